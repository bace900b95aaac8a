"""Selection as one call: a method on a data set, what it keeps, and the smaller model, re-trained and compared."""

from __future__ import annotations

import json
import logging
import math
import shutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from ctrlib.data.loader import Loader
from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, RunConfig, open_store, train
from ctrlib.files import json_text, write_json, write_text
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.optinter import OptInter
from ctrlib.models.presets import COMPONENTS
from ctrlib.schema import BatchLayout, DataError, suggest
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
from ctrlib.search.selection import Choice, Derived, Selection, apply_to_store, compact, derive
from ctrlib.training import predict, seed_everything

_log = logging.getLogger("ctrlib")
_VERIFIED_ROWS = 4 * 8192
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
    """

    options: type[Any]
    search: Callable[[ModelComponent.Config, Store, Any, RunConfig, int], Selection]
    keeps: Literal["fields", "values", "pairs"]


def _with_model(search: Callable[..., Selection]) -> Callable[[ModelComponent.Config, Store, Any, RunConfig, int], Selection]:
    def run(model: ModelComponent.Config, store: Store, options: Any, config: RunConfig, seed: int) -> Selection:
        assert config.batch_size is not None
        return search(model, store, options, fit=config.fit, batch_size=config.batch_size, seed=seed)

    return run


METHODS: Mapping[str, Method] = {
    "optfs": Method(OptFSConfig, _with_model(search_optfs), "values"),
    "optinter": Method(OptInterConfig, _with_model(search_optinter), "pairs"),
    "autofis": Method(AutoFISConfig, _with_model(search_auto_fis), "pairs"),
    "autofield": Method(AutoFieldConfig, _with_model(search_auto_field), "fields"),
    "permutation": Method(PermutationConfig, _with_model(search_permutation), "fields"),
    "gradient": Method(GradientConfig, _with_model(search_gradient), "fields"),
    "outrank": Method(OutRankConfig, lambda _, store, options, __, seed: search_outrank(store, options, seed=seed), "fields"),
    "gbdt": Method(GBDTConfig, lambda _, store, options, __, seed: search_gbdt(store, options, seed=seed), "fields"),
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
        seeds: how many; ``first_seed`` and those after it.
        curve: also train models of other sizes (with the first seed), and draw validation AUC against parameters; needs
            matplotlib (``pip install 'ctrlib[search]'``).

    Returns:
        What ``report.json`` holds.

    Raises:
        ConfigError: an unknown method or option, or one that does not fit the model; nothing would be kept; ``out`` holds a
            selection with other settings or of other data; no matplotlib.
        DataError: see :func:`ctrlib.experiment.train`; ``out`` is there and no selection; a split is missing.

    After an error nothing is at ``out``, unless the search of a seed was finished there.
    """
    chosen = method_options(method, top, settings)
    positive("seeds", seeds)
    plot = _pyplot() if curve else None
    target = Path(out)
    _claim(target, {"method": method, "options": to_json(chosen), "name": name, "run": to_json(config)})
    try:
        store = _three_splits(data, target, options or DataOptions())
        settled = config.for_rows(store.rows["train"])
        first = _search(method, chosen, store, settled, target, first_seed)
    except (ConfigError, DataError):
        if not (target / "selection").is_dir():
            shutil.rmtree(target)
        raise
    full = replace(settled, model=_unselected(config.model))
    seed_list = range(first_seed, first_seed + seeds)
    selections: list[Selection] = []
    before: list[dict[str, Any]] = []
    after: list[dict[str, Any]] = []
    differences: list[float | None] = []
    for seed in seed_list:
        selection = first if seed == first_seed else _search(method, chosen, store, settled, target, seed)
        folder = target / "before" / f"seed-{seed}"
        selections.append(selection)
        before.append(_run(store, full, folder, name, seed))
        smaller = _Smaller(selection, store, target / f"kept-{seed}")
        differences.append(_verified(target / "verified" / f"seed-{seed}.json", smaller, folder))
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
        "compact_difference": None if None in differences else max(d for d in differences if d is not None),
    }
    write_json(target / "report.json", report)
    write_text(target / "report.md", table(report))
    if plot is not None:
        points = list(_curve(method, chosen, selections[0], store, settled, target, name, first_seed))
        points += [_point("before", before[0]), _point("after", after[0])]
        write_json(target / "curve.json", points)
        _draw(plot, points, target / "curve.png", f"{method}, {name}")
    return report


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


