"""What to try next: a prior that is hedged, then a model of the trials so far. The strategy behind ``ctrlib search``.

It chooses among candidates, whatever they are: settings drawn from a space of models, or the rows of a log of past runs. So
``python -m benchmarks.search --replay`` measures the code that searches. NumPy only; larger scores are better throughout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt

from ctrlib.config import ConfigError, check_not_negative, positive

Params = Mapping[str, object]
Floats = npt.NDArray[np.float64]
Turn = Literal["prior", "random", "model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Axis:
    """How far two values of one parameter are apart: 0 if they are equal, ``weight`` from one end of the range to the other.

    Args:
        low, high: the range of a number.
        log: distances are those of logarithms; values below ``low``, 0 among them, count as ``low``.
        choices: names instead of numbers, any two of which are ``weight`` apart.
        weight: see above. A value and none (the parameter is not part of these settings) are this far apart too.
    """

    low: float = 0.0
    high: float = 1.0
    log: bool = False
    choices: tuple[object, ...] = ()
    weight: float = 1.0

    def __post_init__(self) -> None:
        positive("axis.weight", self.weight)
        if not self.choices and not self.low < self.high:
            raise ConfigError(f"an axis goes from {self.low} to {self.high}; expected a low end below the high one")
        if self.log and not self.low > 0:
            raise ConfigError(f"a logarithmic axis begins at {self.low}; expected a number above 0")

    def place(self, value: object) -> float:
        """Where a value is: in [0, 1] for numbers of the range, the position of a name, NaN for ``None``."""
        if value is None:
            return math.nan
        if self.choices:
            return float(self.choices.index(value))
        number = float(value)  # type: ignore[arg-type]
        if self.log:
            return math.log(max(number, self.low) / self.low) / math.log(self.high / self.low)
        return (number - self.low) / (self.high - self.low)

    def value(self, place: float) -> float:
        """The number at a place in [0, 1]."""
        if self.log:
            return min(max(self.low * math.exp(place * math.log(self.high / self.low)), self.low), self.high)
        return self.low + place * (self.high - self.low)


def merged(axes: Sequence[Mapping[str, Axis]]) -> dict[str, Axis]:
    """One axis for each name, where a parameter's range depends on another one: the range or the choices of all together.
    A name that is a choice here and a number there is a choice."""
    found: dict[str, Axis] = {}
    for name, axis in (item for of in axes for item in of.items()):
        other = found.get(name, axis)
        if axis.choices or other.choices:
            found[name] = replace(other, choices=tuple(dict.fromkeys((*other.choices, *axis.choices))))
        else:
            low, high = min(axis.low, other.low), max(axis.high, other.high)
            found[name] = replace(other, low=low, high=high, log=axis.log and other.log)
    return found


@dataclass(frozen=True, slots=True)
class Places:
    """Settings as points: ``numbers_NP`` [N, P] and ``names_NQ`` [N, Q], and the weights of their axes."""

    numbers_NP: Floats  # noqa: N815 (a shape suffix)
    names_NQ: Floats  # noqa: N815 (a shape suffix)
    weight_P: Floats  # noqa: N815 (a shape suffix)
    weight_Q: Floats  # noqa: N815 (a shape suffix)

    def __len__(self) -> int:
        return len(self.numbers_NP)

    def __getitem__(self, which: npt.NDArray[np.int64] | Sequence[int]) -> Places:
        at = np.asarray(which, dtype=np.int64)
        return Places(self.numbers_NP[at], self.names_NQ[at], self.weight_P, self.weight_Q)


def locate(axes: Mapping[str, Axis], settings: Sequence[Params]) -> Places:
    """The points of settings, by which :func:`kernel` compares them."""
    numbers = {name: axis for name, axis in axes.items() if not axis.choices}
    names = {name: axis for name, axis in axes.items() if axis.choices}

    def placed(of: Mapping[str, Axis]) -> Floats:
        rows = [[axis.place(params.get(name)) for name, axis in of.items()] for params in settings]
        return np.array(rows, dtype=np.float64).reshape(len(settings), len(of))

    weights = [np.array([axis.weight for axis in of.values()], dtype=np.float64) for of in (numbers, names)]
    return Places(placed(numbers), placed(names), *weights)


@dataclass(frozen=True, kw_only=True, slots=True)
class Hedge:
    """When to believe what. Trial 0 takes the candidate that the prior likes best, the next ``random`` trials any, all others
    the one with the largest expected improvement under a Gaussian process whose mean is the prior, scaled by min(1, decay/n)
    after n trials. So a prior that is right pays from the first trial on, and one that is wrong is outvoted.

    The process has the kernel exp(−Σ_p d_p(a, b)) over the axes p, observation noise ``noise``, and scores standardised. A
    score that is further below the median than twice the best is above it counts as just so bad: one run gone wrong would else
    make all others alike. Length scales are not fitted: over the BARS log that made it worse, of ten trials or fewer.

    Args:
        random: trials at random after the first.
        decay: see above.
        noise: variance of a repeated trial, in that of all.
        random_from, random_every: from this trial on, every so many-th is again at random.
    """

    random: int = 2
    decay: float = 6.0
    noise: float = 0.5
    random_from: int = 16
    random_every: int = 4

    def __post_init__(self) -> None:
        check_not_negative("hedge.random", self.random)
        check_not_negative("hedge.decay", self.decay)
        check_not_negative("hedge.random_from", self.random_from)
        positive("hedge.noise", self.noise)
        positive("hedge.random_every", self.random_every)

    def turn(self, number: int) -> Turn:
        """How the trial of this number is chosen."""
        if number == 0:
            return "prior"
        late = number >= self.random_from and number % self.random_every == 0
        return "random" if number <= self.random or late else "model"

    def choose(
        self,
        candidates: Places,
        prior_C: Floats,
        seen: Places,
        seen_prior_S: Floats,
        score_S: Floats,
        rng: np.random.Generator,
        number: int | None = None,
    ) -> int:
        """The candidate to try next.

        Args:
            candidates: to choose from.
            prior_C: [C] what the prior expects of each, in standard deviations; 0: nothing known.
            seen: settings that were tried, or are being tried.
            seen_prior_S, score_S: [S] what the prior expected of them, and their scores. A score of NaN is not known yet: the
                median stands in for it, so that workers side by side do not all try the same.
            rng: breaks ties.
            number: of this trial, where not all that came before are known yet; ``None``: S.
        """
        turn = self.turn(len(seen) if number is None else number)
        if turn == "random":
            return int(rng.integers(len(candidates)))
        tie_C = rng.random(len(candidates)) * 1e-9
        known_S = ~np.isnan(score_S)
        if turn == "prior" or not known_S.any():
            return int(np.argmax(prior_C + tie_C))
        middle = float(np.median(score_S[known_S]))
        score_S = np.maximum(np.where(known_S, score_S, middle), middle - 2 * (np.nanmax(score_S) - middle))
        z_S = (score_S - score_S.mean()) / (score_S.std() + 1e-12)
        believed = min(1.0, self.decay / len(seen))
        rest_S = z_S - believed * seen_prior_S
        level = rest_S.mean()
        rest_S = rest_S - level
        factor = np.linalg.cholesky(kernel(seen, seen) + self.noise * np.eye(len(seen)))
        half_S = np.linalg.solve(factor, rest_S)
        half_SC = np.linalg.solve(factor, kernel(seen, candidates))
        mean_C = believed * prior_C + level + half_S @ half_SC
        spread_C = np.sqrt(np.maximum(half_S @ half_S / len(seen) * (1 - np.square(half_SC).sum(axis=0)), 1e-9))
        return int(np.argmax(_expected_improvement(mean_C, spread_C, float(z_S.max())) + tie_C * 1e-3))


def kernel(a: Places, b: Places) -> Floats:
    """exp(−Σ_p w_p d_p(a_i, b_j)), [A, B]; d of two numbers is their difference, of two names 1 unless they are the same."""
    numbers = _with_absent(a.numbers_NP, b.numbers_NP, np.abs(a.numbers_NP[:, None] - b.numbers_NP))
    names = _with_absent(a.names_NQ, b.names_NQ, (a.names_NQ[:, None] != b.names_NQ).astype(np.float64))
    result: Floats = np.exp(-(numbers @ a.weight_P + names @ a.weight_Q))
    return result


def _with_absent(a_AP: Floats, b_BP: Floats, apart_ABP: Floats) -> Floats:
    gone_A, gone_B = np.isnan(a_AP)[:, None], np.isnan(b_BP)
    return np.where(gone_A & gone_B, 0.0, np.where(gone_A | gone_B, 1.0, apart_ABP))


def transfer(past: Sequence[tuple[Places, Floats]], candidates: Places, noise: float = 1.0) -> Floats:
    """What past studies expect of the candidates, [C], in standard deviations: the mean, over the studies, of a Gaussian
    process fitted to each one's scores.

    Args:
        past: settings and scores of each study; see :func:`standardised` for scores that compare between studies.
        candidates: of which something is to be expected; far from all that was tried it is 0.
        noise: of the process; large, since another study is only alike.
    """
    total_C = np.zeros(len(candidates))
    for tried, score_T in past:
        weight_T = np.linalg.solve(kernel(tried, tried) + noise * np.eye(len(tried)), score_T)
        total_C += kernel(candidates, tried) @ weight_T
    return total_C / max(len(past), 1)


def standardised(score_T: Floats) -> Floats:
    """Ranks with mean 0 and variance 1: the same for any monotone change of the scores; 0 where there is only one."""
    ranks = np.argsort(np.argsort(score_T, kind="stable"), kind="stable").astype(np.float64)
    spread = ranks.std()
    return (ranks - ranks.mean()) / spread if spread > 0 else np.zeros_like(ranks)


def _expected_improvement(mean_C: Floats, spread_C: Floats, best: float) -> Floats:
    """E[max(0, N(mean, spread²) − best)]"""
    u_C = (mean_C - best) / spread_C
    below_C = 0.5 * (1 + np.vectorize(math.erf, otypes=[np.float64])(u_C / math.sqrt(2)))
    improvement_C: Floats = spread_C * (u_C * below_C + np.exp(-0.5 * np.square(u_C)) / math.sqrt(2 * math.pi))
    return improvement_C
