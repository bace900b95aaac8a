"""EDCN, number by number (doi:10.1145/3459637.3481915, sections 4.1 and 4.2), without batch normalisation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


@dataclass
class Layer:
    """Gates [F] of both streams or None; cross weight and bias [N]; deep weight [N, N] and bias [N]; the bridge's arrays."""

    g_cross: Array | None
    g_deep: Array | None
    w: Array
    b: Array
    deep_w: Array
    deep_b: Array
    bridge: list[Array]


def softmax(values: Array) -> Array:
    shares = [np.exp(v) for v in values]
    return np.array([s / sum(shares) for s in shares])


def linear(x: Array, w: Array, b: Array | None = None) -> Array:
    return np.array([sum(w[o, i] * x[i] for i in range(len(x))) + (0.0 if b is None else b[o]) for o in range(len(w))])


def relu(x: Array) -> Array:
    return np.array([max(v, 0.0) for v in x])


def regulated(f: Array, g: Array | None, temperature: float, dim: int) -> Array:
    """f [N], g [F]: field i times its share of the softmax."""
    if g is None:
        return f.copy()
    gates = softmax(g / temperature)
    return np.array([gates[n // dim] * f[n] for n in range(len(f))])


def bridge(kind: Literal["product", "sum", "concat", "attention"], c: Array, h: Array, arrays: list[Array]) -> Array:
    if kind == "product":
        return np.array([c[n] * h[n] for n in range(len(c))])
    if kind == "sum":
        return np.array([c[n] + h[n] for n in range(len(c))])
    if kind == "concat":
        w, b = arrays
        return relu(linear(np.concatenate([c, h]), w, b))
    w_c, b_c, p_c, w_h, b_h, p_h = arrays
    a_c, a_h = softmax(linear(relu(linear(c, w_c, b_c)), p_c)), softmax(linear(relu(linear(h, w_h, b_h)), p_h))
    return np.array([a_c[n] * c[n] + a_h[n] * h[n] for n in range(len(c))])


def edcn(
    x: Array,
    layers: list[Layer],
    kind: Literal["product", "sum", "concat", "attention"],
    temperature: float,
    residual: bool = True,
) -> Array:
    """x [F, D] → [3, N]. ``residual=False`` is the wrong variant whose crosses drop their input."""
    f = x.flatten()
    x_0 = regulated(f, layers[0].g_cross, temperature, x.shape[1])
    c = h = f
    for layer in layers:
        c = regulated(f, layer.g_cross, temperature, x.shape[1])
        h = regulated(f, layer.g_deep, temperature, x.shape[1])
        product = sum(layer.w[n] * c[n] for n in range(len(c)))
        c = np.array([x_0[n] * product + layer.b[n] + (c[n] if residual else 0.0) for n in range(len(c))])
        h = relu(linear(h, layer.deep_w, layer.deep_b))
        f = bridge(kind, c, h, layer.bridge)
    return np.stack([c, h, f])
