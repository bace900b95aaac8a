"""Ranking metrics against loops over rows and over every order of tied rows, and numbers computed by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from ctrlib import plots
from ctrlib.config import ConfigError
from ctrlib.metrics import gauc
from ctrlib.ranking_metrics import (
    by_history_length,
    history_segments,
    history_table,
    plot_by_history_length,
    rank_groups,
    summarize_ranking,
)
from ctrlib.schema import DataError
from tests.reference import ranking as reference

KS = (1, 2, 3, 5, 100)


def rows(groups: int, most: int, distinct: int | None, seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Labels, scores (``distinct`` of them, or all different) and groups of 1 to ``most`` rows, in random order."""
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(groups) * 7 - 20, rng.integers(1, most + 1, groups))
    rng.shuffle(group)
    score = rng.normal(size=len(group)) if distinct is None else rng.integers(0, distinct, len(group)) / 4
    return (rng.random(len(group)) < 0.35).astype(int), score, group


def expected(labels: list[int], scores: list[float]) -> dict[str, float]:
    """Every metric of one group, by the reference."""
    found = {f"auc@{k}": reference.auc_at(labels, scores, k) for k in KS}
    orders = list(reference.orders(labels, scores))
    some = any(labels)
    found["mrr"] = float(np.mean([reference.mrr(order) for order in orders])) if some else math.nan
    for name, metric in (("ndcg", reference.ndcg), ("hr", reference.hr), ("recall", reference.recall)):
        for k in KS:
            found[f"{name}@{k}"] = float(np.mean([metric(order, k) for order in orders])) if some else math.nan
    return found


@pytest.mark.parametrize("distinct", [None, 3, 1])
@pytest.mark.parametrize("kind", ["int", "str", "object"])
def test_groups_equal_a_loop_over_every_order(distinct: int | None, kind: str) -> None:
    labels, scores, group = rows(groups=60, most=6, distinct=distinct, seed=1)
    named: Any = {"int": group, "str": group.astype(str), "object": group.astype(str).astype(object)}[kind]
    values, found = rank_groups(labels, scores, named, ks=KS)
    assert values.tolist() == sorted(set(named.tolist()))
    assert found.keys() == {"mrr", *(f"{name}@{k}" for name in ("ndcg", "hr", "recall", "auc") for k in KS)}
    undefined = 0
    for i, value in enumerate(values.tolist()):
        mine = np.flatnonzero(named == value)
        for name, number in expected(labels[mine].tolist(), scores[mine].tolist()).items():
            assert found[name][i] == pytest.approx(number, rel=0, abs=1e-12, nan_ok=True), (name, value)
            undefined += math.isnan(number)
    assert undefined > 20


def test_long_groups_equal_a_loop() -> None:
    labels, scores, group = rows(groups=40, most=200, distinct=None, seed=2)
    _, found = rank_groups(labels, scores, group, ks=(10,))
    for i, value in enumerate(sorted(set(group.tolist()))):
        mine = np.flatnonzero(group == value)
        ordered = [int(labels[j]) for j in sorted(mine.tolist(), key=lambda j: -scores[j])]
        if 1 in ordered:
            assert found["ndcg@10"][i] == pytest.approx(reference.ndcg(ordered, 10), rel=0, abs=1e-12)
            assert found["mrr"][i] == pytest.approx(reference.mrr(ordered), rel=0, abs=1e-15)
            assert found["hr@10"][i] == reference.hr(ordered, 10)
            assert found["recall@10"][i] == pytest.approx(reference.recall(ordered, 10), rel=0, abs=1e-12)


