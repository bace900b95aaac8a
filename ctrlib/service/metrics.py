"""Counters of the service, as Prometheus reads them."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from threading import Lock

_BOUNDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)


class Metrics:
    """Numbers that only grow; any thread may add to them."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._requests: Counter[tuple[str, int]] = Counter()
        self._latency = [0] * (len(_BOUNDS) + 1)
        self._seconds = 0.0
        self._counts: Counter[str] = Counter()

    def request(self, path: str, status: int, seconds: float) -> None:
        """A request was answered."""
        with self._lock:
            self._requests[path, status] += 1
            self._latency[bisect_left(_BOUNDS, seconds)] += 1
            self._seconds += seconds

    def count(self, name: str, by: int = 1) -> None:
        """Add to ``ctrlib_<name>_total``."""
        with self._lock:
            self._counts[name] += by

    def text(self, model: str, waiting: int) -> str:
        """The exposition format, version 0.0.4."""
        with self._lock:
            lines = ["# TYPE ctrlib_requests_total counter"]
            for (path, status), number in sorted(self._requests.items()):
                lines.append(f'ctrlib_requests_total{{path="{path}",status="{status}"}} {number}')
            lines.append("# TYPE ctrlib_request_seconds histogram")
            total = 0
            for bound, number in zip((*map(str, _BOUNDS), "+Inf"), self._latency, strict=True):
                total += number
                lines.append(f'ctrlib_request_seconds_bucket{{le="{bound}"}} {total}')
            lines += [f"ctrlib_request_seconds_sum {self._seconds:.6f}", f"ctrlib_request_seconds_count {total}"]
            for name, number in sorted(self._counts.items()):
                lines += [f"# TYPE ctrlib_{name}_total counter", f"ctrlib_{name}_total {number}"]
            lines += ["# TYPE ctrlib_waiting gauge", f"ctrlib_waiting {waiting}"]
            lines += ["# TYPE ctrlib_model_info gauge", f'ctrlib_model_info{{model="{model}"}} 1']
        return "\n".join(lines) + "\n"
