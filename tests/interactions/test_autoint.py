from __future__ import annotations

import itertools
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ctrlib.config import ConfigError
from ctrlib.interactions.autoint import AutoInt, InteractingLayer
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.linear import Linear
from ctrlib.schema import FieldLayout
from tests.reference import autoint as reference

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)

PAPER: dict[str, Any] = {}
OFFICIAL: dict[str, Any] = {
    "bias": True,
    "projection_activation": "relu",
    "scale": True,
    "norm": "after_relu",
    "norm_eps": 1e-8,
}
FUXICTR: dict[str, Any] = {"residual": "linear_if_needed", "scale": True, "norm": "before_relu"}

CONTRACT: dict[str, Interaction.Config] = {
    "autoint": AutoInt.Config(num_layers=2, head_dim=4, attention_dropout=0.2),
    "autoint_official": AutoInt.Config(
        num_layers=2, head_dim=4, bias=True, projection_activation="relu", scale=True, norm="after_relu", norm_eps=1e-8
    ),
    "autoint_fuxictr": AutoInt.Config(num_layers=2, head_dim=4, residual="linear_if_needed", norm="before_relu"),
}


def autoint(layout: FieldLayout = LAYOUT, **options: Any) -> AutoInt:
    return AutoInt(AutoInt.Config(**options), layout).double()


def layer(block: AutoInt, i: int = 0) -> InteractingLayer:
    found = block.layers[i]
    assert isinstance(found, InteractingLayer)
    return found


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def set_weights(block: AutoInt, **weights: list[list[float]]) -> None:
    """In row convention, x W; nn.Linear stores Wᵀ."""
    for name, rows in weights.items():
        linear = getattr(layer(block), name)
        linear.weight.data.copy_(torch.tensor(rows, dtype=torch.float64).T)
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)


def row_convention(block: AutoInt, i: int) -> reference.Weights:
    it = layer(block, i)

    def weight(linear: nn.Linear) -> reference.Array:
        return linear.weight.detach().numpy().T

    def bias(linear: nn.Linear | None) -> reference.Array | None:
        return None if linear is None or linear.bias is None else linear.bias.detach().numpy()

    norm = it.norm_before or it.norm_after
    return reference.Weights(
        w_q=weight(it.query),
        w_k=weight(it.key),
        w_v=weight(it.value),
        w_res=None if it.residual is None else weight(it.residual),
        b_q=bias(it.query),
        b_k=bias(it.key),
        b_v=bias(it.value),
        b_res=bias(it.residual),
        gain=None if norm is None else norm.weight.detach().numpy(),
        shift=None if norm is None else norm.bias.detach().numpy(),
    )


HAND = {
    "query": [[1.0, 0.0], [0.0, 1.0]],
    "key": [[1.0, 1.0], [0.0, 1.0]],
    "value": [[1.0, -1.0], [0.0, 1.0]],
    "residual": [[0.5, 0.0], [0.0, 1.0]],
}
E_BFD = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("options", "attention", "output"),
    [
        (
            {"num_heads": 1, "head_dim": 2},
            [[[0.731059, 0.268941], [0.119203, 0.880797]]],
            [[1.231059, 0.0], [0.119203, 3.642391]],
        ),
        (
            {"num_heads": 1, "head_dim": 2, "scale": True},
            [[[0.669762, 0.330238], [0.19557, 0.80443]]],
            [[1.169762, 0.0], [0.19557, 3.413289]],
        ),
        (
            {"num_heads": 1, "head_dim": 2, "scale": True, "bias": True, "projection_activation": "relu"},
            [[[0.669762, 0.330238], [0.19557, 0.80443]]],
            [[1.169762, 0.660477], [0.19557, 3.608859]],
        ),
        (
            {"num_heads": 2, "head_dim": 1},
            [[[0.731059, 0.268941], [0.5, 0.5]], [[0.5, 0.5], [0.119203, 0.880797]]],
            [[1.231059, 0.5], [0.5, 3.642391]],
        ),
    ],
    ids=["paper", "scaled", "official_without_norm", "two_heads"],
)
def test_hand_case(options: dict[str, Any], attention: list[Any], output: list[Any]) -> None:
    block = autoint(FieldLayout(("a", "b"), 2), num_layers=1, **options)
    set_weights(block, **HAND)
    np.testing.assert_allclose(block.explain(E_BFD)["attention/0"][0].detach().numpy(), attention, rtol=0, atol=1e-6)
    np.testing.assert_allclose(block(E_BFD)[0].detach().numpy(), output, rtol=0, atol=1e-6)


