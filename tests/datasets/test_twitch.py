from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ctrlib.data.graph import GraphOptions, read_graph
from datasets import twitch

RAW = Path(os.environ.get("CTRLIB_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "twitch"


def raw(folder: Path, features: dict[str, list[int]], columns: str = "new_id") -> Path:
    folder.mkdir(exist_ok=True)
    for country in twitch.COUNTRIES:
        (folder / f"{country}.json").write_text(json.dumps(features))
        (folder / f"{country}_edges.csv").write_text("from,to\n0,1\n2,1\n")
        rows = "9,5,True,7,False,1\n8,6,False,9,True,0\n7,6,True,2,False,2\n"
        (folder / f"{country}_target.csv").write_text(f"id,days,mature,views,partner,{columns}\n{rows}")
    return folder


def test_nodes_are_sorted_with_sets_of_features(tmp_path: Path) -> None:
    files = twitch.prepare(raw(tmp_path / "raw", {"0": [3, 1, 3], "1": [2], "2": [5]}), tmp_path / "out")
    assert [path.name for path in files] == ["de_nodes.parquet", "de_edges.parquet", "engb_nodes.parquet", "engb_edges.parquet"]
    nodes = pq.read_table(files[0])
    assert nodes.schema == twitch.NODES
    assert nodes.to_pylist()[0] == {"id": 0, "features": [1, 3], "mature": False, "partner": True, "views": 9, "days": 6}
    assert pq.read_table(files[1]).to_pylist() == [{"source": 0, "target": 1}, {"source": 2, "target": 1}]


def test_bad_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, features, columns, message in (
        ("a", {"0": [3], "1": [2]}, "new_id", "node 2 of"),
        ("b", {"0": [3], "1": [2], "2": []}, "new_id", "has no features"),
        ("c", {"0": [3]}, "other", "expected new_id, mature"),
    ):
        folder = raw(tmp_path / name, features, columns)
        assert twitch.main(["--raw", str(folder), "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err
    assert twitch.main(["--raw", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2


@pytest.mark.skipif(not RAW.is_dir(), reason="the Twitch data is not there")
@pytest.mark.parametrize(("country", "nodes", "edges", "rate"), [("DE", 9498, 153_138, 0.6045), ("ENGB", 7126, 35_324, 0.5456)])
def test_real_graphs(country: str, nodes: int, edges: int, rate: float) -> None:
    tables = twitch.read_nodes(RAW, country), twitch.read_edges(RAW, country)
    graph = read_graph(*tables, GraphOptions(label="mature"))
    assert (graph.adjacency.num_nodes, graph.adjacency.num_edges) == (nodes, edges)
    assert graph.classes == ("false", "true")
    assert graph.labels.mean() == pytest.approx(rate, abs=5e-5)
