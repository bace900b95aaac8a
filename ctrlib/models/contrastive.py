"""A contrastive loss beside any model: two views of a row, made by leaving out fields, tell it from the other rows.

After the outline in the abstract of "contrastive learning for cold-start recommendation with adaptive feature fusion" (Hu,
An, Yu, Du & Luo, arXiv:2502.03664), whose text could not be read: views, weights and places of the losses are our own choice.

NOTE[DIFF] the abstract also names a module that mines relations; here that is a step after training, :mod:`ctrlib.content_map`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import get_args

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, check_choice, check_not_negative, fraction, positive
from ctrlib.dropout import dropout
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Axes, Interaction, build, evaluating
from ctrlib.interactions.dice import Dice
from ctrlib.losses import Similarity, info_nce
from ctrlib.models.ctr import CTRModel, ModelComponent, build_model, initialize
from ctrlib.schema import OOV_ID, PADDING_ID, BatchLayout, suggest


@dataclass(frozen=True, kw_only=True, slots=True)
class ContrastConfig:
    """How views are made, and how much their likeness counts. The defaults are our choice.

    Args:
        weight: λ of the loss; with 0 there are no views, and no random number is drawn for them.
        temperature: τ of :func:`~ctrlib.losses.info_nce`.
        similarity: of two views.
        field_mask: chance that a field is left out of a view. A row keeps at least one field.
        id_mask: the same for the model's ``id_fields``.
        feature_dropout: of the coordinates of the fields that stay.
        rows: how many of a batch have views, the first ones (a training batch is in random order); ``None``: all. The time of
            the views grows with their number, that of the loss with its square.
    """

    weight: float = 0.1
    temperature: float = 0.15
    similarity: Similarity = "cosine"
    field_mask: float = 0.25
    id_mask: float = 0.5
    feature_dropout: float = 0.2
    rows: int | None = None

    def __post_init__(self) -> None:
        check_not_negative("contrast.weight", self.weight)
        positive("contrast.temperature", self.temperature)
        check_choice("contrast.similarity", self.similarity, get_args(Similarity))
        for name in ("field_mask", "id_mask", "feature_dropout"):
            fraction(f"contrast.{name}", getattr(self, name))
        if self.rows is not None:
            positive("contrast.rows", self.rows)


def view(x_BFD: Tensor, chance_F: Tensor, feature_dropout: float) -> Tensor:
    """A random view of tokens: fields become zero vectors with their chance, coordinates of the others by dropout.

    A row keeps one of its present fields at least (a field is present unless its token is a zero vector).
    """
    present_BF = (x_BFD != 0).any(-1)
    margin_BF = (torch.rand(present_BF.shape, device=x_BFD.device) - chance_F).masked_fill(~present_BF, -2.0)
    keep_BF = (margin_BF >= 0) | (margin_BF == margin_BF.amax(1, keepdim=True))
    return dropout(x_BFD * keep_BF.unsqueeze(-1), feature_dropout)


class Contrast(nn.Module):
    """λ·InfoNCE of two views of some fields, as an encoder sees them; rows of the same ids are no negatives of one another.

        L = ½·(−1/B) Σ_i [ln softmax_j(s(z′_i, z″_j)/τ)_i + ln softmax_j(s(z″_i, z′_j)/τ)_i]

    z′, z″ are the flattened outputs of the encoder. Rows that agree in all sparse ``fields`` are the same thing seen twice, so
    they are left out of each other's denominators. Rows of weight 0 are left out of it all. It has no parameters of its own.

    Args:
        config: see :class:`ContrastConfig`.
        fields: of the views; the tokens of all others are zero vectors there.
        id_fields: those among them that have ``id_mask``.
        names: of all tokens.
        layout: of the batches.
    """

    def __init__(
        self,
        config: ContrastConfig,
        fields: Sequence[str],
        id_fields: Sequence[str],
        names: Sequence[str],
        layout: BatchLayout,
    ) -> None:
        super().__init__()
        self.config = config
        self.chance: Tensor
        self.mine: Tensor
        chances = [config.id_mask if name in id_fields else config.field_mask for name in names]
        self.register_buffer("chance", torch.tensor(chances), persistent=False)
        self.register_buffer("mine", torch.tensor([[name in fields] for name in names]), persistent=False)
        self.identity = Identity(fields, id_fields, layout)

    def forward(self, batch: Batch, x_BFD: Tensor, encode: Callable[[Tensor], Tensor]) -> Tensor:
        """The batch as it came, its tokens, the encoder → a scalar."""
        rows = self.config.rows
        batch = replace(batch, sparse=batch.sparse[:rows], weight=None if batch.weight is None else batch.weight[:rows])
        x_BFD = x_BFD[:rows] * self.mine
        first_BK = encode(view(x_BFD, self.chance, self.config.feature_dropout)).flatten(1)
        second_BK = encode(view(x_BFD, self.chance, self.config.feature_dropout)).flatten(1)
        return self.config.weight * info_nce(
            first_BK,
            second_BK,
            temperature=self.config.temperature,
            similarity=self.config.similarity,
            exclude_BB=self.identity.same(batch),
            rows_B=batch.counted,
            symmetric=True,
        )


def check_encoder(what: str, block: Interaction) -> None:
    """Raise :class:`ConfigError` if a block that also scores whole rows cannot encode views."""
    if block.out.width == 1:
        raise ConfigError(
            f"{what} ({type(block).__name__}) returns one number, of which no two views can be compared; set encoder to a "
            "block that encodes the fields (MLP, AdaptiveFusion), or choose a model with a head"
        )
    if any(isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d | Dice) for m in block.modules()):
        raise ConfigError(
            f"{what} ({type(block).__name__}) has batch norms or dice activations, whose running statistics would be those of "
            "views and whole rows mixed; set encoder to a block of its own, or choose another norm and activation"
        )


class Identity(nn.Module):
    """Which rows of a batch are of one thing, such as a user: those that agree in all sparse fields of it, or in a known id.

    Where the fields hold no id, only the former is left, and a field that changes from row to row keeps all rows apart. All
    fields are compared by a 64-bit hash: equal rows always agree, and that others do has a chance of 2⁻⁶⁴ a pair.

    Args:
        fields: of the thing; those that are not sparse are not looked at.
        id_fields: fields of ids, of this thing and others.
        layout: of the batches.
    """

    def __init__(self, fields: Sequence[str], id_fields: Sequence[str], layout: BatchLayout) -> None:
        super().__init__()
        columns = [i for i, c in enumerate(layout.sparse) if c.name in fields]
        self.ids = [i for i in columns if layout.sparse[i].name in id_fields]
        self.columns: Tensor
        self.factors: Tensor
        factors = torch.randint(-(2**63), 2**63 - 1, (len(columns),), generator=torch.Generator().manual_seed(0))
        self.register_buffer("columns", torch.tensor(columns, dtype=torch.int64), persistent=False)
        self.register_buffer("factors", factors, persistent=False)

    def same(self, batch: Batch) -> Tensor | None:
        """[B, B], True where two rows are of one; ``None``: there are no columns to compare."""
        if not len(self.columns):
            return None
        code_B = (batch.sparse.index_select(1, self.columns).long() * self.factors).sum(1)
        same_BB = code_B.unsqueeze(1) == code_B.unsqueeze(0)
        for column in self.ids:
            id_B = batch.sparse[:, column]
            same_BB = same_BB | ((id_B.unsqueeze(1) == id_B.unsqueeze(0)) & (id_B > OOV_ID))
        return same_BB


class KnownIds(nn.Module):
    """Ids that say nothing become padding, whose token is a zero vector: those unseen in training, and dropped ones.

    So a cold user or item reads no row of its table, neither a stranger's nor the OOV row, and the model has learned in
    training to do without.

    Args:
        fields: sparse fields of ids.
        dropout: chance that a known id is dropped in training; 0 draws no random number.
        layout: of the batches.

    Raises:
        ConfigError: a field that is not sparse, or has hashed ids, or a chance outside [0, 1).
    """

    def __init__(self, fields: Sequence[str], dropout: float, layout: BatchLayout) -> None:
        super().__init__()
        fraction("id_dropout", dropout)
        names = [c.name for c in layout.sparse]
        for name in fields:
            if name not in names:
                raise ConfigError(f"id_fields names {name!r}, which is no sparse field of the data{suggest(name, names)}")
            if layout.sparse[names.index(name)].hashed:
                raise ConfigError(
                    f"id_fields names {name!r}, whose ids are hashed, so that an unseen one cannot be told from those of "
                    "training; give the field a vocabulary (no hash_size), or leave it out of id_fields"
                )
        if dropout and not fields:
            raise ConfigError(f"id_dropout is {dropout}, but id_fields is empty; name the fields that hold ids")
        self.dropout = dropout
        self.columns: Tensor
        self.register_buffer("columns", torch.tensor([names.index(n) for n in fields], dtype=torch.int64), persistent=False)

    def forward(self, batch: Batch) -> Batch:
        if not len(self.columns):
            return batch
        ids_BI = batch.sparse.index_select(1, self.columns)
        gone_BI = ids_BI <= OOV_ID
        if self.training and self.dropout > 0:
            gone_BI = gone_BI | (torch.rand(ids_BI.shape, device=ids_BI.device) < self.dropout)
        return replace(batch, sparse=batch.sparse.index_copy(1, self.columns, ids_BI.masked_fill(gone_BI, PADDING_ID)))


class ContrastiveModel(CTRModel):
    """:class:`CTRModel` with a contrastive loss on views of its fields (:class:`Contrast`), in training only.

    The tokens of a row are looked up once; each of ``views_of`` costs two passes of the encoder more. With ``weight=0`` and
    without ``id_fields`` it is the plain model to the bit. Memory of the loss: some [B, B] tensors.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(CTRModel.Config):
        """
        Args:
            contrast: see :class:`ContrastConfig`.
            views_of: groups of fields, with a loss for each, such as those of the user and those of the item; empty: one loss
                on views of all fields.
            encoder: a block of its own that encodes the views, of which then only the embedding learns; ``None``: the
                interaction, which must return more than a logit.
            id_fields: sparse fields of ids that count as padding where training has not seen them, see :class:`KnownIds`.
            id_dropout: chance that such an id is dropped in training; for cold items, .3 to .5.
        """

        contrast: ContrastConfig = field(default_factory=ContrastConfig)
        views_of: tuple[tuple[str, ...], ...] = ()
        encoder: Interaction.Config | None = None
        id_fields: tuple[str, ...] = ()
        id_dropout: float = 0.0

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__(config, layout)
        self.known = KnownIds(config.id_fields, config.id_dropout, layout)
        self.contrasts = _contrasts(config.contrast, config.views_of, config.id_fields, self.embedding.out.names, layout)
        self.encoder: Interaction | None = None
        if config.contrast.weight == 0:
            return
        if config.encoder is not None:
            self.encoder = build(config.encoder, self.embedding.out)
            initialize(self.encoder, config.weight_init)
            return
        check_encoder("the interaction", self.interaction)

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What the plain model shows."""
        return super().explain(self.known(batch))

    def forward(self, batch: Batch) -> Output:
        known: Batch = self.known(batch)
        x_BFD = self.embedding(known)
        logits = self.score(known, x_BFD)
        if not self.training or not len(self.contrasts):
            return Output(logits)
        encode = self.interaction if self.encoder is None else self.encoder
        return Output(logits, {"contrastive": torch.stack([loss(batch, x_BFD, encode) for loss in self.contrasts]).sum()})


class Contrasted(ModelComponent):
    """Any model with a contrastive loss on views of its fields (:class:`Contrast`), in training only, by an encoder of its own.

    Views are made of the tokens of the model's main embedding, ``model.embedding``, which the loss so trains; other tables of
    the model, and behaviours that it reads itself, have no part in it. The tokens of a row are looked up once more for it, and
    each of ``views_of`` costs two passes of the encoder. With ``weight=0`` and without ``id_fields`` it is the model itself to
    the bit. The loss is called ``contrastive_views``, beside those that the model may have.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            embedding, weight_init: those of the model, whose own are not read.
            model: the model.
            contrast, views_of, encoder, id_fields, id_dropout: see :class:`ContrastiveModel`; the encoder is needed.
        """

        model: ModelComponent.Config
        contrast: ContrastConfig = field(default_factory=ContrastConfig)
        views_of: tuple[tuple[str, ...], ...] = ()
        encoder: Interaction.Config | None = None
        id_fields: tuple[str, ...] = ()
        id_dropout: float = 0.0

        def __post_init__(self) -> None:
            name = self.model.component.__name__
            if isinstance(self.model, ContrastiveModel.Config | Contrasted.Config):
                raise ConfigError(
                    f"the model is a {name}, which has a contrastive loss of views already; set its options instead"
                )
            if self.encoder is None and self.contrast.weight > 0:
                raise ConfigError(
                    f"a {name} has no block that could encode views alone; set encoder to one (MLP, AdaptiveFusion), or "
                    "contrast.weight to 0"
                )

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        self.model = build_model(replace(config.model, embedding=config.embedding, weight_init=config.weight_init), layout)
        self.known = KnownIds(config.id_fields, config.id_dropout, layout)
        self.contrasts = _contrasts(config.contrast, config.views_of, config.id_fields, self.embedding.out.names, layout)
        self.encoder: Interaction | None = None
        if config.encoder is not None and config.contrast.weight > 0:
            self.encoder = build(config.encoder, self.embedding.out)
            initialize(self.encoder, config.weight_init)

    @property
    def embedding(self) -> FeatureEmbedding:  # type: ignore[override]  # it is the model's, and has its place in the state there
        """The main embedding of the model."""
        return self.model.embedding

    @property
    def axes(self) -> Axes:
        """Those of the model."""
        return self.model.axes

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What the model shows."""
        return self.model.explain(self.known(batch))

    def forward(self, batch: Batch) -> Output:
        known: Batch = self.known(batch)
        output = self.model(known)
        if not self.training or self.encoder is None:
            return output
        x_BFD, encode = self.embedding(known), self.encoder
        loss = torch.stack([contrast(batch, x_BFD, encode) for contrast in self.contrasts]).sum()
        return replace(output, auxiliary={**output.auxiliary, "contrastive_views": loss})


