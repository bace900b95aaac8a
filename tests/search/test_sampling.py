"""Trials that were cut off, and what the samplers are told."""

from __future__ import annotations

import json
import os
import socket
import threading
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")

from optuna.trial import TrialState  # noqa: E402

from ctrlib import files  # noqa: E402
from ctrlib.search import sampling  # noqa: E402
from ctrlib.search.hedge import Axis, Hedge  # noqa: E402
from ctrlib.search.sampling import (  # noqa: E402
    HedgedSampler,
    RepeatedTrialError,
    failure,
    mark_as_own,
    open_storage,
    origin,
    others_of,
    sampler_for,
    take_up_lost,
)
from ctrlib.search.space import AutoSpace, Portfolio  # noqa: E402
from tests.search import spaces  # noqa: E402

GONE = f"{socket.gethostname()}:{2**22 + 1}"  # above the largest number of a process


def _killed(study: Any, rungs: dict[int, float], worker: str = GONE, **attributes: Any) -> int:
    """A trial in progress, as a process that is killed leaves it."""
    trial = study.ask()
    trial.suggest_float("x", 0, 1)
    for name, value in {"worker": worker, **attributes}.items():
        trial.set_user_attr(name, value)
    for rung, value in rungs.items():
        trial.report(value, rung)
    return int(trial.number)


def _waiting(study: Any) -> list[Any]:
    return list(study.get_trials(states=(TrialState.WAITING,)))


def test_a_killed_trial_is_asked_again_once() -> None:
    study = optuna.create_study()
    assert _killed(study, {0: 0.5, 1: 0.4}, single_epoch=True, whole_seconds=7.0, metrics={"auc": 0.6}) == 0
    assert take_up_lost(study) == 1
    [again] = _waiting(study)
    assert again.system_attrs["fixed_params"] == study.trials[0].params
    assert again.user_attrs["rungs"] == {"0": 0.5, "1": 0.4}
    carried = {name: again.user_attrs[name] for name in ("single_epoch", "whole_seconds", "metrics")}
    assert carried == {"single_epoch": True, "whole_seconds": 7.0, "metrics": {"auc": 0.6}}
    assert take_up_lost(study) == 0
    assert failure(study.trials[0]) is None
    assert _killed(study, {}) == 1
    assert take_up_lost(study) == 0
    assert _waiting(study) == []
    assert failure(study.trials[1]) == "its process was killed 2 times"
    assert [t.number for t in others_of(study)] == [1]


def test_an_interrupted_trial_is_asked_again_as_often_and_keeps_rungs_and_seed() -> None:
    study = optuna.create_study()
    _killed(study, {0: 0.5}, seconds=3.0)
    for number in (1, 2, 3):
        assert take_up_lost(study) == 1
        assert _waiting(study)[0].user_attrs["rungs"] == {"0": 0.5}
        assert _killed(study, {}, seconds=1.0) == number
        assert origin(study.trials[number].user_attrs, number) == 0
    # as written before the first trial was told
    assert origin({"continues": 4}, 5) == 4


def test_two_that_look_for_lost_trials_at_once(tmp_path: Path) -> None:
    def opened() -> Any:
        return open_storage(None, tmp_path / "study.journal")

    study = optuna.create_study(storage=opened(), study_name="a")
    for _ in range(3):
        _killed(study, {})
    barrier, errors = threading.Barrier(3), list[Exception]()

    def look() -> None:
        mine = optuna.load_study(storage=opened(), study_name="a")
        barrier.wait()
        try:
            take_up_lost(mine)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=look) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    taken = []
    for _ in _waiting(study):
        trial = study.ask()
        try:
            mark_as_own(trial)
        except RepeatedTrialError:
            study.tell(trial, state=TrialState.FAIL)
        else:
            taken.append(trial.user_attrs["continues"])
            study.tell(trial, 0.0)
    assert sorted(taken) == [0, 1, 2]
    assert take_up_lost(study) == 0


def test_the_later_of_two_trials_of_one_lost_trial_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    _killed(study, {})
    take_up_lost(study)
    waiting = _waiting(study)[0]
    study.enqueue_trial(waiting.system_attrs["fixed_params"], user_attrs=waiting.user_attrs)
    first, second = study.ask(), study.ask()
    mark_as_own(first)
    with pytest.raises(RepeatedTrialError, match="trial 1 takes up trial 0 already"):
        mark_as_own(second)
    study.tell(second, state=TrialState.FAIL)
    assert take_up_lost(study) == 0
    # this process is at work on no trial while it looks for those of others, so what is left in its name is lost
    assert failure(study.trials[1]) == "its process was killed 2 times"
    assert failure(study.trials[2]) is None

    def told_by_another(*args: Any, **options: Any) -> None:
        raise optuna.exceptions.UpdateFinishedTrialError

    _killed(study, {})
    monkeypatch.setattr(study, "tell", told_by_another)
    assert take_up_lost(study) == 0


