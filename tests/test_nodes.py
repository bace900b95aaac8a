from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

import ctrlib
from ctrlib import export as exporting
from ctrlib.cli import app
from ctrlib.config import ConfigError
from ctrlib.data.graph import GraphOptions, read_graph
from ctrlib.node_artifact import NodeArtifact, load_nodes
from ctrlib.nodes import configure_nodes, train_nodes
from ctrlib.schema import DataError
from ctrlib.training import Predictions
from tests import graphs

OPTIONS = {"fit.optimizer.learning_rate": "0.05", "model.embedding.dim": "8", "model.propagation.hops": "2"}
TEAM = GraphOptions(label="team")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nodes") / "run"
    train_nodes(*graphs.tables(), configure_nodes(options=OPTIONS, epochs=80), folder, TEAM)
    return folder


@pytest.fixture(scope="module")
def loaded(run: Path) -> NodeArtifact:
    return load_nodes(run)


def report(run: Path) -> Any:
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


def test_learns_the_planted_classes(run: Path, tmp_path: Path) -> None:
    options = {**OPTIONS, "fit.optimizer.learning_rate": "0.01"}
    metrics = train_nodes(*graphs.tables(400), configure_nodes(options=options, epochs=150), tmp_path / "run", TEAM)
    assert metrics["rows"] == {"train": 320, "valid": 40, "test": 40}
    assert metrics["valid"]["accuracy"] >= 0.9
    assert metrics["test"]["accuracy"] >= 0.85
    assert {"accuracy", "macro_f1", "auc", "log_loss", "rows"} == metrics["test"].keys()
    assert sorted(p.name for p in run.iterdir()) == ["artifact", "config.json", "graph", "history.jsonl", "metrics.json"]


def test_best_weights_are_copies_and_not_those_of_the_last_epoch(run: Path) -> None:
    """The trap of the released code, whose best weights go on being trained."""
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    losses = [line["valid"]["log_loss"] for line in lines]
    assert report(run)["valid"]["log_loss"] == pytest.approx(min(losses), abs=1e-6)
    assert losses[-1] > min(losses)


def test_known_nodes_are_predicted_as_in_training(run: Path, loaded: NodeArtifact) -> None:
    graph = read_graph(*graphs.tables(), TEAM)
    model: Any = loaded.artifact.model
    with torch.no_grad():
        logits = model(graph.batch("test", graph.class_weights())).logits
    p_NC = loaded.predict()
    assert p_NC.shape == (120, 3)
    np.testing.assert_allclose(p_NC, logits.softmax(1).numpy(), rtol=0, atol=1e-6)
    test = graph.nodes("test")
    assert (p_NC[test].argmax(1) == graph.labels[test]).mean() == pytest.approx(report(run)["test"]["accuracy"])
    np.testing.assert_array_equal(loaded.predict(["n7", "n0"]), p_NC[[7, 0]])
    mine = loaded.predict()
    mine[:] = 0  # of whoever asked, and no other's
    np.testing.assert_array_equal(loaded.predict(), p_NC)
    assert loaded.classes == ("team 0", "team 1", "team 2")
    with pytest.raises(DataError, match="node n999 is not among the 120 known ones"):
        loaded.predict(["n1", "n999"])
    numbered = replace(loaded, ids=pa.array(range(120), pa.int32()))
    np.testing.assert_array_equal(numbered.predict([7]), p_NC[[7]])
    with pytest.raises(DataError, match="node 3000000000 is not among the 120 known ones"):
        numbered.predict([7, 3_000_000_000])
    with pytest.raises(DataError, match=r"ids of nodes are list<item: int64>; expected int32"):
        numbered.predict([[7]])


