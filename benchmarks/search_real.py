"""Searches that train: hedged against random, the same seconds and the same space, on three data sets.

Two searches run side by side, each with one thread: those of one seed, so that they see the same machine, unless one of them is
there already. Every search is a folder under ``runs/search``; what is finished is not run again, and what was cut off goes on.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from benchmarks.common import print_table, write_result
from ctrlib.cpu import tune_cpu
from ctrlib.data.store import Store
from ctrlib.data.synthetic import write_splits
from ctrlib.experiment import DataOptions, prepare
from ctrlib.files import write_json
from ctrlib.schema import Schema
from ctrlib.search.sampling import Method
from ctrlib.search.tuning import SearchConfig, search
from experiments.criteo.samples import sources
from experiments.frappe import common as frappe

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "runs" / "search"
METHODS: tuple[Method, ...] = ("random", "hedged")
PUBLISHED = ROOT / "experiments" / "frappe" / "results" / "final_mlp.json"
_WINS, _TIME = 4 / 5, 0.5


@dataclass(frozen=True)
class Setting:
    """How long each search takes (by data set), with how many seeds.

    A search gives a trial a sixth of its time at most: enough for the first settings of the portfolio on all rows, which take
    a minute on the synthetic ones.
    """

    seconds: Mapping[str, float] = field(default_factory=lambda: {"frappe": 900.0, "criteo": 450.0, "synthetic": 450.0})
    seeds: int = 5
    rows: int = 100_000
    frappe_seconds: float = 1800.0


def _frappe_store(folder: Path, _: Setting) -> Store:
    data = frappe.data()
    options = DataOptions(schema=data / "schema.json", valid=str(data / "valid.parquet"), test=str(data / "test.parquet"))
    return prepare(str(data / "train.parquet"), folder, options)


def _criteo_store(folder: Path, _: Setting) -> Store:
    """As many validation rows as test rows: a search hands over what is best on them, and 8% of 40,000 rows say too little."""
    raw, options = sources(folder.parent / "raw")["criteo-kaggle"]
    return prepare(str(raw), folder, replace(options, shares={"train": 0.6, "valid": 0.2, "test": 0.2}))


def _synthetic_store(folder: Path, setting: Setting) -> Store:
    data = folder.parent / "synthetic"
    write_splits(data, setting.rows)
    train = str(data / "train.parquet")
    options = DataOptions(
        schema=Schema.infer(train, "label"), valid=str(data / "valid.parquet"), test=str(data / "test.parquet")
    )
    return prepare(train, folder, options)


DATA: Mapping[str, Callable[[Path, Setting], Store]] = {
    "frappe": _frappe_store,
    "criteo": _criteo_store,
    "synthetic": _synthetic_store,
}


def run_real(setting: Setting, names: Sequence[str] = tuple(DATA), folder: Path = RUNS) -> bool:
    """Run what is not run yet, print and write the comparison; whether every gate holds."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    results: dict[str, Any] = {}
    for name in names:
        path = folder / name / "store"
        if not Store.is_store(path):
            DATA[name](path, setting)
        with ProcessPoolExecutor(len(METHODS), get_context("spawn"), initializer=tune_cpu, initargs=(1,)) as processes:
            calls = [
                (m, processes.submit(_one, folder / name, setting.seconds[name], m, s))
                for s in range(setting.seeds)
                for m in METHODS
            ]
            try:
                runs = {method: [call.result() for m, call in calls if m == method] for method in METHODS}
            except BaseException:
                processes.shutdown(wait=False, cancel_futures=True)  # of hours, for nothing
                raise
        results[name] = compare(runs["hedged"], runs["random"], setting.seconds[name])
    rows = [
        [
            name,
            r["hedged"]["mean"],
            r["random"]["mean"],
            f"{r['wins']} of {setting.seeds}",
            r["time_share"] or "never",
            r["holds"],
        ]
        for name, r in results.items()
    ]
    print_table(["data", "hedged, test log loss", "random", "won", "share of the budget to random's median", "holds"], rows)
    result: dict[str, Any] = {"seconds": dict(setting.seconds), "seeds": setting.seeds, "rows": setting.rows, "data": results}
    if "frappe" in names:
        result["published"] = against_published(folder / "frappe", setting)
        print(result["published"])
    print(f"written to {write_result('search_real', result)}")
    return all(r["holds"] for r in results.values()) and result.get("published", {"holds": True})["holds"]


def _one(folder: Path, seconds: float, method: Method, seed: int) -> dict[str, Any]:
    out = folder / method / f"seed-{seed}"
    if not (out / "cpu.json").is_file():
        config = SearchConfig(method=method, budget=seconds, seed=seed)
        began = time.process_time()
        search(Store.open(folder / "store"), out, config=config, resume=out.exists())
        write_json(out / "cpu.json", {"seconds": time.process_time() - began})  # of the last call, if it was cut off before
    report: dict[str, Any] = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return report | {"cpu_seconds": json.loads((out / "cpu.json").read_text(encoding="utf-8"))["seconds"]}


def compare(hedged: Sequence[Mapping[str, Any]], chance: Sequence[Mapping[str, Any]], seconds: float) -> dict[str, Any]:
    """Reports of both methods, seed by seed: final test log loss, and in which part of the budget of so many ``seconds`` the
    median of random's end is reached."""
    losses = {
        name: [float(r["test"]["log_loss"]["mean"]) for r in runs] for name, runs in (("hedged", hedged), ("random", chance))
    }
    wins = sum(a < b for a, b in zip(losses["hedged"], losses["random"], strict=True))
    goal = statistics.median(min((p["value"] for p in r["curve"]), default=float("inf")) for r in chance)
    reached = [next((p["seconds"] for p in r["curve"] if p["value"] <= goal), None) for r in hedged]
    known = sorted(float("inf") if t is None else t for t in reached)
    share = known[len(known) // 2] / seconds
    better = statistics.fmean(losses["hedged"]) <= statistics.fmean(losses["random"])
    return {
        **{name: {"mean": statistics.fmean(v), "by_seed": v} for name, v in losses.items()},
        "trials": {"hedged": [r["trials"] for r in hedged], "random": [r["trials"] for r in chance]},
        "cpu_seconds": {"hedged": [r["cpu_seconds"] for r in hedged], "random": [r["cpu_seconds"] for r in chance]},
        "wins": wins,
        "time_share": share if share < float("inf") else None,
        "holds": better and wins >= _WINS * len(hedged) and share <= _TIME,
    }


def against_published(folder: Path, setting: Setting) -> dict[str, Any]:
    """A search by AUC on Frappe, two workers, beside the published FinalMLP settings, both on the validation rows."""
    out = folder / "published"
    if not (out / "report.json").is_file():
        config = SearchConfig(metric="auc", budget=setting.frappe_seconds)
        search(Store.open(folder / "store"), out, config=config, workers=2, resume=out.exists())
    best = json.loads((out / "report.json").read_text(encoding="utf-8"))["leaderboard"][0]
    published = json.loads(PUBLISHED.read_text(encoding="utf-8"))["valid"]["auc"]
    return {
        "search": best["auc"],
        "model": best["name"],
        "final_mlp": published,
        "holds": best["auc"]["mean"] >= published["mean"],
    }
