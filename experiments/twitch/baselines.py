"""Graph networks of torch_geometric on the mean of the embeddings of a node's features, and an MLP that sees no edge."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch_geometric.nn import APPNP, GATConv, GCNConv, SAGEConv, SGConv

from ctrlib.batch import Batch, Output
from ctrlib.data.adjacency import Adjacency
from ctrlib.embedding import FeatureEmbedding
from ctrlib.schema import BatchLayout

NAMES = ("mlp", "gcn", "gat", "sage", "sgc", "appnp")
WIDTH = 64
HEADS = 8


def edge_index(adjacency: Adjacency) -> Tensor:
    """[2, E] as torch_geometric has edges: both directions, without loops, which its layers add themselves."""
    return torch.stack([torch.from_numpy(adjacency.neighbours.astype("int64")), torch.from_numpy(adjacency.rows)])


class Baseline(nn.Module):
    """Batch of all nodes → logits [B, C].

    Args:
        name: in :data:`NAMES`.
        layout: of the batch; its classes are predicted.
        adjacency: the graph.
        depth: layers of ``gcn``, ``gat`` and ``sage``, hops of ``sgc``, hidden layers of ``mlp`` and ``appnp``, which takes 10
            steps with a teleport of .1.
        dropout: before every layer, and of the pooled embeddings.
    """

    def __init__(self, name: str, layout: BatchLayout, adjacency: Adjacency, depth: int, dropout: float) -> None:
        super().__init__()
        self.name, self.dropout = name, dropout
        self.embedding = FeatureEmbedding(FeatureEmbedding.Config(dim=WIDTH, init_std=1.0), layout)  # as CatGCN's
        self.index: Tensor
        self.register_buffer("index", edge_index(adjacency), persistent=False)
        classes = len(layout.classes)
        self.propagate: nn.Module | None = APPNP(K=10, alpha=0.1) if name == "appnp" else None
        if name == "sgc":
            self.layers = nn.ModuleList([SGConv(WIDTH, classes, K=depth)])
        elif name in ("mlp", "appnp"):
            self.layers = nn.ModuleList([*(nn.Linear(WIDTH, WIDTH) for _ in range(depth)), nn.Linear(WIDTH, classes)])
        elif name == "gat":
            inner = [GATConv(WIDTH, WIDTH // HEADS, heads=HEADS, dropout=dropout) for _ in range(depth - 1)]
            self.layers = nn.ModuleList([*inner, GATConv(WIDTH, classes, heads=1, dropout=dropout)])
        else:
            layer = {"gcn": GCNConv, "sage": SAGEConv}[name]
            self.layers = nn.ModuleList([*(layer(WIDTH, WIDTH) for _ in range(depth - 1)), layer(WIDTH, classes)])

    def forward(self, batch: Batch) -> Output:
        x = self.embedding(batch).flatten(1)
        for i, layer in enumerate(self.layers):
            x = F.dropout(x.relu() if i else x, self.dropout, self.training)
            x = layer(x) if isinstance(layer, nn.Linear) else layer(x, self.index)
        return Output(x if self.propagate is None else self.propagate(x, self.index), classes=True)
