"""From training to a service: the commands one after another, and the service killed, started again, reloaded and ended."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ctrlib import artifact
from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, calibrate_run, evaluate_run, prepare, train
from ctrlib.schema import DataError
from tests.clicks import tiny, write
from tests.test_cli import Call, call
from tests.test_ranking import CONTEXT, SIDES, offline, requests

__all__ = ["call"]  # a fixture


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    options = DataOptions(schema=SIDES, valid=data / "valid.parquet", test=data / "test.parquet")
    train(data / "train.parquet", tiny(), out, options)
    return out


def test_calibrate_export_verify(run: Path, data: Path, tmp_path: Path, call: Call) -> None:
    before = evaluate_run(run, data / "test.parquet")
    code, out, err = call("calibrate", run, data / "valid.parquet", "--plot", tmp_path / "r.png")
    assert code == 0, err
    report = json.loads(out)["label"]
    assert set(report["compared"]) == {"none", "temperature", "platt", "isotonic"}
    assert report["after"]["log_loss"] <= report["before"]["log_loss"]
    assert (tmp_path / "r.png").is_file()
    (calibration,) = artifact.load(run).calibration
    assert calibration.method == report["method"]
    after = evaluate_run(run, data / "test.parquet")
    assert after["auc"] == pytest.approx(before["auc"], abs=5e-3 if calibration.method == "isotonic" else 1e-9)
    assert call("calibrate", run, data / "valid.parquet", "--method", "plat")[0] == 2

    code, _, err = call("export", run, "--out", tmp_path / "program")
    assert code == 0, err
    code, out, err = call("verify", run, data / "test.parquet", "--export", tmp_path / "program", "--rows", "50")
    assert code == 0, err
    assert len(out.splitlines()) == 3
    assert "AUC" in out
    code, out, _ = call("export", run, "--out", tmp_path / "small", "--rows", "int8")
    assert code == 0
    assert call("verify", run, data / "test.parquet", "--export", tmp_path / "small", "--rows", "50")[0] == 1


def test_a_store_is_calibrated_by_its_validation_rows(data: Path, tmp_path: Path) -> None:
    options = DataOptions(schema=SIDES, valid=data / "valid.parquet", test=data / "test.parquet")
    prepare(data / "train.parquet", tmp_path / "store", options)
    train(tmp_path / "store", tiny(), tmp_path / "run")
    by_store = calibrate_run(tmp_path / "run", tmp_path / "store", method="platt")
    assert Store.is_store(tmp_path / "store")
    stored = artifact.load(tmp_path / "run").calibration
    by_rows = calibrate_run(tmp_path / "run", data / "valid.parquet", method="platt")
    assert by_store == by_rows
    assert artifact.load(tmp_path / "run").calibration == stored
    sampled = calibrate_run(tmp_path / "run", data / "valid.parquet", method="platt", sampling_rate=0.5)
    assert sampled["label"]["after"] == pytest.approx(by_rows["label"]["after"])
    assert artifact.load(tmp_path / "run").calibration[0].intercept == pytest.approx(stored[0].intercept + np.log(0.5))
    prepare(data / "test.parquet", tmp_path / "other", replace(options, valid=None, test=None))
    with pytest.raises(DataError, match="made by another encoder"):
        calibrate_run(tmp_path / "run", tmp_path / "other")


def ask(port: int, path: str, body: Any = None) -> Any:
    content = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", content, timeout=20) as answer:
        return json.loads(answer.read())


def started(run: Path, port: int) -> subprocess.Popen[bytes]:
    """A service that answers."""
    command = [sys.executable, "-m", "ctrlib", "serve", str(run), "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    for _ in range(1200):  # bounded: imports alone take seconds on a busy machine
        assert process.poll() is None
        try:
            assert ask(port, "/healthz")["status"] == "ok"
        except OSError:
            time.sleep(0.1)
        else:
            return process
    process.kill()
    process.wait()
    raise AssertionError("no answer within two minutes")


def test_the_service_is_killed_started_reloaded_and_ended(run: Path) -> None:
    pytest.importorskip("uvicorn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    request = requests(1, 5)[0]
    body = {"context": {name: request[0][name] for name in CONTEXT}, "candidates": request[1]}
    expected = offline(artifact.load(run), request)
    for ending in (signal.SIGKILL, signal.SIGTERM):
        process = started(run, port)
        try:
            np.testing.assert_allclose(ask(port, "/score", body)["probabilities"], expected, rtol=0, atol=1e-6)
            if ending == signal.SIGTERM and hasattr(signal, "SIGHUP"):
                os.kill(process.pid, signal.SIGHUP)
                for _ in range(200):
                    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
                        if b"ctrlib_reloads_total 1" in answer.read():
                            break
                    time.sleep(0.1)
                else:
                    raise AssertionError("no reload within 20 s")
            process.send_signal(ending)
            process.wait(30)
        finally:
            process.kill()
            process.wait()
