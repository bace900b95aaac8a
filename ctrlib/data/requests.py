"""Raw requests → ids and numbers: one context and its candidates, without a table on the way.

Values are encoded by the :class:`~ctrlib.data.encoder.Encoder` itself, each distinct one once; a bounded memory of what it said
makes the next request quick. So a request gets the ids that a table of the same rows gets, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch

from ctrlib.batch import Batch, Ragged
from ctrlib.data.crosses import cross_keys
from ctrlib.data.encoder import Encoder
from ctrlib.data.numeric import as_floats
from ctrlib.data.source import Source, as_array, open_source
from ctrlib.schema import CrossField, DataError, DenseField, SequenceField, Side, SparseField, suggest

Columns = Mapping[str, Any]  # of each field a list of values, or of a frame an Arrow array
Ids = npt.NDArray[np.int32]
Place = Callable[[int], str]

_MEMORY = 1 << 17  # values remembered, of all fields together
_PLAIN = {str, int, type(None)}
_NUMBERS = {int, float, type(None)}
_TOGETHER = {int, float, bool, str}  # read alike whether they stand alone in a column or with others of their type
_NUMPY = np.number | np.bool_ | np.str_
_SUGGESTED = 64  # keys, and characters of each, among which the one that was meant is looked for
_EXACT_FLOATS = 2.0**53
_ALL_INTEGERS = 2.0**63  # beyond it, Arrow has a say in what a number is


@dataclass(frozen=True, slots=True)
class Encoded:
    """The columns of one side of a request, N rows: ``sparse`` [N, F], ``dense`` [N, F], sequences by name."""

    sparse: Ids
    dense: npt.NDArray[np.float32]
    sequences: Mapping[str, Ragged]


@dataclass(frozen=True, slots=True)
class Request:
    """One context (a single row) and its N candidates, encoded; ``sides`` tells which columns each of them has."""

    context: Encoded
    candidates: Encoded
    sides: Sides

    def __len__(self) -> int:
        return len(self.candidates.sparse)

    def batch(self) -> Batch:
        """The candidates as rows of a batch, the context repeated in every one."""
        count = len(self)
        sparse = np.empty((count, len(self.sides.sparse)), np.int32)
        dense = np.empty((count, len(self.sides.dense)), np.float32)
        for whole, mask, part in ((sparse, self.sides.sparse, "sparse"), (dense, self.sides.dense, "dense")):
            whole[:, mask] = getattr(self.context, part)
            whole[:, ~mask] = getattr(self.candidates, part)
        sequences = {name: repeated(bag, count) for name, bag in self.context.sequences.items()}
        sequences |= self.candidates.sequences
        return Batch(sparse=torch.from_numpy(sparse), dense=torch.from_numpy(dense), sequences=sequences)


@dataclass(frozen=True, slots=True)
class Sides:
    """Which columns of a batch are of the context: masks over its sparse and dense columns, and names of sequences."""

    sparse: npt.NDArray[np.bool_]
    dense: npt.NDArray[np.bool_]
    sequences: frozenset[str]


def repeated(bag: Ragged, count: int) -> Ragged:
    """The values of a single row as those of ``count`` equal rows."""
    length = int(bag.offsets[1])
    offsets = torch.arange(count + 1, dtype=torch.int32) * length
    if bag.inner is None:
        return Ragged(bag.values.repeat(count), offsets)
    steps = torch.arange(count, dtype=torch.int32).unsqueeze(1) * len(bag.values)
    inner = torch.cat([bag.inner[:1], (bag.inner[1:].unsqueeze(0) + steps).flatten()])
    return Ragged(bag.values.repeat(count), offsets, inner)


@dataclass(frozen=True, slots=True)
class Problem:
    """A field of a request that cannot be read, and why."""

    field: str
    message: str


class RequestEncoder:
    """Encodes requests. Several threads may use one.

    Args:
        encoder: of the model.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        schema, layout = encoder.schema, encoder.layout
        histories = {name: h for h in schema.histories for name in (*h.fields, *([h.gaps] if h.gaps else []))}
        side: dict[str, Side] = {f.name: f.side for f in schema.fields}
        for name, h in histories.items():
            side[name] = "context" if all(schema[member].side == "context" for member in h.fields) else "candidate"
        self.sides = Sides(
            np.array([side[c.name] == "context" for c in layout.sparse], bool),
            np.array([side[c.name] == "context" for c in layout.dense], bool),
            frozenset(c.name for c in layout.sequences if side[c.name] == "context"),
        )
        self._crosses = schema.crosses
        self._at = {c.name: i for i, c in enumerate(layout.sparse)}
        limit = _MEMORY // max(len(schema.fields), 1)
        self._contexts = _Side(encoder, "context", side, set(histories), limit)
        self._candidates = _Side(encoder, "candidate", side, set(histories), limit)
        self.context_inputs, self.candidate_inputs = self._contexts.inputs, self._candidates.inputs

    def encode(self, context: Mapping[str, object], candidates: object) -> Request:
        """Encode one context and its candidates.

        Args:
            context: a value for every field of the context; ``None`` is a missing value.
            candidates: a list of dicts, a dict of lists, or a frame (Arrow, Polars, pandas), with the fields of candidates.

        Raises:
            DataError: a field is absent, or a value cannot be what its field says; names the field and the candidate.
        """
        if not isinstance(context, Mapping):
            raise DataError(f"the context is a {type(context).__name__}; expected an object with a value for every field")
        columns = self._columns(candidates)
        count = len(next(iter(columns.values()), ()))
        single = {name: [_given(context, name, self.context_inputs, "the context")] for name in self.context_inputs}
        above = self._contexts.encode(single, 1, _the_context)
        shared = {name: values * count for name, values in single.items() if name in self._candidates.histories_read}
        below = self._candidates.encode({**shared, **columns}, count, _numbered)
        if self._crosses:
            self._fill_crosses(above.sparse, below.sparse)
        return Request(above, below, self.sides)

    def problems(self, context: Mapping[str, object], candidates: Sequence[Mapping[str, object]]) -> list[Problem]:
        """What is wrong with a request, field by field: of each one the first value that cannot be."""
        found: list[Problem] = []
        columns: dict[str, list[object]] = {}
        for side, names, rows, row in (
            (self._contexts, self.context_inputs, [context], _the_context),
            (self._candidates, self.candidate_inputs, candidates, _numbered),
        ):
            columns = {name: values * len(rows) for name, values in columns.items()}  # those of the context, in every row
            for name in names:
                try:
                    columns[name] = [_given(r, name, names, row(at)) for at, r in enumerate(rows)]
                    side.check(name, columns[name], row)
                except DataError as error:
                    found.append(Problem(name, str(error)))
            if not {problem.field for problem in found}.intersection(side.histories_read):
                found += side.history_problems(columns, len(rows), row)
        return found

    def _columns(self, candidates: object) -> dict[str, Any]:
        wanted = self.candidate_inputs
        if isinstance(candidates, list):
            for at, row in enumerate(candidates):
                if not isinstance(row, Mapping):
                    raise DataError(f"candidate {at + 1} is a {type(row).__name__}; expected an object with a value per field")
            try:
                columns = {name: [row[name] for row in candidates] for name in wanted}
            except KeyError:
                for at, row in enumerate(candidates):
                    for name in wanted:
                        _given(row, name, wanted, f"candidate {at + 1}")
                raise
            return columns if wanted else {"": [None] * len(candidates)}
        table: Source = open_source(candidates, "the candidates")
        table.require(wanted, ", which the model reads of candidates")
        if not wanted:
            return {"": [None] * table.num_rows}
        arrays = {name: table.column(name) for name in wanted}
        return {name: a if name in self._candidates.scalars else a.to_pylist() for name, a in arrays.items()}

    def _fill_crosses(self, above: Ids, below: Ids) -> None:
        """Ids of crosses, once those of the crossed fields are there."""
        mask = self.sides.sparse
        place = np.where(mask, np.cumsum(mask), np.cumsum(~mask)) - 1  # of a column among those of its side

        def ids(name: str) -> Ids:
            at = self._at[name]
            column: Ids = (above if mask[at] else below)[:, place[at]]
            return column

        for f in self._crosses:
            first, second = np.broadcast_arrays(*(ids(name) for name in f.of))
            keys = cross_keys(first, second, self.encoder.layout.sparse[self._at[f.of[1]]].vocab_size)
            ids(f.name)[:] = self.encoder.vocabularies[f.name].key_ids(keys)


