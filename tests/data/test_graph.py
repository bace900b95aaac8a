from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pytest
import torch

from ctrlib.batch import Edges
from ctrlib.config import ConfigError
from ctrlib.data.adjacency import Adjacency, entries
from ctrlib.data.graph import GraphOptions, read_graph
from ctrlib.data.subgraphs import take_nodes
from ctrlib.schema import DataError, Schema, SequenceField, SparseField
from tests import graphs
from tests.reference.catgcn import node_matrix

TEAM = GraphOptions(label="team")


def pairs(*edges: tuple[int, int]) -> tuple[Any, Any]:
    array = np.array(edges, dtype=np.int64).reshape(-1, 2)
    return array[:, 0], array[:, 1]


def dense(edges: Edges) -> Any:
    """[N, N] float64."""
    n = len(edges.offsets) - 1
    matrix = np.zeros((n, n))
    rows = np.repeat(np.arange(n), np.diff(edges.offsets.numpy()))
    matrix[rows, edges.sources.numpy()] = edges.weight.numpy()
    return matrix


def test_normalised_matrix_of_a_path_by_hand() -> None:
    a, b = 0.5, 6**-0.5
    expected = [[a, b, 0], [b, 1 / 3, b], [0, b, a]]
    np.testing.assert_allclose(dense(Adjacency.from_pairs(*pairs((0, 1), (1, 2)), 3).normalized()), expected, atol=1e-7)


@pytest.mark.parametrize("listing", ["once", "both", "repeated", "with loops"])
def test_normalised_matrix_equals_the_formula_however_edges_are_listed(listing: str) -> None:
    rng = np.random.default_rng(1)
    edges = [(int(u), int(v)) for u, v in rng.integers(0, 12, (20, 2)) if u < v]
    listed = {
        "once": [(v, u) if i % 2 else (u, v) for i, (u, v) in enumerate(edges)],
        "both": edges + [(v, u) for u, v in edges],
        "repeated": edges + edges[:4],
        "with loops": [*edges, (3, 3), (3, 3), (7, 7)],
    }[listing]
    listed = [*dict.fromkeys(listed)] if listing == "once" else listed
    found = Adjacency.from_pairs(*pairs(*listed), 14).normalized()
    np.testing.assert_allclose(dense(found), node_matrix(14, edges), rtol=0, atol=1e-7)


def test_normalised_matrix_equals_that_of_torch_geometric() -> None:
    conv = pytest.importorskip("torch_geometric.nn.conv.gcn_conv", exc_type=ImportError)
    rng = np.random.default_rng(2)
    source, target = rng.integers(0, 40, (2, 60))
    adjacency = Adjacency.from_pairs(source, target, 45, symmetrize=True)
    index = torch.from_numpy(np.stack([adjacency.rows, adjacency.neighbours.astype(np.int64)]))
    loops = torch.arange(45).repeat(2, 1)
    for listed in (index, torch.cat([index, loops], dim=1)):  # with loops of its own, too
        (row, column), weight = conv.gcn_norm(listed, num_nodes=45)
        matrix = np.zeros((45, 45))
        np.add.at(matrix, (row.numpy(), column.numpy()), weight.numpy())
        np.testing.assert_allclose(dense(adjacency.normalized()), matrix, rtol=0, atol=1e-7)


def test_isolated_nodes_keep_what_they_have() -> None:
    matrix = dense(Adjacency.from_pairs(*pairs((0, 2)), 4).normalized())
    assert matrix[1].tolist() == [0, 1, 0, 0]
    assert matrix[3].tolist() == [0, 0, 0, 1]
    np.testing.assert_array_equal(dense(Adjacency.from_pairs(*pairs(), 3).normalized()), np.eye(3))


def test_directed_graphs_are_refused_unless_directions_are_to_be_forgotten() -> None:
    listed = pairs((0, 1), (1, 0), (1, 2))
    with pytest.raises(
        DataError, match=r"2 of 3 edges are listed in both directions.*such as that at place 2 of the arrays: a directed"
    ):
        Adjacency.from_pairs(*listed, 3)
    assert Adjacency.from_pairs(*listed, 3, symmetrize=True).num_edges == 2


