"""ARM-Net, neuron by neuron (arXiv:2107.01830 eq. 3, 5 and 6), with α-entmax by its definition (arXiv:1905.05702)."""

from __future__ import annotations

import itertools
import math

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]


def entmax(z: Array, alpha: float) -> Array:
    """z [N] → p [N]. The threshold τ is found by halving an interval that holds it, until doubles are used up."""
    if alpha == 1:
        powers = [math.exp(v - max(z)) for v in z]
        return np.array([v / sum(powers) for v in powers])

    def weights(tau: float) -> list[float]:
        return [max((alpha - 1) * v - tau, 0.0) ** (1 / (alpha - 1)) for v in z]

    top = (alpha - 1) * max(z)
    low, high = top - 1, top
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weights(middle)) >= 1 else (low, middle)
    p = weights(low)
    return np.array([v / sum(p) for v in p])


def nearest_on_simplex(z: Array) -> Array:
    """Sparsemax as a projection: the nearest of the candidates of every support."""
    best = np.full(len(z), np.inf)
    for size in range(1, len(z) + 1):
        for support in itertools.combinations(range(len(z)), size):
            tau = (sum(z[j] for j in support) - 1) / size
            p = np.array([z[j] - tau if j in support else 0.0 for j in range(len(z))])
            if min(p) >= 0 and sum((p - z) ** 2) < sum((best - z) ** 2):
                best = p
    return best


def arm_net(
    x: Array,
    weight: Array | None,
    query: Array | None,
    value: Array | None,
    *,
    alpha: float,
    scale: bool,
    additive: bool = False,
) -> tuple[Array, Array, Array]:
    """x [F, D], weight [K, D, d], query [K, o, d], value [K, o, F] → gates and weights [H, F], unnormed neurons [H, D]."""
    shaped = query if query is not None else value
    assert shaped is not None
    gates, weights, neurons = [], [], []
    for k, i in itertools.product(range(shaped.shape[0]), range(shaped.shape[1])):
        z = np.ones(len(x))
        if query is not None:
            scores = []
            for e in x:
                key = e
                if weight is not None:
                    key = np.array([sum(e[a] * weight[k, a, b] for a in range(len(e))) for b in range(weight.shape[2])])
                score = sum(float(key[b]) * float(query[k, i, b]) for b in range(len(key)))
                scores.append(score / math.sqrt(len(key)) if scale else score)
            z = entmax(np.array(scores), alpha)
        w = np.array([z[j] * (1.0 if value is None else value[k, i, j]) for j in range(len(x))])
        y = np.ones(x.shape[1]) * (0.0 if additive else 1.0)
        for j in range(len(x)):
            for d in range(x.shape[1]):
                if additive:
                    y[d] += w[j] * math.exp(x[j, d])
                else:
                    y[d] *= math.exp(x[j, d]) ** w[j]
        gates.append(z)
        weights.append(w)
        neurons.append(y)
    return np.array(gates), np.array(weights), np.array(neurons)


def batch_norm(y: Array, mean: Array, variance: Array, gain: Array, shift: Array, eps: float = 1e-5) -> Array:
    """y [H, D], the rest [H]: one channel per neuron."""
    return np.array([[gain[h] * (v - mean[h]) / math.sqrt(variance[h] + eps) + shift[h] for v in y[h]] for h in range(len(y))])
