"""Arithmetic without padding against loops over rows, in memory that goes with the tokens, compiled and exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils._python_dispatch import TorchDispatchMode

from ctrlib import ragged

LENGTHS = [(3, 0, 1, 5), (0, 0, 2), (4,), (0,), (0, 0, 0), (), (1, 1, 1, 0), (0, 7, 0, 0, 2, 0)]
every_shape = pytest.mark.parametrize("counts", LENGTHS, ids=str)


def offsets(counts: tuple[int, ...]) -> Tensor:
    return torch.tensor(np.cumsum([0, *counts]), dtype=torch.int32)


def tokens(counts: tuple[int, ...], *shape: int) -> Tensor:
    return torch.randn(sum(counts), *shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def rows(x_N: Tensor, counts: tuple[int, ...]) -> list[Tensor]:
    return list(torch.split(x_N, list(counts))) if counts else []


def stacked(each: list[Tensor], *shape: int) -> Tensor:
    return torch.stack(each) if each else torch.zeros(0, *shape, dtype=torch.float64)


@every_shape
def test_rows_and_places_of_tokens(counts: tuple[int, ...]) -> None:
    o = offsets(counts)
    ids = ragged.segment_ids(o, sum(counts))
    assert ids.dtype == torch.int64
    assert ids.tolist() == [b for b, n in enumerate(counts) for _ in range(n)]
    assert ragged.positions(o, ids).tolist() == [i for n in counts for i in range(n)]
    assert ragged.lengths(o).tolist() == list(counts)
    assert ragged.longest(o) == max(counts, default=0)


@every_shape
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_sums_means_and_maxima(counts: tuple[int, ...], shape: tuple[int, ...]) -> None:
    x, o = tokens(counts, *shape), offsets(counts)
    zero = torch.zeros(shape, dtype=torch.float64)
    laws: list[tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor], Tensor]]] = [
        (ragged.segment_sum, lambda r: r.sum(0)),
        (ragged.segment_mean, lambda r: r.mean(0)),
        (ragged.segment_max, lambda r: r.amax(0)),
    ]
    for function, law in laws:
        want = stacked([law(r) if len(r) else zero for r in rows(x, counts)], *shape)
        torch.testing.assert_close(function(x, o), want)
    weight = tokens(counts)
    weighted = rows((x.flatten(1) * weight[:, None]).reshape(x.shape) if shape else x * weight, counts)
    torch.testing.assert_close(ragged.segment_sum(x, o, weight), stacked([r.sum(0) for r in weighted], *shape))


@every_shape
@pytest.mark.parametrize("shape", [(), (3,)])
def test_softmax(counts: tuple[int, ...], shape: tuple[int, ...]) -> None:
    x, o = 300 * tokens(counts, *shape), offsets(counts)
    found = ragged.segment_softmax(x, o, ragged.segment_ids(o, len(x)))
    assert found.isfinite().all()
    want = [r.softmax(0) for r in rows(x, counts)]
    torch.testing.assert_close(found, torch.cat(want) if want else x)


@every_shape
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_padding_and_back(counts: tuple[int, ...], shape: tuple[int, ...]) -> None:
    x, o = tokens(counts, *shape), offsets(counts)
    ids = ragged.segment_ids(o, len(x))
    block, there = ragged.to_padded(x, o, ids)
    size = max(counts, default=0)
    assert block.shape == (len(counts), size, *shape)
    assert there.tolist() == [[i < n for i in range(size)] for n in counts]
    assert torch.equal(block[there], x)
    assert not block[~there].any()
    assert torch.equal(ragged.from_padded(block, o, ids), x)
    wider, there = ragged.to_padded(x, o, ids, length=size + 2)
    assert torch.equal(wider[:, :size], block)
    assert not wider[:, size:].any()
    assert not there[:, size:].any()
    assert torch.equal(ragged.from_padded(wider, o, ids), x)


@every_shape
def test_expand(counts: tuple[int, ...]) -> None:
    ids = ragged.segment_ids(offsets(counts), sum(counts))
    for shape in ((), (3,), (2, 3)):
        x = torch.randn(len(counts), *shape)
        assert torch.equal(ragged.expand(x, ids), x[ids])


def attention(x_ND: Tensor, q_BD: Tensor, o: Tensor) -> Tensor:
    """Softmax attention of a query over the tokens of its row."""
    ids = ragged.segment_ids(o, x_ND.shape[0])
    scores_N = (x_ND * ragged.expand(q_BD, ids)).sum(1)
    return ragged.segment_sum(x_ND, o, ragged.segment_softmax(scores_N, o, ids))


def padded_attention(x_BLD: Tensor, there_BL: Tensor, q_BD: Tensor) -> Tensor:
    scores_BL = torch.einsum("bld,bd->bl", x_BLD, q_BD).masked_fill(~there_BL, -torch.inf)
    weight_BL = torch.where(there_BL, scores_BL.softmax(1).nan_to_num(0), 0)
    return torch.einsum("bl,bld->bd", weight_BL, x_BLD)


def test_ragged_is_padded_and_gradients_too() -> None:
    counts = tuple(np.random.default_rng(0).integers(0, 12, 40).tolist())
    o = offsets(counts)
    x = tokens(counts, 5).requires_grad_()
    q = torch.randn(len(counts), 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    block, there = ragged.to_padded(x, o, ragged.segment_ids(o, len(x)))
    found, want = attention(x, q, o), padded_attention(block, there, q)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-13)
    floats = attention(x.float(), q.float(), o), padded_attention(block.float(), there, q.float())
    torch.testing.assert_close(*floats, rtol=0, atol=1e-6)
    weights = torch.randn_like(want)
    grads = [torch.autograd.grad((y * weights).sum(), (x, q)) for y in (found, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_are_right() -> None:
    counts = (3, 0, 1, 4)
    o, ids = offsets(counts), ragged.segment_ids(offsets(counts), 8)
    x, w = tokens(counts, 2).requires_grad_(), tokens(counts).requires_grad_()
    checks: list[tuple[Callable[..., Any], tuple[Tensor, ...]]] = [
        (lambda x, w: ragged.segment_sum(x, o, w), (x, w)),
        (lambda x: ragged.segment_mean(x, o), (x,)),
        (lambda x: ragged.segment_max(x, o), (x,)),
        (lambda x: ragged.segment_softmax(x, o, ids), (x,)),
        (lambda x: ragged.to_padded(x, o, ids)[0], (x,)),
        (lambda x: ragged.expand(ragged.segment_sum(x, o), ids), (x,)),
        (lambda x: ragged.from_padded(ragged.to_padded(x, o, ids)[0], o, ids), (x,)),
    ]
    for function, inputs in checks:
        assert torch.autograd.gradcheck(function, inputs)


def test_nothing_leaks_from_one_row_to_another() -> None:
    counts = (3, 2, 4)
    o, x = offsets(counts), tokens(counts, 2)
    other = x.clone()
    other[3:5] = 1e6
    q = torch.ones(3, 2, dtype=torch.float64)
    found, changed = attention(x, q, o), attention(other, q, o)
    assert torch.equal(found[[0, 2]], changed[[0, 2]])


class Largest(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the largest tensor that anything made."""

    numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, Tensor):
                self.numel = max(self.numel, t.numel())
        return out