def _search(method: str, options: Any, store: Store, config: RunConfig, target: Path, seed: int) -> Selection:
    """What one seed keeps: searched for, unless that is done."""
    folder = target / "selection" / f"seed-{seed}"
    if folder.is_dir():
        return Selection.load(folder)
    _log.info("%s, seed %d: search", method, seed)
    selection = METHODS[method].search(config.model, store, options, config, seed)
    selection.apply(store.encoder)  # what cannot be applied is not to be found out after further training
    selection.save(folder)
    return selection


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

    def train(self, config: RunConfig, out: Path, name: str, seed: int) -> dict[str, Any]:
        """The report of a run, from the selection's weights if there are any, unless it is there."""
        done = _finished(out)
        if done is not None:
            return done
        chosen = self.selection
        start = None if chosen.weights is None else chosen.start(self.full.encoder)
        return _run(self.rows(), replace(config, model=chosen.model or config.model), out, name, seed, start)

    def difference(self, before: Path) -> float | None:
        """The largest difference between logits of validation rows: of the whole model behind closed gates, and of the small
        one with the same weights.

        Args:
            before: run of the model before selection, which lends its weights where the selection has none.

        Returns:
            ``None`` where a field that is not kept enters the model by another way than its embedding.
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
            gates = FieldGates(encoder.layout.names)
            gates.values_F[[name not in selection.fields for name in gates.names]] = 0
            try:
                small, _ = compact(whole, selection, encoder)
                with gates.on(whole):
                    return _largest(whole, rows, small, _remapped(rows, derive(selection, encoder, close=True), encoder.layout))
            except (ConfigError, DataError) as error:
                _log.info("the small model is not compared with the whole one: %s", error)
                return None
        assert selection.pairs is not None
        if isinstance(selection.model, OptInter.Config):
            seed_everything(0)
            mixture = build_model(replace(selection.model, choices=None), encoder.layout)
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


def _verified(path: Path, smaller: _Smaller, before: Path) -> float | None:
    """:meth:`_Smaller.difference`, computed unless it is there."""
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_json(path, {"difference": smaller.difference(before)})
    found: float | None = json.loads(path.read_text(encoding="utf-8"))["difference"]
    return found


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


def _largest(a: nn.Module, rows_a: Iterable[Batch], b: nn.Module, rows_b: Iterable[Batch]) -> float:
    first = predict(a, rows_a).logits
    second = predict(b, rows_b).logits
    return float(np.abs(first - second).max())


def _claim(target: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder, or see that what is in it is of this very selection."""
    path = target / "select.json"
    if not path.is_file():
        if target.exists():
            raise DataError(
                f"{target} exists already, and is not a selection to go on with; choose another folder, or remove it"
            )
        target.mkdir(parents=True)
    _same(path, settings, f"{target} holds a selection with other settings")


def _same(path: Path, wanted: Mapping[str, Any], otherwise: str) -> None:
    """Write down what a selection is of, or see that it is what was written down."""
    if not path.is_file():
        write_json(path, wanted)
    elif json.loads(path.read_text(encoding="utf-8")) != json.loads(json_text(wanted)):
        raise ConfigError(f"{otherwise} (see {path}); choose another folder, or remove it")


