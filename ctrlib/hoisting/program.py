"""A model as a program of tensors, for any number of rows."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.export import Dim

from ctrlib.batch import Batch, Model, Ragged

Inputs = tuple[Tensor, ...]

EXPORTING = threading.Lock()
"""Held while torch exports: of two exports at once, the one that ends last would leave torch's flag set that one is going on,
by which torch.compile does nothing from then on, and optimizers take other paths."""


class ExportedBatch(nn.Module):
    """A model of tensors only: ``sparse``, ``dense``, then of each sequence ``values``, ``offsets`` and if nested ``inner``."""

    def __init__(self, model: Model, sequences: Sequence[tuple[str, bool]]) -> None:
        super().__init__()
        self.model = model
        self.sequences = tuple(sequences)

    def forward(self, sparse: Tensor, dense: Tensor, *ragged: Tensor) -> Tensor:
        rest = list(ragged)
        bags = {name: Ragged(rest.pop(0), rest.pop(0), rest.pop(0) if nested else None) for name, nested in self.sequences}
        return self.model(Batch(sparse=sparse, dense=dense, sequences=bags)).logits


def flat_inputs(batch: Batch, sequences: Sequence[tuple[str, bool]]) -> Inputs:
    """The tensors of a batch in the order of :class:`ExportedBatch`."""
    tensors = [batch.sparse, batch.dense]
    for name, nested in sequences:
        bag = batch.sequences[name]
        tensors += [bag.values, bag.offsets]
        if nested:
            assert bag.inner is not None
            tensors.append(bag.inner)
    return tuple(tensors)


def export_model(model: Model, batch: Batch, sequences: Sequence[tuple[str, bool]]) -> torch.export.ExportedProgram:
    """The model as a program for any number of rows, traced with a batch of several rows, none of whose sequences is empty."""
    inputs = flat_inputs(batch, sequences)
    ragged = tuple({0: Dim.DYNAMIC} for _ in inputs[2:])
    shapes = ({0: Dim.DYNAMIC}, {0: Dim.DYNAMIC}, *([ragged] if ragged else []))
    with EXPORTING, torch.no_grad():
        return torch.export.export(ExportedBatch(model, sequences), inputs, dynamic_shapes=shapes)
