from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import log_loss, roc_auc_score

from ctrlib import artifact
from ctrlib.calibration import Calibration
from ctrlib.config import ConfigError
from ctrlib.data.encoder import Encoder
from ctrlib.experiment import DataOptions, configure, train
from ctrlib.files import sealed
from ctrlib.models.ctr import build_model
from ctrlib.schema import DataError, Schema, SparseField
from tests.clicks import FIELDS, SCHEMA, clicks, csv_text, tiny, write


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    options = DataOptions(schema=SCHEMA, valid=data / "valid.parquet", test=data / "test.parquet")
    train(data / "train.parquet", tiny(), out, options)
    return out


@pytest.fixture(scope="module")
def loaded(run: Path) -> artifact.Artifact:
    return artifact.load(run)


SCRIPT = """
import json, sys

found = []
sys.addaudithook(lambda event, args: found.append(args) if event == "pickle.find_class" else None)

import pandas, polars, pyarrow.parquet
from ctrlib import artifact

run, folder = sys.argv[1:]
parquet = folder + "/rows.parquet"
frame = polars.read_parquet(parquet)
kinds = {
    "parquet": parquet,
    "csv": folder + "/rows.csv",
    "pandas": pandas.read_parquet(parquet),
    "polars": frame,
    "lazy": frame.lazy(),
    "dicts": frame.to_dicts(),
    "columns": frame.to_dict(as_series=False),
    "arrow": pyarrow.parquet.read_table(parquet),
}
before = len(found)
loaded = artifact.load(run)
scores = {kind: loaded.predict(rows).tolist() for kind, rows in kinds.items()}
opened = len(found) - before
import pickle
pickle.loads(pickle.dumps(json.JSONDecoder))
print(json.dumps({"scores": scores, "opened": opened, "control": len(found) - before - opened}))
"""


