"""Linear terms: on the embeddings (``Linear``), or embeddings of width 1 taken as the weights themselves (``FirstOrder``)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ctrlib.config import positive
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.schema import FieldLayout


class Linear(Interaction):
    """y = W vec(x) + b. Shape: [B, F, D] → [B, 1, output_dim], field ``"linear"``.

    With ``output_dim=1`` this is the output step of AutoInt (arXiv:1810.11921), logit = wᵀ vec(Y_L) + b.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Raises:
            ConfigError: ``output_dim`` below 1.
        """

        output_dim: int = 1
        bias: bool = True

        def __post_init__(self) -> None:
            positive("Linear.output_dim", self.output_dim)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.linear = nn.Linear(layout.width, config.output_dim, bias=config.bias)
        self.out = FieldLayout(("linear",), config.output_dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, output_dim]."""
        return cast(Tensor, self.linear(x_BFD.flatten(1))).unsqueeze(1)


class FirstOrder(Interaction):
    """Σ_f w_f(x_f) + w_0: logistic regression's logit, the first-order part of FM (Rendle 2010) and of Wide & Deep
    (arXiv:1606.07792).

    Shape: [B, F, 1] → [B, 1, 1], field ``"first_order"``. The weight of a feature value is its embedding of width 1, so the
    block itself owns at most the scalar bias (zero at the start). Wider embeddings are summed over both axes.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``bias`` adds the scalar w_0."""

        bias: bool = True

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1)) if config.bias else None
        self.out = FieldLayout(("first_order",), 1)
        self.axes = {"field": (layout.names,)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, 1]."""
        y_B11 = x_BFD.sum(dim=(1, 2), keepdim=True)
        return y_B11 if self.bias is None else y_B11 + self.bias

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"field"`` [B, F]: what every field adds to the logit."""
        return {"field": x_BFD.sum(dim=2)}
