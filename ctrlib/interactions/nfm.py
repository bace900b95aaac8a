"""NFM's bi-interaction pooling: all pairs of fields, added as vectors (He & Chua, SIGIR 2017, arXiv:1708.05027)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from ctrlib.config import fraction
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.pairs import sum_of_products
from ctrlib.schema import FieldLayout


class BiInteraction(Interaction):
    """Products of all pairs of fields, added:

        y = Σ_{i<j} x_i ⊙ x_j = ½ [(Σ_i x_i)² − Σ_i x_i²]        coordinate by coordinate (eq. 4)

    Shape: [B, F, D] → [B, 1, D], field ``"bi_interaction"``; its coordinates add up to :class:`~ctrlib.interactions.fm.FM`.
    No parameters, 2·D with ``norm``. NFM puts an MLP on top and adds first-order weights: preset ``nfm``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``norm`` is of y, ``dropout`` acts after it, in this order as in the paper.

        Raises:
            ConfigError: a dropout outside [0, 1).
        """

        norm: Literal["none", "batch"] = "none"
        dropout: float = 0.0

        def __post_init__(self) -> None:
            fraction("BiInteraction.dropout", self.dropout)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(layout.dim) if config.norm == "batch" else None
        self.dropout = Dropout(config.dropout)
        self.out = FieldLayout(("bi_interaction",), layout.dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, D]."""
        y_BD = sum_of_products(x_BFD)
        if self.norm is not None:
            y_BD = self.norm(y_BD)
        return cast(Tensor, self.dropout(y_BD)).unsqueeze(1)
