from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.inner_product import PIN, InnerProduct, OuterProduct
from ctrlib.interactions.pairs import Pairs
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, two_fields
from tests.reference import products as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)
NAMES = ("user*item", "user*hour", "user*city", "item*hour", "item*city", "hour*city")
KERNELS: list[Literal["matrix", "vector", "number"]] = ["matrix", "vector", "number"]

CONTRACT: dict[str, Interaction.Config] = {
    "inner_product": InnerProduct.Config(),
    "inner_product_alone": InnerProduct.Config(linear_signal=False),
    "outer_product": OuterProduct.Config(),
    "outer_product_alone": OuterProduct.Config(linear_signal=False),
    "outer_product_matrix": OuterProduct.Config(kernel="matrix"),
    "outer_product_vector": OuterProduct.Config(kernel="vector", linear_signal=False),
    "outer_product_number": OuterProduct.Config(kernel="number"),
    "pin": PIN.Config(hidden_units=(6, 3)),
    "pin_without_norm": PIN.Config(hidden_units=(6, 3), norm="none"),
}
NEEDS: dict[str, Need] = {
    "inner_product": two_fields,
    "inner_product_alone": two_fields,
    "outer_product_matrix": two_fields,
    "outer_product_vector": two_fields,
    "outer_product_number": two_fields,
    "pin": two_fields,
    "pin_without_norm": two_fields,
}


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def criteo(dim: int) -> FieldLayout:
    return FieldLayout(tuple(f"f{i}" for i in range(39)), dim)


def test_inner_product_hand_case() -> None:
    """⟨(1,2),(3,4)⟩ = 11, ⟨(1,2),(5,6)⟩ = 17, ⟨(3,4),(5,6)⟩ = 39."""
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]])
    layout = FieldLayout(("a", "b", "c"), 2)
    block = InnerProduct(InnerProduct.Config(linear_signal=False), layout)
    assert block(x_BFD).tolist() == [[[11.0], [17.0], [39.0]]]
    assert block.out == FieldLayout(("a*b", "a*c", "b*c"), 1)
    block = InnerProduct(InnerProduct.Config(), layout)
    assert block(x_BFD).tolist() == [[[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 11.0, 17.0, 39.0]]]
    assert block.out == FieldLayout(("product",), 9)


def test_inner_product_equals_the_formula() -> None:
    x_BFD = randn(5, 4, 3)
    expected = np.stack([reference.inner_products(x) for x in x_BFD.numpy()])
    for linear_signal in (True, False):
        block = InnerProduct(InnerProduct.Config(linear_signal=linear_signal), LAYOUT)
        y_BFD = block(x_BFD)
        shown = y_BFD[:, 0, 12:] if linear_signal else y_BFD[:, :, 0]
        np.testing.assert_allclose(shown.numpy(), expected, rtol=0, atol=1e-10)
        np.testing.assert_allclose(block.explain(x_BFD)["product"].numpy(), expected, rtol=0, atol=1e-10)
        assert block.out == (FieldLayout(("product",), 18) if linear_signal else FieldLayout(NAMES, 1))
        assert size(block) == 0
    assert torch.equal(InnerProduct(InnerProduct.Config(), LAYOUT)(x_BFD)[:, 0, :12], x_BFD.flatten(1))


def test_outer_product_hand_case() -> None:
    """s = (1,2) + (3,−1) = (4,1), so s sᵀ = [[16, 4], [4, 1]]."""
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    layout = FieldLayout(("a", "b"), 2)
    block = OuterProduct(OuterProduct.Config(linear_signal=False), layout)
    assert block(x_BFD).tolist() == [[[16.0, 4.0], [4.0, 1.0]]]
    assert block.out == FieldLayout(("outer_0", "outer_1"), 2)
    block = OuterProduct(OuterProduct.Config(), layout)
    assert block(x_BFD).tolist() == [[[1.0, 2.0, 3.0, -1.0, 16.0, 4.0, 4.0, 1.0]]]


def test_kernel_product_hand_case() -> None:
    """x_1 = (1,2), x_2 = (3,−1), φ = [[0, 1], [2, 0]]: 1·1·(−1) + 2·2·3 = 11; the transposed kernel gives 2·1·(−1) + 1·2·3."""
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]])
    block = OuterProduct(OuterProduct.Config(kernel="matrix", linear_signal=False), FieldLayout(("a", "b"), 2))
    block.load_state_dict({"kernel.weight": torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])})
    assert block(x_BFD).tolist() == [[[11.0]]]
    block.load_state_dict({"kernel.weight": torch.tensor([[[0.0, 2.0], [1.0, 0.0]]])})
    assert block(x_BFD).tolist() == [[[4.0]]]


