"""What the experiments on behaviour sequences share: the models, the runs, long-tail tables, paired differences."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from ctrlib import artifact
from ctrlib.config import ConfigError, to_json
from ctrlib.cpu import tune_cpu
from ctrlib.data.loader import EVALUATION_ROWS, Loader
from ctrlib.data.store import Split, Store
from ctrlib.experiment import DataOptions, RunConfig, configure, prepare, train
from ctrlib.files import json_text, write_json, write_text
from ctrlib.models.ctr import ModelComponent
from ctrlib.plots import figure_class, plot_gates
from ctrlib.ranking_metrics import by_history_length, history_table, plot_by_history_length
from ctrlib.schema import DataError, suggest
from ctrlib.training import predict
from experiments import seeds

ROOT = Path(__file__).resolve().parents[1]
RAW = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data"))

# By name, the preset and its options. All have one width of embeddings, and stop by GAUC, as all are ranked within sessions.
COMMON = {"model.embedding.dim": "16", "fit.monitor": "gauc", "fit.epochs": "20"}
MODELS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "dnn": ("dnn", {}),
    "din": ("din", {}),
    "moe": ("moe", {}),
    "aw_moe_plain": ("aw_moe", {"model.contrast.weight": "0"}),
    "aw_moe": ("aw_moe", {"model.contrast.user": "user", "model.contrast.weight": "0.001"}),
}
MAIN, BASELINES = "aw_moe", ("din", "moe", "aw_moe_plain", "dnn")
ASKED = ("din", "moe")  # the baselines that AW-MoE is asked to reach
OVERALL = ("auc", "gauc", "ndcg@10", "mrr", "hr@10", "auc@10")
COMPARED = ("gauc", "ndcg@10")
LONG_TAIL = "≤5"
VALID_NEGATIVES = 19
WEIGHTS = (0.001, 0.01, 0.1)  # λ of the contrastive loss, to choose from by validation rows
TUNING = "weight-of-contrast.json"
PLOTS = {"ndcg.png": "NDCG@10 by the length of the history", "gates.png": f"gates of {MAIN}, users by experts"}


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """An experiment.

    Args:
        module: of its ``run.py``.
        title: of its page.
        text: of the data.
        script: in ``datasets/``, which writes train, valid and test Parquet, and the schema.
        raw: its folder of raw files, below ``$CTRLIB_DATA``.
        folder: of the experiment: ``results/`` and README.md.
        script_options: of the script, beside the folders.
        valid_every: of so many validation sessions one is used.
        reading: what people read from the tables, once they are whole.
    """

    module: str
    title: str
    text: str
    script: str
    raw: str
    folder: Path
    script_options: tuple[str, ...] = ()
    valid_every: int = 1
    reading: str = ""

    def settings(self, name: str, options: argparse.Namespace) -> dict[str, Any]:
        """What decides a result, besides the seed."""
        found: dict[str, Any] = {"sessions": options.sessions, "valid_negatives": VALID_NEGATIVES}
        if self.script_options:
            found["script_options"] = self.script_options
        if self.valid_every > 1:
            found["valid_every"] = self.valid_every
        settings: dict[str, Any] = json.loads(json_text({**found, "run": to_json(config(name, options))}))
        return settings

    def store(self, scratch: Path, sessions: int | None) -> Store:
        """The data, encoded; of the first sessions of each split, for a quick look."""
        source = scratch / "data"
        command = [sys.executable, str(ROOT / "datasets" / self.script), "--raw", str(RAW / self.raw), "--out", str(source)]
        if subprocess.run([*command, *self.script_options]).returncode != 0:
            raise DataError(f"the data could not be prepared (see above); set CTRLIB_DATA to the folder that holds {self.raw}/")
        files = {name: source / f"{name}.parquet" for name in ("train", "valid", "test")}
        _thin(files["valid"], VALID_NEGATIVES, self.valid_every)
        if sessions is not None:
            for path in files.values():
                table = pq.read_table(path)
                number_R = np.cumsum(np.diff(table["session"].to_numpy(), prepend=-1) != 0)
                pq.write_table(table.slice(0, int((number_R <= sessions).sum())), path)
        options = DataOptions(schema=source / "schema.json", valid=str(files["valid"]), test=str(files["test"]))
        return prepare(str(files["train"]), scratch / "store", options)

    def page(self, runs: seeds.Runs, folder: Path | None = None) -> str:
        """README.md; with links to the plots that are there in its folder (default: that of the experiment)."""
        text = f"# {self.title}\n\n`python -m {self.module}`. {self.text}\n{_INTRO.format(valid=VALID_NEGATIVES)}"
        done = seeds.complete(runs)
        looks = {found["settings"]["sessions"] for all_seeds in runs.values() for found in all_seeds} - {None}
        if looks:
            text += f"\n**A quick look at {max(looks):,} sessions: these figures say nothing.**\n"
        if done:
            text += f"\n## All test sessions\n\n| model | {' | '.join(OVERALL)} | epochs | parameters |\n"
            text += "|---" * (len(OVERALL) + 3) + "|\n"
            text += "".join(_line(name, found) for name, found in done.items())
            means = {name: mean_buckets(found) for name, found in done.items()}
            for metric in COMPARED:
                text += f"\n## {metric} by the length of the history\n\nMeans over seeds.\n\n{history_table(means, metric)}"
        if MAIN in done:
            text += _comparison(done)
        if self.reading and len(done) == len(MODELS):
            text += f"\n## What it says\n\n{self.reading}"
        tuning = (folder or self.folder) / TUNING
        if tuning.is_file():
            text += _TUNING + _tuning_table(json.loads(tuning.read_text(encoding="utf-8")), runs)
        plots = [name for name in PLOTS if ((folder or self.folder) / name).is_file()]
        if plots:
            text += "\n## Plots\n\n" + "".join(f"![{PLOTS[name]}]({name})\n" for name in plots)
        return text + seeds.missing(runs, MODELS)


_INTRO = """
Five seeds of the initial weights and of the order of rows; default settings of `ctrlib train`, embeddings of width 16; only
the λ of the contrastive loss is chosen. Training stops on validation rows by GAUC, for which every session has {valid}
negatives (those of test have 99); the test rows are read once, after that. *dnn* reads histories as the mean of their vectors,
*moe* too; *din* weighs them by the candidate; *aw_moe_plain* is AW-MoE without the contrastive loss. AW-MoE is a reference
design after the paper's abstract (its text was not at hand), so no figure here is the paper's. All figures are means over
sessions, but AUC (over all rows) and GAUC (weighed by rows).
"""


def _thin(path: Path, negatives: int, every: int = 1) -> None:
    """Leave one of so many sessions of a file, with so many negatives each; they stand in random order."""
    table = pq.read_table(path)
    positive_R = table["label"].to_numpy() == 1
    session_R = np.cumsum(np.diff(table["session"].to_numpy(), prepend=-1) != 0) - 1
    seen_R = np.cumsum(~positive_R)
    starts_S = np.flatnonzero(np.diff(session_R, prepend=-1))
    before_S = seen_R[starts_S] - ~positive_R[starts_S]
    kept_R = positive_R | (seen_R - before_S[session_R] <= negatives)
    pq.write_table(table.filter(kept_R & (session_R % every == 0)), path)


_TUNING = """
## λ of the contrastive loss

