"""Factorization machines with weights for every pair of fields: FwFM (Pan et al. 2018, arXiv:1806.03514) and FmFM (Sun et al.
2021, arXiv:2102.12994). First-order weights are the model's, see :class:`~ctrlib.models.ctr.CTRModel`.

With P = F(F−1)/2 pairs, FM ⊂ FwFM (P numbers) ⊂ FvFM (P diagonals) ⊂ FmFM (P matrices).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from ctrlib.interactions.base import Interaction, evaluating, vector_width
from ctrlib.interactions.pairs import PairKernel, PairProducts, pair_names
from ctrlib.schema import FieldLayout


class FwFM(Interaction):
    """y = Σ_{i<j} r_ij ⟨v_i, v_j⟩, plus a linear part on the vectors:

    ============= =========== ==================== =====================================================
    linear        paper's     term                 reads
    ============= =========== ==================== =====================================================
    none          "LW"        none                 v = x; first-order weights are the model's
    field         "FiLV"      Σ_i ⟨v_i, w_i⟩       v = x; one vector w_i per field
    value         "FeLV"      Σ_i ⟨v_i, u_i⟩       x = [v, u], two vectors per value, see
                                                   :class:`~ctrlib.models.multi_vector.MultiVectorModel`
    ============= =========== ==================== =====================================================

    Shape: [B, F, D] → [B, 1, 1], field ``"fwfm"``. Parameters: P, for FiLV F·D more, with ``bias`` one more.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``bias`` adds a constant, for a model without first-order weights."""

        linear: Literal["none", "field", "value"] = "none"
        bias: bool = False

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        names = pair_names("FwFM", layout)
        self.two_vectors = config.linear == "value"
        self.vectors_read = 2 if self.two_vectors else 1
        self.width = vector_width("FwFM with linear='value'", layout, self.vectors_read, 2)
        self.products = PairProducts(layout.num_fields)
        self.strength = nn.Linear(len(names), 1, bias=config.bias)
        self.linear = nn.Linear(layout.width, 1, bias=False) if config.linear == "field" else None
        self.out = FieldLayout(("fwfm",), 1)
        self.axes = {"pair": (names,)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, 1]."""
        v_BFD = x_BFD[:, :, : self.width]
        y_B1 = cast(Tensor, self.strength(self.products(v_BFD)))
        if self.two_vectors:
            y_B1 = y_B1 + (v_BFD * x_BFD[:, :, self.width :]).sum(dim=(1, 2)).unsqueeze(1)
        if self.linear is not None:
            y_B1 = y_B1 + self.linear(v_BFD.flatten(1))
        return y_B1.unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"pair"`` [B, P]: what every pair adds to the logit, r_ij ⟨v_i, v_j⟩."""
        return {"pair": self.products(x_BFD[:, :, : self.width]) * self.strength.weight}


class FmFM(Interaction):
    """y = Σ_{i<j} v_iᵀ M_ij v_j, with a matrix M_ij for every pair of fields, or a diagonal one ("FvFM").

    Shape: [B, F, D] → [B, 1, 1], field ``"fmfm"``. Parameters: P·D², or P·D.
    """

    # NOTE[DIFF] one width for all fields; the paper also has D_i × D_j matrices for vectors of different widths
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``kernel="vector"`` is FvFM."""

        kernel: Literal["matrix", "vector"] = "matrix"

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.axes = {"pair": (pair_names("FmFM", layout),)}
        self.kernel = PairKernel(config.kernel, layout)
        self.out = FieldLayout(("fmfm",), 1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, 1]."""
        return self.kernel(x_BFD).sum(dim=1, keepdim=True).unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"pair"`` [B, P]: what every pair adds to the logit, v_iᵀ M_ij v_j."""
        return {"pair": self.kernel(x_BFD)}
