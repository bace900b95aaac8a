from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.field_weighted import FmFM, FwFM
from ctrlib.interactions.fm import FM
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, even_width, two_fields
from tests.reference import pairwise as reference
from tests.reference.products import inner_products, kernel_products, pairs

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 4)

CONTRACT: dict[str, Interaction.Config] = {
    "fwfm": FwFM.Config(bias=True),
    "fwfm_field": FwFM.Config(linear="field"),
    "fwfm_value": FwFM.Config(linear="value"),
    "fmfm": FmFM.Config(),
    "fmfm_vector": FmFM.Config(kernel="vector"),
}
NEEDS: dict[str, Need] = {
    "fwfm": two_fields,
    "fwfm_field": two_fields,
    "fwfm_value": lambda layout: two_fields(layout) and even_width(layout),
    "fmfm": two_fields,
    "fmfm_vector": two_fields,
}
# Forward is a linear layer over the products.
DERIVED = {"fwfm": {"pair"}, "fwfm_field": {"pair"}, "fwfm_value": {"pair"}}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def square(weights: Tensor) -> np.ndarray[Any, Any]:
    """[P] as [F, F], lower triangle unused."""
    full = np.full((4, 4), np.nan)
    for weight, (i, j) in zip(weights.tolist(), pairs(4), strict=True):
        full[i, j] = weight
    return full


def test_fwfm_hand_case() -> None:
    """Products 11, 17, 39 times 1, −1, .5 is 13.5; with FiLV vectors (1,0), (0,1), (0,0): + 1 + 4."""
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    layout = FieldLayout(("a", "b", "c"), 2)
    block = FwFM(FwFM.Config(), layout)
    block.load_state_dict({"strength.weight": torch.tensor([[1.0, -1.0, 0.5]])})
    assert block(x_BFD).tolist() == [[[13.5]]]
    assert block.explain(x_BFD)["pair"].tolist() == [[11.0, -17.0, 19.5]]
    block = FwFM(FwFM.Config(linear="field"), layout)
    weights = {"strength.weight": torch.tensor([[1.0, -1.0, 0.5]]), "linear.weight": torch.tensor([[1.0, 0, 0, 1, 0, 0]])}
    block.load_state_dict(weights)
    assert block(x_BFD).tolist() == [[[18.5]]]


@pytest.mark.parametrize("linear", ["none", "field", "value"])
@pytest.mark.parametrize("bias", [False, True])
def test_fwfm_equals_the_formula(linear: Literal["none", "field", "value"], bias: bool) -> None:
    torch.manual_seed(1)
    block = FwFM(FwFM.Config(linear=linear, bias=bias), LAYOUT).double()
    x_BFD = randn(5, 4, 4)
    strength = square(block.strength.weight[0])
    constant = block.strength.bias.item() if bias else 0.0
    expected = []
    for x in x_BFD.numpy():
        v, u = (x[:, :2], x[:, 2:]) if linear == "value" else (x, None)
        w = None if block.linear is None else block.linear.weight.detach().numpy().reshape(4, 4)
        expected.append(constant + reference.fwfm(v, strength, u if linear == "value" else w))
    assert block.out == FieldLayout(("fwfm",), 1)
    assert block(x_BFD).shape == (5, 1, 1)
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].detach().numpy(), expected, rtol=0, atol=1e-10)
    vectors = x_BFD[:, :, :2] if linear == "value" else x_BFD
    shown = np.array([inner_products(v) for v in vectors.numpy()]) * block.strength.weight.detach().numpy()
    np.testing.assert_allclose(block.explain(x_BFD)["pair"].detach().numpy(), shown, rtol=0, atol=1e-10)


def test_equal_strengths_are_a_factorization_machine() -> None:
    x_BFD = randn(5, 4, 4)
    expected = FM(FM.Config(), LAYOUT)(x_BFD)
    block = FwFM(FwFM.Config(), LAYOUT).double()
    nn.init.ones_(block.strength.weight)
    torch.testing.assert_close(block(x_BFD), expected, rtol=0, atol=1e-12)
    diagonal = FmFM(FmFM.Config(kernel="vector"), LAYOUT).double()  # starts at one
    torch.testing.assert_close(diagonal(x_BFD), expected, rtol=0, atol=1e-12)
    full = FmFM(FmFM.Config(), LAYOUT).double()
    full.kernel.weight.data.copy_(torch.eye(4).expand(6, 4, 4))
    torch.testing.assert_close(full(x_BFD), expected, rtol=0, atol=1e-12)


def test_fmfm_hand_case() -> None:
    """(1,2) [[0,1],[2,0]] (3,−1)ᵀ = −1 + 12."""
    block = FmFM(FmFM.Config(), FieldLayout(("a", "b"), 2))
    block.load_state_dict({"kernel.weight": torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])})
    assert block(torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])).tolist() == [[[11.0]]]


@pytest.mark.parametrize("kernel", ["matrix", "vector"])
def test_fmfm_equals_the_formula(kernel: Literal["matrix", "vector"]) -> None:
    torch.manual_seed(2)
    block = FmFM(FmFM.Config(kernel=kernel), LAYOUT).double()
    nn.init.normal_(block.kernel.weight)
    weight = block.kernel.weight.detach().numpy()
    matrices = weight if kernel == "matrix" else np.stack([np.diag(w) for w in weight])
    x_BFD = randn(5, 4, 4)
    expected = [reference.fmfm(x, matrices) for x in x_BFD.numpy()]
    assert block.out == FieldLayout(("fmfm",), 1)
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].detach().numpy(), expected, rtol=0, atol=1e-10)
    shown = np.array([kernel_products(x, matrices) for x in x_BFD.numpy()])
    np.testing.assert_allclose(block.explain(x_BFD)["pair"].detach().numpy(), shown, rtol=0, atol=1e-10)


def test_sizes() -> None:
    layout = FieldLayout(tuple(f"f{i}" for i in range(39)), 10)
    assert size(FwFM(FwFM.Config(), layout)) == 741
    assert size(FwFM(FwFM.Config(linear="field", bias=True), layout)) == 741 + 390 + 1
    assert size(FwFM(FwFM.Config(linear="value"), layout)) == 741
    assert size(FmFM(FmFM.Config(), layout)) == 741 * 100
    assert size(FmFM(FmFM.Config(kernel="vector"), layout)) == 741 * 10


@pytest.mark.parametrize("config", [FwFM.Config(), FmFM.Config()])
def test_one_field_has_no_pairs(config: Interaction.Config) -> None:
    with pytest.raises(ConfigError, match=r"F.FM takes pairs of fields, but its input has the single field 'user'"):
        config.component(config, FieldLayout(("user",), 3))


def test_two_vectors_need_an_even_width() -> None:
    with pytest.raises(ConfigError, match=r"FwFM with linear='value' reads 2 vectors.*but the width is 3"):
        FwFM(FwFM.Config(linear="value"), FieldLayout(("user", "item"), 3))
