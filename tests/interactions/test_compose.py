from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.autoint import AutoInt
from ctrlib.interactions.base import Interaction, build, numbered
from ctrlib.interactions.compose import BilinearFusion, Parallel, Stack
from ctrlib.interactions.cross_net import CrossNet, CrossNetV2
from ctrlib.interactions.fm import FM
from ctrlib.interactions.linear import FirstOrder, Linear
from ctrlib.interactions.mlp import MLP
from ctrlib.schema import FieldLayout
from tests.reference.final_mlp import bilinear, bilinear_heads
from tests.reference.fm import fm

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)
FRAPPE = FieldLayout(tuple(f"f{i}" for i in range(10)), 10)
IDENTITY = AutoInt.Config(num_layers=0)


# No ReLU, of which all units of one row may be off: then a gradient of zero would say nothing.
SILU = MLP.Config(hidden_units=(8, 4), activation="silu", norm="batch", dropout=0.2)
CONTRACT: dict[str, Interaction.Config] = {
    "stack": Stack.Config(blocks=(AutoInt.Config(num_layers=1, head_dim=4), MLP.Config(hidden_units=(8,)))),
    "parallel_sum": Parallel.Config(streams=(FM.Config(), MLP.Config(hidden_units=(8, 1), activation="tanh"))),
    "parallel_concat": Parallel.Config(streams=(CrossNet.Config(), AutoInt.Config(head_dim=4)), fusion="concat"),
    "parallel_bilinear": Parallel.Config(streams=(AutoInt.Config(head_dim=4), SILU), fusion="bilinear", num_heads=2),
}
DERIVED = {"parallel_sum": {"streams.0/pair"}}  # FM's


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def stack(*blocks: Interaction.Config) -> Stack:
    return Stack(Stack.Config(blocks=blocks), LAYOUT).double()


def parallel(*streams: Interaction.Config, layout: FieldLayout = LAYOUT, **options: Any) -> Parallel:
    return Parallel(Parallel.Config(streams=streams, **options), layout).double()


def zero_last_layer(block: nn.Module) -> None:
    last = [m for m in block.modules() if isinstance(m, nn.Linear)][-1]
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)


def test_stack_runs_its_blocks_in_order() -> None:
    block = stack(AutoInt.Config(num_heads=1, head_dim=5), CrossNet.Config(), MLP.Config(hidden_units=(7,)))
    x_BFD = randn(5, 4, 3)
    first, second, third = block.blocks
    assert torch.equal(block(x_BFD), third(second(first(x_BFD))))
    assert block.out == FieldLayout(("mlp",), 7)
    assert second.out == FieldLayout(("cross",), 20)


def test_stack_explains_each_block_on_its_own_input() -> None:
    second_config = Stack.Config(blocks=(AutoInt.Config(num_layers=1, num_heads=4),))
    block = stack(AutoInt.Config(num_layers=1), second_config, MLP.Config())
    x_BFD = randn(5, 4, 3)
    shown = block.explain(x_BFD)
    assert sorted(shown) == ["blocks.0/attention/0", "blocks.1/blocks.0/attention/0"]
    first, second, _ = block.blocks
    assert isinstance(first, AutoInt)
    assert isinstance(second, Stack)
    assert torch.equal(shown["blocks.0/attention/0"], first.explain(x_BFD)["attention/0"])
    assert torch.equal(shown["blocks.1/blocks.0/attention/0"], second.explain(first(x_BFD))["blocks.0/attention/0"])
    of_two, of_four = numbered("head", 2), numbered("head", 4)
    assert block.axes == {
        "blocks.0/attention/0": (of_two, LAYOUT.names, LAYOUT.names),
        "blocks.1/blocks.0/attention/0": (of_four, LAYOUT.names, LAYOUT.names),
    }


def test_sum_product_and_concat() -> None:
    streams = (AutoInt.Config(num_heads=1, head_dim=3), IDENTITY)
    x_BFD = randn(5, 4, 3)
    for fusion in ("sum", "product", "concat"):
        block = parallel(*streams, fusion=fusion)
        y_BFD = block.streams[0](x_BFD)
        expected = {
            "sum": y_BFD + x_BFD,
            "product": y_BFD * x_BFD,
            "concat": torch.cat([y_BFD.reshape(5, 12), x_BFD.reshape(5, 12)], dim=1).reshape(5, 1, 24),
        }[fusion]
        assert torch.equal(block(x_BFD), expected)
        assert block.out == (FieldLayout(("concat",), 24) if fusion == "concat" else LAYOUT)


def test_names_of_a_sum() -> None:
    streams = (FM.Config(), MLP.Config(hidden_units=(), output_dim=1))
    assert parallel(*streams).out == FieldLayout(("fm+mlp",), 1)
    assert parallel(*streams, fusion="product").out == FieldLayout(("fm*mlp",), 1)
    assert parallel(FM.Config(), FM.Config()).out == FieldLayout(("fm",), 1)


