"""GDCN's gated cross network: DCN-V2's, with a gate on every cross (Wang et al., CIKM 2023, arXiv:2311.04635)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrlib.config import positive
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.schema import FieldLayout


class GatedCrossNet(Interaction):
    """With x_0 = vec(x) of width N = F·D,

        x_{l+1} = x_0 ⊙ (W_l x_l + b_l) ⊙ σ(G_l x_l) + x_l

    Shape: [B, F, D] → [B, 1, F·D], field ``"gated_cross"``. Parameters: 2·N² + N per layer. GDCN-S puts an MLP after it, GDCN-P
    one beside it.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Raises:
            ConfigError: ``num_layers`` below 1.
        """

        num_layers: int = 3

        def __post_init__(self) -> None:
            positive("GatedCrossNet.num_layers", self.num_layers)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        width = layout.width
        self.crosses = nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_layers))
        self.gates = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(config.num_layers))
        for cross in self.crosses:
            nn.init.zeros_(cross.bias)  # type: ignore[arg-type]  # NOTE[DIFF] the released code draws it from U(0, 1)
        self.out = FieldLayout(("gated_cross",), width)
        self.axes = {f"gate/{i}": (layout.names, numbered("dim", layout.dim)) for i in range(config.num_layers)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, F·D]."""
        x0_BN = x_BFD.flatten(1)
        x_BN = x0_BN
        for cross, gate in zip(self.crosses, self.gates, strict=True):
            x_BN = x0_BN * cross(x_BN) * torch.sigmoid(gate(x_BN)) + x_BN
        return x_BN.unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"gate/0"``, … [B, F, D], each in (0, 1): how much of the layer's cross goes on."""
        x0_BN = x_BFD.flatten(1)
        x_BN = x0_BN
        shown: dict[str, Tensor] = {}
        for i, (cross, gate) in enumerate(zip(self.crosses, self.gates, strict=True)):
            gate_BN = torch.sigmoid(gate(x_BN))
            shown[f"gate/{i}"] = gate_BN.view(x_BFD.shape)
            x_BN = x0_BN * cross(x_BN) * gate_BN + x_BN
        return shown
