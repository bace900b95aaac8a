from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.dropout import Dropout
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.mlp import ACTIVATIONS, MLP, Activation
from ctrlib.schema import FieldLayout
from tests.reference import mlp as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 2)

CONTRACT: dict[str, Interaction.Config] = {
    "mlp": MLP.Config(hidden_units=(16, 8), output_dim=3, activation="gelu", norm="batch", dropout=0.2),
}


def linears(block: MLP) -> list[tuple[reference.Array, reference.Array]]:
    return [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in block.modules() if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_formula(activation: Activation) -> None:
    torch.manual_seed(1)
    block = MLP(MLP.Config(hidden_units=(5, 4), output_dim=3, activation=activation), LAYOUT).double()
    x_BFD = 3 * torch.randn(4, 3, 2, dtype=torch.float64)
    *hidden, last = linears(block)
    expected = [reference.mlp(x.numpy(), hidden, activation, last) for x in x_BFD]
    assert block.out == FieldLayout(("mlp",), 3)
    assert block(x_BFD).shape == (4, 1, 3)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_without_output_layer_the_last_hidden_layer_is_returned() -> None:
    torch.manual_seed(2)
    block = MLP(MLP.Config(hidden_units=(5,)), LAYOUT).double()
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [reference.mlp(x.numpy(), linears(block), "relu", None) for x in x_BFD]
    assert block.out == FieldLayout(("mlp",), 5)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_layer_norm_stands_between_linear_and_activation() -> None:
    torch.manual_seed(3)
    block = MLP(MLP.Config(hidden_units=(5,), norm="layer"), LAYOUT).double()
    norm = next(m for m in block.modules() if isinstance(m, nn.LayerNorm))
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    gain, shift = norm.weight.detach().numpy(), norm.bias.detach().numpy()
    expected = []
    for x in x_BFD:
        z = reference.linear(x.flatten().numpy(), *linears(block)[0])
        expected.append([max(v, 0.0) for v in reference.layer_norm(z, gain, shift, 1e-5)])
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_batch_norm_stands_between_linear_and_activation() -> None:
    torch.manual_seed(4)
    block = MLP(MLP.Config(hidden_units=(5,), norm="batch"), LAYOUT).double()
    x_BFD = torch.randn(6, 3, 2, dtype=torch.float64)
    z = np.array([reference.linear(x.flatten().numpy(), *linears(block)[0]) for x in x_BFD])
    expected = np.zeros_like(z)
    for unit in range(5):
        column = [float(v) for v in z[:, unit]]
        mean = sum(column) / 6
        variance = sum((v - mean) ** 2 for v in column) / 6
        expected[:, unit] = [max((v - mean) / (variance + 1e-5) ** 0.5, 0.0) for v in column]
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_dropout_follows_every_hidden_layer_and_stops_in_eval() -> None:
    torch.manual_seed(5)
    block = MLP(MLP.Config(hidden_units=(200, 200), activation="sigmoid", dropout=0.5), LAYOUT)
    assert [type(m) for m in block.layers] == [nn.Linear, nn.Sigmoid, Dropout] * 2
    x_BFD = torch.randn(50, 3, 2)
    assert 0.47 < (block(x_BFD) == 0).float().mean() < 0.53  # a sigmoid is never 0, so zeros are dropped units
    block.eval()
    assert torch.equal(block(x_BFD), block(x_BFD))
    assert (block(x_BFD) > 0).all()


def test_output_layer_alone_is_a_linear_model() -> None:
    block = MLP(MLP.Config(hidden_units=(), output_dim=1), LAYOUT).double()
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [reference.linear(x.flatten().numpy(), *linears(block)[0]) for x in x_BFD]
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_published_size() -> None:
    """The DNN of AutoInt+ on Frappe_x1 (BARS): 100 inputs, [400, 400, 400] with batch norm, one output."""
    config = MLP.Config(hidden_units=(400, 400, 400), output_dim=1, norm="batch")
    block = MLP(config, FieldLayout(tuple(f"f{i}" for i in range(10)), 10))
    assert sum(p.numel() for p in block.parameters()) == 364_001


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_units": ()}, "no layers"),
        ({"hidden_units": (4, 0)}, "MLP.hidden_units is 0"),
        ({"output_dim": 0}, "MLP.output_dim is 0"),
        ({"dropout": 1.0}, "MLP.dropout is 1.0"),
    ],
)
def test_config_errors(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MLP.Config(**options)  # type: ignore[arg-type]
