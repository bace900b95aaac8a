"""A whole run as one call: raw data → split → encoder → store → model → best weights → metrics → artifact.

Every command of ``ctrlib`` is one function here.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import resource
import runpy
import shutil
import statistics
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ctrlib import artifact
from ctrlib import export as exporting
from ctrlib.calibration import (
    Calibration,
    choose_calibration,
    fit_calibration,
    plot_reliability,
    reliability,
    sampling_intercept,
    sigmoid,
)
from ctrlib.config import ConfigError, check_choice, check_not_negative, check_seed, override, positive, to_json
from ctrlib.data.encoder import Encoder, as_lists
from ctrlib.data.loader import EVALUATION_ROWS, Loader, StreamLoader
from ctrlib.data.memory import half_of_free_mb
from ctrlib.data.source import Source, decoded, open_source
from ctrlib.data.split import SplitBy, split_rows
from ctrlib.data.store import Store
from ctrlib.data.synthetic import write_splits
from ctrlib.files import check_new_folder, json_text, new_folder, write_json
from ctrlib.memory import model_cross_memory
from ctrlib.metrics import by_segment, ece, log_loss
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS, preset
from ctrlib.optim import OptimizerConfig
from ctrlib.ranking_metrics import by_history_length, history_segments
from ctrlib.schema import BatchLayout, DataError, Schema, SequenceField, SparseField
from ctrlib.training import Batches, FitConfig, evaluate, fit, measure, predict, seed_everything

_log = logging.getLogger("ctrlib")

# What the demo sets: one pass of a cosine over three epochs, a smaller and less dropped-out MLP than DeepFM's, a firm prior.
DEMO = {
    "batch_size": "1024",
    "ridge": "300",
    "fit.epochs": "3",
    "fit.patience": "None",
    "fit.optimizer.learning_rate": "4e-3",
    "fit.schedule.name": "cosine",
    "fit.schedule.warmup_steps": "400",
    "model.embedding.init_std": "0.05",
}
DEMO_DEEPFM = {
    **DEMO,
    "model.embedding.dim": "16",
    "model.interaction.streams.1.hidden_units": "256,128",
    "model.interaction.streams.1.dropout": "0.3",
}

SHARES: Mapping[str, float] = {"train": 0.8, "valid": 0.1, "test": 0.1}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Everything that decides a run besides the data.

    Args:
        model: see :mod:`ctrlib.models.presets`.
        fit: see :class:`~ctrlib.training.FitConfig`.
        batch_size: training rows a step; ``None``: about 1/256 of the rows, a power of two from 256 to 4096.
        ridge: strength of a Gaussian prior on the embedding tables, (ridge/2)·‖W‖² over all training rows together: adds
            ridge/rows to ``fit.optimizer.embedding_l2``, and so means the same for little data and for much. 0: none.
        device: ``auto`` takes a CUDA GPU where there is one.
        workers: threads that prepare batches; the batches do not depend on it.
        memory_mb: of encoded rows held in memory; more rows are shuffled in windows, to the same batches; ``None``: half of
            what is free.
        pretrained: files of vectors by vocabulary (the name of its field), with columns ``value`` and ``vector`` (lists of
            numbers as wide as ``model.embedding.dims`` says); with ``model.embedding.frozen`` they are not trained further.
    """

    model: ModelComponent.Config
    fit: FitConfig = field(default_factory=FitConfig)
    batch_size: int | None = None
    ridge: float = 100.0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int = 1
    memory_mb: float | None = None
    pretrained: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.batch_size is not None:
            positive("batch_size", self.batch_size)
        check_not_negative("ridge", self.ridge)
        check_choice("device", self.device, ("auto", "cpu", "cuda"))
        check_not_negative("workers", self.workers)
        if self.memory_mb is not None:
            positive("memory_mb", self.memory_mb)

    def for_rows(self, rows: int) -> RunConfig:
        """The same with ``batch_size`` and the L2 settled for so many training rows (and ``ridge`` 0, since it is in them).

        Raises:
            ConfigError: a batch would have a single row.
        """
        batch_size = self.batch_size or min(max(2 ** round(math.log2(max(rows / 256, 1))), 256), 4096)
        if min(batch_size, rows) == 1:
            raise ConfigError(
                "a training batch would have a single row, which has no statistics; give more rows, or batch_size=2"
            )
        optimizer = self.fit.optimizer
        optimizer = replace(optimizer, embedding_l2=optimizer.embedding_l2 + self.ridge / rows)
        return replace(self, batch_size=batch_size, ridge=0.0, fit=replace(self.fit, optimizer=optimizer))


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How raw data becomes a store.

    Args:
        label: the label column(s); needed where there is no schema.
        schema: a file or a :class:`~ctrlib.schema.Schema`; ``None``: inferred.
        valid, test: raw files of those rows; ``None``: cut from the data.
        split: how they are cut, see :func:`~ctrlib.data.split.split_rows`.
        shares: of training, validation and test rows, where they are cut.
        group, time, weight: columns, for an inferred schema.
        seed: of a random split.
        stream: :func:`train` encodes while it trains instead of writing a store first: the same batches, less disk, more time.
        cross_min_count, cross_max_size, cross_hash_size: if any of them is given, the crosses of all fields of categories are
            added with these options (:meth:`.Schema.with_crosses`); else there are no crosses but those of the schema.
        cross_memory_mb: what crosses may take, while they are counted (:meth:`.Encoder.fit`) and in training; ``None``: half
            of the free memory while they are counted, all of it in training on the CPU.
    """

    label: str | tuple[str, ...] | None = None
    schema: str | Path | Schema | None = None
    valid: object = None
    test: object = None
    split: SplitBy = "auto"
    shares: Mapping[str, float] = field(default_factory=lambda: SHARES)
    group: str | None = None
    time: str | None = None
    weight: str | None = None
    seed: int = 0
    stream: bool = False
    cross_min_count: int | None = None
    cross_max_size: int | None = None
    cross_hash_size: int | None = None
    cross_memory_mb: float | None = None

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for option, value in self.crossing.items():
            positive(f"cross_{option}", value)
        if self.cross_memory_mb is not None:
            positive("cross_memory_mb", self.cross_memory_mb)
        if self.cuts and self.valid is not None and self.test is not None:
            raise DataError("nothing is to be cut where valid and test rows are given; leave split and shares out")

    @property
    def cuts(self) -> bool:
        """Whether it is said how rows are to be cut."""
        return self.split != "auto" or dict(self.shares) != dict(SHARES)

    @property
    def labels(self) -> tuple[str, ...]:
        """``label`` as a tuple; empty if none is named."""
        return (self.label,) if isinstance(self.label, str) else self.label or ()

    @property
    def crossing(self) -> dict[str, int]:
        """What :meth:`.Schema.with_crosses` is to be given; empty if no crosses are to be added."""
        given = {"min_count": self.cross_min_count, "max_size": self.cross_max_size, "hash_size": self.cross_hash_size}
        return {option: value for option, value in given.items() if value is not None}


def _given_schema(table: Source, options: DataOptions) -> Schema | None:
    """The schema that the options name, with their labels and roles; ``None`` if it is to be inferred."""
    roles = {role: value for role in ("group", "time", "weight") if (value := getattr(options, role)) is not None}
    if options.schema is None:
        if not options.labels:
            raise DataError(f"which column of {table.name} is the label? name it (--label) or give a schema (--schema)")
        table.require(options.labels, ", named as label")
        return None
    schema = options.schema if isinstance(options.schema, Schema) else Schema.load(options.schema)
    schema = replace(schema, labels=options.labels or schema.labels, **roles)
    _require(table, schema)
    return schema


def _inferred_schema(rows: Source, options: DataOptions) -> Schema:
    schema = Schema.infer(rows, options.labels, group=options.group, time=options.time, weight=options.weight)
    for name, reason in schema.ignored.items():
        _log.info("column %r is not used: %s", name, reason)
    return schema


def _require(table: Source, schema: Schema) -> None:
    """Raise :class:`DataError` for the first column that encoding would miss, before any long work."""
    table.require(schema.labels, ", named as label")
    table.require(schema.inputs, ", which the schema declares as a field")
    table.require([c for c in (schema.weight, schema.group) if c is not None], ", named as weight or group")


def prepare(data: object, out: str | Path, options: DataOptions) -> Store:
    """Split, infer a schema and fit the encoder on the training rows, and encode everything once.

    Args:
        data: the training rows, or all rows where ``valid`` or ``test`` are to be cut from them.
        out: folder of the new store.
        options: see :class:`DataOptions`.

    Raises:
        DataError: neither schema nor label, missing columns, shares that do not sum to 1; see also :meth:`.Schema.infer`,
            :meth:`.Encoder.fit` and :meth:`.Store.create`.
    """
    check_new_folder(out)  # a place that cannot be written should not come out only after the encoder is fitted
    encoder, sources = _fit_encoder(data, options)
    return Store.create(out, encoder, sources)


def _fit_encoder(data: object, options: DataOptions) -> tuple[Encoder, dict[str, Source]]:
    """The encoder, fitted on the training rows, and the raw rows by split."""
    table = open_source(data, "the table")
    if table.num_rows == 0:
        raise DataError(f"{table.name} has a header but no rows; expected at least one")
    schema = _given_schema(table, options)
    given = {name: open_source(raw) for name, raw in (("valid", options.valid), ("test", options.test)) if raw is not None}
    # With validation rows but no test rows given, every row of the data is for training.
    cut = ["train"] if "valid" in given else [name for name in SHARES if name not in given]
    parts = {"train": table}
    if len(cut) > 1:
        for name in cut:
            if not 0 < options.shares[name] <= 1:
                raise DataError(f"the share of {name} rows is {options.shares[name]:g}; expected above 0, and at most 1")
        if not abs(sum(options.shares.values()) - 1) <= 1e-9:
            raise DataError(f"the shares are {', '.join(map(str, options.shares.values()))}; expected numbers that sum to 1")
        total = sum(options.shares[name] for name in cut)
        shares = {name: options.shares[name] / total for name in cut}
        parts = split_rows(table, shares, by=options.split, time=schema.time if schema else options.time, seed=options.seed)
    schema = schema or _inferred_schema(parts["train"], options)
    if options.crossing:
        schema = schema.with_crosses("all", **options.crossing)
    for source in given.values():
        _require(source, schema)
    encoder = Encoder.fit(schema, parts["train"], cross_memory_mb=options.cross_memory_mb)
    return encoder, {**parts, **given}


def configure(
    model: str, flavour: str = "paper", options: Mapping[str, str] | None = None, epochs: int | None = None
) -> RunConfig:
    """The run of a preset with options set by dotted path.

    Args:
        model: a name in :data:`~ctrlib.models.presets.PRESETS`.
        flavour: ``paper``, ``fuxictr`` or ``official``.
        options: e.g. ``{"model.interaction.num_layers": "4", "fit.optimizer.learning_rate": "3e-4"}``.
        epochs: at most this many.

    Raises:
        ConfigError: an unknown model, flavour or option; names the nearest.
    """
    config = override(RunConfig(model=preset(model, flavour)), options or {}, COMPONENTS)
    return config if epochs is None else replace(config, fit=replace(config.fit, epochs=epochs))


def train(
    data: object,
    config: RunConfig,
    out: str | Path,
    options: DataOptions | None = None,
    *,
    name: str = "model",
    seed: int = 0,
    start: Mapping[str, torch.Tensor] | None = None,
    test: bool = True,
) -> dict[str, Any]:
    """Train, evaluate and save one model.

    Args:
        data: raw rows, see :func:`prepare`, or the folder of a store (or a :class:`~ctrlib.data.store.Store`).
        config: see :func:`configure`.
        out: folder of the new run: ``artifact/``, ``config.json``, ``history.jsonl``, ``metrics.json``.
        options: see :class:`DataOptions`; a store is compared with what they name, and has splits of its own.
        name: of the model, for the report.
        seed: of initial weights, dropout and the order of rows.
        start: a ``state_dict`` of the model, from which training starts instead of random weights.
        test: whether to evaluate on the test rows; a search that compares many runs must not.

    Returns:
        What ``metrics.json`` holds.

    Raises:
        DataError, ConfigError: see the functions above.
        TrainingDivergedError: the loss is not finite.

    After an error nothing is at ``out``; weights trained until then are in ``<out>.part/best.safetensors``. Ctrl-C while the
    model trains is no error: the run is whole, with the best weights so far, and the report says ``"interrupted": true``.
    """
    options = options or DataOptions()
    check_seed(seed)
    for frozen in config.model.embedding.frozen:
        if frozen not in config.pretrained:
            raise ConfigError(
                f"embedding.frozen names {frozen!r}, which has no pretrained vectors; set pretrained.{frozen}=FILE"
            )
    device = torch_device(config.device)
    with new_folder(out) as part:
        return _train(data, config, part, options, name, seed, device, start, ("valid", "test") if test else ("valid",))


def _train(
    data: object,
    config: RunConfig,
    part: Path,
    options: DataOptions,
    name: str,
    seed: int,
    device: torch.device,
    start: Mapping[str, torch.Tensor] | None,
    evaluated: Sequence[str],
) -> dict[str, Any]:
    started = time.perf_counter()
    encoder, row_counts, loader = _stream(data, options) if options.stream else _stored(data, part / "store", options)
    labels = encoder.schema.labels
    config = config.for_rows(row_counts["train"])
    assert config.batch_size is not None
    write_json(part / "config.json", _run_config(name, seed, config))

    check_cross_memory(config.model, encoder.layout, config.fit.optimizer, options.cross_memory_mb, device=device)
    seed_everything(seed)
    model = build_model(config.model, encoder.layout).to(device)
    for field_name, file in config.pretrained.items():
        _load_pretrained(model, encoder, field_name, file)
    if start is not None:
        try:
            model.load_state_dict(start)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ConfigError(
                f"the weights to start from do not fit the model {name!r} on this data ({reason:.200})"
            ) from error
    pin = device.type == "cuda"
    at_once = max(config.batch_size, EVALUATION_ROWS * (4 if pin else 1))  # a GPU has no such cache, but waits for each batch
    loaders = {
        split: loader(split, at_once, shuffle=False, seed=0, config=config, pin=pin)
        for split in evaluated
        if split in row_counts
    }
    if options.stream:  # a value that cannot be encoded should not come out only after an epoch, or after training
        for rows in loaders.values():
            deque(rows, 0)
    rows = loader("train", config.batch_size, shuffle=True, seed=seed, config=config, pin=pin)
    result = fit(model, rows, loaders.get("valid"), config.fit, out=part, title=name, label_names=labels)

    report: dict[str, Any] = {
        "model": name,
        "seed": seed,
        "rows": dict(row_counts),
        "epochs": result.epochs,
        "best_epoch": result.best_epoch,
        "parameters": sum(p.numel() for p in model.parameters()),
        "interrupted": result.interrupted,
        # the model sees the test rows here for the first time, once, with the weights that validation chose
        **{split: evaluate(model, loader, label_names=labels) for split, loader in loaders.items()},
        "rows_per_second": result.rows_per_second,
        "seconds": time.perf_counter() - started,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    artifact.save(part / "artifact", encoder, model, config.model)
    write_json(part / "metrics.json", report)
    (part / "best.safetensors").unlink(missing_ok=True)  # the artifact has them
    shutil.rmtree(part / "store", ignore_errors=True)
    return report


def check_cross_memory(
    model: ModelComponent.Config,
    layout: BatchLayout,
    optimizer: OptimizerConfig,
    limit_mb: float | None = None,
    *,
    device: torch.device | str = "cpu",
) -> None:
    """See that the rows that a model has for crosses leave room to train it, before it is built.

    Args:
        limit_mb: what they may take; ``None``: the free memory of the device. A model is built on the CPU wherever it is
            trained, so the free memory of the machine has to hold its weights all the same.
        device: to train on.

    Raises:
        DataError: they would take more; says what to change.
    """
    if all(c.parts is None for c in layout.sparse):
        return
    with torch.device("meta"):
        memory = model_cross_memory(build_model(model, layout), layout, optimizer)
    device = torch.device(device)
    in_training = f"in training with fit.optimizer.embedding={optimizer.embedding!r}"
    rooms: list[tuple[int, str, float, str]] = []
    if limit_mb is not None:
        rooms.append((memory.total, in_training, limit_mb, "allowed are {:,.0f} MB (cross_memory_mb)"))
    elif device.type == "cuda":
        rooms.append((memory.total, in_training, _free_on_gpu_mb(device), f"free on {device} are {{:,.0f}} MB"))
    if device.type != "cpu":
        rooms.append((memory.weights, "before the model is on its device", 2 * half_of_free_mb(), "free are {:,.0f} MB"))
    elif limit_mb is None:
        rooms.append((memory.total, in_training, 2 * half_of_free_mb(), "free are {:,.0f} MB"))
    for needed, when, room_mb, room in rooms:
        if needed > room_mb * 2**20:
            raise DataError(
                f"the crosses have {memory.rows:,} values, which take {needed / 2**20:,.0f} MB {when}; {room.format(room_mb)}. "
                "Raise their min_count, set max_size or hash_size, cross fewer fields, lower the width of the model's vectors, "
                "or take an optimizer that keeps less"
            )


def _free_on_gpu_mb(device: torch.device) -> float:
    """What the GPU has, and what torch holds of it without use."""
    free, _ = torch.cuda.mem_get_info(device)
    return (free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)) / 2**20


def _load_pretrained(model: ModelComponent, encoder: Encoder, name: str, file: str) -> None:
    table = open_source(file)
    table.require(["value", "vector"], f"; pretrained vectors of {name!r} need columns value and vector")
    vectors = table.column("vector")
    if not pa.types.is_large_list(vectors.type):
        raise DataError(f"{file}: column 'vector' holds {vectors.type}; expected lists of numbers")
    rows = vectors.to_pylist()
    widths = {len(row) if row is not None else 0 for row in rows}
    if len(widths) != 1:
        raise DataError(f"{file}: the vectors are {', '.join(map(str, sorted(widths)))} wide; expected one width, no nulls")
    values = table.column("value")
    values = decoded(values)
    model.embedding.load_pretrained(name, encoder.ids(name, values.to_pylist()), np.array(rows, dtype=np.float32))


def _run_config(name: str, seed: int, config: RunConfig) -> dict[str, Any]:
    """What ``config.json`` holds."""
    return {"name": name, "seed": seed, **to_json(config)}


class _MakeLoader(Protocol):
    def __call__(self, split: str, batch_size: int, *, shuffle: bool, seed: int, config: RunConfig, pin: bool) -> Batches: ...


def _stored(data: object, scratch: Path, options: DataOptions) -> tuple[Encoder, Mapping[str, int], _MakeLoader]:
    """The encoder, rows by split, and what makes a loader of a split, by way of a store."""
    store = open_store(data, scratch, options)
    if "train" not in store.rows:
        raise DataError(f"store {store.path} has no training rows; it has {', '.join(store.rows)}")

    def make(split: str, batch_size: int, *, shuffle: bool, seed: int, config: RunConfig, pin: bool) -> Loader:
        return Loader(
            store.split(split),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            workers=config.workers,
            memory_mb=config.memory_mb,
            pin_memory=pin,
        )

    return store.encoder, store.rows, make


def _stream(data: object, options: DataOptions) -> tuple[Encoder, Mapping[str, int], _MakeLoader]:
    """As :func:`_stored`, without a store."""
    if isinstance(data, Store) or (isinstance(data, str | Path) and Store.is_store(data)):
        raise DataError(
            f"{data.path if isinstance(data, Store) else data} is a store, encoded already; leave stream out (--stream), "
            "or give the raw rows"
        )
    encoder, sources = _fit_encoder(data, options)

    def make(split: str, batch_size: int, *, shuffle: bool, seed: int, config: RunConfig, pin: bool) -> StreamLoader:
        return StreamLoader(
            encoder,
            sources[split],
            batch_size,
            shuffle=shuffle,
            seed=seed,
            workers=config.workers,
            memory_mb=config.memory_mb,
            pin_memory=pin,
        )

    return encoder, {split: source.num_rows for split, source in sources.items()}, make


def open_store(data: object, scratch: Path, options: DataOptions) -> Store:
    """The store that ``data`` is, or a new one of raw rows.

    Args:
        data: see :func:`train`.
        scratch: folder of the new store.
        options: how raw rows become a store; a store is compared with what they name, and has splits of its own.

    Raises:
        DataError: a store made with other options; see also :func:`prepare`.
    """
    if isinstance(data, Store):
        store = data
    elif isinstance(data, str | Path) and Store.is_store(data):
        schema = Schema.load(options.schema) if isinstance(options.schema, str | Path) else options.schema
        store = Store.open(data, schema=schema)
    else:
        return prepare(data, scratch, options)
    if options.valid is not None or options.test is not None:
        raise DataError(f"store {store.path} has splits of its own ({', '.join(store.rows)}); leave valid and test out")
    if options.cuts:
        raise DataError(f"store {store.path} has splits of its own ({', '.join(store.rows)}); leave split and shares out")
    has = store.encoder.schema
    if options.crossing:
        named = ", ".join(f"cross_{option}" for option in options.crossing)
        raise DataError(
            f"store {store.path} is encoded already, and no cross can be added to it; leave {named} out, or prepare "
            "the raw rows again"
        )
    roles = ("group", "time", "weight")
    asked = {"label": options.labels or None, **{role: getattr(options, role) for role in roles}}
    found = {"label": has.labels, **{role: getattr(has, role) for role in roles}}
    for role, value in asked.items():
        if value is not None and value != found[role]:
            raise DataError(f"store {store.path} was prepared with {role} {found[role]!r}, not {value!r}; prepare it again")
    return store


def torch_device(name: str) -> torch.device:
    """The device of :attr:`RunConfig.device`.

    Raises:
        ConfigError: a GPU is asked for, and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is 'cuda', but this torch sees no CUDA GPU; set device=cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def evaluate_run(run: str | Path, data: object, *, by: str | None = None) -> dict[str, Any]:
    """Metrics of a saved model, with its calibration if it has one, on raw rows or on the test rows of a store.

    Args:
        run: a run or artifact folder.
        data: rows with labels, or a store made by the same encoder.
        by: a column; adds ``"segments"``, one entry per value (deciles of a number with over 50 values). Of a column of
            lists it is one per bucket of their lengths; with a group in the data, those of
            :func:`ctrlib.ranking_metrics.by_history_length`.

    Raises:
        DataError: the data lacks a column, or the store was made by another encoder.
        ConfigError: the model is one of nodes.
    """
    loaded = artifact.load(run)
    loaded.require_rows("evaluate")
    labels = loaded.schema.labels
    if isinstance(data, str | Path) and Store.is_store(data):
        store = Store.open(data)
        if store.encoder.hash != loaded.encoder.hash:
            raise DataError(f"store {data} was made by another encoder than the model's; evaluate on raw rows instead")
        if by is not None:
            raise DataError("a store holds ids, not raw values; evaluate on raw rows to see segments (--by)")
        return measure(loaded.calibrated(predict(loaded.model, Loader(store.split("test"), EVALUATION_ROWS))), labels)
    table = open_source(data, "the table")
    if table.num_rows == 0:
        raise DataError(f"{table.name} has no rows; expected at least one")
    if by is None:
        return measure(loaded.calibrated(predict(loaded.model, loaded.batches(table, labels=True))), labels)
    table.require([by], ", by which to segment")
    if len(labels) > 1:
        raise DataError(f"segments need one label; the model predicts {', '.join(labels)}")
    lengths = _lengths(table, by, loaded.schema)
    segments: Sequence[object] = _segments(table, by) if lengths is None else history_segments(lengths)
    seen = loaded.calibrated(predict(loaded.model, loaded.batches(table, labels=True)))
    assert seen.labels is not None
    if lengths is not None and seen.group is not None:
        found = by_history_length(lengths, seen.labels, seen.logits, seen.group)
    else:
        found = by_segment(segments, seen.labels, seen.probability, weight=seen.weight)
    return measure(seen) | {"segments": found}


