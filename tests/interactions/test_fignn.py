from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.fignn import GRU, AttentionalScore, FiGNN, MessageLayer
from ctrlib.schema import FieldLayout
from tests.interactions.contract import Need, two_fields
from tests.reference import fignn as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)

CONTRACT: dict[str, Interaction.Config] = {
    "fignn": FiGNN.Config(num_layers=2),
    "fignn_own_layers": FiGNN.Config(num_layers=2, share_layers=False, gru=False, residual=False),
    "attentional_score": AttentionalScore.Config(),
}
NEEDS: dict[str, Need] = {"fignn": two_fields, "fignn_own_layers": two_fields}


def fields(count: int, dim: int = 10) -> FieldLayout:
    return FieldLayout(tuple(f"f{i}" for i in range(count)), dim)


def size(*blocks: nn.Module) -> int:
    return sum(p.numel() for block in blocks for p in block.parameters())


def fignn(**options: Any) -> FiGNN:
    block = FiGNN(FiGNN.Config(**options), LAYOUT).double()
    for layer in block.layers:
        assert isinstance(layer, MessageLayer)
        assert not layer.bias.any()
        nn.init.normal_(layer.bias)
    nn.init.normal_(block.attention.weight)
    return block


def steps(block: FiGNN) -> list[tuple[reference.Array, ...]]:
    layers = [m for m in block.layers if isinstance(m, MessageLayer)]
    found = [tuple(p.detach().numpy() for p in (m.weight_in, m.weight_out, m.bias)) for m in layers]
    return found * (block.num_layers // len(found))


def gru_arrays(cell: GRU | None) -> reference.Gru | None:
    if cell is None:
        return None
    return reference.Gru(*(p.detach().numpy() for m in (cell.input, cell.hidden) for p in (m.weight, m.bias)))


def test_hand_case() -> None:
    """Two fields of width 1, x = (2, 3): each listens to the other only. W_in = (1, −1), W_out = (2, 1), b = ½: the messages
    are 1·1·3 + ½ and −1·2·2 + ½; plus the state and the input (3.5 + 2 + 2, −3.5 + 3 + 3)."""
    block = FiGNN(FiGNN.Config(num_layers=1, gru=False), FieldLayout(("a", "b"), 1))
    block.layers.load_state_dict(
        {
            "0.weight_in": torch.tensor([[[1.0]], [[-1.0]]]),
            "0.weight_out": torch.tensor([[[2.0]], [[1.0]]]),
            "0.bias": torch.tensor([0.5]),
        }
    )
    assert block(torch.tensor([[[2.0], [3.0]]])).tolist() == [[[7.5], [2.5]]]


@pytest.mark.parametrize(
    "options",
    [{}, {"share_layers": False}, {"share_layers": False, "gru": False}, {"residual": False}],
    ids=["paper", "fuxictr", "bars", "no_residual"],
)
def test_equals_the_formula(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    block = fignn(num_layers=3, **options)
    assert len(block.layers) == (1 if options.get("share_layers", True) else 3)
    x_BFD = torch.randn(5, 4, 3, dtype=torch.float64)
    y_BFD, edges_BFF = block(x_BFD).detach().numpy(), block.explain(x_BFD)["attention"].detach().numpy()
    w = block.attention.weight[0].detach().numpy()
    assert block.out == LAYOUT
    for x, y, edges in zip(x_BFD.numpy(), y_BFD, edges_BFF, strict=True):
        expected_steps: Any = steps(block)
        np.testing.assert_allclose(edges, reference.graph(x, w), rtol=0, atol=1e-10)
        expected = reference.fignn(x, edges, expected_steps, gru_arrays(block.gru), options.get("residual", True))
        np.testing.assert_allclose(y, expected, rtol=0, atol=1e-10)


def test_messages_go_from_j_to_i() -> None:
    """With the graph or the roles of W_in and W_out turned round it is another network."""
    torch.manual_seed(2)
    block = fignn(num_layers=1)
    x_BFD = torch.randn(1, 4, 3, dtype=torch.float64)
    shown, edges = block(x_BFD)[0].detach().numpy(), block.explain(x_BFD)["attention"][0].detach().numpy()
    ((w_in, w_out, b),) = steps(block)
    p = gru_arrays(block.gru)
    x = x_BFD[0].numpy()
    np.testing.assert_allclose(shown, reference.fignn(x, edges, [(w_in, w_out, b)], p, True), rtol=0, atol=1e-10)
    assert np.abs(shown - reference.fignn(x, edges.T, [(w_in, w_out, b)], p, True)).max() > 1e-3
    assert np.abs(shown - reference.fignn(x, edges, [(w_out, w_in, b)], p, True)).max() > 1e-3


def test_graph_is_a_distribution_over_the_other_fields() -> None:
    graph_BFF = fignn().explain(5 * torch.randn(6, 4, 3, dtype=torch.float64))["attention"]
    assert (graph_BFF >= 0).all()
    assert not graph_BFF.diagonal(dim1=1, dim2=2).any()
    torch.testing.assert_close(graph_BFF.sum(-1), torch.ones(6, 4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_gru_is_that_of_torch() -> None:
    torch.manual_seed(3)
    ours, theirs = GRU(3), nn.GRUCell(3, 3)
    theirs.load_state_dict(
        {
            "weight_ih": ours.input.weight,
            "bias_ih": ours.input.bias,
            "weight_hh": ours.hidden.weight,
            "bias_hh": ours.hidden.bias,
        }
    )
    m_BFD, h_BFD = torch.randn(5, 4, 3), torch.randn(5, 4, 3)
    torch.testing.assert_close(ours(m_BFD, h_BFD).view(-1, 3), theirs(m_BFD.view(-1, 3), h_BFD.view(-1, 3)))


def test_score_equals_the_formula() -> None:
    torch.manual_seed(4)
    block = AttentionalScore(AttentionalScore.Config(), LAYOUT).double()
    score, weight = block.score.weight.detach().numpy()[0], block.weight.weight.detach().numpy()
    x_BFD = torch.randn(5, 4, 3, dtype=torch.float64)
    expected = [reference.attentional_score(x, score, weight) for x in x_BFD.numpy()]
    assert block.out == FieldLayout(("score",), 1)
    assert block(x_BFD).shape == (5, 1, 1)
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].detach().numpy(), expected, rtol=0, atol=1e-10)
    shown = block.explain(x_BFD)
    torch.testing.assert_close((shown["score"] * shown["weight"]).sum(1), block(x_BFD).flatten(), rtol=0, atol=1e-12)


def test_sizes() -> None:
    gru = 6 * 100 + 60
    assert size(FiGNN(FiGNN.Config(num_layers=3), fields(10))) == 20 + 2_010 + gru
    assert size(FiGNN(FiGNN.Config(num_layers=3, share_layers=False), fields(10))) == 20 + 3 * 2_010 + gru
    assert size(AttentionalScore(AttentionalScore.Config(), fields(10))) == 10 + 1_000
    # BARS logs: embeddings of width 10 (5,389 values on Frappe, 90,239 on MovieLens), both blocks.
    for values, count, layers, published in ((5_389, 10, 17, 89_090), (90_239, 3, 13, 910_440)):
        graph = FiGNN(FiGNN.Config(num_layers=layers, share_layers=False, gru=False), fields(count))
        assert 10 * values + size(graph, AttentionalScore(AttentionalScore.Config(), fields(count))) == published


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"FiGNN\.num_layers is 0"):
        FiGNN.Config(num_layers=0)
    with pytest.raises(ConfigError, match="FiGNN takes pairs of fields, but its input has the single field 'user'"):
        FiGNN(FiGNN.Config(), FieldLayout(("user",), 3))
