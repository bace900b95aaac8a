"""The service under load, swapped, killed and restarted: ``python -m benchmarks.service`` (needs wrk; loopback only).

A DNN on 39 fields, half of them of the context, and a table of 2 million rows × 16; requests of 100 candidates, in turn. wrk
posts them and compares every answer with what the model itself, in another process, says of this request; the answer names the
model. Three minutes, in turn: ready after the start; as many requests as go through; half as many for a minute; the model
swapped ten times under load; kill -9, and ready again.

With ``--url`` and ``--body`` one request is posted to a service that runs already; scores are compared with its first ones.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from benchmarks.common import print_table, vocabularies, write_result
from benchmarks.ranking import raw_requests, save
from ctrlib import artifact
from ctrlib.calibration import Calibration
from ctrlib.ranking import Ranker

LOCAL = ("127.0.0.1", "localhost", "::1")
MOST_SECONDS = 600
CLIENTS = 16

# A server echoes the request's id, so that the answer tells which of the bodies it is for.
_SCRIPT = """
local bodies = { %(bodies)s }
local expected = { %(expected)s }
local learn, pause = %(learn)s, %(pause)f
local threads = {}
function setup(thread) table.insert(threads, thread) end
function init() at = 0; answers = 0; failed = 0; wrong = 0; first = "" end
function delay() return math.floor(2 * pause * math.random()) end
function request()
  at = at %% #bodies + 1
  return wrk.format("POST", "/score", {["content-type"] = "application/json", ["x-request-id"] = "r-" .. at}, bodies[at])
end
local function same(known, body)
  local i = 0
  for number in string.gmatch(string.match(body, "%%[(.-)%%]"), "[^,]+") do
    i = i + 1
    if known[i] == nil or math.abs(tonumber(number) - known[i]) > 1e-6 then return false end
  end
  return i == #known
end
function response(status, headers, body)
  answers = answers + 1
  if status ~= 200 then failed = failed + 1; first = status .. " " .. string.sub(body, 1, 200); return end
  local which = tonumber(string.match(headers["x-request-id"], "%%d+"))
  local model = string.match(body, '"model":%%s*"(%%w+)"')
  if expected[model] == nil and learn then
    expected[model] = {{}}
    for number in string.gmatch(string.match(body, "%%[(.-)%%]"), "[^,]+") do
      table.insert(expected[model][1], tonumber(number))
    end
  end
  if expected[model] == nil or not same(expected[model][which], body) then
    wrong = wrong + 1; first = "model " .. tostring(model) .. ": " .. string.sub(body, 1, 200)
  end
end
function done(summary, latency, _)
  local total, bad, other, text = 0, 0, 0, ""
  for _, thread in ipairs(threads) do
    total = total + thread:get("answers"); bad = bad + thread:get("failed"); other = other + thread:get("wrong")
    if thread:get("first") ~= "" then text = thread:get("first") end
  end
  local e = summary.errors
  io.write(string.format("\\nRESULT %%d %%f %%d %%d %%d %%f %%f %%s\\n", total, summary.duration / 1e6, bad, other,
    e.connect + e.read + e.write + e.timeout, latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, text))
end
"""


class Service:
    """``ctrlib serve`` of a link, in a process of its own."""

    def __init__(self, link: Path, threads: int) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        started = time.perf_counter()
        command = [sys.executable, "-m", "ctrlib", "serve", str(link), "--port", str(self.port), "--threads", str(threads)]
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                assert self.ask("GET", "/healthz")["status"] == "ok"
                break
            except OSError:
                if self.process.poll() is not None or time.perf_counter() - started > 60:
                    raise
                time.sleep(0.02)
        self.seconds = time.perf_counter() - started

    def ask(self, method: str, path: str) -> dict[str, Any]:
        """The JSON of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path)
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
        finally:
            connection.close()

    def wait_until_hoisted(self) -> None:
        """The graph that computes the context once is made in the background; a reload waits for it."""
        self.ask("POST", "/reload")

    def kill(self) -> None:
        """With signal 9."""
        self.process.kill()
        self.process.wait()


def script(bodies: Sequence[bytes], expected: Mapping[str, Sequence[Sequence[float]]], pause: float) -> str:
    """What wrk runs. ``expected`` has the scores of every body by model; without any, the first answer counts."""
    lists = (
        f'["{model}"] = {{ ' + ", ".join("{" + ", ".join(f"{p:.9g}" for p in row) + "}" for row in rows) + " }"
        for model, rows in expected.items()
    )
    return _SCRIPT % {
        "bodies": ", ".join(f"[==[{body.decode('utf-8')}]==]" for body in bodies),
        "expected": ", ".join(lists),
        "learn": "false" if expected else "true",
        "pause": pause,
    }


