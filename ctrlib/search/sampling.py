"""What Optuna is told: samplers, storages, lost trials. Needs optuna (``pip install 'ctrlib[search]'``)."""

from __future__ import annotations

import math
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import optuna
from optuna.distributions import BaseDistribution
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.storages.journal._file import get_lock_file
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, ProgrammingError

from ctrlib.config import ConfigError
from ctrlib.files import process_began, process_runs
from ctrlib.search.fidelity import Scores, lifted
from ctrlib.search.hedge import Axis, Hedge, Params, locate, merged, standardised, transfer
from ctrlib.search.space import UNSCALED, Draw, Space

Method = Literal["hedged", "tpe", "random"]
_STARTUP = 8  # random trials before TPE
_FRESH, _NEAR, _BEST = 100, 50, 5  # candidates drawn anew, and near so many of the best
_KEEP = 0.7  # of the parameters, near the best
_JITTER = 0.1  # of the range of a number, nearer still
_FEW_AXES = 4  # up to which each has its own weight
_HEARTBEAT = 60  # seconds
GRACE = 180
"""Seconds without a sign of life after which a worker on another machine counts as dead."""
TOO_SLOW = "too_slow"
"""Attribute of a trial that was out of time: whether that was for its settings, and not for the end of the budget."""
_TRIES = 5
_KILLS = 2  # of the process of the same settings, after which they are not asked again
_REPEATS = "repeats"
_CARRIED = ("single_epoch", "one_epoch", "whole_seconds", "metrics")  # what was found on rungs that are not trained again


def tpe_sampler(seed: int) -> optuna.samplers.TPESampler:
    """TPE with everything that differs between versions of Optuna said out loud.

    ``multivariate`` with ``group``: parameters that are there together are sampled together, so that settings of one block do
    not speak for those of another; without ``group`` only parameters of all trials would be. ``constant_liar``: workers side
    by side do not all try the same.
    """
    with warnings.catch_warnings():  # that these options are experimental
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            seed=seed, n_startup_trials=_STARTUP, multivariate=True, group=True, constant_liar=True
        )


class SeededTPE(optuna.samplers.BaseSampler):
    """:func:`tpe_sampler` with a seed for every trial, of its number: the same after a restart, and no two workers have one."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._inner = tpe_sampler(seed)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Begin anew."""
        self._inner = tpe_sampler(int(np.random.SeedSequence([self._seed, trial.number]).generate_state(1)[0]))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """That of TPE."""
        return self._inner.infer_relative_search_space(study, trial)

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """That of TPE."""
        return self._inner.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """That of TPE."""
        return self._inner.sample_independent(study, trial, param_name, param_distribution)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        """That of TPE."""
        self._inner.after_trial(study, trial, state, values)


