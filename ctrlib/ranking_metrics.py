"""How well the rows of a group are ordered: NDCG@k, MRR, HR@k, Recall@k and AUC@k, also by length of the history.

A group is what competes for the same places: a session, a request, the test rows of a user. A group counts once however many
rows it has; row weights are not read. With places 1, 2, … by falling score and P positives in a group:

========== ================================================================ ======================================
metric     of one group                                                     defined for groups with
========== ================================================================ ======================================
ndcg@k     Σ_{positives in the first k} 1/log2(place + 1) over its largest  a positive
           value, Σ_{i ≤ min(P, k)} 1/log2(i + 1)
mrr        1 / place of the first positive                                  a positive
hr@k       1 if a positive is among the first k, else 0                     a positive
recall@k   positives among the first k, divided by P                        a positive
auc@k      AUC of the first k rows                                          both classes among the first k
========== ================================================================ ======================================

**Ties.** Rows with equal scores have no order: every order of them is equally likely, and ndcg@k, mrr, hr@k and recall@k are
the means over these orders. So the order of the rows has no effect, and a constant score is worth as much as a random one.
For auc@k rows that are tied at the k-th place weigh the share of them that has a place; in AUC a tied pair counts ½, as
everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ctrlib.metrics import Floats, auc, checked_groups, checked_rows, gauc, run_starts
from ctrlib.plots import figure_class, save_png
from ctrlib.schema import DataError, suggest

TOP = (10,)
LONG_TAIL = (1, 3, 5, 10)


def rank_groups(
    labels: ArrayLike, scores: ArrayLike, group: ArrayLike, *, ks: Sequence[int] = TOP
) -> tuple[NDArray[Any], dict[str, Floats]]:
    """Every metric of every group, from one sort of the rows.

    Args:
        labels: [N] of 0 and 1.
        scores: [N]; higher is better.
        group: [N] of ints or strings.
        ks: the cut-offs k.

    Returns:
        The G distinct groups in ascending order, and by name (``"ndcg@10"``, ``"mrr"``, ``"hr@10"``, ``"recall@10"``,
        ``"auc@10"``) arrays [G]; ``nan`` where a group has no such metric.

    Raises:
        DataError: lengths differ, a label is neither 0 nor 1, a score is not finite, or a k is below 1.
    """
    for k in ks:
        if k < 1 or k != int(k):
            raise DataError(f"k is {k}; expected a whole number, 1 or more")
    y_N, s_N, _ = checked_rows(labels, scores, None, "scores")
    group_N = checked_groups(group, y_N)
    if not len(y_N):
        return group_N, {name: np.zeros(0) for name in ("mrr", *(f"{m}@{k}" for k in ks for m in _AT_K))}
    order_N = np.lexsort((-s_N, group_N))
    y_N, s_N, group_N = y_N[order_N], s_N[order_N], group_N[order_N]

    # All that follows is of runs: rows of one group with one score, which share the places above + 1 … above + size.
    first_G, first_R = run_starts(group_N), run_starts(group_N, s_N)
    runs_G = np.searchsorted(first_R, first_G)  # the first run of every group
    group_R = np.searchsorted(first_G, first_R, side="right") - 1
    above_R = first_R - first_G[group_R]
    size_R = np.diff(np.append(first_R, len(y_N)))
    positive_R = np.add.reduceat(y_N, first_R)
    positive_G = np.add.reduceat(y_N, first_G)
    some_G = positive_G > 0
    rate_R = positive_R / size_R

    found = {"mrr": np.where(some_G, _reciprocal(positive_R, size_R, above_R, group_R, runs_G), np.nan)}
    for k in ks:
        gain = np.append(0.0, np.cumsum(1 / np.log2(np.arange(2, k + 2))))  # of being right in all of the first places
        placed_R = np.clip(k - above_R, 0, size_R)  # rows of the run that have one of the first k places
        start_R = np.minimum(above_R, k)
        dcg_G = np.add.reduceat(rate_R * (gain[start_R + placed_R] - gain[start_R]), runs_G)
        hits_G = np.add.reduceat(rate_R * placed_R, runs_G)
        missed_G = np.multiply.reduceat(_no_positive(positive_R, size_R, placed_R), runs_G)
        most_G = gain[np.minimum(positive_G, k).astype(np.int64)]
        found[f"ndcg@{k}"] = np.divide(dcg_G, most_G, out=np.full_like(dcg_G, np.nan), where=some_G)
        found[f"hr@{k}"] = np.where(some_G, 1 - missed_G, np.nan)
        found[f"recall@{k}"] = np.divide(hits_G, positive_G, out=np.full_like(hits_G, np.nan), where=some_G)
        share_R = placed_R / size_R
        found[f"auc@{k}"] = _auc(positive_R * share_R, (size_R - positive_R) * share_R, group_R, runs_G)
    return group_N[first_G], found


_AT_K = ("ndcg", "hr", "recall", "auc")


def summarize_ranking(labels: ArrayLike, scores: ArrayLike, group: ArrayLike, *, ks: Sequence[int] = TOP) -> dict[str, float]:
    """The mean of every metric over the groups that have it, ready for JSON.

    Args:
        labels, scores, group, ks: see :func:`rank_groups`.

    Returns:
        ``groups`` (an int: those with a positive), ``mrr``, and for every k ``ndcg@k``, ``hr@k``, ``recall@k``, ``auc@k``; a
        metric that no group has is ``nan``. GAUC is in :func:`ctrlib.metrics.summarize`.

    Raises:
        DataError: see :func:`rank_groups`.
    """
    _, found = rank_groups(labels, scores, group, ks=ks)
    means = {name: float(x_G[known].mean()) if (known := ~np.isnan(x_G)).any() else float("nan") for name, x_G in found.items()}
    return {"groups": int((~np.isnan(found["mrr"])).sum()), **means}


def history_segments(lengths: ArrayLike, thresholds: Sequence[int] = LONG_TAIL) -> list[str]:
    """The bucket of every length: with thresholds 1, 3, 5, 10 they are ``0``, ``1``, ``2-3``, ``4-5``, ``6-10``, ``>10``.

    Raises:
        DataError: a length that is negative or not finite, or thresholds that do not rise from 1 or more.
    """
    length_N, names = np.asarray(lengths), _bucket_names(thresholds)
    wrong_N = ~((length_N >= 0) & np.isfinite(length_N))
    if wrong_N.any():
        at = int(np.argmax(wrong_N))
        raise DataError(f"the history of row {at + 1} has length {length_N[at]}; expected a finite number of 0 or more")
    return [names[i] for i in np.searchsorted([0, *thresholds], length_N).tolist()]


def by_history_length(
    lengths: ArrayLike,
    labels: ArrayLike,
    scores: ArrayLike,
    group: ArrayLike,
    *,
    ks: Sequence[int] = TOP,
    thresholds: Sequence[int] = LONG_TAIL,
) -> list[dict[str, Any]]:
    """AUC, GAUC and every metric of this module for rows with short histories, and for those with long ones.

    Args:
        lengths: [N] behaviours that a row's history has.
        labels, scores, group, ks: see :func:`rank_groups`. A group whose rows have histories of different lengths counts in
            each of their buckets, there with those rows.
        thresholds: upper ends of the buckets. 1, 3, 5, 10 are our choice: AW-MoE (arXiv:2306.05011) measures users of the
            long tail too, but where it cuts could not be read.

    Returns:
        An entry for each bucket with rows (see :func:`history_segments`), then for each long tail (``≤1``, ``≤3``, …), then
        for ``all``: ``segment``, ``rows``, ``groups``, ``auc``, ``gauc`` and the means of :func:`summarize_ranking`.

    Raises:
        DataError: see :func:`rank_groups` and :func:`history_segments`, or another number of lengths.
    """
    y_N, s_N, _ = checked_rows(labels, scores, None, "scores")
    group_N, length_N = checked_groups(group, y_N), np.asarray(lengths)
    if length_N.shape != y_N.shape:
        raise DataError(f"lengths are of shape {length_N.shape}; expected {y_N.shape}: one length per row")
    bucket_N = np.array(history_segments(length_N, thresholds), dtype=str)
    chosen = {name: bucket_N == name for name in _bucket_names(thresholds)}
    chosen |= {f"≤{t}": length_N <= t for t in thresholds}
    chosen["all"] = np.ones(len(y_N), dtype=np.bool_)
    found = []
    for name, mask_N in chosen.items():
        if mask_N.any():
            rows = y_N[mask_N], s_N[mask_N], group_N[mask_N]
            ranking = summarize_ranking(*rows, ks=ks)
            groups = ranking.pop("groups")
            both = {"auc": auc(*rows[:2]), "gauc": gauc(*rows)}
            found.append({"segment": name, "rows": len(rows[0]), "groups": groups, **both, **ranking})
    return found


def history_table(models: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> str:
    """A Markdown table of one metric: a row per bucket and long tail, a column per model.

    Args:
        models: by name, what :func:`by_history_length` returned for the same rows.
        metric: ``"ndcg@10"``, ``"gauc"``, …

    Raises:
        DataError: no models, models that were evaluated on different rows, or a metric that was not computed.
    """
    buckets = _same_buckets(models, metric)
    lines = [["behaviours", "groups", *models], ["---"] * (2 + len(models))]
    for i, (name, groups) in enumerate(buckets):
        lines.append([name, f"{groups:,}", *(f"{found[i][metric]:.4f}" for found in models.values())])
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot_by_history_length(models: Mapping[str, Sequence[Mapping[str, Any]]], metric: str, path: str | Path) -> None:
    """Draw a metric over the buckets of history length, a line per model, as PNG; long tails and ``all`` are left out.

    Args:
        models, metric: see :func:`history_table`.
        path: of the image.

    Raises:
        DataError: see :func:`history_table`.
        ConfigError: matplotlib is not installed.
    """
    new_figure = figure_class()
    buckets = [(i, name, groups) for i, (name, groups) in enumerate(_same_buckets(models, metric)) if re.match(r"[\d>]", name)]
    figure = new_figure(figsize=(7, 4.5))
    axes = figure.subplots()
    for model, found in models.items():
        axes.plot(range(len(buckets)), [found[i][metric] for i, _, _ in buckets], marker="o", label=model)
    axes.set_xticks(range(len(buckets)), [f"{name}\n{groups:,} groups" for _, name, groups in buckets])
    axes.set(xlabel="behaviours in the history", ylabel=metric)
    axes.grid(alpha=0.3)
    axes.legend()
    save_png(figure, path)


def _same_buckets(models: Mapping[str, Sequence[Mapping[str, Any]]], metric: str) -> list[tuple[str, int]]:
    buckets = [[(entry["segment"], entry["groups"]) for entry in found] for found in models.values()]
    if not buckets or any(other != buckets[0] for other in buckets):
        raise DataError(
            f"the models {', '.join(models) or '(none)'} were not evaluated on the same rows; expected the same buckets of "
            "history length, with the same number of groups, for each"
        )
    for entry in chain(*models.values()):
        if metric not in entry:
            known = sorted(entry.keys() - {"segment", "groups", "rows"})
            raise DataError(f"the models were not measured by {metric!r}, only by {', '.join(known)}{suggest(metric, known)}")
    return buckets[0]


def _bucket_names(thresholds: Sequence[int]) -> list[str]:
    if not thresholds or thresholds[0] < 1 or any(a >= b for a, b in pairwise(thresholds)):
        raise DataError(f"thresholds are {list(thresholds)}; expected lengths that rise, from 1 or more")
    lows = [1, *(t + 1 for t in thresholds[:-1])]
    names = [str(high) if low == high else f"{low}-{high}" for low, high in zip(lows, thresholds, strict=True)]
    return ["0", *names, f">{thresholds[-1]}"]


def _log_factorials(up_to: int) -> Floats:
    return np.append(0.0, np.cumsum(np.log(np.arange(1, up_to + 1))))


def _no_positive(positive_R: Floats, size_R: NDArray[np.intp], placed_R: NDArray[np.intp]) -> Floats:
    """The chance that ``placed`` of ``size`` rows, drawn at random, hold none of the positives: C(n − p, m) / C(n, m)."""
    n, m, p = size_R, placed_R, positive_R.astype(np.int64)
    log = _log_factorials(int(n.max()))
    left = n - p - m
    chance = np.exp(log[n - p] + log[n - m] - log[np.maximum(left, 0)] - log[n])
    return np.where(left >= 0, chance, 0.0)


def _reciprocal(
    positive_R: Floats,
    size_R: NDArray[np.intp],
    above_R: NDArray[np.intp],
    group_R: NDArray[np.intp],
    runs_G: NDArray[np.intp],
) -> Floats:
    """Mean 1/place of the first positive of every group: it is in the first run with one; 0 where there is none.

    Of n tied rows with p positives the first one has the place x + 1 with chance C(n − x − 1, p − 1) / C(n, p).
    """
    before_R = np.cumsum(positive_R) - positive_R
    chosen = np.flatnonzero((positive_R > 0) & (before_R == before_R[runs_G][group_R]))
    n, p = size_R[chosen], positive_R[chosen].astype(np.int64)
    places = n - p + 1  # that the first of them may have
    run = np.repeat(np.arange(len(chosen)), places)
    x = np.arange(len(run)) - np.repeat(np.cumsum(places) - places, places)
    n, p = n[run], p[run]
    log = _log_factorials(int(size_R.max()))
    chance = np.exp(log[n - x - 1] - log[p - 1] - log[n - p - x] - log[n] + log[p] + log[n - p])
    mean_G: Floats = np.bincount(group_R[chosen][run], chance / (above_R[chosen][run] + x + 1), len(runs_G)).astype(np.float64)
    return mean_G


def _auc(positive_R: Floats, negative_R: Floats, group_R: NDArray[np.intp], runs_G: NDArray[np.intp]) -> Floats:
    """AUC of every group; runs are in the order of falling scores."""
    positive_G, negative_G = np.add.reduceat(positive_R, runs_G), np.add.reduceat(negative_R, runs_G)
    until_R = np.cumsum(negative_R)
    below_R = (until_R[runs_G] - negative_R[runs_G] + negative_G)[group_R] - until_R
    won_G = np.add.reduceat(positive_R * (below_R + negative_R / 2), runs_G)
    pairs_G = positive_G * negative_G
    auc_G: Floats = np.divide(won_G, pairs_G, out=np.full_like(won_G, np.nan), where=pairs_G > 0)
    return auc_G
