from __future__ import annotations

import numpy as np
import pytest

from ctrlib.config import ConfigError
from ctrlib.search.hedge import Axis, Hedge, Places, kernel, locate, merged, standardised, transfer

AXES = {
    "l2": Axis(low=1e-8, high=1e-2, log=True, weight=3.0),
    "width": Axis(low=64, high=1024, log=True),
    "kind": Axis(choices=("a", "b")),
}


def test_kernel_against_hand_numbers() -> None:
    a = locate(AXES, [{"l2": 1e-8, "width": 64, "kind": "a"}, {"l2": 0.0, "kind": "b"}])
    b = locate(AXES, [{"l2": 1e-5, "width": 256, "kind": "a"}, {"kind": "b"}])
    # distances: l2 half of its range (weight 3), width 2 of 4 octaves; 0 counts as the low end; absent against present is 1
    expected = np.exp(-np.array([[1.5 + 0.5 + 0, 3 + 1 + 1], [1.5 + 1 + 1, 3 + 0 + 0]]))
    np.testing.assert_allclose(kernel(a, b), expected, rtol=1e-12)


def test_bad_axes() -> None:
    with pytest.raises(ConfigError, match="logarithmic axis begins at 0"):
        Axis(low=0.0, high=1.0, log=True)
    with pytest.raises(ConfigError, match="low end below"):
        Axis(low=1.0, high=1.0)
    with pytest.raises(ConfigError, match="weight"):
        Axis(weight=0)


def test_turns() -> None:
    hedge = Hedge(random=2, random_from=16, random_every=4)
    assert [hedge.turn(n) for n in range(5)] == ["prior", "random", "random", "model", "model"]
    assert [n for n in range(10, 30) if hedge.turn(n) == "random"] == [16, 20, 24, 28]


def _line(count: int = 101) -> tuple[Places, np.ndarray]:
    x = np.linspace(0, 1, count)
    return locate({"x": Axis(weight=3.0)}, [{"x": v} for v in x]), x


def _search(score: np.ndarray, prior: np.ndarray, places: Places, trials: int, seed: int = 0) -> list[int]:
    rng, tried = np.random.default_rng(seed), list[int]()
    for _ in range(trials):
        left = np.setdiff1d(np.arange(len(score)), tried)
        at = Hedge().choose(places[left], prior[left], places[tried], prior[tried], score[tried], rng)
        tried.append(int(left[at]))
    return tried


def test_model_finds_the_top_of_a_hill_and_beats_chance() -> None:
    places, x = _line()
    score = -np.square(x - 0.37)
    found = [score[_search(score, np.zeros(101), places, 12, seed)].max() for seed in range(5)]
    chance = [score[np.random.default_rng(seed).permutation(101)[:12]].max() for seed in range(200)]
    assert np.mean(found) > np.quantile(chance, 0.7)


def test_a_run_gone_wrong_does_not_hide_the_differences_of_the_others() -> None:
    """Of the scores of eight trials one is worse by any amount: the choices are the same."""
    places, x = _line()
    tried = np.array([3, 20, 30, 45, 60, 75, 90, 99])
    score = -np.square(x[tried] - 0.37)
    chosen = set()
    for bad in (-5.0, -5e3, -5e9):
        seen = np.append(score, bad)
        at = np.append(tried, 0)
        rng = np.random.default_rng(0)
        chosen.add(Hedge().choose(places, np.zeros(101), places[at], np.zeros(9), seen, rng))
    assert len(chosen) == 1


def test_a_wrong_prior_is_outvoted() -> None:
    places, x = _line()
    score, wrong = -np.abs(x - 0.9), 1 - 2 * x  # the prior likes the wrong end
    tried = _search(score, wrong, places, 16)
    assert tried[0] == 0
    assert score[tried].max() > -0.02


def test_a_right_prior_pays_at_once() -> None:
    places, x = _line()
    score = -np.abs(x - 0.9)
    assert _search(score, -np.abs(x - 0.9), places, 1) == [90]


def test_pending_trials_push_others_away() -> None:
    places, _ = _line(11)
    seen, score = [0, 5, 10], np.array([0.0, 1.0, 0.0])
    rng = np.random.default_rng(0)

    def choose(tried: list[int], scores: np.ndarray) -> int:
        return Hedge().choose(places, np.zeros(11), places[tried], np.zeros(len(tried)), scores, rng)

    first = choose(seen, score)
    assert choose([*seen, first], np.append(score, np.nan)) != first


def test_same_seed_same_choices() -> None:
    places, x = _line()
    score = np.sin(9 * x)
    assert _search(score, np.zeros(101), places, 10, 3) == _search(score, np.zeros(101), places, 10, 3)


def test_transfer_expects_what_was_good_elsewhere() -> None:
    places, x = _line()
    some = list(range(0, 101, 5))
    expected = transfer([(places[some], standardised(-np.abs(x[some] - 0.2)))], places)
    assert abs(int(expected.argmax()) - 20) <= 5
    assert transfer([], places).tolist() == [0.0] * 101


def test_standardised_ranks() -> None:
    z = standardised(np.array([0.1, 5.0, 0.2, 1000.0]))
    np.testing.assert_allclose(z, (np.array([0, 2, 1, 3]) - 1.5) / np.sqrt(1.25))
    assert standardised(np.array([3.0])).tolist() == [0.0]


def test_axes_of_a_range_that_depends_on_another_parameter() -> None:
    here = {"units": Axis(choices=("16", "8")), "rate": Axis(low=0.1, high=1.0, log=True), "mixed": Axis(low=1, high=2)}
    there = {"units": Axis(choices=("4", "8")), "rate": Axis(low=0.0, high=0.5), "mixed": Axis(choices=("a",))}
    found = merged([here, there, {}])
    assert found["units"].choices == ("16", "8", "4")
    assert (found["rate"].low, found["rate"].high, found["rate"].log) == (0.0, 1.0, False)
    assert found["mixed"].choices == ("a",)
    assert merged([here, here]) == here
