from __future__ import annotations

from typing import Any, Literal, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.final_net import FactorizedLinear, FactorizedMLP, FieldGate, FinalNet
from ctrlib.schema import FieldLayout
from tests.reference import final_net as reference
from tests.reference.mlp import linear

LAYOUT = FieldLayout(("user", "item", "hour"), 4)
COMBINES: tuple[Literal["concat", "sum"], ...] = ("concat", "sum")

CONTRACT: dict[str, Interaction.Config] = {
    "factorized_mlp": FactorizedMLP.Config(hidden_units=(8, 6), activation="none", norm="none"),
    "final_net": FinalNet.Config(
        block1=FactorizedMLP.Config(hidden_units=(8, 4), activation="silu", dropout=0.2),
        block2=FactorizedMLP.Config(hidden_units=(5,), combine="sum", activation="tanh", norm="layer"),
    ),
    "final_net_1b": FinalNet.Config(block1=FactorizedMLP.Config(hidden_units=(8,), activation="silu"), block2=None, gate="sum"),
}


def mlp_config(*units: int, **options: Any) -> FactorizedMLP.Config:
    return FactorizedMLP.Config(hidden_units=units, **options)


def final_net(layout: FieldLayout = LAYOUT, **options: Any) -> FinalNet:
    small: dict[str, Any] = {"block1": mlp_config(6, 4, norm="none"), "block2": mlp_config(8, norm="none")}
    return FinalNet(FinalNet.Config(**(small | options)), layout).double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def weights(module: nn.Module) -> list[tuple[reference.Array, reference.Array]]:
    linears = [m for m in module.modules() if isinstance(m, nn.Linear)]
    return [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in linears]


@pytest.mark.parametrize(("combine", "expected"), [("concat", [1.0, 3.0, 4.0, -3.0]), ("sum", [5.0, 0.0])])
def test_hand_case(combine: Literal["concat", "sum"], expected: list[float]) -> None:
    """x = (1, 2): W x + b = (1, 3, 4, −1), so u = (1, 3) and v = (4, −1)."""
    layer = FactorizedLinear(2, len(expected), combine)
    layer.load_state_dict(
        {
            "linear.weight": torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, -1.0]]),
            "linear.bias": torch.tensor([0.0, 1.0, 0.0, 0.0]),
        }
    )
    assert layer(torch.tensor([[1.0, 2.0]])).tolist() == [expected]


@pytest.mark.parametrize("combine", COMBINES)
@pytest.mark.parametrize("activation", ["relu", "none"])
def test_factorized_mlp_equals_the_formula(combine: Literal["concat", "sum"], activation: Literal["relu", "none"]) -> None:
    torch.manual_seed(1)
    block = FactorizedMLP(mlp_config(6, 4, combine=combine, activation=activation, norm="none"), LAYOUT).double()
    x_BFD = randn(5, 3, 4)
    expected = [reference.factorized_mlp(x, weights(block), activation, combine) for x in x_BFD.numpy()]
    assert block.out == FieldLayout(("factorized_mlp",), 4)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("gate", ["none", *COMBINES])
@pytest.mark.parametrize("branches", [1, 2])
def test_equals_the_formula(gate: Literal["none", "concat", "sum"], branches: int) -> None:
    torch.manual_seed(2)
    block = final_net(gate=gate) if branches == 2 else final_net(gate=gate, block2=None)
    if block.gate is not None:
        nn.init.normal_(block.gate.weight)
        nn.init.normal_(block.gate.bias)
    x_BFD = randn(5, 3, 4)
    expected = []
    for x in x_BFD.numpy():
        read = x
        if block.gate is not None:
            weight, bias = block.gate.weight.detach().numpy(), block.gate.bias.detach().numpy()[:, 0]
            read = reference.gate(x, weight, bias, gate)
        ends = [linear(reference.factorized_mlp(read, weights(block.block_1), "relu", "concat"), *weights(block.linear_1)[0])]
        if block.block_2 is not None:
            hidden = reference.factorized_mlp(x, weights(block.block_2), "relu", "concat")
            ends.append(linear(hidden, *weights(block.linear_2)[0]))
        expected.append([float(end[0]) for end in ends])
    assert block.out == FieldLayout(("final_net",), 1)
    np.testing.assert_allclose(block.explain(x_BFD)["branches"].detach().numpy(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].detach().numpy(), np.mean(expected, axis=1), rtol=0, atol=1e-10)


