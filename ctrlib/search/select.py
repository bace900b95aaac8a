"""Selection as one call: a method on a data set, what it keeps, and the smaller model, re-trained and compared."""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn

from ctrlib import artifact
from ctrlib.batch import Batch
from ctrlib.config import ConfigError, override, positive, to_json
from ctrlib.data.encoder import Encoder
from ctrlib.data.loader import Loader
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, RunConfig, check_cross_memory, open_store, torch_device, train
from ctrlib.files import discard_unfinished, json_text, new_folder, write_json, write_text
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.optinter import OptInter, field_pairs
from ctrlib.models.presets import COMPONENTS
from ctrlib.plots import figure_class, save_png
from ctrlib.schema import BatchLayout, DataError, Schema, suggest
from ctrlib.search.auto_field import AutoFieldConfig, search_auto_field
from ctrlib.search.auto_fis import AutoFISConfig, auto_fis_block, search_auto_fis, without_closed_pairs
from ctrlib.search.field_gates import FieldGates
from ctrlib.search.importance import (
    GBDTConfig,
    GradientConfig,
    PermutationConfig,
    search_gbdt,
    search_gradient,
    search_permutation,
)
from ctrlib.search.optfs import OptFSConfig, search_optfs, ticket
from ctrlib.search.optinter import OptInterConfig, compact_optinter, search_optinter
from ctrlib.search.ranking import Top, best_fields, kendall_tau
from ctrlib.search.screening import OutRankConfig, search_outrank
from ctrlib.search.selection import Choice, Derived, Selection, apply_to_store, compact, derive, dropped_fields
from ctrlib.training import TrainingDivergedError, predict, seed_everything

_log = logging.getLogger("ctrlib")
_VERIFIED_ROWS = 4 * 8192
# of the largest logit, or of 1 if that is smaller: more is no rounding of float32. OptInter at the size of its preset needs
# 1e-6 (10 fields; the small model sums fewer columns), and more of more fields; AutoFIS and OptFS stay far below
_ROUNDING = 1e-5
_NAMED = 12  # pairs or vocabularies in a line of the report
# what the curve shows beside the selection itself
_SHARES = (0.25, 0.5, 0.75)  # of the fields
_STRENGTHS = (0.1, 0.3, 3.0)  # of a penalty, times its own
_ALIKE: tuple[Choice, ...] = ("factorize", "naive")  # of every pair


@dataclass(frozen=True)
class Method:
    """A way to select.

    Attributes:
        options: its config.
        search: model, store, options, run, seed → what is kept.
        keeps: what it chooses among.
        trains: a model, to search with.
    """

    options: type[Any]
    search: Callable[[ModelComponent.Config, Store, Any, RunConfig, int], Selection]
    keeps: Literal["fields", "values", "pairs"]
    trains: bool = True


def _with_model(search: Callable[..., Selection]) -> Callable[[ModelComponent.Config, Store, Any, RunConfig, int], Selection]:
    def run(model: ModelComponent.Config, store: Store, options: Any, config: RunConfig, seed: int) -> Selection:
        assert config.batch_size is not None
        device = torch_device(config.device)
        return search(model, store, options, fit=config.fit, batch_size=config.batch_size, seed=seed, device=device)

    return run


def _outrank(_: ModelComponent.Config, store: Store, options: OutRankConfig, __: RunConfig, seed: int) -> Selection:
    return search_outrank(store, options, seed=seed)


def _gbdt(_: ModelComponent.Config, store: Store, options: GBDTConfig, __: RunConfig, seed: int) -> Selection:
    return search_gbdt(store, options, seed=seed)


METHODS: Mapping[str, Method] = {
    "optfs": Method(OptFSConfig, _with_model(search_optfs), "values"),
    "optinter": Method(OptInterConfig, _with_model(search_optinter), "pairs"),
    "autofis": Method(AutoFISConfig, _with_model(search_auto_fis), "pairs"),
    "autofield": Method(AutoFieldConfig, _with_model(search_auto_field), "fields"),
    "permutation": Method(PermutationConfig, _with_model(search_permutation), "fields"),
    "gradient": Method(GradientConfig, _with_model(search_gradient), "fields"),
    "outrank": Method(OutRankConfig, _outrank, "fields", trains=False),
    "gbdt": Method(GBDTConfig, _gbdt, "fields", trains=False),
}


