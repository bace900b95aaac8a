"""One context × N candidates: the ranker beside tiled rows in eager torch and ONNX Runtime: ``python -m benchmarks.ranking``.

39 fields of ids, half of them of the context, a table of 2 million rows × 16; all sides in turn in one process, on the same
requests, encoded before the clock starts (``encode`` is timed by itself, from raw values). Tiled sides read a batch in which
every candidate has the whole context; making that batch is on their clock too. ``--memory`` also measures what each of three
more processes adds that serve the same artifact.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from benchmarks.common import interleaved, print_table, vocabularies, write_result
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


def raw_requests(sizes: Sequence[int], candidates: int, count: int) -> list[tuple[dict[str, object], list[dict[str, object]]]]:
    """Raw values: frequent ones often, as in logs."""
    rng = np.random.default_rng(0)

    def row(places: range) -> dict[str, object]:
        return {f"f{i}": int(min(rng.zipf(1.2), sizes[i] - FIRST_VALUE_ID - 1)) for i in places}

    above, below = range(1, len(sizes), 2), range(0, len(sizes), 2)
    return [(row(above), [row(below) for _ in range(candidates)]) for _ in range(count)]


def sides(folder: Path, scratch: Path, onnx: bool) -> dict[str, Callable[[Request], Any]]:
    """What scores a request, by name."""
    loaded = artifact.load(folder)
    hoisted = Ranker(loaded)
    found: dict[str, Callable[[Request], Any]] = {
        "eager, tiled": Ranker(loaded, hoisting=False).probabilities,
        "ranker": hoisted.probabilities,
    }
    if onnx:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's exporter meets deprecations of its own
            export(loaded, scratch / "onnx", "onnx")
        program = load_export(scratch / "onnx")
        found["ONNX Runtime, tiled"] = lambda request: program.logits(request.batch())
    return found


def measure(name: str, sizes: Sequence[int], candidates: int, repeats: int, onnx: bool) -> dict[str, Any]:
    """Milliseconds of every side, and the largest difference of a probability from eager torch."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = save(Path(scratch) / "artifact", name, sizes)
        variants = sides(folder, Path(scratch), onnx)
        ranker = Ranker.load(folder)
        raw = raw_requests(sizes, candidates, 8)
        requests = [ranker.encoder.encode(*request) for request in raw]
        expected = [variants["eager, tiled"](request) for request in requests]
        difference = max(float(np.abs(ranker.probabilities(r) - e).max()) for r, e in zip(requests, expected, strict=True))
        turn = {side: iter(requests * (repeats + 8)) for side in variants}
        calls: dict[str, Callable[[], object]] = {
            side: (lambda score=score, side=side: score(next(turn[side])))  # type: ignore[misc]
            for side, score in variants.items()
        }
        again = iter(raw * (repeats + 8))
        calls["encode"] = lambda: ranker.encoder.encode(*next(again))
        seconds = interleaved(calls, repeats=repeats)
        share = ranker.hoisted_share
    return {
        "model": name,
        "candidates": candidates,
        "difference": difference,
        "hoisted_share": share,
        "ms": {
            side: {"p50": 1e3 * float(np.median(samples)), "p99": 1e3 * float(np.quantile(samples, 0.99))}
            for side, samples in seconds.items()
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
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--untuned", action="store_true", help="without ctrlib.tune_cpu(), which helps every side in torch")
    parser.add_argument("--no-onnx", action="store_true")
    parser.add_argument("--memory", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if not args.untuned:
        tune_cpu(args.threads)
    sizes = vocabularies(args.rows)
    found = [measure(name, sizes, n, args.repeats, not args.no_onnx) for name in args.models for n in args.candidates]
    result: dict[str, Any] = {"threads": args.threads, "rows": args.rows, "tuned": not args.untuned, "requests": found}
    header = ["model", "candidates", "side", "p50 ms", "p99 ms", "× eager"]
    rows = [
        [entry["model"], entry["candidates"], side, ms["p50"], ms["p99"], entry["ms"]["eager, tiled"]["p50"] / ms["p50"]]
        for entry in found
        for side, ms in entry["ms"].items()
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
