"""Raw rows → encoded store, beside the same passes in Polars' streaming engine: ``python -m benchmarks.prepare``.

The rows are synthetic and Criteo-shaped: 13 integers with gaps, 26 hexadecimal strings with up to 1.5 million values,
Zipf-distributed. Every measurement runs in a process of its own, in turn, so that peaks are apart. ``ctrlib`` runs under
``RLIMIT_DATA`` (``ulimit -d``), which counts all private writable memory, touched or not, and so is stricter than a limit of
resident memory; the page cache, which the system takes back at will, does not count. Polars runs without a limit.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import medians, print_table, write_result

SIZES = [1460, 583, 1_500_000, 600_000, 305, 24, 12_517, 633, 3, 93_145, 5683, 1_200_000, 3194]
SIZES += [27, 14_992, 900_000, 10, 5652, 2173, 4, 1_000_000, 18, 15, 280_000, 105, 142_000]
GAPS = [0, 0.45, 0, 0.2, 0.03, 0.22, 0.04, 0, 0.04, 0.45, 0.04, 0.77, 0.2]
NUMBERS = [f"I{i + 1}" for i in range(len(GAPS))]
TEXTS = [f"C{i + 1}" for i in range(len(SIZES))]
MIN_COUNT = 2
LIMIT = 2 << 30  # bytes
ROW_GROUP = 500_000
DOUBLE = "ctrlib prepare, twice the rows"
COMPARED = 200_000  # rows whose ids are compared


def generate(path: Path, rows: int, seed: int) -> None:
    """Write rows to a Parquet file, a row group at a time; the values are the same for every seed, their draws are not."""
    fixed, random = np.random.default_rng(0), np.random.default_rng([1, seed])
    values = [pa.array([f"{x:08x}" for x in fixed.integers(0, 2**32, size).tolist()]) for size in SIZES]
    cumulative = [np.cumsum(np.arange(1.0, size + 1) ** -1.05) for size in SIZES]
    writer: Any = None
    for start in range(0, rows, ROW_GROUP):
        n = min(ROW_GROUP, rows - start)
        columns: dict[str, Any] = {"label": pa.array((random.random(n) < 0.25).astype(np.int8))}
        for i, name in enumerate(NUMBERS):
            numbers = np.floor(random.lognormal(1 + i % 5, 1.5, n)).astype(np.int32) - 1
            columns[name] = pa.array(numbers, mask=random.random(n) < GAPS[i])
        for name, texts, weights in zip(TEXTS, values, cumulative, strict=True):
            ranks = np.searchsorted(weights, random.random(n) * weights[-1]).astype(np.int32)
            ids = pa.array(ranks, mask=random.random(n) < (0.03 if len(texts) > 1000 else 0))
            columns[name] = pa.DictionaryArray.from_arrays(ids, texts).cast(pa.string())
        table = pa.table(columns)
        writer = writer or pq.ParquetWriter(path, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=ROW_GROUP)
    writer.close()


# ---------------------------------------------------------------------------------- what is measured, each in its process


def _schema() -> Any:
    from ctrlib.schema import DenseField, Schema, SparseField

    numbers = [DenseField(name=n, encoding="criteo_log", min_count=MIN_COUNT) for n in NUMBERS]
    return Schema(fields=(*numbers, *(SparseField(name=n, min_count=MIN_COUNT) for n in TEXTS)), labels=("label",))


def ctrlib_passes(data: str, out: Path) -> Callable[[], None]:
    """Fit and encode all rows: what the Polars variants do, and checksums."""
    from ctrlib.cpu import tune_cpu
    from ctrlib.data.encoder import Encoder
    from ctrlib.data.source import open_source
    from ctrlib.data.store import Store

    tune_cpu()  # as the command does

    def job() -> None:
        source = open_source(data)
        Store.create(out, Encoder.fit(_schema(), source), {"train": source})

    return job


def ctrlib_prepare(data: str, out: Path) -> Callable[[], None]:
    """``ctrlib prepare`` with its random split."""
    from ctrlib.cpu import tune_cpu
    from ctrlib.experiment import DataOptions, prepare

    tune_cpu()
    return lambda: print(prepare(data, out, DataOptions(schema=_schema(), split="random")).rows, file=sys.stderr)


def polars_passes(data: str, out: Path, together: bool) -> Callable[[], None]:
    """Fit (all columns' counts in one query, or each in its own) and encode, streaming; ids as ctrlib gives them.

    Casts to an ``Enum`` are lookups that stream: the memory of ``replace_strict`` grows with the rows.
    """
    import polars as pl

    def lookup(name: str, values: pl.Series) -> pl.Expr:
        nulls = values.is_null().arg_max() if values.null_count() else None
        id_ = pl.col(name).cast(pl.String).cast(pl.Enum(values.drop_nulls().cast(pl.String)), strict=False).to_physical() + 2
        if nulls is None:
            return id_.cast(pl.Int32).fill_null(1).alias(name)
        of_null = pl.lit(nulls + 2, pl.Int32)  # values from there on stand one place later
        id_ = pl.when(id_ >= of_null).then(id_ + 1).otherwise(id_).cast(pl.Int32).fill_null(1)
        return pl.when(pl.col(name).is_null()).then(of_null).otherwise(id_).alias(name)

    def job() -> None:
        rows = pl.scan_parquet(data).with_columns(_criteo_log(name) for name in NUMBERS)
        encoded = [pl.col("label")]
        counts = [rows.group_by(pl.col(c).alias("v")).len().filter(pl.col("len") >= MIN_COUNT) for c in [*NUMBERS, *TEXTS]]
        found = pl.collect_all(counts, engine="streaming") if together else (q.collect(engine="streaming") for q in counts)
        for name, table in zip([*NUMBERS, *TEXTS], found, strict=True):
            values = table.sort(["len", "v"], descending=[True, False], nulls_last=True)["v"]
            encoded.append(lookup(name, values))
        rows.select(encoded).sink_parquet(out, engine="streaming", compression="lz4")

    return job


def _criteo_log(name: str) -> Any:
    import polars as pl

    x = pl.col(name).cast(pl.Float64)
    return pl.when(x > 2).then(x.log() ** 2).otherwise(x).floor().cast(pl.Int32).alias(name)


VARIANTS: dict[str, Callable[[str, Path], Callable[[], None]]] = {
    "ctrlib": ctrlib_passes,
    "ctrlib prepare": ctrlib_prepare,
    "polars, all counts in one query": lambda data, out: polars_passes(data, out, True),
    "polars, a query for each column": lambda data, out: polars_passes(data, out, False),
}


def _status() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
    return {words[0][:-1]: int(words[1]) for words in lines if words[0] in ("VmHWM:", "RssAnon:")}


def child(variant: str, data: str, out: Path) -> None:
    """Measure one variant in this process and print seconds and peaks (MiB: resident; of it, not backed by files) as JSON."""
    if variant.startswith("ctrlib"):
        resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))
    job = VARIANTS[variant](data, out)
    done, anonymous = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.02):
            anonymous[0] = max(anonymous[0], _status()["RssAnon"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    start, start_cpu = time.perf_counter(), time.process_time()
    try:
        job()
    finally:
        done.set()
        watcher.join()
    times = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - start_cpu}
    print(json.dumps({**times, "peak_mb": _status()["VmHWM"] / 1024, "peak_anonymous_mb": anonymous[0] / 1024}))


def measure(variant: str, data: str, out: Path) -> dict[str, float]:
    """Run a variant in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.prepare", "--child", variant, data, str(out)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{variant} failed ({run.returncode}):\n{run.stderr[-2000:]}")
    result: dict[str, float] = json.loads(run.stdout.splitlines()[-1])
    print(f"{variant}: {result}", file=sys.stderr)
    return result


