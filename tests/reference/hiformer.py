"""One layer of Hiformer (arXiv:2311.05884), token by token and head by head; all weights in row convention, x W."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import erf_gelu, layer_norm

Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Weights:
    """``query``, ``key``, ``value``: [tokens, D, H·d], or composite [L·D, tokens, H·d] if named in ``composite``.

    The others have a row per token that the layer returns: ``output`` [Q, H·d_v, D], the FFN's matrices and biases, and the
    norms' gains and shifts, of attention [tokens, D] and of the FFN [Q, D].
    """

    query: Array
    key: Array
    value: Array
    output: Array
    composite: tuple[str, ...] = ()
    ffn: tuple[Array, Array, Array, Array] | None = None
    norms: tuple[Array, Array, Array, Array] | None = None


def times(x: Array, weight: Array) -> Array:
    """x [n] W [n, m]."""
    return np.array([sum(float(x[i]) * float(weight[i, j]) for i in range(len(x))) for j in range(weight.shape[1])])


def project(x: Array, weight: Array, composite: bool, last: int) -> list[Array]:
    """One vector for each of the ``last`` tokens."""
    if composite:
        everything = np.array([value for row in x for value in row])
        return [times(everything, weight[:, j]) for j in range(last)]
    return [times(x[len(x) - last + j], weight[j]) for j in range(last)]


def layer(
    x: Array, weights: Weights, heads: int, outputs: int, *, residual: bool = True, norm: str = "post"
) -> tuple[Array, Array]:
    """x [L, D] → (the last ``outputs`` tokens [Q, D], attention [heads, Q, L])."""
    length, width = x.shape
    first = length - outputs
    read = x.copy()
    if norm == "pre":
        assert weights.norms is not None
        read = np.array([layer_norm(x[j], weights.norms[0][j], weights.norms[1][j], 1e-5) for j in range(length)])
    q = project(read, weights.query, "q" in weights.composite, outputs)
    k = project(read, weights.key, "k" in weights.composite, length)
    v = project(read, weights.value, "v" in weights.composite, length)
    key_dim, value_dim = len(k[0]) // heads, len(v[0]) // heads
    attention = np.zeros((heads, outputs, length))
    y = np.zeros((outputs, width))
    for i in range(outputs):
        mixed = np.zeros(heads * value_dim)
        for h in range(heads):
            scores = []
            for j in range(length):
                product = sum(float(q[i][a]) * float(k[j][a]) for a in range(h * key_dim, (h + 1) * key_dim))
                scores.append(math.exp(product / math.sqrt(key_dim)))
            for j in range(length):
                attention[h, i, j] = scores[j] / sum(scores)
                for a in range(h * value_dim, (h + 1) * value_dim):
                    mixed[a] += attention[h, i, j] * v[j][a]
        y[i] = times(mixed, weights.output[i])
        if residual:
            y[i] += x[first + i]
        if norm == "post":
            assert weights.norms is not None
            y[i] = layer_norm(y[i], weights.norms[0][i], weights.norms[1][i], 1e-5)
        if weights.ffn is None:
            continue
        inner = y[i]
        if norm == "pre":
            assert weights.norms is not None
            inner = layer_norm(y[i], weights.norms[2][i], weights.norms[3][i], 1e-5)
        w_1, b_1, w_2, b_2 = (part[i] for part in weights.ffn)
        hidden = np.array([erf_gelu(float(z)) for z in times(inner, w_1) + b_1])
        z = times(hidden, w_2) + b_2
        if residual:
            z = z + y[i]
        if norm == "post":
            assert weights.norms is not None
            z = layer_norm(z, weights.norms[2][i], weights.norms[3][i], 1e-5)
        y[i] = z
    return y, attention
