"""FinalNet: layers that multiply two halves of their own output, in place of an MLP (Zhu et al., SIGIR 2023,
doi:10.1145/3539618.3591988).

NOTE[DIFF] the full text was not at hand: the authors' code in FuxiCTR is followed, and the parameter counts of its logs hold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.interactions.mlp import Activation, Norm, after_linear
from ctrlib.schema import FieldLayout

Combine = Literal["concat", "sum"]


class FactorizedMLP(Interaction):
    """Layers of factorized interaction → norm → activation → dropout. From h_0 = vec(x), with W_l h_{l-1} + b_l = [u, v]:

        concat  h_l = dropout(act(norm([u, v ⊙ u])))    half linear, half quadratic
        sum     h_l = dropout(act(norm(u + v ⊙ u)))

    Without an activation L layers are polynomials of degree 2^L. Shape: [B, F, D] → [B, 1, last width], field
    ``"factorized_mlp"``. Parameters of a layer n → m: n·m + m (concat) or twice that (sum), and 2·m with a norm.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            hidden_units: width of each layer's output.
            combine: see above.
            activation: of every layer; ``"none"`` leaves a polynomial.
            norm: before the activation.
            dropout: after it.

        Raises:
            ConfigError: no layers, a width below 1 or (concat) odd, a dropout outside [0, 1).
        """

        hidden_units: tuple[int, ...] = (400, 400)
        combine: Combine = "concat"
        activation: Activation = "relu"
        norm: Norm = "batch"
        dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("FactorizedMLP.hidden_units", *self.hidden_units)
            fraction("FactorizedMLP.dropout", self.dropout)
            if not self.hidden_units:
                raise ConfigError("FactorizedMLP.hidden_units is empty; expected at least one layer")
            if self.combine == "concat" and any(units % 2 for units in self.hidden_units):
                raise ConfigError(
                    f"FactorizedMLP.hidden_units is {self.hidden_units}; expected even widths: concat puts two halves together"
                )

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        width = layout.width
        for units in config.hidden_units:
            layers.append(FactorizedLinear(width, units, config.combine))
            layers.extend(after_linear(units, norm=config.norm, activation=config.activation, dropout=config.dropout))
            width = units
        self.layers = nn.Sequential(*layers)
        self.out = FieldLayout(("factorized_mlp",), width)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, last width]."""
        return cast(Tensor, self.layers(x_BFD.flatten(1))).unsqueeze(1)


class FinalNet(Interaction):
    """One or two :class:`FactorizedMLP` on all embeddings, each with a linear layer to a logit; two are averaged:

        logit = ½ [w_1ᵀ block_1(gate(x)) + b_1 + w_2ᵀ block_2(x) + b_2]

    The gate, G = W x + b over the fields, multiplies every coordinate by a mixture of the same coordinate of all fields; the
    block reads [x, x ⊙ G] (concat) or x + x ⊙ G (sum). It starts as G = 1. Shape: [B, F, D] → [B, 1, 1], field ``"final_net"``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            block1: the first branch.
            block2: the second one; ``None``: there is one branch only (FinalNet-1B).
            gate: what the first branch reads: x alone, or with the gated x as above.
        """

        block1: FactorizedMLP.Config = FactorizedMLP.Config()
        block2: FactorizedMLP.Config | None = FactorizedMLP.Config(hidden_units=(400,))
        gate: Literal["none", "concat", "sum"] = "concat"

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.gate: FieldGate | None = None
        gated = layout
        if config.gate != "none":
            self.gate = FieldGate(layout, config.gate)
            gated = self.gate.out
        self.block_1 = FactorizedMLP(config.block1, gated)
        self.linear_1 = nn.Linear(self.block_1.out.width, 1)
        self.block_2: FactorizedMLP | None = None
        if config.block2 is not None:
            self.block_2 = FactorizedMLP(config.block2, layout)
            self.linear_2 = nn.Linear(self.block_2.out.width, 1)
        self.out = FieldLayout(("final_net",), 1)
        self.axes = {} if self.gate is None else {"gate": (layout.names, numbered("dim", layout.dim))}
        self.axes |= {"branches": (numbered("branch", 1 if self.block_2 is None else 2),)}

    def branches(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → the logit of each branch [B, 1 or 2]."""
        gated_BFD = x_BFD if self.gate is None else self.gate(x_BFD)
        first_B1 = cast(Tensor, self.linear_1(self.block_1(gated_BFD).flatten(1)))
        if self.block_2 is None:
            return first_B1
        return torch.cat([first_B1, self.linear_2(self.block_2(x_BFD).flatten(1))], dim=1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, 1]."""
        return self.branches(x_BFD).mean(dim=1, keepdim=True).unsqueeze(1)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"gate"`` [B, F, D] where there is one, and ``"branches"``, their logits [B, 1 or 2]."""
        shown = {} if self.gate is None else {"gate": self.gate.gates(x_BFD)}
        return shown | {"branches": self.branches(x_BFD)}


class FactorizedLinear(nn.Module):
    """[u, v] = W x + b, then [u, v ⊙ u] or u + v ⊙ u. Shape: [B, n] → [B, m]."""

    def __init__(self, width_in: int, width_out: int, combine: Combine) -> None:
        super().__init__()
        self.combine = combine
        self.linear = nn.Linear(width_in, width_out if combine == "concat" else 2 * width_out)

    def forward(self, x_BN: Tensor) -> Tensor:
        u, v = cast(Tensor, self.linear(x_BN)).chunk(2, dim=-1)
        return torch.cat([u, v * u], dim=-1) if self.combine == "concat" else u + v * u


class FieldGate(nn.Module):
    """x → [x, x ⊙ G] or x + x ⊙ G, with G_fd = Σ_g W_fg x_gd + b_f. Shape: [B, F, D] → [B, 2F, D] or [B, F, D].

    W starts at 0 and b at 1, whatever the initialisation of linear layers. Parameters: F² + F.
    """

    def __init__(self, layout: FieldLayout, combine: Combine) -> None:
        super().__init__()
        self.combine = combine
        self.weight = nn.Parameter(torch.zeros(layout.num_fields, layout.num_fields))
        self.bias = nn.Parameter(torch.ones(layout.num_fields, 1))
        gated = tuple(f"{name}_gated" for name in layout.names)
        self.out = FieldLayout(layout.names + gated if combine == "concat" else layout.names, layout.dim)

    def gates(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → G [B, F, D]."""
        return self.weight @ x_BFD + self.bias

    def forward(self, x_BFD: Tensor) -> Tensor:
        y_BFD = x_BFD * self.gates(x_BFD)
        return torch.cat([x_BFD, y_BFD], dim=1) if self.combine == "concat" else x_BFD + y_BFD
