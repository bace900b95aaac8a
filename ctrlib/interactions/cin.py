"""CIN: the compressed interaction network of xDeepFM (Lian et al., KDD 2018, arXiv:1803.05170)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, positive
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.mlp import ACTIVATIONS, Activation
from ctrlib.schema import FieldLayout


class CIN(Interaction):
    """Crosses of whole vectors, of an order that grows by one per layer. With X^0 = x and H_k vectors X^k_h in layer k:

        X^k_h = act(Σ_i Σ_j W^{k,h}_ij (X^{k−1}_i ⊙ X^0_j))
        y     = [Σ_d X^1_{1,d}, …, Σ_d X^K_{H_K,d}]        every vector of every layer, summed over its D coordinates

    Shape: [B, F, D] → [B, 1, Σ_k H_k], field ``"cin"``. Parameters: H_{k−1}·F·H_k per layer (H_0 = F), and H_k with ``bias``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults are the paper's equations.

        Attributes:
            hidden_units: H_1, …, H_K.
            bias: one number per vector, added to all its coordinates; FuxiCTR has it.
            activation: after every layer; the paper found none to be best.

        Raises:
            ConfigError: no layers; a width below 1.
        """

        hidden_units: tuple[int, ...] = (200, 200, 200)
        bias: bool = False
        activation: Activation = "none"

        def __post_init__(self) -> None:
            positive("CIN.hidden_units", *self.hidden_units)
            if not self.hidden_units:
                raise ConfigError("CIN.hidden_units is empty; expected at least one layer")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        widths = (layout.num_fields, *config.hidden_units)
        self.layers = nn.ModuleList(
            nn.Linear(before * layout.num_fields, after, bias=config.bias)  # NOTE[DIFF] the bias is FuxiCTR, not the paper
            for before, after in pairwise(widths)
        )
        self.activation = ACTIVATIONS[config.activation]()
        self.out = FieldLayout(("cin",), sum(config.hidden_units))

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, Σ_k H_k]."""
        # Coordinates before vectors, so that all products of one coordinate lie side by side and a layer is one matmul.
        x0_BDF = x_BFD.transpose(1, 2)
        x_BDH = x0_BDF
        pooled = []
        for layer in self.layers:
            # An outer product by @: the gradient of a broadcast product is slower on a CPU.
            products_BDN = (x_BDH.unsqueeze(-1) @ x0_BDF.unsqueeze(-2)).flatten(2)
            x_BDH = self.activation(layer(products_BDN))
            pooled.append(x_BDH.sum(dim=1))
        return torch.cat(pooled, dim=-1).unsqueeze(1)