def test_the_gate_starts_open() -> None:
    x_BFD = randn(5, 3, 4)
    gate = FieldGate(LAYOUT, "concat").double()
    assert torch.equal(gate(x_BFD), torch.cat([x_BFD, x_BFD], dim=1))
    assert gate.out == FieldLayout(("user", "item", "hour", "user_gated", "item_gated", "hour_gated"), 4)
    assert torch.equal(FieldGate(LAYOUT, "sum").double()(x_BFD), 2 * x_BFD)
    assert torch.equal(final_net().explain(x_BFD)["gate"], torch.ones(5, 3, 4, dtype=torch.float64))
    assert "gate" not in final_net(gate="none").explain(x_BFD)


def test_only_the_first_branch_is_gated() -> None:
    block = final_net()
    x_BFD = randn(5, 3, 4)
    before = block.branches(x_BFD)
    assert block.gate is not None
    block.gate.bias.data.zero_()
    after = block.branches(x_BFD)
    assert (before[:, 0] != after[:, 0]).any()
    assert torch.equal(before[:, 1], after[:, 1])


def test_layers_without_activation_are_polynomials_of_degree_two_to_their_number() -> None:
    """Along a line t ↦ x + t·d two layers are a quartic: its fifth differences are zero, its fourth are not."""
    torch.manual_seed(3)
    block = FactorizedMLP(mlp_config(6, 4, activation="none", norm="none"), LAYOUT).double()
    x, d = randn(1, 3, 4), randn(1, 3, 4)
    points = np.array([block(x + t * d)[0, 0].detach().numpy() for t in range(8)])
    assert np.abs(np.diff(points, n=4, axis=0)).max() > 1e-3
    np.testing.assert_allclose(np.diff(points, n=5, axis=0), 0, rtol=0, atol=1e-8)


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def fields(count: int) -> FieldLayout:
    return FieldLayout(tuple(f"f{i}" for i in range(count)), 10)


def test_published_sizes() -> None:
    """Logs on Frappe_x1 and MovielensLatest_x1, less their embedding tables."""
    one_branch: dict[str, Any] = {"gate": "none", "block2": None}
    two = {"block1": mlp_config(400, 400), "block2": mlp_config(400)}
    assert size(final_net(fields(10), block1=mlp_config(400, 400), **one_branch)) == 256_791 - 5_399 * 10
    assert size(final_net(fields(10), **two)) == 338_502 - 5_399 * 10
    assert size(final_net(fields(3), block1=mlp_config(400), **one_branch)) == 916_021 - 90_242 * 10
    assert size(final_net(fields(3), block1=mlp_config(400, 400), block2=mlp_config(500))) == 1_106_234 - 90_242 * 10


def test_sizes_of_a_sum() -> None:
    block = FactorizedMLP(mlp_config(5, combine="sum", norm="layer"), LAYOUT)
    assert size(block) == 12 * 10 + 10 + 2 * 5


def test_batch_norm_and_dropout_in_eval() -> None:
    block = FactorizedMLP(mlp_config(6, 4, dropout=0.5), LAYOUT).double()
    x_BFD = randn(8, 3, 4)
    assert not torch.equal(block(x_BFD), block(x_BFD))
    block.eval()
    torch.testing.assert_close(block(x_BFD[:1]), block(x_BFD)[:1], rtol=0, atol=1e-12)


def test_gradients() -> None:
    torch.manual_seed(4)
    block = final_net(
        block1=mlp_config(6, 4, activation="tanh", norm="none"), block2=mlp_config(8, activation="silu", norm="layer")
    )
    assert block.gate is not None
    nn.init.normal_(block.gate.weight)
    assert torch.autograd.gradcheck(block, (randn(3, 3, 4).requires_grad_(),), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_units": ()}, "FactorizedMLP.hidden_units is empty"),
        ({"hidden_units": (4, 0)}, "FactorizedMLP.hidden_units is 0"),
        ({"hidden_units": (4, 3)}, r"hidden_units is \(4, 3\); expected even widths"),
        ({"dropout": 1.0}, "FactorizedMLP.dropout is 1"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        FactorizedMLP.Config(**options)
    assert cast(Any, FactorizedMLP.Config(hidden_units=(3,), combine="sum")).hidden_units == (3,)
