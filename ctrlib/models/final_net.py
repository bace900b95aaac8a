"""FinalNet whose two branches also learn from their mean (SIGIR 2023, doi:10.1145/3539618.3591988)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.final_net import FinalNet
from ctrlib.losses import bce_loss
from ctrlib.models.ctr import ModelComponent, initialize
from ctrlib.schema import BatchLayout


class FinalNetModel(ModelComponent):
    """embedding → FinalNet block. Shape: Batch → Output(logits [B]).

    In training, two branches add the loss ``"distillation"`` = Σ_s BCE(σ(y_s), σ(ŷ)), with no gradient through the mean ŷ.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            block: branches and gate.
        """

        block: FinalNet.Config = field(default_factory=FinalNet.Config)

    interaction: FinalNet

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        if len(layout.labels) > 1:
            raise ConfigError(f"FinalNet returns one logit, but the data has labels {', '.join(layout.labels)}; choose one")
        self.config = config
        self.embedding = FeatureEmbedding(config.embedding, layout)
        self.interaction = FinalNet(config.block, self.embedding.out)
        initialize(self, config.weight_init)

    def forward(self, batch: Batch) -> Output:
        branches_BS = self.interaction.branches(self.embedding(batch))
        logits = branches_BS.mean(dim=1)
        if not self.training or branches_BS.shape[1] == 1:
            return Output(logits)
        target_BS = logits.detach().float().sigmoid().unsqueeze(1).expand_as(branches_BS)
        # The mean over the branches, which bce_loss takes for tasks, times their number.
        return Output(logits, {"distillation": branches_BS.shape[1] * bce_loss(branches_BS, target_BS, batch.weight)})
