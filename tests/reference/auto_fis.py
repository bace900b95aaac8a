"""The gated pairs of one batch, pair by pair (arXiv:2003.11235), and a step of GRDA."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def auto_fis(x: Array, alpha: dict[tuple[int, int], float], eps: float | None) -> list[float]:
    """x [B, F, D], a weight for every pair → B numbers; ``eps`` is that of batch norm over the batch, ``None``: no norm."""
    total = [0.0] * len(x)
    for i, j in combinations(range(x.shape[1]), 2):
        products = [float(row[i] @ row[j]) for row in x]
        if eps is not None:
            mean = sum(products) / len(products)
            variance = sum((p - mean) ** 2 for p in products) / len(products)
            products = [(p - mean) / math.sqrt(variance + eps) for p in products]
        for b, product in enumerate(products):
            total[b] += alpha.get((i, j), 0.0) * product
    return total


def grda(start: float, gradients: list[float], rate: float, c: float, mu: float) -> list[float]:
    """The weight after each step; the threshold added up step by step, as in the authors' code."""
    v, l1, found = 0.0, 0.0, []
    for t, gradient in enumerate(gradients):
        v += (start if t == 0 else 0.0) - rate * gradient
        l1 += c * rate ** (0.5 + mu) * ((t + 1) ** mu - t**mu)
        found.append(math.copysign(max(abs(v) - l1, 0.0), v))
    return found
