"""Permutation, gradients and trees: against loops over rows, on planted fields, and on every kind of field."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import nn

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, override
from ctrlib.data.loader import Loader
from ctrlib.metrics import auc, log_loss
from ctrlib.models.ctr import CTRModel, ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import BatchLayout, DataError, DenseField, SequenceField, SparseField
from ctrlib.search import auto_field, auto_fis, importance
from ctrlib.search.auto_field import AutoFieldConfig, search_auto_field
from ctrlib.search.auto_fis import AutoFISConfig, search_auto_fis
from ctrlib.search.importance import (
    Engine,
    GBDTConfig,
    GradientConfig,
    Metric,
    PermutationConfig,
    gradient_scores,
    permutation_scores,
    search_gbdt,
    search_gradient,
    search_permutation,
)
from ctrlib.search.screening import OutRankConfig, search_outrank
from ctrlib.training import FitConfig, seed_everything
from tests.search.stores import Guarded, click_store, coin, make

FIT = FitConfig(epochs=3, patience=None, optimizer=OptimizerConfig(learning_rate=0.01))


def tiny(name: str = "deepfm") -> ModelComponent.Config:
    options = {"embedding.dim": "1" if name == "lr" else "4", "embedding.init_std": "0.1"}
    if name == "deepfm":
        options |= {"interaction.streams.1.hidden_units": "8", "interaction.streams.1.dropout": "0.2"}
    return override(preset(name), options, COMPONENTS)


def columns(rows: int, seed: int) -> dict[str, Any]:
    """Of four fields ``a``, ``tags`` and ``number`` tell something; ``noise`` has 300 values that mean nothing."""
    rng = np.random.default_rng(seed)
    a, tag, number = rng.integers(0, 6, rows), rng.integers(0, 3, rows), rng.normal(size=rows)
    logit = 1.5 * np.sin(2.0 * a) + 1.2 * (tag - 1) + 1.2 * number
    tags = [[f"t{t}", f"n{rng.integers(0, 5)}"][: rng.integers(0, 3)] for t in tag]
    number[rng.random(rows) < 0.05] = np.nan
    return {"label": coin(logit, rng), "a": a, "tags": tags, "number": number, "noise": rng.integers(0, 300, rows)}


FIELDS = (SparseField(name="a"), SequenceField(name="tags"), DenseField(name="number"), SparseField(name="noise"))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    parts = {name: columns(rows, seed) for seed, (name, rows) in enumerate((("train", 3000), ("valid", 1000), ("test", 100)))}
    return make(tmp_path_factory.mktemp("importance"), parts, FIELDS, allowed=("train", "valid"))


def built(store: Guarded, name: str = "deepfm") -> ModelComponent:
    seed_everything(0)
    return build_model(tiny(name), store.encoder.layout)


class ByUser(nn.Module):
    """The logit is the id of one field."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, batch: Batch) -> Output:
        return Output(batch.sparse[:, 0].float() - 4)


@pytest.mark.parametrize("metric", ["auc", "log_loss"])
def test_permutation_is_the_loss_of_the_metric(data: Guarded, metric: Metric) -> None:
    split, layout = data.split("valid"), data.encoder.layout
    found = permutation_scores(ByUser(), split, layout, metric=metric, repeats=2, seed=3)
    shuffled = Loader(split, 1000, shuffle=True, seed=3)
    labels, ids = split.labels[:, 0].numpy(), split.sparse[:, 0].numpy()
    expected = []
    for _ in range(2):
        dealt = next(iter(shuffled)).sparse[:, 0].numpy()
        if metric == "auc":
            expected.append(auc(labels, ids) - auc(labels, dealt))
        else:
            before, after = (log_loss(labels, 1 / (1 + np.exp(4.0 - values))) for values in (ids, dealt))
            expected.append(after - before)
    assert found["a"] == pytest.approx(expected, abs=1e-6)
    assert found["a"][0] != found["a"][1]
    assert all(found[name] == [0, 0] for name in ("tags", "number", "noise"))  # which the model does not read


@pytest.mark.parametrize("name", ["a", "tags", "number"])
def test_one_field_moves_between_rows_and_the_others_stay(data: Guarded, name: str) -> None:
    split, layout = data.split("valid"), data.encoder.layout
    rows = next(iter(Loader(split, 1000)))
    dealt, again = (next(iter(importance._Dealt(split, layout, name, 0))) for _ in range(2))

    def cells(batch: Batch) -> dict[str, list[Any]]:
        ragged = batch.sequences["tags"]
        ends = ragged.offsets.tolist()
        return {
            "a": batch.sparse[:, 0].tolist(),
            "noise": batch.sparse[:, 1].tolist(),
            "number": batch.dense[:, 0].nan_to_num(99).tolist(),
            "tags": [ragged.values[i:j].tolist() for i, j in pairwise(ends)],
        }

    before, after = cells(rows), cells(dealt)
    assert cells(again) == after
    assert after[name] != before[name]
    assert sorted(after[name]) == sorted(before[name])  # lists are dealt whole
    assert {other: after[other] for other in after if other != name} == {o: before[o] for o in before if o != name}
    assert dealt.labels is not None
    assert rows.labels is not None
    assert torch.equal(dealt.labels, rows.labels)


