"""All measured results on one page: ``python -m experiments.results`` writes ``docs/results.md`` from the committed JSONs."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets.twitch import COUNTRIES
from experiments import seeds, sequences
from experiments.amazon_grocery.run import EXPERIMENT as GROCERY
from experiments.beauty.run import EXPERIMENT as BEAUTY
from experiments.criteo_sample import run as sample
from experiments.frappe import table as frappe
from experiments.movielens_cold import ranking
from experiments.movielens_cold import run as cold
from experiments.selection import run as selection
from experiments.twitch import run as twitch

EXPERIMENTS = Path(__file__).resolve().parent
PAGE = EXPERIMENTS.parent / "docs" / "results.md"

INTRO = """# Results

`python -m experiments.results` makes this page from the JSON files that the experiments wrote; a test compares the two. Every
figure is a mean ± standard deviation over at least three seeds. Training stops on the validation rows and keeps the weights
that were best there; the test rows are read once, after that.
"""

FRAPPE = """
## Frappe_x1: the published settings

Validation and test rows are the published ones; the negatives of the training rows are re-drawn. Published are the figures of
BARS, each the best of a tuning grid at one seed; the settings are those of that best. Figures in brackets are authors' own, for
other splits. Over the {count} models with figures of BARS the median difference in test AUC is {median:+.5f}. More, also on
what differs from the publications: [experiments/frappe](../experiments/frappe/README.md).

| model | test AUC | published | difference | test log loss | published |
|---|---|---|---|---|---|
"""

KAGGLE = """
## Criteo, sample of the Kaggle data: every preset with default settings

{rows} rows for training, validation and test, split at random; nothing is tuned. The difference is to `dnn`, seed by seed, with
its 95 % confidence interval. Models marked \\* are smaller than published, to save CPU time. More:
[experiments/criteo_sample](../experiments/criteo_sample/README.md).

| model | test AUC | difference to dnn | test log loss |
|---|---|---|---|
"""

TERABYTE = """
## Criteo, sample like the 1TB data: default settings

{rows} rows for training, validation and test, in the order of the file; nothing is tuned. More:
[experiments/criteo](../experiments/criteo/README.md).

| model | test AUC | test log loss |
|---|---|---|
"""

OPTIMIZERS = """
## Optimizers of the embedding tables

Difference in test AUC to dense Adam with the same seeds, mean ± standard deviation. More:
[experiments/optimizers](../experiments/optimizers/README.md).

"""

SELECTION = """
## Selection: {title}

Differences are to the first row, seed by seed, mean ± standard deviation. More:
[experiments/selection](../experiments/selection/README.md).

"""

HISTORIES = """
## {title}

Five seeds, default settings; every test session has one positive and 99 negatives. "≤5": users with at most five behaviours.
More: [experiments/{folder}](../experiments/{folder}/README.md).

| model | GAUC | NDCG@10 | GAUC, ≤5 | NDCG@10, ≤5 |
|---|---|---|---|---|
"""

COLD = """
## Cold start on MovieLens-1M

HR@10 among all items of the pool, five seeds; *+ relations*: with the map from content. More:
[experiments/movielens_cold](../experiments/movielens_cold/README.md).

"""

NODES = """
## Nodes of Twitch, {country}

Five seeds, every model tuned by as many settings. More: [experiments/twitch](../experiments/twitch/README.md).

