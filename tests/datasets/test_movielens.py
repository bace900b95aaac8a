import os
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlib.schema import DataError, Schema, SequenceField

PROJECT = Path(__file__).resolve().parents[2]
if TYPE_CHECKING:
    from datasets import movielens
else:  # from their folder, as scripts: an installed package may also be called datasets
    sys.path.insert(0, str(PROJECT / "datasets"))
    import movielens

DATA = Path(os.environ.get("CTRLIB_DATA", PROJECT.parent / "shared" / "data")) / "movielens-1m"
USERS = "1::F::1::10::48067\n7::M::56::16::98107-2117\n"
MOVIES = "10::Toy Story (1995)::Animation|Children's|Comedy\n3000::Misérables, Les (1925)::Drama\n"
RATINGS = "7::3000::5::978300760\n1::10::3::978300761\n1::3000::1::978300762\n1::10::4::978300763\n"
COLUMNS = ["label", "user_id", "movie_id", "gender", "age", "occupation", "zip", "release_year", "genres"]
OF_USER_1, OF_USER_7 = ["F", 1, 10, "48067"], ["M", 56, 16, "98107-2117"]
OF_MOVIE_10, OF_MOVIE_3000 = ["1995", ["Animation", "Children's", "Comedy"]], ["1919-1929", ["Drama"]]
ROWS = [
    [1, 7, 3000, *OF_USER_7, *OF_MOVIE_3000],
    [0, 1, 3000, *OF_USER_1, *OF_MOVIE_3000],
    [1, 1, 10, *OF_USER_1, *OF_MOVIE_10],
]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    for name, text in (("users.dat", USERS), ("movies.dat", MOVIES), ("ratings.dat", RATINGS)):
        (folder / name).write_text(text, encoding="latin-1")
    return folder


def test_prepare(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = movielens.prepare(raw, tmp_path / "out")
    assert file.rows == 3
    assert file.positive_rate == pytest.approx(2 / 3)
    table = pq.read_table(file.path)
    assert table.schema.names == [*COLUMNS, "timestamp"]
    text, number = pa.string(), pa.int32()
    types = [pa.int8(), number, number, text, number, number, text, text, pa.list_(text), pa.int64()]
    assert table.schema.types == types
    times = [978300760, 978300762, 978300763]
    assert [list(row.values()) for row in table.to_pylist()] == [[*row, t] for row, t in zip(ROWS, times, strict=True)]
    printed = capsys.readouterr()
    assert "10.1145/2827872" in printed.out
    assert "note: the published set has 739,012 rows" in printed.out
    assert printed.err.count("warning: ") == 3


def test_ratings_without_time(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ratings = pd.DataFrame([[7, 3000, 5], [1, 10, 3], [1, 3000, 1], [1, 10, 4]], columns=["user", "item", "rating"])
    ratings.to_parquet(raw / "ratings.parquet")
    (file,) = movielens.prepare(raw, tmp_path / "out")
    assert "timestamp" in pq.read_schema(file.path).names
    (raw / "ratings.dat").unlink()
    (file,) = movielens.prepare(raw, tmp_path / "out")
    table = pq.read_table(file.path)
    assert table.schema.names == COLUMNS
    assert [list(row.values()) for row in table.to_pylist()] == ROWS
    assert Schema.load(tmp_path / "out" / "schema.json").time is None
    assert "ratings.parquet has no time" in capsys.readouterr().out


def test_schema(raw: Path, tmp_path: Path) -> None:
    path = tmp_path / "out" / "schema.json"
    arguments = ["--raw", str(raw), "--out", str(path.parent)]
    assert movielens.main(arguments) == 0
    schema = Schema.load(path)
    assert [f.name for f in schema.fields] == COLUMNS[1:]
    assert (schema.labels, schema.group, schema.time) == (("label",), "user_id", "timestamp")
    context = {f.name for f in schema.fields if f.side == "context"}
    assert context == {"user_id", "gender", "age", "occupation", "zip"}
    assert schema["genres"] == SequenceField(name="genres", ordered=False, pooling="mean")
    assert schema.ignored == {}

    assert movielens.main([*arguments, "--no-ids"]) == 0
    schema = Schema.load(path)
    assert [f.name for f in schema.fields] == COLUMNS[3:]
    assert schema.group == "user_id"
    assert set(schema.ignored) == {"user_id", "movie_id"}
    assert "user_id" in pq.read_schema(path.with_name("data.parquet")).names


def test_release_buckets() -> None:
    buckets = [movielens.release_bucket(year) for year in range(1919, 2001)]
    assert len(set(buckets)) == 36  # AutoInt's number
    assert buckets[:11] == ["1919-1929"] * 11
    assert buckets[11:51:10] == ["1930s", "1940s", "1950s", "1960s"]
    assert buckets[20] == "1930s"
    assert buckets[50:53] == ["1960s", "1970", "1971"]
    assert buckets[-1] == "2000"
    assert movielens.release_bucket(1918) is None
    assert movielens.release_bucket(2001) is None


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "ratings.dat",
            RATINGS + "1::10::4\n",
            r"ratings\.dat, line 5: 3 cells; expected user_id::movie_id::rating::timestamp",
        ),
        ("ratings.dat", RATINGS + "1::10::x::9\n", r"ratings\.dat, line 5: rating is 'x'; expected an integer"),
        ("ratings.dat", RATINGS + "1::10::6::9\n", r"ratings\.dat, line 5: rating is 6; expected 1 to 5"),
        ("ratings.dat", RATINGS + "2::10::3::9\n", r"ratings\.dat, line 5: user_id 2 is not in users\.dat"),
        ("ratings.dat", RATINGS + "1::11::4::9\n", r"ratings\.dat, line 5: movie_id 11 is not in movies\.dat"),
        ("ratings.dat", RATINGS + "\n", r"ratings\.dat, line 5: 1 cells"),
        ("ratings.dat", "1::10::3::9\n", r"data\.parquet: not written, for the raw file has no rows"),
        ("users.dat", USERS + "x::F::1::10::1\n", r"users\.dat, line 3: user_id is 'x'; expected an integer"),
        ("users.dat", USERS + "7::F::1::10::1\n", r"users\.dat: 1 repeated user_id"),
        ("movies.dat", MOVIES + "4::Nameless::Drama\n", r"movies\.dat, line 3: title is 'Nameless'; .* year"),
        ("movies.dat", MOVIES + "4::Late (2001)::Drama\n", r"movies\.dat, line 3: title is 'Late \(2001\)'; .* year"),
        ("movies.dat", MOVIES + "4|Toy (1995)|Drama\n", r"movies\.dat, line 3: 1 cells"),
    ],
)
def test_bad_raw_file(name: str, text: str, message: str, raw: Path, tmp_path: Path) -> None:
    (raw / name).write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=message):
        movielens.prepare(raw, tmp_path / "out")
    assert not (tmp_path / "out" / "data.parquet").exists()


