"""Operation-aware neural network, also called NFFM (Yang et al. 2019, arXiv:1904.12579)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ctrlib.interactions.base import Interaction, evaluating, vector_width
from ctrlib.interactions.ffm import FieldAwareProducts
from ctrlib.interactions.pairs import pair_names
from ctrlib.schema import FieldLayout


class ONN(Interaction):
    """What ONN's MLP reads: a value has a vector of width k for every operation that it enters, one to be copied and one for
    the product with every other field:

        x_i = [v_i, v_i→1, …, v_i→i-1, v_i→i+1, …, v_i→F];   y = [v_1, …, v_F, ⟨v_i→j, v_j→i⟩ for i < j]

    Shape: [B, F, F·k] → [B, 1, F·k + F(F−1)/2], field ``"onn"``. No parameters; a
    :class:`~ctrlib.models.multi_vector.MultiVectorModel` with ``vectors="fields"`` provides the vectors.
    """

    # NOTE[DIFF] inner products only, as in FuxiCTR, whose order of vectors this is; the paper allows any set of operations
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """No options."""

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        names = pair_names("ONN", layout)
        self.vectors_read = layout.num_fields
        self.width = vector_width("ONN", layout, self.vectors_read, "fields")
        self.products = FieldAwareProducts(layout.num_fields)
        self.axes = {"product": (names,)}
        self.out = FieldLayout(("onn",), layout.num_fields * self.width + len(names))

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, F·k] → [B, 1, F·k + P]."""
        copied_BFk = x_BFD[:, :, : self.width]
        return torch.cat([copied_BFk.flatten(1), self.products(x_BFD[:, :, self.width :])], dim=1).unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"product"`` [B, P] of the field-aware vectors."""
        return {"product": self.products(x_BFD[:, :, self.width :])}