def test_outer_product_equals_the_formula() -> None:
    x_BFD = randn(5, 4, 3)
    block = OuterProduct(OuterProduct.Config(), LAYOUT)
    expected = np.stack([reference.outer_sum(x) for x in x_BFD.numpy()])
    np.testing.assert_allclose(block(x_BFD)[:, 0, 12:].numpy(), expected.reshape(5, 9), rtol=0, atol=1e-10)
    assert torch.equal(block(x_BFD)[:, 0, :12], x_BFD.flatten(1))
    assert block.out == FieldLayout(("product",), 21)
    assert size(block) == 0
    assert block.explain(x_BFD) == {}


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernel_products_equal_the_formula(kernel: Literal["matrix", "vector", "number"]) -> None:
    torch.manual_seed(1)
    block = OuterProduct(OuterProduct.Config(kernel=kernel, linear_signal=False), LAYOUT).double()
    assert block.kernel is not None
    if kernel != "matrix":
        assert (block.kernel.weight == 1).all()
    nn.init.normal_(block.kernel.weight)
    weight = block.kernel.weight.detach().numpy()
    kernels = weight if kernel == "matrix" else np.stack([np.diag(np.broadcast_to(w, 3)) for w in weight])
    x_BFD = randn(5, 4, 3)
    expected = np.stack([reference.kernel_products(x, kernels) for x in x_BFD.numpy()])
    np.testing.assert_allclose(block(x_BFD)[:, :, 0].detach().numpy(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(block.explain(x_BFD)["product"].detach().numpy(), expected, rtol=0, atol=1e-10)
    assert block.out == FieldLayout(NAMES, 1)
    beside = OuterProduct(OuterProduct.Config(kernel=kernel), LAYOUT).double()
    beside.load_state_dict(block.state_dict())
    torch.testing.assert_close(beside(x_BFD)[:, 0, 12:], block(x_BFD)[:, :, 0], rtol=0, atol=0)
    assert beside.out == FieldLayout(("product",), 18)


def test_sizes() -> None:
    for kernel, parameters in zip(KERNELS, (741 * 20**2, 741 * 20, 741), strict=True):
        assert size(OuterProduct(OuterProduct.Config(kernel=kernel), criteo(20))) == parameters
    per_pair = 60 * 40 + 40 + 40 * 5 + 5
    assert size(PIN(PIN.Config(), criteo(20))) == 741 * per_pair + 2 * 45
    assert size(PIN(PIN.Config(norm="none"), criteo(20))) == 741 * per_pair


@pytest.mark.parametrize("norm", ["none", "layer"])
def test_pin_equals_the_formula(norm: Literal["none", "layer"]) -> None:
    torch.manual_seed(2)
    block = PIN(PIN.Config(hidden_units=(5, 4, 2), norm=norm), LAYOUT).double()
    for p in (*block.biases, *block.gains, *block.shifts):
        nn.init.normal_(p)
    weights, biases, gains, shifts = (
        [p.detach().numpy() for p in group] for group in (block.weights, block.biases, block.gains, block.shifts)
    )
    norms = zip(gains, shifts, strict=True) if norm == "layer" else [(None, None)] * 3
    layers = [(w, b, *n) for w, b, n in zip(weights, biases, norms, strict=True)]
    x_BFD = randn(5, 4, 3)
    y_BPM = block(x_BFD)
    assert block.out == FieldLayout(NAMES, 2)
    expected = np.stack([reference.sub_networks(x, layers, 1e-5) for x in x_BFD.numpy()])
    np.testing.assert_allclose(y_BPM.detach().numpy(), expected, rtol=0, atol=1e-10)


def test_pin_keeps_the_pairs_apart() -> None:
    """Without the norm an output depends on the two fields of its pair and on nothing else."""
    torch.manual_seed(3)
    block = PIN(PIN.Config(norm="none"), LAYOUT).double()
    x_BFD = randn(1, 4, 3).requires_grad_()
    for p, (i, j) in enumerate(reference.pairs(4)):
        (grad_FD,) = torch.autograd.grad(block(x_BFD)[0, p].square().sum(), x_BFD)
        assert {f for f in range(4) if grad_FD[0, f].any()} <= {i, j}


def test_pairs_are_in_the_order_of_their_names() -> None:
    left, right = Pairs(4)(torch.arange(4.0).reshape(1, 4, 1))
    names = [f"{LAYOUT.names[int(a)]}*{LAYOUT.names[int(b)]}" for a, b in zip(left.flatten(), right.flatten(), strict=True)]
    assert tuple(names) == NAMES


@pytest.mark.parametrize("config", [InnerProduct.Config(), OuterProduct.Config(kernel="matrix"), PIN.Config()])
def test_one_field_has_no_pairs(config: Interaction.Config) -> None:
    with pytest.raises(ConfigError, match=r"takes pairs of fields, but its input has the single field 'user'"):
        config.component(config, FieldLayout(("user",), 3))


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"PIN\.hidden_units is empty"):
        PIN.Config(hidden_units=())
    with pytest.raises(ConfigError, match=r"PIN\.hidden_units is 0"):
        PIN.Config(hidden_units=(4, 0))
