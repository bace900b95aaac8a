"""Ranking metrics of one group, row by row; with ties, the mean over every order of the tied rows."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby, permutations, product

Ordered = list[int]  # labels by place


def orders(labels: Sequence[int], scores: Sequence[float]) -> Iterator[Ordered]:
    """Every order of the labels that the scores allow, equally likely."""
    rows = sorted(zip(scores, labels, strict=True), key=lambda row: -row[0])
    tied = [[label for _, label in run] for _, run in groupby(rows, key=lambda row: row[0])]
    for choice in product(*(list(permutations(run)) for run in tied)):
        yield [label for run in choice for label in run]


def ndcg(ordered: Ordered, k: int) -> float:
    """Binary gain, log2 discount."""
    found = sum(label / math.log2(place + 1) for place, label in enumerate(ordered[:k], start=1))
    best = sum(1 / math.log2(place + 1) for place in range(1, min(sum(ordered), k) + 1))
    return found / best


def mrr(ordered: Ordered) -> float:
    """1 / place of the first positive."""
    return 1 / (ordered.index(1) + 1)


def hr(ordered: Ordered, k: int) -> float:
    """A positive among the first k."""
    return float(1 in ordered[:k])


def recall(ordered: Ordered, k: int) -> float:
    """The share of the positives among the first k."""
    return sum(ordered[:k]) / sum(ordered)


def auc_at(labels: Sequence[int], scores: Sequence[float], k: int) -> float:
    """AUC of the first k; rows tied at the k-th place weigh the share of them that has a place; ``nan``: one class."""
    won = pairs = 0.0
    weights = []
    for score in scores:
        above, tied = sum(s > score for s in scores), sum(s == score for s in scores)
        weights.append(min(max(k - above, 0), tied) / tied)
    for label_i, score_i, weight_i in zip(labels, scores, weights, strict=True):
        for label_j, score_j, weight_j in zip(labels, scores, weights, strict=True):
            if label_i == 1 and label_j == 0:
                pairs += weight_i * weight_j
                won += weight_i * weight_j * (1.0 if score_i > score_j else 0.5 if score_i == score_j else 0.0)
    return won / pairs if pairs else math.nan
