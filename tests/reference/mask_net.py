"""MaskNet, number by number (arXiv:2102.07619 eq. 4 to 10)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
EPS = 1e-5


@dataclass
class Block:
    """w1 [A, N], b1 [A], w2 [H, A], b2 [H], w [O, H]; gain and shift [O] of the layer normalisation."""

    w1: Array
    b1: Array
    w2: Array
    b2: Array
    w: Array
    gain: Array
    shift: Array


def layer_norm(x: Array, gain: Array, shift: Array) -> Array:
    """x, gain, shift [N]."""
    mean = sum(x) / len(x)
    variance = sum((v - mean) ** 2 for v in x) / len(x)
    return np.array([(x[i] - mean) / np.sqrt(variance + EPS) * gain[i] + shift[i] for i in range(len(x))])


def mask(e: Array, block: Block) -> Array:
    """e [N] → [H]."""
    hidden = [max(sum(row[i] * e[i] for i in range(len(e))) + b, 0.0) for row, b in zip(block.w1, block.b1, strict=True)]
    return np.array(
        [sum(row[a] * hidden[a] for a in range(len(hidden))) + b for row, b in zip(block.w2, block.b2, strict=True)]
    )


def mask_block(e: Array, h: Array, block: Block) -> Array:
    """e [N], h [H] → [O]."""
    m = mask(e, block)
    linear = np.array([sum(row[i] * m[i] * h[i] for i in range(len(h))) for row in block.w])
    return np.array([max(v, 0.0) for v in layer_norm(linear, block.gain, block.shift)])


def field_norm(x: Array, gain: Array, shift: Array) -> Array:
    """x, gain, shift [F, D] → [F·D], each field normalised by itself."""
    return np.concatenate([layer_norm(x[f], gain[f], shift[f]) for f in range(len(x))])


def serial(x: Array, h: Array, blocks: list[Block]) -> Array:
    """x [F, D]; h [F·D], the embeddings normalised or not."""
    for block in blocks:
        h = mask_block(x.flatten(), h, block)
    return h


def parallel(x: Array, h: Array, blocks: list[Block]) -> Array:
    """As ``serial``, to [K, O]."""
    return np.array([mask_block(x.flatten(), h, block) for block in blocks])
