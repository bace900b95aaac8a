"""A look at a data set before any model: what each field tells of the label, how often it is there, what is wrong with it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt
import torch

from ctrlib.batch import Batch
from ctrlib.config import ConfigError, positive
from ctrlib.data.encoder import vocabulary_name
from ctrlib.data.loader import Loader
from ctrlib.data.source import open_source
from ctrlib.data.store import Store
from ctrlib.data.vocabulary import Vocabulary
from ctrlib.experiment import DataOptions, open_store, prepare
from ctrlib.memory import table_memory
from ctrlib.optim import OptimizerConfig
from ctrlib.schema import OOV_ID, BatchLayout, DataError, Schema, SequenceField, SparseField
from ctrlib.search.combinations import CombinationTally
from ctrlib.search.screening import (
    OutRankConfig,
    Tally,
    coded_relevance,
    columns,
    dense_codes,
    label_column,
    list_codes,
    permuted,
    quantile_bins,
    too_short,
)

_log = logging.getLogger("ctrlib")
Ints = npt.NDArray[np.int64]

_LEAK = 0.5  # of the entropy of the label that a single field tells
_ALMOST_CONSTANT = 0.999
_DRIFT = 0.02  # of the entropy of "which split", likewise
_Z = 3.0
_FREQUENT = 20  # rows of a value, from which its share is compared
_SAMPLE = 2**17  # rows in which copies are looked for, and drift
_MIN_COUNTS = (1, 2, 5, 10)
_SMOOTHING = 10.0  # rows' worth of the overall rate
_REPEATED = 10  # values that are there more than once, from which names of values may differ between copies
_SHOWN = 15  # combinations


@dataclass(frozen=True, kw_only=True, slots=True)
class ScreenConfig:
    """
    Args:
        order: 2 or 3 also looks at combinations of so many fields.
        max_combinations: in one block of rows; the others have their turn in the next ones.
        block_rows, permutations, subsampling: see :class:`~ctrlib.search.screening.OutRankConfig`.
        redundancy: also order the fields by 3MR.
        dim: width of the vectors whose memory is predicted.
        label: against which to score; ``None``: the first.
    """

    order: int = 1
    max_combinations: int = 2**10
    block_rows: int = 2**14
    permutations: int = 5
    subsampling: int = 1
    redundancy: bool = False
    dim: int = 16
    label: str | None = None

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3):
            raise ConfigError(f"screen.order is {self.order}; expected 1, 2 or 3")
        positive("screen.max_combinations", self.max_combinations)
        positive("screen.dim", self.dim)
        self.ranking()

    def ranking(self) -> OutRankConfig:
        """How fields are scored."""
        return OutRankConfig(
            permutations=self.permutations,
            block_rows=self.block_rows,
            subsampling=self.subsampling,
            redundancy=self.redundancy,
            label=self.label,
        )


def screen(
    data: object, options: DataOptions | None = None, *, config: ScreenConfig | None = None, seed: int = 0
) -> dict[str, Any]:
    """Rank the fields, and flag what should not be one.

    Training rows are scored; validation rows are compared with them for drift; test rows are not read.

    Args:
        data: raw rows, see :func:`ctrlib.experiment.prepare`, for which every value is counted, or a store, where only values
            with an id of their own are told apart.
        options: see :class:`~ctrlib.experiment.DataOptions`.
        config: see :class:`ScreenConfig`.
        seed: of the blocks, permutations, noise controls and samples.

    Returns:
        ``label``, ``rows``, ``entropy`` (of the label, nats), ``controls`` (scores of noise), ``fields`` (best first: ``name``,
        ``score``, ``z``, ``plain``, ``surrogate``, ``combined``, ``cardinality``, ``coverage``, ``most_frequent`` (share),
        ``drift``, ``unseen``, ``mb``, ``flags``), ``combinations``, ``memory`` (MB of all tables by minimum count),
        ``ignored`` (columns that are no fields, with the reason).

    Raises:
        DataError, ConfigError: see the functions above; fewer than two values of the label.
    """
    options, config = options or DataOptions(), config or ScreenConfig()
    with tempfile.TemporaryDirectory() as scratch:
        return _screen(_opened(data, Path(scratch), options), config, seed)


def _opened(data: object, scratch: Path, options: DataOptions) -> Store:
    """The rows with an id for every value, where that can be."""
    if isinstance(data, Store) or (isinstance(data, str | Path) and Store.is_store(data)):
        return open_store(data, scratch / "store", options)
    schema = options.schema
    if schema is None:
        labels = options.labels
        if not labels:
            raise DataError("which column is the label? name it (--label) or give a schema (--schema)")
        table = open_source(data, "the table")
        table.require(labels, ", named as label")
        schema = Schema.infer(table, labels, group=options.group, time=options.time, weight=options.weight)
    elif not isinstance(schema, Schema):
        schema = Schema.load(schema)
    every = [
        replace(cast(SparseField, f), min_count=1, max_size=None)
        for f in schema.fields
        if isinstance(f, SparseField | SequenceField) and f.shares is None and f.hash_size is None
    ]
    return prepare(data, scratch / "store", replace(options, schema=schema.with_fields(*every)))


def _screen(store: Store, config: ScreenConfig, seed: int) -> dict[str, Any]:
    layout, split = store.encoder.layout, store.split("train")
    column = label_column(layout, config.label)
    rng = np.random.default_rng(seed)
    tally = Tally(layout.names, config.ranking())
    plain = [name for name in layout.names if name not in {c.name for c in layout.sequences}]
    together = CombinationTally(plain, cast(Literal[2, 3], config.order), config.max_combinations) if config.order > 1 else None
    some = None if config.subsampling == 1 else torch.arange(0, split.num_rows, config.subsampling)
    coverage = _Coverage(store)
    surrogate: dict[str, list[float]] = {name: [] for name in plain}
    labels: list[Ints] = []
    for batch in Loader(split, config.block_rows, rows=some, shuffle=True, seed=seed):  # the file may be sorted
        assert batch.labels is not None
        y_N = dense_codes(batch.labels[:, column].numpy())
        coverage.add(batch)
        labels.append(batch.labels[:, column].numpy().astype(np.int64))
        if tally.blocks and too_short(len(batch), config.block_rows):
            continue  # its rows count, but not its scores, in a median over blocks
        tally.add(layout, batch, y_N, rng)
        codes = _codes(layout, batch)
        for name in plain:
            surrogate[name].append(surrogate_score(codes[name], labels[-1]))
        if together is not None:
            together.add(codes, y_N, permuted(y_N, config.permutations, rng))
    rates = np.bincount(np.concatenate(labels)) / sum(map(len, labels))
    if len(rates[rates > 0]) < 2:
        raise DataError(f"the label {layout.labels[column]!r} has a single value in the training rows; expected both")
    entropy = float(-(rates[rates > 0] * np.log(rates[rates > 0])).sum())
    scores, z, raw = tally.medians("score"), tally.medians("z"), tally.medians("plain")
    combined = {} if together is None else together.combined()
    copies, drift = _copies(store, rng), _drift(store, rng)
    memory = {name: _memory(store, name, config.dim, 1) for name in layout.names}
    fields = []
    for name in sorted(layout.names, key=lambda n: -scores[n]):
        known = coverage.of(name)
        flags = []
        if known["most_frequent"] >= 1:
            flags.append("constant")
        elif known["most_frequent"] >= _ALMOST_CONSTANT:
            flags.append("almost constant")
        if scores[name] > _LEAK * entropy and z[name] > _Z:
            flags.append("leak?")
        if name in copies:
            flags.append(f"copy of {copies[name]}")
        if drift[name]["drift"] > _DRIFT:
            flags.append("drift")
        if z[name] <= _Z or scores[name] <= max(tally.controls.values()):
            flags.append("noise")
        fields.append(
            {
                "name": name,
                "score": scores[name],
                "z": z[name],
                "plain": raw[name],
                "surrogate": float(np.median(surrogate[name])) if name in surrogate else None,
                "combined": combined.get(name),
                **known,
                **drift[name],
                "mb": memory[name],
                "flags": flags,
            }
        )
    report: dict[str, Any] = {
        "label": layout.labels[column],
        "rows": sum(map(len, labels)),
        "entropy": entropy,
        "controls": tally.controls,
        "fields": fields,
        "memory": {str(c): _all_memory(store, config.dim, c) for c in _MIN_COUNTS},
        "dim": config.dim,
        "ignored": dict(store.encoder.schema.ignored),
    }
    if together is not None:
        looked, total = together.looked_at
        best = list(together.scores().items())[:_SHOWN]
        report["combinations"] = [{"fields": list(names), "score": score} for names, score in best]
        report["combinations_looked_at"] = [looked, total]
    if config.redundancy:
        report["order"] = tally.order_3mr()
    return report


def surrogate_score(x_N: Ints, label_N: Ints) -> float:
    """1 − log loss of the smoothed label rate of each value, in two folds: what the best logistic regression on the one-hot
    field alone would reach, without its iterations."""
    # NOTE[DIFF] the released code fits SGD to the one-hot field; a rate per value is where that converges, and needs no seed
    if label_N.max() > 1:
        return float("nan")
    losses, fold_N = [], np.arange(len(x_N)) % 2
    size = int(x_N.max()) + 1
    for fold in (0, 1):
        train, test = fold_N != fold, fold_N == fold
        count_V = np.bincount(x_N[train], minlength=size)
        clicks_V = np.bincount(x_N[train], weights=label_N[train], minlength=size)
        overall = (clicks_V.sum() + 0.5) / (count_V.sum() + 1)
        p_N = ((clicks_V + _SMOOTHING * overall) / (count_V + _SMOOTHING))[x_N[test]]
        losses.append(-np.log(np.where(label_N[test] == 1, p_N, 1 - p_N)).mean())
    return 1 - float(np.median(losses))


def _codes(layout: BatchLayout, batch: Batch) -> dict[str, Ints]:
    """Of every field that has one value a row."""
    bins = OutRankConfig().num_bins
    return {name: dense_codes(codes) for name, codes, row in columns(layout, batch, bins) if row is None}


class _Coverage:
    """How often each field is there, and how many values it has."""

    def __init__(self, store: Store) -> None:
        self._store, self._rows = store, 0
        self._lists = {c.name for c in store.encoder.layout.sequences}
        self._missing: dict[str, int] = dict.fromkeys(store.encoder.layout.names, 0)
        layout = store.encoder.layout
        sizes = {c.name: c.vocab_size for c in layout.sparse} | {c.name: c.vocab_size for c in layout.sequences}
        self._counts: dict[str, Ints] = {name: np.zeros(size, dtype=np.int64) for name, size in sizes.items()}
        # of a number: one that is the most frequent of the first block, and how often it is there. What is nearly constant
        # is found so, without counting all numbers
        self._usual: dict[str, tuple[float, int]] = {}

    def add(self, batch: Batch) -> None:
        layout, vocabularies = self._store.encoder.layout, self._store.encoder.vocabularies
        self._rows += len(batch)
        for i, c in enumerate(layout.sparse):
            ids = batch.sparse[:, i].numpy()
            self._counts[c.name] += np.bincount(ids, minlength=c.vocab_size)
            vocabulary = vocabularies.get(c.table)
            if isinstance(vocabulary, Vocabulary):
                self._missing[c.name] += int((ids == vocabulary.missing_id).sum()) if vocabulary.values.null_count else 0
        for i, d in enumerate(layout.dense):
            x_N = batch.dense[:, i].numpy()
            gone = np.isnan(x_N)
            self._missing[d.name] += int(gone.sum())
            if not gone.all():
                if d.name not in self._usual:
                    values, counts = np.unique(x_N[~gone], return_counts=True)
                    self._usual[d.name] = float(values[counts.argmax()]), 0
                usual, count = self._usual[d.name]
                self._usual[d.name] = usual, count + int((x_N == usual).sum())
        for s in layout.sequences:
            ragged = batch.sequences[s.name].flat
            self._missing[s.name] += int((ragged.offsets.diff() == 0).sum())
            self._counts[s.name] += np.bincount(ragged.values.numpy(), minlength=s.vocab_size)

    def of(self, name: str) -> dict[str, Any]:
        missing, cardinality = self._missing[name], None
        if name in self._counts:
            counts = self._counts[name]
            cardinality = int((counts > 0).sum())
            if name in self._lists:  # every value is one observation, and so is that there is none
                share = max(int(counts.max()), missing) / (int(counts.sum()) + missing)
            else:
                share = int(counts.max()) / self._rows
        else:
            share = max(self._usual.get(name, (0.0, 0))[1], missing) / self._rows
        return {"cardinality": cardinality, "coverage": 1 - missing / self._rows, "most_frequent": share}


def _table(store: Store, name: str) -> str:
    return vocabulary_name(store.encoder.schema[name])


def _copies(store: Store, rng: np.random.Generator) -> dict[str, str]:
    """Fields that say the same as an earlier one, value by value; by name, which.

    Values may have other names in the copy, as long as most values are there more than once; else any two fields of which every
    row has a value of its own would be copies. Of those, the order of the values must be the same.
    """
    layout, split = store.encoder.layout, store.split("train")
    some = np.sort(rng.choice(split.num_rows, min(_SAMPLE, split.num_rows), replace=False))
    batch = next(iter(Loader(split, len(some), rows=torch.from_numpy(some))))
    seen: dict[bytes, str] = {}
    found: dict[str, str] = {}
    numbers = {c.name: batch.dense[:, i].numpy() for i, c in enumerate(layout.dense)}
    ids = {c.name: batch.sparse[:, i].numpy() for i, c in enumerate(layout.sparse)}
    for name, values in {**ids, **numbers}.items():
        _, first, codes, counts = np.unique(values, return_index=True, return_inverse=True, return_counts=True)
        if len(first) < 2:
            continue
        repeated = int((counts > 1).sum())
        if repeated >= min(_REPEATED, len(first) - repeated):
            order = np.empty(len(first), dtype=np.int64)  # in order of appearance, whatever the values are called
            order[np.argsort(first)] = np.arange(len(first))
            codes = order[codes]
        key = codes.tobytes()
        if key in seen:
            found[name] = seen[key]
        else:
            seen[key] = name
    return found


def _drift(store: Store, rng: np.random.Generator) -> dict[str, dict[str, float]]:
    """By field: ``drift``, the share of "training or validation row" that a value tells, and ``unseen``, the share of
    validation rows whose value no training row has."""
    layout = store.encoder.layout
    if "valid" not in store.rows:
        return {name: {"drift": 0.0, "unseen": 0.0} for name in layout.names}
    count = min(_SAMPLE, store.rows["train"], store.rows["valid"])
    parts = []
    for name in ("train", "valid"):
        rows = torch.from_numpy(np.sort(rng.choice(store.rows[name], count, replace=False)))
        parts.append(next(iter(Loader(store.split(name), count, rows=rows))))
    which_N = np.repeat([0, 1], count)
    twins_RN = permuted(which_N, OutRankConfig().permutations, rng)
    found = {name: {"drift": 0.0, "unseen": 0.0} for name in layout.names}
    for name, codes, row_M in _both(layout, parts):
        if row_M is None:
            row_M = np.arange(2 * count)
        told = coded_relevance(dense_codes(codes), which_N, row_M, "permute", twins_RN)
        found[name]["drift"] = max(told.score, 0.0) / float(np.log(2)) if told.z > _Z else 0.0
    for name, ids in _ids(layout, parts[1]):
        if isinstance(store.encoder.vocabularies.get(_table(store, name)), Vocabulary) and len(ids):
            found[name]["unseen"] = float((ids == OOV_ID).mean())
    return found


def _both(layout: BatchLayout, parts: Sequence[Batch]) -> Iterator[tuple[str, Ints, Ints | None]]:
    """As :func:`~ctrlib.search.screening.columns`, of training and validation rows one after the other."""
    for i, sparse in enumerate(layout.sparse):
        yield sparse.name, _frequent(np.concatenate([part.sparse[:, i].numpy() for part in parts])), None
    for i, dense in enumerate(layout.dense):
        x_N = np.concatenate([part.dense[:, i].numpy() for part in parts])
        yield dense.name, quantile_bins(x_N, OutRankConfig().num_bins), None
    for column in layout.sequences:
        (first, first_row), (second, second_row) = (list_codes(part, column.name) for part in parts)
        yield column.name, _frequent(np.concatenate([first, second])), np.concatenate([first_row, second_row + len(parts[0])])


def _ids(layout: BatchLayout, batch: Batch) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """All ids of each field that has some."""
    for i, sparse in enumerate(layout.sparse):
        yield sparse.name, batch.sparse[:, i].numpy()
    for column in layout.sequences:
        yield column.name, batch.sequences[column.name].flat.values.numpy()


def _frequent(ids_N: Ints) -> Ints:
    """The ids, all that are rare (and OOV) as one: a value of which training rows have few is rarer still in any other rows,
    since only what training rows have got an id, and that is no drift."""
    counts = np.bincount(ids_N)
    return np.where((counts[ids_N] < _FREQUENT) | (ids_N == OOV_ID), OOV_ID, ids_N)


def _memory(store: Store, name: str, dim: int, min_count: int) -> float:
    """MB that a field's table takes in training; a field without one: 0."""
    vocabulary = store.encoder.vocabularies.get(_table(store, name))
    if vocabulary is None:
        return 0.0
    rows = vocabulary.size
    if isinstance(vocabulary, Vocabulary) and min_count > 1:
        rows -= int((vocabulary.counts < min_count).sum())
    return table_memory(rows, dim, OptimizerConfig()).total / 2**20


