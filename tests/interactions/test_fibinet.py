from __future__ import annotations

from itertools import combinations
from typing import Literal

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.fibinet import Bilinear, FiBiNET, SENet
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, two_fields
from tests.reference import fibinet as reference

Kind = Literal["field_all", "field_each", "field_interaction"]
LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)
PAIRS = ("user*item", "user*hour", "user*city", "item*hour", "item*city", "hour*city")
kinds = pytest.mark.parametrize("kind", ["field_all", "field_each", "field_interaction"])

CONTRACT: dict[str, Interaction.Config] = {
    "senet": SENet.Config(reduction_ratio=2, activation="sigmoid"),
    "bilinear_all": Bilinear.Config(kind="field_all"),
    "bilinear_each": Bilinear.Config(kind="field_each"),
    "bilinear_interaction": Bilinear.Config(),
    "fibinet": FiBiNET.Config(senet=SENet.Config(activation="silu")),
    "fibinet_shared": FiBiNET.Config(senet=SENet.Config(activation="silu"), share_bilinear=True),
}
NEEDS: dict[str, Need] = {
    "bilinear_all": two_fields,
    "bilinear_each": two_fields,
    "bilinear_interaction": two_fields,
    "fibinet": two_fields,
    "fibinet_shared": two_fields,
}


def fields(count: int, dim: int = 10) -> FieldLayout:
    return FieldLayout(tuple(f"f{i}" for i in range(count)), dim)


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def matrices(block: Bilinear, kind: Kind) -> dict[tuple[int, int], reference.Array]:
    weight = block.weight.detach().numpy()
    pairs = list(combinations(range(4), 2))
    index = {"field_all": [0] * 6, "field_each": [i for i, _ in pairs], "field_interaction": range(6)}[kind]
    return {pair: weight[k] for pair, k in zip(pairs, index, strict=True)}


def test_senet_hand_case() -> None:
    """Means 2 and 1; hidden act(2·1 + 1·(−1)) = 1; weights act((3, −2)·1) = (3, 0)."""
    block = SENet(SENet.Config(reduction_ratio=2), FieldLayout(("a", "b"), 2))
    block.load_state_dict(
        {"excitation.0.weight": torch.tensor([[1.0, -1.0]]), "excitation.2.weight": torch.tensor([[3.0], [-2.0]])}
    )
    x_BFD = torch.tensor([[[1.0, 3.0], [0.0, 2.0]]])
    assert block.explain(x_BFD)["senet"].tolist() == [[3.0, 0.0]]
    assert block(x_BFD).tolist() == [[[3.0, 9.0], [0.0, 0.0]]]


def test_bilinear_hand_case() -> None:
    """W x_1 = ((0, 1), (2, 0)) (1, 3) = (3, 2), times x_2 = (5, −1)."""
    block = Bilinear(Bilinear.Config(kind="field_all"), FieldLayout(("a", "b"), 2))
    block.load_state_dict({"weight": torch.tensor([[[0.0, 1.0], [2.0, 0.0]]])})
    assert block(torch.tensor([[[1.0, 3.0], [5.0, -1.0]]])).tolist() == [[[15.0, -2.0]]]


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "none"])
def test_senet_equals_the_formula(activation: Literal["relu", "sigmoid", "none"]) -> None:
    torch.manual_seed(1)
    block = SENet(SENet.Config(reduction_ratio=2, activation=activation), LAYOUT).double()
    w1, w2 = (m.weight.detach().numpy() for m in block.excitation if isinstance(m, nn.Linear))
    act = {"relu": lambda v: max(v, 0.0), "sigmoid": lambda v: 1 / (1 + np.exp(-v)), "none": lambda v: v}[activation]
    x_BFD = torch.randn(5, 4, 3, dtype=torch.float64)
    expected = np.stack([reference.senet(x.numpy(), w1, w2, act) for x in x_BFD])
    assert block.out == LAYOUT
    np.testing.assert_allclose(block.explain(x_BFD)["senet"].detach().numpy(), expected, rtol=0, atol=1e-10)
    np.testing.assert_allclose(block(x_BFD).detach().numpy(), x_BFD.numpy() * expected[..., None], rtol=0, atol=1e-10)


