"""A layout with a history of three attributes, and batches of it, for the tests of models that read histories."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch

from ctrlib.batch import Batch, Ragged
from ctrlib.schema import BatchLayout, DenseColumn, HistoryColumn, SequenceColumn, SparseColumn

FIELDS = ("hist_item", "hist_category", "hist_gap")
LAYOUT = BatchLayout(
    sparse=(
        SparseColumn("user", 9, "user"),
        SparseColumn("item", 12, "item"),
        SparseColumn("category", 5, "category"),
        SparseColumn("hour", 5, "hour"),
    ),
    dense=(DenseColumn("price"),),
    sequences=(
        SequenceColumn("hist_item", 12, "item", "mean", True),
        SequenceColumn("hist_category", 5, "category", "mean", True),
        SequenceColumn("hist_gap", 6, "hist_gap", "mean", True),
        SequenceColumn("tags", 7, "tags"),
    ),
    histories=(HistoryColumn("history", FIELDS, ("item", "category", None)),),
)
TWO_LABELS = replace(LAYOUT, labels=("click", "buy"))
Behaviour = tuple[int, int, int]


def ragged(lists: list[list[int]]) -> Ragged:
    """Lists of ids, one a row."""
    offsets = torch.tensor([0, *(len(ids) for ids in lists)]).cumsum(0).to(torch.int32)
    return Ragged(torch.tensor([i for ids in lists for i in ids], dtype=torch.int32), offsets)


def behaviours(batch: Batch) -> list[list[Behaviour]]:
    """Those of every row, oldest first."""
    columns = [batch.sequences[name] for name in FIELDS]
    ends = columns[0].offsets.tolist()
    values = list(zip(*(column.values.tolist() for column in columns), strict=True))
    return [values[a:b] for a, b in pairwise(ends)]


def with_behaviours(batch: Batch, lists: list[list[Behaviour]]) -> Batch:
    """The rows with other behaviours."""
    changed = {name: ragged([[b[i] for b in row] for row in lists]) for i, name in enumerate(FIELDS)}
    return replace(batch, sequences={**batch.sequences, **changed})


def rows(count: int, *, seed: int = 0, lengths: list[int] | None = None, num_labels: int = 1) -> Batch:
    """Random rows of a user each; without ``lengths`` the first one has no behaviours, the others up to four."""
    g = torch.Generator().manual_seed(1000 * seed + count)

    def ids(size: int, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.randint(1, size, shape, generator=g, dtype=torch.int32)

    if lengths is None:
        lengths = [0, *torch.randint(1, 5, (max(count - 1, 0),), generator=g).tolist()][:count]
    lists = [[(int(ids(12, ())), int(ids(5, ())), int(ids(6, ()))) for _ in range(n)] for n in lengths]
    batch = Batch(
        sparse=torch.stack([ids(c.vocab_size, (count,)) for c in LAYOUT.sparse], dim=1),
        dense=torch.randn(count, 1, generator=g),
        sequences={"tags": ragged([ids(7, (2,)).tolist() for _ in range(count)])},
        labels=torch.randint(0, 2, (count, num_labels), generator=g).float(),
        group=torch.arange(count),
    )
    return with_behaviours(batch, lists)
