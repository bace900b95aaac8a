from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.cross_net import CrossNet, CrossNetMix, CrossNetV2, LowRankExperts
from ctrlib.schema import FieldLayout
from tests.reference.cross_net import Array, cross_mix, cross_v1, cross_v2, mix_gates

LAYOUT = FieldLayout(("user", "item", "hour"), 2)

CONTRACT: dict[str, Interaction.Config] = {
    "cross_net": CrossNet.Config(),
    "cross_net_v2": CrossNetV2.Config(),
    "cross_net_v2_low_rank": CrossNetV2.Config(rank=2),
    "cross_net_mix": CrossNetMix.Config(num_layers=2, num_experts=3, rank=2),
    "cross_net_mix_linear": CrossNetMix.Config(num_layers=2, num_experts=3, rank=2, activation="none", gate="sigmoid"),
}
# Norms of weights.
DERIVED = {name: {f"strength/{i}" for i in range(3)} for name in ("cross_net_v2", "cross_net_v2_low_rank")}


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def test_v1_hand_case() -> None:
    """x_0 = (1, 2), w = (3, −1), b = (.5, 0): wᵀx_0 = 1, so x_1 = (2.5, 4)."""
    block = CrossNet(CrossNet.Config(num_layers=1), FieldLayout(("a", "b"), 1))
    block.load_state_dict({"weights.0.weight": torch.tensor([[3.0, -1.0]]), "biases.0": torch.tensor([0.5, 0.0])})
    assert block(torch.tensor([[[1.0], [2.0]]])).tolist() == [[[2.5, 4.0]]]


def test_v2_hand_case() -> None:
    """x_0 = (1, 2), W = [[0, 1], [1, 1]], b = (.5, −1): Wx_0 + b = (2.5, 2), so x_1 = (3.5, 6)."""
    block = CrossNetV2(CrossNetV2.Config(num_layers=1), FieldLayout(("a", "b"), 1))
    block.load_state_dict(
        {"layers.0.weight": torch.tensor([[0.0, 1.0], [1.0, 1.0]]), "layers.0.bias": torch.tensor([0.5, -1.0])}
    )
    assert block(torch.tensor([[[1.0], [2.0]]])).tolist() == [[[3.5, 6.0]]]


def test_v1_equals_the_formula() -> None:
    torch.manual_seed(1)
    block = CrossNet(CrossNet.Config(num_layers=3), LAYOUT).double()
    assert all(not bias.any() for bias in block.biases)
    for bias in block.biases:
        nn.init.normal_(bias)
    weights = [p.detach().numpy()[0] for p in block.weights.parameters()]
    biases = [p.detach().numpy() for p in block.biases]
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [cross_v1(x.flatten().numpy(), weights, biases) for x in x_BFD]
    assert block.out == FieldLayout(("cross",), 6)
    assert block(x_BFD).shape == (4, 1, 6)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rank", [None, 2])
def test_v2_equals_the_formula(rank: int | None) -> None:
    torch.manual_seed(2)
    block = CrossNetV2(CrossNetV2.Config(num_layers=3, rank=rank), LAYOUT).double()
    weights, biases = [], []
    for layer in block.layers:
        *first, last = [m for m in layer.modules() if isinstance(m, nn.Linear)]
        assert not last.bias.any()
        nn.init.normal_(last.bias)
        weight = last.weight.detach().numpy()
        weights.append(weight @ first[0].weight.detach().numpy() if first else weight)  # U Vᵀ
        biases.append(last.bias.detach().numpy())
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [cross_v2(x.flatten().numpy(), weights, biases) for x in x_BFD]
    assert block.out == FieldLayout(("cross",), 6)
    assert block(x_BFD).shape == (4, 1, 6)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_v2_with_equal_rows_is_v1() -> None:
    """With every row of W equal to wᵀ and no bias, the matrix form is the vector form."""
    torch.manual_seed(3)
    first = CrossNet(CrossNet.Config(num_layers=1), LAYOUT).double()
    second = CrossNetV2(CrossNetV2.Config(num_layers=1), LAYOUT).double()
    weight = first.state_dict()["weights.0.weight"]
    second.load_state_dict({"layers.0.weight": weight.expand(6, 6), "layers.0.bias": torch.zeros(6)})
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(first(x_BFD), second(x_BFD), rtol=0, atol=1e-12)


def test_sizes() -> None:
    layout = FieldLayout(tuple(f"f{i}" for i in range(10)), 10)
    assert size(CrossNet(CrossNet.Config(num_layers=3), layout)) == 3 * 200
    assert size(CrossNetV2(CrossNetV2.Config(num_layers=4), layout)) == 4 * 10_100
    assert size(CrossNetV2(CrossNetV2.Config(num_layers=2, rank=8), layout)) == 2 * (2 * 100 * 8 + 100)


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"CrossNet\.num_layers is 0"):
        CrossNet.Config(num_layers=0)
    with pytest.raises(ConfigError, match=r"CrossNetV2\.num_layers is 0"):
        CrossNetV2.Config(num_layers=0)
    with pytest.raises(ConfigError, match=r"CrossNetV2\.rank is 0"):
        CrossNetV2.Config(rank=0)


def mix(**options: Any) -> CrossNetMix:
    block = CrossNetMix(CrossNetMix.Config(**options), LAYOUT).double()
    for layer in block.layers:
        assert isinstance(layer, LowRankExperts)
        assert not layer.bias.any()
        nn.init.normal_(layer.bias)
    return block


