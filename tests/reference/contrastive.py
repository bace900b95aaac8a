"""InfoNCE (arXiv:1807.03748), pair of rows by pair of rows."""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def similarity(x: Array, y: Array, kind: str) -> float:
    """Dot product or cosine."""
    dot = sum(float(a) * float(b) for a, b in zip(x, y, strict=True))
    if kind == "dot":
        return dot
    size = math.sqrt(sum(float(a) ** 2 for a in x)) * math.sqrt(sum(float(b) ** 2 for b in y))
    return dot / size


def info_nce(
    anchor: Array,
    positive: Array,
    *,
    kind: str,
    temperature: float,
    negatives_from: str,
    excluded: Collection[tuple[int, int]] = (),
    left_out: Collection[int] = (),
) -> float:
    """anchor, positive [B, D]."""
    rows = [i for i in range(len(anchor)) if i not in left_out]
    others = anchor if negatives_from == "anchor" else positive
    total = 0.0
    for i in rows:
        own = math.exp(similarity(anchor[i], positive[i], kind) / temperature)
        rest = sum(
            math.exp(similarity(anchor[i], others[j], kind) / temperature) for j in rows if j != i and (i, j) not in excluded
        )
        total -= math.log(own / (own + rest))
    return total / max(len(rows), 1)
