"""What methods that rank fields share: how many to keep, and how far two rankings agree."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ctrlib.config import ConfigError
from ctrlib.schema import DataError, Schema

Top = int | float
"""How many fields to keep: a number of them, or a share in (0, 1] (rounded up)."""


def check_top(name: str, top: Top) -> None:
    """Raise :class:`~ctrlib.config.ConfigError` unless ``top`` is a number from 1 up, or a share above 0 and at most 1."""
    allowed = top >= 1 if isinstance(top, int) else 0 < top <= 1
    if not allowed:
        raise ConfigError(f"{name} is {top!r}; expected a number of fields from 1 up, or a share above 0 and up to 1.0")


def number_to_keep(schema: Schema, top: Top) -> int:
    """``top`` as a number of fields; a search asks before it begins.

    Raises:
        ConfigError: ``top`` is more than there are.
    """
    total = len(schema.fields)
    if isinstance(top, int) and top > total:
        raise ConfigError(f"top is {top}, but the data has {total} fields; expected at most so many")
    return top if isinstance(top, int) else math.ceil(top * total - 1e-9)


def best_fields(schema: Schema, scores: Mapping[str, float], top: Top) -> tuple[str, ...]:
    """The fields with the highest scores, in the order of the schema; of equal ones the first.

    A cross is made of the ids of two fields and cannot be kept without them. So a field is ranked by its own score or that of
    the best cross it is part of, whichever is higher, and before that cross. Time gaps follow their
    history: they are not ranked.

    Args:
        schema: of the data.
        scores: of all fields, larger is better.
        top: see :data:`Top`.

    Raises:
        ConfigError: ``top`` is more than there are.
        DataError: a score is not a number.
    """
    names = [f.name for f in schema.fields]
    count = number_to_keep(schema, top)
    for name in names:
        if math.isnan(scores[name]):
            raise DataError(f"the score of field {name!r} is not a number; check its values, or take more rows")
    worth = {name: scores[name] for name in names}
    for cross in schema.crosses:
        for part in cross.of:
            worth[part] = max(worth[part], scores[cross.name])
    crosses = {cross.name for cross in schema.crosses}
    kept = set(sorted(names, key=lambda name: (-worth[name], name in crosses))[:count])
    return tuple(name for name in names if name in kept)


def kendall_tau(a: Mapping[str, float], b: Mapping[str, float]) -> float:
    """How far two rankings agree, as Kendall's τ_b in [−1, 1] (doi:10.1093/biomet/33.3.239):

        τ = Σ_{i<j} s_ij t_ij / √(Σ_{i<j} s_ij² · Σ_{i<j} t_ij²),   s_ij = sign(a_i − a_j), t_ij = sign(b_i − b_j)

    1: the same order; 0: none in common; NaN where a ranking is all ties.

    Args:
        a, b: scores by field, of the same fields; ``Selection.scores`` of two seeds, say.

    Raises:
        DataError: they rank different fields, or fewer than two.
    """
    if set(a) != set(b) or len(a) < 2:
        different = ", ".join(sorted(set(a) ^ set(b))[:5])
        raise DataError(f"two rankings of the same two fields or more are expected; they differ in: {different or 'nothing'}")
    signs = [np.sign(np.subtract.outer(v, v)) for v in (np.array([scores[name] for name in a]) for scores in (a, b))]
    pairs = math.sqrt(np.square(signs[0]).sum() * np.square(signs[1]).sum())
    return float((signs[0] * signs[1]).sum() / pairs) if pairs else math.nan
