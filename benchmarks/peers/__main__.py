"""Rows per second and test AUC beside FuxiCTR and DeepCTR-Torch: ``python -m benchmarks.peers``.

Each peer runs in a virtual environment of its own, made on first use under ``--envs``. Speed: 39 fields in Criteo's proportions
with 2 million rows × 16, and 10 fields with 5,000 rows × 10 (Frappe's size); batch 4096; processes take turns. FuxiCTR's
training step is timed on batches in memory, without its loading; DeepCTR-Torch's ``fit`` and ctrlib's ``fit`` with loading.
DeepCTR-Torch's DCN and AutoInt have a first-order part, as it builds them, which ctrlib's have not.
Quality: the Kaggle sample of Criteo's logs (``$CTRLIB_DATA``) as 39 sparse fields; the same encoded rows, sizes, batch and
learning rate of the net; no L2, no dropout; every side's epoch of the best validation AUC, of ten; 3 seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.common import BATCH, DIM, RESULTS, medians, print_table, vocabularies, write_result, zipf_ids
from benchmarks.models import ctrlib_fit, ctrlib_model
from ctrlib.cpu import tune_cpu
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader
from ctrlib.data.store import Split
from ctrlib.metrics import auc
from ctrlib.schema import DenseField, Schema, SparseField
from ctrlib.training import Precision, fit, predict, seed_everything
from experiments.criteo.samples import sources

HERE = Path(__file__).resolve().parent
PEERS = {
    "FuxiCTR 2.3.10": ("fuxictr", ["fuxictr==2.3.10", "polars<2"]),
    "DeepCTR-Torch 0.3.0": ("deepctr", ["deepctr-torch==0.3.0", "pandas", "requests"]),
}
PAIRS = (
    ("FuxiCTR 2.3.10", "final_mlp"),
    ("FuxiCTR 2.3.10", "dcnv2"),
    ("FuxiCTR 2.3.10", "deepfm"),
    ("DeepCTR-Torch 0.3.0", "dcnv2"),
    ("DeepCTR-Torch 0.3.0", "deepfm"),
    ("DeepCTR-Torch 0.3.0", "autoint_head8"),
)
SKIPPED = {
    "FuxiCTR 2.3.10: autoint": "its wheel has no self-attention over fields to compose AutoInt from",
    "DeepCTR-Torch 0.3.0: final_mlp": "not in its wheel",
}
OURS: tuple[Precision, ...] = ("fp32", "bf16")
SPEED = {"2M rows": (vocabularies(2_000_000), DIM), "5,000 rows": ([500] * 10, 10)}
SEEDS = (0, 1, 2)
EPOCHS = 10


def interpreter(envs: Path, peer: str) -> Path:
    """The Python of the peer's environment, made if it is not there."""
    name, packages = PEERS[peer]
    python = envs / name / "bin" / "python"
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(envs / name)], check=True)
        for wanted in (["torch==2.13.0"], packages):  # torch first: a range would pull another build
            subprocess.run([str(python), "-m", "pip", "install", "-q", *wanted], check=True)
    return python


def speed_data(path: Path, sizes: list[int], dim: int) -> None:
    """Zipf ids and random labels."""
    ids = (zipf_ids(sizes) + 2).astype(np.int32).reshape(-1, len(sizes))
    labels = (np.random.default_rng(0).random(len(ids)) < 0.25).astype(np.float32)
    np.savez(path, ids=ids, labels=labels, sizes=sizes, dim=dim, batch=BATCH, epochs=1)


