"""What was learned from the training rows to turn a table into ids and scaled values; owns the vocabularies.

``fit`` reads every column once, in blocks, several columns at a time; memory grows with the vocabularies, not with the rows.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cached_property
from os import cpu_count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ctrlib.batch import Batch, Ragged
from ctrlib.data.numeric import Floats, Moments, Numeric, Quantiles, as_floats, criteo_log, signed_log
from ctrlib.data.source import BLOCK_ROWS, Source, open_source
from ctrlib.data.vocabulary import HashBuckets, ValueCounter, Vocabulary, as_keys, hash64, key_type
from ctrlib.progress import Tracker, track
from ctrlib.schema import (
    BatchLayout,
    DataError,
    DenseColumn,
    DenseField,
    Field,
    Schema,
    SequenceColumn,
    SequenceField,
    SparseColumn,
    SparseField,
)

T = TypeVar("T")
R = TypeVar("R")
Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Encoded:
    """One block of rows: ids, numbers, ragged ids, and the columns that are not features."""

    sparse: Ids
    dense: npt.NDArray[np.float32]
    sequences: Mapping[str, tuple[Ids, Ids]]  # values, lengths
    labels: npt.NDArray[np.float32] | None = None
    weight: npt.NDArray[np.float32] | None = None
    group: npt.NDArray[np.int64] | None = None

    def batch(self) -> Batch:
        """The block as a :class:`~ctrlib.batch.Batch`."""
        sequences = {
            name: Ragged(torch.from_numpy(values), torch.from_numpy(np.append(0, np.cumsum(lengths)).astype(np.int32)))
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


@dataclass(frozen=True)
class Encoder:
    """Raw columns → ids and numbers, as learned from training rows. Make one with :meth:`fit` or :meth:`load`.

    Attributes:
        schema: the fields.
        vocabularies: by table name (the field's own, or that of the field it shares with).
        numeric: what each dense field learned, except ``criteo_log`` fields, which have a vocabulary.
    """

    schema: Schema
    vocabularies: Mapping[str, Vocabulary | HashBuckets]
    numeric: Mapping[str, Numeric]

    @classmethod
    def fit(cls, schema: Schema, source: object) -> Encoder:
        """Learn vocabularies and statistics from ``source``: the *training* rows and no others.

        Args:
            schema: the fields to encode.
            source: anything :func:`~ctrlib.data.source.open_source` accepts.

        Raises:
            DataError: a declared column is missing, has only missing values, or holds values of the wrong kind.
        """
        table = open_source(source, "the training table")
        if not schema.fields:
            raise DataError(f"the schema of {table.name} has no field left to learn from; declare at least one feature")
        table.require([f.name for f in schema.fields], ", which the schema declares as a field")
        if table.num_rows == 0:
            raise DataError(f"{table.name} has no training rows; expected at least one")
        sharing: dict[str, list[SparseField | SequenceField]] = {}
        jobs: list[Callable[[Tracker], tuple[str, object]]] = []
        for f in schema.fields:
            if isinstance(f, DenseField):
                jobs.append(lambda bar, f=f: (f.name, _fit_dense(f, table, bar)))  # type: ignore[misc]
            else:
                sharing.setdefault(f.shares or f.name, []).append(f)
        for name, members in sharing.items():
            jobs.append(lambda bar, name=name, members=members: (name, _fit_vocabulary(schema, name, members, table, bar)))  # type: ignore[misc]
        with track("fit encoder", len(schema.fields) * table.num_rows, "cells") as bar:
            learned = dict(parallel(lambda job: job(bar), jobs))
        return cls(
            schema,
            {n: v for n, v in learned.items() if isinstance(v, Vocabulary | HashBuckets)},
            {n: v for n, v in learned.items() if isinstance(v, Numeric)},
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
                size = self.vocabularies[_table(f)].size
                sequences.append(SequenceColumn(f.name, size, _table(f), f.pooling, f.ordered))
            else:
                sparse.append(SparseColumn(f.name, self.vocabularies[_table(f)].size, _table(f)))
        return BatchLayout(tuple(sparse), tuple(dense), tuple(sequences), self.schema.labels)

    @cached_property
    def hash(self) -> str:
        """A fingerprint of the schema and of everything learned."""
        digest = hashlib.sha256(json.dumps(self._json(), sort_keys=True).encode())
        for name in sorted(self.vocabularies):
            digest.update(name.encode() + b"\0" + self.vocabularies[name].fingerprint())
        return digest.hexdigest()

    def encode(self, source: object, *, labels: bool = True, block_rows: int = BLOCK_ROWS) -> Iterator[Encoded]:
        """Encode a table block by block, in row order.

        Args:
            source: anything :func:`~ctrlib.data.source.open_source` accepts.
            labels: also read labels, weight and group; without them only the fields are needed.

        Raises:
            DataError: a column is missing or a value cannot be what its field says; names file, column and row.
        """
        table = open_source(source)
        table.require([f.name for f in self.schema.fields], ", which the model reads")
        special = [c for c in (*self.schema.labels, self.schema.weight, self.schema.group) if c is not None] if labels else []
        table.require(special, ", which the schema names as label, weight or group")
        if table.num_rows == 0:
            return
        names = list(dict.fromkeys([*(f.name for f in self.schema.fields), *special]))
        texts = {f.name for f in self.schema.fields if not isinstance(f, DenseField) and _as_text(f, self._keys(f))}
        columns = {name: table.blocks(name, block_rows, text=name in texts) for name in names}
        for start in range(0, table.num_rows, block_rows):
            arrays = dict(zip(names, parallel(lambda name: next(columns[name]), names, rows=table.num_rows), strict=True))
            yield self._encode_block(arrays, table, start, labels)

    def transform(self, source: object, *, labels: bool = False) -> Batch:
        """Encode a whole table in memory as one batch."""
        table = open_source(source)
        if table.num_rows == 0:
            raise DataError(f"{table.name} has no rows; expected at least one")
        return next(self.encode(table, labels=labels, block_rows=table.num_rows)).batch()

    def _encode_block(self, arrays: Mapping[str, Any], table: Source, start: int, with_labels: bool) -> Encoded:
        rows = len(next(iter(arrays.values())))
        layout = self.layout
        sparse = np.empty((rows, len(layout.sparse)), np.int32)
        dense = np.empty((rows, len(layout.dense)), np.float32)
        sequences: dict[str, tuple[Ids, Ids]] = {}
        sparse_at = {c.name: i for i, c in enumerate(layout.sparse)}
        dense_at = {c.name: i for i, c in enumerate(layout.dense)}

        def encode(f: Field) -> None:
            array, describe = arrays[f.name], _describe(f.name, table, start)
            if isinstance(f, SequenceField):
                sequences[f.name] = self._sequence(f, array, describe)
            elif f.name in dense_at:
                dense[:, dense_at[f.name]] = _scaled(self.numeric[f.name], as_floats(array, describe), describe)
            else:
                sparse[:, sparse_at[f.name]] = self._ids(f, array, describe)

        parallel(encode, self.schema.fields, rows=rows)
        if not with_labels:
            return Encoded(sparse, dense, sequences)
        return Encoded(
            sparse,
            dense,
            sequences,
            labels=np.stack([_labels(arrays[n], _describe(n, table, start)) for n in self.schema.labels], axis=1),
            weight=None if (w := self.schema.weight) is None else _weights(arrays[w], _describe(w, table, start)),
            group=None if (g := self.schema.group) is None else _codes(arrays[g], _describe(g, table, start)),
        )

    def _ids(self, f: SparseField | DenseField, array: Any, describe: Callable[[int], str]) -> Ids:
        if isinstance(f, DenseField) and f.encoding == "bucket":
            return self.numeric[f.name].bucket_ids(as_floats(array, describe))
        keys = _category_keys(array, describe) if isinstance(f, DenseField) else as_keys(array, self._keys(f), describe)
        return self.vocabularies[_table(f)].ids(keys)

    def _sequence(self, f: SequenceField, array: Any, describe: Callable[[int], str]) -> tuple[Ids, Ids]:
        values, lengths, describe = _flat(f, array, describe)
        keys = as_keys(values, self._keys(f), describe)
        ids = self.vocabularies[_table(f)].ids(keys)
        if f.max_length is not None:  # keep the last ones
            ends = np.repeat(np.cumsum(lengths), lengths)
            ids = ids[ends - np.arange(len(ids)) <= f.max_length]
            lengths = np.minimum(lengths, f.max_length).astype(np.int32)
        return ids, lengths

    def _keys(self, f: SparseField | SequenceField) -> Any:
        vocabulary = self.vocabularies[_table(f)]
        return vocabulary.values.type if isinstance(vocabulary, Vocabulary) else pa.large_string()

    def ids(self, field: str, values: Sequence[object]) -> Ids:
        """The ids of raw values of a sparse or sequence field (for pretrained vectors, reports)."""
        f = self.schema[field]
        if isinstance(f, DenseField):
            raise DataError(f"field {field!r} is dense; only sparse and sequence fields have ids")
        try:
            array = pa.array(values)
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise DataError(f"the values given for field {field!r} mix kinds ({error}); give all of them one type") from error
        keys = as_keys(array, self._keys(f), lambda at: f"value {at + 1} given for field {field!r}")
        return self.vocabularies[_table(f)].ids(keys)

    def _json(self) -> dict[str, Any]:
        return {"schema": self.schema.to_json(), "numeric": {n: asdict(v) for n, v in sorted(self.numeric.items())}}

    def save(self, folder: Path) -> None:
        """Write ``schema.json``, ``encoder.json`` and ``vocabularies/*.parquet`` into an existing folder."""
        self.schema.save(folder / "schema.json")
        files: dict[str, object] = {}
        (folder / "vocabularies").mkdir(exist_ok=True)
        for i, (name, vocabulary) in enumerate(sorted(self.vocabularies.items())):
            if isinstance(vocabulary, HashBuckets):
                files[name] = {"buckets": vocabulary.buckets}
                continue
            files[name] = {"file": f"vocabularies/{i:04d}.parquet"}  # a field's name may not be a file name
            table = pa.table({"value": vocabulary.values, "count": vocabulary.counts})
            pq.write_table(table, folder / f"vocabularies/{i:04d}.parquet", compression="zstd")
        data = {"hash": self.hash, "numeric": self._json()["numeric"], "vocabularies": files}
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
                    vocabularies[name] = Vocabulary(value, count.to_numpy())
            numeric = {n: Numeric(**{**v, "edges": tuple(v["edges"])}) for n, v in data["numeric"].items()}
            expected = data["hash"]
        except (OSError, ValueError, KeyError, TypeError, pa.ArrowInvalid) as error:
            raise DataError(f"encoder in {folder}: missing or damaged ({error}); make it again") from error
        encoder = cls(schema, vocabularies, numeric)
        if encoder.hash != expected:
            raise DataError(f"encoder in {folder}: its content differs from what was saved; make it again")
        return encoder


def _table(f: Field) -> str:
    return (None if isinstance(f, DenseField) else f.shares) or f.name


def _describe(column: str, table: Source, start: int) -> Callable[[int], str]:
    return lambda row: f"column {column!r}, {table.locate(start + row)}"


def parallel(job: Callable[[T], R], items: Sequence[T], *, rows: int = BLOCK_ROWS) -> list[R]:
    """``[job(i) for i in items]`` on all cores (Arrow and NumPy release the interpreter lock); alone where rows are few."""
    threads = min(cpu_count() or 1, len(items)) if rows > 4096 else 1
    if threads <= 1:
        return [job(i) for i in items]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(job, items))


def _as_text(f: SparseField | SequenceField, kind: Any) -> bool:
    """Whether the field reads text, also from a CSV file in which every cell of the column happens to be a number."""
    return kind != pa.int64() or (isinstance(f, SequenceField) and f.separator is not None)


def _blocks(name: str, table: Source, bar: Tracker, text: bool = False) -> Iterator[tuple[Any, Callable[[int], str]]]:
    start = 0
    for array in table.blocks(name, text=text):
        yield array, _describe(name, table, start)
        start += len(array)
        bar.advance(len(array))


def _fit_vocabulary(
    schema: Schema, name: str, members: list[SparseField | SequenceField], table: Source, bar: Tracker
) -> Vocabulary | HashBuckets:
    owner = schema[name]
    assert not isinstance(owner, DenseField)
    if owner.hash_size is not None:
        return HashBuckets(owner.hash_size)
    kinds = {str(key_type(table.types[f.name])): key_type(table.types[f.name]) for f in members}
    kind = pa.large_string() if len(kinds) > 1 or _separated(members) else next(iter(kinds.values()))
    counter = ValueCounter(kind)
    for f in members:
        for array, describe in _blocks(f.name, table, bar, _as_text(f, kind)):
            if isinstance(f, SequenceField):
                array, _, describe = _flat(f, array, describe)
            counter.update(as_keys(array, kind, describe))
    if not len(counter.result()[0]):
        raise _all_missing(name, table)
    return Vocabulary.fit(counter, owner.min_count, owner.max_size)


def _separated(members: list[SparseField | SequenceField]) -> bool:
    return any(isinstance(f, SequenceField) and f.separator is not None for f in members)


def _fit_dense(f: DenseField, table: Source, bar: Tracker) -> Numeric | Vocabulary:
    moments, quantiles, counter = Moments(), Quantiles(), ValueCounter(pa.int64())
    for array, describe in _blocks(f.name, table, bar):
        x = as_floats(array, describe)
        if f.encoding == "criteo_log":
            counter.update(_category_keys(array, describe))
        elif f.encoding in ("piecewise", "bucket"):
            quantiles.update(x)
        moments.update(signed_log(x) if f.encoding == "log" else x)
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


def _all_missing(name: str, table: Source) -> DataError:
    return DataError(f"column {name!r} of {table.name} has only missing values in the training rows; remove the field")


def _category_keys(array: Any, describe: Callable[[int], str]) -> Any:
    x: Floats = as_floats(array, describe)
    missing = np.isnan(x)
    return pa.array(criteo_log(np.where(missing, 0, x)), mask=missing).dictionary_encode()


def _flat(
    f: SequenceField, array: Any, describe: Callable[[int], str]
) -> tuple[Any, npt.NDArray[np.int32], Callable[[int], str]]:
    """The values of all lists one after another, the length of each list (0: missing), and the place of a value."""
    lists = _lists(f, array, describe)
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int32)
    ends = np.cumsum(lengths)
    return lists.flatten(), lengths, lambda at: describe(int(np.searchsorted(ends, at, side="right")))


def _scaled(numeric: Numeric, x: Floats, describe: Callable[[int], str]) -> npt.NDArray[np.float32]:
    with np.errstate(over="ignore"):
        scaled = numeric.scaled(x)
    if np.isinf(scaled).any():
        row = int(np.argmax(np.isinf(scaled)))
        raise DataError(f"{describe(row)}: {x[row]:g} is beyond what 32-bit floats hold; use encoding log, piecewise or bucket")
    return scaled


def _lists(f: SequenceField, array: Any, describe: Callable[[int], str]) -> Any:
    """The column as a list array without nulls inside lists."""
    if isinstance(array, pa.DictionaryArray):
        array = array.dictionary_decode()
    if pa.types.is_null(array.type):
        return pa.array([[]] * len(array), pa.large_list(pa.large_string()))
    is_text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
    if is_text and f.separator is not None:
        # "" is an empty list, not a list of one empty value
        filled = pc.if_else(pc.equal(array, ""), pa.scalar(None, array.type), array)
        array = pc.split_pattern(filled, f.separator)
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        hint = "set the field's separator" if is_text else "declare the field sparse or dense"
        raise DataError(f"{describe(0)}: the column holds {array.type}, not lists; {hint}")
    if array.flatten().null_count:
        row = int(
            np.repeat(np.arange(len(array)), pc.fill_null(pc.list_value_length(array), 0).to_numpy(zero_copy_only=False))[
                int(np.argmax(pc.is_null(array.flatten()).to_numpy(zero_copy_only=False)))
            ]
        )
        raise DataError(f"{describe(row)}: a list holds a missing value; remove it from the list")
    return array


def _labels(array: Any, describe: Callable[[int], str]) -> npt.NDArray[np.float32]:
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


def _weights(array: Any, describe: Callable[[int], str]) -> npt.NDArray[np.float32]:
    values = as_floats(array, describe)
    wrong = ~(values >= 0)
    if wrong.any():
        row = int(np.argmax(wrong))
        raise DataError(f"{describe(row)}: the row weight is {array[row].as_py()!r}; expected a number of 0 or more")
    return values.astype(np.float32)


def _codes(array: Any, describe: Callable[[int], str]) -> npt.NDArray[np.int64]:
    """An int64 that is equal where the raw value is equal: integers themselves, hashes of text; missing is one group."""
    keys = as_keys(array, key_type(array.type), describe)
    integers = keys.dictionary.type == pa.int64()
    codes = keys.dictionary.to_numpy(zero_copy_only=False) if integers else hash64(keys.dictionary).view(np.int64)
    at = keys.indices.fill_null(len(codes)).to_numpy(zero_copy_only=False)
    result: npt.NDArray[np.int64] = np.append(codes, np.iinfo(np.int64).min)[at]
    return result
