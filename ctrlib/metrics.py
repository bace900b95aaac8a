"""How good probabilities are: ranking (AUC, GAUC), likelihood (log loss, normalized entropy), calibration (ECE, COPC).

Every function takes array-likes of N rows, works in float64 and accepts row weights (``None``: every row weighs 1). Labels are
0 or 1. All raise :class:`~ctrlib.schema.DataError` (a ``ValueError``) when lengths differ, a label is neither 0 nor 1, a weight
is negative, or a value is not finite. A metric that the rows cannot define (one class only, or no weight at all) is ``nan``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrlib.schema import DataError

Floats: TypeAlias = NDArray[np.float64]


def auc(labels: ArrayLike, scores: ArrayLike, weight: ArrayLike | None = None) -> float:
    """The area under the ROC curve, exact: P(score of a positive > score of a negative) + ½·P(equal).

    Args:
        labels: [N] of 0 and 1.
        scores: [N]; any increasing function of the probability.
        weight: [N] row weights; a pair weighs the product of its rows' weights.

    Returns:
        A number in [0, 1]; ``nan`` if only one class is present.
    """
    y_N, s_N, w_N = checked_rows(labels, scores, weight, "scores")
    auc_G, _ = _auc_of_runs(y_N, s_N, w_N, np.argsort(s_N), None)
    return float(auc_G[0]) if len(auc_G) else float("nan")


def gauc(labels: ArrayLike, scores: ArrayLike, group: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Group AUC: the mean of each group's AUC, weighted by the group's rows (arXiv:1706.06978, section 6.2).

    Groups with a single class have no AUC and are left out of both sums.

    Args:
        labels: [N] of 0 and 1.
        scores: [N].
        group: [N] of ints or strings: the user, or the request.
        weight: [N] row weights: they weigh the pairs inside a group, and a group then weighs the sum of its rows' weights.

    Returns:
        A number in [0, 1]; ``nan`` if no group has both classes.
    """
    y_N, s_N, w_N = checked_rows(labels, scores, weight, "scores")
    group_N = checked_groups(group, y_N)
    auc_G, weight_G = _auc_of_runs(y_N, s_N, w_N, np.lexsort((s_N, group_N)), group_N)
    defined_G = ~np.isnan(auc_G)
    total = weight_G[defined_G].sum()
    return float((auc_G[defined_G] * weight_G[defined_G]).sum() / total) if total > 0 else float("nan")


def log_loss(labels: ArrayLike, probabilities: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Mean of −[y·ln p + (1 − y)·ln(1 − p)], natural logarithm; p is clipped to [ε, 1 − ε], ε = 2⁻⁵² (float64).

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].
        weight: [N] row weights.
    """
    y_N, p_N, w_N = checked_rows(labels, probabilities, weight, "probabilities")
    epsilon = np.finfo(np.float64).eps
    clipped_N = np.clip(p_N, epsilon, 1 - epsilon)
    return _ratio(-(w_N * np.log(np.where(y_N > 0, clipped_N, 1 - clipped_N))).sum(), w_N.sum())


def normalized_entropy(labels: ArrayLike, probabilities: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Log loss divided by the entropy of the base rate (He et al., ADKDD 2014, section 3).

    1 is what the constant base rate reaches; lower is better. ``nan`` if only one class is present.

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].
        weight: [N] row weights.
    """
    y_N, _, w_N = checked_rows(labels, probabilities, weight, "probabilities")
    rate = _ratio((w_N * y_N).sum(), w_N.sum())
    entropy = -(rate * np.log(rate) + (1 - rate) * np.log(1 - rate)) if 0 < rate < 1 else 0.0
    return _ratio(log_loss(labels, probabilities, weight), entropy)


