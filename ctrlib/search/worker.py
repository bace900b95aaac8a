"""The trials of a search: the processes that run them, and how a trial climbs from rung to rung."""

from __future__ import annotations

import logging
import math
import multiprocessing
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import optuna
import torch
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ctrlib.config import ConfigError, check_choice, positive
from ctrlib.search.budget import Budget
from ctrlib.search.fidelity import active_rungs, best_after_one_epoch, lifted, one_epoch, promotes, unchecked
from ctrlib.search.sampling import (
    GRACE,
    TOO_SLOW,
    Method,
    failure,
    mark_as_own,
    opened_storage,
    origin,
    others_of,
    sampler_for,
    take_up_lost,
    trial_scores,
)
from ctrlib.search.space import MODELS, AutoSpace, Candidate, Portfolio, Space, candidate_of
from ctrlib.search.trials import (
    Metric,
    OutOfTimeError,
    Stores,
    latency_ms,
    settled,
    sign,
    train_on,
    trial_seed,
    untrained,
)

_log = logging.getLogger("ctrlib")
_POLL_SECONDS = 1.0
_RESTARTS = 3  # of a worker that died
_UNRESTRICTED = 4  # of so many trials, one trains for as long as its settings say, lest one epoch is thought enough for ever


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
class Work:
    """All that a worker needs to know; it goes to other processes. ``began``: of ``time.time()``, less what was used before."""

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
    clock: str  # attribute of the study that keeps what was used

    def tick(self, study: Study) -> None:
        """Keep what was used until now, for a call that resumes this one."""
        study.set_user_attr(self.clock, time.time() - self.began)

    @contextmanager
    def open(self) -> Iterator[Study]:
        """The study, as this process sees it."""
        with opened_storage(self.storage, self.journal) as storage:
            yield optuna.load_study(study_name=self.study, storage=storage)


@contextmanager
def quiet() -> Iterator[None]:
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


def run_workers(work: Work, workers: int) -> None:
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
                    with work.open() as study:
                        take_up_lost(study)
                    processes.append(context.Process(target=_worker, args=(work, threads, os.getpid())))
                    processes[-1].start()
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join()
        raise


def wait_for_others(study: Study, work: Work) -> bool:
    """Wait until no trial of another process or machine is at work, so that all of them compare the same trials in the end;
    whether one is left to be taken up.

    Not for ever: for three times as long as the longest trial so far, and the time after which a silent worker counts as dead;
    nor beyond the time that is kept for comparing the best.
    """
    trials = study.get_trials(deepcopy=False)
    longest = max((float(t.user_attrs.get("seconds", 0.0)) for t in trials), default=0.0)
    patience = GRACE + 3 * longest
    if work.budget.seconds is not None:
        patience = min(patience, work.budget.left(time.time() - work.began, _whole(trials)))
    deadline = time.monotonic() + patience
    while True:
        with warnings.catch_warnings():  # heartbeats are experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            optuna.storages.fail_stale_trials(study)
        take_up_lost(study)
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        if not any("worker" in t.user_attrs for t in running) or time.monotonic() > deadline:
            break
        time.sleep(_POLL_SECONDS)
    return bool(study.get_trials(deepcopy=False, states=(TrialState.WAITING,)))


def _worker(work: Work, threads: int, parent: int) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(threads)
    with quiet():
        run_trials(work, parent)


def run_trials(work: Work, parent: int | None = None) -> None:
    """Trials until the budget is spent, or the process that began this one is gone."""
    with work.open() as study:
        _run_trials(study, work, parent)


def _run_trials(study: Study, work: Work, parent: int | None) -> None:
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
            sign=direction,
            rungs=len(work.rungs),
            portfolio=draws,
        )
        study.optimize(lambda trial: _objective(trial, work), n_trials=1, catch=(Exception,))
        work.tick(study)


def _counts(trial: FrozenTrial) -> bool:
    """Whether a trial is one of those the budget pays for: not one that was cut off, and is taken up by another."""
    if trial.state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.RUNNING):
        return True
    return trial.state == TrialState.FAIL and failure(trial) is not None


def _whole(trials: Sequence[FrozenTrial]) -> list[float]:
    """Seconds on all rows, of trials that were there."""
    return [float(t.user_attrs["whole_seconds"]) for t in trials if "whole_seconds" in t.user_attrs]


