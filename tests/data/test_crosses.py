"""Crosses: hand-computed ids, a loop over rows as reference, bounded memory, and everywhere that encoded rows go."""

from __future__ import annotations

import resource
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import ctrlib
from ctrlib import artifact
from ctrlib.data import crosses
from ctrlib.data.crosses import VALUE_BYTES, cross_keys, fit_crosses, most_values
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader, StreamLoader
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.data.vocabulary import HashBuckets, ValueCounter, Vocabulary, as_keys
from ctrlib.experiment import DataOptions, prepare, train
from ctrlib.models.optinter import field_pairs
from ctrlib.schema import CrossField, DataError, DenseField, Schema, SequenceField, SparseColumn, SparseField
from tests.clicks import SCHEMA as CLICKS
from tests.clicks import clicks, tiny, write

ABC = Schema(fields=tuple(SparseField(name=n) for n in "abc"), labels=("y",))


def frame(**columns: list[Any]) -> dict[str, list[Any]]:
    rows = len(next(iter(columns.values())))
    return {**columns, "y": [0, 1] * (rows // 2) + [0] * (rows % 2)}


def random_rows(n: int, seed: int = 0) -> pa.Table:
    r = np.random.default_rng(seed)
    a, b, c = (r.zipf(1.3, n) % size for size in (60, 90, 30))
    price = np.where(r.random(n) < 0.1, np.nan, r.lognormal(1, 1, n))
    text = pa.array([None if gone else f"v{v}" for v, gone in zip(b, r.random(n) < 0.05, strict=True)])
    return pa.table({"a": a, "b": text, "c": c, "price": price, "y": r.integers(0, 2, n)})


def reference(ids: npt.NDArray[Any], min_count: int, max_size: int | None, test: npt.NDArray[Any]) -> list[int]:
    """Ids of a cross by a loop over rows: training ids [N, 2] → the cross of test ids [M, 2]."""
    counts = Counter(tuple(row) for row in ids.tolist() if min(row) >= 2)
    kept = sorted((pair for pair, count in counts.items() if count >= min_count), key=lambda p: (-counts[p], p))
    at = {pair: i + 2 for i, pair in enumerate(kept[:max_size])}
    return [at.get(tuple(row), 1) for row in test.tolist()]


def test_three_fields_and_six_rows_by_hand() -> None:
    train = frame(a=["p", "p", "p", "q", "q", "r"], b=["x", "x", "y", "x", "y", "y"], c=["m", "n", "m", "m", "m", "m"])
    encoder = Encoder.fit(ABC.with_crosses(min_count=2), train)
    assert [(c.name, c.vocab_size, c.table, c.parts) for c in encoder.layout.sparse] == [
        ("a", 5, "a", None),
        ("b", 4, "b", None),
        ("c", 4, "c", None),
        ("a*b", 3, "a*b", ("a", "b")),
        ("a*c", 4, "a*c", ("a", "c")),
        ("b*c", 4, "b*c", ("b", "c")),
    ]
    # a: p=2 q=3 r=4; b: x=2 y=3 (ties by value); c: m=2 n=3.
    # a*b: (p, x) twice. a*c: (p, m) and (q, m) twice. b*c: (y, m) three times, (x, m) twice.
    assert encoder.transform(train).sparse.tolist() == [
        [2, 2, 2, 2, 2, 3],
        [2, 2, 3, 2, 1, 1],
        [2, 3, 2, 1, 2, 2],
        [3, 2, 2, 1, 3, 3],
        [3, 3, 2, 1, 3, 2],
        [4, 3, 2, 1, 1, 2],
    ]
    # a pair never seen is the OOV of its own cross, and of no other; so is a pair with a value never seen
    test = frame(a=["r", "zz"], b=["x", "x"], c=["n", "m"])
    assert encoder.transform(test).sparse.tolist() == [[4, 2, 3, 1, 1, 1], [1, 2, 2, 1, 1, 3]]


def test_each_cross_reads_its_own_vocabulary() -> None:
    # The released code of OptInter looks up all pairs of the first field in the vocabulary of another pair.
    train = frame(a=[1] * 6, b=[1, 1, 2, 2, 3, 3], c=[7, 7, 7, 7, 8, 8])
    encoder = Encoder.fit(ABC.with_crosses(), train)
    assert encoder.transform(train).sparse[:, 3:].tolist() == [[2, 2, 2], [2, 2, 2], [3, 2, 3], [3, 2, 3], [4, 3, 4], [4, 3, 4]]


@pytest.mark.parametrize("parts", [1, 7])
@pytest.mark.parametrize(("min_count", "max_size"), [(1, None), (3, None), (2, 25)])
def test_against_a_loop_over_rows(min_count: int, max_size: int | None, parts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crosses, "BLOCK_ROWS", 300)
    if parts > 1:  # so much memory a key that they have to be counted in several parts
        monkeypatch.setattr(crosses, "_COUNT_BYTES", 5000)
        monkeypatch.setattr(crosses, "_SMALLEST_PART", 1)
    schema = Schema(
        fields=(
            CrossField(name="first", of=("b", "a"), min_count=min_count, max_size=max_size),  # before what it crosses
            SparseField(name="a", min_count=2),
            SparseField(name="b", max_size=40),
            DenseField(name="price", encoding="bucket", num_bins=6),
            DenseField(name="c", encoding="criteo_log"),
            CrossField(name="a*price", of=("a", "price"), min_count=min_count, max_size=max_size),
            CrossField(name="c*b", of=("c", "b"), min_count=min_count, max_size=max_size),
        ),
        labels=("y",),
    )
    train, test = random_rows(2000), random_rows(500, seed=1)
    encoder = Encoder.fit(schema, train, cross_memory_mb=1.2)
    names = [c.name for c in encoder.layout.sparse]
    assert names == ["first", "a", "b", "price", "c", "a*price", "c*b"]
    ids, found = encoder.transform(train).sparse.numpy(), encoder.transform(test).sparse.numpy()
    for name, first, second in (("first", 2, 1), ("a*price", 1, 3), ("c*b", 4, 2)):
        expected = reference(ids[:, [first, second]], min_count, max_size, found[:, [first, second]])
        assert found[:, names.index(name)].tolist() == expected
        assert len(set(expected)) > 10
        counts = encoder.vocabularies[name].counts  # type: ignore[union-attr]
        assert counts.min() >= min_count
        assert (np.diff(counts) <= 0).all()


def test_missing_values_are_crossed_and_padding_and_oov_are_not() -> None:
    keys = cross_keys(np.array([0, 1, 2, 2, 5], np.int32), np.array([3, 3, 0, 1, 3], np.int32), 4)
    assert keys.tolist() == [-1, -1, -1, -1, 23]
    huge = np.array([2**31 - 1], np.int32)
    assert cross_keys(huge, huge, 2**31 - 1).tolist() == [(2**31 - 1) ** 2 + 2**31 - 1]
    encoder = Encoder.fit(ABC.with_crosses([("a", "b")]), frame(a=[1, None, None], b=["u", None, None], c=[1, 2, 3]))
    assert encoder.transform(frame(a=[None, 1], b=[None, "u"], c=[1, 1])).sparse[:, -1].tolist() == [2, 3]


def test_fields_that_share_a_vocabulary_or_hash_can_be_crossed() -> None:
    schema = Schema(
        fields=(
            SparseField(name="from", shares="to"),
            SparseField(name="to"),
            SparseField(name="agent", hash_size=5),
            CrossField(name="trip", of=("from", "to")),
            CrossField(name="from*agent", of=("from", "agent"), hash_size=1000),
        ),
        labels=("y",),
    )
    towns = {"from": ["A", "B", "A", "B"], "to": ["B", "A", "B", "A"], "agent": ["m", "n", "m", None], "y": [0, 1, 0, 1]}
    encoder = Encoder.fit(schema, towns)
    batch = encoder.transform(towns)
    assert batch.sparse[:, 3].tolist() == [2, 3, 2, 3]  # A→B is not B→A
    hashed = batch.sparse[:, 4].tolist()
    assert hashed[0] == hashed[2] != hashed[1]
    assert hashed[3] == 1  # a missing value of a hashed field is OOV, and so is its cross
    assert min(hashed[:3]) >= 2
    assert encoder.layout.sparse[4].vocab_size == 1002
    assert isinstance(encoder.vocabularies["from*agent"], HashBuckets)


def test_training_rows_only_and_in_any_order() -> None:
    data = random_rows(600)
    schema = ABC.with_crosses(min_count=2)
    mask = np.arange(600) % 3 > 0
    encoder = Encoder.fit(schema, open_source(data).select(mask))
    assert Encoder.fit(schema, data.filter(pa.array(mask))).hash == encoder.hash
    assert Encoder.fit(schema, data.filter(pa.array(mask)).take(np.random.default_rng(0).permutation(400))).hash == encoder.hash
    assert Encoder.fit(schema, data).hash != encoder.hash
    assert Encoder.fit(ABC.with_crosses(min_count=3), open_source(data).select(mask)).hash != encoder.hash


@pytest.mark.parametrize("block_rows", [7, 300, 6000])
def test_blocks_and_threads_change_nothing(block_rows: int) -> None:
    data = random_rows(5000)  # enough rows for threads
    encoder = Encoder.fit(ABC.with_crosses(), data)
    blocks = [block.sparse for block in encoder.encode(data, block_rows=block_rows)]
    assert np.array_equal(np.concatenate(blocks), np.concatenate([b.sparse for b in encoder.encode(data, block_rows=999)]))
    expected = reference(blocks_of(encoder, data)[:, [0, 1]], 1, None, np.concatenate(blocks)[:, [0, 1]])
    assert np.concatenate(blocks)[:, 3].tolist() == expected


def blocks_of(encoder: Encoder, data: pa.Table) -> npt.NDArray[np.int32]:
    return np.concatenate([block.sparse for block in encoder.encode(data)])


def test_saved_and_loaded(tmp_path: Path) -> None:
    schema = ABC.with_crosses([("b", "a")], min_count=2).with_crosses([("a", "c")], hash_size=50)
    assert [f.of for f in schema.crosses] == [("a", "b"), ("a", "c")]  # in the order of the schema
    data = random_rows(500)
    encoder = Encoder.fit(schema, data)
    encoder.save(tmp_path)
    again = Encoder.load(tmp_path)
    assert again.hash == encoder.hash
    assert again.layout == encoder.layout
    assert torch.equal(again.transform(data).sparse, encoder.transform(data).sparse)


def test_store_and_stream_give_the_same_batches(tmp_path: Path) -> None:
    pq.write_table(random_rows(900), tmp_path / "raw.parquet", row_group_size=200)
    source = open_source(tmp_path / "raw.parquet")
    encoder = Encoder.fit(ABC.with_crosses(min_count=2), source)
    Store.create(tmp_path / "store", encoder, {"train": source})
    store = Store.open(tmp_path / "store", schema=encoder.schema)
    stored = list(Loader(store.split("train"), 64, shuffle=True, seed=3))
    for memory_mb in (None, 0.01):
        streamed = list(StreamLoader(encoder, source, 64, shuffle=True, seed=3, memory_mb=memory_mb))
        assert all(torch.equal(a.sparse, b.sparse) for a, b in zip(stored, streamed, strict=True))
    assert stored[0].sparse.shape == (64, 6)


def test_from_raw_rows_to_an_artifact_that_reads_raw_rows(tmp_path: Path) -> None:
    write(tmp_path / "data")
    schema = CLICKS.with_crosses([("user", "city"), ("city", "age")], min_count=3)
    options = DataOptions(
        schema=schema, valid=str(tmp_path / "data/valid.parquet"), test=str(tmp_path / "data/test.parquet"), cross_memory_mb=9
    )
    raw = str(tmp_path / "data/train.parquet")
    reports = [
        train(raw, tiny(), tmp_path / "run", options),
        train(prepare(raw, tmp_path / "store", options), tiny(), tmp_path / "from-store"),
    ]
    assert reports[0]["test"] == reports[1]["test"]
    loaded = artifact.load(tmp_path / "run")
    assert loaded.info["fields"] == ["user", "city", "age", "user*city", "city*age", "price", "genres"]
    rows = clicks(50, 9)
    expected = loaded.model(loaded.encoder.transform(rows)).logits.sigmoid()
    columns = rows.select(["user", "city", "price", "age", "genres"])  # a cross has no column
    np.testing.assert_allclose(loaded.predict(columns), expected.detach().numpy(), atol=1e-6)
    named_alike = columns.append_column("user*city", pa.array(["?"] * 50))
    assert np.array_equal(loaded.predict(named_alike), loaded.predict(columns))
    with pytest.raises(DataError, match="has no column 'city', which the model reads"):
        loaded.predict(columns.drop_columns(["city"]))


def test_bound_before_counting() -> None:
    sizes = {"a": 102, "b": 52}
    for options, bound in (({}, 5000), ({"min_count": 10}, 2000), ({"max_size": 7}, 7), ({"hash_size": 9}, 9)):
        assert most_values(CrossField(name="x", of=("a", "b"), **options), sizes, 20_000) == bound  # type: ignore[arg-type]


def test_refused_over_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random_rows(3000)
    kept = Encoder.fit(ABC.with_crosses(), data)
    values = sum(kept.vocabularies[f.name].size for f in kept.schema.crosses)
    enough = values * VALUE_BYTES / 2**20
    assert Encoder.fit(ABC.with_crosses(), data, cross_memory_mb=1.001 * enough).hash == kept.hash
    with pytest.raises(
        DataError, match=r"3 of 3 have [\d,]+ values.*Raise their min_count, set max_size or hash_size, cross f"
    ):
        Encoder.fit(ABC.with_crosses(), data, cross_memory_mb=0.999 * enough)
    counted: list[str] = []
    fit = crosses._fit_cross

    def noted(cross: CrossField, *rest: Any) -> Vocabulary:
        counted.append(cross.name)
        return fit(cross, *rest)

    monkeypatch.setattr(crosses, "_fit_cross", noted)
    with pytest.raises(DataError, match=r"1 of 3 have .*the largest: 'a\*b' with"):  # and the others were not counted
        Encoder.fit(ABC.with_crosses(), data, cross_memory_mb=0.01)
    assert counted == ["a*b"]
    for smaller in (ABC.with_crosses(min_count=20), ABC.with_crosses(max_size=10), ABC.with_crosses(hash_size=10)):
        Encoder.fit(smaller, data, cross_memory_mb=0.05)


@pytest.mark.parametrize("threads", [1, 3, 16])
def test_counting_stops_at_the_limit_whatever_the_number_of_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """21 crosses of 20,000 values each, of which 5,000 are allowed, counted in parts of at least 500."""
    monkeypatch.setattr(crosses, "cpu_count", lambda: threads)
    monkeypatch.setattr(crosses, "BLOCK_ROWS", 4000)
    monkeypatch.setattr(crosses, "_SMALLEST_PART", 500)
    counted: list[int] = []
    result = ValueCounter.result

    def noted(counter: ValueCounter) -> Any:
        found = result(counter)
        counted.append(len(found[0]))
        return found

    monkeypatch.setattr(ValueCounter, "result", noted)
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(20_000, dtype=np.int32)[:, None] + 2, (1, 7)), axis=0)
    columns = [SparseColumn(f"f{i}", 20_002, f"f{i}") for i in range(7)]
    fields = [CrossField(name=f"{a.name}*{b.name}", of=(a.name, b.name)) for a, b in combinations(columns, 2)]
    limit = 5000 * VALUE_BYTES / 2**20
    with pytest.raises(DataError, match=r"the crosses are too large: .* values so far"):
        fit_crosses(fields, columns, [ids], len(ids), limit)
    part = 5000 * VALUE_BYTES / (100 * threads)  # 100 bytes a key in hand, by all threads together
    assert max(counted) < 1.2 * max(part, 500)
    assert sum(counted) < 5000 + 1.2 * (threads + 1) * max(part, 500)
    # what is allowed is counted alike by all of them
    same = fit_crosses([replace(f, max_size=100) for f in fields], columns, [ids], len(ids), limit)
    assert same["f0*f1"].size == 102
    keys = np.sort(cross_keys(ids[:, 0], ids[:, 1], 20_002))  # all as frequent: the smallest ones
    assert same["f0*f1"].ids(as_keys(pa.array(keys[:101]), pa.int64(), str)).tolist() == [*range(2, 102), 1]


