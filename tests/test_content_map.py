"""The map from content to vectors: against other solvers, in its limits, and on planted tastes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge

from ctrlib.config import ConfigError
from ctrlib.content_map import ContentMap

COLD, KNOWN = torch.arange(10), torch.arange(10, 60)


def test_a_hand_case() -> None:
    """One feature: known items at −1 and 1 with values 2 and 6, so z̄ = 4, c̄ = 0 and W = 4 / (2 + λ) = 1 with λ = 2."""
    content_I1 = torch.tensor([[3.0], [-1.0], [1.0], [7.0]])
    values_I1 = torch.tensor([[0.0], [2.0], [6.0], [9.0]])
    mapped = ContentMap(content_I1, torch.tensor([0]), torch.tensor([1, 2]), ridge=2.0)
    assert mapped.spread(values_I1).flatten().tolist() == pytest.approx([7, 2, 6, 9])  # 4 + 3·1; item 3 is neither
    assert mapped.spread(values_I1, 0.25).flatten().tolist() == pytest.approx([1.75, 2, 6, 9])
    assert mapped.relations().flatten().tolist() == pytest.approx([-0.75, 0.75])  # 3·(∓1) / (2 + λ)


def test_equals_ridge_of_scikit_learn() -> None:
    torch.manual_seed(0)
    content_IC, values_IK = torch.rand(60, 8).double(), torch.randn(60, 3).double()
    found = ContentMap(content_IC, COLD, KNOWN, ridge=0.7).spread(values_IK)
    other = Ridge(alpha=0.7).fit(content_IC[10:].numpy(), values_IK[10:].numpy()).predict(content_IC[:10].numpy())
    np.testing.assert_allclose(found[:10].numpy(), other, atol=1e-10)
    assert (found[10:] == values_IK[10:]).all()


def test_relations_are_those_of_the_kernel() -> None:
    """(C Cᵀ + λ)⁻¹ of the known items: more features than items, where the two ways to solve differ most."""
    torch.manual_seed(1)
    content_IC, values_IK = torch.rand(60, 90).double(), torch.randn(60, 2).double()
    mapped = ContentMap(content_IC, COLD, KNOWN, ridge=0.3)
    centred = content_IC - content_IC[10:].mean(0)
    kernel_II = centred @ centred.T
    weight_MA = torch.linalg.solve(kernel_II[10:, 10:] + 0.3 * torch.eye(50), kernel_II[10:, :10]).T
    torch.testing.assert_close(mapped.relations(), weight_MA)
    mean_K = values_IK[10:].mean(0)
    torch.testing.assert_close(mapped.spread(values_IK)[:10], mean_K + weight_MA @ (values_IK[10:] - mean_K))


def test_mapped_vectors_are_mapped_scores() -> None:
    torch.manual_seed(2)
    user_UK, item_IK = torch.randn(7, 4), torch.randn(60, 4)
    mapped = ContentMap(torch.rand(60, 5), COLD, KNOWN)
    torch.testing.assert_close(mapped.spread(item_IK, 0.3) @ user_UK.T, mapped.spread(item_IK @ user_UK.T, 0.3))
    assert (mapped.spread(item_IK, 0.0) == item_IK).all()


def test_limits() -> None:
    """Without a penalty a linear taste comes back exactly; with a huge one every cold item is the average one."""
    torch.manual_seed(3)
    content_IC = torch.rand(60, 5)
    values_IK = content_IC @ torch.randn(5, 2) + 3
    asked = values_IK.clone()
    asked[:10] = 0
    torch.testing.assert_close(ContentMap(content_IC, COLD, KNOWN, ridge=1e-9).spread(asked), values_IK)
    average = ContentMap(content_IC, COLD, KNOWN, ridge=1e12).spread(asked)[:10]
    torch.testing.assert_close(average, values_IK[10:].mean(0).expand(10, -1))


def test_nothing_is_cold() -> None:
    values_IK = torch.randn(60, 2)
    assert (ContentMap(torch.rand(60, 5), COLD[:0], KNOWN).spread(values_IK) == values_IK).all()


def test_errors() -> None:
    content_IC = torch.rand(60, 5)
    with pytest.raises(ConfigError, match="ridge"):
        ContentMap(content_IC, COLD, KNOWN, ridge=0)
    with pytest.raises(ConfigError, match="known is empty"):
        ContentMap(content_IC, COLD, KNOWN[:0])
    with pytest.raises(ConfigError, match="item 9 is both cold and known"):
        ContentMap(content_IC, COLD, torch.arange(9, 60))
    with pytest.raises(ConfigError, match=r"share is 1\.5"):
        ContentMap(content_IC, COLD, KNOWN).spread(content_IC, 1.5)
