"""One embedding table: a lookup whose gradient is a list of rows, so that an update need not walk the whole table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ctrlib import _native

_unallocated = ContextVar("unallocated", default=False)


@contextmanager
def unallocated_tables() -> Iterator[None]:
    """Tables made in this block take no memory and no time: their rows are on torch's meta device, until saved ones are loaded
    in their place by ``load_state_dict(..., assign=True)``.
    """
    token = _unallocated.set(True)
    try:
        yield
    finally:
        _unallocated.reset(token)


class EmbeddingTable(nn.Embedding):
    """[V, D] rows; row 0 is padding: read as it is (a zero vector), never trained. Shape: ids [...] → [..., D].

    With ``sparse`` (set by :func:`ctrlib.optim.build_optimizer`) the gradient of the table is a sparse tensor that holds the
    gradient of every lookup beside its id; otherwise it is as large as the table, which suits any ``torch.optim`` optimizer.

    Args:
        num_rows: V.
        dim: D.
        dtype: of the rows; by default torch's. bfloat16 halves the memory; lookups give float32. Such a table is trained by
            the row-wise optimizers only, which round stochastically.
    """

    def __init__(self, num_rows: int, dim: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(num_rows, dim, padding_idx=0, dtype=dtype, device="meta" if _unallocated.get() else None)

    def reset_parameters(self) -> None:
        """Rows as torch draws them; none on the meta device, where a draw would import torch's compiler, for over a second."""
        if not self.weight.is_meta:
            super().reset_parameters()

    def forward(self, ids: Tensor) -> Tensor:
        trained = self.weight.requires_grad and torch.is_grad_enabled()
        if (trained and not self.sparse) or torch.compiler.is_compiling() or not _native.gathers(self.weight):
            # Without its padding_idx, a sparse gradient is not copied; the row-wise optimizers leave padding out themselves.
            rows = F.embedding(ids, self.weight, None if self.sparse else 0, sparse=self.sparse)
            return rows.float() if rows.dtype == torch.bfloat16 else rows
        gather: Any = _Gather.apply if trained else _native.gather
        return cast(Tensor, gather(self.weight, ids))

    def pool(self, ids: Tensor, offsets: Tensor, mode: str, gate_N1: Tensor | None = None) -> Tensor:
        """Mean, sum or max over each stretch ``ids[offsets[b]:offsets[b + 1]]`` without its padding; [B, D], 0 where empty.

        With gates, every row is first multiplied by its own; a mean is still one over the number of rows.
        """
        if not self.sparse and gate_N1 is None:
            pooled = F.embedding_bag(ids, self.weight, offsets, mode=mode, include_last_offset=True, padding_idx=0)
            return pooled.float() if pooled.dtype == torch.bfloat16 else pooled
        rows_ND = self(torch.cat([ids.new_zeros(1), ids]))  # the first one stands for padding
        if gate_N1 is not None:
            rows_ND = rows_ND * torch.cat([gate_N1.new_ones(1, 1), gate_N1])
        at = torch.arange(1, ids.shape[0] + 1, device=ids.device, dtype=offsets.dtype) * (ids > 0)
        return F.embedding_bag(at, rows_ND, offsets, mode=mode, include_last_offset=True, padding_idx=0)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.size = weight.shape
        return _native.gather(weight, ids)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ids,) = ctx.saved_tensors
        values = grads[0].reshape(-1, ctx.size[1])
        grad = torch.sparse_coo_tensor(ids.reshape(1, -1).long(), values, ctx.size, check_invariants=False, is_coalesced=False)
        return grad, None
