"""One context × N candidates: the ranker beside tiled rows in eager torch and ONNX Runtime: ``python -m benchmarks.ranking``.

39 fields of ids, half of them of the context, a table of 2 million rows × 16. Each side has a process of its own, as their
threads would spin in each other's way; they take turns, some calls each, on the same requests, encoded before the clock starts
(``encoding`` is timed by itself, from raw values). Tiled sides read a batch in which every candidate has the whole context;
making that batch is on their clock too. The first side is torch as it is installed, the others have ``ctrlib.tune_cpu()``.
``--memory`` also measures what each of three processes adds that serve the same artifact.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.common import print_table, vocabularies, write_result
from benchmarks.models import SETTINGS
from ctrlib import artifact
from ctrlib.config import override
from ctrlib.cpu import tune_cpu
from ctrlib.data.encoder import Encoder
from ctrlib.data.requests import Request
from ctrlib.data.vocabulary import Vocabulary
from ctrlib.export import export, load_export
from ctrlib.models.ctr import build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.ranking import Ranker
from ctrlib.schema import FIRST_VALUE_ID, Schema, SparseField

PRESETS = ("dnn", "dcnv2", "autoint", "final_mlp")
DIM = 16
EAGER, TUNED, RANKER, ONNX, ENCODE = (
    "eager torch, tiled",
    "eager torch, tuned, tiled",
    "ranker",
    "ONNX Runtime, tiled",
    "encoding",
)
CALLS = 24  # of a side before it is another one's turn
WARM = 4  # more, before the clock starts: they find the caches of another process
PAUSE = 0.05  # seconds between turns: threads of a side spin for a while after its last call

RawRequest = tuple[dict[str, object], list[dict[str, object]]]


def save(folder: Path, name: str, sizes: Sequence[int]) -> Path:
    """An artifact with vocabularies of whole numbers, and random weights; every other field is of the context."""
    fields = tuple(SparseField(name=f"f{i}", side="context" if i % 2 else "candidate") for i in range(len(sizes)))
    tables = {
        f.name: Vocabulary(pa.array(np.arange(size - FIRST_VALUE_ID)), np.ones(size - FIRST_VALUE_ID, np.int64))
        for f, size in zip(fields, sizes, strict=True)
    }
    encoder = Encoder(Schema(fields=fields, labels=("label",)), tables, {})
    torch.manual_seed(0)
    settings = {path: value.format(half=DIM // 2, more=DIM + 1) for path, value in SETTINGS[name].items()}
    config = override(preset(name), {"embedding.dim": str(DIM), **settings}, COMPONENTS)
    artifact.save(folder, encoder, build_model(config, encoder.layout).eval(), config)
    return folder


def raw_requests(sizes: Sequence[int], candidates: int, count: int) -> list[RawRequest]:
    """Raw values: frequent ones often, as in logs."""
    rng = np.random.default_rng(0)

    def row(places: range) -> dict[str, object]:
        return {f"f{i}": int(min(rng.zipf(1.2), sizes[i] - FIRST_VALUE_ID - 1)) for i in places}

    above, below = range(1, len(sizes), 2), range(0, len(sizes), 2)
    return [(row(above), [row(below) for _ in range(candidates)]) for _ in range(count)]


def side(name: str, folder: Path, threads: int, tuned: bool) -> tuple[Ranker, Callable[[Request], Any]]:
    """What scores a request, and the ranker that encodes it."""
    torch.set_num_threads(threads)
    if tuned:
        tune_cpu(threads)
    loaded = artifact.load(folder)
    ranker = Ranker(loaded, hoisting=name == RANKER)
    if name != ONNX:
        return ranker, ranker.probabilities
    program = load_export(folder.parent / "onnx")
    return ranker, lambda request: program.logits(request.batch())


def serve_side(pipe: Connection, name: str, folder: Path, threads: int, tuned: bool, raw: Sequence[RawRequest]) -> None:
    """A process of one side: answers a number of calls by their seconds, and 0 by the probabilities of every request."""
    ranker, score = side(name, folder, threads, tuned)
    requests = [ranker.encoder.encode(*request) for request in raw]
    encoding = itertools.cycle(raw)
    turn = itertools.cycle(requests)
    for request in requests:
        score(request)
    pipe.send(ranker.hoisted_share)
    while (calls := pipe.recv()) is not None:
        if not calls:
            pipe.send([np.asarray(score(request)) for request in requests])
            continue
        call: Callable[[], object] = lambda: score(next(turn))  # noqa: E731
        if name == ENCODE:
            call = lambda: ranker.encoder.encode(*next(encoding))  # noqa: E731
        seconds = []
        for _ in range(calls):
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
        pipe.send(seconds)


def measure(name: str, sizes: Sequence[int], candidates: int, rounds: int, threads: int, onnx: bool) -> dict[str, Any]:
    """Milliseconds of every side, and the largest difference of a probability from eager torch."""
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as scratch:
        folder = save(Path(scratch) / "artifact", name, sizes)
        if onnx:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's exporter meets deprecations of its own
                export(artifact.load(folder), folder.parent / "onnx", "onnx")
        raw = raw_requests(sizes, candidates, 8)
        pipes, workers = {}, []
        try:
            for which in (EAGER, TUNED, RANKER, *([ONNX] if onnx else []), ENCODE):
                pipes[which], theirs = processes.Pipe()
                arguments = (theirs, which, folder, threads, which != EAGER, raw)
                workers.append(processes.Process(target=serve_side, args=arguments, daemon=True))
                workers[-1].start()
            shares = {which: pipe.recv() for which, pipe in pipes.items()}

            def ask(which: str, calls: int) -> Any:
                pipes[which].send(calls)
                return pipes[which].recv()

            expected, shown = ask(EAGER, 0), ask(RANKER, 0)
            difference = max(float(np.abs(a - b).max()) for a, b in zip(expected, shown, strict=True))
            seconds: dict[str, list[float]] = {which: [] for which in pipes}
            for _ in range(rounds):
                for which in pipes:
                    time.sleep(PAUSE)
                    seconds[which] += ask(which, CALLS + WARM)[WARM:]
            for pipe in pipes.values():
                pipe.send(None)
        finally:
            for worker in workers:
                worker.join(10)
                worker.kill()
    return {
        "model": name,
        "candidates": candidates,
        "difference": difference,
        "hoisted_share": shares[RANKER],
        "ms": {
            which: {"p50": 1e3 * float(np.median(samples)), "p99": 1e3 * float(np.quantile(samples, 0.99))}
            for which, samples in seconds.items()
        },
    }


_SERVING = """
import sys
from pathlib import Path
import numpy as np
from ctrlib.ranking import Ranker
ranker = Ranker.load(sys.argv[1])
table = ranker.artifact.model.embedding._tables[0].rows.weight
table.sum()  # every page
print("ready", flush=True)
sys.stdin.readline()
address, kind = table.data_ptr(), {}
inside = False
for line in open("/proc/self/smaps"):
    words = line.split()
    if "-" in words[0]:
        start, end = (int(part, 16) for part in words[0].split("-"))
        inside = start <= address < end
    elif inside and words[0] in ("Rss:", "Pss:", "Private_Clean:", "Private_Dirty:"):
        kind[words[0]] = int(words[1])
