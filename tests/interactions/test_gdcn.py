from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.cross_net import CrossNetV2
from ctrlib.interactions.gdcn import GatedCrossNet
from ctrlib.schema import FieldLayout
from tests.reference.gdcn import gate, gated_cross

LAYOUT = FieldLayout(("user", "item", "hour"), 2)

CONTRACT: dict[str, Interaction.Config] = {
    "gated_cross_net": GatedCrossNet.Config(num_layers=2),
}


def test_hand_case() -> None:
    """x_0 = (1, 2), W = [[0, 1], [1, 1]], b = (.5, −1): W x_0 + b = (2.5, 2), times x_0 is (2.5, 4); gates σ(0) = ½ and
    σ(ln 3) = ¾ make (1.25, 3), so x_1 = (2.25, 5)."""
    block = GatedCrossNet(GatedCrossNet.Config(num_layers=1), FieldLayout(("a", "b"), 1))
    block.load_state_dict(
        {
            "crosses.0.weight": torch.tensor([[0.0, 1.0], [1.0, 1.0]]),
            "crosses.0.bias": torch.tensor([0.5, -1.0]),
            "gates.0.weight": torch.tensor([[0.0, 0.0], [float(np.log(3)), 0.0]]),
        }
    )
    torch.testing.assert_close(block(torch.tensor([[[1.0], [2.0]]])), torch.tensor([[[2.25, 5.0]]]))


def test_equals_the_formula() -> None:
    torch.manual_seed(1)
    block = GatedCrossNet(GatedCrossNet.Config(num_layers=3), LAYOUT).double()
    crosses = [m for m in block.crosses if isinstance(m, nn.Linear)]
    assert not any(m.bias.any() for m in crosses)
    for m in crosses:
        nn.init.normal_(m.bias)
    weights, biases = [m.weight.detach().numpy() for m in crosses], [m.bias.detach().numpy() for m in crosses]
    gates = [m.weight.detach().numpy() for m in block.gates if isinstance(m, nn.Linear)]
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [gated_cross(x.flatten().numpy(), weights, biases, gates) for x in x_BFD]
    assert block.out == FieldLayout(("gated_cross",), 6)
    assert block(x_BFD).shape == (4, 1, 6)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)
    shown = block.explain(x_BFD)
    assert list(shown) == ["gate/0", "gate/1", "gate/2"]
    for i in range(3):
        before = [gated_cross(x.flatten().numpy(), weights[:i], biases[:i], gates[:i]) for x in x_BFD]
        opened = [gate(x_l, gates[i]) for x_l in before]
        np.testing.assert_allclose(shown[f"gate/{i}"].flatten(1).numpy(), opened, rtol=0, atol=1e-10)


def test_the_gate_reads_the_current_layer() -> None:
    """Gates that read x_0 in every layer make another network, from layer 2 on."""
    torch.manual_seed(2)
    block = GatedCrossNet(GatedCrossNet.Config(num_layers=2), LAYOUT).double()
    x0 = torch.randn(1, 6, dtype=torch.float64)
    x = x0
    for cross, opened in zip(block.crosses, block.gates, strict=True):
        x = x0 * cross(x) * opened(x0).sigmoid() + x
    assert (block(x0.view(1, 3, 2))[:, 0] - x).abs().max() > 1e-3


def test_half_open_gates_are_half_the_crosses_of_v2() -> None:
    """With G = 0 every gate is ½: a layer is CrossNetV2's with half the weights."""
    torch.manual_seed(3)
    block = GatedCrossNet(GatedCrossNet.Config(num_layers=3), LAYOUT).double()
    plain = CrossNetV2(CrossNetV2.Config(num_layers=3), LAYOUT).double()
    for opened, cross, layer in zip(block.gates, block.crosses, plain.layers, strict=True):
        nn.init.zeros_(opened.weight)  # type: ignore[arg-type]
        layer.load_state_dict({name: value / 2 for name, value in cross.state_dict().items()})
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(block(x_BFD), plain(x_BFD), rtol=0, atol=1e-12)


def test_sizes_and_config_errors() -> None:
    layout = FieldLayout(tuple(f"f{i}" for i in range(10)), 10)
    block = GatedCrossNet(GatedCrossNet.Config(num_layers=4), layout)
    assert sum(p.numel() for p in block.parameters()) == 4 * 20_100
    with pytest.raises(ConfigError, match=r"GatedCrossNet\.num_layers is 0"):
        GatedCrossNet.Config(num_layers=0)
