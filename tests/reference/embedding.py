"""The embedding of one row, field by field: AutoInt (arXiv:1810.11921) section 4.2, piecewise encoding of arXiv:2203.05556."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def lookup(table: Array, value: int) -> Array:
    """table [V, D] of one vocabulary → [D]; id 0 is padding."""
    return np.zeros(table.shape[1]) if value == 0 else table[value].copy()


def bag(table: Array, values: Sequence[int], pooling: str) -> Array:
    """Pool the vectors of the values that are not padding; nothing left is a zero vector."""
    present = [table[v] for v in values if v != 0]
    if not present:
        return np.zeros(table.shape[1])
    y = np.zeros(table.shape[1])
    for d in range(table.shape[1]):
        column = [float(row[d]) for row in present]
        y[d] = {"sum": sum(column), "mean": sum(column) / len(column), "max": max(column)}[pooling]
    return y


def number(x: float, vector: Array, missing: Array | None) -> Array:
    """x·v; a missing number is a vector of its own where there is one, else zero."""
    if math.isnan(x):
        return np.zeros(len(vector)) if missing is None else missing
    return np.array([x * float(v) for v in vector])


def piecewise(position: float, weights: Array, bias: Array, missing: Array | None) -> Array:
    """weights [bins, D]: bins wholly below the position count in full, the one it lies in by the share that is covered."""
    y = bias.copy()
    if math.isnan(position):
        return y if missing is None else y + missing
    for t in range(len(weights)):
        if position >= t + 1:
            y = y + weights[t]
        elif position > t:
            y = y + (position - t) * weights[t]
    return y
