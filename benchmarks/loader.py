"""Rows a second of every way to get shuffled batches of 39 ids and 13 numbers: ``python -m benchmarks.loader``.

Raw rows, their store and everything else lie in a temporary folder (about 0.4 GB per million rows), which goes at the end.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.common import interleaved, medians, print_table, write_result
from ctrlib.cpu import tune_cpu
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader, StreamLoader
from ctrlib.data.source import open_source
from ctrlib.data.store import Split, Store
from ctrlib.schema import DenseField, Schema, SequenceField, SparseField

FIELDS, NUMBERS, BATCH, COLLATED = 39, 13, 4096, 10  # COLLATED: batches of an epoch of torch's own loader
LIST_ROWS, LIST_LENGTH = 200_000, 50
REFERENCE = "Loader, 1 worker"


def write_rows(path: Path, rows: int) -> Schema:
    """A Parquet file of ids of 10,000 values a field, numbers with gaps, and a label."""
    rng = np.random.default_rng(0)
    names = [f"c{i}" for i in range(FIELDS)], [f"n{i}" for i in range(NUMBERS)]
    writer = None
    for start in range(0, rows, 1 << 18):
        count = min(1 << 18, rows - start)
        columns: dict[str, object] = {name: (rng.random(count) ** 3 * 10_000).astype(np.int64) for name in names[0]}
        for name in names[1]:
            columns[name] = pa.array(rng.integers(0, 1000, count).astype(np.float64), mask=rng.random(count) < 0.1)
        columns["label"] = rng.integers(0, 2, count)
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table)
    assert writer is not None
    writer.close()
    numbers = tuple(DenseField(name=n, encoding="standardize") for n in names[1])
    return Schema(fields=tuple(SparseField(name=n) for n in names[0]) + numbers, labels=("label",))


def write_lists(folder: Path) -> Split:
    """Rows with one list of 0 to 100 ids."""
    rng = np.random.default_rng(0)
    offsets = np.append(0, np.cumsum(rng.integers(0, 2 * LIST_LENGTH + 1, LIST_ROWS)))
    data = pa.table(
        {
            "list": pa.LargeListArray.from_arrays(offsets, rng.integers(0, 10_000, offsets[-1])),
            "label": rng.integers(0, 2, LIST_ROWS),
        }
    )
    encoder = Encoder.fit(Schema(fields=(SequenceField(name="list"),), labels=("label",)), data)
    return Store.create(folder / "lists", encoder, {"train": open_source(data)}).split("train")


def drain(batches: Iterable[object]) -> None:
    """Take every batch."""
    for _ in batches:
        pass


def copy(split: Split) -> None:
    """The rows in file order, batch by batch, on this thread."""
    for start in range(0, split.num_rows, BATCH):
        for column in (split.sparse, split.dense, split.labels):
            column[start : start + BATCH].clone()


def main() -> None:
    """Print rows a second, the ratio to the Loader and milliseconds a batch; write ``results/loader.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    tune_cpu()
    with tempfile.TemporaryDirectory(prefix="ctrlib-loader-") as temporary:
        folder = Path(temporary)
        schema = write_rows(folder / "rows.parquet", args.rows)
        source = open_source(str(folder / "rows.parquet"))
        encoder = Encoder.fit(schema, source)
        split = Store.create(folder / "store", encoder, {"train": source}).split("train")
        lists = write_lists(folder)
        store_mb = sum(c.numel() * c.element_size() for c in (split.sparse, split.dense, split.labels)) / 2**20
        # a window is half of the memory given: about five windows an epoch
        loader = partial(Loader, split, BATCH, shuffle=True)
        stream = partial(StreamLoader, encoder, source, BATCH, shuffle=True)
        windows, passes, kept = loader(memory_mb=store_mb / 2.5), stream(memory_mb=store_mb / 2.5), stream()
        few = (column[: BATCH * COLLATED] for column in (split.sparse, split.dense, split.labels))
        default = DataLoader(TensorDataset(*few), BATCH, shuffle=True)
        variants: dict[str, tuple[int, Callable[[], object]]] = {
            "copy in file order": (args.rows, partial(copy, split)),
            REFERENCE: (args.rows, partial(drain, loader())),
            "Loader, no worker": (args.rows, partial(drain, loader(workers=0))),
            "Loader in windows": (args.rows, partial(drain, windows)),
            "StreamLoader, first epoch": (args.rows, lambda: drain(stream())),
            "StreamLoader, later epochs": (args.rows, partial(drain, kept)),
            f"StreamLoader, {passes.num_windows} passes an epoch": (args.rows, partial(drain, passes)),
            "torch DataLoader, default collate": (BATCH * COLLATED, partial(drain, default)),
            f"Loader, one list of {LIST_LENGTH} ids on average": (
                LIST_ROWS,
                partial(drain, Loader(lists, BATCH, shuffle=True)),
            ),
        }
        seconds = medians(interleaved({n: run for n, (_, run) in variants.items()}, repeats=args.repeats, warmup=1))
    speed = {name: rows / seconds[name] for name, (rows, _) in variants.items()}
    ratios = {name: speed[name] / speed[REFERENCE] for name in variants}
    print_table(
        ("shuffled batches", "M rows/s", "ratio to the Loader", "ms a batch"),
        [(name, speed[name] / 1e6, ratios[name], BATCH / speed[name] * 1e3) for name in variants],
    )
    path = write_result(
        "loader",
        {
            "what": f"batches of {BATCH} rows of {FIELDS} ids, {NUMBERS} numbers, a label; medians of {args.repeats} epochs",
            "rows": args.rows,
            "threads": torch.get_num_threads(),
            "rows_per_second": speed,
            "ratio_to_the_loader": ratios,
            "milliseconds_a_batch": {name: BATCH / speed[name] * 1e3 for name in variants},
        },
    )
    print(f"written to {path}")


if __name__ == "__main__":
    main()
