"""FiBiNET: weights of fields and bilinear products of pairs (Huang et al., RecSys 2019, arXiv:1905.09433)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import positive
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.interactions.mlp import ACTIVATIONS, Activation
from ctrlib.interactions.pairs import Pairs, pair_names
from ctrlib.schema import FieldLayout


class SENet(Interaction):
    """Squeeze and excitation: every field is multiplied by a weight that depends on all fields,

        z_f = (1/D) Σ_d x_fd;   A = act(W_2 act(W_1 z));   y_f = A_f x_f

    with W_1 of shape [R, F], W_2 [F, R], R = max(1, ⌊F / reduction_ratio⌋). Shape: [B, F, D] → [B, F, D], names kept.
    Parameters: 2·F·R.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            reduction_ratio: how much narrower than F the layer between is; below 1 it is wider.
            activation: after both layers. The paper leaves it open; ReLU, as in the known implementations, can switch a
                field off for good.

        Raises:
            ConfigError: ``reduction_ratio`` not above 0.
        """

        reduction_ratio: float = 3.0
        activation: Activation = "relu"

        def __post_init__(self) -> None:
            positive("SENet.reduction_ratio", self.reduction_ratio)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        reduced = max(1, int(layout.num_fields / config.reduction_ratio))
        layers: list[nn.Module] = []
        for width_in, width_out in ((layout.num_fields, reduced), (reduced, layout.num_fields)):
            layers += [nn.Linear(width_in, width_out, bias=False), ACTIVATIONS[config.activation]()]
        self.excitation = nn.Sequential(*layers)
        self.out = layout
        self.axes = {"senet": (layout.names,)}

    def weights(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → A [B, F]."""
        return cast(Tensor, self.excitation(x_BFD.mean(dim=-1)))

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F, D]."""
        return x_BFD * self.weights(x_BFD).unsqueeze(-1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"senet"`` [B, F], the weight of each field."""
        return {"senet": self.weights(x_BFD)}


class Bilinear(Interaction):
    """A vector for every pair of fields i < j:

        y_ij = (W x_i) ⊙ x_j,   W is W (field_all), W_i (field_each) or W_ij (field_interaction)

    Shape: [B, F, D] → [B, F(F−1)/2, D], fields ``"user*item"``, in the order of the pairs. Parameters: D², (F−1)·D² or
    F(F−1)/2·D².
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``kind`` says which pairs share a matrix."""

        kind: Literal["field_all", "field_each", "field_interaction"] = "field_interaction"

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        names = pair_names("Bilinear", layout)
        self.kind = config.kind
        # NOTE[DIFF] F−1 matrices for field_each where released code has F: the last field is never on the left.
        count = {"field_all": 1, "field_each": layout.num_fields - 1, "field_interaction": len(names)}[config.kind]
        # Xavier normal matrix by matrix; FuxiCTR 2 computes it from the whole stack, and so starts smaller.
        self.weight = nn.Parameter(torch.randn(count, layout.dim, layout.dim) / math.sqrt(layout.dim))
        self.pairs = Pairs(layout.num_fields)
        self.out = FieldLayout(names, layout.dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F(F−1)/2, D]."""
        right_BPD = x_BFD.index_select(1, self.pairs.right)
        if self.kind == "field_interaction":
            # Pairs first: one small matmul per pair, each of rows that lie side by side.
            left_PBD = x_BFD.transpose(0, 1).contiguous().index_select(0, self.pairs.left)
            return (left_PBD @ self.weight.mT).transpose(0, 1) * right_BPD
        if self.kind == "field_each":
            moved_BFD = torch.einsum("bfd,fed->bfe", x_BFD[:, :-1], self.weight)
        else:
            moved_BFD = x_BFD @ self.weight[0].T
        return moved_BFD.index_select(1, self.pairs.left) * right_BPD


class FiBiNET(Interaction):
    """Bilinear products of the fields as they are, and of the fields weighted by :class:`SENet`:

        y = [Bilinear_1(x), Bilinear_2(SENet(x))]

    Shape: [B, F, D] → [B, F(F−1), D], fields ``"user*item"`` first, then ``"senet:user*item"``. An MLP comes after it.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            senet: the weights of the fields.
            bilinear: the products, of one kind for both inputs.
            share_bilinear: one set of matrices for both inputs, as in FuxiCTR 1 (behind the BARS numbers) and DeepCTR.
        """

        senet: SENet.Config = field(default_factory=SENet.Config)
        bilinear: Bilinear.Config = field(default_factory=Bilinear.Config)
        share_bilinear: bool = False

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.senet = SENet(config.senet, layout)
        self.bilinear = Bilinear(config.bilinear, layout)
        self.bilinear_senet = None if config.share_bilinear else Bilinear(config.bilinear, layout)
        names = self.bilinear.out.names
        self.out = FieldLayout((*names, *(f"senet:{name}" for name in names)), layout.dim)
        self.axes = self.senet.axes

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F(F−1), D]."""
        second = self.bilinear if self.bilinear_senet is None else self.bilinear_senet
        return torch.cat([self.bilinear(x_BFD), second(self.senet(x_BFD))], dim=1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"senet"`` [B, F], the weight of each field."""
        return self.senet.explain(x_BFD)