class HedgedSampler(optuna.samplers.BaseSampler):
    """:class:`~ctrlib.search.hedge.Hedge` over candidates drawn from a space, as a sampler; also random search.

    Every choice depends on the seed, the number of the trial and the trials before it only, so it is the same after a restart.

    Args:
        space: that the trials ask.
        seed: of the search.
        sign: of the study's value, see :func:`ctrlib.search.trials.sign`.
        rungs: how many there are.
        portfolio: settings to begin with; the earlier, the better. The first two are tried whatever the trials say, right
            before and right after the random ones that a hedge begins with.
        hedge: ``None``: every trial is at random.
    """

    def __init__(
        self, space: Space, *, seed: int, sign: float, rungs: int, portfolio: Sequence[Draw] = (), hedge: Hedge | None = None
    ) -> None:
        self._space, self._seed, self._sign, self._rungs = space, seed, sign, rungs
        self._portfolio, self._hedge = portfolio, hedge
        self._chosen: Mapping[str, object] = {}
        self._error: Exception | None = None

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Choose the settings of a trial, all at once. An error here would end the search: the trial raises it instead."""
        self._chosen, self._error = {}, None
        try:
            self._chosen = self._choice(study, trial)
        except Exception as error:
            self._error = error

    def _choice(self, study: Study, trial: FrozenTrial) -> Mapping[str, object]:
        rng = np.random.default_rng([self._seed, trial.number])
        asked_again = trial.system_attrs.get("fixed_params", {})
        if asked_again:  # of a trial that was cut off, maybe before it had all of its settings: the rest must go with them
            return self._drawn(rng, asked_again, keep=1.0).params
        others = others_of(study, trial.number)
        # the trials before this one, also those of other workers that have no settings yet
        number = sum(t.number < trial.number for t in others)
        seen = [t for t in others if t.params]
        if self._hedge is None or self._hedge.turn(number) == "random":
            return self._drawn(rng).params
        untried = [draw for draw in self._portfolio if not any(dict(t.params) == draw.params for t in seen)]
        if untried and number in (0, self._hedge.random + 1):
            return untried[0].params
        scores = trial_scores(seen, self._sign)
        values = np.array(lifted(scores, self._rungs))
        done = np.array([t.state.is_finished() for t in seen], dtype=bool)
        # settings that failed or were too slow are as bad as the worst that did not
        slow = np.array([bool(t.user_attrs.get(TOO_SLOW)) for t in seen], dtype=bool)
        values[slow] = np.nan
        values[np.isnan(values) & done] = np.nanmin(values) if not np.isnan(values).all() else 0.0
        values[~done] = np.nan
        best = [seen[i] for i in np.argsort(-np.nan_to_num(values, nan=-np.inf))[:_BEST]]
        draws = [self._drawn(rng) for _ in range(_FRESH)]
        draws += [self._drawn(rng, best[i % len(best)].params) for i in range(_NEAR) if best]
        draws += [self._drawn(rng, best[i % len(best)].params, jitter=_JITTER) for i in range(_NEAR) if best]
        draws += untried
        axes = _even(merged([draw.axes for draw in draws]))
        candidates, tried = (locate(axes, [_known(p, axes) for p in of]) for of in (_params(draws), _params(seen)))
        past = []
        if self._portfolio:
            places = locate(axes, [_known(d.params, axes) for d in self._portfolio])
            # all of it is better than chance, the first most
            past.append((places, 1 + 0.1 * standardised(-np.arange(len(self._portfolio), dtype=np.float64))))
        at = self._hedge.choose(candidates, transfer(past, candidates), tried, transfer(past, tried), values, rng, number)
        return draws[at].params

    def _drawn(self, rng: np.random.Generator, near: Params | None = None, keep: float = _KEEP, jitter: float = 0.0) -> Draw:
        draw = Draw(rng, near, keep, jitter=jitter)
        try:
            self._space(draw)
        except Exception:  # settings that cannot be: the trial that gets them says why
            return draw
        return draw

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """None: everything was chosen in :meth:`before_trial`."""
        return {}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """Nothing, as above."""
        return {}

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """What was chosen.

        Raises:
            ConfigError: nothing was; says why.
        """
        if self._error is not None:
            raise self._error
        if param_name not in self._chosen:
            raise ConfigError(
                f"the space asks for {param_name!r}, which it did not when the settings were drawn; expected a space that "
                "depends on nothing but the trial"
            )
        return self._chosen[param_name]


def _even(axes: Mapping[str, Axis]) -> dict[str, Axis]:
    """Of many parameters each counts for less: settings that agree in most of them would else have nothing in common."""
    scale = min(1.0, _FEW_AXES / max(len(axes), 1))
    return {n: a if n in UNSCALED else replace(a, weight=a.weight * scale) for n, a in axes.items()}


def _params(of: Sequence[Draw] | Sequence[FrozenTrial]) -> list[Params]:
    return [each.params for each in of]


def _known(params: Params, axes: Mapping[str, Axis]) -> dict[str, object]:
    """Without what has no place on its axis, as after a change of the space."""

    def has_place(value: object, axis: Axis) -> bool:
        return value in axis.choices if axis.choices else isinstance(value, int | float)

    return {n: v for n, v in params.items() if n in axes and has_place(v, axes[n])}


def sampler_for(
    method: Method, space: Space, *, seed: int, sign: float, rungs: int, portfolio: Sequence[Draw] = ()
) -> optuna.samplers.BaseSampler:
    """The sampler of a method."""
    if method == "tpe":
        return SeededTPE(seed)
    hedge = Hedge() if method == "hedged" else None
    return HedgedSampler(space, seed=seed, sign=sign, rungs=rungs, portfolio=portfolio, hedge=hedge)


def others_of(study: Study, number: int | None = None) -> list[FrozenTrial]:
    """The trials that count, but for one: not those that were cut off, which another one takes up."""
    trials = study.get_trials(deepcopy=False)
    return [t for t in trials if t.number != number and (t.state != TrialState.FAIL or failure(t) is not None)]


def failure(trial: FrozenTrial) -> str | None:
    """Why a trial failed for good; ``None``: it did not, or was cut off and another one takes it up, or repeats another."""
    if "error" in trial.user_attrs:
        return str(trial.user_attrs["error"])
    if trial.state != TrialState.FAIL or _REPEATS in trial.user_attrs:
        return None
    return f"its process was killed {_KILLS} times" if _kills(trial) >= _KILLS else None


def _kills(trial: FrozenTrial) -> int:
    """How often the process of these settings was killed: one that was interrupted still said how long it took."""
    earlier = int(trial.user_attrs.get("kills", "continues" in trial.user_attrs))
    return earlier + ("seconds" not in trial.user_attrs)


def trial_scores(trials: Sequence[FrozenTrial], sign: float) -> list[Scores]:
    """What each trial reached by rung, larger is better."""
    return [{rung: sign * value for rung, value in t.intermediate_values.items() if math.isfinite(value)} for t in trials]


def open_storage(url: str | None, journal: Path) -> BaseStorage:
    """A journal file, or the data base at a URL, where workers show a sign of life every minute.

    Raises:
        ConfigError: the storage cannot be reached, or its driver is not installed.
    """
    if url is None:
        _mend(journal)
        return JournalStorage(JournalFileBackend(str(journal), JournalFileOpenLock(str(journal))))
    # said out loud: the driver that SQLAlchemy takes by itself differs between its versions
    driven = url.replace("postgresql://", "postgresql+psycopg://", 1)
    try:
        with warnings.catch_warnings():  # heartbeats are experimental
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return _connected(driven)
    except Exception as error:  # each driver has its own
        shown = _without_password(url)
        reason = " ".join(str(error).replace(driven, shown).replace(url, shown).split())
        raise ConfigError(
            f"the storage {shown} cannot be reached ({type(error).__name__}: {reason:.200}); expected a URL "
            "such as postgresql://user@host/database or sqlite:///file.db, a server that runs, and its driver "
            "(pip install 'ctrlib[distributed]')"
        ) from error


@contextmanager
def opened_storage(url: str | None, journal: Path) -> Iterator[BaseStorage]:
    """:func:`open_storage`, whose connections are given back at the end."""
    storage = open_storage(url, journal)
    try:
        yield storage
    finally:
        if isinstance(storage, RDBStorage):
            storage.remove_session()
            storage.engine.dispose()


def _connected(url: str) -> RDBStorage:
    """Where several machines begin at once, one makes the tables, and the others find them half made: they try again."""
    for _ in range(_TRIES):
        try:
            return RDBStorage(url, heartbeat_interval=_HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=again)
        except (IntegrityError, ProgrammingError):
            time.sleep(1)
    return RDBStorage(url, heartbeat_interval=_HEARTBEAT, grace_period=GRACE, heartbeat_stale_trial_callback=again)


def _without_password(url: str) -> str:
    """What stands before the last ``@`` may be a password, in a URL with a slash too few as well; and so may an option."""
    scheme, found, rest = url.partition(":")
    slashes = "//" if rest.startswith("//") else ""
    shown = f"{scheme}{found}{slashes}{rest.rpartition('@')[2].removeprefix('//')}" if "@" in rest else url
    return re.sub(r"(password=)[^&]*", r"\1...", shown, flags=re.IGNORECASE)


def _mend(journal: Path) -> None:
    """Take off a last line that a process was killed in; every whole line ends in a line feed."""
    if not journal.is_file():
        return
    with get_lock_file(JournalFileOpenLock(str(journal))), journal.open("r+b") as file:
        data = file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            file.truncate(whole)


def mark_as_own(trial: optuna.Trial) -> None:
    """Say which process is at work on a trial, and see that no other trial takes up the same lost one.

    Raises:
        RepeatedTrialError: one does. Two processes that look for lost trials at once ask for the same settings twice; the
            first of the two is trained.
    """
    lost = trial.user_attrs.get("continues")
    if lost is not None:
        others = trial.study.get_trials(deepcopy=False)
        first = min(t.number for t in others if t.user_attrs.get("continues") == lost)
        if first < trial.number:
            trial.set_user_attr(_REPEATS, first)
            raise RepeatedTrialError(f"trial {first} takes up trial {lost} already")
    trial.set_user_attr("process", process_began(os.getpid()))
    trial.set_user_attr("worker", f"{socket.gethostname()}:{os.getpid()}")


class RepeatedTrialError(Exception):
    """A trial that another one makes needless."""


def take_up_lost(study: Study) -> int:
    """Ask again for the settings of trials whose process is gone; returns how many there were.

    What they had measured on their rungs goes along, so that nothing is trained twice. To be called by a process that is not at
    work on a trial.
    """
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if _gone(trial):
            try:
                study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
            except optuna.exceptions.UpdateFinishedTrialError:  # by another process, which looked at the same time
                continue
    before = len(study.get_trials(deepcopy=False))
    for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,)):
        again(study, trial)
    return len(study.get_trials(deepcopy=False)) - before


def _gone(trial: FrozenTrial) -> bool:
    """Whether the process of a trial ended, as far as this machine can know."""
    host, _, number = str(trial.user_attrs.get("worker", "")).rpartition(":")
    if host != socket.gethostname():
        return False
    return int(number) == os.getpid() or not process_runs(int(number), trial.user_attrs.get("process"))


def again(study: Study, trial: FrozenTrial) -> None:
    """Ask once more for the settings of a trial that was cut off, unless that was done, or a retry was killed as well. One that
    failed stays failed."""
    if failure(trial) is not None or _REPEATS in trial.user_attrs or not trial.params:
        return
    others = study.get_trials(deepcopy=False)
    if any(t.user_attrs.get("continues") == trial.number for t in others):
        return
    rungs = {str(rung): value for rung, value in trial.intermediate_values.items()}
    attributes = {name: trial.user_attrs[name] for name in _CARRIED if name in trial.user_attrs} | {
        "continues": trial.number,
        "origin": origin(trial.user_attrs, trial.number),
        "kills": _kills(trial),
        "rungs": {**trial.user_attrs.get("rungs", {}), **rungs},
    }
    study.enqueue_trial(trial.params, user_attrs=attributes)


def origin(attributes: Mapping[str, Any], number: int) -> int:
    """The trial that first had the settings, whose number gives their seed; ``attributes``: of the trial of this number."""
    return int(attributes.get("origin", attributes.get("continues", number)))
