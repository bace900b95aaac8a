from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.edcn import EDCN, EDCNLayer
from ctrlib.schema import FieldLayout
from tests.reference import edcn as reference

Kind = Literal["product", "sum", "concat", "attention"]
LAYOUT = FieldLayout(("user", "item", "hour"), 2)

CONTRACT: dict[str, Interaction.Config] = {
    "edcn": EDCN.Config(num_layers=2, dropout=0.2),
    "edcn_sum": EDCN.Config(num_layers=2, bridge="sum", norm="none", regulation=False),
    "edcn_concat": EDCN.Config(num_layers=2, bridge="concat", temperature=2.0),
    "edcn_attention": EDCN.Config(num_layers=2, bridge="attention"),
}


def fields(count: int, dim: int = 10) -> FieldLayout:
    return FieldLayout(tuple(f"f{i}" for i in range(count)), dim)


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def arrays(block: EDCN) -> list[reference.Layer]:
    found = []
    for layer in block.layers:
        assert isinstance(layer, EDCNLayer)
        gates = None if layer.gate_logits is None else layer.gate_logits.detach().numpy()[..., 0]
        found.append(
            reference.Layer(
                g_cross=None if gates is None else gates[0],
                g_deep=None if gates is None else gates[1],
                w=layer.cross.weight.detach().numpy()[0],
                b=layer.bias.detach().numpy(),
                deep_w=layer.deep.weight.detach().numpy(),
                deep_b=layer.deep.bias.detach().numpy(),
                bridge=[p.detach().numpy() for p in layer.bridge.parameters()],
            )
        )
    return found


def edcn(**options: Any) -> EDCN:
    """Without norm, and with gates and biases away from where they start."""
    block = EDCN(EDCN.Config(norm="none", **options), LAYOUT).double()
    for name, p in block.named_parameters():
        if p.ndim == 1 or name.endswith("gate_logits"):
            nn.init.normal_(p)
    return block


def test_hand_case() -> None:
    """Two fields of width 1 with gates (¾, ¼) for the cross and (½, ½) for the deep layer: x = (4, 8) becomes (3, 2) and
    (2, 4). Cross with w = (1, −1), b = (0, 1): (3, 2)·1 + (0, 1) + (3, 2) = (6, 5). Deep with the identity and bias (1, −9):
    ReLU(3, −5) = (3, 0). Bridge: (18, 0)."""
    block = EDCN(EDCN.Config(num_layers=1, norm="none"), FieldLayout(("a", "b"), 1)).double()
    block.load_state_dict(
        {
            "layers.0.gate_logits": torch.tensor([[[np.log(3.0)], [0.0]], [[0.0], [0.0]]]),
            "layers.0.cross.weight": torch.tensor([[1.0, -1.0]]),
            "layers.0.bias": torch.tensor([0.0, 1.0]),
            "layers.0.deep.weight": torch.eye(2),
            "layers.0.deep.bias": torch.tensor([1.0, -9.0]),
        }
    )
    y_B3N = block(torch.tensor([[[4.0], [8.0]]], dtype=torch.float64))
    np.testing.assert_allclose(y_B3N[0].detach().numpy(), [[6.0, 5.0], [3.0, 0.0], [18.0, 0.0]], rtol=0, atol=1e-6)


@pytest.mark.parametrize("regulation", [True, False])
@pytest.mark.parametrize("bridge", ["product", "sum", "concat", "attention"])
def test_equals_the_formula(bridge: Kind, regulation: bool) -> None:
    torch.manual_seed(1)
    block = edcn(num_layers=3, bridge=bridge, regulation=regulation, temperature=0.5)
    x_BFD = torch.randn(4, 3, 2, dtype=torch.float64)
    expected = [reference.edcn(x.numpy(), arrays(block), bridge, 0.5) for x in x_BFD]
    assert block.out == FieldLayout(("cross", "deep", "bridge"), 6)
    assert block(x_BFD).shape == (4, 3, 6)
    np.testing.assert_allclose(block(x_BFD).detach().numpy(), expected, rtol=0, atol=1e-10)


def test_crosses_keep_their_input() -> None:
    torch.manual_seed(2)
    block = edcn(num_layers=2)
    x_BFD = torch.randn(1, 3, 2, dtype=torch.float64)
    wrong = reference.edcn(x_BFD[0].numpy(), arrays(block), "product", 1.0, residual=False)
    assert np.abs(block(x_BFD)[0].detach().numpy() - wrong).max() > 1e-2


def test_batch_norm_is_on_the_regulated_inputs() -> None:
    block = EDCN(EDCN.Config(num_layers=1), LAYOUT).double()
    layer = block.layers[0]
    assert isinstance(layer, EDCNLayer)
    cross_BN, deep_BN = layer.regulate(5 + torch.randn(64, 3, 2, dtype=torch.float64))
    for normed in (cross_BN, deep_BN):
        torch.testing.assert_close(normed.mean(dim=0), torch.zeros(6, dtype=torch.float64), rtol=0, atol=1e-9)
        assert (normed.var(dim=0) > 0.9).all()


def test_explain_shows_the_gates() -> None:
    torch.manual_seed(3)
    block = edcn(num_layers=2, temperature=2.0)
    shown = block.explain(torch.randn(4, 3, 2, dtype=torch.float64))
    assert list(shown) == ["cross_gate/0", "deep_gate/0", "cross_gate/1", "deep_gate/1"]
    layers = arrays(block)
    for name, gate in shown.items():
        assert gate.shape == (4, 3)
        layer = layers[int(name[-1])]
        logits = layer.g_cross if name.startswith("cross") else layer.g_deep
        assert logits is not None
        np.testing.assert_allclose(gate[2].detach().numpy(), reference.softmax(logits / 2.0), rtol=0, atol=1e-12)
    fresh = EDCN(EDCN.Config(), LAYOUT).explain(torch.zeros(1, 3, 2))
    assert all(torch.allclose(gate, torch.full((1, 3), 1 / 3)) for gate in fresh.values())
    assert edcn(regulation=False).explain(torch.zeros(1, 3, 2)) == {}


def test_sizes() -> None:
    assert size(EDCN(EDCN.Config(num_layers=3), fields(10))) == 3 * (10_000 + 300 + 20 + 400)
    assert size(EDCN(EDCN.Config(num_layers=3, norm="none"), fields(10))) == 3 * (10_000 + 300 + 20)
    assert size(EDCN(EDCN.Config(num_layers=1, norm="none", bridge="concat"), fields(10))) == 10_320 + 20_100
    assert size(EDCN(EDCN.Config(num_layers=1, norm="none", bridge="attention"), fields(10))) == 10_320 + 2 * 20_100
    # BARS logs: embeddings of width 10 (5,389 values on Frappe, 90,239 on MovieLens), the block and one linear layer.
    assert 53_890 + size(EDCN(EDCN.Config(num_layers=3), fields(10))) + 301 == 86_351
    assert 902_390 + size(EDCN(EDCN.Config(num_layers=2, regulation=False), fields(3))) + 91 == 904_701


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": 0}, "EDCN.num_layers is 0"),
        ({"temperature": 0.0}, "EDCN.temperature is 0"),
        ({"dropout": 1.0}, "EDCN.dropout is 1"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EDCN.Config(**options)
