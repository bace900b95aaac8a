"""AutoML: a search over models and how to train them, within a budget, by any number of workers; resumable. Uses Optuna."""

from __future__ import annotations

import hashlib
import json
import logging
import math
import multiprocessing
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import optuna
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ctrlib.config import ConfigError, check_choice, positive, to_json
from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, RunConfig, configure, open_store, torch_device
from ctrlib.files import discard_unfinished, json_text, new_folder, write_json
from ctrlib.models.presets import preset
from ctrlib.schema import DataError, DenseField
from ctrlib.search.budget import Budget, seconds_of
from ctrlib.search.fidelity import active_rungs, best_after_one_epoch, fractions, one_epoch, promotes
from ctrlib.search.finish import Finalist, finish
from ctrlib.search.sampling import Method, here, open_storage, others_of, sampler_for, take_up_lost, trial_scores
from ctrlib.search.select import described
from ctrlib.search.space import MODELS, AutoSpace, Candidate, Fixed, Portfolio, Space, candidate_of
from ctrlib.search.trials import (
    Metric,
    OutOfTimeError,
    Stores,
    estimate,
    latency_ms,
    settled,
    sign,
    train_on,
    trial_seed,
    untrained,
)

__all__ = ["MODELS", "SearchConfig", "Space", "search", "seconds_of", "tune"]

