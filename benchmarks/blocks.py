"""A training step of every preset that FuxiCTR or DeepCTR-Torch has too, beside theirs: ``python -m benchmarks.blocks``.

The same model on all sides: fields, widths, layers; no dropout, no L2, normalisation only where a library builds it in.
FuxiCTR's models are composed of the layers in its wheel. Tables, batch, processes and turns as in ``benchmarks.peers``: 39
fields with 2 million rows × 16, and 10 fields with 5,000 rows × 10; batch 4096; ctrlib's default optimizer against Adam, in
fp32.

A side that takes too long or more memory than ``--memory`` is recorded as such, and doesn't get another turn.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import BATCH, DIM, medians, print_table, vocabularies, write_result
from benchmarks.peers.sides import DEEPCTR, FUXICTR, PEERS, SPEED, interpreter, run, speed_data
from ctrlib.models.presets import PRESETS

_BOTH = (FUXICTR, DEEPCTR)
PAIRS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("lr", "fm", "dnn", "wide_deep", "deepfm", "dcn", "dcnv2", "dcn_mix"), _BOTH),
    **dict.fromkeys(("autoint_tied", "autoint_plus", "ipnn", "cin", "xdeepfm", "fibinet", "afm", "nfm"), _BOTH),
    **dict.fromkeys(("cross_net_v2", "dual_mlp", "final_mlp", "fwfm", "fmfm", "dlrm"), (FUXICTR,)),
    **dict.fromkeys(("opnn", "pnn", "onn", "afn", "ifm"), (DEEPCTR,)),
}
"""Who has which model, by its name in ``benchmarks.models.SETTINGS``."""

NOTES = {
    "afm": "FuxiCTR: its products of pairs; the attention over them is composed",
    "afn": "600 neurons; batch-normalised logarithms, exponentials and MLP",
    "autoint_tied": "two heads as wide together as the embedding, as in DeepCTR-Torch; FuxiCTR: composed on its dot product",
    "autoint_plus": "as autoint_tied, beside an MLP",
    "fibinet": "one set of matrices, one per pair, as in DeepCTR-Torch",
    "final_mlp": "one head; FuxiCTR: gates and fusion are composed",
    "fmfm": "FuxiCTR: its bilinear layer, summed",
    "onn": "width 4; not quite the same: DeepCTR-Torch's MLP reads products coordinate by coordinate and no copies",
    "opnn": "kernel products, x_iᵀ φ_ij x_j: DeepCTR-Torch has no superposed outer product",
    "pnn": "as opnn, and inner products",
}

_ZOO = "in FuxiCTR's repository, but neither in its wheel nor composed of a layer there; not in DeepCTR-Torch"
_NEITHER = "in neither"
ALONE: dict[str, str] = {
    **dict.fromkeys(
        ("fgcnn_ipnn", "fgcnn_dnn", "fgcnn_fm", "fgcnn_deepfm", "ffm", "hofm", "gdcn_stacked", "gdcn_parallel"), _ZOO
    ),
    **dict.fromkeys(("mask_net_serial", "mask_net_parallel", "edcn", "deep_crossing", "fignn", "final_net_1b"), _ZOO),
    **dict.fromkeys(("final_net_2b", "euler_net", "afn_plus", "interhat", "sam", "aoanet", "destine", "destine_plus"), _ZOO),
    **dict.fromkeys(("pin", "hiformer", "hetero_att", "transformer", "ft_transformer", "wukong", "rank_mixer"), _NEITHER),
    **dict.fromkeys(("arm_net", "arm_net_plus"), _NEITHER),
}
"""Presets without a counterpart, and why."""

STEPS = {"2M rows": 8, "5,000 rows": 40}
QUICK = {"39 small fields": (vocabularies(20_000), DIM), "10 small fields": ([500] * 10, 10)}


def why(error: subprocess.SubprocessError, memory: int) -> str:
    """What stopped a process, in a few words."""
    if isinstance(error, subprocess.TimeoutExpired):
        return f"more than {error.timeout:.0f} s"
    message = str(getattr(error, "stderr", "")).strip().splitlines()
    if any("alloc" in line or "MemoryError" in line or "memory" in line for line in message[-3:]):
        return f"more than {memory / 2**30:g} GiB"
    return "failed: " + (message[-1] if message else str(error))


def measure(
    envs: Path, data: Path, name: str, *, rounds: int, steps: int, seconds: float, memory: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Milliseconds a step of the sides of one model, and what stopped those that have none."""
    samples: dict[str, list[float]] = {side: [] for side in ("fp32", *PAIRS[name])}
    stopped: dict[str, str] = {}
    for _ in range(rounds):
        for side in samples:
            if side in stopped:
                continue
            try:
                rate = run(envs, side, data, name, 0, data.with_name("unused.npy"), steps, seconds=seconds, memory=memory)
            except subprocess.SubprocessError as error:
                stopped[side] = why(error, memory)
            else:
                samples[side].append(BATCH / rate * 1e3)
    return medians({side: found for side, found in samples.items() if side not in stopped}), stopped


def main() -> None:
    """Print the table; write ``results/blocks.json`` unless only a part was measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--envs", type=Path, default=Path.home() / ".cache" / "ctrlib-benchmarks")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=300, help="limit of a process")
    parser.add_argument("--memory", type=float, default=16, help="limit of a process in GiB")
    parser.add_argument("--models", nargs="+", choices=tuple(PAIRS), default=tuple(PAIRS), help="only these; writes nothing")
    parser.add_argument("--quick", action="store_true", help="small tables, one round of few steps; writes nothing")
    arguments = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    for peer in PEERS:
        interpreter(arguments.envs, peer)
    limits = {"seconds": arguments.seconds, "memory": int(arguments.memory * 2**30)}
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "data.npz"
        for case, (sizes, dim) in (QUICK if arguments.quick else SPEED).items():
            speed_data(data, sizes, dim)
            effort = {"rounds": 1, "steps": 4} if arguments.quick else {"rounds": arguments.rounds, "steps": STEPS[case]}
            for name in arguments.models:
                found, stopped = measure(arguments.envs, data, name, **effort, **limits)
                for peer in PAIRS[name]:
                    line: dict[str, Any] = {"case": case, "model": name, "peer": peer, "ms": found.get("fp32")}
                    line |= {"peer_ms": found.get(peer), "stopped": {s: stopped[s] for s in ("fp32", peer) if s in stopped}}
                    if not line["stopped"]:
                        line["ratio"] = found[peer] / found["fp32"]
                    lines.append(line)
                    print(line, flush=True)
    print_table(
        ["tables", "model", "peer", "its ms a step", "ctrlib's", "times faster"],
        [
            [r["case"], r["model"], r["peer"], r["peer_ms"] or r["stopped"].get(r["peer"]), r["ms"] or r["stopped"].get("fp32"),
             r.get("ratio", "")] for r in lines
        ],
    )  # fmt: skip
    if arguments.quick or len(arguments.models) < len(PAIRS):
        return
    measured = {name.removesuffix("_tied") for name in PAIRS}
    without = {name: ALONE.get(name, "not looked for") for name in PRESETS if name not in measured}
    settings = {"rounds": arguments.rounds, "steps": STEPS, **limits}
    write_result("blocks", {**settings, "results": lines, "notes": NOTES, "without_counterpart": without})


if __name__ == "__main__":
    main()
