"""OptInter's search: which pairs of fields to memorise, to factorise, and to leave to the network (arXiv:2108.01265)."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, check_choice, check_not_negative, positive, to_json
from ctrlib.data.loader import Loader
from ctrlib.data.store import Store
from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import check_cross_memory
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.optinter import CHOICES, Choice, FieldPair, OptInter
from ctrlib.optim import build_optimizer
from ctrlib.schema import BatchLayout, DataError
from ctrlib.search.passes import Stepper, train_pass
from ctrlib.search.selection import Selection
from ctrlib.training import FitConfig, evaluate, seed_everything

Method = Literal["joint", "bilevel", "random"]

_log = logging.getLogger("ctrlib")


@dataclass(frozen=True, kw_only=True, slots=True)
class OptInterConfig:
    """How to search. The defaults are the paper's for Criteo and Avazu.

    Args:
        method: ``joint``: weights and logits by the gradient of one training batch (the paper's Algorithm 1). ``bilevel``: on
            every other batch the weights, on those between the logits, by first-order gradients; the rows come in the same
            order in every pass, so that a row only ever serves one of the two. ``random``: choices drawn uniformly, without
            any training: the baseline.
        passes: over the training rows. In the first one every batch is new, and its gradient tells what helps on rows not
            seen; later ones reward what fits, so that sooner or later ``joint`` memorises noise. With two or more, the
            validation rows are evaluated after each; the choices are those of the pass with the best AUC, and the search ends
            at the first pass whose AUC is lower than that of the one before. Without validation rows the last pass counts.
        learning_rate: of the logits, by Adam (ε = 1e-8, no decay). A logit moves by at most so much a step: with few steps
            the paper's value leaves the logits where they started (see :meth:`few_steps`).
        start, floor: of the temperature τ = max(floor, start − rate·step); steps are training steps only.
        rate: ``None``: such that the floor is reached with the last step.
    """

    method: Method = "joint"
    passes: int = 1
    learning_rate: float = 3e-5
    start: float = 1.0
    floor: float = 0.01
    rate: float | None = 5e-5

    def __post_init__(self) -> None:
        check_choice("optinter.method", self.method, get_args(Method))
        positive("optinter.passes", self.passes)
        positive("optinter.learning_rate", self.learning_rate)
        positive("optinter.floor", self.floor)
        if not self.start >= self.floor:
            raise ConfigError(
                f"optinter.start is {self.start}, below optinter.floor, {self.floor}; the temperature only falls: "
                "raise start, or lower floor"
            )
        if self.rate is not None:
            check_not_negative("optinter.rate", self.rate)

    @classmethod
    def paper(cls) -> OptInterConfig:
        """The defaults. The paper gives no temperature; it is the released code's."""
        return cls()

    @classmethod
    def released_code(cls) -> OptInterConfig:
        """The authors' defaults for Criteo: ten passes, logits at 1e-3."""
        # NOTE[DIFF] their code evaluates, stops and chooses on test rows, and moves the temperature during these evaluations
        return cls(passes=10, learning_rate=1e-3)

    @classmethod
    def few_steps(cls) -> OptInterConfig:
        """For some hundred to some thousand steps: logits at 1e-2, the temperature down to 0.1 with the last step."""
        return cls(learning_rate=1e-2, floor=0.1, rate=None)

    def temperature(self, step: int, steps: int) -> float:
        """τ of the training step after ``step`` others, of ``steps`` in all."""
        rate = (self.start - self.floor) / max(steps - 1, 1) if self.rate is None else self.rate
        return max(self.floor, self.start - rate * step)


def search_optinter(
    model: ModelComponent.Config,
    store: Store,
    config: OptInterConfig,
    *,
    fit: FitConfig,
    batch_size: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> Selection:
    """Train the mixture of all choices, and take the strongest of every pair.

    Reads training rows, and with several passes validation rows; never test rows. Re-train ``selection.model`` from scratch,
    as the paper does: weights of the mixture are of no use to it.

    Args:
        model: an :class:`~ctrlib.models.optinter.OptInter` config without choices.
        store: whose encoder has crosses, where the mixture is to offer memorize.
        config: see :class:`OptInterConfig`.
        fit: ``optimizer`` and ``precision`` are those of the weights of the mixture; the rest is not read.
        batch_size: rows a step.
        seed: of initial weights, noise and the order of rows.
        device: where the mixture is trained.

    Returns:
        ``pairs``: the choices; ``scores``: by how much the better of memorize and factorize is ahead of naive, in logits (0 if
        naive was not on offer; pairs that could only be naive have none); ``model``: the config with these choices. ``report``:
        ``settings``, ``seconds``, ``steps``, ``passes`` (mean loss, seconds of training, temperature, choices, validation AUC
        of each), ``logits`` and ``margins`` by pair (a margin is how far the best choice is ahead of the second), ``choices``
        (how many of each), ``parameters`` of the mixture and of the model to re-train.

    Raises:
        ConfigError: another model, choices made already, or memorize on offer and no cross in the data.
        DataError: fewer than two categorical fields; crosses that take more than the free memory; several passes, and
            validation rows of one label only.
        TrainingDivergedError: a loss is not finite.
    """
    started = time.perf_counter()
    layout = store.encoder.layout
    if not isinstance(model, OptInter.Config):
        raise ConfigError(
            f"the search of OptInter needs an OptInter model, not {model.component.__name__}; take the preset 'optinter'"
        )
    if model.choices is not None:
        raise ConfigError("the model's choices are made already; set choices to None (the preset 'optinter') to search them")
    check_cross_memory(model, layout, fit.optimizer, device=device)
    seed_everything(seed)
    net = cast(OptInter, build_model(model, layout))
    if net.logits is None:
        raise DataError(
            "OptInter chooses what to do with pairs of categorical fields, and the data has no such pair; expected two or more "
            "sparse fields (numbers become categories by encoding='bucket')"
        )
    if "memorize" in model.operations and "memorize" not in net.operations:
        raise ConfigError(
            "the data has no cross to memorise; add crosses to the schema (CrossField) and prepare the data again, or set "
            "operations=('factorize', 'naive') to choose among these"
        )
    size = _parameters(net)
    if config.method == "random":
        with torch.no_grad():
            net.logits.uniform_()
        passes: list[dict[str, Any]] = []
        steps = 0
    else:
        spread = float(net.logits.detach().std())
        passes, steps = _search(net.to(device), store, config, fit, batch_size, seed)
        if config.learning_rate * steps < spread:
            _log.warning(
                "optinter: %d steps of at most %g leave the logits about where they were drawn (with standard deviation %.2g), "
                "so chance made the choices; raise learning_rate, as OptInterConfig.few_steps() does",
                steps,
                config.learning_rate,
                spread,
            )
    choices = net.best()
    chosen = _with_choices(model, net.pairs, choices)
    with torch.device("meta"):
        smaller = _parameters(cast(OptInter, build_model(chosen, layout)))
    logits_PO = net.logits.detach().masked_fill(net.closed, -math.inf).cpu()
    names = list(choices)
    return Selection(
        method="optinter",
        encoder_hash=store.encoder.hash,
        pairs=choices,
        scores={
            name: score
            for name, score in zip(names, _ahead_of_naive(logits_PO, net.operations), strict=True)
            if math.isfinite(score)
        },
        model=chosen,
        report={
            "settings": {**asdict(config), "batch_size": batch_size, "seed": seed, "optimizer": to_json(fit.optimizer)},
            "seconds": time.perf_counter() - started,
            "steps": steps,
            "passes": passes,
            "operations": list(net.operations),
            "logits": {
                name: [value if math.isfinite(value) else None for value in row]
                for name, row in zip(names, logits_PO.tolist(), strict=True)
            },
            "margins": dict(zip(names, _margins(logits_PO), strict=True)),
            "choices": _counts(choices),
            "parameters": {"mixture": size, "chosen": smaller},
        },
    )


def _search(
    net: OptInter, store: Store, config: OptInterConfig, fit: FitConfig, batch_size: int, seed: int
) -> tuple[list[dict[str, Any]], int]:
    """Train the mixture; it ends with the logits to choose by. Returns what the report says of each pass, and the steps."""
    assert net.logits is not None
    train = Loader(store.split("train"), batch_size, shuffle=True, seed=seed)
    valid = Loader(store.split("valid"), 8192) if config.passes > 1 and "valid" in store.rows else None
    optimizer = build_optimizer(net, fit.optimizer, without=[net.logits])
    logits_optimizer = torch.optim.Adam([net.logits], lr=config.learning_rate, eps=1e-8)
    optimizers: list[Stepper] = [optimizer, logits_optimizer]
    steps, total = 0, config.passes * len(train)

    def tick() -> None:
        nonlocal steps
        net.temperature.fill_(config.temperature(steps, total))
        steps += 1

    passes: list[dict[str, Any]] = []
    best: tuple[float, Tensor] | None = None
    for number in range(1, config.passes + 1):
        steppers = optimizers
        if config.method == "bilevel":  # rows and turns as in the first pass
            train.epoch, steppers = 0, [_InTurn(optimizers)]
        title = f"optinter {number}/{config.passes}"
        began = time.perf_counter()
        loss = train_pass(net, train, steppers, title=title, precision=fit.precision, before_step=tick)
        seconds = time.perf_counter() - began
        choices = _counts(net.best())
        found = {"loss": loss, "seconds": seconds, "temperature": float(net.temperature), "choices": choices}
        passes.append(found)
        if valid is not None:
            auc = float(evaluate(net, valid, label_names=store.encoder.schema.labels, precision=fit.precision)["auc"])
            if not math.isfinite(auc):
                raise DataError(
                    "the validation AUC, by which a search of several passes stops, is undefined; expected validation rows "
                    "with both labels: give others, or search for one pass"
                )
            found["valid_auc"] = auc
            if best is not None and auc < best[0]:
                break
            best = (auc, net.logits.detach().clone())
    optimizer.close()
    if best is not None:
        with torch.no_grad():
            net.logits.copy_(best[1])
    return passes, steps


class _InTurn:
    """Steps of several optimizers in turn, one a batch."""

    def __init__(self, optimizers: Sequence[Stepper]) -> None:
        self._optimizers = optimizers
        self._steps = 0

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        self._optimizers[self._steps % len(self._optimizers)].step()
        self._steps += 1


def _parameters(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def _counts(choices: Mapping[str, Choice]) -> dict[str, int]:
    made = list(choices.values())
    return {choice: made.count(choice) for choice in CHOICES}


def _ahead_of_naive(logits_PO: Tensor, operations: Sequence[Choice]) -> list[float]:
    if "naive" not in operations:
        return [0.0] * len(logits_PO)
    naive = operations.index("naive")
    others = [i for i in range(len(operations)) if i != naive]
    return cast(list[float], (logits_PO[:, others].amax(1) - logits_PO[:, naive]).tolist())


def _margins(logits_PO: Tensor) -> list[float | None]:
    """How far the largest logit is ahead of the second; ``None`` where nothing else was open."""
    first_P, second_P = logits_PO.topk(2, dim=1).values.unbind(1)
    return [m if math.isfinite(m) else None for m in (first_P - second_P).tolist()]


def _unread(pairs: Sequence[FieldPair], choices: Mapping[str, Choice]) -> set[str]:
    """The crosses that are not memorised."""
    return {p.cross for p in pairs if p.cross is not None and choices[p.name] != "memorize"}


def _with_choices(model: OptInter.Config, pairs: Sequence[FieldPair], choices: Mapping[str, Choice]) -> OptInter.Config:
    """The config with choices; it also fits data without the crosses that it does not read."""
    fields = model.embedding.fields
    if fields is not None:
        unread = _unread(pairs, choices)
        fields = tuple(name for name in fields if name not in unread)
    return replace(model, embedding=replace(model.embedding, fields=fields), choices=choices)


def compact_optinter(model: OptInter, layout: BatchLayout) -> tuple[OptInter, BatchLayout]:
    """A mixture reduced to its choices: the same function of what it reads, with only the parts that they need.

    Equal to the mixture once that is fixed (:meth:`.OptInter.fix`): rows of crosses and fields that no pair reads are left
    out, and so are the columns of the first layer that belong to naive pairs.

    Args:
        model: a mixture; its choices are those of :meth:`.OptInter.best`.
        layout: of the batches that it reads.

    Returns:
        The model with choices, and the layout of its batches: without the crosses that are not memorised.

    Raises:
        ConfigError: the model has choices already, and nothing to leave out.
    """
    if model.logits is None:
        raise ConfigError("only a mixture (choices=None) can be made compact; this model has only what its choices need")
    choices = model.best()
    read = {p.cross for p in model.pairs if choices[p.name] == "memorize"}
    smaller_layout = replace(layout, sparse=tuple(c for c in layout.sparse if c.parts is None or c.name in read))
    config = _with_choices(model.config, model.pairs, choices)
    small = cast(OptInter, build_model(config, smaller_layout)).to(model.logits.device)
    small.train(model.training)
    small.embedding.load_state_dict(model.embedding.state_dict())
    _copy_rows(model.factors, small.factors)
    _copy_rows(model.crosses, small.crosses)
    width, dim = model.embedding.out.width, config.pair_dim
    places = torch.tensor([model.slots.index(name) for name in small.slots], dtype=torch.int64)
    columns = torch.cat([torch.arange(width), (width + places.unsqueeze(1) * dim + torch.arange(dim)).flatten()])
    state = model.interaction.state_dict()
    state["layers.0.weight"] = state["layers.0.weight"].index_select(1, columns.to(model.logits.device))
    small.interaction.load_state_dict(state)
    small.head.load_state_dict(model.head.state_dict())
    return small, smaller_layout


@torch.no_grad()
def _copy_rows(source: FeatureEmbedding | None, target: FeatureEmbedding | None) -> None:
    """Copy the rows of the vocabularies that ``target`` has."""
    if source is None or target is None:
        return
    [large], [small] = source._tables, target._tables  # without widths and frozen vocabularies of their own: one table
    for name, size in small.sizes.items():
        start, first = small.first_row[name], large.first_row[name]
        small.rows.weight[start : start + size] = large.rows.weight[first : first + size]
