"""One way to read every kind of table: Parquet or CSV files, folders and globs, pandas and Polars frames, Arrow tables.

A :class:`Source` yields one column at a time as Arrow arrays in blocks of rows, so that columns can be read by several threads
and nothing is ever held whole. Parquet strings come back dictionary-encoded and are never materialised.
"""

from __future__ import annotations

import glob
import shutil
import tempfile
import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from ctrlib.schema import DataError, suggest

BLOCK_ROWS = 1 << 17
_READ_BYTES = 1 << 18  # of a file at a time, for each column: many columns of large row groups are read side by side
_CSV_BLOCK = 1 << 24  # bytes; no row may be longer
_CSV_SUFFIXES = {".csv": ",", ".tsv": "\t"}
_PARQUET_SUFFIXES = (".parquet", ".pq")


@dataclass(frozen=True)
class Source:
    """A table somewhere.

    Attributes:
        name: how errors call it.
        types: Arrow type by column name.
        num_rows: rows (after :meth:`select` or :meth:`divide`, the selected ones).
        codes: a number for every row of the whole table, shared by all selections that one :meth:`divide` made; ``None``: all
            rows are selected.
        picks: the codes whose rows are selected.
    """

    name: str
    types: Mapping[str, Any]
    parts: Sequence[_Part]
    num_rows: int
    codes: npt.NDArray[np.uint8] | None = None
    picks: tuple[int, ...] = ()
    keep_alive: object = field(default=None, repr=False)

    def require(self, columns: Sequence[str], why: str = "") -> None:
        """Raise :class:`DataError` for the first of ``columns`` that the table lacks."""
        for column in columns:
            if column not in self.types:
                raise DataError(
                    f"{self.name} has no column {column!r}{why}{suggest(column, self.types)} "
                    f"(columns: {', '.join(list(self.types)[:40])})"
                )

    def select(self, rows: np.ndarray) -> Source:
        """The rows where the boolean mask over *all* rows of the table is true."""
        return self.divide(rows.astype(bool, copy=False).view(np.uint8), {"": 1})[""]

    def divide(self, codes: npt.NDArray[np.uint8], parts: Mapping[str, int]) -> dict[str, Source]:
        """Selections by name: each has the rows with its code, where ``codes`` holds one for *every* row of the table."""
        return {
            name: replace(self, num_rows=int(np.count_nonzero(codes == code)), codes=codes, picks=(code,))
            for name, code in parts.items()
        }

    def joined(self, others: Iterable[Source]) -> Source:
        """The rows of this selection and of others that the same :meth:`divide` made, in row order."""
        sizes = {source.picks: source.num_rows for source in (self, *others)}
        return replace(self, num_rows=sum(sizes.values()), picks=tuple(pick for picks in sizes for pick in picks))

    def chosen(self, start: int = 0, stop: int | None = None) -> npt.NDArray[np.bool_]:
        """Which of the rows from ``start`` to ``stop`` of the whole table are selected, where not all are (``codes``)."""
        assert self.codes is not None
        picked = np.zeros(256, bool)
        picked[list(self.picks)] = True
        return picked[self.codes[start:stop]]

    def locate(self, row: int) -> str:
        """``"<file>, row 17"`` of the row at position ``row``; the first data row of a file is row 1."""
        at = int(np.flatnonzero(self.chosen())[row]) if self.codes is not None else row
        for part in self.parts:
            if at < part.num_rows:
                return f"{part.name}, row {at + 1}"
            at -= part.num_rows
        return f"{self.name}, row {at + 1}"

    def fingerprint(self) -> list[dict[str, Any]]:
        """Path, size and time of change of every raw file, by which a store notices that it is stale."""
        files = [Path(part.name) for part in self.parts if part.path is not None]
        stats = [(path.resolve(), path.stat()) for path in files]
        return [{"path": str(path), "bytes": s.st_size, "mtime_ns": s.st_mtime_ns} for path, s in stats]

    def blocks(self, column: str, block_rows: int = BLOCK_ROWS, *, text: bool = False) -> Iterator[Any]:
        """The column as Arrow arrays of ``block_rows`` rows (the last one shorter), in row order.

        Args:
            column: its name.
            block_rows: rows an array.
            text: give numbers of a CSV file as the text that was written; other tables know their types.

        Raises:
            DataError: a file turns out to be damaged.
        """
        buffered: list[Any] = []
        missing = block_rows
        for array in self.arrays(column, text=text):
            while len(array) >= missing:
                yield _concat([*buffered, array.slice(0, missing)])
                buffered, array, missing = [], array.slice(missing), block_rows
            if len(array):
                buffered.append(array)
                missing -= len(array)
        if buffered:
            yield _concat(buffered)

    def arrays(self, column: str, *, text: bool = False) -> Iterator[Any]:
        """As :meth:`blocks`, but in the arrays that reading gives, none of them longer than ``BLOCK_ROWS``."""
        at = 0
        for part in self.parts:
            for array in part.arrays(column, text):
                end = at + len(array)
                chosen = None if self.codes is None else self.chosen(at, end)
                at = end
                if chosen is not None and not chosen.all():
                    array = array.filter(pa.array(chosen))
                if len(array):
                    yield array

    def column(self, column: str) -> Any:
        """The whole column as one Arrow array."""
        return _concat(list(self.blocks(column))) if self.num_rows else pa.array([], self.types[column])


