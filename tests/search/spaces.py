"""Small spaces, in a module so that other processes find them, and the search that the tests of kills start."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

from ctrlib.config import ConfigError
from ctrlib.experiment import DataOptions, RunConfig
from ctrlib.search.space import Candidate
from ctrlib.search.tuning import SearchConfig, search
from tests.clicks import tiny

OPTIONS: dict[str, Any] = {"models": ("dnn",), "smallest": 10_000, "finalists": 2, "finish_seeds": 2}


def small(trial: Any) -> RunConfig:
    """A tiny dnn for one epoch; fast."""
    rate = trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
    width = trial.suggest_categorical("width", (4, 8, 16))
    return tiny(
        fit__optimizer__learning_rate=str(rate), model__interaction__hidden_units=str(width), workers="0", fit__epochs="1"
    )


def slow(trial: Any) -> RunConfig:
    """As :func:`small`, for seconds."""
    rate = trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
    return tiny(fit__optimizer__learning_rate=str(rate), fit__patience="None", workers="0", fit__epochs="25", batch_size="64")


def endless(trial: Any) -> RunConfig:
    """As :func:`slow`, for days; all of its epochs are known to come."""
    rate = trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
    return tiny(fit__optimizer__learning_rate=str(rate), fit__patience="None", workers="0", fit__epochs="1000000")


def patient(trial: Any) -> RunConfig:
    """As :func:`endless`, but it might stop after its second epoch."""
    rate = trial.suggest_float("learning_rate", 1e-3, 1e-1, log=True)
    return tiny(fit__optimizer__learning_rate=str(rate), fit__patience="900000", workers="0", fit__epochs="1000000")


def partly_invalid(trial: Any) -> RunConfig:
    """Half of its points cannot be."""
    run = small(trial)
    if trial.suggest_categorical("broken", (True, False)):
        raise ConfigError("fit.epochs is 0; expected a number above 0")
    return run


def invalid(trial: Any) -> RunConfig:
    """None of its points can be."""
    trial.suggest_int("x", 0, 5)
    raise ConfigError("nothing here can be built")


def branching(trial: Any) -> RunConfig:
    """The choices of one parameter depend on another one, which Optuna refuses."""
    units = trial.suggest_categorical("units", ("16", "8") if trial.suggest_categorical("kind", ("a", "b")) == "a" else ("4",))
    return tiny(model__interaction__hidden_units=units, fit__epochs="1", workers="0")


def conditional(trial: Any) -> RunConfig:
    """Every kind has a parameter of its own."""
    kind = trial.suggest_categorical("kind", ("a", "b", "c", "d", "e", "f"))
    units = trial.suggest_categorical(f"units_{kind}", ("16", "8"))
    return tiny(model__interaction__hidden_units=units, fit__epochs="1", workers="0")


def encodes(trial: Any) -> Candidate:
    """Also minimum counts."""
    return Candidate(run=small(trial), name="tiny", min_count=trial.suggest_categorical("min_count", (1, 3)), numeric="log")


def data_options(folder: Path) -> DataOptions:
    """Of :func:`tests.clicks.write`."""
    return DataOptions(schema=folder / "schema.json", valid=str(folder / "valid.parquet"), test=str(folder / "test.parquet"))


def run(
    folder: Path,
    out: Path,
    space: Any = small,
    *,
    storage: str | None = None,
    workers: int = 1,
    resume: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """A search on the rows of :func:`tests.clicks.write`."""
    config = SearchConfig(**{**OPTIONS, **options})
    return search(
        str(folder / "train.parquet"),
        out,
        data_options(folder),
        config=config,
        space=space,
        storage=storage,
        workers=workers,
        resume=resume,
    )


if __name__ == "__main__":
    from tests.search import spaces  # by its own name, which other processes know

    data, out, trials, workers = sys.argv[1:5]
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    url = sys.argv[5] if len(sys.argv) > 5 else None
    few: dict[str, Any] = {"smallest": 300, "finalists": 1, "finish_seeds": 1}
    spaces.run(Path(data), Path(out), spaces.slow, trials=int(trials), workers=int(workers), storage=url, **few)
