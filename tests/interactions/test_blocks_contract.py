"""What holds for every interaction block, one configuration each (two where a switch changes the code path)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ctrlib.config import from_json, to_json
from ctrlib.interactions.base import Interaction, build
from ctrlib.models.presets import COMPONENTS
from tests.interactions.contract import LAYOUT, configs, derived, make, rows

CONFIGS = configs()
DERIVED = derived()
every_block = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def test_every_block_is_here() -> None:
    """At the top or inside another."""
    blocks = {name for name, component in COMPONENTS.items() if issubclass(component, Interaction)}
    text = json.dumps([to_json(config) for config in CONFIGS.values()])
    assert [name for name in sorted(blocks) if f'"type": "{name}"' not in text] == []


@every_block
def test_out_describes_the_output(config: Interaction.Config) -> None:
    block = make(config)
    assert block(rows(7)).shape == (7, block.out.num_fields, block.out.dim)
    assert all(name for name in block.out.names)
    assert len(set(block.out.names)) == block.out.num_fields


@every_block
def test_every_parameter_gets_a_gradient(config: Interaction.Config) -> None:
    block = make(config)  # in eval mode, where a bias before batch norm has an effect
    for p in block.parameters():
        p.data.add_(0.1 * torch.randn_like(p))  # what starts at zero may hold back its neighbour's first gradient
    block(rows(64).requires_grad_()).square().sum().backward()  # type: ignore[no-untyped-call]
    assert [name for name, p in block.named_parameters() if p.grad is None or not p.grad.any()] == []


@every_block
def test_rows_do_not_see_each_other(config: Interaction.Config) -> None:
    x_BFD = rows(5).requires_grad_()
    y_BFD = make(config)(x_BFD)
    # Weighted: the plain sum of what a layer norm returns is constant.
    (y_BFD[2] * torch.linspace(1, 2, y_BFD.shape[2])).sum().backward()  # type: ignore[no-untyped-call]
    assert x_BFD.grad is not None
    assert x_BFD.grad[2].any()
    assert not x_BFD.grad[[0, 1, 3, 4]].any()


@every_block
def test_batch_of_one_and_odd_batches(config: Interaction.Config) -> None:
    block, x_BFD = make(config), rows(7)
    expected = block(x_BFD)
    torch.testing.assert_close(torch.cat([block(x_BFD[i : i + 1]) for i in range(7)]), expected)
    torch.testing.assert_close(block(x_BFD[:3]), expected[:3])


@every_block
def test_state_dict_round_trip_is_exact(config: Interaction.Config) -> None:
    block = make(config)
    block.train()(rows(8))  # moves the batch norm statistics
    block.eval()
    torch.manual_seed(2)
    other = build(config, LAYOUT).eval()
    other.load_state_dict(block.state_dict())
    assert torch.equal(other(rows(5)), block(rows(5)))


@every_block
def test_config_survives_json(config: Interaction.Config) -> None:
    assert from_json(json.loads(json.dumps(to_json(config))), Interaction.Config, COMPONENTS) == config


@every_block
def test_export_with_any_number_of_rows(config: Interaction.Config) -> None:
    block = make(config)
    exported = torch.export.export(block, (rows(4),), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for count in (2, 9):
        torch.testing.assert_close(exported(rows(count)), block(rows(count)))


@every_block
def test_compiles_to_one_graph(config: Interaction.Config) -> None:
    torch.compiler.reset()  # blocks share a __call__, and only so many compiled versions of one function are kept
    block = make(config)
    torch.testing.assert_close(torch.compile(block, fullgraph=True, backend="eager")(rows(5)), block(rows(5)))


@every_block
def test_bf16_autocast(config: Interaction.Config) -> None:
    block = make(config).train()
    x_BFD = rows(32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        block(x_BFD).float().sum().backward()  # type: ignore[no-untyped-call]
        y_BFD = block.eval()(x_BFD)
    assert x_BFD.grad is not None
    assert x_BFD.grad.isfinite().all()
    expected = block(x_BFD)
    assert (y_BFD.float() - expected).abs().max() <= 0.05 * expected.abs().max()


@every_block
def test_explains_each_row_by_itself(config: Interaction.Config) -> None:
    block, x_BFD = make(config), rows(5)
    shown = block.explain(x_BFD)
    moved = x_BFD.clone()
    moved[2] += 1
    for name, value in block.explain(moved).items():
        torch.testing.assert_close(value[[0, 1, 3, 4]], shown[name][[0, 1, 3, 4]])
    for name, value in block.explain(x_BFD[1:2]).items():
        torch.testing.assert_close(value, shown[name][1:2])


@every_block
def test_axes_name_what_is_shown(config: Interaction.Config) -> None:
    block = make(config)
    shown = block.explain(rows(5))
    assert list(shown) == list(block.axes)
    for name, value in shown.items():
        assert value.shape == (5, *map(len, block.axes[name])), name
        assert value.isfinite().all(), name
        for labels in block.axes[name]:
            assert len(set(labels)) == len(labels), name
            assert all(labels), name


@every_block
def test_attention_sums_to_one(config: Interaction.Config) -> None:
    for name, value in make(config).explain(3 * rows(5)).items():
        if "attention" in name:
            assert (value >= 0).all()
            torch.testing.assert_close(value.sum(-1), torch.ones(value.shape[:-1]))


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every tensor that is computed inside."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.seen += [value for value in tree_leaves(result) if isinstance(value, Tensor)]
        return result


@pytest.mark.parametrize("name", CONFIGS)
def test_shows_what_forward_computes(name: str) -> None:
    """The numbers of every row, in any order, are those of a tensor in forward, or of a weight, which all rows share."""
    block, x_BFD = make(CONFIGS[name]), rows(5)
    with torch.no_grad(), Recorder() as recorder:
        block(x_BFD)
    tensors = [*recorder.seen, *block.parameters()]
    rowwise = [t.reshape(5, -1).sort().values for t in tensors if t.is_floating_point() and t.numel() % 5 == 0]
    shared = [t.flatten().sort().values for t in tensors if t.is_floating_point()]
    for key, value in block.explain(x_BFD).items():
        if key in DERIVED.get(name, ()):
            continue
        row = value.reshape(5, -1).sort().values
        found = any(t.shape == row.shape and torch.allclose(t, row) for t in rowwise)
        assert found or any(t.shape == row[0].shape and torch.allclose(t.expand_as(row), row) for t in shared), key


@every_block
def test_explaining_leaves_no_trace(config: Interaction.Config) -> None:
    block = make(config).train()
    next(iter(block.children()), block).eval()  # a part that stays as it is
    modes = [module.training for module in block.modules()]
    state = {name: value.clone() for name, value in block.state_dict().items()}
    x_BFD = rows(6).requires_grad_()
    generator = torch.get_rng_state()
    shown = block.explain(x_BFD)
    assert not any(value.requires_grad for value in shown.values())
    assert torch.equal(torch.get_rng_state(), generator)
    assert [module.training for module in block.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in block.state_dict().items())
    expected = block.eval()(x_BFD)
    again = block.explain(x_BFD)
    assert all(torch.equal(again[name], value) for name, value in shown.items())
    assert torch.equal(block(x_BFD), expected)
