"""The context computed once: the same scores as with the context in every row, for every preset; and what is hoisted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn

from ctrlib.batch import Batch, Output, Ragged
from ctrlib.config import ConfigError
from ctrlib.hoisting import Hoisted, Side, export_model, fuse, fusing, hoist
from ctrlib.models.ctr import ModelComponent
from ctrlib.models.presets import PRESETS
from tests.models.small import rows, take
from tests.models.test_contract import model

SEQUENCES = (("history", False),)
CONTEXT = Side((0, 2), (1,), ("history",))  # user and hour, age, the clicks; item, price and time are the candidate's
CASES = [(name, preset.flavours[-1]) for name, preset in PRESETS.items()]


def hoisted(
    m: nn.Module, side: Side = CONTEXT, dtype: torch.dtype = torch.float64
) -> tuple[fx.GraphModule, tuple[Hoisted, ...]]:
    batch = rows(4)
    return hoist(export_model(m, replace(batch, dense=batch.dense.to(dtype)), SEQUENCES), side, SEQUENCES)


def both(
    m: nn.Module, program: fx.GraphModule, count: int, seed: int, side: Side = CONTEXT, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor]:
    """Logits of candidates with the context in every row, and with the context once."""
    batch = rows(count, seed=seed)
    one = take(batch, [seed % count])
    sparse, dense = batch.sparse.clone(), batch.dense.to(dtype)
    here, numbers = list(side.sparse), list(side.dense)
    sparse[:, here], dense[:, numbers] = one.sparse[:, here], one.dense[:, numbers].to(dtype)
    bag = batch.sequences["history"]
    if "history" in side.sequences:
        bag = one.sequences["history"]
        tiled = Ragged(bag.values.repeat(count), (torch.arange(count + 1) * len(bag.values)).to(torch.int32))
    else:
        tiled = bag
    there = [i for i in range(3) if i not in here]
    left = [i for i in range(3) if i not in numbers]
    with torch.no_grad():
        expected = m(Batch(sparse=sparse, dense=dense, sequences={"history": tiled})).logits
        shown = program(
            one.sparse[:, here], one.dense[:, numbers].to(dtype), sparse[:, there], dense[:, left], bag.values, bag.offsets
        )
    return expected, shown


@pytest.mark.parametrize(("name", "flavour"), CASES)
def test_every_preset_scores_as_with_the_context_in_every_row(name: str, flavour: str) -> None:
    m = model(name, flavour).double().requires_grad_(False)  # type: ignore[arg-type]
    program, found = hoisted(m)
    for count, seed in ((6, 0), (1, 1), (9, 2)):  # of some the history is empty
        expected, shown = both(m, program, count, seed)
        assert expected.shape == shown.shape
        torch.testing.assert_close(shown, expected, rtol=1e-9, atol=1e-9)
    assert all(0 <= h.share <= 1 and h.multiplications > 0 for h in found)


@pytest.mark.parametrize(
    "side",
    [
        Side((0,), (), ()),
        Side((), (0, 2), ()),
        Side((0, 1, 2), (0, 1, 2), ()),
        Side((), (), ("history",)),
        Side((1, 2), (0, 1, 2), ("history",)),
    ],
)
@pytest.mark.parametrize("name", ["deepfm", "final_mlp", "autoint", "din"])
def test_any_split_of_the_fields(name: str, side: Side) -> None:
    m = model(name, "paper").double().requires_grad_(False)
    program, _ = hoisted(m, side)
    for seed in range(2):
        expected, shown = both(m, program, 5, seed, side)
        torch.testing.assert_close(shown, expected, rtol=1e-9, atol=1e-9)


def test_what_is_hoisted_of_an_mlp() -> None:
    m = model("dnn", "paper").requires_grad_(False)
    program, found = hoisted(m, dtype=torch.float32)
    first, *others = [h for h in found if h.operation == "linear"]
    assert first.share == 4 / 7  # two categories, one number and the history, of seven tokens
    assert first.multiplications == 7 * 4 * 8
    assert [h.share for h in others] == [0.0] * len(others)
    expected, shown = both(m, program, 9, 0, dtype=torch.float32)
    torch.testing.assert_close(shown, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["dnn", "dcnv2", "autoint", "final_mlp", "hiformer", "din", "aw_moe"])
def test_packed_layers_score_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fusing, "_MIN_OUT", 2)  # the layers of these models are narrow
    m = model(name, "paper").requires_grad_(False)
    program, _ = hoisted(m, dtype=torch.float32)
    layers = [n for n in program.graph.nodes if n.target is torch.ops.aten.linear.default and n.args[1].op == "get_attr"]
    followed = sum(len(n.users) == 1 and next(iter(n.users)).target is torch.ops.aten.relu.default for n in layers)
    narrow = sum(len(program.get_buffer(n.args[1].target)) < 2 for n in layers)
    fused = fuse(program)
    packed = [n for n in fused.graph.nodes if n.target is torch.ops.mkldnn._linear_pointwise.default]
    assert len(packed) == len(layers) - narrow > 0
    assert sum(n.args[3] == "relu" for n in packed) == followed
    assert {name for name, _ in fused.named_buffers()} == {n.target for n in fused.graph.nodes if n.op == "get_attr"}
    for count, seed in ((6, 0), (1, 1), (9, 2)):
        expected, shown = both(m, fused, count, seed, dtype=torch.float32)
        torch.testing.assert_close(shown, expected, rtol=0, atol=1e-6)


def test_narrow_layers_and_float64_stay_as_they_are() -> None:
    for dtype in (torch.float32, torch.float64):
        program, _ = hoisted(model("dnn", "paper").to(dtype).requires_grad_(False), dtype=dtype)
        fused = fuse(program)
        assert all(n.target is not torch.ops.mkldnn._linear_pointwise.default for n in fused.graph.nodes)


def test_pieces_that_are_joined_anyway_are_joined_before_they_grow() -> None:
    """AutoInt's four projections of a first layer: of one joined tensor of embeddings, not four joined ones."""
    program, found = hoisted(model("autoint", "paper").double().requires_grad_(False))
    named = [str(n.target) for n in program.graph.nodes]
    assert sum("_rows_of" in name for name in named) == 1
    assert sum(name == "aten.embedding.default" for name in named) >= 2  # the context's rows are still looked up once
    assert {h.share for h in found} == {0.0}


