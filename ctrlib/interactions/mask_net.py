"""MaskNet: hidden layers multiplied by masks that are computed from the row's embeddings (Wang et al., arXiv:2102.07619)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.interactions.token_linear import TokenNorm
from ctrlib.schema import FieldLayout


class MaskBlock(nn.Module):
    """With e = vec(x) the embeddings of the row, and h what the mask is put on:

        mask = W_2 ReLU(W_1 e + b_1) + b_2;   y = ReLU(LN(W (mask ⊙ h)))

    Shape: e [B, N], h [B, H] → [B, width_out]. Parameters, with A = ⌊H·reduction_ratio⌋: N·A + A + A·H + H + H·width_out +
    2·width_out.
    """

    def __init__(self, width_e: int, width_h: int, width_out: int, reduction_ratio: float, dropout: float) -> None:
        super().__init__()
        aggregation = max(1, int(width_h * reduction_ratio))
        self.mask = nn.Sequential(nn.Linear(width_e, aggregation), nn.ReLU(), nn.Linear(aggregation, width_h))
        self.hidden = nn.Linear(width_h, width_out, bias=False)
        self.norm = nn.LayerNorm(width_out)
        self.dropout = Dropout(dropout)

    def forward(self, e_BN: Tensor, h_BH: Tensor) -> Tensor:
        return cast(Tensor, self.dropout(F.relu(self.norm(self.hidden(self.mask(e_BN) * h_BH)))))


class SerialMaskNet(Interaction):
    """Mask blocks one after another; the first masks the normalised embeddings, the others their predecessor:

        h_0 = LN(x) per field;   h_l = MaskBlock_l(e, h_{l−1})

    Shape: [B, F, D] → [B, 1, last width], field ``"mask_net"``. Parameters: see :class:`MaskBlock`, and 2·F·D for the LN.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            hidden_units: the width of each block.
            reduction_ratio: width of the mask's hidden layer over that of the mask.
            embedding_norm: normalise each field first; the masks read the embeddings as they are.
            dropout: after every block; not in the paper.

        Raises:
            ConfigError: no blocks; a width below 1; ``reduction_ratio`` not above 0; a dropout outside [0, 1).
        """

        hidden_units: tuple[int, ...] = (400, 400, 400)
        reduction_ratio: float = 2.0
        embedding_norm: bool = True
        dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("SerialMaskNet.hidden_units", *self.hidden_units)
            positive("SerialMaskNet.reduction_ratio", self.reduction_ratio)
            fraction("SerialMaskNet.dropout", self.dropout)
            if not self.hidden_units:
                raise ConfigError("SerialMaskNet.hidden_units is empty; expected at least one block")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.norm = TokenNorm(layout.num_fields, layout.dim) if config.embedding_norm else None
        self.blocks = nn.ModuleList(
            MaskBlock(layout.width, before, after, config.reduction_ratio, config.dropout)
            for before, after in pairwise((layout.width, *config.hidden_units))
        )
        self.out = FieldLayout(("mask_net",), config.hidden_units[-1])
        self.axes = {"mask/0": (layout.names, numbered("dim", layout.dim))}
        self.axes |= {f"mask/{i}": (numbered("unit", n),) for i, n in enumerate(config.hidden_units[:-1], start=1)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, last width]."""
        e_BN = x_BFD.flatten(1)
        h_BH = e_BN if self.norm is None else self.norm(x_BFD).flatten(1)
        for block in self.blocks:
            h_BH = block(e_BN, h_BH)
        return h_BH.unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"mask/0"`` [B, F, D], ``"mask/1"`` [B, width of block 0], …"""
        masks = [cast(MaskBlock, block).mask(x_BFD.flatten(1)) for block in self.blocks]
        return {f"mask/{i}": mask if i else mask.view(x_BFD.shape) for i, mask in enumerate(masks)}


class ParallelMaskNet(Interaction):
    """Mask blocks side by side, all on the normalised embeddings: y = [MaskBlock_1(e, LN(x)), …, MaskBlock_K(e, LN(x))].

    Shape: [B, F, D] → [B, K, block_dim], fields ``"mask_net_0"``, … An MLP comes after it. Parameters: see
    :class:`MaskBlock`, and 2·F·D for the LN.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            num_blocks: K.
            block_dim: the width of each block.
            reduction_ratio: width of the mask's hidden layer over that of the mask.
            embedding_norm: normalise each field first; the masks read the embeddings as they are.
            dropout: after every block; not in the paper.

        Raises:
            ConfigError: a size not above 0; a dropout outside [0, 1).
        """

        num_blocks: int = 3
        block_dim: int = 64
        reduction_ratio: float = 2.0
        embedding_norm: bool = True
        dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("ParallelMaskNet.num_blocks", self.num_blocks)
            positive("ParallelMaskNet.block_dim", self.block_dim)
            positive("ParallelMaskNet.reduction_ratio", self.reduction_ratio)
            fraction("ParallelMaskNet.dropout", self.dropout)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.norm = TokenNorm(layout.num_fields, layout.dim) if config.embedding_norm else None
        self.blocks = nn.ModuleList(
            MaskBlock(layout.width, layout.width, config.block_dim, config.reduction_ratio, config.dropout)
            for _ in range(config.num_blocks)
        )
        self.out = FieldLayout(numbered("mask_net", config.num_blocks), config.block_dim)
        self.axes = {f"mask/{i}": (layout.names, numbered("dim", layout.dim)) for i in range(config.num_blocks)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, K, block_dim]."""
        e_BN = x_BFD.flatten(1)
        h_BN = e_BN if self.norm is None else self.norm(x_BFD).flatten(1)
        return torch.stack([block(e_BN, h_BN) for block in self.blocks], dim=1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"mask/0"``, … [B, F, D]."""
        masks = (cast(MaskBlock, block).mask(x_BFD.flatten(1)) for block in self.blocks)
        return {f"mask/{i}": mask.view(x_BFD.shape) for i, mask in enumerate(masks)}
