"""Time and memory of one epoch on a large graph: ``python -m benchmarks.graph [--nodes 1_000_000]`` (minutes).

Synthetic nodes with bags of features, and random edges. Writes ``benchmarks/results/graph.json``: seconds of an epoch (one step
of all nodes, with dropout) and of one validation, nanoseconds per edge and hop, and the peak memory of the process, read from
the system. Blocks are encoded again for the gradient, so memory is bounded; the limit that it is held to is 8 GiB.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from benchmarks.common import write_result
from ctrlib.batch import Batch, Ragged
from ctrlib.cpu import tune_cpu
from ctrlib.data.adjacency import Adjacency
from ctrlib.files import json_text
from ctrlib.interactions.catgcn import CatInteraction
from ctrlib.losses import total_loss
from ctrlib.models.catgcn import CatGCN
from ctrlib.models.ctr import build_model
from ctrlib.models.propagation import Propagation
from ctrlib.optim import OptimizerConfig, build_optimizer
from ctrlib.schema import BatchLayout, SequenceColumn

LIMIT_GIB = 8.0


def synthetic(nodes: int, features: int, edges: int, vocabulary: int, seed: int = 0) -> Batch:
    """Random nodes, half of which are for training, with exactly so many features each."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(2, vocabulary, nodes * features, dtype=np.int32)
    offsets = np.arange(nodes + 1, dtype=np.int32) * features
    source, target = rng.integers(0, nodes, (2, edges))
    return Batch(
        sparse=torch.zeros(nodes, 0, dtype=torch.int32),
        dense=torch.zeros(nodes, 0),
        sequences={"features": Ragged(torch.from_numpy(ids), torch.from_numpy(offsets))},
        labels=torch.from_numpy(rng.integers(0, 2, nodes)),
        weight=torch.from_numpy((rng.random(nodes) < 0.5).astype(np.float32)),
        edges=Adjacency.from_pairs(source, target, nodes, symmetrize=True).normalized(),
    )


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Build the graph, take a step, predict all nodes."""
    started = time.perf_counter()
    batch = synthetic(options.nodes, options.features, options.edges, options.vocabulary)
    assert batch.edges is not None
    built = time.perf_counter() - started
    columns = (SequenceColumn("features", options.vocabulary, "features"),)
    layout = BatchLayout(sequences=columns, labels=("class",), classes=("a", "b"))
    config = CatGCN.Config(
        interaction=CatInteraction.Config(dropout=0.3),
        propagation=Propagation.Config(hops=options.hops),
        block_nodes=options.block_nodes,
        recompute=not options.keep,
    )
    torch.manual_seed(0)
    model = build_model(config, layout)
    optimizer = build_optimizer(model, OptimizerConfig(embedding="dense"))
    before = _peak()

    started, cpu = time.perf_counter(), time.process_time()
    model.train()
    torch.autograd.backward(total_loss(model(batch), batch))
    optimizer.step()
    epoch, epoch_cpu = time.perf_counter() - started, time.process_time() - cpu

    started = time.perf_counter()
    model.eval()
    with torch.no_grad():
        hidden = model.encode(batch)  # type: ignore[operator]
        encoded = time.perf_counter() - started
        model.propagation(hidden, batch.edges)  # type: ignore[operator]
    validation = time.perf_counter() - started
    directed = len(batch.edges.sources) - options.nodes
    peak = _peak()
    return {
        "nodes": options.nodes,
        "features": options.features,
        "edges": directed // 2,
        "hops": options.hops,
        "block_nodes": options.block_nodes,
        "recompute": not options.keep,
        "threads": torch.get_num_threads(),
        "build_seconds": built,
        "epoch_seconds": epoch,
        "epoch_cpu_seconds": epoch_cpu,
        "epoch_seconds_per_edge": epoch / (directed // 2),
        "validation_seconds": validation,
        "propagation_nanoseconds_per_directed_edge_and_hop": 1e9
        * (validation - encoded)
        / ((directed + options.nodes) * options.hops),
        "peak_gib_before_training": before,
        "peak_gib": peak,
        "within_limit": peak <= LIMIT_GIB,
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=20, help="of every node")
    parser.add_argument("--edges", type=int, default=10_000_000, help="undirected, before repeated ones are dropped")
    parser.add_argument("--vocabulary", type=int, default=10_000)
    parser.add_argument("--hops", type=int, default=4)
    parser.add_argument("--block-nodes", type=int, default=CatGCN.Config().block_nodes)
    parser.add_argument("--keep", action="store_true", help="keep everything for the gradient instead of computing it again")
    options = parser.parse_args(argv)
    tune_cpu()
    found = measure(options)
    write_result("graph", found)
    print(json_text(found))


if __name__ == "__main__":
    main()
