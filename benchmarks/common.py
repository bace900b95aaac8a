"""What every benchmark shares: variants timed in turn within one run, medians, ratios, and a JSON file of the result."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

FIELDS, BATCH, DIM, BATCHES = 39, 4096, 16, 8
# vocabularies of Criteo's 26 categorical columns, in the sample's proportions
CRITEO = (1460, 583, 1_500_000, 600_000, 305, 24, 12_517, 633, 3, 93_145, 5683, 1_200_000, 3194, 27, 14_992, 900_000, 10, 5652,
          2173, 4, 1_000_000, 18, 15, 280_000, 105, 142_000)  # fmt: skip

RESULTS = Path(__file__).parent / "results"


def vocabularies(rows: int) -> list[int]:
    """Sizes of 39 fields, about ``rows`` in all: 13 binned counts of 64, the others in Criteo's proportions, at least 4."""
    small = [64] * (FIELDS - len(CRITEO))
    share = (rows - sum(small)) / sum(CRITEO)
    return [*small, *(max(4, int(size * share)) for size in CRITEO)]


def zipf_ids(sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """[BATCHES, BATCH, fields] ids from 0 within each field: Zipf(1.05), frequent ones anywhere in the field's range."""
    rng = np.random.default_rng(0)
    columns = []
    for size in sizes:
        cumulative = np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -1.05)
        rank = np.searchsorted(cumulative, rng.random((BATCHES, BATCH)) * cumulative[-1])
        columns.append(rng.permutation(size)[rank])
    return np.stack(columns, axis=2)


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 2, inner: int = 1
) -> dict[str, list[float]]:
    """Wall seconds of every variant, ``repeats`` times each, run in turn so that all of them see the same machine.

    With ``inner``, a turn is so many calls in a row after one that is not counted, and a sample their mean: what a variant
    costs when it is repeated, rather than right after another one has emptied the caches.
    """
    for _ in range(warmup):
        for variant in variants.values():
            variant()
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            if inner > 1:
                variant()
            start = time.perf_counter()
            for _ in range(inner):
                variant()
            seconds[name].append((time.perf_counter() - start) / inner)
    return seconds


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The median of every variant."""
    return {name: statistics.median(samples) for name, samples in seconds.items()}


def print_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Rows as a Markdown table, ready for ``benchmarks/README.md``."""
    print("| " + " | ".join(header) + " |")
    print("|" + "---|" * len(header))
    for row in rows:
        print("| " + " | ".join(f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in row) + " |")


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")), cpu
        )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "date": time.strftime("%Y-%m-%d"),
    }


def write_result(name: str, result: Mapping[str, Any]) -> Path:
    """Write ``benchmarks/results/<name>.json`` with the machine beside the result."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"machine": machine(), **result}, indent=1) + "\n", encoding="utf-8")
    part.replace(path)
    return path