_log = logging.getLogger("ctrlib")
_NOISE_SEEDS = 3
_RESTARTS = 3  # of a worker that died
_PARETO_EXTRA = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class SearchConfig:
    """What to search for, and for how long.

    Args:
        metric: of the validation rows, to improve.
        method: ``hedged``: a portfolio, hedged, then a model of the trials (:class:`~ctrlib.search.hedge.Hedge`); ``tpe``:
            Optuna's, grouped and multivariate; ``random``.
        models: names of presets, and ``blocks``; of the default space only.
        budget: seconds of wall clock, the comparison at the end included; ``None``: no limit.
        trials: how many at most; ``None``: no limit. One of the two is needed. Workers side by side may add one trial each.
        latency_ms: a model that takes longer for 100 rows in one batch, on this machine, is not trained; ``None``: no limit.
        finalists: settings that are trained again on all rows; ``finish_seeds``: with how many seeds. Fewer, where the budget
            has no time for them.
        smallest: rows of the lowest rung at least.
        seed: of everything.
        device: see :class:`~ctrlib.experiment.RunConfig`; of the default space.
    """

    metric: Metric = "log_loss"
    method: Method = "hedged"
    models: tuple[str, ...] = MODELS
    budget: float | None = None
    trials: int | None = None
    latency_ms: float | None = None
    finalists: int = 5
    finish_seeds: int = 3
    smallest: int = 10_000
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_choice("metric", self.metric, get_args(Metric))
        check_choice("method", self.method, get_args(Method))
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        positive("smallest", self.smallest)
        if self.latency_ms is not None:
            positive("latency_ms", self.latency_ms)
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; expected 0 or more")
        self.spending(1)
        AutoSpace(models=self.models)

    def spending(self, workers: int) -> Budget:
        """The budget of so many workers."""
        return Budget(
            seconds=self.budget, trials=self.trials, finalists=self.finalists, seeds=self.finish_seeds, workers=workers
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    """All that a worker needs to know; it goes to other processes."""

    config: SearchConfig
    budget: Budget
    space: Space
    portfolio: bool
    stores: Stores
    rungs: tuple[float, ...]
    storage: str | None
    journal: Path
    study: str
    began: float  # of time.time(), less what earlier calls have used

    def open(self) -> Study:
        return optuna.load_study(study_name=self.study, storage=open_storage(self.storage, self.journal))


def search(
    data: object,
    out: str | Path,
    options: DataOptions | None = None,
    *,
    config: SearchConfig,
    space: Space | None = None,
    storage: str | None = None,
    workers: int = 1,
    resume: bool = False,
) -> dict[str, Any]:
    """Find the model, and the training of it, that do best on the validation rows within a budget; train it, and compare.

    The test rows are read once, at the very end, by the models that are handed over.

    Args:
        data: raw rows or a store, see :func:`ctrlib.experiment.train`. Minimum counts and numeric encodings are searched over
            only where it is a path of raw rows.
        out: folder: ``store/``, ``study.journal`` (unless there is a ``storage``), ``finish/`` with the runs of the finalists,
            ``best/``, the artifact of the best, ``report.json``, ``report.md``, ``report.html``, ``curve.png``.
        options: see :class:`~ctrlib.experiment.DataOptions`.
        config: see :class:`SearchConfig`.
        space: ``space(trial)`` → :class:`~ctrlib.search.space.Candidate` or :class:`~ctrlib.experiment.RunConfig`; ``None``:
            :class:`~ctrlib.search.space.AutoSpace`. With several workers it must be a function of an imported module.
        storage: URL of a data base that several machines share, e.g. ``postgresql://…``: the same call on each of them, with an
            ``out`` of its own, works on one study. ``None``: a journal file in ``out``.
        workers: processes on this machine.
        resume: go on with the search at ``out``; its budget counts what was used before.

    Returns:
        What ``report.json`` holds.

    Raises:
        ConfigError: unknown options; the budget is too small for one trial; a latency limit that no model meets; the storage
            cannot be reached; ``out`` holds another search; no trial succeeded.
        DataError: see :func:`ctrlib.experiment.train`; ``out`` exists, and not ``resume``.
    """
    options, target = options or DataOptions(), Path(out)
    positive("workers", workers)
    budget = config.spending(workers)
    torch_device(config.device)
    asked = {name: value for name, value in to_json(config).items() if name not in ("budget", "trials")}
    asked |= {"space": "auto" if space is None else _name(space), "data": described(data, options)}
    study_name = "ctrlib-" + hashlib.sha256(json_text(asked).encode()).hexdigest()[:16]
    if storage is not None:
        open_storage(storage, target)  # before anything is written
    new = _claim(target, asked, resume)
    try:
        store = _store(data, target, options)
        if space is None:
            _check_latency(config, store)
    except BaseException:
        if new:  # there is nothing in it to go on with
            shutil.rmtree(target)
        raise
    searched = space or _auto(config, store, _raw(data, options) is not None)
    work = _Work(
        config=config,
        budget=budget,
        space=searched,
        portfolio=space is None,
        stores=Stores(base=store.path, folder=target / "stores", raw=_raw(data, options)),
        rungs=fractions(store.rows["train"], config.smallest),
        storage=storage,
        journal=target / "study.journal",
        study=study_name,
        began=time.time(),
    )
    with _quiet():
        study = optuna.create_study(
            study_name=study_name,
            storage=open_storage(storage, work.journal),
            direction="minimize" if config.metric == "log_loss" else "maximize",
            load_if_exists=True,
        )
        lost = take_up_lost(study)
        if lost:
            _log.info("%d trials were cut off; they are taken up again", lost)
        if not study.get_trials(deepcopy=False):
            first = _default(work)
            budget.check(estimate(store, first, work.rungs[0]), estimate(store, first, 1.0))
        work = replace(work, began=time.time() - _used(study, workers))
        if "noise" not in study.user_attrs:
            study.set_user_attr("noise", _noise(work, store))
        _run_workers(work, workers)
        return finish(
            _finalists(study, work),
            work.space,
            work.stores,
            target,
            metric=config.metric,
            seeds=config.finish_seeds,
            seed=config.seed,
            workers=workers,
            facts=_facts(study, work),
        )


tune = search
"""The name at the top of the package, where ``ctrlib.search`` is the package of searches."""


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a line of Optuna, or of every epoch, for every trial: one line of ours says it."""

    def no_epochs(record: logging.LogRecord) -> bool:
        return record.module != "training"

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    _log.addFilter(no_epochs)
    try:
        yield
    finally:
        _log.removeFilter(no_epochs)
        optuna.logging.set_verbosity(before)


def _name(space: Space) -> str:
    return f"{getattr(space, '__module__', '')}.{getattr(space, '__qualname__', type(space).__qualname__)}"


def _claim(target: Path, asked: Mapping[str, Any], resume: bool) -> bool:
    """Make the folder (then it is new), or see that what is in it is this very search."""
    path = target / "search.json"
    if not target.exists():
        with new_folder(target) as part:
            write_json(part / path.name, asked)
        return True
    if not path.is_file():
        raise DataError(f"{target} exists already, and is not a search to go on with; choose another folder, or remove it")
    if not resume:
        raise DataError(f"{target} holds a search already; go on with it (--resume), or choose another folder")
    if json.loads(path.read_text(encoding="utf-8")) != json.loads(json_text(asked)):
        raise ConfigError(f"{target} holds a search with other settings or of other data (see {path}); choose another folder")
    return False


def _store(data: object, target: Path, options: DataOptions) -> Store:
    prepared = target / "store"
    if not Store.is_store(prepared):
        discard_unfinished(prepared)
    store = Store.open(prepared) if Store.is_store(prepared) else open_store(data, prepared, options)
    missing = [split for split in ("train", "valid", "test") if split not in store.rows]
    if missing:
        raise DataError(f"a search needs training, validation and test rows; store {store.path} has no {', '.join(missing)}")
    return store


def _raw(data: object, options: DataOptions) -> tuple[str, DataOptions] | None:
    """Raw rows that can be read again, by any process."""
    rows = [rows for rows in (data, options.valid, options.test) if rows is not None]
    if not all(isinstance(r, str | Path) and not Store.is_store(r) for r in rows):
        return None
    return str(data), options


def _auto(config: SearchConfig, store: Store, encodes: bool) -> AutoSpace:
    encoder = store.encoder
    return AutoSpace(
        models=config.models,
        rows=store.rows["train"],
        table_rows=sum(v.size for v in encoder.vocabularies.values()),
        encodes=encodes,
        numbers=any(isinstance(f, DenseField) for f in encoder.schema.fields),
        device=config.device,
    )


def _check_latency(config: SearchConfig, store: Store) -> None:
    """Logistic regression is the fastest model there is."""
    if config.latency_ms is None:
        return
    run = RunConfig(model=preset("lr"), device=config.device)
    fastest = latency_ms(untrained(store, run.model, run), store)
    if fastest > config.latency_ms:
        raise ConfigError(
            f"latency_ms is {config.latency_ms:g}, and logistic regression, the fastest model, takes {fastest:.3g} ms for 100 "
            "rows here; expected a limit above that"
        )


def _default(work: _Work) -> RunConfig:
    """What the noise of seeds and the time of a trial are measured with."""
    if work.portfolio:
        draws = Portfolio().draws(work.space)
        if draws:
            candidate = candidate_of(work.space(Fixed(draws[0].params)))
            return settled(candidate.run, work.config.metric, False)
    return settled(configure("dnn", options={"device": work.config.device}, epochs=5), work.config.metric, False)


def _used(study: Study, workers: int) -> float:
    """Seconds that the trials before this call took of the budget."""
    return sum(float(t.user_attrs.get("seconds", 0.0)) for t in study.get_trials(deepcopy=False)) / workers


def _noise(work: _Work, store: Store) -> float:
    """Standard deviation of the metric over seeds, of one and the same settings on the lowest rung."""
    run, metric = _default(work), work.config.metric
    _log.info("noise of seeds, on %.3g of the rows", work.rungs[0])
    values = [
        train_on(store, run, work.rungs[0], metric=metric, seed=trial_seed(work.config.seed, 2**31 + i)).value
        for i in range(_NOISE_SEEDS)
    ]
    return statistics.stdev(values)


def _run_workers(work: _Work, workers: int) -> None:
    if workers == 1:
        run_trials(work)
        return
    context = multiprocessing.get_context("spawn")  # a fork would inherit threads in the middle of things
    threads = max(1, (os.cpu_count() or 1) // workers)
    processes = [context.Process(target=_worker, args=(work, threads, os.getpid())) for _ in range(workers)]
    restarts = 0
    try:
        for process in processes:
            process.start()
        while processes:
            for process in list(processes):
                process.join(timeout=0.2)
                if process.exitcode is None:
                    continue
                processes.remove(process)
                if process.exitcode != 0 and restarts < _RESTARTS:
                    restarts += 1
                    _log.info("a worker ended with status %s; another takes up its trial", process.exitcode)
                    take_up_lost(work.open())
                    processes.append(context.Process(target=_worker, args=(work, threads, os.getpid())))
                    processes[-1].start()
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        raise


def _worker(work: _Work, threads: int, parent: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    with _quiet():
        run_trials(work, parent)


def run_trials(work: _Work, parent: int | None = None) -> None:
    """Trials until the budget is spent, or the process that began this one is gone."""
    study = work.open()
    draws = Portfolio().draws(work.space) if work.portfolio else []
    direction = sign(work.config.metric)
    while parent is None or os.getppid() == parent:
        trials = study.get_trials(deepcopy=False)
        waiting = any(t.state == TrialState.WAITING for t in trials)
        counted = sum(_counts(t) for t in trials)
        if work.budget.over(time.time() - work.began, counted, _whole(trials)) and not (
            waiting and work.budget.seconds is None
        ):
            return
        study.sampler = sampler_for(
            work.config.method,
            work.space,
            seed=work.config.seed,
            number=len(trials),
            sign=direction,
            rungs=len(work.rungs),
            portfolio=draws,
        )
        study.optimize(lambda trial: _objective(trial, work), n_trials=1, catch=(Exception,))


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those the budget pays for: not one that was cut off, and is taken up by another."""
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
        return True
    return trial.state == TrialState.FAIL and "error" in trial.user_attrs


def _whole(trials: Sequence[FrozenTrial]) -> list[float]:
    """Seconds on all rows, of trials that were there."""
    return [float(t.user_attrs["whole_seconds"]) for t in trials if "whole_seconds" in t.user_attrs]


def _objective(trial: optuna.Trial, work: _Work) -> float:
    """The metric of one trial, on all rows.

    Raises:
        optuna.TrialPruned: it did not go on from a rung, is too slow, or out of time.
        Exception: the settings cannot be trained; the reason is kept with the trial.
    """
    trial.set_user_attr("worker", here())
    started = time.monotonic()
    try:
        candidate = candidate_of(work.space(trial))
        trial.set_user_attr("name", candidate.name)
        return _climb(trial, candidate, work, started)
    except OutOfTimeError as error:
        trial.set_user_attr("stopped", str(error))
        raise optuna.TrialPruned(str(error)) from error
    except optuna.TrialPruned as error:
        trial.set_user_attr("stopped", str(error))
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        trial.set_user_attr("error", reason[:2000])
        _log.info("trial %d failed: %s", trial.number, reason)
        raise
    finally:
        trial.set_user_attr("seconds", time.monotonic() - started)


def _climb(trial: optuna.Trial, candidate: Candidate, work: _Work, started: float) -> float:
    """Train on one rung after the other."""
    config, study = work.config, trial.study
    others = others_of(study, trial.number)
    known = one_epoch([t.user_attrs["one_epoch"] for t in others if "one_epoch" in t.user_attrs])
    trial.set_user_attr("single_epoch", known)
    run = settled(candidate.run, config.metric, known)
    store = work.stores.of(candidate)
    model = untrained(store, run.model, run)
    trial.set_user_attr("parameters", sum(p.numel() for p in model.parameters()))
    measured = latency_ms(model, store)
    trial.set_user_attr("latency_ms", measured)
    if config.latency_ms is not None and measured > config.latency_ms:
        raise optuna.TrialPruned(f"100 rows take {measured:.3g} ms, more than {config.latency_ms:g} ms")
    del model
    longest = work.budget.longest_trial
    done = {int(rung): value for rung, value in trial.user_attrs.get("rungs", {}).items()}
    active = active_rungs(len(work.rungs), trial_scores(others, sign(config.metric)))
    value, checks = math.nan, []
    for rung in active:
        if rung in done:
            value = done[rung]
        else:
            outcome = train_on(
                store,
                run,
                work.rungs[rung],
                metric=config.metric,
                seed=trial_seed(config.seed, trial.user_attrs.get("continues", trial.number)),
                deadline=None if longest is None else started + longest,
            )
            value = outcome.value
            if run.fit.epochs > 1:
                curve = [(epoch, sign(config.metric) * reached) for epoch, reached in outcome.curve]
                checks.append(best_after_one_epoch(curve, float(study.user_attrs.get("noise", 0.0))))
                trial.set_user_attr("one_epoch", checks[-1])
            if rung == active[-1]:
                trial.set_user_attr("whole_seconds", outcome.seconds)
                trial.set_user_attr("metrics", outcome.metrics)
        trial.report(value, rung)
        _log.info(
            "trial %d, %s, on %.3g of the rows: %s %.5f", trial.number, candidate.name, work.rungs[rung], config.metric, value
        )
        if rung != active[-1]:
            now = trial_scores(others_of(study, trial.number), sign(config.metric))
            reached = [scores[rung] for scores in now if rung in scores]
            if not promotes(sign(config.metric) * value, reached):
                raise optuna.TrialPruned(f"not among the best third on {work.rungs[rung]:.3g} of the rows")
    return value


def _finalists(study: Study, work: _Work) -> list[Finalist]:
    """The best trials on all rows that there is time to train again, and those on the front of quality, latency and size.

    Raises:
        ConfigError: there is none; says why trials failed.
    """
    trials = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if t.value is not None]
    if not trials:
        ended = [t.user_attrs.get("error") or t.user_attrs.get("stopped") for t in study.get_trials(deepcopy=False)]
        reasons = list(dict.fromkeys(str(reason) for reason in ended if reason))
        latencies = [t.user_attrs["latency_ms"] for t in study.get_trials(deepcopy=False) if "latency_ms" in t.user_attrs]
        fastest = f" The fastest model took {min(latencies):.3g} ms." if work.config.latency_ms and latencies else ""
        raise ConfigError(f"no trial succeeded: {'; '.join(reasons[:3]) or 'there was no time for any'}.{fastest}")
    best: dict[str, FrozenTrial] = {}  # the same settings once
    for trial in sorted(trials, key=lambda t: -sign(work.config.metric) * float(t.value or 0)):
        best.setdefault(json_text(trial.params), trial)
    ranked = [_finalist(t, work, main=True) for t in best.values()]
    used = time.time() - work.began
    chosen = ranked[: work.budget.affordable(used, [float(t.user_attrs["whole_seconds"]) for t in best.values()])]
    front = [f for f in ranked if not any(_dominates(other, f, work.config.metric) for other in ranked)]
    extra = [replace(f, main=False) for f in front if f.number not in {c.number for c in chosen}]
    return [*chosen, *extra[: _PARETO_EXTRA if work.config.budget is None else 1]]


