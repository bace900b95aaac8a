"""What experiments over several seeds share: a JSON for every model and seed, and differences that are paired by seed."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ctrlib.config import ConfigError

SEEDS = (0, 1, 2, 3, 4)
T_QUANTILE = 2.776445  # Student's t at .975 for the four degrees of freedom of five seeds

Runs = Mapping[str, Sequence[Mapping[str, Any]]]
"""By model, the JSON of every seed, in order."""


def file(folder: Path, model: str, seed: int) -> Path:
    """Where the result is, or will be."""
    return folder / f"{model}-{seed}.json"


def is_done(path: Path, settings: Mapping[str, Any]) -> bool:
    """Whether a result is there.

    Raises:
        ConfigError: it is one of other settings.
    """
    if not path.is_file():
        return False
    if json.loads(path.read_text(encoding="utf-8"))["settings"] != settings:
        raise ConfigError(f"{path} was run with other settings than the experiment has now; remove it, or choose another --out")
    return True


def load(folder: Path, models: Iterable[str]) -> Runs:
    """The results that are there."""
    found: dict[str, list[dict[str, Any]]] = {}
    for model in models:
        paths = [path for seed in SEEDS if (path := file(folder, model, seed)).is_file()]
        if paths:
            found[model] = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    return found


def complete(runs: Runs) -> Runs:
    """The models of which every seed is there."""
    return {model: found for model, found in runs.items() if len(found) == len(SEEDS)}


def missing(runs: Runs, models: Iterable[str]) -> str:
    """A last line for the page: what was not run yet; empty where nothing is missing."""
    left = [f"{m} ({len(runs.get(m, ()))} of {len(SEEDS)} seeds)" for m in models if len(runs.get(m, ())) < len(SEEDS)]
    return f"\nNot run yet: {', '.join(left)}.\n" if left else ""


def mean_std(values: Sequence[float]) -> str:
    """``"0.1234 ± 0.0012"``"""
    return f"{statistics.fmean(values):.4f} ± {statistics.stdev(values):.4f}"


def difference(values: Sequence[float], others: Sequence[float]) -> tuple[float, float]:
    """Mean of the differences, seed by seed, and half their 95 % confidence interval."""
    gains = [a - b for a, b in zip(values, others, strict=True)]
    assert len(gains) == len(SEEDS)
    return statistics.fmean(gains), T_QUANTILE * statistics.stdev(gains) / len(gains) ** 0.5


def signed(values: Sequence[float], others: Sequence[float]) -> str:
    """The same as text: ``"+0.0123 ± 0.0045"``."""
    return "{:+.4f} ± {:.4f}".format(*difference(values, others))