def _concat(arrays: list[Any]) -> Any:
    if len(arrays) == 1:
        return arrays[0]
    if isinstance(arrays[0], pa.DictionaryArray):
        # codes of few bits may not number the values of all parts together
        wide = [pa.DictionaryArray.from_arrays(a.indices.cast(pa.int32()), a.dictionary) for a in arrays]
        return pa.chunked_array(wide).unify_dictionaries().combine_chunks()
    return pa.concat_arrays(arrays)


@dataclass(frozen=True)
class _Part:
    """One file, or a table in memory."""

    name: str
    num_rows: int
    table: Any = None
    path: Path | None = None
    metadata: Any = None
    texts: Collection[str] = ()  # columns stored as text, read dictionary-encoded
    casts: Mapping[str, Any] = field(default_factory=dict)  # numbers of a CSV file; one kind of list

    def arrays(self, column: str, text: bool) -> Iterator[Any]:
        if self.table is not None:
            for chunk in self.table.column(column).chunks:
                yield from (chunk.slice(at, BLOCK_ROWS) for at in range(0, len(chunk), BLOCK_ROWS))
            return
        try:
            stored_text = column in self.texts
            cast = None if text and stored_text else self.casts.get(column)
            dictionary = [column] if stored_text else []
            with pq.ParquetFile(
                self.path, metadata=self.metadata, read_dictionary=dictionary, buffer_size=_READ_BYTES, pre_buffer=False
            ) as file:
                for batch in file.iter_batches(BLOCK_ROWS, columns=[column], use_threads=False):
                    array = batch.column(0)
                    if cast is not None:
                        array = pc.cast(array.dictionary, cast).take(array.indices) if stored_text else pc.cast(array, cast)
                    yield array
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(self.path, error) from error


