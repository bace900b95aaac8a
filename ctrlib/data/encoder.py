"""What was learned from the training rows to turn a table into ids and scaled values; owns the vocabularies.

``fit`` reads every column once, in blocks, several columns at a time; memory grows with the vocabularies, not with the rows.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from os import cpu_count
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ctrlib.batch import Batch, Ragged
from ctrlib.data.crosses import cross_keys, fit_crosses
from ctrlib.data.numeric import Floats, Moments, Numeric, Quantiles, as_floats, criteo_log, narrow_codes, signed_log, tally
from ctrlib.data.source import BLOCK_ROWS, Source, as_array, open_source
from ctrlib.data.vocabulary import HashBuckets, ValueCounter, Vocabulary, as_keys, begins_with, hash64, key_type
from ctrlib.progress import Tracker, track
from ctrlib.schema import (
    FIRST_VALUE_ID,
    BatchLayout,
    CrossField,
    DataError,
    DenseColumn,
    DenseField,
    Field,
    History,
    HistoryColumn,
    Schema,
    SequenceColumn,
    SequenceField,
    SparseColumn,
    SparseField,
)

_log = logging.getLogger("ctrlib")
T = TypeVar("T")
R = TypeVar("R")
Ids = npt.NDArray[np.int32]
Describe = Callable[[int], str]  # the place of a row, for errors
_AHEAD = 2  # blocks that are encoded while the caller is at work on the one before
_FEW_ROWS = 4096  # so few are not worth a thread
_GAP_SIZE = FIRST_VALUE_ID + 64  # ids of time gaps: 64 powers of two hold the distance of any two 64-bit numbers
_DTYPES = {"sparse": np.int32, "dense": np.float32, "labels": np.float32, "weight": np.float32, "group": np.int64}


@dataclass(frozen=True)
class Encoded:
    """One block of rows: ids, numbers, ragged ids, and the columns that are not features."""

    sparse: Ids
    dense: npt.NDArray[np.float32]
    sequences: Mapping[str, tuple[Ids, Ids]]  # values, lengths
    labels: npt.NDArray[np.float32] | None = None
    weight: npt.NDArray[np.float32] | None = None
    group: npt.NDArray[np.int64] | None = None
    inner: Mapping[str, Ids] = field(default_factory=dict)  # of nested sequences: values of each behaviour
    leaks: Mapping[str, Ids] = field(default_factory=dict)  # by guarded history: behaviours of each row that were dropped

    def batch(self) -> Batch:
        """The block as a :class:`~ctrlib.batch.Batch`."""

        def offsets(lengths: Ids) -> torch.Tensor:
            return torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32))

        sequences = {
            name: Ragged(torch.from_numpy(values), offsets(lengths), offsets(self.inner[name]) if name in self.inner else None)
            for name, (values, lengths) in self.sequences.items()
        }
        return Batch(
            sparse=torch.from_numpy(self.sparse),
            dense=torch.from_numpy(self.dense),
            sequences=sequences,
            labels=None if self.labels is None else torch.from_numpy(self.labels),
            weight=None if self.weight is None else torch.from_numpy(self.weight),
            group=None if self.group is None else torch.from_numpy(self.group),
        )


class LeakCount:
    """How many behaviours of how many rows the leak guards dropped, by history (``found``)."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, int]] = {}

    def add(self, block: Encoded) -> None:
        """Count those of a block."""
        for name, dropped in block.leaks.items():
            counts = self.found.setdefault(name, {"behaviours": 0, "rows": 0})
            counts["behaviours"] += int(dropped.sum())
            counts["rows"] += int(np.count_nonzero(dropped))

    def log(self, where: str) -> None:
        """Tell what was dropped, if anything was."""
        for name, counts in self.found.items():
            if counts["behaviours"]:
                _log.warning(
                    "%s: dropped %d behaviours of %d rows from history %r, since they are not before the row's time",
                    where,
                    counts["behaviours"],
                    counts["rows"],
                    name,
                )


