"""AutoFIS: GRDA's golden values, planted pairs, the model that is left, and what a search must not do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError, from_json, override, to_json
from ctrlib.data.loader import Loader
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import DataError
from ctrlib.search import auto_fis
from ctrlib.search.auto_fis import GRDA, AutoFISConfig, search_auto_fis, without_closed_pairs
from ctrlib.search.passes import train_pass
from ctrlib.search.selection import Selection
from ctrlib.training import FitConfig, predict, seed_everything
from tests.clicks import SCHEMA
from tests.models.small import LAYOUT, awake, rows, shrunk
from tests.reference import auto_fis as reference
from tests.search.stores import Guarded, click_store, make

FIT = FitConfig(optimizer=OptimizerConfig(learning_rate=0.01))


def test_grda_golden_values() -> None:
    """Without gradients α = .6 − 5e-4·n^.8, which is 0 after (.6/5e-4)^1.25 = 7062.8 steps."""
    alpha = nn.Parameter(torch.tensor([0.6, -0.6], dtype=torch.float64))
    optimizer = GRDA([alpha])
    alpha.grad = torch.zeros_like(alpha)
    seen = {}
    for n in range(1, 7065):
        optimizer.step()
        seen[n] = alpha[0].item()
        assert alpha[1].item() == -seen[n]
    for n in (1, 2, 100, 5000):
        assert seen[n] == pytest.approx(0.6 - 5e-4 * n**0.8, abs=1e-12)
    assert seen[7062] > 0 == seen[7063]
    assert optimizer.steps == 7064


@pytest.mark.parametrize(("rate", "c", "mu"), [(1.0, 5e-3, 0.8), (0.3, 0.02, 0.5)])
def test_grda_equals_the_formula(rate: float, c: float, mu: float) -> None:
    gradients = np.random.default_rng(0).normal(size=60) * 0.1 + 0.02
    alpha = nn.Parameter(torch.tensor([0.2], dtype=torch.float64))
    optimizer = GRDA([alpha], learning_rate=rate, c=c, mu=mu)
    found = []
    for gradient in gradients:
        optimizer.zero_grad()
        assert alpha.grad is None
        alpha.grad = torch.tensor([gradient])
        optimizer.step()
        found.append(alpha.item())
    expected = reference.grda(0.2, gradients.tolist(), rate, c, mu)
    assert found == pytest.approx(expected, abs=1e-12)
    assert 0.0 in found
    assert found[-1] != 0  # a weight can come back


def test_sparse_gradients_are_refused() -> None:
    """The released optimizer leaves them out without a word."""
    alpha = nn.Parameter(torch.ones(3, 1))
    alpha.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1, 1), (3, 1), check_invariants=False)
    with pytest.raises(ConfigError, match="GRDA got a sparse gradient"):
        GRDA([alpha]).step()


PLANTED = ("f0*f1", "f2*f5", "f3*f4")


def planted(num_rows: int, seed: int) -> dict[str, Any]:
    """Six fields of 20 values, a weight for each, and products of vectors for three pairs; the label is their sign."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 20, (num_rows, 6))
    vectors = rng.normal(size=(6, 20, 5)) / 5**0.25
    logit = 0.5 * rng.normal(size=(6, 20))[np.arange(6), x].sum(axis=1) + 0.5 * rng.normal(size=num_rows)
    for a, b in (name.split("*") for name in PLANTED):
        i, j = int(a[1]), int(b[1])
        logit += (vectors[i][x[:, i]] * vectors[j][x[:, j]]).sum(axis=1)
    return {"label": (logit > 0).astype(np.int64), **{f"f{i}": x[:, i] for i in range(6)}}


def small(name: str = "auto_fm") -> ModelComponent.Config:
    return override(preset(name), {"embedding.dim": "8", "embedding.init_std": "0.1"}, COMPONENTS)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    return make(tmp_path_factory.mktemp("auto_fis"), {"train": planted(40_000, 0), "test": planted(1000, 1)})


@pytest.fixture(scope="module")
def found(data: Guarded) -> Selection:
    return search_auto_fis(small(), data, AutoFISConfig(c=0.02, epochs=2), fit=FIT, batch_size=100, seed=0)


def test_planted_pairs_are_found_and_no_other(found: Selection, data: Guarded) -> None:
    assert found.method == "autofis"
    assert found.encoder_hash == data.encoder.hash
    assert found.pairs is not None
    assert len(found.pairs) == len(found.scores) == 15
    assert tuple(name for name, choice in found.pairs.items() if choice == "factorize") == PLANTED
    assert {name for name, choice in found.pairs.items() if choice == "naive"} == set(found.pairs) - set(PLANTED)
    assert {name for name, score in found.scores.items() if score > 0} == set(PLANTED)
    report = found.report
    assert report["steps"] == 800
    assert report["threshold"] == pytest.approx(0.02 * 800**0.8)
    assert report["epochs"][-1]["kept"] == 3
    json.dumps(dict(report))


@pytest.mark.slow
def test_planted_pairs_of_ten_seeds(tmp_path: Path) -> None:
    """Exactly these in nine; a pair that is closed before its vectors have learned anything has no gradient to come back by."""
    exact = 0
    for seed in range(10):
        store = make(tmp_path / str(seed), {"train": planted(40_000, seed)})
        selection = search_auto_fis(small(), store, AutoFISConfig(c=0.02, epochs=2), fit=FIT, batch_size=100, seed=seed)
        assert selection.pairs is not None
        kept = tuple(name for name, choice in selection.pairs.items() if choice == "factorize")
        assert set(kept) <= set(PLANTED)
        exact += kept == PLANTED
    assert exact >= 9


