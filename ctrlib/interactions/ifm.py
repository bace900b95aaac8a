"""Input-aware factorization machine: the row decides how much each of its fields counts (Yu, Wang & Yuan, IJCAI 2019,
doi:10.24963/ijcai.2019/203)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.interactions.fm import FM
from ctrlib.interactions.mlp import MLP
from ctrlib.interactions.pairs import pair_labels
from ctrlib.schema import FieldLayout

NETWORK = MLP.Config(hidden_units=(256, 128))


class IFM(Interaction):
    """A factorization machine of weights w_i and vectors v_i that are first multiplied by a factor per field,

        m = F · softmax(P MLP(vec(v)))                            positive, with a mean of 1
        y = w_0 + Σ_i m_i w_i + Σ_{i<j} ⟨m_i v_i, m_j v_j⟩

    where x_i = [w_i, v_i]: the first coordinate of an embedding is its weight, so ``embedding.dim`` is 1 + k. Shape:
    [B, F, 1 + k] → [B, 1, 1], field ``"ifm"``. Parameters: the MLP's, F times its last width (P), and 1.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; ``network`` is the MLP, without an output layer: P is that.

        Raises:
            ConfigError: ``network`` with an ``output_dim``.
        """

        network: MLP.Config = NETWORK

        def __post_init__(self) -> None:
            if self.network.output_dim is not None:
                raise ConfigError(
                    f"IFM.network.output_dim is {self.network.output_dim}; expected None: the factors are the output. "
                    "Put that width last in hidden_units instead"
                )

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        if layout.dim < 2:
            raise ConfigError(f"IFM reads a weight and a vector per value, but the width is {layout.dim}; expected 2 or more")
        vectors = FieldLayout(layout.names, layout.dim - 1)
        self.network = MLP(config.network, vectors)
        self.factor = nn.Linear(self.network.out.width, layout.num_fields, bias=False)
        self.fm = FM(FM.Config(), vectors)
        self.bias = nn.Parameter(torch.zeros(1))
        self.out = FieldLayout(("ifm",), 1)
        self.axes = {"factor": (layout.names,), "field": (layout.names,), "pair": (pair_labels(layout.names),)}

    def factors(self, x_BFD: Tensor) -> Tensor:
        """[B, F, 1 + k] → m [B, F]."""
        hidden_BN = self.network(x_BFD[:, :, 1:]).flatten(1)
        return x_BFD.shape[1] * cast(Tensor, self.factor(hidden_BN)).softmax(dim=-1)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, 1 + k] → [B, 1, 1]."""
        scaled_BFD = x_BFD * self.factors(x_BFD).unsqueeze(-1)
        return scaled_BFD[:, :, :1].sum(dim=1, keepdim=True) + self.fm(scaled_BFD[:, :, 1:]) + self.bias

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"factor"`` [B, F], m; and what adds up to the logit, without w_0: ``"field"`` [B, F] and ``"pair"`` [B, P]."""
        factor_BF = self.factors(x_BFD)
        scaled_BFD = x_BFD * factor_BF.unsqueeze(-1)
        return {"factor": factor_BF, "field": scaled_BFD[:, :, 0], **self.fm.explain(scaled_BFD[:, :, 1:])}
