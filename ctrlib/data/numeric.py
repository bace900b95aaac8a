"""Numeric columns: what is learned from the training rows, and the encodings of :class:`~ctrlib.schema.DenseField`.

Everything learned is independent of the order of the rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ctrlib.schema import FIRST_VALUE_ID, OOV_ID, DataError, NumericEncoding

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
_MAX_DISTINCT = 1 << 20


def as_floats(array: Any, describe: Callable[[int], str]) -> Floats:
    """A numeric Arrow array as float64, NaN where the value is missing (null or NaN).

    Raises:
        DataError: text that is not a number, or an infinity; names the place of the first.
    """
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    try:
        values: Floats = pc.cast(array, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        bad = next((i for i in range(len(array)) if not _is_number(array.slice(i, 1))), 0)
        raise DataError(
            f"{describe(bad)}: {array[bad].as_py()!r} is not a number; expected numbers or missing values in a dense field"
        ) from error
    infinite = np.isinf(values)
    if infinite.any():
        bad = int(np.argmax(infinite))
        raise DataError(f"{describe(bad)}: the value is {values[bad]}; replace infinities by numbers, or by nulls for missing")
    return values


def _is_number(value: Any) -> bool:
    try:
        pc.cast(value, pa.float64(), safe=False)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return False
    return True


def narrow_codes(array: Any) -> tuple[npt.NDArray[np.int64], int, int] | None:
    """Integers of a narrow range as codes that count from the smallest; ``None`` for any other array.

    What is done to every row can then be done to the range alone, and looked up.

    Returns:
        The code of every row, the smallest value (code 0) and the size of the range (the code of missing values).
    """
    if not pa.types.is_integer(array.type) or array.null_count == len(array):
        return None
    low, high = (v.as_py() for v in pc.min_max(array).values())
    size = high - low + 1
    if size > 2 * len(array) or not -(2**63) <= low <= high < 2**63 - 1:
        return None
    if array.null_count:
        if high == np.iinfo(array.type.to_pandas_dtype()).max:  # no room for the code of missing values
            array = pc.cast(array, pa.int64())
        array = array.fill_null(high + 1)
    return np.subtract(array.to_numpy(), low, dtype=np.int64), low, size


def tally(array: Any, describe: Callable[[int], str]) -> tuple[Floats, Counts]:
    """Numbers of a column and how often each occurs; a number may come more than once. NaN is missing.

    Raises:
        DataError: see :func:`as_floats`.
    """
    narrow = narrow_codes(array)
    if narrow is None:
        x = as_floats(array, describe)
        return x, np.ones(len(x), np.int64)
    codes, low, size = narrow
    counts = np.bincount(codes)
    seen = np.flatnonzero(counts)
    return np.where(seen < size, seen + float(low), np.nan), counts[seen]


def signed_log(x: Floats) -> Floats:
    """sign(x)·ln(1 + |x|)."""
    return np.sign(x) * np.log1p(np.abs(x))


def criteo_log(x: Floats) -> npt.NDArray[np.int64]:
    """⌊ln²x⌋ for x > 2, else ⌊x⌋: the winning Criteo 2014 transform (AutoInt, arXiv:1810.11921). No NaN in ``x``."""
    return np.floor(np.where(x > 2, np.log(np.maximum(x, 1)) ** 2, x)).astype(np.int64)


class Moments:
    """Count, mean, variance, minimum, maximum of the values seen, missing ones aside."""

    def __init__(self) -> None:
        self.missing = 0
        self.minimum, self.maximum = math.inf, -math.inf
        self._blocks: list[tuple[int, float, float]] = []

    def update(self, x: Floats, counts: Counts | None = None) -> None:
        """Add a block: numbers and how often each occurs (default: once); NaN is missing."""
        counts = np.ones(len(x), np.int64) if counts is None else counts
        known = ~np.isnan(x)
        present, n = x[known], counts[known]
        rows = int(n.sum())
        self.missing += int(counts.sum()) - rows
        if rows:
            low, high = float(present.min()) + 0.0, float(present.max()) + 0.0  # + 0.0: −0 is 0
            self.minimum, self.maximum = min(self.minimum, low), max(self.maximum, high)
            mean = float((present * n).sum()) / rows
            self._blocks.append((rows, mean, float((n * (present - mean) ** 2).sum())))

    def mean_std(self) -> tuple[float, float]:
        """Mean and population standard deviation (1 for a constant), rounded so that the order of rows cannot show."""
        n = sum(b[0] for b in self._blocks)
        if n == 0:
            return 0.0, 1.0
        if self.minimum == self.maximum:
            return self.minimum, 1.0
        mean = math.fsum(b[0] * b[1] for b in self._blocks) / n
        squares = math.fsum([b[2] + b[0] * (b[1] - mean) ** 2 for b in self._blocks])
        std = math.sqrt(squares / n)
        if std <= 1e-12 * abs(mean):
            std = 1.0
        # Rounding errors of the mean are as large as the values, however near to zero it is itself.
        digits = 9 - math.floor(math.log10(max(std, 1e-3 * abs(mean))))
        return round(mean, digits) + 0.0, float(f"{std:.10g}")


class Quantiles:
    """Exact counts of up to 2^20 distinct values; beyond that, of values rounded to as few leading bits as keep within it."""

    def __init__(self) -> None:
        self._keys: npt.NDArray[np.uint64] = np.zeros(0, np.uint64)
        self._counts: Counts = np.zeros(0, np.int64)
        self._blocks: list[tuple[npt.NDArray[np.uint64], Counts]] = []
        self._dropped_bits = 0

    def update(self, x: Floats, counts: Counts | None = None) -> None:
        """Add a block: numbers and how often each occurs (default: once); NaN is missing."""
        known = ~np.isnan(x)
        bits = (x[known] + 0.0).view(np.uint64)  # + 0.0: −0 is 0
        sign = np.uint64(1 << 63)
        ordered = np.where(bits & sign, ~bits, bits | sign)  # unsigned integers in the order of the floats
        ones = np.ones(len(ordered), np.int64)
        self._blocks.append(_distinct(self._round(ordered), ones if counts is None else counts[known]))
        if sum(len(keys) for keys, _ in self._blocks) > _MAX_DISTINCT:
            self._merge()

    def _round(self, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        shift = np.uint64(self._dropped_bits)
        return (keys >> shift) << shift

    def _merge(self) -> None:
        blocks = [(self._keys, self._counts), *self._blocks]
        self._keys, self._counts = _distinct(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))
        self._blocks = []
        if len(self._keys) > _MAX_DISTINCT:
            widths = _bit_length(self._keys[1:] ^ self._keys[:-1])  # neighbours are one when as many bits are dropped
            self._dropped_bits = int(np.partition(widths, -_MAX_DISTINCT)[-_MAX_DISTINCT])
            self._keys, self._counts = _distinct(self._round(self._keys), self._counts)

    def edges(self, num_bins: int) -> tuple[float, ...]:
        """Distinct quantiles at 0, 1/num_bins, …, 1: at most ``num_bins`` + 1 of them, rising."""
        self._merge()
        if not len(self._keys):
            return ()
        sign = np.uint64(1 << 63)
        values = np.where(self._keys & sign, self._keys ^ sign, ~self._keys).view(np.float64)
        cumulative = np.cumsum(self._counts)
        ranks = np.arange(num_bins + 1) * (cumulative[-1] - 1) // num_bins
        return tuple(float(v) for v in np.unique(values[np.searchsorted(cumulative, ranks, side="right")]))


def _distinct(keys: npt.NDArray[np.uint64], counts: Counts) -> tuple[npt.NDArray[np.uint64], Counts]:
    """Sorted distinct keys, and the sum of the counts of each."""
    if not len(keys):
        return keys, counts
    order = np.argsort(keys)
    keys, counts = keys[order], counts[order]
    first = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    return keys[first], np.add.reduceat(counts, first)


def _bit_length(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.int32]:
    high = x >> np.uint64(32)  # in halves, since a double has 53 bits
    return np.where(
        high > 0, 32 + np.frexp(high.astype(np.float64))[1], np.frexp((x & np.uint64(0xFFFFFFFF)).astype(np.float64))[1]
    )


@dataclass(frozen=True, kw_only=True)
class Numeric:
    """What one dense field learned: for the scaled encodings ``offset`` and ``scale``, for the binned ones ``edges``."""

    encoding: NumericEncoding
    missing: bool
    offset: float = 0.0
    scale: float = 1.0
    edges: tuple[float, ...] = ()

    @property
    def num_bins(self) -> int:
        """Bins of ``piecewise`` (between edges) or ``bucket`` (also one below each end)."""
        return max(len(self.edges) - 1, 1)

    @property
    def vocab_size(self) -> int:
        """Ids of ``bucket``: padding, OOV, the bins, and missing if the training rows had missing values."""
        return FIRST_VALUE_ID + self.num_bins + int(self.missing)

    def scaled(self, x: Floats) -> npt.NDArray[np.float32]:
        """``standardize``, ``log``, ``minmax``: scaled values, NaN where missing. ``piecewise``: position among the bins."""
        if self.encoding == "piecewise":
            # NOTE[DIFF] positions stop at the first and last edge: the paper's end bins extrapolate without bound
            positions = np.interp(x, self.edges, np.arange(len(self.edges))) if len(self.edges) > 1 else x * 0.0
            return np.where(np.isnan(x), np.nan, positions).astype(np.float32)
        raw = signed_log(x) if self.encoding == "log" else x
        return ((raw - self.offset) / self.scale).astype(np.float32)

    def bucket_ids(self, x: Floats) -> npt.NDArray[np.int32]:
        """``bucket``: ids of the quantile bins; missing has an id of its own where training rows had missing values."""
        ids = FIRST_VALUE_ID + np.searchsorted(np.asarray(self.edges[1:-1]), x, side="right").astype(np.int32)
        return np.where(np.isnan(x), self.vocab_size - 1 if self.missing else OOV_ID, ids).astype(np.int32)
