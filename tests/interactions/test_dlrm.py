from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.dlrm import DotInteraction
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, two_fields
from tests.reference import dlrm as reference

LAYOUT = FieldLayout(("user", "price", "item", "age"), 3)

CONTRACT: dict[str, Interaction.Config] = {
    "dot_interaction": DotInteraction.Config(),
    "dot_interaction_bottom": DotInteraction.Config(bottom_fields=("hour", "city"), bottom_hidden_units=(8,)),
}
# The bottom fields, and another.
NEEDS: dict[str, Need] = {
    "dot_interaction": two_fields,
    "dot_interaction_bottom": lambda layout: {"hour", "city"} < set(layout.names),
}


def test_hand_case() -> None:
    block = DotInteraction(DotInteraction.Config(), FieldLayout(("a", "b", "c"), 2))
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, -1.0], [0.0, 4.0]]])
    assert block(x_BFD).tolist() == [[[1.0, 8.0, -4.0]]]
    assert block.explain(x_BFD)["product"].tolist() == [[1.0, 8.0, -4.0]]
    assert block.axes == {"product": (("a*b", "a*c", "b*c"),)}


def test_bottom_hand_case() -> None:
    """The bottom makes ReLU(2·3 + 1, −3) = (7, 0) of b = (3, ·); its product with a is 14, with c 35; that of a and c 14."""
    config = DotInteraction.Config(bottom_fields=("b",), bottom_hidden_units=())
    block = DotInteraction(config, FieldLayout(("a", "b", "c"), 2))
    assert block.bottom is not None
    block.bottom.load_state_dict(
        {"layers.0.weight": torch.tensor([[2.0, 0.0], [-1.0, 0.0]]), "layers.0.bias": torch.tensor([1.0, 0.0])}
    )
    x_BFD = torch.tensor([[[2.0, 1.0], [3.0, 9.0], [5.0, 4.0]]])
    assert block(x_BFD).tolist() == [[[7.0, 0.0, 14.0, 35.0, 14.0]]]
    assert block.explain(x_BFD)["product"].tolist() == [[14.0, 35.0, 14.0]]
    assert block.axes == {"product": (("bottom*a", "bottom*c", "a*c"),)}


def test_equals_the_formula() -> None:
    torch.manual_seed(1)
    config = DotInteraction.Config(bottom_fields=("age", "price"), bottom_hidden_units=(5, 4))
    block = DotInteraction(config, LAYOUT).double()
    assert block.bottom is not None
    layers = [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in block.bottom.modules() if isinstance(m, nn.Linear)]
    x_BFD = torch.randn(6, 4, 3, dtype=torch.float64)
    assert block.out == FieldLayout(("dots",), 3 + 3)
    assert block(x_BFD).shape == (6, 1, 6)
    for x, y in zip(x_BFD.numpy(), block(x_BFD)[:, 0].detach().numpy(), strict=True):
        z0 = reference.bottom(np.concatenate([x[3], x[1]]), layers)
        np.testing.assert_allclose(y, [*z0, *reference.dots([z0, x[0], x[2]])], rtol=0, atol=1e-10)


def test_without_bottom_fields_it_is_the_products() -> None:
    block = DotInteraction(DotInteraction.Config(), LAYOUT)
    x_BFD = torch.randn(6, 4, 3, dtype=torch.float64)
    assert list(block.parameters()) == []
    assert block.state_dict() == {}
    assert block.out == FieldLayout(("dots",), 6)
    expected = [reference.dots(list(x)) for x in x_BFD.numpy()]
    np.testing.assert_allclose(block(x_BFD)[:, 0].numpy(), expected, rtol=0, atol=1e-12)


def test_no_vector_is_multiplied_by_itself() -> None:
    """Flipping one field's sign flips its products; a square would stay."""
    block = DotInteraction(DotInteraction.Config(), FieldLayout(("a", "b"), 3))
    x_BFD = torch.randn(5, 2, 3)
    torch.testing.assert_close(block(x_BFD * torch.tensor([[-1.0], [1.0]])), -block(x_BFD))


def test_sizes() -> None:
    config = DotInteraction.Config(bottom_fields=("age", "price"), bottom_hidden_units=(5, 4))
    block = DotInteraction(config, LAYOUT)
    assert sum(p.numel() for p in block.parameters()) == 6 * 5 + 5 + 5 * 4 + 4 + 4 * 3 + 3


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"DotInteraction\.bottom_hidden_units is 0"):
        DotInteraction.Config(bottom_hidden_units=(0,))
    with pytest.raises(ConfigError, match="bottom_fields has 'age' twice"):
        DotInteraction.Config(bottom_fields=("age", "age"))
    with pytest.raises(ConfigError, match="'pric', which is no field; did you mean 'price'"):
        DotInteraction(DotInteraction.Config(bottom_fields=("pric",)), LAYOUT)
    with pytest.raises(ConfigError, match="bottom_fields has all fields"):
        DotInteraction(DotInteraction.Config(bottom_fields=LAYOUT.names), LAYOUT)
    with pytest.raises(ConfigError, match="single field 'user'"):
        DotInteraction(DotInteraction.Config(), FieldLayout(("user",), 3))
