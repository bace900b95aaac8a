"""Every preset on the Kaggle Criteo sample, default settings: ``python -m experiments.criteo_sample.run``.

Writes a JSON per preset into ``results/`` and the table, README.md. Presets that are there already are not run again, so that
the command goes on where it stopped; those that failed are. Reads ``$CTRLIB_DATA/criteo-kaggle`` (default ``../shared/data``).
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ctrlib.config import ConfigError
from ctrlib.cpu import tune_cpu
from ctrlib.data.store import Store
from ctrlib.embedding import FeatureEmbedding
from ctrlib.experiment import RunConfig, configure, prepare, train
from ctrlib.files import write_json
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import PRESETS
from ctrlib.schema import suggest
from experiments.criteo.samples import sources

HERE = Path(__file__).resolve().parent
MODELS = tuple(name for name, preset in PRESETS.items() if not preset.needs_history)  # Criteo has none
RESULTS = HERE / "results"
SEEDS = (0, 1, 2)
BASELINE = "dnn"
CROSSED = ("optinter", "optinter_m")  # these memorise pairs of fields
CROSS_MIN_COUNT = 10
T_QUANTILE = 4.302653  # Student's t at .975 for the two degrees of freedom of three seeds

# The slowest presets at their published sizes, of which one core trains fewer than about a thousand rows a second (PIN, just
# below that, is spared). All other presets, and all else in these, are as published.
_GENERATOR = {"model.embedding.dim": "10", "model.interaction.blocks.0.channels": "6,8,10,12"}
_HIFORMER = {"model.embedding.dim": "32", "model.block.value_dim": "16"}
REDUCED: Mapping[str, Mapping[str, str]] = {
    "fgcnn_ipnn": {**_GENERATOR, "model.interaction.blocks.2.hidden_units": "512,256"},
    "fgcnn_dnn": {**_GENERATOR, "model.interaction.blocks.1.hidden_units": "512,256"},
    "fgcnn_fm": _GENERATOR,
    "fgcnn_deepfm": {**_GENERATOR, "model.interaction.blocks.1.streams.1.hidden_units": "512,256"},
    "cin": {"model.interaction.hidden_units": "64,64"},
    "xdeepfm": {"model.interaction.streams.0.blocks.0.hidden_units": "64,64"},
    "hiformer": _HIFORMER,
    "hetero_att": _HIFORMER,
    "transformer": _HIFORMER,
    "ft_transformer": {"model.embedding.dim": "32", "model.interaction.num_heads": "4"},
    "wukong": {"model.embedding.dim": "32", "model.interaction.blocks.0.hidden_units": "512,512"},
    "rank_mixer": {"model.interaction.token_dim": "128"},
}

INTRO = """# Every preset on a sample of Criteo

`python -m experiments.criteo_sample.run`: the Kaggle sample, split at random as in [the two samples](../criteo/README.md),
flavour `paper`, default settings of `ctrlib train`, mean ± standard deviation over seeds 0, 1, 2. Training stops on validation
rows; the test rows are read once, after that. Nothing is tuned, neither for the data nor for a preset.

