"""A whole run on nodes of a graph as one call: nodes and edges → model → best weights → metrics → artifact.

What :mod:`ctrlib.experiment` is to rows.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast, get_args

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
from ctrlib.batch import Batch
from ctrlib.config import check_choice, check_not_negative, override, positive, to_json
from ctrlib.data.adjacency import Adjacency
from ctrlib.data.graph import SPLITS, ClassWeight, Graph, GraphOptions, edge_ends, encode_nodes, node_ids, read_graph
from ctrlib.data.source import open_source
from ctrlib.data.subgraphs import Clusters, Neighbourhoods, Partition, partition
from ctrlib.experiment import torch_device
from ctrlib.files import new_folder, sha256, write_json
from ctrlib.models.catgcn import CatGCN, node_preset
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import COMPONENTS
from ctrlib.models.propagation import check_reach
from ctrlib.optim import OptimizerConfig, ScheduleConfig
from ctrlib.schema import DataError
from ctrlib.training import Batches, FitConfig, Predictions, evaluate, fit, seed_everything

Floats = npt.NDArray[np.float64]
NodeBatches = Literal["full", "clusters", "neighbours"]


def _fit() -> FitConfig:
    # NOTE[DIFF] the released code keeps references to its best weights, and so returns those of the last epoch; here copies
    optimizer = OptimizerConfig(embedding="dense", learning_rate=0.01, max_grad_norm=None)
    schedule = ScheduleConfig(name="constant")
    return FitConfig(epochs=1000, optimizer=optimizer, schedule=schedule, monitor="log_loss", patience=10)


@dataclass(frozen=True, kw_only=True, slots=True)
class NodeRunConfig:
    """Everything that decides a run besides the data.

    Args:
        model: see :class:`~ctrlib.models.catgcn.CatGCN`.
        fit: see :class:`~ctrlib.training.FitConfig`; an epoch of full batches is one step, and the validation log loss weighs
            classes as that of training does.
        l2: λ of (λ/2)·‖W‖² over every parameter; adds to ``fit.optimizer.embedding_l2`` and ``net_l2``.
        batches: of training: ``full``: all nodes in every step; ``clusters``: some parts of the graph, see
            :class:`~ctrlib.data.subgraphs.Clusters`; ``neighbours``: ``batch_size`` nodes with sampled neighbours, see
            :class:`~ctrlib.data.subgraphs.Neighbourhoods`. Validation and test always see the whole graph.
        partition, parts, parts_per_batch: of ``clusters``.
        batch_size, fan_outs: of ``neighbours``; one number for each hop of the model.
        class_weight: see :meth:`.Graph.class_weights`.
        device: ``auto`` takes a CUDA GPU where there is one.
    """

    model: CatGCN.Config
    fit: FitConfig = field(default_factory=_fit)
    l2: float = 1e-5
    batches: NodeBatches = "full"
    partition: Partition = "auto"
    parts: int = 50
    parts_per_batch: int = 5
    batch_size: int = 512
    fan_outs: tuple[int, ...] = ()
    class_weight: ClassWeight = "train"
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        check_not_negative("l2", self.l2)
        check_choice("batches", self.batches, get_args(NodeBatches))
        check_choice("partition", self.partition, get_args(Partition))
        check_choice("class_weight", self.class_weight, get_args(ClassWeight))
        positive("parts", self.parts)
        positive("parts_per_batch", self.parts_per_batch)
        positive("batch_size", self.batch_size)
        positive("fan_outs", *self.fan_outs)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))


def configure_nodes(
    model: str = "catgcn", flavour: str | None = None, options: Mapping[str, str] | None = None, epochs: int | None = None
) -> NodeRunConfig:
    """The run of a model of nodes with options set by dotted path.

    Args:
        model: a name in :data:`~ctrlib.models.catgcn.NODE_MODELS`.
        flavour: ``released_code``, the default, or ``paper``.
        options: e.g. ``{"model.propagation.hops": "6", "fit.optimizer.learning_rate": "0.1"}``.
        epochs: at most this many.

    Raises:
        ConfigError: an unknown model, flavour or option; names the nearest.
    """
    config = override(NodeRunConfig(model=node_preset(model, flavour)), options or {}, COMPONENTS)
    return config if epochs is None else replace(config, fit=replace(config.fit, epochs=epochs))


def train_nodes(
    nodes: object,
    edges: object,
    config: NodeRunConfig,
    out: str | Path,
    options: GraphOptions,
    *,
    name: str = "catgcn",
    seed: int = 0,
) -> dict[str, Any]:
    """Train, evaluate and save one model of nodes.

    Args:
        nodes, edges: tables, see :func:`~ctrlib.data.graph.read_graph`; or a :class:`~ctrlib.data.graph.Graph` and ``None``.
        config: see :func:`configure_nodes`.
        out: folder of the new run: ``artifact/``, ``graph/``, ``config.json``, ``history.jsonl``, ``metrics.json``.
        options: see :class:`~ctrlib.data.graph.GraphOptions`.
        name: of the model, for the report.
        seed: of initial weights and dropout.

    Returns:
        What ``metrics.json`` holds. The labels of the test nodes are compared once, with the weights that validation chose.

    Raises:
        DataError, ConfigError: see the functions above.
        TrainingDivergedError: the loss is not finite.
    """
    if config.batches == "neighbours":
        check_reach(config.model.propagation, config.fan_outs)
    device = torch_device(config.device)
    with new_folder(out) as part:
        started = time.perf_counter()
        graph = nodes if isinstance(nodes, Graph) else read_graph(nodes, edges, options)
        write_json(part / "config.json", {"name": name, "seed": seed, **to_json(config)})
        seed_everything(seed)
        model = cast(CatGCN, build_model(config.model, graph.encoder.layout)).to(device)
        weights = graph.class_weights(config.class_weight)
        batches = {split: graph.batch(split, weights).to(device) for split in SPLITS if len(graph.nodes(split))}
        optimizer = config.fit.optimizer
        table_l2, net_l2 = optimizer.embedding_l2 + config.l2, optimizer.net_l2 + config.l2
        how = replace(config.fit, optimizer=replace(optimizer, embedding_l2=table_l2, net_l2=net_l2))
        train = _batches(graph, batches["train"], weights, config, seed)
        result = fit(model, train, [batches["valid"]], how, out=part, title=name)
        report: dict[str, Any] = {
            "model": name,
            "seed": seed,
            "rows": {split: len(graph.nodes(split)) for split in batches},
            "nodes": graph.adjacency.num_nodes,
            "edges": graph.adjacency.num_edges,
            "classes": dict(zip(graph.classes, weights.tolist(), strict=True)),
            "epochs": result.epochs,
            "best_epoch": result.best_epoch,
            "parameters": sum(p.numel() for p in model.parameters()),
            "interrupted": result.interrupted,
            **{split: evaluate(model, [batch]) for split, batch in batches.items() if split != "train"},
            "rows_per_second": result.rows_per_second,
            "seconds": time.perf_counter() - started,
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
        artifact.save(part / "artifact", graph.encoder, model, config.model)
        _save_graph(part / "graph", graph, model, options)
        write_json(part / "metrics.json", report)
        (part / "best.safetensors").unlink(missing_ok=True)  # the artifact has them
    return report


def _batches(graph: Graph, full: Batch, weights: npt.NDArray[np.float32], config: NodeRunConfig, seed: int) -> Batches:
    if config.batches == "clusters":
        part_of = partition(graph.adjacency, config.parts, config.partition, seed)
        return Clusters(graph, "train", weights, part_of, parts_per_batch=config.parts_per_batch, seed=seed)
    if config.batches == "neighbours":
        return Neighbourhoods(graph, "train", weights, fan_outs=config.fan_outs, batch_size=config.batch_size, seed=seed)
    return [full]


def _save_graph(folder: Path, graph: Graph, model: CatGCN, options: GraphOptions) -> None:
    """What known nodes say by themselves, and their edges: enough for all predictions, without their features."""
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
            return self._known
        wanted = _cast(ids if isinstance(ids, pa.Array) else pa.array(ids), self.ids.type)
        found = pc.index_in(wanted, value_set=self.ids)
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
        new = _cast(node_ids(table, self.columns["id"]), self.ids.type)
        known = pc.is_in(new, value_set=self.ids)
        if pc.any(known).as_py():
            raise DataError(f"node {new.filter(known)[0]} is known already; ask predict for it, and give only new nodes here")
        features = encode_nodes(self.artifact.encoder, table, new)
        model = cast(CatGCN, self.artifact.model)
        ends = np.zeros((2, 0), dtype=np.int64)
        if edges is not None:
            lines = open_source(edges, "the table of edges")
            names = [self.columns["source"], self.columns["target"]]
            lines.require(names, ", an end of the edges")
            everyone = pa.concat_arrays([self.ids, new])
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


def load_nodes(run: str | Path) -> NodeArtifact:
    """Read a run of :func:`train_nodes`.

    Raises:
        DataError: no such run, or a file is missing or damaged.
    """
    folder = Path(run) / "graph"
    if not (folder / "graph.json").is_file():
        raise DataError(f"{run} is no run on nodes (no graph/graph.json); expected a folder written by ctrlib train --nodes")
    info = json.loads((folder / "graph.json").read_text(encoding="utf-8"))
    for name, digest in info["files"].items():
        if not (folder / name).is_file() or sha256(folder / name) != digest:
            raise DataError(f"file {folder / name} is missing or damaged; copy the run again")
    tensors = load_file(folder / "graph.safetensors")
    ids = pq.read_table(folder / "ids.parquet")["id"].combine_chunks()
    adjacency = Adjacency(tensors["offsets"].numpy(), tensors["neighbours"].numpy())
    columns = {key: info[key] for key in ("id", "source", "target")}
    return NodeArtifact(artifact.load(run), ids, adjacency, tensors["hidden"], columns)


def _cast(ids: Any, kind: Any) -> Any:
    try:
        return ids.cast(kind)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise DataError(f"ids of nodes are {ids.type}; expected {kind}, as those of the training nodes") from error


def _probability(logits: Tensor) -> Floats:
    return Predictions(logits=logits.double().numpy(), labels=None, weight=None, group=None, classes=True).probability
