"""AdaptiveFusion of one row, field by field and modality by modality (the reconstruction in the docstring of the block)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import mlp

Array = npt.NDArray[np.float64]
Layer = tuple[Array, Array]


def gates(x: Array, of: list[int], hidden: Layer, out: Layer) -> list[float]:
    """x [F, D], the modality of every field → γ [F]."""
    stats = [s for field in x for s in (float(np.mean(field)), math.sqrt(float(np.mean(field**2)) + 1e-12))]
    opened = [1 / (1 + math.exp(-g)) for g in mlp(np.array([stats]), [hidden], "relu", out)]
    found = []
    for f, a in enumerate(of):
        others = [opened[g] for g in range(len(x)) if of[g] == a and np.any(x[g] != 0)]
        found.append(opened[f] * len(others) / sum(others) if np.any(x[f] != 0) else 0.0)
    return found


def fusion(
    x: Array,
    gamma: list[float],
    of: list[int],
    weight: Array,
    bias: Array,
    hidden: Layer,
    score: Array,
    norm: Layer,
) -> tuple[list[float], Array, Array]:
    """x [F, D], γ, the modality of every field, W [F, D, k], b [A, k], (U, c), V [A, n], (gain, bias) → α, [α_a h_a], z."""
    count = len(bias)
    h = np.zeros_like(bias)
    present = [False] * count
    for f, a in enumerate(of):
        present[a] = present[a] or bool(np.any(x[f] != 0))
        h[a] += gamma[f] * (x[f] @ weight[f])
    for a in range(count):
        h[a] = h[a] + bias[a] if present[a] else 0
    hidden_n = np.tanh(hidden[0] @ h.reshape(-1) + hidden[1])
    scores = [math.exp(float(score[a] @ hidden_n)) if present[a] else 0.0 for a in range(count)]
    alpha = [s / sum(scores) if sum(scores) else 0.0 for s in scores]
    weighted = np.array([alpha[a] * h[a] for a in range(count)])
    total = weighted.sum(0)
    z = (total - total.mean()) / math.sqrt(float(total.var()) + 1e-5) * norm[0] + norm[1]
    return alpha, weighted, z
