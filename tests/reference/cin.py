"""CIN, coordinate by coordinate (arXiv:1803.05170 eq. 6 and 8)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def cin(x: Array, weights: list[Array], biases: list[Array] | None, act: Callable[[Array], Array]) -> Array:
    """x [F, D]; weight k [H_k, H_{k-1}, F]; bias k [H_k]. The sums over the coordinates of all vectors of all layers."""
    fields, dim = x.shape
    before = x
    pooled: list[float] = []
    for k, weight in enumerate(weights):
        after = np.zeros((len(weight), dim))
        for h in range(len(weight)):
            for i in range(len(before)):
                for j in range(fields):
                    after[h] += weight[h, i, j] * (before[i] * x[j])
            if biases is not None:
                after[h] += biases[k][h]
        before = act(after)
        pooled += [float(sum(vector)) for vector in before]
    return np.array(pooled)


def crossed_with_itself(x: Array, weights: list[Array]) -> Array:
    """The deliberately wrong variant: every layer crosses its predecessor with itself, X^{k-1}_i ⊙ X^{k-1}_j.

    Only for layers as wide as the input.
    """
    before = x
    pooled: list[float] = []
    for weight in weights:
        after = np.zeros_like(x)
        for h in range(len(weight)):
            for i in range(len(before)):
                for j in range(len(before)):
                    after[h] += weight[h, i, j] * (before[i] * before[j])
        before = after
        pooled += [float(sum(vector)) for vector in before]
    return np.array(pooled)
