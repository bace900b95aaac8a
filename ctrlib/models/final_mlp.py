"""FinalMLP whose gates may read chosen fields through tables of their own (arXiv:2304.00902)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import evaluating
from ctrlib.interactions.final_mlp import FinalMLP
from ctrlib.models.ctr import ModelComponent, initialize
from ctrlib.schema import BatchLayout


class FinalMLPModel(ModelComponent):
    """embedding → FinalMLP block; stream s is gated by the fields ``context_s``. Shape: Batch → Output(logits [B]).

    The context fields are embedded by separate tables, as in the released code; the embedding L2 covers those too.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            block: streams, gates and fusion.
            context_1, context_2: fields that the gate of a stream reads; none: one learned gate for all rows.
        """

        block: FinalMLP.Config = field(default_factory=FinalMLP.Config)
        context_1: tuple[str, ...] = ()
        context_2: tuple[str, ...] = ()

    interaction: FinalMLP

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        if len(layout.labels) > 1:
            raise ConfigError(f"FinalMLP returns one logit, but the data has labels {', '.join(layout.labels)}; choose one")
        self.config = config
        self.embedding = FeatureEmbedding(config.embedding, layout)
        self.context_1, self.context_2 = (
            # Frozen rows are zero until vectors are loaded, which the main tables get; a frozen context would stay zero.
            FeatureEmbedding(replace(config.embedding, fields=names, frozen=()), layout)
            if names and config.block.use_fs
            else None
            for names in (config.context_1, config.context_2)
        )
        self.interaction = FinalMLP(
            config.block,
            self.embedding.out,
            None if self.context_1 is None else self.context_1.out,
            None if self.context_2 is None else self.context_2.out,
        )
        initialize(self, config.weight_init)

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the block reads: the embeddings and the two contexts."""
        context_1, context_2 = (None if c is None else c(batch) for c in (self.context_1, self.context_2))
        return self.embedding(batch), context_1, context_2

    def forward(self, batch: Batch) -> Output:
        return Output(self.interaction(*self.inputs(batch)).flatten())

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """The gates of both streams and the heads of the bilinear fusion."""
        return self.interaction.explain(*self.inputs(batch))
