"""CatGCN feature by feature and node by node, with the matrices of the paper (arXiv:2009.05303)."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def feature_matrix(size: int, probe: float) -> Array:
    """(11ᵀ + ρI)/(S + ρ), [S, S]."""
    return (np.ones((size, size)) + probe * np.eye(size)) / (size + probe)


def global_interaction(e: Array, weight: Array, bias: Array, probe: float) -> Array:
    """e [S, D], weight [D, D] (of x W), bias [D] → [D]."""
    hidden = feature_matrix(len(e), probe) @ e @ weight
    mean = np.zeros(e.shape[1])
    for row in hidden:
        for d in range(e.shape[1]):
            mean[d] += max(row[d] + bias[d], 0.0) / len(e)
    return mean


def probe_of_one_step(probe: float, steps: int, size: int) -> float:
    """ρ of the one step that equals so many of them: ρ^K / Σ_{i<K} C(K, i) ρ^i S^(K−1−i)."""
    return float(probe**steps / sum(math.comb(steps, i) * probe**i * size ** (steps - 1 - i) for i in range(steps)))


def node_matrix(num_nodes: int, edges: list[tuple[int, int]]) -> Array:
    """D^-½ (A + I) D^-½ of undirected edges, each listed once or more."""
    matrix = np.eye(num_nodes)
    for u, v in edges:
        matrix[u, v] = matrix[v, u] = 1
    degree = [sum(row) for row in matrix]
    return np.array([[matrix[u, v] / math.sqrt(degree[u] * degree[v]) for v in range(num_nodes)] for u in range(num_nodes)])