def _damaged(path: Path | None, error: Exception) -> DataError:
    if isinstance(error, PermissionError):
        return DataError(f"{path}: cannot be read (permission denied); allow it, or copy the file")
    return DataError(
        f"{path}: cannot be read as Parquet ({_first_line(error)}); the file is damaged or cut short: copy or write it again"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


def open_source(data: object, name: str = "the table") -> Source:
    """A :class:`Source` over whatever ``data`` is.

    Args:
        data: path of a ``.parquet``, ``.csv`` or ``.tsv`` file, of a folder of such files, or a glob; a pandas or Polars frame;
            an Arrow table; a list of dicts (rows) or a dict of lists (columns).
        name: how errors call a table that has no path.

    Raises:
        DataError: nothing there, an unknown kind, duplicate column names, an empty or damaged file, a malformed row.
    """
    if isinstance(data, Source):
        return data
    if isinstance(data, str | Path):
        return _from_paths(_find(str(data)), str(data))
    return _from_table(_to_arrow(data, name), name)


def _to_arrow(data: object, name: str) -> Any:
    if isinstance(data, pa.Table):
        return data
    module = type(data).__module__.partition(".")[0]
    try:
        if module == "pandas":
            frame: Any = data
            _unique([str(c) for c in frame.columns], name)
            return pa.Table.from_pandas(frame, preserve_index=False)
        if module == "polars":
            lazy: Any = data
            return (lazy.collect() if hasattr(lazy, "collect") else lazy).to_arrow()
        if isinstance(data, Mapping):
            return pa.table({str(k): as_array(v) for k, v in data.items()})
        if isinstance(data, list) and all(isinstance(row, Mapping) for row in data):
            names = dict.fromkeys(str(key) for row in data for key in row)
            return pa.table({n: as_array([row.get(n) for row in data]) for n in names})
    except (pa.ArrowInvalid, pa.ArrowTypeError, TypeError, OverflowError) as error:
        raise DataError(f"{name}: a column mixes kinds of values ({_first_line(error)}); give every column one type") from error
    raise DataError(
        f"{name} is a {type(data).__name__}; expected a path, a pandas or Polars frame, an Arrow table, "
        "a list of dicts or a dict of lists"
    )


def as_array(values: Any) -> Any:
    """``pa.array``, which alone does not think of unsigned integers: of numbers from 0 to 2⁶⁴ − 1 it makes uint64 where needed.

    Raises:
        OverflowError: integers that no 64 bits hold, or of both kinds.
    """
    try:
        return pa.array(values)
    except OverflowError:
        if set(map(type, values)) <= {int, type(None)}:
            return pa.array(values, pa.uint64())
        raise


def _from_table(table: Any, name: str) -> Source:
    _unique(table.column_names, name)
    # Polars gives large and view types; one kind of string keeps the rest simple. No value changes.
    table = table.cast(pa.schema([pa.field(f.name, _plain(f.type)) for f in table.schema]))
    types = {f.name: f.type for f in table.schema}
    return Source(name, types, [_Part(name, table.num_rows, table=table)], table.num_rows)


def decoded(values: Any) -> Any:
    """The values of a column, whether it is stored as a dictionary or not."""
    return values.dictionary_decode() if isinstance(values, pa.DictionaryArray) else values


def _plain(kind: Any) -> Any:
    if pa.types.is_string_view(kind):
        return pa.large_string()
    if pa.types.is_dictionary(kind) and pa.types.is_string_view(kind.value_type):
        return pa.dictionary(kind.index_type, pa.large_string())
    if pa.types.is_large_list(kind) or pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        inner = _plain(kind.value_type)
        return pa.large_list(inner.value_type if pa.types.is_dictionary(inner) else inner)
    return kind


def _unique(columns: Sequence[str], name: str) -> None:
    seen: set[str] = set()
    for column in columns:
        if column in seen:
            raise DataError(f"{name} has two columns named {column!r}; rename one of them")
        seen.add(column)


def _find(path: str) -> list[Path]:
    at = Path(path)
    if at.is_file():
        return [at]
    if at.is_dir():
        for name in ("artifact.json", "artifact/artifact.json", "encoder.json"):
            if (at / name).is_file():
                raise DataError(f"{path}: the folder is a run, an artifact or an encoder, not a table; name the rows")
        files = _tables_in(at)
        if not files:
            raise DataError(f"{path}: the folder holds no .parquet, .csv or .tsv file")
    else:
        found = sorted(Path(p) for p in glob.glob(path, recursive=True))  # noqa: PTH207 (absolute patterns)
        visible = [p for p in found if not p.name.startswith((".", "_"))]
        # a name such as day.parquet may be that of a folder of parts
        files = [f for p in visible for f in ([p] if p.is_file() else _tables_in(p) if _kind(p) else [])]
        files = list(dict.fromkeys(files))
        if not files:
            raise DataError(f"{path}: no such file, folder or glob")
    kinds = {_kind(p) or f"unknown: {p.name}" for p in files}
    if len(kinds) > 1:
        raise DataError(f"{path}: holds files of several kinds ({', '.join(sorted(kinds))}); keep one kind")
    return files


def _tables_in(folder: Path) -> list[Path]:
    """Files of tables in a folder and below; not those that are hidden or in hidden folders, where writers keep drafts."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and _kind(p))
    return [p for p in files if not any(part.startswith((".", "_")) for part in p.relative_to(folder).parts)]


def _kind(path: Path) -> str:
    suffix = path.suffixes[-2] if path.suffix == ".gz" and len(path.suffixes) > 1 else path.suffix
    suffix = suffix.lower()
    return "parquet" if suffix in _PARQUET_SUFFIXES else suffix[1:] if suffix in _CSV_SUFFIXES else ""


def _from_paths(paths: list[Path], name: str) -> Source:
    kind = _kind(paths[0])
    if not kind:
        raise DataError(f"{paths[0]}: unknown kind of file; expected .parquet, .csv or .tsv (.csv.gz, .tsv.gz)")
    for path in paths:
        if path.stat().st_size == 0:
            raise DataError(f"{path}: the file is empty")
    if kind == "parquet":
        return _from_parquet(paths, name)
    folder = _Scratch()
    parts, types = _convert_csv(paths, _CSV_SUFFIXES["." + kind], folder.path)
    return Source(name, types, parts, sum(p.num_rows for p in parts), keep_alive=folder)


class _Scratch:
    """A temporary folder that goes when nothing refers to it any more."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="ctrlib-csv-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _from_parquet(paths: list[Path], name: str) -> Source:
    parts: list[_Part] = []
    types: dict[str, Any] = {}
    for path in paths:
        try:
            with pq.ParquetFile(path, memory_map=True) as file:
                schema, metadata = file.schema_arrow, file.metadata
        except (pa.ArrowInvalid, OSError) as error:
            raise _damaged(path, error) from error
        _unique(schema.names, str(path))
        found = {f.name: _plain(f.type) for f in schema}
        if not parts:
            types = found
        for column, kind in types.items():
            if found.get(column) != kind:
                raise DataError(
                    f"{path}: column {column!r} is {found.get(column, 'missing')}, but {paths[0]} has it as {kind}; "
                    "write all files with one schema"
                )
        texts = {n for n, kind in found.items() if pa.types.is_string(kind) or pa.types.is_large_string(kind)}
        casts = {n: kind for n, kind in found.items() if pa.types.is_large_list(kind)}
        parts.append(_Part(str(path), metadata.num_rows, path=path, metadata=metadata, texts=texts, casts=casts))
    return Source(name, types, parts, sum(p.num_rows for p in parts))


def _convert_csv(paths: list[Path], delimiter: str, folder: Path) -> tuple[list[_Part], dict[str, Any]]:
    """Parse CSV files once, as text, into Parquet beside; a column becomes integer or float only if every cell is one.

    Arrow's reader rather than Polars': it names the row of a malformed line, where Polars fills missing cells with nulls.
    """
    texts: dict[str, _TextColumn] = {}
    written: list[tuple[Path, Path, int]] = []
    for i, path in enumerate(paths):
        try:
            names = _csv_header(path, delimiter)
            _unique(names, str(path))
            if texts and list(texts) != names:
                raise DataError(f"{path}: its header differs from that of {paths[0]}; all files need the same columns")
            texts = texts or {n: _TextColumn() for n in names}
            target = folder / f"{i}.parquet"
            written.append((path, target, _csv_to_parquet(path, delimiter, target, texts)))
        except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: {_csv_problem(error)}") from error
    types = {n: t.type for n, t in texts.items()}
    casts = {n: t for n, t in types.items() if t != pa.string()}
    return [_Part(str(p), rows, path=t, texts=types, casts=casts) for p, t, rows in written], types


def _csv_header(path: Path, delimiter: str) -> list[str]:
    with pacsv.open_csv(
        path,
        pacsv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False),
        pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True),
    ) as reader:
        names: list[str] = reader.schema.names
    return names


