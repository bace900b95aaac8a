"""Shuffled, prefetched batches: of a store, or of a table that is encoded on the way.

The order of an epoch is one permutation of all rows from ``(seed, epoch)``. It alone says which rows a batch holds and in which
order; how they are fetched changes no batch. Rows that fit into memory are gathered batch by batch. Of more rows, a window, the
next stretch of the permutation, is read in one ascending sweep while the batches of the window before are in use.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctrlib.batch import Batch, Ragged
from ctrlib.data.encoder import Encoded, Encoder, LeakCount
from ctrlib.data.memory import half_of_free_mb
from ctrlib.data.source import BLOCK_ROWS, open_source
from ctrlib.data.store import Split
from ctrlib.schema import DataError

T = TypeVar("T")
Bounds = Sequence[tuple[int, int]]
Reads = Generator[Callable[[], "_Window"], None, None]
Pieces = Generator[Batch, None, None]

EVALUATION_ROWS = 2048
"""Rows a batch where nothing is learned. What more rows compute leaves the cache of a CPU, which makes some models much
slower."""

_SWEEP_ROWS = 1 << 16  # rows a piece of a sweep; between two of them it can be stopped
_SMALLEST_BLOCK = 1 << 13  # rows; smaller blocks would not be worth encoding in several threads
_SAMPLE_ROWS = 1 << 13  # rows from which the length of sequences is estimated
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class _Window:
    """Rows at hand, and the batches to take from them.

    ``order``: which of ``rows`` stands at each place; ``None``: their own order. ``bounds``: first place of each batch, and of
    what follows it.
    """

    rows: Split
    order: Tensor | None
    bounds: Bounds


class _Epochs(ABC):
    """What :class:`Loader` and :class:`StreamLoader` share: the order of rows, the bounds of batches, the threads."""

    def __init__(
        self,
        num_rows: int,
        row_bytes: float,
        batch_size: int,
        *,
        shuffle: bool,
        seed: int,
        drop_last: bool,
        workers: int,
        memory_mb: float | None,
        pin_memory: bool,
    ) -> None:
        if batch_size < 1:
            raise DataError(f"batch_size is {batch_size}; expected 1 or more")
        if workers < 0:
            raise DataError(f"workers is {workers}; expected 0 (none) or more")
        if memory_mb is not None and not memory_mb > 0:
            raise DataError(f"memory_mb is {memory_mb}; expected more than 0, or None for half of what is free")
        self.epoch = 0
        self._rows = num_rows
        self._batch_size = batch_size
        self._shuffle = shuffle
        self._seed = seed
        self._workers = workers
        self._pin_memory = pin_memory
        budget = (half_of_free_mb() if memory_mb is None else memory_mb) * 2**20
        self._fits = num_rows * row_bytes <= budget
        self._chosen: Tensor | None = None  # numbers of the rows; None: all
        self._window_rows = int(budget / 2 / row_bytes)  # one window is used while the next one is read
        full, rest = divmod(num_rows, batch_size)
        self._bounds = [(i * batch_size, (i + 1) * batch_size) for i in range(full)]
        if rest == 1 and full and batch_size > 1 and not drop_last:
            self._bounds[-1] = (self._bounds[-1][0], num_rows)
        elif rest and not drop_last:
            self._bounds.append((full * batch_size, num_rows))

    def __len__(self) -> int:
        return len(self._bounds)

    @property
    def num_rows(self) -> int:
        """Rows an epoch."""
        return sum(stop - start for start, stop in self._bounds)

    def __iter__(self) -> Iterator[Batch]:
        order = self._chosen
        if self._shuffle:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.epoch)
            # both types give the same permutation; the narrow one takes half the memory
            dtype = torch.int32 if self._rows < 2**31 else torch.int64
            permutation = torch.randperm(self._rows, generator=generator, dtype=dtype)
            order = permutation if self._chosen is None else self._chosen[permutation]
        self.epoch += 1
        return self._batches(order)

    def _batches(self, order: Tensor | None) -> Iterator[Batch]:
        stop = Event()
        with (
            ExitStack() as resources,
            closing(self._windows(order, stop, resources)) as reads,
            closing(_ahead(reads, min(self._workers, 1), 1, stop)) as windows,
            closing(partial(self._take, w, *bounds) for w in windows for bounds in w.bounds) as takes,
            closing(_ahead(takes, self._workers, 2 * self._workers, stop)) as batches,
        ):
            yield from batches

    def _take(self, window: _Window, start: int, stop: int) -> Batch:
        batch = _take(window.rows, window.order, start, stop)
        return batch.pin_memory() if self._pin_memory else batch

    def _groups(self, rows: int) -> list[Bounds]:
        """The batches of every window of about ``rows`` rows: at least one batch, and whole ones."""
        count = max(rows // self._batch_size, 1)
        return [self._bounds[i : i + count] for i in range(0, len(self._bounds), count)]

    @abstractmethod
    def _windows(self, order: Tensor | None, stop: Event, resources: ExitStack) -> Reads:
        """The windows of an epoch, each as a job that reads it, and raises an error soon after ``stop`` is set.

        ``resources`` are closed when no job runs any more.
        """


class Loader(_Epochs):
    """An iterable of :class:`~ctrlib.batch.Batch`; every ``iter()`` is one epoch and, with ``shuffle``, a new order.

    Args:
        split: the rows, from :meth:`ctrlib.data.store.Store.split`.
        batch_size: rows a batch. A last batch of a single row joins the one before (batch norm has no variance of one row).
        shuffle: a new full permutation of the rows each epoch; otherwise file order.
        seed: of the shuffle.
        drop_last: leave out a last batch that is not full.
        workers: threads that prepare batches ahead; 0: none. The batches do not depend on it.
        memory_mb: a split larger than this is shuffled in windows of half of it, at least one batch, each read from disk in
            one sweep; ``None``: half of the memory that is free. The batches do not depend on it. The permutation comes on top:
            4 bytes a row (8 from 2³¹ rows).
        pin_memory: give batches in page-locked memory, for training on a GPU.
        rows: [N] numbers of the only rows to give, in file order unless shuffled; ``None``: all.

    Attributes:
        epoch: number of the next epoch; counts up with every ``iter()``.

    Raises:
        DataError: an argument out of range, a row that the split lacks, or none.
    """

    def __init__(
        self,
        split: Split,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 1,
        memory_mb: float | None = None,
        pin_memory: bool = False,
        rows: Tensor | None = None,
    ) -> None:
        if rows is not None and (not len(rows) or not 0 <= int(rows.min()) <= int(rows.max()) < split.num_rows):
            raise DataError(
                f"rows holds {len(rows)} numbers, not all between 0 and {split.num_rows - 1}; expected one row or more, "
                "all of them in the split"
            )
        super().__init__(
            split.num_rows if rows is None else len(rows),
            _row_bytes(split),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            workers=workers,
            memory_mb=memory_mb,
            pin_memory=pin_memory,
        )
        self._split = split
        self._chosen = rows

    def _windows(self, order: Tensor | None, stop: Event, resources: ExitStack) -> Reads:
        if order is None or self._fits:
            yield partial(_Window, self._split, order, self._bounds)
            return
        for bounds in self._groups(self._window_rows):
            yield partial(self._sweep, order, bounds, stop)

    def _sweep(self, order: Tensor, bounds: Bounds, stop: Event) -> _Window:
        rows, places = _ascending(order, bounds)
        pieces = (_take(self._split, rows, at, min(at + _SWEEP_ROWS, len(rows))) for at in range(0, len(rows), _SWEEP_ROWS))
        return _Window(_join(pieces, len(rows), stop), places, _from_zero(bounds))


class StreamLoader(_Epochs):
    """The batches that a :class:`Loader` would give of a store of the same rows, bit for bit, without a store.

    With ``shuffle``, rows that fit into the budget once encoded are encoded in the first epoch and kept. Of more rows, every
    window is one more pass over the table, so a store is faster; ``num_windows`` says how many they are. Without ``shuffle``,
    an epoch is one pass, in blocks of about 131,072 rows.

    Args:
        encoder: a fitted one.
        source: anything :func:`~ctrlib.data.source.open_source` accepts, with labels; also a selection of rows.
        batch_size, shuffle, seed, drop_last: see :class:`Loader`.
        workers: threads that prepare batches, and if any, one that encodes ahead; encoding itself uses all cores.
        memory_mb: of encoded rows; ``None``: half of the memory that is free. The batches do not depend on it. The permutation
            comes on top (4 bytes a row, 8 from 2³¹ rows), and while a window is read, a few bytes per row of the table.

    Attributes:
        epoch: number of the next epoch; counts up with every ``iter()``.

    Raises:
        DataError: an argument out of range, a table without rows, or, while iterating, a value that cannot be encoded; names
            file, column and row.
    """

    def __init__(
        self,
        encoder: Encoder,
        source: object,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        workers: int = 1,
        memory_mb: float | None = None,
        pin_memory: bool = False,
    ) -> None:
        self._encoder = encoder
        self._source = open_source(source)
        if self._source.num_rows == 0:
            raise DataError(f"{self._source.name} has no rows; expected at least one")
        super().__init__(
            self._source.num_rows,
            self._encoded_row_bytes() if shuffle else 1,
            batch_size,
            shuffle=shuffle,
            seed=seed,
            drop_last=drop_last,
            workers=workers,
            memory_mb=memory_mb,
            pin_memory=pin_memory,
        )
        self._kept: Split | None = None
        self._leaks, self._counted = LeakCount(), 0  # of so many rows of the first epoch

    @property
    def num_windows(self) -> int:
        """Passes over the table that an epoch takes; if it is one and ``shuffle`` is set, only the first epoch takes it."""
        return len(self._groups(self._window_rows)) if self._shuffle and not self._fits else 1

    def _windows(self, order: Tensor | None, stop: Event, resources: ExitStack) -> Reads:
        if self._counted < self._rows:  # also after an epoch that was broken off
            self._leaks, self._counted = LeakCount(), 0
        if order is None:
            block_rows = max(BLOCK_ROWS // self._batch_size, 1) * self._batch_size
            blocks = resources.enter_context(closing(self._encoded(block_rows)))
            for bounds in self._groups(block_rows):
                yield partial(_next_blocks, blocks, bounds, stop)
        elif self._fits:
            yield partial(self._everything, order, stop)
        else:
            for bounds in self._groups(self._window_rows):
                yield partial(self._pass, order, bounds, stop)

    def _everything(self, order: Tensor, stop: Event) -> _Window:
        if self._kept is None:
            self._kept = _join(self._encoded(BLOCK_ROWS), self._rows, stop)
        return _Window(self._kept, order, self._bounds)

    def _pass(self, order: Tensor, bounds: Bounds, stop: Event) -> _Window:
        rows, places = _ascending(order, bounds)
        pieces = self._batches_of(self._selected(rows.numpy()))
        return _Window(_join(pieces, len(rows), stop), places, _from_zero(bounds))

    def _selected(self, rows: npt.NDArray[Any]) -> Generator[Encoded, None, None]:
        """Encode the rows of the source with these numbers."""
        wanted = np.zeros(self._source.num_rows, bool)
        wanted[rows] = True
        mask = wanted
        if self._source.codes is not None:  # the source is itself a selection: from its rows to those of the whole table
            chosen = self._source.chosen()
            mask = np.zeros(len(chosen), bool)
            mask[chosen] = wanted
        # few rows of many come in small blocks: every array that waits for its block to fill holds a dictionary
        block_rows = max(BLOCK_ROWS * len(rows) // len(mask), _SMALLEST_BLOCK)
        return self._encoder.encode(self._source.select(mask), block_rows=block_rows)

    def _encoded(self, block_rows: int) -> Pieces:
        return self._batches_of(self._encoder.encode(self._source, block_rows=block_rows))

    def _batches_of(self, blocks: Generator[Encoded, None, None]) -> Pieces:
        """The blocks as batches; once all rows were encoded, what leak guards dropped is told."""
        with closing(blocks):
            for block in blocks:
                if self._counted < self._rows:
                    self._leaks.add(block)
                    self._counted += len(block.sparse)
                    if self._counted >= self._rows:
                        self._leaks.log(self._source.name)
                yield block.batch()

    def _encoded_row_bytes(self) -> float:
        if not self._encoder.layout.sequences:
            with closing(self._encoder.encode(self._source, block_rows=1)) as blocks:
                return _row_bytes(_join((block.batch() for block in [next(blocks)]), 1, Event()))
        # rows near each other may have sequences of like length, so look at some from everywhere
        rows = np.arange(0, self._source.num_rows, max(self._source.num_rows // _SAMPLE_ROWS, 1))
        return _row_bytes(_join((block.batch() for block in self._selected(rows)), len(rows), Event()))


def _row_bytes(rows: Split) -> float:
    """Memory of a row in a window: its columns, twice what has no fixed size (pieces of sequences are joined), its places."""
    columns = [rows.sparse, rows.dense, rows.labels, rows.weight, rows.group]
    columns += [tensor for values, offsets in rows.sequences.values() for tensor in (values, values, offsets)]
    columns += [cuts for cuts in rows.inner.values() for _ in range(2)]
    return sum(c.numel() * c.element_size() for c in columns if c is not None) / rows.num_rows + 16


def _ahead(jobs: Iterable[Callable[[], T]], threads: int, depth: int, stop: Event) -> Generator[T, None, None]:
    """The results of ``jobs`` in order, up to ``depth`` of them worked out ahead by ``threads`` (0: when asked for).

    Leaving early sets ``stop``, drops the jobs that wait, and returns when those that run have ended.
    """
    if threads == 0:
        for job in jobs:
            yield job()
        return
    with ThreadPoolExecutor(threads) as pool:
        ahead: deque[Future[T]] = deque()
        try:
            for job in jobs:
                ahead.append(pool.submit(job))
                if len(ahead) > depth:
                    yield _result(ahead.popleft())
            while ahead:
                yield _result(ahead.popleft())
        finally:
            stop.set()
            for future in ahead:
                future.cancel()


def _result(future: Future[T]) -> T:
    # An endless wait would not notice Ctrl-C once another library handles it, as Polars does from its first query on.
    while not future.done():
        wait([future], timeout=_POLL_SECONDS)
    return future.result()


def _ascending(order: Tensor, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The rows at the places of a window in ascending order, and for every place, which of these it has."""
    rows, places = order[bounds[0][0] : bounds[-1][1]].sort()
    rank = torch.empty_like(rows)
    rank[places] = torch.arange(len(rows), dtype=rows.dtype)
    return rows, rank


