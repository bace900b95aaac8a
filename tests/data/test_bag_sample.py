from __future__ import annotations

import pyarrow as pa
import pytest

from ctrlib.data.bag_sample import sample_bags
from ctrlib.schema import DataError

LISTS = [list(range(15)), [1, 2, 3], list(range(10)), [7]] * 50
NODES = pa.table({"id": range(200), "features": LISTS})


def test_ten_or_more_are_drawn_without_repeats_and_fewer_with() -> None:
    found = sample_bags(NODES, "features")
    assert found["id"].to_pylist() == list(range(200))
    for before, after in zip(LISTS, found["features"].to_pylist(), strict=True):
        assert len(after) == 10
        assert set(after) <= set(before)
        assert len(before) < 10 or len(set(after)) == 10
    drawn = [v for after in found["features"].to_pylist()[::4] for v in after]
    assert all(20 < drawn.count(v) < 47 for v in range(15))  # 50 draws of 10 of 15: 33 of each
    few = [v for after in found["features"].to_pylist()[1::4] for v in after]
    assert all(few.count(v) > 130 for v in (1, 2, 3))


def test_the_same_seed_draws_the_same() -> None:
    first, second, third = (sample_bags(NODES, "features", 4, seed)["features"] for seed in (1, 1, 2))
    assert first == second
    assert first != third


def test_bad_columns() -> None:
    with pytest.raises(DataError, match="holds int64; expected lists"):
        sample_bags(NODES, "id")
    with pytest.raises(DataError, match="the list is empty"):
        sample_bags(pa.table({"features": pa.array([[1], []], pa.list_(pa.int64()))}), "features")
    with pytest.raises(DataError, match="size is 0"):
        sample_bags(NODES, "features", 0)
