"""Committed results of experiments against the gates that the published figures set; and, marked slow, the runs themselves."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

from ctrlib.experiment import run_experiment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "frappe" / "results"
RAW = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data"))

# Test AUC, mean of 3 seeds, at least: some .0015 below the published figure, which is the best of a grid at one seed.
# AutoInt's runs (bf16 autocast) fall short of theirs; the gate stays, and SHORT says so until better runs are committed.
GATES = {"final_mlp": 0.9850, "autoint_plus": 0.9835, "dcnv2": 0.9832, "deepfm": 0.9830, "dnn": 0.9820, "autoint": 0.9810}


SHORT = {"autoint": pytest.mark.xfail(strict=True, reason="mean test AUC .98039, gate .9810")}


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
    assert results["test"]["auc"]["mean"] >= GATES.get(path.stem, 0.0)


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