def method_options(method: str, top: Top | None = None, settings: Mapping[str, str] | None = None) -> Any:
    """The options of a method.

    Args:
        method: a name in :data:`METHODS`.
        top: fields to keep, for methods that rank them.
        settings: further options by name, as on the command line: ``{"penalty": "1e-4"}``.

    Raises:
        ConfigError: an unknown method or option; ``top`` missing, or given to a method that has none.
    """
    if method not in METHODS:
        raise ConfigError(f"there is no selection method {method!r}{suggest(method, METHODS)}; expected {', '.join(METHODS)}")
    options = METHODS[method].options
    ranks = any(f.name == "top" for f in fields(options))
    if top is not None and not ranks:
        raise ConfigError(f"{method} decides by itself how much it keeps; leave top out")
    if ranks and top is None and method != "outrank":
        raise ConfigError(f"{method} ranks the fields; say how many to keep: top, a number or a share such as 0.5")
    return override(options(top=top) if ranks else options(), settings or {}, COMPONENTS)


def select(
    data: object,
    config: RunConfig,
    out: str | Path,
    options: DataOptions | None = None,
    *,
    method: str,
    top: Top | None = None,
    settings: Mapping[str, str] | None = None,
    name: str = "model",
    search_batch_size: int | None = None,
    seeds: int = 3,
    first_seed: int = 0,
    curve: bool = True,
) -> dict[str, Any]:
    """Train a model, select with it, re-train what is kept, and compare; with every seed from the start.

    What is finished at ``out`` is not done again: the same call goes on where another was interrupted, and with more ``seeds``
    adds to it. Searches and choices read training rows, and validation rows where the method says so; test rows only make the
    metrics of the runs.

    Args:
        data: raw rows, or a store; see :func:`ctrlib.experiment.train`. Raw rows are encoded once, as ``store/`` of ``out``.
        config: of the model and of its training, before and after.
        out: folder: ``before/`` and ``after/`` with a run for every seed, ``selection/`` with what was kept, ``verified/`` with
            how exactly the small model does the same as the gated one, ``report.json``, ``report.md``, and with ``curve`` also
            ``curve.json`` and ``curve.png``.
        options: see :class:`~ctrlib.experiment.DataOptions`.
        method, top, settings: see :func:`method_options`.
        name: of the model, for the report.
        search_batch_size: rows a step of a search that trains a model; ``None``: as in training. What a search moves by about
            its learning rate a step (gates, logits) needs many steps, which smaller batches give to few rows.
        seeds: how many; ``first_seed`` and those after it.
        curve: also train models of other sizes (with the first seed), and draw validation AUC against parameters; needs
            matplotlib (``pip install 'ctrlib[search]'``).

    Returns:
        What ``report.json`` holds. ``verified``: whether small and gated model agree up to rounding (float32: 1e-5 of the
        largest logit); if not, a warning is logged; ``None``: they cannot be compared, ``not_compared`` says why.

    Raises:
        ConfigError: an unknown method or option, or one that does not fit the model; nothing would be kept; pretrained vectors,
            which a search that trains a model would not have; ``out`` holds a selection with other settings or of other data;
            no matplotlib.
        DataError: see :func:`ctrlib.experiment.train`; ``out`` is there and no selection; a split is missing.

    After an error there is nothing at ``out``, unless there was before, or the search of the first seed was finished there.
    After Ctrl-C all that was finished stays, a store of raw rows too.
    """
    options = options or DataOptions()
    chosen = method_options(method, top, settings)
    positive("seeds", seeds)
    if search_batch_size is not None:
        positive("search_batch_size", search_batch_size)
    torch_device(config.device)
    if METHODS[method].trains:
        _check_vectors(method, config)
    figure = figure_class("curve") if curve else None
    target = Path(out)
    asked = {
        "method": method,
        "options": to_json(chosen),
        "name": name,
        "run": to_json(config),
        "search_batch_size": search_batch_size,
    }
    new = _claim(target, {**asked, "data": described(data, options)})
    with _unless_finished(target, new, first_seed):
        store = _three_splits(data, target, options)
        settled = config.for_rows(store.rows["train"])
        full = replace(settled, model=_unselected(config.model, store.encoder.layout))
        mixed = isinstance(chosen, OptInterConfig)  # the only search that reads a mixture of choices
        searching = replace(settled if mixed else full, batch_size=search_batch_size or settled.batch_size)
        if options.cross_memory_mb is not None:
            check_cross_memory(full.model, store.encoder.layout, full.fit.optimizer, options.cross_memory_mb)
        _check_model(full, store.encoder)
        seed_list = range(first_seed, first_seed + seeds)
        selections: list[Selection] = []
        before: list[dict[str, Any]] = []
        after: list[dict[str, Any]] = []
        compared: list[Mapping[str, Any]] = []
        for seed in seed_list:
            selection = _search(method, chosen, store, searching, settled, target, seed)
            selections.append(replace(selection, weights=None))  # which may be large, and are only needed here
            folder = target / "before" / f"seed-{seed}"
            before.append(_run(store, full, folder, name, seed))
            smaller = _Smaller(selection, store, target / f"kept-{seed}")
            compared.append(_verified(target / "verified" / f"seed-{seed}.json", smaller, folder, searching.model))
            after.append(smaller.train(settled, target / "after" / f"seed-{seed}", name, seed))
            smaller.remove()

        report = {
            "method": method,
            "keeps": METHODS[method].keeps,
            "model": name,
            "seeds": list(seed_list),
            "settings": to_json(chosen),
            "kept": [_kept(selection, store) for selection in selections],
            "agreement": _agreement(selections),
            "before": _summary(before),
            "after": _summary(after),
            "gain": _paired(before, after),
            "search_seconds": [selection.report["seconds"] for selection in selections],
            "train_seconds": [run["seconds"] for run in before],
            **_verdict(compared),
        }
        write_json(target / "report.json", report)
        write_text(target / "report.md", table(report))
        if figure is not None:
            others = _variants(method, chosen, selections[0], store, searching, first_seed)
            points = list(_curve(others, store, settled, target, name, first_seed))
            points += [_point("before", before[0]), _point("after", after[0])]
            write_json(target / "curve.json", points)
            _draw(figure, points, target / "curve.png", f"{method}, {name}")
    return report


