"""``Schema.infer``: a first guess at the fields of a table, with a reason for every column left out."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrlib.data.encoder import parallel
from ctrlib.data.numeric import Moments
from ctrlib.data.source import Source, decoded, open_source
from ctrlib.data.vocabulary import ValueCounter, as_keys, key_type
from ctrlib.schema import DataError, DenseField, Field, Schema, SequenceField, SparseField

MAX_ROWS = 2_000_000
FEW_VALUES = 200
_ID_NAME = re.compile(r"(^|[\W_])(?i:ids?)$|[a-z]I[dD]s?$", re.ASCII)
_IDENTIFIER_ROWS = 100


def infer_schema(
    source: object, labels: tuple[str, ...], *, group: str | None = None, time: str | None = None, weight: str | None = None
) -> Schema:
    """Guess a schema from (at most the first two million rows of) ``source``.

    Rules, in order: a column of one value, of missing values only, of times, or a string or integer column whose values
    all differ is ignored, with the reason. Strings and booleans are sparse. Integers (and floats that are whole, with gaps)
    are sparse if they have at most 200 distinct values; whole numbers of any type if one is 2³¹ or more in size (a hash),
    or if the column is called an id (``user_id``, ``itemId``). Other numbers are dense, encoded piecewise over 32 bins,
    which no outlier or unit can spoil. Lists of strings or integers are sequences. Sparse fields with values seen only once
    get ``min_count`` 2, so that the OOV row is trained.

    Raises:
        DataError: the source cannot be read, has no rows, or lacks a named column.
    """
    table = open_source(source, "the table")
    table.require(labels, ", named as label")
    for role, column in (("group", group), ("time", time), ("weight", weight)):
        if column is not None:
            table.require([column], f", named as {role}")
    if table.num_rows == 0:
        raise DataError(f"{table.name} has a header but no rows; expected at least one")
    names = [n for n in table.types if n not in (*labels, time, weight)]
    found = dict(zip(names, parallel(lambda name: _guess(name, table), names), strict=True))
    return Schema(
        fields=tuple(f for f in found.values() if not isinstance(f, str)),
        labels=labels,
        group=group,
        time=time,
        weight=weight,
        ignored={n: f for n, f in found.items() if isinstance(f, str)},
    )


@dataclass
class _Summary:
    rows: int = 0
    nulls: int = 0
    distinct: int = 0
    singletons: int = 0


def _guess(name: str, table: Source) -> Field | str:
    """The field, or the reason why the column cannot be one."""
    kind = table.types[name]
    value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_null(kind):
        return "only missing values"
    if pa.types.is_large_list(kind):
        inner = kind.value_type
        if pa.types.is_integer(inner) or pa.types.is_string(inner) or pa.types.is_large_string(inner):
            return _sequence(name, table)
        return f"lists of {inner}; expected lists of integers or strings"
    if pa.types.is_temporal(value_kind):
        return "a time: use it to split the data (time), or derive columns such as hour and weekday from it"
    numeric = pa.types.is_integer(value_kind) or pa.types.is_floating(value_kind) or pa.types.is_decimal(value_kind)
    text = pa.types.is_string(value_kind) or pa.types.is_large_string(value_kind) or pa.types.is_boolean(value_kind)
    if not numeric and not text:
        return f"values of type {value_kind}; expected numbers, strings or lists of them"
    return _number(name, table) if numeric else _category(name, _count(name, table, key_type(kind)))


def _count(name: str, table: Source, kind: Any, flatten: Callable[[Any], Any] | None = None) -> _Summary:
    counter, rows = ValueCounter(kind), 0
    for array in table.blocks(name):
        values = flatten(array) if flatten else array
        counter.update(as_keys(values, kind, lambda row: f"column {name!r}, row {row + 1}"))
        rows += len(values)
        if rows >= MAX_ROWS:
            break
    counts = counter.result()[1]
    return _Summary(rows, counter.nulls, len(counts), int((counts == 1).sum()))


def _category(name: str, seen: _Summary) -> Field | str:
    present = seen.rows - seen.nulls
    if present == 0:
        return "only missing values"
    if seen.distinct == 1 and seen.nulls == 0:
        return "constant: every row has the same value"
    if seen.distinct == present and present >= _IDENTIFIER_ROWS:
        return "all different: an identifier of the row"
    return SparseField(name=name, min_count=2 if seen.singletons else 1)


def _sequence(name: str, table: Source) -> Field | str:
    seen = _count(name, table, key_type(table.types[name]), lambda array: array.flatten())
    if seen.distinct == 0:
        return "only missing values"
    return SequenceField(name=name, min_count=2 if seen.singletons else 1)


def _number(name: str, table: Source) -> Field | str:
    moments, whole, largest, rows = Moments(), True, 0.0, 0
    for array in table.blocks(name):
        values = decoded(array)
        x = pc.cast(values, pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        finite = x[np.isfinite(x)]
        moments.update(np.where(np.isfinite(x), x, np.nan))
        whole = whole and bool((finite == np.floor(finite)).all())
        largest = max(largest, float(np.abs(finite).max(initial=0)))
        rows += len(x)
        if rows >= MAX_ROWS:
            break
    if moments.maximum < moments.minimum:
        return "only missing values"
    kind = table.types[name]
    integer = pa.types.is_integer(kind.value_type if pa.types.is_dictionary(kind) else kind)
    if whole and (integer or largest < 2**53):
        seen = _count(name, table, pa.int64(), None if integer else _finite)
        guess = _category(name, seen)
        like_integers = integer or moments.missing > 0  # pandas makes floats of integers with gaps
        few = (like_integers and seen.distinct <= FEW_VALUES) or largest >= 2**31 or bool(_ID_NAME.search(name))
        if isinstance(guess, str) or few:
            return guess
    elif moments.minimum == moments.maximum and moments.missing == 0:
        return "constant: every row has the same value"
    return DenseField(name=name, encoding="piecewise", num_bins=32)


def _finite(array: Any) -> Any:
    values = pc.cast(decoded(array), pa.float64(), safe=False)
    return pc.if_else(pc.is_finite(values), values, pa.scalar(None, pa.float64()))