def test_new_nodes_are_predicted_as_if_the_graph_had_them(loaded: NodeArtifact) -> None:
    nodes, edges = graphs.tables()
    new = pa.table({"id": ["new", "other"], "features": [[1, 2, 77_777], [25, 21]]})
    more = pa.table({"source": ["new", "n3", "other"], "target": ["n5", "new", "new"]})
    extended = pa.concat_tables([nodes.select(["id", "features"]), new])
    whole = read_graph(
        extended.append_column("team", pa.array([*nodes["team"].to_pylist(), None, None])),
        pa.concat_tables([edges, more]),
        TEAM,
    )
    encoder = loaded.artifact.encoder  # the vocabulary of the training graph, which lacks 77,777
    model: Any = loaded.artifact.model
    with torch.no_grad():
        hidden = model.encode(encoder.transform(extended))
        logits = model.propagation(hidden, whole.edges)
    np.testing.assert_allclose(loaded.predict_new(new, more), logits[-2:].softmax(1).numpy(), rtol=0, atol=1e-6)


def test_new_nodes_without_edges_stand_alone_and_so_do_rows(run: Path, loaded: NodeArtifact) -> None:
    rows = pa.table({"id": ["a", "b"], "features": [[1, 2], [25]]})
    found = loaded.predict_new(rows)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    np.testing.assert_allclose(ctrlib.load(run).predict(rows), found, rtol=0, atol=1e-6)
    assert ctrlib.load(run).predict(rows.slice(0, 0)).shape == (0, 3)


def test_bad_new_nodes(loaded: NodeArtifact) -> None:
    def new(name: str = "a", features: list[int] | None = None) -> pa.Table:
        return pa.table({"id": [name], "features": [[1] if features is None else features]})

    with pytest.raises(DataError, match="node n3 is known already"):
        loaded.predict_new(new("n3"))
    with pytest.raises(DataError, match="node a has no value"):
        loaded.predict_new(pa.table({"id": ["a"], "features": pa.array([[]], pa.list_(pa.int64()))}))
    with pytest.raises(DataError, match="node zz is not in the known and the new nodes"):
        loaded.predict_new(new(), pa.table({"source": ["a"], "target": ["zz"]}))
    with pytest.raises(DataError, match="an edge between two known nodes"):
        loaded.predict_new(new(), pa.table({"source": ["a", "n1"], "target": ["n1", "n2"]}))


def test_ids_of_new_nodes_may_be_larger_than_those_known(tmp_path: Path) -> None:
    nodes, edges = graphs.tables()
    number = pa.array(range(120), pa.uint8())
    ends = {end: pa.array([int(name[1:]) for name in edges[end].to_pylist()]) for end in ("source", "target")}
    train_nodes(nodes.set_column(0, "id", number), pa.table(ends), configure_nodes(epochs=2), tmp_path / "run", TEAM)
    loaded = load_nodes(tmp_path / "run")
    new = pa.table({"id": [300, 3_000_000_000], "features": [[1], [2]]})
    assert loaded.predict_new(new, pa.table({"source": [300], "target": [3_000_000_000]})).shape == (2, 3)
    with pytest.raises(DataError, match="two new nodes have one id when read as uint8"):
        loaded.predict_new(pa.table({"id": ["200", "0200"], "features": [[1], [2]]}))
    for ids in ([1, "n7"], [2**64]):
        with pytest.raises(DataError, match=r"the ids cannot be read as one kind \(.*\); expected uint8"):
            loaded.predict(ids)


def test_options_without_effect_are_refused(tmp_path: Path) -> None:
    def train(message: str, **options: str) -> None:
        dotted = {key.replace("__", "."): value for key, value in options.items()}
        with pytest.raises(ConfigError, match=message):
            train_nodes(*graphs.tables(), configure_nodes(options=dotted, epochs=1), tmp_path / "run", TEAM)

    train(r"fan_outs is \(3, 3\), which has no effect for batches 'full'", fan_outs="3,3")
    train("fit.monitor is 'gauc', and nodes have no groups", fit__monitor="gauc")
    train("embedding.frozen names 'features', and nodes have no pretrained vectors", model__embedding__frozen="features")
    compiled = {"fit__compile": "true", "model__block_nodes": "50"}
    train("set model.recompute to false, model.block_nodes to 120 or more, or fit.compile to false", **compiled)
    assert not (tmp_path / "run").exists()
    with pytest.raises(ConfigError, match="seed is -1; expected a whole number"):
        train_nodes(*graphs.tables(), configure_nodes(epochs=1), tmp_path / "run", TEAM, seed=-1)
    with pytest.raises(ConfigError, match="edges are given beside a Graph"):
        train_nodes(graphs.graph(), graphs.tables()[1], configure_nodes(epochs=1), tmp_path / "run", TEAM)


