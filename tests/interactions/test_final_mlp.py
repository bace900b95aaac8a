from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from ctrlib.config import ConfigError
from ctrlib.interactions.base import Interaction
from ctrlib.interactions.compose import BilinearFusion, LinearFusion
from ctrlib.interactions.final_mlp import FeatureGate, FinalMLP
from ctrlib.interactions.mlp import MLP
from ctrlib.schema import FieldLayout
from tests.reference import final_mlp as reference
from tests.reference.mlp import mlp

LAYOUT = FieldLayout(("user", "item", "hour", "city"), 3)
CONTEXT = FieldLayout(("user", "hour"), 3)
SMALL: dict[str, Any] = {
    "mlp1": MLP.Config(hidden_units=(8,)),
    "mlp2": MLP.Config(hidden_units=(5, 4)),
    "fs_hidden_units": (6,),
    "num_heads": 2,
}

# No ReLU, of which all units of one row may be off: then a gradient of zero would say nothing.
SILU = MLP.Config(hidden_units=(8, 4), activation="silu", norm="batch", dropout=0.2)
CONTRACT: dict[str, Interaction.Config] = {
    "final_mlp": FinalMLP.Config(mlp1=SILU, mlp2=SILU, fs_hidden_units=(8,), num_heads=2),
    "final_mlp_plain": FinalMLP.Config(mlp1=SILU, mlp2=SILU, use_fs=False, fusion="product"),
}


def final_mlp(context_1: FieldLayout | None = None, context_2: FieldLayout | None = None, **options: Any) -> FinalMLP:
    torch.manual_seed(1)
    return FinalMLP(FinalMLP.Config(**(SMALL | options)), LAYOUT, context_1, context_2).double()


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def size(block: nn.Module) -> int:
    return sum(p.numel() for p in block.parameters())


def linears(block: nn.Module) -> reference.Layers:
    return [(m.weight.detach().numpy(), m.bias.detach().numpy()) for m in block.modules() if isinstance(m, nn.Linear)]


def fields(count: int) -> FieldLayout:
    return FieldLayout(tuple(f"f{i}" for i in range(count)), 10)


def test_equals_the_formula() -> None:
    """Stream 1 gated by a context, stream 2 by a learned vector."""
    block = final_mlp(CONTEXT)
    gate_1, gate_2, fusion = block.gate_1, block.gate_2, block.fusion
    assert gate_1 is not None
    assert gate_2 is not None
    assert gate_2.vector is not None
    assert isinstance(fusion, BilinearFusion)
    nn.init.normal_(gate_2.vector)
    x_BFD, context = randn(5, 4, 3), randn(5, 2, 3)
    vector = gate_2.vector.detach().numpy()
    matrices = list(fusion.weight.detach().numpy().reshape(2, 4, 2))
    w_1, w_2 = (m.weight.detach().numpy()[0] for m in (fusion.linear_1, fusion.linear_2))
    bias = (fusion.linear_1.bias + fusion.linear_2.bias).item()
    gates_1, gates_2, heads, logits = [], [], [], []
    for x, c in zip(x_BFD.numpy(), context.numpy(), strict=True):
        gates_1.append(reference.gate(c, linears(gate_1)[:1], linears(gate_1)[1]))
        gates_2.append(reference.gate(vector, linears(gate_2)[:1], linears(gate_2)[1]))
        o_1 = mlp(reference.gated(x, gates_1[-1]), linears(block.mlp_1), "relu", None)
        o_2 = mlp(reference.gated(x, gates_2[-1]), linears(block.mlp_2), "relu", None)
        heads.append(reference.bilinear_heads(o_1, o_2, matrices))
        logits.append(reference.bilinear(o_1, o_2, w_1, w_2, bias, matrices))
    y_B11, shown = block(x_BFD, context), block.explain(x_BFD, context)
    assert block.out == FieldLayout(("final_mlp",), 1)
    assert y_B11.shape == (5, 1, 1)
    assert sorted(shown) == ["bilinear", "gate_1", "gate_2"]
    np.testing.assert_allclose(y_B11[:, 0, 0].detach().numpy(), logits, rtol=0, atol=1e-10)
    np.testing.assert_allclose(shown["gate_1"].flatten(1).numpy(), gates_1, rtol=0, atol=1e-10)
    np.testing.assert_allclose(shown["gate_2"].flatten(1).numpy(), gates_2, rtol=0, atol=1e-10)
    np.testing.assert_allclose(shown["bilinear"].detach().numpy(), heads, rtol=0, atol=1e-10)


@pytest.mark.parametrize("context", [None, CONTEXT])
def test_a_gate_of_one_is_no_gate(context: FieldLayout | None) -> None:
    block, plain = final_mlp(context), final_mlp(use_fs=False)
    for gate in (block.gate_1, block.gate_2):
        assert gate is not None
        last = [m for m in gate.modules() if isinstance(m, nn.Linear)][-1]
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
    plain.load_state_dict({k: v for k, v in block.state_dict().items() if not k.startswith("gate")})
    x_BFD = randn(5, 4, 3)
    assert torch.equal(block(x_BFD, None if context is None else randn(5, 2, 3)), plain(x_BFD))
    assert sorted(plain.explain(x_BFD)) == ["bilinear"]