print(kind["Rss:"], kind["Private_Clean:"] + kind["Private_Dirty:"])
"""


def memory(sizes: Sequence[int], processes: int = 3) -> list[dict[str, float]]:
    """Of each process, while all of them are alive: MiB of the mapped weights, and how much of it is its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = save(Path(scratch) / "artifact", "dnn", sizes)
        command = [sys.executable, "-c", _SERVING, str(folder)]
        alive = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(processes)]
        try:
            for process in alive:
                assert process.stdout is not None
                process.stdout.readline()
            found = []
            for process in alive:  # each answers while the others wait
                assert process.stdin is not None
                assert process.stdout is not None
                process.stdin.write("\n")
                process.stdin.flush()
                mapped, own = (int(word) / 1024 for word in process.stdout.readline().split())
                found.append({"mapped": mapped, "own": own})
            return found
        finally:
            for process in alive:
                process.kill()
                process.wait()


def main() -> None:
    """Run it, print a table and write ``results/ranking.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=list(PRESETS))
    parser.add_argument("--candidates", type=int, nargs="+", default=[100, 500])
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--rounds", type=int, default=12, help=f"turns of every side, of {CALLS} calls each")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    sizes = vocabularies(args.rows)
    found = []
    for name in args.models:
        for n in args.candidates:
            found.append(measure(name, sizes, n, args.rounds, args.threads, not args.no_onnx))
            print(found[-1], file=sys.stderr, flush=True)
    result: dict[str, Any] = {"threads": args.threads, "rows": args.rows, "requests": found}
    header = ["model", "candidates", "side", "p50 ms", "p99 ms", "× eager"]
    rows = [
        [entry["model"], entry["candidates"], which, ms["p50"], ms["p99"], entry["ms"][EAGER]["p50"] / ms["p50"]]
        for entry in found
        for which, ms in entry["ms"].items()
    ]
    print_table(header, rows)
    if args.memory:
        result["memory_mib"] = memory(sizes)
        print_table(
            ["process", "mapped MiB", "its own MiB"], [[i, m["mapped"], m["own"]] for i, m in enumerate(result["memory_mib"])]
        )
    write_result("ranking", result)


if __name__ == "__main__":
    main()
