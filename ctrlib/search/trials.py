"""One trial: the rows it reads, training on a fraction of them, and what it measures."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import nn

from ctrlib.batch import Batch
from ctrlib.config import ConfigError
from ctrlib.data.loader import EVALUATION_ROWS, Loader
from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, RunConfig, check_cross_memory, prepare, torch_device
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.schema import DataError, DenseField, Schema, SequenceField, SparseField
from ctrlib.search.fidelity import fraction_rows
from ctrlib.search.space import STEPS_AN_EPOCH, Candidate
from ctrlib.training import Batches, fit, predict, seed_everything

Metric = Literal["log_loss", "auc"]
LATENCY_ROWS = 100  # candidates of one request
_LATENCY_CALLS = 15
_PROBE_STEPS = 5
_SMALLEST_BATCH = 32
_POLL_SECONDS = 0.5


class OutOfTimeError(Exception):
    """A trial took longer than it may; not an error of its settings."""


def sign(metric: Metric) -> float:
    """What turns a metric into a score, of which larger is better."""
    return -1.0 if metric == "log_loss" else 1.0


def trial_seed(seed: int, number: int) -> int:
    """The seed of a trial, from that of the search and the trial's number; whoever runs it."""
    return int(np.random.SeedSequence([seed, number]).generate_state(1)[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class Stores:
    """The stores of a search: the one at ``base``, and beside it, made when first asked for, those of other encodings.

    Args:
        base: folder of a store.
        folder: of further stores.
        raw: the raw rows, by path, and how they become a store; ``None``: they cannot be encoded anew.
    """

    base: Path
    folder: Path
    raw: tuple[str, DataOptions] | None = None

    def of(self, candidate: Candidate) -> Store:
        """The rows as a candidate wants them encoded.

        Raises:
            ConfigError: it wants another encoding, and there are no raw rows.
        """
        base = Store.open(self.base)
        schema = encoded_as(base.encoder.schema, candidate)
        if schema == base.encoder.schema:
            return base
        if self.raw is None:
            raise ConfigError(
                "the space sets min_count or numeric, and a store is encoded already; search on files of raw rows, or leave "
                "both out"
            )
        data, options = self.raw
        path = self.folder / f"min_count-{candidate.min_count}-numeric-{candidate.numeric}"
        while not Store.is_store(path):
            try:
                return prepare(data, path, replace(options, schema=schema, label=None))
            except DataError:
                if not (path.with_name(path.name + ".part").exists() or Store.is_store(path)):
                    raise
                time.sleep(_POLL_SECONDS)  # another worker is making it
        return Store.open(path)


def encoded_as(schema: Schema, candidate: Candidate) -> Schema:
    """The schema with the candidate's minimum count and numeric encoding, where they apply."""
    changed: list[Any] = []
    for f in schema.fields:
        counted = isinstance(f, SparseField | SequenceField) and f.shares is None and f.hash_size is None
        if candidate.min_count is not None and counted:
            changed.append(replace(cast(SparseField, f), min_count=candidate.min_count))
        elif candidate.numeric is not None and isinstance(f, DenseField):
            changed.append(replace(f, encoding=candidate.numeric))
    return schema.with_fields(*changed) if changed else schema


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What training on one rung gave: ``value``, the metric on the validation rows, at ``best_epoch``; ``curve``, epoch and
    metric of every evaluation; wall ``seconds``."""

    value: float
    metrics: dict[str, Any]
    curve: tuple[tuple[float, float], ...]
    best_epoch: float
    seconds: float


def settled(run: RunConfig, metric: Metric, single_epoch: bool) -> RunConfig:
    """A candidate's run as a search trains it: monitored by its metric, and for one epoch if that is known to be best."""
    fitting = replace(run.fit, monitor=metric, epochs=1 if single_epoch else run.fit.epochs)
    return replace(run, fit=fitting)


def train_on(
    store: Store, run: RunConfig, fraction: float, *, metric: Metric, seed: int, deadline: float | None = None
) -> Outcome:
    """Train on a fraction of the training rows, with the whole of the schedule, and evaluate on the validation rows.

    Args:
        run: see :func:`settled`.
        seed: of weights, dropout, order and choice of rows.
        deadline: of ``time.monotonic()``.

    Raises:
        OutOfTimeError: the deadline has passed.
        ConfigError, DataError, TrainingDivergedError: the settings cannot be trained.
    """
    started = time.perf_counter()
    total = store.rows["train"]
    recent = store.encoder.schema.time is not None
    # the choice of rows is the same in all trials: what differs between them is to be the settings
    chosen = fraction_rows(total, fraction, recent=recent, seed=0)
    run = run.for_rows(total if chosen is None else len(chosen))
    if chosen is not None:
        run = _with_enough_steps(run, len(chosen))
    assert run.batch_size is not None
    model = _model(store, run, seed)
    rows = Loader(store.split("train"), run.batch_size, shuffle=True, seed=seed, rows=chosen, workers=run.workers)
    valid = Loader(store.split("valid"), EVALUATION_ROWS, workers=run.workers)
    labels = store.encoder.schema.labels
    result = fit(model, rows if deadline is None else _Until(rows, deadline), valid, run.fit, label_names=labels)
    if result.interrupted:
        raise KeyboardInterrupt
    curve = tuple((line["epoch"], float(line["valid"][metric])) for line in result.history)
    return Outcome(
        value=float(result.metrics[metric]),
        metrics={name: result.metrics[name] for name in ("auc", "log_loss")},
        curve=curve,
        best_epoch=result.best_epoch,
        seconds=time.perf_counter() - started,
    )


def _with_enough_steps(run: RunConfig, rows: int) -> RunConfig:
    """Of a fraction of the rows a large batch would leave a few steps, which say nothing of the settings: a smaller batch, and
    with it a smaller learning rate, as in :class:`~ctrlib.search.space.AutoSpace`."""
    assert run.batch_size is not None
    largest = max(rows // STEPS_AN_EPOCH, _SMALLEST_BATCH)
    if run.batch_size <= largest:
        return run
    optimizer = replace(run.fit.optimizer, learning_rate=run.fit.optimizer.learning_rate * math.sqrt(largest / run.batch_size))
    return replace(run, batch_size=largest, fit=replace(run.fit, optimizer=optimizer))


class _Until:
    """Batches that end with an error when time is up."""

    def __init__(self, batches: Batches, deadline: float) -> None:
        self._batches, self._deadline = batches, deadline
        self._began, self._steps = time.monotonic(), 0

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._batches:
            now = time.monotonic()
            if now > self._deadline:
                took = f"{self._steps} steps of {(now - self._began) / self._steps:.3g} s" if self._steps else "no step"
                raise OutOfTimeError(
                    f"the trial took longer than the budget allows for one: {took} in {now - self._began:.3g} s, and an epoch "
                    f"has {len(self._batches)}; give a larger budget (--budget), or a space of faster settings"
                )
            self._steps += 1
            yield batch


def _model(store: Store, run: RunConfig, seed: int) -> ModelComponent:
    layout = store.encoder.layout
    device = torch_device(run.device)
    check_cross_memory(run.model, layout, run.fit.optimizer, device=device)
    seed_everything(seed)
    return build_model(run.model, layout).to(device)


def estimate(store: Store, run: RunConfig, fraction: float) -> float:
    """Seconds that :func:`train_on` takes at least, from a few steps and one batch of validation rows: for all epochs, or for
    two where it may stop by itself."""
    run = run.for_rows(store.rows["train"])
    assert run.batch_size is not None
    model = _model(store, run, 0)
    split = store.split("train")
    steps = min(_PROBE_STEPS, -(-split.num_rows // run.batch_size))
    some = torch.arange(min(steps * run.batch_size, split.num_rows))
    rows = Loader(split, run.batch_size, rows=some, workers=0)
    once = replace(run.fit, epochs=1)
    fit(model, rows, None, once)  # the first pass also starts what later ones find ready
    started = time.perf_counter()
    fit(model, rows, None, once)
    epoch = (time.perf_counter() - started) * fraction * split.num_rows / len(some)
    valid = store.split("valid")
    part = torch.arange(min(valid.num_rows, 4 * EVALUATION_ROWS))
    started = time.perf_counter()
    predict(model, Loader(valid, EVALUATION_ROWS, rows=part, workers=0))
    evaluation = (time.perf_counter() - started) * valid.num_rows / len(part)
    return (epoch + evaluation) * (run.fit.epochs if run.fit.patience is None else min(run.fit.epochs, 2))


def latency_ms(model: nn.Module, store: Store, rows: int = LATENCY_ROWS) -> float:
    """Median milliseconds of a forward pass over so many rows, from encoded rows to logits, on the model's device."""
    split = store.split("valid")
    some = torch.arange(rows) % split.num_rows
    [batch] = Loader(split, rows, rows=some, workers=0)
    times = []
    for _ in range(_LATENCY_CALLS):
        started = time.perf_counter()
        predict(model, [batch])
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[_LATENCY_CALLS // 3 :])


def untrained(store: Store, model: ModelComponent.Config, run: RunConfig) -> ModelComponent:
    """A model with random weights: as large and as fast as the trained one."""
    return _model(store, replace(run, model=model), 0)
