"""Mixtures of experts (doi:10.1145/3219819.3220007), one row at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import Layer, Layers, linear, mlp

Array = npt.NDArray[np.float64]


def softmax(scores: Array, top_k: int | None = None) -> list[float]:
    """Over the ``top_k`` largest; the others get 0."""
    kept = sorted(range(len(scores)), key=lambda k: -float(scores[k]))[: top_k or len(scores)]
    powers = [math.exp(float(scores[k]) - float(max(scores))) if k in kept else 0.0 for k in range(len(scores))]
    return [p / sum(powers) for p in powers]


def plain(x: Array, gate: Layer, experts: Sequence[Layers], top_k: int | None = None) -> float:
    """x [F, D] → Σ_k softmax(G x)_k s_k(x)."""
    g = softmax(linear(x.ravel(), *gate), top_k)
    return sum(w * float(mlp(x, layers[:-1], "relu", layers[-1])[0]) for w, layers in zip(g, experts, strict=True))


def multi_gate(x: Array, gates: Sequence[Layer], experts: Sequence[Layers], towers: Sequence[Layers]) -> list[float]:
    """x [F, D] → a logit for every label; experts end with a hidden layer."""
    seen = [mlp(x, layers, "relu", None) for layers in experts]
    logits = []
    for gate, tower in zip(gates, towers, strict=True):
        g = softmax(linear(x.ravel(), *gate))
        mixed = sum((w * vector for w, vector in zip(g, seen, strict=True)), start=np.zeros_like(seen[0]))
        logits.append(float(mlp(mixed.reshape(1, -1), tower[:-1], "relu", tower[-1])[0]))
    return logits
