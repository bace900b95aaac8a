"""AutoML: a search over models and how to train them, within a budget, by any number of workers; resumable. Uses Optuna."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import socket
import statistics
import time
from collections.abc import Mapping
from dataclasses import replace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.study import Study

from ctrlib.config import ConfigError, positive, to_json
from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, RunConfig, configure, open_store, torch_device
from ctrlib.files import discard_unfinished, json_text, new_folder, write_json
from ctrlib.models.presets import preset
from ctrlib.schema import DataError, DenseField
from ctrlib.search.budget import seconds_of
from ctrlib.search.fidelity import fractions
from ctrlib.search.finish import finish
from ctrlib.search.outcome import facts, finalists
from ctrlib.search.sampling import opened_storage, take_up_lost
from ctrlib.search.select import described
from ctrlib.search.space import ENCODINGS, MODELS, AutoSpace, Draw, Fixed, Portfolio, Space, candidate_of
from ctrlib.search.trials import OutOfTimeError, Stores, estimate, latency_ms, settled, train_on, trial_seed, untrained
from ctrlib.search.worker import SearchConfig, Work, quiet, run_workers, wait_for_others

__all__ = ["MODELS", "SearchConfig", "Space", "search", "seconds_of", "tune"]

_log = logging.getLogger("ctrlib")
_NOISE_SEEDS = 3
_CLOCK = "elapsed-"
_ENCODING = "encoding.json"
_LARGEST_ENCODING = 0.2  # of the budget: what encoding the rows in other ways may take
_PROBES = 3  # points of a user's space, of which one may be slow by chance


def search(
    data: object,
    out: str | Path,
    options: DataOptions | None = None,
    *,
    config: SearchConfig,
    space: Space | None = None,
    storage: str | None = None,
    workers: int = 1,
    resume: bool = False,
) -> dict[str, Any]:
    """Find the model, and the training of it, that do best on the validation rows within a budget; train it, and compare.

    The test rows are read once, at the very end, by the models that are handed over.

    Args:
        data: raw rows or a store, see :func:`ctrlib.experiment.train`. Minimum counts and numeric encodings are searched over
            only where it is a path of raw rows.
        out: folder: ``store/``, ``study.journal`` (unless there is a ``storage``), ``finish/`` with the runs of the finalists,
            ``best/``, the artifact of the best, ``report.json``, ``report.md``, ``report.html``, ``curve.png``.
        options: see :class:`~ctrlib.experiment.DataOptions`.
        config: see :class:`SearchConfig`.
        space: ``space(trial)`` → :class:`~ctrlib.search.space.Candidate` or :class:`~ctrlib.experiment.RunConfig`; ``None``:
            :class:`~ctrlib.search.space.AutoSpace`. With several workers it must be a function of an imported module.
        storage: URL of a data base that several machines share, e.g. ``postgresql://…``: the same call on each of them, with an
            ``out`` of its own, works on one study. ``None``: a journal file in ``out``.
        workers: processes on this machine.
        resume: go on with the search at ``out``; its budget counts what was used before.

    Returns:
        What ``report.json`` holds.

    Raises:
        ConfigError: unknown options; the budget is too small for one trial; a latency limit that no model meets; the storage
            cannot be reached; ``out`` holds another search; no trial succeeded.
        DataError: see :func:`ctrlib.experiment.train`; ``out`` exists, and not ``resume``.
    """
    options, target = options or DataOptions(), Path(out)
    positive("workers", workers)
    if space is not None:
        _check_space(space, config.seed, workers)
    budget = config.spending(workers)
    torch_device(config.device)
    asked = {name: value for name, value in to_json(config).items() if name not in ("budget", "trials")}
    asked |= {"space": "auto" if space is None else _name(space), "data": described(data, options)}
    if storage is not None:
        with opened_storage(storage, target):  # before anything is written
            pass
    new = _claim(target, asked, resume)
    try:
        store = _store(data, target, options)
        content = {"encoder": store.encoder.hash, "rows": store.rows}  # the same wherever the files are
        _same_data(target, content)
        if space is None:
            _check_latency(config, store)
    except BaseException:
        if new:  # there is nothing in it to go on with
            shutil.rmtree(target)
        raise
    study_name = "ctrlib-" + hashlib.sha256(json_text({**asked, "data": content}).encode()).hexdigest()[:16]
    searched = space or _auto(config, store, _raw(data, options) is not None and _has_time_to_encode(target, config))
    work = Work(
        config=config,
        budget=budget,
        space=searched,
        portfolio=space is None,
        stores=Stores(base=store.path, folder=target / "stores", raw=_raw(data, options)),
        rungs=fractions(store.rows["train"], config.smallest),
        storage=storage,
        journal=target / "study.journal",
        study=study_name,
        began=time.time(),
        clock=_clock(target),
    )
    with quiet(), opened_storage(storage, work.journal) as held:
        study = optuna.create_study(
            study_name=study_name,
            storage=held,
            direction="minimize" if config.metric == "log_loss" else "maximize",
            load_if_exists=True,
        )
        lost = take_up_lost(study)
        if lost:
            _log.info("%d trials were cut off; they are taken up again", lost)
        if config.budget is not None and not study.get_trials(deepcopy=False):
            budget.check(*_probe(work, store))
        work = replace(work, began=time.time() - _used(study, work, workers))
        if "noise" not in study.user_attrs:
            study.set_user_attr("noise", _noise(work, store))
        work.tick(study)
        run_workers(work, workers)
        if wait_for_others(study, work):  # one of them died, and left a trial
            run_workers(work, workers)
        chosen, left_out = finalists(study, work)
        report = finish(
            chosen,
            work.space,
            work.stores,
            target,
            metric=config.metric,
            seeds=config.finish_seeds,
            seed=config.seed,
            workers=workers,
            facts=facts(study, work, left_out),
        )
        work.tick(study)
        return report


tune = search
"""The name at the top of the package, where ``ctrlib.search`` is the package of searches."""


def _check_space(space: Space, seed: int, workers: int) -> None:
    """Raise :class:`~ctrlib.config.ConfigError` where no worker could ask the space anything. A point that is no valid model is
    another matter: its trial fails and says why."""
    if workers > 1:
        try:
            ForkingPickler.dumps(space)  # as it goes to them
        except Exception as error:
            raise ConfigError(
                f"the space {_name(space)} cannot be sent to {workers} workers ({error!s:.200}); expected a function of an "
                "imported module, or one worker"
            ) from error
    try:
        space(Draw(np.random.default_rng([seed, 0])))
    except AttributeError as error:
        if isinstance(getattr(error, "obj", None), Draw):
            raise ConfigError(
                f"the space {_name(space)} asks its trial for {error.name!r}; expected suggest_float, suggest_int, "
                "suggest_categorical and set_user_attr only"
            ) from error
    except Exception:
        return


def _name(space: Space) -> str:
    return f"{getattr(space, '__module__', '')}.{getattr(space, '__qualname__', type(space).__qualname__)}"


def _claim(target: Path, asked: Mapping[str, Any], resume: bool) -> bool:
    """Make the folder (then it is new), or see that what is in it is this very search."""
    path = target / "search.json"
    if not target.exists():
        with new_folder(target) as part:
            write_json(part / path.name, asked)
        return True
    if not path.is_file():
        raise DataError(f"{target} exists already, and is not a search to go on with; choose another folder, or remove it")
    if not resume:
        raise DataError(f"{target} holds a search already; go on with it (--resume), or choose another folder")
    if json.loads(path.read_text(encoding="utf-8")) != json.loads(json_text(asked)):
        raise ConfigError(f"{target} holds a search with other settings or of other data (see {path}); choose another folder")
    return False


def _same_data(target: Path, content: Mapping[str, Any]) -> None:
    path = target / "data.json"
    if not path.is_file():
        write_json(path, content)
    elif json.loads(path.read_text(encoding="utf-8")) != json.loads(json_text(content)):
        raise ConfigError(f"{target} holds a search on other data (see {path}); choose another folder")


def _store(data: object, target: Path, options: DataOptions) -> Store:
    prepared = target / "store"
    if not Store.is_store(prepared):
        discard_unfinished(prepared)
    if Store.is_store(prepared):
        store = Store.open(prepared)
    else:
        started = time.perf_counter()
        store = open_store(data, prepared, options)
        write_json(target / _ENCODING, {"seconds": time.perf_counter() - started})
    missing = [split for split in ("train", "valid", "test") if split not in store.rows]
    if missing:
        raise DataError(f"a search needs training, validation and test rows; store {store.path} has no {', '.join(missing)}")
    return store


def _raw(data: object, options: DataOptions) -> tuple[str, DataOptions] | None:
    """Raw rows that can be read again, by any process."""
    rows = [rows for rows in (data, options.valid, options.test) if rows is not None]
    if not all(isinstance(r, str | Path) and not Store.is_store(r) for r in rows):
        return None
    return str(data), options


def _has_time_to_encode(target: Path, config: SearchConfig) -> bool:
    """Whether encoding the rows in every way that the default space has would take a small part of the budget, by the time that
    the first encoding took."""
    path = target / _ENCODING
    if config.budget is None or not path.is_file():
        return True
    seconds = float(json.loads(path.read_text(encoding="utf-8"))["seconds"])
    fits = ENCODINGS * seconds <= _LARGEST_ENCODING * config.budget
    if not fits:
        _log.info("encoding the rows takes %.3g s, too long to try %d ways of it within the budget", seconds, ENCODINGS)
    return fits


def _auto(config: SearchConfig, store: Store, encodes: bool) -> AutoSpace:
    encoder = store.encoder
    return AutoSpace(
        models=config.models,
        rows=store.rows["train"],
        table_rows=sum(v.size for v in encoder.vocabularies.values()),
        encodes=encodes,
        numbers=any(isinstance(f, DenseField) for f in encoder.schema.fields),
        device=config.device,
    )


def _check_latency(config: SearchConfig, store: Store) -> None:
    """Logistic regression is the fastest model there is."""
    if config.latency_ms is None:
        return
    run = RunConfig(model=preset("lr"), device=config.device)
    fastest = latency_ms(untrained(store, run.model, run), store)
    if fastest > config.latency_ms:
        raise ConfigError(
            f"latency_ms is {config.latency_ms:g}, and logistic regression, the fastest model, takes {fastest:.3g} ms for 100 "
            "rows here; expected a limit above that"
        )


def _default(work: Work) -> RunConfig:
    """What the noise of seeds is measured with, and the time of a trial of the default space."""
    if work.portfolio:
        draws = Portfolio().draws(work.space)
        if draws:
            candidate = candidate_of(work.space(Fixed(draws[0].params)))
            return settled(candidate.run, work.config.metric, False)
    return settled(configure("dnn", options={"device": work.config.device}, epochs=5), work.config.metric, False)


def _probe(work: Work, store: Store) -> tuple[float, float]:
    """Estimated seconds of a trial on the lowest rung and on all rows: of the fastest of some points of a user's own space."""
    found = []
    for number in range(0 if work.portfolio else _PROBES):
        try:
            candidate = candidate_of(work.space(Draw(np.random.default_rng([work.config.seed, number]))))
            run = settled(candidate.run, work.config.metric, False)
            found.append((estimate(store, run, 1.0), estimate(store, run, work.rungs[0])))
        except Exception:  # a point that cannot be: its trial will say why
            continue
    if not found:
        run = _default(work)
        found.append((estimate(store, run, 1.0), estimate(store, run, work.rungs[0])))
    whole, trial = min(found)
    return trial, whole


