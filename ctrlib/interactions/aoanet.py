"""AOANet's generalized interaction network (Lang et al., KDD 2021, doi:10.1145/3447548.3467133)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ctrlib.config import positive
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.schema import FieldLayout


class GeneralizedInteraction(Interaction):
    """Layers that cross the fields x_n with the S vectors b_m of the layer before, in the first with the fields, by all
    products of two coordinates, of which Hadamard, inner and outer products are special cases:

        b'_s = (W_s ⊙ Σ_mn α_smn x_n b_mᵀ) h_s,    W_s [D, D] starting as identity, α and h_s as ones

    Shape: [B, F, D] → [B, S, D], fields ``"aoa_s"``. Parameters: S·(D² + D + F²) in the first layer, S·(D² + D + F·S) later.
    Computed without the [D, D] tensors of all pairs: Σ_m (Σ_n α_smn x_n) ⊙ ((W_s ⊙ h_sᵀ) b_m).
    """

    # NOTE[DIFF] the paper's text was not at hand; this is the layer of FuxiCTR's AOANet. The paper's search for an
    # architecture, which prunes interactions by their learned weights, is not included.

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``num_subspaces`` is S.

        Raises:
            ConfigError: a size below 1.
        """

        num_layers: int = 3
        num_subspaces: int = 4

        def __post_init__(self) -> None:
            positive("GeneralizedInteraction.num_layers", self.num_layers)
            positive("GeneralizedInteraction.num_subspaces", self.num_subspaces)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        subspaces, fields = config.num_subspaces, layout.num_fields
        inputs = [fields] + [subspaces] * (config.num_layers - 1)
        self.layers = nn.ModuleList(GeneralizedLayer(before, subspaces, fields, layout.dim) for before in inputs)
        names = numbered("aoa", subspaces)
        self.out = FieldLayout(names, layout.dim)
        self.axes = {f"weights/{i}": (names, names if i else layout.names, layout.names) for i in range(config.num_layers)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, S, D]."""
        b_BMD = x_BFD
        for layer in self.layers:
            b_BMD = layer(x_BFD, b_BMD)
        return b_BMD

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """The weights α, the same for all rows: ``"weights/0"``, ... of shape [B, S, M, F]; M are the layer's inputs."""
        weights = [cast(GeneralizedLayer, layer).weight_SMF for layer in self.layers]
        return {f"weights/{i}": w.clone().expand(len(x_BFD), -1, -1, -1) for i, w in enumerate(weights)}


class GeneralizedLayer(nn.Module):
    """One layer of :class:`GeneralizedInteraction`. Shape: x [B, F, D], b [B, M, D] → [B, S, D]."""

    def __init__(self, inputs: int, subspaces: int, fields: int, dim: int) -> None:
        super().__init__()
        self.operation_SDD = nn.Parameter(torch.eye(dim).repeat(subspaces, 1, 1))
        self.weight_SMF = nn.Parameter(torch.ones(subspaces, inputs, fields))
        self.projection_SD = nn.Parameter(torch.ones(subspaces, dim))

    def forward(self, x_BFD: Tensor, b_BMD: Tensor) -> Tensor:
        subspaces, inputs, _ = self.weight_SMF.shape
        mixed_BSMD = (self.weight_SMF.flatten(0, 1) @ x_BFD).view(-1, subspaces, inputs, x_BFD.shape[2])
        operation_SDD = self.operation_SDD * self.projection_SD.unsqueeze(1)
        read_BMSD = (b_BMD @ operation_SDD.flatten(0, 1).T).view(-1, inputs, subspaces, x_BFD.shape[2])
        return (mixed_BSMD * read_BMSD.transpose(1, 2)).sum(dim=2)
