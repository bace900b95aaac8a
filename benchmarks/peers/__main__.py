"""Rows per second and test AUC beside FuxiCTR and DeepCTR-Torch: ``python -m benchmarks.peers``.

Each peer runs in a virtual environment of its own, made on first use under ``--envs``. Speed: 39 fields in Criteo's proportions
with 2 million rows × 16, and 10 fields with 5,000 rows × 10 (Frappe's size); batch 4096; processes take turns. FuxiCTR's
training step is timed on batches in memory, without its loading; DeepCTR-Torch's ``fit`` and ctrlib's ``fit`` with loading.
Quality: the Kaggle sample of Criteo's logs (``$CTRLIB_DATA``) as 39 sparse fields; the same encoded rows, sizes, batch and
learning rate of the net; no L2, no dropout; every side's epoch of the best validation AUC, of ten; 3 seeds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from benchmarks.common import DIM, RESULTS, medians, print_table, write_result
from benchmarks.models import ctrlib_fit, ctrlib_model
from benchmarks.peers.sides import DEEPCTR, FUXICTR, OURS, PEERS, SPEED, interpreter, run, speed_data
from ctrlib.cpu import tune_cpu
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader
from ctrlib.data.store import Split
from ctrlib.metrics import auc
from ctrlib.schema import DenseField, Schema, SparseField
from ctrlib.training import Precision, fit, predict, seed_everything
from experiments.criteo.samples import sources

PAIRS = (
    (FUXICTR, "final_mlp"),
    (FUXICTR, "dcnv2"),
    (FUXICTR, "deepfm"),
    (DEEPCTR, "dcnv2"),
    (DEEPCTR, "deepfm"),
    (DEEPCTR, "autoint_tied"),
)
SKIPPED = {
    f"{FUXICTR}: autoint": "its wheel has no interacting layer; benchmarks.blocks composes one",
    f"{DEEPCTR}: final_mlp": "not in its wheel",
}
SEEDS = (0, 1, 2)
EPOCHS = 10


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
