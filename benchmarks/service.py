"""A bounded load on a running service: ``python -m benchmarks.service --url http://127.0.0.1:8080 --body body.json``.

Each client posts the body to ``/score`` and waits for the answer before the next one. Every answer must be 200 and hold the
probabilities of the first one, or of another one seen for the model that the answer names. Prints requests per second, p50 and
p99 in milliseconds, and what was wrong; status 1 if anything was. Only loopback addresses are taken.
"""

from __future__ import annotations

import argparse
import http.client
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

LOCAL = ("127.0.0.1", "localhost", "::1")
MOST_SECONDS = 600


def load(url: str, body: bytes, seconds: float, clients: int) -> dict[str, Any]:
    """Post for so many seconds from so many threads."""
    parts = urlsplit(url)
    if parts.hostname not in LOCAL:
        raise SystemExit(f"{url} is not on this machine; expected one of {', '.join(LOCAL)}")
    lock = threading.Lock()
    latencies: list[float] = []
    problems: list[str] = []
    known: dict[str, list[float]] = {}
    end = time.perf_counter() + min(seconds, MOST_SECONDS)

    def client() -> None:
        connection = http.client.HTTPConnection(str(parts.hostname), parts.port or 80, timeout=30)
        mine: list[float] = []
        while time.perf_counter() < end:
            started = time.perf_counter()
            try:
                connection.request("POST", "/score", body, {"content-type": "application/json"})
                answer = connection.getresponse()
                content = answer.read()
            except OSError as error:
                with lock:
                    problems.append(f"{type(error).__name__}: {error}")
                connection.close()
                continue
            mine.append(time.perf_counter() - started)
            with lock:
                if answer.status != 200:
                    problems.append(f"status {answer.status}: {content[:200]!r}")
                    continue
                data = json.loads(content)
                expected = known.setdefault(data["model"], data["probabilities"])
                if not np.allclose(data["probabilities"], expected, rtol=0, atol=1e-6):
                    problems.append(f"other scores of model {data['model']}")
        with lock:
            latencies.extend(mine)
        connection.close()

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    milliseconds = 1e3 * np.array(latencies or [np.nan])
    return {
        "requests": len(latencies),
        "per_second": len(latencies) / seconds,
        "p50_ms": float(np.median(milliseconds)),
        "p99_ms": float(np.quantile(milliseconds, 0.99)),
        "models": sorted(known),
        "problems": len(problems),
        "first_problem": problems[0] if problems else None,
    }


def main() -> None:
    """Run it and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8080")
    parser.add_argument("--body", type=Path, required=True, help="a JSON request")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    result = load(args.url, args.body.read_bytes(), args.seconds, args.clients)
    print(json.dumps(result, indent=1))
    sys.exit(int(result["problems"] > 0 or result["requests"] == 0))


if __name__ == "__main__":
    main()
