"""Behaviours of users: aligned, known before their row, the most recent; the same from a store, a stream and raw rows."""

from __future__ import annotations

import logging
from dataclasses import replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from ctrlib import artifact
from ctrlib.batch import Batch, Ragged
from ctrlib.data import loader
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader, StreamLoader
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.data.vocabulary import Vocabulary
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import preset
from ctrlib.schema import DataError, History, HistoryColumn, Schema, SequenceField, SparseField
from ctrlib.search.field_gates import FieldGates
from ctrlib.search.selection import Selection, apply_to_store, compact, dropped_fields
from ctrlib.training import predict

N = 313
HISTORY = History(name="seen", fields=("hist_item", "hist_tags", "hist_shop"), times="hist_time", gaps="hist_gap", max_length=4)
SCHEMA = Schema(
    fields=(
        SparseField(name="item"),
        SequenceField(name="tags"),
        SequenceField(name="hist_item", ordered=True, shares="item", side="context"),
        SequenceField(name="hist_tags", ordered=True, nested=True, shares="tags", side="context"),
        SequenceField(name="hist_shop", ordered=True, separator="|", pooling="sum", side="context"),
    ),
    labels=("y",),
    group="item",
    time="time",
    histories=(HISTORY,),
)
COLUMNS = ("hist_item", "hist_tags", "hist_shop", "hist_gap")


def raw(n: int = N) -> list[dict[str, Any]]:
    """Rows whose behaviours are partly at or after their time; some have none, some behaviours have no tags."""
    r = np.random.default_rng(4)
    rows = []
    for i in range(n):
        length = int(r.integers(0, 9)) if i % 5 else 0
        times = np.sort(r.integers(0, 1000, length)).tolist()
        rows.append(
            {
                "y": i % 2,
                "item": int(r.integers(0, 30)),
                "tags": [f"t{k}" for k in r.integers(0, 9, i % 3)],
                "time": int(r.integers(300, 1100)),
                "hist_item": r.integers(0, 40, length).tolist(),
                "hist_tags": [[f"t{k}" for k in r.integers(0, 11, r.integers(0, 4))] for _ in range(length)],
                "hist_shop": "|".join(f"s{k}" for k in r.integers(0, 5, length)),
                "hist_time": times if length or i % 2 else None,
            }
        )
    return rows


def table(n: int = N) -> Any:
    rows = raw(n)
    types = {"hist_item": pa.list_(pa.int64()), "hist_tags": pa.list_(pa.list_(pa.string())), "tags": pa.list_(pa.string())}
    types |= {"hist_time": pa.list_(pa.int64()), "hist_shop": pa.string()}
    return pa.table({name: pa.array([row[name] for row in rows], types.get(name)) for name in rows[0]})


def expected(encoder: Encoder, rows: list[dict[str, Any]], history: History = HISTORY) -> tuple[dict[str, list[Any]], int, int]:
    """The ids of every row by a loop, and how many behaviours of how many rows are leaks."""
    found: dict[str, list[Any]] = {name: [] for name in COLUMNS}
    leaks, leaking = 0, 0
    for row in rows:
        times = row["hist_time"] or []
        kept = [i for i, t in enumerate(times) if t < row["time"]]
        leaks += len(times) - len(kept)
        leaking += len(kept) < len(times)
        kept = kept[-history.max_length :] if history.max_length is not None else kept
        shops = row["hist_shop"].split("|") if row["hist_shop"] else []
        found["hist_item"].append(encoder.ids("hist_item", [row["hist_item"][i] for i in kept]).tolist() if kept else [])
        found["hist_shop"].append(encoder.ids("hist_shop", [shops[i] for i in kept]).tolist() if kept else [])
        tags = [row["hist_tags"][i] for i in kept]
        found["hist_tags"].append([encoder.ids("hist_tags", one).tolist() if one else [] for one in tags])
        # 2 + ⌊log₂(1 + gap)⌋ in whole numbers
        found["hist_gap"].append([1 + (1 + row["time"] - times[i]).bit_length() for i in kept])
    return found, leaks, leaking


