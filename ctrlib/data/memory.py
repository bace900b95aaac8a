"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_UNKNOWN_MB = 4096.0  # the half where the system does not say what is free


def half_of_free_mb() -> float:
    """Half of what ``/proc/meminfo`` calls available, in MB of 2²⁰ bytes."""
    if _MEMINFO.is_file():
        for line in _MEMINFO.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) / 1024 / 2
    return _UNKNOWN_MB