@kinds
def test_bilinear_equals_the_formula(kind: Kind) -> None:
    torch.manual_seed(2)
    block = Bilinear(Bilinear.Config(kind=kind), LAYOUT).double()
    found = matrices(block, kind)
    x_BFD = torch.randn(5, 4, 3, dtype=torch.float64)
    expected = np.stack([reference.bilinear(x.numpy(), lambda i, j: found[i, j]) for x in x_BFD])
    assert block.out == FieldLayout(PAIRS, 3)
    np.testing.assert_allclose(block(x_BFD).detach().numpy(), expected, rtol=0, atol=1e-10)


@kinds
def test_the_matrix_belongs_to_the_left_field(kind: Kind) -> None:
    """W on the right field, or transposed, is another product."""
    torch.manual_seed(3)
    block = Bilinear(Bilinear.Config(kind=kind), LAYOUT).double()
    found = matrices(block, kind)
    x_BFD = torch.randn(1, 4, 3, dtype=torch.float64)
    shown = block(x_BFD)[0].detach().numpy()
    x = x_BFD[0].numpy()
    transposed = reference.bilinear(x, lambda i, j: found[i, j].T)
    on_the_right = np.stack([x[i] * (found[i, j] @ x[j]) for i, j in combinations(range(4), 2)])
    assert np.abs(shown - transposed).max() > 1e-2
    assert np.abs(shown - on_the_right).max() > 1e-2


@pytest.mark.parametrize("shared", [False, True])
@kinds
def test_fibinet_is_both_products(kind: Kind, shared: bool) -> None:
    torch.manual_seed(4)
    block = FiBiNET(FiBiNET.Config(bilinear=Bilinear.Config(kind=kind), share_bilinear=shared), LAYOUT).double()
    x_BFD = torch.randn(5, 4, 3, dtype=torch.float64)
    y_BPD = block(x_BFD)
    second = block.bilinear if block.bilinear_senet is None else block.bilinear_senet
    assert (block.bilinear_senet is None) == shared
    assert block.out == FieldLayout((*PAIRS, *(f"senet:{pair}" for pair in PAIRS)), 3)
    torch.testing.assert_close(y_BPD[:, :6], block.bilinear(x_BFD), rtol=0, atol=0)
    weighted = x_BFD * block.explain(x_BFD)["senet"].unsqueeze(-1)
    torch.testing.assert_close(y_BPD[:, 6:], second(weighted), rtol=0, atol=1e-12)


def test_sizes() -> None:
    for kind, expected in {"field_all": 9, "field_each": 3 * 9, "field_interaction": 6 * 9}.items():
        assert size(Bilinear(Bilinear.Config(kind=kind), LAYOUT)) == expected  # type: ignore[arg-type]
    assert size(SENet(SENet.Config(reduction_ratio=3), fields(10))) == 2 * 10 * 3
    assert size(SENet(SENet.Config(reduction_ratio=0.3), fields(3))) == 2 * 3 * 10
    assert size(SENet(SENet.Config(reduction_ratio=100), fields(3))) == 2 * 3
    config = FiBiNET.Config(
        senet=SENet.Config(reduction_ratio=2), bilinear=Bilinear.Config(kind="field_all"), share_bilinear=True
    )
    assert size(FiBiNET(config, fields(10))) == 200


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"SENet\.reduction_ratio is 0"):
        SENet.Config(reduction_ratio=0)
    with pytest.raises(ConfigError, match="Bilinear takes pairs of fields, but its input has the single field 'user'"):
        Bilinear(Bilinear.Config(), FieldLayout(("user",), 3))
