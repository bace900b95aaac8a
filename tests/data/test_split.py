"""Splits hold every row once, in the asked shares and order."""

from __future__ import annotations

import datetime
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from ctrlib.data.source import Source, open_source
from ctrlib.data.split import SplitBy, split_rows
from ctrlib.schema import DataError

SHARES = {"train": 0.6, "valid": 0.2, "test": 0.2}
DAY = datetime.datetime(2024, 2, 28)
TIMES = [5, 1, 3, 3, 9, 3, 0, -2, 7, 3]
# sorted, ties in file order: rows 7 6 1 2 3 5 | 9 0 | 8 4
BY_TIME = {"train": [1, 2, 3, 5, 6, 7], "valid": [0, 9], "test": [4, 8]}


def rows(parts: dict[str, Source]) -> dict[str, list[int]]:
    return {name: part.column("row").to_pylist() for name, part in parts.items()}


def table(times: Any = None, n: int = 10) -> Source:
    return open_source(pa.table({"row": list(range(n))} | ({} if times is None else {"t": times})))


def forms() -> dict[str, Any]:
    moments = [DAY + datetime.timedelta(days=t) for t in TIMES]
    return {
        "integers": pa.array(TIMES),
        "small integers": pa.array(TIMES, pa.int8()),
        "floats": pa.array([t / 7 for t in TIMES]),
        "dates": pa.array([m.date() for m in moments]),
        "text": pa.array([m.isoformat() for m in moments]),
        "dictionary": pa.array([m.isoformat() for m in moments]).dictionary_encode(),
        "dictionary in file order": pa.array(TIMES).dictionary_encode(),
        "zones": pa.array(moments, pa.timestamp("us", "UTC")),
        "date64": pa.array(moments, pa.date64()),
        "time of day": pa.array([(t + 2) * 1000 for t in TIMES], pa.time32("ms")),
        "durations": pa.array(TIMES, pa.duration("s")),
        **{f"timestamps {u}": pa.array(moments, pa.timestamp(u)) for u in ("s", "ms", "us")},
        "timestamps ns": pa.array([t + 1_700_000_000_123_456_700 for t in TIMES], pa.timestamp("ns")),
    }


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("by", ["auto", "time"])
def test_by_time(form: str, by: SplitBy) -> None:
    assert rows(split_rows(table(forms()[form]), SHARES, by=by, time="t")) == BY_TIME


def test_by_time_from_frames() -> None:
    moments = [DAY + datetime.timedelta(days=t) for t in TIMES]
    data = {"row": list(range(10)), "t": moments}
    for frame in (pd.DataFrame(data), pl.DataFrame(data)):
        assert rows(split_rows(open_source(frame), SHARES, time="t")) == BY_TIME


def test_by_wide_integers_that_floats_confuse() -> None:
    times = [2**53 + 1, 2**53, 2**53 + 3, 2**53 + 2]
    parts = split_rows(table(times, 4), {"a": 0.25, "b": 0.25, "c": 0.25, "d": 0.25}, time="t")
    assert rows(parts) == {"a": [1], "b": [0], "c": [3], "d": [2]}


def test_by_order() -> None:
    for times in (None, TIMES):
        parts = split_rows(table(times), SHARES, by="order", time="t" if times else None)
        assert rows(parts) == {"train": [0, 1, 2, 3, 4, 5], "valid": [6, 7], "test": [8, 9]}


@pytest.mark.parametrize("n", [3, 10, 101, 1000, 12345])
@pytest.mark.parametrize("shares", [(0.8, 0.1, 0.1), (0.5, 0.5), (1.0,), (1 / 3, 1 / 3, 1 / 3)])
def test_random_shares_are_exact_and_every_row_is_there_once(n: int, shares: tuple[float, ...]) -> None:
    if n == 3 and shares[0] == 0.8:
        shares = (0.4, 0.3, 0.3)
    fractions = {f"part {i}": s for i, s in enumerate(shares)}
    parts = split_rows(table(n=n), fractions, by="random", seed=4)
    found = rows(parts)
    assert sorted(r for part in found.values() for r in part) == list(range(n))
    for name, share in fractions.items():
        assert abs(len(found[name]) - share * n) < 1
        assert parts[name].num_rows == len(found[name])
        assert found[name] == sorted(found[name])


