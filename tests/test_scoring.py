"""``ctrlib predict``: the probabilities of a table as a table, from Python and from the command line."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ctrlib
from ctrlib.config import ConfigError
from ctrlib.schema import DataError
from tests import graphs
from tests.clicks import TINY, write


@pytest.fixture(scope="module")
def clicks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write(tmp_path_factory.mktemp("clicks"))
    rows = ctrlib.DataOptions(schema=folder / "schema.json", valid=folder / "valid.parquet", test=folder / "test.parquet")
    ctrlib.train(folder / "train.parquet", ctrlib.configure("dnn", options=TINY), folder / "run", rows)
    return folder


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("nodes") / "run"
    small = ctrlib.configure_nodes(options={"model.embedding.dim": "8"}, epochs=3)
    ctrlib.train_nodes(*graphs.tables(), small, run, ctrlib.GraphOptions(label="team"))
    return run


def test_rows(clicks: Path, tmp_path: Path) -> None:
    rows = pq.read_table(clicks / "test.parquet")
    expected = ctrlib.load(clicks / "run").predict(rows)
    pq.write_table(rows.drop_columns(["label"]), tmp_path / "rows.parquet")
    command = [
        sys.executable,
        "-m",
        "ctrlib",
        "predict",
        clicks / "run",
        tmp_path / "rows.parquet",
        "--out",
        tmp_path / "p.parquet",
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"401 rows written to {tmp_path / 'p.parquet'}\n"
    found = pq.read_table(tmp_path / "p.parquet")
    assert found.column_names == ["label"]
    np.testing.assert_allclose(found["label"], expected, rtol=0, atol=1e-6)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["p.parquet", "rows.parquet"]


def test_nodes(nodes: Path, tmp_path: Path) -> None:
    loaded = ctrlib.load_nodes(nodes)
    assert ctrlib.predict_run(nodes, None, tmp_path / "known.parquet") == 120
    known = pq.read_table(tmp_path / "known.parquet")
    assert known.column_names == ["id", *(f"probability_team {i}" for i in range(3))]
    assert known["id"].to_pylist() == loaded.ids.to_pylist()
    np.testing.assert_array_equal(np.stack(known.columns[1:], 1), loaded.predict())

    new = pa.table({"id": ["new", "other"], "features": [[1, 2, 77_777], [25, 21]]})
    edges = pa.table({"source": ["new", "n3"], "target": ["n5", "new"]})
    assert ctrlib.predict_run(nodes, new, tmp_path / "new.parquet", edges=edges) == 2
    found = pq.read_table(tmp_path / "new.parquet")
    assert found["id"].to_pylist() == ["new", "other"]
    np.testing.assert_array_equal(np.stack(found.columns[1:], 1), loaded.predict_new(new, edges))


def test_rows_by_the_artifact_of_a_run_on_nodes(nodes: Path, tmp_path: Path) -> None:
    rows = pa.table({"features": [[1, 2], [25, 21]]})
    assert ctrlib.predict_run(nodes / "artifact", rows, tmp_path / "rows.parquet") == 2
    found = pq.read_table(tmp_path / "rows.parquet")
    assert found.column_names == [f"probability_team {i}" for i in range(3)]
    np.testing.assert_array_equal(np.stack(found.columns, 1), ctrlib.load(nodes / "artifact").predict(rows))


def test_refusals_leave_nothing(clicks: Path, nodes: Path, tmp_path: Path) -> None:
    rows, out = pq.read_table(clicks / "test.parquet"), tmp_path / "p.parquet"
    with pytest.raises(DataError, match="there is no such folder"):
        ctrlib.predict_run(tmp_path / "nowhere", None, out)
    with pytest.raises(ConfigError, match="is a run on rows; name a table of rows, and no edges"):
        ctrlib.predict_run(clicks / "run", None, out)
    with pytest.raises(ConfigError, match="is a run on rows"):
        ctrlib.predict_run(clicks / "run", rows, out, edges=rows)
    with pytest.raises(ConfigError, match="edges are of new nodes; name their table too"):
        ctrlib.predict_run(nodes, None, out, edges=rows)
    with pytest.raises(DataError, match="has no column 'city'"):
        ctrlib.predict_run(clicks / "run", rows.drop_columns(["city"]), out)
    with pytest.raises(DataError, match="is no folder; make it"):
        ctrlib.predict_run(clicks / "run", rows, tmp_path / "none" / "p.parquet")
    assert not list(tmp_path.iterdir())
    out.write_text("mine")
    with pytest.raises(DataError, match="exists; choose another name, or remove it"):
        ctrlib.predict_run(clicks / "run", rows, out)
    assert out.read_text() == "mine"
