"""FT-Transformer (arXiv:2106.11959 section 3.3 and appendix E), token by token; all weights as nn.Linear stores them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import layer_norm, linear

Array = npt.NDArray[np.float64]
Affine = tuple[Array, Array]


@dataclass(frozen=True)
class Layer:
    """``norm_attention`` is absent in the first layer."""

    query: Affine
    key: Affine
    value: Affine
    output: Affine
    ffn_in: Affine
    ffn_out: Affine
    norm_ffn: Affine
    norm_attention: Affine | None


def attend(x: Array, layer: Layer, heads: int) -> tuple[Array, Array]:
    """x [L, D] → (what each token gets [L, D], weights [heads, L, L])."""
    length, width = x.shape
    size = width // heads
    q, k, v = ([linear(row, *part) for row in x] for part in (layer.query, layer.key, layer.value))
    weights = np.zeros((heads, length, length))
    mixed = np.zeros((length, width))
    for i in range(length):
        for h in range(heads):
            part = range(h * size, (h + 1) * size)
            scores = [math.exp(sum(float(q[i][a]) * float(k[j][a]) for a in part) / math.sqrt(size)) for j in range(length)]
            for j in range(length):
                weights[h, i, j] = scores[j] / sum(scores)
                for a in part:
                    mixed[i, a] += weights[h, i, j] * float(v[j][a])
    return np.array([linear(row, *layer.output) for row in mixed]), weights


def reglu_ffn(x: Array, layer: Layer) -> Array:
    """x [D] → [D]."""
    hidden = linear(x, *layer.ffn_in)
    half = len(hidden) // 2
    gated = np.array([float(hidden[i]) * max(float(hidden[half + i]), 0.0) for i in range(half)])
    return linear(gated, *layer.ffn_out)


def ft_transformer(
    x: Array, cls: Array, bias: Array, layers: list[Layer], norm: Affine, heads: int
) -> tuple[Array, list[Array]]:
    """x [F, D] → (ReLU(LN(CLS)) [D], weights of every layer). All tokens are computed in all layers."""
    t = np.concatenate([cls[None], x + bias])
    maps = []
    for layer in layers:
        read = t if layer.norm_attention is None else np.array([layer_norm(row, *layer.norm_attention, 1e-5) for row in t])
        got, weights = attend(read, layer, heads)
        maps.append(weights)
        t = t + got
        t = t + np.array([reglu_ffn(layer_norm(row, *layer.norm_ffn, 1e-5), layer) for row in t])
    return np.array([max(float(v), 0.0) for v in layer_norm(t[0], *norm, 1e-5)]), maps
