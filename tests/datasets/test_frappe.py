import hashlib
import itertools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlib.schema import DataError, Schema

PROJECT = Path(__file__).resolve().parents[2]
if TYPE_CHECKING:
    from datasets import frappe
else:  # from their folder, as scripts: an installed package may also be called datasets
    sys.path.insert(0, str(PROJECT / "datasets"))
    import frappe

DATA = Path(os.environ.get("CTRLIB_DATA", PROJECT.parent / "shared" / "data")) / "frappe"
COLUMNS = ["label", "user", "item", "daytime", "weekday", "isweekend", "homework", "cost", "weather", "country", "city"]
NEGATIVE = "-1 204:1 4798:1 5041:1 5046:1 5053:1 5055:1 5058:1 5060:1 5073:1 5183:1\n"
POSITIVE = "1 0:1 957:1 5045:1 5052:1 5054:1 5057:1 5059:1 5068:1 5148:1 5381:1\n"
NEGATIVE_ROW = [0, 204, 4798, 5041, 5046, 5053, 5055, 5058, 5060, 5073, 5183]
POSITIVE_ROW = [1, 0, 957, 5045, 5052, 5054, 5057, 5059, 5068, 5148, 5381]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "frappe.train.libfm").write_text(NEGATIVE + POSITIVE + NEGATIVE)
    (folder / "frappe.validation.libfm").write_text(POSITIVE)
    (folder / "frappe.test.libfm").write_text(POSITIVE.replace("1 0:1", "-1 956:1") + POSITIVE)
    return folder


def rows(path: Path) -> list[list[int]]:
    return [list(row.values()) for row in pq.read_table(path).to_pylist()]


