"""Product layers of product-based neural networks: PNN (Qu et al. 2016, arXiv:1611.00144) and its sequel with kernels and
sub-networks (Qu et al. 2018, arXiv:1807.00311). Each is followed by an MLP. Pairs: see :mod:`~ctrlib.interactions.pairs`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import ConfigError, positive
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.interactions.pairs import PairKernel, PairProducts, Pairs, pair_names
from ctrlib.schema import FieldLayout


class InnerProduct(Interaction):
    """IPNN's product layer: the inner products of all pairs, beside the embeddings themselves:

        y = [vec(x), ⟨x_i, x_j⟩ for i < j]

    Shape: [B, F, D] → [B, 1, F·D + P], field ``"product"``; with ``linear_signal=False`` only the products, [B, P, 1], fields
    ``"user*item"``, …. No parameters.
    """

    # NOTE[DIFF] the 2016 paper multiplies the products by factorised weights (l_p = ‖Σ_i θ_i x_i‖²); its authors' code and its
    # sequel concatenate them as here, so that the MLP's first layer has one free weight for every pair
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``linear_signal`` keeps vec(x), the paper's z, in front of the products."""

        linear_signal: bool = True

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        names = pair_names("InnerProduct", layout)
        self.linear_signal = config.linear_signal
        self.products = PairProducts(layout.num_fields)
        self.out = _product_layout(config.linear_signal, layout, names)
        self.axes = {"product": (names,)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, F·D + P] or [B, P, 1]."""
        return _product_layer(self.linear_signal, x_BFD, self.products(x_BFD))

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"product"`` [B, P], the inner products."""
        return {"product": self.products(x_BFD)}


class OuterProduct(Interaction):
    """OPNN's product layer, beside the embeddings themselves, y = [vec(x), p]:

    ============== =================================================== =========== ==========================
    kernel         p                                                   numbers     parameters
    ============== =================================================== =========== ==========================
    none (default) vec(s sᵀ) with s = Σ_i x_i, the superposition of    D²          none
                   all outer products x_i x_jᵀ (arXiv:1611.00144)
    matrix         x_iᵀ φ_ij x_j for i < j, "KPNN" (arXiv:1807.00311)  P           P·D²
    vector         the same with a diagonal φ_ij                       P           P·D
    number         the same with φ_ij times the identity               P           P
    ============== =================================================== =========== ==========================

    Shape: [B, F, D] → [B, 1, F·D + numbers], field ``"product"``; with ``linear_signal=False`` only p: [B, D, D] with fields
    ``"outer_0"``, …, or [B, P, 1] with fields ``"user*item"``, ….
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``linear_signal`` keeps vec(x), the paper's z, in front of the products."""

        kernel: Literal["none", "matrix", "vector", "number"] = "none"
        linear_signal: bool = True

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.linear_signal = config.linear_signal
        self.kernel = None if config.kernel == "none" else PairKernel(config.kernel, layout)
        if self.kernel is not None:
            names = pair_names("OuterProduct", layout)
            self.out = _product_layout(config.linear_signal, layout, names)
            self.axes = {"product": (names,)}
        elif config.linear_signal:
            self.out = FieldLayout(("product",), layout.width + layout.dim**2)
        else:
            self.out = FieldLayout(tuple(f"outer_{d}" for d in range(layout.dim)), layout.dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, F·D + numbers], or the products alone."""
        if self.kernel is not None:
            return _product_layer(self.linear_signal, x_BFD, self.kernel(x_BFD))
        sum_BD = x_BFD.sum(dim=1)
        outer_BDD = sum_BD.unsqueeze(2) * sum_BD.unsqueeze(1)
        return torch.cat([x_BFD.flatten(1), outer_BDD.flatten(1)], dim=1).unsqueeze(1) if self.linear_signal else outer_BDD

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"product"`` [B, P], the kernel products, where there are any."""
        return {} if self.kernel is None else {"product": self.kernel(x_BFD)}


class PIN(Interaction):
    """The sub-networks of "product-network in network" (arXiv:1807.00311), one small network for every pair:

        h_0 = [x_i, x_j, x_i ⊙ x_j];   h_l = LN(W_l^ij h_{l-1} + b_l^ij), then ReLU on all but the last

    Shape: [B, F, D] → [B, P, m], m the last of ``hidden_units``, fields ``"user*item"``, …. The layer norm is over all units of
    all pairs of a row, so that a pair keeps its size relative to the others; its gain and shift, one per unit, are shared by
    the pairs. Parameters: P·(3D·m_1 + m_1 + m_1·m_2 + m_2 + …), and 2·Σ m_l with the norm.
    """

    # NOTE[DIFF] the paper's text was not to be had: this follows the authors' code, without its optional FM part ("wide")
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``hidden_units`` of every sub-network, the last being its outputs.

        Raises:
            ConfigError: no layer, or a width below 1.
        """

        hidden_units: tuple[int, ...] = (40, 5)
        norm: Literal["none", "layer"] = "layer"

        def __post_init__(self) -> None:
            positive("PIN.hidden_units", *self.hidden_units)
            if not self.hidden_units:
                raise ConfigError("PIN.hidden_units is empty; expected at least the width of the sub-networks' output")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        names = pair_names("PIN", layout)
        self.pairs = Pairs(layout.num_fields)
        widths = [3 * layout.dim, *config.hidden_units]
        shapes = list(pairwise(widths))
        self.weights = nn.ParameterList(_xavier_uniform(len(names), inputs, outputs) for inputs, outputs in shapes)
        self.biases = nn.ParameterList(torch.zeros(len(names), outputs) for _, outputs in shapes)
        norms = [outputs for _, outputs in shapes] if config.norm == "layer" else []
        self.gains = nn.ParameterList(torch.ones(outputs) for outputs in norms)
        self.shifts = nn.ParameterList(torch.zeros(outputs) for outputs in norms)
        self.out = FieldLayout(names, widths[-1])

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, P, m]."""
        left_BPD, right_BPD = self.pairs(x_BFD)
        h_BPU = torch.cat([left_BPD, right_BPD, left_BPD * right_BPD], dim=2)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            h_BPU = torch.einsum("bpi,pio->bpo", h_BPU, weight) + bias
            if len(self.gains):
                h_BPU = F.layer_norm(h_BPU, list(h_BPU.shape[1:])) * self.gains[i] + self.shifts[i]
            if i < len(self.weights) - 1:
                h_BPU = F.relu(h_BPU)
        return h_BPU


def _product_layout(linear_signal: bool, layout: FieldLayout, names: tuple[str, ...]) -> FieldLayout:
    return FieldLayout(("product",), layout.width + len(names)) if linear_signal else FieldLayout(names, 1)


def _product_layer(linear_signal: bool, x_BFD: Tensor, products_BP: Tensor) -> Tensor:
    return torch.cat([x_BFD.flatten(1), products_BP], dim=1).unsqueeze(1) if linear_signal else products_BP.unsqueeze(2)


def _xavier_uniform(pairs: int, inputs: int, outputs: int) -> Tensor:
    """[P, inputs, outputs], each pair's matrix by itself."""
    return (torch.rand(pairs, inputs, outputs) * 2 - 1) * math.sqrt(6 / (inputs + outputs))
