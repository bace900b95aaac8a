"""One layer of BST (arXiv:1905.06874) on the places of one row, place by place."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import ACTIVATIONS, layer_norm, linear

Array = npt.NDArray[np.float64]


def attention(x: Array, query: Array, key: Array, num_heads: int) -> Array:
    """x [L, W] → [H, L, L]."""
    length, width = x.shape
    size = width // num_heads
    q, k = ([linear(place, matrix, None) for place in x] for matrix in (query, key))
    out = np.zeros((num_heads, length, length))
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        for i in range(length):
            scores = [float(q[i][part] @ k[j][part]) / math.sqrt(size) for j in range(length)]
            powers = [math.exp(s - max(scores)) for s in scores]
            out[head, i] = [p / sum(powers) for p in powers]
    return out


def layer(x: Array, w: dict[str, Any], num_heads: int) -> Array:
    """x [L, W] → [L, W]."""
    length, width = x.shape
    size = width // num_heads
    value = [linear(place, w["value"], None) for place in x]
    attended = attention(x, w["query"], w["key"], num_heads)
    out = np.zeros_like(x)
    for i in range(length):
        mixed = np.zeros(width)
        for head in range(num_heads):
            part = slice(head * size, (head + 1) * size)
            for j in range(length):
                mixed[part] += attended[head, i, j] * value[j][part]
        z = layer_norm(x[i] + linear(mixed, w["output"], None), w["norm_attention"][0], w["norm_attention"][1], 1e-5)
        hidden = np.array([ACTIVATIONS["leaky_relu"](float(v)) for v in linear(z, *w["ffn_in"])])
        out[i] = layer_norm(z + linear(hidden, *w["ffn_out"]), w["norm_ffn"][0], w["norm_ffn"][1], 1e-5)
    return out
