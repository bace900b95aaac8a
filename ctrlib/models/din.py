"""DIN: behaviours weighed by what the candidate has to do with them (arXiv:1706.06978)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from ctrlib.batch import Batch, Output
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Axes, Interaction, build, evaluating
from ctrlib.interactions.mlp import MLP
from ctrlib.models.behaviours import AttendedHistories, TargetAttention, choose_histories
from ctrlib.models.ctr import Head, ModelComponent, initialize
from ctrlib.schema import BatchLayout, FieldLayout


class DIN(ModelComponent):
    """logits = head(interaction([fields; histories])). Shape: Batch → Output(logits [B] or [B, T]).

    Fields are those of the embedding without the attributes of histories; each attribute of a history is one token more, pooled
    by :class:`~ctrlib.models.behaviours.TargetAttention` with the candidate's attributes as context.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            histories: the histories to read; those not named are pooled as any sequence. ``None``: all.
            attention: over the behaviours of a history.
            interaction: the block between tokens and head.
        """

        histories: tuple[str, ...] | None = None
        attention: TargetAttention.Config = field(default_factory=TargetAttention.Config)
        interaction: Interaction.Config = field(default_factory=lambda: MLP.Config(hidden_units=(200, 80), activation="dice"))

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        histories = choose_histories("DIN", layout, config.histories, config.embedding.fields)
        self.embedding = FeatureEmbedding(config.embedding, layout, tuple(h.name for h in histories))
        self.attended = AttendedHistories("DIN", config.attention, histories, self.embedding)
        names = self.embedding.out.names + self.attended.out.names
        self.interaction = build(config.interaction, FieldLayout(names, config.embedding.dim))
        self.head = Head(Head.Config(), self.interaction.out, len(layout.labels))
        initialize(self, config.weight_init)

    def tokens(self, batch: Batch) -> Tensor:
        """What the interaction reads: [B, F, D]."""
        return torch.cat([self.embedding(batch), self.attended(self.embedding, batch)], dim=1)

    def forward(self, batch: Batch) -> Output:
        logits_BT = cast(Tensor, self.head(self.interaction(self.tokens(batch))))
        return Output(logits_BT.squeeze(1) if logits_BT.shape[1] == 1 else logits_BT)

    @property
    def axes(self) -> Axes:
        """Those of the interaction, and of ``"history/weight"``: recent behaviours."""
        return {**self.interaction.axes, **self.attended.axes}

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What the interaction shows, and the weights of the most recent behaviours of every history (``"history/weight"``)."""
        return self.interaction.explain(self.tokens(batch)) | self.attended.explain(self.embedding, batch)
