"""EulerNet: feature interactions of learned order, as sums of moduli and phases of complex embeddings (Tian et al., SIGIR 2023,
arXiv:2304.10711)."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.schema import FieldLayout


class EulerNet(Interaction):
    """Embeddings become complex, z_j = μ_j e^{i x_j}, coordinate by coordinate; every layer maps m vectors to n:

        explicit  Π_j z_j^{α_jk}, computed from z_j = e^{λ_j + iθ_j} as e^{Λ_k} (cos Θ_k + i sin Θ_k),
                  Λ_k = Σ_j α_jk λ_j + δ_k,   Θ_k = Σ_j α_jk θ_j + δ'_k
        implicit  ReLU(W vec(Re z) + b) + i·ReLU(W vec(Im z) + b)
        z'_k      = explicit_k + implicit_k, each of Re and Im by an LN of its own with ``norm``

    The orders α are learned: α_jk = 1 for two j and else 0 is a product of two fields. The paper's prediction is linear in Re z
    and Im z with one weight for both; hence the block returns Re z + Im z, for a linear layer to read.

    Shape: [B, F, D] → [B, n, D], fields ``"euler_0"``, …. Parameters: F (μ), and per layer m·n (α), 2·n·D (δ), m·n·D² + n·D
    (W, b), and 4·D with ``norm``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults are those released for Criteo.

        Attributes:
            num_orders: n of each layer.
            norm: of the real and of the imaginary parts after every layer.
            explicit_dropout: on λ and θ.
            implicit_dropout: on Re z and Im z before W.

        Raises:
            ConfigError: no layers, an n below 1, a dropout outside [0, 1).
        """

        num_orders: tuple[int, ...] = (39, 39)
        norm: Literal["none", "layer"] = "layer"
        explicit_dropout: float = 0.1
        implicit_dropout: float = 0.2

        def __post_init__(self) -> None:
            positive("EulerNet.num_orders", *self.num_orders)
            fraction("EulerNet.explicit_dropout", self.explicit_dropout)
            fraction("EulerNet.implicit_dropout", self.implicit_dropout)
            if not self.num_orders:
                raise ConfigError("EulerNet.num_orders is empty; expected at least one layer")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.ones(layout.num_fields, 1))
        counts = (layout.num_fields, *config.num_orders)
        self.layers = nn.ModuleList(EulerLayer(config, m, n, layout.dim) for m, n in pairwise(counts))
        names = (layout.names, *(numbered("euler", n) for n in config.num_orders))
        self.out = FieldLayout(names[-1], layout.dim)
        self.axes = {f"order/{i}": pair for i, pair in enumerate(pairwise(names))}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, n, D]."""
        re_BFD, im_BFD = self.mu * x_BFD.cos(), self.mu * x_BFD.sin()
        for layer in self.layers:
            re_BFD, im_BFD = layer(re_BFD, im_BFD)
        return re_BFD + im_BFD

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"order/0"``, … [B, m, n]: the learned powers of each layer's inputs in its outputs, the same for all rows."""
        orders = [cast(EulerLayer, layer).order.clone() for layer in self.layers]
        return {f"order/{i}": order.expand(len(x_BFD), -1, -1) for i, order in enumerate(orders)}


class EulerLayer(nn.Module):
    """One layer of :class:`EulerNet`. Shape: Re and Im, both [B, m, D] → both [B, n, D]."""

    def __init__(self, config: EulerNet.Config, count_in: int, count_out: int, width: int) -> None:
        super().__init__()
        self.shape = (count_out, width)
        # As released: each output starts as (almost) one input, of its own where there are as many of both.
        start = torch.eye(count_in) if count_in == count_out else (100 * torch.randn(count_in, count_out)).softmax(dim=0)
        self.order = nn.Parameter(start)
        self.bias_modulus = nn.Parameter(0.01 * torch.randn(count_out, width))
        self.bias_phase = nn.Parameter(0.01 * torch.randn(count_out, width))
        self.implicit = nn.Linear(count_in * width, count_out * width)
        nn.init.xavier_uniform_(self.implicit.weight)
        self.norm_re = nn.LayerNorm(width) if config.norm == "layer" else nn.Identity()
        self.norm_im = nn.LayerNorm(width) if config.norm == "layer" else nn.Identity()
        self.explicit_dropout = Dropout(config.explicit_dropout)
        self.implicit_dropout = Dropout(config.implicit_dropout)

    def forward(self, re_BFD: Tensor, im_BFD: Tensor) -> tuple[Tensor, Tensor]:
        modulus_BFD = 0.5 * (re_BFD.square() + im_BFD.square() + 1e-8).log()
        phase_BFD = torch.atan2(im_BFD, re_BFD)
        modulus_BND = (self.order.T @ self.explicit_dropout(modulus_BFD) + self.bias_modulus).exp()
        phase_BND = self.order.T @ self.explicit_dropout(phase_BFD) + self.bias_phase
        implicit_re, implicit_im = (
            torch.unflatten(F.relu(self.implicit(self.implicit_dropout(part.flatten(1)))), 1, self.shape)
            for part in (re_BFD, im_BFD)
        )
        re_BND = modulus_BND * phase_BND.cos() + implicit_re
        im_BND = modulus_BND * phase_BND.sin() + implicit_im
        return cast(Tensor, self.norm_re(re_BND)), cast(Tensor, self.norm_im(im_BND))
