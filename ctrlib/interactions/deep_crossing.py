"""Deep Crossing: residual units on all embeddings side by side (Shan et al., KDD 2016, doi:10.1145/2939672.2939704)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.mlp import ACTIVATIONS, Activation
from ctrlib.schema import FieldLayout


class DeepCrossing(Interaction):
    """Units with one hidden layer each, that go back to the width N = F·D of x_0 = vec(x):

        x_l = act(V_l act(W_l x_{l−1} + b_l) + c_l + x_{l−1}),   W_l of shape [H_l, N], V_l [N, H_l]

    Shape: [B, F, D] → [B, 1, F·D], field ``"deep_crossing"``. Parameters: 2·N·H_l + H_l + N per unit, 2·N with batch norm.

    NOTE[DIFF] the paper's embeddings are ReLU(W_j x_j + b_j) of chosen widths, with small fields passed on as they are; here
    they are rows of tables, of one width.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            hidden_units: H_1, …, one residual unit each.
            activation: inside each unit and after its sum.
            norm: ``"batch"`` normalises the sum before the activation; not in the paper.
            dropout: after every unit; not in the paper.

        Raises:
            ConfigError: no units; a width below 1; a dropout outside [0, 1).
        """

        hidden_units: tuple[int, ...] = (512, 512, 256, 128, 64)
        activation: Activation = "relu"
        norm: Literal["none", "batch"] = "none"
        dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("DeepCrossing.hidden_units", *self.hidden_units)
            fraction("DeepCrossing.dropout", self.dropout)
            if not self.hidden_units:
                raise ConfigError("DeepCrossing.hidden_units is empty; expected at least one residual unit")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.units = nn.Sequential(*(ResidualUnit(config, layout.width, hidden) for hidden in config.hidden_units))
        self.out = FieldLayout(("deep_crossing",), layout.width)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, F·D]."""
        return cast(Tensor, self.units(x_BFD.flatten(1))).unsqueeze(1)


class ResidualUnit(nn.Module):
    """One unit of :class:`DeepCrossing`. Shape: [B, N] → [B, N]."""

    def __init__(self, config: DeepCrossing.Config, width: int, hidden: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, hidden)
        self.second = nn.Linear(hidden, width)
        self.activation = ACTIVATIONS[config.activation]()
        self.norm = nn.BatchNorm1d(width) if config.norm == "batch" else nn.Identity()
        self.dropout = Dropout(config.dropout)

    def forward(self, x_BN: Tensor) -> Tensor:
        # The second activation comes after the sum, as in the residual networks that the paper builds on, and in FuxiCTR.
        total_BN = self.second(self.activation(self.first(x_BN))) + x_BN
        return cast(Tensor, self.dropout(self.activation(self.norm(total_BN))))
