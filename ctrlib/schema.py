"""The fields of a data set, as a person declares them, and what the encoded columns and token axes mean.

Standard library only: everything else in ctrlib may import this module.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

Side = Literal["context", "candidate"]
NumericEncoding = Literal["standardize", "log", "minmax", "piecewise", "criteo_log", "bucket"]
Pooling = Literal["mean", "sum", "max"]
OnLeak = Literal["drop", "refuse"]

PADDING_ID = 0  # a zero vector, never trained
OOV_ID = 1  # unseen, or seen fewer than min_count times in the training rows
FIRST_VALUE_ID = 2


class DataError(ValueError):
    """The data or the schema is not what was promised. Says what happened, what was expected, how to fix it."""


def suggest(name: str, choices: Iterable[str]) -> str:
    """``"; did you mean 'x'?"`` for the choice nearest to ``name``, or an empty string."""
    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _check_vocabulary_options(name: str, min_count: int, max_size: int | None, hash_size: int | None) -> None:
    if min_count < 1:
        raise DataError(f"field {name!r}: min_count is {min_count}; expected 1 (keep every value) or more")
    for option, value in (("max_size", max_size), ("hash_size", hash_size)):
        if value is not None and value < 1:
            raise DataError(f"field {name!r}: {option} is {value}; expected 1 or more, or null for no limit")
    if hash_size is not None and (max_size is not None or min_count > 1):
        raise DataError(f"field {name!r}: hash_size learns no vocabulary; remove min_count and max_size, or hash_size")


def _is_list_of(kind: type, value: object) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)


def _types(hint: Any) -> tuple[type, ...]:
    """The types that an annotation of a field option allows; names of choices are text."""
    args = get_args(hint)
    if get_origin(hint) is tuple:  # in JSON a list
        return (list,)
    return (str,) if args and isinstance(args[0], str) else args or (hint,)


def _check_choice(name: str, option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"field {name!r}: {option} is {value!r}; expected one of {', '.join(choices)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class SparseField:
    """A column of ids or categories: one value a row.

    Args:
        name: the column.
        side: ``"context"`` if the value is the same for every candidate of a request (user, device), else ``"candidate"``.
        min_count: values seen fewer times in the training rows share the OOV id.
        max_size: keep at most this many values, the most frequent ones; ``None``: all.
        hash_size: hash values into this many buckets instead of learning a vocabulary.
        shares: name of another sparse or sequence field whose vocabulary and embedding rows this field uses.
    """

    name: str
    side: Side = "candidate"
    min_count: int = 1
    max_size: int | None = None
    hash_size: int | None = None
    shares: str | None = None

    def __post_init__(self) -> None:
        _check_choice(self.name, "side", self.side, get_args(Side))
        _check_vocabulary_options(self.name, self.min_count, self.max_size, self.hash_size)


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseField:
    """A numeric column.

    Args:
        name: the column.
        side: see :class:`SparseField`.
        encoding: ``standardize`` ((x − mean)/std), ``log`` (sign(x)·ln(1+|x|), then standardised), ``minmax`` (to [0, 1]),
            ``piecewise`` (piecewise-linear encoding over quantile bins, arXiv:2203.05556): these enter the model as
            numbers; ``criteo_log`` (⌊ln²x⌋ for x > 2, else ⌊x⌋) and ``bucket`` (quantile bins) become categories.
        num_bins: quantile bins of ``piecewise`` and ``bucket``.
        min_count: for ``criteo_log``: rarer categories share the OOV id.
    """

    name: str
    side: Side = "candidate"
    encoding: NumericEncoding = "standardize"
    num_bins: int = 16
    min_count: int = 1

    def __post_init__(self) -> None:
        _check_choice(self.name, "side", self.side, get_args(Side))
        _check_choice(self.name, "encoding", self.encoding, get_args(NumericEncoding))
        if self.num_bins < 2:
            raise DataError(f"field {self.name!r}: num_bins is {self.num_bins}; expected 2 or more")
        _check_vocabulary_options(self.name, self.min_count, None, None)

    @property
    def is_category(self) -> bool:
        """True where the encoded value is an id (a column of ``Batch.sparse``), not a number."""
        return self.encoding in ("criteo_log", "bucket")


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceField:
    """A column of lists: an unordered bag of values (genres) or ordered behaviours (items clicked, oldest first).

    Args:
        name: the column; Arrow/Polars lists, or strings cut at ``separator``.
        ordered: the order of the values means something.
        pooling: how the bag becomes one vector where a model does not read the sequence itself.
        max_length: keep only the last ``max_length`` values; ``None``: no limit (nothing is padded).
        separator: where values are strings such as ``"a|b|c"``.
        nested: the column holds lists of lists, several values for every behaviour of a :class:`History`. ``pooling`` then also
            makes one vector of the values of a behaviour; a token of the whole row pools all values alike.
        side, min_count, max_size, hash_size, shares: see :class:`SparseField`.
    """

    name: str
    side: Side = "candidate"
    ordered: bool = False
    pooling: Pooling = "mean"
    max_length: int | None = None
    separator: str | None = None
    min_count: int = 1
    max_size: int | None = None
    hash_size: int | None = None
    shares: str | None = None
    nested: bool = False

    def __post_init__(self) -> None:
        _check_choice(self.name, "side", self.side, get_args(Side))
        _check_choice(self.name, "pooling", self.pooling, get_args(Pooling))
        _check_vocabulary_options(self.name, self.min_count, self.max_size, self.hash_size)
        if self.max_length is not None and self.max_length < 1:
            raise DataError(f"field {self.name!r}: max_length is {self.max_length}; expected 1 or more, or null")
        if self.separator == "":
            raise DataError(f"field {self.name!r}: separator is empty; give the character between values, or null")
        if self.nested and self.separator is not None:
            raise DataError(
                f"field {self.name!r}: nested needs a column of lists of lists, which a separator cannot cut out of text; "
                "remove one of the two"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class CrossField:
    """Two fields of categories read as one: a value for every pair of their values, with an embedding row of its own.

    A value is the pair of the two *ids*, after the thresholds of the two fields; where one of them is OOV, or the pair was seen
    fewer than ``min_count`` times, it is the OOV of this cross. A cross has no column in the table.

    Args:
        name: of the cross, usually ``"user*item"``.
        of: the names of two sparse fields, or dense ones that become categories (``criteo_log``, ``bucket``).
        side: see :class:`SparseField`; ``"context"`` only if both fields are.
        min_count, max_size, hash_size: see :class:`SparseField`; of pairs.
    """

    name: str
    of: tuple[str, str]
    side: Side = "candidate"
    min_count: int = 1
    max_size: int | None = None
    hash_size: int | None = None

    def __post_init__(self) -> None:
        _check_choice(self.name, "side", self.side, get_args(Side))
        _check_vocabulary_options(self.name, self.min_count, self.max_size, self.hash_size)
        of: Sequence[object] = self.of  # of a schema written by hand, anything
        if len(of) != 2 or not _is_list_of(str, of) or of[0] == of[1]:
            raise DataError(f"field {self.name!r}: of is {list(of)}; expected the names of two different fields")


Field = SparseField | DenseField | SequenceField | CrossField
_KINDS: Mapping[str, type[Field]] = {
    "sparse": SparseField,
    "dense": DenseField,
    "sequence": SequenceField,
    "cross": CrossField,
}


def is_category(f: Field) -> bool:
    """Whether a value of the field is one id learned or counted from the field's own column: what can be crossed."""
    return isinstance(f, SparseField) or (isinstance(f, DenseField) and f.is_category)


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Behaviours of a user, oldest first, with several attributes each: aligned sequence fields.

    Every row has equally many behaviours in each of its columns. With ``times`` and the schema's ``time`` the leak guard holds:
    a behaviour at or after the time of its row could not be known then, and is dropped or refused.

    Args:
        name: by which models ask for it.
        fields: sequence fields with ``ordered``; of each behaviour they hold one value, or with ``nested`` several. One that
            ``shares`` the vocabulary of a field of the candidate is compared with it.
        times: column of lists with the times of the behaviours: numbers, timestamps or dates, never falling within a row.
        gaps: name of one more attribute, made of the time between a behaviour and its row: its ids are
            2 + ⌊log₂(1 + gap)⌋. Gaps between numbers are in their unit, those between timestamps or dates in seconds.
        max_length: keep the most recent behaviours only, after the guard; ``None``: all (nothing is padded).
        on_leak: ``"drop"`` behaviours at or after the row's time, and count them, or ``"refuse"`` the data, for which both
            times are needed.
    """

    name: str = "history"
    fields: tuple[str, ...]
    times: str | None = None
    gaps: str | None = None
    max_length: int | None = None
    on_leak: OnLeak = "drop"

    def __post_init__(self) -> None:
        names: object = self.fields  # of a schema written by hand, anything
        if not _is_list_of(str, names) or not self.fields or len(set(self.fields)) < len(self.fields):
            raise DataError(
                f"history {self.name!r}: fields is {names!r:.80}; expected the names of one or more sequence fields"
            )
        if self.on_leak not in get_args(OnLeak):
            raise DataError(
                f"history {self.name!r}: on_leak is {self.on_leak!r}; expected one of {', '.join(get_args(OnLeak))}"
            )
        if self.max_length is not None and self.max_length < 1:
            raise DataError(f"history {self.name!r}: max_length is {self.max_length}; expected 1 or more, or null")
        if self.gaps is not None and self.times is None:
            raise DataError(f"history {self.name!r}: gaps needs the times of the behaviours; name their column in times")


@dataclass(frozen=True, kw_only=True, slots=True)
class Schema:
    """What a person declares of a data set; see :meth:`infer`, :meth:`load`.

    Args:
        fields: the features, in order.
        labels: columns that hold 0 or 1; several for multi-task models.
        group: column whose values group rows for GAUC (usually the user).
        time: column by which the default split is made; not a feature unless it is also a field.
        weight: column of non-negative row weights.
        ignored: columns that are not features, with the reason; for people to read.
        histories: which sequence fields are attributes of the same behaviours.
        classes: the values of the one label, as text, where it is a class and not 0 or 1: of nodes of a graph.
    """

    fields: tuple[Field, ...]
    labels: tuple[str, ...]
    group: str | None = None
    time: str | None = None
    weight: str | None = None
    ignored: Mapping[str, str] = field(default_factory=dict)
    histories: tuple[History, ...] = ()
    classes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.classes and (len(self.labels) != 1 or len(set(self.classes)) < max(2, len(self.classes))):
            raise DataError(
                f"the schema has {len(self.labels)} labels with the classes {', '.join(self.classes):.80}; expected one label, "
                "and two or more classes, each once"
            )
        if not self.labels:
            raise DataError("the schema names no label; expected at least one column of 0s and 1s")
        names = [f.name for f in self.fields]
        seen: set[str] = set()
        for name in (*names, *self.labels):
            if name in seen:
                raise DataError(f"the schema names column {name!r} twice; a column is one field, or one label")
            seen.add(name)
        if self.weight in seen:
            raise DataError(f"column {self.weight!r} is the row weight and also a field or label; remove one of the two")
        by_name = {f.name: f for f in self.fields}
        for f in self.fields:
            if not isinstance(f, SparseField | SequenceField) or f.shares is None:
                continue
            shares = f.shares
            other = by_name.get(shares)
            if not isinstance(other, SparseField | SequenceField) or other.name == f.name:
                raise DataError(
                    f"field {f.name!r} shares the vocabulary of {shares!r}, which is not another sparse or sequence "
                    f"field{suggest(shares, (n for n in names if n != f.name))}"
                )
            if (f.min_count, f.max_size, f.hash_size) != (1, None, None):
                raise DataError(
                    f"field {f.name!r} shares the vocabulary of {shares!r}, so its own min_count, max_size and hash_size "
                    f"mean nothing; set them on {shares!r} only"
                )
            if other.shares is not None:
                raise DataError(f"field {f.name!r} shares with {shares!r}, which itself shares with {other.shares!r}")
        crossed: dict[frozenset[str], str] = {}
        for f in self.crosses:
            for name in f.of:
                part = by_name.get(name)
                if part is None or not is_category(part):
                    can = [n for n in names if is_category(by_name[n])]
                    raise DataError(
                        f"field {f.name!r} crosses {name!r}, which is not a field of categories (sparse, or dense with "
                        f"encoding criteo_log or bucket){suggest(name, can)}"
                    )
                if f.side == "context" and part.side != "context":
                    raise DataError(f"field {f.name!r} has side 'context', but crosses {name!r} of side {part.side!r}")
            if (pair := frozenset(f.of)) in crossed:
                raise DataError(f"fields {crossed[pair]!r} and {f.name!r} cross the same two fields; remove one of the two")
            crossed[pair] = f.name
        self._check_histories()

    def _check_histories(self) -> None:
        by_name = {f.name: f for f in self.fields}
        ordered = [f.name for f in self.fields if isinstance(f, SequenceField) and f.ordered]
        columns = {*by_name, *self.labels, self.group, self.time, self.weight}
        names: set[str] = set()
        owner: dict[str, str] = {}
        for h in self.histories:
            if h.name in names:
                raise DataError(f"the schema has two histories named {h.name!r}; rename one of them")
            names.add(h.name)
            for name in h.fields:
                f = by_name.get(name)
                if not isinstance(f, SequenceField) or not f.ordered:
                    raise DataError(
                        f"history {h.name!r} has {name!r}, which is not a sequence field with ordered{suggest(name, ordered)}"
                    )
                if name in owner:
                    raise DataError(f"field {name!r} is in histories {owner[name]!r} and {h.name!r}; it can be in one only")
                if f.max_length is not None:
                    raise DataError(f"field {name!r} is in history {h.name!r}; set max_length there, not on the field")
                owner[name] = h.name
            if h.times in (*self.labels, *h.fields):
                raise DataError(
                    f"history {h.name!r}: times is {h.times!r}, a label or one of its fields; name a column of times"
                )
            if h.on_leak == "refuse" and (h.times is None or self.time is None):
                raise DataError(
                    f"history {h.name!r}: on_leak is 'refuse', but no leak would be found without the times of the behaviours "
                    "(times) and of the row (the schema's time); name both columns"
                )
            if h.gaps is None:
                continue
            if self.time is None:
                raise DataError(f"history {h.name!r}: gaps needs the time of the row; name its column in the schema's time")
            if h.gaps in columns or h.gaps == h.times:
                raise DataError(
                    f"history {h.name!r}: gaps is {h.gaps!r}, a column of the data; give the new attribute another name"
                )
            columns.add(h.gaps)
        for f in self.fields:
            if isinstance(f, SequenceField) and f.nested and f.name not in owner:
                raise DataError(f"field {f.name!r} is nested, but in no history; expected it among the fields of one")

    def __getitem__(self, name: str) -> Field:
        for f in self.fields:
            if f.name == name:
                return f
        raise DataError(f"the schema has no field {name!r}{suggest(name, (f.name for f in self.fields))}")

    @property
    def crosses(self) -> tuple[CrossField, ...]:
        """The crosses among the fields."""
        return tuple(f for f in self.fields if isinstance(f, CrossField))

    @property
    def inputs(self) -> tuple[str, ...]:
        """The raw columns that scoring reads: of all fields but crosses, and the times of histories and of their rows."""
        names = [f.name for f in self.fields if not isinstance(f, CrossField)]
        times = [h.times for h in self.histories if h.times is not None]
        if times and self.time is not None:
            times.append(self.time)
        return tuple(dict.fromkeys([*names, *times]))

    @property
    def columns(self) -> tuple[str, ...]:
        """Every raw column that training reads, without repeats: fields, labels, group, time, weight."""
        special = (c for c in (self.group, self.time, self.weight) if c is not None)
        return tuple(dict.fromkeys([*self.inputs, *self.labels, *special]))

    def with_fields(self, *changed: Field) -> Schema:
        """A schema in which each given field replaces the field of the same name."""
        for f in changed:
            self[f.name]
        by_name = {f.name: f for f in changed}
        return replace(self, fields=tuple(by_name.get(f.name, f) for f in self.fields))

    def with_only(self, fields: Iterable[Field]) -> Schema:
        """A schema of these fields and no others; histories keep the attributes among them, and one without any goes."""
        kept = tuple(fields)
        names = {f.name for f in kept}
        histories = (replace(h, fields=left) for h in self.histories if (left := tuple(n for n in h.fields if n in names)))
        return replace(self, fields=kept, histories=tuple(histories))

    def with_crosses(
        self,
        pairs: Iterable[tuple[str, str]] | Literal["all"] = "all",
        *,
        min_count: int = 1,
        max_size: int | None = None,
        hash_size: int | None = None,
    ) -> Schema:
        """A schema with a :class:`CrossField` more for every pair, named ``"first*second"`` in the order of the schema.

        Args:
            pairs: names of fields; ``"all"``: every two fields of categories that have no cross yet, (1, 2), (1, 3), … in the
                order of the schema.
            min_count, max_size, hash_size: of each cross.

        Raises:
            DataError: a name is unknown or not a field of categories, or a pair has a cross already.
        """
        if pairs == "all":
            have = {frozenset(f.of) for f in self.crosses}
            both = combinations([f.name for f in self.fields if is_category(f)], 2)
            pairs = [pair for pair in both if frozenset(pair) not in have]
        at = {f.name: i for i, f in enumerate(self.fields)}
        added: list[CrossField] = []
        for pair in pairs:
            sides = {self[name].side for name in pair}
            of = tuple(sorted(pair, key=at.__getitem__))
            added.append(
                CrossField(
                    name="*".join(of),
                    of=cast(tuple[str, str], of),
                    side="context" if sides == {"context"} else "candidate",
                    min_count=min_count,
                    max_size=max_size,
                    hash_size=hash_size,
                )
            )
        return replace(self, fields=(*self.fields, *added))

    @classmethod
    def infer(
        cls,
        source: object,
        label: str | Sequence[str],
        *,
        group: str | None = None,
        time: str | None = None,
        weight: str | None = None,
    ) -> Schema:
        """Guess the fields of ``source`` (a CSV, TSV or Parquet path, folder or glob, or a pandas or Polars frame).

        Strings and integers with few distinct values become sparse, other numbers dense, lists sequences. Columns that
        cannot be features (constant, all different) go to ``ignored`` with the reason. The rules are stated in
        :func:`ctrlib.data.infer.infer_schema`, which does the work.

        Raises:
            DataError: the source cannot be read, or has no column of a given name.
        """
        from ctrlib.data.infer import infer_schema  # upwards: the one place where a name in the API asks for it

        labels = (label,) if isinstance(label, str) else tuple(label)
        return infer_schema(source, labels, group=group, time=time, weight=weight)

    def to_json(self) -> dict[str, Any]:
        """Plain lists and dicts; options at their defaults are left out so that a person can read the rest."""
        kinds = {cls: kind for kind, cls in _KINDS.items()}
        out = [{"name": f.name, "kind": kinds[type(f)], **_changed_options(f)} for f in self.fields]
        special = {"group": self.group, "time": self.time, "weight": self.weight}
        return {
            "labels": list(self.labels),
            **{k: v for k, v in special.items() if v is not None},
            "fields": out,
            **({"ignored": dict(self.ignored)} if self.ignored else {}),
            **({"histories": [{"name": h.name, **_changed_options(h)} for h in self.histories]} if self.histories else {}),
            **({"classes": list(self.classes)} if self.classes else {}),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Schema:
        """The inverse of :meth:`to_json`.

        Raises:
            DataError: an unknown key, kind or option, named together with the nearest that exists.
        """
        known = [f.name for f in fields(cls)]
        for key in data:
            if key not in known:
                raise DataError(f"schema: unknown key {key!r}{suggest(key, known)}")
        entries, labels, ignored = data.get("fields", []), data.get("labels", []), data.get("ignored", {})
        if not _is_list_of(Mapping, entries):
            raise DataError(f"schema: fields is {entries!r:.80}; expected a list of objects with name and kind")
        if not _is_list_of(Mapping, data.get("histories", [])):
            raise DataError(f"schema: histories is {data['histories']!r:.80}; expected a list of objects with name and fields")
        if not _is_list_of(str, labels):
            raise DataError(f"schema: labels is {labels!r:.80}; expected a list of column names")
        if not isinstance(ignored, Mapping):
            raise DataError(f"schema: ignored is {ignored!r:.80}; expected an object of reasons by column name")
        if not _is_list_of(str, data.get("classes", [])):
            raise DataError(f"schema: classes is {data['classes']!r:.80}; expected a list of the label's values as text")
        for key in ("group", "time", "weight"):
            if not isinstance(data.get(key), str | None):
                raise DataError(f"schema: {key} is {data[key]!r:.80}; expected a column name or null")
        parsed: list[Field] = []
        for entry in entries:
            options = dict(entry)
            kind = options.pop("kind", None)
            if not isinstance(kind, str) or kind not in _KINDS:
                raise DataError(
                    f"schema: field {options.get('name')!r} has kind {kind!r}; expected {', '.join(_KINDS)}"
                    + suggest(str(kind), _KINDS)
                )
            if "name" not in options:
                raise DataError(f"schema: a {kind} field has no name")
            if kind == "cross" and "of" not in options:
                raise DataError(f'schema: field {options["name"]!r} (cross) has no "of"; expected the names of two fields')
            parsed.append(_KINDS[kind](**_checked_options(f"field {options['name']!r}", _KINDS[kind], options, f" ({kind})")))
        histories: list[History] = []
        for entry in data.get("histories", []):
            if "fields" not in entry:
                raise DataError(f'schema: history {entry.get("name")!r} has no "fields"; expected the names of sequence fields')
            histories.append(History(**_checked_options(f"history {entry.get('name')!r}", History, entry)))
        return cls(
            fields=tuple(parsed),
            labels=tuple(labels),
            group=data.get("group"),
            time=data.get("time"),
            weight=data.get("weight"),
            ignored=dict(ignored),
            histories=tuple(histories),
            classes=tuple(data.get("classes", ())),
        )

    def save(self, path: str | Path) -> None:
        """Write the schema as JSON, one field a line."""
        data = self.to_json()
        lines = ",\n".join(f"    {json.dumps(f, ensure_ascii=False)}" for f in data.pop("fields"))
        head = json.dumps(data, indent=2, ensure_ascii=False)
        target = Path(path)
        part = target.with_name(target.name + ".part")
        part.write_text(head[:-2] + ',\n  "fields": [\n' + lines + "\n  ]\n}\n", encoding="utf-8")
        part.replace(target)

    @classmethod
    def load(cls, path: str | Path) -> Schema:
        """Read a schema written by :meth:`save` or by hand.

        Raises:
            DataError: the file is missing, is not JSON, or does not describe a schema.
        """
        try:
            data = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise DataError(f"schema file {path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise DataError(f"schema file {path}: not valid JSON ({error})") from error
        if not isinstance(data, dict):
            raise DataError(f"schema file {path}: holds a {type(data).__name__}; expected an object with labels and fields")
        return cls.from_json(data)


def _changed_options(entry: Field | History) -> dict[str, Any]:
    """For JSON: the options that are not at their defaults, without the name."""
    defaults = {d.name: d.default for d in fields(entry)}
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(entry).items()}
    return {k: v for k, v in options.items() if k != "name" and v != defaults[k]}


def _checked_options(what: str, cls: type[Field | History], options: Mapping[str, Any], kind: str = "") -> dict[str, Any]:
    """From JSON: the options of ``what`` (``"field 'x'"``), if ``cls`` has them and takes values of their types."""
    allowed = get_type_hints(cls)
    for option, value in options.items():
        if option not in allowed:
            raise DataError(f"schema: {what}{kind} has no option {option!r}{suggest(option, allowed)}")
        if type(value) not in _types(allowed[option]):
            wanted = " or ".join("null" if t is type(None) else t.__name__ for t in _types(allowed[option]))
            raise DataError(f"schema: {what}: {option} is {value!r}; expected {wanted}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in options.items()}


@dataclass(frozen=True, slots=True)
class SparseColumn:
    """One column of ``Batch.sparse``. Ids run from 0 (padding) and 1 (OOV) to ``vocab_size`` − 1.

    ``table`` names the vocabulary: columns with the same one share embedding rows. ``parts``: of a cross, its two fields.
    ``hashed``: there is no vocabulary, and unseen values have ids of others.
    """

    name: str
    vocab_size: int
    table: str
    parts: tuple[str, str] | None = None
    hashed: bool = False


@dataclass(frozen=True, slots=True)
class DenseColumn:
    """One column of ``Batch.dense``.

    ``num_bins`` is 0 for a plain number; otherwise the value is a position among that many bins, from which the embedding
    makes the piecewise-linear encoding. ``missing``: training rows had missing values (NaN in the column).
    """

    name: str
    num_bins: int = 0
    missing: bool = False


@dataclass(frozen=True, slots=True)
class SequenceColumn:
    """One entry of ``Batch.sequences``; ids as in :class:`SparseColumn`. ``nested``: several values for every behaviour."""

    name: str
    vocab_size: int
    table: str
    pooling: Pooling = "mean"
    ordered: bool = False
    nested: bool = False


@dataclass(frozen=True, slots=True)
class HistoryColumn:
    """A history: entries of ``Batch.sequences`` that are attributes of the same behaviours.

    ``targets[i]`` is the column of the candidate that reads the same vocabulary as ``fields[i]``: a sparse one, else a bag;
    ``None`` where there is none, as for the time gap.
    """

    name: str
    fields: tuple[str, ...]
    targets: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class BatchLayout:
    """What the columns of a :class:`~ctrlib.batch.Batch` mean: all a model needs to know of the data.

    ``classes``: of the one label, where it is a class; else empty.
    """

    sparse: tuple[SparseColumn, ...] = ()
    dense: tuple[DenseColumn, ...] = ()
    sequences: tuple[SequenceColumn, ...] = ()
    labels: tuple[str, ...] = ("label",)
    histories: tuple[HistoryColumn, ...] = ()
    classes: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Field names in token order: sparse, dense, sequences."""
        return (*(c.name for c in self.sparse), *(c.name for c in self.dense), *(c.name for c in self.sequences))


@dataclass(frozen=True, slots=True)
class FieldLayout:
    """What axes 1 and 2 of a ``[B, F, D]`` tensor mean: F names, and the width D."""

    names: tuple[str, ...]
    dim: int

    @property
    def num_fields(self) -> int:
        """F."""
        return len(self.names)

    @property
    def width(self) -> int:
        """F·D, the width of the flattened tensor."""
        return len(self.names) * self.dim
