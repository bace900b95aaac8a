"""Training any model on any iterable of Batches: epochs, evaluation, early stopping, the best weights kept."""

from __future__ import annotations

import json
import logging
import math
import random
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
import numpy.typing as npt
import safetensors.torch
import torch
from torch import Tensor, nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, check_choice, check_not_negative, positive
from ctrlib.files import finite
from ctrlib.losses import total_loss
from ctrlib.metrics import summarize, summarize_classes, summarize_tasks
from ctrlib.optim import OptimizerConfig, Schedule, ScheduleConfig, build_optimizer
from ctrlib.progress import Tracker, track
from ctrlib.ranking_metrics import summarize_ranking
from ctrlib.schema import DataError

Monitor = Literal["auc", "log_loss", "auc-log_loss", "gauc", "accuracy", "macro_f1"]
Precision = Literal["fp32", "bf16"]

_log = logging.getLogger("ctrlib")

_CHECK_EVERY = 50  # steps between reads of the losses: each read waits for the device


class Batches(Protocol):
    """One epoch each time it is iterated; a training set shuffles itself anew each time. ``len`` is in batches."""

    def __iter__(self) -> Iterator[Batch]: ...

    def __len__(self) -> int: ...


class TrainingDivergedError(FloatingPointError):
    """The loss, its gradient or a prediction became infinite or not a number."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FitConfig:
    """How to train. The defaults are the protocol behind the BARS benchmark's numbers (FuxiCTR).

    Args:
        epochs: at most this many.
        optimizer: see :class:`~ctrlib.optim.OptimizerConfig`.
        schedule: see :class:`~ctrlib.optim.ScheduleConfig`.
        monitor: the validation metric to improve; ``log_loss`` is minimised, the others are maximised. ``accuracy`` and
            ``macro_f1`` are there for labels of classes only, ``gauc`` for rows with groups.
        patience: stop after this many evaluations in a row without improvement; ``None``: never.
        min_delta: an improvement is more than this above the best so far.
        evaluate_every: evaluate after each such fraction of an epoch, and always at its end.
        precision: ``bf16`` runs the forward pass under autocast; weights, loss and updates stay float32.
        compile: run the training steps through ``torch.compile``.
    """

    epochs: int = 100
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    monitor: Monitor = "auc"
    patience: int | None = 2
    min_delta: float = 1e-6
    evaluate_every: float = 1.0
    precision: Precision = "fp32"
    compile: bool = False

    def __post_init__(self) -> None:
        check_choice("fit.monitor", self.monitor, get_args(Monitor))
        check_choice("fit.precision", self.precision, get_args(Precision))
        positive("fit.epochs", self.epochs)
        if self.patience is not None:
            positive("fit.patience", self.patience)
        check_not_negative("fit.min_delta", self.min_delta)
        if not 0 < self.evaluate_every <= 1:
            raise ConfigError(
                f"fit.evaluate_every is {self.evaluate_every}; expected a fraction of an epoch, above 0 and at most 1"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Predictions:
    """What a model says of N rows, and what was true of them.

    Attributes:
        logits: [N] float64, [N, T] for several tasks, or [N, C] for classes.
        labels: the shape of ``logits``, of classes [N], float64; ``None`` where the batches have none.
        weight: [N] float64, or ``None``.
        group: [N] int64, or ``None``.
        classes: the logits are of classes that exclude one another.
    """

    logits: npt.NDArray[np.float64]
    labels: npt.NDArray[np.float64] | None
    weight: npt.NDArray[np.float64] | None
    group: npt.NDArray[np.int64] | None
    classes: bool = False

    @property
    def probability(self) -> npt.NDArray[np.float64]:
        """σ(logits), of classes softmax(logits), in float64."""
        if self.classes:
            raised = np.exp(self.logits - self.logits.max(1, keepdims=True))
            return np.asarray(raised / raised.sum(1, keepdims=True))
        small = np.exp(-np.abs(self.logits))  # never overflows
        return np.where(self.logits >= 0, 1.0, small) / (1.0 + small)


@dataclass(frozen=True, kw_only=True, slots=True)
class FitResult:
    """What :func:`fit` did.

    Attributes:
        epochs: trained, with fractions.
        best_epoch: when the weights that the model now has were reached.
        metrics: of the validation rows at that point; empty without validation.
        history: one entry an evaluation, as in ``history.jsonl`` of :func:`fit`.
        seconds: wall time, evaluations included.
        rows_per_second: training rows per second, evaluations excluded.
        interrupted: stopped by Ctrl-C.
    """

    epochs: float
    best_epoch: float
    metrics: dict[str, Any]
    history: list[dict[str, Any]]
    seconds: float
    rows_per_second: float
    interrupted: bool


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on every device, and make cuDNN deterministic."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False


def predict(
    model: nn.Module, batches: Iterable[Batch], *, precision: Precision = "fp32", device: torch.device | str | None = None
) -> Predictions:
    """Logits of every row, in order, in evaluation mode; the model's mode is put back afterwards.

    Args:
        model: ``Batch → Output``.
        batches: with or without labels.
        precision: see :class:`FitConfig`.
        device: where the batches go; by default where the model's parameters are.

    Raises:
        DataError: there is no batch.
    """
    where = _device(model) if device is None else torch.device(device)
    parts: dict[str, list[npt.NDArray[Any]]] = {"logits": [], "labels": [], "weight": [], "group": []}
    classes = False
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                with _autocast(where, precision):
                    output: Output = model(_move(batch, where))
                classes = output.classes
                parts["logits"].append(output.logits.cpu().double().numpy())
                for name, tensor in (("labels", batch.labels), ("weight", batch.weight), ("group", batch.group)):
                    if tensor is not None:
                        parts[name].append(tensor.cpu().numpy())
    finally:
        model.train(training)
    if not parts["logits"]:
        raise DataError("there is no batch to predict; expected at least one row")

    def joined(name: str, dtype: type[np.generic]) -> npt.NDArray[Any] | None:
        if not parts[name]:
            return None
        values = np.concatenate(parts[name]).astype(dtype)
        return values[:, 0] if values.ndim == 2 and values.shape[1] == 1 else values

    logits = joined("logits", np.float64)
    assert logits is not None
    return Predictions(
        logits=logits,
        labels=joined("labels", np.float64),
        weight=joined("weight", np.float64),
        group=joined("group", np.int64),
        classes=classes,
    )


def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    label_names: Sequence[str] | None = None,
    precision: Precision = "fp32",
    device: torch.device | str | None = None,
) -> dict[str, Any]:
    """Metrics of the model over ``batches``: :func:`ctrlib.metrics.summarize`, or ``summarize_tasks`` for several labels; for
    one label in groups also :func:`ctrlib.ranking_metrics.summarize_ranking`.

    Args:
        model: ``Batch → Output``.
        batches: with labels.
        label_names: of the tasks; by default ``label_0``, ``label_1``, …
        precision, device: see :func:`predict`.

    Raises:
        DataError: there is no batch, or it has no labels.
    """
    return measure(predict(model, batches, precision=precision, device=device), label_names)


def measure(predictions: Predictions, label_names: Sequence[str] | None = None) -> dict[str, Any]:
    """What :func:`evaluate` returns, from predictions made before.

    Raises:
        DataError: there are no labels.
    """
    metrics = _summary(predictions, label_names)
    # not in every validation of a training: each metric more is a sort of the rows
    if predictions.group is None or predictions.labels is None or predictions.labels.ndim > 1:
        return metrics
    return metrics | summarize_ranking(predictions.labels, predictions.logits, predictions.group)


def fit(
    model: nn.Module,
    train: Batches,
    valid: Batches | None,
    config: FitConfig,
    *,
    out: Path | None = None,
    title: str = "",
    label_names: Sequence[str] | None = None,
) -> FitResult:
    """Train ``model`` in place, on the device its parameters are on.

    After an evaluation without improvement the schedule lowers the learning rate and training goes on from the current
    weights; after ``patience`` of them in a row it stops. At the end, however it comes about (Ctrl-C and errors included),
    the model has the weights of its best evaluation, or its last weights where there was none, and is in evaluation mode.

    Args:
        model: ``Batch → Output``.
        train: one epoch per iteration.
        valid: validation batches; ``None``: train ``epochs`` epochs, keep the last weights.
        config: see :class:`FitConfig`.
        out: folder for ``best.safetensors`` (the ``state_dict`` of the best weights so far) and ``history.jsonl``, to which
            every evaluation adds a line: ``epoch`` (with fractions), ``step``, ``train_loss`` (mean over the batches since
            the last line, L2 penalties left out), ``learning_rate`` (of the net), ``seconds`` (since the start),
            ``rows_per_second`` (of training, since the last line) and ``valid`` (the metrics; NaN becomes null).
        title: before the progress bar and in log lines.
        label_names: see :func:`evaluate`.

    Raises:
        TrainingDivergedError: the loss is not finite.
        DataError: no batches, no labels, or a monitored metric that is undefined on the validation rows.
        ConfigError: ``gauc`` is monitored and the validation rows have no group.
    """
    if valid is not None:
        first = next(iter(valid), None)  # what is wrong with it should not come out only after an epoch
        if first is None:
            raise DataError("the validation set has no rows; give it some, or no validation set")
        if config.monitor == "gauc" and first.group is None:
            raise ConfigError("fit.monitor is 'gauc' and the validation rows have no group; name a group column in the schema")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    run = _Run(model, train, valid, config, out, title, label_names)
    interrupted = False
    try:
        for epoch in range(config.epochs):
            run.epoch(epoch)
            if run.stopped:
                break
    except KeyboardInterrupt:
        interrupted = True
        _log.info("%sinterrupted at epoch %.2f", run.prefix, run.position)
    except BaseException:
        run.close(healthy=False)
        raise
    run.close(healthy=True)
    return run.result(interrupted)


class _Run:
    """The state of one :func:`fit`."""

    def __init__(
        self,
        model: nn.Module,
        train: Batches,
        valid: Batches | None,
        config: FitConfig,
        out: Path | None,
        title: str,
        label_names: Sequence[str] | None,
    ) -> None:
        self.model, self.train, self.valid, self.config, self.out = model, train, valid, config, out
        self.prefix, self.label_names = f"{title}: " if title else "", label_names
        self.device = _device(model)
        self.forward = torch.compile(model) if config.compile else model
        self.optimizer = build_optimizer(model, config.optimizer)
        self.schedule = Schedule(self.optimizer, config.schedule, config.epochs * len(train))
        # evaluations inside an epoch, by number of batches; the one at its end comes when the batches do
        per_epoch = math.ceil(1 / config.evaluate_every - 1e-9)
        self.marks = {round(i * config.evaluate_every * len(train)) for i in range(1, per_epoch)} - {0, len(train)}

        self.position = 0.0  # epochs trained
        self.steps = 0
        self.rows = 0
        self.pending: list[Tensor] = []  # [loss, gradient norm] of steps not yet read
        self.losses: list[float] = []  # since the last evaluation
        self.rows_recorded = 0  # at the last evaluation, like the seconds of training
        self.training_recorded = 0.0
        self.history: list[dict[str, Any]] = []
        self.best_score = -math.inf
        self.best_weights: dict[str, Tensor] | None = None
        self.best_epoch = 0.0
        self.best_metrics: dict[str, Any] = {}
        self.saved = False  # best.safetensors holds the weights that would be returned now
        self.failures = 0  # evaluations in a row without improvement
        self.stopped = False
        self.started = time.perf_counter()
        self.evaluating = 0.0  # seconds

    def epoch(self, epoch: int) -> None:
        steps_before = self.steps
        with track(f"{self.prefix}epoch {epoch + 1}/{self.config.epochs}", len(self.train), "batches") as tracker:
            self.model.train()
            for index, batch in enumerate(self.train, 1):
                self.step(batch)
                self.position = epoch + index / len(self.train)
                if len(self.pending) >= _CHECK_EVERY:
                    self.read_losses()
                    tracker.advance(1, self.note())
                else:
                    tracker.advance(1)
                if index in self.marks:
                    self.evaluate(tracker)
                    if self.stopped:
                        return
            if self.steps == steps_before:
                raise DataError("the training set gave no batch; expected at least one row")
            if self.rows > self.rows_recorded:
                self.evaluate(tracker)

    def step(self, batch: Batch) -> None:
        batch = _move(batch, self.device)
        self.optimizer.zero_grad()
        with _autocast(self.device, self.config.precision):
            output: Output = self.forward(batch)
        loss = total_loss(output, batch)
        torch.autograd.backward(loss)
        self.saved = self.saved and self.best_weights is not None  # without best weights, the file holds the current ones
        norm = self.optimizer.step()
        self.schedule.step()
        self.pending.append(torch.stack([loss.detach(), norm.to(loss)]))
        self.steps += 1
        self.rows += len(batch)

    def read_losses(self) -> None:
        """Move losses from the device; the first that is not finite ends the run."""
        pending, self.pending = self.pending, []
        if not pending:
            return
        for step, (loss, norm) in enumerate(torch.stack(pending).tolist(), self.steps - len(pending) + 1):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                where = f"step {step} (epoch {step / len(self.train):.2f})"
                raise self.diverged(f"at {where} the batch's loss is {loss} and the gradient's norm {norm}")
            self.losses.append(loss)

    def diverged(self, what: str) -> TrainingDivergedError:
        kept = (
            f"the best weights, of epoch {self.best_epoch:.2f}, are restored" if self.best_weights else "no weights were kept"
        )
        return TrainingDivergedError(
            f"training diverged: {what}; expected finite numbers; {kept}. Lower "
            f"optimizer.learning_rate ({self.config.optimizer.learning_rate}) or optimizer.max_grad_norm "
            f"({self.config.optimizer.max_grad_norm}), and check numeric columns for infinite or very large values"
        )

    def evaluate(self, tracker: Tracker) -> None:
        """Record a line of history and, with validation, decide what follows from it."""
        self.read_losses()
        seconds = time.perf_counter() - self.started
        training = seconds - self.evaluating
        line: dict[str, Any] = {
            "epoch": self.position,
            "step": self.steps,
            "train_loss": math.fsum(self.losses) / len(self.losses),
            "learning_rate": self.schedule.learning_rate,
            "seconds": seconds,
            "rows_per_second": (self.rows - self.rows_recorded) / (training - self.training_recorded),
        }
        self.losses, self.rows_recorded, self.training_recorded = [], self.rows, training
        if self.valid is not None:
            tracker.advance(0, f"loss {line['train_loss']:.5f}, validating")
            metrics = self.validate(self.valid)
            line["valid"] = metrics
            score = self.score(metrics)
            improved = score > self.best_score + self.config.min_delta
            if improved:
                weights = self.weights()
                self.saved = False  # first: an interrupt between the two lines must not leave the file behind
                self.best_weights, self.best_score, self.best_epoch, self.best_metrics = weights, score, self.position, metrics
            self.failures = 0 if improved else self.failures + 1
            self.stopped = self.config.patience is not None and self.failures >= self.config.patience
            self.schedule.observe(improved)
        self.history.append(line)
        if self.out is not None:
            with (self.out / "history.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps(finite(line)) + "\n")
        self.save()
        self.evaluating += time.perf_counter() - self.started - seconds
        tracker.advance(0, self.note())
        _log.info("%sepoch %.2f, %s%s", self.prefix, self.position, self.note(), ", stopping" if self.stopped else "")

    def validate(self, valid: Batches) -> dict[str, Any]:
        predictions = predict(self.model, valid, precision=self.config.precision, device=self.device)
        if not np.isfinite(predictions.logits).all():
            raise self.diverged(
                f"at step {self.steps} (epoch {self.position:.2f}) predictions for validation rows are not finite"
            )
        return _summary(predictions, self.label_names)

    def score(self, metrics: Mapping[str, Any]) -> float:
        """The monitored metric; larger is better."""
        match self.config.monitor:
            case "log_loss":
                score = -metrics["log_loss"]
            case "auc-log_loss":
                score = metrics["auc"] - metrics["log_loss"]
            case metric if metric not in metrics:
                raise ConfigError(f"fit.monitor is {metric!r}, which these rows lack; they have {', '.join(metrics)}")
            case metric:
                score = metrics[metric]
        if not math.isfinite(score):
            raise DataError(
                f"the monitored {self.config.monitor} of the validation rows is {score}; expected rows of both labels "
                "(and of both within some group, for gauc): use another split or another fit.monitor"
            )
        return float(score)

    def note(self) -> str:
        """The latest numbers, for a person."""
        recent = self.losses or [line["train_loss"] for line in self.history[-1:]]
        training = time.perf_counter() - self.started - self.evaluating
        text = f"loss {math.fsum(recent) / len(recent):.5f}, {self.rows / training:,.0f} rows/s"
        if self.history and "valid" in self.history[-1]:
            metrics = self.history[-1]["valid"]
            text += "".join(
                f", valid {name} {metrics[name]:.5f}" for name in ("accuracy", "auc", "log_loss", "gauc") if name in metrics
            )
        return text

    def weights(self) -> dict[str, Tensor]:
        """Current weights, each a tensor of its own as safetensors wants them: nothing shared, nothing strided."""
        return {
            name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in self.model.state_dict().items()
        }

    def save(self) -> None:
        """Bring best.safetensors up to date, if there is a folder for it."""
        if self.out is None or self.saved:
            return
        part = self.out / "best.safetensors.part"
        safetensors.torch.save_file(self.best_weights or self.weights(), part)
        part.replace(self.out / "best.safetensors")
        self.saved = True

    def close(self, *, healthy: bool) -> None:
        """Put the best weights back, and on disk; current weights are written only if the run was healthy."""
        self.optimizer.close()
        if self.best_weights is not None:
            self.model.load_state_dict(self.best_weights)
        if self.best_weights is not None or healthy:
            self.save()
        self.model.eval()

    def result(self, interrupted: bool) -> FitResult:
        seconds = time.perf_counter() - self.started
        return FitResult(
            epochs=self.position,
            best_epoch=self.position if self.best_weights is None else self.best_epoch,
            metrics=self.best_metrics,
            history=self.history,
            seconds=seconds,
            rows_per_second=self.rows / (seconds - self.evaluating),
            interrupted=interrupted,
        )


def _device(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _move(batch: Batch, device: torch.device) -> Batch:
    return batch if batch.sparse.device == device else batch.to(device)


def _autocast(device: torch.device, precision: Precision) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16")


def _summary(predictions: Predictions, label_names: Sequence[str] | None) -> dict[str, Any]:
    labels, probability = predictions.labels, predictions.probability
    if labels is None:
        raise DataError("the batches have no labels; evaluation needs the label columns that the schema names")
    if predictions.classes:
        return dict(summarize_classes(labels, probability, weight=predictions.weight))
    if labels.shape != probability.shape:
        raise ConfigError(
            f"the model returns logits of shape {probability.shape} for labels of shape {labels.shape}; "
            "give the model as many outputs as the schema has labels"
        )
    if labels.ndim == 1:
        return dict(summarize(labels, probability, weight=predictions.weight, group=predictions.group))
    names = label_names or [f"label_{task}" for task in range(labels.shape[1])]
    return dict(summarize_tasks(names, labels, probability, weight=predictions.weight, group=predictions.group))
