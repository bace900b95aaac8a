"""The end of a search: the best settings trained again with several seeds, compared, tested once, and handed over."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ctrlib import artifact
from ctrlib.config import ConfigError
from ctrlib.data.loader import EVALUATION_ROWS, Loader
from ctrlib.experiment import train
from ctrlib.files import WRITER, discard_unfinished, json_text, new_folder, write_json
from ctrlib.schema import DataError
from ctrlib.search.leaderboard import write_report
from ctrlib.search.space import Candidate, Fixed, Space, candidate_of
from ctrlib.search.trials import Metric, Stores, latency_ms, settled, sign
from ctrlib.training import TrainingDivergedError, evaluate

_log = logging.getLogger("ctrlib")
_POLL_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Finalist:
    """Settings that are trained again.

    Attributes:
        number: of the trial; ``value``: its metric.
        main: one of the best, compared over all seeds; else a point of the front of quality, latency and size, with one seed.
    """

    number: int
    name: str
    params: Mapping[str, Any]
    value: float
    single_epoch: bool
    latency_ms: float
    parameters: int
    main: bool

    def candidate(self, space: Space) -> Candidate:
        """Of these parameters."""
        return candidate_of(space(Fixed(self.params)))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    finalist: Finalist
    space: Space
    stores: Stores
    metric: Metric
    seed: int
    out: Path


def finish(
    finalists: Sequence[Finalist],
    space: Space,
    stores: Stores,
    target: Path,
    *,
    metric: Metric,
    seeds: int,
    seed: int,
    workers: int,
    facts: Mapping[str, Any],
) -> dict[str, Any]:
    """Train, choose by the mean over seeds on the validation rows, test, and write the report.

    What is finished at ``target`` is not done again.

    Raises:
        ConfigError: no finalist could be trained.
    """
    folders = {finalist.number: _folder(target / "finish", finalist, str(facts["study"])) for finalist in finalists}
    tasks = [
        _Task(
            finalist=finalist,
            space=space,
            stores=stores,
            metric=metric,
            seed=seed + i,
            out=folders[finalist.number] / f"seed-{seed + i}",
        )
        for finalist in finalists
        for i in range(seeds if finalist.main else 1)
    ]
    _run_all(tasks, workers)
    entries = [entry for f in finalists if (entry := _entry(f, [t for t in tasks if t.finalist == f], metric)) is not None]
    ranked = sorted((e for e in entries if e["main"]), key=lambda e: -sign(metric) * float(e[metric]["mean"]))
    if not ranked:
        raise ConfigError(f"none of the {len(finalists)} best settings could be trained again; see {target / 'finish'}")
    best, others = ranked[0], [e for e in entries if not e["main"]]
    front = pareto([*ranked, *others], metric)
    tested = _tested(target, best, front, tasks)
    report: dict[str, Any] = {
        **facts,
        "best": best["trial"],
        "artifact": "best",
        "test": tested[best["trial"]],
        "leaderboard": ranked,
        "pareto": [{**e, "test": tested[e["trial"]]} for e in front],
        "runner_up": None if len(ranked) < 2 else _paired(best, ranked[1], metric),
    }
    _hand_over(target, folders[best["trial"]], best, metric)
    write_report(report, target)
    return report


def trained_again(target: Path, finalists: Sequence[Finalist], study: str, seeds: int) -> set[int]:
    """The numbers of those of which an earlier call trained every seed."""
    found = set()
    for finalist in finalists:
        folder, _ = _place(target / "finish", finalist, study)
        if len(list(folder.glob("seed-*/metrics.json"))) >= seeds:
            found.add(finalist.number)
    return found


def _folder(parent: Path, finalist: Finalist, study: str) -> Path:
    """Where the runs of a finalist are; made where it is not there."""
    folder, holds = _place(parent, finalist, study)
    path = folder / "settings.json"
    if not path.is_file():  # new, or of a version that did not write it
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, holds)
    return folder


def _place(parent: Path, finalist: Finalist, study: str) -> tuple[Path, dict[str, Any]]:
    """A folder by the trial's number, which says what it holds, and what this one holds or is to hold.

    The trial of that number of another storage had other settings; its runs stay where they are.
    """
    holds = json.loads(json_text({"study": study, "params": dict(finalist.params), "single_epoch": finalist.single_epoch}))
    again = 0
    while True:
        folder = parent / (f"trial-{finalist.number}" + (f"-{again}" if again else ""))
        path = folder / "settings.json"
        if not path.is_file() or json.loads(path.read_text(encoding="utf-8")) == holds:
            return folder, holds
        again += 1


def _run_all(tasks: Sequence[_Task], workers: int) -> None:
    left = [t for t in tasks if not (t.out / "metrics.json").is_file() and not _failure(t.out).is_file()]
    if workers == 1 or len(left) < 2:
        _run_some(left)
        return
    context = multiprocessing.get_context("spawn")
    threads = max(1, (os.cpu_count() or 1) // workers)
    processes = [
        context.Process(target=_run_some, args=(left[i::workers], threads, os.getpid())) for i in range(min(workers, len(left)))
    ]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except BaseException:
        for process in processes:
            process.terminate()
            process.join()
        raise
    _run_some([t for t in left if not (t.out / "metrics.json").is_file() and not _failure(t.out).is_file()])


def _run_some(tasks: Sequence[_Task], threads: int | None = None, parent: int | None = None) -> None:
    if threads is not None:  # a process of its own
        logging.basicConfig(level=logging.INFO, format="%(message)s")
        torch.set_num_threads(threads)
    for task in tasks:
        if parent is not None and os.getppid() != parent:  # nobody waits for it, and the search may be begun anew
            return
        if _wait_for_writer(task.out):
            continue
        candidate = task.finalist.candidate(task.space)
        run = settled(candidate.run, task.metric, task.finalist.single_epoch)
        discard_unfinished(task.out)
        _log.info("training the settings of trial %d again, seed %d", task.finalist.number, task.seed)
        try:
            report = train(task.stores.of(candidate), run, task.out, name=candidate.name, seed=task.seed, test=False)
        except (ConfigError, DataError, TrainingDivergedError) as error:
            _log.info("trial %d, seed %d failed: %s", task.finalist.number, task.seed, error)
            discard_unfinished(task.out)
            task.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(_failure(task.out), {"reason": f"{type(error).__name__}: {error}"})
            continue
        if report["interrupted"]:
            shutil.rmtree(task.out)
            raise KeyboardInterrupt


def _wait_for_writer(out: Path) -> bool:
    """Wait for the process of a search that was killed, if it is still at work on a run; whether it finished the run."""
    part = out.with_name(out.name + ".part")
    said = False
    while True:
        with suppress(FileNotFoundError):  # the writer came to its end just now
            discard_unfinished(out)
        if not (part / WRITER).is_file():
            if part.exists():  # the writer is between its last two steps
                time.sleep(_POLL_SECONDS)
            return (out / "metrics.json").is_file()
        if not said:
            _log.info("another process is at work on %s; waiting for its end", out)
            said = True
        time.sleep(_POLL_SECONDS)


def _failure(out: Path) -> Path:
    return out.with_name(out.name + ".failed.json")


def _entry(finalist: Finalist, tasks: Sequence[_Task], metric: Metric) -> dict[str, Any] | None:
    """A line of the leaderboard; ``None`` if no seed could be trained."""
    runs = {
        task.seed: json.loads((task.out / "metrics.json").read_text(encoding="utf-8"))
        for task in tasks
        if (task.out / "metrics.json").is_file()
    }
    if not runs:
        return None
    first = next(task for task in tasks if task.seed in runs)
    candidate = finalist.candidate(first.space)
    # measured anew, once: while trials ran side by side, they were in each other's way
    path = first.out.parent / "latency.json"
    if not path.is_file():
        write_json(path, {"ms": latency_ms(artifact.load(first.out).model, first.stores.of(candidate))})
    measured = float(json.loads(path.read_text(encoding="utf-8"))["ms"])
    return {
        "trial": finalist.number,
        "name": finalist.name,
        "main": finalist.main,
        "params": dict(finalist.params),
        "search": finalist.value,
        **{m: _mean_std([run["valid"][m] for run in runs.values()]) for m in ("auc", "log_loss")},
        "by_seed": {str(seed): run["valid"][metric] for seed, run in runs.items()},
        "parameters": finalist.parameters,
        "bytes": sum(p.stat().st_size for p in (first.out / "artifact").rglob("*") if p.is_file()),
        "latency_ms": measured,
        "seconds": statistics.fmean(run["seconds"] for run in runs.values()),
        "artifact": str((first.out / "artifact").relative_to(first.out.parents[2])),
        "failed_seeds": len(tasks) - len(runs),
    }


def pareto(entries: Sequence[Mapping[str, Any]], metric: Metric) -> list[dict[str, Any]]:
    """The entries that no other one matches in quality, latency and size while it is better in one; best quality first."""

    def point(entry: Mapping[str, Any]) -> tuple[float, float, float]:
        return sign(metric) * float(entry[metric]["mean"]), -float(entry["latency_ms"]), -float(entry["bytes"])

    points = [point(entry) for entry in entries]
    front = [
        dict(entry)
        for entry, mine in zip(entries, points, strict=True)
        if not any(other != mine and all(x >= y for x, y in zip(other, mine, strict=True)) for other in points)
    ]
    return sorted(front, key=lambda entry: -point(entry)[0])


def _tested(
    target: Path, best: Mapping[str, Any], front: Sequence[Mapping[str, Any]], tasks: Sequence[_Task]
) -> dict[int, dict[str, Any]]:
    """Metrics of the test rows, of the best and of every point of the front, by trial: read here, once.

    ``test.json`` keeps them by folder and seeds.
    """
    path = target / "test.json"
    kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    found = {}
    for entry in [best, *front]:
        number, seeds = int(entry["trial"]), list(entry["by_seed"])
        mine = [task for task in tasks if task.finalist.number == number and str(task.seed) in seeds]
        key = f"{mine[0].out.parent.name}, seeds {', '.join(seeds)}"
        if key not in kept:
            store = mine[0].stores.of(mine[0].finalist.candidate(mine[0].space))
            runs = [
                evaluate(
                    artifact.load(task.out).model,
                    Loader(store.split("test"), EVALUATION_ROWS),
                    label_names=store.encoder.schema.labels,
                )
                for task in mine
            ]
            kept[key] = {m: _mean_std([run[m] for run in runs]) for m in ("auc", "log_loss")}
        found[number] = kept[key]
    write_json(path, kept)
    return found


def _paired(best: Mapping[str, Any], other: Mapping[str, Any], metric: Metric) -> dict[str, Any]:
    """By how much the best is ahead of another one, seed by seed."""
    both = [seed for seed in best["by_seed"] if seed in other["by_seed"]]
    ahead = [sign(metric) * (best["by_seed"][seed] - other["by_seed"][seed]) for seed in both]
    return {"trial": other["trial"], "ahead": _mean_std(ahead) if ahead else None, "seeds": len(both)}


def _hand_over(target: Path, folder: Path, best: Mapping[str, Any], metric: Metric) -> None:
    """Copy the artifact of the best seed of the best settings to ``best/``."""
    seed = max(best["by_seed"], key=lambda s: sign(metric) * float(best["by_seed"][s]))
    source, chosen = folder / f"seed-{seed}" / "artifact", target / "best"
    shutil.rmtree(chosen, ignore_errors=True)
    discard_unfinished(chosen)
    with new_folder(chosen) as part:
        shutil.copytree(source, part, dirs_exist_ok=True)


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return {"mean": statistics.fmean(values), "std": spread}