def test_a_damaged_or_other_run_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is no run on nodes"):
        load_nodes(tmp_path)
    copy = tmp_path / "copy"
    for path in (p for p in run.rglob("*") if p.is_file()):
        target = copy / path.relative_to(run)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    described = copy / "graph" / "graph.json"
    content = described.read_text(encoding="utf-8")
    whole = json.loads(content)
    for damaged, message in (
        (content[:40], r"graph\.json is missing or damaged"),
        ("[]", r"graph\.json holds a list; expected an object"),
        ("{}", r"graph\.json is damaged"),
        (json.dumps({**whole, "id": None}), r"graph\.json is damaged"),
        (json.dumps({**whole, "files": {}}), "is missing or damaged"),
    ):
        described.write_text(damaged, encoding="utf-8")
        with pytest.raises(DataError, match=message):
            load_nodes(copy)
    described.write_text(content, encoding="utf-8")
    (copy / "graph" / "ids.parquet").write_bytes(b"")
    with pytest.raises(DataError, match=r"ids\.parquet is missing or damaged"):
        load_nodes(copy)


def test_command_line(tmp_path: Path) -> None:
    nodes, edges = graphs.tables()
    pq.write_table(nodes, tmp_path / "nodes.parquet")
    pq.write_table(edges.rename_columns(["from", "to"]), tmp_path / "edges.parquet")
    given = ["--nodes", f"{tmp_path / 'nodes.parquet'}", "--edges", f"{tmp_path / 'edges.parquet'}", "--model", "catgcn"]
    settings = [part for name, value in OPTIONS.items() for part in ("--set", f"{name}={value}")]
    out = ["--out", f"{tmp_path / 'run'}", "--epochs", "3", "--ends", "from,to"]
    result = CliRunner().invoke(app, ["train", *given, "--label", "team", *settings, *out])
    assert result.exit_code == 0, result.exception
    assert "macro_f1" in result.output
    assert load_nodes(tmp_path / "run").predict(["n1"]).shape == (1, 3)
    for wrong, message in (
        (["--label", "team", "--label", "id"], "a graph is given by --nodes FILE --edges FILE --label COLUMN"),
        (["rows.parquet", "--label", "team"], "without other data"),
        (["--label", "team", "--valid", "v.parquet", "--stream"], "--valid, --stream is for rows, not for nodes"),
        (
            ["--label", "team", "--split", "time", "--cross-memory-mb", "0"],
            "--split, --cross-memory-mb is for rows, not for nodes",
        ),
        (["--label", "team", "--ends", "from"], "expected two columns such as source,target"),
    ):
        found = CliRunner().invoke(app, ["train", *given, "--out", f"{tmp_path / 'no'}", *wrong])
        assert isinstance(found.exception, ConfigError)
        assert message in str(found.exception)
    assert CliRunner().invoke(app, ["models", "--nodes"]).output.split()[0] == "catgcn"
    nothing = CliRunner().invoke(app, ["train", "--model", "dnn", "--out", f"{tmp_path / 'no'}"])
    assert "there is no data" in str(nothing.exception)
    of_nodes = ["--id", "id", "--ends", "a,b", "--split-column", "part", "--symmetrize"]
    rows = ["train", f"{tmp_path / 'nodes.parquet'}", "--model", "lr", "--label", "team", "--out", f"{tmp_path / 'no'}"]
    for given_too in ([*of_nodes[:2]], of_nodes):
        refused = CliRunner().invoke(app, [*rows, *given_too])
        assert isinstance(refused.exception, ConfigError)
        names = ", ".join(part for part in given_too if part.startswith("--"))
        assert f"{names} is for nodes, not for rows" in str(refused.exception)


