"""Batches: every row once an epoch, the same for any number of workers, mixed as a full shuffle mixes."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from ctrlib.batch import Batch
from ctrlib.data import loader
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader
from ctrlib.data.source import open_source
from ctrlib.data.store import Split, Store
from ctrlib.schema import DataError, DenseField, Schema, SequenceField, SparseField

N = 103
BAGS = [[f"t{(i * 7 + k) % 11}" for k in range(i % 5)] for i in range(N)]


def build(folder: Path, labels: list[int]) -> Split:
    n = len(labels)
    data = pa.table(
        {
            "y": labels,
            "row": pa.array(np.arange(n, dtype=np.float64)),
            "id": np.arange(n),
            "bag": [BAGS[i % N] for i in range(n)],
            "w": np.arange(n) / n,
            "g": np.arange(n) // 3 + 2**60,
        }
    )
    fields = (SparseField(name="id"), DenseField(name="row", encoding="minmax"), SequenceField(name="bag"))
    source = open_source(data)
    encoder = Encoder.fit(Schema(fields=fields, labels=("y",), weight="w", group="g"), source)
    return Store.create(folder / "store", encoder, {"train": source}).split("train")


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return build(tmp_path_factory.mktemp("loader"), [i % 2 for i in range(N)])


def rows(batch: Batch) -> list[int]:
    """Row numbers: equal counts give ids by value, so that id − 2 is the row."""
    return [i - 2 for i in batch.sparse[:, 0].tolist()]


def orders(batches: Loader) -> list[list[int]]:
    return [rows(batch) for batch in batches]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 10, 17, 50, 51, 102, 103, 104, 1000])
def test_every_row_once(split: Split, batch_size: int, shuffle: bool) -> None:
    data = Loader(split, batch_size, shuffle=shuffle)
    for _ in range(2):
        batches = orders(data)
        flat = [r for batch in batches for r in batch]
        assert sorted(flat) == list(range(N))
        assert (flat == list(range(N))) is (not shuffle)
        assert len(batches) == len(data)
        sizes = [len(b) for b in batches]
        full, rest = divmod(N, batch_size)
        want = [batch_size] * full + [rest] * (rest > 0)
        if rest == 1 and full and batch_size > 1:
            want[-2:] = [batch_size + 1]
        assert sizes == want
        assert data.num_rows == N


def test_a_last_single_row_joins(split: Split) -> None:
    assert [len(b) for b in Loader(split, 51)] == [51, 52]
    assert [len(b) for b in Loader(split, 102)] == [103]
    assert [len(b) for b in Loader(split, 51, drop_last=True)] == [51, 51]


@pytest.mark.parametrize("batch_size", [1, 10, 103, 104])
def test_drop_last(split: Split, batch_size: int) -> None:
    data = Loader(split, batch_size, shuffle=True, drop_last=True)
    batches = orders(data)
    assert [len(b) for b in batches] == [batch_size] * (N // batch_size)
    assert len({r for b in batches for r in b}) == data.num_rows == N // batch_size * batch_size


@pytest.mark.parametrize("shuffle", [False, True])
def test_every_column_against_a_loop(split: Split, shuffle: bool) -> None:
    tags = Counter(t for bag in BAGS for t in bag)
    ids = {t: i + 2 for i, t in enumerate(sorted(tags, key=lambda t: (-tags[t], t)))}
    for batch in Loader(split, 10, shuffle=shuffle, seed=3):
        assert batch.labels is not None
        assert batch.weight is not None
        assert batch.group is not None
        bag = batch.sequences["bag"]
        assert bag.values.dtype == bag.offsets.dtype == torch.int32
        for at, row in enumerate(rows(batch)):
            assert batch.labels[at].tolist() == [row % 2]
            assert batch.dense[at].tolist() == [np.float32(row / (N - 1))]
            assert batch.weight[at].item() == np.float32(row / N)
            assert batch.group[at].item() == row // 3 + 2**60
            assert bag.values[bag.offsets[at] : bag.offsets[at + 1]].tolist() == [ids[t] for t in BAGS[row]]
        assert len(bag.offsets) == len(batch) + 1


def test_batches_own_their_memory(split: Split) -> None:
    batch = next(iter(Loader(split, 10)))
    before = split.sparse.clone()
    batch.sparse.zero_()
    assert torch.equal(split.sparse, before)


def test_workers_change_nothing(split: Split) -> None:
    want = [repr(b) for _ in range(2) for b in Loader(split, 9, shuffle=True, seed=5, workers=0)]
    first = [repr(b) for b in Loader(split, 9, shuffle=True, seed=5, workers=0)]
    assert want == first + first  # a new loader starts at epoch 0
    for workers in (1, 2, 5, 50):
        assert [repr(b) for b in Loader(split, 9, shuffle=True, seed=5, workers=workers)] == first


def test_epochs_and_seeds(split: Split) -> None:
    one, again, other = (Loader(split, 9, shuffle=True, seed=s) for s in (1, 1, 2))
    epochs = [orders(one) for _ in range(4)]
    assert [orders(again) for _ in range(4)] == epochs
    others = [orders(other) for _ in range(4)]
    assert len({repr(e) for e in epochs + others}) == 8
    resumed = Loader(split, 9, shuffle=True, seed=1)
    resumed.epoch = 2
    assert orders(resumed) == epochs[2]
    assert resumed.epoch == 3


def test_the_global_generator_is_left_alone(split: Split) -> None:
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    list(Loader(split, 9, shuffle=True))
    assert torch.equal(torch.rand(3), want)


@pytest.mark.parametrize("workers", [0, 1, 5])
def test_stopping_early_leaves_no_thread(split: Split, workers: int) -> None:
    before = set(threading.enumerate())
    for _ in Loader(split, 5, shuffle=True, workers=workers):
        break
    for _ in Loader(split, 5, shuffle=True, workers=workers, memory_mb=1e-6):
        break
    iterator = iter(Loader(split, 5, workers=workers))
    next(iterator)
    del iterator
    gc.collect()
    assert set(threading.enumerate()) == before


def test_an_error_in_a_worker_reaches_the_caller(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> Batch:
        raise OSError("disk gone")

    monkeypatch.setattr(loader, "_take", broken)
    before = set(threading.enumerate())
    for shuffle, memory_mb in ((False, None), (True, None), (True, 1e-6)):
        with pytest.raises(OSError, match="disk gone"):
            list(Loader(split, 5, shuffle=shuffle, workers=2, memory_mb=memory_mb))
        assert set(threading.enumerate()) == before


def test_pinned_on_the_way(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    # page-locked memory needs a GPU; here only that every tensor of every batch goes that way, and arrives
    pinned: list[torch.Tensor] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    for workers in (0, 1):
        pinned.clear()
        batches = list(Loader(split, 50, workers=workers, pin_memory=True))
        assert len(pinned) == 7 * len(batches) == 21  # ids, numbers, two of the sequence, labels, weight, group
        assert batches[0].sparse is pinned[0]
        assert [row for batch in batches for row in rows(batch)] == list(range(N))


def test_bad_options(split: Split) -> None:
    with pytest.raises(DataError, match="batch_size is 0"):
        Loader(split, 0)
    with pytest.raises(DataError, match="workers is -1"):
        Loader(split, 5, workers=-1)
    for memory_mb in (0, -1, float("nan")):
        with pytest.raises(DataError, match=f"memory_mb is {memory_mb}; expected more than 0"):
            Loader(split, 5, memory_mb=memory_mb)


@pytest.mark.parametrize("memory_mb", [None, 0.001])
def test_only_some_rows(split: Split, memory_mb: float | None) -> None:
    chosen = torch.arange(0, N, 3)
    in_order = Loader(split, 10, rows=chosen, memory_mb=memory_mb)
    assert [r for batch in orders(in_order) for r in batch] == chosen.tolist()
    assert in_order.num_rows == len(chosen)
    shuffled = Loader(split, 10, shuffle=True, rows=chosen, memory_mb=memory_mb)
    first, second = ([r for batch in orders(shuffled) for r in batch] for _ in range(2))
    assert sorted(first) == sorted(second) == chosen.tolist()
    assert first != second
    batch = next(iter(in_order))
    bag = batch.sequences["bag"]
    assert bag.offsets.diff().tolist() == [i % 5 for i in range(0, 30, 3)]


@pytest.mark.parametrize("rows", [[], [0, N], [-1]])
def test_rows_that_are_not_there(split: Split, rows: list[int]) -> None:
    with pytest.raises(DataError, match=f"not all between 0 and {N - 1}; expected one row or more"):
        Loader(split, 10, rows=torch.tensor(rows, dtype=torch.int64))
