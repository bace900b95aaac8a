from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.fm import FM
from ctrlib.interactions.hofm import HOFM, anova
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need
from tests.reference import pairwise as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city", "week"), 6)

CONTRACT: dict[str, Interaction.Config] = {
    "hofm": HOFM.Config(order=4),
    "hofm_shared": HOFM.Config(share_embedding=True),
}
# As many fields as the order, and a vector for each order above the first.
NEEDS: dict[str, Need] = {
    "hofm": lambda layout: layout.num_fields >= 4 and layout.dim % 3 == 0,
    "hofm_shared": lambda layout: layout.num_fields >= 3,
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_hand_case() -> None:
    """z = 1, 2, 3, 4: A² = 2+3+4+6+8+12 = 35, A³ = 6+8+12+24 = 50, A⁴ = 24."""
    x_BFD = torch.tensor([1.0, 2.0, 3.0, 4.0]).view(1, 4, 1)
    assert [anova(x_BFD, t).item() for t in (1, 2, 3, 4)] == [10.0, 35.0, 50.0, 24.0]
    block = HOFM(HOFM.Config(order=4, share_embedding=True), FieldLayout(("a", "b", "c", "d"), 1))
    assert block(x_BFD).tolist() == [[[109.0]]]
    assert {name: value.tolist() for name, value in block.explain(x_BFD).items()} == {
        "order/2": [35.0],
        "order/3": [50.0],
        "order/4": [24.0],
    }


@pytest.mark.parametrize(("order", "share"), [(2, False), (3, False), (4, False), (3, True), (5, True)])
def test_equals_the_sum_over_combinations(order: int, share: bool) -> None:
    block = HOFM(HOFM.Config(order=order, share_embedding=share), LAYOUT)
    x_BFD = randn(6, 5, 6)
    width = 6 if share else 6 // (order - 1)
    shown = block.explain(x_BFD)
    assert list(shown) == [f"order/{t}" for t in range(2, order + 1)]
    expected = np.zeros(6)
    for t in range(2, order + 1):
        start = 0 if share else (t - 2) * width
        terms = [reference.anova(x[:, start : start + width], t) for x in x_BFD.numpy()]
        np.testing.assert_allclose(shown[f"order/{t}"].numpy(), terms, rtol=0, atol=1e-10)
        expected += terms
    assert block.out == FieldLayout(("hofm",), 1)
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].numpy(), expected, rtol=0, atol=1e-10)
    assert list(block.parameters()) == []


def test_order_two_is_a_factorization_machine() -> None:
    x_BFD = randn(6, 5, 6)
    torch.testing.assert_close(HOFM(HOFM.Config(order=2), LAYOUT)(x_BFD), FM(FM.Config(), LAYOUT)(x_BFD), rtol=0, atol=1e-12)


def test_a_field_meets_itself_never() -> None:
    """Linear in every field: the second difference along one of them is zero."""
    x_BFD, step = randn(1, 5, 6), torch.zeros(1, 5, 6, dtype=torch.float64)
    step[0, 2] = 1.0
    block = HOFM(HOFM.Config(order=3), LAYOUT)
    assert abs((block(x_BFD + step) - 2 * block(x_BFD) + block(x_BFD - step)).item()) < 1e-10


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"HOFM\.order is 1; expected 2"):
        HOFM.Config(order=1)
    with pytest.raises(ConfigError, match=r"HOFM\.order is 6, but its input has fewer fields \(5\)"):
        HOFM(HOFM.Config(order=6), LAYOUT)
    with pytest.raises(ConfigError, match=r"HOFM reads 4 vectors per value \(5 fields\).*width is 6.*vectors=4"):
        HOFM(HOFM.Config(order=5), LAYOUT)
