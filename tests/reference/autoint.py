"""One interacting layer of AutoInt, written field by field from arXiv:1810.11921 eq. 5 to 8, with the flavours' switches."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """Row convention: projections are x W. Biases and norm may be absent; ``w_res=None`` adds the input itself."""

    w_q: Array
    w_k: Array
    w_v: Array
    w_res: Array | None
    b_q: Array | None = None
    b_k: Array | None = None
    b_v: Array | None = None
    b_res: Array | None = None
    gain: Array | None = None
    shift: Array | None = None


def project(x: Array, w: Array, b: Array | None, relu: bool) -> Array:
    y = np.zeros(w.shape[1])
    for a in range(w.shape[1]):
        total = 0.0 if b is None else float(b[a])
        for i in range(len(x)):
            total += float(x[i]) * float(w[i, a])
        y[a] = max(total, 0.0) if relu else total
    return y


def normalise(y: Array, gain: Array, shift: Array, eps: float) -> Array:
    mean = sum(y) / len(y)
    variance = sum((v - mean) ** 2 for v in y) / len(y)
    return np.array([gain[a] * (y[a] - mean) / math.sqrt(variance + eps) + shift[a] for a in range(len(y))])


def layer(
    x: Array,
    weights: Weights,
    heads: int,
    *,
    scale: bool = False,
    relu: bool = False,
    residual: bool = True,
    norm: str = "none",
    eps: float = 1e-5,
) -> tuple[Array, Array]:
    """x [F, d] → (y [F, A], attention [heads, F, F])."""
    num_fields, width = x.shape[0], weights.w_q.shape[1]
    size = width // heads
    q = [project(row, weights.w_q, weights.b_q, relu) for row in x]
    k = [project(row, weights.w_k, weights.b_k, relu) for row in x]
    v = [project(row, weights.w_v, weights.b_v, relu) for row in x]
    attention = np.zeros((heads, num_fields, num_fields))
    y = np.zeros((num_fields, width))
    for m in range(num_fields):
        for h in range(heads):
            part = range(h * size, (h + 1) * size)
            scores = [sum(float(q[m][a]) * float(k[n][a]) for a in part) for n in range(num_fields)]
            if scale:
                scores = [s / math.sqrt(size) for s in scores]
            denominator = sum(math.exp(s) for s in scores)
            for n in range(num_fields):
                attention[h, m, n] = math.exp(scores[n]) / denominator
            for a in part:
                y[m, a] = sum(attention[h, m, n] * float(v[n][a]) for n in range(num_fields))
        if residual:
            y[m] += x[m] if weights.w_res is None else project(x[m], weights.w_res, weights.b_res, relu)
        if norm == "before_relu":
            assert weights.gain is not None
            assert weights.shift is not None
            y[m] = normalise(y[m], weights.gain, weights.shift, eps)
        y[m] = [max(value, 0.0) for value in y[m]]
        if norm == "after_relu":
            assert weights.gain is not None
            assert weights.shift is not None
            y[m] = normalise(y[m], weights.gain, weights.shift, eps)
    return y, attention


def rows_split(q: Array, k: Array, v: Array, heads: int) -> Array:
    """Attention as in FuxiCTR 1: [F, A] matrices are cut into F·heads pieces, row after row; every run of F attends."""
    num_fields, size = q.shape[0], q.shape[1] // heads

    def pieces(x: Array) -> list[Array]:
        return [x[m, h * size : (h + 1) * size] for m in range(num_fields) for h in range(heads)]

    pieces_q, pieces_k, pieces_v = pieces(q), pieces(k), pieces(v)
    mixed: list[Array] = []
    for start in range(0, num_fields * heads, num_fields):
        run = range(start, start + num_fields)
        for m in run:
            scores = [math.exp(sum(float(a) * float(b) for a, b in zip(pieces_q[m], pieces_k[n], strict=True))) for n in run]
            mixed.append(sum((s / sum(scores) * pieces_v[n] for s, n in zip(scores, run, strict=True)), np.zeros(size)))
    y = np.zeros((num_fields, heads * size))
    for at, piece in enumerate(mixed):
        y[at // heads, (at % heads) * size : (at % heads + 1) * size] = piece
    return y
