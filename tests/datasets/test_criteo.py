import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlib.schema import DataError, DenseField, Schema, SparseField

PROJECT = Path(__file__).resolve().parents[2]
if TYPE_CHECKING:
    from datasets import criteo
else:  # from their folder, as scripts: an installed package may also be called datasets
    sys.path.insert(0, str(PROJECT / "datasets"))
    import criteo

DATA = Path(os.environ.get("CTRLIB_DATA", PROJECT.parent / "shared" / "data"))
DENSE = [f"I{i}" for i in range(1, 14)]
SPARSE = [f"C{i}" for i in range(1, 27)]
COLUMNS = ["label", *DENSE, *SPARSE]
FIRST = [
    "1",
    "-3",
    "",
    "70000",
    "2147483647",
    "-2147483648",
    *["0"] * 8,
    "68fd1e64",
    "",
    "NA",
    "null",
    '"a',
    *["05db9164"] * 21,
]
SECOND = ["0", *[""] * 39]


def write_lines(folder: Path, *lines: Sequence[str]) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "train.txt").write_text("".join("\t".join(line) + "\n" for line in lines))
    return folder


def changed(name: str, cell: str) -> list[str]:
    line = list(FIRST)
    line[COLUMNS.index(name)] = cell
    return line


def write_frame(path: Path, labels: Sequence[int | None], sparse: Sequence[object]) -> pd.DataFrame:
    """One row a label; every C column holds ``sparse``."""
    path.parent.mkdir(exist_ok=True)
    dense = {name: pd.array([i, None, *range(len(labels) - 2)], dtype="Int64") for i, name in enumerate(DENSE)}
    frame = pd.DataFrame({"label": pd.array(labels, dtype="Int64"), **dict.fromkeys(SPARSE, sparse), **dense, "extra": 1})
    frame.to_parquet(path)
    return frame


def test_kaggle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_lines(tmp_path / "raw", FIRST, SECOND, FIRST)
    (file,) = criteo.prepare(raw, tmp_path / "out")
    assert file.rows == 3
    assert file.positive_rate == pytest.approx(2 / 3)
    table = pq.read_table(file.path)
    assert table.schema.names == COLUMNS
    assert table.schema.types == [pa.int8()] + [pa.int32()] * 13 + [pa.string()] * 26
    first, second, third = table.to_pylist()
    assert list(first.values()) == [
        *[1, -3, None, 70000, 2147483647, -2147483648, *[0] * 8],
        *["68fd1e64", None, "NA", "null", '"a', *["05db9164"] * 21],
    ]
    assert list(second.values()) == [0, *[None] * 39]
    assert third == first
    printed = capsys.readouterr()
    assert "kaggle.com/c/criteo-display-ad-challenge" in printed.out
    assert "45,840,617" in printed.out
    assert "warning: " in printed.err
    # A file given directly, in the last line no line end.
    (raw / "train.txt").rename(raw / "rows.tsv")
    (raw / "rows.tsv").write_text("\t".join(FIRST))
    assert criteo.prepare(raw / "rows.tsv", tmp_path / "out")[0].rows == 1


