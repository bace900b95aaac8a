from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.fm import FM
from ctrlib.interactions.ifm import IFM
from ctrlib.interactions.mlp import MLP
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need
from tests.reference import ifm as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 3)

CONTRACT: dict[str, Interaction.Config] = {
    # No ReLU, of which all units of one row may be off: then a gradient of zero would say nothing.
    "ifm": IFM.Config(network=MLP.Config(hidden_units=(8,), activation="silu")),
}
# A weight and a vector.
NEEDS: dict[str, Need] = {"ifm": lambda layout: layout.dim >= 2}
DERIVED = {"ifm": {"pair"}}  # FM's


def ifm(layout: FieldLayout = LAYOUT, hidden_units: tuple[int, ...] = (5, 4)) -> IFM:
    torch.manual_seed(1)
    block = IFM(IFM.Config(network=MLP.Config(hidden_units=hidden_units)), layout).double()
    nn.init.normal_(block.bias)
    return block


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def array(tensor: Tensor) -> Any:
    return tensor.detach().numpy()


def test_equals_the_formula() -> None:
    block, x_BFD = ifm(), randn(6, 3, 3)
    layers = [(array(m.weight), array(m.bias)) for m in block.network.modules() if isinstance(m, nn.Linear)]
    y_B11, shown = block(x_BFD), block.explain(x_BFD)
    assert y_B11.shape == (6, 1, 1)
    assert block.out == FieldLayout(("ifm",), 1)
    for row, x in enumerate(x_BFD.numpy()):
        m = reference.factors(x[:, 1:], layers, array(block.factor.weight))
        np.testing.assert_allclose(shown["factor"][row].numpy(), m, rtol=0, atol=1e-10)
        assert y_B11[row].item() == pytest.approx(reference.ifm(x[:, 0], x[:, 1:], m, block.bias.item()), abs=1e-10)


def test_hand_case() -> None:
    """Scores 0 and ln 3 give factors ½ and 3/2: 1 + ½·2 + 3/2·4 + ¾·(5·7)."""
    block = ifm(FieldLayout(("a", "b"), 2), hidden_units=(1,))
    for linear in (m for m in block.network.modules() if isinstance(m, nn.Linear)):
        nn.init.zeros_(linear.weight)
        nn.init.ones_(linear.bias)
    block.factor.weight.data = torch.tensor([[0.0], [math.log(3)]], dtype=torch.float64)
    nn.init.ones_(block.bias)
    x_BFD = torch.tensor([[[2.0, 5.0], [4.0, 7.0]]], dtype=torch.float64)
    assert block(x_BFD).item() == pytest.approx(1 + 0.5 * 2 + 1.5 * 4 + 0.75 * 35)


def test_even_factors_leave_a_factorization_machine() -> None:
    """The mutation that the formula test must catch; with P = 0 it is what remains."""
    block, x_BFD = ifm(), randn(6, 3, 3)
    plain = FM(FM.Config(), LAYOUT)(x_BFD[:, :, 1:]) + x_BFD[:, :, :1].sum(dim=1, keepdim=True) + block.bias
    assert (block(x_BFD) - plain).abs().max() > 1e-2
    nn.init.zeros_(block.factor.weight)
    torch.testing.assert_close(block(x_BFD), plain, rtol=0, atol=1e-12)


def test_fields_and_pairs_add_up_to_the_logit() -> None:
    block, x_BFD = ifm(), randn(6, 3, 3)
    shown = block.explain(x_BFD)
    torch.testing.assert_close(shown["factor"].mean(1), torch.ones(6, dtype=torch.float64))
    total = shown["field"].sum(1) + shown["pair"].sum(1) + block.bias
    torch.testing.assert_close(total, block(x_BFD).flatten(), rtol=0, atol=1e-12)


def test_sizes() -> None:
    block = IFM(IFM.Config(), FieldLayout(tuple("abcd"), 1 + 16))
    assert sum(p.numel() for p in block.parameters()) == (64 * 256 + 256) + (256 * 128 + 128) + 4 * 128 + 1


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"IFM\.network\.output_dim is 1"):
        IFM.Config(network=MLP.Config(output_dim=1))
    with pytest.raises(ConfigError, match="the width is 1"):
        IFM(IFM.Config(), FieldLayout(("user", "item"), 1))