@contextmanager
def _unless_finished(target: Path, new: bool, seed: int) -> Iterator[None]:
    """After an error, remove a new folder in which there is nothing to go on from."""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        searched = (target / "selection" / f"seed-{seed}").is_dir()
        if new and not searched and not (interrupted and Store.is_store(target / "store")):
            shutil.rmtree(target)
        elif interrupted:
            _log.info("interrupted; the same call goes on from what is finished in %s", target)
        raise


def _check_vectors(method: str, config: RunConfig) -> None:
    names = dict.fromkeys([*config.pretrained, *config.model.embedding.frozen])
    if names:
        raise ConfigError(
            f"{method} trains a model to search with, which would not have the pretrained vectors of {', '.join(names)}; leave "
            "pretrained and model.embedding.frozen out, or rank the fields by outrank or gbdt, which train none"
        )


def _check_model(config: RunConfig, encoder: Encoder) -> None:
    """Raise what building the model raises, before long work; nothing is allocated."""
    with torch.device("meta"):
        build_model(config.model, encoder.layout)


def _three_splits(data: object, target: Path, options: DataOptions) -> Store:
    """The store to select on, which is the same one whenever the selection goes on."""
    prepared = target / "store"
    store = Store.open(prepared) if Store.is_store(prepared) else open_store(data, prepared, options)
    missing = [split for split in ("train", "valid", "test") if split not in store.rows]
    if missing:
        raise DataError(f"selection needs training, validation and test rows; store {store.path} has no {', '.join(missing)}")
    _same(
        target / "data.json", {"encoder": store.encoder.hash, "rows": store.rows}, f"{target} holds a selection on other data"
    )
    return store


