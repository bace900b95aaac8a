"""Pairs of fields, and what several blocks make of them.

P = F(F−1)/2 pairs (i, j), i < j, are ordered (0, 1), (0, 2), …, (1, 2), … everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.schema import FieldLayout

Kernel = Literal["matrix", "vector", "number"]


def check_pairs(block: str, layout: FieldLayout) -> None:
    """
    Raises:
        ConfigError: a single field, which has no pairs; ``block`` names who asks.
    """
    if layout.num_fields < 2:
        raise ConfigError(
            f"{block} takes pairs of fields, but its input has the single field {layout.names[0]!r}; give it two or more"
        )


def pair_labels(names: tuple[str, ...]) -> tuple[str, ...]:
    """``"user*item"``, … of all pairs."""
    return tuple(f"{a}*{b}" for i, a in enumerate(names) for b in names[i + 1 :])


def pair_names(block: str, layout: FieldLayout) -> tuple[str, ...]:
    """The labels of all pairs of the block's fields.

    Raises:
        ConfigError: see :func:`check_pairs`.
    """
    check_pairs(block, layout)
    return pair_labels(layout.names)


def sum_of_products(x_BFD: Tensor) -> Tensor:
    """Σ_{i<j} x_i ⊙ x_j = ½ [(Σ_i x_i)² − Σ_i x_i²], in O(F·D) (Rendle's lemma). Shape: [B, F, D] → [B, D]."""
    return 0.5 * (x_BFD.sum(dim=1).square() - x_BFD.square().sum(dim=1))


class Pairs(nn.Module):
    """Both members of every pair. Shape: [B, F, D] → [B, P, D], [B, P, D]."""

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        self.left: Tensor
        self.right: Tensor
        left, right = torch.triu_indices(num_fields, num_fields, offset=1)
        self.register_buffer("left", left, persistent=False)
        self.register_buffer("right", right, persistent=False)

    def __call__(self, x_BFD: Tensor) -> tuple[Tensor, Tensor]:
        return cast(tuple[Tensor, Tensor], super().__call__(x_BFD))

    def forward(self, x_BFD: Tensor) -> tuple[Tensor, Tensor]:
        return x_BFD.index_select(1, self.left), x_BFD.index_select(1, self.right)


class PairProducts(nn.Module):
    """⟨x_i, x_j⟩ of every pair: the upper triangle of x xᵀ. Shape: [B, F, D] → [B, P].

    Args:
        num_fields: F.
        chosen: numbers of the only pairs to give, in this order; ``None``: all.
    """

    def __init__(self, num_fields: int, chosen: Sequence[int] | None = None) -> None:
        super().__init__()
        left, right = torch.triu_indices(num_fields, num_fields, offset=1)
        at = left * num_fields + right
        self.at: Tensor
        self.register_buffer("at", at if chosen is None else at[list(chosen)], persistent=False)

    def __call__(self, x_BFD: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(x_BFD))

    def forward(self, x_BFD: Tensor) -> Tensor:
        return (x_BFD @ x_BFD.transpose(1, 2)).flatten(1).index_select(1, self.at)


class PairKernel(nn.Module):
    """x_iᵀ φ_ij x_j of every pair; φ_ij a full matrix, a diagonal, or a number. Shape: [B, F, D] → [B, P].

    Matrices start as N(0, 1/D), which keeps the size of an inner product (the variance of the PNN authors' uniform start);
    diagonals and numbers start at one, where the product is the inner product.
    """

    def __init__(self, kernel: Kernel, layout: FieldLayout) -> None:
        super().__init__()
        num_pairs, dim = layout.num_fields * (layout.num_fields - 1) // 2, layout.dim
        self.pairs = PairProducts(layout.num_fields) if kernel == "number" else Pairs(layout.num_fields)
        shape = {"matrix": (num_pairs, dim, dim), "vector": (num_pairs, dim), "number": (num_pairs,)}[kernel]
        start = torch.randn(shape) / math.sqrt(dim) if kernel == "matrix" else torch.ones(shape)
        self.weight = nn.Parameter(start)

    def __call__(self, x_BFD: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(x_BFD))

    def forward(self, x_BFD: Tensor) -> Tensor:
        if isinstance(self.pairs, PairProducts):
            return self.pairs(x_BFD) * self.weight
        if self.weight.dim() == 2:
            left_BPD, right_BPD = self.pairs(x_BFD)
            return (left_BPD * self.weight * right_BPD).sum(dim=2)
        # Pairs first: one small matmul per pair, of rows that lie side by side, which is faster on a CPU.
        x_FBD = x_BFD.transpose(0, 1).contiguous()
        left_PBD, right_PBD = x_FBD.index_select(0, self.pairs.left), x_FBD.index_select(0, self.pairs.right)
        return ((left_PBD @ self.weight) * right_PBD).sum(dim=2).T
