"""What the end of a search takes from earlier runs, and what it has time for; without training."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

optuna = pytest.importorskip("optuna")

from ctrlib.search import finish as finishing  # noqa: E402
from ctrlib.search.budget import Budget  # noqa: E402
from ctrlib.search.finish import Finalist  # noqa: E402
from ctrlib.search.sampling import open_storage  # noqa: E402
from ctrlib.search.space import Space  # noqa: E402
from ctrlib.search.trials import Stores  # noqa: E402
from ctrlib.search.tuning import _clock, _used  # noqa: E402
from ctrlib.search.worker import SearchConfig, Work  # noqa: E402
from tests.search import spaces  # noqa: E402

FINALIST = Finalist(
    number=3,
    name="tiny",
    params={"learning_rate": 0.01, "width": 8},
    value=0.5,
    single_epoch=False,
    latency_ms=1.0,
    parameters=10,
    main=True,
)


def test_runs_of_another_study_are_not_taken_for_those_of_this_one(tmp_path: Path) -> None:
    first = finishing._folder(tmp_path, FINALIST, "a")
    assert first == tmp_path / "trial-3"
    assert finishing._folder(tmp_path, FINALIST, "a") == first
    others = [
        finishing._folder(tmp_path, dataclasses.replace(FINALIST, params={"learning_rate": 0.02, "width": 8}), "a"),
        finishing._folder(tmp_path, dataclasses.replace(FINALIST, single_epoch=True), "a"),
        finishing._folder(tmp_path, FINALIST, "b"),
    ]
    assert [o.name for o in others] == ["trial-3-1", "trial-3-2", "trial-3-3"]
    assert finishing._folder(tmp_path, FINALIST, "b") == others[2]
    # written before folders said what they hold
    (tmp_path / "trial-4" / "seed-0").mkdir(parents=True)
    assert finishing._folder(tmp_path, dataclasses.replace(FINALIST, number=4), "a").name == "trial-4"


def test_a_run_that_another_process_is_at_work_on_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finishing, "_POLL_SECONDS", 0.01)
    out = tmp_path / "seed-0"
    part = tmp_path / "seed-0.part"
    assert finishing._wait_for_writer(out) is False
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as writer:
        part.mkdir()
        (part / "writer.pid").write_text(str(writer.pid))

        def done() -> None:
            (part / "metrics.json").write_text("{}")
            (part / "writer.pid").unlink()
            part.rename(out)

        finished = threading.Timer(0.5, done)
        finished.start()
        assert finishing._wait_for_writer(out) is True
        finished.join()
        out.rename(tmp_path / "seed-1")
        part.mkdir()
        (part / "writer.pid").write_text(str(writer.pid))
        threading.Timer(0.5, writer.kill).start()
        threading.Timer(0.5, writer.wait).start()
        assert finishing._wait_for_writer(out) is False
        assert not part.exists()


def a_task(folder: Path, space: Space, out: Path) -> finishing._Task:
    stores = Stores(base=folder, folder=folder)
    return finishing._Task(finalist=FINALIST, space=space, stores=stores, metric="auc", seed=0, out=out)


def test_processes_of_a_search_that_is_gone_begin_no_run(tmp_path: Path) -> None:
    finishing._run_some([a_task(tmp_path, spaces.invalid, tmp_path)], threads=1, parent=os.getppid() + 1)


def test_test_metrics_are_kept_by_folder_and_seeds(tmp_path: Path) -> None:
    task = a_task(tmp_path, spaces.small, tmp_path / "finish" / "trial-3-1" / "seed-0")
    tasks = [task, dataclasses.replace(task, seed=1, out=task.out.with_name("seed-1"))]
    entry = {"trial": 3, "by_seed": {"0": 0.7, "1": 0.8}}
    (tmp_path / "test.json").write_text('{"3": {"auc": 0.1}, "trial-3-1, seeds 0, 1": {"auc": 0.2}}')
    assert finishing._tested(tmp_path, entry, [entry], tasks) == {3: {"auc": 0.2}}


def _work(folder: Path) -> Work:
    config = SearchConfig(budget=100.0)
    return Work(
        config=config,
        budget=config.spending(1),
        space=spaces.small,
        portfolio=False,
        stores=Stores(base=folder, folder=folder),
        rungs=(1.0,),
        storage=None,
        journal=folder / "study.journal",
        study="a",
        began=0.0,
        clock=_clock(folder),
    )


def test_what_was_used_is_that_of_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study(storage=open_storage(None, tmp_path / "study.journal"), study_name="a")
    here, there = _work(tmp_path), _work(tmp_path / "other")
    assert _used(study, here, 2) == 0
    for seconds in (30.0, 50.0):
        trial = study.ask()
        trial.set_user_attr("seconds", seconds)
        study.tell(trial, 0.0)
    assert _used(study, here, 2) == 40  # of an earlier version: so many seconds of trials, by workers
    monkeypatch.setattr("time.time", lambda: 37.0)
    here.tick(study)
    assert _used(study, here, 2) == 37
    assert _used(study, there, 2) == 0


def test_points_of_the_front_that_there_is_time_for() -> None:
    budget = Budget(seconds=100, seeds=3, workers=2)
    # 2 × 40 s, less 3 seeds of 10 s and 5 s: 35 s
    assert budget.extra(60, [10, 5], [20, 15, 1]) == 2
    assert budget.extra(99, [10, 5], [20, 15, 1]) == 1
    assert budget.extra(99, [10, 5], []) == 0
    assert Budget(trials=3).extra(60, [10, 5], [20, 15, 1]) == 3