def _unselected(model: ModelComponent.Config) -> ModelComponent.Config:
    """The model to compare with: OptInter with every pair memorised, any other as it is."""
    if isinstance(model, OptInter.Config) and model.choices is None:
        return replace(model, choices="memorize" if "memorize" in model.operations else "factorize")
    return model


def _run(
    store: Store, config: RunConfig, out: Path, name: str, seed: int, start: Mapping[str, Tensor] | None = None
) -> dict[str, Any]:
    """The report of a run, which is trained unless it is there."""
    done = _finished(out)
    if done is not None:
        return done
    report = train(store, config, out, name=name, seed=seed, start=start)
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


def _kept(selection: Selection, store: Store) -> dict[str, Any]:
    """How much is kept, and of how much."""
    found: dict[str, Any] = {}
    if selection.fields is not None:
        found["fields"] = {"kept": len(selection.fields), "total": len(store.encoder.layout.names), "names": selection.fields}
    if selection.values is not None:
        masks = list(selection.values.values())
        found["values"] = {"kept": sum(int(m[1:].sum()) for m in masks), "total": sum(len(m) - 1 for m in masks)}
    if selection.pairs is not None:
        counts = {choice: list(selection.pairs.values()).count(choice) for choice in ("memorize", "factorize", "naive")}
        found["pairs"] = {**counts, "total": len(selection.pairs)}
    return found


def _agreement(selections: Sequence[Selection]) -> dict[str, float]:
    """How far the seeds agree, on average over pairs of them."""
    both = list(combinations(selections, 2))
    if not both:
        return {}
    found: dict[str, list[float]] = {}
    for a, b in both:
        if a.fields is not None and b.fields is not None:
            found.setdefault("fields (Jaccard)", []).append(_jaccard(set(a.fields), set(b.fields)))
        if a.values is not None and b.values is not None:
            kept = [
                {(name, i) for name, mask in s.values.items() for i in mask.nonzero()[0].tolist()} for s in (a, b) if s.values
            ]
            found.setdefault("values (Jaccard)", []).append(_jaccard(*kept))
        if a.pairs is not None and b.pairs is not None:
            same = [choice == b.pairs[name] for name, choice in a.pairs.items()]
            found.setdefault("pairs (share alike)", []).append(statistics.fmean(same))
        if a.scores and b.scores and len(a.scores) > 1:
            found.setdefault("scores (Kendall's tau)", []).append(kendall_tau(a.scores, b.scores))
    return {name: statistics.fmean(values) for name, values in found.items()}


def _jaccard(a: set[Any], b: set[Any]) -> float:
    return len(a & b) / max(len(a | b), 1)


