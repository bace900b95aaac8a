"""What models of behaviour sequences are made of: the activation unit, target attention, pooling; without padding.

The N behaviours of the B rows of a batch stand one after another, so what is here takes memory in proportion to N, but for
:meth:`Steps.recent`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib.batch import Batch
from ctrlib.config import Component, ConfigError, check_choice, positive
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Axes, numbered
from ctrlib.interactions.mlp import UnitActivation, activation_layer
from ctrlib.ragged import expand, segment_ids, segment_softmax, segment_sum
from ctrlib.schema import BatchLayout, FieldLayout, HistoryColumn, suggest

AttentionNorm = Literal["none", "softmax", "sigmoid"]
Pool = Literal["sum", "mean", "sqrt"]

SHOWN = 50
"""How many behaviours of a row ``explain`` shows: the most recent ones."""

RECENT = numbered("recent", SHOWN)
"""Their labels; ``"recent_0"`` is the last behaviour."""


@dataclass(frozen=True, slots=True)
class Steps:
    """The behaviours of B rows, one after another, oldest first.

    Attributes:
        h_NW: a vector of each.
        offsets_B1: row b owns ``h_NW[offsets_B1[b]:offsets_B1[b + 1]]``.
        row_N: b of each, int64, ascending.
        real_N: False for padding, which nothing reads.
    """

    h_NW: Tensor  # noqa: N815 (shape suffixes)
    offsets_B1: Tensor  # noqa: N815
    row_N: Tensor  # noqa: N815
    real_N: Tensor  # noqa: N815

    def replaced(self, h_NW: Tensor) -> Steps:
        """The same behaviours with other vectors."""
        return Steps(h_NW, self.offsets_B1, self.row_N, self.real_N)

    def kept(self, keep_N: Tensor) -> Steps:
        """The same, but behaviours that are not kept count as padding."""
        return Steps(self.h_NW, self.offsets_B1, self.row_N, self.real_N & keep_N)

    def count(self) -> Tensor:
        """n, the number of behaviours of every row without padding: [B] float32."""
        return segment_sum(self.real_N.float(), self.offsets_B1)

    def pool(self, x_NW: Tensor, weight_N: Tensor | None = None, how: Pool = "sum") -> Tensor:
        """Σ_j w_j x_j over the behaviours of a row, with ``mean`` divided by n, with ``sqrt`` by √n; 0 where there are none.
        Shape: [N, W], [N] → [B, W]."""
        x_NW = x_NW.to(torch.promote_types(x_NW.dtype, torch.float32))
        weight_N = x_NW.new_ones(x_NW.shape[0]) if weight_N is None else weight_N.to(x_NW.dtype)
        total_BW = segment_sum(x_NW, self.offsets_B1, torch.where(self.real_N, weight_N, 0.0))
        if how == "sum":
            return total_BW
        count_B1 = self.count().clamp(min=1).unsqueeze(1).to(x_NW.dtype)
        return total_BW / (count_B1 if how == "mean" else count_B1.sqrt())

    def recent(self, x_NW: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """The last ``length`` behaviours of every row, the last one first: [N, W] → [B, length, W], 0 where there are fewer;
        and [B, length], whether there is one. Takes memory of B·length."""
        rows = self.offsets_B1.shape[0] - 1
        # The place of a behaviour: how many behaviours of its row follow it. Counted without padding, wherever that stands.
        seen_N = self.real_N.long().cumsum(0)
        last_B = F.pad(seen_N, (1, 0)).index_select(0, self.offsets_B1[1:].long())
        place_N = last_B.index_select(0, self.row_N) - seen_N
        fits_N = self.real_N & (place_N < length)
        at_N = torch.where(fits_N, self.row_N * length + place_N, rows * length)  # the last place is that of all others
        block_MW = x_NW.new_zeros(rows * length + 1, x_NW.shape[1]).index_copy(0, at_N, x_NW)
        there_M = x_NW.new_zeros(rows * length + 1).index_copy(0, at_N, fits_N.to(x_NW.dtype))
        return block_MW[:-1].reshape(rows, length, x_NW.shape[1]), there_M[:-1].reshape(rows, length) > 0


def read_behaviours(embedding: FeatureEmbedding, batch: Batch, history: str) -> Steps:
    """The behaviours of a history, their A attributes side by side: W = A·D.

    A behaviour of which all attributes are zero vectors (ids 0, or values with closed gates) is padding. So are all of them
    while a vocabulary is still all zeros: frozen and not loaded yet, or with an ``init_std`` of 0.
    """
    found = embedding.behaviours(batch, history)
    h_NW = found.x_NAD.flatten(1)
    return Steps(h_NW, found.offsets_B1, segment_ids(found.offsets_B1, h_NW.shape[0]), found.real_N)


def choose_histories(
    model: str, layout: BatchLayout, wanted: tuple[str, ...] | None, fields: tuple[str, ...] | None
) -> tuple[HistoryColumn, ...]:
    """The histories that a model is to read.

    Args:
        model: its name, for errors.
        layout: of the batches.
        wanted: their names; ``None``: all that have a field among ``fields``.
        fields: those that the embedding reads; ``None``: all.

    Raises:
        ConfigError: the data has none, or none of this name.
    """
    by_name = {h.name: h for h in layout.histories if fields is None or set(h.fields) & set(fields)}
    if not by_name:
        there = "embedding.fields names none of its fields" if layout.histories else "the data has none"
        raise ConfigError(
            f"{model} reads a history of behaviours, but {there}; declare one in the schema (histories, of ordered sequence "
            "fields) and prepare the data again, or choose another model"
        )
    if wanted is not None and not wanted:
        raise ConfigError(f"{model}.histories is empty; name those that it is to read, or None for all")
    for name in wanted or ():
        if name not in by_name:
            raise ConfigError(f"{model} is to read history {name!r}, which the data lacks{suggest(name, by_name)}")
    return tuple(by_name[name] for name in wanted or by_name)


def one_history(model: str, layout: BatchLayout, wanted: str | None, fields: tuple[str, ...] | None) -> HistoryColumn:
    """The single history that a model is to read; ``None``: the only one. Otherwise as :func:`choose_histories`."""
    found = choose_histories(model, layout, None if wanted is None else (wanted,), fields)
    if len(found) > 1:
        raise ConfigError(
            f"{model} reads one history, and the data has {', '.join(h.name for h in found)}; name one in history"
        )
    return found[0]


def need_target(model: str, history: HistoryColumn, fields: tuple[str, ...] | None) -> None:
    """Raise :class:`ConfigError` if the candidate has nothing that the behaviours could be compared with.

    Args:
        model: its name, for errors.
        history: whose behaviours are compared.
        fields: those that the embedding reads; ``None``: all.
    """
    compares = f"{model} compares the behaviours of history {history.name!r} with the candidate, but"
    pairs = [(name, target) for name, target in zip(history.fields, history.targets, strict=True) if target is not None]
    if not pairs:
        raise ConfigError(
            f"{compares} none of its fields ({', '.join(history.fields)}) shares a vocabulary with a field of the candidate; "
            "set shares in the schema"
        )
    if fields is not None and not any({*pair} <= {*fields} for pair in pairs):
        wanted = ", ".join(f"{name} and {target}" for name, target in pairs)
        raise ConfigError(f"{compares} embedding.fields has none of what they have in common; expected both of: {wanted}")


class ActivationUnit(Component, nn.Module):
    """A network on a behaviour h and a context c: y = MLP([h, c, h − c, h ⊙ c]) (DIN, arXiv:1706.06978).

    Shape: h [N, d], c [B, d], row of every behaviour [N] → [N, q]. Parameters: 4d·a_1 + a_1 + a_1·a_2 + a_2 + … + a_n·q + q,
    and those of learned activations.

    The first layer never has its 4d inputs side by side. With W = [W_1, W_2, W_3, W_4] it is

        W_1 h + W_2 c + W_3 (h − c) + W_4 (h ⊙ c) = (W_1 + W_3) h + (W_2 − W_3) c + W_4 (h ⊙ c),

    exactly; the second term is computed once a row, not once a behaviour. Without ``bias`` the last layer adds no constant.
    """

    # NOTE[DIFF] the released code's inputs; the paper's figure has h, c and a product of both

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        """
        Args:
            hidden_units: a_1, a_2, …; may be empty.
            activation: of the hidden layers.
        """

        hidden_units: tuple[int, ...] = (80, 40)
        activation: UnitActivation = "dice"

        def __post_init__(self) -> None:
            positive("ActivationUnit.hidden_units", *self.hidden_units)
            check_choice("ActivationUnit.activation", self.activation, get_args(UnitActivation))

    def __init__(self, config: Config, width: int, output_dim: int, *, bias: bool = True) -> None:
        super().__init__()
        sizes = [*pairwise((4 * width, *config.hidden_units, output_dim))]
        self.first, *following = (nn.Linear(m, n, bias=bias or i + 1 < len(sizes)) for i, (m, n) in enumerate(sizes))
        layers: list[nn.Module] = []
        for units, linear in zip(config.hidden_units, following, strict=True):
            layers += [activation_layer(config.activation, units), linear]
        self.rest = nn.Sequential(*layers)

    def forward(self, h_NW: Tensor, c_BW: Tensor, row_N: Tensor) -> Tensor:
        """[N, d], [B, d], [N] → [N, q]."""
        own, context, difference, product = self.first.weight.chunk(4, dim=1)
        context_BU = F.linear(c_BW, context - difference, self.first.bias)
        y_NU = torch.addmm(expand(context_BU, row_N), h_NW, (own + difference).T)
        return cast(Tensor, self.rest(torch.addmm(y_NU, h_NW * expand(c_BW, row_N), product.T)))

    def __call__(self, h_NW: Tensor, c_BW: Tensor, row_N: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(h_NW, c_BW, row_N))


class TargetAttention(Component, nn.Module):
    """Σ_j w_j h_j over the behaviours of a row, with w_j = norm(unit(h_j, c)). Shape: steps, c [B, d] → [B, d].

    Norms: ``none``, as in DIN, so that the sum also tells how much there is of interest; ``softmax`` over the behaviours of the
    row; ``sigmoid``. A row without behaviours gets a zero vector; with released code's softmax it gets the mean of its padding.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(Component.Config):
        """
        Args:
            unit: the network that compares a behaviour with its context.
            norm: of the weights.
            scale: divide the scores by √d, as DIN's released code does before its softmax.
        """

        unit: ActivationUnit.Config = field(default_factory=ActivationUnit.Config)
        norm: AttentionNorm = "none"
        scale: bool = False

        def __post_init__(self) -> None:
            check_choice("TargetAttention.norm", self.norm, get_args(AttentionNorm))

    def __init__(self, config: Config, width: int) -> None:
        super().__init__()
        # a number that is added to all scores of a row changes no softmax
        self.unit = ActivationUnit(config.unit, width, 1, bias=config.norm != "softmax")
        self.norm = config.norm
        self.divisor = math.sqrt(width) if config.scale else 1.0

    def scores(self, steps: Steps, c_BW: Tensor) -> Tensor:
        """What the unit says of every behaviour, [N]."""
        return self.unit(steps.h_NW, c_BW, steps.row_N).squeeze(1) / self.divisor

    def weights(self, steps: Steps, score_N: Tensor) -> Tensor:
        """w [N] from the scores; 0 for padding."""
        if self.norm == "softmax":
            score_N = score_N.masked_fill(~steps.real_N, torch.finfo(score_N.dtype).min)
            score_N = segment_softmax(score_N, steps.offsets_B1, steps.row_N)
        elif self.norm == "sigmoid":
            score_N = torch.sigmoid(score_N)
        return torch.where(steps.real_N, score_N, 0.0)

    def forward(self, steps: Steps, c_BW: Tensor) -> Tensor:
        return steps.pool(steps.h_NW, self.weights(steps, self.scores(steps, c_BW)))

    def __call__(self, steps: Steps, c_BW: Tensor) -> Tensor:
        return cast(Tensor, super().__call__(steps, c_BW))


