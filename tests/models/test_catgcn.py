from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import ctrlib.dropout
import ctrlib.embedding
import ctrlib.interactions.catgcn
import ctrlib.models.propagation
from ctrlib.batch import Batch, Edges, Ragged
from ctrlib.config import ConfigError, from_json, to_json
from ctrlib.data.adjacency import Adjacency
from ctrlib.data.subgraphs import take_nodes
from ctrlib.interactions.catgcn import CatInteraction
from ctrlib.losses import total_loss
from ctrlib.models.catgcn import CatGCN, node_preset
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS
from ctrlib.models.propagation import Propagation, take
from ctrlib.schema import BatchLayout, DataError, DenseColumn, SequenceColumn, SparseColumn
from tests import graphs

GRAPH = graphs.graph()
LAYOUT = GRAPH.encoder.layout
INSIDE = CatInteraction.Config(dropout=0.4, local_hidden_units=(6,), probe=2.0)


def catgcn(layout: BatchLayout = LAYOUT, **options: Any) -> CatGCN:
    torch.manual_seed(1)
    config = replace(node_preset("catgcn"), interaction=INSIDE, **options)
    config = replace(config, embedding=replace(config.embedding, dim=5))
    model = CatGCN(config, layout)
    nn.init.normal_(model.interaction.linear.bias)  # type: ignore[union-attr]
    return model.double()


def batch() -> Batch:
    return GRAPH.batch("train", GRAPH.class_weights())


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape)))


def matrix(edges: Edges) -> Tensor:
    n = len(edges.offsets) - 1
    rows = np.repeat(np.arange(n), np.diff(edges.offsets.numpy()))
    found = torch.zeros(n, n, dtype=torch.float64)
    found[torch.from_numpy(rows), edges.sources.long()] = edges.weight.double()
    return found


@pytest.mark.parametrize("symmetric", [True, False])
def test_taking_is_a_matrix_product_and_so_is_its_gradient(symmetric: bool) -> None:
    edges = GRAPH.edges
    if not symmetric:
        edges = replace(edges, weight=torch.rand(len(edges.sources)), symmetric=False)
    x = randn(120, 3).requires_grad_()
    g, dense = randn(120, 3) + 1, matrix(edges)
    y = take(edges, x)
    torch.testing.assert_close(y, dense @ x, rtol=0, atol=1e-12)
    y.backward(g)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(x.grad, dense.T @ g, rtol=0, atol=1e-12)


def test_propagations_equal_their_formulas() -> None:
    dense, h = matrix(GRAPH.edges), randn(120, 3)
    sgc = Propagation(Propagation.Config(name="sgc", hops=3), 3)
    torch.testing.assert_close(sgc(h, GRAPH.edges), torch.linalg.matrix_power(dense, 3) @ h, rtol=0, atol=1e-12)
    appnp = Propagation(Propagation.Config(name="appnp", hops=3, teleport=0.2), 3)
    z = h
    for _ in range(3):
        z = 0.8 * dense @ z + 0.2 * h
    torch.testing.assert_close(appnp(h, GRAPH.edges), z, rtol=0, atol=1e-12)
    gcn = Propagation(Propagation.Config(name="gcn", hops=2, units=3), 2).double()
    for bias in gcn.biases:
        nn.init.normal_(bias)
    w0, w1 = (layer.weight.T for layer in gcn.layers)
    hidden = (dense @ h @ w0 + gcn.biases[0]).relu()  # type: ignore[operator]
    torch.testing.assert_close(gcn(h, GRAPH.edges), dense @ hidden @ w1 + gcn.biases[1], rtol=0, atol=1e-12)
    assert torch.equal(Propagation(Propagation.Config(name="none"), 3)(h, GRAPH.edges), h)


STAR = Adjacency.from_pairs(np.zeros(3, np.int64), np.arange(1, 4), 4)


