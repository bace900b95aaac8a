from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.ft_transformer import FTLayer, FTTransformer
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, even_width
from tests.reference import ft_transformer as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 6)
PLAIN: dict[str, Any] = {"attention_dropout": 0.0, "ffn_dropout": 0.0}

CONTRACT: dict[str, Interaction.Config] = {
    "ft_transformer": FTTransformer.Config(num_layers=2, num_heads=2, residual_dropout=0.1),
}
NEEDS: dict[str, Need] = {"ft_transformer": even_width}
DERIVED = {"ft_transformer": {"fields"}}  # the mean of attention maps


def block(layout: FieldLayout = LAYOUT, **options: Any) -> FTTransformer:
    torch.manual_seed(1)
    made = FTTransformer(FTTransformer.Config(**({"num_layers": 2, "num_heads": 2} | options)), layout).double().eval()
    for p in made.parameters():
        p.data += 0.2 * torch.randn_like(p)  # norms and biases that are seen
    return made


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer(made: FTTransformer, i: int) -> FTLayer:
    return cast(FTLayer, made.layers[i])


def affine(module: nn.Module) -> reference.Affine:
    return cast(Tensor, module.weight).detach().numpy(), cast(Tensor, module.bias).detach().numpy()


def weights(it: FTLayer) -> reference.Layer:
    names = ("query", "key", "value", "output", "ffn_in", "ffn_out", "norm_ffn")
    norm = None if isinstance(it.norm_attention, nn.Identity) else affine(it.norm_attention)
    return reference.Layer(**{name: affine(getattr(it, name)) for name in names}, norm_attention=norm)


def by_the_formula(made: FTTransformer, x_BFD: Tensor) -> list[tuple[reference.Array, list[reference.Array]]]:
    cls, bias = made.cls.detach().numpy(), made.bias.detach().numpy()
    layers = [weights(cast(FTLayer, it)) for it in made.layers]
    return [reference.ft_transformer(x, cls, bias, layers, affine(made.norm), 2) for x in x_BFD.numpy()]


def test_equals_the_formula() -> None:
    made, x_BFD = block(num_layers=3), randn(3, 3, 6)
    expected = by_the_formula(made, x_BFD)
    assert made.out == FieldLayout(("cls",), 6)
    np.testing.assert_allclose(made(x_BFD)[:, 0].detach().numpy(), [y for y, _ in expected], rtol=0, atol=1e-10)
    shown = made.explain(x_BFD)
    for i in range(3):
        full = np.stack([maps[i] for _, maps in expected])
        found = shown[f"attention/{i}"].detach().numpy()
        np.testing.assert_allclose(found, full if i < 2 else full[:, :, :1], rtol=0, atol=1e-10)
    fields = [np.mean([m[:, 0, 1:].mean(axis=0) for m in maps], axis=0) for _, maps in expected]
    np.testing.assert_allclose(shown["fields"].detach().numpy(), fields, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mutation", ["scale", "first_norm", "residual"])
def test_a_wrong_layer_would_be_seen(mutation: str) -> None:
    made, x_BFD = block(), randn(3, 3, 6)
    expected = [y for y, _ in by_the_formula(made, x_BFD)]
    if mutation == "scale":
        layer(made, 0).scale = 1.0
    elif mutation == "residual":  # of the FFN, whose input is taken off again
        inputs: list[Tensor] = []
        layer(made, 0).norm_ffn.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
        layer(made, 0).register_forward_hook(lambda _, given, output: output - inputs[-1])
    else:
        layer(made, 0).norm_attention = nn.LayerNorm(6).double()
    assert np.abs(made(x_BFD)[:, 0].detach().numpy() - expected).max() > 1e-3


def test_attention_is_that_of_torch() -> None:
    it = layer(block(), 1)
    oracle = nn.MultiheadAttention(6, 2, batch_first=True).double()
    projections = (it.query, it.key, it.value)
    oracle.in_proj_weight.data = torch.cat([p.weight.data for p in projections])
    oracle.in_proj_bias.data = torch.cat([p.bias.data for p in projections])
    oracle.out_proj.load_state_dict(it.output.state_dict())
    x_BLD = randn(3, 4, 6)
    _, expected = oracle(x_BLD, x_BLD, x_BLD, average_attn_weights=False)
    torch.testing.assert_close(it.attention(x_BLD, 4), expected, rtol=0, atol=1e-12)


def test_biases_of_the_projections_start_at_zero_and_the_first_layer_has_one_norm() -> None:
    made = FTTransformer(FTTransformer.Config(num_heads=2), LAYOUT)
    for i in range(3):
        assert not any(getattr(layer(made, i), name).bias.any() for name in ("query", "key", "value", "output"))
        assert isinstance(layer(made, i).norm_attention, nn.Identity if i == 0 else nn.LayerNorm)


def test_sizes() -> None:
    def size(layout: FieldLayout, **options: Any) -> int:
        return sum(p.numel() for p in FTTransformer(FTTransformer.Config(**options), layout).parameters())

    # D = 192, h = 256: the paper's default with its 39 features of Criteo
    per_layer = 4 * (192**2 + 192) + 3 * 192 * 256 + 2 * 256 + 192
    fields = FieldLayout(tuple(f"f{i}" for i in range(39)), 192)
    assert size(fields) == 3 * per_layer + 6 * 2 * 192 + 40 * 192
    assert size(LAYOUT, num_layers=1, num_heads=3, ffn_dim=5) == 4 * 42 + 3 * 6 * 5 + 10 + 6 + 2 * 12 + 4 * 6


def test_dropout_acts_in_training_only() -> None:
    for name in ("attention_dropout", "ffn_dropout", "residual_dropout"):
        made, x_BFD = block(**(PLAIN | {name: 0.5})).train(), randn(3, 3, 6)
        assert not torch.equal(made(x_BFD), made(x_BFD))
        torch.testing.assert_close(made.explain(x_BFD)["attention/0"].sum(-1), torch.ones(3, 2, 4, dtype=torch.float64))
        assert torch.equal(made.eval()(x_BFD), block(**PLAIN).train()(x_BFD))


def test_gradients() -> None:
    made = block()
    made.norm.bias.data += 3.0  # away from the last ReLU's kink
    assert torch.autograd.gradcheck(made, (randn(2, 3, 6).requires_grad_(),), eps=1e-6, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "FTTransformer.num_layers is 0"),
        ({"num_heads": 0}, "FTTransformer.num_heads is 0"),
        ({"ffn_dim": 0}, "FTTransformer.ffn_dim is 0"),
        ({"ffn_dropout": 1.0}, "FTTransformer.ffn_dropout is 1"),
        ({"num_heads": 4}, "num_heads is 4, which does not divide the embedding dim 6"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        block(**options)
