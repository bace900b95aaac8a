"""IFM of one row, field by field (doi:10.24963/ijcai.2019/203)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tests.reference.fm import fm
from tests.reference.mlp import mlp

Array = npt.NDArray[np.float64]


def factors(v: Array, hidden: list[tuple[Array, Array]], projection: Array) -> list[float]:
    """v [F, k], the ReLU layers, projection [F, last width] → F numbers with a mean of 1."""
    h = mlp(v, hidden, "relu", None)
    scores = [sum(projection[f, n] * h[n] for n in range(len(h))) for f in range(len(v))]
    total = sum(math.exp(score) for score in scores)
    return [len(v) * math.exp(score) / total for score in scores]


def ifm(w: Array, v: Array, m: list[float], bias: float) -> float:
    """w [F], v [F, k], the factors → the logit."""
    first = sum(m[f] * float(w[f]) for f in range(len(w)))
    return bias + first + fm(np.array([m[f] * v[f] for f in range(len(v))]))