def differing_ids(store: Path, parquet: Path) -> int:
    """How many ids of the first and last rows differ between a store of ctrlib and a file of Polars."""
    rows = pq.ParquetFile(parquet).metadata.num_rows
    ours = np.memmap(store / "train" / "sparse.bin", np.int32, "r").reshape(rows, -1)
    theirs = pq.read_table(parquet, columns=[*NUMBERS, *TEXTS], memory_map=True)
    wrong = 0
    for start in (0, max(rows - COMPARED, 0)):
        block = theirs.slice(start, COMPARED)
        for i, column in enumerate(block.columns):
            wrong += int((ours[start : start + COMPARED, i] != column.to_numpy()).sum())
    return wrong


def main(rows: int, repeats: int, polars: bool, folder: str | None) -> None:
    """Print a Markdown table and write ``results/prepare.json``."""
    variants = [name for name in VARIANTS if polars or not name.startswith("polars")]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in variants}
    twice: list[dict[str, float]] = []
    wrong = 0
    with tempfile.TemporaryDirectory(prefix="prepare-", dir=folder) as scratch:
        data = Path(scratch) / "data"
        data.mkdir()
        generate(data / "0.parquet", rows, 0)
        for _ in range(repeats):
            for name in variants:
                out = Path(scratch) / name
                shutil.rmtree(out, ignore_errors=True)
                samples[name].append(measure(name, str(data / "0.parquet"), out))
                if name.startswith("polars"):
                    wrong += differing_ids(Path(scratch) / "ctrlib", out)
                    out.unlink()
        for name in variants:
            shutil.rmtree(Path(scratch) / name, ignore_errors=True)
        generate(data / "1.parquet", rows, 1)
        for i in range(repeats):
            twice.append(measure("ctrlib prepare", str(data), Path(scratch) / f"twice {i}"))
            shutil.rmtree(Path(scratch) / f"twice {i}")

    samples[DOUBLE] = twice
    kinds = ("seconds", "cpu_seconds", "peak_mb", "peak_anonymous_mb")
    found = {kind: medians({name: [s[kind] for s in runs] for name, runs in samples.items()}) for kind in kinds}

    def ratio(kind: str, name: str) -> str:
        best = min((value for other, value in found[kind].items() if other.startswith("polars")), default=0.0)
        return f"×{best / found[kind][name]:.2f}" if best and name != DOUBLE else "–"

    table = [
        [
            name,
            round(rows * (2 if name == DOUBLE else 1) / found["seconds"][name]),
            ratio("seconds", name),
            ratio("cpu_seconds", name),
            round(found["peak_mb"][name]),
            round(found["peak_anonymous_mb"][name]),
            "none" if name.startswith("polars") else f"{LIMIT / 2**30:g} GiB",
        ]
        for name in samples
    ]
    print_table(
        ["", "rows/s", "of the better Polars", "by CPU time", "peak MiB", "of it anonymous", "limit (RLIMIT_DATA)"], table
    )
    growth = found["peak_mb"][DOUBLE] / found["peak_mb"]["ctrlib prepare"]
    print(f"\n{rows:,} rows; peak of prepare with twice the rows: ×{growth:.3f}; ids that differ from those of Polars: {wrong}")
    write_result(
        "prepare",
        {
            "rows": rows,
            "limit_bytes": LIMIT,
            "medians": found,
            "samples": samples,
            "peak_growth_with_twice_the_rows": growth,
            "differing_ids": wrong,
        },
    )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2], sys.argv[3], Path(sys.argv[4]))
    else:
        parser = argparse.ArgumentParser(description=__doc__)
        parser.add_argument("--rows", type=int, default=10_000_000)
        parser.add_argument("--repeats", type=int, default=3)
        parser.add_argument("--polars", action=argparse.BooleanOptionalAction, default=True)
        parser.add_argument("--folder", help="where the temporary files go; about 500 bytes a row")
        options = parser.parse_args()
        main(options.rows, options.repeats, options.polars, options.folder)
