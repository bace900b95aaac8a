"""The protocol of fit with scripted metrics; its arithmetic against plain torch; its files; its interruptions."""

from __future__ import annotations

import io
import json
import logging
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from sklearn.metrics import log_loss, roc_auc_score
from torch import Tensor, nn

from ctrlib import training
from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, from_json, to_json
from ctrlib.optim import OptimizerConfig, ScheduleConfig
from ctrlib.progress import track
from ctrlib.schema import DataError
from ctrlib.training import FitConfig, FitResult, Predictions, TrainingDivergedError, evaluate, fit, predict, seed_everything

Weights = dict[str, Tensor]


class Net(nn.Module):
    """Two sparse fields and two dense ones, a dropout, a linear layer to T logits."""

    def __init__(self, tasks: int = 1, dropout: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Embedding(12, 3)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(8, tasks)
        self.tasks = tasks

    def forward(self, batch: Batch) -> Output:
        x_BD = torch.cat([self.table(batch.sparse).flatten(1), batch.dense], 1)
        logits_BT = self.out(self.dropout(x_BD))
        return Output(logits_BT[:, 0] if self.tasks == 1 else logits_BT)


class Data:
    """Batches in fixed order; ``before`` is called with the number of each batch, counted from 1 over all epochs."""

    def __init__(self, batches: list[Batch], before: Callable[[int], None] = lambda number: None) -> None:
        self.batches, self.before, self.count = batches, before, 0

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self.batches:
            self.count += 1
            self.before(self.count)
            yield batch


def make_batches(number: int = 6, rows: int = 16, tasks: int = 1, seed: int = 1, extras: bool = False) -> list[Batch]:
    """Rows whose label depends on the first id and the first number."""
    rng = np.random.default_rng(seed)
    batches = []
    for _ in range(number):
        ids = rng.integers(0, 12, (rows, 2))
        dense = rng.normal(size=(rows, 2))
        logits = (ids[:, :1] - 5.5) / 2 + dense[:, :1] + np.zeros((1, tasks))
        labels = rng.random((rows, tasks)) < 1 / (1 + np.exp(-logits))
        batches.append(
            Batch(
                sparse=torch.tensor(ids, dtype=torch.int32),
                dense=torch.tensor(dense, dtype=torch.float32),
                labels=torch.tensor(labels, dtype=torch.float32),
                weight=torch.tensor(rng.random(rows), dtype=torch.float32) if extras else None,
                group=torch.tensor(rng.integers(0, 3, rows)) if extras else None,
            )
        )
    return batches


TRAIN, VALID = make_batches(), make_batches(2, seed=2)
SGD = OptimizerConfig(name="sgd", learning_rate=0.1)


def copy_of(model: nn.Module) -> Weights:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: Weights, b: Weights) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Script:
    """Stands in for the metrics: gives the scripted ones in turn, and keeps the weights that each evaluation saw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, model: nn.Module, metrics: list[Any], name: str = "auc") -> None:
        self.weights: list[Weights] = []
        upcoming = iter(metrics)

        def summarize(*arguments: object, **options: object) -> dict[str, float]:
            self.weights.append(copy_of(model))
            value = next(upcoming)
            return value if isinstance(value, dict) else {name: value}

        monkeypatch.setattr(training, "summarize", summarize)


# ---- the protocol


def test_plateau_patience_and_best_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    script = Script(monkeypatch, model, [0.5, 0.6, 0.55, 0.7, 0.65, 0.64])
    starts: list[Weights] = []
    data = Data(TRAIN, lambda number: starts.append(copy_of(model)) if number % 6 == 1 else None)
    result = fit(model, data, Data(VALID), FitConfig(optimizer=SGD))

    assert [line["epoch"] for line in result.history] == [1, 2, 3, 4, 5, 6]
    assert [line["learning_rate"] for line in result.history] == pytest.approx([0.1, 0.1, 0.1, 0.01, 0.01, 0.001])
    assert (result.epochs, result.best_epoch, result.metrics) == (6, 4, {"auc": 0.7})
    assert same(copy_of(model), script.weights[3])
    assert not same(script.weights[3], script.weights[5])
    for start, previous in zip(starts[1:], script.weights, strict=False):
        assert same(start, previous), "training goes on from the current weights, not from the best"
    assert not result.interrupted
    assert not model.training


def test_min_delta_counts_as_no_improvement(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    Script(monkeypatch, model, [0.5, 0.505, 0.52, 0.525, 0.529])
    result = fit(model, Data(TRAIN), Data(VALID), FitConfig(optimizer=SGD, min_delta=0.01))
    assert (result.epochs, result.best_epoch) == (5, 3)


def test_patience_none_trains_all_epochs(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    Script(monkeypatch, model, [0.5, 0.4, 0.3, 0.2])
    config = FitConfig(optimizer=SGD, patience=None, epochs=4, schedule=ScheduleConfig(min_learning_rate=5e-3))
    result = fit(model, Data(TRAIN), Data(VALID), config)
    assert (result.epochs, result.best_epoch) == (4, 1)
    assert [line["learning_rate"] for line in result.history] == pytest.approx([0.1, 0.1, 0.01, 0.005])


@pytest.mark.parametrize(
    ("monitor", "best"),
    [("auc", 1), ("log_loss", 3), ("auc-log_loss", 2), ("gauc", 4)],
)
def test_monitors(monkeypatch: pytest.MonkeyPatch, monitor: Any, best: int) -> None:
    model = Net()
    script = [
        {"auc": 0.80, "log_loss": 0.50, "gauc": 0.5},
        {"auc": 0.78, "log_loss": 0.44, "gauc": 0.6},
        {"auc": 0.70, "log_loss": 0.40, "gauc": 0.4},
        {"auc": 0.60, "log_loss": 0.60, "gauc": 0.7},
    ]
    Script(monkeypatch, model, list(script))
    config = FitConfig(optimizer=SGD, monitor=monitor, patience=None, epochs=4)
    result = fit(model, Data(TRAIN), Data(make_batches(2, extras=True)), config)
    assert result.best_epoch == best
    assert result.metrics == script[best - 1]


def test_gauc_without_groups_is_refused_before_training() -> None:
    data = Data(TRAIN)
    with pytest.raises(ConfigError, match="no group"):
        fit(Net(), data, Data(VALID), FitConfig(monitor="gauc"))
    assert data.count == 0


def test_an_undefined_metric_is_an_error() -> None:
    ones = [Batch(sparse=b.sparse, dense=b.dense, labels=torch.ones(16, 1)) for b in VALID]
    with pytest.raises(DataError, match="auc of the validation rows is nan"):
        fit(Net(), Data(TRAIN), Data(ones), FitConfig(epochs=1))


@pytest.mark.parametrize(
    ("every", "steps"),
    [(1.0, [10, 20]), (0.25, [2, 5, 8, 10, 12, 15, 18, 20]), (0.4, [4, 8, 10, 14, 18, 20]), (0.01, list(range(1, 21)))],
)
def test_evaluate_every(monkeypatch: pytest.MonkeyPatch, every: float, steps: list[int]) -> None:
    model = Net()
    Script(monkeypatch, model, [i / 100 for i in range(20)])
    result = fit(model, Data(make_batches(10)), Data(VALID), FitConfig(optimizer=SGD, evaluate_every=every, epochs=2))
    assert [line["step"] for line in result.history] == steps
    assert [line["epoch"] for line in result.history] == pytest.approx([step / 10 for step in steps])


def test_stops_inside_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    script = Script(monkeypatch, model, [0.5, 0.6, 0.4, 0.4])
    data = Data(make_batches(10))
    result = fit(model, data, Data(VALID), FitConfig(optimizer=SGD, evaluate_every=0.2))
    assert result.epochs == pytest.approx(0.8)
    assert result.best_epoch == pytest.approx(0.4)
    assert data.count == 8
    assert same(copy_of(model), script.weights[1])


def test_without_validation_the_last_weights_are_kept(tmp_path: Path) -> None:
    model = Net()
    data = Data(TRAIN)
    result = fit(model, data, None, FitConfig(optimizer=SGD, epochs=3), out=tmp_path)
    assert data.count == 18
    assert (result.epochs, result.best_epoch, result.metrics) == (3, 3, {})
    assert [line["learning_rate"] for line in result.history] == [0.1, 0.1, 0.1]
    assert all("valid" not in line for line in result.history)
    assert same(load_file(tmp_path / "best.safetensors"), copy_of(model))

    again = Net()
    optimizer = torch.optim.SGD(again.parameters(), lr=0.1)
    for _ in range(3):
        for batch in TRAIN:
            take_step(again, optimizer, batch)
    for name, value in copy_of(again).items():
        torch.testing.assert_close(copy_of(model)[name], value, rtol=1e-5, atol=1e-6)


def test_every_training_step_is_in_training_mode() -> None:
    modes: list[bool] = []
    validated: list[bool] = []

    class Watched(Net):
        def forward(self, batch: Batch) -> Output:
            (modes if torch.is_grad_enabled() else validated).append(self.training and self.dropout.training)
            return super().forward(batch)

    model = Watched()
    model.eval()
    config = FitConfig(epochs=3, evaluate_every=0.5, patience=None)
    fit(model, Data(TRAIN), Data(VALID), config)
    assert modes == [True] * 18
    assert validated == [False] * 12


def test_dropout_is_active_after_the_first_validation() -> None:
    zeros: list[int] = []

    class Watched(Net):
        def forward(self, batch: Batch) -> Output:
            if torch.is_grad_enabled():
                zeros.append(int((self.dropout(torch.ones(1000)) == 0).sum()))
            return super().forward(batch)

    fit(Watched(dropout=0.5), Data(TRAIN), Data(VALID), FitConfig(epochs=3, patience=None))
    assert len(zeros) == 18
    assert all(400 < count < 600 for count in zeros)


# ---- the arithmetic


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, max_norm: float = math.inf) -> float:
    """A training step in plain torch: log loss from probabilities, as a formula."""
    assert batch.labels is not None
    optimizer.zero_grad()
    p = torch.sigmoid(model(batch).logits)
    y = batch.labels[:, 0]
    loss = -(y * p.log() + (1 - y) * (1 - p).log()).mean()
    penalized = loss
    if isinstance(model, Penalized):
        penalized = loss + model.penalty()
    torch.autograd.backward(penalized)
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm))
    optimizer.step()
    assert max_norm == math.inf or norm > 2 * max_norm, "the test means to clip"
    return float(loss.detach())


class Penalized(Net):
    def penalty(self) -> Tensor:
        rest = self.out.weight.square().sum() + self.out.bias.square().sum()
        return 0.3 / 2 * self.table.weight.square().sum() + 0.2 / 2 * rest


def in_float64(batch: Batch) -> Batch:
    return Batch(sparse=batch.sparse, dense=batch.dense.double(), labels=batch.labels)


def test_penalties_and_clipping_equal_plain_torch() -> None:
    """The penalties are part of the gradient that is clipped."""
    ours, theirs = Penalized().double(), Penalized().double()
    batches = [in_float64(b) for b in TRAIN]
    config = OptimizerConfig(name="sgd", learning_rate=0.1, embedding_l2=0.3, net_l2=0.2, max_grad_norm=0.1)
    result = fit(ours, Data(batches), None, FitConfig(optimizer=config, epochs=1))
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    losses = [take_step(theirs, optimizer, batch, max_norm=0.1) for batch in batches]
    for name, value in copy_of(theirs).items():
        torch.testing.assert_close(copy_of(ours)[name], value, rtol=0, atol=1e-12)
    assert result.history[0]["train_loss"] == pytest.approx(np.mean(losses), rel=1e-12)


def test_adam_equals_plain_torch() -> None:
    ours, theirs = Net().double(), Net().double()
    batches = [in_float64(b) for b in TRAIN]
    fit(ours, Data(batches), None, FitConfig(epochs=2, optimizer=OptimizerConfig(learning_rate=0.01, max_grad_norm=None)))
    optimizer = torch.optim.Adam(theirs.parameters(), lr=0.01, foreach=False)
    for batch in [*batches, *batches]:
        take_step(theirs, optimizer, batch)
    for name, value in copy_of(theirs).items():
        torch.testing.assert_close(copy_of(ours)[name], value, rtol=0, atol=1e-9)


def test_warm_up_reaches_the_optimizer() -> None:
    config = FitConfig(optimizer=SGD, epochs=2, schedule=ScheduleConfig(name="cosine", min_learning_rate=0, warmup_steps=6))
    result = fit(Net(), Data(TRAIN), None, config)
    assert [line["learning_rate"] for line in result.history] == pytest.approx([0.1, 0.0])


def test_learns_and_reports_the_metrics_of_the_best_weights() -> None:
    model = Net()
    valid = make_batches(20, seed=5)
    config = FitConfig(optimizer=OptimizerConfig(learning_rate=0.02), epochs=15)
    result = fit(model, Data(make_batches(60, seed=4)), Data(valid), config)
    labels = torch.cat([b.labels for b in valid if b.labels is not None])[:, 0].numpy()
    with torch.no_grad():
        logits = torch.cat([model(b).logits for b in valid])
    assert roc_auc_score(labels, logits.numpy()) > 0.8
    assert result.metrics["auc"] == pytest.approx(roc_auc_score(labels, logits.numpy()), abs=1e-9)
    assert result.metrics["log_loss"] == pytest.approx(log_loss(labels, torch.sigmoid(logits.double()).numpy()), abs=1e-9)


def test_same_seed_same_weights() -> None:
    def trained(seed: int) -> Weights:
        seed_everything(seed)
        model = Net(dropout=0.3, seed=torch.initial_seed())
        fit(model, Data(TRAIN), Data(VALID), FitConfig(epochs=3))
        return copy_of(model)

    assert same(trained(5), trained(5))
    assert not same(trained(5), trained(6))


def test_seed_everything_covers_python_and_numpy() -> None:
    import random

    draws = []
    for _ in range(2):
        seed_everything(11)
        draws.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert draws[0] == draws[1]


def test_bf16() -> None:
    seen: list[torch.dtype] = []

    class Watched(Net):
        def forward(self, batch: Batch) -> Output:
            output = super().forward(batch)
            seen.append(output.logits.dtype)
            return output

    model = Watched()
    result = fit(model, Data(TRAIN), Data(VALID), FitConfig(epochs=2, precision="bf16", patience=None))
    assert set(seen) == {torch.bfloat16}
    assert {value.dtype for value in model.state_dict().values()} == {torch.float32}
    assert math.isfinite(result.history[1]["train_loss"])
    exact, rounded = predict(model, VALID), predict(model, VALID, precision="bf16")
    assert 0 < np.abs(exact.logits - rounded.logits).max() < 0.05


def test_compiled_training_equals_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled_models: list[nn.Module] = []
    compile_model = torch.compile

    def compile_whole(model: nn.Module) -> Any:
        compiled_models.append(model)
        return compile_model(model, backend="aot_eager", fullgraph=True)  # a graph break is an error; no C++, so quick

    monkeypatch.setattr(torch, "compile", compile_whole)
    eager, compiled = Net(), Net()
    fit(eager, Data(TRAIN), Data(VALID), FitConfig(optimizer=SGD, epochs=2))
    fit(compiled, Data(TRAIN), Data(VALID), FitConfig(optimizer=SGD, epochs=2, compile=True))
    assert compiled_models == [compiled]
    assert copy_of(compiled).keys() == copy_of(eager).keys()
    for name, value in copy_of(eager).items():
        torch.testing.assert_close(copy_of(compiled)[name], value, rtol=1e-4, atol=1e-5)


# ---- files


def test_history_and_best_weights_on_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Net()
    script = Script(monkeypatch, model, [{"auc": 0.5, "copc": math.nan}, 0.6, 0.55, 0.54])
    folder = tmp_path / "runs" / "one"
    lines_during: list[int] = []

    def before(number: int) -> None:
        if number % 6 == 1 and number > 1:
            lines_during.append(len((folder / "history.jsonl").read_text().splitlines()))

    result = fit(model, Data(TRAIN, before), Data(VALID), FitConfig(optimizer=SGD), out=folder)
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert lines_during == [1, 2, 3]
    assert [set(line) for line in lines] == [
        {"epoch", "step", "train_loss", "learning_rate", "seconds", "rows_per_second", "valid"}
    ] * 4
    assert [line["valid"] for line in lines] == [{"auc": 0.5, "copc": None}, {"auc": 0.6}, {"auc": 0.55}, {"auc": 0.54}]
    assert lines[1:] == result.history[1:]
    assert [line["step"] for line in lines] == [6, 12, 18, 24]
    assert sorted(path.name for path in folder.iterdir()) == ["best.safetensors", "history.jsonl"]
    assert same(load_file(folder / "best.safetensors"), script.weights[1])


def test_best_weights_are_on_disk_while_training_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Net()
    script = Script(monkeypatch, model, [0.5, 0.4, 0.6])
    on_disk: list[Weights] = []

    def before(number: int) -> None:
        if number in (7, 13):
            on_disk.append(load_file(tmp_path / "best.safetensors"))

    fit(model, Data(TRAIN, before), Data(VALID), FitConfig(optimizer=SGD, epochs=3), out=tmp_path)
    assert [same(weights, script.weights[0]) for weights in on_disk] == [True, True]
    assert same(load_file(tmp_path / "best.safetensors"), script.weights[2])


def test_tied_and_strided_weights_are_saved(tmp_path: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.same = self.out
            self.table.weight = nn.Parameter(torch.randn(3, 12).T)

    model = Tied()
    assert not model.table.weight.is_contiguous()
    fit(model, Data(TRAIN), Data(VALID), FitConfig(epochs=1), out=tmp_path)
    assert same(load_file(tmp_path / "best.safetensors"), copy_of(model))


def test_rows_per_second_leaves_evaluation_out() -> None:
    def slowly(number: int) -> None:
        time.sleep(0.05)

    result = fit(Net(), Data(TRAIN, lambda number: time.sleep(0.01)), Data(VALID, slowly), FitConfig(epochs=2))
    assert result.seconds > 2 * 2 * 0.05 + 12 * 0.01
    assert 16 * 12 / (result.seconds - 0.15) < result.rows_per_second < 16 * 12 / 0.12


def test_one_line_of_log_an_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="ctrlib"):
        fit(Net(), Data(TRAIN), Data(VALID), FitConfig(epochs=2, patience=None), title="frappe")
    assert len(caplog.messages) == 2
    assert caplog.messages[0].startswith("frappe: epoch 1.00, loss ")
    assert "valid auc " in caplog.messages[0]


# ---- what can go wrong


def test_interrupt_restores_and_saves_the_best(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Net()
    script = Script(monkeypatch, model, [0.7, 0.6])

    def before(number: int) -> None:
        if number == 15:
            raise KeyboardInterrupt

    result = fit(model, Data(TRAIN, before), Data(VALID), FitConfig(optimizer=SGD), out=tmp_path)
    assert result.interrupted
    assert result.epochs == pytest.approx(2 + 2 / 6)
    assert (result.best_epoch, result.metrics) == (1, {"auc": 0.7})
    assert same(copy_of(model), script.weights[0])
    assert same(load_file(tmp_path / "best.safetensors"), script.weights[0])


def test_interrupt_during_evaluation_and_during_saving(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = Net()
    script = Script(monkeypatch, model, [0.7, 0.8])
    save_file = safetensors.torch.save_file
    calls: list[int] = []

    def interrupted(*arguments: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        save_file(*arguments)

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    result = fit(model, Data(TRAIN), Data(VALID), FitConfig(optimizer=SGD), out=tmp_path)
    assert result.interrupted
    assert result.best_epoch == 2
    assert same(load_file(tmp_path / "best.safetensors"), script.weights[1])
    assert not list(tmp_path.glob("*.part"))

    def before(number: int) -> None:
        if number == 6:  # 1 for the look at the first batch, 2 and 3, 4 and 5 for two evaluations
            raise KeyboardInterrupt

    model = Net()
    script = Script(monkeypatch, model, [0.7, 0.6])
    result = fit(model, Data(TRAIN), Data(VALID, before), FitConfig(optimizer=SGD))
    assert result.interrupted
    assert (result.epochs, result.best_epoch) == (3, 1)
    assert same(copy_of(model), script.weights[0])


def test_interrupt_before_any_evaluation_keeps_current_weights(tmp_path: Path) -> None:
    model = Net()
    at_interrupt: list[Weights] = []

    def before(number: int) -> None:
        if number == 4:
            at_interrupt.append(copy_of(model))
            raise KeyboardInterrupt

    result = fit(model, Data(TRAIN, before), Data(VALID), FitConfig(), out=tmp_path)
    assert result.interrupted
    assert (result.epochs, result.best_epoch, result.metrics) == (0.5, 0.5, {})
    assert not same(copy_of(model), copy_of(Net()))
    assert same(copy_of(model), at_interrupt[0])
    assert same(load_file(tmp_path / "best.safetensors"), at_interrupt[0])


def test_an_error_in_the_data_still_restores_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Net()
    script = Script(monkeypatch, model, [0.7, 0.6])

    def before(number: int) -> None:
        if number == 15:
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fit(model, Data(TRAIN, before), Data(VALID), FitConfig(optimizer=SGD))
    assert same(copy_of(model), script.weights[0])


def with_infinity(batch: Batch) -> Batch:
    return Batch(sparse=batch.sparse, dense=torch.full_like(batch.dense, math.inf), labels=batch.labels)


def test_infinite_values_name_the_step_and_keep_the_best(tmp_path: Path) -> None:
    model = Net()
    weights: list[Weights] = []

    class Spoiled(Data):
        def __iter__(self) -> Iterator[Batch]:
            for batch in super().__iter__():
                if self.count == 7:
                    weights.append(copy_of(model))
                yield with_infinity(batch) if self.count == 9 else batch

    with pytest.raises(TrainingDivergedError) as caught:
        fit(model, Spoiled(TRAIN), Data(VALID), FitConfig(), out=tmp_path)
    message = str(caught.value)
    assert isinstance(caught.value, FloatingPointError)
    for part in ("step 9 (epoch 1.50)", "loss is nan", "epoch 1.00, are restored", "learning_rate", "numeric columns"):
        assert part in message
    assert same(copy_of(model), weights[0])
    assert same(load_file(tmp_path / "best.safetensors"), weights[0])


def test_divergence_without_best_weights_writes_none(tmp_path: Path) -> None:
    with pytest.raises(TrainingDivergedError, match=r"step 1 .*no weights were kept"):
        fit(Net(), Data([with_infinity(TRAIN[0])]), Data(VALID), FitConfig(), out=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_divergence_is_noticed_inside_a_long_epoch() -> None:
    data = Data([TRAIN[0]] * 20 + [with_infinity(TRAIN[0])] + [TRAIN[0]] * 300)
    with pytest.raises(TrainingDivergedError, match="step 21 "):
        fit(Net(), data, None, FitConfig(epochs=1))
    assert data.count <= 50


def test_infinite_predictions_are_noticed() -> None:
    with pytest.raises(TrainingDivergedError, match="predictions for validation rows"):
        fit(Net(), Data(TRAIN), Data([with_infinity(VALID[0])]), FitConfig())


def test_empty_data_is_refused() -> None:
    with pytest.raises(DataError, match="training set gave no batch"):
        fit(Net(), Data([]), None, FitConfig())
    with pytest.raises(DataError, match="validation set has no rows"):
        fit(Net(), Data(TRAIN), Data([]), FitConfig())
    with pytest.raises(DataError, match="no batch to predict"):
        predict(Net(), [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"patience": 0}, "patience is 0"),
        ({"monitor": "acu"}, "monitor is 'acu'.*did you mean 'auc'"),
        ({"precision": "fp16"}, "precision is 'fp16'"),
        ({"evaluate_every": 0.0}, "evaluate_every is 0.0"),
        ({"evaluate_every": 2.0}, "evaluate_every is 2.0"),
        ({"min_delta": -1.0}, "min_delta is -1.0"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FitConfig(**options)


def test_config_survives_json() -> None:
    config = FitConfig(epochs=3, optimizer=OptimizerConfig(embedding_l2=0.1), monitor="auc-log_loss", patience=None)
    assert from_json(to_json(config), FitConfig, {}) == config


# ---- predict and evaluate


def test_predict() -> None:
    model = Net()
    batches = make_batches(3, extras=True)
    model.train()
    predictions = predict(model, batches)
    assert model.training
    assert predictions.logits.shape == (48,)
    assert predictions.logits.dtype == np.float64
    weight, bias, table = (p.detach().double().numpy() for p in (model.out.weight, model.out.bias, model.table.weight))
    row = batches[1]
    x = np.concatenate([*(table[i] for i in row.sparse[5].tolist()), row.dense[5].double().numpy()])
    assert predictions.logits[21] == pytest.approx(float(weight[0] @ x + bias[0]), rel=1e-5)
    assert predictions.labels is not None
    assert predictions.weight is not None
    assert predictions.group is not None
    assert row.labels is not None
    assert row.weight is not None
    assert row.group is not None
    assert predictions.labels[21] == row.labels[5, 0].item()
    assert predictions.weight[21] == row.weight[5].item()
    assert predictions.group[21] == row.group[5].item()


def test_predict_without_labels_in_eval_mode() -> None:
    model = Net(dropout=0.9)
    model.eval()
    serving = [Batch(sparse=b.sparse, dense=b.dense) for b in VALID]
    a, b = predict(model, serving), predict(model, serving, device="cpu")
    assert np.array_equal(a.logits, b.logits)
    assert (a.labels, a.weight, a.group) == (None, None, None)
    assert not model.training
    with pytest.raises(DataError, match="no labels"):
        evaluate(model, serving)


def test_probability_of_extreme_logits() -> None:
    logits = np.array([0.0, math.log(3), -math.log(3), 800.0, -800.0, 40.0])
    p = Predictions(logits=logits, labels=None, weight=None, group=None).probability
    assert p[:5] == pytest.approx([0.5, 0.75, 0.25, 1.0, 0.0])
    assert 1 - Predictions(logits=-logits, labels=None, weight=None, group=None).probability[5] == p[5]


def test_evaluate_with_weights_and_groups() -> None:
    model, batches = Net(), make_batches(8, extras=True)
    metrics = evaluate(model, batches)
    predictions = predict(model, batches)
    expected = roc_auc_score(predictions.labels, predictions.logits, sample_weight=predictions.weight)
    assert metrics["auc"] == pytest.approx(expected, abs=1e-9)
    assert 0 < metrics["gauc"] < 1


def test_several_tasks() -> None:
    model, batches = Net(tasks=2), make_batches(6, tasks=2)
    result = fit(model, Data(batches), Data(batches), FitConfig(epochs=1), label_names=("click", "like"))
    assert set(result.metrics["labels"]) == {"click", "like"}
    predictions = predict(model, batches)
    assert predictions.labels is not None
    aucs = [roc_auc_score(predictions.labels[:, t], predictions.logits[:, t]) for t in range(2)]
    assert result.metrics["auc"] == pytest.approx(np.mean(aucs), abs=1e-9)
    assert set(evaluate(model, batches)["labels"]) == {"label_0", "label_1"}
    with pytest.raises(ConfigError, match="as many outputs"):
        evaluate(Net(), batches)


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_is_silent_off_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with track("epoch 1", 10) as tracker:
        tracker.advance(10, "loss 0.5")
    captured = capsys.readouterr()
    assert captured.out == captured.err == ""


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    with track("epoch 1", 10, "batches") as tracker:
        tracker.advance(4, "loss 0.5")
        tracker.advance(3)
    shown = terminal.getvalue()
    for part in ("epoch 1", "7/10", "batches/s", "loss 0.5"):
        assert part in shown


def test_fit_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "160")
    result: FitResult = fit(Net(), Data(TRAIN), Data(VALID), FitConfig(epochs=1), title="demo")
    assert "demo: epoch 1/1" in terminal.getvalue()
    assert f"valid auc {result.metrics['auc']:.5f}" in terminal.getvalue()
