"""InterHAt, field by field (doi:10.1145/3336191.3371785)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Affine = tuple[Array, Array | None]


@dataclass(frozen=True)
class Weights:
    """Matrices as [out, in] with a bias or none; norms are (gain, shift); aggregations (W, b, c)."""

    query: Affine
    key: Affine
    value: Affine
    output: Affine | None
    norm_attention: tuple[Array, Array]
    feed_1: Affine
    feed_2: Affine
    norm_feed: tuple[Array, Array]
    fields: list[tuple[Array, Array, Array]]
    orders: tuple[Array, Array, Array]


def affine(x: Array, weight: Affine, relu: bool = False) -> Array:
    matrix, bias = weight
    y = np.zeros(len(matrix))
    for a in range(len(matrix)):
        y[a] = sum(float(matrix[a, b]) * float(x[b]) for b in range(len(x))) + (0.0 if bias is None else float(bias[a]))
    return np.maximum(y, 0) if relu else y


def softmax(scores: list[float]) -> list[float]:
    powers = [math.exp(s - max(scores)) for s in scores]
    return [p / sum(powers) for p in powers]


def layer_norm(x: Array, norm: tuple[Array, Array]) -> Array:
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return np.array([norm[0][d] * (x[d] - mean) / math.sqrt(variance + 1e-5) + norm[1][d] for d in range(len(x))])


def aggregate(x: Array, weights: tuple[Array, Array, Array]) -> tuple[Array, list[float]]:
    matrix, bias, context = weights
    scores = [float(sum(context * affine(row, (matrix, bias), relu=True))) for row in x]
    a = softmax(scores)
    return sum((a[n] * x[n] for n in range(len(x))), np.zeros(x.shape[1])), a


def interhat(x: Array, weights: Weights, heads: int, relu: bool) -> tuple[Array, Array, list[list[float]]]:
    """x [F, D] → (y [D], attention [heads, F, F], weights of the fields for every order, then of the orders)."""
    q, k, v = ([affine(row, w, relu) for row in x] for w in (weights.query, weights.key, weights.value))
    size = len(q[0]) // heads
    attention = np.zeros((heads, len(x), len(x)))
    first = np.zeros_like(x)
    for m in range(len(x)):
        joined = np.zeros(heads * size)
        for h in range(heads):
            part = range(h * size, (h + 1) * size)
            attention[h, m] = softmax([sum(q[m][a] * k[n][a] for a in part) / math.sqrt(size) for n in range(len(x))])
            for a in part:
                joined[a] = sum(attention[h, m, n] * v[n][a] for n in range(len(x)))
        out = np.maximum(joined if weights.output is None else affine(joined, weights.output), 0)
        t = layer_norm(out + x[m], weights.norm_attention)
        fed = affine(affine(t, weights.feed_1, relu=True), weights.feed_2)
        first[m] = layer_norm(fed + t, weights.norm_feed)
    current, gathered, shown = first, [], []
    for aggregation in weights.fields:
        u, over_fields = aggregate(current, aggregation)
        gathered.append(u)
        shown.append(over_fields)
        current = np.array([u * first[f] + current[f] for f in range(len(x))])
    y, over_orders = aggregate(np.array(gathered), weights.orders)
    return y, attention, [*shown, over_orders]