@dataclass(frozen=True)
class Encoder:
    """Raw columns → ids and numbers, as learned from training rows. Make one with :meth:`fit` or :meth:`load`.

    Attributes:
        schema: the fields.
        vocabularies: by table name (the field's own, or that of the field it shares with); that of a cross holds its keys
            (:func:`.cross_keys`).
        numeric: what each dense field learned, except ``criteo_log`` fields, which have a vocabulary.
        clocks: by history, whether its times were timestamps or dates, and not numbers; one is absent where that is not known.
    """

    schema: Schema
    vocabularies: Mapping[str, Vocabulary | HashBuckets]
    numeric: Mapping[str, Numeric]
    clocks: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def fit(cls, schema: Schema, source: object, *, cross_memory_mb: float | None = None) -> Encoder:
        """Learn vocabularies and statistics from ``source``: the *training* rows and no others.

        Crosses take a second pass, once the ids of the fields that they cross are known. Of histories, only behaviours are
        counted that :meth:`encode` lets through.

        Args:
            schema: the fields to encode.
            source: anything :func:`~ctrlib.data.source.open_source` accepts.
            cross_memory_mb: what crosses may take in training, see :func:`.fit_crosses`; ``None``: half of the free memory.

        Raises:
            DataError: a declared column is missing, has only missing values, or holds values of the wrong kind; a history
                cannot be read, or is refused for its leaks; or crosses would take too much memory.
        """
        table = open_source(source, "the training table")
        if not schema.fields:
            raise DataError(f"the schema of {table.name} has no field left to learn from; declare at least one feature")
        table.require(schema.inputs, ", which the schema declares as a field")
        if table.num_rows == 0:
            raise DataError(f"{table.name} has no training rows; expected at least one")
        sharing: dict[str, list[SparseField | SequenceField]] = {}
        jobs: list[Callable[[Tracker], tuple[str, object]]] = []
        for f in schema.fields:
            if isinstance(f, DenseField):
                jobs.append(lambda bar, f=f: (f.name, _fit_dense(f, table, bar)))  # type: ignore[misc]
            elif not isinstance(f, CrossField):
                sharing.setdefault(f.shares or f.name, []).append(f)
        for name, members in sharing.items():
            jobs.append(lambda bar, name=name, members=members: (name, _fit_vocabulary(schema, name, members, table, bar)))  # type: ignore[misc]
        with track("fit encoder", (len(schema.fields) - len(schema.crosses)) * table.num_rows, "cells") as bar:
            learned = dict(parallel(lambda job: job(bar), jobs))
        crosses = schema.crosses
        plain = cls(
            schema.with_only(f for f in schema.fields if not isinstance(f, CrossField)),
            {n: v for n, v in learned.items() if isinstance(v, Vocabulary | HashBuckets)},
            {n: v for n, v in learned.items() if isinstance(v, Numeric)},
            {h.name: clock for h in schema.histories if (clock := _clock(h, schema.time, table)) is not None},
        )
        if not crosses:
            return plain
        parts = plain._parts({name for cross in crosses for name in cross.of})
        blocks = (block.sparse for block in parts.encode(table, labels=False))
        found = fit_crosses(crosses, parts.layout.sparse, blocks, table.num_rows, cross_memory_mb)
        return cls(schema, {**plain.vocabularies, **found}, plain.numeric, plain.clocks)

    def _parts(self, names: Collection[str]) -> Encoder:
        """An encoder of these fields of categories only, each with a vocabulary of its own."""
        fields = [f for f in self.schema.fields if f.name in names]
        return Encoder(
            self.schema.with_only(replace(f, shares=None) if isinstance(f, SparseField) else f for f in fields),
            {f.name: v for f in fields if (v := self.vocabularies.get(vocabulary_name(f))) is not None},
            self.numeric,
        )

    @cached_property
    def layout(self) -> BatchLayout:
        """What the columns of the encoded batches mean."""
        sparse: list[SparseColumn] = []
        dense: list[DenseColumn] = []
        sequences: list[SequenceColumn] = []
        for f in self.schema.fields:
            if isinstance(f, DenseField) and f.encoding == "bucket":
                sparse.append(SparseColumn(f.name, self.numeric[f.name].vocab_size, f.name))
            elif isinstance(f, DenseField) and not f.is_category:
                learned = self.numeric[f.name]
                dense.append(DenseColumn(f.name, learned.num_bins if f.encoding == "piecewise" else 0, learned.missing))
            elif isinstance(f, SequenceField):
                size = self.vocabularies[vocabulary_name(f)].size
                sequences.append(SequenceColumn(f.name, size, vocabulary_name(f), f.pooling, f.ordered, f.nested))
            else:
                of = f.of if isinstance(f, CrossField) else None
                found = self.vocabularies[vocabulary_name(f)]
                sparse.append(SparseColumn(f.name, found.size, vocabulary_name(f), of, isinstance(found, HashBuckets)))
        histories: list[HistoryColumn] = []
        for h in self.schema.histories:
            targets = [self._target(name) for name in h.fields]
            gaps = () if h.gaps is None else (h.gaps,)
            sequences += [SequenceColumn(name, _GAP_SIZE, name, "mean", True) for name in gaps]
            histories.append(HistoryColumn(h.name, (*h.fields, *gaps), (*targets, *(None for _ in gaps))))
        return BatchLayout(
            tuple(sparse), tuple(dense), tuple(sequences), self.schema.labels, tuple(histories), self.schema.classes
        )

    def _target(self, name: str) -> str | None:
        """The field of the candidate that has the vocabulary of this attribute of a history: its owner, a sparse one, a bag."""
        table = vocabulary_name(self.schema[name])
        same = [f for f in self.schema.fields if f.side == "candidate" and vocabulary_name(f) == table]
        sparse = [f.name for f in same if isinstance(f, SparseField)]
        bags = [f.name for f in same if isinstance(f, SequenceField) and not f.ordered]
        # others that share the vocabulary, such as the item clicked last, say less of the candidate than its owner
        return next(iter(sorted(sparse + bags, key=lambda target: target != table)), None)

    @cached_property
    def hash(self) -> str:
        """A fingerprint of the schema and of everything learned."""
        digest = hashlib.sha256(json.dumps(self._json(), sort_keys=True).encode())
        names = sorted(self.vocabularies)
        for name, found in zip(names, parallel(lambda n: self.vocabularies[n].fingerprint(), names), strict=True):
            digest.update(name.encode() + b"\0" + found)
        return digest.hexdigest()

    def encode(self, source: object, *, labels: bool = True, block_rows: int = BLOCK_ROWS) -> Generator[Encoded, None, None]:
        """Encode a table block by block, in row order.

        Args:
            source: anything :func:`~ctrlib.data.source.open_source` accepts.
            labels: also read labels, weight and group; without them only the fields are needed.

        Raises:
            DataError: a column is missing or a value cannot be what its field says; names file, column and row.
        """
        table = open_source(source)
        table.require(self.schema.inputs, ", which the model reads")
        special = [c for c in (*self.schema.labels, self.schema.weight, self.schema.group) if c is not None] if labels else []
        table.require(special, ", which the schema names as label, weight or group")
        if table.num_rows == 0:
            return
        own = self._columns(table, special)
        histories = [_behaviours(h, self.schema.time, table, self.clocks.get(h.name)) for h in self.schema.histories]
        columns: list[_Column | _Behaviours | _Cross] = [*own, *histories, *self._crosses()]
        starts = range(0, table.num_rows, block_rows)
        blocks = (_Block(columns, start, min(block_rows, table.num_rows - start)) for start in starts)
        threads = min(cpu_count() or 1, len(columns)) if table.num_rows > _FEW_ROWS else 1
        if threads == 1:
            for block in blocks:
                for column in columns:
                    column.fill(block)
                yield block.encoded(self.layout)
            return
        pool = ThreadPoolExecutor(threads)
        ahead: deque[tuple[_Block, list[Future[None]]]] = deque()
        try:
            for block in blocks:
                before = ahead[-1][1] if ahead else [None] * len(columns)
                jobs: list[Future[None]] = []
                for column, last in zip(columns, before, strict=True):
                    # a column goes on where it stopped; histories and crosses read what the columns write
                    after = [last] if isinstance(column, _Column) else jobs[: len(own)]
                    jobs.append(pool.submit(_fill, column, after, block))
                ahead.append((block, jobs))
                if len(ahead) > _AHEAD:
                    yield _finished(*ahead.popleft(), self.layout)
            while ahead:
                yield _finished(*ahead.popleft(), self.layout)
        finally:
            pool.shutdown(cancel_futures=True)

    def transform(self, source: object, *, labels: bool = False) -> Batch:
        """Encode a whole table in memory as one batch; the log tells how many behaviours leak guards dropped."""
        table, leaks = open_source(source), LeakCount()
        if table.num_rows == 0:
            raise DataError(f"{table.name} has no rows; expected at least one")
        block = next(self.encode(table, labels=labels, block_rows=table.num_rows))
        leaks.add(block)
        leaks.log(table.name)
        return block.batch()

    def _columns(self, table: Source, special: Sequence[str]) -> list[_Column]:
        """What is to be encoded: the fields, and of labels, weight and group those that are among ``special``."""
        columns: list[_Column] = []

        def add(part: str, at: int, name: str, encode: Callable[..., Any], text: bool = False) -> None:
            columns.append(_Column(part, at, name, table, table.arrays(name, text=text), encode))

        for at, name in enumerate(c.name for c in self.layout.sparse):
            f = self.schema[name]
            if isinstance(f, CrossField):
                continue
            text = isinstance(f, SparseField) and _as_text(f, self._keys(f))
            add("sparse", at, name, _Remembered(partial(self._ids, f)), text)
        for at, name in enumerate(c.name for c in self.layout.dense):
            add("dense", at, name, _Remembered(partial(_scaled, self.numeric[name])))
        gaps = {h.gaps for h in self.schema.histories}
        for at, name in enumerate(c.name for c in self.layout.sequences if c.name not in gaps):
            f = self.schema[name]
            assert isinstance(f, SequenceField)
            add("sequences", at, name, partial(self._sequence, f), _as_text(f, self._keys(f)))
        for name in dict.fromkeys(h.times for h in self.schema.histories if h.times is not None):
            add("times", 0, name, partial(_time_lists, name))
            if self.schema.time is not None and not any(column.part == "time" for column in columns):
                add("time", 0, self.schema.time, _row_times)
        for part, names, encode in (
            ("labels", self.schema.labels, _labels),
            ("weight", (self.schema.weight,), _weights),
            ("group", (self.schema.group,), _codes),
        ):
            for at, special_name in enumerate(names):
                if special_name is not None and special_name in special:
                    add(part, at, special_name, _Remembered(encode))
        return columns

    def _crosses(self) -> list[_Cross]:
        at = {c.name: i for i, c in enumerate(self.layout.sparse)}
        crosses = []
        for f in self.schema.crosses:
            first, second = (at[name] for name in f.of)
            size = self.layout.sparse[second].vocab_size
            crosses.append(_Cross(at[f.name], (first, second), size, self.vocabularies[f.name]))
        return crosses

    def _ids(self, f: Field, array: Any, describe: Describe) -> Ids:
        assert isinstance(f, SparseField | DenseField)
        if isinstance(f, DenseField) and f.encoding == "bucket":
            return self.numeric[f.name].bucket_ids(as_floats(array, describe))
        if isinstance(f, DenseField):
            keys = _category_keys(as_floats(array, describe), describe)
        else:
            keys = _value_keys(array, self._keys(f), describe)
        return self.vocabularies[vocabulary_name(f)].ids(keys)

    def encode_column(self, name: str, array: Any, describe: Describe) -> npt.NDArray[Any]:
        """What :meth:`encode` makes of an Arrow array of a sparse or dense column: int32 ids, or float32 numbers.

        Raises:
            DataError: a value cannot be what its field says; names what ``describe`` gives for its place.
        """
        f = self.schema[name]
        if isinstance(f, DenseField) and not f.is_category:
            return _scaled(self.numeric[name], array, describe)
        return self._ids(f, array, describe)

    def check_history_column(self, name: str, array: Any, describe: Describe) -> None:
        """Read one column of a history by itself: its attributes, the times of its behaviours or those of rows.

        Raises:
            DataError: as :meth:`encode_column`.
        """
        if name == self.schema.time:
            _row_times(array, describe)
        elif any(f.name == name for f in self.schema.fields):
            f = self.schema[name]
            assert isinstance(f, SequenceField)
            self._sequence(f, array, describe)
        else:
            _time_lists(name, array, describe)

    def of_histories(self, names: Collection[str]) -> Encoder:
        """An encoder of these sequence fields only, for the histories that they belong to; each has a vocabulary of its own."""
        kept = [replace(f, shares=None) for f in self.schema.fields if f.name in names and isinstance(f, SequenceField)]
        tables = {f.name: self.vocabularies[vocabulary_name(self.schema[f.name])] for f in kept}
        return Encoder(self.schema.with_only(kept), tables, {}, self.clocks)

    def _sequence(self, f: SequenceField, array: Any, describe: Describe) -> tuple[Ids, ...]:
        """Ids of all values, the length of every list, and if nested, how many values every behaviour has."""
        values, lengths, inner, describe = _flat(f, array, describe)
        keys = _value_keys(values, self._keys(f), describe)
        ids = self.vocabularies[vocabulary_name(f)].ids(keys)
        if inner is not None:
            return ids, lengths, inner
        if f.max_length is not None:
            ids = ids[_most_recent(lengths, f.max_length)]
            lengths = np.minimum(lengths, f.max_length).astype(np.int32)
        return ids, lengths

    def _keys(self, f: SparseField | SequenceField) -> Any:
        vocabulary = self.vocabularies[vocabulary_name(f)]
        return vocabulary.values.type if isinstance(vocabulary, Vocabulary) else pa.large_string()

    def ids(self, field: str, values: Sequence[object]) -> Ids:
        """The ids of raw values of a sparse or sequence field (for pretrained vectors, reports)."""
        f = self.schema[field]
        if not isinstance(f, SparseField | SequenceField):
            kind = "dense" if isinstance(f, DenseField) else "a cross"
            raise DataError(f"field {field!r} is {kind}; only values of sparse and sequence fields have ids")
        try:
            array = as_array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(f"the values given for field {field!r} mix kinds ({error}); give all of them one type") from error
        keys = _value_keys(array, self._keys(f), lambda at: f"value {at + 1} given for field {field!r}")
        return self.vocabularies[vocabulary_name(f)].ids(keys)

    def _json(self) -> dict[str, Any]:
        data = {"schema": self.schema.to_json(), "numeric": {n: asdict(v) for n, v in sorted(self.numeric.items())}}
        clocks = {h.name: self.clocks[h.name] for h in self.schema.histories if h.name in self.clocks}
        return data | ({"clocks": clocks} if clocks else {})

    def save(self, folder: Path) -> None:
        """Write ``schema.json``, ``encoder.json`` and ``vocabularies/*.parquet`` into an existing folder."""
        self.schema.save(folder / "schema.json")
        files: dict[str, object] = {}
        (folder / "vocabularies").mkdir(exist_ok=True)
        tables: list[tuple[Path, Vocabulary]] = []
        for i, (name, vocabulary) in enumerate(sorted(self.vocabularies.items())):
            if isinstance(vocabulary, HashBuckets):
                files[name] = {"buckets": vocabulary.buckets}
                continue
            dropped = {"dropped": vocabulary.dropped, "oov_dropped": vocabulary.oov_dropped}
            file = {"file": f"vocabularies/{i:04d}.parquet"}  # a field's name may not be a file name
            files[name] = file | {option: value for option, value in dropped.items() if value}
            tables.append((folder / f"vocabularies/{i:04d}.parquet", vocabulary))
        parallel(_write_vocabulary, tables)
        learned = {name: value for name, value in self._json().items() if name != "schema"}
        data = {"hash": self.hash, **learned, "vocabularies": files}
        (folder / "encoder.json").write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Encoder:
        """Read what :meth:`save` wrote.

        Raises:
            DataError: a file is missing or damaged, or the content is not what was saved (its hash differs).
        """
        schema = Schema.load(folder / "schema.json")
        try:
            data = json.loads((folder / "encoder.json").read_text(encoding="utf-8"))
            vocabularies: dict[str, Vocabulary | HashBuckets] = {}
            for name, entry in data["vocabularies"].items():
                if "buckets" in entry:
                    vocabularies[name] = HashBuckets(entry["buckets"])
                else:
                    table = pq.read_table(folder / entry["file"]).combine_chunks()
                    value, count = (table[c].combine_chunks() for c in ("value", "count"))
                    dropped = int(entry.get("dropped", 0)), bool(entry.get("oov_dropped", False))
                    vocabularies[name] = Vocabulary(value, count.to_numpy(), *dropped)
            numeric = {n: Numeric(**{**v, "edges": tuple(v["edges"])}) for n, v in data["numeric"].items()}
            clocks = {str(name): bool(clock) for name, clock in data.get("clocks", {}).items()}
            expected = data["hash"]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
            raise DataError(f"encoder in {folder}: missing or damaged ({error}); make it again") from error
        encoder = cls(schema, vocabularies, numeric, clocks)
        if encoder.hash != expected:
            raise DataError(f"encoder in {folder}: its content differs from what was saved; make it again")
        return encoder


