"""Batches of parts of a graph: sampled neighbourhoods of some nodes, or clusters of nodes.

Both shuffle anew each time they are iterated, from ``(seed, epoch)``.

Shape letters: N nodes, B of them in a batch, S seed nodes, E edges.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch

from ctrlib.batch import Batch, Edges, Ragged
from ctrlib.data.adjacency import Adjacency, Nodes, entries
from ctrlib.data.graph import Graph
from ctrlib.schema import DataError

Partition = Literal["auto", "metis", "random"]


def take_nodes(batch: Batch, nodes: Nodes) -> Batch:
    """The features of some nodes, in this order."""
    at = torch.from_numpy(nodes)

    def part(ragged: Ragged) -> Ragged:
        flat = ragged.flat
        values_at, _ = entries(flat.offsets.numpy().astype(np.int64), nodes)
        lengths = (flat.offsets[1:] - flat.offsets[:-1])[at]
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
        return Ragged(flat.values[torch.from_numpy(values_at)], offsets)

    sequences = {name: part(ragged) for name, ragged in batch.sequences.items()}
    return Batch(sparse=batch.sparse[at], dense=batch.dense[at], sequences=sequences)


def sample_neighbourhood(
    adjacency: Adjacency, seeds: Nodes, fan_outs: Sequence[int], rng: np.random.Generator
) -> tuple[Nodes, Edges]:
    """Nodes from which ``len(fan_outs)`` hops reach the seeds, and the rows of the matrix that they need, sampled.

    A node d hops from the seeds takes from ``fan_outs[d]`` of its neighbours, drawn without replacement, or from all where it
    has no more; the weights of those drawn are scaled by their share, so that what it takes is right on average (over three
    hops or more nearly so, for a walk that comes back to a node meets the same draw). Its own weight is kept. With large
    numbers this is the full batch, exactly, for the seeds: the last nodes have no rows but their own, and what is wrong there
    is too far away to arrive.

    Args:
        adjacency: the graph.
        seeds: [S], each once.
        fan_outs: neighbours, hop by hop.
        rng: draws them.

    Returns:
        The nodes, seeds first, and the matrix over them, which is not symmetric.
    """
    place_N = np.full(adjacency.num_nodes, -1, dtype=np.int64)
    place_N[seeds] = np.arange(len(seeds))
    nodes, frontier = [seeds], seeds
    count = len(seeds)
    rows, columns, scales = [], [], []
    for fan_out in fan_outs:
        at_E, owner_E = entries(adjacency.offsets, frontier)
        degree = adjacency.offsets[frontier + 1] - adjacency.offsets[frontier]
        kept_E = first_of_each(owner_E, rng.random(len(at_E)), fan_out)
        at_E, owner_E = at_E[kept_E], owner_E[kept_E]
        found_E = adjacency.neighbours[at_E].astype(np.int64)
        new = np.unique(found_E[place_N[found_E] < 0])
        place_N[new] = count + np.arange(len(new))
        count += len(new)
        rows.append(place_N[frontier][owner_E])
        columns.append(found_E)
        scales.append((degree / np.maximum(np.minimum(degree, fan_out), 1))[owner_E])
        nodes.append(new)
        frontier = new
    everyone = np.concatenate(nodes)
    row_E = np.concatenate([*rows, np.arange(count)])  # a loop for each
    column_E = place_N[np.concatenate([*columns, everyone])]
    scale_B = 1 / np.sqrt(adjacency.offsets[everyone + 1] - adjacency.offsets[everyone] + 1.0)
    weight_E = scale_B[row_E] * scale_B[column_E] * np.concatenate([*scales, np.ones(count)])
    order = np.argsort(row_E, kind="stable")
    offsets = np.searchsorted(row_E[order], np.arange(count + 1)).astype(np.int32)
    sources = torch.from_numpy(column_E[order].astype(np.int32))
    weight = torch.from_numpy(weight_E[order].astype(np.float32))
    return everyone, Edges(torch.from_numpy(offsets), sources, weight, symmetric=False)


def first_of_each(owner_E: Nodes, keys_E: npt.NDArray[np.float64], count: int) -> Nodes:
    """The entries with the ``count`` smallest keys of each owner; owners are ascending."""
    order = np.lexsort((keys_E, owner_E))
    starts = np.searchsorted(owner_E, owner_E)
    return order[np.arange(len(owner_E)) - starts < count]


class Neighbourhoods:
    """Batches of some training nodes with sampled neighbours. One epoch has every node of the split as a seed once.

    Args:
        graph: the nodes.
        split: of the seeds.
        class_weights: see :meth:`.Graph.class_weights`; nodes that are no seeds weigh 0.
        fan_outs: neighbours to draw, hop by hop; as many numbers as the model takes hops.
        batch_size: seeds a batch.
        seed: of the order and of the neighbours.

    Raises:
        DataError: a number below 1.
    """

    def __init__(
        self,
        graph: Graph,
        split: str,
        class_weights: npt.NDArray[np.float32],
        *,
        fan_outs: Sequence[int],
        batch_size: int,
        seed: int = 0,
    ) -> None:
        if min([batch_size, *fan_outs]) < 1:
            raise DataError(f"batch_size is {batch_size} and fan_outs are {list(fan_outs)}; expected numbers of 1 or more")
        self._graph, self._fan_outs, self._batch_size, self._seed = graph, fan_outs, batch_size, seed
        self._nodes, self._weights = graph.nodes(split), graph.weights(split, class_weights)
        self._epoch = 0

    def __len__(self) -> int:
        return math.ceil(len(self._nodes) / self._batch_size)

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng([self._seed, self._epoch])
        self._epoch += 1
        order = rng.permutation(self._nodes)
        graph = self._graph
        for start in range(0, len(order), self._batch_size):
            seeds = order[start : start + self._batch_size]
            nodes, edges = sample_neighbourhood(graph.adjacency, seeds, self._fan_outs, rng)
            weight = np.where(np.arange(len(nodes)) < len(seeds), self._weights[nodes], 0).astype(np.float32)
            yield _batch(graph, nodes, edges, weight)


def partition(adjacency: Adjacency, parts: int, method: Partition = "auto", seed: int = 0) -> npt.NDArray[np.int32]:
    """[N] the part of every node.

    Args:
        adjacency: the graph.
        parts: how many.
        method: ``metis``: few edges between parts, needs the package pymetis; ``random``: of equal size; ``auto``: METIS where
            it is installed, else random.
        seed: of a random partition.

    Raises:
        DataError: more parts than nodes, an unknown method, or no pymetis.
    """
    if not 1 <= parts <= adjacency.num_nodes:
        raise DataError(f"the graph is to be cut into {parts} parts and has {adjacency.num_nodes} nodes; expected 1 to as many")
    if method not in get_args(Partition):
        raise DataError(f"partition is {method!r}; expected one of {', '.join(get_args(Partition))}")
    metis = None if method == "random" else _metis()
    if method == "metis" and metis is None:
        raise DataError("partition is 'metis', and the package pymetis is not installed; install it, or choose 'random'")
    if metis is not None:
        _, found = metis.part_graph(parts, metis.CSRAdjacency(adjacency.offsets, adjacency.neighbours))
        return np.asarray(found, dtype=np.int32)
    return np.random.default_rng(seed).permutation(adjacency.num_nodes).astype(np.int32) % parts


def _metis() -> Any:
    try:
        import pymetis
    except ImportError:
        return None
    return pymetis


class Clusters:
    """Batches of a few parts of the graph, with the edges among them (Cluster-GCN, arXiv:1905.07953).

    The matrix is normalised within each batch, so edges between batches are left out: with random parts most of them.

    Args:
        graph: the nodes.
        split: whose nodes weigh in the loss.
        class_weights: see :meth:`.Graph.class_weights`.
        part_of: [N], see :func:`partition`.
        parts_per_batch: drawn together, anew in every epoch.
        seed: of that.

    Raises:
        DataError: ``parts_per_batch`` is below 1.
    """

    def __init__(
        self,
        graph: Graph,
        split: str,
        class_weights: npt.NDArray[np.float32],
        part_of: npt.NDArray[np.int32],
        *,
        parts_per_batch: int = 1,
        seed: int = 0,
    ) -> None:
        if parts_per_batch < 1:
            raise DataError(f"parts_per_batch is {parts_per_batch}; expected 1 or more")
        self._graph, self._weights, self._seed = graph, graph.weights(split, class_weights), seed
        self._each = parts_per_batch
        self._by_part = np.argsort(part_of, kind="stable")
        _, starts = np.unique(part_of[self._by_part], return_index=True)  # METIS may leave a part empty
        self._bounds = np.append(starts, len(part_of))
        self._epoch = 0

    def __len__(self) -> int:
        return math.ceil((len(self._bounds) - 1) / self._each)

    def __iter__(self) -> Iterator[Batch]:
        rng = np.random.default_rng([self._seed, self._epoch])
        self._epoch += 1
        order = rng.permutation(len(self._bounds) - 1)
        for start in range(0, len(order), self._each):
            parts = order[start : start + self._each]
            nodes = np.concatenate([self._by_part[self._bounds[p] : self._bounds[p + 1]] for p in parts])
            edges = self._graph.adjacency.induced(nodes).normalized()
            yield _batch(self._graph, nodes, edges, self._weights[nodes])


def _batch(graph: Graph, nodes: Nodes, edges: Edges, weight: npt.NDArray[np.float32]) -> Batch:
    labels = torch.from_numpy(np.maximum(graph.labels[nodes], 0))
    return replace(take_nodes(graph.features, nodes), labels=labels, weight=torch.from_numpy(weight), edges=edges)
