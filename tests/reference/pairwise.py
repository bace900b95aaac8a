"""Relatives of factorization machines, term by term, of one row: FwFM (arXiv:1806.03514), FmFM (arXiv:2102.12994), FFM
(doi:10.1145/2959100.2959134), ONN (arXiv:1904.12579), HOFM (arXiv:1607.07195)."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt

from tests.reference.products import inner, kernel_products, pairs

Array = npt.NDArray[np.float64]


def fwfm(v: Array, strength: Array, linear: Array | None) -> float:
    """v [F, D], strength r [F, F] of which i < j is read, linear [F, D] (of the fields, or of the values) → scalar."""
    total = sum(float(strength[i, j]) * inner(v[i], v[j]) for i, j in pairs(len(v)))
    return total if linear is None else total + sum(inner(a, b) for a, b in zip(v, linear, strict=True))


def fmfm(v: Array, matrices: Array) -> float:
    """v [F, D], matrices [P, D, D] → scalar."""
    return float(sum(kernel_products(v, matrices)))


def slot(i: int, j: int) -> int:
    """Where the vectors of field i, in the order of the other fields, hold the one for field j."""
    return [other for other in range(max(i, j) + 1) if other != i].index(j)


def ffm_products(v: Array) -> list[float]:
    """v [F, F−1, k] → [P]."""
    return [inner(v[i, slot(i, j)], v[j, slot(j, i)]) for i, j in pairs(len(v))]


def onn(own: Array, v: Array) -> Array:
    """own [F, k], v [F, F−1, k] → [F·k + P]."""
    return np.array([*own.flatten(), *ffm_products(v)])


def anova(z: Array, order: int) -> float:
    """z [F, D] → Σ_s Σ_{i_1 < … < i_t} Π z: every combination of different fields by itself."""
    total = 0.0
    for chosen in itertools.combinations(range(len(z)), order):
        for s in range(z.shape[1]):
            product = 1.0
            for i in chosen:
                product *= float(z[i, s])
            total += product
    return total