def _finalist(trial: FrozenTrial, work: _Work, main: bool) -> Finalist:
    return Finalist(
        number=trial.number,
        name=str(trial.user_attrs["name"]),
        params=dict(trial.params),
        value=float(trial.value or 0.0),
        single_epoch=bool(trial.user_attrs["single_epoch"]),
        latency_ms=float(trial.user_attrs["latency_ms"]),
        parameters=int(trial.user_attrs["parameters"]),
        main=main,
    )


def _dominates(a: Finalist, b: Finalist, metric: Metric) -> bool:
    first, second = ((sign(metric) * f.value, -f.latency_ms, -f.parameters) for f in (a, b))
    return all(x >= y for x, y in zip(first, second, strict=True)) and first != second


def _facts(study: Study, work: _Work) -> dict[str, Any]:
    """What the report says of the search itself."""
    trials = study.get_trials(deepcopy=False)
    scores = trial_scores(others_of(study), sign(work.config.metric))
    active = active_rungs(len(work.rungs), scores)
    complete = [t for t in trials if t.state == TrialState.COMPLETE]
    begin = min((t.datetime_start for t in trials if t.datetime_start is not None), default=None)
    curve = [
        {"seconds": (t.datetime_complete - begin).total_seconds(), "trial": t.number, "value": t.value}
        for t in sorted(complete, key=lambda t: t.number)
        if t.datetime_complete is not None and begin is not None
    ]
    return {
        "metric": work.config.metric,
        "method": work.config.method,
        "study": work.study,
        "trials": {state.name.lower(): sum(t.state == state for t in trials) for state in TrialState},
        "rungs": [{"share": share, "used": i in active} for i, share in enumerate(work.rungs)],
        "noise": study.user_attrs.get("noise"),
        "one_epoch": one_epoch([t.user_attrs["one_epoch"] for t in trials if "one_epoch" in t.user_attrs]),
        "importance": _importance(study, complete),
        "curve": sorted(curve, key=lambda point: float(point["seconds"] or 0)),
        "failures": [
            {"trial": t.number, "params": t.params, "reason": t.user_attrs["error"]} for t in trials if "error" in t.user_attrs
        ],
        "stopped": [
            {"trial": t.number, "name": t.user_attrs.get("name"), "reason": t.user_attrs["stopped"]}
            for t in trials
            if "stopped" in t.user_attrs
        ],
        "lost": sum("continues" in t.user_attrs for t in trials),
    }


def _importance(study: Study, complete: Sequence[FrozenTrial]) -> dict[str, float]:
    """Of the parameters that all trials on all rows have, by PED-ANOVA (arXiv:2304.10255); empty of fewer than four trials."""
    if len(complete) < 4:
        return {}
    try:
        with warnings.catch_warnings():  # that some values have few trials
            warnings.simplefilter("ignore")
            found = optuna.importance.get_param_importances(study, evaluator=optuna.importance.PedAnovaImportanceEvaluator())
    except (ValueError, RuntimeError) as error:  # such as trials of one and the same value
        _log.info("no importance of parameters: %s", error)
        return {}
    return {name: float(share) for name, share in found.items()}
