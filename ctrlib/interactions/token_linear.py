"""Layers with parameters of their own for every token: linear, linear in all tokens, and layer norm."""

from __future__ import annotations

import math
from typing import cast

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


class Composite(nn.Module):
    """[y_1, …, y_n] = vec(x) M with M [L·D, n·H·d], or M = A R of rank r. Shape: [B, L, D] → [B, n, H·d].

    With ``shared`` all heads have A [L·D, r] and R [r, n·H·d]; else each has its own A [L·D, r] and R [r, n·d].
    """

    def __init__(self, width: int, count: int, num_heads: int, head_dim: int, rank: int | None, *, shared: bool) -> None:
        super().__init__()
        self.shape = (count, num_heads, head_dim)
        self.per_head: TokenLinear | None = None
        if rank is None:
            self.linear: nn.Module = nn.Linear(width, count * num_heads * head_dim, bias=False)
        elif shared:
            last = nn.Linear(rank, count * num_heads * head_dim, bias=False)
            self.linear = nn.Sequential(nn.Linear(width, rank, bias=False), last)
        else:
            self.linear = nn.Linear(width, num_heads * rank, bias=False)
            self.per_head = TokenLinear(num_heads, rank, count * head_dim, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] → [B, n, H·d]."""
        return self._project(x_BLD.flatten(1)).flatten(2)

    def matrix(self) -> Tensor:
        """M as [L·D, n, H, d]."""
        first = self.linear[0] if isinstance(self.linear, nn.Sequential) else self.linear
        weight = cast(nn.Linear, first).weight
        return self._project(torch.eye(weight.shape[1], dtype=weight.dtype, device=weight.device))

    def _project(self, x_BN: Tensor) -> Tensor:
        """[B, L·D] → [B, n, H, d]."""
        count, num_heads, head_dim = self.shape
        y = cast(Tensor, self.linear(x_BN))
        if self.per_head is None:
            return torch.unflatten(y, -1, self.shape)
        y_BHA = cast(Tensor, self.per_head(torch.unflatten(y, -1, (num_heads, -1))))
        return torch.unflatten(y_BHA, -1, (count, head_dim)).transpose(1, 2)