def test_memory_goes_with_the_tokens() -> None:
    counts = (2000, *([1] * 500))  # padded, it would be 501 · 2000 tokens
    o, x, q = offsets(counts), torch.randn(2500, 8, requires_grad=True), torch.randn(501, 8, requires_grad=True)
    with Largest() as ragged_memory:  # type: ignore[no-untyped-call]
        attention(x, q, o).sum().backward()  # type: ignore[no-untyped-call]
    assert ragged_memory.numel == 2500 * 8
    with Largest() as padded_memory:  # type: ignore[no-untyped-call]
        ragged.to_padded(x, o, ragged.segment_ids(o, 2500))
    assert padded_memory.numel == 501 * 2000 * 8


def test_compiles_to_one_graph_and_exports() -> None:
    class Attention(nn.Module):
        def forward(self, x_ND: Tensor, q_BD: Tensor, o: Tensor) -> Tensor:
            pooled = torch.cat([ragged.segment_mean(x_ND, o), ragged.segment_max(x_ND, o)], dim=1)
            return torch.cat([attention(x_ND, q_BD, o), pooled], dim=1)

    def inputs(counts: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
        return tokens(counts, 3).float(), torch.randn(len(counts), 3), offsets(counts)

    torch.compiler.reset()
    module = Attention()
    compiled = torch.compile(module, fullgraph=True, backend="eager", dynamic=True)
    sizes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, {0: Dim.DYNAMIC})
    program = torch.export.export(module, inputs((3, 0, 2, 4)), dynamic_shapes=sizes).module()
    trained = torch.compile(module, fullgraph=True, backend="aot_eager", dynamic=True)
    for counts in ((3, 0, 2, 4), (1, 5), (0, 0, 3, 0, 9, 2), (2, 0)):
        x, q, o = inputs(counts)
        leaves = x.clone().requires_grad_(), q.clone().requires_grad_()
        found, want = (torch.autograd.grad(run(*leaves, o).square().sum(), leaves) for run in (trained, module))
        for a, b in zip(found, want, strict=True):
            torch.testing.assert_close(a, b)
        torch.testing.assert_close(compiled(x, q, o), module(x, q, o))
        torch.testing.assert_close(program(x, q, o), module(x, q, o))
