"""RankMixer: tokens that exchange their pieces without parameters, and an FFN for each (Zhu et al., CIKM 2025,
arXiv:2507.15551)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.token_linear import TokenLinear
from ctrlib.schema import FieldLayout


class RankMixer(Interaction):
    """vec(x) is cut into T pieces of one width, projected to tokens X_0 [T, D'], then in every layer, with LN over D',

        S   = LN(Mix(X) + X),      Mix(X)_h = [piece h of x_1, …, piece h of x_T], all tokens cut into H = T pieces
        X   = LN(PFFN(S) + S),     PFFN_t(s) = GELU(s W_t1 + b_t1) W_t2 + b_t2, of hidden width k·D', for each token its own

    and the mean over the tokens at the end. Shape: [B, F, D] → [B, 1, D'], field ``"rank_mixer"``. Parameters: T·⌈F·D/T⌉·D' +
    T·D' and per layer 2k·T·D'² + (k + 1)·T·D' + 4·D'.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults have the sizes of the paper's smaller model, all but the factor, which it does not state.

        Attributes:
            num_tokens: T; must divide ``token_dim``.
            token_dim: D'.
            num_layers: mixing layers.
            ffn_factor: k.
            dropout: on what the FFNs return.

        Raises:
            ConfigError: a size below 1, T does not divide D', a dropout outside [0, 1).
        """

        num_tokens: int = 16
        token_dim: int = 768
        num_layers: int = 2
        ffn_factor: int = 4
        dropout: float = 0.0

        def __post_init__(self) -> None:
            for name in ("num_tokens", "token_dim", "num_layers", "ffn_factor"):
                positive(f"RankMixer.{name}", getattr(self, name))
            fraction("RankMixer.dropout", self.dropout)
            if self.token_dim % self.num_tokens:
                raise ConfigError(
                    f"RankMixer.num_tokens is {self.num_tokens}, which does not divide token_dim {self.token_dim}; "
                    "every token is cut into as many pieces as there are tokens"
                )

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.num_tokens = config.num_tokens
        piece = -(-layout.width // config.num_tokens)
        self.padding = piece * config.num_tokens - layout.width
        # NOTE[DIFF] the paper groups fields by meaning before cutting; here their order in the layout decides
        self.tokenize = TokenLinear(config.num_tokens, piece, config.token_dim, bias=True)
        self.layers = nn.ModuleList(RankMixerLayer(config) for _ in range(config.num_layers))
        self.out = FieldLayout(("rank_mixer",), config.token_dim)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, D']."""
        x_BTN = torch.unflatten(F.pad(x_BFD.flatten(1), (0, self.padding)), 1, (self.num_tokens, -1))
        x_BTD = cast(Tensor, self.tokenize(x_BTN))
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        return x_BTD.mean(dim=1, keepdim=True)


class RankMixerLayer(nn.Module):
    """One layer of :class:`RankMixer`. Shape: [B, T, D'] → [B, T, D']."""

    def __init__(self, config: RankMixer.Config) -> None:
        super().__init__()
        width, hidden = config.token_dim, config.ffn_factor * config.token_dim
        self.norm_mix = nn.LayerNorm(width)
        self.norm_ffn = nn.LayerNorm(width)
        self.ffn = nn.Sequential(
            TokenLinear(config.num_tokens, width, hidden, bias=True),
            nn.GELU(),
            TokenLinear(config.num_tokens, hidden, width, bias=True),
            Dropout(config.dropout),
        )

    def forward(self, x_BTD: Tensor) -> Tensor:
        mixed_BTD = torch.unflatten(x_BTD, 2, (x_BTD.shape[1], -1)).transpose(1, 2).flatten(2)
        s_BTD = self.norm_mix(mixed_BTD + x_BTD)
        return cast(Tensor, self.norm_ffn(self.ffn(s_BTD) + s_BTD))