def test_no_more_threads_than_the_limit_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def noted(threads: int) -> Any:
        seen.append(threads)
        return ThreadPoolExecutor(threads)

    monkeypatch.setattr(crosses, "ThreadPoolExecutor", noted)
    monkeypatch.setattr(crosses, "cpu_count", lambda: 64)
    monkeypatch.setattr(crosses, "BLOCK_ROWS", 100)
    columns = [SparseColumn(f"f{i}", 12, f"f{i}") for i in range(5)]
    fields = [CrossField(name=f"{a.name}*{b.name}", of=(a.name, b.name)) for a, b in combinations(columns, 2)]
    ids = np.full((200, 5), 2, np.int32)
    for limit in (1, 20, 10_000):  # a part is 65,536 keys of 100 bytes: 6.25 MB
        fit_crosses(fields, columns, [ids], 200, limit)
    assert seen == [1, 3, 10]


def test_hashed_crosses_are_refused_before_a_row_is_read() -> None:
    def never() -> Any:
        raise AssertionError
        yield

    columns = [SparseColumn(n, 10, n) for n in "ab"]
    with pytest.raises(DataError, match="cross_memory_mb"):
        fit_crosses([CrossField(name="x", of=("a", "b"), hash_size=10**6)], columns, never(), 5, 1)
    assert fit_crosses([CrossField(name="x", of=("a", "b"), hash_size=10)], columns, never(), 5, 1) == {"x": HashBuckets(10)}