def test_gradients_by_hand(data: Guarded) -> None:
    """Logistic regression: ∂L/∂w = p − y, so I_f = mean |(p − y)(mean w − w)|."""
    model = built(data, "lr")
    split, layout = data.split("valid"), data.encoder.layout
    batch = next(iter(Loader(split, 1000)))
    with torch.no_grad():
        tokens = model.embedding(batch)[:, :, 0].double().numpy()
        p = torch.sigmoid(model(batch).logits).double().numpy()
    assert batch.labels is not None
    effect = np.abs((p - batch.labels[:, 0].numpy())[:, None] * (tokens.mean(axis=0) - tokens)).mean(axis=0)
    expected = dict(zip(model.embedding.out.names, effect.tolist(), strict=True))
    assert gradient_scores(model, split, layout) == pytest.approx(expected, rel=1e-5)


def test_gradients_of_single_rows_and_of_batches_agree(data: Guarded) -> None:
    """Two embeddings, dropout, lists, ids that repeat in a batch: a row's gradient is its own."""
    model = built(data)
    model.train()
    split, layout = data.split("valid"), data.encoder.layout
    whole, odd, single = (gradient_scores(model, split, layout, batch_size=size) for size in (1000, 37, 1))
    assert odd == pytest.approx(whole, rel=1e-4)
    assert single == pytest.approx(whole, rel=1e-4)
    assert model.training
    assert not [m for m in model.modules() if m._forward_hooks]
    assert all(p.grad is None for p in model.parameters())
    assert min(whole.values()) > 0


def test_gradients_are_the_slope_of_the_loss(data: Guarded) -> None:
    """For a row, moving a token a little of the way to the mean changes the loss by so little times the inner product."""
    model = built(data).double().eval()
    batch = next(iter(Loader(data.split("valid"), 1000)))
    i = model.embedding.out.names.index("a")
    step = 1e-6

    def losses(share: float) -> torch.Tensor:
        def move(_: nn.Module, __: Any, x: torch.Tensor) -> torch.Tensor:
            x = x.clone()
            x[:, i] += share * (x[:, i].mean(dim=0) - x[:, i])
            return x

        handles = [m.register_forward_hook(move) for m in importance_embeddings(model)]
        with torch.no_grad():
            logits = model(batch).logits
        for handle in handles:
            handle.remove()
        assert batch.labels is not None
        return nn.functional.binary_cross_entropy_with_logits(logits, batch.labels[:, 0].double(), reduction="none")

    slope = ((losses(step) - losses(-step)) / (2 * step)).abs().mean().item()
    found = gradient_scores(model.float(), data.split("valid"), data.encoder.layout)
    assert found["a"] == pytest.approx(slope, rel=1e-4)


def importance_embeddings(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if type(m).__name__ == "FeatureEmbedding"]


@pytest.mark.parametrize("method", ["permutation", "gradient"])
def test_a_trained_model_knows_its_fields(data: Guarded, method: str) -> None:
    def run() -> Any:
        if method == "permutation":
            config = PermutationConfig(top=3, repeats=2)
            return search_permutation(tiny(), data, config, fit=FIT, batch_size=128, seed=0)
        return search_gradient(tiny(), data, GradientConfig(top=3), fit=FIT, batch_size=128, seed=0)

    found = run()
    assert found.method == method
    assert found.encoder_hash == data.encoder.hash
    assert found.fields == ("a", "tags", "number")
    assert set(found.scores) == {"a", "tags", "number", "noise"}
    assert found.report["valid"]["auc"] > 0.7
    assert found.report["training_seconds"] > 0
    assert run().scores == found.scores


def test_a_model_needs_validation_rows(tmp_path: Path) -> None:
    store = make(tmp_path, {"train": columns(100, 0)}, FIELDS)
    with pytest.raises(DataError, match="has no validation rows, on which the fields are scored; it has train: prepare it"):
        search_gradient(tiny(), store, GradientConfig(top=1), fit=FIT, batch_size=32, seed=0)


def test_permutation_without_both_labels(tmp_path: Path) -> None:
    ones = columns(50, 0) | {"label": np.ones(50, dtype=np.int64)}
    store = make(tmp_path, {"train": columns(100, 0), "valid": ones}, FIELDS, allowed=("valid",))
    with pytest.raises(DataError, match="auc of these rows is undefined; expected rows of both labels"):
        permutation_scores(ByUser(), store.split("valid"), store.encoder.layout)