def quality_data(path: Path, scratch: Path) -> None:
    """The Kaggle sample, 7:1:2, validation the first of the rows held out; every field as sparse ids."""
    rows = pq.read_table(sources(scratch)["criteo-kaggle"][0])
    order = np.random.default_rng(0).permutation(len(rows))
    train, held_out = rows.take(order[: len(rows) * 7 // 10]), rows.take(order[len(rows) * 7 // 10 :])
    names = [name for name in rows.column_names if name != "label"]
    fields = [DenseField(name=n, encoding="bucket") if n.startswith("I") else SparseField(name=n, min_count=5) for n in names]
    encoder = Encoder.fit(Schema(fields=tuple(fields), labels=("label",)), train)
    parts: dict[str, Any] = {"valid_rows": len(held_out) // 3}
    for prefix, table in (("", train), ("held_out_", held_out)):
        batch = encoder.transform(table, labels=True)
        assert batch.labels is not None
        parts |= {f"{prefix}ids": batch.sparse.numpy(), f"{prefix}labels": batch.labels[:, 0].numpy()}
    sizes = [column.vocab_size - 2 for column in encoder.layout.sparse]
    np.savez(path, **parts, sizes=sizes, dim=DIM, batch=256, epochs=EPOCHS)


def ours(path: Path, name: str, seed: int, out: Path, precision: Precision, steps: int) -> float:
    """ctrlib's side: rows/s of so many steps, or with 0, predictions of the held-out rows at the best epoch [1, rows]."""
    tune_cpu()
    data = np.load(path)
    seed_everything(seed)
    model = ctrlib_model(name, data["sizes"].tolist(), int(data["dim"]))

    def split(ids: np.ndarray, labels: np.ndarray) -> Split:
        empty = torch.zeros(len(ids), 0)
        return Split(len(ids), torch.from_numpy(ids), empty, {}, torch.from_numpy(labels).unsqueeze(1), None, None)

    batch = int(data["batch"])
    if steps:
        rows = np.resize(np.arange(len(data["ids"])), steps * batch)
        train = Loader(split(data["ids"][rows], data["labels"][rows]), batch, shuffle=True, seed=seed)
        # of the second epoch: the first one is the warm-up
        return float(fit(model, train, None, ctrlib_fit(2, precision)).history[-1]["rows_per_second"])
    train = Loader(split(data["ids"], data["labels"]), batch, shuffle=True, seed=seed)
    valid_rows = int(data["valid_rows"])
    valid = Loader(split(data["held_out_ids"][:valid_rows], data["held_out_labels"][:valid_rows]), 8192)
    fit(model, train, valid, ctrlib_fit(int(data["epochs"]), precision))
    held_out = Loader(split(data["held_out_ids"], data["held_out_labels"]), 8192)
    np.save(out, predict(model, held_out, precision=precision).probability.reshape(1, -1))
    return 0.0


def run(envs: Path, side: str, data: Path, name: str, seed: int, out: Path, steps: int) -> float:
    """One process of one side; ctrlib's sides are called fp32 and bf16."""
    arguments = [str(data), name, str(seed), str(out)]
    if side in OURS:
        command = [sys.executable, "-m", "benchmarks.peers", "--worker", *arguments, side, str(steps)]
    else:
        script = HERE / f"{PEERS[side][0]}_worker.py"
        command = [str(interpreter(envs, side)), str(script), *arguments, *([str(steps)] if steps else [])]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(printed[-1]) if steps else 0.0


def measure_speed(envs: Path, scratch: Path, rounds: int) -> list[dict[str, Any]]:
    """Rows per second of every pair, in turn."""
    lines = []
    for case, (sizes, dim) in SPEED.items():
        path = scratch / "speed.npz"
        speed_data(path, sizes, dim)
        steps = 12 if case == "2M rows" else 60
        for name in dict.fromkeys(name for _, name in PAIRS):
            sides = [*OURS, *(peer for peer, model in PAIRS if model == name)]
            samples: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(rounds):
                for side in sides:
                    samples[side].append(run(envs, side, path, name, 0, scratch / "unused.npy", steps))
            found = medians(samples)
            for peer in sides[2:]:
                rates = {"peer_rows_per_second": found[peer], **{f"{p}_rows_per_second": found[p] for p in OURS}}
                ratios = {f"{p}_ratio": found[p] / found[peer] for p in OURS}
                lines.append({"case": case, "peer": peer, "model": name, **rates, **ratios})
                print(lines[-1], flush=True)
    return lines


def measure_quality(envs: Path, scratch: Path, kept: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Test AUC of every pair over the seeds; what is in ``kept`` is not measured again."""
    path, out, lines = scratch / "quality.npz", scratch / "predictions.npy", []
    quality_data(path, scratch)
    data = np.load(path)
    labels, valid_rows = data["held_out_labels"], int(data["valid_rows"])
    for name in dict.fromkeys(name for _, name in PAIRS):
        for side in (*OURS, *(peer for peer, model in PAIRS if model == name)):
            line = next((line for line in kept if (line["model"], line["side"]) == (name, side)), None)
            if line is not None:
                lines.append(line)
                continue
            found = []
            for seed in SEEDS:
                run(envs, side, path, name, seed, out, 0)
                epochs = np.load(out)
                best = max(epochs, key=lambda p: auc(labels[:valid_rows], p[:valid_rows]))
                found.append(auc(labels[valid_rows:], best[valid_rows:]))
            lines.append({"model": name, "side": side, "auc": statistics.fmean(found), "std": statistics.stdev(found)})
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Print the tables and write ``results/peers.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "ctrlib-benchmarks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--part", choices=("speed", "quality"), help="measure this one, keep the committed figures of the other"
    )
    parser.add_argument("--keep-peers", action="store_true", help="keep the peers' quality, measure ctrlib's again")
    parser.add_argument("--worker", nargs=6, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        data, name, seed, out, precision, steps = arguments.worker
        print(json.dumps(ours(Path(data), name, int(seed), Path(out), precision, int(steps))))
        return
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for peer in PEERS:
        interpreter(arguments.envs, peer)
    for model, reason in SKIPPED.items():
        print(f"skipped: {model}: {reason}")
    with tempfile.TemporaryDirectory() as folder:
        kept = json.loads((RESULTS / "peers.json").read_text(encoding="utf-8")) if arguments.part else {"quality": []}
        peers = [line for line in kept["quality"] if line["side"] not in OURS and arguments.keep_peers]
        scratch, part = Path(folder), arguments.part
        speed = kept["speed"] if part == "quality" else measure_speed(arguments.envs, scratch, arguments.rounds)
        quality = kept["quality"] if part == "speed" else measure_quality(arguments.envs, scratch, peers)
    print_table(
        ["tables", "peer", "model", "peer's rows/s", "ctrlib fp32", "ratio", "ctrlib bf16", "ratio"],
        [
            [r["case"], r["peer"], r["model"], round(r["peer_rows_per_second"]), round(r["fp32_rows_per_second"]),
             r["fp32_ratio"], round(r["bf16_rows_per_second"]), r["bf16_ratio"]] for r in speed
        ],
    )  # fmt: skip
    print_table(["model", "side", "test AUC"], [[r["model"], r["side"], f"{r['auc']:.5f} ± {r['std']:.5f}"] for r in quality])
    write_result("peers", {"speed": speed, "quality": quality, "skipped": SKIPPED})


if __name__ == "__main__":
    main()
