from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from ctrlib.search.fidelity import (
    active_rungs,
    best_after_one_epoch,
    fraction_rows,
    fractions,
    lifted,
    one_epoch,
    promotes,
    spearman,
    unchecked,
)


def test_fractions_leave_out_what_has_too_few_rows() -> None:
    assert fractions(1_000_000) == pytest.approx((1 / 9, 1 / 3, 1))
    assert fractions(40_000) == pytest.approx((1 / 3, 1))
    assert fractions(5_000) == (1.0,)
    assert fractions(90, smallest=10) == pytest.approx((1 / 9, 1 / 3, 1))


def test_rows_of_a_fraction() -> None:
    assert fraction_rows(100, 1.0, recent=True, seed=0) is None
    recent = fraction_rows(90, 1 / 3, recent=True, seed=0)
    assert recent is not None
    assert recent.tolist() == list(range(60, 90))
    small, large = (fraction_rows(900, share, recent=False, seed=3) for share in (1 / 9, 1 / 3))
    assert small is not None
    assert large is not None
    assert (len(small), len(large)) == (100, 300)
    assert set(small.tolist()) < set(large.tolist())
    assert small.tolist() == sorted(small.tolist())


def test_promotion_by_a_hand_table() -> None:
    # in the order of arrival; a third of those so far goes on, the best of fewer than three at once
    arrivals = [
        (0.70, True),
        (0.60, False),
        (0.75, True),
        (0.72, False),
        (0.71, False),
        (0.74, True),
        (0.80, True),
        (0.74, False),
    ]
    seen: list[float] = []
    for score, expected in arrivals:
        assert promotes(score, seen) is expected, score
        seen.append(score)


def test_a_difference_that_two_seeds_make_keeps_nobody_back() -> None:
    assert not promotes(0.70, [0.705, 0.71])
    assert not promotes(0.70, [0.705, 0.71], 0.005)  # 0.01 is more than √2 × 0.005
    assert promotes(0.70, [0.705, 0.706], 0.005)
    assert not promotes(0.70, [0.72] * 5, 0.005)


def test_a_rung_is_checked_by_six_trials_that_came_to_the_next() -> None:
    assert unchecked([{0: 1.0, 1: 1.0}] * 5 + [{0: 1.0}] * 9, 0, 1)
    assert not unchecked([{0: 1.0, 1: 1.0}] * 6, 0, 1)


def test_a_scrambled_rung_is_abolished_and_a_true_one_kept() -> None:
    rng = np.random.default_rng(0)
    true = rng.normal(size=12)
    scrambled = [{0: float(s), 1: float(t), 2: float(t)} for s, t in zip(rng.permutation(true), true, strict=True)]
    assert active_rungs(3, scrambled) == (1, 2)
    assert active_rungs(3, scrambled[:5]) == (0, 1, 2)  # too few to tell
    assert active_rungs(3, [{0: t, 1: t, 2: t} for t in true.tolist()]) == (0, 1, 2)
    # with the middle rung gone, the lowest is compared with the last
    middle = [{0: float(t), 1: float(s), 2: float(t)} for s, t in zip(rng.permutation(true), true, strict=True)]
    assert active_rungs(3, middle) == (0, 2)
    # too few came from the lowest to the last, for it was gone by then: what it said of the middle one still counts
    later = [{1: float(s), 2: float(t)} for s, t in zip(rng.permutation(true), true, strict=True)]
    assert active_rungs(3, [{0: t[0], 1: t[1]} for t in scrambled] + later) == (2,)


def test_spearman_against_scipy() -> None:
    rng = np.random.default_rng(1)
    a, b = rng.integers(0, 5, 30).astype(float), rng.normal(size=30)
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman(np.ones(4), np.arange(4.0)) == 1.0


def test_scores_are_lifted_by_what_others_gained() -> None:
    trials = [{0: 0.1, 1: 0.3, 2: 0.4}, {0: 0.2, 1: 0.2}, {0: 0.0}, {}]
    found = lifted(trials, 3)
    assert found[:3] == pytest.approx([0.4, 0.2 + 0.1, 0.0 + 0.1 + 0.1])
    assert np.isnan(found[3])


def test_one_epoch_detector_on_published_curves() -> None:
    def curve(*scores: float) -> list[tuple[float, float]]:
        return [(float(i), s) for i, s in enumerate(scores, 1)]

    assert best_after_one_epoch(curve(0.7928, 0.7896, 0.7763), 0.0003)
    assert not best_after_one_epoch(curve(0.8029, 0.8051, 0.8065), 0.0003)
    assert not best_after_one_epoch(curve(0.8029), 0.0003)
    assert not best_after_one_epoch(curve(0.8029, 0.8025), 0.0003)  # within the noise
    assert best_after_one_epoch([(0.25, 0.70), (0.5, 0.79), (1.0, 0.785), (1.25, 0.78)], 0.001)


def test_one_epoch_needs_most_of_three_good_trials() -> None:
    assert not one_epoch([True, True, True, True], [4, 3, 2, 1])  # of which two are the better half
    assert one_epoch([True, True, False, False, False], [5, 4, 3, 2, 1])
    assert not one_epoch([False, False, True, True, True], [5, 4, 3, 2, 1])
    assert not one_epoch([False, False, True, True, True], [3, 2, 1, math.nan, math.nan])
    assert one_epoch([False, False, True, True, True], [1, 2, 3, 4, 5])
