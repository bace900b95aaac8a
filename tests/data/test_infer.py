"""What ``Schema.infer`` makes of every kind of column, and the reasons it gives."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlib.data import infer
from ctrlib.data.encoder import Encoder
from ctrlib.schema import DataError, DenseField, Field, Schema, SequenceField, SparseField


def dense(name: str) -> DenseField:
    """How numbers are inferred."""
    return DenseField(name=name, encoding="piecewise", num_bins=32)


N = 900
RNG = np.random.default_rng(0)
NORMAL = RNG.normal(size=N)
MANY = RNG.integers(0, 400, N)
MANY[:400] = np.arange(400)  # more than 200 values
MANY[400:800] = np.arange(400)  # each at least twice


def gaps(values: Any, every: int = 7) -> list[Any]:
    return [None if i % every == 0 else v for i, v in enumerate(list(values))]


def days(n: int) -> list[datetime.date]:
    return [datetime.date(2024, 1, 1) + datetime.timedelta(days=i % 9) for i in range(n)]


COLUMNS: dict[str, tuple[Any, Field | str]] = {
    "constant": ([3] * N, "constant: every row has the same value"),
    "constant_text": (["a"] * N, "constant: every row has the same value"),
    "constant_float": ([0.5] * N, "constant: every row has the same value"),
    "constant_with_gaps": (gaps([3] * N), SparseField(name="constant_with_gaps")),
    "constant_text_with_gaps": (gaps(["a"] * N), SparseField(name="constant_text_with_gaps")),
    "whole_floats_with_gaps": (gaps([3.0] * N), SparseField(name="whole_floats_with_gaps")),
    "half_with_gaps": (gaps([0.5] * N), dense("half_with_gaps")),
    "all_different": ([f"r{i}" for i in range(N)], "all different: an identifier of the row"),
    "all_different_numbers": (list(range(N)), "all different: an identifier of the row"),
    "all_different_with_gaps": (gaps(range(N)), "all different: an identifier of the row"),
    "nothing": (pa.nulls(N), "only missing values"),
    "nothing_text": (pa.nulls(N, pa.string()), "only missing values"),
    "nothing_float": (pa.nulls(N, pa.float64()), "only missing values"),
    "nothing_nan": (np.full(N, np.nan), "only missing values"),
    "nothing_lists": (pa.nulls(N, pa.list_(pa.int64())), "only missing values"),
    "empty_lists": (pa.array([[]] * N, pa.list_(pa.string())), "only missing values"),
    "date": (days(N), "a time: use it"),
    "moment": (pa.array(days(N)).cast(pa.timestamp("us")), "a time: use it"),
    "nested": ([[[1]], [[2], [3]]] * (N // 2), "lists of large_list<item: int64>"),
    "number_lists": ([[1.5], [2.0]] * (N // 2), "lists of double; expected lists of integers or strings"),
    "struct": ([{"a": 1}, {"a": 2}] * (N // 2), "values of type struct<a: int64>"),
    "binary": ([b"a", b"b"] * (N // 2), "values of type binary"),
    "text": (["a", "b", "c"] * (N // 3), SparseField(name="text")),
    "rare_text": (["a", "b"] * (N // 2 - 1) + ["c", "d"], SparseField(name="rare_text", min_count=2)),
    "truth": ([True, False, True] * (N // 3), SparseField(name="truth")),
    "few": (list(range(150)) * 6, SparseField(name="few")),
    "two_hundred": ([i % 200 for i in range(N)], SparseField(name="two_hundred")),
    "two_hundred_and_one": ([i % 201 for i in range(N)], dense("two_hundred_and_one")),
    "many": (MANY, dense("many")),
    "many_floats": (MANY.astype(float), dense("many_floats")),
    "hash": (MANY + 2**31, SparseField(name="hash")),
    "negative_hash": (-MANY - 2**40, SparseField(name="negative_hash")),
    "unsigned_hash": (MANY.astype(np.uint64) + np.uint64(2**63), SparseField(name="unsigned_hash")),
    **{
        name: (MANY, SparseField(name=name))
        for name in ("user_id", "itemId", "userID", "ids", "ID", "AD_ID", "shop-id", "shop id", "productIds")
    },
    **{name: (MANY, dense(name)) for name in ("paid", "grid", "idle", "PAID", "width", "bids")},
    "normal": (NORMAL, dense("normal")),
    "normal_with_gaps": (gaps(NORMAL), dense("normal_with_gaps")),
    "small_floats": (NORMAL.astype(np.float32), dense("small_floats")),
    "heavy": (np.exp(3 * NORMAL), dense("heavy")),
    "heavy_below": (-np.exp(3 * NORMAL), dense("heavy_below")),
    "price": ([decimal.Decimal(i % 300) / 4 for i in range(N)], dense("price")),
    "infinite": (np.where(np.arange(N) == 5, np.inf, NORMAL), dense("infinite")),
    "tags": ([["a", "b"], [], ["b", "a"]] * (N // 3), SequenceField(name="tags")),
    "rare_tags": ([["a"], ["b"]] * (N // 2 - 1) + [["c"], None], SequenceField(name="rare_tags", min_count=2)),
    "dictionary": (pa.array(["a", "b", "b"] * (N // 3)).dictionary_encode(), SparseField(name="dictionary")),
    "dictionary_ints": (pa.array([1, 2, 2] * (N // 3)).dictionary_encode(), SparseField(name="dictionary_ints")),
    "dictionary_floats": (pa.array(NORMAL).dictionary_encode(), dense("dictionary_floats")),
}


def table() -> pa.Table:
    columns = {name: column if isinstance(column, pa.Array) else pa.array(column) for name, (column, _) in COLUMNS.items()}
    return pa.table({"y": [0, 1, 1] * (N // 3), **columns})


def check(schema: Schema, names: Any) -> None:
    found = {f.name: f for f in schema.fields}
    for name in names:
        want = COLUMNS[name][1]
        if isinstance(want, str):
            assert schema.ignored[name].startswith(want), name
            assert name not in found
        else:
            assert found[name] == want, name
            assert name not in schema.ignored
    assert [f.name for f in schema.fields] == [n for n in names if not isinstance(COLUMNS[n][1], str)]


def test_rules() -> None:
    check(Schema.infer(table(), "y"), COLUMNS)


@pytest.mark.parametrize("form", ["parquet", "polars", "pandas", "csv"])
def test_rules_for_other_forms(form: str, tmp_path: Path) -> None:
    names = [n for n in COLUMNS if n not in ("struct", "binary", "price", "date", "dictionary_floats")]
    if form in ("pandas", "csv"):
        names = [n for n in names if "lists" not in n and "tags" not in n and n != "nested"]
    if form == "csv":  # where text, infinities and times have no type of their own
        names = [n for n in names if n not in ("truth", "moment")]
    plain = table().select(["y", *names])
    makers: dict[str, Callable[[], object]] = {
        "parquet": lambda: pq.write_table(plain, tmp_path / "a.parquet"),
        "polars": lambda: pl.from_arrow(plain),
        "pandas": lambda: plain.to_pandas(),
        "csv": lambda: plain.to_pandas(types_mapper={pa.int64(): pd.Int64Dtype()}.get).to_csv(tmp_path / "a.csv", index=False),
    }
    made = makers[form]()
    check(Schema.infer(tmp_path / f"a.{form}" if made is None else made, "y"), names)


def test_fields_can_be_fitted() -> None:
    data = table().drop_columns(["infinite"])
    schema = Schema.infer(data, "y")
    assert len(Encoder.fit(schema, data).layout.names) == len(schema.fields)


def test_few_rows_are_no_identifiers() -> None:
    assert Schema.infer({"y": [0, 1], "x": ["a", "b"]}, "y").fields == (SparseField(name="x", min_count=2),)


def test_roles() -> None:
    data = {"y": [0, 1] * 5, "z": [1, 0] * 5, "user": list("aabbccddee"), "t": list(range(10)), "w": [1.0, 2.0] * 5}
    schema = Schema.infer(data, ["y", "z"], group="user", time="t", weight="w")
    assert (schema.labels, schema.group, schema.time, schema.weight) == (("y", "z"), "user", "t", "w")
    assert [f.name for f in schema.fields] == ["user"]
    assert schema.ignored == {}


def test_only_the_first_rows_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(infer, "MAX_ROWS", 3)
    monkeypatch.setattr("ctrlib.data.source.Source.blocks.__defaults__", (3,))
    data = {"y": [0, 1, 0, 1], "x": ["a", "a", "a", "b"]}
    assert Schema.infer(data, "y").ignored == {"x": "constant: every row has the same value"}


def test_missing_columns() -> None:
    data = {"label": [0, 1], "x": [1, 2]}
    with pytest.raises(DataError, match="no column 'lable', named as label; did you mean 'label'"):
        Schema.infer(data, "lable")
    for role in ("group", "time", "weight"):
        with pytest.raises(DataError, match=f"no column 'q', named as {role}"):
            Schema.infer(data, "label", **{role: "q"})


def test_no_rows() -> None:
    with pytest.raises(DataError, match="has a header but no rows"):
        Schema.infer(table()[:0], "y")
