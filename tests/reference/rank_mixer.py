"""RankMixer (arXiv:2507.15551 sections 3.1 to 3.3), token by token; token weights in row convention, x W."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import erf_gelu, layer_norm

Array = npt.NDArray[np.float64]
Affine = tuple[Array, Array]


@dataclass(frozen=True)
class Layer:
    """The FFN's weights [T, D, kD] and [T, kD, D] with biases, and two norms."""

    first: Affine
    last: Affine
    norm_mix: Affine
    norm_ffn: Affine


def affine(x: Array, weight: Array, bias: Array) -> Array:
    return np.array([float(bias[j]) + sum(float(x[i]) * float(weight[i, j]) for i in range(len(x))) for j in range(len(bias))])


def tokenize(x: Array, weight: Array, bias: Array) -> Array:
    """x [F, D] → [T, D']: zeros at the end make all pieces equally long."""
    count, piece, _ = weight.shape
    flat = [*x.ravel(), *np.zeros(count * piece - x.size)]
    return np.array([affine(np.array(flat[t * piece : (t + 1) * piece]), weight[t], bias[t]) for t in range(count)])


def mix(x: Array) -> Array:
    """x [T, D]: new token h is the h-th piece of all tokens, one after another."""
    count, width = x.shape
    piece = width // count
    return np.array([np.concatenate([x[t, h * piece : (h + 1) * piece] for t in range(count)]) for h in range(count)])


def rank_mixer(x: Array, token: Affine, layers: list[Layer]) -> Array:
    """x [F, D] → [D']."""
    t = tokenize(x, *token)
    for layer in layers:
        s = np.array([layer_norm(row, *layer.norm_mix, 1e-5) for row in mix(t) + t])
        new = []
        for i, row in enumerate(s):
            hidden = np.array([erf_gelu(float(z)) for z in affine(row, layer.first[0][i], layer.first[1][i])])
            new.append(layer_norm(affine(hidden, layer.last[0][i], layer.last[1][i]) + row, *layer.norm_ffn, 1e-5))
        t = np.array(new)
    mean: Array = sum(t, np.zeros(t.shape[1])) / len(t)
    return mean
