"""A layer of the generalized interaction network, coordinate by coordinate (doi:10.1145/3447548.3467133)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def layer(x: Array, b: Array, operation: Array, weight: Array, projection: Array) -> Array:
    """x [F, D], b [M, D], operation [S, D, D], weight [S, M, F], projection [S, D] → [S, D]."""
    dim = x.shape[1]
    y = np.zeros((len(weight), dim))
    for s in range(len(weight)):
        for c in range(dim):
            for d in range(dim):
                outer = 0.0
                for m in range(len(b)):
                    for n in range(len(x)):
                        outer += weight[s, m, n] * x[n, c] * b[m, d]
                y[s, c] += operation[s, c, d] * outer * projection[s, d]
    return y