def test_tables_are_not_copied() -> None:
    m = model("deepfm", "paper").requires_grad_(False)
    program, _ = hoisted(m, dtype=torch.float32)
    places = {tensor.data_ptr() for tensor in program.buffers()}
    assert all(table.weight.data_ptr() in places for table in m.modules() if isinstance(table, nn.Embedding))


class Strange(nn.Module):
    """Operations without a rule, between operations that have one."""

    def __init__(self, inner: ModelComponent) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, batch: Batch) -> Output:
        x_BFD = self.inner.embedding(batch)
        x_BFD = torch.cumsum(x_BFD * 2, dim=1) + torch.flip(x_BFD, (1,))
        return Output((x_BFD.sort(1).values.relu() @ x_BFD.mT).amax((1, 2)) + torch.logsumexp(x_BFD.flatten(1), 1))


class Own(nn.Module):
    """An operation on the tokens."""

    def __init__(self, do: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = model("dnn", "paper")
        self.do = do

    def forward(self, batch: Batch) -> Output:
        return Output(self.do(self.inner.embedding(batch)).square().flatten(1).sum(1))


@pytest.mark.parametrize(
    "places",
    [
        [0, 0, 1, 1, 2, 2, 2],  # places of both sides
        [0, 1, 2, 3, 0, 1, 2],
        [2, 0, 2, 1, 3, 0, 3],  # as far as the sides go, none
        [2, 0, 1, 1, 0, 0, 0],
    ],
)
def test_adding_by_index(places: list[int]) -> None:
    def add(x_BFD: Tensor) -> Tensor:
        return x_BFD.new_zeros(x_BFD.shape[0], 4, x_BFD.shape[2]).index_add(1, torch.tensor(places), x_BFD)

    m = Own(add).double().requires_grad_(False).eval()
    program, _ = hoisted(m)
    for count, seed in ((6, 0), (1, 1)):
        expected, shown = both(m, program, count, seed)
        torch.testing.assert_close(shown, expected, rtol=1e-9, atol=1e-9)


def to_a_view(x_BFD: Tensor) -> Tensor:
    y_BFD = x_BFD.clone()
    y_BFD[:, :3].mul_(2)
    return y_BFD


def with_a_view(x_BFD: Tensor) -> Tensor:
    y_BFD = x_BFD.clone()
    part_BFD = y_BFD[:, :3]
    y_BFD.add_(1)
    return part_BFD


def to_a_place(x_BFD: Tensor) -> Tensor:
    y_BFD = x_BFD.clone()
    y_BFD[:, 0] = 0
    return y_BFD


@pytest.mark.parametrize("do", [to_a_view, with_a_view, to_a_place])
def test_writes_to_views_are_refused(do: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(ConfigError, match="writes in place to a view"):
        hoisted(Own(do).double().requires_grad_(False).eval())


@pytest.mark.parametrize("do", [lambda x: (x * 2).add_(1), lambda x: torch.relu_(x * 2) + x])
def test_other_writes_in_place(do: Callable[[Tensor], Tensor]) -> None:
    m = Own(do).double().requires_grad_(False).eval()
    expected, shown = both(m, hoisted(m)[0], 6, 0)
    torch.testing.assert_close(shown, expected, rtol=1e-9, atol=1e-9)


def test_operations_without_a_rule_read_the_joined_pieces() -> None:
    m = Strange(model("dnn", "paper")).double().requires_grad_(False).eval()
    program, _ = hoisted(m)
    expected, shown = both(m, program, 6, 0)
    torch.testing.assert_close(shown, expected, rtol=1e-9, atol=1e-9)
