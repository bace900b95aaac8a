"""FT-Transformer: a Transformer over field tokens, read off a CLS token (Gorishniy et al., NeurIPS 2021, arXiv:2106.11959)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.schema import FieldLayout


class FTTransformer(Interaction):
    """Pre-norm Transformer layers over [CLS, x_1 + b_1, …, x_F + b_F], with a learned vector CLS and a bias b_f per field:

        t ← t + MHSA(LN(t));   t ← t + ReGLU-FFN(LN(t));   y = ReLU(LN(t_CLS))

    The first layer has no norm before attention; ReGLU-FFN(x) = W_2 (u ⊙ ReLU(v)) + b_2 with [u, v] = W_1 x + b_1. The last
    layer computes the CLS token only, which is all that is read. A linear layer on y is the paper's prediction.

    Shape: [B, F, D] → [B, 1, D], field ``"cls"``. Parameters: 4(D² + D) + 3·D·h + 2h + D per layer with its FFN of width h,
    norms of 2·D each (two per layer, one less in the first, one at the end), and (F + 1)·D for biases and CLS.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults are the paper's.

        Attributes:
            num_layers: Transformer layers.
            num_heads: attention heads; must divide D.
            ffn_dim: h; ``None`` for ⌊4/3·D⌋.
            attention_dropout: on the attention weights.
            ffn_dropout: on the hidden units of the FFN.
            residual_dropout: on what attention and FFN return.

        Raises:
            ConfigError: a size below 1, a dropout outside [0, 1).
        """

        num_layers: int = 3
        num_heads: int = 8
        ffn_dim: int | None = None
        attention_dropout: float = 0.2
        ffn_dropout: float = 0.1
        residual_dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("FTTransformer.num_layers", self.num_layers)
            positive("FTTransformer.num_heads", self.num_heads)
            if self.ffn_dim is not None:
                positive("FTTransformer.ffn_dim", self.ffn_dim)
            for name in ("attention_dropout", "ffn_dropout", "residual_dropout"):
                fraction(f"FTTransformer.{name}", getattr(self, name))

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        if layout.dim % config.num_heads:
            raise ConfigError(
                f"FTTransformer.num_heads is {config.num_heads}, which does not divide the embedding dim {layout.dim}; "
                "choose a divisor"
            )
        bound = 1 / math.sqrt(layout.dim)
        self.cls = nn.Parameter(torch.empty(layout.dim).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(layout.num_fields, layout.dim).uniform_(-bound, bound))
        self.layers = nn.ModuleList(FTLayer(config, layout.dim, first=i == 0) for i in range(config.num_layers))
        self.norm = nn.LayerNorm(layout.dim)
        self.out = FieldLayout(("cls",), layout.dim)
        heads, tokens, last = numbered("head", config.num_heads), ("cls", *layout.names), config.num_layers - 1
        self.axes = {f"attention/{i}": (heads, tokens if i < last else tokens[:1], tokens) for i in range(config.num_layers)}
        self.axes |= {"fields": (layout.names,)}

    def tokens(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1 + F, D], CLS first."""
        return torch.cat([self.cls.expand(x_BFD.shape[0], 1, -1), x_BFD + self.bias], dim=1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, D]."""
        t_BLD = self.tokens(x_BFD)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            t_BLD = layer(t_BLD, 1 if i == last else t_BLD.shape[1])
        return F.relu(self.norm(t_BLD))

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """Attention weights before dropout: ``"attention/0"``, … [B, H, 1 + F, 1 + F], of the last layer [B, H, 1, 1 + F]; CLS
        is the first token. ``"fields"`` [B, F]: what CLS reads of every field, averaged over heads and layers."""
        shown: dict[str, Tensor] = {}
        t_BLD = self.tokens(x_BFD)
        last = len(self.layers) - 1
        for i, layer in enumerate(self.layers):
            count = 1 if i == last else t_BLD.shape[1]
            shown[f"attention/{i}"] = cast(FTLayer, layer).attention(cast(FTLayer, layer).norm_attention(t_BLD), count)
            t_BLD = layer(t_BLD, count)
        return shown | {"fields": torch.stack([a[:, :, 0, 1:].mean(dim=1) for a in shown.values()]).mean(dim=0)}


class FTLayer(nn.Module):
    """One layer of :class:`FTTransformer`, for the first ``count`` tokens. Shape: [B, L, D] → [B, count, D]."""

    def __init__(self, config: FTTransformer.Config, width: int, *, first: bool) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.scale = math.sqrt(config.num_heads / width)
        ffn_dim = config.ffn_dim or width * 4 // 3
        self.norm_attention: nn.Module = nn.Identity() if first else nn.LayerNorm(width)
        self.query, self.key, self.value, self.output = (nn.Linear(width, width) for _ in range(4))
        for linear in (self.query, self.key, self.value, self.output):
            nn.init.zeros_(linear.bias)
        self.norm_ffn = nn.LayerNorm(width)
        self.ffn_in = nn.Linear(width, 2 * ffn_dim)
        self.ffn_out = nn.Linear(ffn_dim, width)
        self.attention_dropout = Dropout(config.attention_dropout)
        self.ffn_dropout = Dropout(config.ffn_dropout)
        self.residual_dropout = Dropout(config.residual_dropout)

    def heads(self, y_BLD: Tensor) -> Tensor:
        """[B, L, D] → [B, H, L, D/H]."""
        return torch.unflatten(y_BLD, -1, (self.num_heads, -1)).transpose(1, 2)

    def attention(self, x_BLD: Tensor, count: int) -> Tensor:
        """[B, L, D] → weights [B, H, count, L]; each row sums to 1."""
        query_BHQd = self.heads(self.query(x_BLD[:, :count])) * self.scale
        # Keys on the last axis but one: a CPU's softmax over a short last axis is several times slower.
        return (self.heads(self.key(x_BLD)) @ query_BHQd.transpose(-2, -1)).softmax(dim=-2).transpose(-2, -1)

    def forward(self, t_BLD: Tensor, count: int) -> Tensor:
        x_BLD = self.norm_attention(t_BLD)
        mixed_BHQd = self.attention_dropout(self.attention(x_BLD, count)) @ self.heads(self.value(x_BLD))
        t_BQD = t_BLD[:, :count] + self.residual_dropout(self.output(mixed_BHQd.transpose(1, 2).flatten(2)))
        u, v = self.ffn_in(self.norm_ffn(t_BQD)).chunk(2, dim=-1)
        return cast(Tensor, t_BQD + self.residual_dropout(self.ffn_out(self.ffn_dropout(u * F.relu(v)))))
