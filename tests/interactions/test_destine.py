from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.destine import Destine, DisentangledLayer
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, two_fields
from tests.reference import destine as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)

CONTRACT: dict[str, Interaction.Config] = {
    "destine": Destine.Config(head_dim=4, attention_dropout=0.2),
    "destine_each_layer": Destine.Config(head_dim=4, residual="each_layer", scale=True, final_relu=False),
    "destine_relu": Destine.Config(num_layers=1, head_dim=4, projection_activation="relu", residual="none", final_relu=False),
}
NEEDS: dict[str, Need] = {"destine": two_fields, "destine_each_layer": two_fields, "destine_relu": two_fields}


def destine(layout: FieldLayout = LAYOUT, **options: Any) -> Destine:
    torch.manual_seed(1)
    block = Destine(Destine.Config(**{"head_dim": 4, **options}), layout).double()
    for p in block.parameters():
        nn.init.normal_(p)
    return block


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def affine(linear: nn.Linear) -> reference.Affine:
    bias = torch.randn(linear.out_features).double() if linear.bias is None else linear.bias  # any: it has no effect
    return linear.weight.detach().numpy(), bias.detach().numpy()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"residual": "each_layer", "final_relu": False},
        {"residual": "none", "scale": True},
        {"projection_activation": "relu", "num_heads": 1, "num_layers": 1},
    ],
    ids=["paper", "each_layer", "scaled", "relu"],
)
def test_equals_the_formula(options: dict[str, Any]) -> None:
    block, x_BFD = destine(**options), randn(5, 4, 3)
    y_BFA, shown = block(x_BFD), block.explain(x_BFD)
    flags = {"scale": options.get("scale", False), "relu": options.get("projection_activation") == "relu"}
    for row in range(5):
        x = x_BFD[row].numpy()
        for i, layer in enumerate(block.layers):
            assert isinstance(layer, DisentangledLayer)
            query, key, value, unary = (affine(linear) for linear in (layer.query, layer.key, layer.value, layer.unary))
            residual = None if layer.residual is None else affine(layer.residual)
            x, pairs, singles = reference.layer(x, query, key, value, unary, residual, **flags)
            np.testing.assert_allclose(shown[f"pairs/{i}"][row].detach().numpy(), pairs, rtol=0, atol=1e-10)
            np.testing.assert_allclose(shown[f"unary/{i}"][row].detach().numpy(), singles, rtol=0, atol=1e-10)
        if block.residual is not None:
            x = x + np.array([reference.affine(field, affine(block.residual)) for field in x_BFD[row].numpy()])
        expected = np.maximum(x, 0) if options.get("final_relu", True) else x
        np.testing.assert_allclose(y_BFA[row].detach().numpy(), expected, rtol=0, atol=1e-10)
    assert block.out == FieldLayout(LAYOUT.names, 4 * options.get("num_heads", 2))


def test_hand_case() -> None:
    """Fields 0 and ln 2 with q = k = v = x, u = x: whitened q is ∓ln 2 / 2, so pairs are 2^∓(ln 2)/2 odds; unary is 1 : 2."""
    block = destine(FieldLayout(("a", "b"), 1), num_layers=1, num_heads=1, head_dim=1, residual="none", final_relu=False)
    state = {
        name: torch.ones_like(p) if name.endswith("weight") else torch.zeros_like(p) for name, p in block.state_dict().items()
    }
    block.load_state_dict(state)
    log2 = float(np.log(2))
    x_BFD = torch.tensor([[[0.0], [log2]]], dtype=torch.float64)
    odds = np.exp(log2 * log2 / 2)
    expected = [log2 * (1 / (1 + odds) + 2 / 3), log2 * (odds / (1 + odds) + 2 / 3)]
    assert block(x_BFD).flatten().tolist() == pytest.approx(expected)


def test_without_whitening_the_result_differs() -> None:
    """The mutation that the formula test must catch: plain attention in the pairwise term."""
    block, x_BFD = destine(num_layers=1), randn(5, 4, 3)
    layer = block.layers[0]
    assert isinstance(layer, DisentangledLayer)
    plain = (layer.heads(layer.query, x_BFD) @ layer.heads(layer.key, x_BFD).transpose(-2, -1)).softmax(-1)
    assert (plain - layer.attention(x_BFD)[0]).abs().max() > 1e-2


def test_missing_residual_and_wrong_scale_are_noticed() -> None:
    """More mutations that the formula test must catch."""
    block, x_BFD = destine(final_relu=False), randn(5, 4, 3)
    y_BFA = block(x_BFD)
    block.residual = None
    assert (block(x_BFD) - y_BFA).abs().max() > 1e-2
    assert (destine(final_relu=False, scale=True)(x_BFD) - y_BFA).abs().max() > 1e-2


def test_terms_are_distributions_and_unary_is_of_the_field_read() -> None:
    block, x_BFD = destine(), randn(5, 4, 3)
    shown = block.explain(x_BFD)
    assert sorted(shown) == ["pairs/0", "pairs/1", "unary/0", "unary/1"]
    for value in shown.values():
        torch.testing.assert_close(value.sum(-1), torch.ones(value.shape[:-1], dtype=torch.float64))
    order = [2, 0, 3, 1]
    permuted = block.explain(x_BFD[:, order])
    torch.testing.assert_close(permuted["unary/0"], shown["unary/0"][:, :, order])
    torch.testing.assert_close(block(x_BFD[:, order]), block(x_BFD)[:, order])


def test_dropout_acts_in_training_and_on_attention_only() -> None:
    block, x_BFD = destine(attention_dropout=0.5, num_layers=1), randn(5, 4, 3)
    assert not torch.equal(block(x_BFD), block(x_BFD))
    assert torch.equal(block.explain(x_BFD)["pairs/0"], destine(num_layers=1).explain(x_BFD)["pairs/0"])
    assert torch.equal(block.eval()(x_BFD), destine(num_layers=1)(x_BFD))


def test_sizes() -> None:
    layout = FieldLayout(tuple(f"f{i}" for i in range(10)), 16)
    first, later = 3 * 16 * 64 + 64 + 16 * 2, 3 * 64 * 64 + 64 + 64 * 2
    residuals = {"none": 0, "last_layer": 16 * 64 + 64, "each_layer": 16 * 64 + 64 + 64 * 64 + 64}
    for residual, extra in residuals.items():
        block = destine(layout, head_dim=32, residual=residual)
        assert sum(p.numel() for p in block.parameters()) == first + later + extra
    relu = destine(layout, head_dim=32, residual="none", projection_activation="relu")
    assert sum(p.numel() for p in relu.parameters()) == first + later + 2 * 2 * 64


@pytest.mark.parametrize("name", ["num_layers", "num_heads", "head_dim"])
def test_config_errors(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"Destine\.{name} is 0"):
        Destine.Config(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"Destine\.attention_dropout is 1"):
        Destine.Config(attention_dropout=1.0)
    with pytest.raises(ConfigError, match="single field 'user'"):
        Destine(Destine.Config(), FieldLayout(("user",), 3))
