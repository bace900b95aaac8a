"""The embedding part of a training step, forward, backward and update: ``python -m benchmarks.embedding``.

39 fields with vocabularies in Criteo's proportions, batch 4096, width 16, ids from Zipf(1.05). FBGEMM takes part if it is
installed (``pip install fbgemm-gpu-cpu==1.8.0`` beside torch 2.13).

Two processes take turns, three rounds of each: torch and FBGEMM as they come, and ctrlib after ``tune_cpu()``, as its command
line runs it. Dense optimizers gain from the tuned allocator too, so they are also timed there.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.common import (
    BATCH,
    BATCHES,
    DIM,
    FIELDS,
    interleaved,
    medians,
    print_table,
    vocabularies,
    write_result,
    zipf_ids,
)
from ctrlib import _native
from ctrlib.cpu import tune_cpu
from ctrlib.optim import EmbeddingOptimizerName, OptimizerConfig, build_optimizer
from ctrlib.table import EmbeddingTable

RULES: tuple[EmbeddingOptimizerName, ...] = ("sgd", "rowwise_adagrad", "adagrad", "lazy_adam", "rowwise_adam", "adam")

Step = Callable[[], None]


def zipf_batches(sizes: list[int]) -> list[Tensor]:
    """[BATCH, FIELDS] int32 rows of one table in which every field has a stretch, after a row for padding."""
    first = 1 + np.cumsum([0, *sizes[:-1]])
    return list(torch.from_numpy((zipf_ids(sizes) + first).astype(np.int32)))


@contextmanager
def _without_kernel() -> Iterator[None]:
    original = _native.kernel
    _native.kernel = lambda: None  # type: ignore[assignment]
    try:
        yield
    finally:
        _native.kernel = original


def ours(rule: EmbeddingOptimizerName, rows: int, batches: list[Tensor], grad: Tensor, kernel: bool) -> Step:
    """One step of ctrlib's path, with the kernel or in torch operations."""
    table = EmbeddingTable(1 + sum(vocabularies(rows)), DIM)
    config = OptimizerConfig(embedding=rule, max_grad_norm=None)
    at = iter(range(10**9))
    if not kernel:
        with _without_kernel():
            optimizer = build_optimizer(table, config)
    else:
        optimizer = build_optimizer(table, config)

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(table(batches[next(at) % BATCHES]), grad)
        optimizer.step()

    def step_without() -> None:
        with _without_kernel():
            step()

    return step if kernel else step_without


def torchs(kind: str, rows: int, batches: list[Tensor], grad: Tensor) -> Step:
    """One step of an ``nn.Embedding`` under a torch optimizer."""
    table = nn.Embedding(1 + sum(vocabularies(rows)), DIM, sparse=kind.startswith("sparse"))
    kinds: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "dense Adam (torch's default)": lambda: torch.optim.Adam(table.parameters()),
        "dense Adam, fused": lambda: torch.optim.Adam(table.parameters(), fused=True),
        "sparse, SparseAdam": lambda: torch.optim.SparseAdam(list(table.parameters())),
        "sparse, Adagrad": lambda: torch.optim.Adagrad(table.parameters()),
    }
    optimizer, at = kinds[kind](), iter(range(10**9))

    def step() -> None:
        optimizer.zero_grad()
        torch.autograd.backward(table(batches[next(at) % BATCHES]), grad)
        optimizer.step()

    return step


def fbgemm(rows: int, batches: list[Tensor], grad: Tensor) -> Step:
    """One step of FBGEMM's CPU kernel: row-wise Adagrad, one id a bag (its fastest form for single-valued fields)."""
    from fbgemm_gpu.split_embedding_configs import EmbOptimType  # type: ignore[import-not-found,unused-ignore]
    from fbgemm_gpu.split_table_batched_embeddings_ops_common import (  # type: ignore[import-not-found,unused-ignore]
        EmbeddingLocation,
        PoolingMode,
    )
    from fbgemm_gpu.split_table_batched_embeddings_ops_training import (  # type: ignore[import-not-found,unused-ignore]
        ComputeDevice,
        SplitTableBatchedEmbeddingBagsCodegen,
    )

    sizes = vocabularies(rows)
    module: Any = SplitTableBatchedEmbeddingBagsCodegen(
        [(size, DIM, EmbeddingLocation.HOST, ComputeDevice.CPU) for size in sizes],
        optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
        learning_rate=0.01,
        pooling_mode=PoolingMode.SUM,
    )
    offsets = torch.arange(BATCH * FIELDS + 1)
    first = 1 + torch.tensor([0, *sizes]).cumsum(0)[:-1]
    local = [(ids.long() - first).T.reshape(-1).contiguous() for ids in batches]
    flat, at = grad.reshape(BATCH, FIELDS * DIM), iter(range(10**9))

    def step() -> None:
        torch.autograd.backward(module(local[next(at) % BATCHES], offsets), flat)

    return step


