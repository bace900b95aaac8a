from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.afm import AFM
from ctrlib.interactions.base import Interaction
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, two_fields
from tests.reference.pairs import afm as reference
from tests.reference.pairs import bi_interaction

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)

CONTRACT: dict[str, Interaction.Config] = {
    "afm": AFM.Config(attention_dim=5, attention_dropout=0.2, dropout=0.2),
}
NEEDS: dict[str, Need] = {"afm": two_fields}


def afm(layout: FieldLayout = LAYOUT, **options: Any) -> AFM:
    torch.manual_seed(1)
    block = AFM(AFM.Config(**{"attention_dim": 5, **options}), layout).double()
    for p in block.parameters():
        nn.init.normal_(p)
    return block


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def weights(block: AFM) -> tuple[Any, ...]:
    parts = (block.hidden.weight, block.hidden.bias, block.score.weight[0])
    return tuple(p.detach().numpy() for p in parts)


def test_equals_the_formula() -> None:
    block, x_BFD = afm(), randn(6, 4, 3)
    y_B1D, shown = block(x_BFD), block.explain(x_BFD)["attention"]
    assert y_B1D.shape == (6, 1, 3)
    assert block.out == FieldLayout(("afm",), 3)
    for row in range(6):
        y, attention = reference(x_BFD[row].numpy(), *weights(block))
        np.testing.assert_allclose(y_B1D[row, 0].detach().numpy(), y, rtol=0, atol=1e-10)
        assert list(attention) == list(itertools.combinations(range(4), 2))  # the order of axes["attention"]
        np.testing.assert_allclose(shown[row].numpy(), list(attention.values()), rtol=0, atol=1e-10)


def test_hand_case() -> None:
    """Fields 1, 2, 3 with W = 1, b = 0, h = ln 2: products 2, 3, 6 get weights 2²: 2³: 2⁶ of 76."""
    block = afm(FieldLayout(("a", "b", "c"), 1), attention_dim=1)
    block.load_state_dict(
        {"hidden.weight": torch.ones(1, 1), "hidden.bias": torch.zeros(1), "score.weight": torch.full((1, 1), np.log(2))}
    )
    x_BFD = torch.tensor([[[1.0], [2.0], [3.0]]], dtype=torch.float64)
    assert block(x_BFD).item() == pytest.approx((4 * 2 + 8 * 3 + 64 * 6) / 76)


def test_even_attention_is_the_mean_of_the_pairs() -> None:
    """The mutation that the formula test must catch; with h = 0 it is what remains."""
    block, x_BFD = afm(), randn(6, 4, 3)
    mean = np.array([bi_interaction(x.numpy()) / 6 for x in x_BFD])
    assert np.abs(block(x_BFD)[:, 0].detach().numpy() - mean).max() > 1e-2
    nn.init.zeros_(block.score.weight)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), mean, rtol=0, atol=1e-12)


def test_order_of_fields_does_not_matter() -> None:
    block, x_BFD = afm(), randn(6, 4, 3)
    torch.testing.assert_close(block(x_BFD[:, [2, 0, 3, 1]]), block(x_BFD), rtol=0, atol=1e-12)


def test_dropouts_act_in_training_only() -> None:
    x_BFD = randn(6, 4, 3)
    for name in ("attention_dropout", "dropout"):
        options: dict[str, Any] = {name: 0.5}
        block = afm(**options)
        assert not torch.equal(block(x_BFD), block(x_BFD))
        assert torch.equal(block.eval()(x_BFD), afm()(x_BFD))
        torch.testing.assert_close(block.explain(x_BFD)["attention"].sum(1), torch.ones(6, dtype=torch.float64))


def test_sizes() -> None:
    assert sum(p.numel() for p in afm(FieldLayout(("a", "b"), 16), attention_dim=8).parameters()) == 8 * 16 + 2 * 8


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"AFM\.attention_dim is 0"):
        AFM.Config(attention_dim=0)
    with pytest.raises(ConfigError, match=r"AFM\.attention_dropout is 1"):
        AFM.Config(attention_dropout=1.0)
    with pytest.raises(ConfigError, match=r"AFM\.dropout is -0\.1"):
        AFM.Config(dropout=-0.1)
    with pytest.raises(ConfigError, match="single field 'user'"):
        AFM(AFM.Config(), FieldLayout(("user",), 4))
