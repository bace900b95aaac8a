"""MovieLens-1M as clicks, as AutoInt (arXiv:1810.11921) does it: more than 3 stars is 1, fewer is 0, 3 stars are left out.

    python datasets/movielens.py [--raw DIR] --out DIR [--no-ids]

The raw folder holds ratings.dat (or ratings.parquet with user, item, rating and no time), users.dat and movies.dat. Writes
data.parquet and schema.json; no split is published.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING or __package__:
    from . import common
else:  # a script: Python looks in this folder, not in the project's, and ctrlib need not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import common
from ctrlib.files import new_file
from ctrlib.schema import DataError, Field, Schema, SequenceField, SparseField

URL = "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
TERMS = (
    "MovieLens-1M, GroupLens, University of Minnesota: for research, no commercial use and no redistribution without\n"
    "permission, no implied endorsement; cite F. M. Harper and J. A. Konstan, 'The MovieLens Datasets: History and Context',\n"
    "ACM TiiS 5(4), 2015, doi:10.1145/2827872."
)
RATINGS, RATINGS_PARQUET, USERS, MOVIES = "ratings.dat", "ratings.parquet", "users.dat", "movies.dat"
KNOWN = {
    "ml-1m.zip": common.KnownFile(
        5_917_549, "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20", "the archive of GroupLens"
    ),
    RATINGS: common.KnownFile(
        24_594_131, "506d64ca44484487c11dc2d9a28de5c54948213e6b96285e298afe28d6ea4e0f", "the file of GroupLens"
    ),
    RATINGS_PARQUET: common.KnownFile(
        1_832_189, "d672ceb69bc342e7fefd02f053c239c152cf1774d913e8cecaada2c768a74f28", "the ratings rebuilt without their time"
    ),
    USERS: common.KnownFile(
        134_368, "1dc3a95300cb19f7c10e027daf29b8cdf1d908dab65b5edfb45950aa389a10a3", "the file of GroupLens"
    ),
    MOVIES: common.KnownFile(
        171_308, "0140fc2356357c1a851d0f52e893a1e4d3696df632c4141cea8d5bc3d621f0b9", "the file of GroupLens"
    ),
}
RATED_ROWS = 739_012  # with more or fewer than 3 stars (AutoInt, Table 1)
TITLE_YEAR = re.compile(r"\((\d{4})\)$")
IDS = ("user_id", "movie_id")
USER_COLUMNS = ("user_id", "gender", "age", "occupation", "zip")


def make_schema(*, ids: bool = True, time: bool = False) -> Schema:
    """The fields; rows are grouped by user for GAUC in either case.

    Args:
        ids: make fields of ``user_id`` and ``movie_id``, which AutoInt leaves out.
        time: the data has the column ``timestamp``.
    """
    sparse = (*(IDS if ids else ()), "gender", "age", "occupation", "zip", "release_year")
    fields: list[Field] = [SparseField(name=n, side="context" if n in USER_COLUMNS else "candidate") for n in sparse]
    return Schema(
        fields=(*fields, SequenceField(name="genres", ordered=False, pooling="mean")),
        labels=("label",),
        group="user_id",
        time="timestamp" if time else None,
        ignored={} if ids else dict.fromkeys(IDS, "an id, left out as in AutoInt (arXiv:1810.11921)"),
    )


def release_bucket(year: int) -> str | None:
    """AutoInt's 36 buckets: ``1919-1929``, the decades ``1930s`` to ``1960s``, then single years up to 2000."""
    if not 1919 <= year <= 2000:
        return None
    if year < 1930:
        return "1919-1929"
    return f"{year // 10}0s" if year < 1970 else str(year)


