"""What serving makes of models of the Kaggle sample: ``python -m experiments.criteo.serving`` writes serving.json, serving.md.

Reads ``$CTRLIB_DATA/criteo-kaggle`` (default ``../shared/data``); 3 seeds. ONNX needs the extra ``onnx``.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ctrlib import artifact
from ctrlib.cpu import tune_cpu
from ctrlib.experiment import DataOptions, configure, train, verify_run
from ctrlib.export import export
from ctrlib.files import write_json
from ctrlib.schema import Schema
from experiments.criteo.samples import sources

HERE = Path(__file__).resolve().parent
MODELS = ("dnn", "dcnv2", "autoint")
SEEDS = (0, 1, 2)
EXPORTS = (("torch", "float32"), ("onnx", "float32"), ("torch", "bfloat16"), ("torch", "int8"))

INTRO = """# Serving models of Criteo's Kaggle sample

`python -m experiments.criteo.serving`: default settings, seeds {seeds}; the 26 categorical fields are the context. Each of
{rows:,} raw test rows is scored by every path and compared with `ctrlib evaluate`: the largest difference of a probability, of
all seeds, and the change in AUC, mean ± standard deviation. A program's size is that of its folder.

| model | path | largest difference | change in AUC | MB |
|---|---|---|---|---|
"""


def run(name: str, seed: int, folder: Path, schema: Schema) -> dict[str, Any]:
    """Train, export in every way, and verify."""
    options = DataOptions(schema=schema, test=str(folder / "test.parquet"))
    train(folder / "train.parquet", configure(name), folder / "run", options, name=name, seed=seed)
    loaded = artifact.load(folder / "run")
    places = {}
    for kind, rows in EXPORTS:
        place = folder / f"{kind}, {rows} rows"
        export(loaded, place, kind, rows=rows)
        places[place.name] = place
    found = verify_run(folder / "run", str(folder / "test.parquet"), list(places.values()))
    paths = {Path(path).name: dict(result) for path, result in found.items()}
    for path, place in places.items():
        paths[path]["bytes"] = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
    return {"model": name, "seed": seed, "paths": paths}


def page(results: Mapping[str, Any]) -> str:
    """serving.md."""
    text = INTRO.format(seeds=", ".join(map(str, SEEDS)), rows=results["rows"])
    runs: Sequence[Mapping[str, Any]] = results["runs"]
    for name in MODELS:
        of = [run["paths"] for run in runs if run["model"] == name]
        for path in of[0]:
            changes = [paths[path]["auc_change"] for paths in of]
            worst = max(paths[path]["difference"] for paths in of)
            size = f"{statistics.fmean(paths[path]['bytes'] for paths in of) / 1e6:.2f}" if "bytes" in of[0][path] else ""
            change = f"{statistics.fmean(changes):+.1e} ± {statistics.stdev(changes):.1e}"
            text += f"| {name} | {path} | {worst:.1e} | {change} | {size} |\n"
    return text


def main() -> None:
    """Train, verify and write the page."""
    tune_cpu()
    runs = []
    with tempfile.TemporaryDirectory() as scratch:
        data, _ = sources(Path(scratch))["criteo-kaggle"]
        table = pq.read_table(data)
        order = np.random.default_rng(0).permutation(len(table))
        cut = len(table) * 8 // 10
        schema = Schema.load(data.with_name("schema.json"))
        schema = schema.with_fields(*(replace(f, side="context") for f in schema.fields if f.name.startswith("C")))
        for name in MODELS:
            for seed in SEEDS:
                with tempfile.TemporaryDirectory() as place:
                    for part, rows in (("train", order[:cut]), ("test", order[cut:])):
                        pq.write_table(table.take(rows), Path(place) / f"{part}.parquet")
                    runs.append(run(name, seed, Path(place), schema))
                print(runs[-1], flush=True)
    results = {"rows": len(table) - cut, "runs": runs}
    write_json(HERE / "serving.json", results)
    (HERE / "serving.md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
