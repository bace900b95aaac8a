"""What a model reads and what it returns.

Shape letters, used as suffixes of tensor names everywhere: B rows, F fields, D embedding dim, L sequence length, H heads,
K experts, T tasks, C classes, E edges.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Protocol

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Ragged:
    """B sequences of different lengths without padding.

    ``values`` [N] int32 are the ids of all rows one after another; row b owns ``values[offsets[b]:offsets[b + 1]]``
    (``offsets`` [B + 1] int32). Of a nested sequence, of several values for each of M behaviours, the offsets count behaviours,
    and ``inner`` [M + 1] int32 cuts the values: behaviour m owns ``values[inner[m]:inner[m + 1]]``.
    """

    values: Tensor
    offsets: Tensor
    inner: Tensor | None = None

    @property
    def flat(self) -> Ragged:
        """The same values without the bounds of behaviours: offsets count values."""
        return self if self.inner is None else Ragged(self.values, self.inner[self.offsets.long()])


@dataclass(frozen=True, slots=True)
class Edges:
    """Which rows of a batch a row takes from, and how much: a sparse [B, B] matrix by rows.

    Row b takes ``weight[e]`` of row ``sources[e]`` for e from ``offsets[b]`` to ``offsets[b + 1]``. ``offsets`` [B + 1] and
    ``sources`` [E] are int32, ``weight`` [E] float32.

    Attributes:
        symmetric: the matrix is its own transpose, as that of an undirected graph.
    """

    offsets: Tensor
    sources: Tensor
    weight: Tensor
    symmetric: bool = True


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """Tensors of B rows; what the columns mean is in :class:`~ctrlib.schema.BatchLayout`.

    Attributes:
        sparse: [B, F] int32 ids within each field; 0 is padding, 1 is OOV. Ids and floats are never mixed.
        dense: [B, F] float32; NaN marks a missing value.
        sequences: by field name.
        labels: [B, T] float32 of 0 and 1, or [B] int64 of classes; ``None`` when serving.
        weight: [B] float32 row weights, or ``None`` for equal weights.
        group: [B] int64 codes of the GAUC group, or ``None``.
        edges: where rows are nodes of a graph.
    """

    sparse: Tensor
    dense: Tensor
    sequences: Mapping[str, Ragged] = field(default_factory=dict)
    labels: Tensor | None = None
    weight: Tensor | None = None
    group: Tensor | None = None
    edges: Edges | None = None

    def __len__(self) -> int:
        return self.sparse.shape[0]

    @property
    def counted(self) -> Tensor | None:
        """[B] bool: which rows weigh more than 0, so that losses may learn from them; ``None``: all do."""
        return None if self.weight is None else self.weight > 0

    def to(self, device: torch.device | str) -> Batch:
        """The same rows on ``device``; from pinned memory without waiting for the copy."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The same rows in page-locked memory, from which a GPU copies while the CPU goes on; needs CUDA."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        changed: dict[str, Tensor | None] = {
            f.name: None if (value := getattr(self, f.name)) is None else change(value)
            for f in fields(self)
            if f.name not in ("sequences", "edges")
        }
        e = self.edges
        edges = None if e is None else Edges(change(e.offsets), change(e.sources), change(e.weight), e.symmetric)
        sequences = {
            name: Ragged(change(r.values), change(r.offsets), None if r.inner is None else change(r.inner))
            for name, r in self.sequences.items()
        }
        return Batch(sequences=sequences, edges=edges, **changed)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Output:
    """What a model returns: ``logits`` [B] (or [B, T] tasks) and auxiliary losses by name, scalars to be added.

    ``classes``: the logits are [B, C], of the classes of one label, which exclude one another.
    """

    logits: Tensor
    auxiliary: Mapping[str, Tensor] = field(default_factory=dict)
    classes: bool = False


class Model(Protocol):
    """Anything ``Batch → Output``; in practice an ``nn.Module``."""

    def __call__(self, batch: Batch) -> Output: ...


def embedding_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The trainable embedding tables of a model: the weights of every ``nn.Embedding`` inside it."""
    tables = {m.weight: None for m in model.modules() if isinstance(m, nn.Embedding)}
    return [w for w in tables if isinstance(w, nn.Parameter) and w.requires_grad]