def test_schema_options(tmp_path: Path) -> None:
    raw, out = write_lines(tmp_path / "raw", FIRST), tmp_path / "out"
    arguments = ["--raw", str(raw), "--out", str(out)]
    assert criteo.main(arguments) == 0
    schema = Schema.load(out / "schema.json")
    assert schema.labels == ("label",)
    assert schema.fields == (
        *(DenseField(name=name, encoding="piecewise") for name in DENSE),
        *(SparseField(name=name, min_count=10) for name in SPARSE),
    )
    assert criteo.main([*arguments, "--numeric", "criteo_log", "--min-count", "4"]) == 0
    schema = Schema.load(out / "schema.json")
    assert schema["I13"] == DenseField(name="I13", encoding="criteo_log", min_count=4)
    assert schema["C1"] == SparseField(name="C1", min_count=4)
    assert criteo.main([*arguments, "--min-count", "0"]) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (FIRST[:-1], "39 cells; expected 40 .*test.txt"),
        ([*FIRST, "x"], "41 cells; expected 40"),
        ([""], "1 cells; expected 40"),
        (changed("label", "2"), "label is '2'; expected 0 or 1"),
        (changed("label", "-1"), "label is '-1'; expected 0 or 1"),
        (changed("label", ""), "label is ''; expected 0 or 1"),
        (changed("label", "300"), "label is '300'; expected 0 or 1"),
        (changed("I3", "abc"), "I3 is 'abc'; expected a 32-bit integer"),
        (changed("I3", "1.5"), "I3 is '1.5'; expected a 32-bit integer"),
        (changed("I13", "2147483648"), "I13 is '2147483648'; expected a 32-bit integer"),
    ],
)
def test_bad_line(line: list[str], message: str, tmp_path: Path) -> None:
    raw = write_lines(tmp_path / "raw", FIRST, SECOND, line, FIRST)
    with pytest.raises(DataError, match=rf"train\.txt, line 3: {message}"):
        criteo.prepare(raw, tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("line", [FIRST[:-1], changed("label", "7"), changed("I1", "x")])
def test_bad_line_far_into_the_file(line: list[str], tmp_path: Path) -> None:
    raw = write_lines(tmp_path / "raw", *[FIRST] * 80_000, line)  # 20 MB, several blocks
    with pytest.raises(DataError, match=r"train\.txt, line 80001: "):
        criteo.prepare(raw, tmp_path / "out")


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    raw = write_lines(tmp_path / "raw", FIRST, FIRST)
    path = raw / "train.txt"
    path.write_bytes(path.read_bytes().replace(b"68fd1e64", b"68fd\xff64"))
    with pytest.raises(DataError, match=r"line 1: C1 is .*; expected UTF-8"):
        criteo.prepare(raw, tmp_path / "out")


def test_empty_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"train\.txt: not in the format"):
        criteo.prepare(write_lines(tmp_path / "raw"), tmp_path / "out")