def load(
    url: str,
    bodies: Sequence[bytes],
    seconds: float,
    clients: int,
    expected: Mapping[str, Sequence[Sequence[float]]] | None = None,
    pause: float = 0.0,
) -> dict[str, Any]:
    """Post for so many seconds over so many connections; each rests between requests, on average ``pause`` milliseconds."""
    parts = urlsplit(url)
    if parts.hostname not in LOCAL:
        raise SystemExit(f"{url} is not on this machine; expected one of {', '.join(LOCAL)}")
    wrk = shutil.which("wrk")
    if wrk is None:
        raise SystemExit("the load comes from wrk, which is not installed; install it (on Debian: apt-get install wrk)")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "load.lua"
        file.write_text(script(bodies, expected or {}, pause), encoding="utf-8")
        duration = f"{min(int(seconds), MOST_SECONDS)}s"
        command = [wrk, "-t1", f"-c{clients}", f"-d{duration}", "--timeout", "30s", "-s", str(file), url]
        output = subprocess.run(command, capture_output=True, text=True, timeout=MOST_SECONDS + 60)
    line = next((line for line in output.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise SystemExit(f"wrk says nothing of its load: {output.stdout[-300:]} {output.stderr[-300:]}")
    answers, took, failed, wrong, broken, p50, p99, *first = line.split(maxsplit=8)[1:]
    return {
        "answers": int(answers),
        "per_second": int(answers) / float(took),
        "not_200": int(failed),
        "wrong_scores": int(wrong),
        "connection_errors": int(broken),
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "first_problem": first[0] if first else None,
    }


def swap(link: Path, target: Path) -> None:
    """Move the link in one step."""
    following = link.with_name("next")
    following.symlink_to(target)
    following.replace(link)


def scenario(rows: int, candidates: int, seconds: float, threads: int) -> dict[str, Any]:
    """Everything, on two artifacts that differ in their calibration."""
    raw = raw_requests(vocabularies(rows), candidates, 16)
    bodies = [json.dumps({"context": context, "candidates": items}).encode() for context, items in raw]
    found: dict[str, Any] = {"rows": rows, "candidates": candidates, "threads": threads}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        versions = [save(folder / name, "dnn", vocabularies(rows)) for name in ("first", "second")]
        artifact.calibrate(versions[1], {"label": Calibration(method="platt", slope=1.0, intercept=1.0)})
        expected = {}
        for version in versions:
            ranker = Ranker.load(version, hoisting=False)
            scores = [ranker.score(context, items).tolist() for context, items in raw]
            expected[str(ranker.artifact.info["checksum"])[:12]] = scores
        link = folder / "now"
        link.symlink_to(versions[0])
        service = Service(link, threads)
        try:
            found["ready_seconds"] = service.seconds
            service.wait_until_hoisted()
            url = f"http://127.0.0.1:{service.port}"
            found["saturated"] = load(url, bodies, seconds / 4, CLIENTS, expected)
            rate = found["saturated"]["per_second"] / 2
            pause = 1e3 * CLIENTS / rate - found["saturated"]["p50_ms"] / 2
            found["half"] = load(url, bodies, seconds, CLIENTS, expected, pause)
            swapping = threading.Thread(
                target=lambda: found.update(swapped=load(url, bodies, seconds, CLIENTS, expected, pause))
            )
            swapping.start()
            served = []
            for turn in range(10):
                swap(link, versions[(turn + 1) % 2])
                served.append(service.ask("POST", "/reload")["model"])
                time.sleep(seconds / 60)
            swapping.join()
            assert served == [list(expected)[(turn + 1) % 2] for turn in range(10)]
            found["swapped"]["swaps"] = len(served)
        finally:
            service.kill()
        again = Service(link, threads)
        found["ready_seconds_after_kill"] = again.seconds
        again.kill()
    return found


def main() -> None:
    """Run it, print it, and write ``results/service.json``; status 1 if any answer was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", help="of a service that runs already; needs --body")
    parser.add_argument("--body", type=Path, help="a JSON request")
    parser.add_argument("--clients", type=int, default=CLIENTS)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--rows", type=int, default=2_000_000)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1, help="of the service")
    args = parser.parse_args()
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if args.url:
        runs = {"load": load(args.url, [args.body.read_bytes()], args.seconds, args.clients)}
    else:
        found = scenario(args.rows, args.candidates, args.seconds, args.threads)
        runs = {name: found[name] for name in ("saturated", "half", "swapped")}
        print(f"ready after {found['ready_seconds']:.1f} s, after kill -9 {found['ready_seconds_after_kill']:.1f} s\n")
        write_result("service", found)
    header = ["load", "answers", "per second", "p50 ms", "p99 ms", "not 200", "wrong scores", "broken connections"]
    cells = ("answers", "per_second", "p50_ms", "p99_ms", "not_200", "wrong_scores", "connection_errors")
    print_table(header, [[name, *(run[cell] for cell in cells)] for name, run in runs.items()])
    bad = [
        run for run in runs.values() if run["not_200"] + run["wrong_scores"] + run["connection_errors"] or not run["answers"]
    ]
    if bad:
        sys.exit(f"error: {bad[0]['first_problem']}")


if __name__ == "__main__":
    main()
