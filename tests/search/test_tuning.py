from __future__ import annotations

import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

optuna = pytest.importorskip("optuna")

import ctrlib  # noqa: E402
from ctrlib.cli import main  # noqa: E402
from ctrlib.config import ConfigError  # noqa: E402
from ctrlib.data.store import Store  # noqa: E402
from ctrlib.experiment import RunConfig, prepare, train  # noqa: E402
from ctrlib.models.presets import preset  # noqa: E402
from ctrlib.schema import DataError  # noqa: E402
from ctrlib.search import finish as finishing  # noqa: E402
from ctrlib.search import trials, tuning, worker  # noqa: E402
from ctrlib.search.budget import Budget  # noqa: E402
from ctrlib.search.hedge import Hedge  # noqa: E402
from ctrlib.search.sampling import open_storage, tpe_sampler  # noqa: E402
from ctrlib.search.space import AutoSpace  # noqa: E402
from ctrlib.search.tuning import SearchConfig, search  # noqa: E402
from ctrlib.training import TrainingDivergedError  # noqa: E402
from tests.clicks import write  # noqa: E402
from tests.search import spaces  # noqa: E402

SLOW: dict[str, Any] = {"smallest": 300, "finalists": 1, "finish_seeds": 1}
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("clicks"))


@pytest.fixture(scope="module")
def finished(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("search") / "run"
    return out, spaces.run(data, out, trials=6, smallest=300)


def _trials(out: Path) -> list[Any]:
    storage = open_storage(None, out / "study.journal")
    [name] = [study.study_name for study in optuna.get_all_study_summaries(storage)]
    return list(optuna.load_study(study_name=name, storage=storage).trials)


def _params(out: Path) -> list[dict[str, Any]]:
    return [t.params for t in _trials(out)]


def test_a_search_reports_and_hands_over(finished: tuple[Path, dict[str, Any]], data: Path) -> None:
    out, report = finished
    assert sum(report["trials"].values()) == 6
    means = [entry["log_loss"]["mean"] for entry in report["leaderboard"]]
    assert means == sorted(means)
    assert all(len(e["by_seed"]) == 2 and e["log_loss"]["std"] >= 0 for e in report["leaderboard"])
    assert {e["trial"] for e in report["pareto"]} >= {report["best"]}
    for entry in report["pareto"]:
        assert entry["latency_ms"] > 0
        assert entry["bytes"] > 0
        assert ctrlib.load(out / entry["artifact"]).predict(str(data / "test.parquet")).shape == (401,)
    assert ctrlib.load(out / "best").predict(str(data / "test.parquet")).shape == (401,)
    for name in ("report.md", "report.html", "curve.png", "report.json"):
        assert (out / name).stat().st_size > 100
    text = (out / "report.html").read_text(encoding="utf-8")
    assert "data:image/png;base64," in text
    assert "http" not in text
    assert json.loads((out / "report.json").read_text())["best"] == report["best"]


def test_the_same_seed_gives_the_same_trials(finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    spaces.run(data, tmp_path / "again", trials=6, smallest=300)
    assert _params(tmp_path / "again") == _params(finished[0])
    values = [[t.intermediate_values for t in _trials(out)] for out in (finished[0], tmp_path / "again")]
    assert values[0] == values[1]
    spaces.run(data, tmp_path / "other", trials=2, seed=1)
    assert _params(tmp_path / "other") != _params(finished[0])[:2]


def test_test_rows_are_read_once_and_only_at_the_end(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    split = Store.split

    def watched(self: Store, name: str) -> Any:
        read.append(name)
        return split(self, name)

    monkeypatch.setattr(Store, "split", watched)
    report = spaces.run(data, tmp_path / "run", trials=3)
    first = read.index("test")
    assert set(read[first:]) == {"test"}
    tested = {report["best"], *(e["trial"] for e in report["pareto"])}
    entries = {e["trial"]: e for e in (*report["leaderboard"], *report["pareto"])}
    assert read.count("test") == sum(len(entries[t]["by_seed"]) for t in tested)
    read.clear()
    spaces.run(data, tmp_path / "run", trials=3, resume=True)  # nothing is left to do
    assert "test" not in read
    assert "train" not in read


def test_resuming_adds_trials_and_repeats_none(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    spaces.run(data, out, trials=3)
    before = _trials(out)
    spaces.run(data, out, trials=5, resume=True)
    after = _trials(out)
    assert len(after) == 5
    assert [t.params for t in after[:3]] == [t.params for t in before]
    spaces.run(data, tmp_path / "whole", trials=5)
    assert _params(tmp_path / "whole") == _params(out)


def test_resuming_a_spent_budget_changes_nothing(data: Path, tmp_path: Path) -> None:
    """What is trained again already costs no time."""
    out = tmp_path / "run"
    first = spaces.run(data, out, budget=60.0, trials=4)
    assert len(first["leaderboard"]) == 2
    storage = open_storage(None, out / "study.journal")
    [name] = [study.study_name for study in optuna.get_all_study_summaries(storage)]
    study = optuna.load_study(study_name=name, storage=storage)
    [clock] = [key for key in study.user_attrs if key.startswith("elapsed-")]
    study.set_user_attr(clock, 60.0)
    again = spaces.run(data, out, budget=60.0, trials=4, resume=True)
    assert [e["trial"] for e in again["leaderboard"]] == [e["trial"] for e in first["leaderboard"]]
    assert again["best"] == first["best"]


def test_spaces_that_no_worker_could_ask(data: Path, tmp_path: Path) -> None:
    def lists(trial: Any) -> Any:
        return trial.suggest_list("x", 1, 2)

    with pytest.raises(ConfigError, match="asks its trial for 'suggest_list'; expected suggest_float, suggest_int"):
        spaces.run(data, tmp_path / "run", lists, trials=1)
    with pytest.raises(ConfigError, match=r"cannot be sent to 2 workers .*; expected a function of an imported module"):
        spaces.run(data, tmp_path / "run", lambda trial: spaces.small(trial), trials=1, workers=2)
    assert not (tmp_path / "run").exists()


def test_a_space_may_keep_notes(data: Path, tmp_path: Path) -> None:
    def noted(trial: Any) -> Any:
        trial.set_user_attr("note", 1)
        return spaces.small(trial)

    assert spaces.run(data, tmp_path / "run", noted, trials=2)["trials"]["complete"] == 2
    assert [t.user_attrs["note"] for t in _trials(tmp_path / "run")] == [1, 1]


def test_large_batches_are_made_smaller_for_a_fraction_of_the_rows() -> None:
    run = RunConfig(model=preset("dnn"), batch_size=4096).for_rows(100_000)
    small = trials._with_enough_steps(run, 20_000)
    assert small.batch_size == 1250
    assert small.fit.optimizer.learning_rate == pytest.approx(run.fit.optimizer.learning_rate * (1250 / 4096) ** 0.5)
    assert trials._with_enough_steps(run, 4096 * 16) == run


def test_encodings_are_searched_where_there_is_time(tmp_path: Path) -> None:
    config = SearchConfig(budget=100.0)
    assert tuning._has_time_to_encode(tmp_path, config)  # of a store
    for seconds, fits in ((1.0, True), (2.0, False)):
        (tmp_path / "encoding.json").write_text(json.dumps({"seconds": seconds}))
        assert tuning._has_time_to_encode(tmp_path, config) == fits
    assert tuning._has_time_to_encode(tmp_path, SearchConfig(trials=3))


def test_no_overwriting_and_no_mixing(finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds a search already; go on with it \(--resume\)"):
        spaces.run(data, finished[0], trials=6)
    with pytest.raises(ConfigError, match="other settings or of other data"):
        spaces.run(data, finished[0], trials=6, resume=True, metric="auc")
    (tmp_path / "mine").mkdir()
    with pytest.raises(DataError, match="not a search to go on with"):
        spaces.run(data, tmp_path / "mine", trials=1)


def test_invalid_points_fail_with_their_reason_and_the_search_goes_on(data: Path, tmp_path: Path) -> None:
    report = spaces.run(data, tmp_path / "run", spaces.partly_invalid, trials=8, seed=3, method="random")
    assert report["failures"]
    assert all("fit.epochs is 0" in f["reason"] for f in report["failures"])
    assert report["trials"]["fail"] == len(report["failures"])
    assert report["trials"]["complete"] > 0
    assert "fit.epochs is 0" in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.parametrize("method", ["hedged", "random"])
def test_choices_that_depend_on_another_parameter_fail_alone(data: Path, tmp_path: Path, method: str) -> None:
    report = spaces.run(data, tmp_path / "run", spaces.branching, trials=8, method=method, finalists=1, finish_seeds=1)
    assert report["trials"]["complete"] > 0
    assert report["trials"]["complete"] + report["trials"]["fail"] == 8
    assert all("dynamic value space" in f["reason"] for f in report["failures"])


def test_an_error_of_the_sampler_is_that_of_a_trial(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    choose = Hedge.choose

    def once(self: Hedge, *args: Any) -> int:
        calls.append(0)
        if len(calls) == 1:
            raise ArithmeticError("not positive definite")
        return choose(self, *args)

    monkeypatch.setattr(Hedge, "choose", once)
    report = spaces.run(data, tmp_path / "run", trials=2, finalists=1, finish_seeds=1)
    assert [(f["trial"], f["reason"]) for f in report["failures"]] == [(0, "ArithmeticError: not positive definite")]
    assert report["trials"]["complete"] == 1


def test_a_space_without_a_valid_point_says_why(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no trial succeeded: ConfigError: nothing here can be built"):
        spaces.run(data, tmp_path / "run", spaces.invalid, trials=3)


def test_a_budget_too_small_for_one_trial_says_how_much_is_needed(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget of 0\.001 s is too small.*give at least [\d.e-]+ s"):
        spaces.run(data, tmp_path / "run", budget=0.001)
    with pytest.raises(ConfigError, match="no end; give a budget"):
        SearchConfig()


def test_an_impossible_latency_names_the_fastest(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"logistic regression, the fastest model, takes .* ms for 100 rows here"):
        spaces.run(data, tmp_path / "auto", None, trials=2, latency_ms=1e-4)
    with pytest.raises(ConfigError, match=r"no trial succeeded: 100 rows take .* The fastest model took"):
        spaces.run(data, tmp_path / "own", trials=2, latency_ms=1e-4)


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://nobody:secret@127.0.0.1:1/none",
        "postgresql:/nobody:secret@127.0.0.1/none",
        "postgresql://127.0.0.1:1/none?user=nobody&password=secret",
        "nonsense",
        "sqlite:////no/such/folder/x.db",
    ],
)
def test_a_storage_that_cannot_be_reached(data: Path, tmp_path: Path, url: str) -> None:
    with pytest.raises(ConfigError, match="cannot be reached") as caught:
        spaces.run(data, tmp_path / "run", trials=1, storage=url)
    assert "secret" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_other_bad_options(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'hedged'"):
        SearchConfig(trials=1, method="hedge")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'log_loss'"):
        SearchConfig(trials=1, metric="logloss")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no model 'dnnn'"):
        SearchConfig(trials=1, models=("dnnn",))
    with pytest.raises(ConfigError, match="workers is 0"):
        spaces.run(data, tmp_path / "run", trials=1, workers=0)


def test_data_that_cannot_be_read_leaves_nothing(data: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--label"):
        search(str(data / "train.parquet"), tmp_path / "run", config=SearchConfig(trials=1))
    assert not (tmp_path / "run").exists()


def test_from_the_command_line(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = str(data / "train.parquet"), str(tmp_path / "run")
    given = ["--schema", str(data / "schema.json"), "--models", "fm", "--finalists", "1", "--finish-seeds", "1"]

    def run(*more: str) -> object:
        monkeypatch.setattr("sys.argv", ["ctrlib", "search", rows, "--out", out, *given, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code

    assert run("--budget", "soon") == 2
    assert "expected a time such as 90s, 30m" in capsys.readouterr().err
    assert run("--trials", "1") == 0
    assert "best: fm, test AUC" in capsys.readouterr().out
    assert run("--trials", "1") == 2
    assert "--resume" in capsys.readouterr().err
    assert run("--trials", "1", "--resume") == 0


def test_encodings_are_searched_where_raw_rows_are_at_hand(data: Path, tmp_path: Path) -> None:
    report = spaces.run(data, tmp_path / "run", spaces.encodes, trials=4, method="random")
    counts = {t.params["min_count"] for t in _trials(tmp_path / "run")}
    assert {f"min_count-{c}-numeric-log" for c in counts} == {p.name for p in (tmp_path / "run" / "stores").iterdir()}
    loaded = ctrlib.load(tmp_path / "run" / "best")
    best = next(t for t in _trials(tmp_path / "run") if t.number == report["best"])
    assert loaded.schema["user"].min_count == best.params["min_count"]
    assert loaded.schema["price"].encoding == "log"  # type: ignore[union-attr]


def test_going_on_with_another_store_is_refused(data: Path, tmp_path: Path) -> None:
    options = spaces.data_options(data)
    config = SearchConfig(trials=1, models=("dnn",), finalists=1, finish_seeds=1)
    first = prepare(str(data / "train.parquet"), tmp_path / "first", options)
    search(first, tmp_path / "run", config=config, space=spaces.small)
    other = prepare(str(data / "test.parquet"), tmp_path / "other", options)
    with pytest.raises(ConfigError, match="holds a search on other data"):
        search(other, tmp_path / "run", config=config, space=spaces.small, resume=True)


def test_a_store_has_no_encodings_to_search(data: Path, tmp_path: Path) -> None:
    store = prepare(str(data / "train.parquet"), tmp_path / "store", spaces.data_options(data))
    config = SearchConfig(trials=2, **spaces.OPTIONS)
    with pytest.raises(ConfigError, match="a store is encoded already; search on files of raw rows"):
        search(store, tmp_path / "run", config=config, space=spaces.encodes)
    assert tuning._raw(store, spaces.data_options(data)) is None


def test_the_default_space_on_small_data(data: Path, tmp_path: Path) -> None:
    report = spaces.run(data, tmp_path / "run", None, trials=2, models=("dnn", "fm"), finalists=1, finish_seeds=1)
    assert report["leaderboard"][0]["name"] in ("dnn", "fm")
    assert isinstance(report["noise"], float)


@pytest.mark.parametrize(("seconds", "begun"), [(0.0, 3), (1e3, 1)])
def test_no_seed_for_the_noise_begins_that_would_not_be_done_in_time(
    seconds: float, begun: int, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on = trials.train_on
    seeds: list[int] = []

    def timed(store: Store, run: RunConfig, fraction: float, *, seed: int, **options: Any) -> Any:
        seeds.append(seed)
        return replace(train_on(store, run, fraction, seed=seed, **options), seconds=seconds)

    monkeypatch.setattr(tuning, "train_on", timed)
    report = spaces.run(data, tmp_path / "run", trials=1, budget=600.0, smallest=300)
    assert len(set(seeds)) == len(seeds) == begun
    assert (report["noise"] is None) == (begun == 1)


def test_tpe_is_grouped_and_searches(data: Path, tmp_path: Path) -> None:
    sampler = tpe_sampler(0)
    assert (sampler._multivariate, sampler._group, sampler._constant_liar) == (True, True, True)
    spaces.run(data, tmp_path / "run", trials=10, method="tpe", finalists=1, finish_seeds=1)
    assert len(_trials(tmp_path / "run")) == 10


def test_a_budget_too_small_for_a_space_of_ones_own(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"budget of 5 s is too small.*give at least [\d.]+e\+0[4-9] s"):
        spaces.run(data, tmp_path / "run", spaces.endless, budget=5.0, finalists=1, finish_seeds=1)
    with pytest.raises(ConfigError, match=r"no trial succeeded: .* [1-9]\d* steps of [\d.e-]+ s in .*give a larger budget"):
        spaces.run(data, tmp_path / "patient", spaces.patient, budget=30.0, finalists=1, finish_seeds=1)
    # .6 of the budget for all that tried; a clock on the wall would also see what else the machine does
    assert sum(t.user_attrs["seconds"] for t in _trials(tmp_path / "patient")) < 25


def test_where_no_trial_comes_to_all_rows_the_best_on_fewer_are_trained_again(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on = trials.train_on

    def cut_off(store: Store, run: RunConfig, fraction: float, **options: Any) -> Any:
        if fraction < 1:
            return train_on(store, run, fraction, **options)
        raise trials.OutOfTimeError("no time")

    monkeypatch.setattr(worker, "train_on", cut_off)
    monkeypatch.setattr(worker, "_deadline", lambda work, whole: (None, False))  # the budget ended, whatever the settings
    report = spaces.run(data, tmp_path / "run", trials=5, smallest=300)
    assert report["trials"]["complete"] == 0
    assert report["curve"] == []
    values = {t.number: t.intermediate_values[0] for t in _trials(tmp_path / "run")}  # of two rungs
    assert {e["trial"] for e in report["leaderboard"]} == set(sorted(values, key=values.__getitem__)[:2])
    assert all(e["search"] == values[e["trial"]] for e in report["leaderboard"])
    assert report["compared_on"] == pytest.approx(1 / 3)
    assert "the best on 0.333 of them were trained again" in (tmp_path / "run" / "report.md").read_text()
    assert (tmp_path / "run" / "curve.png").is_file()

    monkeypatch.setattr(worker, "_deadline", lambda work, whole: (None, True))  # these settings would need more than there is
    with pytest.raises(ConfigError, match="no trial succeeded: no time"):
        spaces.run(data, tmp_path / "slow", trials=1, smallest=300)


def test_slow_settings_keep_no_others_from_all_rows(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train_on = trials.train_on
    seen: list[float] = []

    def first_is_slow(store: Store, run: RunConfig, fraction: float, **options: Any) -> Any:
        seen.append(fraction)
        if seen.count(1.0) == 1 and fraction == 1:
            raise trials.OutOfTimeError("no time")
        found = train_on(store, run, fraction, **options)
        return replace(found, value=float(len(seen)))  # the first is the best, on every rung

    monkeypatch.setattr(worker, "train_on", first_is_slow)
    monkeypatch.setattr(worker, "_deadline", lambda work, whole: (None, True))
    report = spaces.run(data, tmp_path / "run", trials=2, smallest=300, method="random")
    assert report["trials"]["complete"] == 1


def test_settings_that_fewer_rows_show_to_be_too_slow_are_stopped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_on = trials.train_on
    fractions: list[float] = []

    def slower(store: Store, run: RunConfig, fraction: float, **options: Any) -> Any:
        fractions.append(fraction)
        found = train_on(store, run, fraction, **options)
        return replace(found, value=1.0, seconds=1e6 * fraction)  # the first has no other to compare with, and goes on

    monkeypatch.setattr(worker, "train_on", slower)
    report = spaces.run(data, tmp_path / "run", trials=2, smallest=300, budget=600.0)
    assert fractions == pytest.approx([1 / 3, 1, 1 / 3])
    assert report["trials"]["complete"] == 1
    assert [s["trial"] for s in report["stopped"]] == [1]
    assert report["stopped"][0]["reason"] == "all rows would take about 1e+06 s, more than the budget allows for one trial"


def test_the_longest_trial() -> None:
    budget = Budget(seconds=100, seeds=3, workers=1, finalists=2)
    # before any on all rows: as long as it takes to train it once more with three seeds
    assert budget.longest_trial(20, []) == 20
    assert budget.left(20, []) == 40
    assert budget.longest_trial(20, [4]) == pytest.approx(100 / 6)
    assert budget.left(70, [4]) == 6  # 2 × 3 × 4 s are kept
    assert budget.over(59, 1, []) is False
    assert budget.over(60, 1, []) is True
    assert budget.over(60, 0, []) is False
    assert Budget(trials=3).longest_trial(1e9, []) is None


def test_time_is_kept_for_the_end_and_trials_do_not_run_over(data: Path, tmp_path: Path) -> None:
    report = spaces.run(data, tmp_path / "run", spaces.small, budget=20.0)
    assert sum(t.user_attrs["seconds"] for t in _trials(tmp_path / "run")) < 20
    assert report["trials"]["complete"] >= 1


def test_a_diverging_finalist_is_left_out(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def sometimes(*args: Any, **options: Any) -> dict[str, Any]:
        calls.append(options["seed"])
        if len(calls) <= 2:
            raise TrainingDivergedError("the loss is nan")
        return train(*args, **options)

    monkeypatch.setattr(finishing, "train", sometimes)
    report = spaces.run(data, tmp_path / "run", trials=2)
    assert len(report["leaderboard"]) == 1
    assert len(list((tmp_path / "run" / "finish").rglob("*.failed.json"))) == 2


# Kills, with real processes


@contextmanager
def _started(
    data: Path, out: Path, trials: int, workers: int, log: Path, storage: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A search in a process of its own."""
    command = [sys.executable, "-m", "tests.search.spaces", str(data), str(out), str(trials), str(workers)]
    command += [] if storage is None else [storage]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with (
        log.open("wb") as errors,
        subprocess.Popen(command, cwd=ROOT, stderr=errors, stdout=subprocess.DEVNULL, env=environment) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def _until(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def _attributes(out: Path) -> list[dict[str, Any]]:
    """User attributes by trial, read off the journal without taking part."""
    journal = out / "study.journal"
    lines = journal.read_bytes().split(b"\n")[:-1] if journal.is_file() else []
    found: dict[int, dict[str, Any]] = {}
    for line in map(json.loads, lines):
        if "user_attr" in line and "trial_id" in line:
            found.setdefault(line["trial_id"], {}).update(line["user_attr"])
    return [found[key] for key in sorted(found)]


def _rungs(text: str) -> set[tuple[int, str]]:
    return {(int(n), share) for n, share in re.findall(r"^trial (\d+), .*, on ([\d.]+) of the rows", text, re.M)}


def test_kill_of_the_whole_search(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    out, log = tmp_path / "run", tmp_path / "log"
    with _started(data, out, 3, 1, log) as process:
        # in the middle of the second trial
        _until(lambda: len(_attributes(out)) > 1 and "parameters" in _attributes(out)[1], process, log)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert "seconds" not in _attributes(out)[1]
    with (out / "study.journal").open("ab") as journal:
        journal.write(b'{"op_code": 4, "half a li')  # killed while writing
    with caplog.at_level(logging.INFO, "ctrlib"):
        report = spaces.run(data, out, spaces.slow, trials=3, resume=True, **SLOW)
    trials = _trials(out)
    assert report["lost"] == 1
    [(new, old)] = [(t.number, t.user_attrs["continues"]) for t in trials if "continues" in t.user_attrs]
    assert old == 1
    assert trials[new].params == trials[old].params
    assert sum(t.state.name in ("COMPLETE", "PRUNED") for t in trials) == 3
    first, second = _rungs(log.read_text()), _rungs("\n".join(r.getMessage() for r in caplog.records))
    assert (0, "1") in first
    assert second
    assert not first & {(old if n == new else n, share) for n, share in second}  # nothing is trained twice


def test_kill_of_one_worker(data: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "run", tmp_path / "log"

    def at_work() -> list[int]:
        found = [a for a in _attributes(out) if "parameters" in a and "seconds" not in a]
        return [int(a["worker"].rpartition(":")[2]) for a in found]

    with _started(data, out, 4, 2, log) as process:
        _until(lambda: bool(at_work()), process, log)
        os.kill(at_work()[0], signal.SIGKILL)
        assert process.wait(timeout=500) == 0, log.read_text()
    trials = _trials(out)
    assert sum("continues" in t.user_attrs for t in trials) == 1
    assert 4 <= sum(t.state.name in ("COMPLETE", "PRUNED") for t in trials) <= 5
    assert json.loads((out / "report.json").read_text())["lost"] == 1


def test_kill_between_the_last_rung_and_the_end_of_its_trial(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    spaces.run(data, out, trials=1, finalists=1, finish_seeds=1)
    [done] = _trials(out)
    storage = open_storage(None, out / "study.journal")
    study = optuna.load_study(study_name=optuna.get_all_study_names(storage)[0], storage=storage)
    study.enqueue_trial({"learning_rate": 0.01, "width": 8})
    trial = study.ask()
    spaces.small(trial)
    for name, value in done.user_attrs.items():
        if name != "seconds":
            trial.set_user_attr(name, value)
    trial.set_user_attr("worker", f"{socket.gethostname()}:{2**22 + 1}")
    trial.report(0.3, 0)
    report = spaces.run(data, out, trials=2, resume=True, finalists=1, finish_seeds=1)
    assert report["trials"]["complete"] == 2
    last = _trials(out)[-1]
    assert (last.value, last.user_attrs["continues"]) == (0.3, 1)
    assert last.user_attrs["metrics"] == done.user_attrs["metrics"]
    assert report["best"] == last.number


def test_auto_space_reaches_other_processes() -> None:
    import pickle  # noqa: TID251 (what multiprocessing does with it)

    assert pickle.loads(pickle.dumps(AutoSpace())) == AutoSpace()  # noqa: S301
    assert np.isfinite(tuning.seconds_of("1.5h"))