def ece(labels: ArrayLike, probabilities: ArrayLike, num_bins: int = 20, weight: ArrayLike | None = None) -> float:
    """Expected calibration error: Σ_b (w_b / W)·|mean label in b − mean probability in b| over bins of equal mass.

    Rows are sorted by probability and cut into ``num_bins`` bins of (nearly) the same total weight. Rows with equal
    probability always share a bin (the one where the middle of their weight falls), so the order of rows has no effect.

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].
        num_bins: bins.
        weight: [N] row weights.

    Raises:
        DataError: ``num_bins`` below 1.
    """
    if num_bins < 1:
        raise DataError(f"num_bins is {num_bins}; expected 1 or more")
    y_N, p_N, w_N = checked_rows(labels, probabilities, weight, "probabilities")
    total = w_N.sum()
    if not total > 0:
        return float("nan")
    order_N = np.argsort(p_N)
    starts_R = run_starts(p_N[order_N])
    weight_R = np.add.reduceat(w_N[order_N], starts_R)
    excess_R = np.add.reduceat((w_N * (p_N - y_N))[order_N], starts_R)
    middle_R = (np.cumsum(weight_R) - weight_R / 2) / total
    bin_R = np.minimum((middle_R * num_bins).astype(np.int64), num_bins - 1)
    return float(np.abs(np.bincount(bin_R, excess_R)).sum() / total)


