"""OptInter from raw rows with crosses to a smaller store and a trained model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa

import ctrlib
from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, RunConfig, prepare, train
from ctrlib.models.ctr import build_model
from ctrlib.models.optinter import OptInter
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import Schema, SparseField
from ctrlib.search.optinter import OptInterConfig, search_optinter
from ctrlib.search.selection import Selection, apply_to_store
from ctrlib.training import FitConfig
from tests.search.planted import random_sign_pair, small

FIT = FitConfig(epochs=1, optimizer=OptimizerConfig(embedding="dense", learning_rate=0.01, max_grad_norm=None))


def test_search_apply_and_train(tmp_path: Path) -> None:
    x_NF, y_N = random_sign_pair(60_000, 20, 0)
    rows = pa.table({**{f"f{i}": x_NF[:, i] for i in range(4)}, "label": y_N.astype(np.int8)})
    parts = {
        name: rows.slice(at, size) for name, at, size in (("train", 0, 50_000), ("valid", 50_000, 5000), ("test", 55_000, 5000))
    }
    schema = Schema(fields=tuple(SparseField(name=f"f{i}") for i in range(4)), labels=("label",)).with_crosses()
    store = prepare(parts["train"], tmp_path / "store", DataOptions(schema=schema, valid=parts["valid"], test=parts["test"]))
    found = search_optinter(small(), store, OptInterConfig.few_steps(), fit=FIT, batch_size=100, seed=0)
    found.save(tmp_path / "selection")
    selection = Selection.load(tmp_path / "selection")
    assert selection.pairs == found.pairs
    assert [name for name, choice in (selection.pairs or {}).items() if choice != "naive"] == ["f0*f1"]
    assert isinstance(selection.model, OptInter.Config)
    smaller = apply_to_store(selection, store, tmp_path / "smaller")
    assert [c.name for c in smaller.encoder.layout.sparse if c.parts] == ["f0*f1"]
    built = build_model(selection.model, smaller.encoder.layout)
    assert sum(p.numel() for p in built.parameters()) == selection.report["parameters"]["chosen"]
    report = train(smaller, RunConfig(model=selection.model, fit=FIT, batch_size=100, ridge=0.0), tmp_path / "run")
    assert report["test"]["auc"] > 0.9
    raw = parts["test"].drop_columns(["label"])
    scores = np.asarray(ctrlib.load(tmp_path / "run").predict(raw))
    assert len(scores) == 5000
    assert Store.open(tmp_path / "smaller").rows == store.rows
