"""DLRM's interaction: inner products of all pairs of fields, beside the output of the bottom MLP (Naumov et al. 2019,
arXiv:1906.00091)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ctrlib.config import ConfigError, positive
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.interactions.mlp import MLP
from ctrlib.interactions.pairs import PairProducts, check_pairs, pair_labels
from ctrlib.schema import FieldLayout, suggest


class DotInteraction(Interaction):
    """With z_0 = Bottom(the bottom fields) and z_1, …, z_K the other fields' vectors,

        y = [z_0, (⟨z_i, z_j⟩)_{i<j}]

    Bottom is an MLP with a ReLU after every layer, the last one of width D. Without bottom fields y is the products alone.
    Shape: [B, F, D] → [B, 1, D + K(K+1)/2] or [B, 1, F(F−1)/2], field ``"dots"``. The top MLP comes after it.

    NOTE[DIFF] the paper's bottom MLP reads the numbers themselves; this one reads the numeric fields' vectors. For numbers
    embedded as x·v the first layer is the same linear function of them, with more parameters.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            bottom_fields: names of the fields that the bottom MLP makes one vector of: the numeric ones, in the paper.
            bottom_hidden_units: its layers before the last.

        Raises:
            ConfigError: a width below 1; a name given twice.
        """

        bottom_fields: tuple[str, ...] = ()
        bottom_hidden_units: tuple[int, ...] = (512, 256, 64)

        def __post_init__(self) -> None:
            positive("DotInteraction.bottom_hidden_units", *self.bottom_hidden_units)
            for name in self.bottom_fields:
                if self.bottom_fields.count(name) > 1:
                    raise ConfigError(f"DotInteraction.bottom_fields has {name!r} twice; name every field once")

    bottom_index: Tensor
    other_index: Tensor

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        """
        Raises:
            ConfigError: an unknown bottom field; a single field, or none but bottom fields.
        """
        super().__init__()
        for name in config.bottom_fields:
            if name not in layout.names:
                raise ConfigError(f"DotInteraction.bottom_fields has {name!r}, which is no field{suggest(name, layout.names)}")
        check_pairs("DotInteraction", layout)
        others = [i for i, name in enumerate(layout.names) if name not in config.bottom_fields]
        if not others:
            raise ConfigError("DotInteraction.bottom_fields has all fields, so there are no pairs of vectors; leave one out")
        count = len(others) + bool(config.bottom_fields)
        self.bottom: MLP | None = None
        if config.bottom_fields:
            bottom = MLP.Config(hidden_units=(*config.bottom_hidden_units, layout.dim))
            self.bottom = MLP(bottom, FieldLayout(config.bottom_fields, layout.dim))
        bottom_index = [layout.names.index(name) for name in config.bottom_fields]
        self.register_buffer("bottom_index", torch.tensor(bottom_index, dtype=torch.int64), persistent=False)
        self.register_buffer("other_index", torch.tensor(others, dtype=torch.int64), persistent=False)
        self.products = PairProducts(count)
        self.out = FieldLayout(("dots",), count * (count - 1) // 2 + (layout.dim if config.bottom_fields else 0))
        names = tuple(layout.names[i] for i in others)
        self.axes = {"product": (pair_labels(("bottom", *names) if config.bottom_fields else names),)}

    def vectors(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → z [B, K+1, D], the bottom's output first; x itself without bottom fields."""
        if self.bottom is None:
            return x_BFD
        z0_B1D = self.bottom(x_BFD.index_select(1, self.bottom_index))
        return torch.cat([z0_B1D, x_BFD.index_select(1, self.other_index)], dim=1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, width]."""
        z_BKD = self.vectors(x_BFD)
        dots_BP = self.products(z_BKD)
        return (dots_BP if self.bottom is None else torch.cat([z_BKD[:, 0], dots_BP], dim=-1)).unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"product"`` [B, P], the inner products; the bottom's output is called ``"bottom"``."""
        return {"product": self.products(self.vectors(x_BFD))}