def test_parallel_explains_its_streams() -> None:
    block = parallel(Linear.Config(), AutoInt.Config(num_layers=1), fusion="concat")
    x_BFD = randn(5, 4, 3)
    attention = block.streams[1]
    assert isinstance(attention, AutoInt)
    shown = block.explain(x_BFD)
    assert list(shown) == list(block.axes) == ["streams.1/attention/0"]
    assert torch.equal(shown["streams.1/attention/0"], attention.explain(x_BFD)["attention/0"])


def test_autoint_plus_is_a_sum_of_two_logits() -> None:
    attention = Stack.Config(blocks=(AutoInt.Config(), Linear.Config()))
    deep = MLP.Config(hidden_units=(8, 8), output_dim=1)
    x_BFD = randn(5, 4, 3)
    for off in (0, 1):
        block = parallel(attention, deep)
        torch.testing.assert_close(block(x_BFD), block.streams[0](x_BFD) + block.streams[1](x_BFD), rtol=0, atol=1e-12)
        zero_last_layer(block.streams[off])
        assert block(x_BFD).any()
        assert torch.equal(block(x_BFD), block.streams[1 - off](x_BFD))


def test_autoint_without_layers_is_linear_on_the_embeddings() -> None:
    block = stack(AutoInt.Config(num_layers=0), Linear.Config())
    x_BFD = randn(5, 4, 3)
    weight, bias = (p.detach().numpy() for p in block.parameters())
    expected = [sum(float(w) * float(v) for w, v in zip(weight[0], x.flatten(), strict=True)) + float(bias[0]) for x in x_BFD]
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


def test_published_sizes() -> None:
    """BARS logs on Frappe_x1: 5,389 feature values, 10 fields, width 10."""
    embeddings, first_order = 5_389 * 10, 5_389
    deep = MLP.Config(norm="batch")
    deep_logit = MLP.Config(norm="batch", output_dim=1)

    def with_logit(streams: Parallel.Config) -> int:
        return size(build(Stack.Config(blocks=(streams, Linear.Config())), FRAPPE))

    assert first_order + size(build(FirstOrder.Config(), FieldLayout(FRAPPE.names, 1))) == 5_390  # LR
    fm_size = size(build(FM.Config(), FRAPPE)) + size(build(FirstOrder.Config(), FieldLayout(FRAPPE.names, 1)))
    assert embeddings + first_order + fm_size == 59_280
    assert embeddings + first_order + size(parallel(FM.Config(), deep_logit, layout=FRAPPE)) == 423_280  # DeepFM
    dcn = Parallel.Config(streams=(CrossNet.Config(num_layers=3), deep), fusion="concat")
    assert embeddings + with_logit(dcn) == 418_591
    dcn_v2 = Parallel.Config(streams=(CrossNetV2.Config(num_layers=4), deep), fusion="concat")
    assert embeddings + with_logit(dcn_v2) == 458_391


def set_fusion(fusion: BilinearFusion, w_1: Tensor, w_2: Tensor, bias: float, weight: Tensor) -> None:
    fusion.load_state_dict(
        {
            "linear_1.weight": w_1[None],
            "linear_1.bias": torch.tensor([bias]),
            "linear_2.weight": w_2[None],
            "linear_2.bias": torch.zeros(1),
            "weight": weight.reshape(-1, 1),
        }
    )


def test_bilinear_hand_case() -> None:
    """Head terms −.3 and 11.1; with w_1 = (.1, .2, .3, .4), w_2 = (1, 0, −1, 0), bias .5 the logit is 13.3."""
    fusion = BilinearFusion(4, 4, num_heads=2).double()
    weight = torch.tensor([[[0.1, 0.2], [0.3, 0.4]], [[0.5, 0.6], [0.7, 0.8]]], dtype=torch.float64)
    w_1, w_2 = torch.tensor([0.1, 0.2, 0.3, 0.4]).double(), torch.tensor([1.0, 0.0, -1.0, 0.0])
    set_fusion(fusion, w_1, w_2, 0.5, weight)
    a = torch.tensor([[1.0, 2.0, 3.0, 4.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -1.0, 2.0, 0.5]], dtype=torch.float64)
    np.testing.assert_allclose(fusion.heads(a, b).detach().numpy(), [[-0.3, 11.1]], rtol=0, atol=1e-6)
    np.testing.assert_allclose(fusion(a, b).detach().numpy(), [[13.3]], rtol=0, atol=1e-6)