def test_bias_of_gcn_is_not_smoothed() -> None:
    """Ã H·0 + 1 = 1 for every node; Ã(H·0 + 1) would be 1.31 for the middle of a star, and 0.85 for the others."""
    gcn = Propagation(Propagation.Config(name="gcn", hops=1, units=2), 2)
    nn.init.zeros_(gcn.layers[0].weight)  # type: ignore[arg-type]
    nn.init.ones_(gcn.biases[0])
    assert torch.equal(gcn(torch.randn(4, 2), STAR.normalized()), torch.ones(4, 2))


def test_gcn_equals_that_of_torch_geometric() -> None:
    conv = pytest.importorskip("torch_geometric.nn", exc_type=ImportError).GCNConv(3, 3).double()
    gcn = Propagation(Propagation.Config(name="gcn", hops=1, units=3), 3).double()
    nn.init.normal_(conv.bias)
    with torch.no_grad():
        gcn.layers[0].weight.copy_(conv.lin.weight)  # type: ignore[operator]
        gcn.biases[0].copy_(conv.bias)
    adjacency, h = GRAPH.adjacency, randn(120, 3)
    index = torch.from_numpy(np.stack([adjacency.rows, adjacency.neighbours.astype(np.int64)]))
    torch.testing.assert_close(gcn(h, GRAPH.edges), conv(h, index), rtol=0, atol=1e-6)  # weights of edges are float32


def test_weights_of_the_older_gcn_are_refused() -> None:
    gcn = Propagation(Propagation.Config(name="gcn", hops=1, units=2), 2)
    old = nn.ModuleDict({"propagation": gcn})
    with pytest.raises(DataError, match=r"older gcn, which smoothed its bias.*train the model again"):
        old.load_state_dict({"propagation.layers.0.weight": torch.zeros(2, 2), "propagation.layers.0.bias": torch.zeros(2)})


def test_propagation_commutes_with_a_projection() -> None:
    """Why only C columns are propagated."""
    sgc, h, w = Propagation(Propagation.Config(hops=4), 3), randn(120, 3), randn(3, 2)
    torch.testing.assert_close(sgc(h @ w, GRAPH.edges), sgc(h, GRAPH.edges) @ w, rtol=0, atol=1e-12)


def test_equals_the_block_and_the_matrix() -> None:
    model = catgcn().eval()
    table = model.embedding.vocabularies["features"]
    bag = GRAPH.features.sequences["features"]
    rows = []
    for i in range(120):
        e = table[bag.values[bag.offsets[i] : bag.offsets[i + 1]].long()]
        rows.append(model.interaction(e.unsqueeze(0))[0, 0])
    expected = torch.linalg.matrix_power(matrix(GRAPH.edges), 4) @ torch.stack(rows)
    torch.testing.assert_close(model(batch()).logits, expected, rtol=0, atol=1e-10)


def test_nodes_without_edges_stand_alone() -> None:
    """A^L of a graph without edges is the identity, and equals no propagation at all."""
    model, alone = catgcn().eval(), catgcn(propagation=Propagation.Config(name="none")).eval()
    nothing = Adjacency.from_pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), 120).normalized()
    expected = alone(batch()).logits
    for given in (replace(batch(), edges=nothing), replace(batch(), edges=None)):
        torch.testing.assert_close(model(given).logits, expected, rtol=0, atol=1e-12)


def test_other_numbers_of_nodes_give_other_places_and_no_other_logits() -> None:
    model = catgcn().eval()
    order = np.random.default_rng(0).permutation(120)
    moved = replace(take_nodes(GRAPH.features, order), edges=GRAPH.adjacency.induced(order).normalized())
    torch.testing.assert_close(model(moved).logits, model(batch()).logits[order], rtol=0, atol=1e-12)


