"""What two or three fields together tell of the label, looked at within a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

import numpy as np
import numpy.typing as npt

from ctrlib.search.screening import coded_relevance, dense_codes

Ints = npt.NDArray[np.int64]


class CombinationTally:
    """Scores of the combinations of fields, block by block; those looked at least often come first.

    A combination's codes are those of the tuple of its values, so no two tuples share one. Its score is the median over the
    blocks in which it was looked at, as of a field (:func:`~ctrlib.search.screening.relevance`, with ``permute``).

    Args:
        names: of the fields, without sequences, which have no one value a row.
        order: fields in a combination at most; 2 or 3.
        budget: combinations in one block.
    """

    def __init__(self, names: Sequence[str], order: Literal[2, 3], budget: int) -> None:
        self._names, self._budget = tuple(names), budget
        # the pairs first: of equally often looked at ones they come first
        self._all = [c for size in range(2, order + 1) for c in combinations(range(len(names)), size)]
        self._times_K = np.zeros(len(self._all), dtype=np.int64)
        self._found: dict[int, list[float]] = {}

    def add(self, codes: Mapping[str, Ints], y_N: Ints, twins_RN: Ints) -> None:
        """Score combinations in one block.

        Args:
            codes: of every field, from 0 without gaps.
            y_N: codes of the label; ``twins_RN`` [R, N] permutations of them.
        """
        rows = np.arange(len(y_N))
        least = np.argsort(self._times_K, kind="stable")[: self._budget]
        self._times_K[least] += 1
        joint: dict[tuple[int, ...], Ints] = {}
        for k in least.tolist():
            parts = self._all[k]
            x_N = codes[self._names[parts[0]]]
            for end in range(2, len(parts) + 1):
                known = joint.get(parts[:end])
                if known is None:
                    other = codes[self._names[parts[end - 1]]]
                    known = dense_codes(x_N * (int(other.max()) + 1) + other)
                    if end < 3:  # as the beginning of triples it is needed again
                        joint[parts[:end]] = known
                x_N = known
            self._found.setdefault(k, []).append(coded_relevance(x_N, y_N, rows, "permute", twins_RN).score)

    @property
    def looked_at(self) -> tuple[int, int]:
        """How many combinations were looked at, of how many."""
        return len(self._found), len(self._all)

    def scores(self) -> dict[tuple[str, ...], float]:
        """By the names of the fields, best first."""
        found = {tuple(self._names[i] for i in self._all[k]): float(np.median(v)) for k, v in self._found.items()}
        return dict(sorted(found.items(), key=lambda item: -item[1]))

    def combined(self) -> dict[str, float]:
        """By field, the median over all combinations it is part of: what it is worth in company."""
        scores = self.scores()
        parts = {name: [score for fields, score in scores.items() if name in fields] for name in self._names}
        return {name: float(np.median(values)) for name, values in parts.items() if values}
