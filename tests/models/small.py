"""A layout with every kind of column, batches of it, and models shrunk to a few units, for the tests of models."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from typing import Any

import torch

from ctrlib.batch import Batch, Output, Ragged, embedding_parameters
from ctrlib.config import from_json, to_json
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.hiformer import HiformerModel
from ctrlib.models.optinter import OptInter
from ctrlib.models.presets import COMPONENTS
from ctrlib.schema import BatchLayout, DenseColumn, HistoryColumn, SequenceColumn, SparseColumn

LAYOUT = BatchLayout(
    sparse=(SparseColumn("user", 9, "user"), SparseColumn("item", 12, "item"), SparseColumn("hour", 5, "hour")),
    dense=(DenseColumn("price"), DenseColumn("age", 0, True), DenseColumn("time", 4, True)),
    sequences=(SequenceColumn("history", 12, "item", "mean", True),),
    histories=(HistoryColumn("history", ("history",), ("item",)),),
)
WIDTHS = {"hidden_units": [8, 8], "fs_hidden_units": [8], "head_dim": 4, "num_neurons": 4, "dim": 4}
WIDTHS |= {"key_dim": 4, "value_dim": 3, "rank_key": 5, "rank_value": 6}
WIDTHS |= {"num_tokens": 4, "token_dim": 8, "num_fmb": 3, "num_lcb": 4, "fm_rank": 3, "num_orders": [5, 3]}
LARGE, SMALL = 16, 8  # any other size above the one becomes the other


def rows(count: int, *, seed: int = 0, num_labels: int = 1) -> Batch:
    """Random rows of few groups; missing numbers, padding, OOV and an empty sequence among them."""
    g = torch.Generator().manual_seed(1000 * seed + count)
    sizes = torch.tensor([c.vocab_size for c in LAYOUT.sparse])
    sparse = (torch.rand(count, len(sizes), generator=g) * sizes).to(torch.int32)
    dense = torch.randn(count, 3, generator=g)
    dense[:, 2] = torch.rand(count, generator=g) * 4
    dense[torch.rand(count, 3, generator=g) < 0.2] = torch.nan
    lengths = torch.randint(0, 4, (count,), generator=g)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(torch.int32)
    values = torch.randint(0, 12, (int(offsets[-1]),), generator=g, dtype=torch.int32)
    labels = torch.randint(0, 2, (count, num_labels), generator=g).float()
    group = torch.randint(0, 1 + count // 2, (count,), generator=g)
    sequences = {"history": Ragged(values, offsets)}
    return Batch(sparse=sparse, dense=dense, sequences=sequences, labels=labels, group=group)


def take(batch: Batch, chosen: list[int]) -> Batch:
    """Some rows of a batch, row by row."""
    ragged = batch.sequences["history"]
    lists = [ragged.values[ragged.offsets[i] : ragged.offsets[i + 1]] for i in chosen]
    offsets = torch.tensor([0, *(len(values) for values in lists)]).cumsum(0).to(torch.int32)
    return Batch(
        sparse=batch.sparse[chosen],
        dense=batch.dense[chosen],
        sequences={"history": Ragged(torch.cat(lists), offsets)},
        labels=None if batch.labels is None else batch.labels[chosen],
        group=None if batch.group is None else batch.group[chosen],
    )


def shrunk(config: ModelComponent.Config, **changes: Any) -> ModelComponent.Config:
    """The same model with few units; ``changes`` sets further options wherever they occur."""

    if isinstance(config, HiformerModel.Config):  # layer norms over 4 coordinates, many in a row, magnify every rounding
        changes = {"dim": 8} | changes

    def walk(node: Any) -> Any:
        if isinstance(node, dict):
            sizes = WIDTHS | changes | ({"num_heads": 2} if node.get("type") in ("FinalMLP", "FTTransformer", "BST") else {})
            # Width 1 is what makes a table one of first-order weights.
            return {k: sizes[k] if k in sizes and (k, v) != ("dim", 1) else walk(v) for k, v in node.items()}
        if isinstance(node, list):
            return [walk(item) for item in node]
        return SMALL if isinstance(node, int) and node > LARGE else node

    return from_json(walk(to_json(config)), ModelComponent.Config, COMPONENTS)


def with_crosses(layout: BatchLayout) -> BatchLayout:
    """The layout with the cross of every two sparse columns, which :func:`crossed` adds to batches."""
    crosses = [
        SparseColumn(f"{a.name}*{b.name}", a.vocab_size * b.vocab_size, f"{a.name}*{b.name}", (a.name, b.name))
        for a, b in combinations(layout.sparse, 2)
    ]
    return replace(layout, sparse=(*layout.sparse, *crosses))


def crossed(batch: Batch, layout: BatchLayout) -> Batch:
    """A batch of ``layout`` as one of ``with_crosses(layout)``: every pair of two known values is a value of its own."""
    columns = [batch.sparse]
    for (i, a), (j, b) in combinations(enumerate(layout.sparse), 2):
        x_B1, y_B1 = batch.sparse[:, i : i + 1], batch.sparse[:, j : j + 1]
        known = (x_B1 >= 2) & (y_B1 >= 2) & (x_B1 < a.vocab_size) & (y_B1 < b.vocab_size)
        columns.append(torch.where(known, x_B1 * b.vocab_size + y_B1, 1).to(batch.sparse.dtype))
    return replace(batch, sparse=torch.cat(columns, dim=1))


class Crossing(OptInter):
    """OptInter on batches without crosses, which it adds itself, so that it stands the tests of all models."""

    def __init__(self, config: OptInter.Config, layout: BatchLayout) -> None:
        super().__init__(config, with_crosses(layout))
        self.layout = layout

    def forward(self, batch: Batch) -> Output:
        return super().forward(crossed(batch, self.layout))


def make(config: ModelComponent.Config, layout: BatchLayout = LAYOUT, seed: int = 1) -> ModelComponent:
    """The model from a fixed seed, in eval mode; OptInter as :class:`Crossing`."""
    torch.manual_seed(seed)
    return (Crossing(config, layout) if isinstance(config, OptInter.Config) else build_model(config, layout)).eval()


def awake(model: ModelComponent) -> ModelComponent:
    """The model with all parameters but padding rows moved: what starts at zero may hold back its neighbour's gradient."""
    torch.manual_seed(2)
    tables = {id(table) for table in embedding_parameters(model)}
    for p in model.parameters():
        p.data += 0.3 * torch.randn_like(p) * ((p != 0) if id(p) in tables else 1)
    return model