def _from_zero(bounds: Bounds) -> Bounds:
    first = bounds[0][0]
    return [(start - first, stop - first) for start, stop in bounds]


def _next_blocks(blocks: Iterator[Batch], bounds: Bounds, stop: Event) -> _Window:
    """The next block, and where the last batch takes one row more, the one after."""
    found: list[Batch] = []
    while (count := sum(map(len, found))) < bounds[-1][1] - bounds[0][0]:
        found.append(next(blocks))
    return _Window(_join((block for block in found), count, stop), None, _from_zero(bounds))


def _join(pieces: Pieces, num_rows: int, stop: Event) -> Split:
    """Pieces that together have ``num_rows`` rows, one after another in memory.

    Raises:
        CancelledError: ``stop`` was set; nobody waits for the result.
    """
    columns: dict[str, Tensor] = {}
    values: dict[str, list[Tensor]] = {}
    offsets: dict[str, Tensor] = {}
    inner: dict[str, list[Tensor]] = {}
    ends: dict[str, int] = {}  # of inner offsets
    at = 0
    with closing(pieces):
        for piece in pieces:
            if stop.is_set():
                raise CancelledError
            end = at + len(piece)
            for name in ("sparse", "dense", "labels", "weight", "group"):
                column: Tensor | None = getattr(piece, name)
                if column is not None:
                    if name not in columns:
                        columns[name] = column.new_empty((num_rows, *column.shape[1:]))
                    columns[name][at:end] = column
            for name, ragged in piece.sequences.items():
                values.setdefault(name, []).append(ragged.values)
                bounds = offsets.setdefault(name, torch.zeros(num_rows + 1, dtype=torch.int64))
                bounds[at + 1 : end + 1] = ragged.offsets[1:].long() + bounds[at]
                if ragged.inner is not None:
                    cuts, before = inner.setdefault(name, [torch.zeros(1, dtype=torch.int64)]), ends.get(name, 0)
                    cuts.append(ragged.inner[1:].long() + before)
                    ends[name] = before + len(ragged.values)
            at = end
    return Split(
        num_rows=num_rows,
        sparse=columns["sparse"],
        dense=columns["dense"],
        sequences={name: (torch.cat(found), offsets[name]) for name, found in values.items()},
        labels=columns["labels"],
        weight=columns.get("weight"),
        group=columns.get("group"),
        inner={name: torch.cat(cuts) for name, cuts in inner.items()},
    )


