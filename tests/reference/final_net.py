"""FinalNet row by row: factorized layers, the gate over the fields, the loss of two branches (doi:10.1145/3539618.3591988)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import ACTIVATIONS, linear

Array = npt.NDArray[np.float64]


def factorized(x: Array, weight: Array, bias: Array, combine: str) -> Array:
    """x [n] → [m]; weight as nn.Linear stores it."""
    h = linear(x, weight, bias)
    half = len(h) // 2
    product = [float(h[half + i]) * float(h[i]) for i in range(half)]
    if combine == "concat":
        return np.array([*h[:half], *product])
    return np.array([float(h[i]) + product[i] for i in range(half)])


def factorized_mlp(x: Array, layers: list[tuple[Array, Array]], activation: str, combine: str) -> Array:
    """x [F, D] → [last width], without norms."""
    h = np.array([v for row in x for v in row])
    for weight, bias in layers:
        h = np.array([ACTIVATIONS[activation](float(z)) for z in factorized(h, weight, bias, combine)])
    return h


def gate(x: Array, weight: Array, bias: Array, combine: str) -> Array:
    """x [F, D] → [2F, D] or [F, D]: every coordinate by a linear map over the fields of that coordinate."""
    gated = np.zeros_like(x)
    for f in range(x.shape[0]):
        for d in range(x.shape[1]):
            total = float(bias[f])
            for g in range(x.shape[0]):
                total += float(weight[f, g]) * float(x[g, d])
            gated[f, d] = x[f, d] * total
    return np.concatenate([x, gated]) if combine == "concat" else x + gated


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def cross_entropy(probability: float, target: float) -> float:
    return -(target * math.log(probability) + (1 - target) * math.log(1 - probability))


def losses(y_1: float, y_2: float, label: float) -> tuple[float, float, float]:
    """Of the mean against the label, and of each branch against the mean."""
    mean = sigmoid((y_1 + y_2) / 2)
    return cross_entropy(mean, label), cross_entropy(sigmoid(y_1), mean), cross_entropy(sigmoid(y_2), mean)