def _read_dat(path: Path, names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    with path.open(encoding="latin-1") as file:
        for number, line in enumerate(file, start=1):
            cells = line.rstrip("\r\n").split("::")
            if len(cells) != len(names):
                raise DataError(f"{path}, line {number}: {len(cells)} cells; expected {'::'.join(names)}")
            yield number, cells


def _integer(cell: str, name: str, path: Path, number: int) -> int:
    try:
        return int(cell)
    except ValueError:
        raise DataError(f"{path}, line {number}: {name} is {cell[:40]!r}; expected an integer") from None


def _read_users(path: Path) -> pa.Table:
    columns: dict[str, list[int | str]] = {name: [] for name in USER_COLUMNS}
    for number, cells in _read_dat(path, USER_COLUMNS):
        for name, cell in zip(USER_COLUMNS, cells, strict=True):
            columns[name].append(cell if name in ("gender", "zip") else _integer(cell, name, path, number))
    types = [
        ("user_id", pa.int32()),
        ("gender", pa.string()),
        ("age", pa.int32()),
        ("occupation", pa.int32()),
        ("zip", pa.string()),
    ]
    return pa.table(columns, schema=pa.schema(types))


def _read_movies(path: Path) -> pa.Table:
    movie_ids: list[int] = []
    buckets: list[str] = []
    genres: list[list[str]] = []
    words: list[list[str]] = []
    for number, (movie_id, title, genre_names) in _read_dat(path, ("movie_id", "title (year)", "genre|genre")):
        year = TITLE_YEAR.search(title)
        bucket = release_bucket(int(year[1])) if year else None
        if bucket is None:
            raise DataError(f"{path}, line {number}: title is {title[-40:]!r}; expected it to end in a year, (1919) to (2000)")
        movie_ids.append(_integer(movie_id, "movie_id", path, number))
        buckets.append(bucket)
        genres.append(genre_names.split("|"))
        words.append(re.findall(r"\w+", TITLE_YEAR.sub("", title).lower()))
    texts = pa.list_(pa.string())
    types = [("movie_id", pa.int32()), ("release_year", pa.string()), ("genres", texts), ("title", texts)]
    return pa.table([movie_ids, buckets, genres, words], schema=pa.schema(types))


def _read_ratings(path: Path) -> dict[str, npt.NDArray[np.int64]]:
    if path.name == RATINGS_PARQUET:
        table = common.open_parquet(path, ("user", "item", "rating")).read()
        columns = {"user_id": table["user"], "movie_id": table["item"], "rating": table["rating"]}
        for name, column in columns.items():
            if not pa.types.is_integer(column.type) or column.null_count:
                raise DataError(f"{path}: {name} is {column.type} with {column.null_count} nulls; expected integers")
        return {name: column.to_numpy().astype(np.int64) for name, column in columns.items()}
    names = ("user_id", "movie_id", "rating", "timestamp")
    rows = [
        [_integer(cell, name, path, number) for name, cell in zip(names, cells, strict=True)]
        for number, cells in _read_dat(path, names)
    ]
    return dict(zip(names, np.array(rows, dtype=np.int64).reshape(-1, len(names)).T, strict=True))


def _place(ratings: Path, index: int) -> str:
    return f"{ratings}, {'row' if ratings.name == RATINGS_PARQUET else 'line'} {index + 1}"


def _rows_of(ids: npt.NDArray[np.int64], ratings: Path, key: str, table: pa.Table, source: Path) -> npt.NDArray[np.int64]:
    """For every rating, the row of ``table`` (read from ``source``) whose ``key`` is its id."""
    row_of = {known: row for row, known in enumerate(table[key].to_pylist())}
    if len(row_of) != table.num_rows:
        raise DataError(f"{source}: {table.num_rows - len(row_of)} repeated {key}; expected one line for each")
    rows = np.array([row_of.get(one, -1) for one in ids.tolist()], dtype=np.int64)
    unknown = np.flatnonzero(rows < 0)
    if unknown.size:
        raise DataError(f"{_place(ratings, unknown[0])}: {key} {ids[unknown[0]]} is not in {source.name}")
    return rows


def _fetch(folder: Path) -> None:
    archive = folder / "ml-1m.zip"
    common.download(URL, archive)
    common.check_known(archive, KNOWN)
    try:
        with zipfile.ZipFile(archive) as zipped:
            for name in (RATINGS, USERS, MOVIES):
                with zipped.open(f"ml-1m/{name}") as source, new_file(folder / name) as part, part.open("wb") as target:
                    shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{archive}: not the archive of GroupLens ({error}); delete it and start again") from error


@dataclass(frozen=True, kw_only=True)
class Ratings:
    """All ratings, in the order of their file, and what is known of users and movies.

    Attributes:
        file: of the ratings.
        users, movies: a row each; of a movie ``movie_id``, ``release_year``, ``genres`` and ``title`` (its words).
        user_row, movie_row: for every rating, the row of its user and of its movie.
        stars: 1 to 5.
        timestamp: ``None`` where the file has none.
    """

    file: Path
    users: pa.Table
    movies: pa.Table
    user_row: npt.NDArray[np.int64]
    movie_row: npt.NDArray[np.int64]
    stars: npt.NDArray[np.int64]
    timestamp: npt.NDArray[np.int64] | None


def read(raw: Path | None, out: Path) -> Ratings:
    """Read the raw files; without ``raw`` they are first downloaded to ``out/raw``.

    Raises:
        DataError: a raw file is missing, cannot be downloaded, or is not what its name says.
    """
    if raw is None:
        raw = out / "raw"
        _fetch(raw)
    name = RATINGS_PARQUET if not (raw / RATINGS).is_file() and (raw / RATINGS_PARQUET).is_file() else RATINGS
    common.require_files(raw, name, USERS, MOVIES)
    for known in (name, USERS, MOVIES):
        common.check_known(raw / known, KNOWN)
    users, movies, ratings = _read_users(raw / USERS), _read_movies(raw / MOVIES), _read_ratings(raw / name)
    stars = ratings["rating"]
    wrong = np.flatnonzero((stars < 1) | (stars > 5))
    if wrong.size:
        raise DataError(f"{_place(raw / name, wrong[0])}: rating is {stars[wrong[0]]}; expected 1 to 5 stars")
    return Ratings(
        file=raw / name,
        users=users,
        movies=movies,
        user_row=_rows_of(ratings["user_id"], raw / name, "user_id", users, raw / USERS),
        movie_row=_rows_of(ratings["movie_id"], raw / name, "movie_id", movies, raw / MOVIES),
        stars=stars,
        timestamp=ratings.get("timestamp"),
    )


def prepare(raw: Path | None, out: Path, *, ids: bool = True) -> tuple[common.OutputFile, ...]:
    """Write ``data.parquet``, in the order of the ratings, and the schema.

    Columns: ``label`` int8; ``user_id``, ``movie_id``, ``age``, ``occupation`` int32; ``gender``, ``zip``, ``release_year``
    strings; ``genres`` lists of strings; ``timestamp`` int64, where the ratings have one.

    Args:
        raw: folder of the raw files; ``None``: download them to ``out/raw``.
        out: folder to write to.
        ids: see :func:`make_schema`.

    Returns:
        One file.

    Raises:
        DataError: a raw file is missing, cannot be downloaded, or is not what its name says.
    """
    data = read(raw, out)
    kept = data.stars != 3
    of_user, of_movie = data.users.take(pa.array(data.user_row[kept])), data.movies.take(pa.array(data.movie_row[kept]))
    columns = {
        "label": pa.array((data.stars[kept] > 3).astype(np.int8)),
        "user_id": of_user["user_id"],
        "movie_id": of_movie["movie_id"],
        **{column: of_user[column] for column in USER_COLUMNS[1:]},
        "release_year": of_movie["release_year"],
        "genres": of_movie["genres"],
    }
    if data.timestamp is not None:
        columns["timestamp"] = pa.array(data.timestamp[kept])
    else:
        print(f"note: {data.file.name} has no time, one of the seven fields of AutoInt; the original {RATINGS} has it")
    table = pa.table(columns)
    file = common.write_parquet([table], table.schema, out / "data.parquet")
    if file.rows != RATED_ROWS:
        print(f"note: the published set has {RATED_ROWS:,} rows")
    make_schema(ids=ids, time=data.timestamp is not None).save(out / "schema.json")
    print(TERMS)
    return (file,)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.argument_parser(__doc__)
    parser.add_argument(
        "--ids", action=argparse.BooleanOptionalAction, default=True, help="user_id and movie_id are features (default: yes)"
    )
    args = parser.parse_args(argv)
    return common.run(lambda: prepare(args.raw, args.out, ids=args.ids))


if __name__ == "__main__":
    sys.exit(main())