def mix_arrays(block: CrossNetMix) -> list[tuple[Array, Array, Array | None, Array]]:
    """U, V, C and b of every layer, as the paper has them."""
    found = []
    for layer in block.layers:
        assert isinstance(layer, LowRankExperts)
        down, up = layer.down.detach().view(-1, *layer.experts), layer.up.detach().view(*layer.experts, -1)
        within = None if layer.within is None else layer.within.detach().numpy()
        found.append((up.transpose(1, 2).numpy(), down.transpose(0, 1).numpy(), within, layer.bias.detach().numpy()))
    return found


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
@pytest.mark.parametrize(
    ("activation", "act"),
    [("tanh", np.tanh), ("relu", lambda v: np.maximum(v, 0)), ("none", None)],
    ids=["tanh", "relu", "none"],
)
def test_mix_equals_the_formula(activation: str, act: Any, gate: Literal["softmax", "sigmoid"]) -> None:
    torch.manual_seed(4)
    block = mix(num_layers=3, num_experts=3, rank=2, activation=activation, gate=gate)
    weight = block.gate.weight.detach().numpy()
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [cross_mix(x.flatten().numpy(), weight, gate, mix_arrays(block), act) for x in x_BFD]
    assert block.out == FieldLayout(("cross",), 6)
    assert block(x_BFD).shape == (4, 1, 6)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_mix_gates_read_the_current_layer() -> None:
    """Gates of x_0 in every layer make another network; explain shows those of x_l."""
    torch.manual_seed(5)
    block = mix(num_layers=2, num_experts=3, rank=2)
    x0_BN = torch.randn(4, 6, dtype=torch.float64)
    shown = block.explain(x0_BN.view(4, 3, 2))
    assert list(shown) == ["gate/0", "gate/1"]
    right = wrong = x0_BN
    for i, layer in enumerate(block.layers):
        expected = [mix_gates(x.detach().numpy(), block.gate.weight.detach().numpy(), "softmax") for x in right]
        np.testing.assert_allclose(shown[f"gate/{i}"].detach().numpy(), expected, rtol=0, atol=1e-10)
        right = x0_BN * layer(right, block.gates(right)) + right
        wrong = x0_BN * layer(wrong, block.gates(x0_BN)) + wrong
    torch.testing.assert_close(block(x0_BN.view(4, 3, 2))[:, 0], right, rtol=0, atol=1e-12)
    assert (wrong - right).abs().max() > 1e-3


def test_mix_of_one_linear_expert_is_the_low_rank_form() -> None:
    torch.manual_seed(6)
    block = mix(num_layers=2, num_experts=1, rank=2, activation="none")
    plain = CrossNetV2(CrossNetV2.Config(num_layers=2, rank=2), LAYOUT).double()
    for layer, experts in zip(plain.layers, block.layers, strict=True):
        assert isinstance(experts, LowRankExperts)
        layer.load_state_dict(
            {"0.weight": experts.down.detach().T, "1.weight": experts.up.detach().T, "1.bias": experts.bias.detach()}
        )
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    torch.testing.assert_close(block(x_BFD), plain(x_BFD), rtol=0, atol=1e-12)


def test_mix_sizes_and_config_errors() -> None:
    layout = FieldLayout(tuple(f"f{i}" for i in range(10)), 10)
    per_layer = 2 * 4 * 100 * 32 + 100
    assert size(CrossNetMix(CrossNetMix.Config(), layout)) == 400 + 3 * (per_layer + 4 * 32 * 32)
    assert size(CrossNetMix(CrossNetMix.Config(activation="none"), layout)) == 400 + 3 * per_layer
    wrong: list[dict[str, Any]] = [{"num_layers": 0}, {"num_experts": 0}, {"rank": 0}]
    for options in wrong:
        with pytest.raises(ConfigError, match=rf"CrossNetMix\.{next(iter(options))} is 0"):
            CrossNetMix.Config(**options)


def test_explain_of_the_vector_form_is_what_each_layer_adds() -> None:
    torch.manual_seed(3)
    block = CrossNet(CrossNet.Config(num_layers=2), LAYOUT).double()
    x_BFD = torch.randn(5, LAYOUT.num_fields, LAYOUT.dim, dtype=torch.float64)
    x0 = x_BFD.flatten(1)
    shown = block.explain(x_BFD)
    first = shown["strength/0"].unsqueeze(1) * x0 + x0  # biases start at zero
    torch.testing.assert_close(first + shown["strength/1"].unsqueeze(1) * x0, block(x_BFD)[:, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rank", [None, 2])
def test_explain_of_the_matrix_form_is_the_norm_of_each_block(rank: int | None) -> None:
    torch.manual_seed(3)
    block = CrossNetV2(CrossNetV2.Config(num_layers=1, rank=rank), LAYOUT).double()
    basis = torch.eye(LAYOUT.width, dtype=torch.float64)
    layer = block.layers[0]
    matrix = np.array([layer(e).detach().numpy() for e in basis]).T  # bias zero at the start
    dim = LAYOUT.dim
    expected = [
        [np.sqrt((matrix[i * dim : (i + 1) * dim, j * dim : (j + 1) * dim] ** 2).sum()) for j in range(LAYOUT.num_fields)]
        for i in range(LAYOUT.num_fields)
    ]
    shown = block.explain(torch.zeros(2, LAYOUT.num_fields, dim, dtype=torch.float64))["strength/0"]
    np.testing.assert_allclose(shown[1].numpy(), expected, rtol=0, atol=1e-12)