def copc(labels: ArrayLike, probabilities: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Predicted over observed clicks, Σ w·p / Σ w·y: above 1 the model promises too much. ``nan`` without positives.

    The field also uses the inverse under this name (clicks over predicted clicks).

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].
        weight: [N] row weights.
    """
    y_N, p_N, w_N = checked_rows(labels, probabilities, weight, "probabilities")
    return _ratio((w_N * p_N).sum(), (w_N * y_N).sum())


def summarize(
    labels: ArrayLike, probabilities: ArrayLike, *, weight: ArrayLike | None = None, group: ArrayLike | None = None
) -> dict[str, float]:
    """Every metric of this module for one task, ready for JSON.

    Args:
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].
        weight: [N] row weights.
        group: [N] ints or strings, for ``gauc``.

    Returns:
        ``rows`` (an int, unweighted), ``label_rate``, ``auc``, ``log_loss``, ``normalized_entropy``, ``ece``, ``copc``, and
        ``gauc`` if ``group`` is given.
    """
    y_N, p_N, w_N = checked_rows(labels, probabilities, weight, "probabilities")
    metrics: dict[str, float] = {
        "rows": len(y_N),
        "label_rate": _ratio((w_N * y_N).sum(), w_N.sum()),
        "auc": auc(y_N, p_N, w_N),
        "log_loss": log_loss(y_N, p_N, w_N),
        "normalized_entropy": normalized_entropy(y_N, p_N, w_N),
        "ece": ece(y_N, p_N, weight=w_N),
        "copc": copc(y_N, p_N, w_N),
    }
    if group is not None:
        metrics["gauc"] = gauc(y_N, p_N, group, w_N)
    return metrics


def summarize_tasks(
    names: Sequence[str],
    labels: ArrayLike,
    probabilities: ArrayLike,
    *,
    weight: ArrayLike | None = None,
    group: ArrayLike | None = None,
) -> dict[str, Any]:
    """:func:`summarize` for T tasks on the same rows.

    Args:
        names: the T label names.
        labels: [N, T] of 0 and 1.
        probabilities: [N, T] in [0, 1].
        weight: [N] row weights.
        group: [N] ints or strings, for ``gauc``.

    Returns:
        The mean over tasks of each metric (``nan`` if it is undefined for a task; ``rows`` stays N), and under ``"labels"`` the
        metrics of each task by name.

    Raises:
        DataError: the shapes are not [N, T]; otherwise as :func:`summarize`, naming the task.
    """
    y_NT, p_NT = np.asarray(labels), np.asarray(probabilities)
    if not names or y_NT.ndim != 2 or y_NT.shape != p_NT.shape or y_NT.shape[1] != len(names):
        raise DataError(
            f"labels are of shape {y_NT.shape} and probabilities of shape {p_NT.shape}; "
            f"expected [rows, {len(names)}] for both, a column for each of {list(names)}"
        )
    tasks: dict[str, dict[str, float]] = {}
    for t, name in enumerate(names):
        try:
            tasks[name] = summarize(y_NT[:, t], p_NT[:, t], weight=weight, group=group)
        except DataError as error:
            raise DataError(f"task {name!r}: {error}") from error
    mean: dict[str, Any] = {key: float(np.mean([task[key] for task in tasks.values()])) for key in tasks[names[0]]}
    return mean | {"rows": len(y_NT), "labels": tasks}


def summarize_classes(labels: ArrayLike, probabilities: ArrayLike, *, weight: ArrayLike | None = None) -> dict[str, float]:
    """Metrics of one label of C classes.

    Weights balance classes in the log loss; in the other metrics a row counts once if its weight is above 0, else not at all.

    Args:
        labels: [N] of 0 to C − 1.
        probabilities: [N, C] in [0, 1].
        weight: [N].

    Returns:
        ``rows`` (an int, of those that count), ``accuracy`` of the likeliest class, ``macro_f1`` (the mean over classes of
        2·hits / (rows of the class + rows said to be of it), over those that are there or are said to be), ``auc`` (of the
        second class; of more than two, the mean of each that is there against the rest) and ``log_loss``.

    Raises:
        DataError: see the top of this module.
    """
    p_NC, y_N = np.asarray(probabilities, dtype=np.float64), np.asarray(labels)
    if p_NC.ndim != 2 or y_N.shape != p_NC.shape[:1]:
        raise DataError(
            f"labels are of shape {y_N.shape}, probabilities of shape {p_NC.shape}; expected [rows], [rows, classes]"
        )
    w_N = np.ones(len(y_N)) if weight is None else np.asarray(weight, dtype=np.float64)
    if w_N.shape != y_N.shape:
        raise DataError(f"weight is of shape {w_N.shape}; expected {y_N.shape}, one per row")
    _refuse(~np.isfinite(w_N) | (w_N < 0), w_N, "weights are negative or not finite; expected numbers from 0 up")
    kept_N = w_N > 0
    p_NC, y_N, w_N = p_NC[kept_N], y_N[kept_N].astype(np.int64), w_N[kept_N]
    count = p_NC.shape[1]
    _refuse((y_N < 0) | (y_N >= count), y_N.astype(np.float64), f"labels are no class; expected 0 to {count - 1}")
    outside_N = ~np.all((p_NC >= 0) & (p_NC <= 1), axis=1)
    _refuse(outside_N, p_NC.max(1, initial=0), "rows have probabilities outside [0, 1]; expected probabilities, not logits")
    said_N = p_NC.argmax(1)
    there_C, told_C = np.bincount(y_N, minlength=count), np.bincount(said_N, minlength=count)
    hits_C = np.bincount(y_N[said_N == y_N], minlength=count)
    known_C = there_C + told_C > 0
    own_N = np.clip(p_NC[np.arange(len(y_N)), y_N], np.finfo(np.float64).eps, 1)
    # of a class that has no row, or has all, there is none
    both = [1] if count == 2 else [c for c in range(count) if 0 < there_C[c] < len(y_N)]
    aucs = [auc(y_N == c, p_NC[:, c]) for c in both]
    return {
        "rows": len(y_N),
        "accuracy": _ratio(hits_C.sum(), len(y_N)),
        "macro_f1": _ratio((2 * hits_C[known_C] / (there_C + told_C)[known_C]).sum(), known_C.sum()),
        "auc": float(np.mean(aucs)) if aucs else float("nan"),
        "log_loss": _ratio(-(w_N * np.log(own_N)).sum(), w_N.sum()),
    }


def by_segment(
    segment: Iterable[object], labels: ArrayLike, probabilities: ArrayLike, *, weight: ArrayLike | None = None
) -> list[dict[str, Any]]:
    """The metrics of each segment of the rows: where a model is good, and where it is not calibrated.

    Args:
        segment: [N] values of one type; ``None`` and NaN are one segment, reported as ``None``.
        labels: [N] of 0 and 1.
        probabilities: [N] in [0, 1].
        weight: [N] row weights.

    Returns:
        For each distinct value: ``segment``, ``rows``, ``label_rate``, ``auc``, ``log_loss``, ``ece``, ``copc``; most rows
        first, then by value, ``None`` last.
    """
    y_N, p_N, w_N = checked_rows(labels, probabilities, weight, "probabilities")
    # Arrays and data frame columns turn into plain Python values (and nulls into None) through their own method.
    values = segment.tolist() if hasattr(segment, "tolist") else list(segment)
    if len(values) != len(y_N):
        raise DataError(f"segment has {len(values)} rows and labels {len(y_N)}; expected one segment per row")
    codes: dict[object, int] = {}
    code_N = np.fromiter(
        (codes.setdefault(None if v is None or v != v else v, len(codes)) for v in values), np.int64, len(values)
    )
    order_N = np.argsort(code_N, kind="stable")
    rows_G = np.split(order_N, run_starts(code_N[order_N])[1:])
    found: list[dict[str, Any]] = []
    for value, rows in zip(codes, rows_G, strict=False):  # without rows there is no value, and one empty piece
        metrics = summarize(y_N[rows], p_N[rows], weight=w_N[rows])
        del metrics["normalized_entropy"]
        found.append({"segment": value} | metrics)
    return sorted(found, key=lambda s: (-s["rows"], s["segment"] is None, s["segment"]))


class StreamingAUC:
    """AUC of any number of rows in fixed memory, with a guaranteed bound on its error.

    Counts positives and negatives in bins that are uniform in logit(p) over [−20, 20] (p from 2e-9 to 1 − 2e-9; the outermost
    bins also take what lies beyond), so small click-through rates are resolved as finely as large ones.

    Args:
        num_bins: bins; memory is 16 bytes each.

    Raises:
        DataError: ``num_bins`` below 2.
    """

    def __init__(self, num_bins: int = 2**16) -> None:
        if num_bins < 2:
            raise DataError(f"num_bins is {num_bins}; expected 2 or more")
        # Edges live in probability space: comparing p with them keeps the order of any two probabilities, which the rounding
        # of a logarithm might not, and the bound relies on it.
        self._edges = 1 / (1 + np.exp(-np.linspace(-20.0, 20.0, num_bins + 1)[1:-1]))
        self._positive = np.zeros(num_bins)
        self._negative = np.zeros(num_bins)

    def update(self, labels: ArrayLike, probabilities: ArrayLike, weight: ArrayLike | None = None) -> None:
        """Count some rows: labels [N] of 0 and 1, probabilities [N] in [0, 1], weight [N]."""
        y_N, p_N, w_N = checked_rows(labels, probabilities, weight, "probabilities")
        bin_N = np.searchsorted(self._edges, p_N, side="right")
        self._positive += np.bincount(bin_N, w_N * y_N, len(self._positive))
        self._negative += np.bincount(bin_N, w_N * (1 - y_N), len(self._negative))

    def merge(self, other: StreamingAUC) -> None:
        """Add the rows that ``other`` has counted.

        Raises:
            DataError: the numbers of bins differ.
        """
        if len(self._positive) != len(other._positive):
            raise DataError(f"cannot merge {len(other._positive)} bins into {len(self._positive)}; expected the same num_bins")
        self._positive += other._positive
        self._negative += other._negative

    def compute(self) -> tuple[float, float]:
        """(AUC, bound): the exact AUC is within ``bound`` (up to float64 rounding) of this one.

        Only the order of pairs inside one bin is unknown; each counts ½ and is wrong by at most ½, so
        bound = Σ_b positive_b·negative_b / (2·P·N). Both are ``nan`` if only one class is present.
        """
        pairs = self._positive.sum() * self._negative.sum()
        below_b = np.cumsum(self._negative) - self._negative
        inside = (self._positive * self._negative).sum() / 2
        return _ratio((self._positive * below_b).sum() + inside, pairs), _ratio(inside, pairs)


def checked_rows(labels: ArrayLike, values: ArrayLike, weight: ArrayLike | None, name: str) -> tuple[Floats, Floats, Floats]:
    """Labels, values and weights as checked float64 arrays [N]; values named ``probabilities`` must lie in [0, 1]."""
    y_N, v_N = np.asarray(labels, dtype=np.float64), np.asarray(values, dtype=np.float64)
    w_N = np.ones_like(y_N) if weight is None else np.asarray(weight, dtype=np.float64)
    if y_N.ndim != 1 or v_N.shape != y_N.shape or w_N.shape != y_N.shape:
        raise DataError(
            f"labels are of shape {y_N.shape}, {name} of {v_N.shape}, weight of {w_N.shape}; expected [rows] for all"
        )
    _refuse(~np.isfinite(v_N), v_N, f"{name} are not finite; expected numbers")
    if name == "probabilities":
        _refuse((v_N < 0) | (v_N > 1), v_N, "probabilities are outside [0, 1]; expected probabilities, not logits")
    _refuse((y_N != 0) & (y_N != 1), y_N, "labels are neither 0 nor 1; expected only these")
    _refuse(~np.isfinite(w_N) | (w_N < 0), w_N, "weights are negative or not finite; expected numbers from 0 up")
    return y_N, v_N, w_N


def checked_groups(group: ArrayLike, y_N: Floats) -> NDArray[Any]:
    """``group`` as an array [N] of ints or strings.

    Raises:
        DataError: another shape or type.
    """
    group_N = np.asarray(group)
    if group_N.dtype.kind in "OT":
        group_N = group_N.astype(str)
    if group_N.shape != y_N.shape or group_N.dtype.kind not in "biuUS":
        raise DataError(
            f"group is {group_N.dtype} of shape {group_N.shape}; expected ints or strings of shape {y_N.shape}, one per row"
        )
    return group_N


def _refuse(bad_N: NDArray[np.bool_], values_N: Floats, what: str) -> None:
    if bad_N.any():
        first = int(bad_N.argmax())
        raise DataError(f"{int(bad_N.sum())} of {len(bad_N)} {what} (the first is row {first}: {values_N[first]})")


def _ratio(numerator: float, denominator: float) -> float:
    return float(numerator / denominator) if denominator > 0 else float("nan")


def run_starts(*sorted_N: NDArray[Any]) -> NDArray[np.intp]:
    """Where a run of rows that are equal in every one of the arrays begins."""
    changes = np.zeros(len(sorted_N[0]), dtype=np.bool_)
    changes[:1] = True
    for values in sorted_N:
        changes[1:] |= values[1:] != values[:-1]
    return np.flatnonzero(changes)


def _auc_of_runs(
    y_N: Floats, s_N: Floats, w_N: Floats, order_N: NDArray[np.intp], group_N: NDArray[Any] | None
) -> tuple[Floats, Floats]:
    """AUC and weight of every group, both [G]; ``order_N`` sorts by group, then score; ``None``: one group."""
    if not len(order_N):
        return np.zeros(0), np.zeros(0)
    y_N, s_N, w_N = y_N[order_N], s_N[order_N], w_N[order_N]
    sorted_group_N = np.zeros(len(y_N), dtype=np.int8) if group_N is None else group_N[order_N]
    ties_R = run_starts(sorted_group_N, s_N)  # runs of one score in one group: their pairs count a half
    groups_G = run_starts(sorted_group_N[ties_R])  # positions among the runs
    positive_R = np.add.reduceat(w_N * y_N, ties_R)
    negative_R = np.add.reduceat(w_N * (1 - y_N), ties_R)
    before_R = np.cumsum(negative_R) - negative_R
    runs_G = np.diff(np.append(groups_G, len(ties_R)))
    below_R = before_R - np.repeat(before_R[groups_G], runs_G)
    won_G = np.add.reduceat(positive_R * (below_R + negative_R / 2), groups_G)
    positive_G, negative_G = np.add.reduceat(positive_R, groups_G), np.add.reduceat(negative_R, groups_G)
    pairs_G = positive_G * negative_G
    auc_G = np.full(len(groups_G), np.nan)
    np.divide(won_G, pairs_G, out=auc_G, where=pairs_G > 0)
    return auc_G, positive_G + negative_G
