"""OptInter: every pair of categorical fields memorised, factorised, or left to the network (arXiv:2108.01265)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Literal, cast, get_args

import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, check_choice, check_not_negative, positive
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.base import Axes, evaluating
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import Head, ModelComponent, initialize
from ctrlib.schema import BatchLayout, DataError, FieldLayout, suggest

Choice = Literal["memorize", "factorize", "naive"]
Relaxation = Literal["softmax", "gumbel", "straight_through"]

CHOICES: tuple[Choice, ...] = get_args(Choice)
_REMEDY = "add crosses of categorical fields to the schema (CrossField) and prepare the data again"


@dataclass(frozen=True, slots=True)
class FieldPair:
    """Two categorical fields in the order of the layout, and the column of their cross, where the data has one."""

    left: str
    right: str
    cross: str | None

    @property
    def name(self) -> str:
        """``"user*item"``."""
        return f"{self.left}*{self.right}"


def field_pairs(layout: BatchLayout, fields: tuple[str, ...] | None = None) -> tuple[FieldPair, ...]:
    """The P pairs of categorical fields, ordered (0, 1), (0, 2), …, (1, 2), …

    A cross is found by the two fields that it names as its parts, in either order, wherever its column stands. Crosses,
    numbers and sequences form no pairs.

    Args:
        layout: of the batches.
        fields: only these, crosses among them; ``None``: all.

    Raises:
        DataError: two pairs have one name, as ``a`` and ``b*c``, and ``a*b`` and ``c`` have.
    """
    columns = [c for c in layout.sparse if fields is None or c.name in fields]
    crosses = {frozenset(c.parts): c.name for c in columns if c.parts is not None}
    names = [c.name for c in columns if c.parts is None]
    pairs = tuple(FieldPair(a, b, crosses.get(frozenset((a, b)))) for a, b in combinations(names, 2))
    called = [p.name for p in pairs]
    if len(set(called)) < len(called):
        twice = next(name for name in called if called.count(name) > 1)
        raise DataError(f"two pairs of fields would both be called {twice!r}; rename a field that has a '*' in its name")
    return pairs


class OptInter(ModelComponent):
    """Vectors of all fields and of the pairs, through one MLP. Shape: Batch → Output(logits [B] or [B, T]).

        logits = head(MLP([x_1, …, x_F ; b_1, …, b_P])),   b_p = Σ_o softmax(a_p / τ)_o · e_p^o

    with, for the pair p of the fields i and j,

    * memorize: e = the row of the value pair in the vocabulary of the cross i*j;
    * factorize: e = u_i ⊙ u_j, rows of a second table over the values of the fields;
    * naive: e = 0.

    While ``choices`` is ``None`` the model is the mixture, with logits a [P, 3] and the temperature τ, a buffer that only a
    search moves (:func:`ctrlib.search.optinter.search_optinter`). With choices, b_p is what was chosen: naive pairs have no
    place in the MLP's input, and neither table has rows that no pair reads. Pairs whose cross the data lacks can only be
    factorised or naive.

    Parameters, with V_f values in field f, V_p in the cross of p, s1 and s2 the widths: V·s1 + (values of the fields of
    factorised pairs)·s2 + (values of memorised crosses)·s2 + MLP, and 3·P for the mixture. Rows for padding and OOV are values.
    Memorised and factorised pairs start with vectors of one size: factors as N(0, init_std), so that their products, like
    the other rows, have the standard deviation init_std.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """
        Args:
            embedding: of the fields; ``dim`` is s1. ``dims`` and ``frozen`` are of this table only.
            pair_dim: s2, the width of crosses and of factors.
            choices: by pair (``"user*item"``; pairs not named are naive), or one choice for all pairs; ``None``: the mixture.
            operations: what the mixture offers.
            relaxation: of the mixture in training. ``softmax``: as above; ``gumbel``: Gumbel noise added to a; or, forward,
                the largest of these alone (``straight_through``). The noise is drawn once a batch.
            arch_gain: a starts as Xavier-normal, times this; 0: at zero.
            mlp: the hidden layers.
        """

        pair_dim: int = 10
        choices: Mapping[str, Choice] | Choice | None = None
        operations: tuple[Choice, ...] = CHOICES
        relaxation: Relaxation = "softmax"
        arch_gain: float = 1.0
        # NOTE[DIFF] the paper prints the norm after ReLU; its code, from which the published numbers come, has it before
        mlp: MLP.Config = field(default_factory=lambda: MLP.Config(hidden_units=(700,) * 5, norm="layer"))

        def __post_init__(self) -> None:
            positive("OptInter.pair_dim", self.pair_dim)
            check_not_negative("OptInter.arch_gain", self.arch_gain)
            check_choice("OptInter.relaxation", self.relaxation, get_args(Relaxation))
            for operation in self.operations:
                check_choice("OptInter.operations", operation, CHOICES)
            if len(set(self.operations)) != len(self.operations) or len(self.operations) < 2:
                raise ConfigError(
                    f"OptInter.operations is {self.operations}; expected two or three different ones of {', '.join(CHOICES)}. "
                    "For one and the same of all pairs, set choices"
                )
            if isinstance(self.choices, Mapping):
                for pair, choice in self.choices.items():
                    check_choice(f"OptInter.choices[{pair!r}]", choice, CHOICES)
            elif self.choices is not None:
                check_choice("OptInter.choices", self.choices, CHOICES)
            if self.mlp.output_dim is not None:
                raise ConfigError(
                    f"OptInter.mlp.output_dim is {self.mlp.output_dim}; expected None: the model adds the last layer. "
                    "Put that width last in hidden_units instead"
                )

    config: Config
    interaction: MLP

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        wanted = layout.names if config.embedding.fields is None else config.embedding.fields
        crosses = [c.name for c in layout.sparse if c.parts is not None]
        self.embedding = FeatureEmbedding(
            replace(config.embedding, fields=tuple(name for name in wanted if name not in crosses)), layout
        )
        self.pairs = field_pairs(layout, wanted)
        self.logits: nn.Parameter | None = None
        self.closed: Tensor
        self.temperature: Tensor
        if config.choices is None and self.pairs:
            self.operations = self._offered(config.operations)
            count = (len(self.pairs), len(self.operations))
            self.logits = nn.Parameter(torch.randn(count) * (config.arch_gain * math.sqrt(2 / sum(count))))
            missing = [[o == "memorize" and p.cross is None for o in self.operations] for p in self.pairs]
            self.register_buffer("closed", torch.tensor(missing))
            self.register_buffer("temperature", torch.ones(()))
            memorised = [i for i, p in enumerate(self.pairs) if p.cross is not None and "memorize" in self.operations]
            factorised = list(range(len(self.pairs))) if "factorize" in self.operations else []
        else:
            self.operations = CHOICES
            self.chosen = self._resolve({} if config.choices is None else config.choices)
            memorised = [i for i, choice in enumerate(self.chosen) if choice == "memorize"]
            factorised = [i for i, choice in enumerate(self.chosen) if choice == "factorize"]
        memorised.sort(key=lambda i: crosses.index(cast(str, self.pairs[i].cross)))  # as the columns stand
        slots = range(len(self.pairs)) if self.logits is not None else (*memorised, *factorised)
        self.slots = tuple(self.pairs[i].name for i in slots)
        """The pairs that have a place in the MLP's input, in its order."""

        self.crosses = self._table([cast(str, self.pairs[i].cross) for i in memorised], config.embedding.init_std, layout)
        self.at: Tensor | None
        in_place = self.logits is None or memorised == list(slots)
        at = None if in_place else torch.tensor(memorised, dtype=torch.int64)
        self.register_buffer("at", at, persistent=False)
        ends = [(self.pairs[i].left, self.pairs[i].right) for i in factorised]
        # NOTE[DIFF] Xavier in the paper, whose spread shrinks with the number of rows: on Criteo, factors start at 0.002 and
        # their products at 4e-6. Here products start as large as the rows of crosses, so that both have a fair start.
        reading = sorted({name for pair in ends for name in pair})
        self.factors = self._table(reading, math.sqrt(config.embedding.init_std), layout)
        self.left: Tensor
        self.right: Tensor
        if self.factors is not None:
            places = self.factors.out.names
            self.register_buffer("left", torch.tensor([places.index(a) for a, _ in ends]), persistent=False)
            self.register_buffer("right", torch.tensor([places.index(b) for _, b in ends]), persistent=False)

        width = self.embedding.out.width + len(self.slots) * config.pair_dim
        self.interaction = MLP(config.mlp, FieldLayout(("fields_and_pairs",), width))
        self.head = Head(Head.Config(), self.interaction.out, len(layout.labels))
        initialize(self, config.weight_init)

    def _offered(self, operations: tuple[Choice, ...]) -> tuple[Choice, ...]:
        """Without memorize where no pair has a cross."""
        if any(p.cross is not None for p in self.pairs):
            return operations
        offered = tuple(o for o in operations if o != "memorize")
        if len(offered) < 2:
            raise ConfigError(
                f"OptInter.operations is {', '.join(operations)}, but the data has no cross to memorise; {_REMEDY}, or take "
                "factorize and naive"
            )
        return offered

    def _resolve(self, choices: Mapping[str, Choice] | Choice) -> tuple[Choice, ...]:
        """One choice for every pair; a mapping may name the fields of a pair in either order."""
        if isinstance(choices, str):
            chosen: list[Choice] = [choices] * len(self.pairs)
        else:
            chosen = ["naive"] * len(self.pairs)
            places = {f"{p.right}*{p.left}": i for i, p in enumerate(self.pairs)}
            places |= {p.name: i for i, p in enumerate(self.pairs)}
            for name, choice in choices.items():
                if name not in places:
                    raise ConfigError(
                        f"OptInter.choices names {name!r}, which is no pair of categorical fields of the data"
                        + suggest(name, (p.name for p in self.pairs))
                    )
                chosen[places[name]] = choice
        for pair, choice in zip(self.pairs, chosen, strict=True):
            if choice == "memorize" and pair.cross is None:
                raise ConfigError(f"{pair.name!r} is to be memorised, but the data has no cross of these fields; {_REMEDY}")
        return tuple(chosen)

    def _table(self, fields: list[str], init_std: float, layout: BatchLayout) -> FeatureEmbedding | None:
        """Vectors of width s2 of these fields."""
        if not fields:
            return None
        config = replace(
            self.config.embedding, dim=self.config.pair_dim, dims={}, frozen=(), fields=tuple(fields), init_std=init_std
        )
        return FeatureEmbedding(config, layout)

    def probabilities(self) -> Tensor:
        """[P, O]: the share of every operation in the mixture of each pair; those that are closed to a pair have none."""
        assert self.logits is not None
        logits_PO = self.logits.masked_fill(self.closed, -math.inf)
        if self.training and self.config.relaxation != "softmax":
            logits_PO = logits_PO - torch.empty_like(logits_PO).exponential_().log()  # −log of an exponential is Gumbel
        shares_PO = torch.softmax(logits_PO / self.temperature, dim=1)
        if self.config.relaxation != "straight_through":
            return shares_PO
        largest_PO = nn.functional.one_hot(shares_PO.argmax(1), len(self.operations)).to(shares_PO.dtype)
        return largest_PO - shares_PO.detach() + shares_PO

    def pair_vectors(self, batch: Batch) -> Tensor | None:
        """b of every slot, [B, slots, s2]; ``None`` if there is no slot."""
        memorised_BCD = None if self.crosses is None else self.crosses(batch)
        product_BPD = None
        if self.factors is not None:
            factors_BFD = self.factors(batch)
            product_BPD = factors_BFD.index_select(1, self.left) * factors_BFD.index_select(1, self.right)
        if self.logits is None:
            found = [x for x in (memorised_BCD, product_BPD) if x is not None]
            return torch.cat(found, dim=1) if found else None
        shares = dict(zip(self.operations, self.probabilities().unsqueeze(2).unbind(1), strict=True))
        if product_BPD is not None:
            product_BPD = shares["factorize"] * product_BPD
        if memorised_BCD is None:
            return product_BPD
        share = shares["memorize"] if self.at is None else shares["memorize"].index_select(0, self.at)
        memorised_BCD = share * memorised_BCD
        if self.at is None:
            return memorised_BCD if product_BPD is None else memorised_BCD + product_BPD
        if product_BPD is None:
            product_BPD = memorised_BCD.new_zeros(len(memorised_BCD), len(self.pairs), memorised_BCD.shape[2])
        return product_BPD.index_add(1, self.at, memorised_BCD.to(product_BPD.dtype))

    def forward(self, batch: Batch) -> Output:
        x_BW = self.embedding(batch).flatten(1)
        pairs_BSD = self.pair_vectors(batch)
        if pairs_BSD is not None:
            x_BW = torch.cat([x_BW, pairs_BSD.flatten(1)], dim=1)
        logits_BT = cast(Tensor, self.head(self.interaction(x_BW.unsqueeze(1))))
        return Output(logits_BT.squeeze(1) if logits_BT.shape[1] == 1 else logits_BT)

    def best(self) -> dict[str, Choice]:
        """The choice of every pair: of the mixture, the operation of the largest logit."""
        if self.logits is None:
            return {p.name: choice for p, choice in zip(self.pairs, self.chosen, strict=True)}
        places = self.logits.detach().masked_fill(self.closed, -math.inf).argmax(1).tolist()
        return {p.name: self.operations[i] for p, i in zip(self.pairs, places, strict=True)}

    def fix(self, choices: Mapping[str, Choice] | Choice) -> None:
        """Close everything but the choices, for good; all parts of the mixture stay, as in the authors' re-training.

        A pair's share of its choice is then exactly one. Pairs not named are naive.

        Raises:
            ConfigError: the model is no mixture; no such pair; an operation that the mixture does not offer.
        """
        if self.logits is None:
            raise ConfigError("only a mixture (choices=None, with two categorical fields or more) can be fixed")
        chosen = self._resolve(choices)
        for pair, choice in zip(self.pairs, chosen, strict=True):
            if choice not in self.operations:
                raise ConfigError(f"{pair.name!r} is to be {choice!r}, but the mixture offers {', '.join(self.operations)}")
        self.closed.copy_(torch.tensor([[o != choice for o in self.operations] for choice in chosen]))
        self.logits.requires_grad_(False)

    @property
    def axes(self) -> Axes:
        """Of ``"choice"``: pairs, operations."""
        return {"choice": (tuple(p.name for p in self.pairs), self.operations)} if self.pairs else {}

    @evaluating
    def explain(self, batch: Batch) -> dict[str, Tensor]:
        """``"choice"`` [B, P, operations]: the share of each operation in every pair; the same in all rows."""
        if not self.pairs:
            return {}
        if self.logits is not None:
            shares_PO = self.probabilities()
        else:
            shares_PO = torch.tensor([[float(o == c) for o in CHOICES] for c in self.chosen], device=batch.sparse.device)
        return {"choice": shares_PO.expand(len(batch), -1, -1)}
