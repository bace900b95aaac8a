"""A whole run on nodes of a graph as one call: nodes and edges → model → best weights → metrics → artifact.

What :mod:`ctrlib.experiment` is to rows.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import numpy.typing as npt

from ctrlib import artifact
from ctrlib.batch import Batch
from ctrlib.config import ConfigError, check_choice, check_not_negative, check_seed, override, positive, to_json
from ctrlib.data.graph import SPLITS, ClassWeight, Graph, GraphOptions, read_graph
from ctrlib.data.subgraphs import Clusters, Neighbourhoods, Partition, partition
from ctrlib.experiment import torch_device
from ctrlib.files import new_folder, write_json
from ctrlib.models.catgcn import CatGCN, node_preset
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import COMPONENTS
from ctrlib.models.propagation import check_reach
from ctrlib.node_artifact import save_graph
from ctrlib.optim import OptimizerConfig, ScheduleConfig
from ctrlib.training import Batches, FitConfig, evaluate, fit, seed_everything

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
        if self.fan_outs and self.batches != "neighbours":
            raise ConfigError(f"fan_outs is {self.fan_outs}, which has no effect for batches {self.batches!r}; leave it out")
        if self.fit.monitor == "gauc":
            raise ConfigError("fit.monitor is 'gauc', and nodes have no groups; expected auc, log_loss, accuracy or macro_f1")
        if self.model.embedding.frozen:
            raise ConfigError(
                f"embedding.frozen names {self.model.embedding.frozen[0]!r}, and nodes have no pretrained vectors; leave it out"
            )


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
        nodes, edges: tables, see :func:`~ctrlib.data.graph.read_graph`; or the :class:`~ctrlib.data.graph.Graph` that it made
            with the same options, and ``None``.
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
    check_seed(seed)
    if config.batches == "neighbours":
        check_reach(config.model.propagation, config.fan_outs)
    if isinstance(nodes, Graph) and edges is not None:
        raise ConfigError("edges are given beside a Graph, which has its own; give None")
    device = torch_device(config.device)
    with new_folder(out) as part:
        started = time.perf_counter()
        graph = nodes if isinstance(nodes, Graph) else read_graph(nodes, edges, options)
        if config.fit.compile and config.model.recompute and graph.adjacency.num_nodes > config.model.block_nodes:
            raise ConfigError(
                f"fit.compile does not reach nodes that are encoded block by block and once more for the gradient; set "
                f"model.recompute to false, model.block_nodes to {graph.adjacency.num_nodes} or more, or fit.compile to false"
            )
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
        save_graph(part / "graph", graph, model, options)
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
