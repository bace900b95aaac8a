"""tune_cpu changes a whole process, so every test runs it in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any


def run(script: str) -> Any:
    """What the script prints, read as JSON."""
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_products_stay_fp32_and_a_second_call_changes_nothing() -> None:
    seen = run("""
import dataclasses, json, torch
from torch.nn import functional as F
setting = torch.backends.mkldnn.matmul
start = setting.fp32_precision
from ctrlib.cpu import tune_cpu
imported = setting.fp32_precision
state = torch.random.get_rng_state()
first = dataclasses.asdict(tune_cpu())
precision = setting.fp32_precision
second = dataclasses.asdict(tune_cpu())
untouched = torch.equal(state, torch.random.get_rng_state())
torch.manual_seed(7)
def error(fp32, exact):
    return ((fp32.double() - exact).abs().max() / exact.abs().max()).item()
x, w, b = torch.randn(1000, 624), torch.randn(400, 624), torch.randn(400)
q, k = torch.randn(100, 2, 39, 32), torch.randn(100, 2, 39, 32)
errors = [
    error(F.linear(x, w, b), F.linear(x.double(), w.double(), b.double())),
    error(x @ w.T, x.double() @ w.double().T),
    error(x.T @ x, x.double().T @ x.double()),
    error(q @ k.mT, q.double() @ k.double().mT),
    error(x[:7, :20] @ w[:5, :20].T, x[:7, :20].double() @ w[:5, :20].double().T),
]
again = setting.fp32_precision
print(json.dumps([start, imported, precision, again, first, second, untouched, errors]))
""")
    start, imported, precision, again, first, second, untouched, errors = seen
    assert imported == start
    assert first == second
    assert again == precision
    assert first["matmul"] in ("onednn", "default", "unavailable")
    assert precision == ("bf16" if first["matmul"] == "onednn" else start)
    assert untouched
    assert max(errors) < 5e-6


def test_a_route_that_rounds_is_put_back() -> None:
    before, after, report = run("""
import json, torch
import ctrlib.cpu as cpu
before = torch.backends.mkldnn.matmul.fp32_precision
cpu._matmul_error = lambda: 3e-4
report = cpu.tune_cpu().matmul
print(json.dumps([before, torch.backends.mkldnn.matmul.fp32_precision, report]))
""")
    assert after == before
    assert report in ("default", "unavailable")


def test_the_check_sees_bf16() -> None:
    """What the check computes, with products that are really rounded."""
    (error,) = run("""
import json, torch
import ctrlib.cpu as cpu
with torch.autocast("cpu", dtype=torch.bfloat16):
    print(json.dumps([cpu._matmul_error()]))
""")
    assert error > 1e-3


def test_threads_and_a_foreign_c_library() -> None:
    before, kept, given, allocator = run("""
import ctypes, json, torch
import ctrlib.cpu as cpu
before = torch.get_num_threads()
kept = cpu.tune_cpu().threads
def missing(name):
    raise OSError(name)
cpu.ctypes.CDLL = missing
report = cpu.tune_cpu(threads=2)
assert torch.get_num_threads() == 2
print(json.dumps([before, kept, report.threads, report.allocator]))
""")
    assert kept == before
    assert given == 2
    assert allocator == "unavailable"
