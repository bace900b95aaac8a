"""The sides of a comparison with other libraries: each runs in a process of its own, a peer in its own environment too."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.common import BATCH, DIM, vocabularies, zipf_ids
from ctrlib.training import Precision

HERE = Path(__file__).resolve().parent
FUXICTR, DEEPCTR = "FuxiCTR 2.3.10", "DeepCTR-Torch 0.3.0"
PEERS = {
    FUXICTR: ("fuxictr", ["fuxictr==2.3.10", "polars<2"]),
    DEEPCTR: ("deepctr", ["deepctr-torch==0.3.0", "pandas", "requests"]),
}
OURS: tuple[Precision, ...] = ("fp32", "bf16")
SPEED = {"2M rows": (vocabularies(2_000_000), DIM), "5,000 rows": ([500] * 10, 10)}


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


def run(
    envs: Path,
    side: str,
    data: Path,
    name: str,
    seed: int,
    out: Path,
    steps: int,
    *,
    seconds: float | None = None,
    memory: int | None = None,
) -> float:
    """One process of one side; ctrlib's sides are called fp32 and bf16.

    Args:
        seconds: the process is killed after so many.
        memory: limit of its private memory in bytes, touched or not (``RLIMIT_DATA``).

    Raises:
        subprocess.TimeoutExpired: it took longer.
        subprocess.CalledProcessError: it failed.
    """
    arguments = [str(data), name, str(seed), str(out)]
    if side in OURS:
        command = [sys.executable, "-m", "benchmarks.peers", "--worker", *arguments, side, str(steps)]
    else:
        script = HERE / f"{PEERS[side][0]}_worker.py"
        command = [str(interpreter(envs, side)), str(script), *arguments, *([str(steps)] if steps else [])]
    bounded = None if memory is None else lambda: resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=seconds, preexec_fn=bounded)
    return float(done.stdout.split()[-1]) if steps else 0.0