def test_hand_case_logit() -> None:
    block = autoint(FieldLayout(("a", "b"), 2), num_layers=1, num_heads=1, head_dim=2)
    set_weights(block, **HAND)
    last = Linear(Linear.Config(), block.out).double()
    last.load_state_dict({"linear.weight": torch.tensor([[1.0, -1.0, 0.5, 2.0]]), "linear.bias": torch.tensor([0.1])})
    logit = last(block(E_BFD))
    assert logit.item() == pytest.approx(8.675443, abs=1e-6)
    assert logit.sigmoid().item() == pytest.approx(0.999830, abs=1e-6)


@pytest.mark.parametrize(
    "options",
    [PAPER, OFFICIAL, FUXICTR, {"residual": "none"}, {**FUXICTR, "scale": False, "norm": "none"}],
    ids=["paper", "official", "fuxictr", "no_residual", "fuxictr_plain"],
)
def test_equals_the_formula(options: dict[str, Any]) -> None:
    torch.manual_seed(1)
    block = autoint(num_layers=3, num_heads=2, head_dim=4, **options)
    for module in block.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    x_BFD = randn(5, 4, 3)
    y_BFA, shown = block(x_BFD), block.explain(x_BFD)
    assert block.out == FieldLayout(LAYOUT.names, 8)
    assert y_BFA.shape == (5, 4, 8)
    assert sorted(shown) == ["attention/0", "attention/1", "attention/2"]
    config = block_options(options)
    for row in range(5):
        x = x_BFD[row].numpy()
        for i in range(3):
            x, attention = reference.layer(x, row_convention(block, i), 2, **config)
            np.testing.assert_allclose(shown[f"attention/{i}"][row].detach().numpy(), attention, rtol=0, atol=1e-10)
        np.testing.assert_allclose(y_BFA[row].detach().numpy(), x, rtol=0, atol=1e-10)


def block_options(options: dict[str, Any]) -> dict[str, Any]:
    return {
        "scale": options.get("scale", False),
        "relu": options.get("projection_activation") == "relu",
        "residual": options.get("residual") != "none",
        "norm": options.get("norm", "none"),
        "eps": options.get("norm_eps", 1e-5),
    }


@pytest.mark.parametrize("scale", [False, True])
def test_without_residual_equals_torch_attention(scale: bool) -> None:
    block = autoint(num_layers=1, num_heads=1, head_dim=4, residual="none", scale=scale)
    x_BFD = randn(5, 4, 3)
    q, k, v = (getattr(layer(block), name)(x_BFD) for name in ("query", "key", "value"))
    expected = F.scaled_dot_product_attention(q, k, v, scale=None if scale else 1.0).relu()
    torch.testing.assert_close(block(x_BFD), expected, rtol=0, atol=1e-12)


def test_attention_is_a_distribution() -> None:
    attention = autoint(num_layers=1).explain(10 * randn(5, 4, 3))["attention/0"]
    assert attention.shape == (5, 2, 4, 4)
    assert (attention >= 0).all()
    torch.testing.assert_close(attention.sum(-1), torch.ones(5, 2, 4, dtype=torch.float64), rtol=0, atol=1e-12)


def test_identical_fields_are_attended_equally() -> None:
    block = autoint(num_layers=1)
    row = randn(1, 1, 3)
    x_BFD = row.expand(2, 4, 3)
    assert torch.equal(block.explain(x_BFD)["attention/0"], torch.full((2, 2, 4, 4), 0.25, dtype=torch.float64))
    expected = (layer(block).value(row) + layer(block).residual(row)).relu().expand(2, 4, 64)  # type: ignore[misc]
    torch.testing.assert_close(block(x_BFD), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["query", "key"])
def test_zero_query_or_key_averages_the_values(name: str) -> None:
    block = autoint(num_layers=1, residual="none")
    nn.init.zeros_(getattr(layer(block), name).weight)
    x_BFD = randn(5, 4, 3)
    expected = layer(block).value(x_BFD).mean(dim=1, keepdim=True).relu().expand(5, 4, 64)
    torch.testing.assert_close(block(x_BFD), expected, rtol=0, atol=1e-12)


