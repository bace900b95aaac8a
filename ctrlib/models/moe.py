"""Mixtures of experts: experts computed together, their gates, and the model with one gate or several (MoE, MMoE)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import Component, ConfigError, positive
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Axes, Interaction, build, evaluating, numbered
from ctrlib.interactions.mlp import MLP, after_linear
from ctrlib.interactions.token_linear import TokenLinear, TokenNorm
from ctrlib.models.behaviours import AttendedHistories, TargetAttention, choose_histories
from ctrlib.models.ctr import ModelComponent, WeightInit, initialize
from ctrlib.schema import BatchLayout, FieldLayout, suggest

GateNorm = Literal["none", "softmax", "topk"]


class BatchedMLP(nn.Module):
    """K MLPs of one shape in one product a layer. Shape: [B, K, W] → [B, K, last width].

    Each computes what :class:`~ctrlib.interactions.mlp.MLP` does, from an input of its own.
    """

    def __init__(self, config: MLP.Config, count: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for units in config.hidden_units:
            layers.append(TokenLinear(count, width, units, bias=True))
            if config.norm == "layer":
                layers.append(TokenNorm(count, units))
            norm = "none" if config.norm == "layer" else config.norm
            after = after_linear(count * units, norm=norm, activation=config.activation, dropout=config.dropout)
            layers += [nn.Flatten(), *after, nn.Unflatten(1, (count, units))]
            width = units
        if config.output_dim is not None:
            layers.append(TokenLinear(count, width, config.output_dim, bias=True))
            width = config.output_dim
        self.layers = nn.Sequential(*layers)
        self.dim = width

    def forward(self, x_BKW: Tensor) -> Tensor:
        """[B, K, W] → [B, K, last width]."""
        return cast(Tensor, self.layers(x_BKW))


class Experts(Component, nn.Module):
    """K networks of one shape with weights of their own on one input. Shape: [B, F, D] → [B, K, E].

    Experts that are MLPs are computed together, in one product a layer; any other block one after another, with a linear layer
    to E on each.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        """
        Args:
            count: K.
            expert: the network; of an MLP the hidden layers.
        """

        count: int = 4
        expert: Interaction.Config = field(default_factory=lambda: MLP.Config(hidden_units=(80, 40)))

        def __post_init__(self) -> None:
            positive("Experts.count", self.count)
            if isinstance(self.expert, MLP.Config) and self.expert.output_dim is not None:
                raise ConfigError(
                    f"Experts.expert.output_dim is {self.expert.output_dim}; expected None: the model adds the last layer. Put "
                    "that width last in hidden_units instead"
                )

    def __init__(self, config: Config, layout: FieldLayout, output_dim: int | None) -> None:
        super().__init__()
        self.count = config.count
        self.mlps: BatchedMLP | None = None
        self.blocks: nn.ModuleList | None = None
        self.last: TokenLinear | None = None
        if isinstance(config.expert, MLP.Config):
            self.mlps = BatchedMLP(replace(config.expert, output_dim=output_dim), self.count, layout.width)
            self.dim = self.mlps.dim
        else:
            blocks = [build(config.expert, layout) for _ in range(self.count)]
            self.blocks, self.dim = nn.ModuleList(blocks), blocks[0].out.width
            if output_dim is not None:
                self.last, self.dim = TokenLinear(self.count, self.dim, output_dim, bias=True), output_dim

    def forward(self, x_BFD: Tensor) -> Tensor:
        """[B, F, D] → [B, K, E]."""
        if self.mlps is not None:
            return cast(Tensor, self.mlps(x_BFD.flatten(1).unsqueeze(1).expand(-1, self.count, -1)))
        assert self.blocks is not None
        y_BKE = torch.stack([block(x_BFD).flatten(1) for block in self.blocks], dim=1)
        return y_BKE if self.last is None else cast(Tensor, self.last(y_BKE))

    def __call__(self, x_BFD: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(x_BFD))


def initialize_experts(module: nn.Module, scheme: WeightInit) -> None:
    """:func:`~ctrlib.models.ctr.initialize` for the layers that hold a matrix for every expert: each as a layer of its own."""
    initialize(module, scheme)
    if scheme == "torch":
        return
    init = nn.init.xavier_normal_ if scheme == "xavier_normal" else nn.init.xavier_uniform_
    for m in module.modules():
        if isinstance(m, TokenLinear):
            for matrix in m.weight:
                init(matrix)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


def normed_gate(gate_BK: Tensor, norm: GateNorm, top_k: int) -> Tensor:
    """Gates as they are, softmax over all experts, or softmax over the ``top_k`` largest and 0 elsewhere. Shape: [*, K]."""
    if norm == "none":
        return gate_BK
    if norm == "topk":
        largest, at = gate_BK.topk(min(top_k, gate_BK.shape[-1]), dim=-1)
        gate_BK = torch.full_like(gate_BK, -torch.inf).scatter(-1, at, largest)
    return gate_BK.softmax(dim=-1)