class _Side:
    """The columns of one side, in the order of the batch."""

    def __init__(self, encoder: Encoder, side: Side, sides: Mapping[str, Side], histories: set[str], limit: int) -> None:
        schema, layout = encoder.schema, encoder.layout
        self._encoder = encoder
        mine = [name for name in layout.names if sides[name] == side]
        self._sparse = [self._ids(encoder, c.name, limit) for c in layout.sparse if c.name in mine]
        self._dense = [(c.name, partial(encoder.encode_column, c.name)) for c in layout.dense if c.name in mine]
        plain = [c.name for c in layout.sequences if c.name in mine and c.name not in histories]
        self._sequences = [(schema[name], _Memory(partial(_resolved, encoder, name), limit)) for name in plain]
        self._behaviours = [name for name in mine if name in histories]
        self._history_encoder = encoder.of_histories(self._behaviours) if self._behaviours else None
        self._name = "the context" if side == "context" else "the candidates"
        self._times: dict[str, bool] = {}  # columns of times, and whether training had timestamps
        if self._history_encoder is not None:
            known = self._history_encoder.schema
            for h in known.histories:
                if h.times is not None and h.name in encoder.clocks:
                    self._times |= dict.fromkeys([h.times, *([known.time] if known.time else [])], encoder.clocks[h.name])
        self.histories_read = () if self._history_encoder is None else self._history_encoder.schema.inputs
        own = [f.name for f in schema.fields if f.side == side and not isinstance(f, CrossField)]
        if side == "context":  # times are those of the request
            own += [name for name in self.histories_read if name not in own]
        elif self._behaviours:
            context = {f.name for f in schema.fields if f.side == "context"}
            own += [name for name in self.histories_read if name not in own and name not in context]
        self.inputs = tuple(own)
        self.scalars = {f.name for f in schema.fields if isinstance(f, SparseField | DenseField)} - set(self.histories_read)

    @staticmethod
    def _ids(encoder: Encoder, name: str, limit: int) -> tuple[str, _Memory | None, bool]:
        f = encoder.schema[name]
        if isinstance(f, CrossField):
            return name, None, False
        if isinstance(f, DenseField):
            return name, _Memory(partial(_categories, encoder, name), limit), True
        return name, _Memory(partial(_resolved, encoder, name), limit), False

    def encode(self, columns: Columns, count: int, row: Place) -> Encoded:
        sparse = np.zeros((count, len(self._sparse)), np.int32)
        dense = np.zeros((count, len(self._dense)), np.float32)
        for i, (name, memory, number) in enumerate(self._sparse):
            if memory is not None:
                place = partial(_place, name, row)
                values = columns[name]
                if isinstance(values, pa.Array):
                    sparse[:, i] = self._encoder.encode_column(name, values, place)
                else:
                    sparse[:, i] = memory.ids(_or_none(_floats(values, place)) if number else _plain(values), place)
        for i, (name, scale) in enumerate(self._dense):
            place, values = partial(_place, name, row), columns[name]
            dense[:, i] = scale(values if isinstance(values, pa.Array) else pa.array(_floats(values, place)), place)
        sequences: dict[str, Ragged] = {}
        for f, memory in self._sequences:
            assert isinstance(f, SequenceField)
            sequences[f.name] = _sequence(f, memory, columns[f.name], partial(_place, f.name, row))
        if self._history_encoder is not None:
            sequences |= self._histories(columns, count, row)
        return Encoded(sparse, dense, sequences)

    def check(self, name: str, values: Sequence[object], row: Place) -> None:
        """Encode one column by itself; :meth:`history_problems` checks how those of a history go together.

        Raises:
            DataError: a value cannot be what its field says.
        """
        place = partial(_place, name, row)
        for known, memory, number in self._sparse:
            if known == name and memory is not None:
                memory.ids(_or_none(_floats(values, place)) if number else _plain(values), place)
        for known, scale in self._dense:
            if known == name:
                scale(pa.array(_floats(values, place)), place)
        for f, memory in self._sequences:
            if f.name == name:
                assert isinstance(f, SequenceField)
                _sequence(f, memory, values, place)
        if self._history_encoder is not None and name in self.histories_read and values:
            values = self._as_times(name, values, row)
            try:
                self._history_encoder.check_history_column(name, as_array(values), place)
            except (pa.ArrowException, TypeError, OverflowError, UnicodeError) as error:
                raise DataError(f"{place(0)}: the values mix kinds or cannot be read ({error!s:.200})") from error

    def history_problems(self, columns: Columns, count: int, row: Place) -> list[Problem]:
        """What is wrong with the columns of histories together, each of which can be read."""
        if self._history_encoder is None:
            return []
        try:
            self._histories(columns, count, row)
        except DataError as error:
            text = str(error)
            at = {text.find(f"column {name!r}"): name for name in self.histories_read}  # the first one named is the wrong one
            return [Problem(at.get(min((i for i in at if i >= 0), default=-1), ""), text)]
        return []

    def _as_times(self, name: str, values: Sequence[object], row: Place) -> Sequence[object]:
        """The values; where training had timestamps, text is read as such."""
        if name not in self._times:
            return values
        return [_time(value, self._times[name], partial(_place, name, row, at)) for at, value in enumerate(values)]

    def _histories(self, columns: Columns, count: int, row: Place) -> dict[str, Ragged]:
        assert self._history_encoder is not None
        if not count:
            nothing, start = torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
            nested = {c.name for c in self._history_encoder.layout.sequences if c.nested}
            return {name: Ragged(nothing, start, start if name in nested else None) for name in self._behaviours}
        rows = {name: self._as_times(name, columns[name], row) for name in self._history_encoder.schema.inputs}
        try:
            block = next(self._history_encoder.encode(open_source(rows, self._name), labels=False, block_rows=count))
        except (pa.ArrowException, UnicodeError, OverflowError) as error:
            raise DataError(f"the columns of a history cannot be read ({error!s:.200})") from error
        batch = block.batch()
        return {name: batch.sequences[name] for name in self._behaviours}


