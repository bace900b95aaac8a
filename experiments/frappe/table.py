"""``python experiments/frappe/table.py RUNS`` copies ``RUNS/*/results.json`` to ``results/`` and writes README.md, the table.

RUNS is a folder with one folder per experiment, as ``ctrlib run … --out RUNS/<experiment>`` makes them; models that it lacks
keep the results that they have. Without RUNS only the table is written anew.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
ORDER = (
    *("lr", "fm", "fwfm", "fmfm", "ffm", "hofm", "afm", "nfm"),
    *("dnn", "wide_deep", "deepfm", "ipnn", "dlrm"),
    *("dcn", "cross_net_v2", "dcnv2", "edcn", "cin", "xdeepfm", "aoanet", "fibinet", "mask_net"),
    *("autoint", "autoint_plus", "destine", "sam", "fignn", "arm_net", "afn", "afn_plus"),
    *("dual_mlp", "final_mlp", "final_net_1b", "final_net_2b"),
)

INTRO = """# Frappe_x1

Settings of BARS, FuxiCTR flavour, mean ± standard deviation over {seeds} seeds, on validation and test rows that are exactly
the published ones. **Train negatives re-drawn:** the published training file is not to be had whole, so the item of each
negative training row was drawn anew; positives and contexts are the published ones. Published figures are the best of a tuning
grid at one seed, and seeds alone differ by about .001. Over the {count} models with figures of BARS the median difference to
the published test AUC is {median:+.5f}.

Each row: `ctrlib run experiments/frappe/<model>.py --seeds 3 --out runs/frappe/<model>`; this table:
`python experiments/frappe/table.py runs/frappe`. Every run's metrics are in `results/`.

| model | test AUC | published | difference | test log loss | published | parameters | published | note |
|---|---|---|---|---|---|---|---|---|
"""

AUTOINT = """
AutoInt's published runs are of FuxiCTR 1.2, whose heads are cut by a reshape without a transpose (`head_split="rows"`, see
[the paper's page](../../docs/papers/autoint.md)); so are these.
"""

PLATEAUS = """
Without an MLP beside them, models of products of embeddings may stop on a plateau near .94, that of logistic regression;
whether and when they leave it differs from seed to seed. BARS' public tuning log shows the same: on the plateau end 6 of its
15 runs of the cross network alone, 12 of 25 of CIN, 26 of 36 of SAM. A published figure is the best run of such a grid: its
18 runs of AFM have a median of .9602 and end at .9697, its 8 of AutoInt with this L2 have a mean of .9807. What was changed
for a model to leave the plateau stands in the notes.
"""

PARAMETERS = """
Parameter counts: the embedding has a padding row for each of the ten fields. FuxiCTR 2 counts them, FuxiCTR 1 does not, and the
re-drawn training rows may hold an item more or less. With the published vocabularies counts are compared to the last parameter:
`tests/models/test_presets.py`.
"""


def load(folder: Path = RESULTS) -> dict[str, dict[str, Any]]:
    """The results by model, in the order of the table."""
    files = {name: folder / f"{name}.json" for name in ORDER}
    return {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items() if f.is_file()}


def difference(results: Mapping[str, Any]) -> float:
    """Mean test AUC less the published one."""
    return float(results["test"]["auc"]["mean"] - results["published"]["auc"])


def of_bars(results: Mapping[str, Any]) -> bool:
    """Whether the published figures are for these very splits; other papers' figures are AUCs alone."""
    return "log_loss" in results["published"]


def median(results: Mapping[str, Mapping[str, Any]]) -> tuple[int, float]:
    """Number of models with figures of BARS, and the median of their differences."""
    found = [difference(r) for r in results.values() if of_bars(r)]
    return len(found), statistics.median(found)


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """README.md.

    Raises:
        SystemExit: not all models have the same number of runs.
    """
    seeds = {len(r["runs"]) for r in results.values()}
    if len(seeds) != 1:
        raise SystemExit(f"the results are over {sorted(seeds) or 'no'} seeds; expected the same number for all models")
    count, middle = median(results)
    text = INTRO.format(seeds=seeds.pop(), count=count, median=middle)
    text += "".join(_row(name, found) for name, found in results.items())
    missing = [name for name in ORDER if name not in results]
    if missing:
        text += f"\nNot run yet: {', '.join(missing)}.\n"
    if {"autoint", "autoint_plus"} & set(results):
        text += AUTOINT
    return text + PLATEAUS + PARAMETERS


def _row(name: str, results: Mapping[str, Any]) -> str:
    test, published, runs = results["test"], results["published"], results["runs"]
    cells = [
        f"[{name}]({name}.py)",
        f"{test['auc']['mean']:.5f} ± {test['auc']['std']:.5f}",
        f"{published['auc']:.5f}",
        f"{difference(results):+.5f}",
        f"{test['log_loss']['mean']:.4f} ± {test['log_loss']['std']:.4f}",
        f"{published['log_loss']:.4f}" if "log_loss" in published else "",
        f"{runs[0]['parameters']:,}",
        f"{published['parameters']:,}",
        results["note"].replace("train negatives re-drawn", "").strip("; "),
    ]
    return "| " + " | ".join(cells) + " |\n"


def main(folder: Path | None) -> None:
    """Take over what has been run, and write the table."""
    RESULTS.mkdir(exist_ok=True)
    if folder is not None:
        for name in ORDER:
            path = folder / name / "results.json"
            if path.is_file():
                (RESULTS / f"{name}.json").write_text(path.read_text(encoding="utf-8"), encoding="utf-8")
    (HERE / "README.md").write_text(page(load()), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
