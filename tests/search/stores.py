"""Small stores with planted fields, and stores that do not give every split away."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.store import Split, Store
from ctrlib.schema import Field, Schema, SparseField
from tests.clicks import SCHEMA, clicks

Floats = npt.NDArray[np.float64]


class Guarded(Store):
    """A store that keeps some of its splits to itself."""

    allowed: tuple[str, ...] = ("train",)

    def split(self, name: str) -> Split:
        assert name in self.allowed, f"a search read the {name} rows"
        return super().split(name)


def make(
    folder: Path,
    parts: Mapping[str, Mapping[str, Any]],
    fields: tuple[Field, ...] | None = None,
    allowed: tuple[str, ...] = ("train",),
) -> Guarded:
    """A store of the columns of each part; all but ``label`` are sparse fields unless ``fields`` says otherwise."""
    tables = {name: pa.table(dict(columns)) for name, columns in parts.items()}
    names = [name for name in tables["train"].column_names if name != "label"]
    schema = Schema(fields=fields or tuple(SparseField(name=name) for name in names), labels=("label",))
    return _guarded(folder, schema, tables, allowed)


def click_store(folder: Path, allowed: tuple[str, ...] = ("train",), schema: Schema = SCHEMA) -> Guarded:
    """:func:`tests.clicks.clicks`, with every kind of field."""
    tables = {name: clicks(rows, seed) for seed, (name, rows) in enumerate((("train", 2000), ("valid", 500), ("test", 500)))}
    return _guarded(folder, schema, tables, allowed)


def _guarded(folder: Path, schema: Schema, tables: Mapping[str, Any], allowed: tuple[str, ...]) -> Guarded:
    encoder = Encoder.fit(schema, open_source(tables["train"]))
    Store.create(folder / "store", encoder, {name: open_source(table) for name, table in tables.items()})
    opened = Guarded.open(folder / "store")
    assert isinstance(opened, Guarded)
    opened.allowed = allowed
    return opened


def coin(logit: Floats, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Labels with these log-odds."""
    return (rng.random(len(logit)) < 1 / (1 + np.exp(-logit))).astype(np.int64)