def test_a_fresh_process_scores_every_kind_of_table_as_evaluation_did(data: Path, run: Path, tmp_path: Path) -> None:
    rows = pq.read_table(data / "test.parquet").select(FIELDS)  # no labels
    pq.write_table(rows, tmp_path / "rows.parquet")
    (tmp_path / "rows.csv").write_text(csv_text(rows))
    done = subprocess.run([sys.executable, "-c", SCRIPT, run, tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["opened"] == 0
    assert found["control"] == 1  # the hook does see a pickle that names a class

    table = pq.read_table(data / "test.parquet")
    labels = table["label"].to_numpy()
    reported = json.loads((run / "metrics.json").read_text())["test"]
    for scores in found["scores"].values():
        assert len(scores) == 401
        assert roc_auc_score(labels, scores) == pytest.approx(reported["auc"], abs=1e-9)
        assert log_loss(labels, scores) == pytest.approx(reported["log_loss"], abs=1e-9)
    reference = np.array(found["scores"]["parquet"])
    for kind, scores in found["scores"].items():
        np.testing.assert_allclose(scores, reference, rtol=0, atol=1e-12, err_msg=kind)

    here = artifact.load(run)
    with torch.no_grad():
        logits = here.model(here.encoder.transform(table)).logits
    np.testing.assert_allclose(torch.sigmoid(logits.double()).numpy(), reference, atol=1e-6)


def test_one_row_is_scored_as_in_a_batch(loaded: artifact.Artifact, data: Path) -> None:
    rows = pq.read_table(data / "test.parquet").to_pylist()
    batched = loaded.predict(rows)
    alone = [loaded.predict([row])[0] for row in rows[:20] + rows[-3:]]
    np.testing.assert_allclose(alone, np.append(batched[:20], batched[-3:]), rtol=0, atol=1e-6)


def test_a_row_of_gaps_and_of_unseen_values_is_scored(loaded: artifact.Artifact) -> None:
    nothing: dict[str, Any] = dict.fromkeys(FIELDS)
    unseen = {"user": -5, "city": "Atlantis", "price": 1e3, "age": 2000, "genres": ["x", "y"]}
    scores = loaded.predict([nothing, unseen, {**nothing, "genres": []}])
    assert np.isfinite(scores).all()
    assert ((scores > 0) & (scores < 1)).all()
    assert scores[0] == scores[2]  # no list and an empty one are the same
    assert loaded.predict([nothing])[0] == pytest.approx(scores[0], abs=1e-6)


@pytest.mark.parametrize("kind", ["dicts", "pandas", "polars", "arrow", "csv"])
def test_zero_rows_give_zero_scores(loaded: artifact.Artifact, tmp_path: Path, kind: str) -> None:
    table = clicks(3, 0).slice(0, 0)
    path = tmp_path / "none.csv"
    path.write_text(",".join(FIELDS) + "\n")
    kinds = {"dicts": [], "pandas": table.to_pandas(), "polars": pl.from_arrow(table), "arrow": table, "csv": path}
    scores = loaded.predict(kinds[kind])
    assert scores.shape == (0,)
    assert scores.dtype == np.float64


def test_two_labels_give_two_columns_also_of_no_rows(tmp_path: Path) -> None:
    table = clicks(50, 0)
    schema = Schema(fields=(SparseField(name="user"), SparseField(name="city")), labels=("label", "buy"))
    encoder = Encoder.fit(schema, table)
    config = configure("dcn", options={"model.interaction.streams.1.hidden_units": "8"}).model
    artifact.save(tmp_path / "a", encoder, build_model(config, encoder.layout), config)
    loaded = artifact.load(tmp_path / "a")
    assert loaded.predict(table).shape == (50, 2)
    assert loaded.predict(table.slice(0, 0)).shape == (0, 2)


@pytest.mark.parametrize(
    ("column", "values", "message"),
    [
        ("user", ["1", "2", "abc"], "column 'user', the table, row 3: 'abc' is not an integer"),
        ("user", [1.0, 2.5, 3.0], "column 'user', the table, row 2: 2.5 is not an integer"),
        ("price", ["1", "cheap", "3"], "column 'price', the table, row 2: 'cheap' is not a number"),
        ("price", [1.0, 2.0, float("inf")], "column 'price', the table, row 3: the value is inf"),
        ("genres", [1, 2, 3], "column 'genres', the table, row 1: the column holds int64, not lists"),
        ("genres", [["a"], ["b", None], []], "column 'genres', the table, row 2: a list holds a missing value"),
    ],
)
def test_values_of_the_wrong_kind_are_refused_by_column_and_row(
    loaded: artifact.Artifact, column: str, values: list[Any], message: str
) -> None:
    table = clicks(3, 0)
    for rows in (
        table.set_column(table.column_names.index(column), column, pa.array(values)),
        pl.from_arrow(table).with_columns(pl.Series(column, values)),  # type: ignore[union-attr]
        table.to_pandas().assign(**{column: values}),
    ):
        with pytest.raises(DataError) as refused:
            loaded.predict(rows)
        assert message in str(refused.value)


def test_other_columns_and_the_order_of_columns_change_nothing(loaded: artifact.Artifact) -> None:
    table = clicks(30, 9)
    expected = loaded.predict(table.select(FIELDS))
    reordered = table.select(sorted(table.column_names, reverse=True))
    np.testing.assert_array_equal(loaded.predict(reordered), expected)
    odd = table.append_column("odd", pa.array([{"a": 1}] * 30))
    np.testing.assert_array_equal(loaded.predict(odd), expected)
    assert isinstance(table.to_pandas(), pd.DataFrame)
    np.testing.assert_array_equal(loaded.predict(table.to_pandas()[list(reversed(table.column_names))]), expected)


@pytest.mark.parametrize("rows", [0, 5])
def test_a_missing_column_is_named(loaded: artifact.Artifact, rows: int) -> None:
    table = clicks(5, 0).drop_columns(["city"]).slice(0, rows)
    with pytest.raises(DataError, match="no column 'city', which the model reads"):
        loaded.predict(table)


def test_raw_rows_are_explained_with_labels(data: Path, tmp_path: Path) -> None:
    table = pq.read_table(data / "test.parquet")
    encoder = Encoder.fit(SCHEMA, table)
    config = configure("fm", options={"model.embedding.dim": "4"}).model
    artifact.save(tmp_path / "a", encoder, build_model(config, encoder.layout), config)
    loaded = artifact.load(tmp_path / "a")
    shown = loaded.explain(table)
    with torch.no_grad():
        expected = loaded.model.explain(loaded.encoder.transform(table))
    assert list(shown) == list(expected) == ["pair", "first_order/field"]
    for name, explanation in shown.items():
        np.testing.assert_allclose(explanation.values, expected[name].double().numpy(), rtol=0, atol=1e-6)
        assert explanation.values.shape == (401, *map(len, explanation.labels))
    assert shown["first_order/field"].labels == (tuple(loaded.info["fields"]),)
    none = loaded.explain([])
    assert {name: e.values.shape[0] for name, e in none.items()} == dict.fromkeys(shown, 0)
    assert {name: e.labels for name, e in none.items()} == {name: e.labels for name, e in shown.items()}
    with pytest.raises(DataError, match="no column 'city', which the model reads"):
        loaded.explain(table.drop_columns(["city"]).slice(0, 0))


def test_what_is_loaded_is_what_was_saved(run: Path, loaded: artifact.Artifact) -> None:
    assert loaded.schema == SCHEMA
    assert loaded.config == tiny().model
    assert loaded.info["parameters"] == sum(p.numel() for p in loaded.model.parameters())
    assert loaded.info["encoder_hash"] == loaded.encoder.hash
    assert not loaded.model.training
    assert artifact.load(run / "artifact").info == loaded.info
    assert not list(run.rglob("*.pkl")) + list(run.rglob("*.pt")) + list(run.rglob("*.bin"))


def flip(name: str) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (path,) = [p for p in folder.rglob("*") if p.match(name)][:1]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    return damage


def rewrite(name: str, edit: Callable[[str], str], *, rehash: bool = True) -> Callable[[Path], None]:
    """Change a file; with ``rehash`` the checksum in artifact.json agrees, as after an edit with intent."""

    def damage(folder: Path) -> None:
        (folder / name).write_text(edit((folder / name).read_text()))
        if rehash:
            info = json.loads((folder / "artifact.json").read_text())
            info["files"][name] = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            (folder / "artifact.json").write_text(json.dumps(sealed(info)))

    return damage


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def manifest(*, seal: bool = True, **changes: object) -> Callable[[Path], None]:
    def edit(text: str) -> str:
        info = {**json.loads(text), **changes}
        return json.dumps(sealed(info) if seal else info)

    return rewrite("artifact.json", edit, rehash=False)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip("weights.safetensors"), "weights.safetensors is missing or damaged"),
        (flip("vocabularies/0000.parquet"), "0000.parquet is missing or damaged"),
        (remove("weights.safetensors"), "weights.safetensors is missing or damaged"),
        (remove("vocabularies/0001.parquet"), "0001.parquet is missing or damaged"),
        (remove("schema.json"), "schema.json is missing or damaged"),
        (remove("artifact.json"), "is not an artifact"),
        (manifest(format=3), "has format 3, newer than this version reads (2): install a newer ctrlib"),
        (manifest(format=0), "has format 0; this version reads 1 to 2"),
        (manifest(format="2"), "has format '2'; this version reads 1 to 2"),
        (manifest(seal=False, parameters=3), "artifact.json is damaged or was changed"),
        (manifest(files={}), "is missing or damaged"),
        (manifest(files=[]), "artifact.json is damaged or was changed"),
        (manifest(calibration="calibration-0123456789ab.json"), "calibration-0123456789ab.json is missing or damaged"),
        (manifest(calibration="../weights.safetensors"), "names '../weights.safetensors' as its calibration"),
        (manifest(calibration=["x"]), "names ['x'] as its calibration"),
        (manifest(fields=["city", "user", "price", "age", "genres"]), "are not those of its schema"),
        (rewrite("artifact.json", lambda _: '{"format": 1, ', rehash=False), "artifact.json is missing or damaged"),
        (rewrite("artifact.json", lambda _: "[1]", rehash=False), "holds a list; expected an object"),
        (rewrite("model.json", lambda text: text.replace('"MLP"', '"MLQ"')), "'MLQ', which is unknown; did you mean 'MLP'?"),
        (rewrite("model.json", lambda text: text.replace('"MLP"', '"os.system"')), "'os.system', which is unknown"),
        (rewrite("model.json", lambda text: text.replace('"dropout"', '"dropuot"')), "'dropuot'; did you mean 'dropout'?"),
        (rewrite("model.json", lambda text: text[:-20]), "model.json is missing or damaged"),
        (rewrite("model.json", lambda text: text.replace("16", "17")), "the weights do not fit the model"),
        (rewrite("schema.json", lambda text: text.replace('"price"', '"prize"')), "its content differs from what was saved"),
    ],
)
def test_a_damaged_artifact_is_refused(run: Path, tmp_path: Path, damage: Callable[[Path], None], message: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "artifact", copy)
    damage(copy)
    with pytest.raises((DataError, ConfigError)) as refused:
        artifact.load(copy)
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(copy) in str(refused.value) or "model.json" in str(refused.value)


