"""How long a search may take, and what it keeps for its end."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ctrlib.config import ConfigError, positive

_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}
_LARGEST_FINISH = 0.4  # of the time: what comparing the best again may take at most
_LARGEST_NOISE = 0.1  # of the time: what measuring the noise of seeds may take
_LARGEST_TRIAL = 1 / 6  # of the time: what a single trial may take


def seconds_of(text: str) -> float:
    """``"90"``, ``"90s"``, ``"30m"``, ``"1.5h"`` or ``"2d"`` in seconds.

    Raises:
        ConfigError: anything else.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd]?)\s*", text)
    if found is None or float(found[1]) == 0:
        raise ConfigError(f"budget is {text!r}; expected a time such as 90s, 30m, 1.5h or 2d")
    return float(found[1]) * _UNITS[found[2]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Budget:
    """What a search may spend.

    Args:
        seconds: of wall clock, from the first trial to the end; ``None``: no limit.
        trials: how many; ``None``: no limit. One of the two is needed.
        finalists: settings that are compared again at the end; ``seeds``: with how many seeds each.
        workers: processes side by side.
    """

    seconds: float | None = None
    trials: int | None = None
    finalists: int = 5
    seeds: int = 3
    workers: int = 1

    def __post_init__(self) -> None:
        if self.seconds is None and self.trials is None:
            raise ConfigError("the search has no end; give a budget of time (--budget 30m) or of trials (--trials 50)")
        if self.seconds is not None:
            positive("budget", self.seconds)
        if self.trials is not None:
            positive("trials", self.trials)
        positive("finalists", self.finalists)
        positive("finish_seeds", self.seeds)
        positive("workers", self.workers)

    def check(self, trial: float, whole: float) -> None:
        """Raise :class:`~ctrlib.config.ConfigError` unless there is time for one trial and its comparison.

        Args:
            trial: estimated seconds on the lowest rung.
            whole: estimated seconds on all rows.
        """
        needed = trial + whole + self.seeds * whole / self.workers
        if self.seconds is not None and self.seconds < needed:
            comparing = self.seeds * whole / self.workers
            raise ConfigError(
                f"the budget of {self.seconds:.3g} s is too small: one trial takes about {trial + whole:.3g} s here, and to "
                f"train the best settings with {self.seeds} seeds {comparing:.3g} s more; give at least "
                f"{needed:.3g} s (--budget), fewer seeds, fewer rows, or say how many trials instead (--trials)"
            )

    def over(self, used: float, finished: int, whole: Sequence[float]) -> bool:
        """Whether no further trial is to begin.

        Args:
            used: seconds so far.
            finished: trials; the first one is begun however late it is.
            whole: seconds that trials on all rows took.
        """
        if self.trials is not None and finished >= self.trials:
            return True
        return self.seconds is not None and finished > 0 and self.left(used, whole) <= 0

    def left(self, used: float, whole: Sequence[float]) -> float:
        """Seconds for trials; ``used``, ``whole``: see :meth:`over`."""
        assert self.seconds is not None
        return self.seconds - used - self.finish(whole)

    def finish(self, whole: Sequence[float]) -> float:
        """Seconds kept for the comparison at the end."""
        assert self.seconds is not None
        if not whole:
            return _LARGEST_FINISH * self.seconds
        wanted = self.finalists * self.seeds * statistics.median(whole) / self.workers
        return min(wanted, _LARGEST_FINISH * self.seconds)

    def affordable(self, used: float, whole: Sequence[float]) -> int:
        """How many of ``finalists`` there is time for, at least one; ``whole``: seconds of a seed of each, best first, 0 if
        it is trained already."""
        if self.seconds is None:
            return min(self.finalists, len(whole))
        left, count = self.seconds - used, 0
        for seconds in whole[: self.finalists]:
            left -= self.seeds * seconds / self.workers
            if left < 0 and count and seconds:
                break
            count += 1
        return count

    def extra(self, used: float, chosen: Sequence[float], front: Sequence[float]) -> int:
        """How many of the points of the front there is time for beside the best, with one seed each: at least one.

        Args:
            used: seconds so far.
            chosen: seconds of each of those that are compared; ``front``: of the points.
        """
        if self.seconds is None:
            return len(front)
        left = (self.seconds - used) * self.workers - self.seeds * sum(chosen)
        count = sum(total <= left for total in itertools.accumulate(front))
        return min(max(count, 1), len(front))

    def longest_trial(self, used: float, whole: Sequence[float]) -> float | None:
        """Seconds after which a slow trial is given up, as it would leave no time for others.

        Until there is one on all rows, what is left must be enough to train the trial again with all seeds.
        """
        if self.seconds is None:
            return None
        if not whole:
            return max(self.seconds - used, 0.0) / (1 + self.seeds / self.workers)
        return self.seconds * _LARGEST_TRIAL

    @property
    def noise(self) -> float | None:
        """Seconds for the noise of seeds."""
        return None if self.seconds is None else self.seconds * _LARGEST_NOISE