def _all_memory(store: Store, dim: int, min_count: int) -> float:
    """Tables that several fields share count once."""
    tables = {
        _table(store, name): name
        for name in store.encoder.layout.names
        if name in {f.name for f in store.encoder.schema.fields}
    }
    return sum(_memory(store, name, dim, min_count) for name in tables.values())


def table(report: Mapping[str, Any]) -> str:
    """The report for a terminal."""
    names = [f"{f['name']} ({_number(f['cardinality'])}; {f['coverage']:.0%})" for f in report["fields"]]
    width = max(map(len, [*names, "field (values; coverage)"]))
    text = f"{'field (values; coverage)':<{width}}     score        z  surrogate  combined   drift  unseen        MB  flags\n"
    for name, f in zip(names, report["fields"], strict=True):
        surrogate = "" if f["surrogate"] is None else f"{f['surrogate']:.4f}"
        combined = "" if f["combined"] is None else f"{f['combined']:.4f}"
        text += f"{name:<{width}}  {f['score']:>8.4f} {f['z']:>8.1f} {surrogate:>10} {combined:>9} "
        text += f"{f['drift']:>7.1%} {f['unseen']:>7.1%} {f['mb']:>9.2f}  {', '.join(f['flags'])}\n"
    text += f"\n{report['rows']:,} rows; entropy of {report['label']}: {report['entropy']:.4f} nats; "
    text += f"best score of noise: {max(report['controls'].values()):.4f}\n"
    memory = ", ".join(f"{mb:,.1f} MB with min_count {c}" for c, mb in report["memory"].items())
    text += f"tables of width {report['dim']} in training: {memory}\n"
    if "combinations" in report:
        looked, total = report["combinations_looked_at"]
        text += f"\nbest of {looked:,} combinations looked at, of {total:,}:\n"
        text += "".join(f"  {c['score']:.4f}  {' × '.join(c['fields'])}\n" for c in report["combinations"])
    if "order" in report:
        text += f"\norder by relevance, redundancy and relation (3MR): {', '.join(report['order'])}\n"
    for name, reason in report["ignored"].items():
        text += f"column {name!r} is no field: {reason}\n"
    return text


def _number(cardinality: int | None) -> str:
    return "number" if cardinality is None else f"{cardinality:,}"