def _objective(trial: optuna.Trial, work: Work) -> float:
    """The metric of one trial, on all rows.

    Raises:
        RepeatedTrialError: another trial takes up the same lost one.
        optuna.TrialPruned: it did not go on from a rung, is too slow, or out of time.
        Exception: the settings cannot be trained; the reason is kept with the trial.
    """
    mark_as_own(trial)
    started = time.monotonic()
    try:
        candidate = candidate_of(work.space(trial))
        trial.set_user_attr("name", candidate.name)
        return _climb(trial, candidate, work)
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
        trial.set_user_attr("at", time.time() - work.began)


def _deadline(work: Work, whole: Sequence[float]) -> tuple[float | None, bool]:
    """Until when, of ``time.monotonic()``, a trial may train that begins now; and whether one that does not make it is too slow
    for the budget, or the budget all but spent."""
    used = time.time() - work.began
    longest = work.budget.longest_trial(used, whole)
    if longest is None:
        return None, False
    left = work.budget.left(used, whole)
    return time.monotonic() + min(longest, left), longest <= left


def after_one_epoch(trials: Sequence[FrozenTrial], work: Work) -> tuple[list[bool], list[float]]:
    """Of the trials that trained longer: whether they were at their best after one epoch, and their scores."""
    longer = [t for t in trials if "one_epoch" in t.user_attrs]
    scores = lifted(trial_scores(longer, sign(work.config.metric)), len(work.rungs))
    return [bool(t.user_attrs["one_epoch"]) for t in longer], scores


def _climb(trial: optuna.Trial, candidate: Candidate, work: Work) -> float:
    """Train on one rung after the other."""
    config, study = work.config, trial.study
    others = others_of(study, trial.number)
    known = trial.user_attrs.get("single_epoch")  # of a trial that goes on as it began
    if known is None:
        known = trial.number % _UNRESTRICTED != 0 and one_epoch(*after_one_epoch(others, work))
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
    whole = _whole(others)
    deadline, too_slow = _deadline(work, whole)
    done = {int(rung): value for rung, value in trial.user_attrs.get("rungs", {}).items()}
    active = active_rungs(len(work.rungs), trial_scores(others, sign(config.metric)))
    value, checks = math.nan, list[bool]()
    for rung in active:
        seconds = 0.0
        if rung in done:
            value = done[rung]
        else:
            seed = trial_seed(config.seed, origin(trial.user_attrs, trial.number))
            try:
                outcome = train_on(store, run, work.rungs[rung], metric=config.metric, seed=seed, deadline=deadline)
            except OutOfTimeError:
                trial.set_user_attr(TOO_SLOW, too_slow)
                raise
            value, seconds = outcome.value, outcome.seconds
            noise = study.user_attrs.get("noise")
            if run.fit.epochs > 1 and noise is not None:
                curve = [(epoch, sign(config.metric) * reached) for epoch, reached in outcome.curve]
                checks.append(best_after_one_epoch(curve, float(noise)))
                trial.set_user_attr("one_epoch", checks[-1])
            if rung == active[-1]:
                trial.set_user_attr("whole_seconds", outcome.seconds)
                trial.set_user_attr("metrics", outcome.metrics)
        trial.report(value, rung)
        _log.info(
            "trial %d, %s, on %.3g of the rows: %s %.5f", trial.number, candidate.name, work.rungs[rung], config.metric, value
        )
        if rung != active[-1]:
            needed = seconds / work.rungs[rung]
            if whole and deadline is not None and time.monotonic() + needed > deadline:  # others have the time
                trial.set_user_attr(TOO_SLOW, too_slow)
                raise OutOfTimeError(f"all rows would take about {needed:.3g} s, more than the budget allows for one trial")
            # settings that are too slow for all rows keep nobody from them
            rivals = [t for t in others_of(study, trial.number) if not t.user_attrs.get(TOO_SLOW)]
            scores = trial_scores(rivals, sign(config.metric))
            above = active[active.index(rung) + 1]
            if above != active[-1] and unchecked(scores, rung, above):  # it may mislead: the next one, of few rows, tells
                continue
            reached = [s[rung] for s in scores if rung in s]
            if not promotes(sign(config.metric) * value, reached, float(study.user_attrs.get("noise") or 0.0)):
                raise optuna.TrialPruned(f"not among the best third on {work.rungs[rung]:.3g} of the rows")
    return value
