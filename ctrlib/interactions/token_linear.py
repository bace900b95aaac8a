"""A linear layer and a layer norm with parameters of their own for every token; parts of Hiformer and RankMixer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class TokenLinear(nn.Module):
    """y_l = x_l W_l + b_l. Shape: [B, L, d] → [B, L, e]. Parameters: L·d·e, and L·e with ``bias``.

    Every W_l and b_l starts as torch's ``nn.Linear`` does: uniform within ±1/√d.
    """

    def __init__(self, num_tokens: int, width_in: int, width_out: int, *, bias: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(width_in)
        self.weight = nn.Parameter(torch.empty(num_tokens, width_in, width_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(num_tokens, width_out).uniform_(-bound, bound)) if bias else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, d] → [B, L, e]."""
        y_BLE = torch.einsum("bld,lde->ble", x_BLD, self.weight)
        return y_BLE if self.bias is None else y_BLE + self.bias


class TokenNorm(nn.Module):
    """Layer normalisation over the last axis with a gain and a shift per token. Shape: [B, L, d] → [B, L, d]."""

    def __init__(self, num_tokens: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(num_tokens, width))
        self.bias = nn.Parameter(torch.zeros(num_tokens, width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, d] → [B, L, d]."""
        return F.layer_norm(x_BLD, x_BLD.shape[-1:]) * self.weight + self.bias
