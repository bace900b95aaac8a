"""CatGCN's interactions inside a node (arXiv:2009.05303): products of all pairs of features, and a complete graph over them.

The features of a row are its fields, or a bag of any size, without padding: the two forms compute the same.

Shape letters: B rows, F fields, T values of all bags one after another, D embedding dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, check_choice, check_not_negative, fraction, positive
from ctrlib.dropout import dropout
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.mlp import MLP
from ctrlib.interactions.pairs import sum_of_products
from ctrlib.ragged import expand, lengths, segment_ids, segment_sum
from ctrlib.schema import FieldLayout

Parts = Literal["both", "local", "global"]
ProbeMode = Literal["fixed", "per_feature"]
FusionActivation = Literal["none", "relu"]
Bag = tuple[Tensor, Tensor]
"""Vectors [T, D] of the values of B rows, and the offsets [B + 1] that cut them."""

_PUBLISHED_FEATURES = 10  # S of every node in the paper's data, for which its values of ρ are


class CatInteraction(Interaction):
    """Local and global interaction of the S features e_i of a row:

        local   h_l = Σ_{i<j} e_i ⊙ e_j = ½ [(Σ_i e_i)² − Σ_i e_i²]                                          (eq. 4)
        global  h_g = 1/S Σ_i ReLU((P̃ E W)_i + b),  P̃ = (11ᵀ + ρI)/(S + ρ), so (P̃E)_i = (Σ_j e_j + ρ e_i)/(S + ρ)  (eq. 5)

    P̃ is one step on the complete graph of the features whose self-connections weigh ρ more: its eigenvalues are 1 and, S − 1
    times, ρ/(S + ρ). In the second form it takes O(S·D), and no S × S matrix. Several steps are one step with a smaller ρ, so
    there is one only.

    Shape: [B, F, D] → [B, 2, D], fields ``"local"`` and ``"global"``; with ``output_dim`` C both are projected and fused,

        y = a·φ(MLP_g(h_g)) + (1 − a)·φ(MLP_l(h_l))                                                         (eq. 14)

    to [B, 1, C], field ``"catgcn"``. Parameters: D² + D of the global part, and the two MLPs. Preset ``catgcn_interaction``;
    with propagation along the edges of a graph it is :class:`~ctrlib.models.catgcn.CatGCN`.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            parts: both interactions, or one alone (CatGCN_L, CatGCN_G).
            probe: ρ, the self-connection of features; 0 replaces each by the mean of all, a large one mixes nothing.
            probe_mode: ``"fixed"``: ρ for every row; ``"per_feature"``: ρ·S/10, which filters bags of any size alike.
            bias: b of the global part.
            dropout: in the global part after the ReLU, and between the layers of the MLPs.
            output_dim: C; ``None``: no projection, no fusion. Models of nodes set it to the number of classes.
            local_hidden_units, global_hidden_units: hidden ReLU layers of the two MLPs.
            balance: a, the share of the global part; with one part alone it has no effect.
            fusion_activation: φ.

        Raises:
            ConfigError: a width or ρ below 0, a dropout outside [0, 1), a share outside [0, 1]; when it is built, hidden
                layers without ``output_dim``.
        """

        parts: Parts = "both"
        probe: float = 1.0
        probe_mode: ProbeMode = "fixed"
        # NOTE[DIFF] the paper has neither b nor a dropout here; the released code has both
        bias: bool = True
        dropout: float = 0.0
        output_dim: int | None = None
        local_hidden_units: tuple[int, ...] = ()
        global_hidden_units: tuple[int, ...] = ()
        balance: float = 0.5
        # NOTE[DIFF] eq. 14 has a ReLU; the released code has none, since a ReLU would cut logits off at zero
        fusion_activation: FusionActivation = "none"

        def __post_init__(self) -> None:
            check_choice("CatInteraction.parts", self.parts, get_args(Parts))
            check_choice("CatInteraction.probe_mode", self.probe_mode, get_args(ProbeMode))
            check_choice("CatInteraction.fusion_activation", self.fusion_activation, get_args(FusionActivation))
            check_not_negative("CatInteraction.probe", self.probe)
            fraction("CatInteraction.dropout", self.dropout)
            positive("CatInteraction.local_hidden_units", *self.local_hidden_units)
            positive("CatInteraction.global_hidden_units", *self.global_hidden_units)
            if not 0 <= self.balance <= 1:
                raise ConfigError(f"CatInteraction.balance is {self.balance}; expected a share from 0 to 1")
            if self.output_dim is not None:
                positive("CatInteraction.output_dim", self.output_dim)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.config = config
        dim, width = layout.dim, config.output_dim
        if width is None and (config.local_hidden_units or config.global_hidden_units):
            raise ConfigError("CatInteraction has hidden layers but no output_dim; set the width that they lead to")
        hidden = {"local": config.local_hidden_units, "global": config.global_hidden_units}
        names = tuple(hidden) if config.parts == "both" else (config.parts,)
        self.linear: nn.Linear | None = None
        if "global" in names:
            self.linear = nn.Linear(dim, dim, bias=config.bias)
            nn.init.xavier_uniform_(self.linear.weight)
            if config.bias:
                nn.init.zeros_(self.linear.bias)
        self.project = nn.ModuleDict()
        if width is not None:
            for name in names:
                mlp = MLP.Config(hidden_units=hidden[name], output_dim=width, dropout=config.dropout)
                self.project[_mlp(name)] = MLP(mlp, FieldLayout((name,), dim))
        self.out = FieldLayout(names, dim) if width is None else FieldLayout(("catgcn",), width)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 2, D] (one part: [B, 1, D]), or [B, 1, C]."""
        found: dict[str, Tensor] = {}
        if self.config.parts != "global":
            found["local"] = sum_of_products(x_BFD)
        if self.config.parts != "local":
            count = x_BFD.shape[1]
            probe = self._probe(count)
            smooth_BFD = (x_BFD.sum(1, keepdim=True) + probe * x_BFD) / (count + probe)
            found["global"] = self._activate(smooth_BFD).mean(1)
        return self._fuse(found)

    def pool(self, bags: Sequence[Bag]) -> Tensor:
        """The same of rows whose features are the values of one or more bags, of any sizes. A row without features has h = 0.

        Returns:
            [B, 2, D], [B, 1, D] or [B, 1, C], as :meth:`forward`.
        """
        total_BD = torch.stack([segment_sum(x_TD, offsets) for x_TD, offsets in bags]).sum(0)
        found: dict[str, Tensor] = {}
        if self.config.parts != "global":
            squares_BD = torch.stack([segment_sum(x_TD.square(), offsets) for x_TD, offsets in bags]).sum(0)
            found["local"] = 0.5 * (total_BD.square() - squares_BD)
        if self.config.parts != "local":
            count_B1 = torch.stack([lengths(offsets) for _, offsets in bags]).sum(0).unsqueeze(1).to(total_BD)
            probe_B1 = self._probe(count_B1)
            parts = []
            for x_TD, offsets in bags:
                rows_T = segment_ids(offsets, x_TD.shape[0])
                share_B1 = 1 / (count_B1 + probe_B1).clamp(min=1)
                # divided before it is spread to the values: one pass over [T, D] less
                own_T1 = (probe_B1 * share_B1).index_select(0, rows_T)
                smooth_TD = torch.addcmul(expand(total_BD * share_B1, rows_T), own_T1, x_TD)
                parts.append(segment_sum(self._activate(smooth_TD), offsets))
            found["global"] = torch.stack(parts).sum(0) / count_B1.clamp(min=1)
        return self._fuse(found)

    def _probe(self, count: Tensor | int) -> Tensor | float:
        probe = self.config.probe
        return probe if self.config.probe_mode == "fixed" else probe * count / _PUBLISHED_FEATURES

    def _activate(self, smooth: Tensor) -> Tensor:
        assert self.linear is not None
        return dropout(self.linear(smooth).relu(), self.config.dropout, self.training)

    def _fuse(self, found: dict[str, Tensor]) -> Tensor:
        if self.config.output_dim is None:
            return torch.stack(list(found.values()), dim=1)
        parts = {name: cast(Tensor, self.project[_mlp(name)](h_BD.unsqueeze(1))) for name, h_BD in found.items()}
        if self.config.fusion_activation == "relu":
            parts = {name: y_B1C.relu() for name, y_B1C in parts.items()}
        if self.config.parts != "both":
            return parts[self.config.parts]
        return self.config.balance * parts["global"] + (1 - self.config.balance) * parts["local"]


def _mlp(part: str) -> str:
    """The name of its projection: an exported module is code, in which ``global`` cannot be a name."""
    return f"{part}_mlp"
