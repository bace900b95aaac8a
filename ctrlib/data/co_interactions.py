"""Edges between users who interacted with the same item, from a log of interactions, held-out rows left out.

Shape letters: P distinct (user, item) pairs, U users.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ctrlib.data.adjacency import Nodes
from ctrlib.data.source import Source, decoded, open_source
from ctrlib.schema import DataError

_log = logging.getLogger("ctrlib")

_BLOCK = 5_000_000  # pairs of users that are held at once, besides the distinct ones


@dataclass(frozen=True, kw_only=True, slots=True)
class CoInteractionOptions:
    """Which interactions make edges.

    A graph that knows of an interaction in a validation or test row has seen what is to be predicted. So one of ``split``,
    ``before`` and ``held_out`` must say which those are.

    Args:
        user, item: columns.
        split: a column; only rows that say ``train`` count.
        time, before: a column of numbers, timestamps or dates, and the first time that no longer counts.
        held_out: a table of interactions that are to be predicted; the log must have none of them.
        min_users: items with fewer users make no edge.
        max_users: items with more users make none either: an item of d users joins d·(d − 1)/2 pairs of them; ``None``: no
            limit. NOTE[DIFF] the paper has none.
        max_edges: the most pairs of users, counted item by item, before repeated ones are dropped.
    """

    user: str = "user"
    item: str = "item"
    split: str | None = None
    time: str | None = None
    before: object = None
    held_out: object = None
    min_users: int = 2
    max_users: int | None = None
    max_edges: int = 1_000_000_000

    def __post_init__(self) -> None:
        if (self.time is None) != (self.before is None):
            raise DataError(f"time is {self.time!r} and before is {self.before!r}; expected both or none")
        if self.split is None and self.before is None and self.held_out is None:
            raise DataError(
                "nothing says which interactions are held out, and a graph of all would know what is to be predicted; name a "
                "split column, a time before which rows count, or the table of the held-out interactions"
            )
        if self.min_users < 2 or (self.max_users is not None and self.max_users < self.min_users):
            raise DataError(f"min_users is {self.min_users} and max_users {self.max_users}; expected 2 or more, and not fewer")


def co_interaction_edges(log: object, options: CoInteractionOptions) -> Any:
    """The undirected graph of users with an item in common.

    Args:
        log: a row for every interaction; see :func:`~ctrlib.data.source.open_source`.
        options: see :class:`CoInteractionOptions`.

    Returns:
        An Arrow table with the columns ``source`` and ``target``, ids of users; every edge once.

    Raises:
        DataError: a column is missing or has missing values, no row counts, a held-out interaction is in the log, or there
            would be too many edges.
    """
    table = open_source(log, "the log of interactions")
    counted = _counted(table, options)
    users, items = (_values(table, column).filter(counted) for column in (options.user, options.item))
    if len(users) == 0:
        raise DataError(f"{table.name} has no interaction that counts; expected some training rows")
    if options.held_out is not None:
        _refuse_held_out(users, items, options)
    coded = users.dictionary_encode()
    user_P, item_P = _distinct(coded.indices.to_numpy(), items.dictionary_encode().indices.to_numpy())
    degree = np.bincount(item_P)
    most = options.max_users or len(user_P)
    kept = (degree >= options.min_users) & (degree <= most)
    hubs = int((degree > most).sum())
    total = int((degree[kept] * (degree[kept] - 1) // 2).sum())
    _log.info(
        "%d users, %d items that join some, %d left out as hubs, %d pairs", len(coded.dictionary), kept.sum(), hubs, total
    )
    if total > options.max_edges:
        raise DataError(
            f"the items join {total:,} pairs of users, more than max_edges, {options.max_edges:,}; the most frequent item "
            f"alone has {int(degree.max()):,} users: set max_users, or a larger max_edges"
        )
    edges_2 = _pairs(user_P[kept[item_P]], item_P[kept[item_P]], len(coded.dictionary))
    source, target = (coded.dictionary.take(pa.array(ends)) for ends in edges_2)
    return pa.table({"source": source, "target": target})


def _counted(table: Source, options: CoInteractionOptions) -> Any:
    """A mask of the rows that count."""
    table.require([options.user, options.item], ", named as user or item")
    counted = pa.array(np.ones(table.num_rows, dtype=np.bool_))
    if options.split is not None:
        table.require([options.split], ", which says which rows are for training")
        says = decoded(table.column(options.split))
        if not (pa.types.is_string(says.type) or pa.types.is_large_string(says.type)):
            raise DataError(
                f"column {options.split!r} of {table.name} holds {says.type}; expected text, 'train' in the rows that count"
            )
        counted = pc.fill_null(pc.equal(says, "train"), False)
    if options.time is not None:
        table.require([options.time], ", the time of interactions")
        times = _values(table, options.time)
        kind, tests = times.type, pa.types
        timed = tests.is_timestamp(kind) or tests.is_date(kind)
        if not (timed or tests.is_integer(kind) or tests.is_floating(kind) or tests.is_decimal(kind)):
            raise DataError(  # as text '9' is later than '10', and rows would leak
                f"column {options.time!r} of {table.name} holds {kind}; expected numbers, timestamps or dates: parse it first"
            )
        other = DataError(f"column {options.time!r} holds {kind}; before is {options.before!r}, no such time")
        if timed and isinstance(options.before, int | float):  # of which unit?
            raise other
        try:
            early = pc.less(times, pa.scalar(options.before).cast(kind))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise other from error
        counted = pc.and_(counted, early)
    return counted


def _values(table: Source, column: str) -> Any:
    values = decoded(table.column(column))
    if pa.types.is_nested(values.type):
        raise DataError(f"column {column!r} of {table.name} holds {values.type}; expected one value an interaction")
    gone = pc.is_null(values, nan_is_null=True).to_numpy(zero_copy_only=False)
    if gone.any():
        row = int(np.argmax(gone))
        raise DataError(f"column {column!r}, {table.locate(row)}: the value is missing; expected one in every interaction")
    return values


def _as_in_log(held: Source, column: str, kind: Any) -> Any:
    values = _values(held, column)
    try:
        return values.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(
            f"column {column!r} of {held.name} holds {values.type}, that of the log {kind}; give both the same type ({error})"
        ) from error


def _refuse_held_out(users: Any, items: Any, options: CoInteractionOptions) -> None:
    held = open_source(options.held_out, "the held-out interactions")
    held.require([options.user, options.item], ", named as user or item")
    theirs = _as_in_log(held, options.user, users.type), _as_in_log(held, options.item, items.type)
    size = len(users)
    user = pa.concat_arrays([users, theirs[0]]).dictionary_encode().indices.to_numpy().astype(np.int64)
    item = pa.concat_arrays([items, theirs[1]]).dictionary_encode().indices.to_numpy().astype(np.int64)
    keys = user * (int(item.max()) + 1) + item
    leaked = np.flatnonzero(np.isin(keys[size:], keys[:size]))
    if len(leaked):
        row = int(leaked[0])
        raise DataError(
            f"{held.locate(row)}: user {theirs[0][row]} and item {theirs[1][row]} are held out, and the log has them too "
            f"({len(leaked):,} such interactions); build the graph from training interactions only"
        )


def _distinct(user: npt.NDArray[Any], item: npt.NDArray[Any]) -> tuple[Nodes, Nodes]:
    """Each (user, item) once, by item, then user."""
    size = int(user.max()) + 1
    keys = np.unique(item.astype(np.int64) * size + user)
    return keys % size, keys // size


def _pairs(user_P: Nodes, item_P: Nodes, num_users: int) -> tuple[Nodes, Nodes]:
    """Both ends of every edge: users who follow one another within an item's run."""
    ends_P = np.searchsorted(item_P, item_P, side="right")
    later_P = ends_P - np.arange(len(user_P)) - 1  # partners of each entry that come after it
    total_P = np.cumsum(later_P)
    found = np.zeros(0, dtype=np.int64)
    start = 0
    while start < len(user_P):
        done = total_P[start - 1] if start else 0
        stop = max(int(np.searchsorted(total_P, done + _BLOCK, side="right")), start + 1)
        at = np.arange(start, stop)
        first = np.repeat(at, later_P[start:stop])
        within = np.arange(len(first)) - np.repeat(total_P[start:stop] - later_P[start:stop] - done, later_P[start:stop])
        found = np.union1d(found, user_P[first] * num_users + user_P[first + 1 + within])
        start = stop
    return found // num_users, found % num_users
