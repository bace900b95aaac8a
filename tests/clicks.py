"""Tiny raw click data with everything that real tables have: gaps, lists, rare values, a time, weights, two labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ctrlib.experiment import RunConfig, configure
from ctrlib.schema import DenseField, Schema, SequenceField, SparseField

FIELDS = ("user", "city", "price", "age", "genres")
SCHEMA = Schema(
    fields=(
        SparseField(name="user", min_count=2),
        SparseField(name="city"),
        DenseField(name="price"),
        DenseField(name="age", encoding="bucket", num_bins=4),
        SequenceField(name="genres", separator="|"),
    ),
    labels=("label",),
)
TINY = {
    "model.embedding.dim": "4",
    "model.interaction.hidden_units": "16",
    "fit.optimizer.learning_rate": "0.01",
    "fit.epochs": "2",
    "batch_size": "256",
}


def tiny(**options: str) -> RunConfig:
    """A two-epoch run of a small ``dnn``; options by dotted path with ``__`` for the dots."""
    return configure("dnn", options=TINY | {path.replace("__", "."): value for path, value in options.items()})


def clicks(rows: int, seed: int) -> Any:
    """An Arrow table; ``day`` is a time in random order, ``id`` the number of the row."""
    rng = np.random.default_rng(seed)
    user, city = rng.integers(0, 40, rows), rng.integers(0, 6, rows)
    price, age = np.exp(rng.normal(size=rows)), rng.integers(18, 80, rows)
    count = rng.integers(0, 4, rows)
    logit = np.sin(user) + 0.8 * (city % 3) - 0.9 * np.log(price) + 0.3 * count - 0.5
    genres = [None if c == 3 else [f"g{g}" for g in rng.integers(0, 9, c)] for c in count]

    def gaps(values: list[Any]) -> list[Any]:
        return [None if gone else v for v, gone in zip(values, rng.random(rows) < 0.1, strict=True)]

    return pa.table(
        {
            "user": pa.array(gaps(user.tolist()), pa.int64()),
            "city": pa.array(gaps([f"Stadt {c}" for c in city]), pa.string()),
            "price": pa.array(gaps(price.tolist()), pa.float64()),
            "age": pa.array(gaps(age.tolist()), pa.int64()),
            "genres": pa.array(genres, pa.list_(pa.string())),
            "day": pa.array(rng.permutation(rows) + 1_700_000_000, pa.int64()),
            "w": pa.array(rng.integers(0, 3, rows).astype(float), pa.float64()),
            "id": pa.array(range(rows), pa.int64()),
            "label": pa.array((rng.random(rows) < 1 / (1 + np.exp(-logit))).astype(int).tolist(), pa.int64()),
            "buy": pa.array((rng.random(rows) < 0.3).astype(int).tolist(), pa.int64()),
        }
    )


def write(folder: Path) -> Path:
    """``train.parquet``, ``valid.parquet``, ``test.parquet`` (with values never seen before) and ``schema.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    for seed, (name, rows) in enumerate({"train": 2000, "valid": 400, "test": 400}.items()):
        table = clicks(rows, seed)
        if name == "test":
            new = pa.table(
                {**{c: [None] for c in table.column_names}, "user": [987654], "city": ["Atlantis"], "genres": [["new"]]}
            )
            new = new.set_column(new.column_names.index("label"), "label", pa.array([1]))
            new = new.set_column(new.column_names.index("buy"), "buy", pa.array([0]))
            new = new.set_column(new.column_names.index("w"), "w", pa.array([1.0]))
            table = pa.concat_tables([table, new.cast(table.schema)])
        pq.write_table(table, folder / f"{name}.parquet")
    SCHEMA.save(folder / "schema.json")
    return folder


def csv_text(table: Any) -> str:
    """CSV written by hand: lists joined by ``|``, nothing for a missing value."""

    def cell(value: object) -> str:
        return "" if value is None else "|".join(value) if isinstance(value, list) else repr(value).strip("'")

    lines = [",".join(table.column_names)]
    lines += [",".join(cell(v) for v in row.values()) for row in table.to_pylist()]
    return "\n".join(lines) + "\n"
