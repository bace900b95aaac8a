from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.interhat import Aggregation, InterHAt
from ctrlib.schema import FieldLayout
from tests.reference import interhat as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 6)

CONTRACT: dict[str, Interaction.Config] = {
    "interhat": InterHAt.Config(num_heads=2, head_dim=4, hidden_dim=5, attention_dropout=0.2),
    "interhat_official": InterHAt.Config(num_heads=2, head_dim=4, order=2, projection_activation="relu"),
    "interhat_fuxictr": InterHAt.Config(num_heads=1, head_dim=6, order=2, output="if_needed"),
}


def interhat(layout: FieldLayout = LAYOUT, **options: Any) -> InterHAt:
    torch.manual_seed(1)
    block = InterHAt(InterHAt.Config(**{"num_heads": 2, "head_dim": 3, "hidden_dim": 5, **options}), layout).double().eval()
    for p in block.parameters():
        nn.init.normal_(p)
    return block


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def affine(module: nn.Module) -> reference.Affine:
    linear = module[0] if isinstance(module, nn.Sequential) else module
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach().numpy(), None if linear.bias is None else linear.bias.detach().numpy()


def norm(module: nn.LayerNorm) -> tuple[reference.Array, reference.Array]:
    return module.weight.detach().numpy(), module.bias.detach().numpy()


def aggregation(module: nn.Module) -> tuple[reference.Array, reference.Array, reference.Array]:
    assert isinstance(module, Aggregation)
    parts = (module.hidden.weight, module.hidden.bias, module.context.weight[0])
    matrix, bias, context = (p.detach().numpy() for p in parts)
    return matrix, bias, context


def weights(block: InterHAt) -> reference.Weights:
    return reference.Weights(
        query=affine(block.query),
        key=affine(block.key),
        value=affine(block.value),
        output=None if block.output is None else affine(block.output),
        norm_attention=norm(block.norm_attention),
        feed_1=affine(block.ffn[0]),
        feed_2=affine(block.ffn[2]),
        norm_feed=norm(block.norm_ffn),
        fields=[aggregation(module) for module in block.fields],
        orders=aggregation(block.orders),
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"projection_activation": "relu", "head_dim": 4},
        {"output": "if_needed"},
        {"output": "if_needed", "head_dim": 2},
        {"order": 1},
    ],
)
def test_equals_the_formula(options: dict[str, Any]) -> None:
    block, x_BFD = interhat(**options), randn(4, 4, 6)
    y_B1D, shown = block(x_BFD), block.explain(x_BFD)
    order = options.get("order", 3)
    keys = [f"fields/{p}" for p in range(1, order + 1)] + ["orders"]
    assert list(shown) == ["attention", *keys]
    assert block.out == FieldLayout(("interhat",), 6)
    for row in range(4):
        y, attention, expected = reference.interhat(
            x_BFD[row].numpy(), weights(block), 2, options.get("projection_activation") == "relu"
        )
        np.testing.assert_allclose(y_B1D[row, 0].detach().numpy(), y, rtol=0, atol=1e-10)
        np.testing.assert_allclose(shown["attention"][row].detach().numpy(), attention, rtol=0, atol=1e-10)
        for key, value in zip(keys, expected, strict=True):
            np.testing.assert_allclose(shown[key][row].detach().numpy(), value, rtol=0, atol=1e-10)


def test_aggregation_by_hand() -> None:
    """Rows 1 and 2 with W = 1, b = 0, c = ln 3: weights 3 : 9, so 1·¼ + 2·¾."""
    block = Aggregation(1, 1)
    block.load_state_dict(
        {"hidden.weight": torch.ones(1, 1), "hidden.bias": torch.zeros(1), "context.weight": torch.full((1, 1), np.log(3))}
    )
    y_B1D, weights_BN = block(torch.tensor([[[1.0], [2.0]]]))
    assert y_B1D.item() == pytest.approx(1.75)
    assert weights_BN[0].tolist() == pytest.approx([0.25, 0.75])


def test_the_residual_of_the_orders_matters() -> None:
    """The mutation that the formula test must catch: x^{p+1} = u_p ⊙ x¹ without + x^p."""
    block, x_BFD = interhat(order=2), randn(4, 4, 6)
    first_BFD = block.transform(x_BFD)
    u_B1D, _ = block.fields[0](first_BFD)
    second_B1D, _ = block.fields[1](u_B1D * first_BFD)
    mutant, _ = block.orders(torch.cat([u_B1D, second_B1D], dim=1))
    assert (mutant - block(x_BFD)).abs().max() > 1e-3  # the formula test allows 1e-10


def test_wrong_scale_and_missing_residual_are_noticed() -> None:
    """More mutations: scores that are not divided by √d, and the transformer layer without + x."""
    block, x_BFD = interhat(), randn(4, 4, 6)
    y_B1D = block(x_BFD)
    block.scale = 1.0
    assert (block(x_BFD) - y_B1D).abs().max() > 1e-2
    block = interhat()
    value_BHFd = block.attention(x_BFD) @ block.heads(block.value(x_BFD))
    assert block.output is not None
    t_BFD = block.norm_attention(block.output(value_BHFd.transpose(1, 2).flatten(2)).relu())
    mutant_BFD = block.norm_ffn(block.ffn(t_BFD) + t_BFD)
    assert (mutant_BFD - block.transform(x_BFD)).abs().max() > 1e-2


def test_order_of_fields_does_not_matter() -> None:
    block, x_BFD = interhat(), randn(4, 4, 6)
    torch.testing.assert_close(block(x_BFD[:, [2, 0, 3, 1]]), block(x_BFD), rtol=0, atol=1e-10)


def test_dropout_acts_in_training_and_on_attention_only() -> None:
    block, x_BFD = interhat(attention_dropout=0.5).train(), randn(4, 4, 6)
    assert not torch.equal(block(x_BFD), block(x_BFD))
    torch.testing.assert_close(block.explain(x_BFD)["attention"].sum(-1), torch.ones(4, 2, 4, dtype=torch.float64))
    assert torch.equal(block.eval()(x_BFD), interhat()(x_BFD))


@pytest.mark.parametrize("order", [1, 4])
def test_sizes(order: int) -> None:
    block = interhat(FieldLayout(("a", "b"), 10), num_heads=4, head_dim=8, hidden_dim=20, order=order)
    assert sum(p.numel() for p in block.parameters()) == 4 * 10 * 32 + 8 * 100 + 9 * 10 + (order + 1) * (20 * 10 + 2 * 20)


@pytest.mark.parametrize("name", ["num_heads", "head_dim", "order", "hidden_dim"])
def test_config_errors(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"InterHAt\.{name} is 0"):
        InterHAt.Config(**{name: 0})  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"InterHAt\.attention_dropout is 1"):
        InterHAt.Config(attention_dropout=1.0)
