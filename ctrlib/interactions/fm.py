"""The second-order part of factorization machines (Rendle, ICDM 2010; as a layer in DeepFM, arXiv:1703.04247)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.interactions.pairs import PairProducts, pair_labels, sum_of_products
from ctrlib.schema import FieldLayout


class FM(Interaction):
    """Inner products of all pairs of fields:

        y = Σ_{i<j} ⟨x_i, x_j⟩ = ½ Σ_d [(Σ_i x_id)² − Σ_i x_id²]

    The right-hand side (Rendle's lemma) takes O(F·D) instead of O(F²·D). A numeric field's embedding already carries its value,
    so there is no separate x_i x_j factor. Shape: [B, F, D] → [B, 1, 1], field ``"fm"``. No parameters; the first-order part is
    :class:`~ctrlib.interactions.linear.FirstOrder`.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """No options."""

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.products = PairProducts(layout.num_fields)  # for explain alone
        self.out = FieldLayout(("fm",), 1)
        self.axes = {"pair": (pair_labels(layout.names),)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, 1]."""
        return sum_of_products(x_BFD).sum(dim=-1, keepdim=True).unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"pair"`` [B, P]: what every pair adds to the logit, ⟨x_i, x_j⟩."""
        return {"pair": self.products(x_BFD)}
