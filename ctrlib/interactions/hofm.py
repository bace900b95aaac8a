"""Higher-order factorization machines (Blondel et al., NIPS 2016, arXiv:1607.07195)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction, evaluating, vector_width
from ctrlib.schema import FieldLayout


class HOFM(Interaction):
    """y = Σ_{t=2..m} Σ_s Aᵗ(v_1s, …, v_Fs), where the ANOVA kernel Aᵗ sums the products of all t *different* fields:

        Aᵗ(z) = Σ_{i_1 < … < i_t} z_{i_1} ⋯ z_{i_t} = Σ_j z_j Aᵗ⁻¹(z_1, …, z_{j-1}),   A¹(z) = Σ_j z_j

    The recursion takes O(t·F·k) instead of O(Fᵗ·k); all prefixes Aᵗ⁻¹(z_1, …, z_{j-1}) are one cumulative sum. A² is FM's.

    Shape: [B, F, (m−1)·k] → [B, 1, 1], field ``"hofm"``: one vector per order, side by side, that a
    :class:`~ctrlib.models.multi_vector.MultiVectorModel` with ``vectors`` = m − 1 provides; with ``share_embedding`` one for
    all, [B, F, k]. No parameters; the first-order weights are the model's.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``order`` is m, the highest, ``share_embedding`` uses the same vectors in all orders.

        Raises:
            ConfigError: ``order`` below 2.
        """

        order: int = 3
        share_embedding: bool = False

        def __post_init__(self) -> None:
            if self.order < 2:
                raise ConfigError(f"HOFM.order is {self.order}; expected 2 (a factorization machine) or more")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        if config.order > layout.num_fields:
            raise ConfigError(
                f"HOFM.order is {config.order}, but its input has fewer fields ({layout.num_fields}); expected at most as many"
            )
        self.orders = range(2, config.order + 1)
        self.share_embedding = config.share_embedding
        self.vectors_read = 1 if config.share_embedding else len(self.orders)
        vector_width("HOFM", layout, self.vectors_read, self.vectors_read)
        self.out = FieldLayout(("hofm",), 1)
        self.axes = {f"order/{t}": () for t in self.orders}

    def terms(self, x_BFD: Tensor) -> list[Tensor]:
        """What every order adds to the logit, each [B]."""
        count = len(self.orders)
        vectors = [x_BFD] * count if self.share_embedding else list(x_BFD.chunk(count, dim=2))
        return [anova(z, t).sum(dim=1) for t, z in zip(self.orders, vectors, strict=True)]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, (m−1)·k] or [B, F, k] → [B, 1, 1]."""
        return torch.stack(self.terms(x_BFD)).sum(dim=0).view(-1, 1, 1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"order/2"``, … [B]: what every order adds to the logit."""
        return {f"order/{t}": term_B for t, term_B in zip(self.orders, self.terms(x_BFD), strict=True)}


def anova(z_BFD: Tensor, order: int) -> Tensor:
    """The ANOVA kernel of every column: [B, F, D] → [B, D]."""
    term_BFD = z_BFD  # products of t fields of which j is the last
    for t in range(1, order):
        term_BFD = z_BFD[:, t:] * term_BFD.cumsum(dim=1)[:, :-1]
    return term_BFD.sum(dim=1)
