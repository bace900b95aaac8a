"""A whole training step of three models against the usual torch form: ``python -m benchmarks.train``.

39 fields in Criteo's proportions with 2 million rows × 16, batch 4096, Zipf(1.05) ids. The usual form: one ``nn.Embedding`` a
field, torch's Adam, L2 of the tables in the loss, clipping by norm, torch's own allocator and matrix products. ctrlib: ``fit``
with its default optimizer after ``tune_cpu()``. Processes take turns.

Each also times one matrix product (4096 × 624 × 400) as it is configured. From its rate and the floating-point operations of a
step follows how much of the step is matrix products: no library can be faster than those.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import BATCH, DIM, interleaved, print_table, vocabularies, write_result, zipf_ids
from benchmarks.models import Repeated, UsualModel, ctrlib_fit, ctrlib_model
from ctrlib.batch import Batch
from ctrlib.cpu import tune_cpu
from ctrlib.models.ctr import ModelComponent
from ctrlib.training import Precision, fit

SIZES = vocabularies(2_000_000)
MODELS = ("final_mlp", "dcnv2", "autoint")
VARIANTS = ("usual torch", "ctrlib fp32", "ctrlib bf16")


def data(sizes: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [batches, BATCH, fields] int32 from 2, and labels [batches, BATCH, 1]."""
    ids = torch.from_numpy((zipf_ids(sizes) + 2).astype(np.int32))
    return ids, (torch.rand(*ids.shape[:2], 1, generator=torch.Generator().manual_seed(0)) < 0.25).float()


def product_rate(dtype: torch.dtype) -> float:
    """Floating-point operations per second of a matrix product as torch is configured now."""
    a, b = torch.randn(BATCH, 624).to(dtype), torch.randn(624, 400).to(dtype)
    seconds = statistics.median(interleaved({"": lambda: a @ b}, repeats=10, inner=4)[""])
    return 2 * BATCH * 624 * 400 / seconds


def operations(model: ModelComponent, batch: Batch) -> int:
    """Floating-point operations in matrix products of one forward and backward pass."""
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(model(batch).logits.sum())
    return int(counter.get_total_flops())


def worker(variant: str, name: str, steps: int) -> dict[str, float]:
    """Rows per second, after a warm-up, and of ctrlib the share of matrix products."""
    ids, labels = data(SIZES)
    torch.manual_seed(0)
    if variant == "usual torch":
        model = UsualModel(name, SIZES, DIM)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        tables = list(model.tables.parameters())

        def step(i: int) -> None:
            optimizer.zero_grad()
            loss = F.binary_cross_entropy_with_logits(model(ids[i % len(ids)].long()), labels[i % len(ids), :, 0])
            loss = loss + 1e-5 / 2 * torch.stack([table.square().sum() for table in tables]).sum()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
            optimizer.step()

        for i in range(3):
            step(i)
        start = time.perf_counter()
        for i in range(steps):
            step(i)
        return {
            "rows_per_second": steps * BATCH / (time.perf_counter() - start),
            "products_per_second": product_rate(torch.float32),
        }
    tune_cpu()
    precision: Precision = "bf16" if variant.endswith("bf16") else "fp32"
    ours = ctrlib_model(name, SIZES, DIM)
    result = fit(ours, Repeated(ids, labels, steps), None, ctrlib_fit(2, precision))
    rate = float(result.history[-1]["rows_per_second"])  # of the second epoch: the first one is the warm-up
    products = product_rate(torch.bfloat16 if precision == "bf16" else torch.float32)
    share = operations(ours, next(iter(Repeated(ids, labels, 1)))) / products / (BATCH / rate)
    return {"rows_per_second": rate, "products_per_second": products, "share_of_products": share}


def main() -> None:
    """Print the table and write ``results/train.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        variant, name = arguments.worker
        print(json.dumps(worker(variant, name, arguments.steps)))
        return
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    results: list[dict[str, Any]] = []
    for name in MODELS:
        samples: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
        for _ in range(arguments.rounds):
            for variant in VARIANTS:
                command = [sys.executable, "-m", "benchmarks.train", "--steps", str(arguments.steps), "--worker", variant, name]
                out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                samples[variant].append(json.loads(out.splitlines()[-1]))
        usual = statistics.median(run["rows_per_second"] for run in samples[VARIANTS[0]])
        for variant, runs in samples.items():
            line: dict[str, Any] = {kind: statistics.median(run[kind] for run in runs) for kind in runs[0]}
            rate = line["rows_per_second"]
            results.append({"model": name, "variant": variant, **line, "ms": BATCH / rate * 1e3, "ratio": rate / usual})
            print(results[-1], flush=True)
    print_table(
        ["model", "variant", "rows/s", "ms a step", "ratio to usual torch"],
        [[r["model"], r["variant"], round(r["rows_per_second"]), r["ms"], r["ratio"]] for r in results],
    )
    cuda = (
        "a CUDA GPU is there, but this benchmark ran on the CPU" if torch.cuda.is_available() else "no CUDA GPU: not run there"
    )
    print(cuda)
    write_result("train", {"rounds": arguments.rounds, "results": results, "cuda": cuda})


if __name__ == "__main__":
    main()
