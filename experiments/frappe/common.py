"""What the Frappe_x1 experiments share: the data, the FuxiCTR flavour, the training protocol, the caveat."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from ctrlib.config import override
from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import Experiment, RunConfig
from ctrlib.models.ctr import ModelComponent
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.optim import OptimizerConfig, ScheduleConfig, ScheduleName
from ctrlib.schema import DataError
from ctrlib.training import FitConfig, Monitor, Precision

ROOT = Path(__file__).resolve().parents[2]
EMBEDDING = FeatureEmbedding.Config(dim=10, init_std=1e-4)


RAW = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data")) / "frappe"
REDRAWN = (RAW / "train_rebuilt.parquet").is_file() and not (RAW / "frappe.train.libfm").is_file()


def data() -> Path:
    """The prepared splits under ``runs/data/frappe``, made on first use from ``$CTRLIB_DATA/frappe``, or downloaded."""
    out = ROOT / "runs" / "data" / "frappe"
    if not (out / "schema.json").is_file():
        raw = ["--raw", str(RAW)] if RAW.is_dir() else []
        command = [sys.executable, str(ROOT / "datasets" / "frappe.py"), *raw, "--out", str(out)]
        if subprocess.run(command).returncode != 0:
            raise DataError(
                "the Frappe data could not be prepared (see above); set CTRLIB_DATA to the folder that holds frappe/"
            )
    return out


def fuxictr(name: str, options: Mapping[str, str]) -> ModelComponent.Config:
    """A preset as the benchmark code has it, and the options that BARS tuned, as on the command line."""
    return override(preset(name, "fuxictr"), options, COMPONENTS)


def frappe(
    name: str,
    model: ModelComponent.Config,
    *,
    published: Mapping[str, float],
    embedding_l2: float = 0.0,
    net_l2: float = 0.0,
    monitor: Monitor = "auc",
    patience: int | None = 2,
    schedule: ScheduleName = "plateau",
    precision: Precision = "fp32",
    note: str = "",
) -> Experiment:
    """An experiment with BARS' common settings: dense Adam 1e-3, batch 4096, clipping at 10, at most 100 epochs."""
    optimizer = OptimizerConfig(embedding="dense", embedding_l2=embedding_l2, net_l2=net_l2)
    fit = FitConfig(
        optimizer=optimizer, monitor=monitor, patience=patience, precision=precision, schedule=ScheduleConfig(name=schedule)
    )
    return Experiment(
        name=f"frappe/{name}",
        config=RunConfig(model=model, fit=fit, batch_size=4096, ridge=0.0),
        data=data,
        published=published,
        note="; ".join(
            filter(None, ["train negatives re-drawn" if REDRAWN else "", "bf16 autocast" if precision == "bf16" else "", note])
        ),
    )
