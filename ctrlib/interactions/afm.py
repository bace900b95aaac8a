"""AFM: all pairs of fields, weighed by attention (Xiao et al., IJCAI 2017, arXiv:1708.04617)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ctrlib.config import fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.interactions.pairs import Pairs, check_pairs, pair_labels
from ctrlib.schema import FieldLayout


class AFM(Interaction):
    """With the product of two fields p_ij = x_i ⊙ x_j for every pair i < j,

        a_ij = softmax over all pairs of hᵀ ReLU(W p_ij + b)        attention (eq. 6)
        y    = Σ_{i<j} a_ij p_ij                                    pooling (eq. 5)

    Shape: [B, F, D] → [B, 1, D], field ``"afm"``. Parameters: A·D + 2·A with A = ``attention_dim``. The paper's logit is
    w_0 + Σ_i w_i + pᵀ y: a linear layer after the block and first-order weights, preset ``afm``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``attention_dropout`` acts on the weights a_ij, ``dropout`` on y.

        Raises:
            ConfigError: ``attention_dim`` below 1, a dropout outside [0, 1).
        """

        attention_dim: int = 16
        attention_dropout: float = 0.0
        dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("AFM.attention_dim", self.attention_dim)
            fraction("AFM.attention_dropout", self.attention_dropout)
            fraction("AFM.dropout", self.dropout)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        check_pairs("AFM", layout)
        self.pairs = Pairs(layout.num_fields)
        self.hidden = nn.Linear(layout.dim, config.attention_dim)
        self.score = nn.Linear(config.attention_dim, 1, bias=False)
        self.attention_dropout = Dropout(config.attention_dropout)
        self.dropout = Dropout(config.dropout)
        self.out = FieldLayout(("afm",), layout.dim)
        self.axes = {"attention": (pair_labels(layout.names),)}

    def products(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → x_i ⊙ x_j of all pairs [B, P, D]."""
        left_BPD, right_BPD = self.pairs(x_BFD)
        return left_BPD * right_BPD

    def attention(self, pairs_BPD: Tensor) -> Tensor:
        """[B, P, D] → weights [B, P]; each row sums to 1."""
        return cast(Tensor, self.score(self.hidden(pairs_BPD).relu())).squeeze(-1).softmax(dim=-1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, D]."""
        pairs_BPD = self.products(x_BFD)
        attention_B1P = self.attention_dropout(self.attention(pairs_BPD)).unsqueeze(1)
        return cast(Tensor, self.dropout(attention_B1P.to(pairs_BPD.dtype) @ pairs_BPD))

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"attention"`` [B, P], before dropout: the weight of every pair."""
        return {"attention": self.attention(self.products(x_BFD))}
