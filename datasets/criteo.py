"""Criteo display advertising: 13 counts and 26 hashed categories for each ad shown, clicked or not.

    python datasets/criteo.py --raw DIR_OR_FILE --out DIR [--format kaggle|parquet] [--numeric log] [--min-count 10]

Reads the Kaggle challenge's train.txt, or Parquet files with the columns label, I1..I13, C1..C26. Writes data.parquet and
schema.json; neither set has a published split. Rows stream through, so the size of the raw files does not matter.
"""

from __future__ import annotations

import itertools
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pcsv

if TYPE_CHECKING or __package__:
    from . import common
else:  # a script: Python looks in this folder, not in the project's, and ctrlib need not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import common
from ctrlib.schema import DataError, DenseField, Schema, SparseField

FileFormat = Literal["kaggle", "parquet"]
Numeric = Literal["log", "criteo_log", "piecewise", "standardize"]

KAGGLE_URL = "https://www.kaggle.com/c/criteo-display-ad-challenge"
TERABYTE_URL = "https://ailab.criteo.com/download-criteo-1tb-click-logs-dataset/"
TERMS = {
    "kaggle": f"Criteo Labs, Display Advertising Challenge (Kaggle, 2014): Criteo's terms at {KAGGLE_URL} hold (research use).",
    "parquet": f"Criteo 1TB Click Logs, Criteo AI Lab: CC BY-NC-SA 4.0, attribution to Criteo, non-commercial; {TERABYTE_URL}",
}
KNOWN = {
    "train.txt": common.KnownFile(
        9_863_352, "d3a0d64e994a74e4a445851c71874055cf15bb3652997a9c3747c57ca066f5ab", "the sample of 40,604 Kaggle rows"
    ),
    "sample.parquet": common.KnownFile(
        5_102_038, "6f94d225a53739842348e0bd717c702fc5f20f934f4d38b0f5ebb82ac1094c8d", "the sample of 80,000 rows"
    ),
}
KAGGLE_ROWS = 45_840_617

DENSE = tuple(f"I{i}" for i in range(1, 14))
SPARSE = tuple(f"C{i}" for i in range(1, 27))
COLUMNS = ("label", *DENSE, *SPARSE)
KAGGLE_SCHEMA = pa.schema(
    [("label", pa.int8()), *((name, pa.int32()) for name in DENSE), *((name, pa.string()) for name in SPARSE)]
)
INTEGER = re.compile(r"-?\d+")


def make_schema(numeric: Numeric = "piecewise", min_count: int = 10) -> Schema:
    """13 numeric and 26 categorical fields; what they mean is not public, so all are on the candidate's side.

    Args:
        numeric: how the counts enter the model.
        min_count: rarer categories share one id; also those that ``criteo_log`` makes of the counts.
    """
    dense_count = min_count if numeric == "criteo_log" else 1
    return Schema(
        fields=(
            *(DenseField(name=name, encoding=numeric, min_count=dense_count) for name in DENSE),
            *(SparseField(name=name, min_count=min_count) for name in SPARSE),
        ),
        labels=("label",),
    )


def _detect(raw: Path) -> FileFormat:
    if raw.is_file():
        return "parquet" if raw.suffix == ".parquet" else "kaggle"
    has_text, has_parquet = (raw / "train.txt").is_file(), any(raw.glob("*.parquet"))
    if has_text and has_parquet:
        raise DataError(f"{raw}: holds train.txt and *.parquet files; choose with --format kaggle or --format parquet")
    if not has_text and not has_parquet:
        raise DataError(f"{raw}: holds neither train.txt nor *.parquet files; pass the folder that does with --raw")
    return "kaggle" if has_text else "parquet"


def _labels_are_wrong(label: pa.ChunkedArray) -> bool:
    return bool(label.null_count or pc.any(pc.or_(pc.less(label, 0), pc.greater(label, 1))).as_py())


def _line_error(path: Path, skip: int, cause: str) -> DataError:
    """Find the first bad line after ``skip`` good ones: the fast reader does not say enough."""
    with path.open("rb") as file:
        for number, line in enumerate(itertools.islice(file, skip, None), start=skip + 1):
            cells = line.rstrip(b"\r\n").decode("utf-8", errors="replace").split("\t")
            if len(cells) != len(COLUMNS):
                hint = "; test.txt of the challenge has no label" if len(cells) == len(COLUMNS) - 1 else ""
                return DataError(f"{path}, line {number}: {len(cells)} cells; expected {len(COLUMNS)} separated by tabs{hint}")
            if cells[0] not in ("0", "1"):
                return DataError(f"{path}, line {number}: label is {cells[0][:40]!r}; expected 0 or 1")
            for name, cell in zip(COLUMNS[1:], cells[1:], strict=True):
                if name in DENSE and cell and not (INTEGER.fullmatch(cell) and -(2**31) <= int(cell) < 2**31):
                    return DataError(f"{path}, line {number}: {name} is {cell[:40]!r}; expected a 32-bit integer or nothing")
                if "\ufffd" in cell:
                    return DataError(f"{path}, line {number}: {name} is {cell[:40]!r}; expected UTF-8 text")
    return DataError(f"{path}: not in the format of the Kaggle challenge ({cause})")