def _search(
    method: str, options: Any, store: Store, searching: RunConfig, config: RunConfig, target: Path, seed: int
) -> Selection:
    """What one seed keeps, for a run of ``config``: searched for, unless that is done."""

    def find() -> Selection:
        _log.info("%s, seed %d: search", method, seed)
        selection = METHODS[method].search(searching.model, store, options, searching, seed)
        # what cannot be applied, or built, is not to be found out after further training
        derived = derive(selection, store.encoder)
        _check_model(_of_what_is_left(config, selection, derived), derived.encoder)
        return selection

    return _once(target / "selection" / f"seed-{seed}", find)


def _once(folder: Path, find: Callable[[], Selection]) -> Selection:
    """What is saved in the folder; found and saved there, unless it is."""
    if folder.is_dir():
        return Selection.load(folder)
    selection = find()
    selection.save(folder)
    return selection


def _of_what_is_left(config: RunConfig, selection: Selection, derived: Derived) -> RunConfig:
    """The run of the smaller model: what the config says of single fields and vocabularies, of those that are left."""
    layout = derived.encoder.layout
    model = _unselected(config.model, layout) if selection.model is None else selection.model
    embedding = model.embedding
    tables = dict.fromkeys([*(c.table for c in layout.sparse), *(c.table for c in layout.sequences)])
    old = {table: derived.owners.get(table, table) for table in tables}
    embedding = replace(
        embedding,
        fields=None if embedding.fields is None else tuple(name for name in embedding.fields if name in layout.names),
        dims={table: embedding.dims[name] for table, name in old.items() if name in embedding.dims},
        frozen=tuple(table for table, name in old.items() if name in embedding.frozen),
    )
    pretrained = {table: config.pretrained[name] for table, name in old.items() if name in config.pretrained}
    return replace(config, model=replace(model, embedding=embedding), pretrained=pretrained)