def test_bilinear_equals_the_formula_with_unequal_widths() -> None:
    fusion = BilinearFusion(6, 4, num_heads=2).double()
    a, b = randn(5, 6), randn(5, 4)
    matrices = list(fusion.weight.detach().numpy().reshape(2, 3, 2))
    w_1, w_2 = (linear.weight.detach().numpy()[0] for linear in (fusion.linear_1, fusion.linear_2))
    bias = (fusion.linear_1.bias + fusion.linear_2.bias).item()
    heads = [bilinear_heads(p.numpy(), q.numpy(), matrices) for p, q in zip(a, b, strict=True)]
    logits = [bilinear(p.numpy(), q.numpy(), w_1, w_2, bias, matrices) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(fusion.heads(a, b).detach().numpy(), heads, rtol=0, atol=1e-10)
    np.testing.assert_allclose(fusion(a, b)[:, 0].detach().numpy(), logits, rtol=0, atol=1e-10)


def test_heads_are_blocks_on_the_diagonal_of_one_matrix() -> None:
    a, b = randn(5, 6), randn(5, 4)
    many, one = BilinearFusion(6, 4, num_heads=2).double(), BilinearFusion(6, 4).double()
    state = many.state_dict()
    whole = torch.zeros(6, 4, dtype=torch.float64)
    whole[:3, :2], whole[3:, 2:] = state["weight"].view(2, 3, 2)
    one.load_state_dict(state | {"weight": whole.view(-1, 1)})
    torch.testing.assert_close(one(a, b), many(a, b), rtol=0, atol=1e-12)


def test_one_head_is_torch_bilinear() -> None:
    a, b = randn(5, 6), randn(5, 4)
    fusion, expected = BilinearFusion(6, 4).double(), nn.Bilinear(6, 4, 1, bias=False).double()
    expected.weight.data.copy_(fusion.weight.data.view(1, 6, 4))
    torch.testing.assert_close(fusion.heads(a, b), expected(a, b), rtol=0, atol=1e-12)


def test_as_many_heads_as_units_is_a_dot_product() -> None:
    a, b = randn(5, 6), randn(5, 6)
    fusion = BilinearFusion(6, 6, num_heads=6).double()
    set_fusion(fusion, torch.zeros(6), torch.zeros(6), 0.0, torch.ones(6, 1, 1))
    torch.testing.assert_close(fusion(a, b)[:, 0], (a * b).sum(1), rtol=0, atol=1e-12)


def test_fm_is_a_bilinear_fusion_of_two_identities() -> None:
    block = parallel(IDENTITY, IDENTITY, fusion="bilinear")
    pairs = torch.kron(torch.ones(4, 4).triu(1), torch.eye(3))
    set_fusion(block.bilinear, torch.zeros(12), torch.zeros(12), 0.0, pairs)
    x_BFD = randn(5, 4, 3)
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].detach().numpy(), [fm(x.numpy()) for x in x_BFD], rtol=0, atol=1e-10)
    assert block.out == FieldLayout(("bilinear",), 1)
    shown = block.explain(x_BFD)
    torch.testing.assert_close(shown["bilinear"], block(x_BFD)[:, 0], rtol=0, atol=1e-12)


def test_bilinear_weight_starts_by_its_flat_shape() -> None:
    """std = √(2 / (d_1 d_2 / k + 1)), not that of one matrix, which would be about 10 times larger here."""
    torch.manual_seed(1)
    weight = BilinearFusion(400, 200, num_heads=2).weight
    assert weight.shape == (40_000, 1)
    assert weight.std().item() == pytest.approx(math.sqrt(2 / 40_001), rel=0.02)


def test_bilinear_size() -> None:
    assert size(BilinearFusion(400, 100, num_heads=5)) == 401 + 101 + 8_000


@pytest.mark.parametrize("fusion", ["sum", "product"])
def test_streams_of_different_shape_are_named(fusion: str) -> None:
    with pytest.raises(ConfigError, match=rf"'{fusion}'.*FM \[B, 1, 1\], AutoInt \[B, 4, 64\]"):
        parallel(FM.Config(), AutoInt.Config(), fusion=fusion)


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"Stack\.blocks is empty"):
        Stack.Config(blocks=())
    with pytest.raises(ConfigError, match=r"Parallel\.streams is empty"):
        Parallel.Config(streams=())
    with pytest.raises(ConfigError, match="with 3 streams; expected exactly two"):
        Parallel.Config(streams=(FM.Config(),) * 3, fusion="bilinear")
    with pytest.raises(ConfigError, match=r"Parallel\.num_heads is 0"):
        Parallel.Config(streams=(FM.Config(),), num_heads=0)
    with pytest.raises(ConfigError, match="num_heads is 3, which does not divide the fused widths 12 and 64"):
        parallel(IDENTITY, MLP.Config(hidden_units=(64,)), fusion="bilinear", num_heads=3)