def calibrate_run(
    run: str | Path,
    data: object,
    *,
    method: str = "auto",
    sampling_rate: float = 1.0,
    plot: str | Path | None = None,
) -> dict[str, Any]:
    """Fit a calibration on validation rows and keep it in the artifact, in place of one that it had.

    Args:
        run: a run or artifact folder.
        data: validation rows with labels, or the store of the training run, of which the validation rows are read. Never test
            rows: what is measured on them would be too good.
        method: ``auto`` (the least log loss, see :func:`.choose_calibration`), ``none``, ``temperature``, ``platt``,
            ``isotonic``.
        sampling_rate: see :func:`.fit_calibration`.
        plot: a PNG with the reliability before and after.

    Returns:
        By label: ``method``, ``ece`` and ``log_loss`` before and after on these rows (of ``auto`` also ``compared``, log losses
        of each method on rows that it was not fitted on).

    Raises:
        DataError, ConfigError: see :func:`evaluate_run` and :func:`.fit_calibration`.
    """
    loaded = artifact.load(run)
    loaded.require_rows("calibrate")
    if isinstance(data, str | Path) and Store.is_store(data):
        store = Store.open(data)
        if store.encoder.hash != loaded.encoder.hash:
            raise DataError(f"store {data} was made by another encoder than the model's; calibrate on raw rows instead")
        if "valid" not in store.rows:
            raise DataError(f"store {data} has no validation rows to calibrate on; prepare it with some")
        seen = predict(loaded.model, Loader(store.split("valid"), EVALUATION_ROWS))
    else:
        seen = predict(loaded.model, loaded.batches(open_source(data, "the validation rows"), labels=True))
    assert seen.labels is not None
    found: dict[str, Calibration] = {}
    report: dict[str, Any] = {}
    curves: dict[str, Any] = {}
    for at, label in enumerate(loaded.schema.labels):
        several = seen.logits.ndim == 2
        z, y = (seen.logits[:, at], seen.labels[:, at]) if several else (seen.logits, seen.labels)
        report[label] = {}
        if method == "auto":
            found[label], report[label]["compared"] = choose_calibration(y, z, seen.weight, sampling_rate=sampling_rate)
        else:
            found[label] = fit_calibration(method, y, z, seen.weight, sampling_rate=sampling_rate)
        # of these rows, in which negatives are as rare as in training
        after = found[label].logits(z) - sampling_intercept(sampling_rate)
        report[label]["method"] = found[label].method
        for name, logits in (("before", z), ("after", after)):
            p = sigmoid(logits)
            report[label][name] = {"ece": ece(y, p, weight=seen.weight), "log_loss": log_loss(y, p, seen.weight)}
            curves[name if not several else f"{label} {name}"] = reliability(y, p, seen.weight)
    if plot is not None:
        plot_reliability(plot, curves)
    artifact.calibrate(run, found)
    return report