def test_a_session_of_three_by_hand() -> None:
    """The positives are first and third: DCG = 1 + ½, the best is 1 + 1/log2(3); one of two pairs is won."""
    labels, scores, group = [1, 0, 1], [0.9, 0.5, 0.1], [4, 4, 4]
    found = summarize_ranking(labels, scores, group, ks=(1, 2, 3))
    assert found["groups"] == 1
    assert found["ndcg@1"] == 1.0
    assert found["ndcg@2"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert found["ndcg@3"] == pytest.approx(1.5 / (1 + 1 / math.log2(3)))
    assert (found["mrr"], found["hr@1"]) == (1.0, 1.0)
    assert (found["recall@1"], found["recall@3"]) == (0.5, 1.0)
    assert math.isnan(found["auc@1"])  # one class among the first
    assert (found["auc@2"], found["auc@3"]) == (1.0, 0.5)


def test_one_positive_has_the_formulas_of_leave_one_out() -> None:
    """HR@k = 1[rank ≤ k], NDCG@k = 1/log2(rank + 1), MRR = 1/rank, Recall@k = HR@k."""
    for rank in (1, 2, 10, 11):
        scores = -np.arange(1.0, 102.0)
        found = summarize_ranking(np.arange(1, 102) == rank, scores, np.zeros(101, int))
        assert found["mrr"] == pytest.approx(1 / rank)
        assert found["hr@10"] == found["recall@10"] == (rank <= 10)
        assert found["ndcg@10"] == pytest.approx(1 / math.log2(rank + 1) if rank <= 10 else 0)


def test_ties_by_hand() -> None:
    """One positive among four tied rows, one row above: it has the places 2 to 5 alike."""
    labels, scores = [1, 0, 0, 0, 0], [0.5, 0.5, 0.5, 0.5, 0.9]
    found = summarize_ranking(labels, scores, [1] * 5, ks=(3,))
    assert found["mrr"] == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
    assert (found["hr@3"], found["recall@3"]) == pytest.approx((0.5, 0.5))
    assert found["ndcg@3"] == pytest.approx((1 / math.log2(3) + 1 / math.log2(4)) / 4)
    # weights of the first three: 1 for the row above, ½ for each tied row; the positive loses to it, and ties with 3·½
    assert found["auc@3"] == pytest.approx(0.5 * 1.5 / 2 / (0.5 * (1 + 1.5)))


def test_a_constant_score_is_worth_a_random_one() -> None:
    """Released evaluation code sorts with the positive first: then a constant score ranks everything right."""
    labels = np.tile([1] + [0] * 100, 50)
    group = np.repeat(np.arange(50), 101)
    found = summarize_ranking(labels, np.zeros(len(labels)), group)
    assert found["hr@10"] == pytest.approx(10 / 101)
    assert found["mrr"] == pytest.approx(sum(1 / place for place in range(1, 102)) / 101)
    assert found["auc@10"] == pytest.approx(0.5)


def test_the_order_of_rows_has_no_effect() -> None:
    labels, scores, group = rows(groups=200, most=30, distinct=4, seed=3)
    order = np.random.default_rng(4).permutation(len(labels))
    first = summarize_ranking(labels, scores, group, ks=(1, 5))
    assert summarize_ranking(labels[order], scores[order], group[order], ks=(1, 5)) == pytest.approx(first, rel=0, abs=1e-12)


def test_a_large_tie_is_finite() -> None:
    labels = (np.arange(200_000) % 3 == 0).astype(int)
    found = summarize_ranking(labels, np.zeros(200_000), np.zeros(200_000, int))
    assert found["recall@10"] == pytest.approx(10 / 200_000)
    assert found["hr@10"] == pytest.approx(1 - (2 / 3) ** 10, rel=1e-3)
    # of so many rows the places are almost drawn independently
    assert found["mrr"] == pytest.approx(sum((2 / 3) ** (i - 1) / 3 / i for i in range(1, 200)), rel=1e-3)


def test_without_a_cut_off_auc_is_that_of_gauc() -> None:
    labels, scores, group = rows(groups=300, most=40, distinct=9, seed=5)
    values, found = rank_groups(labels, scores, group, ks=(1000,))
    sizes = np.array([(group == value).sum() for value in values])
    defined = ~np.isnan(found["auc@1000"])
    assert gauc(labels, scores, group) == pytest.approx(np.average(found["auc@1000"][defined], weights=sizes[defined]))


def test_means_are_over_the_groups_that_have_the_metric() -> None:
    found = summarize_ranking([1, 0, 0, 0, 1], [2.0, 1.0, 1.0, 0.0, 0.0], [1, 1, 2, 2, 3], ks=(2,))
    assert found == {"groups": 2, "mrr": 1.0, "ndcg@2": 1.0, "hr@2": 1.0, "recall@2": 1.0, "auc@2": 1.0}
    nothing = summarize_ranking([0, 0], [1.0, 2.0], [1, 1])
    assert nothing.pop("groups") == 0
    assert all(map(math.isnan, nothing.values()))
    empty = summarize_ranking([], [], np.zeros(0, int))
    assert empty.keys() == {"groups", *nothing}
    assert empty["groups"] == 0


def test_history_segments() -> None:
    names = history_segments([0, 1, 2, 3, 4, 5, 6, 10, 11, 500])
    assert names == ["0", "1", "2-3", "2-3", "4-5", "4-5", "6-10", "6-10", ">10", ">10"]
    assert history_segments([0, 1, 2, 3], thresholds=(2,)) == ["0", "1-2", "1-2", ">2"]
    assert history_segments([]) == []
    for wrong in (np.nan, np.inf, -np.inf, -1.0):
        with pytest.raises(DataError, match=f"the history of row 2 has length {wrong}; expected a finite number of 0 or more"):
            history_segments([3.0, wrong])


def test_by_history_length_is_the_metrics_of_the_rows() -> None:
    labels, scores, group = rows(groups=200, most=12, distinct=None, seed=6)
    lengths = np.abs(group) % 17
    found = by_history_length(lengths, labels, scores, group, ks=(3,))
    names = [entry["segment"] for entry in found]
    assert names == ["0", "1", "2-3", "4-5", "6-10", ">10", "≤1", "≤3", "≤5", "≤10", "all"]
    for entry in found:
        low, high = {
            "0": (0, 0), "1": (1, 1), "2-3": (2, 3), "4-5": (4, 5), "6-10": (6, 10), ">10": (11, 99),
            "≤1": (0, 1), "≤3": (0, 3), "≤5": (0, 5), "≤10": (0, 10), "all": (0, 99),
        }[entry["segment"]]  # fmt: skip
        mine = (lengths >= low) & (lengths <= high)
        ranking = summarize_ranking(labels[mine], scores[mine], group[mine], ks=(3,))
        assert entry["rows"] == mine.sum()
        assert entry["gauc"] == pytest.approx(gauc(labels[mine], scores[mine], group[mine]))
        assert {name: entry[name] for name in ranking} == ranking
    assert sum(entry["rows"] for entry in found[:6]) == len(labels)


def test_empty_buckets_are_left_out() -> None:
    found = by_history_length([4, 4], [0, 1], [0.0, 1.0], [1, 1])
    assert [entry["segment"] for entry in found] == ["4-5", "≤5", "≤10", "all"]
    assert by_history_length([], [], [], np.zeros(0, int)) == []


def test_table_and_plot(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    labels, scores, group = rows(groups=200, most=12, distinct=None, seed=6)
    lengths = np.abs(group) % 17
    models = {name: by_history_length(lengths, labels, sign * scores, group) for name, sign in (("dnn", 1), ("din", -1))}
    lines = history_table(models, "ndcg@10").splitlines()
    assert lines[:2] == ["| behaviours | groups | dnn | din |", "| --- | --- | --- | --- |"]
    last = models["dnn"][-1]
    assert lines[-1] == f"| all | {last['groups']} | {last['ndcg@10']:.4f} | {models['din'][-1]['ndcg@10']:.4f} |"
    plot_by_history_length(models, "ndcg@10", tmp_path / "plot.png")
    assert [path.name for path in tmp_path.iterdir()] == ["plot.png"]
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_heat_map_of_gates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    gate_UK = np.array([[0.5, -2.0, 0.0], [1.0, 0.25, 0.75], [0.0, 0.0, 1.5]])
    plots.plot_gates(gate_UK, [7, 0, 3], tmp_path / "gates.png")
    assert (tmp_path / "gates.png").read_bytes().startswith(b"\x89PNG")
    drawn: list[Any] = []
    monkeypatch.setattr(plots, "save_png", lambda figure, path: drawn.append(figure))
    plots.plot_gates(gate_UK, [7, 0, 3], tmp_path / "gates.png")
    axes = drawn[0].axes[0]
    np.testing.assert_array_equal(axes.images[0].get_array(), gate_UK[[1, 2, 0]])  # the shortest history on top
    assert axes.images[0].get_clim() == (-2.0, 2.0)  # no gate is white
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "3", "7"]
    for gates, lengths in ((gate_UK, [1, 2]), (gate_UK[0], [1]), (gate_UK[:0], []), (gate_UK * np.nan, [1, 2, 3])):
        with pytest.raises(DataError, match=r"expected finite numbers \[users, experts\], and a length for every user"):
            plots.plot_gates(gates, lengths, tmp_path / "gates.png")


def test_errors(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="k is 0; expected a whole number, 1 or more"):
        rank_groups([0, 1], [0.1, 0.2], [1, 1], ks=(0,))
    with pytest.raises(DataError, match=r"k is 2\.5; expected a whole number"):
        rank_groups([0, 1], [0.1, 0.2], [1, 1], ks=cast(Any, (2.5,)))
    with pytest.raises(DataError, match="scores are not finite"):
        rank_groups([0, 1], [0.1, math.nan], [1, 1])
    with pytest.raises(DataError, match="group is float64"):
        rank_groups([0, 1], [0.1, 0.2], [1.0, 1.0])
    with pytest.raises(DataError, match=r"lengths are of shape \(1,\)"):
        by_history_length([1], [0, 1], [0.1, 0.2], [1, 1])
    with pytest.raises(DataError, match="the history of row 1 has length -1"):
        history_segments([-1])
    for wrong in ((), (0, 1), (3, 3)):
        with pytest.raises(DataError, match="expected lengths that rise, from 1 or more"):
            history_segments([1], wrong)
    one, other = by_history_length([4], [1], [0.0], [1]), by_history_length([1], [1], [0.0], [1])
    for models in ({}, {"dnn": one, "din": other}):
        with pytest.raises(DataError, match="not evaluated on the same rows"):
            history_table(models, "mrr")
    for draw in (history_table, lambda models, metric: plot_by_history_length(models, metric, tmp_path / "plot.png")):
        with pytest.raises(DataError, match=r"not measured by 'mmr', only by .*; did you mean 'mrr'"):
            draw({"dnn": one}, "mmr")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match="the plot needs matplotlib"):
        plot_by_history_length({"dnn": one}, "mrr", tmp_path / "plot.png")
