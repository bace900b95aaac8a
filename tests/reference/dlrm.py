"""DLRM's interaction, number by number (arXiv:1906.00091, section 2.1.4 and 2.2)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def bottom(x: Array, layers: list[tuple[Array, Array]]) -> Array:
    """x [N]; a ReLU after every layer, the last one too."""
    for w, b in layers:
        x = np.array([max(sum(w[o, i] * x[i] for i in range(len(x))) + b[o], 0.0) for o in range(len(w))])
    return x


def dots(vectors: list[Array]) -> list[float]:
    """⟨z_i, z_j⟩ for i < j, in the order (0, 1), (0, 2), …"""
    found = []
    for i in range(len(vectors)):
        for j in range(i + 1, len(vectors)):
            found.append(float(sum(a * b for a, b in zip(vectors[i], vectors[j], strict=True))))
    return found
