"""AW-MoE (arXiv:2306.05011 as designed in docs/papers/aw_moe.md), one row and one behaviour at a time."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from tests.reference.behaviours import attend, unit
from tests.reference.mlp import Layers, mlp

Array = npt.NDArray[np.float64]


def gate(h: Array, c: Array, gate_unit: Layers, activation_unit: Layers, activation: str) -> Array:
    """Σ_j a_j r_j over the behaviours h [n, d] of one row → [K]."""
    total = np.zeros(len(gate_unit[-1][0]))
    for behaviour in h:
        a = float(unit(behaviour, c, activation_unit, activation)[0])
        r = unit(behaviour, c, gate_unit, activation)
        for k in range(len(total)):
            total[k] += a * float(r[k])
    return total


def logit(
    fields: Array,
    h: Array,
    c: Array,
    *,
    attention: Layers,
    gate_unit: Layers,
    activation_unit: Layers,
    experts: Sequence[Layers],
    empty: Array,
    activation: str,
) -> float:
    """fields [F, D], h [n, A·D], c [A·D] of one row → Σ_k g_k s_k."""
    pooled = attend(h, c, attention, activation, "none")
    x = np.concatenate([fields.ravel(), pooled]).reshape(1, -1)
    g = gate(h, c, gate_unit, activation_unit, activation) if len(h) else empty
    total = 0.0
    for k, layers in enumerate(experts):
        total += float(g[k]) * float(mlp(x, layers[:-1], activation, layers[-1])[0])
    return total