DENSE = ("dense Adam (torch's default)", "dense Adam, fused")
SPARSE = ("sparse, SparseAdam", "sparse, Adagrad")
ROUNDS = 3


def worker(group: str, rows: int, repeats: int) -> dict[str, list[float]]:
    """Seconds of the variants of one group, in this process."""
    batches, grad = zipf_batches(vocabularies(rows)), torch.randn(BATCH, FIELDS, DIM) * 1e-4
    variants: dict[str, Step] = {}
    if group == "torch":
        if importlib.util.find_spec("fbgemm_gpu") is not None:
            variants["FBGEMM, row-wise Adagrad"] = fbgemm(rows, batches, grad)
        for kind in (*DENSE, *SPARSE):
            variants[kind] = torchs(kind, rows, batches, grad)
    else:
        tune_cpu()
        for rule in RULES:
            if _native.kernel() is not None:
                variants[f"ctrlib kernel, {rule}"] = ours(rule, rows, batches, grad, True)
            variants[f"ctrlib torch, {rule}"] = ours(rule, rows, batches, grad, False)
        for kind in DENSE:
            variants[f"{kind}, tuned allocator"] = torchs(kind, rows, batches, grad)
    return interleaved(variants, repeats=repeats, inner=4)


def compare(rows: int, repeats: int) -> dict[str, Any]:
    """All variants on one size of table, in processes that take turns."""
    samples: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for group in ("torch", "ctrlib"):
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.embedding", "--worker", group]
            command += ["--rows", str(rows), "--repeats", str(repeats)]
            out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            for name, seconds in json.loads(out.splitlines()[-1]).items():
                samples.setdefault(name, []).extend(seconds)
    found = medians(samples)
    base = found[DENSE[0]]
    print(f"\n{rows:,} rows × {DIM}, medians of {ROUNDS * repeats}:\n")
    print_table(["variant", "ms", "times faster than dense Adam"], [[n, s * 1e3, base / s] for n, s in found.items()])
    return {"rows": rows, "ms": {n: s * 1e3 for n, s in found.items()}, "faster": {n: base / s for n, s in found.items()}}


def sweep(sizes: list[int], rules: tuple[EmbeddingOptimizerName, ...], repeats: int) -> list[dict[str, Any]]:
    """Cost per distinct row against the number of rows; tables of all sizes take turns (those of Adam need 13 GB together)."""
    lines: list[dict[str, Any]] = []
    batches, grad = {rows: zipf_batches(vocabularies(rows)) for rows in sizes}, torch.randn(BATCH, FIELDS, DIM) * 1e-4
    distinct = {rows: float(np.mean([len(torch.unique(ids)) for ids in batches[rows]])) for rows in sizes}
    for rule in rules:
        steps = {f"{rows}": ours(rule, rows, batches[rows], grad, _native.kernel() is not None) for rows in sizes}
        found = medians(interleaved(steps, repeats=repeats, warmup=BATCHES, inner=4))
        del steps
        gc.collect()  # the next rule's state may not fit beside this one's
        for rows in sizes:
            seconds = found[f"{rows}"]
            lines.append(
                {
                    "rule": rule,
                    "rows": rows,
                    "distinct": round(distinct[rows]),
                    "ms": seconds * 1e3,
                    "ns a distinct row": seconds / distinct[rows] * 1e9,
                    "ns a look-up": seconds / (BATCH * FIELDS) * 1e9,
                }
            )
    print("\nBy number of rows:\n")
    print_table(list(lines[0]), [list(line.values()) for line in lines])
    return lines


def main() -> None:
    """Print the tables and write ``results/embedding.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--sizes", type=int, nargs="*", default=[100_000, 1_000_000, 10_000_000, 50_000_000])
    parser.add_argument("--worker", choices=("torch", "ctrlib"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(worker(arguments.worker, arguments.rows, arguments.repeats)))
        return
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # of the processes to come
    result = {"compare": compare(arguments.rows, arguments.repeats)}
    tune_cpu()
    write_result(
        "embedding",
        {**result, "sweep": sweep(arguments.sizes, ("rowwise_adagrad", "lazy_adam", "adam"), 2 * arguments.repeats)},
    )


if __name__ == "__main__":
    main()
