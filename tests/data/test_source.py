"""Every kind of table reads the same; damaged and contradictory input is refused with its place."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlib.data.encoder import Encoder
from ctrlib.data.source import Source, open_source
from ctrlib.schema import DataError, DenseField, Schema, SequenceField, SparseField

RNG = np.random.default_rng(5)
N = 57
ROWS: list[dict[str, Any]] = [
    {
        "label": int(RNG.integers(2)),
        "code": ["007", "7", "", "ä|b", 'quo"te', "two\nlines", None][int(RNG.integers(7))] or None,
        "item": int(RNG.integers(-3, 9)) + 2**60 if RNG.random() > 0.2 else None,
        "price": float(RNG.normal()) if RNG.random() > 0.2 else None,
        "tags": "|".join(str(t) for t in RNG.integers(0, 6, int(RNG.integers(0, 5)))) or None,
    }
    for _ in range(N)
]
SCHEMA = Schema(
    fields=(
        SparseField(name="code"),
        SparseField(name="item"),
        DenseField(name="price"),
        SequenceField(name="tags", separator="|", max_length=3),
    ),
    labels=("label",),
)


def table() -> pa.Table:
    return pa.Table.from_pylist(ROWS)


def as_csv(folder: Path, delimiter: str, name: str) -> str:
    def cell(value: object) -> str:
        text = "" if value is None else repr(value) if isinstance(value, float) else str(value)
        return '"' + text.replace('"', '""') + '"' if any(c in text for c in '"\n\t,') else text

    lines = [delimiter.join(ROWS[0])] + [delimiter.join(cell(v) for v in row.values()) for row in ROWS]
    path = folder / name
    data = ("\n".join(lines) + "\n").encode()
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return str(path)


def as_parquet(folder: Path) -> str:
    pq.write_table(table(), folder / "all.parquet", row_group_size=10)
    return str(folder / "all.parquet")


def as_folder(folder: Path) -> str:
    inner = folder / "parts" / "day=1"
    inner.mkdir(parents=True)
    pq.write_table(table().slice(0, 20), inner / "a.parquet")
    pq.write_table(table().slice(20, 0), inner / "b.parquet")
    pq.write_table(table().slice(20), inner / "c.pq")
    (inner / "_SUCCESS").write_text("")
    (inner / "notes.txt").write_text("not a table")
    (inner / "_temporary").mkdir()
    pq.write_table(table().slice(0, 3), inner / "_temporary" / "draft.parquet")
    return str(folder / "parts")


def as_glob(folder: Path) -> str:
    as_folder(folder)
    (folder / "parts" / "other").mkdir()
    return str(folder / "parts" / "**" / "*[a-c].p*")


def as_csv_folder(folder: Path) -> str:
    text = Path(as_csv(folder, ",", "whole.csv")).read_text(encoding="utf-8")
    # cut where a quoted newline cannot be: pandas finds the rows
    frame = pd.read_csv(folder / "whole.csv", dtype=str, keep_default_na=False)
    assert len(frame) == N
    assert text.startswith("label,code")
    (folder / "csv").mkdir()
    frame.iloc[:30].to_csv(folder / "csv" / "1.csv", index=False)
    frame.iloc[30:].to_csv(folder / "csv" / "2.csv", index=False)
    return str(folder / "csv")


def polars_frame() -> pl.DataFrame:
    return pl.DataFrame(ROWS, infer_schema_length=None)


def pandas_frame() -> pd.DataFrame:
    return pd.DataFrame(
        {name: pd.Series([row[name] for row in ROWS], dtype="Int64" if name == "item" else None) for name in ROWS[0]}
    )


FORMS: dict[str, Callable[[Path], object]] = {
    "csv": lambda p: as_csv(p, ",", "a.csv"),
    "tsv": lambda p: as_csv(p, "\t", "a.tsv"),
    "csv.gz": lambda p: as_csv(p, ",", "a.csv.gz"),
    "csv folder": as_csv_folder,
    "parquet": as_parquet,
    "path object": lambda p: Path(as_parquet(p)),
    "folder": as_folder,
    "glob": as_glob,
    "pandas": lambda _: pandas_frame(),
    "pandas objects": lambda _: pd.DataFrame(ROWS, dtype=object).astype({"price": float, "label": int}),
    "pandas categories": lambda _: pandas_frame().astype({"code": "category", "tags": "category"}),
    "polars": lambda _: polars_frame(),
    "polars lazy": lambda _: polars_frame().lazy(),
    "polars categories": lambda _: polars_frame().with_columns(pl.col("code", "tags").cast(pl.Categorical)),
    "polars chunks": lambda _: pl.concat([polars_frame()[:9], polars_frame()[9:]], rechunk=False),
    "rows": lambda _: ROWS,
    "columns": lambda _: {name: [row[name] for row in ROWS] for name in ROWS[0]},
    "arrow": lambda _: table(),
    "arrow chunks": lambda _: pa.concat_tables([table().slice(0, 5), table().slice(5, 0), table().slice(5)]),
    "arrow dictionary": lambda _: table().set_column(1, "code", table()["code"].dictionary_encode()),
    "arrow null in dictionary": lambda _: table().set_column(
        1, "code", table()["code"].combine_chunks().dictionary_encode(null_encoding="encode")
    ),
    "arrow large strings": lambda _: table().set_column(1, "code", table()["code"].cast(pa.large_string())),
    "arrow string views": lambda _: table().set_column(1, "code", table()["code"].cast(pa.string_view())),
    "arrow dictionary of views": lambda _: table().set_column(
        1,
        "code",
        pa.DictionaryArray.from_arrays(
            (d := table()["code"].combine_chunks().dictionary_encode()).indices.cast(pa.int8()),
            d.dictionary.cast(pa.string_view()),
        ),
    ),
}


@pytest.fixture(scope="module")
def expected() -> tuple[str, list[list[int]], list[list[int]]]:
    """Hash and ids; the ids from loops over the Python rows."""

    def vocabulary(values: list[Any]) -> dict[Any, int]:
        counts: dict[Any, int] = {}
        for v in values:
            counts[v] = counts.get(v, 0) + 1
        # bytes order as Arrow's; null after every value of the same count
        order = sorted(
            counts, key=lambda v: (-counts[v], v is None, v.encode() if isinstance(v, str) else v if v is not None else 0)
        )
        return {v: i + 2 for i, v in enumerate(order)}

    codes, items = (vocabulary([row[n] for row in ROWS]) for n in ("code", "item"))
    tags = vocabulary([t for row in ROWS if row["tags"] for t in row["tags"].split("|")])
    sparse = [[codes[row["code"]], items[row["item"]]] for row in ROWS]
    sequences = [[tags[t] for t in row["tags"].split("|")][-3:] if row["tags"] else [] for row in ROWS]
    return Encoder.fit(SCHEMA, ROWS).hash, sparse, sequences


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_table_gives_the_same_ids(form: str, tmp_path: Path, expected: tuple[str, Any, Any]) -> None:
    data = FORMS[form](tmp_path)
    encoder = Encoder.fit(SCHEMA, data)
    batch = encoder.transform(data, labels=True)
    assert encoder.hash == expected[0]
    assert batch.sparse.tolist() == expected[1]
    tags = batch.sequences["tags"]
    assert [tags.values[a:b].tolist() for a, b in zip(tags.offsets[:-1], tags.offsets[1:], strict=True)] == expected[2]
    assert batch.labels is not None
    assert batch.labels[:, 0].tolist() == [row["label"] for row in ROWS]
    missing = [row["price"] is None for row in ROWS]
    assert batch.dense[:, 0].isnan().tolist() == missing


LISTS = [["a", "b"], [], None, ["b", "c", "a", "a"], ["a"]]


@pytest.mark.parametrize("form", ["rows", "polars", "pandas", "parquet", "large", "fixed", "categories", "chunks"])
def test_lists(form: str, tmp_path: Path) -> None:
    column = pa.array(LISTS, pa.list_(pa.string()))
    data: object = [{"x": v} for v in LISTS]
    want = [[2, 3], [], [], [4, 2, 2], [2]]  # a: 4 times, b: 2, c: 1; the last three
    if form == "polars":
        data = pl.DataFrame({"x": LISTS})
    elif form == "categories":
        data = pl.DataFrame({"x": LISTS}).with_columns(pl.col("x").cast(pl.List(pl.Categorical)))
    elif form == "pandas":
        data = pd.DataFrame({"x": LISTS})
    elif form == "large":
        data = pa.table({"x": column.cast(pa.large_list(pa.large_string()))})
    elif form == "chunks":
        data = pa.concat_tables([pa.table({"x": column.slice(1)}).slice(0, 2), pa.table({"x": column})]).slice(2)
    elif form == "parquet":
        pq.write_table(pa.table({"x": column}), tmp_path / "a.parquet")
        data = tmp_path / "a.parquet"
    elif form == "fixed":
        pq.write_table(pa.table({"x": pa.array([["a", "b"], ["a", "a"]], pa.list_(pa.string(), 2))}), tmp_path / "a.parquet")
        data, want = tmp_path / "a.parquet", [[2, 3], [2, 2]]
    schema = Schema(fields=(SequenceField(name="x", max_length=3),), labels=("y",))
    bag = Encoder.fit(schema, data).transform(data).sequences["x"]
    assert [bag.values[a:b].tolist() for a, b in zip(bag.offsets[:-1], bag.offsets[1:], strict=True)] == want


@pytest.mark.parametrize(
    ("cells", "kind"),
    [
        (["1", "-2", ""], pa.int64()),
        (["9223372036854775807"], pa.int64()),
        (["9223372036854775808", "1"], pa.uint64()),
        (["18446744073709551616"], pa.string()),
        (["9223372036854775808", "-1"], pa.string()),
        (["1", "007"], pa.string()),
        (["007"], pa.string()),
        (["1.5", "007"], pa.string()),
        (["0x10"], pa.string()),
        (["1", "2.5", "1e-3", "NaN", "0.5", "-0.25"], pa.float64()),
        (["9007199254740993", "2.5"], pa.string()),
        (["1", "x"], pa.string()),
        (["+1"], pa.float64()),
        (["", ""], pa.int64()),
    ],
)
def test_csv_columns_become_numbers_only_without_loss(cells: list[str], kind: Any, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("y,x\n" + "".join(f"0,{c}\n" for c in cells))
    assert open_source(tmp_path / "a.csv").types["x"] == kind


def test_a_csv_type_holds_for_all_files_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "1.csv").write_text("x,y\n9007199254740993,1\n")
    (tmp_path / "2.csv").write_text("x,y\n2.5,1\n")
    source = open_source(tmp_path)
    assert source.types["x"] == pa.string()
    assert source.column("x").to_pylist() == ["9007199254740993", "2.5"]


def test_text_learned_from_csv_is_read_as_text_where_all_cells_look_like_numbers(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text("version,tags\n10.0,1|2\n4.4.2,2\n10.0,\n")
    (tmp_path / "valid.csv").write_text("version,tags\n10.0,2\n9.0,1\n")
    fields = (SparseField(name="version"), SequenceField(name="tags", separator="|"))
    encoder = Encoder.fit(Schema(fields=fields, labels=("y",)), tmp_path / "train.csv")
    batch = encoder.transform(tmp_path / "valid.csv")
    assert batch.sparse.tolist() == [[2], [1]]
    assert batch.sequences["tags"].values.tolist() == [2, 3]


@pytest.mark.parametrize("rows", [1, 2, 7, 56, 57, 58])
def test_blocks_have_the_asked_size_and_lose_nothing(rows: int, tmp_path: Path) -> None:
    source = open_source(as_folder(tmp_path))
    blocks = list(source.blocks("item", rows))
    assert [len(b) for b in blocks] == [rows] * (N // rows) + [N % rows] * (N % rows > 0)
    assert [v for b in blocks for v in b.to_pylist()] == [row["item"] for row in ROWS]


def test_selected_rows_and_their_places(tmp_path: Path) -> None:
    source = open_source(as_folder(tmp_path))
    mask = np.arange(N) % 3 == 1
    part = source.select(mask)
    assert part.num_rows == mask.sum()
    assert part.column("code").to_pylist() == [row["code"] for row, m in zip(ROWS, mask, strict=True) if m]
    # position 7 is row 22 of the table (from 0), the third row of the file that starts at row 20
    assert part.locate(7).endswith("c.pq, row 3")
    assert part.locate(0).endswith("a.parquet, row 2")


def test_divided_and_joined(tmp_path: Path) -> None:
    source = open_source(as_folder(tmp_path))
    codes = RNG.integers(0, 4, N).astype(np.uint8)
    parts = source.divide(codes, {"a": 2, "b": 0, "none": 9})
    items = np.array([row["item"] for row in ROWS], object)
    for name, code in (("a", 2), ("b", 0)):
        assert parts[name].column("item").to_pylist() == items[codes == code].tolist()
        assert parts[name].num_rows == (codes == code).sum()
        assert parts[name].chosen(3, 20).tolist() == (codes == code)[3:20].tolist()
    assert parts["none"].num_rows == 0
    both = parts["a"].joined([parts["b"], parts["a"]])
    wanted = (codes == 2) | (codes == 0)
    assert both.num_rows == wanted.sum()
    assert both.column("item").to_pylist() == items[wanted].tolist()
    row = int(np.flatnonzero(wanted)[25])
    assert both.locate(25).endswith(f"row {row + 1}" if row < 20 else f"c.pq, row {row - 19}")


def test_reading_holds_no_more_of_a_long_file_than_of_a_short_one(tmp_path: Path) -> None:
    peaks = []
    for groups in (4, 40):
        path = tmp_path / f"{groups}.parquet"
        values = np.random.default_rng(0).integers(0, 2**62, groups * 20_000)
        pq.write_table(pa.table({"x": values}), path, row_group_size=20_000, use_dictionary=False)
        arrays = open_source(path).arrays("x")
        before = pa.total_allocated_bytes()
        peaks.append(max(pa.total_allocated_bytes() - before for _ in arrays))
    assert peaks[1] < 1.5 * peaks[0]


def test_an_open_source_is_returned_as_it_is() -> None:
    source = open_source(ROWS)
    assert open_source(source) is source


def test_temporary_files_go_with_the_source(tmp_path: Path) -> None:
    source: Source | None = open_source(as_csv(tmp_path, ",", "a.csv"))
    assert source is not None
    folder = source.keep_alive.path  # type: ignore[attr-defined]
    part = source.select(np.ones(N, bool))
    source = None
    assert part.column("code").to_pylist() == [row["code"] for row in ROWS]
    del part
    assert not folder.exists()


# ---------------------------------------------------------------------------------------------------------- bad input


def refused(data: object, *words: str) -> None:
    with pytest.raises(DataError) as caught:
        open_source(data)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    refused(tmp_path / "none.csv", "none.csv", "no such file")
    refused(str(tmp_path / "*.parquet"), "no such file")


def test_unknown_kind(tmp_path: Path) -> None:
    (tmp_path / "a.xlsx").write_text("x")
    refused(tmp_path / "a.xlsx", "a.xlsx", "expected .parquet, .csv or .tsv")
    refused(tmp_path, "holds no .parquet")
    refused(7, "int", "expected a path")


def test_mixed_folder(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x\n1\n")
    pq.write_table(pa.table({"x": [1]}), tmp_path / "b.parquet")
    refused(tmp_path, "several kinds", "csv, parquet")
    (tmp_path / "readme.txt").write_text("x")
    refused(str(tmp_path / "*.[ct]*"), "several kinds", "readme.txt")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.parquet", "a.csv.gz"])
def test_file_of_0_bytes(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"")
    refused(tmp_path / name, name, "empty")


def test_csv_of_blank_lines(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\n\n")
    refused(tmp_path / "a.csv", "a.csv", "empty")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_header_without_rows(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{kind}"
    if kind == "csv":
        path.write_text("x,y\n")
    else:
        pq.write_table(pa.table({"x": pa.array([], pa.int64()), "y": pa.array([], pa.int64())}), path)
    source = open_source(path)
    assert source.num_rows == 0
    assert len(source.column("x")) == 0
    with pytest.raises(DataError, match=rf"a\.{kind} has no training rows"):
        Encoder.fit(Schema(fields=(SparseField(name="x"),), labels=("y",)), source)
    with pytest.raises(DataError, match=rf"a\.{kind} has a header but no rows"):
        Schema.infer(source, "y")


@pytest.mark.parametrize("keep", [3, 200, -4])
def test_truncated_parquet(keep: int, tmp_path: Path) -> None:
    path = Path(as_parquet(tmp_path))
    path.write_bytes(path.read_bytes()[:keep])
    refused(path, "all.parquet", "damaged or cut short")


def test_parquet_with_damaged_pages(tmp_path: Path) -> None:
    path = Path(as_parquet(tmp_path))
    data = bytearray(path.read_bytes())
    for at in range(4, 300):
        data[at] ^= 0xFF
    path.write_bytes(data)
    source = open_source(path)
    with pytest.raises(DataError, match=r"all\.parquet.*damaged"):
        source.column("label")


@pytest.mark.parametrize(("line", "found"), [("8", "got 1"), ("8,9,10", "got 3")])
@pytest.mark.parametrize("before", [1, 100_000])
def test_csv_row_of_another_length(line: str, found: str, before: int, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n" + "1,2\n" * before + line + "\n3,4\n")
    refused(tmp_path / "a.csv", "a.csv", f"Row #{before + 2}", "Expected 2 columns", found)


@pytest.mark.parametrize("content", [b"x,y\na,1\n\xff\xfe,2\n", b"\xffx,y\na,1\n"])
def test_not_utf8(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    refused(tmp_path / "a.csv", "a.csv", "not UTF-8", *(["Row #3"] if content[0] != 0xFF else []))


def test_damaged_gzip(tmp_path: Path) -> None:
    whole = Path(as_csv(tmp_path, ",", "a.csv.gz"))
    whole.write_bytes(whole.read_bytes()[:-20])
    refused(whole, "a.csv.gz")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,x\n1,2\n")
    refused(tmp_path / "a.csv", "a.csv", "two columns named 'x'")
    refused(pd.DataFrame([[1, 2]], columns=["x", "x"]), "two columns named 'x'")
    refused(pd.DataFrame([[1, 2]], columns=[1, "1"]), "two columns named '1'")
    both = pa.Table.from_arrays([pa.array([1]), pa.array([2])], names=["x", "x"])
    refused(both, "two columns named 'x'")
    pq.write_table(both, tmp_path / "a.parquet")
    refused(tmp_path / "a.parquet", "a.parquet", "two columns named 'x'")


def test_files_of_different_schemas(tmp_path: Path) -> None:
    for kind, wrong in (("type", pa.table({"x": ["1"], "y": [1]})), ("column", pa.table({"x": [1]}))):
        folder = tmp_path / kind
        folder.mkdir()
        pq.write_table(pa.table({"x": [1], "y": [1]}), folder / "1.parquet")
        pq.write_table(wrong, folder / "2.parquet")
        refused(folder, "2.parquet", "1.parquet", "'x' is string" if kind == "type" else "'y' is missing")
    (tmp_path / "1.csv").write_text("x,y\n1,2\n")
    (tmp_path / "2.csv").write_text("y,x\n1,2\n")
    refused(str(tmp_path / "*.csv"), "2.csv", "header differs", "1.csv")


def test_values_of_several_kinds_in_memory() -> None:
    refused(pd.DataFrame({"x": [1, "a"]}), "mixes kinds", "column x")
    refused([{"x": 1}, {"x": "a"}], "mixes kinds")
    refused({"x": [1, 2], "y": [1]}, "length")


def test_missing_column_names_the_nearest() -> None:
    with pytest.raises(DataError, match=r"has no column 'cod'.*did you mean 'code'.*columns: label, code"):
        open_source(ROWS).require(["cod"])


def test_fingerprints_name_the_raw_files(tmp_path: Path) -> None:
    path = Path(as_csv(tmp_path, ",", "a.csv"))
    assert open_source(path).fingerprint() == [
        {"path": str(path.resolve()), "bytes": path.stat().st_size, "mtime_ns": path.stat().st_mtime_ns}
    ]
    assert json.dumps(open_source(ROWS).fingerprint()) == "[]"


def test_a_glob_reads_folders_that_are_named_as_tables(tmp_path: Path) -> None:
    """As Spark writes them."""
    for day in ("d1.parquet", "d2.parquet"):
        (tmp_path / day).mkdir()
        pq.write_table(table().slice(0, 3), tmp_path / day / "part-0.parquet")
    pq.write_table(table().slice(0, 4), tmp_path / "x.parquet")
    assert open_source(str(tmp_path / "*.parquet")).num_rows == 10


def test_what_is_no_table_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "artifact.json").write_text("{}")
    pq.write_table(table(), tmp_path / "artifact" / "vocabulary.parquet")
    with pytest.raises(DataError, match="the folder is a run, an artifact or an encoder, not a table"):
        open_source(str(tmp_path))


def test_categories_of_files_with_other_codes(tmp_path: Path) -> None:
    """100 values of eight bits a file are 200 values together."""
    for day in range(2):
        codes = pa.array(np.arange(100, dtype=np.int8))
        values = pa.array([f"{day}-{i}" for i in range(100)])
        pq.write_table(pa.table({"c": pa.DictionaryArray.from_arrays(codes, values)}), tmp_path / f"{day}.parquet")
    column = open_source(str(tmp_path)).column("c")
    assert len(column) == 200
    assert len(set(column.to_pylist())) == 200
