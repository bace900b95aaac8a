"""What adding each field's offset to its ids costs inside the step, beside the lookup: ``python -m benchmarks.offsets``."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

FIELDS, ROWS, DIM, BATCH, REPEATS = 39, 2_000_000, 16, 4096, 200


def _median_ms(*variants: Callable[[], object]) -> list[float]:
    """Medians, in CPU milliseconds of one thread, of variants that are run in turn."""
    times: list[list[float]] = [[] for _ in variants]
    for _ in range(REPEATS):
        for samples, variant in zip(times, variants, strict=True):
            start = time.process_time()
            variant()
            samples.append((time.process_time() - start) * 1e3)
    return [statistics.median(samples) for samples in times]


def main() -> None:
    """Print both times and their ratio."""
    torch.set_num_threads(1)
    size = ROWS // FIELDS
    table = torch.randn(size * FIELDS, DIM)
    local = torch.randint(1, size, (BATCH, FIELDS), dtype=torch.int32)
    offsets = torch.arange(FIELDS, dtype=torch.int32) * size
    rows = local + offsets

    def added() -> torch.Tensor:
        return F.embedding((local + offsets) * (local > 0), table)

    with torch.no_grad():
        plain, with_offsets = _median_ms(lambda: F.embedding(rows, table), added)
    print(f"lookup of global ids {plain:.3f} ms; of local ids {with_offsets:.3f} ms; difference {with_offsets - plain:.3f} ms")


if __name__ == "__main__":
    main()
