"""FiGNN, node by node (arXiv:1910.05552, sections 3.4 and 3.5)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass
class Gru:
    """Weights [3·D, D] and biases [3·D] of reset, update and new, of the input and of the state."""

    w: Array
    b: Array
    u: Array
    c: Array


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def graph(x: Array, w: Array) -> Array:
    """x [F, D], w [2·D] → [F, F]."""
    fields = len(x)
    weights = np.zeros((fields, fields))
    for i in range(fields):
        edges = {}
        for j in range(fields):
            if j != i:
                logit = float(w @ np.concatenate([x[i], x[j]]))
                edges[j] = np.exp(logit if logit > 0 else 0.01 * logit)
        for j, edge in edges.items():
            weights[i, j] = edge / sum(edges.values())
    return weights


def gru(m: Array, h: Array, p: Gru) -> Array:
    """m, h [D]."""
    d = len(h)
    reset = sigmoid(p.w[:d] @ m + p.b[:d] + p.u[:d] @ h + p.c[:d])
    update = sigmoid(p.w[d : 2 * d] @ m + p.b[d : 2 * d] + p.u[d : 2 * d] @ h + p.c[d : 2 * d])
    new = np.tanh(p.w[2 * d :] @ m + p.b[2 * d :] + reset * (p.u[2 * d :] @ h + p.c[2 * d :]))
    return (1 - update) * new + update * h


def fignn(
    x: Array,
    edges: Array,
    steps: list[tuple[Array, Array, Array]],
    p: Gru | None,
    residual: bool,
) -> Array:
    """x [F, D], edges [F, F]; per step W_in and W_out [F, D, D] and b [D]."""
    h = x.copy()
    for w_in, w_out, b in steps:
        after = np.zeros_like(x)
        for i in range(len(x)):
            m = b.copy()
            for j in range(len(x)):
                m += edges[i, j] * (w_in[i] @ (w_out[j] @ h[j]))
            after[i] = m + h[i] if p is None else gru(m, h[i], p)
            if residual:
                after[i] += x[i]
        h = after
    return h


def attentional_score(x: Array, score: Array, weight: Array) -> float:
    """x [F, D], score [D], weight [F, F·D]."""
    shares = sigmoid(weight @ x.flatten())
    return float(sum(shares[i] * (score @ x[i]) for i in range(len(x))))
