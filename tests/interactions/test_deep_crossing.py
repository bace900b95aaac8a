from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.deep_crossing import DeepCrossing, ResidualUnit
from ctrlib.schema import FieldLayout
from tests.reference import deep_crossing as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 2)

CONTRACT: dict[str, Interaction.Config] = {
    "deep_crossing": DeepCrossing.Config(hidden_units=(8, 5), activation="silu"),
    "deep_crossing_norm": DeepCrossing.Config(hidden_units=(8, 5), activation="silu", norm="batch", dropout=0.2),
}


def arrays(block: DeepCrossing) -> list[tuple[reference.Array, ...]]:
    units = [u for u in block.units if isinstance(u, ResidualUnit)]
    return [tuple(p.detach().numpy() for m in (u.first, u.second) for p in (m.weight, m.bias)) for u in units]


def test_hand_case() -> None:
    """x = (1, −2), hidden ReLU(x_1 − x_2 + 1) = 4, back (−1, .25)·4 + (0, 2) = (−4, 3), sum (−3, 1), ReLU (0, 1)."""
    block = DeepCrossing(DeepCrossing.Config(hidden_units=(1,)), FieldLayout(("a", "b"), 1))
    block.load_state_dict(
        {
            "units.0.first.weight": torch.tensor([[1.0, -1.0]]),
            "units.0.first.bias": torch.tensor([1.0]),
            "units.0.second.weight": torch.tensor([[-1.0], [0.25]]),
            "units.0.second.bias": torch.tensor([0.0, 2.0]),
        }
    )
    assert block(torch.tensor([[[1.0], [-2.0]]])).tolist() == [[[0.0, 1.0]]]


def test_equals_the_formula() -> None:
    torch.manual_seed(1)
    block = DeepCrossing(DeepCrossing.Config(hidden_units=(5, 4)), LAYOUT).double()
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    units: Any = arrays(block)
    expected = np.stack([reference.deep_crossing(x.flatten().numpy(), units) for x in x_BFD])
    wrong = np.stack([reference.deep_crossing(x.flatten().numpy(), units, sum_first=False) for x in x_BFD])
    assert block.out == FieldLayout(("deep_crossing",), 6)
    assert block(x_BFD).shape == (4, 1, 6)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)
    assert np.abs(wrong - expected).max() > 1e-2


def test_batch_norm_is_on_the_sum() -> None:
    block = DeepCrossing(DeepCrossing.Config(hidden_units=(5,), norm="batch", activation="none"), LAYOUT).double()
    y_BN = block(3 + torch.randn(64, 3, 2, dtype=torch.float64))[:, 0]
    torch.testing.assert_close(y_BN.mean(dim=0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)


def test_dropout_acts_in_training() -> None:
    block = DeepCrossing(DeepCrossing.Config(hidden_units=(5,), dropout=0.5), LAYOUT)
    x_BFD = torch.rand(8, 3, 2)
    assert not torch.equal(block(x_BFD), block(x_BFD))
    block.eval()
    assert torch.equal(block(x_BFD), block(x_BFD))


def test_sizes() -> None:
    def size(block: nn.Module) -> int:
        return sum(p.numel() for p in block.parameters())

    layout = FieldLayout(tuple(f"f{i}" for i in range(10)), 10)
    assert size(DeepCrossing(DeepCrossing.Config(hidden_units=(64, 32)), layout)) == 2 * 100 * 96 + 96 + 200
    assert size(DeepCrossing(DeepCrossing.Config(hidden_units=(64,), norm="batch"), layout)) == 2 * 6_400 + 164 + 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_units": ()}, "DeepCrossing.hidden_units is empty"),
        ({"hidden_units": (0,)}, "DeepCrossing.hidden_units is 0"),
        ({"dropout": 1.0}, "DeepCrossing.dropout is 1"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeepCrossing.Config(**options)
