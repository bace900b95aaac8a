"""DESTINE: self-attention between fields, split into pairs and single fields (Xu et al., CIKM 2021, arXiv:2101.03654)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.interactions.pairs import check_pairs
from ctrlib.schema import FieldLayout


class Destine(Interaction):
    """A stack of disentangled self-attention layers. Per head, with the means μ over the fields,

        α_mk = softmax_k ⟨q_m − μ_q, k_k − μ_k⟩ + softmax_k u_k        whitened pair, and unary term of the field read
        y_m  = [Σ_k α_mk v_k]_heads [+ W_res x_m + b_res]

    q, k, v and u (one number per head) are linear in x. The residual is in every layer, or once over the whole stack. Rows of
    α sum to 2.

    Shape: [B, F, D] → [B, F, A] with A = num_heads · head_dim, field names kept. Parameters per layer of input width D:
    3·D·A + A + D·num_heads, 2·A more with ReLU projections; D·A + A for a residual.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            num_layers: attention layers.
            num_heads: attention heads.
            head_dim: width of one head.
            residual: in ``"each_layer"``, or once from the input to the ``"last_layer"``.
            scale: divide the pairs' scores by √head_dim.
            projection_activation: of queries, keys and values; with a ReLU queries and keys have biases.
            final_relu: a ReLU on the output of the stack.
            attention_dropout: on the attention weights.

        Raises:
            ConfigError: a size below 1, a dropout outside [0, 1).
        """

        num_layers: int = 2
        num_heads: int = 2
        head_dim: int = 32
        residual: Literal["none", "each_layer", "last_layer"] = "last_layer"
        scale: bool = False
        projection_activation: Literal["none", "relu"] = "none"
        final_relu: bool = True
        attention_dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("Destine.num_layers", self.num_layers)
            positive("Destine.num_heads", self.num_heads)
            positive("Destine.head_dim", self.head_dim)
            fraction("Destine.attention_dropout", self.attention_dropout)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        check_pairs("Destine", layout)
        width = config.num_heads * config.head_dim
        widths = [layout.dim] + [width] * (config.num_layers - 1)
        self.layers = nn.ModuleList(DisentangledLayer(config, width_in) for width_in in widths)
        self.residual = nn.Linear(layout.dim, width) if config.residual == "last_layer" else None
        self.final_relu = config.final_relu
        self.out = FieldLayout(layout.names, width)
        heads = numbered("head", config.num_heads)
        self.axes = {}
        for i in range(config.num_layers):
            self.axes |= {f"pairs/{i}": (heads, layout.names, layout.names), f"unary/{i}": (heads, layout.names)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F, A]."""
        y_BFA = x_BFD
        for layer in self.layers:
            y_BFA = layer(y_BFA)
        if self.residual is not None:
            y_BFA = y_BFA + self.residual(x_BFD)
        return y_BFA.relu() if self.final_relu else y_BFA

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """Of every layer, before dropout: ``"pairs/0"``, ... [B, H, F, F], row m what field m reads, and ``"unary/0"``, ...
        [B, H, F], what all fields read; each sums to 1."""
        shown: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            shown[f"pairs/{i}"], shown[f"unary/{i}"] = cast(DisentangledLayer, layer).attention(x_BFD)
            x_BFD = layer(x_BFD)
        return shown


class DisentangledLayer(nn.Module):
    """One layer of :class:`Destine`. Shape: [B, F, D] → [B, F, A]."""

    def __init__(self, config: Destine.Config, width_in: int) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.relu_projections = config.projection_activation == "relu"
        self.scale = 1 / math.sqrt(config.head_dim) if config.scale else None
        # NOTE[DIFF] released code has biases everywhere. Those of u cancel in its softmax, and without a ReLU the queries' are
        # subtracted with their mean and the keys' cancel like the keys' mean: they could never learn.
        self.query = nn.Linear(width_in, width, bias=self.relu_projections)
        self.key = nn.Linear(width_in, width, bias=self.relu_projections)
        self.value = nn.Linear(width_in, width)
        self.unary = nn.Linear(width_in, config.num_heads, bias=False)
        self.residual = nn.Linear(width_in, width) if config.residual == "each_layer" else None
        # NOTE[DIFF] the authors' code drops out when scoring too; here, as in FuxiCTR, in training only.
        self.dropout = Dropout(config.attention_dropout)

    def heads(self, linear: nn.Linear, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → projected [B, H, F, A/H]."""
        y_BFA = cast(Tensor, linear(x_BFD))
        y_BFA = y_BFA.relu() if self.relu_projections else y_BFA
        return torch.unflatten(y_BFA, -1, (self.num_heads, -1)).transpose(1, 2)

    def attention(self, x_BFD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F, D] → pairs [B, H, F, F] and unary [B, H, F]."""
        query_BHFd, key_BHFd = self.heads(self.query, x_BFD), self.heads(self.key, x_BFD)
        # The keys' mean shifts all scores of a row alike, which its softmax ignores; only the queries' has to go.
        query_BHFd = query_BHFd - query_BHFd.mean(dim=2, keepdim=True)
        if self.scale is not None:
            query_BHFd = query_BHFd * self.scale
        # Keys on the last axis but one: a CPU's softmax over a short last axis is several times slower.
        pairs_BHFF = (key_BHFd @ query_BHFd.transpose(-2, -1)).softmax(dim=-2).transpose(-2, -1)
        return pairs_BHFF, cast(Tensor, self.unary(x_BFD)).softmax(dim=1).transpose(1, 2)

    def forward(self, x_BFD: Tensor) -> Tensor:
        pairs_BHFF, unary_BHF = self.attention(x_BFD)
        value_BHFd = self.heads(self.value, x_BFD)
        attention_BHFF = self.dropout(pairs_BHFF + unary_BHF.unsqueeze(2)).to(value_BHFd.dtype)
        y_BFA: Tensor = (attention_BHFF @ value_BHFd).transpose(1, 2).flatten(2)
        return y_BFA if self.residual is None else y_BFA + cast(Tensor, self.residual(x_BFD))