def test_gates_stay_between_zero_and_two() -> None:
    shown = final_mlp(CONTEXT, CONTEXT).explain(randn(50, 4, 3), 20 * randn(50, 2, 3), 20 * randn(50, 2, 3))
    for name in ("gate_1", "gate_2"):
        assert shown[name].shape == (50, 4, 3)
        assert (shown[name] > 0).all()
        assert (shown[name] < 2).all()
        assert shown[name].min() < 0.5
        assert shown[name].max() > 1.5


def test_without_context_the_gate_is_the_same_for_every_row() -> None:
    block = final_mlp()
    assert block.gate_1 is not None
    assert block.gate_1.vector is not None
    assert not block.gate_1.vector.any()
    gates = block.explain(randn(5, 4, 3))["gate_1"]
    assert gates.shape == (5, 4, 3)
    assert torch.equal(gates, gates[:1].expand(5, 4, 3))
    assert not torch.equal(gates[0], torch.ones(4, 3))


def test_a_context_gate_changes_with_the_context_only() -> None:
    block = final_mlp(CONTEXT)
    context = randn(5, 2, 3)
    gates = block.explain(randn(5, 4, 3), context)["gate_1"]
    assert torch.equal(block.explain(randn(5, 4, 3), context)["gate_1"], gates)
    context[2, 1] += 1.0
    moved = block.explain(randn(5, 4, 3), context)["gate_1"]
    assert [bool((moved[row] != gates[row]).any()) for row in range(5)] == [False, False, True, False, False]


def test_zero_bilinear_weight_is_concatenation() -> None:
    block, concat = final_mlp(), final_mlp(fusion="concat")
    assert isinstance(block.fusion, BilinearFusion)
    nn.init.zeros_(block.fusion.weight)
    concat.load_state_dict({k: v for k, v in block.state_dict().items() if k != "fusion.weight"})
    x_BFD = randn(5, 4, 3)
    torch.testing.assert_close(block(x_BFD), concat(x_BFD), rtol=0, atol=1e-12)
    o_1, o_2 = block.mlp_1(gated(block.gate_1, x_BFD)), block.mlp_2(gated(block.gate_2, x_BFD))
    expected = block.fusion.linear_1(o_1) + block.fusion.linear_2(o_2)
    torch.testing.assert_close(concat(x_BFD), expected, rtol=0, atol=1e-12)


def gated(gate: FeatureGate | None, x_BFD: Tensor) -> Tensor:
    assert gate is not None
    gated_BFD: Tensor = gate(None) * x_BFD
    return gated_BFD


@pytest.mark.parametrize("fusion", ["sum", "product"])
def test_sum_and_product_end_in_one_linear_layer(fusion: Literal["sum", "product"]) -> None:
    block = final_mlp(use_fs=False, mlp1=MLP.Config(hidden_units=(4,)), fusion=fusion)
    x_BFD = randn(5, 4, 3)
    weight, bias = linears(block.fusion)[0]
    o_1, o_2 = (m(x_BFD)[:, 0].detach().numpy() for m in (block.mlp_1, block.mlp_2))
    expected = []
    for a, b in zip(o_1, o_2, strict=True):
        fused = [float(p) + float(q) if fusion == "sum" else float(p) * float(q) for p, q in zip(a, b, strict=True)]
        expected.append(sum(float(w) * v for w, v in zip(weight[0], fused, strict=True)) + float(bias[0]))
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].detach().numpy(), expected, rtol=0, atol=1e-10)
    assert block.explain(x_BFD) == {}


