"""Adaptive fusion: one vector of several modalities, each row weighing them by what it holds.

After the components that the abstract of Hu, An, Yu, Du & Luo (arXiv:2502.03664) names: re-weighting of key features, and
fusion of user attributes, item information and context. The text of the paper could not be read, so the equations are our own
and no figure of this block is the paper's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, check_choice, positive
from ctrlib.interactions.base import Interaction, evaluating
from ctrlib.schema import FieldLayout, suggest

FusionOutput = Literal["sum", "modalities"]


class AdaptiveFusion(Interaction):
    """A modality is a group of fields; the row decides how much each field and each modality counts.

        σ    = sigmoid(MLP([mean(x_1), rms(x_1), …, mean(x_F), rms(x_F)]))
        γ_f  = n_a σ_f / Σ_{g in a} σ_g            gates of the fields, over the n_a present ones
        h_a  = Σ_{f in a} γ_f W_f x_f + b_a        modalities a = 1 … A, of width k
        α    = softmax over the present modalities of V tanh(U [h_1, …, h_A] + c)
        z    = LayerNorm(Σ_a α_a h_a)

    Shape: [B, F, D] → [B, 1, k], field ``"adaptive_fusion"``; with ``output="modalities"`` [B, A, k] of α_a h_a under the
    names of the modalities, for a block that follows. Parameters: F·D·k + A·k (W, b), A·k·n + n + n·A (U, c, V; n
    ``hidden_dim``), 2·k, and the gates' 2F·n + n + n·F + F, where any modality has two fields.

    The gates of a modality have a mean of 1, so that how much it counts is said by α alone; without that, a gate could close
    what α leaves open. A modality of one field has no gate.

    A field whose token is a zero vector (padding, an id that was dropped, an empty sequence) is absent. A modality without a
    present field has α = 0 and takes no part, so what stands in its place cannot move the others. The token of a number that
    is 0 is a zero vector too: name numbers in ``never_absent``.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Interaction.Config):
        """
        Args:
            modalities: their fields by name; a field that none names is a modality of its own.
            dim: k; ``None``: the width of the input.
            hidden_dim: n, of the network of the weights, and of that of the gates.
            field_gates: gate the fields within their modalities; otherwise γ = 1.
            never_absent: fields that are there in every row, such as numbers, whose zero is a value.
            output: ``sum``: z; ``modalities``: the weighted modalities side by side.
        """

        modalities: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
        dim: int | None = None
        hidden_dim: int = 32
        field_gates: bool = True
        never_absent: tuple[str, ...] = ()
        output: FusionOutput = "sum"

        def __post_init__(self) -> None:
            positive("AdaptiveFusion.hidden_dim", self.hidden_dim)
            if self.dim is not None:
                positive("AdaptiveFusion.dim", self.dim)
            check_choice("AdaptiveFusion.output", self.output, get_args(FusionOutput))
            named: dict[str, str] = {}
            for modality, names in self.modalities.items():
                if not names:
                    raise ConfigError(f"AdaptiveFusion.modalities.{modality} is empty; expected at least one field")
                for name in names:
                    if name in named:
                        raise ConfigError(
                            f"field {name!r} is in the modalities {named[name]!r} and {modality!r}; expected one of the two"
                        )
                    named[name] = modality

    def __init__(self, config: Config, layout: FieldLayout) -> None:
        super().__init__()
        owner = {name: modality for modality, names in config.modalities.items() for name in names}
        for option, named in (("modalities", tuple(owner)), ("never_absent", config.never_absent)):
            for name in named:
                if name not in layout.names:
                    near = suggest(name, layout.names)
                    raise ConfigError(f"AdaptiveFusion.{option} names field {name!r}, which the block does not read{near}")
        names = list(dict.fromkeys(owner.get(name, name) for name in layout.names))
        of_F = [names.index(owner.get(name, name)) for name in layout.names]
        width, count = config.dim or layout.dim, len(names)
        self.count, self.output = count, config.output
        self.of: Tensor
        self.register_buffer("of", torch.tensor(of_F, dtype=torch.int64), persistent=False)
        self.always: Tensor
        self.register_buffer("always", torch.tensor([n in config.never_absent for n in layout.names]), persistent=False)
        sizes_F1 = torch.bincount(self.of, minlength=count)[self.of].view(-1, 1, 1)
        # as nn.Linear starts: every modality reads its fields side by side
        self.weight_FDK = nn.Parameter(
            (2 * torch.rand(layout.num_fields, layout.dim, width) - 1) / (sizes_F1 * layout.dim).sqrt()
        )
        self.bias_AK = nn.Parameter(torch.zeros(count, width))
        self.gates: nn.Sequential | None = None
        if config.field_gates and count < layout.num_fields:
            self.gates = nn.Sequential(
                nn.Linear(2 * layout.num_fields, config.hidden_dim),
                nn.ReLU(),
                nn.Linear(config.hidden_dim, layout.num_fields),
            )
        self.hidden = nn.Linear(count * width, config.hidden_dim)
        self.score = nn.Linear(config.hidden_dim, count, bias=False)
        self.norm = nn.LayerNorm(width) if config.output == "sum" else None
        self.out = FieldLayout(("adaptive_fusion",) if config.output == "sum" else tuple(names), width)
        self.axes = {"attention": (tuple(names),)} | ({"gate": (layout.names,)} if self.gates is not None else {})

    def _present(self, x_BFD: Tensor) -> Tensor:
        return (x_BFD != 0).any(-1) | self.always

    def gate(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → γ [B, F], 0 where a field is absent."""
        assert self.gates is not None
        stats_BF2 = torch.stack([x_BFD.mean(-1), (x_BFD.square().mean(-1) + 1e-12).sqrt()], dim=-1)
        open_BF = cast(Tensor, self.gates(stats_BF2.flatten(1))).sigmoid()
        present_BF = self._present(x_BFD).to(open_BF.dtype)
        open_BF = open_BF * present_BF
        zero_BA = open_BF.new_zeros(open_BF.shape[0], self.count)
        mean_BA = zero_BA.index_add(1, self.of, open_BF) / zero_BA.index_add(1, self.of, present_BF).clamp(min=1)
        return open_BF / mean_BA.index_select(1, self.of).clamp(min=torch.finfo(open_BF.dtype).tiny)

    def modalities(self, x_BFD: Tensor) -> tuple[Tensor, Tensor]:
        """[B, F, D] → h [B, A, k], zero where a modality is absent, and α [B, A]."""
        y_BFK = torch.einsum("bfd,fdk->bfk", x_BFD, self.weight_FDK)
        if self.gates is not None:
            y_BFK = y_BFK * self.gate(x_BFD).unsqueeze(-1)
        present_BF = self._present(x_BFD).to(y_BFK.dtype)
        zero_BA = y_BFK.new_zeros(y_BFK.shape[0], self.count)
        present_BA = zero_BA.index_add(1, self.of, present_BF) > 0
        h_BAK = self.bias_AK.to(y_BFK.dtype).expand(y_BFK.shape[0], -1, -1).index_add(1, self.of, y_BFK)
        h_BAK = torch.where(present_BA.unsqueeze(-1), h_BAK, 0.0)
        score_BA = cast(Tensor, self.score(self.hidden(h_BAK.flatten(1)).tanh()))
        # A row without any present modality has no weights; the smallest float stands for −∞, of which softmax would be NaN.
        weight_BA = score_BA.masked_fill(~present_BA, torch.finfo(score_BA.dtype).min).softmax(-1) * present_BA
        return h_BAK, weight_BA.to(h_BAK.dtype)

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, 1, k] or [B, A, k]."""
        h_BAK, weight_BA = self.modalities(x_BFD)
        weighted_BAK = h_BAK * weight_BA.unsqueeze(-1)
        return weighted_BAK if self.norm is None else cast(Tensor, self.norm(weighted_BAK.sum(1, keepdim=True)))

    @evaluating
    def explain(self, x_BFD: Tensor) -> dict[str, Tensor]:
        """``"attention"`` [B, A]: α, which sums to 1 unless the row has nothing; ``"gate"`` [B, F]: γ."""
        shown = {"attention": self.modalities(x_BFD)[1]}
        return shown if self.gates is None else shown | {"gate": self.gate(x_BFD)}