def _write_vocabulary(job: tuple[Path, Vocabulary]) -> None:
    path, vocabulary = job
    pq.write_table(pa.table({"value": vocabulary.values, "count": vocabulary.counts}), path, compression="zstd")


def vocabulary_name(f: Field) -> str:
    """Under which name the vocabulary of a field is found: its own, or that of the field it shares with."""
    return (f.shares if isinstance(f, SparseField | SequenceField) else None) or f.name


def _describe(column: str, table: Source, start: int) -> Describe:
    return lambda row: f"column {column!r}, {table.locate(start + row)}"


def _nowhere(_: int) -> str:
    return ""


class _Remembered:
    """Encodes a column array by array, but each distinct value once, where the array tells what they are: in a dictionary, or
    as integers of a narrow range. (The arrays of one row group of a Parquet file share a dictionary, or lengthen it.)
    """

    def __init__(self, encode: Callable[[Any, Describe], npt.NDArray[Any]]) -> None:
        self._encode = encode
        self._values: Any = pa.nulls(0)  # a dictionary, or all integers of a range
        self._encoded: npt.NDArray[Any] = np.zeros(0)
        self._missing: npt.NDArray[Any] | None = None

    def __call__(self, array: Any, describe: Describe, out: npt.NDArray[Any]) -> None:
        """Write what ``encode`` itself gives to ``out``."""
        try:
            if isinstance(array, pa.DictionaryArray):
                table = self._dictionary(array.dictionary)
                codes = array.indices.cast(pa.int32()).fill_null(len(table)).to_numpy(zero_copy_only=False)
            elif (narrow := narrow_codes(array)) is not None:
                codes, low, size = narrow
                table = self._range(low, size)
            else:
                out[:] = self._encode(array, describe)
                return
            if array.null_count:
                if self._missing is None:
                    self._missing = self._encode(pa.nulls(1, array.type), _nowhere)
                table = np.append(table, self._missing)
        except DataError:  # of a value, perhaps one of other rows than these
            out[:] = self._encode(array, describe)
        else:
            np.take(table, codes, out=out, mode="clip")  # the quickest mode; no code is out of range

    def _dictionary(self, values: Any) -> npt.NDArray[Any]:
        if not begins_with(self._values, values):
            known = len(self._values) if begins_with(values, self._values) else 0
            new = values.slice(known)
            rows = pa.DictionaryArray.from_arrays(pa.array(np.arange(len(new), dtype=np.int32)), new)
            encoded = self._encode(rows, _nowhere)
            self._encoded = np.concatenate([self._encoded[:known], encoded]) if known else encoded
            self._values = values
        return self._encoded[: len(values)]

    def _range(self, low: int, size: int) -> npt.NDArray[Any]:
        first = self._values[0].as_py() if len(self._values) else low
        if not first <= low <= low + size <= first + len(self._values):
            values = pa.array(np.arange(low, low + size))
            self._encoded = self._encode(values, _nowhere)
            self._values, first = values, low
        return self._encoded[low - first :][:size]