Of Amazon Grocery, seed 0, validation rows (`--tune`); the best is taken for both experiments. 0: *aw_moe_plain*.

| λ | GAUC | epochs |
|---|---|---|
"""


def _tuning_table(trials: Mapping[str, Mapping[str, Any]], runs: seeds.Runs) -> str:
    rows = [("0", first) for first in runs.get("aw_moe_plain", ())[:1]] + list(trials.items())
    return "".join(f"| {weight} | {trial['valid']['gauc']:.4f} | {trial['epochs']:.0f} |\n" for weight, trial in rows)


def config(name: str, options: argparse.Namespace, weight: float | None = None) -> RunConfig:
    """The run of a model; ``weight``: another λ of the contrastive loss."""
    model, own = MODELS[name]
    others = {} if weight is None else {"model.contrast.weight": str(weight)}
    return configure(model, options={**COMMON, **own, **others}, epochs=options.epochs)


def tune(store: Store, scratch: Path, options: argparse.Namespace, path: Path) -> None:
    """Train AW-MoE by each λ with the first seed, and write its validation metrics; test rows are not read."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    for weight in WEIGHTS:
        if str(weight) in found:
            continue
        report = train(store, config(MAIN, options, weight), scratch / "run", name=MAIN, seed=seeds.SEEDS[0], test=False)
        if report["interrupted"]:
            raise KeyboardInterrupt
        shutil.rmtree(scratch / "run")
        found[str(weight)] = {key: report[key] for key in ("valid", "epochs", "best_epoch")}
        write_json(path, found)
        print(f"λ = {weight:g}: validation GAUC {report['valid']['gauc']:.4f}", flush=True)


