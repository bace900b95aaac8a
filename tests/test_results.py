"""Committed results of experiments against the gates that the published figures set; and, marked slow, the runs themselves."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, prepare, run_experiment
from ctrlib.models.presets import PRESETS
from experiments import results as results_page
from experiments.criteo_sample import run as sample
from experiments.frappe import table
from experiments.selection import planted
from experiments.selection import run as selection
from tests.clicks import SCHEMA, clicks

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "frappe" / "results"
RAW = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data"))

# Test AUC, mean of 3 seeds, at least: some .0015 below the published figure, which is the best of a grid at one seed; ARM-Net's
# is for other splits. Models that are not named here: .003 below.
# AutoInt's runs (bf16 autocast) fall short of theirs; the gate stays, and SHORT says so until better runs are committed.
GATES = {
    "final_mlp": 0.9850,
    "autoint_plus": 0.9835,
    "dcnv2": 0.9832,
    "deepfm": 0.9830,
    "dnn": 0.9820,
    "autoint": 0.9810,
    "arm_net": 0.9750,
}
SLACK = 0.003
# AFM's runs may end on the plateau of logistic regression (experiments/frappe/README.md); BARS' figure is the best of 18 runs,
# whose median is .9602.
SHORT = {
    "autoint": pytest.mark.xfail(strict=True, reason="mean test AUC .98039, gate .9810"),
    "afm": pytest.mark.xfail(strict=True, reason="mean test AUC .95571, published .96973, the best of 18 runs"),
}


@pytest.mark.parametrize(
    "path", [pytest.param(p, id=p.stem, marks=SHORT.get(p.stem, ())) for p in sorted(RESULTS.glob("*.json"))]
)
def test_committed_results(path: Path) -> None:
    results = json.loads(path.read_text(encoding="utf-8"))
    aucs = [run["test"]["auc"] for run in results["runs"]]
    assert len(aucs) >= 3
    assert len({run["seed"] for run in results["runs"]}) == len(aucs)
    assert results["test"]["auc"]["mean"] == pytest.approx(sum(aucs) / len(aucs), abs=1e-12)
    assert "train negatives re-drawn" in results["note"]
    assert results["test"]["auc"]["mean"] >= GATES.get(path.stem, results["published"]["auc"] - SLACK)


def test_models_are_neither_better_nor_worse_than_published() -> None:
    assert abs(table.median(table.load())[1]) <= 0.001


def test_the_frappe_table_names_every_experiment() -> None:
    files = {path.stem for path in RESULTS.parent.glob("*.py")} - {"common", "table"}
    assert sorted(table.ORDER) == sorted(files)
    assert {path.stem for path in RESULTS.glob("*.json")} <= files


def test_committed_pages_are_what_the_committed_results_make() -> None:
    assert (RESULTS.parent / "README.md").read_text(encoding="utf-8") == table.page(table.load())
    assert (sample.HERE / "README.md").read_text(encoding="utf-8") == sample.page(sample.load(sample.RESULTS))
    assert (selection.HERE / "README.md").read_text(encoding="utf-8") == selection.page(selection.load())
    assert results_page.PAGE.read_text(encoding="utf-8") == results_page.page()


def test_the_searches_find_what_is_planted() -> None:
    found = json.loads((planted.HERE / "planted.json").read_text(encoding="utf-8"))
    assert (planted.HERE / "planted.md").read_text(encoding="utf-8") == planted.page(found)
    right = {"a*b": "memorize"} | dict.fromkeys(planted.PAIRS[1:], "naive")
    assert len(found["optinter"]) == 10
    assert sum(seed["choices"] == right for seed in found["optinter"]) >= 9
    middle = [seed for seed in found["optfs"] if seed["penalty"] == 1e-4]
    assert len(middle) >= 3
    assert all(seed["informative"] >= 0.75 and seed["noise"] == seed["unseen"] == 0 for seed in middle)


def test_a_published_figure_may_be_an_auc_alone() -> None:
    results = table.load()
    count, median = table.median(results)
    other = {**results["dnn"], "published": {"auc": 0.9, "parameters": 1}}
    assert table.median({**results, "arm_net": other}) == (count, median)
    [line] = [line for line in table.page({**results, "arm_net": other}).splitlines() if line.startswith("| [arm_net]")]
    assert [cell.strip() for cell in line.split("|")][3:7:3] == ["0.90000", ""]


def test_results_of_the_criteo_sample() -> None:
    for path in sample.RESULTS.glob("*.json"):
        found = json.loads(path.read_text(encoding="utf-8"))
        assert path.stem in PRESETS
        assert found["model"] == path.stem
        assert found["reduced"] == sample.REDUCED.get(path.stem, {})
        assert "error" not in found
        assert [run["seed"] for run in found["runs"]] == list(sample.SEEDS)
        assert not any(run["interrupted"] for run in found["runs"])


def _store(folder: Path) -> Store:
    return prepare(clicks(400, 0), folder / "store", DataOptions(schema=SCHEMA, split="random"))


def _sample_run(name: str, aucs: list[float]) -> dict[str, Any]:
    runs = [
        {
            "seed": seed,
            "test": {"auc": auc, "log_loss": 0.5},
            "epochs": 3.0,
            "rows": {"train": 1000, "valid": 100, "test": 100},
            "cpu_seconds": 1.5,
        }
        for seed, auc in zip(sample.SEEDS, aucs, strict=True)
    ]
    return {"model": name, "reduced": {}, "parameters": 7, "runs": runs}


def test_differences_are_paired_by_seed_with_an_interval_of_student() -> None:
    baseline, other = _sample_run("dnn", [0.70, 0.72, 0.74]), _sample_run("fm", [0.71, 0.74, 0.77])
    other["runs"].reverse()
    assert pytest.approx(0.95 * (2 / (1 - 0.95**2)) ** 0.5) == sample.T_QUANTILE  # two degrees of freedom: in closed form
    mean, half = sample.paired(other, baseline)  # differences .01, .02, .03
    assert mean == pytest.approx(0.02)
    assert half == pytest.approx(4.302653 * 0.01 / 3**0.5, rel=1e-6)
    page = sample.page({"dnn": baseline, "fm": other})
    assert "| dnn | 0.7200 ± 0.0200 |  | 0.5000 ± 0.0000 | 3.0 | 7 | 2,000 |" in page
    assert "| fm | 0.7400 ± 0.0300 | +0.0200 ± 0.0248 |" in page
    assert "Not run yet: lr, wide_deep" in page


def test_a_model_that_fails_is_listed_with_its_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = _store(tmp_path)

    def fail(*_: object, **__: object) -> dict[str, Any]:
        raise FloatingPointError("the loss is nan")

    monkeypatch.setattr(sample, "train", fail)
    found = sample.run("fm", store, tmp_path)
    assert found["error"] == "FloatingPointError: the loss is nan"
    page = sample.page({"dnn": _sample_run("dnn", [0.7, 0.7, 0.7]), "fm": found})
    assert "**fm failed:** FloatingPointError: the loss is nan" in page
    assert "| fm |" not in page


def test_a_preset_is_run_with_every_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "REDUCED", {"cin": {"model.interaction.hidden_units": "2", "fit.epochs": "1"}})
    found = sample.run("cin", _store(tmp_path), tmp_path)
    assert [run["seed"] for run in found["runs"]] == [0, 1, 2]
    assert found["published_parameters"] > found["parameters"] > 0
    assert not (tmp_path / "run").exists()
    page = sample.page({"cin": found})
    assert "| cin\\* |" in page
    assert "* cin: `model.interaction.hidden_units=2`, `fit.epochs=1`" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", GATES)
@pytest.mark.skipif(not (RAW / "frappe").is_dir(), reason="no Frappe data: set CTRLIB_DATA")
def test_reproduction(name: str, tmp_path: Path) -> None:
    results = run_experiment(ROOT / "experiments" / "frappe" / f"{name}.py", tmp_path / name, seeds=3)
    assert results["test"]["auc"]["mean"] >= GATES[name]


def test_relative_links_of_the_documents_exist() -> None:
    for document in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "experiments").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", document.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (document.parent / target).exists(), f"{document.name}: {target}"
