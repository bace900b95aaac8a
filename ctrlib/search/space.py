"""Spaces of models and how to train them: a plain function ``space(trial) -> Candidate``, and the one that is used by default.

A space only calls ``trial.suggest_float``, ``suggest_int`` and ``suggest_categorical`` (and may ``set_user_attr``), which
Optuna's trials have and :class:`Draw` too, so nothing here needs Optuna.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, TypeVar, cast

import numpy as np

from ctrlib.config import Component, ConfigError, positive
from ctrlib.experiment import RunConfig
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.compose import Parallel, Stack
from ctrlib.interactions.cross_net import CrossNetV2
from ctrlib.interactions.fibinet import SENet
from ctrlib.interactions.final_mlp import FinalMLP
from ctrlib.interactions.gdcn import GatedCrossNet
from ctrlib.interactions.inner_product import InnerProduct
from ctrlib.interactions.mlp import MLP
from ctrlib.models.ctr import CTRModel, Head, ModelComponent
from ctrlib.models.presets import PRESETS, preset
from ctrlib.optim import OptimizerConfig, ScheduleConfig
from ctrlib.schema import NumericEncoding, suggest
from ctrlib.search.hedge import Axis, Params
from ctrlib.training import FitConfig

T = TypeVar("T", bool, int, float, str)
C = TypeVar("C")
COMPOSED = "blocks"
"""The name, among those of presets, of blocks that the space puts together itself: alone, before an MLP, or beside one."""

MODELS = (
    *("dcnv2", "final_mlp", "deepfm", "dual_mlp", "gdcn_parallel", "mask_net_parallel", "autoint_plus", "ipnn", "final_net_2b"),
    *("dnn", COMPOSED),
)
BLOCKS: Mapping[str, Interaction.Config] = {
    "cross": CrossNetV2.Config(),
    "gated_cross": GatedCrossNet.Config(),
    "attention": AutoInt.Config(),
    "products": InnerProduct.Config(),
    "squeeze": SENet.Config(),
}
_LARGEST_DENSE_TABLE = 100_000  # rows up to which updating all of them in every step is worth trying
_MIN_COUNTS = (1, 2, 5, 10)
_NUMERIC = ("standardize", "log", "piecewise", "bucket")
ENCODINGS = len(_MIN_COUNTS) * len(_NUMERIC)
"""Ways to encode raw rows that :class:`AutoSpace` has."""
STEPS_AN_EPOCH = 16
"""At least; fewer make no training."""


class Trial(Protocol):
    """What a space asks."""

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float: ...

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int: ...

    def suggest_categorical(self, name: str, choices: Sequence[T]) -> T: ...

    def set_user_attr(self, key: str, value: object) -> None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidate:
    """One point of a space.

    Args:
        run: the model, and how to train it. Its ``fit.monitor`` is set to the metric of the search.
        name: of the model, for reports.
        min_count: of every field that has a vocabulary of its own; ``None``: as the schema says.
        numeric: encoding of every number; ``None``: as the schema says.
    """

    run: RunConfig
    name: str = "model"
    min_count: int | None = None
    numeric: NumericEncoding | None = None

    def __post_init__(self) -> None:
        if self.min_count is not None:
            positive("min_count", self.min_count)


Space = Callable[[Any], "Candidate | RunConfig"]
"""``space(trial) -> Candidate``, or a :class:`~ctrlib.experiment.RunConfig` alone. It must depend on nothing but the trial."""


def candidate_of(point: object) -> Candidate:
    """What a space returned.

    Raises:
        ConfigError: it is neither a :class:`Candidate` nor a run.
    """
    if isinstance(point, RunConfig):
        return Candidate(run=point)
    if not isinstance(point, Candidate):
        raise ConfigError(f"the space returned {type(point).__name__}; expected a Candidate or a RunConfig")
    return point


class Draw:
    """A trial that answers by itself: with what is ``fixed`` where the range allows that, else at random.

    Attributes:
        params: what was answered.
        axes: of the parameters asked for, see :class:`~ctrlib.search.hedge.Axis`.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        fixed: Params | None = None,
        keep: float = 1.0,
        clip: bool = False,
        jitter: float = 0.0,
    ) -> None:
        """``keep``: chance that a fixed value is kept, one by one; ``clip``: of a fixed number beyond its range, the nearest in
        it is; ``jitter``: standard deviation, in the range, by which a fixed number that is no whole one is moved."""
        self.params: dict[str, object] = {}
        self.axes: dict[str, Axis] = {}
        self._rng, self._fixed, self._keep, self._clip, self._jitter = rng, fixed or {}, keep, clip, jitter

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        """A number in [low, high]."""
        kept = self._number(name, low, high, lambda value: True)
        if kept is not None:
            value = float(kept)
            if self._jitter and step is None and low < high:
                axis = Axis(low=low, high=high, log=log)
                value = axis.value(min(max(axis.place(value) + self._jitter * self._rng.normal(), 0.0), 1.0))
        elif step is not None:
            value = round(low + step * int(self._rng.integers(int((high - low) / step + 1e-9) + 1)), 12)
        elif log:
            value = min(max(math.exp(self._rng.uniform(math.log(low), math.log(high))), low), high)
        else:
            value = float(self._rng.uniform(low, high))
        self._answered(name, value, low, high, log)
        return value

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """A whole number from low to high."""
        kept = self._number(name, low, high, lambda value: (value - low) % step == 0)
        if kept is not None:
            value = int(kept)
        elif log:
            value = min(int(math.exp(self._rng.uniform(math.log(low), math.log(high + 1)))), high)
        else:
            value = low + step * int(self._rng.integers((high - low) // step + 1))
        self._answered(name, value, low, high, log)
        return value

    def suggest_categorical(self, name: str, choices: Sequence[T]) -> T:
        """One of the choices."""
        options = tuple(choices)
        value = self._kept(name, lambda value: value in options)
        chosen = options[int(self._rng.integers(len(options)))] if value is None else value
        self.params[name], self.axes[name] = chosen, Axis(choices=options, weight=WEIGHTS.get(name, 1.0))
        return cast(T, chosen)

    def set_user_attr(self, key: str, value: object) -> None:
        """Nothing: only a trial of a study keeps notes."""

    def _kept(self, name: str, allowed: Callable[[Any], bool]) -> Any:
        value = self._fixed.get(name)
        keep = self._keep >= 1 or self._rng.random() < self._keep
        return value if value is not None and keep and allowed(value) else None

    def _number(self, name: str, low: float, high: float, on_grid: Callable[[Any], bool]) -> Any:
        kept = self._kept(name, lambda value: self._clip or low <= value <= high)
        if kept is None:
            return None
        inside = min(max(kept, low), high)
        return inside if on_grid(inside) else None

    def _answered(self, name: str, value: float, low: float, high: float, log: bool) -> None:
        self.params[name] = value
        if low < high:
            self.axes[name] = Axis(low=low, high=high, log=log, weight=WEIGHTS.get(name, 1.0))


class Fixed:
    """A trial of which all parameters are given."""

    def __init__(self, params: Mapping[str, Any]) -> None:
        self._params = params

    def suggest_float(self, name: str, low: float, high: float, *, step: float | None = None, log: bool = False) -> float:
        """What was given."""
        return float(self._params[name])

    def suggest_int(self, name: str, low: int, high: int, *, step: int = 1, log: bool = False) -> int:
        """What was given."""
        return int(self._params[name])

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        """What was given."""
        return self._params[name]

    def set_user_attr(self, key: str, value: object) -> None:
        """Nothing, as of a :class:`Draw`."""


WEIGHTS: Mapping[str, float] = {"ridge": 5.0, "learning_rate": 2.0}
"""How far apart the two ends of a parameter are for the model of the trials, beside 1 for others. The L2 of the embeddings
explains most of the variance in public tuning logs, and has the widest range."""
UNSCALED = ("ridge",)
"""Whose weight is the same however many parameters there are, see :meth:`.HedgedSampler`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AutoSpace:
    """The default space: blocks, depths, widths, embedding dimensions and their L2, dropout, learning rate, batch size,
    optimizers, schedules and, where raw rows are at hand, numeric encodings and minimum counts.

    Args:
        models: names of presets, and :data:`COMPOSED`.
        rows: training rows; batches leave at least 16 steps an epoch.
        table_rows: rows of all embedding tables; where they are few, the tables may also be trained as the net is.
        encodes: whether the data can be encoded anew.
        numbers: whether there are numbers to encode.
        max_epochs: of a schedule that stops by validation.
        device: see :class:`~ctrlib.experiment.RunConfig`.
    """

    models: tuple[str, ...] = MODELS
    rows: int = 1_000_000
    table_rows: int = 1_000_000
    encodes: bool = False
    numbers: bool = False
    max_epochs: int = 20
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        if not self.models:
            raise ConfigError("the space has no models; expected at least one")
        for name in self.models:
            if name not in PRESETS and name != COMPOSED:
                known = [*PRESETS, COMPOSED]
                raise ConfigError(f"there is no model {name!r}{suggest(name, known)} (all: {', '.join(known)})")

    def __call__(self, trial: Trial) -> Candidate:
        """One point."""
        name = trial.suggest_categorical("model", self.models)
        largest = max(5, min(12, int(math.log2(max(self.rows / STEPS_AN_EPOCH, 1)))))
        batch_size = 2 ** trial.suggest_int("log2_batch", min(8, largest - 1), largest)
        rate = trial.suggest_float("learning_rate", 1e-4, 1e-2, log=True)
        tables = ("adagrad", "lazy_adam", "dense") if self.table_rows <= _LARGEST_DENSE_TABLE else ("adagrad", "lazy_adam")
        optimizer = OptimizerConfig(
            name=trial.suggest_categorical("optimizer", ("adam", "adamw", "adagrad")),  # type: ignore[arg-type]
            embedding=trial.suggest_categorical("table_optimizer", tables),  # type: ignore[arg-type]
            # larger batches have less noise and take larger steps, so that one learning rate means the same for all of them
            learning_rate=rate * math.sqrt(batch_size / 1024),
        )
        if trial.suggest_categorical("schedule", ("plateau", "cosine")) == "cosine":
            epochs = 2 ** trial.suggest_int("log2_epochs", 0, 3)
            fit = FitConfig(optimizer=optimizer, epochs=epochs, patience=None, schedule=ScheduleConfig(name="cosine"))
        else:
            fit = FitConfig(optimizer=optimizer, epochs=self.max_epochs)
        run = RunConfig(
            model=self._model(trial, name),
            fit=fit,
            batch_size=batch_size,
            ridge=trial.suggest_float("ridge", 1e-1, 1e6, log=True),
            device=self.device,
        )
        if not self.encodes:
            return Candidate(run=run, name=name)
        return Candidate(
            run=run,
            name=name,
            min_count=trial.suggest_categorical("min_count", _MIN_COUNTS),
            numeric=cast(NumericEncoding, trial.suggest_categorical("numeric", _NUMERIC)) if self.numbers else None,
        )

    def _model(self, trial: Trial, name: str) -> ModelComponent.Config:
        if name == COMPOSED:
            block = BLOCKS[trial.suggest_categorical("block", tuple(BLOCKS))]
            structure = trial.suggest_categorical("structure", ("single", "stacked", "parallel"))
            interaction: Interaction.Config = block
            if structure == "stacked":
                interaction = Stack.Config(blocks=(block, MLP.Config()))
            elif structure == "parallel":
                interaction = Parallel.Config(streams=(block, MLP.Config()), fusion="concat")
            config: ModelComponent.Config = CTRModel.Config(interaction=interaction, head=Head.Config())
        else:
            config = preset(name)
        if _any(config, lambda part: _layers(part) is not None):
            layers = trial.suggest_int("layers", 1, 4)
            config = _changed(config, lambda part: replace(part, num_layers=layers) if _layers(part) is not None else part)
        if _any(config, lambda part: isinstance(part, MLP.Config)):
            units = (2 ** trial.suggest_int("log2_width", 6, 10),) * trial.suggest_int("depth", 1, 4)
            dropout = trial.suggest_float("dropout", 0.0, 0.5, step=0.1)
            norm: Any = trial.suggest_categorical("norm", ("none", "batch"))

            def sized(part: Any) -> Any:
                if isinstance(part, MLP.Config):
                    return replace(part, hidden_units=units, dropout=dropout, norm=norm)
                # of the bilinear fusion, whose heads must divide the width
                return replace(part, num_heads=8) if isinstance(part, FinalMLP.Config) else part

            config = _changed(config, sized)
        if name == "lr":  # its only weights are those of values, one each
            return config
        return replace(config, embedding=replace(config.embedding, dim=2 ** trial.suggest_int("log2_dim", 2, 6)))


def _layers(part: object) -> int | None:
    found = getattr(part, "num_layers", None)
    return found if isinstance(found, int) else None


def _any(config: object, test: Callable[[Any], bool]) -> bool:
    """Whether any part of a config passes."""
    if isinstance(config, tuple):
        return any(_any(item, test) for item in config)
    if not isinstance(config, Component.Config):
        return False
    return test(config) or any(_any(getattr(config, f.name), test) for f in dataclasses.fields(config))


def _changed(config: C, change: Callable[[Any], Any]) -> C:
    """A config with every part changed, the innermost first."""
    if isinstance(config, tuple):
        return cast(C, tuple(_changed(item, change) for item in config))
    if not isinstance(config, Component.Config):
        return config
    parts = {f.name: _changed(getattr(config, f.name), change) for f in dataclasses.fields(config)}
    return cast(C, change(replace(config, **parts)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Portfolio:
    """Settings worth trying first, best guess first: of the default space, fixed before any trial.

    Between them they have weak and strong L2 on embeddings, the parameter whose best value differs most between data sets, each
    with a model and a training that do well in the experiments of this repository and in public benchmarks. The second is the
    opposite of the first in what data sets disagree about: strong L2 in every step instead of weak one on the rows of the
    batch, with batch norm instead of none.
    """

    members: tuple[Params, ...] = field(
        default_factory=lambda: (
            {**_COMMON, "model": "dcnv2", "ridge": 100.0},
            {**_COMMON, "model": "ipnn", "ridge": 1e4, "norm": "batch", "dropout": 0.3, "table_optimizer": "dense"},
            {**_COMMON, "model": "final_mlp", "ridge": 3e3, "norm": "batch", "dropout": 0.4, "table_optimizer": "dense"},
            {**_COMMON, "model": "deepfm", "ridge": 10.0, "schedule": "cosine", "log2_epochs": 1},
            {**_COMMON, "model": "gdcn_parallel", "ridge": 1e3, "dropout": 0.3},
            {**_COMMON, "model": "mask_net_parallel", "ridge": 300.0},
            {**_COMMON, "model": "dnn", "ridge": 30.0, "schedule": "cosine", "log2_epochs": 0},
            {**_COMMON, "model": "autoint_plus", "ridge": 1e5, "dropout": 0.2},
        )
    )

    def draws(self, space: Space) -> list[Draw]:
        """The members that the space knows: all of their names are among its choices. A number beyond its range, as the usual
        batch is for few rows, is the nearest one of it; tables too large to be dense have the usual optimizer."""
        usual = {"table_optimizer": _COMMON["table_optimizer"]}
        found = [_as_fixed(space, member) or _as_fixed(space, {**member, **usual}) for member in self.members]
        return [draw for draw in found if draw is not None]


def _as_fixed(space: Space, params: Params) -> Draw | None:
    """``None`` where the space does not have all of their names among its choices."""
    draw = Draw(np.random.default_rng(0), params, clip=True)
    try:
        space(draw)
    except ConfigError:
        return None
    names = [name for name, axis in draw.axes.items() if axis.choices and name in params]
    return draw if all(draw.params[name] == params[name] for name in names) else None


_COMMON: Params = {
    "log2_dim": 4,
    "layers": 3,
    "log2_width": 8,
    "depth": 2,
    "dropout": 0.1,
    "norm": "none",
    "log2_batch": 10,
    "learning_rate": 1e-3,
    "optimizer": "adam",
    "table_optimizer": "adagrad",
    "schedule": "plateau",
    "min_count": 2,
    "numeric": "standardize",
}
