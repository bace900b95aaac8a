"""Shuffled, prefetched batches from a store.

A full shuffle of the rows from ``(seed, epoch)``; a batch is one gather from the mapped file, without any per-row Python. Which
rows a batch holds depends on nothing but the seed and the epoch, so any number of workers gives the same batches.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ctrlib.batch import Batch, Ragged
from ctrlib.data.store import Split
from ctrlib.schema import DataError


class Loader:
    """An iterable of :class:`~ctrlib.batch.Batch`; every ``iter()`` is one epoch and, with ``shuffle``, a new order.

    Args:
        split: the rows, from :meth:`ctrlib.data.store.Store.split`.
        batch_size: rows a batch. A last batch of a single row joins the one before (batch norm has no variance of one row).
        shuffle: a new full permutation of the rows each epoch; otherwise file order.
        seed: of the shuffle.
        drop_last: leave out a last batch that is not full.
        workers: threads that prepare batches ahead; 0: none. The batches do not depend on it.

    Attributes:
        epoch: number of the next epoch; counts up with every ``iter()``.
    """

    def __init__(
        self, split: Split, batch_size: int, *, shuffle: bool = False, seed: int = 0, drop_last: bool = False, workers: int = 1
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; expected 1 or more")
        if workers < 0:
            raise DataError(f"workers is {workers}; expected 0 (none) or more")
        self.epoch = 0
        self._split = split
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._workers = workers
        full, rest = divmod(split.num_rows, batch_size)
        self._bounds = [(i * batch_size, (i + 1) * batch_size) for i in range(full)]
        if rest == 1 and full and batch_size > 1 and not drop_last:
            self._bounds[-1] = (self._bounds[-1][0], split.num_rows)
        elif rest and not drop_last:
            self._bounds.append((full * batch_size, split.num_rows))

    def __len__(self) -> int:
        return len(self._bounds)

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return sum(stop - start for start, stop in self._bounds)

    def __iter__(self) -> Iterator[Batch]:
        order: Tensor | None = None
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
            order = torch.randperm(self._split.num_rows, generator=generator)
        self.epoch += 1
        return self._batches(order)

    def _batches(self, order: Tensor | None) -> Iterator[Batch]:
        if self._workers == 0:
            for start, stop in self._bounds:
                yield self._batch(order, start, stop)
            return
        with ThreadPoolExecutor(self._workers) as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for start, stop in self._bounds:
                    ahead.append(pool.submit(self._batch, order, start, stop))
                    if len(ahead) > 2 * self._workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for future in ahead:
                    future.cancel()

    def _batch(self, order: Tensor | None, start: int, stop: int) -> Batch:
        split = self._split
        rows = None if order is None else order[start:stop]

        def take(column: Tensor) -> Tensor:
            return column[start:stop].clone() if rows is None else torch.index_select(column, 0, rows)

        return Batch(
            sparse=take(split.sparse),
            dense=take(split.dense),
            sequences={
                name: _take_ragged(values, offsets, torch.arange(start, stop) if rows is None else rows)
                for name, (values, offsets) in split.sequences.items()
            },
            labels=take(split.labels),
            weight=None if split.weight is None else take(split.weight),
            group=None if split.group is None else take(split.group),
        )


def _take_ragged(values: Tensor, offsets: Tensor, rows: Tensor) -> Ragged:
    starts = offsets[rows]
    lengths = offsets[rows + 1] - starts
    ends = torch.cumsum(lengths, 0)
    # position of every value in the file: its row's start there, minus its row's start here, plus its place here
    at = torch.repeat_interleave(starts - (ends - lengths), lengths) + torch.arange(int(ends[-1]))
    return Ragged(values[at], torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32))