class AttendedHistories(nn.Module):
    """The attributes of histories, each history pooled by target attention of its own. Shape: Batch → [B, A, D], ``out``."""

    def __init__(
        self, model: str, config: TargetAttention.Config, histories: Sequence[HistoryColumn], embedding: FeatureEmbedding
    ) -> None:
        super().__init__()
        for history in histories:
            need_target(model, history, embedding.config.fields)
        self.histories = tuple(history.name for history in histories)
        layouts = [embedding.attributes(name) for name in self.histories]
        self.attention = nn.ModuleList(TargetAttention(config, layout.width) for layout in layouts)
        self.out = FieldLayout(tuple(name for layout in layouts for name in layout.names), embedding.out.dim)
        self.axes: Axes = {f"{name}/weight": (RECENT,) for name in self.histories}

    def forward(self, embedding: FeatureEmbedding, batch: Batch) -> Tensor:
        parts = []
        for name, attention in zip(self.histories, self.attention, strict=True):
            pooled_BW = attention(read_behaviours(embedding, batch, name), embedding.targets(batch, name).flatten(1))
            parts.append(torch.unflatten(pooled_BW, 1, (-1, self.out.dim)))
        return torch.cat(parts, dim=1)

    def __call__(self, embedding: FeatureEmbedding, batch: Batch) -> Tensor:
        return cast(Tensor, super().__call__(embedding, batch))

    def explain(self, embedding: FeatureEmbedding, batch: Batch) -> dict[str, Tensor]:
        """``"history/weight"`` [B, 50]: weights of the most recent behaviours, the last one first; 0 where there are fewer."""
        shown = {}
        for name, module in zip(self.histories, self.attention, strict=True):
            attention = cast(TargetAttention, module)
            steps = read_behaviours(embedding, batch, name)
            weight_N = attention.weights(steps, attention.scores(steps, embedding.targets(batch, name).flatten(1)))
            shown[f"{name}/weight"] = steps.recent(weight_N.unsqueeze(1), SHOWN)[0].squeeze(2)
        return shown
