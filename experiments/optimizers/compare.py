"""Optimizers of the embedding tables by quality: ``python -m experiments.optimizers.compare``.

The settings of ``ctrlib train`` but for the optimizer of the tables. Reads ``$CTRLIB_DATA`` (default ``../shared/data``):
the two Criteo samples as in ``experiments/criteo``; and 200,000 rows of synthetic data. Writes results.json and README.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from ctrlib.cpu import tune_cpu
from ctrlib.data.store import Store
from ctrlib.data.synthetic import write_splits
from ctrlib.experiment import DEMO_DEEPFM, DataOptions, configure, prepare, train
from ctrlib.schema import Schema, SparseField
from experiments.criteo.samples import sources

HERE = Path(__file__).resolve().parent
SEEDS = (0, 1, 2)
VARIANTS: dict[str, dict[str, str]] = {
    "dense Adam, full_table": {"embedding": "dense"},
    "adam, batch_rows": {"embedding": "adam"},
    "lazy_adam, elapsed": {"embedding": "lazy_adam"},
    "lazy_adam, batch_rows": {"embedding": "lazy_adam", "embedding_l2_mode": "batch_rows"},
    "rowwise_adagrad, elapsed": {"embedding": "rowwise_adagrad"},
    "adagrad, elapsed": {"embedding": "adagrad"},
}
CASES = (
    ("criteo-kaggle", "dcnv2"),
    ("criteo-kaggle", "deepfm"),
    ("criteo-1tb-80k", "dcnv2"),
    ("criteo-1tb-80k", "deepfm"),
    ("synthetic", "deepfm"),
)

INTRO = """# Which optimizer for the embedding tables

`python -m experiments.optimizers.compare`; default settings of `ctrlib train` but for the optimizer of the tables; mean ±
standard deviation over 3 seeds; training stops on validation rows, the test rows are read once, after that. The differences
are to dense Adam with the same seeds (mean ± standard deviation of the paired differences). The synthetic data is that of
`ctrlib demo`, 200,000 rows, with the demo's learning rate of 4e-3. Adagrad's tables learn at 10 times the net's rate.

| data | model | tables | valid AUC | test AUC | difference | test log loss | best epoch |
|---|---|---|---|---|---|---|---|
"""


def stores(scratch: Path) -> dict[str, Store]:
    """The data sets, prepared."""
    found: dict[str, Store] = {}
    for name, (data, options) in sources(scratch).items():
        found[name] = prepare(str(data), scratch / f"store-{name}", options)
    write_splits(scratch / "synthetic", 200_000, 0)
    files = {name: scratch / "synthetic" / f"{name}.parquet" for name in ("train", "valid", "test")}
    schema = Schema.infer(files["train"], "label")
    schema = schema.with_fields(*(SparseField(name=f.name, min_count=10) for f in schema.fields if isinstance(f, SparseField)))
    options = DataOptions(schema=schema, valid=files["valid"], test=files["test"])
    found["synthetic"] = prepare(files["train"], scratch / "store-synthetic", options)
    return found


def main() -> None:
    """Train everything and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the results")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="the others keep their results")
    arguments = parser.parse_args()
    out, found = arguments.out, _earlier(arguments.out / "results.json")
    tune_cpu()
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        prepared = stores(scratch)
        for data, model in CASES:
            base = DEMO_DEEPFM if data == "synthetic" else {}
            for variant, optimizer in VARIANTS.items():
                if variant not in arguments.variants:
                    runs += [r for r in found if (r["data"], r["model"], r["variant"]) == (data, model, variant)]
                    continue
                options = {**base, **{f"fit.optimizer.{name}": value for name, value in optimizer.items()}}
                for seed in SEEDS:
                    run = scratch / f"run-{len(runs)}"
                    report = train(prepared[data], configure(model, options=options), run, name=model, seed=seed)
                    runs.append({"data": data, "variant": variant, **report})
                    print(data, model, variant, seed, f"valid {report['valid']['auc']:.4f} test {report['test']['auc']:.4f}")
    (out / "results.json").write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(INTRO + "".join(_lines(runs)), encoding="utf-8")


def _earlier(path: Path) -> list[dict[str, Any]]:
    """What an earlier call wrote."""
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


def _lines(runs: list[dict[str, Any]]) -> list[str]:
    cases: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for run in runs:
        cases.setdefault((run["data"], run["model"], run["variant"]), []).append(run)
    lines = []
    for (data, model, variant), found in cases.items():
        dense = cases.get((data, model, next(iter(VARIANTS))), [])
        paired = [a["test"]["auc"] - b["test"]["auc"] for a, b in zip(found, dense, strict=False)]
        cells = [
            _mean_std([r["valid"]["auc"] for r in found]),
            _mean_std([r["test"]["auc"] for r in found]),
            "" if found is dense else _mean_std(paired, "+"),
            _mean_std([r["test"]["log_loss"] for r in found]),
            f"{statistics.fmean(r['best_epoch'] for r in found):.1f}",
        ]
        lines.append(f"| {data} | {model} | {variant} | {' | '.join(cells)} |\n")
    return lines


def _mean_std(values: list[float], sign: str = "") -> str:
    return f"{statistics.fmean(values):{sign}.4f} ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""


if __name__ == "__main__":
    main()
