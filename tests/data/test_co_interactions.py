from __future__ import annotations

from datetime import datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ctrlib.data import co_interactions
from ctrlib.data.co_interactions import CoInteractionOptions, co_interaction_edges
from ctrlib.schema import DataError

LOG = pa.table(
    {
        "user": ["ann", "bob", "cid", "bob", "ann", "cid", "dan"],
        "item": [1, 1, 2, 2, 1, 3, 3],
        "part": ["train", "train", "train", "train", "train", "test", "train"],
        "time": [1, 2, 3, 4, 5, 6, 7],
    }
)


def edges(log: object = LOG, **options: Any) -> set[frozenset[str]]:
    table = co_interaction_edges(log, CoInteractionOptions(**options))
    found = [frozenset(pair) for pair in zip(table["source"].to_pylist(), table["target"].to_pylist(), strict=True)]
    assert len(set(found)) == len(found)
    return set(found)


def names(*pairs: str) -> set[frozenset[str]]:
    return {frozenset(pair.split()) for pair in pairs}


def test_by_hand() -> None:
    """Item 1 joins Ann and Bob, item 2 Bob and Cid; item 3 joins Cid and Dan only by a test row."""
    assert edges(split="part") == names("ann bob", "bob cid")
    assert edges(time="time", before=100) == names("ann bob", "bob cid", "cid dan")
    assert edges(time="time", before=4) == names("ann bob")
    assert edges(split="part", time="time", before=4) == names("ann bob")


def test_a_test_interaction_leaves_no_trace() -> None:
    """The edges are those of a log that never had the held-out rows."""
    train = LOG.filter(pa.array([part == "train" for part in LOG["part"].to_pylist()]))
    held_out = LOG.filter(pa.array([part == "test" for part in LOG["part"].to_pylist()]))
    assert edges(split="part") == edges(train, held_out=held_out)


def test_the_guard_refuses_to_guess_and_finds_what_leaked() -> None:
    with pytest.raises(DataError, match="nothing says which interactions are held out"):
        CoInteractionOptions()
    with pytest.raises(DataError, match=r"user cid and item 3 are held out, and the log has them too \(1 such"):
        edges(held_out=pa.table({"user": ["cid", "eve"], "item": [3, 1]}))


def test_times_are_compared_as_such() -> None:
    log = LOG.set_column(3, "time", pa.array([datetime(2024, 1, day) for day in range(1, 8)]))
    assert edges(log, time="time", before=datetime(2024, 1, 4)) == names("ann bob")
    assert edges(log, time="time", before="2024-01-04") == names("ann bob")
    with pytest.raises(DataError, match="before is 'soon', no such time"):
        edges(LOG, time="time", before="soon")
    with pytest.raises(DataError, match=r"holds timestamp.*; before is 4, no such time"):
        edges(log, time="time", before=4)


@pytest.mark.parametrize("before", ["2024-1-9", 20240109])
def test_times_as_text_are_refused(before: object) -> None:
    """As text 2024-1-10 is before 2024-1-9, and would leak."""
    log = pa.table({"user": ["a", "b"], "item": [1, 1], "time": ["2024-1-2", "2024-1-10"]})
    with pytest.raises(DataError, match=r"'time' of .* holds .*string; expected numbers, timestamps or dates"):
        edges(log, time="time", before=before)


@pytest.mark.parametrize("block", [1, 7, 5_000_000])
def test_blocks_find_what_the_matrix_product_finds(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(co_interactions, "_BLOCK", block)
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 30, 150), rng.integers(0, 25, 150)
    log = pa.table({"user": user, "item": item, "time": np.zeros(150)})
    b = np.zeros((30, 25), dtype=np.int64)
    b[user, item] = 1
    for most in (None, 5):
        chosen = b if most is None else b[:, b.sum(0) <= most]
        pairs = np.argwhere(np.triu(chosen @ chosen.T, 1))
        found = edges(log, time="time", before=1, max_users=most)
        assert found == {frozenset(map(int, pair)) for pair in pairs}  # type: ignore[comparison-overlap]


def test_hubs_and_rare_items() -> None:
    log = pa.table({"user": ["a", "b", "c", "d", "a", "b"], "item": [1, 1, 1, 1, 2, 2], "time": [0] * 6})
    assert edges(log, time="time", before=1, max_users=3) == names("a b")
    assert len(edges(log, time="time", before=1, min_users=3)) == 6
    with pytest.raises(DataError, match=r"join 7 pairs of users, more than max_edges, 5; .*alone has 4 users"):
        edges(log, time="time", before=1, max_edges=5)


def test_bad_logs() -> None:
    with pytest.raises(DataError, match=r"'user', .*: the value is missing"):
        edges(pa.table({"user": ["a", None], "item": [1, 1], "part": ["train", "train"]}), split="part")
    for missing in ([1.0, float("nan")], [1.0, None]):
        with pytest.raises(DataError, match=r"'item', .*row 2: the value is missing"):
            edges(pa.table({"user": ["a", "b"], "item": missing, "part": ["train", "train"]}), split="part")
    with pytest.raises(DataError, match=r"'item' .* holds .*list.*; expected one value an interaction"):
        edges(pa.table({"user": ["a"], "item": [[1]], "part": ["train"]}), split="part")
    with pytest.raises(DataError, match="no interaction that counts"):
        edges(time="time", before=0)
    with pytest.raises(DataError, match="'parts'"):
        edges(split="parts")
    with pytest.raises(DataError, match=r"'time' of .* holds int64; expected text, 'train' in"):
        edges(split="time")
    with pytest.raises(
        DataError, match=r"'item' of the held-out interactions holds .*string, that of the log int64; give both"
    ):
        edges(held_out=pa.table({"user": ["z"], "item": ["q"]}))
    with pytest.raises(DataError, match="expected both or none"):
        CoInteractionOptions(time="time")
    with pytest.raises(DataError, match="min_users is 1"):
        CoInteractionOptions(split="part", min_users=1)


def test_the_edges_make_a_graph() -> None:
    from ctrlib.data.graph import GraphOptions, read_graph

    nodes = pa.table(
        {
            "id": ["ann", "bob", "cid", "dan"],
            "features": [[1], [2], [1], [2]],
            "y": [0, 1, 0, 1],
            "s": ["train"] * 3 + ["valid"],
        }
    )
    made = co_interaction_edges(LOG, CoInteractionOptions(split="part"))
    assert read_graph(nodes, made, GraphOptions(label="y", split="s")).adjacency.degrees.tolist() == [1, 2, 1, 0]
