"""Raw value ↔ id of one field. Id 0 is padding, id 1 is OOV; ids from 2 follow falling frequency in the training rows.

Values are 64-bit integers or strings and never pass through floats. A missing value is a value like any other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ctrlib.schema import FIRST_VALUE_ID, OOV_ID, DataError

Ids = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint64]
_EXACT_FLOATS = 2.0**53


def key_type(kind: Any) -> Any:
    """The Arrow type in which a vocabulary keeps values of a column of this type: int64 or large_string."""
    if pa.types.is_dictionary(kind) or pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return key_type(kind.value_type)
    numeric = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    return pa.int64() if numeric else pa.large_string()


def as_keys(array: Any, kind: Any, describe: Callable[[int], str]) -> Any:
    """``array`` as dictionary-encoded keys of type ``kind``, exactly, or an error that names the first value that cannot be.

    Args:
        describe: the place of a row, for errors, e.g. ``"column 'C1', part-0.parquet, row 17"``.
    """
    if pa.types.is_nested(array.type):
        raise DataError(f"{describe(0)}: the column holds {array.type}, not single values; declare the field as a sequence")
    if pa.types.is_floating(array.type):
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
    if isinstance(array, pa.DictionaryArray) and array.dictionary.null_count:
        array = array.dictionary_decode()
    if pa.types.is_null(array.type):
        array = array.cast(kind)
    encoded = array if isinstance(array, pa.DictionaryArray) else array.dictionary_encode()
    values = encoded.dictionary
    try:
        keys = _exact(values, kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        bad = next((i for i in range(len(values)) if not _castable(values.slice(i, 1), kind)), 0)
        row = pc.index(encoded.indices, pa.scalar(bad, encoded.indices.type)).as_py()
        if row < 0:  # the value belongs to other rows than these
            return as_keys(encoded.dictionary_decode(), kind, describe)
        wanted = "an integer id" if kind == pa.int64() else "text or an integer id"
        raise DataError(
            f"{describe(row)}: {values[bad].as_py()!r} is not {wanted}; "
            "give the column the type it had in the training rows, or declare the field dense"
        ) from error
    return pa.DictionaryArray.from_arrays(encoded.indices.cast(pa.int32()), keys)


def _castable(value: Any, kind: Any) -> bool:
    try:
        _exact(value, kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def _exact(values: Any, kind: Any) -> Any:
    if kind == pa.int64() and (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
        return _integers_in_text(values)
    if values.type == pa.uint64() and kind == pa.int64():  # the same 64 bits: 2^64 distinct values stay distinct
        values = values.view(pa.int64())
    elif pa.types.is_floating(values.type):  # pandas turns integer columns with gaps into floats
        if pc.any(pc.greater_equal(pc.abs(values), _EXACT_FLOATS)).as_py():
            raise pa.ArrowInvalid("a float this large may stand for several integers")
        values = pc.cast(values, pa.int64())
    return values if values.type == kind else pc.cast(values, kind)


def _integers_in_text(texts: Any) -> Any:
    try:
        integers = pc.cast(texts, pa.int64())
    except pa.ArrowInvalid:
        integers = pc.cast(texts, pa.uint64())
    if not pc.all(pc.equal(pc.cast(integers, texts.type), texts), min_count=0).as_py():
        raise pa.ArrowInvalid("007 and 0x7 are codes, not the number 7")
    return integers.view(pa.int64())


def _mix(x: Hashes) -> Hashes:
    """The finaliser of splitmix64 (Steele, Lea, Flood 2014): a bijection of 64-bit words that looks random."""
    with np.errstate(over="ignore"):
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash64(values: Any) -> Hashes:
    """A fixed 64-bit hash of every value of a null-free int64 or large_string array: the same on every machine and version."""
    if values.type == pa.int64():
        return _mix(values.to_numpy(zero_copy_only=False).view(np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    length = len(values)
    _, offset_buffer, data_buffer = values.buffers()
    if length == 0:
        return np.zeros(0, np.uint64)
    offsets = np.frombuffer(offset_buffer, np.int64)[values.offset : values.offset + length + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    offsets = offsets - offsets[0]
    lengths = np.diff(offsets)
    # Polynomial in a fixed odd base over bytes spread to random words, all strings at once by a running sum.
    powers = np.full(int(lengths.max(initial=0)) + 1, 0x9E3779B97F4A7C15, np.uint64)
    powers[0] = 1
    letters = _mix(np.arange(1, 257, dtype=np.uint64))
    with np.errstate(over="ignore"):
        powers = np.multiply.accumulate(powers)
        terms = letters[data] * powers[np.arange(len(data)) - np.repeat(offsets[:-1], lengths)]
        sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(terms, dtype=np.uint64)])
        return _mix(sums[offsets[1:]] - sums[offsets[:-1]] + lengths.astype(np.uint64))


def _spread(keys: Any, dictionary_ids: Ids, missing_id: int) -> Ids:
    """The id of every row from the ids of the distinct values."""
    codes: npt.NDArray[Any] = keys.indices.fill_null(len(keys.dictionary)).to_numpy(zero_copy_only=False)
    ids: Ids = np.append(dictionary_ids, np.int32(missing_id))[codes]
    return ids


class ValueCounter:
    """Counts of distinct values over many blocks; memory grows with the distinct values only."""

    def __init__(self, kind: Any) -> None:
        self.nulls = 0
        self._kind = kind
        self._values: list[Any] = []
        self._counts: list[npt.NDArray[np.int64]] = []
        self._pending = 0
        self._merged = 0

    def update(self, keys: Any) -> None:
        """Add a dictionary-encoded block."""
        self.nulls += keys.null_count
        codes = keys.indices.drop_null().to_numpy(zero_copy_only=False)
        counts = np.bincount(codes, minlength=len(keys.dictionary))
        self._values.append(keys.dictionary)
        self._counts.append(counts)
        self._pending += len(counts)
        if self._pending > max(1 << 20, 2 * self._merged):
            self._merge()

    def _merge(self) -> None:
        values = pa.concat_arrays(self._values).dictionary_encode() if self._values else None
        if values is None:
            self._values, self._counts = [pa.array([], self._kind)], [np.zeros(0, np.int64)]
        else:
            codes = values.indices.to_numpy(zero_copy_only=False)
            totals = np.zeros(len(values.dictionary), np.int64)
            np.add.at(totals, codes, np.concatenate(self._counts))
            self._values, self._counts = [values.dictionary], [totals]
        self._pending = self._merged = len(self._counts[0])

    def result(self) -> tuple[Any, npt.NDArray[np.int64]]:
        """Distinct non-null values and how often each occurred."""
        self._merge()
        seen = self._counts[0] > 0
        return self._values[0].filter(pa.array(seen)), self._counts[0][seen]


@dataclass(frozen=True)
class Vocabulary:
    """Values in id order (``values[i]`` has id ``i + 2``; at most one is null) and their counts in the training rows."""

    values: Any
    counts: npt.NDArray[np.int64]

    @classmethod
    def fit(cls, counter: ValueCounter, min_count: int, max_size: int | None) -> Vocabulary:
        """Keep values seen at least ``min_count`` times, at most ``max_size``; most frequent first, ties by value."""
        values, counts = counter.result()
        keep = pa.array(counts >= min_count)
        values, counts = values.filter(keep), counts[keep.to_numpy(zero_copy_only=False)]
        if counter.nulls >= min_count:
            values = pa.concat_arrays([values, pa.nulls(1, values.type)])
            counts = np.append(counts, counter.nulls)
        table = pa.table({"value": values, "count": counts})
        order = pc.sort_indices(table, sort_keys=[("count", "descending"), ("value", "ascending")])
        order = order.slice(0, max_size) if max_size is not None else order
        return cls(values.take(order), counts[order.to_numpy()])

    @property
    def size(self) -> int:
        """Ids, padding and OOV included."""
        return len(self.values) + FIRST_VALUE_ID

    @cached_property
    def missing_id(self) -> int:
        """The id of a missing value: its own if the training rows had enough of them, else OOV."""
        nulls = pc.is_null(self.values).to_numpy(zero_copy_only=False)
        return int(np.argmax(nulls)) + FIRST_VALUE_ID if nulls.any() else OOV_ID

    @cached_property
    def _index(self) -> tuple[npt.NDArray[Any], Ids]:
        """Sorted search keys (the integers themselves, or hashes of strings) and the id of each."""
        present = np.flatnonzero(pc.is_valid(self.values).to_numpy(zero_copy_only=False))
        keys = self._search_keys(self.values.take(pa.array(present)))
        order = np.argsort(keys, kind="stable")
        if len(keys) and self.values.type != pa.int64() and (np.diff(keys[order]) == 0).any():
            raise DataError("two values of one field have the same 64-bit hash; rename one of them")  # chance 1 in 10^7 at 10^6
        return keys[order], (present[order] + FIRST_VALUE_ID).astype(np.int32)

    def _search_keys(self, values: Any) -> npt.NDArray[Any]:
        keys: npt.NDArray[Any] = values.to_numpy(zero_copy_only=False) if values.type == pa.int64() else hash64(values)
        return keys

    def ids(self, keys: Any) -> Ids:
        """Ids of a dictionary-encoded block of keys (:func:`as_keys`); values outside the vocabulary get OOV."""
        return _spread(keys, self._dictionary_ids(keys.dictionary), self.missing_id)

    def _dictionary_ids(self, values: Any) -> Ids:
        found = np.full(len(values), OOV_ID, np.int32)
        sorted_keys, ids = self._index
        if not len(sorted_keys) or not len(values):
            return found
        keys = self._search_keys(values)
        at = np.minimum(np.searchsorted(sorted_keys, keys), len(sorted_keys) - 1)
        hit = np.flatnonzero(sorted_keys[at] == keys)
        if self.values.type != pa.int64():  # equal hashes are not yet equal strings
            same = pc.equal(values.take(pa.array(hit)), self.values.take(pa.array(ids[at[hit]] - FIRST_VALUE_ID)))
            hit = hit[same.to_numpy(zero_copy_only=False)]
        found[hit] = ids[at[hit]]
        return found

    def fingerprint(self) -> bytes:
        """Bytes that change with any value, order or count."""
        nulls = pc.is_null(self.values).to_numpy(zero_copy_only=False)
        parts: list[bytes] = [hash64(self.values.drop_null()).tobytes(), nulls.tobytes(), self.counts.tobytes()]
        return b"".join(parts)


@dataclass(frozen=True)
class HashBuckets:
    """The hashing alternative to a :class:`Vocabulary`: nothing is learned; a missing value is OOV."""

    buckets: int

    @property
    def size(self) -> int:
        """Ids, padding and OOV included."""
        return self.buckets + FIRST_VALUE_ID

    def ids(self, keys: Any) -> Ids:
        """Ids of a dictionary-encoded block of keys."""
        hashed = (hash64(keys.dictionary) % np.uint64(self.buckets)).astype(np.int32) + FIRST_VALUE_ID
        return _spread(keys, hashed, OOV_ID)

    def fingerprint(self) -> bytes:
        """Bytes that change with the number of buckets."""
        return f"hash {self.buckets}".encode()
