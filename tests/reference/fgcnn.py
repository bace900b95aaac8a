"""FGCNN's generator (arXiv:1904.04447 section 3.2) of one row, number by number."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.reference.mlp import linear

Array = npt.NDArray[np.float64]
Norm = tuple[Array, Array, Array, Array]  # mean, variance, gain, shift, each [maps] or [units]
EPS = 1e-5


@dataclass(frozen=True)
class Layer:
    """kernel [m_c, m_c', h], bias [m_c]; weight [units, H·k·m_c] as nn.Linear stores it."""

    kernel: Array
    bias: Array | None
    conv_norm: Norm | None
    pool_size: int
    weight: Array | None
    recombine_bias: Array | None
    recombine_norm: Norm | None


def normalized(value: float, norm: Norm | None, i: int) -> float:
    if norm is None:
        return value
    mean, variance, gain, shift = (float(part[i]) for part in norm)
    return (value - mean) / math.sqrt(variance + EPS) * gain + shift


def convolve(maps: list[Array], kernel: Array, bias: Array | None) -> list[Array]:
    """maps of [H, k] → maps of [H, k]: Σ_m Σ_a X_m[p + a − ⌊(h−1)/2⌋, q] W[m, a], rows outside read as zero."""
    height, dim = maps[0].shape
    before = (kernel.shape[2] - 1) // 2
    results = []
    for j in range(kernel.shape[0]):
        result = np.zeros((height, dim))
        for p in range(height):
            for q in range(dim):
                total = 0.0 if bias is None else float(bias[j])
                for m, source in enumerate(maps):
                    for a in range(kernel.shape[2]):
                        row = p + a - before
                        if 0 <= row < height:
                            total += float(source[row, q]) * float(kernel[j, m, a])
                result[p, q] = total
        results.append(result)
    return results


def pool(one: Array, size: int, rounded: Callable[[float], int] = math.ceil) -> Array:
    """[H, k] → [⌈H/size⌉, k]; the last window may have fewer rows. ``math.floor`` drops it."""
    height = rounded(one.shape[0] / size)
    return np.array(
        [[max(float(v) for v in one[p * size : (p + 1) * size, q]) for q in range(one.shape[1])] for p in range(height)]
    )


def generate(x: Array, layers: list[Layer], rounded: Callable[[float], int] = math.ceil) -> tuple[list[Array], list[Array]]:
    """x [F, k] → the generated fields [N_i, k] of every layer, and the pooled maps [m_c, H_i, k] of every layer."""
    maps, fields, pooled = [x], [], []
    for layer in layers:
        maps = convolve(maps, layer.kernel, layer.bias)
        maps = [
            np.array([[math.tanh(normalized(float(v), layer.conv_norm, j)) for v in row] for row in one])
            for j, one in enumerate(maps)
        ]
        maps = [pool(one, layer.pool_size, rounded) for one in maps]
        pooled.append(np.array(maps))
        if layer.weight is None:
            fields.append(np.concatenate(maps))
        else:
            flat = np.array([v for one in maps for row in one for v in row])
            units = linear(flat, layer.weight, layer.recombine_bias)
            units = np.array([math.tanh(normalized(float(u), layer.recombine_norm, i)) for i, u in enumerate(units)])
            fields.append(units.reshape(-1, x.shape[1]))
    return fields, pooled
