"""What the data set scripts share: safe writing, known files, downloads, Parquet, the command line."""

from __future__ import annotations

import argparse
import hashlib
import http.client
import shutil
import sys
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctrlib.files import new_file
from ctrlib.schema import DataError

ROW_GROUP = 500_000  # rows; also what write_parquet holds in memory


@dataclass(frozen=True, slots=True)
class KnownFile:
    """A raw file as it was when a script was written; ``description`` says which edition of the data it is."""

    size: int
    sha256: str
    description: str


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A Parquet file that a script wrote; ``size`` is in bytes, ``positive_rate`` the mean of the label."""

    path: Path
    rows: int
    positive_rate: float
    size: int
    sha256: str


def sha256(path: Path) -> str:
    """Hexadecimal SHA-256 of a file of any size."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_known(path: Path, known: Mapping[str, KnownFile]) -> None:
    """Say whether a raw file is the one known under its name; a warning on stderr where it is another edition."""
    expected = known.get(path.name)
    if expected is None:
        return
    size = path.stat().st_size
    if size != expected.size:  # hashing tens of GB to learn the same would take minutes
        found = f"{size:,} bytes, not {expected.size:,}"
    elif (digest := sha256(path)) != expected.sha256:
        found = f"sha256 {digest}, not {expected.sha256}"
    else:
        print(f"{path}: sha256 matches {expected.description}")
        return
    print(f"warning: {path}: {found} as in {expected.description}; reading it anyway", file=sys.stderr)


def download(url: str, target: Path) -> None:
    """Fetch ``url`` into ``target``, unless it is there already.

    Raises:
        DataError: the address cannot be reached or the transfer broke off.
    """
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"downloading {url}")
    try:
        with new_file(target) as part, urllib.request.urlopen(url, timeout=60) as response:
            with part.open("wb") as file:
                shutil.copyfileobj(response, file)
            promised = response.headers.get("Content-Length")
            if promised is not None and part.stat().st_size != int(promised):
                raise OSError(f"got {part.stat().st_size:,} of {int(promised):,} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise DataError(
            f"cannot download {url} ({error}); fetch the file another way and pass its folder with --raw"
        ) from error


def require_files(raw: Path, *names: str) -> None:
    """Raise :class:`DataError` unless the folder ``raw`` holds every named file."""
    if not raw.is_dir():
        raise DataError(f"{raw}: no such folder; pass the folder of the raw files with --raw")
    missing = [name for name in names if not (raw / name).is_file()]
    if missing:
        raise DataError(f"{raw}: no {' and no '.join(missing)}; expected {', '.join(names)} in the folder given with --raw")


def open_parquet(path: Path, columns: Sequence[str]) -> pq.ParquetFile:
    """Open a Parquet file that must have these columns.

    Raises:
        DataError: the file is not Parquet or lacks a column.
    """
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a Parquet file ({error})") from error
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{path}: no column {', '.join(missing)}; expected {', '.join(columns)}")
    return file


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    pending: list[pa.Table] = []
    rows = 0
    for table in tables:
        pending.append(table)
        rows += table.num_rows
        while rows >= ROW_GROUP:
            joined = pa.concat_tables(pending)
            yield joined.slice(0, ROW_GROUP)
            pending = [joined.slice(ROW_GROUP)]
            rows -= ROW_GROUP
    if rows:
        yield pa.concat_tables(pending)


def write_parquet(tables: Iterable[pa.Table], schema: pa.Schema, target: Path) -> OutputFile:
    """Write tables one after another (zstd, row groups of ``ROW_GROUP``) and print what came out.

    Raises:
        DataError: there is not a single row.
    """
    rows = positives = 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as part:
        with pq.ParquetWriter(part, schema, compression="zstd") as writer:
            for group in _row_groups(tables):
                writer.write_table(group, row_group_size=ROW_GROUP)
                rows += group.num_rows
                positives += pc.sum(group["label"]).as_py()
        if rows == 0:
            raise DataError(f"{target}: not written, for the raw file has no rows")
    written = OutputFile(target, rows, positives / rows, target.stat().st_size, sha256(target))
    print(f"{target}: {rows:,} rows, positive rate {positives / rows:.4f}, {written.size:,} bytes, sha256 {written.sha256}")
    return written


def argument_parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every script has: ``--raw`` and ``--out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--raw", type=Path, help="folder of the raw files; without it they are downloaded where that is possible"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write Parquet and schema.json to")
    return parser


def run(work: Callable[[], object]) -> int:
    """Do the work of a script; returns its exit status: 0, or 2 after printing an error."""
    try:
        work()
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0
