"""Pooling of pairs of fields: AFM (arXiv:1708.04617 eq. 5 and 6), NFM's bi-interaction (arXiv:1708.05027 eq. 3)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def afm(x: Array, weight: Array, bias: Array, h: Array) -> tuple[Array, dict[tuple[int, int], float]]:
    """x [F, D], weight [A, D], bias and h [A] → (y [D], weight of every pair)."""
    scores, products = {}, {}
    for i in range(len(x)):
        for j in range(i + 1, len(x)):
            p = [float(x[i, d] * x[j, d]) for d in range(x.shape[1])]
            hidden = [max(sum(weight[a, d] * p[d] for d in range(len(p))) + bias[a], 0.0) for a in range(len(bias))]
            scores[i, j], products[i, j] = sum(h[a] * hidden[a] for a in range(len(h))), p
    total = sum(math.exp(s) for s in scores.values())
    attention = {pair: math.exp(s) / total for pair, s in scores.items()}
    y = [sum(attention[pair] * products[pair][d] for pair in scores) for d in range(x.shape[1])]
    return np.array(y), attention


def bi_interaction(x: Array) -> Array:
    """x [F, D] → [D]."""
    y = np.zeros(x.shape[1])
    for i in range(len(x)):
        for j in range(i + 1, len(x)):
            for d in range(x.shape[1]):
                y[d] += x[i, d] * x[j, d]
    return y
