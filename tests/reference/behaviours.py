"""Activation unit, Dice and target attention (arXiv:1706.06978), behaviour by behaviour, with the inputs side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import ACTIVATIONS, Layers, linear

Array = npt.NDArray[np.float64]


def unit(h: Array, c: Array, layers: Layers, activation: str) -> Array:
    """h [d], c [d] → [q]; the first layer reads [h, c, h − c, h ⊙ c]."""
    x = np.array([*h, *c, *(a - b for a, b in zip(h, c, strict=True)), *(a * b for a, b in zip(h, c, strict=True))])
    *hidden, last = layers
    for weight, bias in hidden:
        x = np.array([ACTIVATIONS[activation](float(z)) for z in linear(x, weight, bias)])
    return linear(x, *last)


def dice(column: Array, alpha: float, eps: float) -> Array:
    """The values of one unit over a batch: p(s)·s + (1 − p(s))·α·s."""
    mean = sum(float(s) for s in column) / len(column)
    variance = sum((float(s) - mean) ** 2 for s in column) / len(column)
    out = []
    for s in column:
        p = 1 / (1 + math.exp(-(float(s) - mean) / math.sqrt(variance + eps)))
        out.append(p * float(s) + (1 - p) * alpha * float(s))
    return np.array(out)


def weights(scores: Sequence[float], norm: str) -> list[float]:
    """Of the behaviours of one row."""
    if norm == "softmax":
        powers = [math.exp(s - max(scores)) for s in scores]
        return [p / sum(powers) for p in powers]
    return [1 / (1 + math.exp(-s)) if norm == "sigmoid" else s for s in scores]


def attend(h: Array, c: Array, layers: Layers, activation: str, norm: str) -> Array:
    """h [n, d] of one row, c [d] → [d]."""
    total = np.zeros(len(c))
    scores = [float(unit(behaviour, c, layers, activation)[0]) for behaviour in h]
    for w, behaviour in zip(weights(scores, norm), h, strict=True):
        total += w * behaviour
    return total