def run(
    name: str,
    seed: int,
    store: Store,
    scratch: Path,
    settings: Mapping[str, Any],
    options: argparse.Namespace,
    plots: Path,
) -> dict[str, Any]:
    """What the JSON of a model and seed holds: the report, and the test metrics by length of the history.

    Of AW-MoE there is also a heat map of gates, in the folder ``plots``; the last seed's stays.
    """
    started = time.process_time()
    report = train(store, config(name, options), scratch / "run", name=name, seed=seed)
    if report["interrupted"]:
        raise KeyboardInterrupt
    model = artifact.load(scratch / "run").model
    shutil.rmtree(scratch / "run")
    split = store.split("test")
    history = store.encoder.schema.histories[0].fields[0]
    lengths = split.sequences[history][1].diff().numpy()
    seen = predict(model, Loader(split, EVALUATION_ROWS))
    assert seen.labels is not None
    assert seen.group is not None
    buckets = by_history_length(lengths, seen.labels, seen.logits, seen.group)
    if name == MAIN:
        plot_gates(*sample_gates(model, split, lengths), plots / "gates.png")
    seconds = time.process_time() - started
    return {**report, "settings": settings, "history": buckets, "cpu_seconds": seconds}


def sample_gates(
    model: ModelComponent, split: Split, lengths: npt.NDArray[np.int64], rows: int = 16_384
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """The gates of the clicked ones among the first rows, a user each, and how many behaviours each has."""
    batch = next(iter(Loader(split, rows)))
    assert batch.labels is not None
    clicked = batch.labels[:, 0].numpy() == 1
    return model.explain(batch)["gate"].numpy()[clicked], lengths[: len(clicked)][clicked]


def mean_buckets(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The test metrics by length of the history, means over seeds."""
    found = []
    for entries in zip(*(one["history"] for one in runs), strict=True):
        first = entries[0]
        names = [key for key, value in first.items() if not isinstance(value, str | int)]
        means = {key: statistics.fmean(entry[key] for entry in entries) for key in names if _known(entries, key)}
        found.append({**first, **dict.fromkeys(names, float("nan")), **means})
    return found


def _known(entries: Sequence[Mapping[str, Any]], key: str) -> bool:
    return all(entry[key] is not None for entry in entries)  # what is undefined is null in JSON


def bucket(runs: Sequence[Mapping[str, Any]], segment: str, metric: str) -> list[float]:
    """A test metric of a segment of history lengths, of every run."""
    return [next(float(entry[metric]) for entry in one["history"] if entry["segment"] == segment) for one in runs]


def _line(name: str, runs: Sequence[Mapping[str, Any]]) -> str:
    cells = [seeds.mean_std([one["test"][metric] for one in runs]) for metric in OVERALL]
    epochs = statistics.fmean(one["epochs"] for one in runs)
    return f"| {name} | {' | '.join(cells)} | {epochs:.1f} | {runs[0]['parameters']:,} |\n"


def _comparison(done: seeds.Runs) -> str:
    """Differences of AW-MoE to the others, seed by seed, for all and for the long tail, and what follows from them."""
    text = (
        f"\n## {MAIN} minus the others\n\nMean difference of the same seeds and its 95 % confidence interval (Student's t over "
    )
    text += "five pairs), which speaks of other seeds, not of other sessions.\n\n"
    others = [name for name in BASELINES if name in done]
    columns = [f"{metric}, {segment}" for metric in COMPARED for segment in ("all", LONG_TAIL)]
    text += f"| to | {' | '.join(columns)} |\n" + "|---" * (len(columns) + 1) + "|\n"
    for name in others:
        cells = [
            seeds.signed(bucket(done[MAIN], segment, metric), bucket(done[name], segment, metric))
            for metric in COMPARED
            for segment in ("all", LONG_TAIL)
        ]
        text += f"| {name} | {' | '.join(cells)} |\n"
    text += (
        "\nAsked was that the mean is at least that of *din* and of *moe*, and that the gain for histories of up to five is at "
    )
    text += "least the gain for all.\n\n"
    for name in ASKED:
        for metric in COMPARED if name in done else ():
            gains = [
                seeds.difference(bucket(done[MAIN], segment, metric), bucket(done[name], segment, metric))[0]
                for segment in ("all", LONG_TAIL)
            ]
            text += f"* {metric} to *{name}*: {'reached' if gains[0] >= 0 else 'missed'} ({gains[0]:+.4f}); gain for the long "
            text += f"tail: {'reached' if gains[1] >= gains[0] else 'missed'} ({gains[1]:+.4f}).\n"
    return text


def main(experiment: Sequences, description: str | None, argv: Sequence[str] | None = None) -> None:
    """Run what is not there yet, and write the page after every run."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", help="names with commas between them, run in this order; default: all")
    parser.add_argument("--seeds", default=",".join(map(str, seeds.SEEDS)), help="with commas between them")
    parser.add_argument("--epochs", type=int, help="at most")
    parser.add_argument("--tune", action="store_true", help="only choose λ of the contrastive loss by validation rows")
    parser.add_argument("--sessions", type=int, help="only so many sessions of each split: for a quick look")
    parser.add_argument("--out", type=Path, help="folder of the JSONs; README.md goes there too")
    options = parser.parse_args(argv)
    names = options.models.split(",") if options.models else list(MODELS)
    for name in names:
        if name not in MODELS:
            raise ConfigError(f"--models names {name!r}, which is no model of this experiment{suggest(name, MODELS)}")
    if options.sessions is not None and options.out is None:
        raise ConfigError("--sessions is for a quick look; give --out, so that it does not mix with results")
    out: Path = options.out or experiment.folder / "results"
    readme = (options.out or experiment.folder) / "README.md"
    out.mkdir(parents=True, exist_ok=True)
    figure_class()  # whoever lacks it is told before the first run
    tune_cpu()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        store: Store | None = None
        if options.tune:
            tune(experiment.store(scratch, options.sessions), scratch, options, readme.parent / TUNING)
            names = []
        for seed in map(int, options.seeds.split(",")):  # seed by seed, so that models are soon compared
            for name in names:
                settings = experiment.settings(name, options)
                if seeds.is_done(seeds.file(out, name, seed), settings):
                    continue
                if store is None:
                    store = experiment.store(scratch, options.sessions)
                found = run(name, seed, store, scratch, settings, options, readme.parent)
                write_json(seeds.file(out, name, seed), found)
                print(name, seed, f"test GAUC {found['test']['gauc']:.4f}, {found['cpu_seconds']:.0f} s", flush=True)
                write_text(readme, experiment.page(seeds.load(out, MODELS), readme.parent))
    runs = seeds.load(out, MODELS)
    done = seeds.complete(runs)
    if done:
        means = {name: mean_buckets(found) for name, found in done.items()}
        plot_by_history_length(means, "ndcg@10", readme.parent / "ndcg.png")
    write_text(readme, experiment.page(runs, readme.parent))


def script(experiment: Sequences, description: str | None) -> None:
    """:func:`main` for the command line."""
    try:
        main(experiment, description)
    except (ConfigError, DataError) as error:
        sys.exit(f"error: {error}")