_LONG = 256  # characters of text that is not remembered, since the memory counts values


class _Memory:
    """Ids of values that were seen before, at most ``limit`` of them; the others from ``resolve``."""

    def __init__(self, resolve: Callable[[list[object], Place], Ids], limit: int) -> None:
        self._resolve = resolve
        self._limit = limit
        self._known: dict[object, int] = {}

    def ids(self, values: Sequence[object], place: Place) -> list[int]:
        known = self._known  # another thread may put a new one in its place
        try:
            return [known[value] for value in values]
        except KeyError:
            pass
        new: dict[object, int] = {}
        for at, value in enumerate(values):
            if type(value) is not _Odd and value not in known:
                new.setdefault(value, at)
        places = list(new.values())
        raw = [value[1] if type(value) is tuple else value for value in new]
        found = dict(zip(new, self._resolve(raw, lambda i: place(places[i])).tolist(), strict=True))
        short = {value: i for value, i in found.items() if not (type(value) is str and len(value) > _LONG)}
        if len(known) + len(short) <= self._limit:
            known.update(short)
        elif len(short) <= self._limit:
            self._known = short
        for at, value in enumerate(values):
            if type(value) is _Odd:
                found[value] = int(self._resolve([value.value], partial(_same, place(at)))[0])
        return [found[value] if value in found else known[value] for value in values]


