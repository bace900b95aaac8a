"""How much pairs of fields tell of the label: mutual information of each pair of values, from counts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ctrlib.data.store import Store
from ctrlib.models.optinter import Choice, field_pairs
from ctrlib.schema import DataError, suggest


@dataclass(frozen=True, slots=True)
class PairInformation:
    """Mutual information of a pair of values and the label, in nats.

    ``information`` is that of the observed frequencies, Σ p(h, y) ln(p(h, y) / (p(h) p(y))). It is too large, the more the more
    pairs of values there are for the rows: a pair seen once "tells" its label for certain. ``corrected`` takes off the
    Miller–Madow estimate of that bias, (K_hy − K_h − K_y + 1) / 2N with K the numbers of different h, y and (h, y) among N
    rows. With many values seen once or twice that is not enough; ``once`` says how large their share of the rows is.
    """

    information: float
    corrected: float
    values: int
    once: float


def pair_information(store: Store, *, label: str | None = None) -> dict[str, PairInformation]:
    """The information of every pair of categorical fields, from the training rows; one pair in memory at a time.

    Args:
        store: of ids; rare values count as one, OOV. Its crosses are not needed, and its row weights are not read.
        label: which one; ``None``: the only one.

    Raises:
        DataError: no such label, or several and none named.
    """
    encoder = store.encoder
    labels = encoder.schema.labels
    if label is None and len(labels) > 1:
        raise DataError(f"pair information is of one label, and the data has {', '.join(labels)}; name one of them")
    if label is not None and label not in labels:
        raise DataError(f"there is no label {label!r}{suggest(label, labels)}")
    split = store.split("train")
    columns = {c.name: (i, c.vocab_size) for i, c in enumerate(encoder.layout.sparse)}
    label_N = split.labels[:, 0 if label is None else labels.index(label)].numpy() > 0
    entropy_y = _entropy(np.array([np.count_nonzero(label_N), np.count_nonzero(~label_N)]))
    found = {}
    for pair in field_pairs(encoder.layout):
        (left, _), (right, size) = columns[pair.left], columns[pair.right]
        key_N = split.sparse[:, left].numpy().astype(np.int64) * size + split.sparse[:, right].numpy()
        both, counts = np.unique(key_N * 2 + label_N, return_counts=True)
        _, first = np.unique(both // 2, return_index=True)
        values = np.add.reduceat(counts, first)
        rows = len(key_N)
        information = entropy_y + _entropy(values) - _entropy(counts)
        bias = (len(counts) - len(values) - len(np.unique(label_N)) + 1) / (2 * rows)
        once = float(np.count_nonzero(values == 1) / rows)
        found[pair.name] = PairInformation(information, information - bias, len(values), once)
    return found


def information_by_choice(
    information: Mapping[str, PairInformation], pairs: Mapping[str, Choice]
) -> dict[Choice, tuple[float, float]]:
    """Means over the pairs of each choice, as in the paper's Figure 5: of the observed and of the corrected information.

    A choice that no pair has is left out.

    Raises:
        DataError: a pair of ``pairs`` is not in ``information``.
    """
    members: dict[Choice, list[PairInformation]] = {}
    for name, choice in pairs.items():
        if name not in information:
            raise DataError(f"there is no information on the pair {name!r}{suggest(name, information)}")
        members.setdefault(choice, []).append(information[name])
    return {
        choice: (math.fsum(m.information for m in found) / len(found), math.fsum(m.corrected for m in found) / len(found))
        for choice, found in members.items()
    }


def _entropy(counts: np.ndarray[tuple[int, ...], np.dtype[np.int64]]) -> float:
    """−Σ p ln p of counts, in nats."""
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())
