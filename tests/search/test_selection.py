"""Selections: saved and loaded, applied to encoders and stores, and refused where they do not fit."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from ctrlib.config import ConfigError
from ctrlib.data import store as store_module
from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.split import split_rows
from ctrlib.data.store import Store
from ctrlib.data.vocabulary import Vocabulary
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import preset
from ctrlib.schema import DataError, DenseField, Schema, SequenceField, SparseField
from ctrlib.search.selection import Selection, apply_to_store
from tests.models.small import shrunk

N = 260
SCHEMA = Schema(
    fields=(
        SparseField(name="user", min_count=2),
        SequenceField(name="tags"),
        DenseField(name="price"),
        SparseField(name="item"),
        SparseField(name="agent", hash_size=20),
        SequenceField(name="seen", shares="item", max_length=2),
        SparseField(name="last", shares="item"),
        DenseField(name="age", encoding="bucket", num_bins=4),
        DenseField(name="clicks", encoding="criteo_log"),
        DenseField(name="height", encoding="piecewise", num_bins=4),
    ),
    labels=("y",),
    group="user",
    weight="w",
)


def raw(n: int = N, seed: int = 2) -> pa.Table:
    r = np.random.default_rng(seed)
    items = 2**62 + np.arange(20)

    def gaps(values: Any) -> list[Any]:
        return [None if r.random() < 0.1 else v for v in values.tolist()]

    return pa.table(
        {
            "y": r.integers(0, 2, n),
            "w": r.random(n),
            "user": gaps(np.array([f"u{k}" for k in r.integers(0, 40, n)])),
            "tags": [["a", "b", "c", "d"][r.integers(0, 3) : r.integers(1, 5)] for _ in range(n)],
            "price": r.normal(size=n),
            "item": r.choice(items, n),
            "agent": gaps(np.array([f"agent {k}" for k in r.integers(0, 9, n)])),
            "seen": [None if r.random() < 0.2 else r.choice(items, r.integers(0, 5)).tolist() for _ in range(n)],
            "last": gaps(r.choice(items, n)),
            "age": pa.array(gaps(r.integers(18, 80, n)), pa.int64()),
            "clicks": pa.array(gaps(r.integers(0, 500, n)), pa.int64()),
            "height": r.normal(170, 10, n),
        }
    )


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder.fit(SCHEMA, raw())


@pytest.fixture(scope="module")
def crossed() -> Encoder:
    return Encoder.fit(SCHEMA.with_crosses([("user", "item"), ("item", "age"), ("user", "agent")]), raw())


def masks(encoder: Encoder, share: float = 0.6, seed: int = 0) -> dict[str, Any]:
    """Random values of every learned vocabulary; the OOV of every other one is dropped."""
    r = np.random.default_rng(seed)
    found = {}
    for i, (name, vocabulary) in enumerate(encoder.vocabularies.items()):
        if isinstance(vocabulary, Vocabulary):
            found[name] = r.random(vocabulary.size) < share
            found[name][:2] = False, i % 2 == 0
    return found


def select(encoder: Encoder, **options: Any) -> Selection:
    return Selection(method="test", encoder_hash=encoder.hash, **options)


def test_saved_and_loaded(encoder: Encoder, tmp_path: Path) -> None:
    config = shrunk(preset("deepfm"))
    weights = build_model(config, encoder.layout).state_dict()
    full = select(
        encoder,
        fields=("user", "item"),
        values=masks(encoder),
        pairs={"user*item": "memorize", "user*last": "naive"},
        scores={"user": 0.25, "item": float("nan")},
        model=config,
        weights=weights,
        report={"seconds": 1.5, "kept": {"user": 3}},
    )
    full.save(tmp_path / "full")
    again = Selection.load(tmp_path / "full")
    for name in ("method", "encoder_hash", "fields", "pairs", "model", "report"):
        assert getattr(again, name) == getattr(full, name)
    assert again.scores["user"] == 0.25
    assert np.isnan(again.scores["item"])
    assert again.values is not None
    assert full.values is not None
    assert list(again.values) == list(full.values)
    assert all(np.array_equal(again.values[n], m) and again.values[n].dtype == bool for n, m in full.values.items())
    assert again.weights is not None
    assert list(again.weights) == sorted(weights)
    assert all(torch.equal(again.weights[n], w) for n, w in weights.items())
    assert sorted(p.name for p in (tmp_path / "full").iterdir()) == ["selection.json", "values.parquet", "weights.safetensors"]
    bare = select(encoder)
    bare.save(tmp_path / "bare")
    assert Selection.load(tmp_path / "bare") == bare
    assert [p.name for p in (tmp_path / "bare").iterdir()] == ["selection.json"]
    with pytest.raises(DataError, match="exists already"):
        bare.save(tmp_path / "bare")


def test_damaged_files_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a selection"):
        Selection.load(tmp_path)
    select(encoder, values=masks(encoder)).save(tmp_path / "a")
    with (tmp_path / "a" / "values.parquet").open("ab") as file:
        file.write(b"x")
    with pytest.raises(DataError, match=r"values\.parquet is missing or damaged"):
        Selection.load(tmp_path / "a")
    (tmp_path / "a" / "values.parquet").unlink()
    with pytest.raises(DataError, match=r"values\.parquet is missing or damaged"):
        Selection.load(tmp_path / "a")
    path = tmp_path / "a" / "selection.json"
    data = json.loads(path.read_text())
    for changed, message in (({"format": 9}, "has format 9"), ({"files": 3}, "is damaged"), ({"scores": [1]}, "is damaged")):
        path.write_text(json.dumps({**data, "files": {}, **changed}))
        with pytest.raises(DataError, match=message):
            Selection.load(tmp_path / "a")
    for text in ("{", "[]", "{}"):
        path.write_text(text)
        with pytest.raises(DataError, match="is damaged"):
            Selection.load(tmp_path / "a")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="is damaged"):
        Selection.load(tmp_path / "a")
    with pytest.raises(ConfigError, match="expected one of 'memorize', 'factorize', 'naive'; did you mean 'memorize'"):
        select(encoder, pairs={"user*item": "memorise"})


def test_dropped_values_become_padding_and_nothing_else_changes(encoder: Encoder) -> None:
    kept = masks(encoder)
    derived = select(encoder, values=kept).apply(encoder)
    assert derived.schema == encoder.schema
    before, after = (e.transform(raw(seed=5)) for e in (encoder, derived))
    assert torch.equal(torch.nan_to_num(before.dense), torch.nan_to_num(after.dense))
    for i, column in enumerate(encoder.layout.sparse):
        new = new_ids(kept, column.table, column.vocab_size)
        assert after.sparse[:, i].tolist() == new[before.sparse[:, i]].tolist(), column.name
        assert derived.layout.sparse[i].vocab_size == max(new.max() + 1, 2), column.name
    for sequence in encoder.layout.sequences:
        new = new_ids(kept, sequence.table, sequence.vocab_size)
        a, b = before.sequences[sequence.name], after.sequences[sequence.name]
        assert b.values.tolist() == new[a.values].tolist()
        assert torch.equal(a.offsets, b.offsets)
    # once more, with what is left
    again = select(derived, values=masks(derived, 0.5, seed=4)).apply(derived)
    assert [c.vocab_size for c in again.layout.sparse] != [c.vocab_size for c in derived.layout.sparse]


def new_ids(kept: dict[str, Any], table: str, size: int) -> Any:
    """By a loop: kept ids move up in order, all others become padding."""
    if table not in kept:
        return np.arange(size)
    new, following = [0, int(kept[table][1])], 2
    for keep in kept[table][2:]:
        new.append(following if keep else 0)
        following += bool(keep)
    return np.array(new)


def test_vocabularies_that_are_not_named_keep_all(encoder: Encoder) -> None:
    only = {"user": masks(encoder)["user"]}
    derived = select(encoder, values=only).apply(encoder)
    assert derived.layout.sparse[0].vocab_size < encoder.layout.sparse[0].vocab_size
    assert derived.layout.sparse[1:] == encoder.layout.sparse[1:]


def test_dropped_fields_are_not_read(encoder: Encoder) -> None:
    derived = select(encoder, fields=("user", "price", "clicks", "tags")).apply(encoder)
    assert [f.name for f in derived.schema.fields] == ["user", "tags", "price", "clicks"]  # the order of the schema
    assert derived.schema.ignored["item"] == "dropped by test"
    assert set(derived.vocabularies) == {"user", "tags", "clicks"}
    assert set(derived.numeric) == {"price"}
    few = raw().select(["user", "tags", "price", "clicks"])
    want, found = encoder.transform(raw()), derived.transform(few)
    assert torch.equal(found.sparse, want.sparse[:, [0, 5]])
    assert torch.equal(found.dense, want.dense[:, :1])
    assert torch.equal(found.sequences["tags"].values, want.sequences["tags"].values)


def test_the_owner_of_a_shared_vocabulary_may_go(encoder: Encoder) -> None:
    derived = select(encoder, fields=("user", "seen", "last"), values=masks(encoder)).apply(encoder)
    assert derived.schema["seen"] == SequenceField(name="seen", max_length=2)
    assert derived.schema["last"] == SparseField(name="last", shares="seen")
    assert [(c.name, c.table) for c in derived.layout.sparse] == [("user", "user"), ("last", "seen")]
    whole = select(encoder, values=masks(encoder)).apply(encoder)
    want, found = whole.transform(raw()), derived.transform(raw())
    assert torch.equal(found.sparse, want.sparse[:, [0, 3]])
    assert torch.equal(found.sequences["seen"].values, want.sequences["seen"].values)
    sharer_gone = select(encoder, fields=("user", "item", "last")).apply(encoder)
    assert sharer_gone.schema["last"] == SCHEMA["last"]
    options = replace(SCHEMA, fields=(SparseField(name="b", shares="a"), SparseField(name="a", min_count=3, max_size=5)))
    rows = {"a": [1] * 6 + [2], "b": [2] * 7, "y": [0, 1] * 3 + [0], "user": [0] * 7, "w": [1.0] * 7}
    fitted = Encoder.fit(options, rows)
    assert select(fitted, fields=("b",)).apply(fitted).schema["b"] == SparseField(name="b", min_count=3, max_size=5)


def test_crosses_that_are_not_memorised_go(crossed: Encoder) -> None:
    pairs = {"user*item": "memorize", "age*item": "factorize", "user*agent": "naive", "item*last": "naive"}
    derived = select(crossed, pairs=pairs).apply(crossed)
    assert [f.name for f in derived.schema.crosses] == ["user*item"]
    assert derived.schema.inputs == crossed.schema.inputs
    names = [c.name for c in crossed.layout.sparse]
    kept = [names.index(c.name) for c in derived.layout.sparse]
    assert torch.equal(derived.transform(raw()).sparse, crossed.transform(raw()).sparse[:, kept])
    assert "item*age" not in derived.schema.ignored  # it is no column
    partly = select(crossed, pairs={"user*agent": "naive"}).apply(crossed)  # of the others, nothing was said
    assert [f.name for f in partly.schema.crosses] == ["user*item", "item*age"]


@pytest.mark.parametrize("block_rows", [1 << 17, 7])
@pytest.mark.parametrize("case", ["values", "fields", "both", "pairs"])
def test_a_store_is_what_the_derived_encoder_makes_of_the_raw_rows(
    case: str, block_rows: int, encoder: Encoder, crossed: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "BLOCK_ROWS", block_rows)
    fields = ("tags", "price", "agent", "seen", "last", "age")
    cases: dict[str, dict[str, Any]] = {
        "values": {"values": masks(encoder)},
        "fields": {"fields": fields},
        "both": {"values": masks(encoder), "fields": fields},
        "pairs": {"pairs": {"user*item": "memorize", "item*age": "naive"}},
    }
    old = crossed if case == "pairs" else encoder
    parts = split_rows(open_source(raw()), {"train": 0.8, "test": 0.2}, by="random")
    selection = select(old, **cases[case])
    made = apply_to_store(selection, Store.create(tmp_path / "old", old, parts), tmp_path / "new")
    want = Store.create(tmp_path / "want", selection.apply(old), parts)
    assert made.encoder.hash == want.encoder.hash == Store.open(tmp_path / "new").encoder.hash
    files = sorted(p.relative_to(tmp_path / "want") for p in (tmp_path / "want").rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(tmp_path / "new") for p in (tmp_path / "new").rglob("*") if p.is_file())
    for file in files:  # the manifest with its checksums too
        assert (tmp_path / "new" / file).read_bytes() == (tmp_path / "want" / file).read_bytes(), file
    assert torch.equal(made.split("test").sparse, want.split("test").sparse)


def test_a_derived_store_knows_its_raw_files(encoder: Encoder, tmp_path: Path) -> None:
    pa.parquet.write_table(raw(), tmp_path / "raw.parquet")
    store = Store.create(tmp_path / "old", encoder, {"train": open_source(tmp_path / "raw.parquet")})
    apply_to_store(select(encoder, fields=("user",)), store, tmp_path / "new")
    Store.open(tmp_path / "new")
    os.utime(tmp_path / "raw.parquet", ns=(1, 1))
    with pytest.raises(DataError, match="is stale"):
        Store.open(tmp_path / "new")


def test_nothing_is_half_written(encoder: Encoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.create(tmp_path / "old", encoder, {"train": open_source(raw())})
    with pytest.raises(DataError, match="keeps no value"):
        apply_to_store(
            select(encoder, values={"user": np.zeros(encoder.layout.sparse[0].vocab_size, bool)}), store, tmp_path / "new"
        )

    def fails(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(store_module, "_encoded", fails)
    with pytest.raises(RuntimeError):
        apply_to_store(select(encoder, fields=("user",)), store, tmp_path / "new")
    assert [p.name for p in tmp_path.iterdir()] == ["old"]


def test_refused(encoder: Encoder, crossed: Encoder) -> None:
    user = encoder.layout.sparse[0].vocab_size
    options: dict[str, Any]
    for options, message in (
        ({"fields": ("user", "itme")}, "keeps field 'itme', which the data lacks; did you mean 'item'"),
        ({"fields": ()}, "keeps no field"),
        (
            {"pairs": {"user*itme": "naive"}},
            r"a pair 'user\*itme', which is no pair of fields of the data; did you mean 'user\*item'",
        ),
        ({"pairs": {"user*item": "memorize"}}, r"memorises the pair 'user\*item', but the data has no cross of it"),
        (
            {"values": {"usre": np.ones(user, bool)}},
            "values of 'usre', which is no vocabulary of the data; did you mean 'user'",
        ),
        ({"values": {"agent": np.ones(22, bool)}}, "values of 'agent', which is hashed"),
        ({"values": {"age": np.ones(6, bool)}}, "values of 'age', which is no vocabulary"),
        ({"values": {"user": np.ones(user + 1, bool)}}, f"expected {user} booleans, one for each id"),
        ({"values": {"user": np.ones(user)}}, "float64 values of shape"),
        ({"values": {"user": np.arange(user) == 0}}, "keeps no value; lower its penalty"),
    ):
        with pytest.raises(DataError, match=message):
            select(encoder, **options).apply(encoder)
    names = tuple(f.name for f in crossed.schema.fields)
    for options, message in (
        ({"fields": tuple(n for n in names if n != "item")}, r"keeps the cross 'user\*item' but not field 'item'"),
        (
            {"values": {"user": np.arange(user) > 1}},
            r"drops values, but the data has crosses \(user\*item, item\*age, user\*agent\)",
        ),
    ):
        with pytest.raises(DataError, match=message):
            select(crossed, **options).apply(crossed)
    with pytest.raises(DataError, match="was made with another encoder"):
        select(crossed, fields=("user",)).apply(encoder)
    # without the crosses that read it, a field may go, and with no cross left, values
    without = tuple(n for n in names if "item" not in n)
    assert [f.name for f in select(crossed, fields=without).apply(crossed).schema.crosses] == ["user*agent"]
    plain = {"fields": tuple(n for n in names if "*" not in n), "values": {"user": np.arange(user) > 1}}
    assert select(crossed, **plain).apply(crossed).layout.sparse[0].vocab_size == user