def test_nothing_is_left_in_the_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    Encoder.fit(ABC.with_crosses(), random_rows(300))
    with pytest.raises(DataError, match="too large"):
        Encoder.fit(ABC.with_crosses(), random_rows(300), cross_memory_mb=0.01)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_an_error_and_no_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "missing"))
    with pytest.raises(DataError, match=r"counting crosses needs room in .*missing.*name another folder in .* TMPDIR"):
        Encoder.fit(ABC.with_crosses(), random_rows(50))


def test_a_disk_that_fills_up_is_an_error_and_no_crash() -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))  # what is left to write is too much for closing, too
    try:
        with pytest.raises(DataError, match="counting crosses needs room in"):
            Encoder.fit(ABC.with_crosses(), random_rows(1500))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_crossed_is_what_the_model_pairs() -> None:
    """The released code of OptInter crosses 13 numbers and 13 categories on Criteo, and its network pairs the 26 categories."""
    numbers = tuple(DenseField(name=f"I{i}") for i in range(3))
    categories = tuple(SparseField(name=f"C{i}") for i in range(4))
    r = np.random.default_rng(0)
    columns: dict[str, Any] = {f"I{i}": r.random(400) for i in range(3)}
    columns |= {f"C{i}": r.integers(0, 3 + i, 400) for i in range(4)}
    rows = pa.table({**columns, "y": r.integers(0, 2, 400)})
    encoder = Encoder.fit(Schema(fields=(*numbers, *categories), labels=("y",)).with_crosses(), rows)
    layout, sparse = encoder.layout, encoder.transform(rows).sparse
    at = {c.name: i for i, c in enumerate(layout.sparse)}
    pairs = field_pairs(layout)
    assert [p.name for p in pairs] == ["C0*C1", "C0*C2", "C0*C3", "C1*C2", "C1*C3", "C2*C3"]
    assert {p.cross for p in pairs} == {c.name for c in layout.sparse if c.parts is not None}
    for pair in pairs:
        assert pair.cross is not None
        both = set(zip(columns[pair.left].tolist(), columns[pair.right].tolist(), strict=True))
        with_id = zip(
            columns[pair.left].tolist(), columns[pair.right].tolist(), sparse[:, at[pair.cross]].tolist(), strict=True
        )
        assert len(set(with_id)) == len(both) == len(set(sparse[:, at[pair.cross]].tolist()))  # one id, one pair of raw values


def test_a_cross_without_any_frequent_pair_has_its_oov_only() -> None:
    encoder = Encoder.fit(ABC.with_crosses(min_count=99), random_rows(50))
    assert {c.vocab_size for c in encoder.layout.sparse if c.parts} == {2}
    assert isinstance(encoder.vocabularies["a*b"], Vocabulary)
    assert set(encoder.transform(random_rows(50)).sparse[:, 3:].flatten().tolist()) == {1}
    rare = Schema(fields=(SparseField(name="a", min_count=99), SparseField(name="c")), labels=("y",))
    of_nothing = Encoder.fit(rare.with_crosses(), random_rows(50))
    assert [c.vocab_size for c in of_nothing.layout.sparse if c.name != "c"] == [2, 2]


def test_ids_of_raw_values_of_a_cross_are_refused() -> None:
    encoder = Encoder.fit(ABC.with_crosses(), random_rows(50))
    with pytest.raises(DataError, match="'a\\*b' is a cross"):
        encoder.ids("a*b", [1])


def test_in_the_public_names() -> None:
    assert ctrlib.CrossField is CrossField
    assert isinstance(CLICKS.fields[-1], SequenceField)