def _summary(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds."""
    test = {metric: _mean_std([run["test"][metric] for run in runs]) for metric in ("auc", "log_loss")}
    return {"test": test, "parameters": _mean_std([run["parameters"] for run in runs]), "runs": list(runs)}


def _paired(before: Sequence[Mapping[str, Any]], after: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Gains in the test metrics, seed by seed."""
    return {
        metric: _mean_std([b["test"][metric] - a["test"][metric] for a, b in zip(before, after, strict=True)])
        for metric in ("auc", "log_loss")
    }


def _mean_std(values: Sequence[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else float("nan")}


def _curve(
    method: str, options: Any, selection: Selection, store: Store, config: RunConfig, target: Path, name: str, seed: int
) -> Iterator[dict[str, Any]]:
    """Points of models of other sizes; without those of which nothing is left, or nothing that fits together."""
    for label, other in _variants(method, options, selection, store, config, seed):
        folder = target / "curve" / f"seed-{seed}" / label.replace(" ", "-").replace("×", "x")
        if (folder / "point.json").is_file():
            yield json.loads((folder / "point.json").read_text(encoding="utf-8"))
            continue
        try:
            smaller = _Smaller(other(), store, folder / "store")
            point = _point(label, smaller.train(config, folder / "run", name, seed))
        except (ConfigError, DataError) as error:
            _log.info("%s is not in the curve: %s", label, error)
            continue
        write_json(folder / "point.json", point)
        smaller.remove()
        shutil.rmtree(folder / "run")
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
    return replace(selection, fields=best_fields(store.encoder.schema, selection.scores, share))


def _all_alike(selection: Selection, choice: Choice) -> Selection:
    assert isinstance(selection.model, OptInter.Config)
    pairs = dict.fromkeys(selection.pairs or {}, choice)
    return replace(selection, pairs=pairs, model=replace(selection.model, choices=choice))


def _point(label: str, run: Mapping[str, Any]) -> dict[str, Any]:
    return {"label": label, "parameters": run["parameters"], "valid_auc": run["valid"]["auc"]}


def _pyplot() -> Any:
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ConfigError("the curve needs matplotlib; pip install 'ctrlib[search]', or leave the curve out") from error
    return pyplot


def _draw(pyplot: Any, points: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for point in points:
        chosen = point["label"] in ("before", "after")
        axes.scatter(point["parameters"], point["valid_auc"], marker="s" if chosen else "o", color="C3" if chosen else "C0")
        axes.annotate(point["label"], (point["parameters"], point["valid_auc"]), xytext=(4, 4), textcoords="offset points")
    axes.set(xscale="log", xlabel="parameters", ylabel="validation AUC, one seed", title=title)
    axes.grid(alpha=0.3)
    part = path.with_name(path.name + ".part")
    figure.savefig(part, dpi=150, bbox_inches="tight", format="png")
    pyplot.close(figure)
    part.replace(path)


def table(report: Mapping[str, Any]) -> str:
    """``report.md``: what was kept, sizes, metrics before and after."""
    text = f"# {report['method']}, {report['model']}, seeds {', '.join(map(str, report['seeds']))}\n\n"
    text += "| | parameters | test AUC | test log loss |\n|---|---|---|---|\n"
    for when in ("before", "after"):
        found = report[when]
        cells = [f"{found['parameters']['mean']:,.0f}", *(_shown(found["test"][m]) for m in ("auc", "log_loss"))]
        text += f"| {when} | {' | '.join(cells)} |\n"
    text += f"| difference, seed by seed | | {' | '.join(_shown(report['gain'][m], '+') for m in ('auc', 'log_loss'))} |\n\n"
    for seed, kept in zip(report["seeds"], report["kept"], strict=True):
        text += f"* seed {seed}: {kept_line(kept)}\n"
    for name, value in report["agreement"].items():
        text += f"* agreement of the seeds, {name}: {value:.3f}\n"
    search, training = (statistics.fmean(report[f"{part}_seconds"]) for part in ("search", "train"))
    text += f"* the search took {search:.1f} s, training the model before {training:.1f} s\n"
    if report["compact_difference"] is not None:
        text += (
            f"* logits of the small model differ from those of the gated one by at most {report['compact_difference']:.1e}\n"
        )
    return text


def kept_line(kept: Mapping[str, Any]) -> str:
    """What was kept, in one line."""
    parts = []
    if "fields" in kept:
        parts.append(f"{kept['fields']['kept']} of {kept['fields']['total']} fields ({', '.join(kept['fields']['names'])})")
    if "values" in kept:
        share = kept["values"]["kept"] / max(kept["values"]["total"], 1)
        parts.append(f"{kept['values']['kept']:,} of {kept['values']['total']:,} values ({share:.1%})")
    if "pairs" in kept:
        counts = ", ".join(f"{kept['pairs'][choice]} {choice}" for choice in get_args(Choice))
        parts.append(f"{kept['pairs']['total']} pairs: {counts}")
    return "; ".join(parts)


def _shown(value: Mapping[str, float], sign: str = "") -> str:
    spread = "" if math.isnan(value["std"]) else f" ± {value['std']:.5f}"  # of a single seed there is none
    return f"{value['mean']:{sign}.5f}{spread}"
