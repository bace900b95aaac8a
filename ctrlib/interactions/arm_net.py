"""ARM-Net: exponential neurons that choose their fields by sparse attention (Cai et al., SIGMOD 2021, arXiv:2107.01830)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, positive
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.interactions.entmax import entmax
from ctrlib.schema import FieldLayout

GAIN = 1.414  # of Xavier's uniform distribution, in the released code


class ARMNet(Interaction):
    """H = num_heads · num_neurons exponential neurons. Neuron i of head k weighs the fields j of a row by

        z_kij = entmax_α over j of q_kiᵀ W_k x_j       sparse gates: a field with z = 0 takes no part (eq. 5)
        w_kij = z_kij · v_kij                          v learned, of either sign, the same for all rows (eq. 6)
        y_ki  = exp(Σ_j w_kij x_j)                     a product of powers exp(x_j)^w, coordinate by coordinate (eq. 3)

    and batch normalisation per neuron, over rows and coordinates. Shape: [B, F, D] → [B, H, D], fields ``"arm_k_i"``.
    Parameters: K·D·d + H·d + H·F + 2·H with d = ``key_dim``. Time is linear in F: W_kᵀ q_ki is folded once per step.
    The paper's models put an MLP on top, see the presets ``arm_net`` and ``arm_net_plus``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """Options; the defaults are the paper's on Frappe.

        Attributes:
            num_heads: K.
            num_neurons: o, neurons per head.
            alpha: sparsity of the gates: 1 is softmax, 2 sparsemax, more is sparser.
            learn_alpha: train α, starting from ``alpha``.
            key_dim: d, width of queries; ``None``: D.
            bilinear: ``"per_head"`` has a W_k for every head; ``"shared"`` one W, ``"none"`` none, both with a single head.
            scale: divide the scores by √d.
            gate: ``"none"`` leaves the gates out, so w = v for all rows.
            use_values: ``False`` leaves v out, so w = z.
            neuron: ``"additive"`` is y = Σ_j w_j exp(x_j).
            norm: batch normalisation of the neurons.
            exponent_clip: keep what is exponentiated in [−clip, clip], for half precision.
            keep_fields: return the input fields too, before the neurons; ``FM`` after it is the paper's FM + o neurons.

        Raises:
            ConfigError: a size below 1, α below 1, or options that contradict each other.
        """

        num_heads: int = 8
        num_neurons: int = 32
        alpha: float = 2.0
        learn_alpha: bool = False
        key_dim: int | None = None
        bilinear: Literal["per_head", "shared", "none"] = "per_head"
        scale: bool = False
        gate: Literal["entmax", "none"] = "entmax"
        use_values: bool = True
        neuron: Literal["exp", "additive"] = "exp"
        norm: Literal["none", "batch"] = "batch"
        exponent_clip: float | None = None
        keep_fields: bool = False

        def __post_init__(self) -> None:
            positive("ARMNet.num_heads", self.num_heads)
            positive("ARMNet.num_neurons", self.num_neurons)
            if self.key_dim is not None:
                positive("ARMNet.key_dim", self.key_dim)
            if self.exponent_clip is not None:
                positive("ARMNet.exponent_clip", self.exponent_clip)
            if not 1 <= self.alpha < math.inf:
                raise ConfigError(f"ARMNet.alpha is {self.alpha}; expected 1 (softmax) or more")
            if self.bilinear != "per_head" and self.num_heads > 1:
                raise ConfigError(
                    f"ARMNet.num_heads is {self.num_heads} with bilinear={self.bilinear!r}, where heads do not differ; set "
                    "num_heads=1 and give all neurons to that head"
                )
            if self.bilinear == "none" and self.key_dim is not None:
                raise ConfigError(f"ARMNet.key_dim is {self.key_dim} but bilinear is 'none': queries are as wide as embeddings")
            if self.learn_alpha and (self.alpha == 1 or self.gate == "none"):
                raise ConfigError("ARMNet.learn_alpha needs gate='entmax' and a start above 1, which α never reaches again")
            if self.gate == "none" and not self.use_values:
                raise ConfigError("ARMNet has gate='none' and use_values=False, so nothing weighs the fields; set one of them")

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        heads, neurons = config.num_heads, config.num_neurons
        key_dim = layout.dim if config.key_dim is None else config.key_dim
        single = config.bilinear != "per_head"
        gated = config.gate == "entmax"
        self.query = _xavier(heads, neurons, key_dim, single) if gated else None
        self.weight = _xavier(heads, layout.dim, key_dim, single) if gated and config.bilinear != "none" else None
        if self.weight is not None and config.bilinear == "shared":  # as nn.Linear starts
            nn.init.uniform_(self.weight, -1 / math.sqrt(layout.dim), 1 / math.sqrt(layout.dim))
        self.value = _xavier(heads, neurons, layout.num_fields, single) if config.use_values else None
        self.log_alpha = nn.Parameter(torch.tensor(math.log(config.alpha - 1))) if config.learn_alpha else None
        # NOTE[DIFF] the normalisation is not in the paper's text, but in its code and in its parameter counts
        self.norm = nn.BatchNorm1d(heads * neurons) if config.norm == "batch" else None
        self.alpha = config.alpha
        # NOTE[DIFF] later versions of the code divide, the paper does not
        self.scale = 1 / math.sqrt(key_dim) if config.scale else None
        self.additive = config.neuron == "additive"
        self.exponent_clip = config.exponent_clip
        self.keep_fields = config.keep_fields
        names = tuple(f"arm_{k}_{i}" for k in range(heads) for i in range(neurons))
        self.out = FieldLayout((*layout.names, *names) if config.keep_fields else names, layout.dim)
        self.axes = {"gates": (names, layout.names)} if gated else {}
        self.axes |= {"weights": (names, layout.names)}

    def gates(self, x_BFD: Tensor) -> Tensor | None:
        """[B, F, D] → z [B, F, H], each column summing to 1; ``None`` without gates."""
        if self.query is None:
            return None
        query_KDo = self.query.transpose(1, 2) if self.weight is None else self.weight @ self.query.transpose(1, 2)
        if self.scale is not None:
            query_KDo = query_KDo * self.scale
        # Fields stay on axis 1: a CPU reduces a short last axis several times slower.
        scores_BFH = x_BFD @ query_KDo.transpose(0, 1).flatten(1)
        return entmax(scores_BFH, self.alpha if self.log_alpha is None else 1 + self.log_alpha.exp(), dim=1)

    def weights(self, gates_BFH: Tensor | None) -> Tensor:
        """Gates → w [B, F, H], or [1, F, H] where there are none."""
        if self.value is None:
            return cast(Tensor, gates_BFH)
        value_FH = self.value.flatten(0, 1).T
        return value_FH.unsqueeze(0) if gates_BFH is None else gates_BFH * value_FH

    def exponential(self, x: Tensor) -> Tensor:
        """exp, of clipped exponents where so configured."""
        return (x if self.exponent_clip is None else x.clamp(-self.exponent_clip, self.exponent_clip)).exp()

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, H, D], or [B, F + H, D] with ``keep_fields``."""
        weights_BHF = self.weights(self.gates(x_BFD)).transpose(1, 2)
        # No autocast: exponents start near 0, where half precision rounds the exponential to 1 and the norm magnifies the rest.
        with torch.autocast(x_BFD.device.type, enabled=False):
            values_BFD = x_BFD.to(weights_BHF.dtype)
            y_BHD = weights_BHF @ self.exponential(values_BFD) if self.additive else self.exponential(weights_BHF @ values_BFD)
            if self.norm is not None:
                y_BHD = self.norm(y_BHD)
        return torch.cat([x_BFD, y_BHD.to(x_BFD.dtype)], dim=1) if self.keep_fields else y_BHD

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"gates"`` z and ``"weights"`` w, both [B, H, F]: row i says which fields neuron i joins, and with which power."""
        gates_BFH = self.gates(x_BFD)
        shown = {"weights": self.weights(gates_BFH).transpose(1, 2).clone().expand(len(x_BFD), -1, -1)}
        return shown if gates_BFH is None else {"gates": gates_BFH.transpose(1, 2), **shown}


def _xavier(heads: int, rows: int, columns: int, single: bool) -> nn.Parameter:
    """[heads, rows, columns]. Xavier reads the bound off the shape, and the code of a single head has no axis of heads."""
    weight = torch.empty(heads, rows, columns)
    nn.init.xavier_uniform_(weight[0] if single else weight, gain=GAIN)
    return nn.Parameter(weight)
