from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.euler_net import EulerLayer, EulerNet
from ctrlib.schema import FieldLayout
from tests.reference import euler_net as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 4)

CONTRACT: dict[str, Interaction.Config] = {
    "euler_net": EulerNet.Config(num_orders=(4, 3)),
    "euler_net_plain": EulerNet.Config(num_orders=(3,), norm="none"),
}


def euler_net(layout: FieldLayout = LAYOUT, **options: Any) -> EulerNet:
    torch.manual_seed(1)
    plain: dict[str, Any] = {"num_orders": (2, 3), "explicit_dropout": 0.0, "implicit_dropout": 0.0}
    block = EulerNet(EulerNet.Config(**(plain | options)), layout).double()
    for p in block.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return block


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer(block: EulerNet, i: int = 0) -> EulerLayer:
    return cast(EulerLayer, block.layers[i])


def affine(module: nn.Module) -> reference.Affine:
    return cast(Tensor, module.weight).detach().numpy(), cast(Tensor, module.bias).detach().numpy()


def weights(it: EulerLayer) -> reference.Layer:
    order, modulus, phase = (p.detach().numpy() for p in (it.order, it.bias_modulus, it.bias_phase))
    return reference.Layer(
        order,
        modulus,
        phase,
        implicit=affine(it.implicit),
        norms=None if isinstance(it.norm_re, nn.Identity) else (affine(it.norm_re), affine(it.norm_im)),
    )


@pytest.mark.parametrize("norm", ["layer", "none"])
def test_equals_the_formula(norm: bool) -> None:
    block, x_BFD = euler_net(norm=norm), randn(4, 3, 4)
    layers = [weights(cast(EulerLayer, it)) for it in block.layers]
    expected = [reference.euler_net(x, block.mu.detach().numpy()[:, 0], layers) for x in x_BFD.numpy()]
    assert block.out == FieldLayout(("euler_0", "euler_1", "euler_2"), 4)
    np.testing.assert_allclose(block(x_BFD).detach().numpy(), expected, rtol=0, atol=1e-10)
    exact = [reference.euler_net(x, block.mu.detach().numpy()[:, 0], layers, eps=0.0) for x in x_BFD.numpy()]
    np.testing.assert_allclose(block(x_BFD).detach().numpy(), exact, rtol=0, atol=1e-5)  # what the epsilon changes


def test_a_product_of_two_fields() -> None:
    """α = (1, 1, 0): z_0 z_1 has the sum of the angles; nothing implicit, no biases."""
    block = euler_net(num_orders=(1,), norm="none")
    it = layer(block)
    it.order.data = torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64)
    for p in (it.bias_modulus, it.bias_phase, it.implicit.weight, it.implicit.bias):
        nn.init.zeros_(p)
    block.mu.data = torch.tensor([[2.0], [0.5], [7.0]], dtype=torch.float64)
    angles = torch.tensor([[[0.3], [0.9], [0.1]]], dtype=torch.float64).expand(1, 3, 4)
    expected = 2.0 * 0.5 * (math.cos(1.2) + math.sin(1.2))
    np.testing.assert_allclose(block(angles).detach().numpy(), np.full((1, 1, 4), expected), rtol=0, atol=1e-7)


@pytest.mark.parametrize("mutation", ["phase", "modulus"])
def test_a_wrong_layer_would_be_seen(mutation: str) -> None:
    block, x_BFD = euler_net(), randn(4, 3, 4)
    expected = [
        reference.euler_net(x, block.mu.detach().numpy()[:, 0], [weights(cast(EulerLayer, it)) for it in block.layers])
        for x in x_BFD.numpy()
    ]
    bias = layer(block).bias_phase if mutation == "phase" else layer(block).bias_modulus
    bias.data += 0.5
    assert np.abs(block(x_BFD).detach().numpy() - expected).max() > 1e-2


def test_where_the_orders_start() -> None:
    square = EulerLayer(EulerNet.Config(), 3, 3, 4)
    assert torch.equal(square.order, torch.eye(3))
    order = EulerLayer(EulerNet.Config(), 5, 30, 4).order.detach()
    torch.testing.assert_close(order.sum(dim=0), torch.ones(30))
    assert (order.max(dim=0).values > 0.99).float().mean() > 0.8  # one input each


def test_explain_shows_the_orders() -> None:
    block = euler_net()
    shown = block.explain(randn(5, 3, 4))
    assert {name: value.shape for name, value in shown.items()} == {"order/0": (5, 3, 2), "order/1": (5, 2, 3)}
    assert torch.equal(shown["order/1"][4], layer(block, 1).order)


def test_sizes() -> None:
    def size(block: EulerNet) -> int:
        return sum(p.numel() for p in block.parameters())

    def layer_size(m: int, n: int, d: int) -> int:
        return m * n + 2 * n * d + m * n * d * d + n * d

    assert size(euler_net(norm="none")) == 3 + layer_size(3, 2, 4) + layer_size(2, 3, 4)
    assert size(euler_net(norm="layer")) == 3 + layer_size(3, 2, 4) + layer_size(2, 3, 4) + 2 * 4 * 4


@pytest.mark.parametrize("name", ["explicit_dropout", "implicit_dropout"])
def test_dropout_acts_in_training_only(name: str) -> None:
    options: dict[str, Any] = {name: 0.5}
    block, x_BFD = euler_net(**options), randn(4, 3, 4)
    assert not torch.equal(block(x_BFD), block(x_BFD))
    assert torch.equal(block.eval()(x_BFD), euler_net()(x_BFD))


def test_gradients() -> None:
    block = euler_net(norm="none")
    for i in range(2):
        layer(block, i).implicit.bias.data += 5.0  # away from the ReLUs' kink
    assert torch.autograd.gradcheck(block, (0.3 * randn(2, 3, 4).requires_grad_(),), eps=1e-6, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_orders": ()}, "EulerNet.num_orders is empty"),
        ({"num_orders": (3, 0)}, "EulerNet.num_orders is 0"),
        ({"explicit_dropout": 1.0}, "EulerNet.explicit_dropout is 1"),
        ({"implicit_dropout": -0.5}, "EulerNet.implicit_dropout is -0.5"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EulerNet.Config(**options)
