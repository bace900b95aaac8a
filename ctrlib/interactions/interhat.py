"""InterHAt: a transformer layer, then attention over fields by orders (Li et al., WSDM 2020, doi:10.1145/3336191.3371785)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.schema import FieldLayout


class InterHAt(Interaction):
    """Fields read each other once, then interactions of a growing order are gathered, each into one vector:

        x¹      = LN(FFN(t) + t),  t = LN(ReLU([softmax_k(q_m·k_k / √d) v_k]_heads W_O) + x)
        u_p     = Σ_f a^p_f x^p_f,    a^p = softmax over fields of c_pᵀ ReLU(W_p x^p_f + b_p)      attention of order p
        x^{p+1} = u_p ⊙ x¹ + x^p
        y       = Σ_p a_p u_p,        a   = softmax over orders of cᵀ ReLU(W u_p + b)

    Shape: [B, F, D] → [B, 1, D], field ``"interhat"``. Parameters without biases of the projections, A = num_heads · head_dim
    and G = ``hidden_dim``: 4·D·A (W_O included) + 8·D² + 9·D (FFN and two norms: 4·D hidden units) + (order + 1)·(G·D + 2·G).
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            num_heads: of the transformer layer.
            head_dim: d, width of one head.
            order: highest order of interaction.
            hidden_dim: width of the attention over fields and over orders; ``None``: 4·D.
            projection_activation: of queries, keys and values; with a ReLU they and W_O have biases.
            output: ``"if_needed"`` leaves out W_O where the heads are together as wide as D.
            attention_dropout: on the attention between fields.

        Raises:
            ConfigError: a size below 1, a dropout outside [0, 1).
        """

        num_heads: int = 4
        head_dim: int = 8
        order: int = 3
        hidden_dim: int | None = None
        projection_activation: Literal["none", "relu"] = "none"
        output: Literal["always", "if_needed"] = "always"
        attention_dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("InterHAt.num_heads", self.num_heads)
            positive("InterHAt.head_dim", self.head_dim)
            positive("InterHAt.order", self.order)
            if self.hidden_dim is not None:
                positive("InterHAt.hidden_dim", self.hidden_dim)
            fraction("InterHAt.attention_dropout", self.attention_dropout)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        dim, width = layout.dim, config.num_heads * config.head_dim
        hidden = 4 * dim if config.hidden_dim is None else config.hidden_dim
        relu = config.projection_activation == "relu"

        def projection() -> nn.Module:
            linear = nn.Linear(dim, width, bias=relu)
            return nn.Sequential(linear, nn.ReLU()) if relu else linear

        self.num_heads = config.num_heads
        self.scale = 1 / math.sqrt(config.head_dim)
        self.query, self.key, self.value = projection(), projection(), projection()
        has_output = config.output == "always" or width != dim
        self.output = nn.Linear(width, dim, bias=relu) if has_output else None
        self.dropout = Dropout(config.attention_dropout)
        # NOTE[DIFF] torch's ε of 1e-5; the authors' code adds 1e-8 to the variance.
        self.norm_attention, self.norm_ffn = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.ReLU(), nn.Linear(4 * dim, dim))
        self.fields = nn.ModuleList(Aggregation(dim, hidden) for _ in range(config.order))
        self.orders = Aggregation(dim, hidden)
        self.out = FieldLayout(("interhat",), dim)
        self.axes = {"attention": (numbered("head", config.num_heads), layout.names, layout.names)}
        self.axes |= {f"fields/{p}": (layout.names,) for p in range(1, config.order + 1)}
        self.axes |= {"orders": (tuple(f"order_{p}" for p in range(1, config.order + 1)),)}

    def heads(self, y_BFA: Tensor) -> Tensor:
        """[B, F, A] → [B, H, F, A/H]."""
        return torch.unflatten(y_BFA, -1, (self.num_heads, -1)).transpose(1, 2)

    def attention(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → weights [B, H, F, F]; each row sums to 1."""
        query_BHFd, key_BHFd = self.heads(self.query(x_BFD)) * self.scale, self.heads(self.key(x_BFD))
        # Keys on the last axis but one: a CPU's softmax over a short last axis is several times slower.
        return (key_BHFd @ query_BHFd.transpose(-2, -1)).softmax(dim=-2).transpose(-2, -1)

    def transform(self, x_BFD: Tensor) -> Tensor:
        """The transformer layer, [B, F, D] → [B, F, D]."""
        value_BHFd = self.heads(self.value(x_BFD))
        attention_BHFF = self.dropout(self.attention(x_BFD)).to(value_BHFd.dtype)
        y_BFA = (attention_BHFF @ value_BHFd).transpose(1, 2).flatten(2)
        y_BFD = (y_BFA if self.output is None else cast(Tensor, self.output(y_BFA))).relu()
        y_BFD = self.norm_attention(y_BFD + x_BFD)
        return cast(Tensor, self.norm_ffn(self.ffn(y_BFD) + y_BFD))

    def hierarchy(self, x_BFD: Tensor) -> tuple[Tensor, list[Tensor]]:
        """[B, F, D] → y [B, 1, D], and the weights: [B, F] for every order, then [B, order] over them."""
        first_BFD = self.transform(x_BFD)
        x_BFD = first_BFD
        gathered: list[Tensor] = []
        weights: list[Tensor] = []
        for p, aggregation in enumerate(self.fields):
            if p:
                x_BFD = gathered[-1] * first_BFD + x_BFD
            u_B1D, weights_BF = aggregation(x_BFD)
            gathered.append(u_B1D)
            weights.append(weights_BF)
        y_B1D, weights_BP = self.orders(torch.cat(gathered, dim=1))
        return y_B1D, [*weights, weights_BP]

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, D]."""
        return self.hierarchy(x_BFD)[0]

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"attention"`` [B, H, F, F] before dropout, ``"fields/1"``, ``"fields/2"``, … [B, F]: what every order reads of the
        fields, and ``"orders"`` [B, order]."""
        *fields, orders_BP = self.hierarchy(x_BFD)[1]
        shown = {f"fields/{p}": weights_BF for p, weights_BF in enumerate(fields, start=1)}
        return {"attention": self.attention(x_BFD), **shown, "orders": orders_BP}


class Aggregation(nn.Module):
    """Σ_n a_n x_n with a = softmax over n of cᵀ ReLU(W x_n + b). Shape: [B, N, D] → [B, 1, D], a [B, N]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(dim, hidden)
        self.context = nn.Linear(hidden, 1, bias=False)

    def forward(self, x_BND: Tensor) -> tuple[Tensor, Tensor]:
        weights_BN = cast(Tensor, self.context(self.hidden(x_BND).relu())).squeeze(-1).softmax(dim=-1)
        return weights_BN.to(x_BND.dtype).unsqueeze(1) @ x_BND, weights_BN