def test_gradients_need_an_embedding(data: Guarded) -> None:
    with pytest.raises(ConfigError, match="no embedding of the model reads field 'a'"):
        gradient_scores(ByUser(), data.split("valid"), data.encoder.layout)


engines = pytest.mark.parametrize("engine", ["lightgbm", "scikit-learn"])


def gbdt(engine: str, **options: Any) -> GBDTConfig:
    pytest.importorskip({"lightgbm": "lightgbm", "scikit-learn": "sklearn"}[engine])
    chosen: Engine = "lightgbm" if engine == "lightgbm" else "scikit-learn"
    return GBDTConfig(**{"top": 3, "trees": 20, "engine": chosen} | options)


@engines
def test_trees_know_the_fields(data: Guarded, engine: str) -> None:
    found = search_gbdt(data, gbdt(engine), seed=0)
    assert found.fields == ("a", "tags", "number")
    assert sum(found.scores.values()) == pytest.approx(1)
    assert found.scores["noise"] < 0.1
    assert found.report["engine"] == engine
    assert found.report["rows"] == 3000
    assert search_gbdt(data, gbdt(engine), seed=0).scores == found.scores
    assert search_gbdt(data, gbdt(engine, max_rows=500), seed=0).report["rows"] == 500


@engines
def test_trees_on_every_kind_of_field(tmp_path: Path, engine: str) -> None:
    found = search_gbdt(click_store(tmp_path), gbdt(engine), seed=0)
    assert set(found.scores) == {"user", "city", "price", "age", "genres"}
    assert "age" not in (found.fields or ())


def rates(ids: npt.NDArray[np.int32], y: npt.NDArray[np.float64], fold: npt.NDArray[np.int64], smoothing: float) -> list[float]:
    """Row by row."""
    found = []
    for i in range(len(ids)):
        others = [j for j in range(len(ids)) if ids[j] == ids[i] and fold[j] != fold[i]]
        found.append((sum(y[j] for j in others) + smoothing * y.mean()) / (len(others) + smoothing))
    return found


def test_label_rates_are_those_of_other_folds() -> None:
    rng = np.random.default_rng(0)
    ids, fold = rng.integers(0, 9, 60).astype(np.int32), rng.integers(0, 3, 60)
    y = rng.integers(0, 2, 60).astype(np.float64)
    ids[7] = 9  # seen once: the average, not its own label
    config = GBDTConfig(top=1, folds=3, smoothing=4.0)
    found = importance._label_rates(ids, np.arange(60), y, np.ones(60), fold, config)
    assert found.tolist() == pytest.approx(rates(ids, y, fold, 4.0), abs=1e-12)
    assert found[7] == pytest.approx(y.mean())
    unsmoothed = importance._label_rates(ids, np.arange(60), y, np.ones(60), fold, GBDTConfig(top=1, folds=3, smoothing=0))
    assert unsmoothed[7] == pytest.approx(y.mean())
    # a row of weight 2 is two rows
    doubled = importance._label_rates(np.tile(ids, 2), np.arange(120), np.tile(y, 2), np.ones(120), np.tile(fold, 2), config)
    weighted = importance._label_rates(ids, np.arange(60), y, np.full(60, 2.0), fold, config)
    assert weighted.tolist() == pytest.approx(doubled[:60].tolist(), abs=1e-12)


def test_a_list_is_the_mean_of_its_values_and_gaps_are_lowest(data: Guarded) -> None:
    layout: BatchLayout = data.encoder.layout
    batch = next(iter(Loader(data.split("train"), 3000)))
    assert batch.labels is not None
    y = batch.labels[:, 0].numpy().astype(np.float64)
    x = importance._features(layout, batch, y, np.ones(3000), GBDTConfig(top=1), np.random.default_rng(0))
    assert x.shape == (3000, 4)
    assert np.isfinite(x).all()
    number, tags = (x[:, layout.names.index(name)] for name in ("number", "tags"))
    gone = torch.isnan(batch.dense[:, 0]).numpy()
    assert (number[gone] == number[~gone].min() - 1).all()
    empty = batch.sequences["tags"].offsets.diff().numpy() == 0
    assert (tags[empty] < tags[~empty].min()).all()
    assert (tags[~empty] <= 1).all()


def test_the_engine_that_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    there = {"sklearn"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in there else None)
    assert importance._engine("auto") == "scikit-learn"
    with pytest.raises(ConfigError, match=r"gbdt needs lightgbm, which is not installed; .*ctrlib\[search\]"):
        importance._engine("lightgbm")
    there.add("lightgbm")
    assert importance._engine("auto") == "lightgbm"
    assert importance._engine("scikit-learn") == "scikit-learn"
    there.clear()
    with pytest.raises(ConfigError, match="gbdt needs LightGBM or scikit-learn, which is not installed"):
        importance._engine("auto")


