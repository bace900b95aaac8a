"""Cross networks, coordinate by coordinate (arXiv:1708.05123 eq. 3, arXiv:2008.13535 eq. 1 to 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

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


def mix_gates(x_l: Array, weight: Array, kind: Literal["softmax", "sigmoid"]) -> Array:
    """x_l [N], weight [K, N] → [K]."""
    logits = [sum(row[j] * x_l[j] for j in range(len(x_l))) for row in weight]
    if kind == "sigmoid":
        return np.array([1 / (1 + np.exp(-v)) for v in logits])
    return np.array([np.exp(v) / sum(np.exp(u) for u in logits) for v in logits])


def cross_mix(
    x: Array,
    gate: Array,
    kind: Literal["softmax", "sigmoid"],
    layers: list[tuple[Array, Array, Array | None, Array]],
    act: Callable[[Array], Array],
) -> Array:
    """x [N], gate [K, N]; per layer U [K, N, r], V [K, N, r], C [K, r, r] or None (eq. 3), b [N]. Eq. 3 and 4."""
    x_l = x.copy()
    for u, v, c, b in layers:
        shares = mix_gates(x_l, gate, kind)
        total = x_l.copy()
        for i in range(len(u)):
            h = np.array([sum(v[i, n, r] * x_l[n] for n in range(len(x))) for r in range(v.shape[2])])
            if c is not None:
                h = act(h)
                h = act(np.array([sum(c[i, s, r] * h[r] for r in range(len(h))) for s in range(len(h))]))
            for n in range(len(x)):
                expert = x[n] * (sum(u[i, n, r] * h[r] for r in range(len(h))) + b[n])
                total[n] += shares[i] * expert
        x_l = total
    return x_l
