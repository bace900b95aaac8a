"""OptFS's gate of a value that no batch contains: scalar Adam on λ·σ(τ·g_c), in double precision."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sigmoid_slope(x: float) -> float:
    """σ′(x), for any x."""
    small = math.exp(-abs(x))
    return small / (1 + small) ** 2


def never_seen(
    penalty: float, rate: float, temperatures: Sequence[float], steps: int, *, start: float = 0.5, epsilon: float = 1e-8
) -> list[float]:
    """g_c at the end of each epoch of so many steps."""
    logit, m, v, decay1, decay2 = start, 0.0, 0.0, 1.0, 1.0
    ends = []
    for temperature in temperatures:
        for _ in range(steps):
            gradient = penalty * temperature * sigmoid_slope(temperature * logit)
            m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient * gradient
            decay1, decay2 = 0.9 * decay1, 0.999 * decay2
            logit -= rate * m / (1 - decay1) / (math.sqrt(v / (1 - decay2)) + epsilon)
        ends.append(logit)
    return ends
