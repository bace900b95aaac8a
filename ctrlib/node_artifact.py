"""A model of nodes with its graph: predictions of known nodes, and of new ones that join them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctrlib import artifact
from ctrlib.artifact import Artifact
from ctrlib.data.adjacency import Adjacency
from ctrlib.data.graph import Graph, GraphOptions, edge_ends, encode_nodes, node_ids, places
from ctrlib.data.source import open_source
from ctrlib.files import sha256, write_json
from ctrlib.models.catgcn import CatGCN
from ctrlib.schema import DataError
from ctrlib.training import Predictions

Floats = npt.NDArray[np.float64]

_FILES = ("graph.safetensors", "ids.parquet")


def save_graph(folder: Path, graph: Graph, model: CatGCN, options: GraphOptions) -> None:
    """Write what known nodes say by themselves, and their edges: enough for all predictions, without their features."""
    with torch.no_grad():
        device = next(model.parameters()).device
        hidden = model.encode(graph.features.to(device)).cpu().contiguous()
    folder.mkdir()
    pq.write_table(pa.table({"id": graph.ids}), folder / "ids.parquet")
    adjacency = graph.adjacency
    arrays = {"offsets": adjacency.offsets, "neighbours": adjacency.neighbours}
    tensors = {"hidden": hidden, **{key: torch.from_numpy(np.ascontiguousarray(a)) for key, a in arrays.items()}}
    save_file(tensors, folder / "graph.safetensors")
    files = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_json(folder / "graph.json", {"id": options.id, "source": options.source, "target": options.target, "files": files})


@dataclass(frozen=True)
class NodeArtifact:
    """A model of nodes with the graph that it was trained on. Make one with :func:`load_nodes`."""

    artifact: Artifact
    ids: Any
    adjacency: Adjacency
    hidden: Tensor
    columns: Mapping[str, str]

    @property
    def classes(self) -> tuple[str, ...]:
        """The columns of what is predicted."""
        return self.artifact.schema.classes

    def predict(self, ids: Sequence[object] | None = None) -> Floats:
        """Probabilities of known nodes.

        Args:
            ids: of the nodes; ``None``: all, in the order of the training table.

        Returns:
            [N, C], by :attr:`classes`.

        Raises:
            DataError: a node is not known.
        """
        if ids is None:
            return self._known.copy()
        try:
            wanted = ids if isinstance(ids, pa.Array) else pa.array(ids)
        except (pa.ArrowException, OverflowError) as error:
            raise DataError(f"the ids cannot be read as one kind ({error!s:.200}); expected {self.ids.type}") from error
        try:
            found = places(wanted, self.ids)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise _other_type(wanted.type, self.ids.type) from error
        if found.null_count:
            lost = wanted.filter(pc.is_null(found))[0]
            raise DataError(f"node {lost} is not among the {len(self.ids):,} known ones; give its features to predict_new")
        at: npt.NDArray[np.int32] = found.to_numpy(zero_copy_only=False)
        return self._known[at]

    def predict_new(self, nodes: object, edges: object = None) -> Floats:
        """Probabilities of nodes that were not there in training: as if the model had read the graph with them in it.

        Args:
            nodes: a table with the id and the features; no label is needed.
            edges: a table with both ends, of which one at least is a new node; ``None``: they have no edges.

        Returns:
            [M, C], by :attr:`classes`.

        Raises:
            DataError: a node is known already, there twice, or has no features; an end is no node; an edge is between
                known nodes.
        """
        table = open_source(nodes, "the table of new nodes")
        table.require([self.columns["id"]], ", the id of the nodes")
        old_ids, new = _alike(self.ids, node_ids(table, self.columns["id"]))
        if pc.count_distinct(new).as_py() < len(new):
            raise DataError(f"two new nodes have one id when read as {new.type}, as those of the training nodes are")
        known = pc.is_in(new, value_set=old_ids)
        if pc.any(known).as_py():
            raise DataError(f"node {new.filter(known)[0]} is known already; ask predict for it, and give only new nodes here")
        features = encode_nodes(self.artifact.encoder, table, new)
        model = cast(CatGCN, self.artifact.model)
        ends = np.zeros((2, 0), dtype=np.int64)
        if edges is not None:
            lines = open_source(edges, "the table of edges")
            names = [self.columns["source"], self.columns["target"]]
            lines.require(names, ", an end of the edges")
            everyone = pa.concat_arrays([old_ids, new])
            ends = np.stack([edge_ends(lines, name, everyone, "the known and the new nodes") for name in names])
            old = np.flatnonzero((ends < len(self.ids)).all(0))
            if len(old):
                raise DataError(
                    f"{lines.locate(int(old[0]))}: an edge between two known nodes; give only edges of new nodes here"
                )
        extended = self.adjacency.extended(ends[0], ends[1], len(new))
        with torch.no_grad():
            hidden = torch.cat([self.hidden, model.encode(features)])
            logits = model.propagation(hidden, extended.normalized())[len(self.ids) :]
        return _probability(logits)

    @cached_property
    def _known(self) -> Floats:
        with torch.no_grad():
            return _probability(cast(CatGCN, self.artifact.model).propagation(self.hidden, self.adjacency.normalized()))


def is_node_run(run: str | Path) -> bool:
    """Whether the folder was written by :func:`train_nodes`."""
    return (Path(run) / "graph" / "graph.json").is_file()


def load_nodes(run: str | Path) -> NodeArtifact:
    """Read a run of :func:`train_nodes`.

    Raises:
        DataError: no such run, or a file is missing or damaged.
    """
    folder = Path(run) / "graph"
    if not is_node_run(run):
        raise DataError(f"{run} is no run on nodes (no graph/graph.json); expected a folder written by ctrlib train --nodes")
    info = artifact.read_json(folder / "graph.json")
    columns = {key: info[key] for key in ("id", "source", "target") if isinstance(info.get(key), str)}
    files = info.get("files")
    if not isinstance(files, dict) or len(columns) < 3:
        raise DataError(f"file {folder / 'graph.json'} is damaged; copy the run again")
    for name in {*_FILES, *files}:
        if not (folder / name).is_file() or sha256(folder / name) != files.get(name):
            raise DataError(f"file {folder / name} is missing or damaged; copy the run again")
    tensors = load_file(folder / "graph.safetensors")
    ids = pq.read_table(folder / "ids.parquet")["id"].combine_chunks()
    adjacency = Adjacency(tensors["offsets"].numpy(), tensors["neighbours"].numpy())
    return NodeArtifact(artifact.load(run), ids, adjacency, tensors["hidden"], columns)


def _alike(known: Any, new: Any) -> tuple[Any, Any]:
    """Both kinds of ids as one type: that of the known ones, or one that holds the integers of both."""
    wide = [pa.int64(), pa.uint64()] if pa.types.is_integer(known.type) and pa.types.is_integer(new.type) else []
    for kind in (known.type, *wide):
        try:
            return known.cast(kind), new.cast(kind)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            continue
    raise _other_type(new.type, known.type)


def _other_type(found: Any, kind: Any) -> DataError:
    return DataError(f"ids of nodes are {found}; expected {kind}, as those of the training nodes")


def _probability(logits: Tensor) -> Floats:
    return Predictions(logits=logits.double().numpy(), labels=None, weight=None, group=None, classes=True).probability