def export_run(run: str | Path, out: str | Path, format: str = "torch", *, rows: str = "float32") -> dict[str, Any]:
    """Write a saved model as a program for other runtimes: :func:`ctrlib.export.export`."""
    return exporting.export(artifact.load(run), out, format, rows=rows)


def verify_run(
    run: str | Path, data: object, exports: Sequence[str | Path] = (), *, rows: int | None = None
) -> dict[str, dict[str, float]]:
    """Score raw rows by every path and compare with evaluation: :func:`ctrlib.export.verify`."""
    programs = {str(path): exporting.load_export(path) for path in exports}
    return exporting.verify(artifact.load(run), data, programs, rows=rows)


def _lengths(table: Source, by: str, schema: Schema) -> npt.NDArray[np.int64] | None:
    """Values in every list of a column, or of text that the schema cuts; a missing list has none. ``None``: no such column."""
    f = next((f for f in schema.fields if f.name == by and isinstance(f, SequenceField)), None)
    if f is None and not (pa.types.is_list(table.types[by]) or pa.types.is_large_list(table.types[by])):
        return None
    lists = table.column(by) if f is None else as_lists(f, table.column(by), partial(_row_of, table, by))
    lengths: npt.NDArray[np.int64] = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
    return lengths


def _row_of(table: Source, by: str, row: int) -> str:
    return f"column {by!r}, {table.locate(row)}"


