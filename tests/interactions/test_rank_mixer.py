from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.rank_mixer import RankMixer, RankMixerLayer
from ctrlib.schema import FieldLayout
from tests.reference import rank_mixer as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 5)
SMALL: dict[str, Any] = {"num_tokens": 4, "token_dim": 8, "ffn_factor": 2}

CONTRACT: dict[str, Interaction.Config] = {
    "rank_mixer": RankMixer.Config(num_tokens=5, token_dim=10, ffn_factor=2, dropout=0.1),
}


def rank_mixer(layout: FieldLayout = LAYOUT, **options: Any) -> RankMixer:
    torch.manual_seed(1)
    block = RankMixer(RankMixer.Config(**(SMALL | options)), layout).double()
    for p in block.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return block


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def affine(module: nn.Module) -> reference.Affine:
    return cast(Tensor, module.weight).detach().numpy(), cast(Tensor, module.bias).detach().numpy()


def by_the_formula(block: RankMixer, x_BFD: Tensor) -> list[reference.Array]:
    layers = []
    for module in block.layers:
        it = cast(RankMixerLayer, module)
        layers.append(reference.Layer(affine(it.ffn[0]), affine(it.ffn[2]), affine(it.norm_mix), affine(it.norm_ffn)))
    return [reference.rank_mixer(x, affine(block.tokenize), layers) for x in x_BFD.numpy()]


@pytest.mark.parametrize("num_tokens", [1, 2, 4, 8])  # 15 numbers, into pieces of 15, 8, 4 and 2
def test_equals_the_formula(num_tokens: int) -> None:
    block, x_BFD = rank_mixer(num_tokens=num_tokens), randn(4, 3, 5)
    assert block.out == FieldLayout(("rank_mixer",), 8)
    np.testing.assert_allclose(block(x_BFD)[:, 0].detach().numpy(), by_the_formula(block, x_BFD), rtol=0, atol=1e-10)


def test_mixing_hand_case() -> None:
    """Two tokens (1, 2, 3, 4) and (5, 6, 7, 8) become (1, 2, 5, 6) and (3, 4, 7, 8)."""
    x = np.array([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])
    assert reference.mix(x).tolist() == [[1, 2, 5, 6], [3, 4, 7, 8]]
    it = RankMixerLayer(RankMixer.Config(num_tokens=2, token_dim=4)).double()
    seen: list[Tensor] = []
    it.norm_mix.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    it(torch.tensor(x)[None])
    assert seen[0][0].tolist() == [[2, 4, 8, 10], [8, 10, 14, 16]]  # with the residual


@pytest.mark.parametrize("mutation", ["residual", "shared_ffn"])
def test_a_wrong_layer_would_be_seen(mutation: str) -> None:
    block, x_BFD = rank_mixer(num_layers=1), randn(4, 3, 5)
    expected = by_the_formula(block, x_BFD)
    it = cast(RankMixerLayer, block.layers[0])
    if mutation == "residual":
        sums: list[Tensor] = []
        it.norm_mix.register_forward_hook(lambda _, inputs, output: sums.append(output))
        it.norm_ffn.register_forward_pre_hook(lambda _, inputs: (inputs[0] - sums[-1],))
    else:
        for module in (it.ffn[0], it.ffn[2]):
            weight = cast(nn.Parameter, module.weight)
            weight.data.copy_(weight.data[:1].expand_as(weight))
    assert np.abs(block(x_BFD)[:, 0].detach().numpy() - expected).max() > 1e-2


def test_sizes() -> None:
    def size(block: RankMixer) -> int:
        return sum(p.numel() for p in block.parameters())

    t, d, k = 4, 8, 2
    per_layer = 2 * k * t * d * d + (k + 1) * t * d + 4 * d
    assert size(rank_mixer(num_layers=3)) == t * 4 * d + t * d + 3 * per_layer  # 15 numbers in 4 pieces of 4
    with torch.device("meta"):
        paper = RankMixer(RankMixer.Config(), FieldLayout(("all",), 16 * 768))
    dense = sum(p.numel() for layer in paper.layers for p in layer.parameters())
    assert dense == pytest.approx(2 * 4 * 2 * 16 * 768**2, rel=0.002)  # the paper's 2kLTD²


def test_dropout_acts_in_training_only() -> None:
    block, x_BFD = rank_mixer(dropout=0.5), randn(4, 3, 5)
    assert not torch.equal(block(x_BFD), block(x_BFD))
    assert torch.equal(block.eval()(x_BFD), rank_mixer()(x_BFD))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: 0}, f"RankMixer.{name} is 0") for name in ("num_tokens", "token_dim", "num_layers", "ffn_factor")),
        ({"num_tokens": 3}, "num_tokens is 3, which does not divide token_dim 8"),
        ({"dropout": 1.0}, "RankMixer.dropout is 1"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        rank_mixer(**options)