def test_order_and_padding_of_features_mean_nothing() -> None:
    model = catgcn().eval()
    bag = GRAPH.features.sequences["features"]
    lists = [bag.values[bag.offsets[i] : bag.offsets[i + 1]].flip(0) for i in range(120)]
    padded = [torch.cat([values, values.new_zeros(i % 3)]) for i, values in enumerate(lists)]
    offsets = torch.tensor([0, *(len(p) for p in padded)]).cumsum(0).int()
    changed = replace(batch(), sequences={"features": Ragged(torch.cat(padded), offsets)})
    torch.testing.assert_close(model(changed).logits, model(batch()).logits, rtol=0, atol=1e-12)


def test_a_sparse_field_is_one_more_feature() -> None:
    layout = BatchLayout(
        sparse=(SparseColumn("country", 6, "country"),), sequences=LAYOUT.sequences, labels=("team",), classes=LAYOUT.classes
    )
    model = catgcn(layout).eval()
    country = torch.arange(120, dtype=torch.int32) % 6  # 0: none
    y = model(replace(batch(), sparse=country.unsqueeze(1), edges=None)).logits
    bag, tables = GRAPH.features.sequences["features"], model.embedding.vocabularies
    for i in (5, 6):
        e = tables["features"][bag.values[bag.offsets[i] : bag.offsets[i + 1]].long()]
        e = torch.cat([e, tables["country"][country[i : i + 1].long()]]) if country[i] else e
        torch.testing.assert_close(y[i], model.interaction(e.unsqueeze(0))[0, 0], rtol=0, atol=1e-12)


def gradients(model: CatGCN) -> tuple[float, dict[str, Tensor]]:
    model.train().zero_grad()
    torch.manual_seed(3)
    loss = total_loss(model(batch()), batch())
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["sgc", "gcn"])
def test_blocks_computed_once_more_have_the_gradient_of_those_kept(name: Any) -> None:
    """With dropout: the random numbers are put back."""
    options: dict[str, Any] = {"propagation": Propagation.Config(name=name, hops=2), "block_nodes": 17}
    loss, expected = gradients(catgcn(recompute=False, **options))
    again, found = gradients(catgcn(recompute=True, **options))
    assert again == loss
    assert found.keys() == expected.keys()
    assert len(found) == len(dict(catgcn(**options).named_parameters()))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sgc", "gcn"])
