"""Cross networks: explicit feature crosses of an order that grows by one per layer (DCN, DCN-V2).

Both read all embeddings side by side, x_0 = vec(x) of width N = F·D, and return the same width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrlib.config import positive
from ctrlib.interactions.base import Interaction
from ctrlib.schema import FieldLayout


class CrossNet(Interaction):
    """DCN's cross network with a weight *vector* per layer (Wang et al. 2017, arXiv:1708.05123):

        x_{l+1} = x_0 · (w_lᵀ x_l) + b_l + x_l

    Shape: [B, F, D] → [B, 1, F·D], field ``"cross"``. Parameters: 2·N per layer.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Raises:
            ConfigError: ``num_layers`` below 1.
        """

        num_layers: int = 3

        def __post_init__(self) -> None:
            positive("CrossNet.num_layers", self.num_layers)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.weights = nn.ModuleList(nn.Linear(layout.width, 1, bias=False) for _ in range(config.num_layers))
        self.biases = nn.ParameterList(torch.zeros(layout.width) for _ in range(config.num_layers))
        self.out = FieldLayout(("cross",), layout.width)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, F·D]."""
        x0_BN = x_BFD.flatten(1)
        x_BN = x0_BN
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x_BN = x0_BN * weight(x_BN) + bias + x_BN
        return x_BN.unsqueeze(1)


class CrossNetV2(Interaction):
    """DCN-V2's cross network with a weight *matrix* per layer (Wang et al. 2021, arXiv:2008.13535):

        x_{l+1} = x_0 ⊙ (W_l x_l + b_l) + x_l,   W_l = U_l V_lᵀ when ``rank`` is given (U_l, V_l of shape [N, rank])

    Shape: [B, F, D] → [B, 1, F·D], field ``"cross"``. Parameters per layer: N² + N, or 2·N·rank + N.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``rank=None``, the default, is the full matrix.

        Raises:
            ConfigError: ``num_layers`` or ``rank`` below 1.
        """

        num_layers: int = 3
        rank: int | None = None

        def __post_init__(self) -> None:
            positive("CrossNetV2.num_layers", self.num_layers)
            if self.rank is not None:
                positive("CrossNetV2.rank", self.rank)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        width, rank = layout.width, config.rank

        def projection() -> nn.Module:
            last = nn.Linear(width if rank is None else rank, width)
            nn.init.zeros_(last.bias)
            return last if rank is None else nn.Sequential(nn.Linear(width, rank, bias=False), last)  # V_lᵀ, then U_l and b_l

        self.layers = nn.ModuleList(projection() for _ in range(config.num_layers))
        self.out = FieldLayout(("cross",), width)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, F·D]."""
        x0_BN = x_BFD.flatten(1)
        x_BN = x0_BN
        for layer in self.layers:
            x_BN = x0_BN * layer(x_BN) + x_BN
        return x_BN.unsqueeze(1)