def test_zero_values_leave_the_residual() -> None:
    block = autoint(num_layers=1)
    nn.init.zeros_(layer(block).value.weight)
    x_BFD = randn(5, 4, 3)
    expected = layer(block).residual(x_BFD).relu()  # type: ignore[misc]
    torch.testing.assert_close(block(x_BFD), expected, rtol=0, atol=1e-12)


def test_zero_values_without_residual_leave_the_bias() -> None:
    block = autoint(num_layers=1, residual="none")
    nn.init.zeros_(layer(block).value.weight)
    last = Linear(Linear.Config(), block.out).double()
    x_BFD = randn(5, 4, 3)
    assert not block(x_BFD).any()
    assert torch.equal(last(block(x_BFD)).flatten(), last.linear.bias.expand(5))


@pytest.mark.parametrize("options", [PAPER, OFFICIAL, FUXICTR], ids=["paper", "official", "fuxictr"])
def test_permuting_the_fields_permutes_the_output(options: dict[str, Any]) -> None:
    block = autoint(**options)
    x_BFD, order = randn(5, 4, 3), [2, 0, 3, 1]
    torch.testing.assert_close(block(x_BFD[:, order]), block(x_BFD)[:, order], rtol=0, atol=1e-12)
    last = Linear(Linear.Config(), block.out).double()
    logit = last(block(x_BFD))
    assert not torch.allclose(last(block(x_BFD[:, order])), logit)
    last.linear.weight.data = last.linear.weight.data.view(4, -1)[order].view(1, -1)
    torch.testing.assert_close(last(block(x_BFD[:, order])), logit, rtol=0, atol=1e-12)


def test_heads_are_slices() -> None:
    block = autoint(num_layers=1, num_heads=3, head_dim=2, scale=True)
    x_BFD = randn(5, 4, 3)
    parts = []
    for h in range(3):
        single = autoint(num_layers=1, num_heads=1, head_dim=2, scale=True)
        single.load_state_dict({name: w[2 * h : 2 * h + 2] for name, w in block.state_dict().items()})
        parts.append(single(x_BFD))
    torch.testing.assert_close(block(x_BFD), torch.cat(parts, dim=-1), rtol=0, atol=1e-12)


def test_rows_split_is_that_of_fuxictr_1() -> None:
    """head_split="rows" against a loop over the pieces; it differs from the paper's split and has as many parameters."""
    torch.manual_seed(3)
    layout = FieldLayout(("a", "b", "c"), 5)
    block = AutoInt(AutoInt.Config(num_layers=1, num_heads=2, head_dim=2, residual="none", head_split="rows"), layout).double()
    paper = AutoInt(AutoInt.Config(num_layers=1, num_heads=2, head_dim=2, residual="none"), layout).double()
    paper.load_state_dict(block.state_dict())
    x_BFD = torch.randn(4, 3, 5, dtype=torch.float64)
    layer = block.layers[0]
    q, k, v = (linear(x_BFD).detach().numpy() for linear in (layer.query, layer.key, layer.value))  # type: ignore[operator]
    expected = np.stack([np.maximum(reference.rows_split(q[b], k[b], v[b], 2), 0) for b in range(4)])
    np.testing.assert_allclose(block(x_BFD).detach().numpy(), expected, rtol=0, atol=1e-12)
    assert (paper(x_BFD) - block(x_BFD)).abs().max() > 1e-3


def test_no_layers_is_the_identity() -> None:
    block = autoint(num_layers=0)
    x_BFD = randn(5, 4, 3)
    assert torch.equal(block(x_BFD), x_BFD)
    assert block.out == LAYOUT
    assert block.explain(x_BFD) == {}


@pytest.mark.parametrize("residual", ["linear_always", "linear_if_needed", "none"])
def test_which_layers_have_a_residual_matrix(residual: Literal["linear_always", "linear_if_needed", "none"]) -> None:
    block = autoint(num_layers=3, residual=residual)
    expected = {"linear_always": [True] * 3, "linear_if_needed": [True, False, False], "none": [False] * 3}[residual]
    assert [layer(block, i).residual is not None for i in range(3)] == expected


def size(num_fields: int, dim: int, **options: Any) -> int:
    """Of the stack and its final linear layer."""
    block = autoint(FieldLayout(tuple(f"f{i}" for i in range(num_fields)), dim), **options)
    last = Linear(Linear.Config(), block.out)
    return sum(p.numel() for module in (block, last) for p in module.parameters())