def test_blocks_have_the_gradient_of_the_full_batch_with_dropout(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 17 nodes with dropout as it is, computed once more; and all nodes at once, dropping what those dropped."""
    options: dict[str, Any] = {"propagation": Propagation.Config(name=name, hops=2, dropout=0.4)}
    users = (ctrlib.dropout, ctrlib.embedding, ctrlib.interactions.catgcn, ctrlib.models.propagation)
    masks: list[Tensor] = []
    wanted: list[Tensor] = []

    def put(replacement: Callable[..., Tensor]) -> None:
        for module in users:
            monkeypatch.setattr(module, "dropout", replacement)

    def record(x: Tensor, p: float, training: bool) -> Tensor:
        if p == 0:  # of the embeddings
            return x
        masks.append(F.dropout(torch.ones_like(x), p, training))
        return x * masks[-1]

    def replay(x: Tensor, p: float, training: bool) -> Tensor:
        return x * wanted.pop(0) if p else x

    def gradient(model: CatGCN) -> tuple[float, dict[str, Tensor], int]:
        torch.manual_seed(3)
        loss = total_loss(model.train()(batch()), batch())
        drawn = len(masks)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss.item(), {key: p.grad for key, p in model.named_parameters() if p.grad is not None}, drawn

    put(record)
    loss, expected, drawn = gradient(catgcn(block_nodes=17, **options))
    blocks, inside = math.ceil(120 / 17), 2  # the global part, and the hidden layer of the local one
    after = 1 if name == "gcn" else 0  # between its layers, of all nodes at once
    assert (drawn, len(masks)) == (blocks * inside + after, 2 * blocks * inside + after)
    kept = masks[: blocks * inside]
    wanted += [torch.cat(kept[place::inside]) for place in range(inside)] + masks[blocks * inside : drawn]
    assert all(0.3 < (mask == 0).double().mean() < 0.5 for mask in wanted)
    put(replay)
    again, found, _ = gradient(catgcn(block_nodes=120, **options))
    assert not wanted
    assert again == pytest.approx(loss, abs=1e-12)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=1e-12)


def test_size_of_blocks_changes_nothing() -> None:
    """Without dropout, whose random numbers go to other nodes when blocks are cut elsewhere."""
    plain = replace(INSIDE, dropout=0.0)
    found = []
    for size in (7, 120, 10_000):
        torch.manual_seed(1)
        config = replace(node_preset("catgcn"), interaction=plain, block_nodes=size)
        found.append(gradients(CatGCN(config, LAYOUT).double()))
    for loss, grads in found[1:]:
        assert loss == pytest.approx(found[0][0], abs=1e-12)
        for key, value in found[0][1].items():
            torch.testing.assert_close(grads[key], value, rtol=0, atol=1e-12)


def test_only_training_nodes_count_in_the_loss() -> None:
    """By class weight, divided by their sum, as torch's weighted loss."""
    model = catgcn().eval()
    logits = model(batch()).logits
    train = torch.from_numpy(GRAPH.nodes("train"))
    labels, weight = torch.from_numpy(GRAPH.labels), torch.from_numpy(GRAPH.class_weights()).double()
    expected = nn.functional.cross_entropy(logits[train], labels[train], weight)
    assert total_loss(model(batch()), batch()).item() == pytest.approx(expected.item(), rel=1e-6)


def test_values_that_no_node_had_say_nothing() -> None:
    model = catgcn()
    assert not model.embedding.vocabularies["features"][:2].any()
    assert model.embedding.vocabularies["features"][2:].std().item() == pytest.approx(1.0, abs=0.1)


def test_published_size() -> None:
    """Tencent-age, 309 categories and 7 classes, and two rows for padding and unseen values."""
    classes = tuple("abcdefg")
    layout = BatchLayout(sequences=(SequenceColumn("features", 311, "features"),), labels=("age",), classes=classes)
    model = build_model(node_preset("catgcn"), layout)
    assert sum(p.numel() for p in model.parameters()) == 24_846 + 2 * 64


def test_flavours() -> None:
    paper = node_preset("catgcn", "paper").interaction
    assert (paper.bias, paper.dropout, paper.fusion_activation) == (False, 0.0, "relu")
    released = node_preset("catgcn", "released_code").interaction
    assert (released.bias, released.dropout, released.fusion_activation) == (True, 0.3, "none")
    assert node_preset("catgcn").interaction == released


def test_config_survives_json() -> None:
    config = catgcn(propagation=Propagation.Config(name="appnp")).config
    assert from_json(to_json(config), ModelComponent.Config, COMPONENTS) == config


def test_what_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs a label of classes.*'catgcn_interaction' on rows"):
        CatGCN(CatGCN.Config(), BatchLayout(sequences=LAYOUT.sequences))
    with pytest.raises(ConfigError, match=r"the data has numbers \(age\); set the encoding"):
        CatGCN(CatGCN.Config(), replace(LAYOUT, dense=(DenseColumn("age"),)))
    with pytest.raises(ConfigError, match="output_dim is 3; leave it None"):
        CatGCN.Config(interaction=CatInteraction.Config(output_dim=3))
    with pytest.raises(ConfigError, match="no model of nodes 'catgn'; did you mean 'catgcn'"):
        node_preset("catgn")
    with pytest.raises(ConfigError, match="no flavour 'official'; expected one of released_code, paper"):
        node_preset("catgcn", "official")
    with pytest.raises(ConfigError, match=r"Propagation\.name is 'sgd'.*did you mean 'sgc'"):
        Propagation.Config(name="sgd")  # type: ignore[arg-type]


def test_same_seed_same_loss() -> None:
    assert gradients(catgcn())[0] == gradients(catgcn())[0]