def _take(rows: Split, order: Tensor | None, start: int, stop: int) -> Batch:
    """The rows at the places from ``start`` to ``stop``, in memory of their own."""
    at = None if order is None else order[start:stop]

    def take(column: Tensor) -> Tensor:
        return column[start:stop].clone() if at is None else torch.index_select(column, 0, at)

    sequences: dict[str, Ragged] = {}
    for name, (values, offsets) in rows.sequences.items():
        inner = rows.inner.get(name)
        sequences[name] = (
            _slice_ragged(values, offsets, inner, start, stop) if at is None else _take_ragged(values, offsets, inner, at)
        )
    return Batch(
        sparse=take(rows.sparse),
        dense=take(rows.dense),
        sequences=sequences,
        labels=take(rows.labels),
        weight=None if rows.weight is None else take(rows.weight),
        group=None if rows.group is None else take(rows.group),
    )


def _slice_ragged(values: Tensor, offsets: Tensor, inner: Tensor | None, start: int, stop: int) -> Ragged:
    bounds, cuts = _bounds(offsets, start, stop), None
    first, last = int(offsets[start]), int(offsets[stop])
    if inner is not None:
        cuts = _bounds(inner, first, last)
        first, last = int(inner[first]), int(inner[last])
    return Ragged(values[first:last].clone(), bounds, cuts)


def _bounds(offsets: Tensor, start: int, stop: int) -> Tensor:
    return (offsets[start : stop + 1] - offsets[start]).to(torch.int32)


def _take_ragged(values: Tensor, offsets: Tensor, inner: Tensor | None, rows: Tensor) -> Ragged:
    at, bounds = _positions(offsets, rows)
    cuts = None
    if inner is not None:
        at, cuts = _positions(inner, at)
    return Ragged(torch.index_select(values, 0, at), bounds, cuts)


def _positions(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where in the file the values of these rows are, one row after the other, and by which offsets the rows cut them."""
    starts = torch.index_select(offsets, 0, rows)
    lengths = torch.index_select(offsets[1:], 0, rows) - starts
    bounds = torch.cat([lengths.new_zeros(1), torch.cumsum(lengths, 0)])
    count = int(bounds[-1])
    # position of every value in the file: its row's start there, minus its row's start here, plus its place here
    at = torch.repeat_interleave(starts - bounds[:-1], lengths, output_size=count)
    at += torch.arange(count)
    return at, bounds.to(torch.int32)
