"""Nodes and edges as Batches: tables → checked nodes, an undirected simple graph, its normalised matrix.

Shape letters: N nodes, E edges, C classes.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ctrlib.batch import Batch, Edges
from ctrlib.config import check_seed
from ctrlib.data.adjacency import Adjacency, Nodes
from ctrlib.data.encoder import Encoder
from ctrlib.data.source import Source, decoded, open_source
from ctrlib.schema import DataError, Schema, SequenceField

_log = logging.getLogger("ctrlib")

ClassWeight = Literal["train", "all", "none"]
SPLITS = ("train", "valid", "test")
_SHARES: Mapping[str, float] = {"train": 0.8, "valid": 0.1, "test": 0.1}
_NO_SPLIT = len(SPLITS)
_MOST_CLASSES = 1000


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """How tables of nodes and edges become a :class:`Graph`.

    Args:
        label: the column of classes: text, whole numbers or booleans; a node without a value, or with empty text, has none.
        id: the column that names nodes.
        source, target: the columns of the edges' ends.
        schema: a file or a :class:`~ctrlib.schema.Schema` of the features; ``None``: all columns of lists.
        split: a column that says ``train``, ``valid`` or ``test``; a node that says anything else is in none. ``None``: nodes
            with a label are cut at random.
        shares: of the splits, where they are cut at random.
        symmetrize: see :meth:`Adjacency.from_pairs`.
        seed: of the split.
    """

    label: str
    id: str = "id"
    source: str = "source"
    target: str = "target"
    schema: str | Path | Schema | None = None
    split: str | None = None
    shares: Mapping[str, float] = field(default_factory=lambda: _SHARES)
    symmetrize: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        shares = [self.shares.get(name, 0.0) for name in SPLITS]
        if min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9 or len(self.shares) > len(SPLITS):
            raise DataError(
                f"the shares are {dict(self.shares)}; expected numbers above 0 for {', '.join(SPLITS)} that sum to 1"
            )
        if self.split is not None and self.shares != _SHARES:
            raise DataError(f"the split is that of column {self.split!r}, so shares have no effect; give one of the two")
        if self.source == self.target:
            raise DataError(f"both ends of an edge are column {self.source!r}; name two columns")


@dataclass(frozen=True)
class Graph:
    """Nodes with features and classes, and the edges between them. Make one with :func:`read_graph`.

    Attributes:
        ids: [N] names of the nodes, as an Arrow array.
        encoder: of the features; its schema has the classes.
        features: a Batch of all nodes, without labels and edges.
        adjacency: the edges.
        labels: [N] numbers of classes; −1: none.
        split: [N] numbers of :data:`SPLITS`; 3: none.
    """

    ids: Any
    encoder: Encoder
    features: Batch
    adjacency: Adjacency
    labels: Nodes
    split: npt.NDArray[np.uint8]

    @cached_property
    def edges(self) -> Edges:
        """See :meth:`Adjacency.normalized`."""
        return self.adjacency.normalized()

    @property
    def classes(self) -> tuple[str, ...]:
        """Their names."""
        return self.encoder.schema.classes

    def nodes(self, split: str) -> Nodes:
        """The numbers of the nodes of a split."""
        return np.flatnonzero(self.split == SPLITS.index(split))

    def class_weights(self, among: ClassWeight = "train") -> npt.NDArray[np.float32]:
        """[C] n / (C · n_c), with n_c the training nodes of class c: each class weighs the same in the loss.

        Args:
            among: NOTE[DIFF] the released code counts ``all`` labels, test nodes included; ``train`` is the default here.
                ``none``: 1 for each.
        """
        if among not in get_args(ClassWeight):
            raise DataError(f"class weights are of {among!r}; expected one of {', '.join(get_args(ClassWeight))}")
        size = len(self.classes)
        if among == "none":
            return np.ones(size, dtype=np.float32)
        counted = self.split == 0 if among == "train" else self.split < _NO_SPLIT
        counts = np.bincount(self.labels[counted], minlength=size)
        return np.asarray(counts.sum() / (size * counts), dtype=np.float32)

    def weights(self, split: str, class_weights: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """[N] the weight of its class for a node of the split, 0 for all others."""
        return np.where(self.split == SPLITS.index(split), class_weights[np.maximum(self.labels, 0)], 0).astype(np.float32)

    def batch(self, split: str, class_weights: npt.NDArray[np.float32]) -> Batch:
        """All nodes and edges; only nodes of the split weigh in the loss and in metrics."""
        labels = torch.from_numpy(np.maximum(self.labels, 0))
        weight = torch.from_numpy(self.weights(split, class_weights))
        return replace(self.features, labels=labels, weight=weight, edges=self.edges)


def read_graph(nodes: object, edges: object, options: GraphOptions) -> Graph:
    """Read, check and encode nodes and edges.

    The features of all nodes are read, also of those to be predicted: their values are known and have embeddings, as in
    the paper. Labels of validation and test nodes are read only to name the classes.

    Args:
        nodes: a table with the id, lists of categorical values, and the label; see :func:`~ctrlib.data.source.open_source`.
        edges: a table with the ids of both ends.
        options: see :class:`GraphOptions`.

    Raises:
        DataError: a column is missing; a node is there twice or has no features; an edge leads to an unknown node; directions
            are mixed; no node has a label, or a class no training node.
    """
    table, lines = open_source(nodes, "the table of nodes"), open_source(edges, "the table of edges")
    columns = [c for c in (options.id, options.label, options.split) if c is not None]
    table.require(columns, ", named as id, label or split of the nodes")
    lines.require([options.source, options.target], ", named as an end of the edges")
    ids = node_ids(table, options.id)
    source, target = (edge_ends(lines, column, ids, table.name) for column in (options.source, options.target))

    def say(edge: int) -> str:
        return f"from node {ids[int(source[edge])]} to {ids[int(target[edge])]} ({lines.locate(edge)})"

    adjacency = Adjacency.from_pairs(source, target, len(ids), symmetrize=options.symmetrize, say=say)
    labels, classes = _classes(table, options)
    split = _split(table, labels, options)
    _check_classes(labels, split, classes, options.label)
    encoder = Encoder.fit(_schema(table, options, classes), table)
    features = encode_nodes(encoder, table, ids)
    _log.info("%d nodes, %d edges, %d isolated nodes", len(ids), adjacency.num_edges, int((adjacency.degrees == 0).sum()))
    return Graph(ids, encoder, features, adjacency, labels, split)


def node_ids(table: Source, column: str) -> Any:
    """[N] the names of nodes, each once.

    Raises:
        DataError: there is none, one is missing, one is there twice, or they are no single values.
    """
    ids = decoded(table.column(column))
    if pa.types.is_nested(ids.type) or pa.types.is_floating(ids.type):
        raise DataError(
            f"column {column!r} of {table.name} holds {ids.type}; expected one id a node, such as a whole number or text"
        )
    if len(ids) == 0:
        raise DataError(f"{table.name} has no nodes; expected at least one")
    if ids.null_count:
        row = int(np.argmax(pc.is_null(ids).to_numpy(zero_copy_only=False)))
        raise DataError(f"column {column!r}, {table.locate(row)}: the node has no id; give every node one")
    codes = ids.dictionary_encode().indices.to_numpy()
    if codes.max() + 1 < len(codes):
        row = int(np.setdiff1d(np.arange(len(codes)), np.unique(codes, return_index=True)[1])[0])
        raise DataError(
            f"column {column!r}, {table.locate(row)}: node {ids[row]} is there twice (first {table.locate(int(codes[row]))}); "
            "expected every node once"
        )
    return ids


def edge_ends(lines: Source, column: str, ids: Any, nodes: str) -> Nodes:
    """[E] the numbers of the nodes at one end of the edges.

    Raises:
        DataError: an end is missing, or is no node.
    """
    ends = decoded(lines.column(column))
    try:
        found = places(ends, ids)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"column {column!r} of {lines.name} holds {ends.type}; expected {ids.type} as ids of nodes") from error
    if found.null_count:
        row = int(np.argmax(pc.is_null(found).to_numpy(zero_copy_only=False)))
        raise DataError(
            f"column {column!r}, {lines.locate(row)}: node {ends[row]} is not in {nodes}; add the node, or remove its edges "
            f"({found.null_count:,} ends of edges are unknown)"
        )
    result: Nodes = found.to_numpy(zero_copy_only=False).astype(np.int64)
    return result


def places(values: Any, ids: Any) -> Any:
    """Where each value is among the ids; null: nowhere.

    Raises:
        ArrowInvalid, ArrowNotImplementedError: the values cannot be such ids.
    """
    try:
        return pc.index_in(values.cast(ids.type), value_set=ids)
    except pa.ArrowInvalid:
        if not (pa.types.is_integer(values.type) and pa.types.is_integer(ids.type)):
            raise
        return pc.index_in(values.cast(pa.string()), value_set=ids.cast(pa.string()))  # some are too large for the type of ids


def encode_nodes(encoder: Encoder, table: Source, ids: Any) -> Batch:
    """A Batch of all nodes. A missing value of a field is an id like any other, but no feature alone.

    Raises:
        DataError: a node has no feature.
    """
    batch = encoder.transform(table)
    counts = np.zeros(len(ids), dtype=np.int64)
    for column in encoder.layout.sparse:
        gone = [pc.is_null(decoded(table.column(name)), nan_is_null=True) for name in column.parts or (column.name,)]
        counts += ~np.any([one.to_numpy(zero_copy_only=False) for one in gone], axis=0)
    for ragged in batch.sequences.values():
        flat = ragged.flat
        before = np.append(0, np.cumsum(flat.values.numpy() > 0))
        counts = counts + np.diff(before[flat.offsets.numpy()])
    empty = np.flatnonzero(counts == 0)
    if len(empty):
        names = ", ".join(repr(f.name) for f in encoder.schema.fields)
        raise DataError(
            f"{table.locate(int(empty[0]))}: node {ids[int(empty[0])]} has no value in {names} ({len(empty):,} nodes "
            "have none); give it one, such as a value that says 'none', or remove the node"
        )
    return batch


def _schema(table: Source, options: GraphOptions, classes: tuple[str, ...]) -> Schema:
    if options.schema is None:
        special = (options.id, options.label, options.split)
        names = [name for name, kind in table.types.items() if _is_list(kind) and name not in special]
        for name in names:
            if pa.types.is_floating(table.types[name].value_type):
                raise DataError(
                    f"column {name!r} of {table.name} holds lists of {table.types[name].value_type}, and features are "
                    "categories; name the columns of features in a schema (--schema), or leave this one out"
                )
        if not names:
            raise DataError(f"{table.name} has no column of lists, which would be the features; give a schema (--schema)")
        return Schema(fields=tuple(SequenceField(name=name) for name in names), labels=(options.label,), classes=classes)
    schema = options.schema if isinstance(options.schema, Schema) else Schema.load(options.schema)
    if schema.weight is not None:
        raise DataError(
            f"the schema has the column {schema.weight!r} of row weights, and nodes have none; remove it. Classes are balanced "
            "by class_weight"
        )
    timed = [h.name for h in schema.histories if h.times is not None]
    for role, named in (("group", schema.group), ("time", None if timed else schema.time)):
        if named is not None:
            raise DataError(f"the schema has the column {named!r} as {role}, which has no meaning for nodes; remove it")
    return replace(schema, labels=(options.label,), classes=classes)


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _classes(table: Source, options: GraphOptions) -> tuple[Nodes, tuple[str, ...]]:
    """Numbers of classes, −1 where there is none, and their names in order of value."""
    values = decoded(table.column(options.label))
    if pa.types.is_string(values.type) or pa.types.is_large_string(values.type):
        values = pc.if_else(pc.equal(values, ""), pa.scalar(None, values.type), values)
    if values.null_count == len(values):
        raise DataError(f"column {options.label!r} of {table.name}: no node has a label; expected some nodes with one")
    coded = values.dictionary_encode()
    kind = coded.dictionary.type
    known = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not known or len(coded.dictionary) > _MOST_CLASSES:
        raise DataError(
            f"column {options.label!r} of {table.name} holds {len(coded.dictionary):,} values of type {kind}; expected "
            f"classes: text, whole numbers or booleans, at most {_MOST_CLASSES}"
        )
    order = np.argsort(coded.dictionary.to_numpy(zero_copy_only=False), kind="stable")
    rank = np.empty(len(order) + 1, dtype=np.int64)
    rank[order], rank[-1] = np.arange(len(order)), -1
    at = pc.fill_null(coded.indices, len(order)).to_numpy()
    names = coded.dictionary.take(pa.array(order)).cast(pa.string()).to_pylist()
    return rank[at], tuple(names)


def _split(table: Source, labels: Nodes, options: GraphOptions) -> npt.NDArray[np.uint8]:
    split = np.full(len(labels), _NO_SPLIT, dtype=np.uint8)
    if options.split is not None:
        says = decoded(table.column(options.split))
        if not (pa.types.is_string(says.type) or pa.types.is_large_string(says.type)):
            raise DataError(f"column {options.split!r} of {table.name} holds {says.type}; expected text: {', '.join(SPLITS)}")
        for code, name in enumerate(SPLITS):
            split[pc.fill_null(pc.equal(says, name), False).to_numpy(zero_copy_only=False)] = code
        split[labels < 0] = _NO_SPLIT
    else:
        labelled = np.flatnonzero(labels >= 0)
        order = np.random.default_rng(options.seed).permutation(labelled)
        cuts = np.rint(np.cumsum([options.shares[name] for name in SPLITS[:-1]]) * len(order)).astype(np.int64)
        for code, nodes in enumerate(np.split(order, cuts)):
            split[nodes] = code
    for code, name in enumerate(SPLITS[:2]):
        if not (split == code).any():
            how = f"column {options.split!r} says {name!r} for none of them" if options.split else "they are too few to be cut"
            raise DataError(f"{table.name} has no labelled node for {name} ({how}); expected at least one")
    return split


def _check_classes(labels: Nodes, split: npt.NDArray[np.uint8], classes: tuple[str, ...], label: str) -> None:
    if len(classes) < 2:
        raise DataError(f"column {label!r} has the single class {classes[0]!r}; expected two or more")
    counts = np.bincount(labels[split == 0], minlength=len(classes))
    if (counts == 0).any():
        raise DataError(
            f"column {label!r}: class {classes[int(np.argmin(counts))]!r} has no training node, so nothing could be "
            "learned of it; expected some of every class: use another split or seed, or leave the label of its nodes empty"
        )
