"""FiBiNET, number by number (arXiv:1905.09433 eq. 3 to 8)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def senet(x: Array, w1: Array, w2: Array, act: Callable[[float], float]) -> Array:
    """x [F, D], w1 [R, F], w2 [F, R]: the weight of each field."""
    z = [sum(vector) / len(vector) for vector in x]
    hidden = [act(sum(w1[r, f] * z[f] for f in range(len(x)))) for r in range(len(w1))]
    return np.array([act(sum(w2[f, r] * hidden[r] for r in range(len(w1)))) for f in range(len(x))])


def bilinear(x: Array, weight: Callable[[int, int], Array]) -> Array:
    """x [F, D]; ``weight(i, j)`` [D, D], row = output. One vector per pair i < j, in the order (0, 1), (0, 2), …"""
    fields, dim = x.shape
    vectors = []
    for i in range(fields):
        for j in range(i + 1, fields):
            w = weight(i, j)
            vectors.append([sum(w[e, d] * x[i, d] for d in range(dim)) * x[j, e] for e in range(dim)])
    return np.array(vectors)