@pytest.mark.skipif(files.process_began(os.getpid()) is None, reason="the system does not say when a process began")
def test_a_process_that_got_the_number_of_one_that_is_gone() -> None:
    study = optuna.create_study()
    parent = f"{socket.gethostname()}:{os.getppid()}"
    _killed(study, {}, parent, process=files.process_began(os.getppid()))
    assert take_up_lost(study) == 0
    _killed(study, {}, parent, process="17")
    assert take_up_lost(study) == 1
    assert _waiting(study)[0].user_attrs["continues"] == 1
    _killed(study, {}, "elsewhere:1", process="17")
    assert take_up_lost(study) == 0


@pytest.mark.parametrize("hedge", [None, Hedge()])
def test_what_a_trial_had_no_time_to_ask_goes_with_what_it_had(hedge: Hedge | None) -> None:
    study = optuna.create_study(sampler=HedgedSampler(spaces.conditional, seed=0, sign=-1.0, rungs=1, hedge=hedge))
    for kind in ("a", "b", "c", "d", "e", "f"):
        study.enqueue_trial({"kind": kind})
        trial = study.ask()
        spaces.conditional(trial)
        assert set(trial.params) == {"kind", f"units_{kind}"}
        assert trial.params["kind"] == kind


@pytest.mark.parametrize("method", ["hedged", "tpe", "random"])
def test_workers_that_begin_at_once_do_not_try_the_same(method: Any) -> None:
    """Each has a sampler of its own, and none of the others has settings yet."""
    study = optuna.create_study()
    workers = [sampler_for(method, spaces.small, seed=0, sign=-1.0, rungs=1) for _ in range(3)]
    begun = []
    for worker in workers:
        study.sampler = worker
        begun.append(study.ask())
    for worker, trial in zip(workers, begun, strict=True):
        study.sampler = worker
        spaces.small(trial)
    assert len({json.dumps(trial.params) for trial in begun}) == 3


def test_the_first_two_of_the_portfolio_are_tried_whatever_the_trials_say() -> None:
    space = AutoSpace(rows=100_000, table_rows=5_000)
    first, second, *_ = Portfolio().draws(space)
    for scores in ((0.1, 0.9, 0.9), (0.9, 0.1, 0.1)):
        study = optuna.create_study(
            sampler=sampler_for("hedged", space, seed=0, sign=-1.0, rungs=1, portfolio=Portfolio().draws(space))
        )
        for score in scores:
            trial = study.ask()
            space(trial)
            trial.report(score, 0)
            study.tell(trial, score)
        trial = study.ask()
        space(trial)
        assert [study.trials[0].params, trial.params] == [first.params, second.params]


def test_the_more_parameters_the_less_each_counts() -> None:
    few = {name: Axis() for name in "abcd"}
    assert sampling._even(few) == few
    many = sampling._even({name: Axis(weight=2.0) for name in "abcdefgh"} | {"ridge": Axis(weight=5.0)})
    assert many["a"].weight == pytest.approx(2 * 4 / 9)
    assert many["ridge"].weight == 5


def test_settings_that_were_too_slow_are_as_bad_as_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []

    def watched(self: Hedge, *args: Any) -> int:
        told.append(args[4])
        return 0

    monkeypatch.setattr(Hedge, "choose", watched)
    study = optuna.create_study()
    ranges = {
        "learning_rate": optuna.distributions.FloatDistribution(1e-3, 1e-1, log=True),
        "width": optuna.distributions.CategoricalDistribution((4, 8, 16)),
    }
    losses = [{0: 0.55, 1: 0.50}, {0: 0.56, 1: 0.51}, {0: 0.57, 1: 0.52}, {0: 0.40}, {0: 0.40}]
    for number, rungs in enumerate(losses):
        study.add_trial(
            optuna.trial.create_trial(
                params={"learning_rate": 0.01 + 0.01 * number, "width": 4},
                distributions=ranges,
                state=TrialState.COMPLETE if 1 in rungs else TrialState.PRUNED,
                value=rungs.get(1),
                intermediate_values=rungs,
                user_attrs={}
                if 1 in rungs
                else {"too_slow": number == 3},  # the last one began when the budget was all but spent
            )
        )
    study.sampler = HedgedSampler(spaces.small, seed=0, sign=-1.0, rungs=2, hedge=Hedge())
    study.ask()
    assert told[0] == pytest.approx([-0.50, -0.51, -0.52, -0.52, -0.35])
