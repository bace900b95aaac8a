"""CatGCN: nodes with categorical features (Chen et al., TKDE 35(4), arXiv:2009.05303).

Shape letters: B nodes, T values of all nodes one after another, D embedding dim, C classes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, cast

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ctrlib.batch import Batch, Output
from ctrlib.config import ConfigError, positive
from ctrlib.embedding import FeatureEmbedding
from ctrlib.interactions.catgcn import Bag, CatInteraction
from ctrlib.models.ctr import ModelComponent, initialize
from ctrlib.models.propagation import Propagation
from ctrlib.schema import OOV_ID, BatchLayout, FieldLayout, suggest

Ids = tuple[Tensor, Tensor]


class CatGCN(ModelComponent):
    """Logits of classes: interactions inside every node, projected to C, then smoothed along the edges.

        H = a·MLP_g(h_g) + (1 − a)·MLP_l(h_l),  Y = Ã^L H

    with h_l and h_g of :class:`~ctrlib.interactions.catgcn.CatInteraction` over the bag of a node: the values of all its
    sequence fields, and those of its sparse fields. Padding is not in the bag. Shape: Batch with ``edges`` → logits
    [B, C]; without edges every node stands alone.

    Nodes are encoded in blocks. Of several blocks nothing but their [block, C] results is kept for the gradient, and each is
    computed once more when its gradient is asked for, with the same random numbers: memory is bounded by a block, and the
    gradient is that of all nodes at once. (Random numbers are drawn block by block, so ``block_nodes`` decides which values
    dropout drops.) The graph's part sees all nodes at once, and has C columns only.

    Raises:
        ConfigError: the data has numeric fields, or no classes.
    """

    @dataclass(frozen=True, kw_only=True, slots=True)
    class Config(ModelComponent.Config):
        """Options. The defaults are those of the released code, of which the paper's results are.

        Attributes:
            embedding: of the values; the released code has 64 and starts at N(0, 1).
            interaction: inside the nodes; its ``output_dim`` is given by the classes.
            propagation: along the edges.
            block_nodes: nodes that are encoded at once.
            recompute: as above; ``False`` keeps everything of all blocks for the gradient: faster, and more memory.
        """

        embedding: FeatureEmbedding.Config = field(default_factory=lambda: FeatureEmbedding.Config(dim=64, init_std=1.0))
        interaction: CatInteraction.Config = field(default_factory=CatInteraction.Config)
        propagation: Propagation.Config = field(default_factory=Propagation.Config)
        block_nodes: int = 4096
        recompute: bool = True

        def __post_init__(self) -> None:
            positive("CatGCN.block_nodes", self.block_nodes)
            if self.interaction.output_dim is not None:
                raise ConfigError(
                    f"CatGCN.interaction.output_dim is {self.interaction.output_dim}; leave it None: it is given by the classes"
                )

    reads_classes = True

    def __init__(self, config: Config, layout: BatchLayout) -> None:
        super().__init__()
        self.config = config
        if not layout.classes:
            raise ConfigError(
                "CatGCN needs a label of classes, and the data has none; train it on nodes and edges (ctrlib train --nodes "
                "--edges), or use the preset 'catgcn_interaction' on rows"
            )
        if layout.dense:
            raise ConfigError(
                f"CatGCN reads categories, and the data has numbers ({', '.join(c.name for c in layout.dense)}); set the "
                "encoding of these fields to 'bucket' in the schema, or remove them"
            )
        self.embedding = FeatureEmbedding(config.embedding, layout)
        names = self.embedding.out.names
        self._sparse = [(i, c.name) for i, c in enumerate(layout.sparse) if c.name in names]
        self._sequences = [c.name for c in layout.sequences if c.name in names]
        self.propagation = Propagation(config.propagation, len(layout.classes))
        inside = replace(config.interaction, output_dim=self.propagation.in_width)
        self.interaction: CatInteraction = CatInteraction(inside, FieldLayout(names, config.embedding.dim))
        initialize(self, config.weight_init)
        with torch.no_grad():  # what no node had should say nothing, and would else stay random
            for vectors in self.embedding.vocabularies.values():
                vectors[OOV_ID] = 0

    def encode(self, batch: Batch) -> Tensor:
        """H: what the nodes say by themselves. Shape: Batch → [B, C] (of ``gcn``, [B, units])."""
        bags = self._bags(batch)
        size = self.config.block_nodes
        count = len(batch)
        if count <= size:
            return self._encode(bags)
        starts = list(range(0, count, size))
        edges = [*starts, count]
        cuts = {name: offsets[torch.tensor(edges, device=offsets.device)].tolist() for name, (_, offsets) in bags.items()}
        blocks = []
        for i, start in enumerate(starts):
            stop = edges[i + 1]
            block = {
                name: (ids[cuts[name][i] : cuts[name][i + 1]], offsets[start : stop + 1] - cuts[name][i])
                for name, (ids, offsets) in bags.items()
            }
            again = self.config.recompute and torch.is_grad_enabled()
            blocks.append(cast(Tensor, checkpoint(self._encode, block, use_reentrant=False)) if again else self._encode(block))
        return torch.cat(blocks)

    def forward(self, batch: Batch) -> Output:
        h_BC = self.encode(batch)
        h_BC = h_BC.to(torch.promote_types(h_BC.dtype, torch.float32))  # sums over many neighbours, also under autocast
        return Output(self.propagation(h_BC, batch.edges), classes=True)

    def _encode(self, bags: Mapping[str, Ids]) -> Tensor:
        vectors: list[Bag] = [(self.embedding.values(ids, name), offsets) for name, (ids, offsets) in bags.items()]
        return self.interaction.pool(vectors).squeeze(1)

    def _bags(self, batch: Batch) -> dict[str, Ids]:
        """Ids and offsets by field, without padding; a sparse field is a bag of at most one value."""
        flat = {name: batch.sequences[name].flat for name in self._sequences}
        bags = {name: _without_padding(r.values, r.offsets) for name, r in flat.items()}
        ones = torch.arange(len(batch) + 1, dtype=torch.int32, device=batch.sparse.device)
        return bags | {name: _without_padding(batch.sparse[:, i], ones) for i, name in self._sparse}


def _without_padding(ids_T: Tensor, offsets_B1: Tensor) -> Ids:
    there_T = ids_T > 0
    before = torch.cat([there_T.new_zeros(1, dtype=torch.int32), there_T.cumsum(0, dtype=torch.int32)])
    return ids_T[there_T], before[offsets_B1.long()]


Flavour = Literal["released_code", "paper"]


def catgcn(flavour: Flavour = "released_code") -> CatGCN.Config:
    """The published model. Widths, ρ, a, L and dropout, which the paper tunes per data set, are our choice.

    * ``released_code``: embeddings start at N(0, 1), a bias and a dropout in the global interaction, no ReLU on the logits.
    * ``paper``: as printed: neither bias nor dropout there, a ReLU on both projections, Xavier everywhere.
    """
    if flavour == "released_code":
        return CatGCN.Config(interaction=CatInteraction.Config(dropout=0.3), propagation=Propagation.Config(hops=4))
    # NOTE[DIFF] Xavier's deviation of a table depends on its size; .05 is that of 740 values of width 64
    return CatGCN.Config(
        embedding=FeatureEmbedding.Config(dim=64, init_std=0.05),
        weight_init="xavier_uniform",
        interaction=CatInteraction.Config(bias=False, fusion_activation="relu"),
        propagation=Propagation.Config(hops=4),
    )


NODE_FLAVOURS: tuple[Flavour, ...] = ("released_code", "paper")
NODE_MODELS = {"catgcn": catgcn}


def node_preset(name: str, flavour: str | None = None) -> CatGCN.Config:
    """The config of a model of nodes.

    Args:
        name: in :data:`NODE_MODELS`.
        flavour: in :data:`NODE_FLAVOURS`; ``None``: the first.

    Raises:
        ConfigError: no such model or flavour; names the nearest.
    """
    if name not in NODE_MODELS:
        raise ConfigError(f"there is no model of nodes {name!r}{suggest(name, NODE_MODELS)} (all: {', '.join(NODE_MODELS)})")
    for known in NODE_FLAVOURS:
        if known == (flavour or NODE_FLAVOURS[0]):
            return NODE_MODELS[name](known)
    raise ConfigError(f"model {name!r} has no flavour {flavour!r}; expected one of {', '.join(NODE_FLAVOURS)}")
