"""The synthetic graph of the CatGCN paper: what interactions inside nodes are for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch
from sklearn.metrics import silhouette_score

from ctrlib.batch import Batch, Output
from ctrlib.data.graph import Graph, GraphOptions, read_graph
from ctrlib.models.catgcn import CatGCN, node_preset
from ctrlib.models.ctr import build_model
from ctrlib.models.propagation import Propagation, take
from ctrlib.nodes import configure_nodes
from ctrlib.training import fit, seed_everything


def planted(seed: int = 0) -> Graph:
    """1,000 nodes of two classes with 10 of 70 binary features each, 40 of them in common; edges .005 within, .001 across."""
    rng = np.random.default_rng(seed)
    label = np.arange(1000) % 2
    features = [sorted((rng.choice(70, 10, replace=False) + 30 * y).tolist()) for y in label]
    chance = np.where(label[:, None] == label, 0.005, 0.001)
    source, target = np.nonzero(np.triu(rng.random((1000, 1000)) < chance, 1))
    nodes = pa.table({"id": range(1000), "features": features, "label": label})
    return read_graph(nodes, pa.table({"source": source, "target": target}), GraphOptions(label="label"))


def trained(graph: Graph, model: Any) -> Any:
    config = configure_nodes(epochs=120).fit
    weights = graph.class_weights()
    fit(model, [graph.batch("train", weights)], [graph.batch("valid", weights)], replace(config, patience=20))
    return model


class Plain(torch.nn.Module):
    """SGC on the mean of the embeddings."""

    def __init__(self, like: CatGCN, hops: int) -> None:
        super().__init__()
        self.embedding, self.hops = like.embedding, hops
        self.linear = torch.nn.Linear(64, 2)

    def forward(self, batch: Batch) -> Output:
        assert batch.edges is not None
        x = self.linear(self.embedding(batch).flatten(1))
        for _ in range(self.hops):
            x = take(batch.edges, x)
        return Output(x, classes=True)


def test_nodes_are_apart_before_they_see_their_neighbours() -> None:
    """By the silhouette of what enters the propagation; a qualitative claim of the paper."""
    graph = planted()
    config = replace(node_preset("catgcn"), propagation=Propagation.Config(hops=2))
    seed_everything(0)
    catgcn = trained(graph, build_model(config, graph.encoder.layout))
    seed_everything(0)
    plain = trained(graph, Plain(cast(CatGCN, build_model(config, graph.encoder.layout)), 2))
    with torch.no_grad():
        ours = catgcn.encode(graph.features).numpy()
        theirs = plain.embedding(graph.features).flatten(1).numpy()
    assert silhouette_score(ours, graph.labels) > silhouette_score(theirs, graph.labels) + 0.05
