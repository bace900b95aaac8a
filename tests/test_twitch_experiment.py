"""The experiment on Twitch: its baselines, its page and a quick look."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrlib.config import ConfigError
from datasets.twitch import COUNTRIES
from experiments import seeds
from experiments.twitch import run as twitch
from tests import graphs

OPTIONS = argparse.Namespace(epochs=3, patience=2, quick=False, out=Path("unused"))


def fake(name: str, seed: int, accuracy: float) -> dict[str, Any]:
    test = {"accuracy": accuracy, "macro_f1": accuracy - 0.1, "auc": accuracy + 0.1}
    return {"model": name, "seed": seed, "test": test, "parameters": 1000}


def test_the_page_says_what_came_out() -> None:
    def runs(best: float) -> seeds.Runs:
        means = dict.fromkeys(twitch.ORDER, 0.6) | {"catgcn": 0.7, "appnp": best}
        return {name: [fake(name, s, mean + 0.01 * s) for s in seeds.SEEDS] for name, mean in means.items()}

    page = twitch.page({"DE": runs(0.65), "ENGB": runs(0.75)}, OPTIONS)
    assert "| gcn | 0.6200 ± 0.0158 | 0.5200 ± 0.0158 | 0.7200 ± 0.0158 | -0.1000 ± 0.0000 |" in page
    assert "* accuracy: so it is; 0.7200, the best of them, *appnp*, 0.6700 (+0.0500 ± 0.0000)." in page
    assert "* accuracy: it is not; 0.7200, the best of them, *appnp*, 0.7700 (-0.0500 ± 0.0000)." in page
    half = {"gcn": [fake("gcn", 0, 0.6)]}
    assert "Not run yet: mlp (0 of 5 seeds), gcn (1 of 5 seeds)" in twitch.page({"DE": half}, OPTIONS)


def test_every_model_is_tuned_alike() -> None:
    common = ("learning_rate", "l2", "dropout")
    for name in twitch.ORDER:
        tried = twitch.trials(name, "DE")
        assert len(tried) == twitch.TRIALS["DE"]
        assert tried == twitch.trials(name, "ENGB")[: len(tried)]
        assert tried == twitch.trials(name, "DE")
        inside = {"probe", "balance", "hidden"} if name in twitch.CATGCN else set()
        assert tried[0].keys() == twitch.trials("gcn", "DE")[0].keys() | inside
        assert all(setting not in tried[:i] for i, setting in enumerate(tried))
        assert all(len({setting[key] for setting in tried}) > 1 for key in common)


@pytest.mark.parametrize("name", twitch.ORDER)
def test_every_model_trains(name: str) -> None:
    if name in twitch.BASELINES:
        pytest.importorskip("torch_geometric", exc_type=ImportError)
    graph = graphs.graph()
    found = twitch.run(name, twitch.trials(name, "DE")[0], graph, 0, OPTIONS, test=True)
    assert found["epochs"] <= 3
    assert {"accuracy", "macro_f1", "auc"} <= found["test"].keys()
    assert "test" not in twitch.run(name, twitch.trials(name, "DE")[0], graph, 0, OPTIONS, test=False)


def test_baselines_see_the_edges_as_the_matrix_has_them() -> None:
    """SGC of torch_geometric on the pooled embeddings is Ã² X W + b."""
    pytest.importorskip("torch_geometric", exc_type=ImportError)
    from ctrlib.models.propagation import take
    from experiments.twitch.baselines import Baseline

    graph = graphs.graph()
    torch.manual_seed(0)
    model = Baseline("sgc", graph.encoder.layout, graph.adjacency, 2, 0.5).eval()
    x = model.embedding(graph.features).flatten(1)
    expected = model.layers[0].lin(take(graph.edges, take(graph.edges, x)))  # type: ignore[operator]
    torch.testing.assert_close(model(graph.features).logits, expected, rtol=0, atol=1e-4)


def test_tuning_goes_on_and_takes_the_best_by_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def run(name: str, setting: Any, graph: object, seed: int, options: object, *, test: bool) -> dict[str, Any]:
        assert not test
        calls.append(setting)
        return {"epochs": 1, "valid": {"log_loss": float(np.abs(len(calls) - 4))}}

    monkeypatch.setattr(twitch, "run", run)
    monkeypatch.setattr(twitch, "read", lambda country, seed: None)
    options = argparse.Namespace(epochs=3, patience=2, out=tmp_path)
    best = twitch.tuned("DE", "gcn", options)
    assert best == twitch.trials("gcn", "DE")[3]
    assert twitch.tuned("DE", "gcn", options) == best
    assert len(calls) == twitch.TRIALS["DE"]
    path = tmp_path / "DE-gcn-tuning.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(data | {"trials": data["trials"][:-2]}), encoding="utf-8")
    twitch.tuned("DE", "gcn", options)
    assert len(calls) == twitch.TRIALS["DE"] + 2
    with pytest.raises(ConfigError, match="tuned in another way"):
        twitch.tuned("DE", "gcn", argparse.Namespace(epochs=4, patience=2, out=tmp_path))


def test_bad_options() -> None:
    with pytest.raises(ConfigError, match="did you mean 'catgcn'"):
        twitch.main(["--models", "catgnc"])
    with pytest.raises(ConfigError, match="expected DE or ENGB"):
        twitch.main(["--countries", "FR"])
    with pytest.raises(ConfigError, match="give --out"):
        twitch.main(["--quick"])


def test_the_committed_page_is_what_the_committed_results_make() -> None:
    runs = {country: twitch.load(twitch.RESULTS, country) for country in COUNTRIES}
    page = twitch.page(runs, argparse.Namespace(patience=20, quick=False))
    assert (twitch.HERE / "README.md").read_text(encoding="utf-8") == page