def _csv_to_parquet(path: Path, delimiter: str, target: Path, texts: Mapping[str, _TextColumn]) -> int:
    rows = 0
    convert = pacsv.ConvertOptions(
        column_types={n: pa.string() for n in texts},
        strings_can_be_null=True,
        null_values=[""],
        quoted_strings_can_be_null=True,
    )
    schema = pa.schema([(n, pa.string()) for n in texts])
    parse = pacsv.ParseOptions(delimiter=delimiter, newlines_in_values=True)
    read = pacsv.ReadOptions(block_size=_CSV_BLOCK, use_threads=False)  # threads would lose the row numbers of errors
    with (
        pacsv.open_csv(path, read, parse, convert) as reader,
        pq.ParquetWriter(target, schema, compression="lz4") as writer,
    ):
        for batch in reader:
            rows += batch.num_rows
            for n, text in texts.items():
                text.update(batch.column(n))
            writer.write_batch(batch)
    return rows


def _csv_problem(error: Exception) -> str:
    text = _first_line(error)
    if "Empty CSV" in text:
        return "the file is empty; expected a header line and rows"
    if isinstance(error, UnicodeDecodeError) or "UTF8" in text:
        return f"the text is not UTF-8 ({text}; the header is row 1); convert the file to UTF-8"
    if "CSV parse error" in text:
        return f"malformed line ({text.removeprefix('CSV parse error: ')}; the header is row 1); mend or remove it"
    return text


class _TextColumn:
    """Narrowest of int64, uint64, double and string that holds every cell of a CSV column without loss."""

    def __init__(self) -> None:
        self._candidates: list[Any] = [pa.int64(), pa.uint64(), pa.float64()]

    @property
    def type(self) -> Any:
        return self._candidates[0] if self._candidates else pa.string()

    def update(self, array: Any) -> None:
        self._candidates = [kind for kind in self._candidates if self._fits(array, kind)]

    @staticmethod
    def _fits(array: Any, kind: Any) -> bool:
        try:
            values = pc.cast(array, kind)
        except pa.ArrowInvalid:
            return False
        if kind == pa.float64():  # neither a code such as 007 nor an integer with more digits than a double holds
            return not pc.any(pc.match_substring_regex(array, r"^-?(0[0-9]|[0-9]{16})")).as_py()
        # 007 and 0x7 are codes, not the number 7
        return bool(pc.all(pc.equal(pc.cast(values, pa.string()), array), min_count=0).as_py())
