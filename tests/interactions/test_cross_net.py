from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.cross_net import CrossNet, CrossNetV2
from ctrlib.schema import FieldLayout
from tests.reference.cross_net import cross_v1, cross_v2

LAYOUT = FieldLayout(("user", "item", "hour"), 2)


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def test_v1_hand_case() -> None:
    """x_0 = (1, 2), w = (3, −1), b = (.5, 0): wᵀx_0 = 1, so x_1 = (2.5, 4)."""
    block = CrossNet(CrossNet.Config(num_layers=1), FieldLayout(("a", "b"), 1))
    block.load_state_dict({"weights.0.weight": torch.tensor([[3.0, -1.0]]), "biases.0": torch.tensor([0.5, 0.0])})
    assert block(torch.tensor([[[1.0], [2.0]]])).tolist() == [[[2.5, 4.0]]]


def test_v2_hand_case() -> None:
    """x_0 = (1, 2), W = [[0, 1], [1, 1]], b = (.5, −1): Wx_0 + b = (2.5, 2), so x_1 = (3.5, 6)."""
    block = CrossNetV2(CrossNetV2.Config(num_layers=1), FieldLayout(("a", "b"), 1))
    block.load_state_dict(
        {"layers.0.weight": torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "layers.0.bias": torch.tensor([0.5, -1.0])}
    )
    assert block(torch.tensor([[[1.0], [2.0]]])).tolist() == [[[3.5, 6.0]]]


def test_v1_equals_the_formula() -> None:
    torch.manual_seed(1)
    block = CrossNet(CrossNet.Config(num_layers=3), LAYOUT).double()
    assert all(not bias.any() for bias in block.biases)
    for bias in block.biases:
        nn.init.normal_(bias)
    weights = [p.detach().numpy()[0] for p in block.weights.parameters()]
    biases = [p.detach().numpy() for p in block.biases]
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [cross_v1(x.flatten().numpy(), weights, biases) for x in x_BFD]
    assert block.out == FieldLayout(("cross",), 6)
    assert block(x_BFD).shape == (4, 1, 6)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [None, 2])
def test_v2_equals_the_formula(rank: int | None) -> None:
    torch.manual_seed(2)
    block = CrossNetV2(CrossNetV2.Config(num_layers=3, rank=rank), LAYOUT).double()
    weights, biases = [], []
    for layer in block.layers:
        *first, last = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        assert not last.bias.any()
        nn.init.normal_(last.bias)
        weight = last.weight.detach().numpy()
        weights.append(weight @ first[0].weight.detach().numpy() if first else weight)  # U Vᵀ
        biases.append(last.bias.detach().numpy())
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [cross_v2(x.flatten().numpy(), weights, biases) for x in x_BFD]
    assert block.out == FieldLayout(("cross",), 6)
    assert block(x_BFD).shape == (4, 1, 6)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_v2_with_equal_rows_is_v1() -> None:
    """With every row of W equal to wᵀ and no bias, the matrix form is the vector form."""
    torch.manual_seed(3)
    first = CrossNet(CrossNet.Config(num_layers=1), LAYOUT).double()
    second = CrossNetV2(CrossNetV2.Config(num_layers=1), LAYOUT).double()
    weight = first.state_dict()["weights.0.weight"]
    second.load_state_dict({"layers.0.weight": weight.expand(6, 6), "layers.0.bias": torch.zeros(6)})
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(first(x_BFD), second(x_BFD), rtol=0, atol=1e-12)


def test_sizes() -> None:
    layout = FieldLayout(tuple(f"f{i}" for i in range(10)), 10)
    assert size(CrossNet(CrossNet.Config(num_layers=3), layout)) == 3 * 200
    assert size(CrossNetV2(CrossNetV2.Config(num_layers=4), layout)) == 4 * 10_100
    assert size(CrossNetV2(CrossNetV2.Config(num_layers=2, rank=8), layout)) == 2 * (2 * 100 * 8 + 100)


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"CrossNet\.num_layers is 0"):
        CrossNet.Config(num_layers=0)
    with pytest.raises(ConfigError, match=r"CrossNetV2\.num_layers is 0"):
        CrossNetV2.Config(num_layers=0)
    with pytest.raises(ConfigError, match=r"CrossNetV2\.rank is 0"):
        CrossNetV2.Config(rank=0)
