"""The gated cross network, coordinate by coordinate (arXiv:2311.04635 eq. 2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def gate(x_l: Array, g: Array) -> Array:
    """x_l [N], g [N, N] → σ(g x_l)."""
    return np.array([1 / (1 + np.exp(-sum(g[i, j] * x_l[j] for j in range(len(x_l))))) for i in range(len(x_l))])


def gated_cross(x: Array, weights: list[Array], biases: list[Array], gates: list[Array]) -> Array:
    """x [N]; each weight and gate [N, N], row = output; each bias [N]."""
    x_l = x.copy()
    for w, b, g in zip(weights, biases, gates, strict=True):
        opened = gate(x_l, g)
        crossed = [x[i] * (sum(w[i, j] * x_l[j] for j in range(len(x))) + b[i]) * opened[i] for i in range(len(x))]
        x_l = np.array([crossed[i] + x_l[i] for i in range(len(x))])
    return x_l
