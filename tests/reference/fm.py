"""Pairwise term of factorization machines, pair by pair (Rendle 2010, the defining double sum)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


def fm(x: npt.NDArray[np.float64]) -> float:
    """x [F, D] → scalar."""
    total = 0.0
    for i in range(x.shape[0]):
        for j in range(i + 1, x.shape[0]):
            for d in range(x.shape[1]):
                total += float(x[i, d]) * float(x[j, d])
    return total
