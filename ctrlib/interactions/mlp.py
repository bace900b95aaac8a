"""The plain multi-layer network on all embeddings side by side; "DNN" and "deep part" in the literature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

from torch import Tensor, nn

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.dice import Dice
from ctrlib.schema import FieldLayout

Activation = Literal["relu", "gelu", "silu", "tanh", "leaky_relu", "sigmoid", "none"]
UnitActivation = Literal[Activation, "prelu", "dice"]  # the last two are learned, unit by unit

ACTIVATIONS: dict[Activation, type[nn.Module]] = {
    "relu": nn.ReLU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
    "leaky_relu": nn.LeakyReLU,
    "sigmoid": nn.Sigmoid,
    "none": nn.Identity,
}

Norm = Literal["none", "batch", "layer"]


def activation_layer(activation: UnitActivation, units: int) -> nn.Module:
    """The activation of a layer of so many units."""
    if activation == "prelu":
        return nn.PReLU(units)
    return Dice(units) if activation == "dice" else ACTIVATIONS[activation]()


def after_linear(units: int, *, norm: Norm, activation: UnitActivation, dropout: float = 0.0) -> list[nn.Module]:
    """What follows a linear layer of so many units: norm, activation, dropout, as far as they are wanted."""
    layers: list[nn.Module] = []
    if norm != "none":
        layers.append(nn.BatchNorm1d(units) if norm == "batch" else nn.LayerNorm(units))
    layers.append(activation_layer(activation, units))
    if dropout > 0:
        layers.append(Dropout(dropout))
    return layers


class MLP(Interaction):
    """Hidden layers of linear → norm → activation → dropout, then optionally one plain linear layer.

        h_0 = vec(x);  h_l = dropout(act(norm(W_l h_{l-1} + b_l)));  y = W h_L + b

    Shape: [B, F, D] → [B, 1, last width], field ``"mlp"``. The order inside a layer is that of FuxiCTR's ``MLP_Block``, from
    which the published numbers of FinalMLP (arXiv:2304.00902), DCN-V2 and AutoInt+ on the BARS benchmark come.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            hidden_units: width of each hidden layer; may be empty if ``output_dim`` is given.
            output_dim: width of the last plain linear layer; ``None``, the default, for none.
            activation: of the hidden layers; ``"prelu"`` and ``"dice"`` (:class:`.Dice`) are learned, a parameter a unit.
            norm: ``"batch"`` or ``"layer"`` normalisation before the activation.
            dropout: after the activation of every hidden layer.

        Raises:
            ConfigError: no layer at all, a width below 1, a dropout outside [0, 1).
        """

        hidden_units: tuple[int, ...] = (400, 400, 400)
        output_dim: int | None = None
        activation: UnitActivation = "relu"
        norm: Norm = "none"
        dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("MLP.hidden_units", *self.hidden_units)
            fraction("MLP.dropout", self.dropout)
            if self.output_dim is not None:
                positive("MLP.output_dim", self.output_dim)
            elif not self.hidden_units:
                raise ConfigError("MLP has no layers: hidden_units is empty and output_dim is None; set one of them")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = layout.width
        for units in config.hidden_units:
            layers.append(nn.Linear(width, units))
            layers.extend(after_linear(units, norm=config.norm, activation=config.activation, dropout=config.dropout))
            width = units
        if config.output_dim is not None:
            layers.append(nn.Linear(width, config.output_dim))
            width = config.output_dim
        self.layers = nn.Sequential(*layers)
        self.out = FieldLayout(("mlp",), width)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, last width]."""
        return cast(Tensor, self.layers(x_BFD.flatten(1))).unsqueeze(1)
