"""AutoInt: self-attention between fields (Song et al., CIKM 2019, arXiv:1810.11921).

Three published flavours differ and give different numbers; all are settings of one block:

===================== ================= ======================================== =====================
option                paper (default)   authors' code                            FuxiCTR (BARS numbers)
===================== ================= ======================================== =====================
bias                  no                yes                                      no
projection_activation none              relu (queries, keys, values, residual)   none
scale                 no                yes                                      either
residual              linear_always     linear_always                            linear_if_needed
norm                  none              after_relu, norm_eps 1e-8                none or before_relu
head_split            columns           columns                                  rows
===================== ================= ======================================== =====================

The paper's parameter counts (39,361 on Criteo) hold for the first column only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.schema import FieldLayout


class AutoInt(Interaction):
    """A stack of interacting layers. With A = num_heads · head_dim and x of width A after the first layer, each layer is

        α^h_mk = softmax_k ⟨x_m W_Q^h, x_k W_K^h⟩        per head h, self included
        y_m    = ReLU([Σ_k α^h_mk x_k W_V^h]_h + x_m W_Res)

    Shape: [B, F, D] → [B, F, A], field names kept; ``num_layers=0`` is the identity. Parameters: 4·D·A + 4·A² per later layer.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults are the paper's equations and sizes.

        Attributes:
            num_layers: interacting layers; 0 leaves the input as it is.
            num_heads: attention heads.
            head_dim: width of *one* head.
            bias: a bias in every projection, the residual's included.
            projection_activation: applied to every projection, the residual's included.
            scale: divide the scores by √head_dim.
            residual: ``"linear_always"`` has W_Res in every layer, ``"linear_if_needed"`` adds the input itself where its
                width is already A.
            norm: LayerNorm after or before the final ReLU of each layer.
            norm_eps: its epsilon.
            attention_dropout: on the attention weights.
            head_split: what a head sees of the projected [F, A] matrix: its own ``"columns"`` of all fields, or as in FuxiCTR 1
                (behind the BARS numbers) a run of F of its F·H row pieces, which are those of neighbouring fields.

        Raises:
            ConfigError: a size below 1, a negative number of layers, a dropout outside [0, 1).
        """

        num_layers: int = 3
        num_heads: int = 2
        head_dim: int = 32
        bias: bool = False
        projection_activation: Literal["none", "relu"] = "none"
        scale: bool = False
        residual: Literal["none", "linear_always", "linear_if_needed"] = "linear_always"
        norm: Literal["none", "after_relu", "before_relu"] = "none"
        norm_eps: float = 1e-5
        attention_dropout: float = 0.0
        head_split: Literal["columns", "rows"] = "columns"

        def __post_init__(self) -> None:
            if self.num_layers < 0:
                raise ConfigError(f"AutoInt.num_layers is {self.num_layers}; expected 0 (the identity) or more")
            positive("AutoInt.num_heads", self.num_heads)
            positive("AutoInt.head_dim", self.head_dim)
            positive("AutoInt.norm_eps", self.norm_eps)
            fraction("AutoInt.attention_dropout", self.attention_dropout)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        widths = [layout.dim] + [width] * config.num_layers
        self.layers = nn.ModuleList(InteractingLayer(config, width_in) for width_in in widths[:-1])
        self.out = FieldLayout(layout.names, widths[-1])
        read = layout.names if config.head_split == "columns" else numbered("piece", layout.num_fields)
        self.axes = {f"attention/{i}": (numbered("head", config.num_heads), read, read) for i in range(config.num_layers)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F, A]."""
        for layer in self.layers:
            x_BFD = layer(x_BFD)
        return x_BFD

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """Attention weights before dropout: ``"attention/0"``, ... of shape [B, H, F, F]; row m says what field m reads
        (with ``head_split="rows"``, what piece m of the head's run reads)."""
        shown: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            shown[f"attention/{i}"] = cast(InteractingLayer, layer).attention(x_BFD)
            x_BFD = layer(x_BFD)
        return shown


class InteractingLayer(nn.Module):
    """One layer of :class:`AutoInt`. Shape: [B, F, D] → [B, F, A]."""

    def __init__(self, config: AutoInt.Config, width_in: int) -> None:
        super().__init__()
        width = config.num_heads * config.head_dim
        self.num_heads = config.num_heads
        self.split_columns = config.head_split == "columns"
        self.relu_projections = config.projection_activation == "relu"
        self.scale = 1 / math.sqrt(config.head_dim) if config.scale else None  # NOTE[DIFF] the paper never scales
        self.query = nn.Linear(width_in, width, bias=config.bias)  # NOTE[DIFF] biases are the authors' code, not the paper
        self.key = nn.Linear(width_in, width, bias=config.bias)
        self.value = nn.Linear(width_in, width, bias=config.bias)
        self.has_residual = config.residual != "none"
        has_linear = config.residual == "linear_always" or (config.residual == "linear_if_needed" and width_in != width)
        self.residual = nn.Linear(width_in, width, bias=config.bias) if has_linear else None
        # NOTE[DIFF] no normalisation in the paper: after the ReLU in the authors' code, before it in FuxiCTR.
        self.norm_before = nn.LayerNorm(width, eps=config.norm_eps) if config.norm == "before_relu" else None
        self.norm_after = nn.LayerNorm(width, eps=config.norm_eps) if config.norm == "after_relu" else None
        self.dropout = Dropout(config.attention_dropout)

    def project(self, linear: nn.Module, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F, A] by one of the four projections."""
        y_BFA = cast(Tensor, linear(x_BFD))
        return F.relu(y_BFA) if self.relu_projections else y_BFA  # NOTE[DIFF] ReLU here is the authors' code, not the paper

    def heads(self, y_BFA: Tensor) -> Tensor:
        """[B, F, A] → [B, H, F, A/H]."""
        if self.split_columns:
            return torch.unflatten(y_BFA, -1, (self.num_heads, -1)).transpose(1, 2)
        # NOTE[DIFF] FuxiCTR 1 reshapes without the transpose, so a head mixes pieces of neighbouring fields
        return torch.unflatten(y_BFA.flatten(1), 1, (self.num_heads, y_BFA.shape[1], -1))

    def merge(self, y_BHFd: Tensor) -> Tensor:
        """[B, H, F, A/H] → [B, F, A], the inverse of :meth:`heads`."""
        y_BFHd = y_BHFd.transpose(1, 2) if self.split_columns else y_BHFd
        return torch.unflatten(y_BFHd.flatten(1), 1, (y_BHFd.shape[2], -1))

    def attention(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → weights [B, H, F, F]; each row sums to 1."""
        query_BHFd = self.heads(self.project(self.query, x_BFD))
        key_BHFd = self.heads(self.project(self.key, x_BFD))
        if self.scale is not None:
            query_BHFd = query_BHFd * self.scale
        # Keys on the last axis but one: a CPU's softmax over a short last axis is several times slower.
        return (key_BHFd @ query_BHFd.transpose(-2, -1)).softmax(dim=-2).transpose(-2, -1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        # Plain products, not scaled_dot_product_attention: for some 40 fields that is slower on a CPU.
        value_BHFd = self.heads(self.project(self.value, x_BFD))
        y_BFA = self.merge(self.dropout(self.attention(x_BFD)) @ value_BHFd)
        if self.has_residual:
            y_BFA = y_BFA + (x_BFD if self.residual is None else self.project(self.residual, x_BFD))
        if self.norm_before is not None:
            y_BFA = self.norm_before(y_BFA)
        y_BFA = F.relu(y_BFA)
        return y_BFA if self.norm_after is None else cast(Tensor, self.norm_after(y_BFA))