def lists(ragged: Ragged) -> list[Any]:
    """As nested lists."""
    values, offsets = ragged.values.tolist(), ragged.offsets.tolist()
    if ragged.inner is not None:
        inner = ragged.inner.tolist()
        assert (inner[0], inner[-1], len(inner)) == (0, len(values), offsets[-1] + 1)
        values = [values[inner[m] : inner[m + 1]] for m in range(len(inner) - 1)]
    assert (offsets[0], offsets[-1]) == (0, len(values))
    return [values[offsets[b] : offsets[b + 1]] for b in range(len(offsets) - 1)]


def tensors(batch: Batch) -> list[Tensor]:
    found = [t for t in (batch.sparse, batch.dense, batch.labels, batch.group) if t is not None]
    for ragged in batch.sequences.values():
        found += [ragged.values, ragged.offsets, *([] if ragged.inner is None else [ragged.inner])]
    return found


def same(a: Batch, b: Batch) -> bool:
    assert [(n, r.inner is None) for n, r in a.sequences.items()] == [(n, r.inner is None) for n, r in b.sequences.items()]
    pairs = zip(tensors(a), tensors(b), strict=True)
    return all((x.dtype, x.shape, x.numpy().tobytes()) == (y.dtype, y.shape, y.numpy().tobytes()) for x, y in pairs)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("raw") / "raw.parquet"
    pq.write_table(table(), target, row_group_size=50)
    return target


@pytest.fixture(scope="module")
def encoder(path: Path) -> Encoder:
    return Encoder.fit(SCHEMA, path)


