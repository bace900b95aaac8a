from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlib.data import subgraphs
from ctrlib.data.adjacency import Adjacency
from ctrlib.data.subgraphs import Clusters, Neighbourhoods, partition, sample_neighbourhood
from ctrlib.models.propagation import take
from ctrlib.schema import DataError
from tests import graphs

GRAPH = graphs.graph()
EDGES = GRAPH.edges
WEIGHTS = GRAPH.class_weights()
H = torch.randn(120, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
SEEDS = np.array([7, 0, 55, 119])
HOPS = 2


def after(edges: object, h: Tensor) -> Tensor:
    for _ in range(HOPS):
        h = take(edges, h)  # type: ignore[arg-type]
    return h


def sampled(fan_out: int, seed: int) -> Tensor:
    nodes, edges = sample_neighbourhood(GRAPH.adjacency, SEEDS, (fan_out,) * HOPS, np.random.default_rng(seed))
    assert nodes[:4].tolist() == SEEDS.tolist()
    assert len(np.unique(nodes)) == len(nodes)
    return after(edges, H[nodes])[:4]


def test_all_neighbours_are_the_full_batch() -> None:
    torch.testing.assert_close(sampled(1000, 0), after(EDGES, H)[SEEDS], rtol=0, atol=1e-6)


def test_more_neighbours_come_closer_and_the_mean_is_right() -> None:
    exact = after(EDGES, H)[SEEDS]
    errors, biases = [], []
    for fan_out in (1, 3, 9, 27):
        found = torch.stack([sampled(fan_out, seed) for seed in range(200)])
        errors.append((found - exact).square().mean().sqrt().item())
        spread = found.std(0) / 200**0.5
        biases.append(((found.mean(0) - exact).abs() / spread.clamp(min=1e-6)).max().item())
    assert all(b < a for a, b in pairwise(errors)), errors
    assert errors[-1] < 1e-6
    assert max(biases[:3]) < 4  # of 8 numbers each, in standard errors


def test_drawn_neighbours_are_neighbours_each_once_and_loops_stay() -> None:
    nodes, edges = sample_neighbourhood(GRAPH.adjacency, SEEDS, (2, 2), np.random.default_rng(0))
    rows = np.repeat(np.arange(len(nodes)), np.diff(edges.offsets.numpy()))
    columns = edges.sources.numpy()
    degrees = GRAPH.adjacency.degrees
    assert len({*zip(rows.tolist(), columns.tolist(), strict=True)}) == len(rows)
    for row, column in zip(rows, columns, strict=True):
        start, stop = GRAPH.adjacency.offsets[nodes[row] : nodes[row] + 2]
        assert row == column or nodes[column] in GRAPH.adjacency.neighbours[start:stop]
    counts = np.bincount(rows)[:4]
    assert counts.tolist() == (1 + np.minimum(degrees[SEEDS], 2)).tolist()


def test_neighbourhoods_have_every_training_node_once_and_count_no_other() -> None:
    loader = Neighbourhoods(GRAPH, "train", WEIGHTS, fan_outs=(3, 3), batch_size=20, seed=1)
    assert len(loader) == 5
    orders = []
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == 5
        total = sum(b.weight.sum().item() for b in batches if b.weight is not None)
        assert total == pytest.approx(GRAPH.weights("train", WEIGHTS).sum(), rel=1e-5)
        orders.append([b.labels[:20].tolist() for b in batches if b.labels is not None])
        assert all(b.weight is not None and not b.weight[20:].any() for b in batches)
    assert orders[0] != orders[1]
    again = Neighbourhoods(GRAPH, "train", WEIGHTS, fan_outs=(3, 3), batch_size=20, seed=1)
    for first, second in zip(
        again, Neighbourhoods(GRAPH, "train", WEIGHTS, fan_outs=(3, 3), batch_size=20, seed=1), strict=True
    ):
        assert first.edges is not None
        assert second.edges is not None
        assert torch.equal(first.edges.sources, second.edges.sources)


def test_clusters_hold_every_node_once_with_a_matrix_of_their_own() -> None:
    part_of = partition(GRAPH.adjacency, 6, "random", seed=3)
    assert np.bincount(part_of).tolist() == [20] * 6
    loader = Clusters(GRAPH, "train", WEIGHTS, part_of, parts_per_batch=4, seed=0)
    assert len(loader) == 2
    batches = list(loader)
    assert [len(b) for b in batches] == [80, 40]
    total = sum(b.weight.sum().item() for b in batches if b.weight is not None)
    assert total == pytest.approx(GRAPH.weights("train", WEIGHTS).sum(), rel=1e-5)
    for batch in batches:  # a matrix of A + I: D^½ 1 is its eigenvector of eigenvalue 1
        assert batch.edges is not None
        degree = (batch.edges.offsets[1:] - batch.edges.offsets[:-1]).double().sqrt().unsqueeze(1)
        torch.testing.assert_close(take(batch.edges, degree), degree, rtol=0, atol=1e-5)


def test_an_empty_part_is_no_batch() -> None:
    part_of = np.where(np.arange(120) < 60, 0, 2).astype(np.int32)
    assert [len(batch) for batch in Clusters(GRAPH, "train", WEIGHTS, part_of)] == [60, 60]


def test_one_cluster_is_the_full_batch() -> None:
    (batch,) = Clusters(GRAPH, "train", WEIGHTS, np.zeros(120, dtype=np.int32))
    full = GRAPH.batch("train", WEIGHTS)
    assert batch.edges is not None
    assert torch.equal(batch.edges.weight, EDGES.weight)
    assert batch.labels is not None
    assert full.labels is not None
    assert torch.equal(batch.labels, full.labels)
    assert torch.equal(batch.sequences["features"].values, full.sequences["features"].values)


def test_metis_cuts_few_edges() -> None:
    pytest.importorskip("pymetis")

    def cut(part_of: np.ndarray) -> float:
        return float((part_of[GRAPH.adjacency.rows] != part_of[GRAPH.adjacency.neighbours]).mean())

    assert cut(partition(GRAPH.adjacency, 3, "metis")) < 0.7 * cut(partition(GRAPH.adjacency, 3, "random"))


def test_what_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="to be cut into 500 parts and has 120 nodes"):
        partition(GRAPH.adjacency, 500)
    with pytest.raises(DataError, match="partition is 'best'"):
        partition(GRAPH.adjacency, 2, "best")  # type: ignore[arg-type]
    monkeypatch.setattr(subgraphs, "_metis", lambda: None)
    with pytest.raises(DataError, match="pymetis is not installed"):
        partition(GRAPH.adjacency, 2, "metis")
    assert partition(GRAPH.adjacency, 2, "auto").sum() == 60
    with pytest.raises(DataError, match=r"fan_outs are \[3, 0\]"):
        Neighbourhoods(GRAPH, "train", WEIGHTS, fan_outs=(3, 0), batch_size=5)
    with pytest.raises(DataError, match="parts_per_batch is 0"):
        Clusters(GRAPH, "train", WEIGHTS, np.zeros(120, dtype=np.int32), parts_per_batch=0)


def test_isolated_seeds_are_sampled_too() -> None:
    nothing = Adjacency.from_pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), 120)
    lonely = replace(GRAPH, adjacency=nothing)
    (batch,) = Neighbourhoods(lonely, "valid", WEIGHTS, fan_outs=(2, 2), batch_size=50)
    assert batch.edges is not None
    assert batch.edges.weight.tolist() == [1.0] * 12
