from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.aoanet import GeneralizedInteraction, GeneralizedLayer
from ctrlib.interactions.base import Interaction
from ctrlib.schema import FieldLayout
from tests.reference.aoanet import layer as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)

CONTRACT: dict[str, Interaction.Config] = {
    "generalized_interaction": GeneralizedInteraction.Config(num_layers=2, num_subspaces=3),
}


def block(num_layers: int = 3, num_subspaces: int = 2, layout: FieldLayout = LAYOUT) -> GeneralizedInteraction:
    torch.manual_seed(1)
    config = GeneralizedInteraction.Config(num_layers=num_layers, num_subspaces=num_subspaces)
    return GeneralizedInteraction(config, layout).double()


def awake(gin: GeneralizedInteraction) -> GeneralizedInteraction:
    for p in gin.parameters():
        nn.init.normal_(p)
    return gin


@pytest.mark.parametrize("num_layers", [1, 3])
def test_equals_the_formula(num_layers: int) -> None:
    gin = awake(block(num_layers))
    x_BFD = torch.randn(5, 4, 3, dtype=torch.float64)
    shown = gin.explain(x_BFD)
    for row in range(5):
        x = x_BFD[row].numpy()
        b = x
        for i, layer in enumerate(gin.layers):
            assert isinstance(layer, GeneralizedLayer)
            parts = (layer.operation_SDD, layer.weight_SMF, layer.projection_SD)
            assert torch.equal(shown[f"weights/{i}"][row], layer.weight_SMF)
            b = reference(x, b, *(p.detach().numpy() for p in parts))
        np.testing.assert_allclose(gin(x_BFD)[row].detach().numpy(), b, rtol=1e-12, atol=1e-10)
    assert len(shown) == num_layers
    assert gin.out == FieldLayout(("aoa_0", "aoa_1"), 3)


def test_starts_with_powers_of_the_sum_of_the_fields() -> None:
    """Identity and ones: each layer multiplies by Σ_n x_n; the layers after the first also add the equal subspaces."""
    x_BFD = torch.randn(5, 4, 3, dtype=torch.float64)
    total = x_BFD.sum(dim=1, keepdim=True)
    torch.testing.assert_close(block(1)(x_BFD), total.square().expand(-1, 2, -1))
    torch.testing.assert_close(block(3)(x_BFD), (total**4 * 2 * 2).expand(-1, 2, -1))


def test_hand_case() -> None:
    """x = (1, 2), (3, 4); α picks x_0 b_1ᵀ = (1, 2)ᵀ (3, 4); W picks its upper triangle 3, 4, 8; h = (10, 1)."""
    gin = block(1, 1, FieldLayout(("a", "b"), 2))
    operation, weight = torch.tensor([[[1.0, 1.0], [0.0, 1.0]]]), torch.tensor([[[0.0, 0.0], [1.0, 0.0]]])
    state = {"operation_SDD": operation, "weight_SMF": weight, "projection_SD": torch.tensor([[10.0, 1.0]])}
    gin.load_state_dict({f"layers.0.{name}": value for name, value in state.items()})
    assert gin(torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.float64)).tolist() == [[[34.0, 8.0]]]


def test_transposed_operation_is_noticed() -> None:
    """The mutation that the formula test must catch: which axis of W belongs to the fields."""
    gin, mutant, x_BFD = awake(block(1)), block(1), torch.randn(5, 4, 3, dtype=torch.float64)
    state = gin.state_dict()
    mutant.load_state_dict({**state, "layers.0.operation_SDD": state["layers.0.operation_SDD"].transpose(1, 2)})
    assert (mutant(x_BFD) - gin(x_BFD)).abs().max() > 1e-2


def test_sizes() -> None:
    layout = FieldLayout(tuple(f"f{i}" for i in range(39)), 10)
    count = sum(p.numel() for p in block(3, 4, layout).parameters())
    assert count == 4 * (110 + 39 * 39) + 2 * 4 * (110 + 39 * 4)


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"GeneralizedInteraction\.num_layers is 0"):
        GeneralizedInteraction.Config(num_layers=0)
    with pytest.raises(ConfigError, match=r"GeneralizedInteraction\.num_subspaces is 0"):
        GeneralizedInteraction.Config(num_subspaces=0)