def test_induced_and_extended_graphs() -> None:
    edges = [(0, 1), (1, 2), (2, 3), (3, 0), (1, 3)]
    whole = Adjacency.from_pairs(*pairs(*edges), 4)
    part = whole.induced(np.array([3, 1, 0]))
    np.testing.assert_allclose(dense(part.normalized()), node_matrix(3, [(0, 1), (0, 2), (1, 2)]), atol=1e-7)
    more = whole.extended(*pairs((4, 1), (1, 4), (5, 4)), 2)
    np.testing.assert_allclose(dense(more.normalized()), node_matrix(6, [*edges, (4, 1), (4, 5)]), atol=1e-7)


def test_entries_of_rows() -> None:
    at, owner = entries(np.array([0, 2, 2, 5]), np.array([2, 1, 0]))
    assert (at.tolist(), owner.tolist()) == ([2, 3, 4, 0, 1], [0, 0, 0, 2, 2])


def test_reads_nodes_in_order_with_classes_by_name() -> None:
    nodes, edges = graphs.tables()
    found = read_graph(nodes, edges, TEAM)
    assert found.classes == ("team 0", "team 1", "team 2")
    assert [found.classes[i] for i in found.labels] == nodes["team"].to_pylist()
    assert found.ids.to_pylist() == nodes["id"].to_pylist()
    assert found.encoder.schema == Schema(fields=(SequenceField(name="features"),), labels=("team",), classes=found.classes)
    assert np.bincount(found.split).tolist() == [96, 12, 12]
    offsets = found.features.sequences["features"].offsets
    assert (offsets[1:] - offsets[:-1]).tolist() == [len(v) for v in nodes["features"].to_pylist()]
    assert found.adjacency.num_edges == edges.num_rows


def test_split_depends_on_the_seed_or_is_given() -> None:
    nodes, edges = graphs.tables()
    splits = [read_graph(nodes, edges, GraphOptions(label="team", seed=seed)).split for seed in (0, 0, 1)]
    assert (splits[0] == splits[1]).all()
    assert (splits[0] != splits[2]).any()
    says = ["train", "valid", "test", None, "later"] * 24
    given = read_graph(nodes.append_column("part", pa.array(says)), edges, GraphOptions(label="team", split="part"))
    assert given.split.tolist() == [0, 1, 2, 3, 3] * 24


def test_unlabelled_nodes_are_in_no_split() -> None:
    nodes, edges = graphs.tables()
    team = [None if i % 3 == 0 else t for i, t in enumerate(nodes["team"].to_pylist())]
    found = read_graph(nodes.set_column(2, "team", pa.array(team)), edges, TEAM)
    assert (found.split[::3] == 3).all()
    assert (found.labels[::3] == -1).all()
    assert not found.weights("train", found.class_weights())[::3].any()


@pytest.mark.parametrize(
    ("values", "names"),
    [([True, False] * 60, ("false", "true")), ([10, 9, 2, 10] * 30, ("2", "9", "10"))],
    ids=["booleans", "numbers"],
)
def test_classes_are_in_order_of_value(values: list[object], names: tuple[str, ...]) -> None:
    nodes, edges = graphs.tables()
    found = read_graph(nodes.set_column(2, "team", pa.array(values)), edges, TEAM)
    assert found.classes == names
    assert [found.classes[i] for i in found.labels] == [str(v).lower() for v in values]


def test_class_weights_by_hand_count_training_labels_only() -> None:
    nodes, edges = graphs.tables(8)
    nodes = nodes.set_column(2, "team", pa.array(["a", "a", "a", "b", "b", "b", "b", "b"]))
    nodes = nodes.append_column("part", pa.array(["train", "train", "train", "train", "valid", "test", "test", "test"]))
    found = read_graph(nodes, edges, GraphOptions(label="team", split="part"))
    np.testing.assert_allclose(found.class_weights("train"), [4 / (2 * 3), 4 / (2 * 1)], rtol=1e-6)
    np.testing.assert_allclose(found.class_weights("all"), [8 / (2 * 3), 8 / (2 * 5)], rtol=1e-6)
    assert found.class_weights("none").tolist() == [1, 1]
    np.testing.assert_allclose(found.weights("train", found.class_weights()), [2 / 3] * 3 + [2] + [0] * 4, rtol=1e-6)


def test_more_fields_by_schema() -> None:
    nodes, edges = graphs.tables()
    nodes = nodes.append_column("country", pa.array(["de", "en"] * 60))
    schema = Schema(fields=(SequenceField(name="features"), SparseField(name="country")), labels=("x",))
    found = read_graph(nodes, edges, GraphOptions(label="team", schema=schema))
    assert found.features.sparse.shape == (120, 1)
    assert found.encoder.layout.names == ("country", "features")