def test_what_is_for_rows_refuses_a_run_on_nodes(run: Path, tmp_path: Path) -> None:
    """Sigmoids of its logits would be no probabilities of classes."""
    message = r"is for models of rows, and this is a run on nodes \(label 'team' with 3 classes\); .*load_nodes"
    with pytest.raises(ConfigError, match=message):
        ctrlib.Ranker.load(run)
    with pytest.raises(ConfigError, match=message):
        pytest.importorskip("ctrlib.service").Engine(run)
    artifact = ctrlib.load(run)
    with pytest.raises(ConfigError, match=message):
        exporting.export(artifact, tmp_path / "program")
    with pytest.raises(ConfigError, match=message):
        exporting.verify(artifact, graphs.tables()[0], {})
    pq.write_table(graphs.tables()[0], tmp_path / "nodes.parquet")
    rows, out = str(tmp_path / "nodes.parquet"), str(tmp_path / "out")
    for command in (["evaluate", rows], ["calibrate", rows], ["export", "--out", out], ["verify", rows]):
        found = CliRunner().invoke(app, [command[0], str(run), *command[1:]])
        assert isinstance(found.exception, ConfigError)
        assert f"{command[0]} is for models of rows" in str(found.exception)
    assert not (tmp_path / "out").exists()
    assert ctrlib.load(run).predict(graphs.tables()[0].slice(0, 2)).sum(1) == pytest.approx(1)


def test_monitor_by_accuracy_and_what_the_rows_lack(tmp_path: Path) -> None:
    tables = graphs.tables()
    config = configure_nodes(options={**OPTIONS, "fit.monitor": "macro_f1"}, epochs=2)
    assert train_nodes(*tables, config, tmp_path / "a", TEAM)["epochs"] == 2
    wrong = configure_nodes(options={**OPTIONS, "fit.monitor": "auc-log_loss"}, epochs=1)
    assert train_nodes(*tables, wrong, tmp_path / "b", TEAM)["epochs"] == 1


def test_probabilities_of_classes() -> None:
    logits = np.array([[0.0, np.log(3.0)], [1000.0, 0.0]])
    found = Predictions(logits=logits, labels=None, weight=None, group=None, classes=True).probability
    np.testing.assert_allclose(found, np.array([[0.25, 0.75], [1, 0]]), atol=1e-15)


@pytest.mark.parametrize(
    "options",
    [
        {"batches": "clusters", "partition": "random", "parts": "4", "parts_per_batch": "2"},
        {"batches": "neighbours", "batch_size": "32", "fan_outs": "5,5"},
        {"model.propagation.name": "gcn", "model.propagation.units": "8"},
        {"fit.precision": "bf16", "model.block_nodes": "100"},
    ],
    ids=["clusters", "neighbours", "gcn", "bf16"],
)
def test_other_batches_and_propagations_learn_too(options: dict[str, str], tmp_path: Path) -> None:
    config = configure_nodes(options={**OPTIONS, "fit.patience": "None", **options}, epochs=30)
    metrics = train_nodes(*graphs.tables(400), config, tmp_path / "run", TEAM)
    assert metrics["test"]["accuracy"] >= 0.75
    assert load_nodes(tmp_path / "run").predict().shape == (400, 3)


def test_fan_outs_are_for_the_hops_of_the_model(tmp_path: Path) -> None:
    config = configure_nodes(options={**OPTIONS, "batches": "neighbours"})
    with pytest.raises(ConfigError, match="fan_outs has 0 numbers and the model takes 2 hops"):
        train_nodes(*graphs.tables(), config, tmp_path / "run", TEAM)