class MoE(ModelComponent):
    """logit_t = Σ_k softmax(G_t z)_k s_kt(x), or tower_t(Σ_k softmax(G_t z)_k s_k(x)).

    Shape: Batch → Output(logits [B] or [B, T]). x are all tokens, z those that the gates read, s_k the experts
    (arXiv:1701.06538). Without a tower an expert gives a score for every label; with one a vector, its last hidden
    layer. With a gate per label and towers it is MMoE (doi:10.1145/3219819.3220007).
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            experts: K and the networks.
            gates: one G for all labels, or one per label.
            gate_fields: z, fields or attributes of histories; ``None``: all.
            top_k: only so many of the largest gates of a row are not 0; ``None``: all.
            tower: hidden layers between the mixture and the logit of a label, for each its own; ``None``: experts give scores.
            attention: read every history by target attention, as DIN does; ``None``: pool its attributes as any sequence.
        """

        experts: Experts.Config = field(default_factory=Experts.Config)
        gates: Literal["shared", "per_label"] = "shared"
        gate_fields: tuple[str, ...] | None = None
        top_k: int | None = None
        tower: MLP.Config | None = None
        attention: TargetAttention.Config | None = None

        def __post_init__(self) -> None:
            if self.gate_fields is not None and not self.gate_fields:
                raise ConfigError(
                    "MoE.gate_fields is empty, so that gates would read nothing; name some fields, or None for all"
                )
            if self.top_k is not None:
                positive("MoE.top_k", self.top_k)
            if self.tower is not None and self.tower.output_dim is not None:
                raise ConfigError(
                    f"MoE.tower.output_dim is {self.tower.output_dim}; expected None: the model adds the last layer. Put that "
                    "width last in hidden_units instead"
                )

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        self.labels = layout.labels
        fields = config.embedding.fields
        histories = () if config.attention is None else choose_histories("MoE with attention", layout, None, fields)
        self.embedding = FeatureEmbedding(config.embedding, layout, tuple(h.name for h in histories))
        names = self.embedding.out.names
        self.attended: AttendedHistories | None = None
        if config.attention is not None:
            self.attended = AttendedHistories("MoE with attention", config.attention, histories, self.embedding)
            names += self.attended.out.names
        tokens = FieldLayout(names, self.embedding.out.dim)
        num_labels, read = len(layout.labels), names if config.gate_fields is None else config.gate_fields
        for name in read:
            if name not in names:
                raise ConfigError(f"MoE.gate_fields names {name!r}, which the model does not read{suggest(name, names)}")
        self.read: Tensor
        self.register_buffer("read", torch.tensor([names.index(name) for name in read], dtype=torch.int64), persistent=False)
        self.experts = Experts(config.experts, tokens, num_labels if config.tower is None else None)
        self.num_gates = num_labels if config.gates == "per_label" else 1
        self.gate = nn.Linear(len(read) * tokens.dim, self.num_gates * config.experts.count)
        self.towers: BatchedMLP | None = None
        if config.tower is not None:
            self.towers = BatchedMLP(replace(config.tower, output_dim=1), num_labels, self.experts.dim)
        initialize_experts(self, config.weight_init)

    def tokens(self, batch: Batch) -> Tensor:
        """x: [B, F, D]."""
        x_BFD = self.embedding(batch)
        return x_BFD if self.attended is None else torch.cat([x_BFD, self.attended(self.embedding, batch)], dim=1)

    def gates(self, x_BFD: Tensor) -> Tensor:
        """[B, gates, K]; each sums to 1 over the experts."""
        read_BFD = x_BFD if self.config.gate_fields is None else x_BFD.index_select(1, self.read)
        g_BGK = torch.unflatten(self.gate(read_BFD.flatten(1)), 1, (self.num_gates, -1))
        top_k = self.config.top_k
        return normed_gate(g_BGK, "softmax" if top_k is None else "topk", top_k or 0)

    def forward(self, batch: Batch) -> Output:
        x_BFD = self.tokens(batch)
        g_BGK, s_BKE = self.gates(x_BFD), self.experts(x_BFD)
        if self.towers is not None:
            mixed_BGE = g_BGK @ s_BKE
            logits_BT = self.towers(mixed_BGE.expand(-1, len(self.labels), -1)).flatten(1)
        else:
            logits_BT = (g_BGK.transpose(1, 2) * s_BKE).sum(1)
        return Output(logits_BT.squeeze(1) if logits_BT.shape[1] == 1 else logits_BT)

    @property
    def axes(self) -> Axes:
        """Of ``"gate"``: experts; with a gate per label: labels, experts."""
        experts = numbered("expert", self.experts.count)
        gate = (self.labels, experts) if self.config.gates == "per_label" else (experts,)
        return {"gate": gate, **({} if self.attended is None else self.attended.axes)}

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """``"gate"`` [B, K], or [B, T, K] with a gate per label; with attention also the weights of recent behaviours."""
        g_BGK = self.gates(self.tokens(batch))
        shown = {"gate": g_BGK if self.config.gates == "per_label" else g_BGK.squeeze(1)}
        return shown | ({} if self.attended is None else self.attended.explain(self.embedding, batch))
