"""What the Frappe_x1 experiments share: the data, the FuxiCTR flavour, the training protocol, the caveat."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import Experiment, RunConfig
from ctrlib.models.ctr import ModelComponent
from ctrlib.optim import OptimizerConfig
from ctrlib.training import FitConfig, Monitor, Precision

ROOT = Path(__file__).resolve().parents[2]
EMBEDDING = FeatureEmbedding.Config(dim=10, init_std=1e-4)


def data() -> Path:
    """The prepared splits under ``runs/data/frappe``, made from ``$CTRLIB_DATA/frappe`` on first use."""
    out = ROOT / "runs" / "data" / "frappe"
    if not (out / "schema.json").is_file():
        raw = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data")) / "frappe"
        script = ROOT / "datasets" / "frappe.py"
        subprocess.run([sys.executable, script, "--raw", raw, "--out", out], check=True)
    return out


def frappe(
    name: str,
    model: ModelComponent.Config,
    *,
    published: Mapping[str, float],
    embedding_l2: float = 0.0,
    net_l2: float = 0.0,
    monitor: Monitor = "auc",
    precision: Precision = "fp32",
    note: str = "",
) -> Experiment:
    """An experiment with BARS' common settings: Adam 1e-3, batch 4096, patience 2, clipping at 10, 100 epochs."""
    optimizer = OptimizerConfig(embedding_l2=embedding_l2, net_l2=net_l2)
    fit = FitConfig(optimizer=optimizer, monitor=monitor, precision=precision)
    return Experiment(
        name=f"frappe/{name}",
        config=RunConfig(model=model, fit=fit, batch_size=4096, ridge=0.0),
        data=data,
        published=published,
        note="; ".join(filter(None, ["train negatives re-drawn", "bf16 autocast" if precision == "bf16" else "", note])),
    )