def _clock(target: Path) -> str:
    """The attribute of a study that holds how long a search in this folder of this machine has been at work."""
    return _CLOCK + hashlib.sha256(f"{socket.gethostname()}:{target.resolve()}".encode()).hexdigest()[:12]


def _used(study: Study, work: Work, workers: int) -> float:
    """Seconds that calls before this one took of the budget; other machines have budgets of their own."""
    if any(name.startswith(_CLOCK) for name in study.user_attrs):
        return float(study.user_attrs.get(work.clock, 0.0))
    # a study of an earlier version kept the seconds of trials only
    return sum(float(t.user_attrs.get("seconds", 0.0)) for t in study.get_trials(deepcopy=False)) / workers


def _noise(work: Work, store: Store) -> float | None:
    """Standard deviation of the metric over seeds, of one and the same settings on the lowest rung; ``None``: there was no time
    for two of them."""
    run, metric, values = _default(work), work.config.metric, list[float]()
    _log.info("noise of seeds, on %.3g of the rows", work.rungs[0])
    deadline = None if work.budget.noise is None else time.monotonic() + work.budget.noise
    for i in range(_NOISE_SEEDS):
        seed = trial_seed(work.config.seed, 2**31 + i)
        try:
            found = train_on(store, run, work.rungs[0], metric=metric, seed=seed, deadline=deadline)
        except OutOfTimeError:
            break
        values.append(found.value)
        if deadline is not None and time.monotonic() + found.seconds > deadline:  # the next would not be done by then
            break
    return statistics.stdev(values) if len(values) > 1 else None
