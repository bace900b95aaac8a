from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from ctrlib.config import ConfigError
from ctrlib.interactions.auto_fis import AutoFIS
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.fm import FM
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, two_fields
from tests.reference import auto_fis as reference
from tests.reference.products import pairs

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 4)

CONTRACT: dict[str, Interaction.Config] = {"auto_fis": AutoFIS.Config(), "auto_fis_no_norm": AutoFIS.Config(norm="none")}
NEEDS: dict[str, Need] = {"auto_fis": two_fields, "auto_fis_no_norm": two_fields}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def test_hand_case() -> None:
    """Products 11, 17, 39 times 1, −1, .5 is 13.5."""
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    config = AutoFIS.Config(pairs=("a*b", "a*c", "b*c"), alpha=(1.0, -1.0, 0.5), norm="none")
    block = AutoFIS(config, FieldLayout(("a", "b", "c"), 2))
    assert block(x_BFD).tolist() == [[[13.5]]]
    assert block.explain(x_BFD)["pair"].tolist() == [[11.0, -17.0, 19.5]]


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("chosen", [None, ("user*hour", "item*city", "hour*city")])
def test_equals_the_formula(norm: Literal["batch", "none"], chosen: tuple[str, ...] | None) -> None:
    block = AutoFIS(AutoFIS.Config(norm=norm, pairs=chosen), LAYOUT).double().train()
    block.alpha_P.data = randn(len(block.names))
    of = dict(zip(AutoFIS(AutoFIS.Config(), LAYOUT).names, pairs(4), strict=True))
    alpha = {of[name]: value for name, value in zip(block.names, block.alpha_P.tolist(), strict=True)}
    x_BFD = randn(7, 4, 4)
    expected = reference.auto_fis(x_BFD.numpy(), alpha, 1e-5 if norm == "batch" else None)
    assert block.out == FieldLayout(("auto_fis",), 1)
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].detach().numpy(), expected, rtol=0, atol=1e-10)
    assert block.axes == {"pair": (block.names,)}
    assert sum(p.numel() for p in block.parameters()) == len(block.names)  # the norm has none


def test_open_gates_without_norm_are_a_factorization_machine() -> None:
    block = AutoFIS(AutoFIS.Config(norm="none"), LAYOUT).double()
    block.alpha_P.data.fill_(1)
    x_BFD = randn(5, 4, 4)
    torch.testing.assert_close(block(x_BFD), FM(FM.Config(), LAYOUT)(x_BFD), rtol=0, atol=1e-12)


def test_where_the_weights_start() -> None:
    alpha_P = AutoFIS(AutoFIS.Config(), FieldLayout(tuple(f"f{i}" for i in range(39)), 2)).alpha_P
    assert alpha_P.shape == (741,)
    assert ((alpha_P - 0.6).abs() <= 1e-3).all()
    assert len(set(alpha_P.tolist())) > 700
    kept = AutoFIS(AutoFIS.Config(pairs=("item*hour",), alpha=(0.25,), learn_alpha=False), LAYOUT)
    assert kept.alpha_P.tolist() == [0.25]
    assert not kept.alpha_P.requires_grad


def test_errors() -> None:
    for options, message in (
        ({"pairs": ()}, "AutoFIS.pairs is empty"),
        ({"alpha": (1.0,)}, "alpha has 1 weights, but pairs is None"),
        ({"pairs": ("a*b",), "alpha": (1.0, 2.0)}, "alpha has 2 weights for 1 pairs"),
    ):
        with pytest.raises(ConfigError, match=message):
            AutoFIS.Config(**options)
    with pytest.raises(ConfigError, match=r"names 'user\*itm', which is no pair of its fields; did you mean 'user\*item'"):
        AutoFIS(AutoFIS.Config(pairs=("user*itm",)), LAYOUT)
    with pytest.raises(ConfigError, match="names a pair twice, or not in the order of the fields"):
        AutoFIS(AutoFIS.Config(pairs=("user*hour", "user*item")), LAYOUT)
    with pytest.raises(ConfigError, match="AutoFIS takes pairs of fields, but its input has the single field 'user'"):
        AutoFIS(AutoFIS.Config(), FieldLayout(("user",), 3))
