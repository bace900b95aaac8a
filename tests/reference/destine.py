"""Disentangled self-attention, field by field (arXiv:2101.03654), queries and keys both whitened."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Affine = tuple[Array, Array]


def affine(x: Array, weight: Affine, relu: bool = False) -> Array:
    matrix, bias = weight
    y = np.array([sum(float(matrix[a, b]) * float(x[b]) for b in range(len(x))) + float(bias[a]) for a in range(len(bias))])
    return np.maximum(y, 0) if relu else y


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


def layer(
    x: Array, query: Affine, key: Affine, value: Affine, unary: Affine, residual: Affine | None, *, scale: bool, relu: bool
) -> tuple[Array, Array, Array]:
    """x [F, D], matrices as [out, in] → (y [F, A], pairs [H, F, F], unary [H, F])."""
    fields, heads = len(x), len(unary[1])
    q, k, v = (np.array([affine(row, w, relu) for row in x]) for w in (query, key, value))
    size = q.shape[1] // heads
    q = q - sum(q) / fields
    k = k - sum(k) / fields
    y, pairs, singles = np.zeros_like(v), np.zeros((heads, fields, fields)), np.zeros((heads, fields))
    for h in range(heads):
        singles[h] = softmax([float(affine(row, unary)[h]) for row in x])
        part = range(h * size, (h + 1) * size)
        for m in range(fields):
            scores = [sum(float(q[m, a]) * float(k[n, a]) for a in part) for n in range(fields)]
            pairs[h, m] = softmax([s / math.sqrt(size) for s in scores] if scale else scores)
            for a in part:
                y[m, a] = sum((pairs[h, m, n] + singles[h, n]) * v[n, a] for n in range(fields))
    if residual is not None:
        y = np.array([y[m] + affine(x[m], residual) for m in range(fields)])
    return y, pairs, singles
