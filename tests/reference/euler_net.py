"""EulerNet (arXiv:2304.10711) with Python's complex numbers: explicit interactions as products of complex powers."""

from __future__ import annotations

import cmath
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import layer_norm, linear

Array = npt.NDArray[np.float64]
Affine = tuple[Array, Array]


@dataclass(frozen=True)
class Layer:
    """``order`` [m, n]; biases of modulus and phase [n, D]; the implicit linear layer; two norms, or none."""

    order: Array
    bias_modulus: Array
    bias_phase: Array
    implicit: Affine
    norms: tuple[Affine, Affine] | None


def start(x: Array, mu: Array) -> list[list[complex]]:
    """μ e^{i x}, coordinate by coordinate."""
    return [[float(mu[f]) * cmath.exp(1j * float(v)) for v in row] for f, row in enumerate(x)]


def power(z: complex, order: float, eps: float) -> complex:
    """z^order on the principal branch; ``eps`` is added to |z|², as the block does to keep its logarithm finite."""
    return cmath.rect((abs(z) ** 2 + eps) ** (order / 2), order * cmath.phase(z))


def layer(z: list[list[complex]], weights: Layer, eps: float) -> list[list[complex]]:
    """m vectors of complex numbers → n."""
    width = len(z[0])
    parts = [linear(np.array([v.real for row in z for v in row]), *weights.implicit)]
    parts.append(linear(np.array([v.imag for row in z for v in row]), *weights.implicit))
    re, im = (
        [[max(float(v), 0.0) for v in part[k * width : (k + 1) * width]] for k in range(weights.order.shape[1])]
        for part in parts
    )
    for k in range(weights.order.shape[1]):
        for d in range(width):
            product = cmath.exp(complex(weights.bias_modulus[k, d], weights.bias_phase[k, d]))
            for j in range(len(z)):
                product *= power(z[j][d], float(weights.order[j, k]), eps)
            re[k][d] += product.real
            im[k][d] += product.imag
        if weights.norms is not None:
            re[k] = layer_norm(np.array(re[k]), *weights.norms[0], 1e-5).tolist()
            im[k] = layer_norm(np.array(im[k]), *weights.norms[1], 1e-5).tolist()
    return [[complex(a, b) for a, b in zip(r, i, strict=True)] for r, i in zip(re, im, strict=True)]


def euler_net(x: Array, mu: Array, layers: list[Layer], eps: float = 1e-8) -> Array:
    """x [F, D] → Re z + Im z [n, D]."""
    z = start(x, mu)
    for weights in layers:
        z = layer(z, weights, eps)
    return np.array([[v.real + v.imag for v in row] for row in z])
