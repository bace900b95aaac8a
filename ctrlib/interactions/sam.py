"""SAM: feature interaction as self-attention of first, second and higher order (Cheng & Xue, SIGIR 2021, arXiv:2105.05563)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, fraction, positive
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.schema import FieldLayout

Kind = Literal["sam1", "sam2a", "sam2e", "sam3a", "sam3e"]


class SAM(Interaction):
    """Without softmax, s_ij = ⟨x_i, x_j⟩ in SAM2 and ⟨x_i, K x_j⟩ in SAM3, weights what a pair of fields gives:

    ====== ======================================= ============== ====================
    kind   y                                       shape          parameters
    ====== ======================================= ============== ====================
    sam1   y_i = x_i                               [B, F, D]      none
    sam2a  y_ij = s_ij w_ij                        [B, F², D]     F²·D
    sam2e  y_ij = s_ij (x_i ⊙ x_j)                 [B, F², D]     none
    sam3a  y_i = Σ_j s_ij w_ij [+ Q x_i]           [B, F, D]      F²·D + D² [+ D²]
    sam3e  y_i = Σ_j s_ij (x_i ⊙ x_j) [+ Q x_i]    [B, F, D]      D² [+ D²]
    ====== ======================================= ============== ====================

    with learned w_ij of width D, all 1 at the start. SAM3 layers are stacked, parameters are per layer, [ ] is the residual.
    Fields keep their names, pairs are called ``"user*item"``. A linear layer on the result makes the logit.
    """

    # NOTE[DIFF] the paper's text was not at hand. SAM2 and SAM3 follow FuxiCTR; SAM1, which FuxiCTR lacks and the paper calls
    # an extension of logistic regression, is here what remains without interaction: the embeddings themselves.

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            kind: which of the five.
            num_layers: of SAM3; the others have one.
            residual: add Q x_i in SAM3.
            pooling: how fields become one vector, in a ``"weighted"`` sum with a learned scalar per field (1 at the start), in
                a sum or in a mean; not for SAM2.
            dropout: on the output of every layer.

        Raises:
            ConfigError: ``num_layers`` below 1, more layers or a residual where there are none, pooling of SAM2, a dropout
                outside [0, 1).
        """

        kind: Kind = "sam3a"
        num_layers: int = 1
        residual: bool = False
        pooling: Literal["none", "weighted", "sum", "mean"] = "none"
        dropout: float = 0.0

        def __post_init__(self) -> None:
            positive("SAM.num_layers", self.num_layers)
            fraction("SAM.dropout", self.dropout)
            if not self.kind.startswith("sam3") and (self.num_layers > 1 or self.residual):
                raise ConfigError(
                    f"SAM.kind is {self.kind!r} with num_layers={self.num_layers}, residual={self.residual}; only sam3a and "
                    "sam3e are stacked and have a residual"
                )
            if self.kind.startswith("sam2") and self.pooling != "none":
                raise ConfigError(f"SAM.pooling is {self.pooling!r} with kind={self.kind!r}, which returns pairs; set 'none'")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        names: tuple[str, ...] = layout.names
        if config.kind.startswith("sam2"):
            names = tuple(f"{a}*{b}" for a in layout.names for b in layout.names)
        if config.pooling != "none":
            names = ("sam",)
        count = 0 if config.kind == "sam1" else config.num_layers
        self.layers = nn.ModuleList(SAMLayer(config, layout) for _ in range(count))
        self.pooling = config.pooling
        weighted = config.pooling == "weighted"
        self.field_weights_F1 = nn.Parameter(torch.ones(layout.num_fields, 1)) if weighted else None
        self.out = FieldLayout(names, layout.dim)
        self.axes = {f"score/{i}": (layout.names, layout.names) for i in range(count)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, F, D], [B, F², D] or [B, 1, D]."""
        for layer in self.layers:
            x_BFD = layer(x_BFD)
        if self.field_weights_F1 is not None:
            x_BFD = x_BFD * self.field_weights_F1
        if self.pooling == "none":
            return x_BFD
        return x_BFD.mean(dim=1, keepdim=True) if self.pooling == "mean" else x_BFD.sum(dim=1, keepdim=True)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """The weights s_ij, ``"score/0"``, ... of shape [B, F, F]; unlike a softmax's they are of either sign."""
        shown: dict[str, Tensor] = {}
        for i, layer in enumerate(self.layers):
            shown[f"score/{i}"] = cast(SAMLayer, layer).attention(x_BFD)
            x_BFD = layer(x_BFD)
        return shown


class SAMLayer(nn.Module):
    """One layer of :class:`SAM`. Shape: [B, F, D] → [B, F, D] or [B, F², D]."""

    def __init__(self, config: SAM.Config, layout: FieldLayout) -> None:
        super().__init__()
        fields, dim = layout.num_fields, layout.dim
        self.pairs = config.kind.startswith("sam2")
        self.weight_FFD = nn.Parameter(torch.ones(fields, fields, dim)) if config.kind.endswith("a") else None
        self.key = None if self.pairs else nn.Linear(dim, dim, bias=False)
        self.residual = nn.Linear(dim, dim, bias=False) if config.residual else None
        self.dropout = Dropout(config.dropout)

    def attention(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → s [B, F, F]."""
        key_BFD = x_BFD if self.key is None else cast(Tensor, self.key(x_BFD))
        return x_BFD @ key_BFD.transpose(1, 2)

    def forward(self, x_BFD: Tensor) -> Tensor:
        attention_BFF = self.attention(x_BFD)
        if self.pairs:
            given = x_BFD.unsqueeze(2) * x_BFD.unsqueeze(1) if self.weight_FFD is None else self.weight_FFD
            y_BND = (attention_BFF.unsqueeze(-1) * given).flatten(1, 2)
        elif self.weight_FFD is None:
            y_BND = x_BFD * (attention_BFF @ x_BFD)  # x_i does not depend on j
        else:
            y_BND = torch.einsum("bij,ijd->bid", attention_BFF, self.weight_FFD)
        if self.residual is not None:
            y_BND = y_BND + self.residual(x_BFD)
        return cast(Tensor, self.dropout(y_BND))