def test_prepare(raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    train, valid, test = frappe.prepare(raw, out)
    assert rows(train.path) == [NEGATIVE_ROW, POSITIVE_ROW, NEGATIVE_ROW]
    assert rows(valid.path) == [POSITIVE_ROW]
    assert rows(test.path) == [[0, 956, *POSITIVE_ROW[2:]], POSITIVE_ROW]
    assert (train.rows, valid.rows, test.rows) == (3, 1, 2)
    assert train.positive_rate == pytest.approx(1 / 3)
    arrow = pq.read_schema(out / "train.parquet")
    assert arrow.names == COLUMNS
    assert arrow.types == [pa.int8()] + [pa.int32()] * 10
    assert sorted(path.name for path in out.iterdir()) == ["schema.json", "test.parquet", "train.parquet", "valid.parquet"]

    schema = Schema.load(out / "schema.json")
    assert [f.name for f in schema.fields] == COLUMNS[1:]
    assert schema.labels == ("label",)
    assert {f.name for f in schema.fields if f.side == "candidate"} == {"item", "cost"}

    printed = capsys.readouterr()
    assert "note: train has 3 rows; the published split has 202,027" in printed.out
    assert "re-drawn" not in printed.out
    assert "arXiv:1505.03014" in printed.out
    assert "research only" in printed.out
    assert printed.err.count("warning: ") == 2  # the two files that are known


def test_rebuilt_train_is_read_where_the_original_is_missing(
    raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frame = pd.DataFrame([POSITIVE_ROW, POSITIVE_ROW], columns=COLUMNS, dtype="int16")
    frame[COLUMNS[::-1]].to_parquet(raw / "train_rebuilt.parquet")  # found by name, not by place
    assert frappe.prepare(raw, tmp_path / "out")[0].rows == 3
    assert "re-drawn" not in capsys.readouterr().out
    (raw / "frappe.train.libfm").unlink()
    assert rows(frappe.prepare(raw, tmp_path / "out")[0].path) == [POSITIVE_ROW, POSITIVE_ROW]
    assert "note: train negatives re-drawn" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (NEGATIVE.replace("-1 ", "0 "), "'-1' or '1'"),
        (NEGATIVE.replace(" 5183:1", ""), "ten cells"),
        (NEGATIVE.replace("5183:1", "5183:1 5183:1"), "ten cells"),
        (NEGATIVE.replace("5183:1", "5183:2"), "ten cells"),
        (NEGATIVE.replace("5183:1", "x:1"), "ten cells"),
        ("\n", "ten cells"),
        (NEGATIVE.replace("204", "204é"), "ten cells"),
        (NEGATIVE.replace("204:1 4798:1", "4798:1 204:1"), "user is 4798; expected 0 to 956"),
        (NEGATIVE.replace("5183", "5382"), "city is 5382; expected 5149 to 5381"),
    ],
)
def test_bad_line(line: str, message: str, raw: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (raw / "frappe.test.libfm").write_text(POSITIVE + NEGATIVE + line + POSITIVE)
    assert frappe.main(["--raw", str(raw), "--out", str(tmp_path / "out")]) == 2
    errors = [one for one in capsys.readouterr().err.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1
    assert "frappe.test.libfm, line 3: " in errors[0]
    assert message in errors[0]
    assert not (tmp_path / "out").exists()


def test_bad_rebuilt_train(raw: Path, tmp_path: Path) -> None:
    (raw / "frappe.train.libfm").unlink()
    with pytest.raises(DataError, match=r"no frappe\.train\.libfm"):
        frappe.prepare(raw, tmp_path / "out")
    path = raw / "train_rebuilt.parquet"
    frame = pd.DataFrame([POSITIVE_ROW, NEGATIVE_ROW], columns=COLUMNS)
    frame.drop(columns="weather").to_parquet(path)
    with pytest.raises(DataError, match="no column weather"):
        frappe.prepare(raw, tmp_path / "out")
    frame.assign(label=[1, -1]).to_parquet(path)
    with pytest.raises(DataError, match="row 2: label is -1; expected 0 to 1"):
        frappe.prepare(raw, tmp_path / "out")
    frame.assign(city=[5381.0, np.nan]).to_parquet(path)
    with pytest.raises(DataError, match="city is double with 1 nulls; expected integers"):
        frappe.prepare(raw, tmp_path / "out")
    path.write_text("not Parquet at all")
    with pytest.raises(DataError, match="not a Parquet file"):
        frappe.prepare(raw, tmp_path / "out")


def test_without_raw_the_files_are_downloaded(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert frappe.URL.startswith("https://raw.githubusercontent.com/hexiangnan/neural_factorization_machine/")
    monkeypatch.setattr(frappe, "URL", raw.as_uri() + "/")
    assert [file.rows for file in frappe.prepare(None, tmp_path / "out")] == [3, 1, 2]
    monkeypatch.setattr(frappe, "URL", "http://127.0.0.1:9/")
    with pytest.raises(DataError, match=r"http://127\.0\.0\.1:9/frappe\.train\.libfm .*--raw"):
        frappe.prepare(None, tmp_path / "new")


@pytest.mark.skipif(not DATA.is_dir(), reason="no frappe folder under $CTRLIB_DATA")
def test_real_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train, valid, test = frappe.prepare(DATA, tmp_path)
    assert (train.rows, valid.rows, test.rows) == (202_027, 57_722, 28_860)
    assert train.positive_rate == pytest.approx(0.3346, abs=5e-5)
    assert capsys.readouterr().err == ""
    frames = {file.path.stem: pd.read_parquet(file.path) for file in (train, valid, test)}
    # The published comma-separated files of Frappe_x1 (github.com/reczoo/Datasets) have these md5 sums.
    for split, md5 in (("valid", "88d51bf2173505436d3a8f78f2a59da8"), ("test", "3470f6d32713dc5f7715f198ca7c612a")):
        csv = frames[split].to_csv(index=False, lineterminator="\r\n").encode()
        assert hashlib.md5(csv, usedforsecurity=False).hexdigest() == md5
    ids = pd.concat(frames.values())[COLUMNS[1:]]
    assert ids["user"].min() == 0
    assert ids["city"].max() == 5381
    for left, right in itertools.pairwise(COLUMNS[1:]):
        assert ids[left].max() + 1 == ids[right].min()  # disjoint ranges without holes