def test_calibrating_removes_no_file_of_others(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run / "artifact", tmp_path / "a")
    (tmp_path / "victim.txt").write_text("here")
    manifest(calibration="../victim.txt")(tmp_path / "a")
    with pytest.raises(DataError, match="as its calibration, which is none"):
        artifact.calibrate(tmp_path / "a", {"label": Calibration(method="platt", slope=2.0)})
    assert (tmp_path / "victim.txt").read_text() == "here"


@pytest.mark.parametrize("times", [1, 2])
def test_a_load_while_it_is_calibrated(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int) -> None:
    """The file that artifact.json named is gone when it is read: the load begins again, once."""
    shutil.copytree(run / "artifact", tmp_path / "a")
    artifact.calibrate(tmp_path / "a", {"label": Calibration(method="platt", slope=2.0)})
    calls = [0]

    def meanwhile(*given: Any) -> Any:
        calls[0] += 1
        if calls[0] <= times:
            artifact.calibrate(tmp_path / "a", {"label": Calibration(method="platt", slope=2.0 + calls[0])})
        return build_model(*given)

    monkeypatch.setattr(artifact, "build_model", meanwhile)
    if times == 1:
        assert artifact.load(tmp_path / "a").calibration[0].slope == 3.0
    else:
        with pytest.raises(DataError, match="missing or damaged"):
            artifact.load(tmp_path / "a")
    assert calls[0] == 2