def _segments(table: Source, by: str) -> list[object]:
    """The segment of every row: the value itself, or the decile of a number with many values; missing is ``None``."""
    values = decoded(table.column(by))
    if pa.types.is_nested(values.type):
        raise DataError(f"column {by!r} of {table.name} holds {values.type}; segments need one value a row")
    raw: list[Any] = [None if v != v else v for v in values.to_pylist()]  # NaN is missing too
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)) or len(set(raw)) <= 50:
        return raw
    present = np.array([v for v in raw if v is not None], dtype=np.float64)
    edges = np.unique(np.quantile(present, np.linspace(0, 1, 11)))
    # as few digits as tell the edges apart: six would write every timestamp alike
    digits = next(d for d in range(6, 18) if len({f"{e:.{d}g}" for e in edges}) == len(edges))
    names = [f"[{low:.{digits}g}, {high:.{digits}g})" for low, high in itertools.pairwise(edges)]
    names[-1] = names[-1][:-1] + "]"
    decile = iter(np.searchsorted(edges[1:-1], present, side="right").tolist())
    return [None if v is None else names[next(decile)] for v in raw]


def demo(out: str | Path, *, rows: int = 600_000, seed: int = 0) -> dict[str, Any]:
    """Synthetic Criteo-shaped data with planted interactions; DeepFM and, for comparison, logistic regression on it.

    Args:
        out: new folder: ``data/{train,valid,test}.parquet``, ``run/`` (DeepFM), ``lr/``, ``truth.json``.
        rows: of the three splits together.
        seed: of the data and the training.

    Returns:
        ``{"truth": per split bayes_auc, bayes_log_loss, additive_auc, …, "run": …, "lr": …}``; the latter two as from
        :func:`train`. No model can beat ``bayes_auc``; none without interactions can beat ``additive_auc``.

    Raises:
        DataError: the folder exists or cannot be written, or there are too few rows.
    """
    reports: dict[str, Any] = {}
    with new_folder(out) as part:
        truth = write_splits(part / "data", rows, seed)
        write_json(part / "truth.json", truth)
        files = {name: str(part / "data" / f"{name}.parquet") for name in SHARES}
        schema = Schema.infer(files["train"], "label")
        frequent = (replace(f, min_count=10) for f in schema.fields if isinstance(f, SparseField))
        options = DataOptions(schema=schema.with_fields(*frequent), valid=files["valid"], test=files["test"])
        store = prepare(files["train"], part / "store", options)
        for folder, model, settings in (("lr", "lr", DEMO), ("run", "deepfm", DEMO_DEEPFM)):
            reports[folder] = train(store, configure(model, options=settings), part / folder, name=model, seed=seed)
            if reports[folder]["interrupted"]:
                raise KeyboardInterrupt
        shutil.rmtree(part / "store")
    return {"truth": truth, **reports}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A published result to reproduce; an experiment file defines ``experiment() -> Experiment``.

    Args:
        name: e.g. ``frappe/final_mlp``.
        config: the whole run.
        data: makes (or finds) a folder with ``train.parquet``, ``valid.parquet``, ``test.parquet`` and ``schema.json``.
        published: metrics of the publication, by our names.
        note: what differs from the publication.
    """

    name: str
    config: RunConfig
    data: Callable[[], Path]
    published: Mapping[str, float]
    note: str = ""


def run_experiment(file: str | Path, out: str | Path, *, seeds: int = 3, first_seed: int = 2021) -> dict[str, Any]:
    """Run an experiment file over several seeds.

    Args:
        file: a Python file with ``experiment() -> Experiment``.
        out: folder of the runs, ``seed-2021/`` and so on, and of ``results.json``: every run's metrics, mean and standard
            deviation of the test metrics, and the published ones.
        seeds: how many; ``first_seed`` and those after it. Finished runs found at ``out`` are kept.

    Raises:
        DataError: no such file, it defines no experiment, or ``out`` holds runs with other settings.
        KeyboardInterrupt: Ctrl-C; the runs finished before are kept.
    """
    path, target = Path(file).resolve(), Path(out)
    if not path.is_file():
        raise DataError(f"{file}: no such experiment file")
    if seeds < 1:
        raise DataError(f"seeds is {seeds}; expected 1 or more")
    root = next((p for p in path.parents if p.name == "experiments"), path.parent).parent
    if str(root) not in sys.path:
        sys.path.insert(0, str(root))  # experiment files import what they share
    make = runpy.run_path(str(path)).get("experiment")
    if make is None:
        raise DataError(f"{file} defines no function experiment() -> ctrlib.experiment.Experiment")
    experiment: Experiment = make()
    store_path = target / "store"
    if not Store.is_store(store_path):
        folder = experiment.data()
        options = DataOptions(
            schema=folder / "schema.json", valid=str(folder / "valid.parquet"), test=str(folder / "test.parquet")
        )
        target.mkdir(parents=True, exist_ok=True)
        prepare(str(folder / "train.parquet"), store_path, options)
    store = Store.open(store_path)
    settings = experiment.config.for_rows(store.rows["train"])
    runs: list[dict[str, Any]] = []
    for seed in range(first_seed, first_seed + seeds):
        folder = target / f"seed-{seed}"
        if (folder / "metrics.json").is_file():
            done = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            if done != json.loads(json_text(_run_config(experiment.name, seed, settings))):
                raise DataError(f"{folder} was run with other settings than {file} has now; choose another --out or remove it")
            runs.append(json.loads((folder / "metrics.json").read_text(encoding="utf-8")))
        else:
            runs.append(train(store, experiment.config, folder, name=experiment.name, seed=seed))
            if runs[-1]["interrupted"]:  # not what the others are compared with, and no seed is to follow
                shutil.rmtree(folder)
                raise KeyboardInterrupt
        _log.info(
            "%s seed %d: test auc %.6f, log_loss %.6f",
            experiment.name,
            seed,
            runs[-1]["test"]["auc"],
            runs[-1]["test"]["log_loss"],
        )
    results = {
        "experiment": experiment.name,
        "note": experiment.note,
        "published": dict(experiment.published),
        "test": {metric: _mean_std([run["test"][metric] for run in runs]) for metric in ("auc", "log_loss")},
        "valid": {metric: _mean_std([run["valid"][metric] for run in runs]) for metric in ("auc", "log_loss")},
        "config": to_json(experiment.config),
        "runs": runs,
    }
    write_json(target / "results.json", results)
    return results


def _mean_std(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else float("nan")}
