from __future__ import annotations

import numpy as np
import pytest
import torch

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.linear import FirstOrder, Linear
from ctrlib.schema import FieldLayout
from tests.reference import mlp as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 2)

CONTRACT: dict[str, Interaction.Config] = {
    "linear": Linear.Config(output_dim=2),
    "first_order": FirstOrder.Config(),
}
DERIVED = {"first_order": {"field"}}  # forward sums over both axes at once


@pytest.mark.parametrize("bias", [True, False])
def test_linear_equals_the_formula(bias: bool) -> None:
    block = Linear(Linear.Config(output_dim=4, bias=bias), LAYOUT).double()
    x_BFD = torch.randn(5, 3, 2, dtype=torch.float64)
    b = block.linear.bias.detach().numpy() if bias else None
    expected = [reference.linear(x.flatten().numpy(), block.linear.weight.detach().numpy(), b) for x in x_BFD]
    assert block.out == FieldLayout(("linear",), 4)
    assert block(x_BFD).shape == (5, 1, 4)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_autoint_output_step() -> None:
    """The hand-computed logit: Y = [[1.231059, 0], [.119203, 3.642391]], w = [1, −1, .5, 2], b = .1."""
    block = Linear(Linear.Config(), FieldLayout(("a", "b"), 2)).double()
    block.load_state_dict({"linear.weight": torch.tensor([[1.0, -1.0, 0.5, 2.0]]), "linear.bias": torch.tensor([0.1])})
    logit = block(torch.tensor([[[1.231059, 0.0], [0.119203, 3.642391]]], dtype=torch.float64))
    assert logit.item() == pytest.approx(8.675443, abs=2e-6)
    assert logit.sigmoid().item() == pytest.approx(0.999830, abs=1e-6)


def test_first_order_sums_the_weights() -> None:
    block = FirstOrder(FirstOrder.Config(), FieldLayout(("user", "item", "hour"), 1))
    x_BF1 = torch.tensor([[[0.5], [-1.0], [0.25]], [[2.0], [0.0], [1.0]]])
    assert block(x_BF1).tolist() == [[[-0.25]], [[3.0]]]  # the bias starts at zero
    assert block.bias is not None
    block.bias.data.fill_(10.0)
    assert block(x_BF1).tolist() == [[[9.75]], [[13.0]]]
    assert reference.first_order(x_BF1[0].double().numpy(), 10.0) == 9.75
    assert block.out == FieldLayout(("first_order",), 1)


def test_first_order_without_bias_has_no_parameters() -> None:
    assert not list(FirstOrder(FirstOrder.Config(bias=False), LAYOUT).parameters())


def test_config_error() -> None:
    with pytest.raises(ConfigError, match=r"Linear\.output_dim is 0"):
        Linear.Config(output_dim=0)