def test_missing_file(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "users.dat").unlink()
    assert movielens.main(["--raw", str(raw), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {raw}: no users.dat; expected ratings.dat, users.dat, movies.dat")


def test_without_raw_the_archive_is_downloaded(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert movielens.URL == "https://files.grouplens.org/datasets/movielens/ml-1m.zip"
    archive = tmp_path / "ml-1m.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for name in ("ratings.dat", "users.dat", "movies.dat"):
            zipped.write(raw / name, f"ml-1m/{name}")
    monkeypatch.setattr(movielens, "URL", archive.as_uri())
    assert movielens.prepare(None, tmp_path / "out")[0].rows == 3
    (tmp_path / "bad" / "raw").mkdir(parents=True)
    (tmp_path / "bad" / "raw" / "ml-1m.zip").write_text("not a zip file")
    with pytest.raises(DataError, match=r"ml-1m\.zip: not the archive of GroupLens"):
        movielens.prepare(None, tmp_path / "bad")


@pytest.mark.skipif(not DATA.is_dir(), reason="no movielens-1m folder under $CTRLIB_DATA")
def test_real_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = movielens.prepare(DATA, tmp_path)
    assert file.rows == 739_012
    assert capsys.readouterr().err == ""
    table = pq.read_table(file.path)
    assert all(column.null_count == 0 for column in table.columns)
    ratings = pd.read_parquet(DATA / "ratings.parquet").query("rating != 3")
    np.testing.assert_array_equal(table["label"].to_numpy(), (ratings["rating"] >= 4).to_numpy().astype(int))
    np.testing.assert_array_equal(table["user_id"].to_numpy(), ratings["user"].to_numpy())
    np.testing.assert_array_equal(table["movie_id"].to_numpy(), ratings["item"].to_numpy())
    # Independent of the joins: what the raw files say of each rating's user and movie.
    read = {"sep": "::", "engine": "python", "header": None, "encoding": "latin-1", "index_col": 0, "dtype": str}
    users, movies = pd.read_csv(DATA / "users.dat", **read), pd.read_csv(DATA / "movies.dat", **read)
    users.index, movies.index = users.index.astype(int), movies.index.astype(int)
    assert table["zip"].to_pylist() == users[4][ratings["user"]].tolist()
    assert table["gender"].to_pylist() == users[1][ratings["user"]].tolist()
    assert table["genres"].to_pylist() == [genres.split("|") for genres in movies[2][ratings["item"]]]
    assert len(set(table["release_year"].to_pylist())) == 36
    assert len({genre for genres in table["genres"].to_pylist() for genre in genres}) == 18
