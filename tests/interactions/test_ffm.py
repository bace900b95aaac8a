from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.compose import Stack
from ctrlib.interactions.ffm import FFM
from ctrlib.interactions.fm import FM
from ctrlib.interactions.onn import ONN
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, two_fields
from tests.reference import pairwise as reference

NAMES = ("user", "item", "hour", "city")

CONTRACT: dict[str, Interaction.Config] = {
    "ffm": FFM.Config(),
    "onn": Stack.Config(blocks=(AutoInt.Config(num_layers=1, head_dim=4), ONN.Config())),
}
# A vector for every other field, and for every field of AutoInt's width of 8.
NEEDS: dict[str, Need] = {
    "ffm": lambda layout: two_fields(layout) and layout.dim % (layout.num_fields - 1) == 0,
    "onn": lambda layout: two_fields(layout) and 8 % layout.num_fields == 0,
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def test_ffm_hand_case() -> None:
    """Three fields, k = 1. a = (a→b, a→c) = (1, 2), b = (b→a, b→c) = (3, 4), c = (c→a, c→b) = (5, 6): 1·3 + 2·5 + 4·6."""
    block = FFM(FFM.Config(), FieldLayout(("a", "b", "c"), 2))
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    assert block(x_BFD).tolist() == [[[37.0]]]
    assert block.explain(x_BFD)["pair"].tolist() == [[3.0, 10.0, 24.0]]


def test_onn_hand_case() -> None:
    """The same with vectors of their own in front: 7, 8 and 9 are copied."""
    block = ONN(ONN.Config(), FieldLayout(("a", "b", "c"), 3))
    x_BFD = torch.tensor([[[7.0, 1.0, 2.0], [8.0, 3.0, 4.0], [9.0, 5.0, 6.0]]])
    assert block(x_BFD).tolist() == [[[7.0, 8.0, 9.0, 3.0, 10.0, 24.0]]]


def test_ffm_equals_the_formula() -> None:
    block = FFM(FFM.Config(), FieldLayout(NAMES, 6))
    x_BFD = randn(5, 4, 6)
    products = np.array([reference.ffm_products(x.reshape(4, 3, 2)) for x in x_BFD.numpy()])
    assert block.out == FieldLayout(("ffm",), 1)
    assert block(x_BFD).shape == (5, 1, 1)
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].numpy(), products.sum(axis=1), rtol=0, atol=1e-10)
    np.testing.assert_allclose(block.explain(x_BFD)["pair"].numpy(), products, rtol=0, atol=1e-10)
    assert size(block) == 0


def test_onn_equals_the_formula() -> None:
    block = ONN(ONN.Config(), FieldLayout(NAMES, 8))
    x_BFD = randn(5, 4, 8)
    expected = np.array([reference.onn(x[:, :2], x[:, 2:].reshape(4, 3, 2)) for x in x_BFD.numpy()])
    assert block.out == FieldLayout(("onn",), 4 * 2 + 6)
    np.testing.assert_allclose(block(x_BFD)[:, 0].numpy(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(block.explain(x_BFD)["product"].numpy(), expected[:, 8:], rtol=0, atol=1e-10)
    assert size(block) == 0


def test_equal_vectors_for_all_fields_are_a_factorization_machine() -> None:
    x_BFk = randn(5, 4, 2)
    expected = FM(FM.Config(), FieldLayout(NAMES, 2))(x_BFk)
    torch.testing.assert_close(FFM(FFM.Config(), FieldLayout(NAMES, 6))(x_BFk.repeat(1, 1, 3)), expected, rtol=0, atol=1e-12)


def test_every_vector_meets_exactly_one_other() -> None:
    x_BFD = randn(1, 4, 6).requires_grad_()
    block = FFM(FFM.Config(), FieldLayout(NAMES, 6))
    for pair in block.products(x_BFD)[0]:
        (grad_BFD,) = torch.autograd.grad(pair, x_BFD, retain_graph=True)
        assert int(grad_BFD.reshape(4, 3, 2).any(dim=2).sum()) == 2
    (grad_BFD,) = torch.autograd.grad(block(x_BFD).sum(), x_BFD)
    assert (grad_BFD != 0).all()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (FFM.Config(), r"FFM reads 3 vectors per value \(4 fields\) side by side, but the width is 7.*vectors='others'"),
        (ONN.Config(), r"ONN reads 4 vectors per value \(4 fields\) side by side, but the width is 7.*vectors='fields'"),
    ],
)
def test_width_must_fit(config: Interaction.Config, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config.component(config, FieldLayout(NAMES, 7))


@pytest.mark.parametrize("config", [FFM.Config(), ONN.Config()])
def test_one_field_has_no_pairs(config: Interaction.Config) -> None:
    with pytest.raises(ConfigError, match=r"(FFM|ONN) takes pairs of fields, but its input has the single field 'user'"):
        config.component(config, FieldLayout(("user",), 3))
