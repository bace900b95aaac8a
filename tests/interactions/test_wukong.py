from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.wukong import Wukong, WukongLayer
from ctrlib.schema import FieldLayout
from tests.reference import wukong as reference

LAYOUT = FieldLayout(("user", "item", "hour"), 4)
SMALL: dict[str, Any] = {"num_fmb": 2, "num_lcb": 3, "fm_rank": 2, "hidden_units": (7, 6)}

CONTRACT: dict[str, Interaction.Config] = {
    "wukong": Wukong.Config(num_fmb=2, num_lcb=3, fm_rank=3, hidden_units=(16,), dropout=0.1),
    "wukong_all_pairs": Wukong.Config(num_fmb=2, num_lcb=2, fm_rank=None, hidden_units=(16, 8)),
}


def wukong(layout: FieldLayout = LAYOUT, **options: Any) -> Wukong:
    torch.manual_seed(1)
    block = Wukong(Wukong.Config(**(SMALL | options)), layout).double()
    for p in block.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return block


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def layer(block: Wukong, i: int = 0) -> WukongLayer:
    return cast(WukongLayer, block.layers[i])


def affine(module: nn.Module) -> reference.Affine:
    return cast(Tensor, module.weight).detach().numpy(), cast(Tensor, module.bias).detach().numpy()


def weights(it: WukongLayer) -> reference.Weights:
    *hidden, last = (affine(m) for m in it.mlp.modules() if isinstance(m, nn.Linear))
    return reference.Weights(
        y=None if it.projection is None else it.projection.weight.detach().numpy().T,
        norm_fm=affine(it.norm_fm),
        hidden=hidden,
        last=last,
        compress=it.compress.weight.detach().numpy(),
        residual=None if it.residual is None else it.residual.weight.detach().numpy(),
        norm=affine(it.norm),
    )


def by_the_formula(block: Wukong, x_BFD: Tensor) -> reference.Array:
    rows = []
    for x in x_BFD.numpy():
        for i in range(len(block.layers)):
            x = reference.layer(x, weights(layer(block, i)))
        rows.append(x)
    return np.stack(rows)


@pytest.mark.parametrize("fm_rank", [2, None])
@pytest.mark.parametrize("num_lcb", [1, 3])
def test_equals_the_formula(fm_rank: int | None, num_lcb: int) -> None:
    block, x_BFD = wukong(num_layers=3, fm_rank=fm_rank, num_lcb=num_lcb), randn(4, 3, 4)
    names = ("fmb_0", "fmb_1", *(f"lcb_{i}" for i in range(num_lcb)))
    assert block.out == FieldLayout(names, 4)
    assert (layer(block).residual is None) == (num_lcb == 1)  # 2 + 1 embeddings are as many as there are fields
    assert layer(block, 1).residual is None
    np.testing.assert_allclose(block(x_BFD).detach().numpy(), by_the_formula(block, x_BFD), rtol=0, atol=1e-10)
    shown = block.explain(x_BFD)
    assert list(shown) == ["fm/0", "fm/1", "fm/2"]
    expected = [reference.fm(x, weights(layer(block)).y) for x in x_BFD.numpy()]
    np.testing.assert_allclose(shown["fm/0"].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_fm_hand_case() -> None:
    """x = (1, 2), (3, −1), Y = (1, 2)ᵀ: X Xᵀ = [[5, 1], [1, 10]], so X Xᵀ Y = (7, 21)ᵀ."""
    block = wukong(FieldLayout(("a", "b"), 2), fm_rank=1)
    assert layer(block).projection is not None
    cast(nn.Linear, layer(block).projection).weight.data = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
    x_BFD = torch.tensor([[[1.0, 2.0], [3.0, -1.0]]], dtype=torch.float64)
    torch.testing.assert_close(block.explain(x_BFD)["fm/0"], torch.tensor([[[7.0], [21.0]]], dtype=torch.float64))


def test_a_missing_residual_would_be_seen() -> None:
    block, x_BFD = wukong(), randn(4, 3, 4)
    expected = by_the_formula(block, x_BFD)
    residual = layer(block).residual
    assert residual is not None
    nn.init.zeros_(residual.weight)
    assert np.abs(block(x_BFD).detach().numpy() - expected).max() > 1e-2


def test_sizes() -> None:
    def size(block: Wukong) -> int:
        return sum(p.numel() for p in block.parameters())

    def layer_size(n: int, k: int, d: int) -> int:
        mlp = (n * k * 7 + 7) + (7 * 6 + 6) + (6 * 2 * d + 2 * d)
        return n * k + 2 * n * k + mlp + n * 3 + (0 if n == 5 else n * 5) + 2 * d

    assert size(wukong(num_layers=2)) == layer_size(3, 2, 4) + layer_size(5, 2, 4)
    assert size(wukong(num_layers=1, fm_rank=None)) == layer_size(3, 3, 4) - 9


def test_dropout_acts_in_training_only() -> None:
    block, x_BFD = wukong(dropout=0.5), randn(4, 3, 4)
    assert not torch.equal(block(x_BFD), block(x_BFD))
    assert torch.equal(block.eval()(x_BFD), wukong()(x_BFD))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(({name: 0}, f"Wukong.{name} is 0") for name in ("num_layers", "num_fmb", "num_lcb", "fm_rank")),
        ({"hidden_units": (4, 0)}, "Wukong.hidden_units is 0"),
        ({"hidden_units": ()}, "Wukong.hidden_units is empty"),
        ({"dropout": 1.0}, "Wukong.dropout is 1"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Wukong.Config(**options)
