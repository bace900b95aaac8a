"""OptInter's pair vectors (arXiv:2108.01265 eq. 8 and 17) of one pair of one row, number by number."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def shares(logits: list[float], temperature: float) -> list[float]:
    """softmax(a / τ)."""
    powers = [math.exp((a - max(logits)) / temperature) for a in logits]
    return [p / sum(powers) for p in powers]


def mixture(logits: list[float], temperature: float, memorized: Array, left: Array, right: Array) -> Array:
    """Σ_o p_o e_o; the operations are memorize, factorize, naive."""
    p = shares(logits, temperature)
    return np.array([p[0] * float(m) + p[1] * float(a) * float(b) for m, a, b in zip(memorized, left, right, strict=True)])


def logit_gradient(logits: list[float], temperature: float, above: Array, memorized: Array, product: Array) -> list[float]:
    """∂L/∂a_o = (p_o / τ)(s_o − Σ_q p_q s_q) with s_o = ⟨∂L/∂b, e_o⟩."""
    p = shares(logits, temperature)
    s = [float(above @ memorized), float(above @ product), 0.0]
    mean = sum(p[q] * s[q] for q in range(3))
    return [p[o] / temperature * (s[o] - mean) for o in range(3)]
