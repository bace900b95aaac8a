"""The default settings on two small Criteo samples: ``python experiments/criteo/samples.py`` writes results.json and README.md.

Reads ``$CTRLIB_DATA/criteo-kaggle`` and ``$CTRLIB_DATA/criteo-1tb-80k`` (default ``../shared/data``); 3 seeds of every model.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ctrlib.cpu import tune_cpu
from ctrlib.experiment import DataOptions, configure, prepare, train

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RAW = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data"))
MODELS = ("lr", "deepfm", "dcnv2")
SEEDS = (0, 1, 2)
SHARES = {"train": 0.72, "valid": 0.08, "test": 0.2}

INTRO = """# Two samples of Criteo's logs, default settings

`python experiments/criteo/samples.py`; mean ± standard deviation over 3 seeds. Training stops on validation rows; the test rows
are read once, after that. The floor to beat is one-hot logistic regression fitted on all rows that are not test rows: .7561 on
another random 80/20 split of the Kaggle sample with minimum count 5, .7159 on these test rows of the 1TB-like sample.

| data | rows for training, validation, test | model | test AUC | test log loss | ECE |
|---|---|---|---|---|---|
"""


def sources(scratch: Path) -> dict[str, tuple[Path, DataOptions]]:
    """The Kaggle sample through its script (random split), the 1TB-like sample as it is (the last rows are the test rows)."""
    script = ROOT / "datasets" / "criteo.py"
    kaggle = scratch / "kaggle"
    subprocess.run([sys.executable, script, "--raw", RAW / "criteo-kaggle", "--out", kaggle, "--min-count", "5"], check=True)
    return {
        "criteo-kaggle": (kaggle / "data.parquet", DataOptions(schema=kaggle / "schema.json", shares=SHARES)),
        "criteo-1tb-80k": (
            RAW / "criteo-1tb-80k" / "sample.parquet",
            DataOptions(label="label", split="order", shares=SHARES),
        ),
    }


def main() -> None:
    """Train every model on both samples and write the table."""
    tune_cpu()
    runs: list[dict[str, Any]] = []
    table = INTRO
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name, (data, options) in sources(scratch).items():
            store = prepare(str(data), scratch / f"store-{name}", options)
            for model in MODELS:
                found = []
                for seed in SEEDS:
                    report = train(store, configure(model), scratch / f"{name}-{model}-{seed}", name=model, seed=seed)
                    found.append({"data": name, **report})
                runs += found
                cells = [_mean_std([run["test"][metric] for run in found]) for metric in ("auc", "log_loss", "ece")]
                rows = ", ".join(f"{count:,}" for count in store.rows.values())
                table += f"| {name} | {rows} | {model} | {' | '.join(cells)} |\n"
    (HERE / "results.json").write_text(json.dumps(runs, indent=2) + "\n", encoding="utf-8")
    (HERE / "README.md").write_text(table, encoding="utf-8")


def _mean_std(values: list[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


if __name__ == "__main__":
    main()