def test_published_sizes() -> None:
    assert size(39, 16, **PAPER) == 39_361  # Criteo, the paper's Table 3
    assert size(39, 16, **OFFICIAL) == 40_513  # the authors' code, same data
    # BARS logs, less the embeddings (5,389 values on Frappe, 90,239 on MovieLens, width 10) and, where there is one, the DNN
    # with batch norm and the first-order weights.
    fuxictr: dict[str, Any] = {"num_heads": 4, "head_dim": 32, "residual": "linear_if_needed"}
    assert size(10, 10, num_layers=6, **fuxictr) == 306_051 - 5_389 * 10
    assert size(10, 10, num_layers=5, norm="before_relu", **fuxictr) == 622_180 - 5_389 * 10 - 364_001
    assert size(3, 10, num_layers=2, norm="before_relu", **fuxictr) == 1_047_798 - 90_239 * 11
    assert size(3, 10, num_layers=2, norm="before_relu", **fuxictr) == 1_383_799 - 90_239 * 11 - 336_001


def test_dropout_acts_in_training_and_on_attention_only() -> None:
    torch.manual_seed(2)
    block = autoint(attention_dropout=0.5, num_layers=1)
    x_BFD = randn(5, 4, 3)
    assert not torch.equal(block(x_BFD), block(x_BFD))
    shown = block.explain(x_BFD)["attention/0"]  # in training mode, yet before dropout
    torch.testing.assert_close(shown.sum(-1), torch.ones(5, 2, 4, dtype=torch.float64), rtol=0, atol=1e-12)
    block.eval()
    assert torch.equal(block(x_BFD), block(x_BFD))
    assert torch.equal(block.explain(x_BFD)["attention/0"], shown)
    plain = autoint(num_layers=1)
    plain.load_state_dict(block.state_dict())
    assert torch.equal(plain.train()(x_BFD), block(x_BFD))


@pytest.mark.parametrize("options", [{}, {"scale": True, "norm": "after_relu"}], ids=["paper", "norm"])
def test_gradients(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    block = autoint(num_layers=2, num_heads=2, head_dim=2, **options)
    for i in range(2):
        residual = layer(block, i).residual
        assert residual is not None
        residual.weight.data.abs_().add_(0.3)  # with positive inputs the residual keeps the ReLU away from its kink
        layer(block, i).value.weight.data.mul_(0.1)
        nn.init.normal_(layer(block, i).query.weight)
        norm = layer(block, i).norm_after
        if norm is not None:
            norm.bias.data.fill_(3.0)
    x_BFD = (randn(2, 4, 3).abs() + 0.5).requires_grad_()
    y_BFA = x_BFD
    for i in range(2):
        y_BFA = layer(block, i)(y_BFA)
        assert y_BFA.min() > 0.1
    assert torch.autograd.gradcheck(block, (x_BFD,), eps=1e-6, atol=1e-7, rtol=1e-6)


def test_one_layer_mixes_every_pair_of_fields_and_no_layer_none() -> None:
    """∂² logit / ∂e_i ∂e_j by central differences."""
    torch.manual_seed(4)
    for num_layers in (0, 1):
        block = autoint(num_layers=num_layers, num_heads=1, head_dim=3)
        if num_layers:
            residual = layer(block).residual
            assert residual is not None
            residual.weight.data.abs_().add_(0.5)  # away from the ReLU's kink, so the residual is linear
        last = Linear(Linear.Config(), block.out).double()
        x_BFD, step = randn(1, 4, 3).abs() + 0.5, 1e-3
        assert block(x_BFD).min() > 0.1
        for i, j in itertools.combinations(range(4), 2):
            mixed = 0.0
            for a, b in itertools.product((-1, 1), repeat=2):
                moved = x_BFD.clone()
                moved[0, i, 0] += a * step
                moved[0, j, 1] += b * step
                mixed += a * b * last(block(moved)).item()
            mixed /= 4 * step**2
            assert (abs(mixed) > 1e-5) if num_layers else (abs(mixed) < 1e-8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layers": -1}, "AutoInt.num_layers is -1"),
        ({"num_heads": 0}, "AutoInt.num_heads is 0"),
        ({"head_dim": 0}, "AutoInt.head_dim is 0"),
        ({"norm_eps": 0.0}, "AutoInt.norm_eps is 0"),
        ({"attention_dropout": 1.0}, "AutoInt.attention_dropout is 1"),
    ],
)
def test_config_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AutoInt.Config(**options)
