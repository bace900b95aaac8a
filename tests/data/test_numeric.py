"""Numeric encodings against the formulas, written as loops or from sorted lists."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from ctrlib.data import numeric
from ctrlib.data.encoder import Encoder
from ctrlib.data.numeric import Moments, Quantiles, criteo_log
from ctrlib.schema import DataError, DenseField, NumericEncoding, Schema

NAN = math.nan
RNG = np.random.default_rng(11)
COLUMNS: dict[str, list[float]] = {
    "normal": RNG.normal(3, 2, 401).tolist(),
    "skewed": np.floor(RNG.lognormal(2, 2, 300)).tolist(),
    "negative": (-RNG.lognormal(1, 1, 100)).tolist(),
    "gaps": [NAN if RNG.random() < 0.3 else float(v) for v in RNG.normal(0, 1, 200)],
    "ties": [0.0] * 90 + [1.0] * 5 + [2.0, 3.0, 4.0, 5.0, 6.0],
    "constant": [4.25] * 10,
    "constant with gaps": [0.1, NAN, 0.1, NAN, 0.1],
    "single": [7.0],
    "far": [1.6e9 + 3600 * i for i in range(50)],
    "tiny": [1e-20 * i for i in range(9)],
}
SERVED = [NAN, -1e6, -1.0, -0.0, 0.0, 0.1, 0.5, 1.0, 2.0, 2.5, 4.25, 1e6, 1.6e9]


def fit(values: Any, encoding: NumericEncoding, **options: Any) -> Encoder:
    field = DenseField(name="x", encoding=encoding, **options)
    return Encoder.fit(Schema(fields=(field,), labels=("y",)), {"x": values})


def dense(encoder: Encoder, values: list[float]) -> list[float]:
    found: list[float] = encoder.transform({"x": values}).dense[:, 0].tolist()
    return found


def present(values: list[float]) -> list[float]:
    return [v for v in values if not math.isnan(v)]


def slog(v: float) -> float:
    return math.copysign(math.log1p(abs(v)), v)


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("encoding", ["standardize", "log", "minmax"])
def test_scaled_encodings(name: str, encoding: NumericEncoding) -> None:
    values = COLUMNS[name]
    learned = [slog(v) if encoding == "log" else v for v in present(values)]
    if encoding == "minmax":
        offset, scale = min(learned), (max(learned) - min(learned)) or 1.0
    else:
        offset = math.fsum(learned) / len(learned)
        scale = math.sqrt(math.fsum((v - offset) ** 2 for v in learned) / len(learned))
        if min(learned) == max(learned):
            offset, scale = learned[0], 1.0
    encoder = fit(values, encoding)
    for served in (values, SERVED):
        want = [((slog(v) if encoding == "log" else v) - offset) / scale for v in served]
        np.testing.assert_allclose(dense(encoder, served), want, rtol=2e-6, atol=1e-6)
    column = encoder.layout.dense[0]
    assert (column.num_bins, column.missing) == (0, any(map(math.isnan, values)))


def quantile_edges(values: list[float], bins: int) -> list[float]:
    ordered = sorted(present(values))
    return sorted({ordered[i * (len(ordered) - 1) // bins] for i in range(bins + 1)})


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("bins", [2, 3, 16])
def test_piecewise_positions(name: str, bins: int) -> None:
    values = COLUMNS[name]
    edges = quantile_edges(values, bins)

    def position(v: float) -> float:
        if math.isnan(v) or len(edges) == 1:
            return v if math.isnan(v) else 0.0
        v = min(max(v, edges[0]), edges[-1])
        at = max(i for i, e in enumerate(edges) if e <= v)
        return float(at) if at == len(edges) - 1 else at + (v - edges[at]) / (edges[at + 1] - edges[at])

    encoder = fit(values, "piecewise", num_bins=bins)
    assert list(encoder.numeric["x"].edges) == edges
    for served in (values, SERVED):
        np.testing.assert_allclose(dense(encoder, served), [position(v) for v in served], rtol=1e-6, atol=1e-6)
    assert encoder.layout.dense[0].num_bins == max(len(edges) - 1, 1)


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("bins", [2, 5, 16])
def test_bucket_ids(name: str, bins: int) -> None:
    values = COLUMNS[name]
    edges = quantile_edges(values, bins)
    bins_found = max(len(edges) - 1, 1)
    gaps = any(map(math.isnan, values))

    def bucket(v: float) -> int:
        if math.isnan(v):
            return 2 + bins_found if gaps else 1
        return 2 + sum(v >= e for e in edges[1:-1])  # below the first edge: first bin; above the last: last bin

    encoder = fit(values, "bucket", num_bins=bins)
    for served in (values, SERVED):
        assert encoder.transform({"x": served}).sparse[:, 0].tolist() == [bucket(v) for v in served]
    column = encoder.layout.sparse[0]
    assert (column.vocab_size, column.table) == (2 + bins_found + gaps, "x")


def test_many_ties_leave_few_edges() -> None:
    assert fit(COLUMNS["ties"], "piecewise", num_bins=16).numeric["x"].edges == (0.0, 1.0, 6.0)
    assert fit([0.0] * 999 + [5.0], "bucket", num_bins=4).transform({"x": [-1, 0, 4, 9]}).sparse[:, 0].tolist() == [2] * 4


def test_criteo_log_golden_values() -> None:
    x = [2.0, 3.0, 0.0, -1.0, 100.0, 2.5, 1.9, -2.5, 1e9, math.e, 8.0]
    assert criteo_log(np.array(x)).tolist() == [2, 1, 0, -1, 21, 0, 1, -3, 429, 1, 4]
    for v in range(3, 5000):
        assert criteo_log(np.array([float(v)]))[0] == math.floor(math.log(v) ** 2)


def test_criteo_log_ids() -> None:
    values = [2, 3, 3, None, 100, 0, -1, 100, 101, None, None, 2]
    # keys: 2 1 1 null 21 0 -1 21 21 null null 2; by count: 21 and null (3; null last), 1 and 2 (2), -1 and 0 (1)
    encoder = fit(values, "criteo_log")
    assert encoder.transform({"x": values}).sparse[:, 0].tolist() == [5, 4, 4, 3, 2, 7, 6, 2, 2, 3, 3, 5]
    assert encoder.transform({"x": [1e9, math.e]}).sparse[:, 0].tolist() == [1, 4]
    rare = fit(values, "criteo_log", min_count=3)
    assert rare.transform({"x": values}).sparse[:, 0].tolist() == [1, 1, 1, 3, 2, 1, 1, 2, 2, 3, 3, 1]


# ------------------------------------------------------------------------------------------------- row order, blocks


@pytest.mark.parametrize("encoding", ["standardize", "log", "minmax", "piecewise", "bucket", "criteo_log"])
@pytest.mark.parametrize("name", [*COLUMNS, "symmetric", "zeros"])
def test_row_order_does_not_show(encoding: NumericEncoding, name: str) -> None:
    half = RNG.normal(size=300)
    more = {"symmetric": np.concatenate([half, -half]).tolist(), "zeros": [0.0, -0.0, -0.0, 0.0, 1.0]}
    values = (COLUMNS | more)[name]
    hashes = {fit(random.Random(seed).sample(values, len(values)), encoding).hash for seed in range(8)}
    assert len(hashes) == 1


def test_blocks_do_not_show() -> None:
    x = np.random.default_rng(0).normal(1e4, 3, 5000)
    whole, cut = Moments(), Moments()
    whole.update(x)
    for i in range(0, len(x), 37):
        cut.update(x[i : i + 37])
    assert whole.mean_std() == cut.mean_std()
    assert (whole.minimum, whole.maximum) == (cut.minimum, cut.maximum) == (x.min(), x.max())


def test_standardised_data_of_mean_zero_stays_stable() -> None:
    z = RNG.normal(size=1000)
    z = (z - z.mean()) / z.std()
    found = set()
    for seed in range(20):
        moments = Moments()
        for block in np.array_split(np.random.default_rng(seed).permutation(z), 7):
            moments.update(block)
        found.add(moments.mean_std())
    assert found == {(0.0, 1.0)}


@pytest.mark.parametrize("limit", [16, 100, 1000])
@pytest.mark.parametrize("block", [10, 333, 5000])
def test_quantiles_beyond_the_limit_do_not_depend_on_order(limit: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.concatenate([RNG.normal(size=3000), np.linspace(-2, 2, 1500), np.zeros(500)])
    exact = Quantiles()
    exact.update(x)
    monkeypatch.setattr(numeric, "_MAX_DISTINCT", limit)

    def edges(order: np.ndarray) -> tuple[float, ...]:
        quantiles = Quantiles()
        for i in range(0, len(x), block):
            quantiles.update(x[order[i : i + block]])
        found = quantiles.edges(8)
        assert len(quantiles._keys) <= limit
        assert quantiles._counts.sum() == len(x)
        return found

    found = {edges(np.random.default_rng(seed).permutation(len(x))) for seed in range(3)} | {edges(np.argsort(x))}
    assert len(found) == 1
    if limit >= 1000:
        np.testing.assert_allclose(found.pop()[1:-1], exact.edges(8)[1:-1], atol=0.02)


def test_no_more_bits_are_dropped_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = RNG.normal(size=2000)
    bits = x.view(np.uint64)
    ordered = np.where(bits >> np.uint64(63), ~bits, bits | np.uint64(2**63))
    needed = next(d for d in range(64) if len(np.unique(ordered >> np.uint64(d))) <= 150)
    monkeypatch.setattr(numeric, "_MAX_DISTINCT", 150)
    quantiles = Quantiles()
    quantiles.update(x)
    quantiles.edges(2)
    assert quantiles._dropped_bits == needed


def test_quantiles_are_exact_up_to_the_limit() -> None:
    x = np.random.default_rng(1).normal(size=200_000)
    quantiles = Quantiles()
    for part in np.array_split(x, 3):
        quantiles.update(part)
    ordered = np.sort(x)
    assert quantiles.edges(10) == tuple(ordered[i * (len(x) - 1) // 10] for i in range(11))
    assert Quantiles().edges(4) == ()


# ------------------------------------------------------------------------------------------------- missing and bad values


@pytest.mark.parametrize("encoding", ["standardize", "log", "minmax", "piecewise", "bucket", "criteo_log"])
def test_nan_and_null_are_the_same(encoding: NumericEncoding) -> None:
    numbers = [1.0, NAN, 3.0, 3.0]
    nulls = [1.0, None, 3.0, 3.0]
    forms: list[Any] = [
        {"x": nulls},
        {"x": numbers},
        pd.DataFrame({"x": numbers}),
        pl.DataFrame({"x": numbers}),
        pa.table({"x": numbers}),
        {"x": ["1", None, "3", "3.0"]},
        pd.DataFrame({"x": pd.array([1, None, 3, 3], "Int64")}),
    ]
    schema = Schema(fields=(DenseField(name="x", encoding=encoding),), labels=("y",))
    encoders = [Encoder.fit(schema, form) for form in forms]
    assert len({e.hash for e in encoders}) == 1
    outputs = [repr(e.transform(form)) for e, form in zip(encoders, forms, strict=True)]
    assert len(set(outputs)) == 1


@pytest.mark.parametrize("value", [math.inf, -math.inf])
@pytest.mark.parametrize("encoding", ["standardize", "piecewise", "criteo_log"])
def test_infinities_are_refused_with_their_row(value: float, encoding: NumericEncoding) -> None:
    with pytest.raises(DataError, match=r"column 'x', the training table, row 4: the value is -?inf"):
        fit([1.0, 2.0, NAN, value, value], encoding)
    encoder = fit([1.0, 2.0], encoding)
    with pytest.raises(DataError, match=r"column 'x', the table, row 2: the value is -?inf"):
        encoder.transform({"x": [1.0, value]})


@pytest.mark.parametrize("value", ["abc", "", "1,5", "0x"])
def test_text_is_refused_with_its_row(value: str) -> None:
    with pytest.raises(DataError, match=rf"column 'x', the training table, row 3: '{value}' is not a number"):
        fit(["1", None, value, "abc"], "standardize")


@pytest.mark.parametrize("value", [[1.0], {"a": 1}, np.datetime64("2020-01-01", "us")])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(DataError, match=r"column 'x', the training table, row 1: .* is not a number"):
        fit([value, value], "standardize")


@pytest.mark.parametrize("values", [[None, None], [NAN, NAN]])
@pytest.mark.parametrize("encoding", ["standardize", "log", "minmax", "piecewise", "bucket", "criteo_log"])
def test_only_missing_values_are_refused(values: list[Any], encoding: NumericEncoding) -> None:
    with pytest.raises(DataError, match=r"column 'x' of the training table has only missing values.*remove the field"):
        fit(values, encoding)


def test_missing_values_where_training_had_none() -> None:
    assert math.isnan(dense(fit([1.0, 2.0], "standardize"), [NAN])[0])
    assert fit([1.0, 2.0], "bucket").transform({"x": [None]}).sparse.tolist() == [[1]]
    assert fit([1.0, 2.0], "criteo_log").transform({"x": [None]}).sparse.tolist() == [[1]]


# --------------------------------------------------------------------------------------------------------------- counts


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint8(), pa.int16(), pa.uint32(), pa.int64(), pa.uint64()])
def test_narrow_codes_in_every_width(kind: Any) -> None:
    info = np.iinfo(kind.to_pandas_dtype())
    for low in (info.min, info.max - 9, 3):
        values = [None if i % 5 == 3 else low + i * 7 % 10 for i in range(40)]
        narrow = numeric.narrow_codes(pa.array(values, kind))
        if low + 9 >= 2**63 - 1:
            assert narrow is None
            continue
        assert narrow is not None
        codes, first, size = narrow
        present = [v for v in values if v is not None]
        assert (first, size) == (min(present), max(present) - min(present) + 1)
        assert codes.tolist() == [size if v is None else v - first for v in values]


def test_what_has_no_narrow_codes() -> None:
    for array in (
        pa.array([0, 10**9]),
        pa.array([1.0, 2.0]),
        pa.array(["1"]),
        pa.array([], pa.int64()),
        pa.nulls(3, pa.int8()),
    ):
        assert numeric.narrow_codes(array) is None


@pytest.mark.parametrize("wide", [0, 10**12])
def test_a_tally_stands_for_its_rows(wide: int) -> None:
    values = [None if v % 7 == 0 else int(v) for v in RNG.integers(-30, 60, 500)] + [wide + 5]
    x, counts = numeric.tally(pa.array(values), lambda row: "")
    assert (
        sorted(np.repeat(x, counts)[: len(values)], key=lambda v: (np.isnan(v), v))[:-75]
        == sorted(float(v) for v in values if v is not None)[: len(values) - 75]
    )
    rows, weighted = (Moments(), Quantiles()), (Moments(), Quantiles())
    floats = np.array([NAN if v is None else float(v) for v in values])
    for moments_or_quantiles in rows:
        moments_or_quantiles.update(floats)
    for moments_or_quantiles in weighted:
        moments_or_quantiles.update(x, counts)
    assert rows[0].mean_std() == weighted[0].mean_std()
    assert (rows[0].missing, rows[0].minimum, rows[0].maximum) == (
        weighted[0].missing,
        weighted[0].minimum,
        weighted[0].maximum,
    )
    assert rows[1].edges(13) == weighted[1].edges(13)
