"""A store gives back what was encoded, and refuses to be read once anything about it has changed."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ctrlib.data.encoder import Encoder
from ctrlib.data.source import open_source
from ctrlib.data.split import split_rows
from ctrlib.data.store import Split, Store
from ctrlib.schema import DataError, DenseField, Schema, SequenceField, SparseField

N = 230
SCHEMA = Schema(
    fields=(
        SparseField(name="user"),
        DenseField(name="price"),
        SequenceField(name="tags"),
        SparseField(name="hash"),
        SequenceField(name="seen", shares="hash", max_length=2),
        DenseField(name="age", encoding="bucket", num_bins=4),
    ),
    labels=("y", "z"),
    group="hash",
    weight="w",
)


def raw(n: int = N) -> pa.Table:
    r = np.random.default_rng(2)
    wide = 2**62 + np.arange(20)
    return pa.table(
        {
            "y": r.integers(0, 2, n),
            "z": r.integers(0, 2, n),
            "user": [f"u{k}" if k else None for k in r.integers(0, 30, n)],
            "price": r.normal(size=n),
            "tags": [["a", "b", "c"][: r.integers(0, 4)] for _ in range(n)],
            "hash": r.choice(wide, n),
            "seen": [None if r.random() < 0.2 else r.choice(wide, r.integers(0, 5)).tolist() for _ in range(n)],
            "age": pa.array(r.integers(18, 80, n), mask=r.random(n) < 0.1),
            "w": r.random(n),
        }
    )


@pytest.fixture
def store(tmp_path: Path) -> Store:
    pq.write_table(raw(), tmp_path / "raw.parquet", row_group_size=50)
    parts = split_rows(open_source(tmp_path / "raw.parquet"), {"train": 0.8, "test": 0.2}, by="random")
    return Store.create(tmp_path / "store", Encoder.fit(SCHEMA, parts["train"]), parts)


def check_equal(split: Split, encoder: Encoder, source: Any) -> None:
    want = encoder.transform(source, labels=True)
    assert split.num_rows == len(want)
    for name in ("sparse", "dense", "labels", "weight", "group"):
        assert torch.equal(getattr(split, name), getattr(want, name)), name
    assert split.sequences.keys() == want.sequences.keys()
    for name, (values, offsets) in split.sequences.items():
        assert torch.equal(values, want.sequences[name].values)
        assert offsets.tolist() == want.sequences[name].offsets.tolist()


def test_round_trip(store: Store, tmp_path: Path) -> None:
    parts = split_rows(open_source(tmp_path / "raw.parquet"), {"train": 0.8, "test": 0.2}, by="random")
    opened = Store.open(tmp_path / "store", schema=SCHEMA)
    assert opened.encoder.hash == store.encoder.hash
    assert dict(opened.rows) == {"train": 184, "test": 46}
    for s in (store, opened):
        for name in ("train", "test"):
            check_equal(s.split(name), store.encoder, parts[name])
    group = opened.split("test").group
    assert group is not None
    assert group.tolist() == parts["test"].column("hash").to_pylist()  # wide ids, exactly


def test_blocks_do_not_show(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = Encoder.encode
    monkeypatch.setattr(Encoder, "encode", lambda self, source: encode(self, source, block_rows=7))
    parts = split_rows(open_source(tmp_path / "raw.parquet"), {"train": 0.8, "test": 0.2}, by="random")
    Store.create(tmp_path / "again", store.encoder, parts)
    files = sorted(p.relative_to(tmp_path / "store") for p in (tmp_path / "store").rglob("*") if p.is_file())
    assert len(files) > 15
    for file in files:
        assert (tmp_path / "store" / file).read_bytes() == (tmp_path / "again" / file).read_bytes(), file


def test_parts_of_one_table_are_encoded_in_one_pass(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, passes = Encoder.encode, []

    def counted(self: Encoder, source: Any) -> Any:
        passes.append(source.num_rows)
        return encode(self, source, block_rows=37)

    monkeypatch.setattr(Encoder, "encode", counted)
    source = open_source(tmp_path / "raw.parquet")
    parts = split_rows(source, {"train": 0.5, "valid": 0.3, "test": 0.2}, by="random", seed=3)
    only = {name: parts[name] for name in ("test", "train")}  # of rows in between, none
    created = Store.create(tmp_path / "new", store.encoder, {**only, "whole": source, "again": parts["test"]})
    assert passes == [46 + 115, N]
    assert dict(created.rows) == {"test": 46, "train": 115, "whole": N, "again": 46}
    monkeypatch.undo()
    for name, rows in ({**only, "whole": source, "again": parts["test"]}).items():
        check_equal(created.split(name), store.encoder, rows)
    Store.open(tmp_path / "new")


def test_a_bad_row_of_another_part_is_no_error(store: Store, tmp_path: Path) -> None:
    data = raw().set_column(0, "y", pa.array([7, *[0] * (N - 1)]))
    codes = np.arange(N) % 3
    parts = open_source(data).divide(codes.astype(np.uint8), {"b": 1, "c": 2, "a": 0})
    good = {name: parts[name] for name in ("b", "c")}
    assert dict(Store.create(tmp_path / "good", store.encoder, good).rows) == {"b": 77, "c": 76}
    with pytest.raises(DataError, match=r"column 'y', the table, row 1: the label is 7"):
        Store.create(tmp_path / "bad", store.encoder, parts)
    assert not (tmp_path / "bad").exists()


@pytest.mark.parametrize(
    "fields",
    [(SparseField(name="user"),), (DenseField(name="price"),), (SequenceField(name="tags"),), (SequenceField(name="none"),)],
)
def test_one_kind_of_field_only(fields: Any, tmp_path: Path) -> None:
    data = raw().append_column("none", [[["a"], *[[]] * (N - 1)]])
    source = open_source(data)
    encoder = Encoder.fit(Schema(fields=fields, labels=("y",)), source)
    last = source.select(np.arange(N) >= N - 3)  # also a split without one value in its lists
    split = Store.create(tmp_path / "store", encoder, {"all": source, "last": last}).split("last")
    want = encoder.transform(last, labels=True)
    assert torch.equal(split.sparse, want.sparse)
    assert torch.equal(split.dense, want.dense)
    assert split.weight is split.group is None
    for name, bag in want.sequences.items():
        assert torch.equal(split.sequences[name][0], bag.values)
        assert split.sequences[name][1].tolist() == bag.offsets.tolist()
    Store.open(tmp_path / "store")


def test_unknown_split(store: Store) -> None:
    with pytest.raises(DataError, match="has no split 'valid'; it has train, test"):
        store.split("valid")


# ------------------------------------------------------------------------------------------------------------ refusals


def test_not_a_store(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        assert not Store.is_store(path)
        with pytest.raises(DataError, match="is not a prepared store"):
            Store.open(path)


FILES = ["sparse.bin", "dense.bin", "labels.bin", "weight.bin", "group.bin", "values-0.bin", "offsets-1.bin"]


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("split", ["train", "test"])
def test_damaged_files(file: str, split: str, store: Store) -> None:
    path = store.path / split / file
    whole = path.read_bytes()
    for content, reason in (
        (whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :], "checksum differs"),
        (whole[:-1], f"has {len(whole) - 1} bytes; expected {len(whole)}"),
        (whole + b"\0", f"has {len(whole) + 1} bytes"),
        (b"", "has 0 bytes"),
        (None, "is missing"),
    ):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DataError, match=rf"store file .*{split}/{file}:? .*{reason}.*prepare it again"):
            Store.open(store.path)
    path.write_bytes(whole)
    assert Store.open(store.path).rows == store.rows


def edit(store: Store, change: Callable[[Any], Any]) -> None:
    path = store.path / "manifest.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: m.update(format=2), "has format 2; this version reads 1"),
        (lambda m: m.update(encoder_hash="0"), "another encoder"),
        (lambda m: m.pop("splits"), "manifest.json is damaged"),
        (lambda m: m.pop("format"), "manifest.json is damaged"),
        (lambda m: [m], "manifest.json is damaged"),
        (lambda m: m["splits"]["train"].update(rows=185), "counts the rows of train in two ways"),
        (lambda m: m["splits"]["train"]["files"].pop("sparse.bin"), "manifest.json is damaged"),
        (lambda m: m["splits"]["train"]["files"]["sparse.bin"].update(dtype="<i8"), "bytes; expected"),
        (lambda m: m["splits"]["train"]["files"]["sparse.bin"].update(dtype="nonsense"), "manifest.json is damaged"),
    ],
)
def test_changed_manifest(change: Callable[[Any], Any], reason: str, store: Store) -> None:
    edit(store, lambda m: None if isinstance(r := change(m), dict | str | int | None) else r)
    with pytest.raises(DataError, match=reason):
        Store.open(store.path)


def test_manifest_cut_short(store: Store) -> None:
    path = store.path / "manifest.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match=r"manifest\.json is damaged.*prepare it again"):
        Store.open(store.path)


def test_damaged_encoder(store: Store) -> None:
    (store.path / "vocabularies" / "0000.parquet").unlink()
    with pytest.raises(DataError, match=r"encoder in .* missing or damaged"):
        Store.open(store.path)


def test_another_schema(store: Store) -> None:
    other = SCHEMA.with_fields(SparseField(name="user", min_count=2), DenseField(name="price", encoding="log"))
    with pytest.raises(DataError, match=r"another schema \(fields that differ: user, price\)"):
        Store.open(store.path, schema=other)
    with pytest.raises(DataError, match=r"another schema \(its labels"):
        Store.open(store.path, schema=replace(SCHEMA, labels=("y",)))
    Store.open(store.path, schema=SCHEMA)


def test_stale_raw_file(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "raw.parquet"
    before = path.stat()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000_000))
    with pytest.raises(DataError, match=r"is stale: .*raw\.parquet, from which its train rows came, has changed"):
        Store.open(store.path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    Store.open(store.path)
    path.write_bytes(path.read_bytes() + b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DataError, match="is stale"):
        Store.open(store.path)
    path.unlink()  # a store outlives its raw file
    Store.open(store.path)


def test_stale_csv(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("y,x\n" + "0,1\n1,2\n" * 5)
    source = open_source(path)
    Store.create(tmp_path / "s", Encoder.fit(Schema(fields=(SparseField(name="x"),), labels=("y",)), source), {"train": source})
    path.write_text("y,x\n" + "0,3\n1,2\n" * 5)
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))
    with pytest.raises(DataError, match=r"is stale: .*a\.csv"):
        Store.open(tmp_path / "s")


def test_the_place_is_taken(store: Store) -> None:
    with pytest.raises(DataError, match="exists already; choose another folder, or remove it"):
        Store.create(store.path, store.encoder, {"train": open_source(raw())})


def test_a_place_that_cannot_be_written(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        Store.create(tmp_path / "file" / "store", store.encoder, {"train": open_source(raw())})


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device"), DataError("bad row")])
def test_interruption_leaves_nothing(
    error: BaseException, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, before = Encoder.encode, sorted(tmp_path.iterdir())

    def broken(self: Encoder, source: Any) -> Any:
        yield from list(encode(self, source, block_rows=50))[:2]
        raise error

    monkeypatch.setattr(Encoder, "encode", broken)
    with pytest.raises(DataError if isinstance(error, OSError) else type(error)):
        Store.create(tmp_path / "new", store.encoder, {"train": open_source(raw())})
    assert sorted(tmp_path.iterdir()) == before


def test_what_an_earlier_interruption_left_is_cleared(store: Store, tmp_path: Path) -> None:
    (tmp_path / "new.part" / "train").mkdir(parents=True)
    (tmp_path / "new.part" / "train" / "old.bin").write_text("x")
    (tmp_path / "new.part" / "writer.pid").write_text("")  # killed before it wrote its number
    created = Store.create(tmp_path / "new", store.encoder, {"train": open_source(raw())})
    assert not (created.path / "train" / "old.bin").exists()
    assert not (tmp_path / "new.part").exists()


def test_a_split_without_rows(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows for the split 'valid'"):
        Store.create(tmp_path / "new", store.encoder, {"valid": open_source(raw()).select(np.zeros(N, bool))})
    assert not (tmp_path / "new").exists()
