"""What the values of a program are in the graph in which the context is computed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Hoisted:
    """One matrix product of a model: where it is, its multiplications for a row, and the share computed once per request."""

    module: str
    operation: str
    multiplications: int
    share: float


@dataclass(frozen=True, slots=True)
class Side:
    """Which columns of a batch are of the context: places in ``sparse`` and ``dense``, names of sequences."""

    sparse: tuple[int, ...]
    dense: tuple[int, ...]
    sequences: tuple[str, ...]


# What a value of the program is in the new graph.


@dataclass(frozen=True, slots=True)
class Static:
    """The same for all requests: a tensor, a number, anything."""

    value: Any


@dataclass(frozen=True, slots=True)
class Rows:
    """Decided by the number of rows alone, such as zeros for each of them: made anew for whoever needs it."""


@dataclass(frozen=True, slots=True)
class Context:
    """Of the context alone: for a single row."""

    node: Any


@dataclass(frozen=True, slots=True)
class Full:
    """Of candidates."""

    node: Any


@dataclass(frozen=True, slots=True)
class Parts:
    """Of both along ``axis``: places ``here`` of ``size`` are the context's. Dimension 0 are the rows."""

    context: Any
    candidates: Any
    axis: int
    here: tuple[int, ...]
    size: int

    @property
    def there(self) -> tuple[int, ...]:
        known = set(self.here)
        return tuple(i for i in range(self.size) if i not in known)

    @property
    def pieces(self) -> tuple[tuple[Any, tuple[int, ...]], tuple[Any, tuple[int, ...]]]:
        return (self.context, self.here), (self.candidates, self.there)


@dataclass(frozen=True, slots=True)
class Many:
    """A list of values, as chunks are."""

    values: tuple[Any, ...]


Value = Static | Rows | Context | Full | Parts | Many


class NoRuleError(Exception):
    """The pieces have to be joined."""
