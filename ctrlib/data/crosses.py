"""Crosses: the values of two fields read as one. Their keys, and their vocabularies within bounded memory.

The ids of the crossed fields are written to a temporary file once, a column after the other. Then one pair at a time is counted
from its two columns, in as many parts of its keys as the limit asks for, so that memory grows with what is kept and not with
what is seen. After every part, of whichever pair, all that is kept is held against the limit.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from os import cpu_count
from threading import Lock
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctrlib.data.memory import half_of_free_mb
from ctrlib.data.numeric import Counts
from ctrlib.data.source import BLOCK_ROWS
from ctrlib.data.vocabulary import HashBuckets, Ids, ValueCounter, Vocabulary, as_keys
from ctrlib.progress import track
from ctrlib.schema import FIRST_VALUE_ID, CrossField, DataError, SparseColumn

Keys = npt.NDArray[np.int64]

VALUE_BYTES = 4 * 4 * 16 + 28
"""What a value is taken to cost when crosses are counted: a row of width 16 with its gradient and the two moments of dense Adam
in float32; key, count and index of the vocabulary. :func:`ctrlib.memory.cross_memory` knows the real width and optimizer."""

_COUNT_BYTES = 100  # of a distinct key while it is counted
_SMALLEST_PART = 1 << 16  # keys that are counted in one pass, however low the limit
_NONE = -1  # the key of a pair that has no id of its own


def cross_keys(first: Ids, second: Ids, second_size: int) -> Keys:
    """id_1 · size_2 + id_2, and −1 where either is padding or OOV."""
    known = (first >= FIRST_VALUE_ID) & (second >= FIRST_VALUE_ID)
    return np.where(known, first.astype(np.int64) * second_size + second, _NONE)


def most_values(cross: CrossField, sizes: Mapping[str, int], rows: int) -> int:
    """A bound on the values of a cross before it is counted: min(\\|A\\|·\\|B\\|, rows/min_count, max_size), or hash_size.

    Args:
        cross: of fields A and B.
        sizes: ids by field, padding and OOV included.
        rows: of the training table.
    """
    if cross.hash_size is not None:
        return cross.hash_size
    bound = min(_most_pairs(cross, sizes), rows // cross.min_count)
    return bound if cross.max_size is None else min(bound, cross.max_size)


def _most_pairs(cross: CrossField, sizes: Mapping[str, int]) -> int:
    first, second = (sizes[name] - FIRST_VALUE_ID for name in cross.of)
    return first * second


def fit_crosses(
    crosses: Sequence[CrossField],
    columns: Sequence[SparseColumn],
    blocks: Iterable[Ids],
    rows: int,
    memory_mb: float | None = None,
) -> dict[str, Vocabulary | HashBuckets]:
    """The vocabulary of every cross.

    Args:
        crosses: of fields among ``columns``.
        columns: what the columns of the blocks mean.
        blocks: the ids of the training rows, [N, F].
        rows: of all blocks.
        memory_mb: what the crosses may take in training, at :data:`VALUE_BYTES` a value; ``None``: half of the free memory.

    Raises:
        DataError: they would take more; says what to change. Pairs are counted largest bound first, and no further than to the
            limit, so it comes early.
    """
    limit = (half_of_free_mb() if memory_mb is None else memory_mb) * 2**20
    sizes = {c.name: c.vocab_size for c in columns}
    vocabularies: dict[str, Vocabulary | HashBuckets] = {
        c.name: HashBuckets(c.hash_size) for c in crosses if c.hash_size is not None
    }
    kept = _Kept(len(crosses), limit)
    for name, hashed in vocabularies.items():
        kept.note(name, hashed.size)
    kept.check()
    counted = [c for c in crosses if c.hash_size is None]
    if not counted:
        return vocabularies
    counted.sort(key=lambda c: -most_values(c, sizes, rows))
    used = {name for c in counted for name in c.of}
    at_once = max(int(limit / (_COUNT_BYTES * _SMALLEST_PART)), 1)  # parts in hand, which may not be smaller
    threads = min(cpu_count() or 1, len(counted), at_once) if rows > BLOCK_ROWS else 1
    with ExitStack() as stack:
        ids = _spill([(i, c.name) for i, c in enumerate(columns) if c.name in used], blocks, stack)
        pool = stack.enter_context(ThreadPoolExecutor(threads))
        bar = stack.enter_context(track("count crosses", len(counted), "crosses"))

        def fit(cross: CrossField) -> Vocabulary:
            kept.check()  # another thread may have come to the limit
            first, second = (ids[name] for name in cross.of)
            seen = min(_most_pairs(cross, sizes), rows)
            parts = math.ceil(max(seen, 1) / max(limit / (_COUNT_BYTES * threads), _SMALLEST_PART))
            return _fit_cross(cross, first, second, sizes[cross.of[1]], parts, kept)

        for cross, vocabulary in zip(counted, pool.map(fit, counted), strict=True):
            vocabularies[cross.name] = vocabulary
            bar.advance(1)
    return vocabularies


class _Kept:
    """How many values are kept of each cross so far, for several threads."""

    def __init__(self, crosses: int, limit: float) -> None:
        self._crosses, self._limit = crosses, limit
        self._sizes: dict[str, int] = {}
        self._lock = Lock()

    def note(self, name: str, size: int) -> None:
        """Of this cross there are so many ids by now."""
        with self._lock:
            self._sizes[name] = size

    def check(self) -> None:
        """Raise :class:`DataError` if all together take more than the limit; every thread then ends with its next part."""
        with self._lock:
            sizes = dict(self._sizes)
        total = sum(sizes.values())
        if total * VALUE_BYTES <= self._limit:
            return
        largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
        raise DataError(
            f"the crosses are too large: {len(sizes)} of {self._crosses} have {total:,} values so far, which take about "
            f"{total * VALUE_BYTES / 2**20:,.0f} MB in training ({VALUE_BYTES} bytes each); allowed are "
            f"{self._limit / 2**20:,.0f} MB (cross_memory_mb). Raise their min_count, set max_size or hash_size, cross fewer "
            "fields, or allow more; the largest: " + ", ".join(f"{name!r} with {sizes[name]:,}" for name in largest)
        )


def _spill(columns: Sequence[tuple[int, str]], blocks: Iterable[Ids], stack: ExitStack) -> dict[str, Ids]:
    """Columns by name, mapped from temporary files that go with ``stack``."""
    files: dict[str, IO[bytes]] = {}
    try:
        for _, name in columns:
            files[name] = stack.enter_context(tempfile.TemporaryFile(prefix="ctrlib-"))  # noqa: SIM115 — the stack closes it
        for block in blocks:
            for i, name in columns:
                files[name].write(np.ascontiguousarray(block[:, i]).data)
        for file in files.values():
            file.flush()
    except OSError as error:
        raise DataError(
            f"counting crosses needs room in {tempfile.gettempdir()} for 4 bytes a row and crossed field, which cannot be "
            f"written ({error.strerror}); free some space, or name another folder in the environment variable TMPDIR"
        ) from error
    return {name: np.memmap(file, np.int32, "r") for name, file in files.items()}


def _fit_cross(cross: CrossField, first: Ids, second: Ids, second_size: int, parts: int, kept: _Kept) -> Vocabulary:
    """Count the keys of one pair, those with each remainder modulo ``parts`` in a pass of their own."""
    values: list[Keys] = []
    counts: list[Counts] = []
    size = 0
    for part in range(parts):
        counter = ValueCounter(pa.int64())
        for start in range(0, len(first), BLOCK_ROWS):
            keys = cross_keys(first[start : start + BLOCK_ROWS], second[start : start + BLOCK_ROWS], second_size)
            keys = keys[(keys != _NONE) & (keys % parts == part)]
            counter.update(as_keys(pa.array(keys), pa.int64(), str))
        found, count = counter.result()
        frequent = count >= cross.min_count
        values.append(found.to_numpy()[frequent])
        counts.append(count[frequent])
        size += len(counts[-1])
        kept.note(cross.name, FIRST_VALUE_ID + (size if cross.max_size is None else min(size, cross.max_size)))
        kept.check()
        if cross.max_size is not None and size > 2 * cross.max_size:  # what is cut off in the end would be held until then
            best = _joined(values, counts, cross.max_size)
            values, counts, size = [best.values.to_numpy()], [best.counts], cross.max_size
    return _joined(values, counts, cross.max_size)


def _joined(values: Sequence[Keys], counts: Sequence[Counts], max_size: int | None) -> Vocabulary:
    return Vocabulary.ordered(pa.array(np.concatenate(values)), np.concatenate(counts), max_size)
