"""Products of pairs of fields, pair by pair (arXiv:1611.00144, arXiv:1807.00311), of one row."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import linear

Array = npt.NDArray[np.float64]


def pairs(count: int) -> list[tuple[int, int]]:
    """(0, 1), (0, 2), …, (1, 2), …"""
    return [(i, j) for i in range(count) for j in range(count) if i < j]


def inner(a: Array, b: Array) -> float:
    """⟨a, b⟩ of two vectors."""
    return sum(float(u) * float(v) for u, v in zip(a, b, strict=True))


def inner_products(x: Array) -> Array:
    """x [F, D] → [P]."""
    return np.array([inner(x[i], x[j]) for i, j in pairs(len(x))])


def kernel_products(x: Array, kernels: Array) -> Array:
    """x [F, D], kernels [P, D, D] → [P]: Σ_k Σ_l φ_kl x_ik x_jl."""
    products = []
    for kernel, (i, j) in zip(kernels, pairs(len(x)), strict=True):
        total = 0.0
        for k in range(x.shape[1]):
            for m in range(x.shape[1]):
                total += float(kernel[k, m]) * float(x[i, k]) * float(x[j, m])
        products.append(total)
    return np.array(products)


def outer_sum(x: Array) -> Array:
    """x [F, D] → [D, D]: the sum of the outer products of all F² ordered pairs, a field with itself among them."""
    total = np.zeros((x.shape[1], x.shape[1]))
    for a in x:
        for b in x:
            for k in range(x.shape[1]):
                for m in range(x.shape[1]):
                    total[k, m] += float(a[k]) * float(b[m])
    return total


Layer = tuple[Array, Array, Array | None, Array | None]  # per pair weight [P, in, out] and bias [P, out]; gain and shift [out]


def sub_networks(x: Array, layers: list[Layer], eps: float) -> Array:
    """x [F, D] → [P, m]; ReLU on all layers but the last, mean and variance over all units of all pairs."""
    h = [np.array([*x[i], *x[j], *(float(u) * float(v) for u, v in zip(x[i], x[j], strict=True))]) for i, j in pairs(len(x))]
    for depth, (weight, bias, gain, shift) in enumerate(layers):
        h = [linear(vector, weight[p].T, bias[p]) for p, vector in enumerate(h)]
        if gain is not None and shift is not None:
            values = [float(v) for vector in h for v in vector]
            mean = sum(values) / len(values)
            deviation = (sum((v - mean) ** 2 for v in values) / len(values) + eps) ** 0.5
            h = [(vector - mean) / deviation * gain + shift for vector in h]
        if depth < len(layers) - 1:
            h = [np.array([max(float(v), 0.0) for v in vector]) for vector in h]
    return np.array(h)
