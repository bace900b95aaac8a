"""CTRModel = embedding → interaction → head (+ optional first-order weights). Most models are one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal, cast

from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import Component, ConfigError, check_literals
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Axes, Interaction, build, evaluating
from ctrlib.interactions.linear import FirstOrder
from ctrlib.interactions.mlp import MLP
from ctrlib.schema import BatchLayout, FieldLayout

WeightInit = Literal["torch", "xavier_normal", "xavier_uniform"]


class ModelComponent(Component, nn.Module):
    """A model, built from a config and a :class:`~ctrlib.schema.BatchLayout`. Batch → Output(logits [B] or [B, T])."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        """
        Args:
            embedding: the shared feature embedding.
            weight_init: of every ``nn.Linear`` and of experts; biases then start at 0. ``torch`` leaves the framework's own.
                Other weights, such as those of layers that each token has for itself, start as their block says.
        """

        embedding: FeatureEmbedding.Config = field(default_factory=FeatureEmbedding.Config)
        weight_init: WeightInit = "torch"

    reads_classes: ClassVar[bool] = False  # whether it is a model of nodes
    embedding: FeatureEmbedding
    interaction: Interaction

    def __call__(self, batch: Batch) -> Output:
        return cast(Output, super().__call__(batch))

    @property
    def axes(self) -> Axes:
        """The labels of what :meth:`explain` returns; see :class:`~ctrlib.interactions.base.Interaction`."""
        return self.interaction.axes

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What the interaction has to show of each row, by name: attention, gates, strengths; empty where there is nothing."""
        return self.interaction.explain(self.embedding(batch))


def build_model(config: ModelComponent.Config, layout: BatchLayout) -> ModelComponent:
    """The model that ``config`` describes, for batches of this layout.

    Raises:
        ConfigError: an option has a value that cannot be, or does not go with the layout.
    """
    check_literals(config)
    if layout.classes and not config.component.reads_classes:
        raise ConfigError(
            f"{config.component.__name__} predicts labels of 0 and 1, and the rows are nodes of a graph with the classes "
            f"{', '.join(layout.classes[:5])}; expected a model of nodes (catgcn)"
        )
    return cast(ModelComponent, config.component(config, layout))


def initialize(module: nn.Module, scheme: WeightInit) -> None:
    """Initialise every ``nn.Linear`` inside ``module``; see :class:`ModelComponent`."""
    if scheme == "torch":
        return
    init = nn.init.xavier_normal_ if scheme == "xavier_normal" else nn.init.xavier_uniform_
    for m in module.modules():
        if isinstance(m, nn.Linear):
            init(m.weight)
            if m.bias is not None:
                nn.init.zeros_(m.bias)


class Head(Component, nn.Module):
    """Flatten and one linear layer. Shape: [B, F, D] → logits [B, T]."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        """
        Args:
            bias: add a learned constant.
        """

        bias: bool = True

    def __init__(self, config: Config, layout: FieldLayout, num_tasks: int) -> None:
        super().__init__()
        self.linear = nn.Linear(layout.width, num_tasks, bias=config.bias)

    def forward(self, x_BFD: Tensor) -> Tensor:
        return cast(Tensor, self.linear(x_BFD.flatten(1)))


class CTRModel(ModelComponent):
    """logits = head(interaction(embedding(batch))) [+ Σ_i w_i + b over a table of width 1]."""

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            interaction: the block between embedding and head.
            head: ``None`` says that the interaction already returns one logit.
            first_order: add the first-order term of LR/FM/Wide&Deep, with weights of its own.
        """

        interaction: Interaction.Config = field(default_factory=MLP.Config)
        head: Head.Config | None = field(default_factory=Head.Config)
        first_order: FirstOrder.Config | None = None

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        num_tasks = len(layout.labels)
        self.embedding = FeatureEmbedding(config.embedding, layout)
        self.interaction = build(config.interaction, self.embedding.out)
        out = self.interaction.out
        if config.head is None and out.width != 1:
            raise ConfigError(
                f"head is None, so the interaction must return one logit; {config.interaction.component.__name__} returns "
                f"{out.num_fields} fields of width {out.dim}: give a head, or end with a block of one output"
            )
        if num_tasks > 1 and (config.head is None or config.first_order is not None):
            raise ConfigError(
                f"the data has {num_tasks} labels ({', '.join(layout.labels)}), but this model returns one logit; choose a "
                "model with a head and no first-order term (dnn, dcn, dcnv2, autoint), or one label"
            )
        self.head = None if config.head is None else Head(config.head, out, num_tasks)
        self.first_order: nn.ModuleList | None = None
        if config.first_order is not None:
            # One trained weight for every value, whatever width its vector has and whether that is frozen.
            weights = replace(config.embedding, dim=1, dims={}, frozen=(), dropout=0.0)
            wide = FeatureEmbedding(weights, layout)
            self.first_order = nn.ModuleList([wide, build(config.first_order, wide.out)])
        initialize(self, config.weight_init)

    @property
    def axes(self) -> Axes:
        """Those of the interaction, and ``"first_order/field"``."""
        if self.first_order is None:
            return self.interaction.axes
        return {**self.interaction.axes, "first_order/field": (self.embedding.out.names,)}

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What the interaction has to show, and ``"first_order/field"`` [B, F]: what every field's weight adds to the logit."""
        shown = self.interaction.explain(self.embedding(batch))
        if self.first_order is None:
            return shown
        wide, total = self.first_order
        return {**shown, "first_order/field": cast(FirstOrder, total).explain(wide(batch))["field"]}

    def net(self, x_BFD: Tensor) -> Tensor:
        """Tokens → logits [B] or [B, T], without the first-order term: the part that is exported for serving."""
        y_BFD = self.interaction(x_BFD)
        logits = y_BFD.flatten(1) if self.head is None else cast(Tensor, self.head(y_BFD))
        return logits.squeeze(1) if logits.shape[1] == 1 else logits

    def score(self, batch: Batch, x_BFD: Tensor) -> Tensor:
        """A batch and its tokens → logits [B] or [B, T]."""
        logits = self.net(x_BFD)
        if self.first_order is not None:
            wide, total = self.first_order
            logits = logits + total(wide(batch)).flatten()
        return logits

    def forward(self, batch: Batch) -> Output:
        return Output(self.score(batch, self.embedding(batch)))
