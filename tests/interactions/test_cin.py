from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.cin import CIN
from ctrlib.schema import FieldLayout
from tests.reference import cin as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 2)

CONTRACT: dict[str, Interaction.Config] = {
    "cin": CIN.Config(hidden_units=(5, 4)),
    "cin_with_activation": CIN.Config(hidden_units=(5, 4), bias=True, activation="tanh"),
}


def fields(count: int, dim: int = 10) -> FieldLayout:
    return FieldLayout(tuple(f"f{i}" for i in range(count)), dim)


def weights(block: CIN, num_fields: int) -> list[reference.Array]:
    found = [layer.weight.detach().numpy() for layer in block.layers if isinstance(layer, nn.Linear)]
    return [w.reshape(len(w), -1, num_fields) for w in found]


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def test_hand_case() -> None:
    """x = ((1, 2), (3, −1)): products (1, 4), (3, −2), (3, −2), (9, 1). With W^1 = (1, 0, 2, −1) the vector of layer 1 is
    (−2, −1); its products with x are (−2, −2) and (−6, 1), and with W^2 = (1, .5) that makes (−5, −1.5)."""
    block = CIN(CIN.Config(hidden_units=(1, 1)), FieldLayout(("a", "b"), 2))
    block.load_state_dict(
        {"layers.0.weight": torch.tensor([[1.0, 0.0, 2.0, -1.0]]), "layers.1.weight": torch.tensor([[1.0, 0.5]])}
    )
    assert block(torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])).tolist() == [[[-3.0, -6.5]]]


@pytest.mark.parametrize(
    ("options", "act"),
    [({}, lambda x: x), ({"bias": True}, lambda x: x), ({"bias": True, "activation": "relu"}, lambda x: np.maximum(x, 0))],
    ids=["paper", "bias", "relu"],
)
def test_equals_the_formula(options: dict[str, Any], act: Any) -> None:
    torch.manual_seed(1)
    block = CIN(CIN.Config(hidden_units=(4, 2, 5), **options), LAYOUT).double()
    biases = [b.detach().numpy() for name, b in block.named_parameters() if name.endswith("bias")] or None
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [reference.cin(x.numpy(), weights(block, 3), biases, act) for x in x_BFD]
    assert block.out == FieldLayout(("cin",), 11)
    assert block(x_BFD).shape == (4, 1, 11)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_every_layer_crosses_with_the_input() -> None:
    """A network whose layers cross with their predecessor twice is another: equal in layer 1, not in layer 2."""
    torch.manual_seed(2)
    block = CIN(CIN.Config(hidden_units=(3, 3)), LAYOUT).double()
    x_BFD = torch.randn(1, 3, 2, dtype=torch.float64)
    shown = block(x_BFD)[0, 0].detach().numpy()
    wrong = reference.crossed_with_itself(x_BFD[0].numpy(), weights(block, 3))
    np.testing.assert_allclose(shown[:3], wrong[:3], rtol=0, atol=1e-10)
    assert np.abs(shown[3:] - wrong[3:]).min() > 1e-4


def test_layer_k_has_order_k_plus_one() -> None:
    block = CIN(CIN.Config(hidden_units=(4, 4, 4)), LAYOUT).double()
    x_BFD = torch.randn(5, 3, 2, dtype=torch.float64)
    order = torch.tensor([2] * 4 + [3] * 4 + [4] * 4)
    torch.testing.assert_close(block(3 * x_BFD), block(x_BFD) * 3.0**order, rtol=1e-10, atol=0)


def test_sizes() -> None:
    assert size(CIN(CIN.Config(hidden_units=(64, 64, 64)), fields(10))) == 10 * 10 * 64 + 2 * 64 * 10 * 64
    assert size(CIN(CIN.Config(hidden_units=(64, 64, 64), bias=True), fields(10))) == 88_512
    # BARS logs: embeddings of width 10 and first-order weights (5,389 values on Frappe, 90,239 on MovieLens), CIN, one linear.
    assert 5_389 * 11 + size(CIN(CIN.Config(hidden_units=(64, 64, 64), bias=True), fields(10))) + 193 == 147_984
    assert 90_239 * 11 + size(CIN(CIN.Config(hidden_units=(32, 32, 32, 32), bias=True), fields(3))) + 129 == 1_002_390


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"CIN\.hidden_units is 0"):
        CIN.Config(hidden_units=(4, 0))
    with pytest.raises(ConfigError, match=r"CIN\.hidden_units is empty"):
        CIN.Config(hidden_units=())
