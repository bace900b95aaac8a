from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("optuna")

from benchmarks import search
from benchmarks.search_real import compare
from benchmarks.search_replay import (
    AXES,
    LOG,
    Grid,
    Regrets,
    hedged,
    random_regrets,
    read_grids,
    replay,
    tpe,
)
from ctrlib.schema import DataError
from ctrlib.search.hedge import locate


def _grid(auc: list[float]) -> Grid:
    params: list[dict[str, float | None]] = [{**dict.fromkeys(AXES), "net_dropout": i / 20} for i in range(len(auc))]
    return Grid("hand", params, locate(AXES, params), np.array(auc), np.zeros(len(auc)))


def test_expected_regret_of_random_search_against_draws() -> None:
    auc = np.random.default_rng(0).random(14)
    exact = random_regrets([_grid(auc.tolist())]).regret_GST[0, 0]
    rng = np.random.default_rng(1)
    drawn = np.array([auc.max() - np.maximum.accumulate(rng.permutation(auc)[:12]) for _ in range(20_000)])
    np.testing.assert_allclose(exact, drawn.mean(axis=0), atol=4 * drawn.std() / np.sqrt(len(drawn)))


def test_win_share_counts_a_tie_as_half() -> None:
    a = Regrets("a", np.array([1.0, 2.0, 3.0, 4.0]).reshape(4, 1, 1))
    b = Regrets("b", np.array([2.0, 2.0, 2.0, 5.0]).reshape(4, 1, 1))
    assert a.win_share(b, 1) == pytest.approx((2 + 0.5) / 4)


@pytest.mark.parametrize("strategy", [hedged(), tpe])
def test_strategies_try_every_run_of_a_grid_once(strategy: Any) -> None:
    order = strategy(_grid([0.1, 0.5, 0.3, 0.2, 0.4]), 0)
    assert sorted(order) == [0, 1, 2, 3, 4]


def test_gates_fail_where_a_strategy_is_no_better_than_chance() -> None:
    grids = [_grid(np.random.default_rng(i).normal(0.7, 0.01, 20).tolist()) for i in range(4)]
    chance = random_regrets(grids)
    held = {name: holds for name, *_, holds in search.gates(chance, chance)}
    assert not held["win share over random after 8"]
    assert not held["mean regret after 12"]


def test_a_missing_log_is_named(tmp_path: Any) -> None:
    with pytest.raises(DataError, match="no such file; the replay needs the log"):
        read_grids(tmp_path / "tuning_log.csv")


@pytest.mark.skipif(not LOG.is_file(), reason="no log of BARS runs: set CTRLIB_DATA")
def test_the_gates_of_the_replay_hold() -> None:
    grids = read_grids()
    chance = random_regrets(grids)
    assert 1e4 * chance.mean(8) == pytest.approx(5.4, abs=0.1)  # what others measured on the same log
    for name, value, direction, limit, holds in search.gates(replay("hedged", hedged(), grids, search.SEEDS), chance):
        assert holds, f"{name}: {value} is not {direction} {limit}"


def test_comparison_of_real_searches_by_hand() -> None:
    def report(loss: float, *curve: tuple[float, float]) -> dict[str, Any]:
        points = [{"seconds": s, "value": v} for s, v in curve]
        return {"test": {"log_loss": {"mean": loss}}, "curve": points, "trials": {}, "cpu_seconds": 90.0}

    chance = [report(0.5, (50, 0.6), (100, 0.5)) for _ in range(5)]
    good = [report(0.4, (20, 0.5), (100, 0.4)) for _ in range(4)] + [report(0.6, (100, 0.6))]
    found = compare(good, chance, 200)
    assert (found["wins"], found["time_share"], found["holds"]) == (4, 0.1, True)
    late = [report(0.4, (120, 0.5)) for _ in range(5)]
    assert not compare(late, chance, 200)["holds"]