def test_seeds() -> None:
    a, b, c = (rows(split_rows(table(n=1000), SHARES, by="random", seed=s)) for s in (0, 0, 1))
    assert a == b
    assert a != c
    assert a == rows(split_rows(table(n=1000), SHARES, seed=0))  # auto without a time column
    # about .6 of a's training rows are c's too, as for independent draws: mean 360, variance 57.7
    assert abs(len(set(a["train"]) & set(c["train"])) - 360) < 4 * 57.7**0.5


def test_a_selection_is_split_again() -> None:
    mask = np.arange(40) % 4 == 2
    parts = split_rows(table([-i for i in range(40)], 40).select(mask), SHARES, time="t")
    assert rows(parts) == {"train": [18, 22, 26, 30, 34, 38], "valid": [10, 14], "test": [2, 6]}


@pytest.mark.parametrize(
    "shares", [{}, {"a": 0.5}, {"a": 1.5, "b": -0.5}, {"a": 1.0, "b": 0.0}, {"a": float("nan"), "b": 0.5}, {"a": float("nan")}]
)
def test_shares_that_do_not_sum_to_1(shares: dict[str, float]) -> None:
    with pytest.raises(DataError, match="expected positive numbers that sum to 1"):
        split_rows(table(), shares)


def test_too_few_rows() -> None:
    with pytest.raises(DataError, match="has 2 rows, too few for train, valid, test"):
        split_rows(table(n=2), SHARES)
    with pytest.raises(DataError, match="has 10 rows, too few"):
        split_rows(table(), {"train": 0.99, "test": 0.01})


def test_no_time_column() -> None:
    with pytest.raises(DataError, match="needs a time column"):
        split_rows(table(), SHARES, by="time")
    with pytest.raises(DataError, match="has no column 'tt', the time column; did you mean 't'"):
        split_rows(table(TIMES), SHARES, time="tt")


def test_unknown_way() -> None:
    with pytest.raises(DataError, match="'tiem'; expected one of auto, time, random, order"):
        split_rows(table(), SHARES, by="tiem")  # type: ignore[arg-type]


@pytest.mark.parametrize("times", [[1, 2, None] + [4] * 7, [1.0, 2.0, float("nan")] + [4.0] * 7, ["a", "b", None] + ["c"] * 7])
def test_a_row_without_a_time(times: list[Any]) -> None:
    with pytest.raises(DataError, match=r"column 't', the table, row 3: the time is missing"):
        split_rows(table(times), SHARES, time="t")


def test_a_missing_time_inside_a_dictionary() -> None:
    times = pa.DictionaryArray.from_arrays(pa.array([0, 1, 2] + [0] * 7, pa.int8()), pa.array(["a", "b", None]))
    with pytest.raises(DataError, match=r"column 't', the table, row 3: the time is missing"):
        split_rows(open_source(pa.table({"t": times})), SHARES, time="t")


def test_random_parts_are_spread_evenly_over_the_file() -> None:
    parts = rows(split_rows(table(n=40_000), {"train": 0.7, "test": 0.3}, by="random", seed=1))
    counts = np.histogram(parts["test"], bins=20, range=(0, 40_000))[0]  # hypergeometric: mean 600, variance 2000·.3·.7·.95
    assert float((((counts - 600) ** 2) / (420 * 0.95)).sum()) < 45.3  # 0.1 % of chi-square with 20 degrees of freedom


def test_one_byte_a_row() -> None:
    parts = split_rows(table(n=1000), SHARES, by="random")
    assert {part.codes.nbytes for part in parts.values() if part.codes is not None} == {1000}
    assert len({id(part.codes) for part in parts.values()}) == 1


def test_too_many_parts() -> None:
    with pytest.raises(DataError, match="256 parts; expected at most 255"):
        split_rows(table(n=1000), {str(i): 1 / 256 for i in range(256)})
