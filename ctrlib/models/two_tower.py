"""Two towers: the score of a user and an item is a product of two vectors, each made of the fields of its own side.

The scorer of the cold-start reconstruction (see :mod:`ctrlib.models.contrastive`): with content beside the ids, an item
without a single click has a vector too, and every item of a catalogue is scored by one matrix product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, check_not_negative
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.adaptive_fusion import AdaptiveFusion
from ctrlib.interactions.base import Axes, Interaction, build, evaluating
from ctrlib.losses import info_nce
from ctrlib.models.contrastive import Contrast, ContrastConfig, Identity, KnownIds, check_encoder
from ctrlib.models.ctr import ModelComponent, initialize
from ctrlib.schema import BatchLayout, FieldLayout, suggest


class TwoTower(ModelComponent):
    """logit = ⟨z_u, z_v⟩ / √k + b, with z_u = user_tower(tokens of the user) and z_v = item_tower(tokens of the item).

    Shape: Batch → Output(logits [B]). z are the flattened outputs of the towers, of one width k. In training there are up to
    four auxiliary losses: ``contrastive_user`` and ``contrastive_item`` on views of the fields of a side
    (:class:`.Contrast`); ``contrastive_cross``, InfoNCE between z_u and z_v of the clicked rows of the batch, where rows of the
    same user or of the same item (:class:`.Identity`) are no negatives; and ``contrastive_unclicked``, InfoNCE of the scores,
    in which every user of a clicked row tells its item from the items of all unclicked rows of the batch:

        L = −(1/n) Σ_i ln( e^{s_ii} / (e^{s_ii} + Σ_{l unclicked} e^{s_il}) ),    s_il = ⟨z_u of row i, z_v of row l⟩ / √k

    Rows l with the item of row i are no negatives there. Rows of weight 0 are left out of all four.

    NOTE[DIFF] the negatives of ``contrastive_cross`` come as often as they are clicked; there is no correction by −ln p(v), for
    which the model would have to know how often that is. Those of ``contrastive_unclicked`` come as the data has them: drawn
    alike, if its unclicked rows are, and then nothing needs correction.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            item_fields: the fields of the item; all others are of the user.
            user_tower, item_tower: blocks over the tokens of each side.
            contrast: of the views of each side; with ``weight=0``, the default, there are none.
            cross_weight: λ of ``contrastive_cross``, which has the temperature and similarity of ``contrast``.
            unclicked_weight: λ of ``contrastive_unclicked``.
            id_fields, id_dropout: see :class:`~ctrlib.models.contrastive.KnownIds`.
        """

        item_fields: tuple[str, ...]
        user_tower: Interaction.Config = field(default_factory=AdaptiveFusion.Config)
        item_tower: Interaction.Config = field(default_factory=AdaptiveFusion.Config)
        contrast: ContrastConfig = field(default_factory=lambda: ContrastConfig(weight=0.0))
        cross_weight: float = 0.0
        unclicked_weight: float = 0.0
        id_fields: tuple[str, ...] = ()
        id_dropout: float = 0.0

        def __post_init__(self) -> None:
            check_not_negative("cross_weight", self.cross_weight)
            check_not_negative("unclicked_weight", self.unclicked_weight)

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        if len(layout.labels) > 1:
            raise ConfigError(
                f"the data has {len(layout.labels)} labels ({', '.join(layout.labels)}), but this model returns one logit; "
                "choose a model with a head, or one label"
            )
        self.embedding = FeatureEmbedding(config.embedding, layout)
        names, dim = self.embedding.out.names, self.embedding.out.dim
        for name in config.item_fields:
            if name not in names:
                raise ConfigError(f"item_fields names {name!r}, which the model does not read{suggest(name, names)}")
        user = tuple(name for name in names if name not in config.item_fields)
        item = tuple(name for name in names if name in config.item_fields)
        if not user or not item:
            raise ConfigError(
                f"item_fields is {list(config.item_fields)} of the fields {list(names)}; expected some for the item, and some "
                "left for the user"
            )
        self.user_at: Tensor
        self.item_at: Tensor
        for side, fields in (("user_at", user), ("item_at", item)):
            at = torch.tensor([names.index(name) for name in fields], dtype=torch.int64)
            self.register_buffer(side, at, persistent=False)
        self.user_tower = build(config.user_tower, FieldLayout(user, dim))
        self.item_tower = build(config.item_tower, FieldLayout(item, dim))
        self.width = self.user_tower.out.width
        if self.item_tower.out.width != self.width:
            raise ConfigError(
                f"the user's tower returns {self.width} numbers and the item's {self.item_tower.out.width}; expected as many: "
                "give the last blocks one width"
            )
        if config.contrast.weight > 0:
            check_encoder("user_tower", self.user_tower)
            check_encoder("item_tower", self.item_tower)
        self.bias = nn.Parameter(torch.zeros(()))
        self.known = KnownIds(config.id_fields, config.id_dropout, layout)
        self.user_contrast, self.item_contrast = (
            Contrast(config.contrast, fields, config.id_fields, fields, layout) for fields in (user, item)
        )
        self.user_id, self.item_id = (Identity(fields, config.id_fields, layout) for fields in (user, item))
        initialize(self, config.weight_init)

    @property
    def axes(self) -> Axes:
        """Those of the towers, as ``"user/…"`` and ``"item/…"``."""
        towers = {"user": self.user_tower, "item": self.item_tower}
        return {f"{side}/{name}": labels for side, tower in towers.items() for name, labels in tower.axes.items()}

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """What the towers have to show, as ``"user/…"`` and ``"item/…"``."""
        user_BFD, item_BFD = self._tokens(self.known(batch))
        towers = {"user": (self.user_tower, user_BFD), "item": (self.item_tower, item_BFD)}
        return {f"{side}/{name}": value for side, (tower, x) in towers.items() for name, value in tower.explain(x).items()}

    @evaluating
    def vectors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """z_u and z_v, [B, k] each; the score of any user and any item is ⟨z_u, z_v⟩/√k + ``bias``."""
        user_BFD, item_BFD = self._tokens(self.known(batch))
        return self.user_tower(user_BFD).flatten(1), self.item_tower(item_BFD).flatten(1)

    def _tokens(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x_BFD = self.embedding(batch)
        return x_BFD.index_select(1, self.user_at), x_BFD.index_select(1, self.item_at)

    def forward(self, batch: Batch) -> Output:
        user_BFD, item_BFD = self._tokens(self.known(batch))
        user_BK, item_BK = self.user_tower(user_BFD).flatten(1), self.item_tower(item_BFD).flatten(1)
        logits = (user_BK * item_BK).sum(1) / math.sqrt(self.width) + self.bias
        if not self.training:
            return Output(logits)
        auxiliary: dict[str, Tensor] = {}
        if self.config.contrast.weight > 0:
            auxiliary["contrastive_user"] = self.user_contrast(batch, user_BFD, self.user_tower)
            auxiliary["contrastive_item"] = self.item_contrast(batch, item_BFD, self.item_tower)
        if self.config.cross_weight > 0 and batch.labels is not None:
            auxiliary["contrastive_cross"] = self.config.cross_weight * self._cross(batch, user_BK, item_BK)
        if self.config.unclicked_weight > 0 and batch.labels is not None:
            auxiliary["contrastive_unclicked"] = self.config.unclicked_weight * self._unclicked(batch, user_BK, item_BK)
        return Output(logits, auxiliary)

    def _cross(self, batch: Batch, user_BK: Tensor, item_BK: Tensor) -> Tensor:
        same_user_BB, same_item_BB = self.user_id.same(batch), self.item_id.same(batch)
        rows_B = cast(Tensor, batch.labels)[:, 0] > 0
        if batch.counted is not None:
            rows_B = rows_B & batch.counted
        both = [same for same in (same_user_BB, same_item_BB) if same is not None]
        return info_nce(
            user_BK,
            item_BK,
            temperature=self.config.contrast.temperature,
            similarity=self.config.contrast.similarity,
            exclude_BB=torch.stack(both).any(0) if both else None,
            rows_B=rows_B,
            symmetric=True,
        )

    def _unclicked(self, batch: Batch, user_BK: Tensor, item_BK: Tensor) -> Tensor:
        clicked_B = cast(Tensor, batch.labels)[:, 0] > 0
        counted_B = torch.ones_like(clicked_B) if batch.counted is None else batch.counted
        rows_N, others_M = (clicked_B & counted_B).nonzero().squeeze(1), (~clicked_B & counted_B).nonzero().squeeze(1)
        if not len(rows_N):
            return (user_BK * 0).sum()
        # No autocast: as in info_nce, scores of half precision are too coarse for a softmax.
        with torch.autocast(user_BK.device.type, enabled=False):
            dtype = torch.promote_types(user_BK.dtype, torch.float32)
            user_NK, item_BK = user_BK[rows_N].to(dtype) / math.sqrt(self.width), item_BK.to(dtype)
            own_N1 = (user_NK * item_BK[rows_N]).sum(1, keepdim=True)
            score_NM = user_NK @ item_BK[others_M].T
            same_item_BB = self.item_id.same(batch)
            if same_item_BB is not None:
                score_NM = score_NM.masked_fill(same_item_BB[rows_N][:, others_M], float("-inf"))
            return (torch.cat([own_N1, score_NM], dim=1).logsumexp(1) - own_N1.squeeze(1)).mean()
