"""Mixtures of experts: experts together and one by one, gates, towers; the models against the formula row by row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError, override
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.cross_net import CrossNetV2
from ctrlib.interactions.mlp import MLP
from ctrlib.interactions.token_linear import TokenLinear, TokenNorm
from ctrlib.models.behaviours import TargetAttention
from ctrlib.models.moe import BatchedMLP, Experts, MoE, normed_gate
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.schema import FieldLayout
from tests.models.histories import LAYOUT, TWO_LABELS, rows
from tests.models.small import awake, make
from tests.reference import moe as reference

Array = npt.NDArray[np.float64]
Layers = list[tuple[Array, Array]]
FIELDS = FieldLayout(("a", "b"), 3)


def numbers(x: Tensor) -> Array:
    return x.detach().double().numpy()


def expert_layers(module: nn.Module, k: int) -> Layers:
    """Weights and biases of expert k as nn.Linear stores them."""
    linears = [m for m in module.modules() if isinstance(m, TokenLinear)]
    return [(numbers(m.weight[k].T), numbers(cast(Tensor, m.bias)[k])) for m in linears]


def alone(mlps: BatchedMLP, config: MLP.Config, k: int) -> MLP:
    """MLP k as a module of its own, its weights and statistics copied."""
    block = MLP(config, FieldLayout(("x",), 5))
    mine = [m for m in block.layers if isinstance(m, nn.Linear | nn.LayerNorm | nn.BatchNorm1d | nn.PReLU)]
    kinds = (TokenLinear, TokenNorm, nn.BatchNorm1d, nn.PReLU)
    theirs = [m for m in mlps.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        for m, other in zip(mine, theirs, strict=True):
            if isinstance(m, nn.Linear):
                source = cast(TokenLinear, other)
                m.weight.copy_(source.weight[k].T)
                m.bias.copy_(cast(Tensor, source.bias)[k])
            elif isinstance(m, nn.LayerNorm):
                m.weight.copy_(cast(TokenNorm, other).weight[k])
                m.bias.copy_(cast(TokenNorm, other).bias[k])
            else:
                count = m.weight.numel()
                for name, p in m.state_dict().items():
                    if p.ndim:
                        p.copy_(other.state_dict()[name][k * count : (k + 1) * count])
    return block


@pytest.mark.parametrize("norm", ["none", "batch", "layer"])
@pytest.mark.parametrize("activation", ["relu", "prelu"])
def test_together_is_one_by_one(norm: Any, activation: Any) -> None:
    torch.manual_seed(1)
    config = MLP.Config(hidden_units=(7, 4), output_dim=2, norm=norm, activation=activation)
    mlps = BatchedMLP(config, 3, 5)
    for p in mlps.parameters():
        p.data += 0.3 * torch.randn_like(p)
    x_BKW = torch.randn(9, 3, 5)
    mlps.train()(x_BKW)  # moves the statistics
    mlps.eval()
    expected = torch.stack([alone(mlps, config, k).eval()(x_BKW[:, k : k + 1])[:, 0] for k in range(3)], dim=1)
    torch.testing.assert_close(mlps(x_BKW), expected, rtol=1e-5, atol=1e-6)
    assert sum(p.numel() for p in mlps.parameters()) == 3 * sum(p.numel() for p in alone(mlps, config, 0).parameters())


def test_experts_of_any_block() -> None:
    torch.manual_seed(2)
    x_BFD = torch.randn(4, 2, 3)
    for config, width in ((CrossNetV2.Config(num_layers=1), 6), (MLP.Config(hidden_units=(5, 4)), 4)):
        plain = Experts(Experts.Config(count=3, expert=config), FIELDS, None)
        assert (plain.dim, plain(x_BFD).shape) == (width, (4, 3, width))
        scored = Experts(Experts.Config(count=3, expert=config), FIELDS, 2)
        assert (scored.dim, scored(x_BFD).shape) == (2, (4, 3, 2))
    crosses = Experts(Experts.Config(count=3, expert=CrossNetV2.Config(num_layers=1)), FIELDS, 2)
    assert crosses.blocks is not None
    assert crosses.last is not None
    for k, block in enumerate(crosses.blocks):
        expected = block(x_BFD).flatten(1) @ crosses.last.weight[k] + cast(Tensor, crosses.last.bias)[k]
        torch.testing.assert_close(crosses(x_BFD)[:, k], expected)


def test_experts_start_apart_and_each_as_a_layer_of_its_own() -> None:
    torch.manual_seed(3)
    for scheme, std in (
        ("torch", (1 / 3 / 60) ** 0.5),
        ("xavier_normal", (2 / 360) ** 0.5),
        ("xavier_uniform", (2 / 360) ** 0.5),
    ):
        config = MoE.Config(
            embedding=FeatureEmbedding.Config(dim=10, fields=("user", "item", "category", "hour", "price", "tags")),
            weight_init=cast(Any, scheme),
            experts=Experts.Config(count=5, expert=MLP.Config(hidden_units=(300,))),
        )
        model = cast(MoE, make(config, LAYOUT))
        assert model.experts.mlps is not None
        first = cast(TokenLinear, model.experts.mlps.layers[0])
        assert not torch.equal(first.weight[0], first.weight[1])
        assert float(first.weight.detach().std()) == pytest.approx(std, rel=0.05)
        if scheme != "torch":
            assert not cast(Tensor, first.bias).any()


def test_gates_by_hand() -> None:
    g = torch.tensor([[1.0, 3.0, 2.0]])
    assert torch.equal(normed_gate(g, "none", 2), g)
    torch.testing.assert_close(normed_gate(g, "softmax", 2), g.softmax(1))
    top = normed_gate(g, "topk", 2)
    torch.testing.assert_close(top, torch.tensor([[0.0, 1 / (1 + np.exp(-1)), 1 / (1 + np.exp(1))]], dtype=torch.float32))
    torch.testing.assert_close(normed_gate(g, "topk", 9), g.softmax(1))


def moe(layout: Any = LAYOUT, **options: Any) -> MoE:
    chosen: dict[str, Any] = {
        "embedding": FeatureEmbedding.Config(dim=4, init_std=0.5),
        "experts": Experts.Config(count=3, expert=MLP.Config(hidden_units=(6,))),
    }
    return cast(MoE, awake(make(MoE.Config(**(chosen | options)), layout)))


@pytest.mark.parametrize("top_k", [None, 2, 1])
def test_plain_is_the_formula(top_k: int | None) -> None:
    model, batch = moe(top_k=top_k), rows(6)
    gate = numbers(model.gate.weight), numbers(model.gate.bias)
    experts = [expert_layers(model.experts, k) for k in range(3)]
    expected = [reference.plain(x, gate, experts, top_k) for x in numbers(model.tokens(batch))]
    np.testing.assert_allclose(numbers(model(batch).logits), expected, rtol=1e-4, atol=1e-5)
    shown = model.explain(batch)["gate"]
    assert model.axes["gate"] == (("expert_0", "expert_1", "expert_2"),)
    torch.testing.assert_close(shown.sum(1), torch.ones(6))
    assert ((shown > 0).sum(1) == (top_k or 3)).all()


def test_multi_gate_is_the_formula() -> None:
    tower = MLP.Config(hidden_units=(5,))
    model, batch = moe(TWO_LABELS, gates="per_label", tower=tower), rows(6, num_labels=2)
    assert model.towers is not None
    weight, bias = numbers(model.gate.weight), numbers(model.gate.bias)
    gates = [(weight[3 * t : 3 * t + 3], bias[3 * t : 3 * t + 3]) for t in range(2)]
    experts = [expert_layers(model.experts, k) for k in range(3)]
    towers = [expert_layers(model.towers, t) for t in range(2)]
    expected = [reference.multi_gate(x, gates, experts, towers) for x in numbers(model.tokens(batch))]
    np.testing.assert_allclose(numbers(model(batch).logits), expected, rtol=1e-4, atol=1e-5)
    shown = model.explain(batch)["gate"]
    assert model.axes["gate"] == (("click", "buy"), ("expert_0", "expert_1", "expert_2"))
    torch.testing.assert_close(shown.sum(2), torch.ones(6, 2))


def test_gates_may_be_shared_by_labels() -> None:
    model, batch = moe(TWO_LABELS), rows(4, num_labels=2)
    s_BKE = model.experts(model.tokens(batch))
    expected = torch.einsum("bk,bkt->bt", model.explain(batch)["gate"], s_BKE)
    torch.testing.assert_close(model(batch).logits, expected)
    model = moe(TWO_LABELS, tower=MLP.Config(hidden_units=(5,)))
    assert model(batch).logits.shape == (4, 2)


def test_a_gate_that_sees_some_fields_only() -> None:
    """Category-MoE: the gate depends on the category alone."""
    model, batch = moe(gate_fields=("category",)), rows(6)
    assert model.gate.in_features == 4
    expected = model.explain(batch)["gate"]
    moved = replace(batch, sparse=batch.sparse.clone(), dense=batch.dense + 1)
    moved.sparse[:, [0, 1, 3]] = 1
    torch.testing.assert_close(model.explain(moved)["gate"], expected, rtol=0, atol=0)
    with pytest.raises(
        ConfigError, match="gate_fields names 'categori', which the model does not read; did you mean 'category'"
    ):
        moe(gate_fields=("categori",))
    with pytest.raises(ConfigError, match="gate_fields is empty, so that gates would read nothing"):
        moe(gate_fields=())


def test_attention_is_an_option() -> None:
    config = override(preset("moe"), {"attention": "{}"}, COMPONENTS)
    assert cast(MoE.Config, config).attention == TargetAttention.Config()
    model, batch = moe(attention=TargetAttention.Config()), rows(5)
    assert model.tokens(batch).shape == (5, 9, 4)
    assert model.explain(batch)["history/weight"].shape == (5, 50)
    assert moe().tokens(batch).shape == (5, 9, 4)  # pooled, in other places
    with pytest.raises(ConfigError, match="MoE with attention reads a history of behaviours, but the data has none"):
        moe(replace(LAYOUT, histories=()), attention=TargetAttention.Config())


@pytest.mark.parametrize(
    ("make_config", "message"),
    [
        (lambda: Experts.Config(count=0), "Experts.count is 0"),
        (lambda: Experts.Config(expert=MLP.Config(output_dim=1)), "Experts.expert.output_dim is 1; expected None"),
        (lambda: MoE.Config(tower=MLP.Config(output_dim=1)), "MoE.tower.output_dim is 1; expected None"),
        (lambda: MoE.Config(top_k=0), "MoE.top_k is 0"),
    ],
)
def test_options(make_config: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_config()
