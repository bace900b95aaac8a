"""Cross networks: explicit feature crosses of an order that grows by one per layer (DCN, DCN-V2).

All read all embeddings side by side, x_0 = vec(x) of width N = F·D, and return the same width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import positive
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.interactions.mlp import ACTIVATIONS, Activation
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
        self.axes = {f"strength/{i}": () for i in range(config.num_layers)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, F·D]."""
        x0_BN = x_BFD.flatten(1)
        x_BN = x0_BN
        for weight, bias in zip(self.weights, self.biases, strict=True):
            x_BN = x0_BN * weight(x_BN) + bias + x_BN
        return x_BN.unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"strength/0"``, … [B]: w_lᵀ x_l, how much of x_0 each layer adds."""
        x0_BN = x_BFD.flatten(1)
        x_BN = x0_BN
        shown: dict[str, Tensor] = {}
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            strength_B1 = weight(x_BN)
            shown[f"strength/{i}"] = strength_B1.squeeze(1)
            x_BN = x0_BN * strength_B1 + bias + x_BN
        return shown


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
        self.axes = {f"strength/{i}": (layout.names, layout.names) for i in range(config.num_layers)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, F·D]."""
        x0_BN = x_BFD.flatten(1)
        x_BN = x0_BN
        for layer in self.layers:
            x_BN = x0_BN * layer(x_BN) + x_BN
        return x_BN.unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"strength/0"``, … [B, F, F]: the Frobenius norm of W_l's block (i, j), which crosses field i of x_0 with field j of
        x_l, the same for all rows."""
        shown: dict[str, Tensor] = {}
        _, num_fields, dim = x_BFD.shape
        for i, layer in enumerate(self.layers):
            linears = [cast(nn.Linear, m) for m in (layer if isinstance(layer, nn.Sequential) else (layer,))]
            weight_NN = linears[-1].weight if len(linears) == 1 else linears[1].weight @ linears[0].weight
            blocks_FDFD = weight_NN.view(num_fields, dim, num_fields, dim)
            shown[f"strength/{i}"] = torch.linalg.vector_norm(blocks_FDFD, dim=(1, 3)).expand(len(x_BFD), -1, -1)
        return shown


class CrossNetMix(Interaction):
    """DCN-V2's mixture of low-rank crosses, DCN-Mix (arXiv:2008.13535 eq. 3 and 4). K experts work in subspaces of width r:

        x_{l+1} = Σ_i G_i(x_l) E_i(x_l) + x_l
        E_i(x)  = x_0 ⊙ (U_l^i act(C_l^i act(V_l^iᵀ x)) + b_l)      eq. 4; without act and C it is eq. 3

    The gates G = softmax(W x), or σ(W x), belong to all layers, as G_i without a layer's index in the paper and in released
    code. Shape: [B, F, D] → [B, 1, F·D], field ``"cross"``. Parameters: K·N, and 2·K·N·r + K·r² + N per layer (eq. 3: no K·r²).
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            num_layers: crosses.
            num_experts: K.
            rank: r.
            activation: twice inside each expert; ``"none"`` is eq. 3, where a C would add nothing to U.
            gate: the paper names both.

        Raises:
            ConfigError: a size below 1.
        """

        num_layers: int = 3
        num_experts: int = 4
        rank: int = 32
        activation: Activation = "tanh"
        gate: Literal["softmax", "sigmoid"] = "softmax"

        def __post_init__(self) -> None:
            positive("CrossNetMix.num_layers", self.num_layers)
            positive("CrossNetMix.num_experts", self.num_experts)
            positive("CrossNetMix.rank", self.rank)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.gate = nn.Linear(layout.width, config.num_experts, bias=False)
        self.softmax = config.gate == "softmax"
        self.layers = nn.ModuleList(LowRankExperts(config, layout.width) for _ in range(config.num_layers))
        self.out = FieldLayout(("cross",), layout.width)
        self.axes = {f"gate/{i}": (numbered("expert", config.num_experts),) for i in range(config.num_layers)}

    def gates(self, x_BN: Tensor) -> Tensor:
        """[B, N] → [B, K]."""
        logits_BK = self.gate(x_BN)
        return cast(Tensor, logits_BK.softmax(dim=-1) if self.softmax else logits_BK.sigmoid())

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, F·D]."""
        x0_BN = x_BFD.flatten(1)
        x_BN = x0_BN
        for layer in self.layers:
            x_BN = x0_BN * layer(x_BN, self.gates(x_BN)) + x_BN
        return x_BN.unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"gate/0"``, … [B, K]: how much each expert counts in each layer."""
        x0_BN = x_BFD.flatten(1)
        x_BN = x0_BN
        shown: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            shown[f"gate/{i}"] = self.gates(x_BN)
            x_BN = x0_BN * layer(x_BN, shown[f"gate/{i}"]) + x_BN
        return shown


class LowRankExperts(nn.Module):
    """Σ_i G_i (U^i act(C^i act(V^iᵀ x)) + b): a layer of :class:`CrossNetMix` before the product with x_0. All experts' V side
    by side, and all U below each other, make one matmul each. Shape: x [B, N], gates [B, K] → [B, N].

    NOTE[DIFF] Xavier normal expert by expert; FuxiCTR computes it from the stack of K matrices, and so starts smaller.
    """

    def __init__(self, config: CrossNetMix.Config, width: int) -> None:
        super().__init__()
        self.experts = (config.num_experts, config.rank)
        inner = config.num_experts * config.rank
        std = math.sqrt(2 / (width + config.rank))
        self.down = nn.Parameter(std * torch.randn(width, inner))
        self.up = nn.Parameter(std * torch.randn(inner, width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.activation = ACTIVATIONS[config.activation]()
        self.within: nn.Parameter | None = None
        if config.activation != "none":
            self.within = nn.Parameter(torch.randn(config.num_experts, config.rank, config.rank) / math.sqrt(config.rank))

    def forward(self, x_BN: Tensor, gates_BK: Tensor) -> Tensor:
        h_BKr = (x_BN @ self.down).view(-1, *self.experts)
        if self.within is not None:
            h_BKr = self.activation(torch.einsum("bkr,ksr->bks", self.activation(h_BKr), self.within))
        up_BN: Tensor = (h_BKr * gates_BK.unsqueeze(-1)).flatten(1) @ self.up
        return up_BN + self.bias * gates_BK.sum(dim=-1, keepdim=True)
