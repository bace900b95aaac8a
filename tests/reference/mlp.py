"""Multi-layer networks and linear terms, one row and one unit at a time."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Layer = tuple[Array, Array | None]  # weight, bias
Layers = Sequence[Layer]


def erf_gelu(z: float) -> float:
    return z * 0.5 * (1 + math.erf(z / math.sqrt(2)))


ACTIVATIONS: dict[str, Callable[[float], float]] = {
    "relu": lambda z: z if z > 0 else 0.0,
    "gelu": erf_gelu,
    "silu": lambda z: z / (1 + math.exp(-z)),
    "tanh": math.tanh,
    "leaky_relu": lambda z: z if z > 0 else 0.01 * z,
    "sigmoid": lambda z: 1 / (1 + math.exp(-z)),
    "none": lambda z: z,
}


def linear(x: Array, weight: Array, bias: Array | None) -> Array:
    """x [n] → [m]; weight [m, n] as nn.Linear stores it."""
    y = np.zeros(weight.shape[0])
    for i in range(weight.shape[0]):
        total = 0.0 if bias is None else float(bias[i])
        for j in range(weight.shape[1]):
            total += float(weight[i, j]) * float(x[j])
        y[i] = total
    return y


def layer_norm(x: Array, gain: Array, shift: Array, eps: float) -> Array:
    """Over one vector, with the biased variance."""
    mean = sum(float(v) for v in x) / len(x)
    variance = sum((float(v) - mean) ** 2 for v in x) / len(x)
    return np.array(
        [(float(v) - mean) / math.sqrt(variance + eps) * float(g) + float(s) for v, g, s in zip(x, gain, shift, strict=True)]
    )


def mlp(x: Array, hidden: Layers, activation: str, last: Layer | None) -> Array:
    """x [F, D] → [last width]; each layer is (weight, bias)."""
    h = np.array([v for row in x for v in row])
    for weight, bias in hidden:
        h = np.array([ACTIVATIONS[activation](float(z)) for z in linear(h, weight, bias)])
    return h if last is None else linear(h, *last)


def first_order(x: Array, bias: float) -> float:
    """x [F, D] → scalar."""
    total = bias
    for row in x:
        for v in row:
            total += float(v)
    return total
