"""Field-aware factorization machines (Juan et al., RecSys 2016, doi:10.1145/2959100.2959134)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ctrlib.interactions.base import Interaction, evaluating, vector_width
from ctrlib.interactions.pairs import pair_names
from ctrlib.schema import FieldLayout


class FFM(Interaction):
    """y = Σ_{i<j} ⟨v_i→j, v_j→i⟩, where a value has a vector of its own, of width k, for every other field:

        x_i = [v_i→1, …, v_i→i-1, v_i→i+1, …, v_i→F], side by side

    Shape: [B, F, (F−1)·k] → [B, 1, 1], field ``"ffm"``. No parameters; a
    :class:`~ctrlib.models.multi_vector.MultiVectorModel` with ``vectors="others"`` provides the vectors. The paper leaves out
    first-order weights; they are an option of that model.
    """

    # NOTE[DIFF] libffm also stores v_i→i, which meets nothing when every field has one value
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """No options."""

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.axes = {"pair": (pair_names("FFM", layout),)}
        self.vectors_read = layout.num_fields - 1
        vector_width("FFM", layout, self.vectors_read, "others")
        self.products = FieldAwareProducts(layout.num_fields)
        self.out = FieldLayout(("ffm",), 1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, (F−1)·k] → [B, 1, 1]."""
        pair_BP: Tensor = self.products(x_BFD)
        return pair_BP.sum(dim=1, keepdim=True).unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"pair"`` [B, P]: what every pair adds to the logit."""
        return {"pair": self.products(x_BFD)}


class FieldAwareProducts(nn.Module):
    """⟨v_i→j, v_j→i⟩ of every pair i < j. Shape: [B, F, (F−1)·k] → [B, P]."""

    def __init__(self, num_fields: int) -> None:
        super().__init__()
        self.others = num_fields - 1
        self.left: Tensor
        self.right: Tensor
        i, j = torch.triu_indices(num_fields, num_fields, offset=1)
        self.register_buffer("left", i * self.others + j - 1, persistent=False)  # the slots of field i leave out i itself
        self.register_buffer("right", j * self.others + i, persistent=False)

    def forward(self, x_BFD: Tensor) -> Tensor:
        rows, fields, width = x_BFD.shape
        v_BNk = x_BFD.reshape(rows, fields * self.others, width // self.others)
        return (v_BNk.index_select(1, self.left) * v_BNk.index_select(1, self.right)).sum(dim=2)
