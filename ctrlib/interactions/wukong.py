"""Wukong: layers of factorization machines whose output is again a set of embeddings (Zhang et al., ICML 2024,
arXiv:2403.02545)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.interactions.mlp import MLP
from ctrlib.schema import FieldLayout


class Wukong(Interaction):
    """A stack of interaction layers on the embeddings X [n, D], each with two parts side by side:

        FMB(X)  = reshape(MLP(LN(vec(X Xᵀ Y))))      n_F embeddings, from inner products; Y [n, k] is learned
        LCB(X)  = W_L X                              n_L embeddings, linear over the fields
        X_{i+1} = LN([FMB(X_i), LCB(X_i)] + W_R X_i)

    W_R is the identity where n = n_F + n_L. Layer i holds interactions of order 1 to 2^i. X Xᵀ Y is computed as X (Xᵀ Y).

    Shape: [B, F, D] → [B, n_F + n_L, D], fields ``"fmb_0"``, …, ``"lcb_0"``, …. Parameters of a layer: n·k (Y), 2·n·k (LN), the
    MLP n·k → hidden → n_F·D, n·n_L, n(n_F + n_L) where W_R is not the identity, and 2·D.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults are the smallest model of the paper's scaling study.

        Attributes:
            num_layers: interaction layers.
            num_fmb: n_F.
            num_lcb: n_L.
            fm_rank: k; ``None``: all pairs, X Xᵀ without Y.
            hidden_units: ReLU layers of the MLP in every FMB.
            dropout: after each of them.

        Raises:
            ConfigError: a size below 1, no hidden layer, a dropout outside [0, 1).
        """

        num_layers: int = 2
        num_fmb: int = 8
        num_lcb: int = 8
        fm_rank: int | None = 24
        hidden_units: tuple[int, ...] = (2048, 2048, 2048)
        dropout: float = 0.0

        def __post_init__(self) -> None:
            for name in ("num_layers", "num_fmb", "num_lcb"):
                positive(f"Wukong.{name}", getattr(self, name))
            if self.fm_rank is not None:
                positive("Wukong.fm_rank", self.fm_rank)
            positive("Wukong.hidden_units", *self.hidden_units)
            fraction("Wukong.dropout", self.dropout)
            if not self.hidden_units:
                raise ConfigError(
                    "Wukong.hidden_units is empty; expected at least one layer between inner products and embeddings"
                )

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        names = numbered("fmb", config.num_fmb) + numbered("lcb", config.num_lcb)
        counts = [layout.num_fields] + [len(names)] * (config.num_layers - 1)
        self.layers = nn.ModuleList(WukongLayer(config, count, layout.dim) for count in counts)
        self.out = FieldLayout(names, layout.dim)
        inputs = [layout.names] + [names] * (config.num_layers - 1)
        read = None if config.fm_rank is None else numbered("factor", config.fm_rank)
        self.axes = {f"fm/{i}": (before, before if read is None else read) for i, before in enumerate(inputs)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, n_F + n_L, D]."""
        for layer in self.layers:
            x_BFD = layer(x_BFD)
        return x_BFD

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"fm/0"``, … [B, n, k]: what the FM of each layer gives to its MLP."""
        shown: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            shown[f"fm/{i}"] = cast(WukongLayer, layer).fm(x_BFD)
            x_BFD = layer(x_BFD)
        return shown


class WukongLayer(nn.Module):
    """One layer of :class:`Wukong`. Shape: [B, n, D] → [B, n_F + n_L, D]."""

    def __init__(self, config: Wukong.Config, count: int, width: int) -> None:
        super().__init__()
        self.width = width
        # NOTE[DIFF] the paper also makes Y depend on the input, by an MLP that it does not describe
        self.projection = None if config.fm_rank is None else FieldLinear(count, config.fm_rank)
        interactions = count * (config.fm_rank or count)
        self.norm_fm = nn.LayerNorm(interactions)
        mlp = MLP.Config(hidden_units=config.hidden_units, output_dim=config.num_fmb * width, dropout=config.dropout)
        self.mlp = MLP(mlp, FieldLayout(("fm",), interactions))
        self.compress = FieldLinear(count, config.num_lcb)
        total = config.num_fmb + config.num_lcb
        self.residual = None if count == total else FieldLinear(count, total)
        self.norm = nn.LayerNorm(width)

    def fm(self, x_BFD: Tensor) -> Tensor:
        """X (Xᵀ Y): [B, n, D] → [B, n, k]."""
        # FieldLinear is Yᵀ X, the transpose of Xᵀ Y.
        y_BKD = x_BFD if self.projection is None else cast(Tensor, self.projection(x_BFD))
        return x_BFD @ y_BKD.transpose(1, 2)

    def forward(self, x_BFD: Tensor) -> Tensor:
        fmb_B1N = self.mlp(self.norm_fm(self.fm(x_BFD).flatten(1)))
        fmb_BFD = torch.unflatten(fmb_B1N.squeeze(1), 1, (-1, self.width))
        y_BFD = torch.cat([fmb_BFD, self.compress(x_BFD)], dim=1)
        return cast(Tensor, self.norm(y_BFD + (x_BFD if self.residual is None else self.residual(x_BFD))))


class FieldLinear(nn.Linear):
    """W X over the fields, without bias. Shape: [B, n, D] → [B, m, D]; the weight is [m, n], as of any linear layer."""

    def __init__(self, count_in: int, count_out: int) -> None:
        super().__init__(count_in, count_out, bias=False)

    def forward(self, x_BFD: Tensor) -> Tensor:
        return self.weight @ x_BFD