def test_errors(tmp_path: Path) -> None:
    ones = columns(50, 0) | {"label": np.ones(50, dtype=np.int64)}
    store = make(tmp_path, {"train": ones}, FIELDS)
    with pytest.raises(DataError, match="all 50 rows have the label 1; trees need rows of both labels"):
        search_gbdt(store, GBDTConfig(top=1, engine="scikit-learn"), seed=0)
    for options, message in (
        ({"top": 0}, r"gbdt.top is 0"),
        ({"folds": 1}, r"gbdt.folds is 1; expected 2 or more"),
        ({"smoothing": -1.0}, r"gbdt.smoothing is -1.0"),
        ({"engine": "xgboost"}, r"gbdt.engine is 'xgboost'; expected one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            GBDTConfig(**{"top": 1} | options)
    with pytest.raises(ConfigError, match=r"permutation.metric is 'acu'; .*did you mean 'auc'"):
        PermutationConfig(top=1, metric="acu")  # type: ignore[arg-type]


def test_label_rates_of_a_large_vocabulary_take_no_more_memory() -> None:
    rng = np.random.default_rng(1)
    ids, fold = rng.integers(0, 9, 60).astype(np.int32), rng.integers(0, 3, 60)
    y = rng.integers(0, 2, 60).astype(np.float64)
    config = GBDTConfig(top=1, folds=3)
    small, large = (importance._label_rates(i, np.arange(60), y, np.ones(60), fold, config) for i in (ids, ids + 2_000_000_000))
    assert small.tolist() == large.tolist()


def test_trees_that_split_nothing_rank_nothing(tmp_path: Path) -> None:
    store = make(tmp_path, {"train": columns(12, 0)}, FIELDS)  # LightGBM wants 20 rows in a leaf
    with pytest.raises(DataError, match="no tree split the 12 rows, so all fields would rank alike"):
        search_gbdt(store, gbdt("lightgbm"), seed=0)


@pytest.mark.parametrize("method", ["permutation", "gradient"])
def test_ctrl_c_while_the_model_trains_ends_the_search(data: Guarded, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """`fit` only stops, and gives back a model that has seen part of the rows."""

    forward = CTRModel.forward

    def stop(self: CTRModel, batch: Batch) -> Output:
        if self.training:
            raise KeyboardInterrupt
        return forward(self, batch)

    monkeypatch.setattr(CTRModel, "forward", stop)
    named: Any = {"fit": FIT, "batch_size": 128, "seed": 0}
    searches: dict[str, Callable[[], object]] = {
        "permutation": lambda: search_permutation(tiny(), data, PermutationConfig(top=1), **named),
        "gradient": lambda: search_gradient(tiny(), data, GradientConfig(top=1), **named),
    }
    with pytest.raises(KeyboardInterrupt):
        searches[method]()


def test_more_fields_than_there_are_is_said_before_any_row_is_read(data: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "allowed", ())
    named: Any = {"fit": FIT, "batch_size": 128, "seed": 0}
    searches: tuple[Callable[[], object], ...] = (
        lambda: search_permutation(tiny(), data, PermutationConfig(top=5), **named),
        lambda: search_gradient(tiny(), data, GradientConfig(top=5), **named),
        lambda: search_auto_field(tiny(), data, AutoFieldConfig(top=5), **named),
        lambda: search_gbdt(data, GBDTConfig(top=5), seed=0),
        lambda: search_outrank(data, OutRankConfig(top=5), seed=0),
    )
    for search in searches:
        with pytest.raises(ConfigError, match="top is 5, but the data has 4 fields"):
            search()


def test_models_train_where_they_are_told_to(data: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that cannot train: what matters is that the model is there when training begins."""

    class BegunError(Exception):
        pass

    def begun(model: nn.Module, *_: Any, **__: Any) -> None:
        assert {p.device.type for p in model.parameters()} == {"meta"}
        raise BegunError

    monkeypatch.setattr(importance, "fit", begun)
    monkeypatch.setattr(auto_field, "train_pass", begun)
    monkeypatch.setattr(auto_fis, "train_pass", begun)
    named: Any = {"fit": FIT, "batch_size": 128, "seed": 0, "device": "meta"}
    searches: tuple[Callable[[], object], ...] = (
        lambda: search_permutation(tiny(), data, PermutationConfig(top=1), **named),
        lambda: search_gradient(tiny(), data, GradientConfig(top=1), **named),
        lambda: search_auto_field(tiny(), data, AutoFieldConfig(top=1), **named),
        lambda: search_auto_fis(preset("auto_fm"), data, AutoFISConfig(), **named),
    )
    for search in searches:
        with pytest.raises(BegunError):
            search()
