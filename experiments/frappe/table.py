"""``python experiments/frappe/table.py RUNS`` reads ``RUNS/*/results.json`` and writes ``results/`` and README.md, the table.

RUNS is a folder with one folder per experiment, as ``ctrlib run … --out RUNS/<experiment>`` makes them.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ORDER = ["lr", "fm", "dnn", "wide_deep", "deepfm", "dcn", "dcnv2", "autoint", "autoint_plus", "dual_mlp", "final_mlp"]

INTRO = """# Frappe_x1

Settings of BARS, FuxiCTR flavour, mean ± standard deviation over {seeds} seeds, on validation and test rows that are exactly
the published ones. **Train negatives re-drawn:** the published training file is not to be had whole, so the item of each
negative training row was drawn anew; positives and contexts are the published ones. Published figures are the best of a tuning
grid at one seed, and seeds alone differ by about .001.

Each row: `ctrlib run experiments/frappe/<model>.py --seeds 3 --out runs/frappe/<model>`; this table:
`python experiments/frappe/table.py runs/frappe`. Every run's metrics are in `results/`.

| model | test AUC | published | test log loss | published | parameters | published | note |
|---|---|---|---|---|---|---|---|
"""


def row(name: str, results: dict[str, Any]) -> str:
    """One line of the table."""
    test, published, runs = results["test"], results["published"], results["runs"]
    cells = [
        f"[{name}]({name}.py)",
        f"{test['auc']['mean']:.5f} ± {test['auc']['std']:.5f}",
        f"{published['auc']:.5f}",
        f"{test['log_loss']['mean']:.4f} ± {test['log_loss']['std']:.4f}",
        f"{published['log_loss']:.4f}",
        f"{runs[0]['parameters']:,}",
        f"{published['parameters']:,}",
        results["note"].replace("train negatives re-drawn", "").strip("; "),
    ]
    return "| " + " | ".join(cells) + " |\n"


def main(folder: Path) -> None:
    """Write ``results/<model>.json`` and ``README.md``; models that have not been run are named."""
    (HERE / "results").mkdir(exist_ok=True)
    lines, missing, seeds = "", [], set()
    for name in ORDER:
        path = folder / name / "results.json"
        if not path.is_file():
            missing.append(name)
            continue
        text = path.read_text(encoding="utf-8")
        results = json.loads(text)
        seeds.add(len(results["runs"]))
        (HERE / "results" / f"{name}.json").write_text(text, encoding="utf-8")
        lines += row(name, results)
    if len(seeds) != 1:
        raise SystemExit(
            f"the results in {folder} are over {sorted(seeds) or 'no'} seeds; expected the same number for all models"
        )
    text = INTRO.format(seeds=seeds.pop()) + lines
    if missing:
        text += f"\nNot run yet: {', '.join(missing)}.\n"
    if {"autoint", "autoint_plus"} - set(missing):
        text += (
            "\nAutoInt's published runs are of FuxiCTR 1.2, whose heads are cut by a reshape without a transpose "
            '(`head_split="rows"`, see [the paper\'s page](../../docs/papers/autoint.md)); so are these.\n'
        )
    text += (
        "\nParameter counts: the embedding has a padding row for each of the ten fields. FuxiCTR 2 (FinalMLP, DualMLP) counts "
        "them, FuxiCTR 1 (all others) does not, and the re-drawn training rows may hold an item more or less. With the "
        "published vocabularies all counts are equal to the last parameter: `tests/models/test_presets.py`.\n"
    )
    (HERE / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