The difference is to `dnn` with the same seed: mean and 95 % confidence interval (Student's t over three pairs). The interval
speaks of other seeds, not of other rows; and of {intervals} intervals about three miss zero by chance. Parameters are those
outside the embedding tables. For {crossed} every two categorical fields are also crossed, pairs of values seen fewer than
{cross_min_count} times being one. Rows/s are training rows by second of CPU time, evaluations included, on one thread of a CPU
that other work shared: read them as an order of magnitude.

| model | test AUC | difference to dnn | test log loss | epochs | parameters | rows/s |
|---|---|---|---|---|---|---|
"""


def run(name: str, store: Store, scratch: Path) -> dict[str, Any]:
    """What the preset's JSON holds: a report for every seed, or the error."""
    options = dict(REDUCED.get(name, {}))
    found: dict[str, Any] = {"model": name, "reduced": options}
    try:
        config = configure(name, options=options)
        found["parameters"] = _parameters(config, store)
        if options:
            found["published_parameters"] = _parameters(configure(name), store)
        found["runs"] = []
        for seed in SEEDS:
            started = time.process_time()
            report = train(store, config, scratch / "run", name=name, seed=seed)
            seconds = time.process_time() - started
            shutil.rmtree(scratch / "run")
            if report["interrupted"]:
                raise KeyboardInterrupt
            found["runs"].append({**report, "cpu_seconds": seconds})
            print(name, seed, f"test {report['test']['auc']:.4f}, {seconds:.0f} s", flush=True)
    except Exception as error:  # the table names it, and the others are run
        traceback.print_exc()
        found["error"] = f"{type(error).__name__}: {error}"
    return found


def _parameters(config: RunConfig, store: Store) -> int:
    """Those outside the embedding tables."""
    model = build_model(config.model, store.encoder.layout)
    tables = {id(p) for m in model.modules() if isinstance(m, FeatureEmbedding) for p in m.parameters()}
    return sum(p.numel() for p in model.parameters() if id(p) not in tables)


def load(folder: Path) -> dict[str, dict[str, Any]]:
    """The results by preset, in the order of the presets."""
    files = {name: folder / f"{name}.json" for name in MODELS}
    return {name: json.loads(f.read_text(encoding="utf-8")) for name, f in files.items() if f.is_file()}


def page(results: Mapping[str, Mapping[str, Any]]) -> str:
    """README.md."""
    done = {name: found for name, found in results.items() if "error" not in found}
    crossed = " and ".join(f"`{name}`" for name in CROSSED)
    intro = INTRO.format(intervals=len(MODELS) - 1, crossed=crossed, cross_min_count=CROSS_MIN_COUNT)
    text = intro + "".join(_line(found, done.get(BASELINE)) for found in done.values())
    reduced = {name: found for name, found in done.items() if found["reduced"]}
    if reduced:
        text += (
            "\n\\* Smaller than published, to save CPU time: at their published sizes these train too slowly on one core. "
            "Their figures say nothing of the published models.\n\n"
        )
        for name, found in reduced.items():
            options = ", ".join(f"`{path}={value}`" for path, value in found["reduced"].items())
            text += f"* {name}: {options}; {found['parameters']:,} parameters, published {found['published_parameters']:,}\n"
    if "auto_fm" in done:
        text += (
            "\n`auto_fm` and `auto_deepfm` add up hundreds of products, each normalised over the batch, with weights that "
            "start at .6 as published: their logits are too large for a sample this small, as the log loss shows.\n"
        )
    for name, found in results.items():
        if "error" in found:
            text += f"\n**{name} failed:** {found['error']}\n"
    missing = [name for name in MODELS if name not in results]
    return text + (f"\nNot run yet: {', '.join(missing)}.\n" if missing else "")


def paired(found: Mapping[str, Any], baseline: Mapping[str, Any]) -> tuple[float, float]:
    """Mean and half the 95 % confidence interval of the differences in test AUC, seed by seed."""
    other = {r["seed"]: r["test"]["auc"] for r in baseline["runs"]}
    gains = [r["test"]["auc"] - other[r["seed"]] for r in found["runs"]]
    assert len(gains) == len(SEEDS)
    return statistics.fmean(gains), T_QUANTILE * statistics.stdev(gains) / len(gains) ** 0.5


def _line(found: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> str:
    runs: Sequence[Mapping[str, Any]] = found["runs"]
    difference = ""
    if baseline is not None and found is not baseline:
        difference = "{:+.4f} ± {:.4f}".format(*paired(found, baseline))
    cells = [
        found["model"] + ("\\*" if found["reduced"] else ""),
        _mean_std([r["test"]["auc"] for r in runs]),
        difference,
        _mean_std([r["test"]["log_loss"] for r in runs]),
        f"{statistics.fmean(r['epochs'] for r in runs):.1f}",
        f"{found['parameters']:,}",
        f"{sum(r['epochs'] * r['rows']['train'] for r in runs) / sum(r['cpu_seconds'] for r in runs):,.0f}",
    ]
    return f"| {' | '.join(cells)} |\n"


def _mean_std(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def main() -> None:
    """Run what is not there yet, and write the table after every preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", help="names with commas between them, run in this order; default: every preset")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the JSONs; README.md goes there too")
    options = parser.parse_args()
    out: Path = options.out
    names = options.models.split(",") if options.models else list(MODELS)
    for name in names:
        if name not in MODELS:
            raise ConfigError(f"--models names {name!r}, which is no preset without a history{suggest(name, MODELS)}")
    readme = (HERE if out == RESULTS else out) / "README.md"
    out.mkdir(parents=True, exist_ok=True)
    tune_cpu()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        stores: dict[bool, Store] = {}
        for name in names:
            before = load(out).get(name)
            if before is not None and "error" not in before:
                if before["reduced"] != REDUCED.get(name, {}):
                    raise ConfigError(
                        f"{out / name}.json was run with other sizes than {Path(__file__).name} has now; remove it"
                    )
                continue
            crossed = name in CROSSED
            if crossed not in stores:
                data, how = sources(scratch)["criteo-kaggle"]
                how = replace(how, cross_min_count=CROSS_MIN_COUNT if crossed else None)
                stores[crossed] = prepare(str(data), scratch / f"store-{crossed}", how)
            write_json(out / f"{name}.json", run(name, stores[crossed], scratch))
            readme.write_text(page(load(out)), encoding="utf-8")
    readme.write_text(page(load(out)), encoding="utf-8")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"error: {error}")
