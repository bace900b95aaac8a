"""Metrics against scikit-learn, loops and numbers computed by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import roc_auc_score

from ctrlib.metrics import (
    StreamingAUC,
    auc,
    by_segment,
    copc,
    ece,
    gauc,
    log_loss,
    normalized_entropy,
    summarize,
    summarize_tasks,
)
from ctrlib.schema import DataError

Floats = NDArray[np.float64]


def make_rows(rows: int, seed: int, distinct: int | None = None) -> tuple[NDArray[np.int8], Floats, Floats]:
    """Labels, probabilities (``distinct`` of them, or all different) and weights, some of them zero."""
    rng = np.random.default_rng(seed)
    probability = rng.beta(0.7, 3.0, rows)
    if distinct is not None:
        probability = np.round(probability * distinct) / distinct
    label = (rng.random(rows) < probability * 0.8 + 0.05).astype(np.int8)
    weight = rng.exponential(2.0, rows) * (rng.random(rows) > 0.1)
    return label, probability, weight


@pytest.mark.parametrize("distinct", [None, 1000, 7, 1])
@pytest.mark.parametrize("weighted", [False, True])
def test_auc_and_log_loss_equal_scikit_learn(distinct: int | None, weighted: bool) -> None:
    label, probability, every_weight = make_rows(5000, seed=1, distinct=distinct)
    weight = every_weight if weighted else None
    assert auc(label, probability, weight) == pytest.approx(
        roc_auc_score(label, probability, sample_weight=weight), rel=0, abs=1e-12
    )
    assert log_loss(label, probability, weight) == pytest.approx(
        sklearn_log_loss(label, probability, sample_weight=weight), rel=0, abs=1e-9
    )


def test_auc_by_hand() -> None:
    # Pairs (0.3, 0.1) won, (0.3, 0.3) tied, (0.8, 0.1) won, (0.8, 0.3) won: 3.5 of 4.
    assert auc([0, 0, 1, 1], [0.1, 0.3, 0.3, 0.8]) == 0.875
    assert auc([0, 1], [5.0, -5.0]) == 0.0
    # Weights 1 and 3 on the negatives: 1·1 won, 3·½ tied, of 4.
    assert auc([0, 0, 1], [0.1, 0.3, 0.3], [1, 3, 1]) == 0.625


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_has_no_auc(label: int) -> None:
    assert math.isnan(auc([label] * 3, [0.1, 0.2, 0.3]))
    assert math.isnan(normalized_entropy([label] * 3, [0.1, 0.2, 0.3]))
    assert math.isnan(gauc([label] * 3, [0.1, 0.2, 0.3], [1, 1, 2]))
    streaming = StreamingAUC(16)
    streaming.update([label] * 3, [0.1, 0.2, 0.3])
    assert all(map(math.isnan, streaming.compute()))


def test_no_rows_and_no_weight_give_nan() -> None:
    for labels, probabilities, weight in (([], [], None), ([0, 1], [0.2, 0.4], [0, 0])):
        metrics = summarize(labels, probabilities, weight=weight, group=np.zeros(len(labels), dtype=int))
        assert metrics.pop("rows") == len(labels)
        assert all(map(math.isnan, metrics.values()))
    assert by_segment([], [], []) == []


def test_log_loss_clips_certain_predictions() -> None:
    labels, probabilities = [0, 1, 1, 0], [1.0, 0.0, 1.0, 0.0]
    assert log_loss(labels, probabilities) == pytest.approx(sklearn_log_loss(labels, probabilities), rel=0, abs=1e-9)
    assert log_loss(labels, probabilities) > 10


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["int", "str", "object"])
def test_gauc_equals_a_loop_over_groups(kind: str, weighted: bool) -> None:
    label, score, every_weight = make_rows(6000, seed=2, distinct=40)
    every_weight += 0.01
    group: Any = np.random.default_rng(3).zipf(1.3, 6000) % 900
    group = {"int": group, "str": group.astype(str), "object": group.astype(str).astype(object)}[kind]
    total = wins = skipped = 0.0
    for value in set(group.tolist()):
        rows = group == value
        if len(set(label[rows].tolist())) < 2:
            skipped += 1
            continue
        share = every_weight[rows].sum() if weighted else rows.sum()
        sample_weight = every_weight[rows] if weighted else None
        wins += share * roc_auc_score(label[rows], score[rows], sample_weight=sample_weight)
        total += share
    assert skipped > 10
    assert gauc(label, score, group, every_weight if weighted else None) == pytest.approx(wins / total, rel=0, abs=1e-9)


def test_normalized_entropy_of_the_base_rate_is_one() -> None:
    label, probability, weight = make_rows(2000, seed=4)
    rate = float((label * weight).sum() / weight.sum())
    assert normalized_entropy(label, np.full(2000, rate), weight) == pytest.approx(1.0, rel=0, abs=1e-12)
    entropy = sklearn_log_loss(label, np.full(2000, label.mean()))
    assert normalized_entropy(label, probability) == pytest.approx(sklearn_log_loss(label, probability) / entropy, rel=1e-9)


def test_ece_equals_a_loop_over_bins() -> None:
    label, probability, _ = make_rows(1000, seed=5)
    order = sorted(range(1000), key=lambda i: float(probability[i]))
    expected = 0.0
    for b in range(20):
        rows = order[50 * b : 50 * (b + 1)]
        expected += 50 / 1000 * abs(float(np.mean(label[rows])) - float(np.mean(probability[rows])))
    assert ece(label, probability) == pytest.approx(expected, rel=0, abs=1e-12)
    assert ece(label, probability, num_bins=1) == pytest.approx(abs(label.mean() - probability.mean()), rel=0, abs=1e-12)


def test_ece_by_hand_with_weights() -> None:
    # Two bins of weight 4: |0.25·4 − 1| = 0 in the first (weights 1 + 3, positive weight 1), |0.5·4 − 4| = 2 in the second.
    assert ece([1, 0, 1], [0.25, 0.25, 0.5], num_bins=2, weight=[1, 3, 4]) == 0.25


def test_ece_does_not_depend_on_the_order_of_rows() -> None:
    # Equal predictions with the labels sorted: cutting through the tie would see a first half of zeros, a second of ones.
    assert ece([0] * 50 + [1] * 50, [0.5] * 100) == 0.0
    label, probability, weight = make_rows(3000, seed=6, distinct=9)
    shuffle = np.random.default_rng(0).permutation(3000)
    shuffled = ece(label[shuffle], probability[shuffle], weight=weight[shuffle])
    assert shuffled == pytest.approx(ece(label, probability, weight=weight), rel=0, abs=1e-12)


def test_copc_is_predicted_over_observed() -> None:
    assert copc([1, 0, 0, 1], [0.9, 0.9, 0.6, 0.6]) == pytest.approx(1.5)
    assert copc([1, 0], [0.5, 0.5], [1, 3]) == pytest.approx(2.0)
    assert math.isnan(copc([0, 0], [0.5, 0.5]))


def test_summarize_is_json_of_plain_numbers() -> None:
    label, probability, weight = make_rows(500, seed=7)
    metrics = summarize(label, probability.astype(np.float32), weight=weight)
    assert list(metrics) == ["rows", "label_rate", "auc", "log_loss", "normalized_entropy", "ece", "copc"]
    assert json.loads(json.dumps(metrics)) == metrics
    assert type(metrics["rows"]) is int
    assert metrics["rows"] == 500
    assert all(type(metrics[key]) is float for key in metrics if key != "rows")
    assert metrics["label_rate"] == pytest.approx(np.average(label, weights=weight))
    single = probability.astype(np.float32).astype(np.float64)
    assert metrics["ece"] == ece(label, single, weight=weight)
    assert metrics["auc"] == pytest.approx(roc_auc_score(label, single, sample_weight=weight), rel=0, abs=1e-12)
    group = np.arange(500) % 20
    assert summarize(label, probability, group=group)["gauc"] == gauc(label, probability, group)


def test_summarize_tasks_means_over_tasks() -> None:
    first, second = make_rows(800, seed=8), make_rows(800, seed=9)
    labels, probabilities = np.stack([first[0], second[0]], axis=1), np.stack([first[1], second[1]], axis=1)
    weight, group = first[2], np.arange(800) % 5
    metrics = summarize_tasks(["click", "buy"], labels, probabilities, weight=weight, group=group)
    assert metrics["labels"]["click"] == summarize(first[0], first[1], weight=weight, group=group)
    assert metrics["labels"]["buy"] == summarize(second[0], second[1], weight=weight, group=group)
    for key in ("label_rate", "auc", "log_loss", "normalized_entropy", "ece", "copc", "gauc"):
        assert metrics[key] == pytest.approx((metrics["labels"]["click"][key] + metrics["labels"]["buy"][key]) / 2, rel=1e-12)
    assert metrics["rows"] == 800
    assert type(metrics["rows"]) is int
    json.dumps(metrics)
    with pytest.raises(DataError, match=r"expected \[rows, 1\]"):
        summarize_tasks(["click"], labels, probabilities)
    probabilities[3, 1] = np.nan
    with pytest.raises(DataError, match=r"task 'buy'.*row 3"):
        summarize_tasks(["click", "buy"], labels, probabilities)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_probabilities_are_refused(bad: float) -> None:
    with pytest.raises(ValueError, match=r"2 of 5 probabilities are not finite.*first is row 1"):
        summarize([0, 1, 0, 1, 0], [0.5, bad, 0.5, bad, 0.1])


def test_other_bad_inputs_are_refused() -> None:
    with pytest.raises(DataError, match=r"outside \[0, 1\].*row 0: 1.5"):
        log_loss([0, 1], [1.5, 0.5])
    with pytest.raises(DataError, match=r"1 of 2 labels.*row 1: 2.0"):
        auc([0, 2], [0.1, 0.2])
    with pytest.raises(DataError, match=r"weights.*row 1: -1.0"):
        auc([0, 1], [0.1, 0.2], [1, -1])
    with pytest.raises(DataError, match=r"labels are of shape \(2,\), scores of \(3,\)"):
        auc([0, 1], [0.1, 0.2, 0.3])
    with pytest.raises(DataError, match="group is"):
        gauc([0, 1], [0.1, 0.2], [1.5, 2.5])
    with pytest.raises(DataError, match="segment has 1 rows"):
        by_segment(["a"], [0, 1], [0.1, 0.2])
    with pytest.raises(DataError, match="num_bins"):
        ece([0, 1], [0.1, 0.2], num_bins=0)
    assert auc([0, 1], [-3.0, 7.5]) == 1.0  # scores need not be probabilities


def test_by_segment_sorts_by_rows_then_value() -> None:
    label, probability, weight = make_rows(1000, seed=10)
    names = [None, "b", "a", "c"]
    segment = [names[i] for i in np.random.default_rng(1).permutation([0] * 200 + [1] * 300 + [2] * 300 + [3] * 200)]
    found = by_segment(segment, label, probability, weight=weight)
    assert [(s["segment"], s["rows"]) for s in found] == [("a", 300), ("b", 300), ("c", 200), (None, 200)]
    for entry in found:
        assert list(entry) == ["segment", "rows", "label_rate", "auc", "log_loss", "ece", "copc"]
        rows = np.array([value == entry["segment"] for value in segment])
        expected = roc_auc_score(label[rows], probability[rows], sample_weight=weight[rows])
        assert entry["auc"] == pytest.approx(expected, rel=0, abs=1e-9)
        assert entry["copc"] == copc(label[rows], probability[rows], weight[rows])
    json.dumps(found)


@pytest.mark.parametrize(
    "segment",
    [
        np.array([3.0, np.nan, 3.0, 1.0]),
        pd.Series([3.0, None, 3.0, 1.0]),
        [3, None, 3, 1],
        pd.Series([3, 9, 3, 1]).replace(9, np.nan),
    ],
)
def test_by_segment_takes_arrays_columns_and_lists(segment: Any) -> None:
    found = by_segment(segment, [0, 1, 1, 0], [0.1, 0.2, 0.3, 0.4])
    assert [(s["segment"], s["rows"]) for s in found] == [(3, 2), (1, 1), (None, 1)]
    json.dumps(found)


def adversarial(rows: int, seed: int) -> tuple[NDArray[np.int8], Floats]:
    """Probabilities crowded into a few bins, beyond the clamped range and exactly 0 and 1, in the worst order."""
    rng = np.random.default_rng(seed)
    probability = np.concatenate(
        [
            0.01 + 1e-9 * rng.random(rows),
            1e-10 * rng.random(rows),
            1 - 1e-12 * rng.random(rows),
            np.repeat([0.0, 1.0, 0.5], rows // 3),
            np.nextafter(0.5, np.full(rows, 1.0)),
        ]
    )
    # Positives are always the smaller probabilities of their cluster, so every pair inside a bin is wrong.
    label = np.concatenate([part <= np.median(part) for part in np.split(probability[: 3 * rows], 3)])
    rest = rng.random(len(probability) - 3 * rows) < 0.5
    return np.concatenate([label, rest]).astype(np.int8), probability


@pytest.mark.parametrize("num_bins", [2, 64, 2**16])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_streaming_auc_is_within_its_bound_on_adversarial_data(num_bins: int, seed: int) -> None:
    label, probability = adversarial(900, seed)
    weight = np.random.default_rng(seed).exponential(1.0, len(label))
    streaming = StreamingAUC(num_bins)
    streaming.update(label, probability, weight)
    estimate, bound = streaming.compute()
    error = abs(estimate - roc_auc_score(label, probability, sample_weight=weight))
    assert error <= bound + 1e-12
    assert error > bound / 10  # the data do press against the bound


def test_streaming_auc_bound_by_hand() -> None:
    streaming = StreamingAUC(2)  # below and above one half
    streaming.update([1, 0, 1, 0], [0.1, 0.2, 0.9, 0.8])
    # Of 4 pairs, (0.9, 0.2) is won, (0.1, 0.8) lost, and one lies inside each bin: (1 + 2·½) / 4, wrong by at most 2·½ / 4.
    assert streaming.compute() == (0.5, 0.25)
    wrong = StreamingAUC(2)
    wrong.update([1, 0], [0.1, 0.2])
    assert wrong.compute() == (0.5, 0.5)  # the exact AUC is 0: the bound is reached


def test_streaming_auc_is_tight_on_ordinary_data_and_merges() -> None:
    rng = np.random.default_rng(11)
    logit = rng.normal(-4.0, 1.0, 200_000)
    probability = 1 / (1 + np.exp(-logit))
    label = (rng.random(200_000) < probability).astype(np.int8)
    whole, left, right = StreamingAUC(), StreamingAUC(), StreamingAUC()
    whole.update(label, probability)
    for start in range(0, 200_000, 4096):
        part = left if start < 100_000 else right
        part.update(label[start : start + 4096], probability[start : start + 4096])
    left.merge(right)
    assert left.compute() == whole.compute()
    estimate, bound = whole.compute()
    assert bound < 1e-4
    assert abs(estimate - roc_auc_score(label, probability)) <= bound
    with pytest.raises(DataError, match="cannot merge 8 bins"):
        left.merge(StreamingAUC(8))