class _Smaller:
    """What a selection leaves: the rows of a store as they are encoded then, and a model of them.

    Args:
        selection: of ``store``.
        store: all rows with all that they hold.
        path: folder of the derived rows, written when they are first needed.
    """

    def __init__(self, selection: Selection, store: Store, path: Path) -> None:
        self.selection, self.full, self.path = selection, store, path

    def rows(self) -> Store:
        """The rows of the store as :meth:`.Selection.apply` encodes them."""
        return Store.open(self.path) if Store.is_store(self.path) else apply_to_store(self.selection, self.full, self.path)

    def train(self, config: RunConfig, out: Path, name: str, seed: int, *, test: bool = True) -> dict[str, Any]:
        """The report of a run, from the selection's weights if there are any, unless it is there."""
        done = _finished(out)
        if done is not None:
            return done
        chosen, encoder = self.selection, self.full.encoder
        start = None if chosen.weights is None else chosen.start(encoder)
        left = _of_what_is_left(config, chosen, derive(chosen, encoder))
        return _run(self.rows(), left, out, name, seed, start, test=test)

    def difference(self, before: Path, model: ModelComponent.Config) -> dict[str, Any]:
        """The logits of validation rows of the whole model behind closed gates, against those of the small one with the same
        weights.

        Args:
            before: run of the model before selection, which lends its weights where the selection has none.
            model: that was searched with. Of OptInter's mixture the weights are drawn anew: the search keeps none.

        Returns:
            ``difference``, the largest of any row, and ``largest_logit``, in absolute numbers; or ``difference`` ``None`` and
            the ``reason``, where a field that is not kept enters the model by another way than its embedding.
        """
        selection, encoder = self.selection, self.full.encoder
        rows = list(islice(Loader(self.full.split("valid"), 8192), _VERIFIED_ROWS // 8192))
        if selection.values is not None:
            gated = ticket(selection, encoder)
            small, _ = compact(gated.model, selection, encoder)
            return _largest(gated, rows, small, _remapped(rows, derive(selection, encoder, close=True), encoder.layout))
        loaded = artifact.load(before)
        whole = loaded.model
        if selection.fields is not None:
            gates, closed = FieldGates(encoder.layout.names), dropped_fields(selection, encoder)
            gates.values_F[[name in closed for name in gates.names]] = 0
            try:
                small, _ = compact(whole, selection, encoder)
                with gates.on(whole):
                    return _largest(whole, rows, small, _remapped(rows, derive(selection, encoder, close=True), encoder.layout))
            except (ConfigError, DataError) as error:
                _log.info("the small model is not compared with the whole one: %s", error)
                return {"difference": None, "reason": str(error)}
        assert selection.pairs is not None
        if isinstance(selection.model, OptInter.Config):
            seed_everything(0)
            mixture = build_model(model, encoder.layout)  # reads the crosses that the selected model no longer names
            assert isinstance(mixture, OptInter)
            mixture.fix(selection.pairs)
            chosen, _ = compact_optinter(mixture, encoder.layout)
            return _largest(mixture, rows, chosen, islice(Loader(self.rows().split("valid"), 8192), len(rows)))
        block = auto_fis_block(whole)
        block.alpha_P.data[[selection.pairs[name] == "naive" for name in block.names]] = 0
        return _largest(whole, rows, without_closed_pairs(whole, loaded.config, encoder.layout), rows)

    def remove(self) -> None:
        """The derived rows, when nothing more is to be trained on them."""
        if Store.is_store(self.path):
            shutil.rmtree(self.path)


def _verified(path: Path, smaller: _Smaller, before: Path, model: ModelComponent.Config) -> dict[str, Any]:
    """:meth:`_Smaller.difference`, computed unless it is there; warns where that is no rounding."""
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_json(path, smaller.difference(before, model))
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if _relative(found) is not None and _verdict([found])["verified"] is False:
        _log.warning(
            "%s: the small model is not the same function as the gated one (logits up to %s differ by up to %s); its metrics "
            "after re-training are its own, but do not replace the one by the other, and report the defect",
            "/".join(path.parts[-2:]),
            found.get("largest_logit"),
            found["difference"],
        )
    return found


def _relative(found: Mapping[str, Any]) -> float | None:
    """The difference as a share of the largest logit, or of 1; NaN if it is none, ``None`` if nothing was compared."""
    if found["difference"] is None:
        return math.nan if "largest_logit" in found else None  # a file calls NaN null
    return float(found["difference"]) / max(1.0, found.get("largest_logit") or 1.0)


def _verdict(compared: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the report says of the comparisons: whether all were equal up to rounding; ``None``: not all could be made."""
    relative = [_relative(found) for found in compared]
    if None in relative:
        reasons = [found.get("reason") for found in compared if found["difference"] is None]
        return {"verified": None, "compact_difference": None, "compact_relative": None, "not_compared": reasons[0]}
    return {
        "verified": all(r is not None and r <= _ROUNDING for r in relative),
        "compact_difference": float(np.max([_number(found["difference"]) for found in compared])),
        "compact_relative": float(np.max([_number(r) for r in relative])),
    }


def _remapped(batches: Sequence[Batch], derived: Derived, layout: BatchLayout) -> Iterator[Batch]:
    """The batches as the derived encoder would have made them."""
    new = {name: torch.from_numpy(ids) for name, ids in derived.ids.items()}
    for batch in batches:
        columns = [
            new[c.name][batch.sparse[:, i].long()] if c.name in new else batch.sparse[:, i] for i, c in enumerate(layout.sparse)
        ]
        sequences = {
            name: replace(ragged, values=new[name][ragged.values.long()]) if name in new else ragged
            for name, ragged in batch.sequences.items()
        }
        yield replace(batch, sparse=torch.stack(columns, dim=1) if columns else batch.sparse, sequences=sequences)


def _largest(a: nn.Module, rows_a: Iterable[Batch], b: nn.Module, rows_b: Iterable[Batch]) -> dict[str, Any]:
    first = predict(a, rows_a).logits
    second = predict(b, rows_b).logits
    return {"difference": float(np.abs(first - second).max()), "largest_logit": float(np.abs(first).max())}


def _claim(target: Path, settings: Mapping[str, Any]) -> bool:
    """Make the folder (then it is new), or see that what is in it is of this very selection."""
    path = target / "select.json"
    if path.is_file():
        _same(path, settings, f"{target} holds a selection with other settings, or of other data")
        return False
    if target.exists():
        raise DataError(f"{target} exists already, and is not a selection to go on with; choose another folder, or remove it")
    with new_folder(target) as part:
        write_json(part / path.name, settings)
    return True


def described(data: object, options: DataOptions) -> dict[str, Any] | None:
    """Which raw rows are encoded, and how; ``None`` of a store, which says so itself."""
    if isinstance(data, Store) or (isinstance(data, str | Path) and Store.is_store(data)):
        return None
    said = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("stream", "cross_memory_mb")}
    schema = options.schema if isinstance(options.schema, Schema | None) else Schema.load(options.schema)
    return {
        **said,
        "label": options.labels,
        "schema": None if schema is None else schema.to_json(),
        "train": _whereabouts(data),
        "valid": _whereabouts(options.valid),
        "test": _whereabouts(options.test),
    }


def _whereabouts(rows: object) -> str | None:
    """A path as it is found from anywhere; of rows in memory, what tells them apart at a glance."""
    if rows is None:
        return None
    if isinstance(rows, str | Path):
        return str(Path(rows).absolute())
    source = open_source(rows)
    return f"{source.num_rows} rows in memory, of {', '.join(source.types)}"


def _same(path: Path, wanted: Mapping[str, Any], otherwise: str) -> None:
    """Write down what a selection is of, or see that it is what was written down."""
    if not path.is_file():
        write_json(path, wanted)
    elif json.loads(path.read_text(encoding="utf-8")) != json.loads(json_text(wanted)):
        raise ConfigError(f"{otherwise} (see {path}); choose another folder, or remove it")


def _unselected(model: ModelComponent.Config, layout: BatchLayout) -> ModelComponent.Config:
    """The model to compare with: OptInter with every pair memorised that has a cross, any other as it is."""
    if not isinstance(model, OptInter.Config) or model.choices is not None:
        return model
    other: Choice = "factorize" if "factorize" in model.operations else "naive"
    memorize, pairs = "memorize" in model.operations, field_pairs(layout, model.embedding.fields)
    return replace(model, choices={p.name: "memorize" if memorize and p.cross is not None else other for p in pairs})


def _run(
    store: Store,
    config: RunConfig,
    out: Path,
    name: str,
    seed: int,
    start: Mapping[str, Tensor] | None = None,
    *,
    test: bool = True,
) -> dict[str, Any]:
    """The report of a run, which is trained unless it is there."""
    done = _finished(out)
    if done is not None:
        return done
    discard_unfinished(out)  # of a call that was killed: this one trains from the start
    _log.info("training %s", "/".join(out.parts[-2:]))
    report = train(store, config, out, name=name, seed=seed, start=start, test=test)
    if report["interrupted"]:  # it is not what the others are compared with
        shutil.rmtree(out)
        raise KeyboardInterrupt
    return report


def _finished(run: Path) -> dict[str, Any] | None:
    """The report of a run that is there."""
    if not (run / "metrics.json").is_file():
        return None
    report: dict[str, Any] = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return report


def _metric(run: Mapping[str, Any], split: str, name: str) -> float:
    """NaN where it is undefined, which a file calls null."""
    return _number(run[split][name])


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _kept(selection: Selection, store: Store) -> dict[str, Any]:
    """How much is kept, and of how much."""
    found: dict[str, Any] = {}
    if selection.fields is not None:
        found["fields"] = {"kept": len(selection.fields), "total": len(store.encoder.schema.fields), "names": selection.fields}
    if selection.values is not None:
        each = {name: {"kept": int(m[1:].sum()), "total": len(m) - 1} for name, m in selection.values.items()}  # 0: padding
        total = {key: sum(counts[key] for counts in each.values()) for key in ("kept", "total")}
        found["values"] = {**total, "vocabularies": each}
    if selection.pairs is not None:
        names = {choice: [name for name, made in selection.pairs.items() if made == choice] for choice in get_args(Choice)}
        counts = {choice: len(pairs) for choice, pairs in names.items()}
        found["pairs"] = {**counts, "total": len(selection.pairs), "names": names}
    return found


def _agreement(selections: Sequence[Selection]) -> dict[str, float]:
    """How far the seeds agree, on average over pairs of them."""
    found: dict[str, list[float]] = {}
    for a, b in combinations(selections, 2):
        if a.fields is not None and b.fields is not None:
            kept_a, kept_b = set(a.fields), set(b.fields)
            found.setdefault("fields (Jaccard)", []).append(len(kept_a & kept_b) / len(kept_a | kept_b))
        if a.values is not None and b.values is not None:
            in_both = sum(int((mask & b.values[name]).sum()) for name, mask in a.values.items())
            in_one = sum(int((mask | b.values[name]).sum()) for name, mask in a.values.items())
            found.setdefault("values (Jaccard)", []).append(in_both / in_one)
        if a.pairs is not None and b.pairs is not None:
            same = [choice == b.pairs[name] for name, choice in a.pairs.items()]
            found.setdefault("pairs (share alike)", []).append(statistics.fmean(same))
        if a.scores and b.scores and len(a.scores) > 1:
            found.setdefault("scores (Kendall's tau)", []).append(kendall_tau(a.scores, b.scores))
    return {name: statistics.fmean(values) for name, values in found.items()}


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    test = {metric: _mean_std([_metric(run, "test", metric) for run in runs]) for metric in ("auc", "log_loss")}
    return {"test": test, "parameters": _mean_std([run["parameters"] for run in runs]), "runs": list(runs)}


def _paired(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Gains in the test metrics, seed by seed."""
    pairs = list(zip(before, after, strict=True))
    return {
        metric: _mean_std([_metric(b, "test", metric) - _metric(a, "test", metric) for a, b in pairs])
        for metric in ("auc", "log_loss")
    }


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan  # of NaN, NaN, unlike `statistics.stdev`
    return {"mean": statistics.fmean(values), "std": spread}


def _curve(
    variants: Iterable[tuple[str, Callable[[], Selection]]], store: Store, config: RunConfig, target: Path, name: str, seed: int
) -> Iterator[dict[str, Any]]:
    """Points of models of other sizes; without those of which nothing is left, or nothing that fits together."""
    for label, other in variants:
        folder = target / "curve" / f"seed-{seed}" / label.replace(" ", "-").replace("×", "x")
        if (folder / "point.json").is_file():
            yield json.loads((folder / "point.json").read_text(encoding="utf-8"))
            continue
        _log.info("curve: %s", label)
        try:
            smaller = _Smaller(_once(folder / "selection", other), store, folder / "store")
            point = _point(label, smaller.train(config, folder / "run", name, seed, test=False))
        except (ConfigError, DataError, TrainingDivergedError) as error:
            _log.info("%s is not in the curve: %s", label, error)
            shutil.rmtree(folder, ignore_errors=True)
            continue
        write_json(folder / "point.json", point)
        for part in ("selection", "store", "run"):  # of which the point is all that is needed
            shutil.rmtree(folder / part, ignore_errors=True)
        yield point


def _variants(
    method: str, options: Any, selection: Selection, store: Store, config: RunConfig, seed: int
) -> Iterator[tuple[str, Callable[[], Selection]]]:
    """Selections of other sizes: a name, and how to find each."""
    if METHODS[method].keeps == "fields":
        for share in _SHARES:
            yield f"{share:.0%} of the fields", partial(_best, selection, store, share)
    elif isinstance(selection.model, OptInter.Config):
        for choice in _ALIKE:
            yield f"all {choice}", partial(_all_alike, selection, choice)
    else:
        strength = {"optfs": "penalty", "autofis": "c"}[method]
        for factor in _STRENGTHS:
            changed = replace(options, **{strength: getattr(options, strength) * factor})
            yield f"{strength} × {factor:g}", partial(METHODS[method].search, config.model, store, changed, config, seed)


def _best(selection: Selection, store: Store, share: float) -> Selection:
    order = selection.report.get("order")  # of OutRank's 3MR, which is not that of the scores
    scores = selection.scores if order is None else {name: -place for place, name in enumerate(order)}
    return replace(selection, fields=best_fields(store.encoder.schema, scores, share))


def _all_alike(selection: Selection, choice: Choice) -> Selection:
    assert isinstance(selection.model, OptInter.Config)
    pairs = dict.fromkeys(selection.pairs or {}, choice)
    return replace(selection, pairs=pairs, model=replace(selection.model, choices=choice))


def _point(label: str, run: Mapping[str, Any]) -> dict[str, Any]:
    return {"label": label, "parameters": run["parameters"], "valid_auc": _metric(run, "valid", "auc")}


def _draw(class_of_figures: Any, points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    figure = class_of_figures(figsize=(7, 4.5))
    axes = figure.subplots()
    shown = [p for p in points if not math.isnan(p["valid_auc"] or math.nan)]  # undefined of rows of one label
    for i, point in enumerate(shown):
        mark = {"before": ("s", "black"), "after": ("s", "C3")}.get(point["label"], ("o", f"C{i + 4}"))
        axes.scatter(point["parameters"], point["valid_auc"], marker=mark[0], color=mark[1], label=point["label"])
    axes.set(xlabel="parameters", ylabel="validation AUC, one seed", title=title)
    sizes = [p["parameters"] for p in shown]
    if sizes and max(sizes) > 10 * min(sizes):
        axes.set_xscale("log")
    else:
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.locator_params(axis="x", nbins=5)
    axes.grid(alpha=0.3)
    if shown:
        axes.legend()
    save_png(figure, path)


def table(report: Mapping[str, Any]) -> str:
    """``report.md``: what was kept, sizes, metrics before and after."""
    text = f"# {report['method']}, {report['model']}, seeds {', '.join(map(str, report['seeds']))}\n\n"
    text += "| | parameters | test AUC | test log loss |\n|---|---|---|---|\n"
    whole = report["before"]["parameters"]["mean"]
    for when in ("before", "after"):
        found = report[when]
        size = found["parameters"]["mean"]
        share = "" if when == "before" else f" ({size / whole:.1%})"
        cells = [f"{size:,.0f}{share}", *(_shown(found["test"][m]) for m in ("auc", "log_loss"))]
        text += f"| {when} | {' | '.join(cells)} |\n"
    text += f"| difference, seed by seed | | {' | '.join(_shown(report['gain'][m], '+') for m in ('auc', 'log_loss'))} |\n\n"
    for seed, kept in zip(report["seeds"], report["kept"], strict=True):
        text += f"* seed {seed}: {kept_line(kept)}\n"
    for name, value in report["agreement"].items():
        text += f"* agreement of the seeds, {name}: {value:.3f}\n"
    search, training = (statistics.fmean(report[f"{part}_seconds"]) for part in ("search", "train"))
    text += (
        f"* the search took {search:.1f} s, {search / training:.2f} times as long as training the model before "
        f"({training:.1f} s)\n"
    )
    if report["verified"] is None:
        return text + f"* the small model is not compared with the gated one: {report['not_compared']}\n"
    drawn = " (both with weights drawn at random)" if report["method"] == "optinter" else ""
    text += (
        f"* logits of the small model differ from those of the gated one by at most {report['compact_difference']:.1e}{drawn}"
    )
    if not report["verified"]:
        text += (
            f", {report['compact_relative']:.1e} of the largest: **not verified equal** (rounding changes {_ROUNDING:g}); "
            "do not replace the one by the other, and report the defect"
        )
    return text + "\n"


def kept_line(kept: Mapping[str, Any]) -> str:
    """What was kept, in one line."""
    parts = []
    if "fields" in kept:
        parts.append(f"{kept['fields']['kept']} of {kept['fields']['total']} fields ({', '.join(kept['fields']['names'])})")
    if "values" in kept:
        values = kept["values"]
        each = [f"{name} {v['kept']:,} of {v['total']:,}" for name, v in values["vocabularies"].items()]
        share = values["kept"] / max(values["total"], 1)
        parts.append(f"{values['kept']:,} of {values['total']:,} values, {share:.1%} ({_listed(each)})")
    if "pairs" in kept:
        pairs = kept["pairs"]
        each = [f"{pairs[choice]} {choice}{_in_brackets(choice, pairs['names'][choice])}" for choice in get_args(Choice)]
        parts.append(f"{pairs['total']} pairs: {', '.join(each)}")
    return "; ".join(parts)


def _in_brackets(choice: Choice, names: Sequence[str]) -> str:
    return f" ({_listed(names)})" if names and choice != "naive" else ""


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _shown(value: Mapping[str, float], sign: str = "") -> str:
    spread = "" if math.isnan(value["std"]) else f" ± {value['std']:.5f}"  # of a single seed there is none
    return f"{value['mean']:{sign}.5f}{spread}"
