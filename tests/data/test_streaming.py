"""However rows are fetched, the batches are the same to the bit: gathered from a mapped store, read in windows of little
memory, or encoded on the way without any store.
"""

from __future__ import annotations

import gc
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from ctrlib import cli, experiment
from ctrlib.batch import Batch
from ctrlib.data import loader, memory
from ctrlib.data.encoder import Encoded, Encoder
from ctrlib.data.loader import Loader, StreamLoader
from ctrlib.data.source import Source, open_source
from ctrlib.data.split import split_rows
from ctrlib.data.store import Split, Store
from ctrlib.experiment import DataOptions, prepare, train
from ctrlib.schema import DataError, DenseField, Schema, SequenceField, SparseField
from tests.clicks import TINY, tiny, write

N = 401
SCHEMA = Schema(
    fields=(
        SparseField(name="id"),
        SparseField(name="city", min_count=2),
        SparseField(name="item"),
        DenseField(name="price"),
        DenseField(name="age", encoding="bucket", num_bins=4),
        SequenceField(name="bag"),
        SequenceField(name="clicks", max_length=3, shares="item"),
    ),
    labels=("y", "buy"),
    weight="w",
    group="g",
)


def table(n: int = N) -> Any:
    """Every kind of column, gaps included; ``id`` is the number of the row."""
    rng = np.random.default_rng(0)
    price = [None if i % 7 == 3 else float(i) ** 2 for i in range(n)]
    return pa.table(
        {
            "id": np.arange(n),
            "city": pa.array([None if i % 11 == 0 else f"city {i * i % 23}" for i in range(n)]),
            "item": rng.integers(0, 50, n),
            "price": pa.array(price),
            "age": rng.integers(18, 80, n),
            "bag": pa.array([None if i % 13 == 0 else [f"t{k}" for k in rng.integers(0, 9, i % 6)] for i in range(n)]),
            "clicks": pa.array([rng.integers(0, 60, i % 5).tolist() for i in range(n)]),
            "y": np.arange(n) % 2,
            "buy": np.arange(n) % 3 // 2,
            "w": rng.random(n),
            "g": np.arange(n) // 3 + 2**60,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The table as three Parquet files in row groups that no batch ends with."""
    path = tmp_path_factory.mktemp("raw")
    data = table()
    for i, start in enumerate((0, 150, 151)):
        stop = (150, 151, N)[i]
        pq.write_table(data.slice(start, stop - start), path / f"{i}.parquet", row_group_size=37)
    return path


@pytest.fixture(scope="module")
def encoder(folder: Path) -> Encoder:
    return Encoder.fit(SCHEMA, str(folder))


@pytest.fixture(scope="module")
def split(folder: Path, encoder: Encoder, tmp_path_factory: pytest.TempPathFactory) -> Split:
    path = tmp_path_factory.mktemp("stores") / "store"
    return Store.create(path, encoder, {"train": open_source(str(folder))}).split("train")


def tensors(batch: Batch) -> dict[str, Tensor]:
    found = {f.name: getattr(batch, f.name) for f in fields(batch) if f.name not in ("sequences", "edges")}
    for name, ragged in batch.sequences.items():
        found |= {f"{name} values": ragged.values, f"{name} offsets": ragged.offsets}
    assert all(tensor is not None for tensor in found.values())
    return found


def same(found: list[Batch], wanted: list[Batch]) -> bool:
    """Equal to the bit, types and shapes included; NaN equals NaN of the same bits."""
    return len(found) == len(wanted) and all(
        (x.dtype, x.shape, x.numpy().tobytes()) == (y.dtype, y.shape, y.numpy().tobytes())
        for a, b in zip(found, wanted, strict=True)
        for x, y in zip(tensors(a).values(), tensors(b).values(), strict=True)
    )


def ids(batch: Batch) -> list[int]:
    """Row numbers: equal counts give ids by value. (The first two ids are padding and OOV.)"""
    return [i - 2 for i in batch.sparse[:, 0].tolist()]


ONE_BATCH, SOME, ALL = 1e-6, 0.02, None  # windows of a batch; a few windows an epoch; everything at once


@pytest.mark.parametrize("memory_mb", [ONE_BATCH, SOME, ALL])
@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("batch_size", [20, 57, 131, 1000])
def test_windows_and_streams_give_the_batches_of_a_plain_gather(
    batch_size: int, workers: int, memory_mb: float | None, folder: Path, encoder: Encoder, split: Split
) -> None:
    plain = Loader(split, batch_size, shuffle=True, seed=3, workers=0)
    windows = Loader(split, batch_size, shuffle=True, seed=3, workers=workers, memory_mb=memory_mb)
    stream = StreamLoader(encoder, str(folder), batch_size, shuffle=True, seed=3, workers=workers, memory_mb=memory_mb)
    assert (stream.num_windows > 1) is (memory_mb is not ALL and batch_size < N)
    assert len(windows) == len(stream) == len(plain)
    assert windows.num_rows == stream.num_rows == plain.num_rows == N
    for _ in range(2):
        wanted = list(plain)
        assert sorted(row for batch in wanted for row in ids(batch)) == list(range(N))
        assert same(list(windows), wanted)
        assert same(list(stream), wanted)
    assert plain.epoch == windows.epoch == stream.epoch == 2


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [25, 39, 40, 50, 100, 400, 401, 402])
def test_the_last_batch(
    batch_size: int,
    shuffle: bool,
    drop_last: bool,
    folder: Path,
    encoder: Encoder,
    split: Split,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(loader, "BLOCK_ROWS", 100)
    plain = list(Loader(split, batch_size, shuffle=shuffle, drop_last=drop_last))
    wanted = [batch_size] * (N // batch_size) + [N % batch_size] * (N % batch_size > 0 and not drop_last)
    if N % batch_size == 1 and not drop_last and batch_size <= N:
        wanted[-2:] = [batch_size + 1]
    assert [len(batch) for batch in plain] == wanted
    for memory_mb in (ONE_BATCH, SOME, ALL):
        windows = Loader(split, batch_size, shuffle=shuffle, drop_last=drop_last, memory_mb=memory_mb)
        stream = StreamLoader(
            encoder, str(folder), batch_size, shuffle=shuffle, drop_last=drop_last, workers=1, memory_mb=memory_mb
        )
        assert same(list(windows), plain)
        assert same(list(stream), plain)
        assert len(windows) == len(stream) == len(plain)
        assert windows.num_rows == stream.num_rows == sum(wanted)


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_without_shuffle_a_stream_is_one_pass_in_file_order(
    workers: int, folder: Path, encoder: Encoder, split: Split, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "BLOCK_ROWS", 100)
    passes = []
    encode = Encoder.encode

    def counted(self: Encoder, source: Any, **options: Any) -> Iterator[Encoded]:
        passes.append(source.num_rows)
        return encode(self, source, **options)

    monkeypatch.setattr(Encoder, "encode", counted)
    stream = StreamLoader(encoder, str(folder), 30, workers=workers, memory_mb=ONE_BATCH)
    for _ in range(2):
        found = list(stream)
        assert [row for batch in found for row in ids(batch)] == list(range(N))
        assert same(found, list(Loader(split, 30)))
    assert passes == [N, N]


def test_rows_that_fit_are_encoded_once(folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StreamLoader(encoder, str(folder), 30, shuffle=True)
    first = list(stream)

    def refuse(*_: object, **__: object) -> Iterator[Encoded]:
        raise AssertionError("a second pass")

    monkeypatch.setattr(Encoder, "encode", refuse)
    second = list(stream)
    assert sorted(row for batch in second for row in ids(batch)) == list(range(N))
    assert not same(second, first)
    stream.epoch = 0
    assert same(list(stream), first)


@pytest.mark.parametrize("memory_mb", [SOME, ALL])
def test_a_selection_is_streamed_as_it_would_be_stored(
    memory_mb: float | None, folder: Path, encoder: Encoder, tmp_path: Path
) -> None:
    parts = split_rows(open_source(str(folder)), {"train": 0.7, "valid": 0.2, "test": 0.1}, seed=5)
    store = Store.create(tmp_path / "store", encoder, parts)
    seen: list[int] = []
    for name, source in parts.items():
        for shuffle in (False, True):
            wanted = list(Loader(store.split(name), 16, shuffle=shuffle, seed=2))
            assert same(list(StreamLoader(encoder, source, 16, shuffle=shuffle, seed=2, memory_mb=memory_mb)), wanted)
        seen += [row for batch in wanted for row in ids(batch)]
    assert sorted(seen) == list(range(N))


def test_tables_in_memory_and_csv(encoder: Encoder, tmp_path: Path) -> None:
    data = table()
    frame = data.to_pandas()
    assert same(
        list(StreamLoader(encoder, frame, 50, shuffle=True, memory_mb=SOME)),
        list(StreamLoader(encoder, data, 50, shuffle=True, memory_mb=ALL)),
    )
    plain = Schema(fields=(SparseField(name="id"), DenseField(name="age")), labels=("y",))
    path = tmp_path / "rows.csv"
    frame[["id", "age", "y"]].to_csv(path, index=False)
    fitted = Encoder.fit(plain, str(path))
    seen = []
    for batch in StreamLoader(fitted, path, 50, shuffle=True, memory_mb=0.005):
        assert batch.labels is not None
        assert batch.labels[:, 0].tolist() == [row % 2 for row in ids(batch)]
        seen += ids(batch)
    assert sorted(seen) == list(range(N))


@pytest.fixture(scope="module")
def label_sorted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Encoder, Source, Split]:
    n, positives = 20_100, 6_030
    data = pa.table({"id": np.arange(n), "y": np.arange(n) >= n - positives})
    encoder = Encoder.fit(Schema(fields=(SparseField(name="id"),), labels=("y",)), data)
    store = Store.create(tmp_path_factory.mktemp("sorted") / "store", encoder, {"train": open_source(data)})
    return encoder, open_source(data), store.split("train")


def chi_square_p(statistic: float, degrees: int) -> float:
    """P(χ² > statistic); for even degrees, P(Poisson(statistic/2) < degrees/2)."""
    half = statistic / 2
    return math.fsum(math.exp(k * math.log(half) - half - math.lgamma(k + 1)) for k in range(degrees // 2))


def test_chi_square_p_against_a_table() -> None:
    assert chi_square_p(23.209, 10) == pytest.approx(0.01, abs=1e-5)
    assert chi_square_p(2.558, 10) == pytest.approx(0.99, abs=1e-5)


Way = Callable[[Encoder, Source, Split, int], Loader | StreamLoader]
WAYS: dict[str, Way] = {
    "gather": lambda _, __, split, seed: Loader(split, 100, shuffle=True, seed=seed),
    "windows": lambda _, __, split, seed: Loader(split, 100, shuffle=True, seed=seed, memory_mb=0.2),
    "stream": lambda encoder, source, _, seed: StreamLoader(encoder, source, 100, shuffle=True, seed=seed),
    "passes": lambda encoder, source, _, seed: StreamLoader(encoder, source, 100, shuffle=True, seed=seed, memory_mb=0.2),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", range(10))
def test_sorted_labels_are_mixed_like_a_full_shuffle(seed: int, way: str, label_sorted: tuple[Encoder, Source, Split]) -> None:
    n, positives, size = 20_100, 6_030, 100
    found = []
    seen = []
    for batch in WAYS[way](*label_sorted, seed):
        assert batch.labels is not None
        found.append(int(batch.labels.sum()))
        seen += ids(batch)
    assert sorted(seen) == list(range(n))
    # positives of a batch of a full shuffle are hypergeometric: mean 30, variance 21 · (n − size)/(n − 1)
    share = positives / n
    variance = size * share * (1 - share) * (n - size) / (n - 1)
    statistic = sum((k - size * share) ** 2 for k in found) / variance
    # 201 batches of a fixed total: 200 degrees of freedom. Both tails: neither clumps of equal labels nor batches all alike.
    assert 0.01 < chi_square_p(statistic, 200) < 0.99
    # neighbours on disk do not stay near: mean distance of two random places is n/3
    places = np.empty(n)
    places[seen] = np.arange(n)
    assert abs(np.abs(np.diff(places)).mean() - n / 3) < 4 * n / 18**0.5 / n**0.5


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("shuffle", "memory_mb"), [(False, ALL), (True, ALL), (True, SOME)])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("price", math.inf, "column 'price', .*2.parquet, row 106: "),
        ("y", 2, "column 'y', .*2.parquet, row 106: the label is 2; expected 0 or 1"),
        ("w", -1.0, "column 'w', .*2.parquet, row 106: the row weight is -1.0"),
    ],
)
def test_what_cannot_be_encoded_is_named_with_file_column_and_row(
    column: str,
    value: float,
    message: str,
    shuffle: bool,
    memory_mb: float | None,
    workers: int,
    folder: Path,
    encoder: Encoder,
    tmp_path: Path,
) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    data = pq.read_table(tmp_path / "2.parquet")
    cells = data[column].to_pylist()
    cells[105] = value
    pq.write_table(data.set_column(data.column_names.index(column), column, pa.array(cells)), tmp_path / "2.parquet")
    before = set(threading.enumerate())
    with pytest.raises(DataError, match=message):
        list(StreamLoader(encoder, str(tmp_path), 10, shuffle=shuffle, workers=workers, memory_mb=memory_mb))
    assert set(threading.enumerate()) == before


def test_what_a_stream_cannot_start_from(encoder: Encoder) -> None:
    with pytest.raises(DataError, match=r"the table has no rows; expected at least one"):
        StreamLoader(encoder, table().slice(0, 0), 10)
    with pytest.raises(DataError, match=r"no column 'price', which the model reads"):
        StreamLoader(encoder, table().drop_columns("price"), 10, shuffle=True)
    with pytest.raises(DataError, match=r"no column 'buy', which the schema names as label"):
        next(iter(StreamLoader(encoder, table().drop_columns("buy"), 10)))
    with pytest.raises(DataError, match="batch_size is 0"):
        StreamLoader(encoder, table(), 0)


def slow_down(monkeypatch: pytest.MonkeyPatch) -> list[Encoded]:
    """Let encoding all rows take 10 seconds: 200 blocks. Returns those encoded so far, 20 of them for every second."""
    encode, encoded = Encoder.encode, list[Encoded]()

    def slowly(self: Encoder, source: Source, *, block_rows: int) -> Iterator[Encoded]:
        for block in encode(self, source, block_rows=min(block_rows, 2)):
            time.sleep(0.05)
            encoded.append(block)
            yield block

    monkeypatch.setattr(Encoder, "encode", slowly)
    return encoded


@pytest.mark.parametrize("shuffle", [False, True])
def test_leaving_a_stream_waits_for_no_window_and_leaves_no_thread(
    shuffle: bool, folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader, "BLOCK_ROWS", 10)
    before = set(threading.enumerate())
    stream = StreamLoader(encoder, str(folder), 20, shuffle=shuffle, memory_mb=0.01 if shuffle else None)
    encoded = slow_down(monkeypatch)
    iterator = iter(stream)
    next(iterator)
    assert set(threading.enumerate()) > before
    so_far = len(encoded)
    del iterator
    gc.collect()
    assert len(encoded) - so_far < 20  # what a second is enough for, on a busy machine too
    assert set(threading.enumerate()) == before


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("waits_end", [False, True])
def test_ctrl_c_while_a_window_is_read(
    waits_end: bool, folder: Path, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a signal doesn't end a system call that waits, as after any query of Polars."""
    signal.siginterrupt(signal.SIGINT, waits_end)
    before = set(threading.enumerate())
    stream = StreamLoader(encoder, str(folder), 10, shuffle=True)
    slow_down(monkeypatch)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.3, signal.pthread_kill, (main, signal.SIGINT))
    start = time.perf_counter()
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert time.perf_counter() - start < 5
    timer.join()
    assert set(threading.enumerate()) == before
    monkeypatch.undo()
    assert len(list(stream)) == len(stream)  # and it can be used again


def test_long_sequences_count_in_the_budget(folder: Path, encoder: Encoder) -> None:
    """A window holds about as many bytes as it may, although the first rows have empty lists."""
    n = 20_000
    lists: list[list[str]] = [[]] * (n // 2) + [[f"t{i % 9}" for i in range(100)]] * (n // 2)
    data = pa.table({"bag": lists, "y": [0, 1] * (n // 2)})
    fitted = Encoder.fit(Schema(fields=(SequenceField(name="bag"),), labels=("y",)), data)
    stream = StreamLoader(fitted, data, 100, shuffle=True, memory_mb=2)
    values = 4 * 50 * n  # bytes of all ids
    assert values / 2**20 < stream.num_windows < 3 * values / 2**20


def test_the_budget_is_half_of_what_is_free(split: Split, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert 10 < memory.half_of_free_mb() < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**21
    info = tmp_path / "meminfo"
    monkeypatch.setattr(memory, "_MEMINFO", info)
    assert memory.half_of_free_mb() == 4096
    info.write_text("MemTotal:       16384 kB\nMemAvailable:      20 kB\n")
    assert memory.half_of_free_mb() == 10 / 1024
    sweeps: list[int] = []
    join = loader._join

    def counted(pieces: Any, num_rows: int, stop: threading.Event) -> Split:
        sweeps.append(num_rows)
        return join(pieces, num_rows, stop)

    monkeypatch.setattr(loader, "_join", counted)
    list(Loader(split, 10, shuffle=True))
    info.write_text("MemAvailable:      2000 kB\n")
    list(Loader(split, 10, shuffle=True))
    assert sum(sweeps) == N  # the first in windows, the second at once
    # ids, numbers, labels, weight, group, offsets and two lists of 2.3 and 1.8 values on average; at least that
    assert max(sweeps) * (4 * 4 + 4 + 8 + 4 + 8 + 2 * 8 + 4 * 4) <= 10 * 1024 / 2


def test_one_permutation_whatever_the_width_of_its_numbers(split: Split) -> None:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(7 * 1_000_003 + 4))
    plain = Loader(split, 50, shuffle=True, seed=7)
    plain.epoch = 4
    assert [row for batch in plain for row in ids(batch)] == order.tolist()


def same_run(streamed: Path, stored: Path) -> None:
    """Metrics to the last digit, and the same artifact."""
    reports = [json.loads((run / "metrics.json").read_text()) for run in (streamed, stored)]
    for report in reports:
        for clock in ("seconds", "rows_per_second", "peak_rss_mb"):
            del report[clock]
    assert reports[0] == reports[1]
    files = [{f.relative_to(run): f.read_bytes() for f in (run / "artifact").rglob("*.*")} for run in (streamed, stored)]
    assert files[0] == files[1]
    assert len(files[0]) > 5
    assert sorted(f.name for f in streamed.iterdir()) == ["artifact", "config.json", "history.jsonl", "metrics.json"]


def test_a_streamed_run_is_the_run_with_a_store(tmp_path: Path) -> None:
    data = write(tmp_path / "data")
    given = DataOptions(
        schema=data / "schema.json", valid=data / "valid.parquet", test=data / "test.parquet", group="user", weight="w"
    )
    cut = DataOptions(label=("label", "buy"), time="day", shares={"train": 0.6, "valid": 0.2, "test": 0.2})
    for name, options in (("given", given), ("cut", cut)):
        for stream in (False, True):
            out = tmp_path / f"{name}-{stream}"
            train(data / "train.parquet", tiny(workers=str(int(stream))), out, replace(options, stream=stream), seed=3)
        same_run(tmp_path / f"{name}-True", tmp_path / f"{name}-False")


def test_the_command_line_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data")
    given = ["--schema", data / "schema.json", "--valid", data / "valid.parquet", "--test", data / "test.parquet"]
    settings = [word for path, value in TINY.items() for word in ("--set", f"{path}={value}")]
    monkeypatch.setattr(Store, "create", None)

    def call(*words: object) -> tuple[object, str]:
        monkeypatch.setattr(sys, "argv", ["ctrlib", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return ended.value.code, capsys.readouterr().err

    code, _ = call("train", data / "train.parquet", "--model", "dnn", "--out", tmp_path / "run", *given, *settings, "--stream")
    assert code == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["rows"] == {"train": 2000, "valid": 400, "test": 401}
    monkeypatch.undo()
    prepare(data / "train.parquet", tmp_path / "store", DataOptions(schema=data / "schema.json", valid=data / "valid.parquet"))
    code, error = call("train", tmp_path / "store", "--model", "dnn", "--out", tmp_path / "other", "--stream")
    assert code == 2
    assert f"{tmp_path / 'store'} is a store, encoded already; leave stream out" in error
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("split", ["valid", "test"])
def test_bad_rows_come_out_before_training(split: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write(tmp_path / "data")
    file = data / f"{split}.parquet"
    rows = pq.read_table(file)
    labels = [0] * (len(rows) - 1) + [7]
    pq.write_table(rows.set_column(rows.column_names.index("label"), "label", pa.array(labels)), file)
    options = DataOptions(schema=data / "schema.json", valid=data / "valid.parquet", test=data / "test.parquet", stream=True)
    monkeypatch.setattr(experiment, "fit", None)
    with pytest.raises(DataError, match=rf"column 'label', .*{split}.parquet, row {len(rows)}: the label is 7"):
        train(data / "train.parquet", tiny(), tmp_path / "run", options)
    assert not (tmp_path / "run").exists()