@pytest.fixture(scope="module")
def store(path: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Store:
    codes = (np.arange(N) % 3 == 2).astype(np.uint8)
    sources = open_source(path).divide(codes, {"train": 0, "test": 1})
    return Store.create(tmp_path_factory.mktemp("stores") / "store", encoder, sources)


def test_layout(encoder: Encoder) -> None:
    layout = encoder.layout
    assert layout.histories == (HistoryColumn("seen", COLUMNS, ("item", "tags", None, None)),)
    columns = {c.name: c for c in layout.sequences}
    assert list(columns) == ["tags", *COLUMNS]
    assert [name for name, c in columns.items() if c.nested] == ["hist_tags"]
    assert [name for name, c in columns.items() if c.ordered] == list(COLUMNS)
    assert columns["hist_gap"].vocab_size == 66
    assert columns["hist_item"].table == "item"
    assert "hist_gap" not in encoder.vocabularies


@pytest.mark.parametrize("block_rows", [1 << 17, 7, 1])
@pytest.mark.parametrize("max_length", [None, 1, 4])
def test_ids_are_those_of_a_loop(path: Path, encoder: Encoder, block_rows: int, max_length: int | None) -> None:
    history = replace(HISTORY, max_length=max_length)
    encoder = Encoder(replace(SCHEMA, histories=(history,)), encoder.vocabularies, encoder.numeric)
    want, leaks, leaking = expected(encoder, raw(), history)
    assert leaks > 100
    blocks = list(encoder.encode(path, block_rows=block_rows))
    for name in COLUMNS:
        assert [row for block in blocks for row in lists(block.batch().sequences[name])] == want[name], name
    dropped = np.concatenate([block.leaks["seen"] for block in blocks])
    assert (dropped.sum(), (dropped > 0).sum()) == (leaks, leaking)
    assert {t.dtype for t in tensors(blocks[0].batch()) if not t.is_floating_point()} == {torch.int32, torch.int64}


def test_threads_do_not_show(encoder: Encoder) -> None:
    data = table(4500)
    whole = encoder.transform(data)
    blocks = [block.batch() for block in encoder.encode(data, labels=False, block_rows=800)]
    for name in COLUMNS:
        assert lists(whole.sequences[name]) == [row for block in blocks for row in lists(block.sequences[name])]


def test_a_frame_or_dicts_give_the_same(path: Path, encoder: Encoder) -> None:
    want = encoder.transform(path)
    assert same(encoder.transform(raw()), want)
    assert same(encoder.transform(table()), want)
    rows = raw()
    one = encoder.transform([rows[0]])  # a list without any value has no type
    assert rows[0]["hist_item"] == []
    assert lists(one.sequences["hist_tags"]) == [[]]


def test_store_stream_and_transform_agree(path: Path, encoder: Encoder, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = (np.arange(N) % 3 == 2).astype(np.uint8)
    source = open_source(path).divide(codes, {"train": 0, "test": 1})["train"]
    opened = Store.open(store.path, schema=SCHEMA)
    [whole] = Loader(opened.split("train"), N)
    assert same(whole, encoder.transform(source, labels=True))
    monkeypatch.setattr(loader, "_SWEEP_ROWS", 16)
    monkeypatch.setattr(loader, "_SMALLEST_BLOCK", 8)
    for shuffle in (False, True):
        want = list(Loader(store.split("train"), 20, shuffle=shuffle, seed=3, workers=0))
        for memory_mb in (None, 0.005):
            batches = Loader(opened.split("train"), 20, shuffle=shuffle, seed=3, memory_mb=memory_mb)
            stream = StreamLoader(encoder, source, 20, shuffle=shuffle, seed=3, memory_mb=memory_mb)
            assert stream.num_windows > 1 or memory_mb is None or not shuffle
            for found in (batches, stream):
                assert all(same(a, b) for a, b in zip(found, want, strict=True))


def test_what_the_guard_drops_is_counted(
    path: Path, encoder: Encoder, store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = raw()
    for name, codes in (("train", (0, 1)), ("test", (2,))):
        _, leaks, leaking = expected(encoder, [row for i, row in enumerate(rows) if i % 3 in codes])
        assert store.leaks[name] == {"seen": {"behaviours": leaks, "rows": leaking}}
    assert Store.open(store.path).leaks == store.leaks
    _, leaks, leaking = expected(encoder, rows)
    message = f"dropped {leaks} behaviours of {leaking} rows from history 'seen'"
    with caplog.at_level(logging.WARNING, logger="ctrlib"):
        Store.create(tmp_path / "again", encoder, {"all": open_source(path)})
    assert message in caplog.text
    for shuffle, memory_mb in ((False, None), (True, None), (True, 0.005)):
        caplog.clear()
        stream = StreamLoader(encoder, path, 50, shuffle=shuffle, memory_mb=memory_mb)
        for _ in range(2):  # told in the first epoch only
            assert sum(len(batch) for batch in stream) == N
        assert caplog.text.count(message) == 1


def test_an_artifact_reads_raw_rows(path: Path, encoder: Encoder, store: Store, tmp_path: Path) -> None:
    config = preset("dnn")
    torch.manual_seed(0)
    model = build_model(config, encoder.layout).eval()
    artifact.save(tmp_path / "artifact", encoder, model, config)
    loaded = artifact.load(tmp_path / "artifact")
    rows = [row for i, row in enumerate(raw()) if i % 3 == 2]
    for row in rows:
        del row["y"]
    want = predict(model, Loader(store.split("test"), 64)).probability
    np.testing.assert_allclose(loaded.predict(rows), want, rtol=0, atol=1e-7)
    with pytest.raises(DataError, match="no column 'hist_time', which the model reads"):
        loaded.predict([{name: value for name, value in row.items() if name != "hist_time"} for row in rows])


def test_no_guard_without_the_time_of_the_row(encoder: Encoder) -> None:
    schema = replace(SCHEMA, time=None, histories=(replace(HISTORY, gaps=None, max_length=None),))
    batch = Encoder(schema, encoder.vocabularies, {}).transform(raw())
    assert [len(one) for one in lists(batch.sequences["hist_item"])] == [len(row["hist_item"]) for row in raw()]
    assert next(Encoder(schema, encoder.vocabularies, {}).encode(raw())).leaks == {}


def test_timestamps_and_dates(encoder: Encoder) -> None:
    def schema(gaps: str | None) -> Schema:
        fields = (SparseField(name="x"), SequenceField(name="h", ordered=True, shares="x"))
        return Schema(fields=fields, labels=("y",), time="now", histories=(History(fields=("h",), times="at", gaps=gaps),))

    def encoded(now: Any, at: Any, gaps: str | None = "g") -> tuple[list[Any], list[Any]]:
        data = pa.table({"x": [1, 2], "h": [[1, 2, 1], [2, 2, 1]], "y": [0, 1], "now": now, "at": at})
        batch = Encoder.fit(schema(gaps), data).transform(data)
        return lists(batch.sequences["h"]), lists(batch.sequences["g"])

    day = 86_400
    seconds = [[0, day, 2 * day], [day, day, 3 * day]]
    days = [[date(1970, 1, 1 + t // day) for t in row] for row in seconds]
    stamps = [[datetime(1970, 1, 1 + t // day, tzinfo=UTC) for t in row] for row in seconds]
    want = encoded([2 * day, 3 * day], seconds)
    gap = {1: 2 + 16, 2: 2 + 17}  # of so many days: 2¹⁶ ≤ 86,401 < 2¹⁷ ≤ 172,801
    assert want == ([[3, 2], [2, 2]], [[gap[2], gap[1]], [gap[2], gap[2]]])
    now = [datetime(1970, 1, 3, tzinfo=UTC), datetime(1970, 1, 4, tzinfo=UTC)]
    for unit in ("s", "ms", "us", "ns"):
        for zone in (None, "Europe/Berlin"):
            kind = pa.timestamp(unit, zone)
            assert encoded(pa.array(now, pa.timestamp("ms", "UTC")), pa.array(stamps, pa.list_(kind))) == want
    assert encoded(pa.array([t.date() for t in now]), pa.array(days)) == want
    assert encoded(pa.array([2.0 * day, 3.0 * day]), pa.array(seconds, pa.list_(pa.float32()))) == want
    with pytest.raises(DataError, match=r"'at' of history 'history' holds .*list.*, and the row's time 'now' timestamp"):
        encoded(pa.array(now), seconds)
    with pytest.raises(DataError, match=r"column 'now', the training table, row 1: the column holds string; expected times"):
        encoded(pa.array(["a", "b"]), seconds)


def broken(column: str, row: int, value: Any, kind: Any = None) -> Any:
    rows = raw(60)
    rows[row][column] = value
    data = table(60)
    at = data.column_names.index(column)
    return data.set_column(at, column, pa.array([one[column] for one in rows], kind or data.schema.field(column).type))


ROW = next(i for i, row in enumerate(raw(60)) if i > 20 and len(row["hist_item"]) > 3 and row["hist_time"][1] < row["time"])


@pytest.mark.parametrize(
    ("column", "change", "message"),
    [
        ("hist_tags", lambda v: v[:-1], "values, but .* in column 'hist_item'; history 'seen' needs one for every behaviour"),
        ("hist_time", lambda v: [*v, 5000], "values, but .* in column 'hist_item'"),
        ("hist_time", lambda v: [v[0], v[1] + 1, v[1], *v[3:]], r"times of history 'seen' fall \(behaviour 3 of \d\); sort"),
        ("hist_time", lambda v: [None, *v[1:]], "a list holds a missing value"),
        ("hist_tags", lambda v: [None, *v[1:]], "a list holds a missing value"),
        ("hist_tags", lambda v: [[None], *v[1:]], "a list holds a missing value"),
        ("time", lambda v: None, "the time is missing; expected one in every row"),
    ],
)
def test_rows_that_are_wrong(encoder: Encoder, tmp_path: Path, column: str, change: Any, message: str) -> None:
    file = tmp_path / "bad.parquet"
    pq.write_table(broken(column, ROW, change(raw(60)[ROW][column])), file, row_group_size=7)
    with pytest.raises(DataError, match=rf"column '{column}', .*bad\.parquet, row {ROW + 1}: .*{message}"):
        list(encoder.encode(file))
    part = open_source(file).select(np.arange(60) >= 10)  # of a selection too, the row of the file
    with pytest.raises(DataError, match=rf"bad\.parquet, row {ROW + 1}: "):
        list(encoder.encode(part, block_rows=9))


def test_leaks_are_refused(encoder: Encoder, tmp_path: Path) -> None:
    strict = replace(SCHEMA, histories=(replace(HISTORY, on_leak="refuse"),))
    refusing = Encoder(strict, encoder.vocabularies, encoder.numeric)
    rows = [row for row in raw() if not row["hist_time"] or row["hist_time"][-1] < row["time"]]
    assert len(rows) > 50
    want, *_ = expected(encoder, rows)
    batch = refusing.transform(rows)
    assert lists(batch.sequences["hist_item"]) == want["hist_item"]
    at = next(i for i, row in enumerate(rows) if len(row["hist_item"]) == 3)
    rows[at]["time"] = rows[at]["hist_time"][2]  # at the row's time is too late
    with pytest.raises(
        DataError, match=rf"column 'hist_time', the table, row {at + 1}: behaviour 3 of 3 of history 'seen' is not"
    ):
        refusing.transform(rows)


def test_refusing_leaks_needs_both_times() -> None:
    for times, time in ((None, "t"), ("ht", None)):
        history = History(fields=("h",), times=times, on_leak="refuse")
        fields = (SparseField(name="x"), SequenceField(name="h", ordered=True, shares="x"))
        with pytest.raises(DataError, match="history 'history': on_leak is 'refuse', but no leak would be found without"):
            Schema(fields=fields, labels=("y",), time=time, histories=(history,))


def test_behaviours_are_compared_with_the_owner_of_their_vocabulary() -> None:
    fields = (
        SparseField(name="clicked_last", shares="item"),
        SparseField(name="item"),
        SequenceField(name="h", ordered=True, shares="item"),
    )
    schema = Schema(fields=fields, labels=("y",), histories=(History(fields=("h",)),))
    encoder = Encoder.fit(schema, [{"clicked_last": 1, "item": 2, "h": [1, 2], "y": i} for i in (0, 1)])
    assert encoder.layout.histories[0].targets == ("item",)


def leaking(**options: Any) -> tuple[Schema, list[dict[str, Any]]]:
    """Rows at time 100, whose last behaviour is known at 500 only; the one before has two tags."""
    fields = (
        SparseField(name="item"),
        SequenceField(name="h", ordered=True, shares="item"),
        SequenceField(name="tags", ordered=True, nested=True),
    )
    history = History(fields=("h", "tags"), times="ht", **options)
    row = {"item": 1, "h": [1, 2, 999], "tags": [["a"], ["b", "c"], ["z"]], "ht": [10, 20, 500], "t": 100}
    return Schema(fields=fields, labels=("y",), time="t", histories=(history,)), [{**row, "y": i % 2} for i in range(4)]


def counts(encoder: Encoder, name: str) -> dict[Any, int]:
    vocabulary = encoder.vocabularies[name]
    assert isinstance(vocabulary, Vocabulary)
    return dict(zip(vocabulary.values.to_pylist(), vocabulary.counts.tolist(), strict=True))


def test_leaks_are_not_counted() -> None:
    encoder = Encoder.fit(*leaking())
    assert encoder.ids("item", [999, 777]).tolist() == [1, 1]
    assert counts(encoder, "item") == {1: 8, 2: 4}
    assert counts(encoder, "tags") == {"a": 4, "b": 4, "c": 4}
    recent = Encoder.fit(*leaking(max_length=1))  # after the guard, item 2 alone is left
    assert (counts(recent, "item"), counts(recent, "tags")) == ({1: 4, 2: 4}, {"b": 4, "c": 4})


def test_leaks_are_refused_by_fit() -> None:
    with pytest.raises(DataError, match=r"column 'ht', the training table, row 1: behaviour 3 of 3 .* set on_leak to 'drop'"):
        Encoder.fit(*leaking(on_leak="refuse"))
    schema, rows = leaking()
    with pytest.raises(DataError, match=r"column 'tags' .*, or behaviours that are not before the time of their row"):
        Encoder.fit(schema, [{**row, "t": 10} for row in rows])


def test_leaks_are_not_counted_however_many_rows_there_are() -> None:
    """More than are read at a time; every row has a value of its own that it may know, and one that it may not."""
    n = 140_000
    values = np.stack([np.arange(n), np.arange(n) + n], axis=1)
    lists = {"h": values, "ht": np.tile([5, 100], (n, 1))}
    data = {
        name: pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 2).cast(pa.list_(pa.int64())) for name, x in lists.items()
    }
    fields = (SequenceField(name="h", ordered=True),)
    schema = Schema(fields=fields, labels=("y",), time="t", histories=(History(fields=("h",), times="ht"),))
    now = np.full(n, 100)
    now[135_000] = 101
    vocabulary = Encoder.fit(schema, pa.table({**data, "t": now, "y": np.arange(n) % 2})).vocabularies["h"]
    assert isinstance(vocabulary, Vocabulary)
    assert sorted(vocabulary.values.to_pylist()) == [*range(n), n + 135_000]


def test_the_kind_of_times_is_remembered(tmp_path: Path) -> None:
    schema, rows = leaking()
    stamps = [{**row, "ht": [datetime(2024, 1, d) for d in (1, 2, 9)], "t": datetime(2024, 1, 5)} for row in rows]
    for trained, other, message in (
        (rows, stamps, r"column 'ht' of history 'history' holds .*timestamp.*, but training had numbers"),
        (stamps, rows, r"column 'ht' of history 'history' holds .*int64.*, but training had timestamps or dates"),
    ):
        encoder = Encoder.fit(schema, trained)
        assert encoder.clocks == {"history": trained is stamps}
        encoder.transform(trained)
        encoder.save(tmp_path)
        loaded = Encoder.load(tmp_path)
        assert (loaded.clocks, loaded.hash) == (encoder.clocks, encoder.hash)
        for known in (encoder, loaded):
            with pytest.raises(DataError, match=message):
                known.transform(other)
        with pytest.raises(DataError, match=r"column 't' of history 'history' holds"):
            loaded.transform([{**row, "h": [], "tags": [], "ht": []} for row in other])
    # One that was written before kinds were remembered: it is read, and takes what it took.
    old = Encoder(schema, encoder.vocabularies, encoder.numeric)
    old.save(tmp_path)
    assert "clocks" not in (tmp_path / "encoder.json").read_text()
    assert Encoder.load(tmp_path).clocks == {}
    Encoder.load(tmp_path).transform(rows)


def test_kinds_that_are_wrong(encoder: Encoder) -> None:
    rows = raw(9)
    with pytest.raises(DataError, match=r"column 'hist_tags', the table, row 1: .*not lists; declare the field without nested"):
        encoder.transform([{**row, "hist_tags": ["a"] * len(row["hist_item"])} for row in rows[1:]])
    with pytest.raises(DataError, match=r"column 'hist_item', the table, row 1: the column holds lists of lists"):
        encoder.transform([{**row, "hist_item": [[1]] * len(row["hist_item"])} for row in rows])
    with pytest.raises(DataError, match=r"column 'hist_time', the table, row 1: .*expected a list of times in every row"):
        encoder.transform([{**row, "hist_time": 3} for row in rows])
    with pytest.raises(DataError, match=r"column 'hist_time', the table, row \d: the column holds .*string; expected times"):
        encoder.transform([{**row, "hist_time": ["a"] * len(row["hist_item"])} for row in rows])
    with pytest.raises(DataError, match=r"has no column 'hist_time', which the schema declares as a field"):
        Encoder.fit(SCHEMA, table(9).drop_columns(["hist_time"]))


def test_a_saved_encoder_reads_histories(encoder: Encoder, path: Path, tmp_path: Path) -> None:
    encoder.save(tmp_path)
    loaded = Encoder.load(tmp_path)
    assert (loaded.schema, loaded.layout, loaded.hash) == (SCHEMA, encoder.layout, encoder.hash)
    assert same(loaded.transform(path), encoder.transform(path))
    other = replace(SCHEMA, histories=(replace(HISTORY, max_length=3),))
    assert Encoder(other, encoder.vocabularies, encoder.numeric).hash != encoder.hash


def selection(encoder: Encoder, **kept: Any) -> Selection:
    return Selection(method="test", encoder_hash=encoder.hash, **kept)


def test_a_selection_of_attributes(path: Path, encoder: Encoder, store: Store, tmp_path: Path) -> None:
    chosen = selection(encoder, fields=("item", "hist_item", "hist_shop"))
    derived = chosen.apply(encoder)
    assert derived.schema.histories == (replace(HISTORY, fields=("hist_item", "hist_shop")),)  # time gaps go with any field
    assert "hist_time" not in derived.schema.ignored
    smaller = apply_to_store(chosen, store, tmp_path / "smaller")
    assert smaller.leaks == store.leaks
    [found], [want] = Loader(smaller.split("test"), N), Loader(store.split("test"), N)
    assert same(found, Loader(Store.open(smaller.path).split("test"), N).__iter__().__next__())
    for name in ("hist_item", "hist_shop"):
        assert lists(found.sequences[name]) == lists(want.sequences[name])
    assert derived.layout.histories[0].targets == ("item", None, None)
    none = selection(encoder, fields=("item", "tags", "hist_gap")).apply(encoder)
    assert none.schema.histories == ()
    assert [c.name for c in none.layout.sequences] == ["tags"]


def test_a_selection_of_values_keeps_behaviours(path: Path, encoder: Encoder, store: Store, tmp_path: Path) -> None:
    kept = np.arange(encoder.vocabularies["tags"].size) % 3 > 0
    kept[0] = True
    chosen = selection(encoder, values={"tags": kept})
    derived = chosen.apply(encoder)
    smaller = apply_to_store(chosen, store, tmp_path / "smaller")
    [found] = Loader(smaller.split("test"), N)
    codes = (np.arange(N) % 3 == 2).astype(np.uint8)
    assert same(found, derived.transform(open_source(path).divide(codes, {"test": 1})["test"], labels=True))
    [want] = Loader(store.split("test"), N)
    assert torch.equal(found.sequences["hist_tags"].offsets, want.sequences["hist_tags"].offsets)
    assert (found.sequences["hist_tags"].values == 0).any()


def test_batches_move_whole(encoder: Encoder) -> None:
    batch = encoder.transform(raw(20))
    moved = batch.to("cpu")
    assert same(moved, batch)
    flat = batch.sequences["hist_tags"].flat
    assert flat.inner is None
    assert lists(flat) == [[v for one in row for v in one] for row in lists(batch.sequences["hist_tags"])]
    assert batch.sequences["hist_item"].flat is batch.sequences["hist_item"]


def test_a_model_is_compacted(encoder: Encoder) -> None:
    torch.manual_seed(0)
    model = build_model(preset("dnn", "paper"), encoder.layout).eval()
    chosen = selection(encoder, fields=("item", "tags", "hist_item", "hist_tags"))
    small, derived = compact(model, chosen, encoder)
    gates = FieldGates(encoder.layout.names)
    dropped = dropped_fields(chosen, encoder)
    assert "hist_gap" not in dropped
    gates.values_F[[name in dropped for name in gates.names]] = 0
    with gates.on(model), torch.no_grad():
        want, found = model(encoder.transform(raw())).logits, small(derived.transform(raw())).logits
    torch.testing.assert_close(found, want, rtol=0, atol=1e-6)
    assert want.std() > 1e-6
    assert derived.layout.histories[0].fields == COLUMNS