def test_dual_mlp_is_the_sum_of_two_networks() -> None:
    block = final_mlp(use_fs=False, fusion="concat")
    assert isinstance(block.fusion, LinearFusion)
    x_BFD = randn(5, 4, 3)
    last = linears(block.fusion)
    expected = []
    for x in x_BFD.numpy():
        one = mlp(x, linears(block.mlp_1), "relu", last[0])
        two = mlp(x, linears(block.mlp_2), "relu", last[1])
        expected.append(float(one[0]) + float(two[0]))
    np.testing.assert_allclose(block(x_BFD)[:, 0, 0].detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("fusion", ["concat", "bilinear"])
def test_swapping_the_streams_changes_nothing(fusion: Literal["concat", "bilinear"]) -> None:
    block = final_mlp(fusion=fusion)
    swapped = final_mlp(fusion=fusion, mlp1=SMALL["mlp2"], mlp2=SMALL["mlp1"])
    state = {swap(name): value for name, value in block.state_dict().items()}
    if fusion == "bilinear":
        state["fusion.weight"] = state["fusion.weight"].view(2, 4, 2).transpose(1, 2).reshape(-1, 1)
    swapped.load_state_dict(state)
    x_BFD = randn(5, 4, 3)
    torch.testing.assert_close(swapped(x_BFD), block(x_BFD), rtol=0, atol=1e-12)


def swap(name: str) -> str:
    return name.replace("_1", "_x").replace("_2", "_1").replace("_x", "_2")


def test_published_sizes() -> None:
    """Logs of FinalMLP and DualMLP on Frappe_x1 and MovielensLatest_x1, less their embedding tables."""

    def mlp_config(*units: int) -> MLP.Config:
        return MLP.Config(hidden_units=units, norm="batch")

    frappe = FinalMLP.Config(mlp1=mlp_config(400), mlp2=mlp_config(100), fs_hidden_units=(400,), num_heads=5)
    tables = (5_399 + 956 + 4_084) * 10  # the main table, and those of the gates' contexts: user and item
    assert size(FinalMLP(frappe, fields(10), fields(1), fields(1))) == 253_392 - tables
    movielens = FinalMLP.Config(mlp1=mlp_config(400), mlp2=mlp_config(800), fs_hidden_units=(800,), num_heads=10)
    assert size(FinalMLP(movielens, fields(3))) == 1_040_902 - 90_242 * 10
    dual = FinalMLP.Config(mlp1=mlp_config(400, 400, 400), mlp2=mlp_config(500, 500, 500), use_fs=False, fusion="concat")
    assert size(FinalMLP(dual, fields(10))) == 972_992 - 5_399 * 10
    dual = FinalMLP.Config(mlp1=mlp_config(400, 400, 400), mlp2=mlp_config(400), use_fs=False, fusion="concat")
    assert size(FinalMLP(dual, fields(3))) == 1_252_022 - 90_242 * 10


def test_all_zero_biases_leave_only_the_last_bias_of_a_global_gate_to_learn() -> None:
    block = final_mlp()
    for module in block.modules():
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)
    block(randn(5, 4, 3)).sum().backward()  # type: ignore[no-untyped-call]
    assert block.gate_1 is not None
    learns = [name for name, p in block.gate_1.named_parameters() if p.grad is not None and p.grad.any()]
    assert learns == ["mlp.layers.2.bias"]


def test_eval_is_deterministic_and_takes_one_row() -> None:
    mlp_config = MLP.Config(hidden_units=(8,), norm="batch", dropout=0.5)
    block = final_mlp(CONTEXT, mlp1=mlp_config, mlp2=mlp_config)
    x_BFD, context = randn(6, 4, 3), randn(6, 2, 3)
    assert not torch.equal(block(x_BFD, context), block(x_BFD, context))
    block.eval()
    y_B11 = block(x_BFD, context)
    assert torch.equal(block(x_BFD, context), y_B11)
    torch.testing.assert_close(block(x_BFD[:1], context[:1]), y_B11[:1], rtol=0, atol=1e-12)


def test_contexts_compile_and_export() -> None:
    block = FinalMLP(FinalMLP.Config(**SMALL), LAYOUT, CONTEXT, FieldLayout(("item",), 5)).eval()
    inputs = (torch.randn(6, 4, 3), torch.randn(6, 2, 3), torch.randn(6, 1, 5))
    expected = block(*inputs)
    compiled = torch.compile(block, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(*inputs), expected)
    rows = {0: torch.export.Dim("rows")}
    exported = torch.export.export(block, inputs, dynamic_shapes=(rows, rows, rows)).module()
    torch.testing.assert_close(exported(*(t[:3] for t in inputs)), expected[:3])


def test_config_errors() -> None:
    with pytest.raises(ConfigError, match=r"FinalMLP\.mlp2\.output_dim is 1; expected None"):
        FinalMLP.Config(mlp2=MLP.Config(output_dim=1))
    with pytest.raises(ConfigError, match=r"FinalMLP\.num_heads is 0"):
        FinalMLP.Config(num_heads=0)
    with pytest.raises(ConfigError, match=r"FinalMLP\.fs_hidden_units is 0"):
        FinalMLP.Config(fs_hidden_units=(0,))
    with pytest.raises(ConfigError, match="num_heads is 3, which does not divide the fused widths 8 and 4"):
        final_mlp(num_heads=3)
    with pytest.raises(ConfigError, match="mlp1 ends with 8 and mlp2 with 4"):
        final_mlp(fusion="sum")
    with pytest.raises(ConfigError, match="use_fs is False"):
        final_mlp(CONTEXT, use_fs=False)


def test_context_and_layout_go_together() -> None:
    x_BFD, context = randn(5, 4, 3), randn(5, 2, 3)
    with pytest.raises(ConfigError, match="built for a context but got none"):
        final_mlp(CONTEXT)(x_BFD)
    with pytest.raises(ConfigError, match="built without its layout"):
        final_mlp()(x_BFD, context)
