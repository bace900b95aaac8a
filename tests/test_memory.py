"""The predicted memory of tables: against what the optimizers hold, and the peak of the process while it trains."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ctrlib.embedding import RowDtype
from ctrlib.experiment import DataOptions, check_cross_memory, prepare, train
from ctrlib.memory import TableMemory, cross_memory, model_cross_memory, table_memory
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.optinter import OptInter
from ctrlib.models.presets import PRESETS, preset
from ctrlib.optim import OptimizerConfig, build_optimizer
from ctrlib.schema import BatchLayout, DataError, SparseColumn
from ctrlib.search.optinter import OptInterConfig, search_optinter
from ctrlib.table import EmbeddingTable
from tests.clicks import SCHEMA, clicks, tiny
from tests.models.small import LAYOUT, shrunk, with_crosses

CROSSED = with_crosses(LAYOUT)

EVERY: list[dict[str, Any]] = [
    *({"embedding": e} for e in ("sgd", "adagrad", "rowwise_adagrad", "lazy_adam", "rowwise_adam", "adam")),
    *({"embedding": "dense", "name": n} for n in ("adam", "adamw", "adagrad", "sgd")),
    {"embedding": "dense", "name": "sgd", "momentum": 0.9},
    {"embedding": "adagrad", "embedding_l2": 1e-3},
    {"embedding": "lazy_adam", "embedding_l2": 1e-3, "embedding_l2_mode": "batch_rows"},
]


def _held(value: object) -> int:
    """Bytes of the large tensors inside a state dict."""
    if isinstance(value, torch.Tensor):
        return value.numel() * value.element_size()
    if isinstance(value, dict):
        return sum(map(_held, value.values()))
    return sum(map(_held, value)) if isinstance(value, list) else 0


@pytest.mark.parametrize(
    ("options", "row_dtype"),
    [(o, d) for o in EVERY for d in ("float32", "bfloat16") if d == "float32" or o["embedding"] != "dense"],
    ids=str,
)
def test_what_the_optimizers_hold(options: dict[str, Any], row_dtype: RowDtype) -> None:
    rows, dim = 5000, 6
    config = OptimizerConfig(**options)
    table = EmbeddingTable(rows, dim, torch.bfloat16 if row_dtype == "bfloat16" else None)
    optimizer = build_optimizer(table, config)
    torch.autograd.backward(table(torch.arange(50)).sum())
    predicted = table_memory(rows, dim, config, row_dtype)
    weight = table.weight
    assert predicted.weights == weight.numel() * weight.element_size()
    grad = weight.grad
    assert grad is not None
    assert predicted.gradient == (0 if grad.is_sparse else grad.numel() * 4)
    optimizer.step()
    state = optimizer.state_dict()
    held = _held(state["tables"]) + _held(state["dense"])
    kernel = 0 if options["embedding"] == "dense" else 4 * rows
    assert held + kernel == pytest.approx(predicted.state, abs=64)  # torch.optim counts its steps
    optimizer.close()


def test_only_crosses_count() -> None:
    layout = BatchLayout(
        sparse=(
            SparseColumn("a", 1000, "a"),
            SparseColumn("b", 50, "b"),
            SparseColumn("a*b", 300, "a*b", ("a", "b")),
            SparseColumn("a*c", 70, "a*c", ("a", "c")),
        )
    )
    config = OptimizerConfig(embedding="dense")
    memory = cross_memory(layout, 10, config)
    assert (memory.rows, memory.weights, memory.gradient, memory.state) == (370, 14800, 14800, 29600)
    assert memory.best == 2 * 14800
    assert memory.total == 6 * 14800  # the weights, their gradient, two moments, and the best weights so far twice
    assert cross_memory(layout, 10, config, dims={"a*c": 4, "a": 99}).weights == 4 * (300 * 10 + 70 * 4)
    assert cross_memory(layout, 10, OptimizerConfig(embedding="sgd"), row_dtype="bfloat16").weights == 7400


def test_of_a_model_all_its_rows_of_crosses_count() -> None:
    config, crosses = OptimizerConfig(embedding="dense"), CROSSED.sparse[3:]
    rows = sum(c.vocab_size for c in crosses)

    def taken(model: ModelComponent.Config) -> TableMemory:
        with torch.device("meta"):
            return model_cross_memory(build_model(model, CROSSED), CROSSED, config)

    assert taken(preset("dnn")) == cross_memory(CROSSED, preset("dnn").embedding.dim, config)
    assert taken(preset("fm")).weights == 4 * rows * (preset("fm").embedding.dim + 1)  # first-order weights
    mixture = preset("optinter")
    assert isinstance(mixture, OptInter.Config)
    assert taken(mixture).weights == 4 * rows * mixture.pair_dim  # not the width of its fields
    assert taken(preset("optinter_f")).total == 0  # crosses that it does not read
    some = replace(mixture, choices={"user*hour": "memorize"})
    assert taken(some).rows == next(c.vocab_size for c in crosses if c.name == "user*hour")


@pytest.mark.parametrize("name", PRESETS)
def test_every_model_can_be_measured_before_it_takes_memory(name: str) -> None:
    config = shrunk(preset(name))
    with torch.device("meta"):
        measured = model_cross_memory(build_model(config, CROSSED), CROSSED, OptimizerConfig())
    assert measured == model_cross_memory(build_model(config, CROSSED), CROSSED, OptimizerConfig())


PEAK = """
import json
import torch
from ctrlib.batch import Batch
from ctrlib.memory import cross_memory
from ctrlib.models.ctr import build_model
from ctrlib.experiment import configure
from ctrlib.schema import BatchLayout, SparseColumn
from ctrlib.training import fit

