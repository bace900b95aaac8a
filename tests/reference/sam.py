"""Layers of SAM, pair by pair (arXiv:2105.05563)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def layer(x: Array, kind: str, weight: Array | None, key: Array | None, residual: Array | None) -> tuple[Array, Array]:
    """x [F, D], weight [F, F, D], key and residual [D, D] as [out, in] → (y [F, D] or [F², D], s [F, F])."""
    fields, dim = x.shape
    s = np.zeros((fields, fields))
    pairs = np.zeros((fields, fields, dim))
    for i in range(fields):
        for j in range(fields):
            for a in range(dim):
                read = x[j, a] if key is None else sum(float(key[a, b]) * float(x[j, b]) for b in range(dim))
                s[i, j] += x[i, a] * read
            for d in range(dim):
                pairs[i, j, d] = s[i, j] * (x[i, d] * x[j, d] if weight is None else weight[i, j, d])
    if kind.startswith("sam2"):
        return pairs.reshape(fields * fields, dim), s
    y = np.zeros((fields, dim))
    for i in range(fields):
        for d in range(dim):
            y[i, d] = sum(float(pairs[i, j, d]) for j in range(fields))
            if residual is not None:
                y[i, d] += sum(float(residual[d, b]) * float(x[i, b]) for b in range(dim))
    return y, s