def test_the_model_to_retrain_has_the_kept_pairs_alone(found: Selection, data: Guarded) -> None:
    assert found.model is not None
    again = from_json(json.loads(json.dumps(to_json(found.model))), ModelComponent.Config, COMPONENTS)
    assert again == found.model
    model = build_model(found.model, data.encoder.layout)
    block = auto_fis.auto_fis_block(model)
    assert block.names == PLANTED
    assert block.alpha_P.requires_grad
    assert block.alpha_P.tolist() == pytest.approx([found.report["alpha"][name] for name in PLANTED])
    assert found.weights is None
    assert found.model.embedding == small().embedding


def test_alpha_left_out_of_retraining(data: Guarded) -> None:
    config = AutoFISConfig(alpha="one", c=0)
    selection = search_auto_fis(small("auto_fm"), data, config, fit=FIT, batch_size=2000, seed=0)
    assert selection.model is not None
    block = auto_fis.auto_fis_block(build_model(selection.model, data.encoder.layout))
    assert set(block.alpha_P.tolist()) == {1.0}
    assert not block.alpha_P.requires_grad
    assert len(block.names) == 15  # c = 0 closes nothing


def test_same_seed_same_weights_and_evaluation_moves_nothing(data: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(seed: int) -> Any:
        return search_auto_fis(small(), data, AutoFISConfig(), fit=FIT, batch_size=1000, seed=seed).report["alpha"]

    plain, other = run(0), run(1)
    counts = []

    def and_evaluate(model: nn.Module, batches: Any, optimizers: Any, **options: Any) -> float:
        loss = train_pass(model, batches, optimizers, **options)
        steps = optimizers[1].steps
        before = optimizers[1].threshold
        predict(model, Loader(data.split("train"), 5000))
        assert (optimizers[1].steps, optimizers[1].threshold) == (steps, before)
        counts.append(steps)
        return loss

    monkeypatch.setattr(auto_fis, "train_pass", and_evaluate)
    assert run(0) == plain
    assert other != plain
    assert counts == [40]


@pytest.mark.parametrize("embedding", ["dense", "adagrad", "adam"])
def test_every_kind_of_field_and_optimizer(tmp_path: Path, embedding: Any) -> None:
    fit = FitConfig(optimizer=OptimizerConfig(embedding=embedding, learning_rate=0.01))
    store = click_store(tmp_path)
    selection = search_auto_fis(shrunk(preset("auto_deepfm")), store, AutoFISConfig(c=0.01), fit=fit, batch_size=64, seed=0)
    assert selection.pairs is not None
    assert list(selection.pairs)[:2] == ["user*city", "user*age"]  # in the order of the tokens
    assert len(selection.pairs) == 10


@pytest.mark.parametrize("name", ["auto_fm", "auto_deepfm"])
@pytest.mark.parametrize("training", [False, True])
def test_without_closed_pairs_the_function_is_the_same(name: str, training: bool) -> None:
    config, batch = shrunk(preset(name)), rows(32)
    model = awake(build_model(config, LAYOUT))
    block = auto_fis.auto_fis_block(model)
    with torch.no_grad():
        block.alpha_P[::3] = 0
    model.train()(batch)  # moves the norms
    model.eval().train(training)
    smaller = without_closed_pairs(model, config, LAYOUT)
    assert smaller.training is training
    assert len(auto_fis.auto_fis_block(smaller).names) == 14
    seed_everything(0)  # of dropout
    expected = model(batch).logits
    seed_everything(0)
    torch.testing.assert_close(smaller(batch).logits, expected, rtol=0, atol=1e-6)
    missing = sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in smaller.parameters())
    assert missing == 7


def test_errors(data: Guarded) -> None:
    with pytest.raises(ConfigError, match="the model has 0 AutoFIS blocks; expected one: take the preset auto_fm"):
        search_auto_fis(preset("fm"), data, AutoFISConfig(), fit=FIT, batch_size=1000, seed=0)
    with pytest.raises(ConfigError, match=r"closed all 15 pairs in 40 steps; lower auto_fis.c \(0.5\)"):
        search_auto_fis(small(), data, AutoFISConfig(c=0.5), fit=FIT, batch_size=1000, seed=0)
    fixed = override(small(), {"interaction.learn_alpha": "false"}, COMPONENTS)
    with pytest.raises(ConfigError, match="learn_alpha is False, so there is nothing to search"):
        search_auto_fis(fixed, data, AutoFISConfig(), fit=FIT, batch_size=1000, seed=0)
    with pytest.raises(ConfigError, match=r"auto_fis.c is -1.0; expected 0 or more"):
        AutoFISConfig(c=-1.0)
    with pytest.raises(ConfigError, match=r"auto_fis.alpha is 'keep'; .*did you mean 'kept'"):
        AutoFISConfig(alpha="keep")  # type: ignore[arg-type]


def test_data_with_crosses_is_refused(tmp_path: Path) -> None:
    """The pair user*city and the cross user*city have one name: dropping the pair would drop the cross."""
    store = click_store(tmp_path, schema=SCHEMA.with_crosses(min_count=3))
    with pytest.raises(DataError, match=r"a cross \(user\*city, .*\) bears the name of such a pair; expected data without"):
        search_auto_fis(shrunk(preset("auto_fm")), store, AutoFISConfig(), fit=FIT, batch_size=64, seed=0)