def _contrasts(
    config: ContrastConfig,
    views_of: Sequence[Sequence[str]],
    id_fields: Sequence[str],
    names: tuple[str, ...],
    layout: BatchLayout,
) -> nn.ModuleList:
    """The losses of groups of fields, or of all ``names``; none if they weigh nothing."""
    contrasts = nn.ModuleList()
    for fields in views_of or (names,) if config.weight > 0 else ():
        for name in fields:
            if name not in names:
                raise ConfigError(f"views_of names {name!r}, which the model does not read{suggest(name, names)}")
        contrasts.append(Contrast(config, fields, id_fields, names, layout))
    return contrasts


def contrastive(
    model: ModelComponent.Config,
    contrast: ContrastConfig | None = None,
    *,
    views_of: tuple[tuple[str, ...], ...] = (),
    encoder: Interaction.Config | None = None,
    id_fields: tuple[str, ...] = (),
    id_dropout: float = 0.0,
) -> ContrastiveModel.Config | Contrasted.Config:
    """``model`` with a contrastive loss: of a plain CTRModel a :class:`ContrastiveModel`, whose options these are, of any other
    model a :class:`Contrasted`, which needs an encoder.

    Raises:
        ConfigError: ``model`` has such a loss already, or there is no encoder where one is needed.
    """
    if type(model) is not CTRModel.Config:
        return Contrasted.Config(
            embedding=model.embedding,
            weight_init=model.weight_init,
            model=model,
            contrast=contrast or ContrastConfig(),
            views_of=views_of,
            encoder=encoder,
            id_fields=id_fields,
            id_dropout=id_dropout,
        )
    return ContrastiveModel.Config(
        embedding=model.embedding,
        weight_init=model.weight_init,
        interaction=model.interaction,
        head=model.head,
        first_order=model.first_order,
        contrast=contrast or ContrastConfig(),
        views_of=views_of,
        encoder=encoder,
        id_fields=id_fields,
        id_dropout=id_dropout,
    )