@dataclass
class _Column:
    """One column on its way into blocks: where it comes from, and its place in a :class:`_Block`."""

    part: str
    at: int
    name: str
    table: Source
    arrays: Iterator[Any]
    encode: Callable[..., Any]  # lists, and times: gives arrays; any other: writes to the array that it is given
    row: int = 0  # the next
    rest: Any = None  # of the last array

    def fill(self, block: _Block) -> None:
        """Encode the next rows into a block."""
        done, lists = 0, []
        while done < block.rows:
            array = self.rest if self.rest is not None else next(self.arrays)
            piece = array.slice(0, block.rows - done)
            self.rest = array.slice(len(piece)) if len(piece) < len(array) else None
            describe = _describe(self.name, self.table, self.row)
            if self.part in _DTYPES:
                self.encode(piece, describe, block.parts[self.part][self.at, done : done + len(piece)])
            else:
                lists.append(self.encode(piece, describe))
            done += len(piece)
            self.row += len(piece)
        if lists:
            block.lists[self.part, self.name] = tuple(np.concatenate(arrays) for arrays in zip(*lists, strict=True))


@dataclass(frozen=True)
class _Behaviours:
    """A history on its way into blocks, after its columns: checked, guarded, cut to the most recent behaviours."""

    history: History
    time: str | None  # column of the row's time
    table: Source

    part: ClassVar[str] = "history"

    def fill(self, block: _Block) -> None:
        h = self.history
        lengths = block.lists["sequences", h.fields[0]][1]
        for part, name in [*(("sequences", name) for name in h.fields[1:]), *([("times", h.times)] if h.times else [])]:
            wrong = block.lists[part, name][1] != lengths
            if wrong.any():
                row = int(np.argmax(wrong))
                raise DataError(
                    f"{self._place(name, block, row)}: {block.lists[part, name][1][row]} values, but {lengths[row]} in column "
                    f"{h.fields[0]!r}; history {h.name!r} needs one for every behaviour in each of its columns"
                )
        rows_N = np.repeat(np.arange(block.rows), lengths)
        kept_N = np.ones(len(rows_N), bool)
        if h.times is not None:
            kept_N = self._guarded(h.times, block, rows_N)
        if h.max_length is not None:
            known = np.bincount(rows_N[kept_N], minlength=block.rows)
            kept_N[kept_N] = _most_recent(known, h.max_length)
        left = np.bincount(rows_N[kept_N], minlength=block.rows).astype(np.int32)
        for name in h.fields:
            values, _, *inner = block.lists["sequences", name]
            values, *inner = keep_behaviours(kept_N, values, *inner)
            block.lists["sequences", name] = values, left, *inner
        if h.gaps is not None and h.times is not None and self.time is not None:
            gap_N = block.lists["time", self.time][0][rows_N[kept_N]] - block.lists["times", h.times][0][kept_N]
            units = 1e6 if _is_clock(self.table.types[self.time]) else 1
            exponent_N = np.frexp(1 + gap_N / units)[1] - 1  # ⌊log₂⌋, exact up to 2⁵³
            ids = FIRST_VALUE_ID + np.minimum(exponent_N, _GAP_SIZE - FIRST_VALUE_ID - 1)
            block.lists["sequences", h.gaps] = ids.astype(np.int32), left

    def _guarded(self, column: str, block: _Block, rows_N: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Which behaviours were before the time of their row; an error where they are out of order, or refused."""
        times_N, _ = block.lists["times", column]
        back = (times_N[1:] < times_N[:-1]) & (rows_N[1:] == rows_N[:-1])
        if back.any():
            at = int(np.argmax(back)) + 1
            raise DataError(
                f"{self._place(column, block, rows_N[at])}: the times of history {self.history.name!r} fall (behaviour "
                f"{self._number(at, rows_N)}); sort the behaviours of every row, oldest first"
            )
        if self.time is None:
            return np.ones(len(times_N), bool)
        kept_N: npt.NDArray[np.bool_] = times_N < block.lists["time", self.time][0][rows_N]
        if self.history.on_leak == "refuse" and not kept_N.all():
            at = int(np.argmin(kept_N))
            raise DataError(
                f"{self._place(column, block, rows_N[at])}: behaviour {self._number(at, rows_N)} of history "
                f"{self.history.name!r} is not before the row's time (column {self.time!r}), so it could not be known then; "
                "remove it, or set on_leak to 'drop'"
            )
        block.leaks[self.history.name] = np.bincount(rows_N[~kept_N], minlength=block.rows).astype(np.int32)
        return kept_N

    def _place(self, column: str, block: _Block, row: int) -> str:
        return f"column {column!r}, {self.table.locate(block.start + int(row))}"

    @staticmethod
    def _number(at: int, rows_N: npt.NDArray[np.int64]) -> str:
        first, end = np.searchsorted(rows_N, [rows_N[at], rows_N[at] + 1])
        return f"{at - first + 1} of {end - first}"


def _behaviours(h: History, time: str | None, table: Source, clock: bool | None = None) -> _Behaviours:
    """A history of a table, whose times are of one kind: that of training (``clock``), where it is known.

    Raises:
        DataError: they are not.
    """
    if h.times is not None:
        kinds = {name: _is_clock(table.types[name]) for name in (h.times, time) if name is not None}
        if time is not None and {*kinds.values()} == {False, True}:
            raise DataError(
                f"{table.name}: column {h.times!r} of history {h.name!r} holds {table.types[h.times]}, and the row's "
                f"time {time!r} {table.types[time]}; expected numbers in both, or timestamps in both"
            )
        for name, kind in kinds.items():
            if clock is not None and kind is not None and kind != clock:
                raise DataError(
                    f"{table.name}: column {name!r} of history {h.name!r} holds {table.types[name]}, but training had "
                    f"{'timestamps or dates' if clock else 'numbers'}; expected times of the same kind"
                )
    return _Behaviours(h, time, table)


def _clock(h: History, time: str | None, table: Source) -> bool | None:
    """Whether a history has timestamps or dates; ``None``: it has no times, or they are all missing."""
    if h.times is None:
        return None
    own = _is_clock(table.types[h.times])
    return own if own is not None or time is None else _is_clock(table.types[time])


def keep_behaviours(kept_N: npt.NDArray[np.bool_], values: Ids, inner: Ids | None = None) -> tuple[Ids, ...]:
    """The values of the behaviours that are kept, and if every behaviour has ``inner`` of them, also how many each has."""
    if inner is None:
        return (values[kept_N],)
    return values[np.repeat(kept_N, inner)], inner[kept_N]


def _most_recent(lengths: Ids | npt.NDArray[np.int64], count: int) -> npt.NDArray[np.bool_]:
    """Of the values of lists of these lengths, which are among the last ``count`` of theirs."""
    ends = np.repeat(np.cumsum(lengths), lengths)
    recent: npt.NDArray[np.bool_] = ends - np.arange(len(ends)) <= count
    return recent


@dataclass(frozen=True)
class _Cross:
    """A cross on its way into blocks, after the columns that it crosses: places among the sparse columns, and its ids."""

    at: int
    of: tuple[int, int]
    second_size: int
    vocabulary: Vocabulary | HashBuckets

    part: ClassVar[str] = "sparse"

    def fill(self, block: _Block) -> None:
        ids = block.parts["sparse"]
        ids[self.at] = self.vocabulary.key_ids(cross_keys(ids[self.of[0]], ids[self.of[1]], self.second_size))


def _fill(column: _Column | _Behaviours | _Cross, after: Sequence[Future[None] | None], block: _Block) -> None:
    for job in after:  # all of them submitted before this one, so never behind it in the queue
        if job is not None:
            job.result()
    column.fill(block)


class _Block:
    """Rows on their way to an :class:`Encoded`: column by column, since every column is encoded by itself.

    ``lists`` has the values of lists, how many every row has, and of nested lists, how many every behaviour has; and the times
    of rows.
    """

    def __init__(self, columns: Sequence[_Column | _Behaviours | _Cross], start: int, rows: int) -> None:
        self.start, self.rows = start, rows
        self.lists: dict[tuple[str, str], tuple[npt.NDArray[Any], ...]] = {}
        self.leaks: dict[str, Ids] = {}
        self.parts: dict[str, npt.NDArray[Any]] = {}
        for part, dtype in _DTYPES.items():
            count = sum(column.part == part for column in columns)
            # some rows more than needed, since columns a power of two of bytes apart would share few lines of the cache
            self.parts[part] = np.empty((count, rows + 16), dtype)[:, :rows]

    def encoded(self, layout: BatchLayout) -> Encoded:
        """The rows, once every column has filled its part."""
        parts = {part: np.ascontiguousarray(columns.T) for part, columns in self.parts.items()}
        lists = {c.name: self.lists["sequences", c.name] for c in layout.sequences}
        labels, weight, group = (parts[name] if parts[name].shape[1] else None for name in ("labels", "weight", "group"))
        return Encoded(
            parts["sparse"],
            parts["dense"],
            {name: (values, lengths) for name, (values, lengths, *_) in lists.items()},
            labels=labels,
            weight=None if weight is None else weight[:, 0],
            group=None if group is None else group[:, 0],
            inner={name: found[2] for name, found in lists.items() if len(found) > 2},
            leaks=self.leaks,
        )


def _finished(block: _Block, jobs: list[Future[None]], layout: BatchLayout) -> Encoded:
    for job in jobs:
        job.result()
    return block.encoded(layout)


def parallel(job: Callable[[T], R], items: Sequence[T], *, rows: int = BLOCK_ROWS) -> list[R]:
    """``[job(i) for i in items]`` on all cores (Arrow and NumPy release the interpreter lock); alone where rows are few."""
    threads = min(cpu_count() or 1, len(items)) if rows > _FEW_ROWS else 1
    if threads <= 1:
        return [job(i) for i in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(job, items))


def _as_text(f: SparseField | SequenceField, kind: Any) -> bool:
    """Whether the field reads text, also from a CSV file in which every cell of the column happens to be a number."""
    return kind != pa.int64() or (isinstance(f, SequenceField) and f.separator is not None)


def _blocks(name: str, table: Source, bar: Tracker, text: bool = False) -> Iterator[tuple[Any, Describe]]:
    start = 0
    for array in table.arrays(name, text=text):
        yield array, _describe(name, table, start)
        start += len(array)
        bar.advance(len(array))


def _fit_vocabulary(
    schema: Schema, name: str, members: list[SparseField | SequenceField], table: Source, bar: Tracker
) -> Vocabulary | HashBuckets:
    owner = schema[name]
    assert isinstance(owner, SparseField | SequenceField)
    if owner.hash_size is not None:
        return HashBuckets(owner.hash_size)
    kinds = {str(key_type(table.types[f.name])): key_type(table.types[f.name]) for f in members}
    kind = pa.large_string() if len(kinds) > 1 or _separated(members) else next(iter(kinds.values()))
    counter = ValueCounter(kind)
    histories = {member: h for h in schema.histories for member in h.fields}
    for f in members:
        if isinstance(f, SequenceField) and f.name in histories:
            blocks = _known_values(histories[f.name], schema.time, f, table, bar, _as_text(f, kind))
        else:
            blocks = _blocks(f.name, table, bar, _as_text(f, kind))
        for array, describe in blocks:
            if isinstance(f, SequenceField) and f.name not in histories:
                array, _, _, describe = _flat(f, array, describe)
            counter.update(_value_keys(array, kind, describe))
    if not len(counter.result()[0]):
        raise _all_missing(name, table, guarded=not histories.keys().isdisjoint(f.name for f in members))
    return Vocabulary.fit(counter, owner.min_count, owner.max_size)


def _value_keys(array: Any, kind: Any, describe: Describe) -> Any:
    """Keys of categories. Times are none: how many digits their text has depends on the unit of the column."""
    found = array.type.value_type if isinstance(array, pa.DictionaryArray) else array.type
    if pa.types.is_temporal(found) and not pa.types.is_date(found):
        raise DataError(
            f"{describe(0)}: the column holds {found}, which is no category; derive columns from it (hour, weekday), or make "
            "it text or an integer"
        )
    return as_keys(array, kind, describe)


def _known_values(
    h: History, time: str | None, f: SequenceField, table: Source, bar: Tracker, text: bool
) -> Iterator[tuple[Any, Describe]]:
    """The values of an attribute of a history in those behaviours that encoding lets through, and the place of each."""
    behaviours = _behaviours(replace(h, fields=(f.name,), gaps=None), time, table)
    read = table.blocks(f.name, text=text)
    times = None if h.times is None else table.blocks(h.times)
    now = None if times is None or time is None else table.blocks(time)
    start = 0
    for array in read:
        values, lengths, inner, place = _flat(f, array, _describe(f.name, table, start))
        block = _Block((), start, len(array))
        block.lists["sequences", f.name] = np.arange(len(values)), lengths, *(() if inner is None else (inner,))
        if h.times is not None and times is not None:
            block.lists["times", h.times] = _time_lists(h.times, next(times), _describe(h.times, table, start))
        if time is not None and now is not None:
            block.lists["time", time] = _row_times(next(now), _describe(time, table, start))
        behaviours.fill(block)
        kept = block.lists["sequences", f.name][0]
        yield values.take(pa.array(kept)), lambda at, kept=kept, place=place: place(int(kept[at]))  # type: ignore[misc]
        start += len(array)
        bar.advance(len(array))


def _separated(members: list[SparseField | SequenceField]) -> bool:
    return any(isinstance(f, SequenceField) and f.separator is not None for f in members)


def _fit_dense(f: DenseField, table: Source, bar: Tracker) -> Numeric | Vocabulary:
    moments, quantiles, counter = Moments(), Quantiles(), ValueCounter(pa.int64())
    for array, describe in _blocks(f.name, table, bar):
        x, counts = tally(array, describe)
        if f.encoding == "criteo_log":
            counter.update(_category_keys(x, describe), counts)
        elif f.encoding in ("piecewise", "bucket"):
            quantiles.update(x, counts)
        moments.update(signed_log(x) if f.encoding == "log" else x, counts)
    if not moments.maximum >= moments.minimum:
        raise _all_missing(f.name, table)
    missing = moments.missing > 0
    if f.encoding == "criteo_log":
        return Vocabulary.fit(counter, f.min_count, None)
    if f.encoding in ("piecewise", "bucket"):
        return Numeric(encoding=f.encoding, missing=missing, edges=quantiles.edges(f.num_bins))
    if f.encoding == "minmax":
        scale = moments.maximum - moments.minimum
        return Numeric(encoding=f.encoding, missing=missing, offset=moments.minimum, scale=scale or 1.0)
    mean, std = moments.mean_std()
    return Numeric(encoding=f.encoding, missing=missing, offset=mean, scale=std)


def _all_missing(name: str, table: Source, guarded: bool = False) -> DataError:
    leaks = ", or behaviours that are not before the time of their row" if guarded else ""
    return DataError(f"column {name!r} of {table.name} has only missing values{leaks} in the training rows; remove the field")


def _category_keys(x: Floats, describe: Describe) -> Any:
    missing = np.isnan(x)
    return as_keys(pa.array(criteo_log(np.where(missing, 0, x)), mask=missing), pa.int64(), describe)


def _flat(f: SequenceField, array: Any, describe: Describe, hint: str | None = None) -> tuple[Any, Ids, Ids | None, Describe]:
    """The values of all lists one after another, the length of each list (0: missing), and the place of a value.

    Of a nested field, the lists inside the lists are behaviours: between the two last comes how many values each of them has.
    """
    lists = as_lists(f, array, describe, hint)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int32)
    ends = np.cumsum(lengths)

    def place(at: int) -> str:
        return describe(int(np.searchsorted(ends, at, side="right")))

    if not f.nested:
        return lists.flatten(), lengths, None, place
    values, inner, _, inner_place = _flat(replace(f, nested=False), lists.flatten(), place, "declare the field without nested")
    return values, lengths, inner, inner_place


def _time_lists(column: str, array: Any, describe: Describe) -> tuple[npt.NDArray[Any], Ids]:
    """The times of behaviours as :func:`_times` gives them, and how many every row has."""
    values, lengths, _, place = _flat(SequenceField(name=column), array, describe, "expected a list of times in every row")
    return _times(values, place), lengths


def _row_times(array: Any, describe: Describe) -> tuple[npt.NDArray[Any]]:
    return (_times(array, describe),)


def _times(array: Any, describe: Describe) -> npt.NDArray[Any]:
    """Numbers as they are, as int64 or float64; timestamps and dates in microseconds, as int64."""
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    kind = array.type
    if pa.types.is_floating(kind):
        array = pc.if_else(pc.is_nan(array), pa.scalar(None, kind), array)
    if array.null_count:
        row = int(np.argmax(pc.is_null(array).to_numpy(zero_copy_only=False)))
        raise DataError(f"{describe(row)}: the time is missing; expected one in every row, since the schema has a history")
    if not len(array):
        return np.zeros(0, np.int64)
    if pa.types.is_timestamp(kind):
        array = array.view(pa.timestamp(kind.unit))  # the instant, whatever the time zone
    times: npt.NDArray[Any]
    if _is_clock(kind):
        times = pc.cast(pc.cast(array, pa.timestamp("us"), safe=False), pa.int64()).to_numpy(zero_copy_only=False)
    elif pa.types.is_integer(kind) and kind != pa.uint64():
        times = pc.cast(array, pa.int64()).to_numpy(zero_copy_only=False)
    elif pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        times = as_floats(array, describe)
    else:
        raise DataError(f"{describe(0)}: the column holds {kind}; expected times as numbers, timestamps or dates")
    return times


def _is_list(kind: Any) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind))


def _is_clock(kind: Any) -> bool | None:
    """Whether a column of this type, or its lists, hold timestamps or dates; ``None`` if they hold nothing."""
    while _is_list(kind) or pa.types.is_dictionary(kind):
        kind = kind.value_type
    return None if pa.types.is_null(kind) else pa.types.is_timestamp(kind) or pa.types.is_date(kind)


def _scaled(numeric: Numeric, array: Any, describe: Describe) -> npt.NDArray[np.float32]:
    x = as_floats(array, describe)
    with np.errstate(over="ignore"):
        scaled = numeric.scaled(x)
    if np.isinf(scaled).any():
        row = int(np.argmax(np.isinf(scaled)))
        raise DataError(f"{describe(row)}: {x[row]:g} is beyond what 32-bit floats hold; use encoding log, piecewise or bucket")
    return scaled


def as_lists(f: SequenceField, array: Any, describe: Describe, hint: str | None = None) -> Any:
    """The column as a list array without nulls inside lists."""
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if pa.types.is_null(array.type):
        kind = pa.large_list(pa.large_string())
        return pa.array([[]] * len(array), pa.large_list(kind) if f.nested else kind)
    is_text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
    if is_text and f.separator is not None:
        # "" is an empty list, not a list of one empty value
        filled = pc.if_else(pc.equal(array, ""), pa.scalar(None, array.type), array)
        array = pc.split_pattern(filled, f.separator)
    if not _is_list(array.type):
        hint = hint or ("set the field's separator" if is_text else "declare the field sparse or dense")
        raise DataError(f"{describe(0)}: the column holds {array.type}, not lists; {hint}")
    if _is_list(array.type.value_type) and not f.nested:
        raise DataError(f"{describe(0)}: the column holds lists of lists; declare the field nested, in a history")
    if array.flatten().null_count:
        row = int(
            np.repeat(np.arange(len(array)), pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False))[
                int(np.argmax(pc.is_null(array.flatten()).to_numpy(zero_copy_only=False)))
            ]
        )
        raise DataError(f"{describe(row)}: a list holds a missing value; remove it from the list")
    return array


def _labels(array: Any, describe: Describe) -> npt.NDArray[np.float32]:
    keys = array.dictionary_encode() if not isinstance(array, pa.DictionaryArray) else array
    values = np.array([_label(value) for value in keys.dictionary.to_pylist()] + [np.nan], np.float32)
    labels: npt.NDArray[np.float32] = values[keys.indices.cast(pa.int32()).fill_null(len(values) - 1).to_numpy()]
    if np.isnan(labels).any():
        row = int(np.argmax(np.isnan(labels)))
        raise DataError(f"{describe(row)}: the label is {array[row].as_py()!r}; expected 0 or 1 in every row")
    return labels


def _label(value: object) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return math.nan
    return number if number in (0, 1) else math.nan


def _weights(array: Any, describe: Describe) -> npt.NDArray[np.float32]:
    values = as_floats(array, describe)
    wrong = ~(values >= 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"{describe(row)}: the row weight is {array[row].as_py()!r}; expected a number of 0 or more")
    return values.astype(np.float32)


def _codes(array: Any, describe: Describe) -> npt.NDArray[np.int64]:
    """An int64 that is equal where the raw value is equal: integers themselves, hashes of text; missing is one group."""
    keys = as_keys(array, key_type(array.type), describe)
    integers = keys.dictionary.type == pa.int64()
    codes = keys.dictionary.to_numpy(zero_copy_only=False) if integers else hash64(keys.dictionary).view(np.int64)
    at = keys.indices.fill_null(len(codes)).to_numpy(zero_copy_only=False)
    result: npt.NDArray[np.int64] = np.append(codes, np.iinfo(np.int64).min)[at]
    return result
