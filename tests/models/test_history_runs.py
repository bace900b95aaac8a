"""Models of behaviours from raw rows to a saved run: planted taste is found, users without a history get sensible scores."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import ctrlib
from ctrlib import cli
from ctrlib.config import ConfigError
from ctrlib.experiment import DataOptions, configure, train
from ctrlib.schema import History, Schema, SequenceField, SparseField

CATEGORIES, ITEMS = 4, 40
SCHEMA = Schema(
    fields=(
        SparseField(name="hour", side="context"),
        SparseField(name="item"),
        SparseField(name="category"),
        SequenceField(name="hist_item", side="context", ordered=True, shares="item"),
        SequenceField(name="hist_category", side="context", ordered=True, shares="category"),
    ),
    labels=("click",),
    group="user",
    time="time",
    histories=(History(fields=("hist_item", "hist_category"), times="hist_time", gaps="hist_gap"),),
)
OPTIONS = {
    "model.embedding.dim": "8",
    "model.embedding.init_std": "0.1",
    "fit.epochs": "4",
    "fit.optimizer.learning_rate": "0.005",
    "batch_size": "256",
    "ridge": "5",
}


def raw(rows: int, seed: int) -> Any:
    """Users who click what is of the category that they clicked before; a fifth of them without a history. The item that is of
    category 0 is liked by all."""
    r = np.random.default_rng(seed)
    taste, count = r.integers(0, CATEGORIES, rows), np.where(r.random(rows) < 0.2, 0, r.integers(1, 7, rows))
    item = r.integers(0, ITEMS, rows)
    likes = (item % CATEGORIES == taste) & (count > 0) | (item % CATEGORIES == 0)
    histories = []
    for t, n in zip(taste, count, strict=True):
        own = r.random(n) < 0.8
        histories.append(
            np.where(own, t + CATEGORIES * r.integers(0, ITEMS // CATEGORIES, n), r.integers(0, ITEMS, n)).tolist()
        )
    return pa.table(
        {
            "user": seed * 10**6 + np.arange(rows) // 4,
            "hour": r.integers(0, 24, rows),
            "item": item,
            "category": item % CATEGORIES,
            "hist_item": pa.array(histories, pa.list_(pa.int64())),
            "hist_category": pa.array([[i % CATEGORIES for i in h] for h in histories], pa.list_(pa.int64())),
            "hist_time": pa.array([list(range(len(h))) for h in histories], pa.list_(pa.int64())),
            "time": np.full(rows, 100),
            "click": (r.random(rows) < np.where(likes, 0.85, 0.1)).astype(int),
        }
    )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("histories")
    for seed, (name, rows) in enumerate({"train": 6000, "valid": 1000, "test": 2000}.items()):
        pq.write_table(raw(rows, seed), folder / f"{name}.parquet")
    SCHEMA.save(folder / "schema.json")
    return folder


@pytest.fixture(scope="module")
def store(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stores") / "store"
    options = DataOptions(schema=SCHEMA, valid=str(data / "valid.parquet"), test=str(data / "test.parquet"))
    ctrlib.prepare(data / "train.parquet", out, options)
    return out


@pytest.mark.parametrize("name", ["din", "bst", "aw_moe"])
def test_planted_taste_is_found(name: str, store: Path, data: Path, tmp_path: Path) -> None:
    contrast = {"model.contrast.weight": "0.1"} if name == "aw_moe" else {}  # enough to move something
    report = train(store, configure(name, options={**OPTIONS, **contrast}), tmp_path / "run", name=name, seed=1)
    assert report["test"]["auc"] > 0.8
    loaded = ctrlib.load(tmp_path / "run")
    rows = pq.read_table(data / "test.parquet").slice(0, 400)
    p = loaded.predict(rows)
    empty = np.array([len(h) == 0 for h in rows["hist_item"].to_pylist()])
    assert empty.any()
    popular = rows["category"].to_numpy()[empty] == 0  # what a user without a history is to be shown
    assert p[empty][popular].mean() > 0.6
    assert p[empty][~popular].mean() < 0.3
    shown = loaded.explain(rows.slice(0, 7))
    for found in shown.values():
        assert found.values.shape == (7, *map(len, found.labels))
        assert np.isfinite(found.values).all()


def test_from_the_command_line(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", data / "train.parquet", "--model", "aw_moe", "--schema", data / "schema.json", "--out", tmp_path / "run"]
    words += ["--epochs", 1, "--set", "model.experts.count=2", "--set", "model.contrast.weight=0.2"]
    monkeypatch.setattr(sys, "argv", ["ctrlib", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code, capsys.readouterr().err
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["model"]["type"] == "AWMoE"
    assert written["model"]["contrast"]["weight"] == 0.2
    history = (tmp_path / "run" / "history.jsonl").read_text().splitlines()
    assert np.isfinite(json.loads(history[0])["train_loss"])


def test_data_without_a_history_is_refused(data: Path, tmp_path: Path) -> None:
    plain = Schema(fields=SCHEMA.fields[:3], labels=SCHEMA.labels, group="user")
    for name in ("din", "bst", "aw_moe"):
        with pytest.raises(
            ConfigError, match="reads a history of behaviours, but the data has none; declare one in the schema"
        ):
            train(
                data / "train.parquet",
                configure(name, options={"batch_size": "256"}),
                tmp_path / name,
                DataOptions(schema=plain),
            )
    grouped = Schema(fields=SCHEMA.fields, labels=SCHEMA.labels, time="time", histories=SCHEMA.histories)
    with pytest.raises(
        ConfigError, match=r"which rows are of one user, and the data has no group; name the column in the schema"
    ):
        train(data / "train.parquet", configure("aw_moe"), tmp_path / "aw_moe", DataOptions(schema=grouped))
