"""Neighbours of cold items and the step along them, against loops, and on planted tastes."""

from __future__ import annotations

import pytest
import torch

from ctrlib.config import ConfigError
from ctrlib.item_graph import ItemGraph, nearest_items


def test_a_hand_case() -> None:
    content_IC = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.6, 0.8], [0.0, 1.0], [0.0, 0.0]])
    graph = nearest_items(content_IC, torch.tensor([0, 4]), torch.tensor([1, 2, 3]), neighbours=2)
    assert graph.near[0].tolist() == [1, 2]  # cosines 1 and .6
    torch.testing.assert_close(graph.weight, torch.tensor([[1 / 1.6, 0.6 / 1.6], [0.0, 0.0]]))
    values_I1 = torch.tensor([[8.0], [16.0], [32.0], [64.0], [5.0]])
    # .75·8 + .25·(16/1.6 + .6·32/1.6) = 6 + .25·22; the last item is like none and keeps its own
    assert graph.spread(values_I1, 0.25).flatten().tolist() == pytest.approx([11.5, 16, 32, 64, 5])


def test_neighbours_equal_a_loop() -> None:
    torch.manual_seed(0)
    content_IC = torch.randn(1500, 6, dtype=torch.float64)  # more than a block
    items, among = torch.arange(0, 1500), torch.arange(0, 1500, 3)
    graph = nearest_items(content_IC, items, among, neighbours=4)
    for item in (0, 1, 3, 1023, 1024, 1499):
        like = {
            other: torch.cosine_similarity(content_IC[item], content_IC[other], dim=0).item()
            for other in among.tolist()
            if other != item
        }
        nearest = sorted(like, key=lambda other: -like[other])[:4]
        assert graph.near[item].tolist() == nearest
        total = sum(like[other] for other in nearest)
        assert graph.weight[item].tolist() == pytest.approx([like[other] / total for other in nearest])


def test_a_step_of_vectors_is_a_step_of_scores() -> None:
    torch.manual_seed(0)
    graph = nearest_items(torch.rand(30, 5).double(), torch.arange(10), torch.arange(10, 30))
    user_UK, item_IK = torch.randn(7, 4).double(), torch.randn(30, 4).double()
    torch.testing.assert_close(graph.spread(item_IK, 0.3) @ user_UK.T, graph.spread(item_IK @ user_UK.T, 0.3))
    assert (graph.spread(item_IK, 0.0) == item_IK).all()
    assert (graph.spread(item_IK, 0.7)[10:] == item_IK[10:]).all()


def test_planted_groups() -> None:
    """Cold items of a group take the taste for it from its known items, whatever they said themselves."""
    torch.manual_seed(0)
    group_I = torch.arange(60) % 3
    content_IC = torch.nn.functional.one_hot(group_I, 3) + 0.1 * torch.rand(60, 3)
    value_I1 = group_I.unsqueeze(1) + 0.1 * torch.randn(60, 1)
    cold = torch.arange(12)
    value_I1[cold] = torch.randn(12, 1)
    found = nearest_items(content_IC, cold, torch.arange(12, 60)).spread(value_I1, 1.0)
    assert (found[cold, 0] - group_I[cold]).abs().max() < 0.2


def test_no_item_is_its_own_neighbour_and_few_may_be_there() -> None:
    graph = nearest_items(torch.ones(3, 2), torch.tensor([0, 1]), torch.tensor([0, 1]), neighbours=10)
    assert graph.near.shape == (2, 2)
    torch.testing.assert_close(graph.spread(torch.tensor([[1.0], [2.0], [3.0]]), 1.0), torch.tensor([[2.0], [1.0], [3.0]]))
    nobody = nearest_items(torch.ones(3, 2), torch.tensor([], dtype=torch.int64), torch.tensor([0]))
    assert nobody.spread(torch.ones(3, 1), 0.5).tolist() == [[1], [1], [1]]


def test_bad_input() -> None:
    items = torch.arange(2)
    with pytest.raises(ConfigError, match="among is empty"):
        nearest_items(torch.ones(3, 2), items, items[:0])
    with pytest.raises(ConfigError, match="neighbours"):
        nearest_items(torch.ones(3, 2), items, items, neighbours=0)
    with pytest.raises(ConfigError, match=r"share is 1.5; expected a number from 0"):
        ItemGraph(items, items.unsqueeze(1), torch.ones(2, 1)).spread(torch.ones(3, 1), 1.5)