def status(name):
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))

def peak(layout, config):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # forget the peak so far
    before = status("VmRSS")
    model = build_model(config.model, layout)
    batches = []
    for _ in range(3):
        ids = torch.stack([torch.randint(1, c.vocab_size, (64,)) for c in layout.sparse], 1).int()
        labels = (torch.rand(64, 1) < 0.9).float()
        batches.append(Batch(sparse=ids, dense=torch.zeros(64, 0), labels=labels))
    result = fit(model, batches, batches, config.fit)
    assert result.best_epoch == 3  # better every time, so the best weights were replaced
    return status("VmHWM") - before

plain = (SparseColumn("a", 2000, "a"), SparseColumn("b", 2000, "b"))
crossed = (*plain, SparseColumn("a*b", 600_000, "a*b", ("a", "b")))
found = {}
for embedding in ("dense", "adagrad", "lazy_adam"):
    options = {"model.embedding.dim": "16", "fit.optimizer.embedding": embedding, "model.interaction.hidden_units": "8"}
    options |= {"fit.epochs": "3", "fit.monitor": "log_loss"}
    config = configure("dnn", options=options)
    peak(BatchLayout(sparse=plain), config)  # what torch allocates once
    rest = peak(BatchLayout(sparse=plain), config)
    taken = peak(BatchLayout(sparse=crossed), config) - rest
    found[embedding] = taken, cross_memory(BatchLayout(sparse=crossed), 16, config.fit.optimizer).total
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak of the process from /proc")
def test_the_real_peak_is_within_a_tenth_of_the_prediction() -> None:
    done = subprocess.run([sys.executable, "-c", PEAK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"dense", "adagrad", "lazy_adam"}
    for embedding, (taken, predicted) in found.items():
        assert taken == pytest.approx(predicted, rel=0.1), embedding


def test_a_limit_of_ones_own(tmp_path: Path) -> None:
    crossed = DataOptions(schema=SCHEMA.with_crosses([("user", "city")]), cross_memory_mb=0.2)
    with pytest.raises(DataError, match=r"take [\d,]+ MB in training.*allowed are 0 MB \(cross_memory_mb\)"):
        train(clicks(300, 0), tiny(model__embedding__dim="999"), tmp_path / "run", crossed)  # few values, but wide
    assert list(tmp_path.iterdir()) == []
    train(clicks(300, 0), tiny(fit__epochs="1"), tmp_path / "run", crossed)


def test_crosses_that_a_model_does_not_read_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrlib.experiment.half_of_free_mb", lambda: 1e-3)
    check_cross_memory(preset("optinter_f"), CROSSED, OptimizerConfig())
    with pytest.raises(DataError, match="the crosses have"):
        check_cross_memory(preset("optinter_m"), CROSSED, OptimizerConfig())


def test_off_the_cpu_weights_must_fit_the_machine_and_all_of_it_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    config, optimizer = preset("optinter_m"), OptimizerConfig(embedding="dense")
    with torch.device("meta"):
        memory = model_cross_memory(build_model(config, CROSSED), CROSSED, optimizer)
    weights, everything = memory.weights / 2**20, memory.total / 2**20
    assert everything == 6 * weights

    def check(device: str, machine: float, gpu: float, limit: float | None = None) -> None:
        monkeypatch.setattr("ctrlib.experiment.half_of_free_mb", lambda: machine / 2)
        # half of what is free is in torch's own store
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (int(gpu / 2 * 2**20), 0))
        monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: int(gpu / 2 * 2**20) + 999)
        monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 999)
        check_cross_memory(config, CROSSED, optimizer, limit, device=device)

    enough, little = 1.01, 0.99
    check("cuda", enough * weights, enough * everything)
    check("cuda", enough * weights, 0, limit=enough * everything)  # a limit of one's own stands for what is free there
    check("meta", enough * weights, 0)
    check("cpu", enough * everything, 0)
    with pytest.raises(DataError, match=r"MB in training with .*'dense'; free on cuda are \d+ MB"):
        check("cuda", enough * weights, little * everything)
    for device in ("cuda", "meta"):
        with pytest.raises(DataError, match=r"MB before the model is on its device; free are \d+ MB"):
            check(device, little * weights, enough * everything)
    with pytest.raises(DataError, match="before the model is on its device"):
        check("cuda", little * weights, enough * everything, limit=enough * everything)
    with pytest.raises(DataError, match="cross_memory_mb"):
        check("cuda", enough * weights, enough * everything, limit=little * everything)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_search_of_optinter_is_refused_on_any_device(device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    crossed = DataOptions(schema=SCHEMA.with_crosses([("user", "city")]))
    store = prepare(clicks(300, 0), tmp_path / "store", crossed)
    monkeypatch.setattr("ctrlib.experiment.half_of_free_mb", lambda: 1e-4)
    with pytest.raises(DataError, match="the crosses have"):
        search_optinter(preset("optinter"), store, OptInterConfig(), fit=tiny().fit, batch_size=64, seed=0, device=device)


def test_training_is_refused_where_the_crosses_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ctrlib.experiment.half_of_free_mb", lambda: 1e-3)
    crossed = DataOptions(schema=SCHEMA.with_crosses([("user", "city")]))
    with pytest.raises(
        DataError, match=r"the crosses have [\d,]+ values, which take .* MB in training with .*'adagrad'; free are"
    ):
        train(clicks(300, 0), tiny(), tmp_path / "run", crossed)
    assert list(tmp_path.iterdir()) == []
    train(clicks(300, 0), tiny(fit__epochs="1"), tmp_path / "run", DataOptions(schema=SCHEMA))
