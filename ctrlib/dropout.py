"""Dropout whose random numbers cost less than the layer before it.

On a CPU torch's own draws so slowly that it takes longer than the product with a 400 × 400 matrix before it
(``benchmarks/dropout.py``); 16 random bits an element are enough. Elsewhere, and in compiled graphs, torch's own is used.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 1 << 16


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """x with every element set to 0 with chance ``p`` and otherwise divided by 1 − p; x itself outside training.

    On a CPU ``p`` is rounded to a multiple of 2⁻¹⁶, in the divisor too, so that the mean stays x. The random numbers are of
    torch's global generator.
    """
    if not training or p == 0 or x.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(x, p, training)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    kept = words.view(torch.int16)[: x.numel()].reshape(x.shape) >= dropped - _LEVELS // 2
    return x * kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))


class Dropout(nn.Dropout):
    """:func:`dropout` as a layer. Shape: any → the same."""

    def forward(self, input: Tensor) -> Tensor:
        """x → x."""
        return dropout(input, self.p, self.training)