def test_an_artifact_is_moved_freely(run: Path, loaded: artifact.Artifact, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "elsewhere")
    rows = clicks(10, 3)
    np.testing.assert_array_equal(artifact.load(tmp_path / "elsewhere").predict(rows), loaded.predict(rows))


def test_saving_never_replaces_and_leaves_nothing_half_done(
    loaded: artifact.Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(DataError, match="exists already"):
        artifact.save(tmp_path / "taken", loaded.encoder, loaded.model, loaded.config)
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        artifact.save(tmp_path / "file" / "a", loaded.encoder, loaded.model, loaded.config)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(artifact, "save_file", full)
    with pytest.raises(DataError, match="cannot be written \\(No space left on device\\)"):
        artifact.save(tmp_path / "a", loaded.encoder, loaded.model, loaded.config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "taken"]


def test_an_artifact_of_the_first_format_is_read(run: Path, loaded: artifact.Artifact, tmp_path: Path) -> None:
    shutil.copytree(run / "artifact", tmp_path / "old")
    info = json.loads((tmp_path / "old" / "artifact.json").read_text())
    del info["checksum"]
    (tmp_path / "old" / "artifact.json").write_text(json.dumps({**info, "format": 1}))
    rows = clicks(10, 3)
    np.testing.assert_array_equal(artifact.load(tmp_path / "old").predict(rows), loaded.predict(rows))


def test_a_calibration_is_kept_replaced_and_checked(run: Path, loaded: artifact.Artifact, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run / "artifact", copy)
    rows = clicks(10, 3)
    p = loaded.predict(rows)
    for slope in (2.0, 0.5):
        artifact.calibrate(copy, {"label": Calibration(method="platt", slope=slope, intercept=0.1)})
        shown = artifact.load(copy).predict(rows)
        np.testing.assert_allclose(np.log(shown / (1 - shown)), slope * np.log(p / (1 - p)) + 0.1, rtol=1e-9, atol=1e-9)
    (file,) = copy.glob("calibration-*.json")  # the first one is gone
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(DataError, match=r"calibration-\w+\.json is missing or damaged"):
        artifact.load(copy)
    with pytest.raises(DataError, match="calibration is of labels buy; expected label"):
        artifact.calibrate(copy, {"buy": Calibration(method="none")})
