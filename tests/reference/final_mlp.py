"""FinalMLP row by row from the equations of arXiv:2304.00902: gates, two networks, multi-head bilinear fusion."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import mlp

Array = npt.NDArray[np.float64]
Layers = list[tuple[Array, Array]]


def bilinear_heads(a: Array, b: Array, weights: list[Array]) -> list[float]:
    """a [d_1], b [d_2], one matrix per head → each head's aᵀ W b on its own blocks."""
    rows, columns = weights[0].shape
    terms = []
    for j, weight in enumerate(weights):
        total = 0.0
        for p in range(rows):
            for q in range(columns):
                total += float(a[j * rows + p]) * float(weight[p, q]) * float(b[j * columns + q])
        terms.append(total)
    return terms


def bilinear(a: Array, b: Array, w_1: Array, w_2: Array, bias: float, weights: list[Array]) -> float:
    """The logit."""
    linear = sum(float(w) * float(v) for w, v in zip(w_1, a, strict=True)) + sum(
        float(w) * float(v) for w, v in zip(w_2, b, strict=True)
    )
    return linear + bias + sum(bilinear_heads(a, b, weights))


def gate(context: Array, hidden: Layers, last: tuple[Array, Array]) -> list[float]:
    """context [c, d] → 2σ(g) [F·D]."""
    return [2 / (1 + math.exp(-float(g))) for g in mlp(context, hidden, "relu", last)]


def gated(x: Array, gates: list[float]) -> Array:
    """h = gate ⊙ e, as [F, D]."""
    y = np.zeros_like(x)
    for f in range(x.shape[0]):
        for d in range(x.shape[1]):
            y[f, d] = x[f, d] * gates[f * x.shape[1] + d]
    return y