def _kaggle_tables(path: Path) -> Iterator[pa.Table]:
    rows = 0
    try:
        reader = pcsv.open_csv(
            path,
            read_options=pcsv.ReadOptions(column_names=COLUMNS, block_size=8 << 20),
            # An empty line becomes a row of nulls, so that rows stay lines and the label check finds it.
            parse_options=pcsv.ParseOptions(delimiter="\t", quote_char=False, ignore_empty_lines=False),
            convert_options=pcsv.ConvertOptions(column_types=KAGGLE_SCHEMA, null_values=[""], strings_can_be_null=True),
        )
        for batch in reader:
            table = pa.Table.from_batches([batch])
            if _labels_are_wrong(table["label"]):
                raise _line_error(path, rows, "labels")
            rows += table.num_rows
            yield table
    except pa.ArrowInvalid as error:
        raise _line_error(path, rows, str(error)) from error


def _parquet_schema(paths: Sequence[Path]) -> pa.Schema:
    """The columns as they are, the label as int8; every file must have the same types."""
    types: dict[str, pa.DataType] = {}
    for path in paths:
        found = common.open_parquet(path, COLUMNS).schema_arrow
        for name in COLUMNS:
            kind = found.field(name).type
            is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
            if name in SPARSE and not (pa.types.is_integer(kind) or is_text):
                raise DataError(
                    f"{path}: column {name} is {kind}; expected integers or strings, as floats cannot hold 64-bit ids"
                )
            if name in DENSE and not (pa.types.is_integer(kind) or pa.types.is_floating(kind)):
                raise DataError(f"{path}: column {name} is {kind}; expected numbers")
            if name == "label" and not pa.types.is_integer(kind):
                raise DataError(f"{path}: column label is {kind}; expected integers, 0 or 1")
            if types.setdefault(name, kind) != kind:
                raise DataError(f"{path}: column {name} is {kind}; expected {types[name]} as in {paths[0]}")
    return pa.schema([("label", pa.int8()), *((name, types[name]) for name in COLUMNS[1:])])


def _parquet_tables(paths: Sequence[Path], schema: pa.Schema) -> Iterator[pa.Table]:
    for path in paths:
        rows = 0
        try:
            for batch in common.open_parquet(path, COLUMNS).iter_batches(batch_size=65_536, columns=list(COLUMNS)):
                table = pa.Table.from_batches([batch]).select(list(COLUMNS))
                if _labels_are_wrong(table["label"]):
                    wrong = next(i for i, value in enumerate(table["label"].to_pylist()) if value not in (0, 1))
                    raise DataError(f"{path}, row {rows + wrong + 1}: label is {table['label'][wrong]}; expected 0 or 1")
                rows += table.num_rows
                yield table.cast(schema)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(f"{path}: cannot be read after row {rows:,} ({error}); fetch it again") from error


def prepare(
    raw: Path | None, out: Path, *, file_format: FileFormat | None = None, numeric: Numeric = "piecewise", min_count: int = 10
) -> tuple[common.OutputFile, ...]:
    """Write ``data.parquet`` and the schema, in the order of the raw rows; missing cells are nulls.

    Kaggle: ``label`` int8, ``I*`` int32, ``C*`` strings. Parquet: ``label`` int8, the rest with the types that it has.

    Args:
        raw: folder of ``train.txt`` or of ``*.parquet``, or one such file.
        out: folder to write to.
        file_format: ``None``: look at ``raw``.
        numeric, min_count: see :func:`make_schema`.

    Returns:
        One file.

    Raises:
        DataError: ``raw`` is ``None`` or missing, or a row is not what it should be; names file and line.
    """
    if raw is None:
        raise DataError(
            f"Criteo's data needs a login and consent to its terms, so it cannot be downloaded here: get the Kaggle set from "
            f"{KAGGLE_URL} or the 1TB logs from {TERABYTE_URL} and pass the folder with --raw"
        )
    if not raw.exists():
        raise DataError(f"{raw}: no such file or folder; pass the folder of train.txt or of *.parquet files with --raw")
    if raw.resolve() == out.resolve():
        raise DataError(f"{out}: --out is the raw folder, where data.parquet would be read as raw data; choose another")
    schema = make_schema(numeric, min_count)
    file_format = file_format or _detect(raw)
    if file_format == "kaggle":
        if raw.is_dir():
            common.require_files(raw, "train.txt")
        path = raw / "train.txt" if raw.is_dir() else raw
        common.check_known(path, KNOWN)
        file = common.write_parquet(_kaggle_tables(path), KAGGLE_SCHEMA, out / "data.parquet")
        if file.rows != KAGGLE_ROWS:
            print(f"note: the complete Kaggle training set has {KAGGLE_ROWS:,} rows")
    else:
        paths = sorted(raw.glob("*.parquet")) if raw.is_dir() else [raw]
        if not paths:
            raise DataError(f"{raw}: no *.parquet files; expected at least one in the folder given with --raw")
        for path in paths:
            common.check_known(path, KNOWN)
        arrow_schema = _parquet_schema(paths)
        file = common.write_parquet(_parquet_tables(paths, arrow_schema), arrow_schema, out / "data.parquet")
    schema.save(out / "schema.json")
    print(TERMS[file_format])
    return (file,)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = common.argument_parser(__doc__)
    parser.add_argument("--format", choices=get_args(FileFormat), help="of the raw files; found out by itself where left out")
    parser.add_argument(
        "--numeric", choices=get_args(Numeric), default="piecewise", help="encoding of I1..I13 (default: piecewise)"
    )
    parser.add_argument("--min-count", type=int, default=10, help="rarer categories share one id (default: 10)")
    args = parser.parse_args(argv)
    return common.run(
        lambda: prepare(args.raw, args.out, file_format=args.format, numeric=args.numeric, min_count=args.min_count)
    )


if __name__ == "__main__":
    sys.exit(main())
