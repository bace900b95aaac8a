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

from ctrlib import _native
from ctrlib.data.numeric import Counts, narrow_codes
from ctrlib.schema import FIRST_VALUE_ID, OOV_ID, PADDING_ID, DataError

Ids = npt.NDArray[np.int32]
Hashes = npt.NDArray[np.uint64]
_Pointer = int | None
_EXACT_FLOATS = {16: 2.0**11, 32: 2.0**24, 64: 2.0**53}  # by bits
_HASHED = 1 << 16  # strings that are hashed at a time: bounds the memory it takes
_LONGEST = 1 << 12  # bytes of a string that its quick hash depends on
_PENDING = 1 << 18


def key_type(kind: Any) -> Any:
    """The Arrow type in which a vocabulary keeps values of a column of this type: int64 or large_string."""
    if pa.types.is_dictionary(kind) or pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return key_type(kind.value_type)
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind)
    return pa.int64() if number or pa.types.is_boolean(kind) or pa.types.is_null(kind) else pa.large_string()


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
    encoded = array if isinstance(array, pa.DictionaryArray) else _dictionary_encode(array)
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


def _dictionary_encode(array: Any) -> Any:
    narrow = narrow_codes(array)
    if narrow is None:
        return array.dictionary_encode()
    codes, low, size = narrow
    indices = pa.array(codes.astype(np.int32), mask=codes == size if array.null_count else None)
    return pa.DictionaryArray.from_arrays(indices, pa.array(np.arange(low, low + size)))


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
        if pc.any(pc.greater_equal(pc.abs(values.cast(pa.float64())), _EXACT_FLOATS[values.type.bit_width])).as_py():
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
    if len(values) > _HASHED:
        return np.concatenate([hash64(values.slice(at, _HASHED)) for at in range(0, len(values), _HASHED)])
    if len(values) == 0:
        return np.zeros(0, np.uint64)
    offsets, data = _text_buffers(values)
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


def _text_buffers(values: Any) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """Where each string of a large_string array starts (and the last one ends) in the bytes of all of them."""
    _, offset_buffer, data_buffer = values.buffers()
    offsets = np.frombuffer(offset_buffer or b"\0" * 8, np.int64)[values.offset : values.offset + len(values) + 1]
    data = np.frombuffer(data_buffer or b"", np.uint8)[offsets[0] : offsets[-1]]
    return offsets - offsets[0], data


def _search_hash(values: Any) -> Hashes:
    """A hash for tables in memory: as :func:`hash64`, but quick, free to change, and of long text that of its beginning."""
    if len(values) > _HASHED:
        return np.concatenate([_search_hash(values.slice(at, _HASHED)) for at in range(0, len(values), _HASHED)])
    if values.type == pa.int64():
        return _mix(values.to_numpy(zero_copy_only=False).view(np.uint64))
    offsets, data = _text_buffers(values)
    lengths = np.diff(offsets)
    padded = np.concatenate([data, np.zeros(8, np.uint8)])
    words: npt.NDArray[np.uint64] = np.ndarray(len(data) + 1, "<u8", padded, strides=(1,))  # the 8 bytes from every place
    masks = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)
    hashes = _mix(words[offsets[:-1]] & masks[np.minimum(lengths, 8)] ^ lengths.astype(np.uint64))
    done, rows = 8, np.flatnonzero(lengths > 8)
    while len(rows):
        left = lengths[rows] - done
        hashes[rows] = _mix(hashes[rows] ^ (words[offsets[rows] + done] & masks[np.minimum(left, 8)]))
        done, rows = done + 8, rows[left > 8] if done < _LONGEST else rows[:0]
    return hashes


class _Index:
    """Finds the positions of many values at a time, in an array of distinct values; the null at ``skip`` is none of them."""

    def __init__(self, values: Any, skip: int = -1) -> None:
        self.values = values
        if skip >= 0:  # the same memory, without the bits that tell which values are null
            self.values = pa.Array.from_buffers(values.type, len(values), [None, *values.buffers()[1:]], offset=values.offset)
        self._skip = skip
        self._native = _Slots(self.values, skip) if _native.kernel() is not None else None
        self._bits = len(values).bit_length()
        self._low = np.uint64((1 << self._bits) - 1)
        self._shift = np.uint64(63 - self._bits)  # of hashes with one bit less, since no shift is by 64

    @cached_property
    def _table(self) -> tuple[Hashes, Ids]:
        """Sorted entries, the leading bits of a hash and in place of its last ones a position; and where each bucket starts."""
        entries = _search_hash(self.values) & ~self._low | np.arange(len(self.values), dtype=np.uint64)
        entries = np.sort(entries if self._skip < 0 else np.delete(entries, self._skip))
        sizes = np.bincount(self._bucket(entries), minlength=1 << self._bits)
        return entries, np.concatenate([np.zeros(1, np.int32), np.cumsum(sizes, dtype=np.int32)])

    def _bucket(self, hashes: Hashes) -> npt.NDArray[np.int64]:
        return (hashes >> np.uint64(1) >> self._shift).view(np.int64)

    def find(self, values: Any) -> Ids:
        """The position of each value of a null-free array; -1: not there."""
        if self._native is not None:
            return self._native.find(values)
        found = np.full(len(values), -1, np.int32)
        all_entries, starts = self._table
        hashes = _search_hash(values)
        bucket = self._bucket(hashes)
        at, end = starts[bucket], starts[bucket + 1]
        left = np.flatnonzero(at < end)
        while len(left):
            entries = all_entries[at[left]]
            hit = np.flatnonzero((entries ^ hashes[left]) <= self._low)  # equal as far as entries tell
            position, row = (entries[hit] & self._low).view(np.int64), left[hit]
            same = pc.equal(self.values.take(pa.array(position)), values.take(pa.array(row))).to_numpy(zero_copy_only=False)
            found[row[same]] = position[same]
            at[left] += 1
            left = left[(found[left] < 0) & (at[left] < end[left])]
        return found


