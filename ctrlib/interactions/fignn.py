"""FiGNN: the fields as nodes of a graph that exchange messages (Li et al., CIKM 2019, arXiv:1910.05552)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import positive
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.interactions.pairs import check_pairs
from ctrlib.schema import FieldLayout


class FiGNN(Interaction):
    """The edge weights are computed once from the input, and the nodes' states h^0 = x are updated in steps:

        A_ij    = softmax_{j≠i} LeakyReLU(wᵀ [x_i, x_j])
        m_i     = Σ_{j≠i} A_ij W_in^i W_out^j h_j^{t−1} + b          every node has its own W_in and W_out
        h_i^t   = GRU(m_i, h_i^{t−1}) + x_i

    Shape: [B, F, D] → [B, F, D], names kept. Parameters: 2·D for w; 2·F·D² + D, times ``num_layers`` unless the layers are
    shared; 6·D² + 6·D for the GRU.

    In the paper a self-attention layer comes before it, and :class:`AttentionalScore` after it.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults are the paper's equations.

        Attributes:
            num_layers: steps; the paper tunes them per data set.
            share_layers: one W_in, W_out, b for all steps; FuxiCTR has its own for each.
            gru: without it h_i^t = m_i + h_i^{t−1} + x_i; the BARS numbers are without.
            residual: the "+ x_i".

        Raises:
            ConfigError: ``num_layers`` below 1.
        """

        num_layers: int = 3
        share_layers: bool = True
        gru: bool = True
        residual: bool = True

        def __post_init__(self) -> None:
            positive("FiGNN.num_layers", self.num_layers)

    diagonal: Tensor

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        check_pairs("FiGNN", layout)
        self.num_layers = config.num_layers
        self.residual = config.residual
        self.attention = nn.Linear(2 * layout.dim, 1, bias=False)
        self.layers = nn.ModuleList(MessageLayer(layout) for _ in range(1 if config.share_layers else config.num_layers))
        self.gru = GRU(layout.dim) if config.gru else None
        self.register_buffer("diagonal", torch.eye(layout.num_fields, dtype=torch.bool), persistent=False)
        self.out = layout
        self.axes = {"attention": (layout.names, layout.names)}

    def graph(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → A [B, F, F]; row i says what field i listens to."""
        # wᵀ [x_i, x_j] is a sum of one number per field. The j on the last axis but one, where a CPU's softmax is faster.
        own_BF, other_BF = (x_BFD @ w_D for w_D in self.attention.weight[0].chunk(2))
        logits_BFF = F.leaky_relu(own_BF.unsqueeze(1) + other_BF.unsqueeze(2))
        return logits_BFF.masked_fill(self.diagonal, -torch.inf).softmax(dim=1).transpose(1, 2)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F, D]."""
        graph_BFF = self.graph(x_BFD)
        h_BFD = x_BFD
        for step in range(self.num_layers):
            message_BFD = self.layers[step % len(self.layers)](graph_BFF, h_BFD)
            h_BFD = message_BFD + h_BFD if self.gru is None else self.gru(message_BFD, h_BFD)
            if self.residual:
                h_BFD = h_BFD + x_BFD
        return h_BFD

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"attention"`` [B, F, F], the edge weights A; row i says what field i listens to."""
        return {"attention": self.graph(x_BFD)}


class MessageLayer(nn.Module):
    """m_i = W_in^i Σ_j A_ij W_out^j h_j + b. Shape: A [B, F, F], h [B, F, D] → [B, F, D]. Parameters: 2·F·D² + D.

    Xavier normal matrix by matrix; FuxiCTR computes it from the stack of F matrices, and so starts smaller.
    """

    def __init__(self, layout: FieldLayout) -> None:
        super().__init__()
        shape, std = (layout.num_fields, layout.dim, layout.dim), layout.dim**-0.5
        self.weight_in = nn.Parameter(std * torch.randn(shape))
        self.weight_out = nn.Parameter(std * torch.randn(shape))
        self.bias = nn.Parameter(torch.zeros(layout.dim))

    def forward(self, graph_BFF: Tensor, h_BFD: Tensor) -> Tensor:
        sent_BFD = torch.einsum("bfd,fed->bfe", h_BFD, self.weight_out)
        return torch.einsum("bfd,fed->bfe", graph_BFF @ sent_BFD, self.weight_in) + self.bias


class GRU(nn.Module):
    """torch's GRUCell over the last axis of any tensor: with r, z = σ(U m + V h) and n = tanh(U_n m + r ⊙ V_n h),
    (1 − z) ⊙ n + z ⊙ h. Shape: m, h [..., D] → [..., D]. Parameters: 6·D² + 6·D."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.input = nn.Linear(dim, 3 * dim)
        self.hidden = nn.Linear(dim, 3 * dim)

    def forward(self, m_BFD: Tensor, h_BFD: Tensor) -> Tensor:
        reset_m, update_m, new_m = self.input(m_BFD).chunk(3, dim=-1)
        reset_h, update_h, new_h = self.hidden(h_BFD).chunk(3, dim=-1)
        update = torch.sigmoid(update_m + update_h)
        new = torch.tanh(new_m + torch.sigmoid(reset_m + reset_h) * new_h)
        return (1 - update) * new + update * h_BFD


class AttentionalScore(Interaction):
    """FiGNN's prediction: every field scores the row, and the fields' weights depend on all of them,

        y = Σ_i a_i s_i,   s_i = wᵀ x_i,   a = σ(W vec(x)) with W of shape [F, F·D]

    Shape: [B, F, D] → [B, 1, 1], field ``"score"``. Parameters: D + F²·D. σ is FuxiCTR's; the paper leaves both networks open.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """No options."""

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.score = nn.Linear(layout.dim, 1, bias=False)
        self.weight = nn.Linear(layout.width, layout.num_fields, bias=False)
        self.out = FieldLayout(("score",), 1)
        self.axes = {"score": (layout.names,), "weight": (layout.names,)}

    def scores(self, x_BFD: Tensor) -> tuple[Tensor, Tensor]:
        """s and a, both [B, F]."""
        weight_BF = cast(Tensor, self.weight(x_BFD.flatten(1))).sigmoid()
        return cast(Tensor, self.score(x_BFD)).squeeze(-1), weight_BF

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, 1]."""
        score_BF, weight_BF = self.scores(x_BFD)
        return (weight_BF * score_BF).sum(dim=-1)[:, None, None]

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"score"`` and ``"weight"`` [B, F]; the logit is the sum of their products."""
        return dict(zip(("score", "weight"), self.scores(x_BFD), strict=True))