"""


def page() -> str:
    """``docs/results.md``; experiments without results are left out."""
    sections = [_frappe(), _kaggle()]
    sections += [_terabyte(EXPERIMENTS / "criteo" / "results.json"), _optimizers(EXPERIMENTS / "optimizers" / "results.json")]
    sections += [SELECTION.format(title=found["title"]) + selection.rows_table(found) for found in selection.load().values()]
    sections += [_histories(GROCERY), _histories(BEAUTY), _cold(), *map(_nodes, COUNTRIES)]
    return INTRO + "".join(sections)


def _frappe() -> str:
    results = frappe.load()
    count, median = frappe.median(results)
    text = FRAPPE.format(count=count, median=median)
    for name, found in results.items():
        test, published = found["test"], found["published"]
        text += _line(
            f"[{name}](../experiments/frappe/{name}.py)",
            f"{test['auc']['mean']:.5f} ± {test['auc']['std']:.5f}",
            f"{published['auc']:.5f}" if frappe.of_bars(found) else f"({published['auc']:.5f})",
            f"{frappe.difference(found):+.5f}" if frappe.of_bars(found) else f"({frappe.difference(found):+.5f})",
            f"{test['log_loss']['mean']:.4f} ± {test['log_loss']['std']:.4f}",
            f"{published['log_loss']:.4f}" if "log_loss" in published else "",
        )
    return text


def _kaggle() -> str:
    results = sample.load(sample.RESULTS)
    done = {name: found for name, found in results.items() if "error" not in found}
    if sample.BASELINE not in done:
        return ""
    text = KAGGLE.format(rows=_rows(done[sample.BASELINE]["runs"]))
    for name, found in done.items():
        difference = "" if name == sample.BASELINE else "{:+.4f} ± {:.4f}".format(*sample.paired(found, done[sample.BASELINE]))
        text += _line(
            name + ("\\*" if found["reduced"] else ""),
            _metric(found["runs"], "auc"),
            difference,
            _metric(found["runs"], "log_loss"),
        )
    failed = [name for name in results if name not in done]
    return text + (f"\nFailed: {', '.join(failed)}.\n" if failed else "")


def _terabyte(path: Path) -> str:
    runs = [r for r in _runs(path) if r["data"] == "criteo-1tb-80k"]
    models = dict.fromkeys(r["model"] for r in runs)
    text = TERABYTE.format(rows=_rows(runs)) if runs else ""
    for model in models:
        found = [r for r in runs if r["model"] == model]
        text += _line(model, _metric(found, "auc"), _metric(found, "log_loss"))
    return text


def _optimizers(path: Path) -> str:
    runs = _runs(path)
    if not runs:
        return ""
    cases = list(dict.fromkeys((r["data"], r["model"]) for r in runs))
    variants = list(dict.fromkeys(r["variant"] for r in runs))
    aucs = {(r["data"], r["model"], r["variant"], r["seed"]): r["test"]["auc"] for r in runs}
    seeds = sorted({r["seed"] for r in runs})
    text = OPTIMIZERS + _line("tables", *(f"{data}, {model}" for data, model in cases)) + "|---" * (len(cases) + 1) + "|\n"
    for variant in variants[1:]:  # the first is dense Adam
        gains = [[aucs[*c, variant, seed] - aucs[*c, variants[0], seed] for seed in seeds] for c in cases]
        text += _line(variant, *(f"{statistics.fmean(g):+.4f} ± {statistics.stdev(g):.4f}" for g in gains))
    return text


def _histories(experiment: sequences.Sequences) -> str:
    done = seeds.complete(seeds.load(experiment.folder / "results", sequences.MODELS))
    text = HISTORIES.format(title=experiment.title, folder=experiment.folder.name) if done else ""
    for name, runs in done.items():
        cells = ((part, metric) for part in ("all", sequences.LONG_TAIL) for metric in sequences.COMPARED)
        text += _line(name, *(seeds.mean_std(sequences.bucket(runs, *cell)) for cell in cells))
    return text


def _cold() -> str:
    done = seeds.complete(seeds.load(cold.RESULTS, cold.ORDER))
    if not done:
        return ""
    text = COLD + _line("model", *ranking.POOLS, f"cold{cold.RELATIONS}") + "|---" * (len(ranking.POOLS) + 2) + "|\n"
    for name, runs in done.items():
        cells = [seeds.mean_std([run["pools"][pool]["hr@10"] for run in runs]) for pool in ranking.POOLS]
        related = [run["related"]["cold"]["hr@10"] for run in runs if "related" in run]
        text += _line(name, *cells, seeds.mean_std(related) if related else "")
    return text


def _nodes(country: str) -> str:
    done = seeds.complete(twitch.load(twitch.RESULTS, country))
    if not done:
        return ""
    text = NODES.format(country=country) + _line("model", *twitch.METRICS) + "|---" * (len(twitch.METRICS) + 1) + "|\n"
    for name, results in done.items():
        text += _line(name, *(seeds.mean_std([r["test"][metric] for r in results]) for metric in twitch.METRICS))
    return text


def _runs(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return found


def _rows(runs: Sequence[Mapping[str, Any]]) -> str:
    train, valid, test = (f"{runs[0]['rows'][split]:,}" for split in ("train", "valid", "test"))
    return f"{train}, {valid} and {test}"


def _metric(runs: Sequence[Mapping[str, Any]], metric: str) -> str:
    values = [r["test"][metric] for r in runs]
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def _line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