def _same(place: str, _: int) -> str:
    return place


def _resolved(encoder: Encoder, name: str, values: list[object], place: Place) -> Ids:
    """Ids of raw values, each as if it stood alone in a column."""
    found = np.empty(len(values), np.int32)
    # what makes a column together: integers from 2⁶³ up make none with those below 0
    kinds: dict[tuple[type, bool], list[int]] = {}
    for i, value in enumerate(values):
        kinds.setdefault((type(value), type(value) is int and value >= 2**63), []).append(i)
    for (kind, _), at in kinds.items():
        if kind is type(None) and isinstance(encoder.schema[name], SequenceField):
            raise DataError(f"{place(at[0])}: a list holds a missing value; remove it from the list")
        _fill_ids(encoder, name, values, at, found, place)
    return found


def _fill_ids(encoder: Encoder, name: str, values: list[object], at: list[int], found: Ids, place: Place) -> None:
    """The ids of the values at some places; halved until the wrong one is found, so that it takes few tries."""
    if len(at) == 1:
        found[at] = _alone(encoder, name, values[at[0]], partial(place, at[0]))
        return
    try:
        found[at] = encoder.ids(name, [values[i] for i in at])
    except (DataError, UnicodeError, pa.ArrowException):
        for half in (at[: len(at) // 2], at[len(at) // 2 :]):
            _fill_ids(encoder, name, values, half, found, place)


def _alone(encoder: Encoder, name: str, value: object, place: Callable[[], str]) -> int:
    try:
        return int(encoder.ids(name, [value])[0])
    except UnicodeError as error:
        raise DataError(f"{place()}: {value!r:.80} is not valid text; expected characters that UTF-8 can hold") from error
    except (DataError, pa.ArrowException) as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise DataError(f"{place()}: {reason:.300}") from error


def _categories(encoder: Encoder, name: str, numbers: list[object], place: Place) -> Ids:
    """Ids of numbers that become categories; NaN is missing."""
    ids: Ids = encoder.encode_column(name, pa.array(numbers, pa.float64()), place)
    return ids


def _or_none(numbers: npt.NDArray[np.float64]) -> list[object]:
    return [None if x != x else x for x in numbers.tolist()]


def _plain(values: Sequence[object]) -> Sequence[object]:
    """Values of which equal ones have equal ids: no number equals one of another type in ``_Memory``."""
    if set(map(type, values)) <= _PLAIN:
        return values
    return [_simple(value) for value in values]


def _simple(value: object) -> object:
    value = _of_python(value)
    if type(value) is bool:  # equal to 1 or 0, but another text
        return bool, value
    if type(value) is float:
        if value != value:
            return None
        if abs(value) < _EXACT_FLOATS and value == int(value):
            return int(value)
        return _Odd(value)
    return value if type(value) in _PLAIN else _Odd(value)


def _of_python(value: object) -> object:
    """A scalar of NumPy as one of Python; those that are times stay, since as integers they would have lost their unit."""
    return value.item() if isinstance(value, _NUMPY) and not isinstance(value, np.timedelta64) else value


class _Odd:
    """A value of which the encoder alone knows what it is worth: it is never remembered."""

    def __init__(self, value: object) -> None:
        self.value = value


def _floats(values: Sequence[object], place: Place) -> npt.NDArray[np.float64]:
    """Numbers as float64, NaN where missing, exactly as :func:`.as_floats` reads them."""
    kinds = set(map(type, values))
    if not kinds <= _PLAIN | _TOGETHER:
        values = [_of_python(value) for value in values]
        kinds = set(map(type, values))
    if kinds <= _NUMBERS:
        try:
            x = np.array([np.nan if value is None else value for value in values], np.float64)
        except OverflowError:
            pass
        else:
            if not (np.abs(x) >= _ALL_INTEGERS).any():
                return x
    x = np.full(len(values), np.nan)
    for kind in kinds - {type(None)}:
        at = [i for i, value in enumerate(values) if type(value) is kind]
        x[at] = _numbers(kind, [values[i] for i in at], lambda i, at=at: place(at[i]))  # type: ignore[misc]
    return x


def _numbers(kind: type, values: list[object], place: Place) -> npt.NDArray[np.float64]:
    """Numbers of one type."""
    if kind in _TOGETHER:
        try:
            return as_floats(as_array(values), place)
        except (pa.ArrowException, OverflowError, UnicodeError):  # of one value
            pass
    return np.array([_number(value, partial(place, i)) for i, value in enumerate(values)], np.float64)


def _number(value: object, place: Callable[[], str]) -> float:
    try:
        return float(as_floats(as_array([value]), lambda _: place())[0])
    except (pa.ArrowException, TypeError, OverflowError, UnicodeError) as error:
        raise DataError(f"{place()}: {value!r:.80} is not a number; expected a number or null") from error


def _sequence(f: SequenceField, memory: _Memory, rows: Sequence[object], place: Place) -> Ragged:
    lists = [_list(f, value, partial(place, at)) for at, value in enumerate(rows)]
    owner = [at for at, values in enumerate(lists) for _ in values]
    ids = memory.ids(_plain([value for values in lists for value in values]), lambda i: place(owner[i]))
    if f.max_length is not None and any(len(values) > f.max_length for values in lists):
        ends = np.cumsum([len(values) for values in lists]).tolist()
        ids = [i for values, end in zip(lists, ends, strict=True) for i in ids[end - min(len(values), f.max_length) : end]]
        lists = [values[-f.max_length :] for values in lists]
    offsets = np.zeros(len(lists) + 1, np.int32)
    np.cumsum([len(values) for values in lists], out=offsets[1:])
    return Ragged(torch.tensor(ids, dtype=torch.int32), torch.from_numpy(offsets))


def _time(value: object, clock: bool, place: Callable[[], str]) -> object:
    """A time, or a list of times, in which text is read as ISO 8601; times without a zone are in UTC."""
    if isinstance(value, list | tuple):
        if any(isinstance(one, list | tuple) for one in value):
            raise DataError(f"{place()}: a list of times holds a list; expected times")
        return [_time(one, clock, place) for one in value]
    if not isinstance(value, str):
        return value
    if not clock:
        raise DataError(f"{place()}: {value!r:.80} is text, but training had numbers; expected times of the same kind")
    try:
        time = datetime.fromisoformat(value)
        return time if time.tzinfo is None else time.astimezone(UTC).replace(tzinfo=None)
    except (ValueError, OverflowError) as error:  # the latter in UTC only
        raise DataError(f"{place()}: {value!r:.80} is no time; expected ISO 8601, such as '2024-05-01T12:30:00'") from error


def _list(f: SequenceField, value: object, place: Callable[[], str]) -> Sequence[object]:
    if value is None or (type(value) is float and value != value):
        return ()
    if isinstance(value, str) and f.separator is not None:
        return value.split(f.separator) if value else ()
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, np.ndarray) and value.ndim == 1:
        items: list[object] = value.tolist()
        return items
    hint = "; set the field's separator" if isinstance(value, str) else ""
    raise DataError(f"{place()}: the value is a {type(value).__name__}; expected a list of values, or null{hint}")


def _the_context(_: int) -> str:
    return "the context"


def _numbered(at: int) -> str:
    return f"candidate {at + 1}"


def _place(name: str, row: Place, at: int) -> str:
    return f"{row(at)}, field {name!r}"


def _given(row: Mapping[str, object], name: str, wanted: Sequence[str], what: str) -> object:
    if name not in row:
        others = (key[:_SUGGESTED] for key in row if isinstance(key, str) and key not in wanted)
        near = suggest(name, islice(others, _SUGGESTED))
        raise DataError(f"{what} has no field {name!r}{near}; give it a value, or null where it is missing")
    return row[name]