def test_parquet_keeps_wide_ids(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wide = [2**53 + 1, 2**63 - 1, -(2**63)]
    write_frame(tmp_path / "raw" / "part-1.parquet", [0, 1, 1], pd.array([*wide[:2], None], dtype="Int64"))
    write_frame(tmp_path / "raw" / "part-0.parquet", [1, 0], pd.array([wide[2], 5], dtype="Int64"))
    (file,) = criteo.prepare(tmp_path / "raw", tmp_path / "out")
    table = pq.read_table(file.path)
    assert table.schema.names == COLUMNS
    assert table.schema.types == [pa.int8()] + [pa.int64()] * 39
    for name in SPARSE:
        assert table[name].to_pylist() == [wide[2], 5, *wide[:2], None]
    assert table["label"].to_pylist() == [1, 0, 0, 1, 1]
    assert table["I3"].to_pylist() == [2, None, 2, None, 0]
    assert "Criteo 1TB" in capsys.readouterr().out
    assert len(Schema.load(tmp_path / "out" / "schema.json").fields) == 39


def test_parquet_strings_stay_strings(tmp_path: Path) -> None:
    write_frame(tmp_path / "raw" / "a.parquet", [0, 1, 0], ["007", None, "ff"])
    (file,) = criteo.prepare(tmp_path / "raw" / "a.parquet", tmp_path / "out")
    assert pq.read_table(file.path)["C26"].to_pylist() == ["007", None, "ff"]


def test_bad_parquet(tmp_path: Path) -> None:
    raw = tmp_path / "raw"

    def message() -> str:
        with pytest.raises(DataError) as caught:
            criteo.prepare(raw, tmp_path / "out", file_format="parquet")
        return str(caught.value)

    raw.mkdir()
    assert "no *.parquet files" in message()
    write_frame(raw / "a.parquet", [0, 1], [1.0, 2.0])
    assert "a.parquet: column C1 is double; expected integers or strings" in message()
    write_frame(raw / "a.parquet", [0, 1], [1, 2]).drop(columns="C9").to_parquet(raw / "a.parquet")
    assert "a.parquet: no column C9" in message()
    write_frame(raw / "a.parquet", [0, 1], [1, 2]).astype({"I2": str}).to_parquet(raw / "a.parquet")
    assert "a.parquet: column I2 is" in message()
    for labels, wrong in (([0, 1, 2], "2"), ([0, 1, None], "None"), ([0, 1, -1], "-1")):
        write_frame(raw / "a.parquet", labels, [1, 2, 3])
        assert f"a.parquet, row 3: label is {wrong}; expected 0 or 1" in message()
    write_frame(raw / "a.parquet", [0, 1], [1, 2])
    write_frame(raw / "b.parquet", [0, 1], ["1", "2"])
    assert "b.parquet: column C1 is" in message()
    (raw / "b.parquet").write_text("not Parquet at all")
    assert "b.parquet: not a Parquet file" in message()


def test_detection(tmp_path: Path) -> None:
    raw, out = tmp_path / "raw", tmp_path / "out"
    raw.mkdir()
    with pytest.raises(DataError, match=r"neither train\.txt nor"):
        criteo.prepare(raw, out)
    write_lines(raw, FIRST)
    write_frame(raw / "a.parquet", [0, 1], [1, 2])
    with pytest.raises(DataError, match="choose with --format"):
        criteo.prepare(raw, out)
    for name, rows in (("kaggle", 1), ("parquet", 2)):
        assert criteo.main(["--raw", str(raw), "--out", str(out), "--format", name]) == 0
        assert pq.read_metadata(out / "data.parquet").num_rows == rows


def test_paths_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert criteo.main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    for part in ("login", "https://www.kaggle.com/", "https://ailab.criteo.com/", "--raw"):
        assert part in error
    with pytest.raises(DataError, match="no such file or folder"):
        criteo.prepare(tmp_path / "nothing", tmp_path / "out")
    with pytest.raises(DataError, match="--out is the raw folder"):
        criteo.prepare(tmp_path, tmp_path)


@pytest.mark.skipif(not (DATA / "criteo-kaggle").is_dir(), reason="no criteo-kaggle folder under $CTRLIB_DATA")
def test_real_kaggle_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = criteo.prepare(DATA / "criteo-kaggle", tmp_path)
    assert file.rows == 40_604
    assert file.positive_rate == pytest.approx(0.2420, abs=5e-5)
    assert capsys.readouterr().err == ""
    source = pd.read_csv(DATA / "criteo-kaggle" / "train.txt", sep="\t", header=None, names=COLUMNS, dtype=str)
    written = pd.read_parquet(file.path)
    for name in SPARSE:
        assert written[name].equals(source[name]) or written[name].fillna("").tolist() == source[name].fillna("").tolist()
    for name in DENSE:
        pd.testing.assert_series_equal(written[name].astype(float), source[name].astype(float), check_exact=True)


@pytest.mark.skipif(not (DATA / "criteo-1tb-80k").is_dir(), reason="no criteo-1tb-80k folder under $CTRLIB_DATA")
def test_real_parquet_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (file,) = criteo.prepare(DATA / "criteo-1tb-80k", tmp_path)
    assert file.rows == 80_000
    assert file.positive_rate == pytest.approx(0.0322, abs=5e-5)
    assert capsys.readouterr().err == ""
    source, written = pq.read_table(DATA / "criteo-1tb-80k" / "sample.parquet"), pq.read_table(file.path)
    for name in (*DENSE, *SPARSE):
        assert written[name].type == pa.int64()
        assert written[name].to_pylist() == source[name].to_pylist()
