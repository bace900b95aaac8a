"""What embedding tables take in training, told before they are built."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from ctrlib.embedding import FeatureEmbedding, RowDtype
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import BatchLayout

_FLOAT = 4  # bytes; the state of every optimizer and every dense gradient is float32


@dataclass(frozen=True, kw_only=True, slots=True)
class TableMemory:
    """Bytes by what they hold.

    Attributes:
        rows: of the tables, padding and OOV included.
        weights: of the rows.
        gradient: as large as the tables with ``embedding="dense"``; else it has only the rows of a batch, which are left out.
        state: what the optimizer keeps for every row.
        best: two copies of the weights, where there are validation rows: :func:`ctrlib.training.fit` keeps the best so far, and
            for a moment those before them too.
    """

    rows: int
    weights: int
    gradient: int
    state: int
    best: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.gradient + self.state + self.best


def table_memory(rows: int, dim: int, optimizer: OptimizerConfig, row_dtype: RowDtype = "float32") -> TableMemory:
    """Memory of a table of ``rows`` rows of width ``dim`` while it is trained.

    With V rows of width D, in numbers of 4 bytes beside the V·D weights (bfloat16: half of that):

    * ``dense``: V·D of gradient; 2·V·D of moments for ``adam`` and ``adamw``, V·D for ``adagrad`` and ``sgd`` with momentum;
    * row by row: the state that :class:`~ctrlib.rowwise.RowwiseTable` names.
    """
    values = rows * dim
    if optimizer.embedding == "dense":
        copies = {"adam": 2, "adamw": 2, "adagrad": 1, "sgd": int(optimizer.momentum > 0)}[optimizer.name]
        gradient, state = values, copies * values
    else:
        counts = {
            "sgd": 0,
            "adagrad": values,
            "rowwise_adagrad": rows,
            "lazy_adam": 2 * values,
            "rowwise_adam": values + rows,
            "adam": 2 * values + rows,
        }
        elapsed = optimizer.embedding_l2 > 0 and optimizer.embedding != "adam" and optimizer.embedding_l2_mode != "batch_rows"
        gradient, state = 0, counts[optimizer.embedding] + rows * elapsed + rows  # the last: the kernel's
    weights = values * (2 if row_dtype == "bfloat16" else _FLOAT)
    return TableMemory(rows=rows, weights=weights, gradient=gradient * _FLOAT, state=state * _FLOAT, best=2 * weights)


def cross_memory(
    layout: BatchLayout,
    dim: int,
    optimizer: OptimizerConfig,
    *,
    dims: Mapping[str, int] | None = None,
    row_dtype: RowDtype = "float32",
) -> TableMemory:
    """Memory of the tables of all crosses in training.

    Args:
        layout: of a fitted encoder (``encoder.layout``).
        dim: width of all vectors of a value together: D, and 1 more for first-order weights.
        optimizer: that trains them.
        dims: width of single vocabularies, as in the config of the embedding.
        row_dtype: likewise.
    """
    widths = dims or {}
    crosses = [c for c in layout.sparse if c.parts is not None]
    return _sum(table_memory(c.vocab_size, widths.get(c.table, dim), optimizer, row_dtype) for c in crosses)


def model_cross_memory(model: nn.Module, layout: BatchLayout, optimizer: OptimizerConfig) -> TableMemory:
    """As :func:`cross_memory`, of a given model: of all rows that it has for crosses, in whichever of its tables.

    Args:
        model: may be on the device ``meta``, where it takes no memory itself.
        layout: that it was built for.
        optimizer: that trains it.
    """
    crosses = {c.table for c in layout.sparse if c.parts is not None}
    return _sum(
        table_memory(rows_VD.shape[0], rows_VD.shape[1], optimizer, part.config.row_dtype)
        for part in model.modules()
        if isinstance(part, FeatureEmbedding)
        for name, rows_VD in part.vocabularies.items()
        if name in crosses
    )


def _sum(parts: Iterable[TableMemory]) -> TableMemory:
    each = list(parts)
    return TableMemory(
        rows=sum(m.rows for m in each),
        weights=sum(m.weights for m in each),
        gradient=sum(m.gradient for m in each),
        state=sum(m.state for m in each),
        best=sum(m.best for m in each),
    )
