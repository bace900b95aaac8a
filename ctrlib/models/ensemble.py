"""Two towers over tables of their own, mixed by learned scalars: ARM-Net+ (arXiv:2107.01830), AFN+ (arXiv:1909.03276)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import cast

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Interaction, build
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import Head, ModelComponent, initialize
from ctrlib.schema import BatchLayout


class EnsembleModel(ModelComponent):
    """logits = w_1 ⊙ head_1(interaction(embedding_1(batch))) + w_2 ⊙ head_2(deep(embedding_2(batch))) + b

    Shape: Batch → Output(logits [B] or [B, T]). The weights start at ½ and b at 0: the mean of the two logits. All is trained
    together by the loss of the mixture.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            interaction: the first tower.
            deep: the second tower.
            head: on each tower.
            share_embedding: both towers read one table.
        """

        interaction: Interaction.Config
        deep: MLP.Config = field(default_factory=MLP.Config)
        head: Head.Config = field(default_factory=Head.Config)
        share_embedding: bool = False

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        num_tasks = len(layout.labels)
        self.embedding = FeatureEmbedding(config.embedding, layout)
        # Frozen rows are zero until vectors are loaded, which the main tables get; here they would stay zero.
        deep = None if config.share_embedding else FeatureEmbedding(replace(config.embedding, frozen=()), layout)
        self.deep_embedding = deep
        self.interaction = build(config.interaction, self.embedding.out)
        self.deep = MLP(config.deep, self.embedding.out)
        self.head = Head(config.head, self.interaction.out, num_tasks)
        self.deep_head = Head(config.head, self.deep.out, num_tasks)
        self.weight_2T = nn.Parameter(torch.full((2, num_tasks), 0.5))
        self.bias_T = nn.Parameter(torch.zeros(num_tasks))
        initialize(self, config.weight_init)

    def forward(self, batch: Batch) -> Output:
        x_BFD = self.embedding(batch)
        deep_BFD = x_BFD if self.deep_embedding is None else self.deep_embedding(batch)
        first_BT = cast(Tensor, self.head(self.interaction(x_BFD)))
        second_BT = cast(Tensor, self.deep_head(self.deep(deep_BFD)))
        logits = first_BT * self.weight_2T[0] + second_BT * self.weight_2T[1] + self.bias_T
        return Output(logits.squeeze(1) if logits.shape[1] == 1 else logits)
