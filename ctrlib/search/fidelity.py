"""Cheap trials: a fraction of the training rows with a complete schedule, and when not to trust what it says.

A long schedule that is cut short ranks settings badly: the learning rate is lowered late, and a model that gains much from that
is thrown out before. Fewer rows with all of the schedule keep the order better, and where they do not, a rung is abolished.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

ETA = 3  # of the trials on a rung, one in so many goes on
_SMALLEST = 10_000  # rows; fewer say little about any model
_RUNGS = 3
_PAIRS = 6  # trials on two rungs, from which on their orders are compared
_AGREEMENT = 0.5
_CHECKED = 3  # good trials of which most must have been at their best after one epoch
_NOISE = 1e-4  # at least, of a metric

Scores = Mapping[int, float]
"""What one trial reached, larger is better, by rung."""


def fractions(rows: int, smallest: int = _SMALLEST) -> tuple[float, ...]:
    """The rungs, lowest first: thirds of thirds of the training rows, none of fewer than ``smallest`` rows, and all rows."""
    lower = [ETA**-i for i in range(_RUNGS - 1, 0, -1)]
    return (*(share for share in lower if share * rows >= smallest), 1.0)


def fraction_rows(rows: int, fraction: float, *, recent: bool, seed: int) -> Tensor | None:
    """Numbers of the rows of a fraction, ascending: the last ones of a log in order of time, else some that every smaller
    fraction is part of; ``None``: all."""
    if fraction >= 1:
        return None
    count = max(2, round(rows * fraction))
    if recent:
        return torch.arange(rows - count, rows)
    return torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:count].sort().values


def promotes(score: float, others: Sequence[float], noise: float = 0.0) -> bool:
    """Whether a trial goes on to the next rung: it is among the best third of those that came to this one, itself among them,
    or the best of fewer than three (ASHA, arXiv:1810.05934, decided at once instead of waiting for a free worker). Another one
    is better only by more than two seeds of the same settings differ, √2 standard deviations.

    Args:
        score: of the trial.
        others: of all other trials on the rung that can be trained on all rows.
        noise: standard deviation of the score over seeds; 0: unknown.
    """
    allowed = max((len(others) + 1) // ETA, 1)
    return sum(other - score > math.sqrt(2) * noise for other in others) < allowed


def unchecked(trials: Sequence[Scores], rung: int, above: int) -> bool:
    """Whether fewer trials were on both rungs than :func:`active_rungs` needs to tell if the lower one misleads."""
    return len(_both(trials, rung, above)) < _PAIRS


def active_rungs(count: int, trials: Sequence[Scores]) -> tuple[int, ...]:
    """Rungs that are still used, lowest first; the last one always is.

    A rung is abolished when it misleads: of at least six trials that were on it and on the next one in use, the order on the
    two agrees less than Spearman's ρ = 0.5. Where fewer came to that one, an abolished one below it tells; a rung does not come
    back because the one above it went.
    """
    active = list(range(count))
    for rung in range(count - 2, -1, -1):
        used = active[active.index(rung) + 1]
        for above in (used, *range(rung + 1, used)):
            if unchecked(trials, rung, above):
                continue
            if spearman(*map(np.array, zip(*_both(trials, rung, above), strict=True))) < _AGREEMENT:
                active.remove(rung)
            break
    return tuple(active)


def _both(trials: Sequence[Scores], rung: int, above: int) -> list[tuple[float, float]]:
    """Scores of the trials that were on both rungs."""
    return [(t[rung], t[above]) for t in trials if rung in t and above in t]


def spearman(a_N: npt.NDArray[np.float64], b_N: npt.NDArray[np.float64]) -> float:
    """Correlation of the ranks, ties sharing their mean rank; 1 where one of the two is all ties, which tells nothing."""

    def ranks(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        below = (x[None] < x[:, None]).sum(axis=1)
        same = (x[None] == x[:, None]).sum(axis=1)
        return np.asarray(below + (same - 1) / 2, dtype=np.float64)

    first, second = (r - r.mean() for r in (ranks(a_N), ranks(b_N)))
    spread = math.sqrt(float(first @ first) * float(second @ second))
    return float(first @ second) / spread if spread > 0 else 1.0


def lifted(trials: Sequence[Scores], count: int) -> list[float]:
    """Every trial's score as if it had been on the last rung: its highest rung, and from there up what the trials that were on
    two neighbouring rungs gained on average. NaN of a trial without any."""
    gains = [0.0] * count  # from rung r to the last
    for rung in range(count - 2, -1, -1):
        for above in range(rung + 1, count):
            steps = [after - before for before, after in _both(trials, rung, above)]
            if steps:
                gains[rung] = gains[above] + math.fsum(steps) / len(steps)
                break
    return [math.nan if not t else t[max(t)] + gains[max(t)] for t in trials]


def best_after_one_epoch(curve: Sequence[tuple[float, float]], noise: float) -> bool:
    """Whether a model was at its best within its first epoch: the first evaluation after it is worse than the best until then
    by more than three standard deviations of the noise of seeds.

    Args:
        curve: epoch (with fractions) and score, larger is better, in order.
        noise: standard deviation of the score over seeds, itself of a few; 1e-4 at least.
    """
    first = [score for epoch, score in curve if epoch <= 1]
    later = [score for epoch, score in curve if epoch > 1]
    return bool(first and later) and max(first) - later[0] > 3 * max(noise, _NOISE)


def one_epoch(found: Sequence[bool], scores: Sequence[float]) -> bool:
    """Whether further trials should train for a single epoch: of the better half of all trials, most of three or more were at
    their best after one. The others, such as those without any L2, say nothing of settings that are worth training.

    Args:
        found: :func:`best_after_one_epoch` of every trial that trained longer; ``scores``: of these, larger is better.
    """
    best = np.argsort(-np.nan_to_num(np.asarray(scores, dtype=np.float64), nan=-np.inf), kind="stable")[: (len(found) + 1) // 2]
    good = [found[i] for i in best]
    return len(good) >= _CHECKED and 2 * sum(good) > len(good)
