from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.sam import SAM, SAMLayer
from ctrlib.schema import FieldLayout
from tests.reference import sam as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)
VARIANTS: list[dict[str, Any]] = [
    {"kind": "sam1"},
    {"kind": "sam2a"},
    {"kind": "sam2e"},
    {"kind": "sam3a"},
    {"kind": "sam3a", "num_layers": 2, "residual": True},
    {"kind": "sam3e"},
    {"kind": "sam3e", "num_layers": 2, "residual": True},
]

CONTRACT: dict[str, Interaction.Config] = {
    "sam1": SAM.Config(kind="sam1", pooling="weighted"),
    "sam2a": SAM.Config(kind="sam2a", dropout=0.2),
    "sam2e": SAM.Config(kind="sam2e"),
    "sam3a": SAM.Config(kind="sam3a", num_layers=2, residual=True, pooling="mean"),
    "sam3e": SAM.Config(kind="sam3e", num_layers=2, residual=True),
}


def sam(layout: FieldLayout = LAYOUT, **options: Any) -> SAM:
    torch.manual_seed(1)
    block = SAM(SAM.Config(**options), layout).double()
    for p in block.parameters():
        nn.init.normal_(p)
    return block


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def array(p: Tensor | None) -> Any:
    return None if p is None else p.detach().numpy()


def parts(layer: nn.Module) -> tuple[Any, Any, Any]:
    assert isinstance(layer, SAMLayer)
    key, residual = (None if linear is None else linear.weight for linear in (layer.key, layer.residual))
    return array(layer.weight_FFD), array(key), array(residual)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(map(str, o.values())))
def test_equals_the_formula(options: dict[str, Any]) -> None:
    block, x_BFD = sam(**options), randn(5, 4, 3)
    y_BND, shown = block(x_BFD), block.explain(x_BFD)
    for row in range(5):
        x = x_BFD[row].numpy()
        for i, layer in enumerate(block.layers):
            x, attention = reference.layer(x, options["kind"], *parts(layer))
            np.testing.assert_allclose(shown[f"score/{i}"][row].detach().numpy(), attention, rtol=0, atol=1e-10)
        np.testing.assert_allclose(y_BND[row].detach().numpy(), x, rtol=1e-12, atol=1e-10)
    assert len(shown) == len(block.layers)
    pairs = options["kind"].startswith("sam2")
    assert block.out.dim == 3
    assert block.out.names == (tuple(f"{a}*{b}" for a in LAYOUT.names for b in LAYOUT.names) if pairs else LAYOUT.names)


def test_hand_case() -> None:
    """Fields 2 and 3: s = (4, 6; 6, 9); with w = 1 field 0 gets 10; elementwise it gets 4·4 + 6·6."""
    x_BFD, layout = torch.tensor([[[2.0], [3.0]]], dtype=torch.float64), FieldLayout(("a", "b"), 1)
    for kind, expected in (("sam3a", [10.0, 15.0]), ("sam3e", [52.0, 117.0])):
        block = sam(layout, kind=kind)
        block.load_state_dict({name: torch.ones_like(p) for name, p in block.state_dict().items()})
        assert block(x_BFD).flatten().tolist() == pytest.approx(expected)
    assert sam(layout, kind="sam2e")(x_BFD).flatten().tolist() == [16.0, 36.0, 36.0, 81.0]


@pytest.mark.parametrize("pooling", ["weighted", "sum", "mean"])
def test_pooling(pooling: str) -> None:
    block, plain, x_BFD = sam(kind="sam3e", pooling=pooling), sam(kind="sam3e"), randn(5, 4, 3)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if k.startswith("layers")})
    y_BFD = plain(x_BFD)
    weights = torch.full((4, 1), 0.25 if pooling == "mean" else 1.0)
    if block.field_weights_F1 is not None:
        weights = block.field_weights_F1
    torch.testing.assert_close(block(x_BFD), (y_BFD * weights).sum(1, keepdim=True))
    assert block.out == FieldLayout(("sam",), 3)
    assert len(set(block.state_dict()) - set(plain.state_dict())) == (pooling == "weighted")


def test_softmax_in_place_of_plain_weights_is_noticed() -> None:
    """The mutation that the formula test must catch."""
    block, x_BFD = sam(kind="sam3e"), randn(5, 4, 3)
    mutant = x_BFD * (block.explain(x_BFD)["score/0"].softmax(-1) @ x_BFD)
    assert (mutant - block(x_BFD)).abs().max() > 1e-2


def test_weights_start_at_one_and_dropout_acts_in_training() -> None:
    block, x_BFD = SAM(SAM.Config(kind="sam2a", dropout=0.5), LAYOUT), torch.randn(5, 4, 3)
    assert all((p == 1).all() for p in block.parameters())
    assert not torch.equal(block(x_BFD), block(x_BFD))
    assert torch.equal(block.eval()(x_BFD), block(x_BFD))


def test_sizes() -> None:
    layout = FieldLayout(tuple(f"f{i}" for i in range(10)), 16)
    pairs, square = 100 * 16, 256
    expected = {"sam1": 0, "sam2a": pairs, "sam2e": 0, "sam3a": pairs + square, "sam3e": square}
    assert {kind: sum(p.numel() for p in sam(layout, kind=kind).parameters()) for kind in expected} == expected
    both = sam(layout, kind="sam3a", num_layers=2, residual=True, pooling="weighted")
    assert sum(p.numel() for p in both.parameters()) == 2 * (pairs + 2 * square) + 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, r"SAM\.num_layers is 0"),
        ({"dropout": 1.0}, r"SAM\.dropout is 1"),
        ({"kind": "sam2a", "num_layers": 2}, r"only sam3a and sam3e are stacked"),
        ({"kind": "sam1", "residual": True}, r"only sam3a and sam3e are stacked"),
        ({"kind": "sam2e", "pooling": "sum"}, r"SAM\.pooling is 'sum' with kind='sam2e'"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SAM.Config(**options)
