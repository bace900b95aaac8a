"""AFN's logarithmic layer: products of learned powers of the fields (Cheng et al., AAAI 2020, arXiv:1909.03276)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import positive
from ctrlib.interactions.base import Interaction, evaluating, numbered
from ctrlib.schema import FieldLayout


class LogTransform(Interaction):
    """Neuron j multiplies the fields, each to a learned power w_jf, coordinate by coordinate:

        y_j = BN(exp(Σ_f w_jf BN(ln max(|x_f|, ε)) [+ b_j]))     without norms: Π_f |x_f|^{w_jf}

    Shape: [B, F, D] → [B, L, D], fields ``"log_j"``. Parameters: L·F, 2·(F + L) of the norms, whose channels are fields and
    neurons, and L with ``bias``. The sign of an embedding has no effect. AFN puts an MLP on top: presets ``afn``, ``afn_plus``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options.

        Attributes:
            num_neurons: L.
            eps: ε, what smaller magnitudes are raised to.
            bias: add b_j.
            norm: batch normalisation of the logarithms and of the exponentials.

        Raises:
            ConfigError: a number that isn't above 0.
        """

        num_neurons: int = 600
        eps: float = 1e-7
        bias: bool = False
        norm: Literal["none", "batch"] = "batch"

        def __post_init__(self) -> None:
            positive("LogTransform.num_neurons", self.num_neurons)
            positive("LogTransform.eps", self.eps)

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        self.eps = config.eps
        # NOTE[DIFF] the bias and this start are of the authors' code; FuxiCTR starts the powers Xavier-normal.
        self.orders_LF = nn.Parameter(torch.empty(config.num_neurons, layout.num_fields).normal_(std=0.1))
        self.bias_L = nn.Parameter(torch.zeros(config.num_neurons)) if config.bias else None
        self.norm_log = nn.BatchNorm1d(layout.num_fields) if config.norm == "batch" else None
        self.norm_exp = nn.BatchNorm1d(config.num_neurons) if config.norm == "batch" else None
        self.out = FieldLayout(numbered("log", config.num_neurons), layout.dim)
        self.axes = {"orders": (self.out.names, layout.names)}

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, L, D]."""
        # No autocast: exp turns an absolute error of the exponent, a sum of logarithms down to ln ε, into a relative one.
        with torch.autocast(x_BFD.device.type, enabled=False):
            log_BFD = x_BFD.to(self.orders_LF.dtype).abs().clamp(min=self.eps).log()
            # N = B·D: a coordinate is a row, so that all neurons are one matmul and channels lie side by side for the norms.
            log_NF = log_BFD.transpose(1, 2).flatten(0, 1)
            if self.norm_log is not None:
                log_NF = self.norm_log(log_NF)
            y_NL = F.linear(log_NF, self.orders_LF, self.bias_L).exp()
            if self.norm_exp is not None:
                y_NL = self.norm_exp(y_NL)
            return y_NL.view(x_BFD.shape[0], x_BFD.shape[2], y_NL.shape[1]).transpose(1, 2)

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"orders"`` [B, L, F]: the power of every field in every neuron, the same for all rows.

        Batch normalisation scales the logarithms: with it the power of an embedding is w·γ/σ of its field, as in eval mode.
        """
        orders_LF: Tensor = self.orders_LF.clone()
        if self.norm_log is not None:
            variance_F = cast(Tensor, self.norm_log.running_var)
            orders_LF = orders_LF * self.norm_log.weight * torch.rsqrt(variance_F + self.norm_log.eps)
        return {"orders": orders_LF.expand(len(x_BFD), -1, -1)}
