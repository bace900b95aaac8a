"""Arithmetic on sequences without padding: N tokens of B rows one after another, row b from ``offsets[b]`` on.

Memory is proportional to N, the tokens that are there; :func:`to_padded` alone is not. All functions but it and :func:`longest`
compile without graph breaks and export with dynamic N and B. An empty row has the sum, mean and maximum 0.

Shape letters: B rows, N tokens, L the longest row; ``*`` any further axes.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor


def lengths(offsets_B1: Tensor) -> Tensor:
    """Tokens of every row. Shape: [B + 1] → [B]."""
    return offsets_B1[1:] - offsets_B1[:-1]


def segment_ids(offsets_B1: Tensor, num_tokens: int) -> Tensor:
    """The row of every token.

    Args:
        offsets_B1: [B + 1].
        num_tokens: N, the length of what the offsets cut.

    Returns:
        [N] int64.
    """
    # Counting the rows that end at or before a token needs no size that only the values know, unlike repeat_interleave.
    ends_B = offsets_B1[1:].long()
    count = torch.zeros(num_tokens + 1, dtype=torch.int64, device=offsets_B1.device)
    return count.index_add(0, ends_B, torch.ones_like(ends_B))[:num_tokens].cumsum(0)


def positions(offsets_B1: Tensor, rows_N: Tensor) -> Tensor:
    """The place of every token in its row, from 0. ``rows_N`` are :func:`segment_ids`. Returns [N] int64."""
    at = torch.arange(rows_N.shape[0], device=rows_N.device)
    return at - offsets_B1.long().index_select(0, rows_N)


def expand(x_B: Tensor, rows_N: Tensor) -> Tensor:
    """The value of its row for every token. ``rows_N`` are :func:`segment_ids`. Shape: [B, *], [N] → [N, *]."""
    apply: Any = _Expand.apply
    return cast(Tensor, apply(x_B, rows_N))


def segment_sum(x_N: Tensor, offsets_B1: Tensor, weight_N: Tensor | None = None) -> Tensor:
    """The sum of the tokens of every row, each times its weight if there are weights. Shape: [N, *], [B + 1], [N] → [B, *]."""
    if weight_N is not None:
        x_N = x_N * weight_N.reshape(-1, *[1] * (x_N.dim() - 1))
    apply: Any = _Sum.apply
    return cast(Tensor, apply(x_N, offsets_B1))


def segment_mean(x_N: Tensor, offsets_B1: Tensor) -> Tensor:
    """The mean of the tokens of every row. Shape: [N, *], [B + 1] → [B, *]."""
    total_B = segment_sum(x_N, offsets_B1)
    return total_B / lengths(offsets_B1).clamp(min=1).reshape(-1, *[1] * (x_N.dim() - 1))


def segment_max(x_N: Tensor, offsets_B1: Tensor) -> Tensor:
    """The largest value of every row, coordinate by coordinate. Shape: [N, *], [B + 1] → [B, *]."""
    return _bags(x_N, offsets_B1, "max")


def segment_softmax(scores_N: Tensor, offsets_B1: Tensor, rows_N: Tensor) -> Tensor:
    """exp(s_n) / Σ exp(s_m) over the tokens m of the row of n, coordinate by coordinate. Shape: [N, *] → [N, *].

    Args:
        scores_N: [N, *].
        offsets_B1: [B + 1].
        rows_N: their :func:`segment_ids`.
    """
    highest_N = expand(segment_max(scores_N.detach(), offsets_B1), rows_N)  # a constant of the row changes nothing
    raised_N = (scores_N - highest_N).exp()
    return raised_N / expand(segment_sum(raised_N, offsets_B1), rows_N)


def longest(offsets_B1: Tensor) -> int:
    """L, as a number: on a GPU it waits for the device, and a compiled graph breaks here."""
    return int(lengths(offsets_B1).max()) if offsets_B1.shape[0] > 1 else 0


def to_padded(x_N: Tensor, offsets_B1: Tensor, rows_N: Tensor, length: int | None = None) -> tuple[Tensor, Tensor]:
    """The tokens in a block with zeros behind shorter rows, for what needs all tokens of a row at once, such as self-attention.

    Memory is B·L, so one long row costs as much as if all were.

    Args:
        x_N: [N, *].
        offsets_B1: [B + 1].
        rows_N: their :func:`segment_ids`.
        length: L if it is known, at least that of the longest row; ``None``: :func:`longest`.

    Returns:
        [B, L, *], and [B, L] booleans, true where there is a token.
    """
    size = longest(offsets_B1) if length is None else length
    count = offsets_B1.shape[0] - 1
    place_N = rows_N * size + positions(offsets_B1, rows_N)
    block = x_N.new_zeros(count * size, *x_N.shape[1:]).index_copy_(0, place_N, x_N)
    there_BL = torch.arange(size, device=x_N.device) < lengths(offsets_B1).unsqueeze(1)
    return block.reshape(count, size, *x_N.shape[1:]), there_BL


def from_padded(x_BL: Tensor, offsets_B1: Tensor, rows_N: Tensor) -> Tensor:
    """The tokens of a block one after another, the inverse of :func:`to_padded`. Shape: [B, L, *], [B + 1], [N] → [N, *]."""
    place_N = rows_N * x_BL.shape[1] + positions(offsets_B1, rows_N)
    return x_BL.flatten(0, 1).index_select(0, place_N)


def _matrix(x: Tensor) -> Tensor:
    """[N, *] → [N, product of the rest], also where N is 0."""
    return x.flatten(1) if x.dim() > 1 else x.unsqueeze(1)


def _bags(x_N: Tensor, offsets_B1: Tensor, mode: str) -> Tensor:
    """Sum or maximum over rows, as bags of an embedding table that is the tokens: in a fixed order, also on a GPU."""
    at_N = torch.arange(x_N.shape[0], device=x_N.device, dtype=offsets_B1.dtype)
    pooled = F.embedding_bag(at_N, _matrix(x_N), offsets_B1, mode=mode, include_last_offset=True)
    return pooled.reshape(offsets_B1.shape[0] - 1, *x_N.shape[1:])


# The gradient of a sum is an expansion and that of an expansion a sum. Those of torch's own functions sort the ids first
# (embedding bags), or add up in no fixed order on a GPU (index_select).
class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_N: Tensor, offsets_B1: Tensor) -> Tensor:
        ctx.save_for_backward(offsets_B1)
        ctx.num_tokens = x_N.shape[0]
        return _bags(x_N, offsets_B1, "sum")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (offsets_B1,) = ctx.saved_tensors
        return expand(grads[0], segment_ids(offsets_B1, ctx.num_tokens)), None


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_B: Tensor, rows_N: Tensor) -> Tensor:
        ctx.save_for_backward(rows_N)
        ctx.num_rows = x_B.shape[0]
        return x_B.index_select(0, rows_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (rows_N,) = ctx.saved_tensors
        offsets_B1 = torch.searchsorted(rows_N, torch.arange(ctx.num_rows + 1, device=rows_N.device))
        return segment_sum(grads[0].contiguous(), offsets_B1), None