def test_taking_nodes() -> None:
    whole = graphs.graph().features
    some = take_nodes(whole, np.array([5, 0, 5]))
    bag, part = whole.sequences["features"], some.sequences["features"]
    for row, node in enumerate((5, 0, 5)):
        expected = bag.values[bag.offsets[node] : bag.offsets[node + 1]]
        assert torch.equal(part.values[part.offsets[row] : part.offsets[row + 1]], expected)
    assert len(some) == 3


def change(column: str, row: int, value: object) -> pa.Table:
    nodes, _ = graphs.tables()
    values = nodes[column].to_pylist()
    values[row] = value
    return nodes.set_column(nodes.schema.get_field_index(column), column, pa.array(values))


NODES, EDGES = graphs.tables()


@pytest.mark.parametrize(
    ("nodes", "edges", "message"),
    [
        (change("id", 7, "n3"), EDGES, r"'id', .*: node n3 is there twice \(first .*\); expected every node once"),
        (change("id", 7, None), EDGES, "'id', .*: the node has no id"),
        (change("features", 7, []), EDGES, r"node n7 has no value in 'features' \(1 nodes have none\); give it one"),
        (change("features", 7, None), EDGES, "node n7 has no value in 'features'"),
        (NODES, pa.table({"source": ["n1", "n2"], "target": ["n2", "n999"]}), "'target', .*: node n999 is not in .*nodes"),
        (NODES, pa.table({"source": ["n1", None], "target": ["n2", "n3"]}), "node None is not in"),
        (NODES, pa.table({"from": ["n1"], "target": ["n2"]}), "'source'"),
        (NODES.set_column(2, "team", pa.nulls(120, pa.string())), EDGES, "no node has a label"),
        (NODES.set_column(2, "team", pa.array(["a"] * 120)), EDGES, "single class 'a'"),
        (NODES.set_column(2, "team", pa.array(np.arange(120) + 0.5)), EDGES, "values of type double; expected classes"),
        (NODES.select(["id", "team"]), EDGES, r"no column of lists.*\(--schema\)"),
        (NODES.slice(0, 0), EDGES, "has no nodes"),
    ],
)
def test_what_is_refused(nodes: pa.Table, edges: pa.Table, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read_graph(nodes, edges, TEAM)


def test_a_class_without_training_nodes_is_refused() -> None:
    nodes = NODES.append_column("part", pa.array(["train", "valid", "test"] * 40))
    team = ["a", "b"] * 60
    team = [("c" if i % 3 == 2 else t) for i, t in enumerate(team)]
    with pytest.raises(DataError, match="class 'c' has no training node"):
        read_graph(nodes.set_column(2, "team", pa.array(team)), EDGES, GraphOptions(label="team", split="part"))
    given = nodes.set_column(3, "part", pa.array(["train"] * 120))
    with pytest.raises(DataError, match="no labelled node for valid"):
        read_graph(given, EDGES, GraphOptions(label="team", split="part"))


def test_a_directed_edge_is_named_by_ids_and_place() -> None:
    nodes = pa.table({"id": [10, 20, 30, 40, 50, 60], "f": [[1]] * 6, "y": [0, 1] * 3})
    listed = pa.table({"source": [40, 10, 20, 20], "target": [40, 20, 10, 30]})
    options = GraphOptions(label="y", shares={"train": 0.7, "valid": 0.15, "test": 0.15})
    with pytest.raises(DataError, match=r"such as that from node 20 to 30 \(the table of edges, row 4\): a directed graph"):
        read_graph(nodes, listed, options)


def test_weights_of_rows_are_refused() -> None:
    schema = Schema(fields=(SequenceField(name="features"),), labels=("x",), weight="w")
    with pytest.raises(DataError, match="the column 'w' of row weights, and nodes have none"):
        read_graph(NODES.append_column("w", pa.array(np.ones(120))), EDGES, GraphOptions(label="team", schema=schema))


def test_roles_that_nodes_have_not_are_refused() -> None:
    for role in ("group", "time"):
        schema = replace(Schema(fields=(SequenceField(name="features"),), labels=("x",)), **cast(Any, {role: "team"}))
        with pytest.raises(DataError, match=f"the schema has the column 'team' as {role}, which has no meaning for nodes"):
            read_graph(NODES, EDGES, GraphOptions(label="team", schema=schema))


def test_a_node_of_which_every_field_is_missing_is_refused() -> None:
    features = [[1], *NODES["features"].to_pylist()[1:]]
    features[7], features[9] = [], []
    nodes = NODES.set_column(1, "features", pa.array(features, pa.list_(pa.int64())))
    nodes = nodes.append_column("city", pa.array([None if i in (7, 8) else "x" for i in range(120)]))
    schema = Schema(fields=(SequenceField(name="features"), SparseField(name="city")), labels=("team",))
    with pytest.raises(DataError, match=r"row 8: node n7 has no value in 'features', 'city' \(1 nodes have none\)"):
        read_graph(nodes, EDGES, GraphOptions(label="team", schema=schema))


def test_empty_text_is_no_label() -> None:
    team = ["" if i % 3 == 0 else name for i, name in enumerate(NODES["team"].to_pylist())]
    found = read_graph(NODES.set_column(2, "team", pa.array(team)), EDGES, TEAM)
    assert "" not in found.classes
    assert (found.labels < 0).tolist() == [i % 3 == 0 for i in range(120)]


def test_options_that_contradict_each_other() -> None:
    with pytest.raises(DataError, match="both ends of an edge are column 'a'"):
        GraphOptions(label="y", source="a", target="a")
    with pytest.raises(DataError, match="the split is that of column 'part', so shares have no effect"):
        GraphOptions(label="y", split="part", shares={"train": 0.6, "valid": 0.2, "test": 0.2})
    with pytest.raises(DataError, match="expected numbers above 0 for train, valid, test that sum to 1"):
        GraphOptions(label="y", shares={"train": 0.8, "valid": 0.1, "test": 0.1, "other": 0.1})
    with pytest.raises(ConfigError, match="seed is -1; expected a whole number"):
        GraphOptions(label="y", seed=-1)


def test_lists_that_are_no_categories_nor_splits() -> None:
    vectors = pa.array([[0.5, 1.0]] * 120)
    with pytest.raises(DataError, match=r"column 'vector' .* holds lists of double, and features are categories"):
        read_graph(NODES.append_column("vector", vectors), EDGES, TEAM)
    with pytest.raises(DataError, match=r"column 'vector' .* holds .*list.*; expected text: train, valid, test"):
        read_graph(NODES.append_column("vector", vectors), EDGES, replace(TEAM, split="vector"))
    with pytest.raises(DataError, match=r"column 'id' .* holds double; expected one id a node"):
        read_graph(NODES.set_column(0, "id", pa.array(np.arange(120.0))), EDGES, TEAM)


def test_unknown_ids_that_are_larger_than_the_nodes_type() -> None:
    nodes = NODES.set_column(0, "id", pa.array(range(120), pa.int32()))
    large = pa.table({"source": [1, 2], "target": [2, 3_000_000_000]})
    with pytest.raises(DataError, match=r"'target', .*row 2: node 3000000000 is not in the table of nodes.*\(1 ends"):
        read_graph(nodes, large, TEAM)


def test_lists_are_no_ids() -> None:
    with pytest.raises(DataError, match=r"'id' of the table of nodes holds .*list.*; expected one id a node"):
        read_graph(NODES.set_column(0, "id", pa.array([[i] for i in range(120)])), EDGES, TEAM)
    with pytest.raises(DataError, match=r"'source' of the table of edges holds .*list.*; expected .*string as ids"):
        read_graph(NODES, pa.table({"source": [["n1"]], "target": ["n2"]}), TEAM)
    with pytest.raises(DataError, match=r"'source' of the table of edges holds .*list.*; expected int64 as ids"):
        read_graph(NODES.set_column(0, "id", pa.array(range(120))), pa.table({"source": [[1]], "target": [2]}), TEAM)


def test_ids_of_another_type_are_refused_or_read_as_the_nodes_are() -> None:
    numbers = NODES.set_column(0, "id", pa.array(range(120)))
    text = pa.table({"source": ["1", "2"], "target": ["2", "3"]})
    assert read_graph(numbers, text, TEAM).adjacency.num_edges == 2
    with pytest.raises(DataError, match=r"'source' of .* holds .*string; expected int64 as ids"):
        read_graph(numbers, EDGES, TEAM)
