"""AutoField: its clock, its two parts of the training rows, planted fields, every kind of field and optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrlib.config import ConfigError
from ctrlib.models.presets import preset
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import DataError
from ctrlib.search import auto_field
from ctrlib.search.auto_field import AutoFieldConfig, search_auto_field
from ctrlib.search.selection import Selection
from ctrlib.training import FitConfig, TrainingDivergedError
from tests.models.small import shrunk
from tests.search.stores import Guarded, click_store, coin, make


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    return click_store(tmp_path_factory.mktemp("auto_field"))


def run(
    store: Guarded, name: str = "deepfm", seed: int = 0, optimizer: OptimizerConfig | None = None, **options: Any
) -> Selection:
    settings = {"top": 3, "learning_rate": 0.05, "update_every": 1} | options
    fit = FitConfig(optimizer=optimizer or OptimizerConfig(learning_rate=0.01))
    return search_auto_field(shrunk(preset(name)), store, AutoFieldConfig(**settings), fit=fit, batch_size=64, seed=seed)


def test_temperature_by_the_number_of_steps() -> None:
    config = AutoFieldConfig(top=1)
    found = [config.temperature_at(step) for step in (0, 1, 10_000, 19_800, 50_000)]
    assert found == pytest.approx([1.0, 0.99995, 0.5, 0.01, 0.01], abs=1e-12)


def test_the_clock_counts_steps_of_the_weights_only(data: Guarded) -> None:
    """2000 rows, 1600 for the weights: 25 batches an epoch. Steps of the logits are forward passes too, and do not count."""
    report = run(data, epochs=2, update_every=4, temperature_step=0.01).report
    assert report["rows"] == {"weights": 1600, "arch": 400}
    assert report["steps"] == 50
    assert report["arch_steps"] == 12  # after 4, 8, …, 48 steps
    assert [e["temperature"] for e in report["epochs"]] == pytest.approx([1 - 0.24, 1 - 0.49])


def test_rows_of_the_logits_are_not_those_of_the_weights() -> None:
    weights, arch = auto_field._two_parts(1000, 0.2, 0)
    assert sorted([*weights.tolist(), *arch.tolist()]) == list(range(1000))
    assert len(arch) == 200
    assert arch.float().mean() == pytest.approx(500, abs=60)  # from everywhere
    assert not torch.equal(auto_field._two_parts(1000, 0.2, 1)[1], arch)
    with pytest.raises(DataError, match=r"3 training rows cannot be parted at 0.1"):
        auto_field._two_parts(3, 0.1, 0)
    with pytest.raises(DataError, match=r"10 training rows cannot be parted at 0.1; expected two or more for the field logits"):
        auto_field._two_parts(10, 0.1, 0)  # a batch of one row has no statistics


def test_one_step_of_the_logits_by_hand(data: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A first step of Adam moves every logit by the learning rate against its gradient; keep and drop against each other."""
    seen: list[torch.Tensor] = []
    update = auto_field._Controller._update

    def spy(self: auto_field._Controller, batch: Any) -> None:
        before = [p.detach().clone() for p in self._model.parameters()]
        update(self, batch)
        assert all(torch.equal(p, q) for p, q in zip(self._model.parameters(), before, strict=True))  # first order: W stays
        seen.append(self.logits_F2.detach().clone())

    monkeypatch.setattr(auto_field._Controller, "_update", spy)
    run(data, update_every=20)
    assert len(seen) == 1
    torch.testing.assert_close(seen[0].abs(), torch.full((5, 2), 0.05), rtol=1e-3, atol=0)
    torch.testing.assert_close(seen[0][:, 0], -seen[0][:, 1])


@pytest.mark.parametrize("seed", [0, 1])
def test_planted_fields(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = {f"f{i}": rng.integers(0, 5, 6000) for i in range(8)}
    label = coin(1.5 * np.sin(2.0 * values["f1"]) + 1.5 * np.cos(2.0 * values["f4"]) + values["f6"] % 2 - 0.5, rng)
    store = make(tmp_path, {"train": {"label": label, **values}})
    found = run(store, seed=seed, epochs=2)
    assert found.fields == ("f1", "f4", "f6")
    assert found.scores["f1"] > 0.5 > found.scores["f0"]


@pytest.mark.parametrize("embedding", ["dense", "adagrad", "adam", "lazy_adam"])
def test_every_kind_of_field_and_optimizer(data: Guarded, embedding: Any) -> None:
    optimizer = OptimizerConfig(embedding=embedding, learning_rate=0.01)
    found = run(data, optimizer=optimizer)
    assert found.method == "autofield"
    assert found.encoder_hash == data.encoder.hash
    assert set(found.scores) == {"user", "city", "price", "age", "genres"}
    assert all(0 < score < 1 for score in found.scores.values())
    assert found.fields is not None
    assert len(found.fields) == 3
    assert run(data, optimizer=optimizer).scores == found.scores


@pytest.mark.parametrize("name", ["autoint", "final_mlp", "fgcnn_fm"])
def test_other_models(data: Guarded, name: str) -> None:
    assert run(data, name).scores != run(data, name, seed=1).scores


def test_a_loss_that_is_not_finite(data: Guarded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_field, "total_loss", lambda output, batch: output.logits.sum() * torch.inf)
    with pytest.raises(TrainingDivergedError, match="the loss of step 1 of the field logits is"):
        run(data)


def test_errors() -> None:
    for options, message in (
        ({"top": 1.5}, r"auto_field.top is 1.5"),
        ({"arch_share": 1.0}, r"auto_field.arch_share is 1.0"),
        ({"temperature": 0.001}, r"expected a temperature that does not rise"),
        ({"update_every": 0}, r"auto_field.update_every is 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            AutoFieldConfig(**{"top": 1} | options)
