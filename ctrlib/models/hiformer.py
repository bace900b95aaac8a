"""Hiformer as a whole model: numbers mixed into a few tokens, attention, and a network per label (arXiv:2311.05884)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, positive
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import evaluating
from ctrlib.interactions.hiformer import Hiformer
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import ModelComponent, initialize
from ctrlib.schema import BatchLayout, DenseColumn, FieldLayout

# As wide as what comes out of them at the paper's sizes: 6 tokens of width 128, and a task token.
_DENSE = MLP.Config(hidden_units=(768,))
_TOWER = MLP.Config(hidden_units=(128,))


class HiformerModel(ModelComponent):
    """[field tokens, dense tokens, task tokens] → Hiformer → one MLP per task token. Shape: Batch → Output(logits [B] or
    [B, T]).

    There is a task token for every label, whatever ``block.num_tasks`` says.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            block: the attention.
            num_dense_tokens: tokens that all numbers together are mapped to; ``None``: a token for every number.
            dense_mlp: the hidden layers of that map.
            tower: the hidden layers between a task token and its logit.
        """

        block: Hiformer.Config = field(default_factory=Hiformer.Config)
        num_dense_tokens: int | None = None
        dense_mlp: MLP.Config = _DENSE
        tower: MLP.Config = _TOWER

        def __post_init__(self) -> None:
            if self.num_dense_tokens is not None:
                positive("HiformerModel.num_dense_tokens", self.num_dense_tokens)
            for name, mlp in (("dense_mlp", self.dense_mlp), ("tower", self.tower)):
                if mlp.output_dim is not None:
                    raise ConfigError(
                        f"HiformerModel.{name}.output_dim is {mlp.output_dim}; expected None: the model adds the last layer. "
                        "Put that width last in hidden_units instead"
                    )

    interaction: Hiformer

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        wanted = layout.names if config.embedding.fields is None else config.embedding.fields
        numbers = [(i, c) for i, c in enumerate(layout.dense) if c.name in wanted]
        self.dense: DenseTokens | None = None
        embedding = config.embedding
        if config.num_dense_tokens is not None and numbers:
            rest = tuple(name for name in wanted if name not in [c.name for _, c in numbers])
            if not rest:
                raise ConfigError("the model reads numbers only; set num_dense_tokens to None, for a token of each")
            embedding = replace(embedding, fields=rest)
            self.dense = DenseTokens(numbers, config.dense_mlp, config.num_dense_tokens, embedding.dim)
        self.embedding = FeatureEmbedding(embedding, layout)
        names = self.embedding.out.names + (() if self.dense is None else self.dense.out.names)
        tokens = FieldLayout(names, embedding.dim)
        self.interaction = Hiformer(replace(config.block, num_tasks=len(layout.labels)), tokens)
        task = FieldLayout(("task",), embedding.dim)
        self.towers = nn.ModuleList(MLP(replace(config.tower, output_dim=1), task) for _ in layout.labels)
        initialize(self, config.weight_init)

    def tokens(self, batch: Batch) -> Tensor:
        """What the attention reads: fields and dense tokens, [B, F, D]."""
        x_BFD = self.embedding(batch)
        return x_BFD if self.dense is None else torch.cat([x_BFD, self.dense(batch.dense)], dim=1)

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """The attention of every layer."""
        return self.interaction.explain(self.tokens(batch))

    def forward(self, batch: Batch) -> Output:
        tasks_BTD = self.interaction(self.tokens(batch))[:, -len(self.towers) :]  # task tokens are the last ones
        logits_BT = torch.cat([tower(tasks_BTD[:, i : i + 1]).flatten(1) for i, tower in enumerate(self.towers)], dim=1)
        return Output(logits_BT.squeeze(1) if len(self.towers) == 1 else logits_BT)


class DenseTokens(nn.Module):
    """All numbers through one MLP, whose output is cut into n tokens. Shape: Batch.dense [B, columns] → [B, n, D].

    Numbers come as the encoder made them (standardised by default); a position among quantile bins counts as a share of them.
    A missing number is 0, and where the training rows had any, a column of ones and zeros says so.
    """

    def __init__(self, numbers: list[tuple[int, DenseColumn]], mlp: MLP.Config, num_tokens: int, dim: int) -> None:
        super().__init__()
        self.columns: Tensor
        self.shares: Tensor
        self.may_miss: Tensor
        columns = [c for _, c in numbers]
        self.register_buffer("columns", torch.tensor([i for i, _ in numbers]), persistent=False)
        self.register_buffer("shares", torch.tensor([1 / max(c.num_bins, 1) for c in columns]), persistent=False)
        missing = torch.tensor([i for i, c in enumerate(columns) if c.missing], dtype=torch.int64)
        self.register_buffer("may_miss", missing, persistent=False)
        source = FieldLayout(tuple(c.name for c in columns) + tuple(f"{c.name}_missing" for c in columns if c.missing), 1)
        self.mlp = MLP(replace(mlp, output_dim=num_tokens * dim), source)
        self.out = FieldLayout(tuple(f"dense_{i}" for i in range(num_tokens)), dim)

    def forward(self, dense: Tensor) -> Tensor:
        x_BF = dense.index_select(1, self.columns)
        gone_BF = torch.isnan(x_BF)
        x_BF = torch.where(gone_BF, 0.0, x_BF * self.shares)
        x_BF = torch.cat([x_BF, gone_BF.index_select(1, self.may_miss).to(x_BF.dtype)], dim=1)
        return self.mlp(x_BF.unsqueeze(-1)).view(-1, self.out.num_fields, self.out.dim)
