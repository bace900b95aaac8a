"""The experiments on behaviour sequences: their pages, paired differences and quick looks."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrlib.config import ConfigError
from ctrlib.data.store import Split
from ctrlib.models.aw_moe import AWMoE
from ctrlib.models.presets import preset
from experiments import seeds, sequences
from experiments.amazon_grocery.run import EXPERIMENT as GROCERY
from experiments.beauty.run import EXPERIMENT as BEAUTY
from tests.models.histories import LAYOUT, rows
from tests.models.small import make, shrunk


def _bucket(segment: str, value: float) -> dict[str, Any]:
    return {"segment": segment, "rows": 10, "groups": 2, "auc": value, "gauc": value, "ndcg@10": value, "mrr": None}


def _runs(value: float, tail: float) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed,
            "settings": {"sessions": None},
            "test": dict.fromkeys(sequences.OVERALL, value + 0.01 * seed),
            "history": [_bucket("2-3", tail), _bucket("≤5", tail + 0.01 * seed), _bucket("all", value + 0.01 * seed)],
            "epochs": 3.0,
            "parameters": 1234,
        }
        for seed in seeds.SEEDS
    ]


def test_differences_are_paired_by_seed_with_an_interval_of_student() -> None:
    # Four degrees of freedom, in closed form: F(t) = Â½ + Â½Â·sÂ·(1 + (1 â sÂ²)/2) with s = t/â(tÂ² + 4).
    t = seeds.T_QUANTILE
    share = t / math.sqrt(t * t + 4)
    assert 0.5 + share * (1 + (1 - share**2) / 2) / 2 == pytest.approx(0.975, abs=1e-6)
    mean, half = seeds.difference([1, 2, 3, 4, 5], [1, 1, 1, 1, 1])
    assert mean == 2
    assert half == pytest.approx(t * math.sqrt(2.5) / math.sqrt(5))
    assert seeds.signed([1.0] * 5, [1.5] * 5) == "-0.5000 ± 0.0000"


@pytest.mark.parametrize("experiment", [GROCERY, BEAUTY])
def test_pages(experiment: sequences.Sequences) -> None:
    runs = {"dnn": _runs(0.5, 0.5), "din": _runs(0.6, 0.5), "aw_moe": _runs(0.7, 0.7), "moe": _runs(0.7, 0.7)[:3]}
    text = experiment.page(runs)
    assert text.startswith(f"# {experiment.title}\n\n`python -m {experiment.module}`.")
    assert "| dnn | 0.5200 ± 0.0158 |" in text
    assert "| 2-3 | 2 | 0.5000 | 0.5000 | 0.7000 |" in text
    assert "| din | +0.1000 ± 0.0000 | +0.2000 ± 0.0000 |" in text
    assert "* gauc to *din*: reached (+0.1000); gain for the long tail: reached (+0.2000)." in text
    assert "Not run yet: moe (3 of 5 seeds), aw_moe_plain (0 of 5 seeds)." in text
    worse = experiment.page({"din": _runs(0.6, 0.5), "aw_moe": _runs(0.5, 0.5)})
    assert "* ndcg@10 to *din*: missed (-0.1000); gain for the long tail: reached (+0.0000)." in worse


@pytest.mark.parametrize("experiment", [GROCERY, BEAUTY])
def test_the_committed_page_is_what_the_committed_results_make(experiment: sequences.Sequences) -> None:
    committed = (experiment.folder / "README.md").read_text(encoding="utf-8")
    assert committed == experiment.page(seeds.load(experiment.folder / "results", sequences.MODELS))


def test_the_page_links_the_plots_that_are_there(tmp_path: Path) -> None:
    runs = {"aw_moe": _runs(0.5, 0.5)}
    assert "## Plots" not in GROCERY.page(runs, tmp_path)
    (tmp_path / "gates.png").touch()
    assert "\n## Plots\n\n![gates of aw_moe, users by experts](gates.png)\n" in GROCERY.page(runs, tmp_path)
    (tmp_path / "ndcg.png").touch()
    assert "](ndcg.png)\n![gates" in GROCERY.page(runs, tmp_path)


def test_a_sample_of_gates() -> None:
    """Of the clicked rows among the first ones."""
    batch = rows(9)
    assert batch.labels is not None
    layout_rows = {name: (r.values, r.offsets.long()) for name, r in batch.sequences.items()}
    split = Split(9, batch.sparse, batch.dense, layout_rows, batch.labels, None, batch.group)
    model = make(shrunk(preset("aw_moe")), LAYOUT)
    lengths = batch.sequences["hist_item"].offsets.diff().numpy()
    gates, found = sequences.sample_gates(model, split, lengths, rows=6)
    clicked = [i for i in range(6) if batch.labels[i, 0] == 1]
    assert found.tolist() == [int(lengths[i]) for i in clicked]
    np.testing.assert_allclose(gates, model.explain(batch)["gate"].numpy()[clicked], rtol=0, atol=1e-6)


def test_means_leave_what_is_undefined_undefined() -> None:
    means = sequences.mean_buckets(_runs(0.5, 0.6))
    assert means[0]["gauc"] == pytest.approx(0.6)
    assert math.isnan(means[0]["mrr"])
    assert means[2]["gauc"] == pytest.approx(0.52)
    assert [entry["groups"] for entry in means] == [2, 2, 2]


@pytest.mark.parametrize("name", sequences.MODELS)
def test_every_model_can_be_configured(name: str) -> None:
    config = sequences.config(name, argparse.Namespace(epochs=2))
    assert (config.fit.monitor, config.fit.epochs, config.model.embedding.dim) == ("gauc", 2, 16)


def test_thinned_sessions_keep_their_positive_and_the_first_negatives(tmp_path: Path) -> None:
    label = [0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    table = pa.table({"session": [4] * 5 + [2] * 4 + [7] * 2, "label": label, "row": list(range(11))})
    pq.write_table(table, tmp_path / "valid.parquet")
    sequences._thin(tmp_path / "valid.parquet", 2)
    assert pq.read_table(tmp_path / "valid.parquet")["row"].to_pylist() == [0, 1, 2, 5, 6, 7, 9, 10]
    pq.write_table(table, tmp_path / "valid.parquet")
    sequences._thin(tmp_path / "valid.parquet", 2, every=2)
    assert pq.read_table(tmp_path / "valid.parquet")["row"].to_pylist() == [0, 1, 2, 9, 10]


def test_a_quick_look_does_not_mix_with_results(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--sessions is for a quick look"):
        sequences.main(GROCERY, None, ["--sessions", "10"])
    with pytest.raises(ConfigError, match="did you mean 'aw_moe'"):
        sequences.main(GROCERY, None, ["--models", "awmoe", "--out", str(tmp_path)])


def test_the_weight_of_the_contrastive_loss_is_the_best_on_validation_rows() -> None:
    trials = json.loads((GROCERY.folder / sequences.TUNING).read_text(encoding="utf-8"))
    assert [float(weight) for weight in trials] == list(sequences.WEIGHTS)
    best = max(trials, key=lambda weight: trials[weight]["valid"]["gauc"])
    model = sequences.config("aw_moe", argparse.Namespace(epochs=2)).model
    assert isinstance(model, AWMoE.Config)
    assert model.contrast.weight == float(best)