class _Slots:
    """What :class:`_Index` does, in C."""

    def __init__(self, values: Any, skip: int) -> None:
        self._values, self._skip = values, skip

    @cached_property
    def _table(self) -> tuple[Hashes, tuple[_Pointer, _Pointer]]:
        """The slots, 1.5 times as many as values, and where the values are."""
        slots = np.zeros(3 * len(self._values) // 2 + 1, np.uint64)
        hashes = _search_hash(self._values)
        _native.kernel().ctrlib_index(hashes.ctypes.data, len(hashes), self._skip, slots.ctypes.data, len(slots))
        return slots, _pointers(self._values)

    def find(self, values: Any) -> Ids:
        slots, known = self._table
        hashes, found = _search_hash(values), np.empty(len(values), np.int32)
        _native.kernel().ctrlib_find(
            hashes.ctypes.data, len(hashes), *_pointers(values), slots.ctypes.data, len(slots), *known, found.ctypes.data
        )
        return found


def _pointers(values: Any) -> tuple[_Pointer, _Pointer]:
    """Offsets and bytes of a large_string array; of an int64 array, ``None`` and its integers."""
    *offsets, data = values.buffers()[1:]
    first = 8 * values.offset
    if offsets:
        return (offsets[0].address + first if offsets[0] else None), (data.address if data else None)
    return None, (data.address + first if data else None)


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
        self._index = _Index(pa.array([], kind))
        self._counts: Counts = np.zeros(0, np.int64)  # of the values of the index
        self._new: list[tuple[Any, Counts]] = []  # values that the index lacks, perhaps several times
        self._last = (self._index.values, self._counts)  # the dictionary of the last blocks

    def update(self, keys: Any, weights: Counts | None = None) -> None:
        """Add a dictionary-encoded block, each row as often as ``weights`` says (default: once)."""
        values = keys.dictionary
        codes = keys.indices.fill_null(len(values)).to_numpy(zero_copy_only=False)
        counts = np.bincount(codes, weights, len(values) + 1).astype(np.int64)  # exact in floats, up to 2^53
        self.nulls += int(counts[-1])
        counts = counts[:-1]
        before, so_far = self._last
        if begins_with(values, before):  # blocks of one row group of a Parquet file share a dictionary, or lengthen it
            counts[: len(before)] += so_far
        else:
            self._look_up()
        self._last = (values, counts)

    def _look_up(self) -> None:
        values, counts = self._last
        seen = np.flatnonzero(counts)
        if len(seen) < len(counts):
            values, counts = values.take(pa.array(seen)), counts[seen]
        at = self._index.find(values)
        known = at >= 0
        np.add.at(self._counts, at[known], counts[known])
        self._new.append((values.filter(pa.array(~known)), counts[~known]))
        self._last = (values.slice(0, 0), counts[:0])
        if sum(len(new) for _, new in self._new) > max(_PENDING, len(self._counts)):
            self._merge()

    def _merge(self) -> None:
        if not self._new:
            return
        values, counts = zip(*self._new, strict=True)
        distinct = pa.concat_arrays(values).dictionary_encode()
        codes = distinct.indices.to_numpy(zero_copy_only=False)
        totals = np.bincount(codes, np.concatenate(counts), len(distinct.dictionary))
        self._index = _Index(pa.concat_arrays([self._index.values, distinct.dictionary]))
        self._counts = np.concatenate([self._counts, totals.astype(np.int64)])
        self._new = []

    def result(self) -> tuple[Any, Counts]:
        """Distinct non-null values and how often each occurred."""
        self._look_up()
        self._merge()
        return self._index.values, self._counts


def begins_with(values: Any, start: Any) -> bool:
    """Whether the first values of an array are those of another (compared as memory, where both hold strings or integers)."""
    return len(values) >= len(start) and bool(values.slice(0, len(start)).equals(start))


@dataclass(frozen=True)
class Vocabulary:
    """Values in id order (``values[i]`` has id ``i + 2``; at most one is null) and their counts in the training rows.

    A selection may have dropped values (:meth:`keep`). They are known, and so not OOV: their id is that of padding, a zero
    vector.

    Attributes:
        values: those that have an id, then the dropped ones.
        counts: of each.
        dropped: how many of the last values have no id.
        oov_dropped: values that are not known get the id of padding too.
    """

    values: Any
    counts: npt.NDArray[np.int64]
    dropped: int = 0
    oov_dropped: bool = False

    @classmethod
    def fit(cls, counter: ValueCounter, min_count: int, max_size: int | None) -> Vocabulary:
        """Keep values seen at least ``min_count`` times, at most ``max_size``; most frequent first, ties by value."""
        values, counts = counter.result()
        keep = pa.array(counts >= min_count)
        values, counts = values.filter(keep), counts[keep.to_numpy(zero_copy_only=False)]
        if counter.nulls >= min_count:
            values = pa.concat_arrays([values, pa.nulls(1, values.type)])
            counts = np.append(counts, counter.nulls)
        return cls.ordered(values, counts, max_size)

    @classmethod
    def ordered(cls, values: Any, counts: Counts, max_size: int | None = None) -> Vocabulary:
        """The most frequent of these distinct values first, ties by value; at most ``max_size``."""
        table = pa.table({"value": values, "count": counts})
        order = pc.sort_indices(table, sort_keys=[("count", "descending"), ("value", "ascending")])
        order = order.slice(0, max_size) if max_size is not None else order
        return cls(values.take(order), counts[order.to_numpy()])

    @property
    def size(self) -> int:
        """Ids, padding and OOV included."""
        return len(self.values) - self.dropped + FIRST_VALUE_ID

    @cached_property
    def missing_id(self) -> int:
        """The id of a missing value: its own if the training rows had enough of them, else OOV."""
        return int(self._ids(np.array([self._null], np.int32))[0])

    @cached_property
    def _null(self) -> int:
        return int(pc.index(pc.is_null(self.values), pa.scalar(True)).as_py())  # -1: none

    @cached_property
    def _index(self) -> _Index:
        return _Index(self.values, self._null)

    def ids(self, keys: Any) -> Ids:
        """Ids of a dictionary-encoded block of keys (:func:`as_keys`); values outside the vocabulary get OOV."""
        return _spread(keys, self._ids(self._index.find(keys.dictionary)), self.missing_id)

    def key_ids(self, keys: npt.NDArray[np.int64]) -> Ids:
        """As :meth:`ids`, of integers as they are, where nearly every one may be different."""
        return self._ids(self._index.find(pa.array(keys)))

    def _ids(self, at: Ids) -> Ids:
        """From places among the values."""
        ids = at + np.int32(FIRST_VALUE_ID)  # nowhere, -1, becomes OOV
        if self.dropped:
            ids[ids >= self.size] = PADDING_ID
        if self.oov_dropped:
            ids[ids == OOV_ID] = PADDING_ID
        return ids

    def keep(self, kept: npt.NDArray[np.bool_]) -> tuple[Vocabulary, Ids]:
        """The vocabulary without the values, perhaps without the OOV, whose id is not kept.

        Args:
            kept: [size] by id; padding is always kept.

        Returns:
            The vocabulary, and [size] the new id of every old one, 0 where it was dropped. The order of the others stays.
        """
        places = np.flatnonzero(kept[FIRST_VALUE_ID:])
        oov_dropped = self.oov_dropped or not kept[OOV_ID]
        gone = np.flatnonzero(~kept[FIRST_VALUE_ID:])
        gone = np.append(gone, np.arange(len(kept) - FIRST_VALUE_ID, len(self.values)))
        if oov_dropped:  # then what is dropped need not be told from what was never seen
            gone = gone[:0]
        order = np.append(places, gone)
        new_ids = np.zeros(len(kept), np.int32)
        new_ids[OOV_ID] = OOV_ID if kept[OOV_ID] else PADDING_ID
        new_ids[places + FIRST_VALUE_ID] = np.arange(len(places), dtype=np.int32) + FIRST_VALUE_ID
        return Vocabulary(self.values.take(pa.array(order)), self.counts[order], len(gone), oov_dropped), new_ids

    def fingerprint(self) -> bytes:
        """Bytes that change with any value, order or count."""
        nulls = pc.is_null(self.values).to_numpy(zero_copy_only=False)
        parts: list[bytes] = [hash64(self.values.drop_null()).tobytes(), nulls.tobytes(), self.counts.tobytes()]
        if self.dropped or self.oov_dropped:
            parts.append(f"dropped {self.dropped} {self.oov_dropped}".encode())
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
        return _spread(keys, self._buckets(keys.dictionary), OOV_ID)

    def key_ids(self, keys: npt.NDArray[np.int64]) -> Ids:
        """As :meth:`ids`, of integers as they are; those below 0 are OOV."""
        return np.where(keys < 0, np.int32(OOV_ID), self._buckets(pa.array(keys)))

    def _buckets(self, values: Any) -> Ids:
        return (hash64(values) % np.uint64(self.buckets)).astype(np.int32) + np.int32(FIRST_VALUE_ID)

    def fingerprint(self) -> bytes:
        """Bytes that change with the number of buckets."""
        return f"hash {self.buckets}".encode()
