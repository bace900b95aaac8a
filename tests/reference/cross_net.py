"""Cross networks, coordinate by coordinate (arXiv:1708.05123 eq. 3, arXiv:2008.13535 eq. 1 and 2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def cross_v1(x: Array, weights: list[Array], biases: list[Array]) -> Array:
    """x [N]; each weight and bias [N]. x_{l+1} = x_0 x_lᵀ w + b + x_l, with the outer product written out."""
    x_l = x.copy()
    for w, b in zip(weights, biases, strict=True):
        outer = np.zeros((len(x), len(x)))
        for i in range(len(x)):
            for j in range(len(x)):
                outer[i, j] = x[i] * x_l[j]
        x_l = np.array([sum(outer[i, j] * w[j] for j in range(len(x))) + b[i] + x_l[i] for i in range(len(x))])
    return x_l


def cross_v2(x: Array, weights: list[Array], biases: list[Array]) -> Array:
    """x [N]; each weight [N, N], row = output. x_{l+1} = x_0 ⊙ (W x_l + b) + x_l."""
    x_l = x.copy()
    for w, b in zip(weights, biases, strict=True):
        x_l = np.array([x[i] * (sum(w[i, j] * x_l[j] for j in range(len(x))) + b[i]) + x_l[i] for i in range(len(x))])
    return x_l
