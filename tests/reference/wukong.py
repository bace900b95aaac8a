"""A layer of Wukong (arXiv:2403.02545 sections 3.3 to 3.6), with the matrix of all inner products written out."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import layer_norm, mlp

Array = npt.NDArray[np.float64]
Affine = tuple[Array, Array]


@dataclass(frozen=True)
class Weights:
    """``y`` [n, k] or absent, ``compress`` W_L [n_L, n], ``residual`` [n_F + n_L, n] or absent."""

    y: Array | None
    norm_fm: Affine
    hidden: list[Affine]
    last: Affine
    compress: Array
    residual: Array | None
    norm: Affine


def recombine(weight: Array, x: Array) -> Array:
    """W X, row by row."""
    return np.array([sum((float(w) * x[j] for j, w in enumerate(row)), np.zeros(x.shape[1])) for row in weight])


def fm(x: Array, y: Array | None) -> Array:
    """x [n, D] → X Xᵀ Y [n, k]."""
    count = len(x)
    products = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            products[i, j] = sum(float(a) * float(b) for a, b in zip(x[i], x[j], strict=True))
    if y is None:
        return products
    return np.array(
        [[sum(products[i, j] * float(y[j, r]) for j in range(count)) for r in range(y.shape[1])] for i in range(count)]
    )


def layer(x: Array, weights: Weights) -> Array:
    """x [n, D] → [n_F + n_L, D]."""
    interactions = layer_norm(fm(x, weights.y).ravel(), *weights.norm_fm, 1e-5)
    fmb = mlp(interactions[None], weights.hidden, "relu", weights.last).reshape(-1, x.shape[1])
    total = np.concatenate([fmb, recombine(weights.compress, x)])
    total = total + (x if weights.residual is None else recombine(weights.residual, x))
    return np.array([layer_norm(row, *weights.norm, 1e-5) for row in total])
