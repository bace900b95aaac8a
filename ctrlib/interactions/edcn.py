"""EDCN: a cross network and an MLP that exchange what they found after every layer (Chen et al., CIKM 2021,
doi:10.1145/3459637.3481915)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.schema import FieldLayout


class EDCN(Interaction):
    """Two streams of width N = F·D. With f_0 = vec(x) and x_0 the first regulated input of the crosses, layer l is

        c, h = Regulation_l(f_{l−1})                    the inputs of the cross and of the deep layer
        c_l  = x_0 · (w_lᵀ c) + b_l + c                 DCN's cross
        h_l  = ReLU(W_l h + v_l)
        f_l  = Bridge(c_l, h_l)
        y    = [c_L, h_L, f_L]

    Regulation multiplies field i by softmax(g / τ)_i, with its own g ∈ R^F per layer and stream, all ones at the start. Shape:
    [B, F, D] → [B, 3, N], fields ``"cross"``, ``"deep"``, ``"bridge"``. Parameters per layer: N² + 3·N, and 2·F for the
    regulation, 4·N for its batch norms, 2·N² + N or 4·N² + 2·N for the bridges that have parameters.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            num_layers: L.
            bridge: ``"product"`` c ⊙ h (the paper's choice), ``"sum"`` c + h, ``"concat"`` ReLU(W [c, h] + b), or
                ``"attention"`` a_c ⊙ c + a_h ⊙ h with a = softmax(P ReLU(W · + b)) over the N coordinates.
            regulation: have the gates.
            temperature: τ of the gates; the paper tunes it per data set.
            norm: batch normalisation of both regulated inputs. The gates are near 1/F and the product multiplies small numbers,
                so without it the signal fades with every layer.
            dropout: after every deep layer.

        Raises:
            ConfigError: ``num_layers`` below 1; a temperature not above 0; a dropout outside [0, 1).
        """

        num_layers: int = 3
        bridge: Literal["product", "sum", "concat", "attention"] = "product"
        regulation: bool = True
        temperature: float = 1.0
        norm: Literal["none", "batch"] = "batch"
        dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("EDCN.num_layers", self.num_layers)
            positive("EDCN.temperature", self.temperature)
            fraction("EDCN.dropout", self.dropout)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EDCNLayer(config, layout) for _ in range(config.num_layers))
        # NOTE[DIFF] all three, as in the authors' code; the paper's text names the two streams.
        self.out = FieldLayout(("cross", "deep", "bridge"), layout.width)
        if config.regulation:
            self.axes = {f"{name}_gate/{i}": (layout.names,) for i in range(config.num_layers) for name in ("cross", "deep")}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 3, F·D]."""
        x0_BN: Tensor | None = None
        bridge_BFD = x_BFD
        for layer in self.layers:
            cross_BN, deep_BN = cast(EDCNLayer, layer).regulate(bridge_BFD)
            x0_BN = cross_BN if x0_BN is None else x0_BN
            cross_BN, deep_BN, bridge_BN = layer(x0_BN, cross_BN, deep_BN)
            bridge_BFD = bridge_BN.view(x_BFD.shape)
        return torch.stack([cross_BN, deep_BN, bridge_BN], dim=1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"cross_gate/0"``, ``"deep_gate/0"``, … [B, F], each summing to 1 and the same for all rows; nothing without
        regulation."""
        shown: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            for name, gate_F1 in zip(("cross", "deep"), cast(EDCNLayer, layer).gates(), strict=False):
                shown[f"{name}_gate/{i}"] = gate_F1.squeeze(-1).expand(len(x_BFD), -1)
        return shown


class EDCNLayer(nn.Module):
    """One layer of :class:`EDCN`: x_0, c, h of shape [B, N] → c_l, h_l, f_l of shape [B, N]."""

    def __init__(self, config: EDCN.Config, layout: FieldLayout) -> None:
        super().__init__()
        width = layout.width
        self.temperature = config.temperature
        self.gate_logits = nn.Parameter(torch.ones(2, layout.num_fields, 1)) if config.regulation else None
        self.norm_cross = nn.BatchNorm1d(width) if config.norm == "batch" else nn.Identity()
        self.norm_deep = nn.BatchNorm1d(width) if config.norm == "batch" else nn.Identity()
        self.cross = nn.Linear(width, 1, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))
        self.deep = nn.Linear(width, width)
        self.dropout = Dropout(config.dropout)
        self.kind = config.bridge
        self.bridge: nn.Module = nn.Identity()
        if config.bridge == "concat":
            self.bridge = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU())
        elif config.bridge == "attention":
            # NOTE[DIFF] FuxiCTR builds both and uses the first for both streams.
            self.bridge = nn.ModuleList(
                nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width, bias=False), nn.Softmax(dim=-1))
                for _ in range(2)
            )

    def gates(self) -> tuple[Tensor, ...]:
        """Of the cross and of the deep stream, each [F, 1]; empty without regulation."""
        return () if self.gate_logits is None else (self.gate_logits / self.temperature).softmax(dim=1).unbind()

    def regulate(self, x_BFD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F, D] → the inputs of the cross and of the deep layer, each [B, N]."""
        cross_BFD = deep_BFD = x_BFD
        if self.gate_logits is not None:
            gate_cross_F1, gate_deep_F1 = self.gates()
            cross_BFD, deep_BFD = x_BFD * gate_cross_F1, x_BFD * gate_deep_F1
        return self.norm_cross(cross_BFD.flatten(1)), self.norm_deep(deep_BFD.flatten(1))

    def forward(self, x0_BN: Tensor, cross_BN: Tensor, deep_BN: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # NOTE[DIFF] FuxiCTR 2 leaves out "+ cross"; the authors' code and FuxiCTR 1 (behind the BARS numbers) have it.
        cross_BN = x0_BN * self.cross(cross_BN) + self.bias + cross_BN
        deep_BN = self.dropout(F.relu(self.deep(deep_BN)))
        return cross_BN, deep_BN, self.join(cross_BN, deep_BN)

    def join(self, cross_BN: Tensor, deep_BN: Tensor) -> Tensor:
        """The bridge: [B, N], [B, N] → [B, N]."""
        if self.kind == "product":
            return cross_BN * deep_BN
        if self.kind == "sum":
            return cross_BN + deep_BN
        if self.kind == "concat":
            return cast(Tensor, self.bridge(torch.cat([cross_BN, deep_BN], dim=-1)))
        weigh_cross, weigh_deep = cast(nn.ModuleList, self.bridge)
        return cast(Tensor, weigh_cross(cross_BN) * cross_BN + weigh_deep(deep_BN) * deep_BN)
