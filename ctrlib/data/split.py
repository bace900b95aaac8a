"""Training, validation and test rows where no split is given: by time where a time column is known, else at random.

A split is one byte for every row; only a split by time holds more (the time column).
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ctrlib.data.source import Source
from ctrlib.schema import DataError

SplitBy = Literal["auto", "time", "random", "order"]


def split_rows(
    table: Source, fractions: dict[str, float], *, by: SplitBy = "auto", time: str | None = None, seed: int = 0
) -> dict[str, Source]:
    """Cut a table into named parts that together hold every row once.

    Args:
        table: the rows.
        fractions: share of the rows by name, e.g. ``{"train": .8, "valid": .1, "test": .1}``; in order of time.
        by: ``time`` (earliest rows first; equal times in file order), ``order`` (the order of the file), ``random`` (exact
            shares, from ``seed``), or ``auto``: time where a column is given, else random.
        time: the time column: numbers, timestamps, dates, or text that sorts in time order.
        seed: of the random split.

    Raises:
        DataError: shares that do not sum to 1, fewer rows than parts, more than 255 parts, no time column, or a row without a
            time.
    """
    shares = np.array(list(fractions.values()))
    if not ((shares > 0).all() and abs(shares.sum() - 1) <= 1e-9):
        raise DataError(f"the split shares are {list(fractions.values())}; expected positive numbers that sum to 1")
    if len(shares) > 255:
        raise DataError(f"the split has {len(shares)} parts; expected at most 255")
    if by not in get_args(SplitBy):
        raise DataError(f"the split is by {by!r}; expected one of {', '.join(get_args(SplitBy))}")
    if by == "time" and time is None:
        raise DataError(
            "a split by time needs a time column; name it in the schema or with --time, or split by order or random"
        )
    n = table.num_rows
    cuts = np.rint(np.cumsum(shares) * n).astype(np.int64)
    cuts[-1] = n
    sizes = np.diff(cuts, prepend=0)
    if n < len(shares) or (sizes == 0).any():
        raise DataError(f"{table.name} has {n} rows, too few for {', '.join(fractions)}; give more rows or other shares")
    codes = np.repeat(np.arange(len(sizes), dtype=np.uint8), sizes)
    if by == "time" or (by == "auto" and time is not None):
        assert time is not None
        for code, rows in enumerate(np.split(np.argsort(_times(table, time), kind="stable"), cuts[:-1])):
            codes[rows] = code
    elif by != "order":
        np.random.default_rng(seed).shuffle(codes)
    if table.codes is not None:
        chosen = table.chosen()
        everywhere = np.full(len(chosen), len(sizes), np.uint8)  # one more code, for the rows that the table does not select
        everywhere[chosen] = codes
        codes = everywhere
    return table.divide(codes, {name: code for code, name in enumerate(fractions)})


def _times(table: Source, time: str) -> npt.NDArray[np.float64] | npt.NDArray[np.int64]:
    table.require([time], ", the time column")
    values = table.column(time)
    if isinstance(values, pa.DictionaryArray) and values.dictionary.null_count:
        values = values.dictionary_decode()
    if pa.types.is_floating(values.type):
        values = pc.if_else(pc.is_nan(values), pa.scalar(None, values.type), values)
    if values.null_count:
        row = int(np.argmax(pc.is_null(values).to_numpy(zero_copy_only=False)))
        raise DataError(f"column {time!r}, {table.locate(row)}: the time is missing; fill it in, or split by order or random")
    if isinstance(values, pa.DictionaryArray) or pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        encoded = values.dictionary_encode() if not isinstance(values, pa.DictionaryArray) else values
        order = pc.rank(encoded.dictionary, tiebreaker="dense").to_numpy(zero_copy_only=False)
        times: npt.NDArray[np.int64] = order[encoded.indices.to_numpy(zero_copy_only=False)]
        return times
    if pa.types.is_temporal(values.type):
        values = values.view(pa.int32() if values.type.bit_width == 32 else pa.int64())
    result: npt.NDArray[np.float64] = values.to_numpy(zero_copy_only=False)
    return result
