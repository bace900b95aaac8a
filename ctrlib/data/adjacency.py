"""An undirected graph as compressed rows of neighbours, and its normalised matrix.

Shape letters: N nodes, E directed edges (each undirected one is two).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from ctrlib.batch import Edges
from ctrlib.schema import DataError

Nodes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Adjacency:
    """An undirected graph without loops and repeated edges, by rows: node n has ``neighbours[offsets[n]:offsets[n + 1]]``,
    ascending. Make one with :meth:`from_pairs`."""

    offsets: Nodes
    neighbours: npt.NDArray[np.int32]

    @classmethod
    def from_pairs(
        cls,
        source: Nodes,
        target: Nodes,
        num_nodes: int,
        *,
        symmetrize: bool = False,
        say: Callable[[int], str] = "at place {} of the arrays".format,
    ) -> Adjacency:
        """The graph of some edges, each listed in one direction, or all of them in both.

        Repeated edges count once, loops not at all: the normalised matrix has loops of its own.

        Args:
            source, target: [E] node numbers.
            num_nodes: N.
            symmetrize: forget the directions of a directed graph.
            say: how an error names the edge at a place of ``source`` and ``target``.

        Raises:
            DataError: some edges are listed in both directions and others in one, so that the graph is directed or damaged.
        """
        size = max(num_nodes, 1)
        plain_E = source != target
        keys_E = np.unique(source[plain_E] * size + target[plain_E])
        back_E = np.sort(keys_E % size * size + keys_E // size)
        if not symmetrize:
            both = int(np.isin(back_E, keys_E, assume_unique=True).sum())
            if 0 < both < len(keys_E):
                lonely = keys_E[~np.isin(keys_E, back_E, assume_unique=True)][0]
                first = int(np.argmax((source == lonely // size) & (target == lonely % size)))
                raise DataError(
                    f"{both:,} of {len(keys_E):,} edges are listed in both directions and the others in one, such as that "
                    f"{say(first)}: a directed graph; expected every edge once, or every edge in both directions. To forget "
                    "the directions, symmetrize (--symmetrize)"
                )
        return cls._from_keys(np.union1d(keys_E, back_E), num_nodes)

    @classmethod
    def _from_keys(cls, keys_E: Nodes, num_nodes: int) -> Adjacency:
        size = max(num_nodes, 1)
        offsets = np.searchsorted(keys_E, np.arange(num_nodes + 1, dtype=np.int64) * size)
        return cls(offsets.astype(np.int64), (keys_E % size).astype(np.int32))

    @property
    def num_nodes(self) -> int:
        """N."""
        return len(self.offsets) - 1

    @property
    def num_edges(self) -> int:
        """Undirected edges."""
        return len(self.neighbours) // 2

    @property
    def degrees(self) -> Nodes:
        """[N] neighbours."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> Nodes:
        """[E] the node that each entry of ``neighbours`` is a neighbour of."""
        return np.repeat(np.arange(self.num_nodes), self.degrees)

    def normalized(self) -> Edges:
        """Ã = D^-½ (A + I) D^-½, with D the degrees of A + I (GCN, arXiv:1609.02907)."""
        n = self.num_nodes
        scale_N = 1 / np.sqrt(self.degrees + 1.0)
        rows_E, keys = self.rows, np.arange(n, dtype=np.int64)
        # Rows stay in order: each gets its loop as one entry more, before its neighbours.
        offsets = self.offsets + np.append(keys, n)
        sources = np.empty(len(self.neighbours) + n, dtype=np.int32)
        weight = np.empty(len(sources), dtype=np.float32)
        at_E = np.arange(len(rows_E)) + rows_E + 1
        sources[offsets[:-1]], weight[offsets[:-1]] = keys, scale_N**2
        sources[at_E], weight[at_E] = self.neighbours, scale_N[rows_E] * scale_N[self.neighbours]
        if offsets[-1] >= 2**31:
            raise DataError(f"the graph has {offsets[-1]:,} directed edges; expected fewer than {2**31:,}")
        return Edges(torch.from_numpy(offsets.astype(np.int32)), torch.from_numpy(sources), torch.from_numpy(weight))

    def induced(self, nodes: Nodes) -> Adjacency:
        """The graph of these nodes, numbered in this order, and of the edges between them."""
        place_N = np.full(self.num_nodes, -1, dtype=np.int64)
        place_N[nodes] = np.arange(len(nodes))
        at_E, rows_E = entries(self.offsets, nodes)
        there_E = place_N[self.neighbours[at_E]]
        inside_E = there_E >= 0
        keys_E = np.sort(rows_E[inside_E] * max(len(nodes), 1) + there_E[inside_E])
        return self._from_keys(keys_E, len(nodes))

    def extended(self, source: Nodes, target: Nodes, count: int) -> Adjacency:
        """The graph with ``count`` nodes more, numbered from N on, and these edges more, in one direction each or in both."""
        total = self.num_nodes + count
        old_E = self.rows * max(total, 1) + self.neighbours
        added = Adjacency.from_pairs(source, target, total, symmetrize=True)
        return self._from_keys(np.union1d(old_E, added.rows * max(total, 1) + added.neighbours), total)


def entries(offsets: Nodes, rows: Nodes) -> tuple[Nodes, Nodes]:
    """Where the entries of some rows of a compressed matrix are, and to which of these rows each belongs, by place."""
    counts = offsets[rows + 1] - offsets[rows]
    owner = np.repeat(np.arange(len(rows)), counts)
    within = np.arange(len(owner)) - np.repeat(np.cumsum(counts) - counts, counts)
    return offsets[rows][owner] + within, owner
