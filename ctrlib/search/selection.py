"""What every selection method returns: fields by score, the values to keep, or what becomes of each pair of fields.

A :class:`Selection` is data. It is applied in one call (:meth:`Selection.apply`, :func:`apply_to_store`), which gives a derived
encoder or store, for re-training by :func:`ctrlib.experiment.train`. A model that was trained with closed gates is not trained
again but compacted (:func:`compact`): the same function, with smaller tables.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ctrlib.config import ConfigError, Table, check_choice, from_json, to_json
from ctrlib.data.encoder import Encoder, vocabulary_name
from ctrlib.data.store import Store
from ctrlib.data.vocabulary import HashBuckets, Ids, Vocabulary
from ctrlib.embedding import FeatureEmbedding
from ctrlib.files import new_folder, sha256, write_json
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.optinter import Choice as Choice
from ctrlib.models.presets import COMPONENTS
from ctrlib.schema import OOV_ID, CrossField, DataError, Field, Schema, SequenceField, SparseField, suggest

Mask = npt.NDArray[np.bool_]

_FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Selection:
    """A result of feature or interaction selection, to be saved, applied, re-trained.

    Attributes:
        method: its name, as in ``ctrlib select --method``.
        encoder_hash: of the encoder (schema and vocabularies) that it was made with; it is refused for any other.
        fields: kept, in the order of the schema; ``None``: all. The time gaps of a history are kept with any field of it.
        values: by vocabulary (table name), which ids are kept: [vocab_size] booleans, padding never; ``None``, and for the
            vocabularies that are not in it: all.
        pairs: by ``"user*item"``, what to do with the pair; ``None``: the method does not choose pairs.
        scores: of fields or of pairs, larger is better; empty where a method has none.
        model: the model to re-train; ``None``: any.
        weights: ``state_dict`` of that model from which re-training starts, before compaction; ``None``: from scratch.
        report: settings, seconds and whatever else the method has to say; JSON.
    """

    method: str
    encoder_hash: str
    fields: tuple[str, ...] | None = None
    values: Mapping[str, Mask] | None = None
    pairs: Mapping[str, Choice] | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    model: ModelComponent.Config | None = None
    weights: Mapping[str, Tensor] | None = None
    report: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for pair, choice in (self.pairs or {}).items():
            check_choice(f"pairs[{pair!r}]", choice, get_args(Choice))

    def apply(self, encoder: Encoder) -> Encoder:
        """The encoder of what is kept, for the same raw tables.

        Fields that are not kept, and crosses whose pair is not to be memorised, are no longer read. Where the owner of a shared
        vocabulary goes, the first of those that share it takes its place, and gives the vocabulary its name. A value that is
        not kept gets the id of padding, a zero vector as of a closed gate; a value never seen is OOV, unless that is not kept.

        Raises:
            DataError: another encoder than the search had, an unknown field, vocabulary or pair, nothing left, a field dropped
                that a kept cross reads, or values dropped of data with crosses, whose keys are made of ids.
        """
        return derive(self, encoder).encoder

    def start(self, encoder: Encoder) -> dict[str, Tensor]:
        """:attr:`weights` for the model that is trained with :meth:`apply`'s encoder: the rows of kept values.

        To be given to :func:`ctrlib.experiment.train` as ``start``.

        Raises:
            DataError: as :meth:`apply`; or the selection has no model or weights, or drops fields, for which they do not fit.
        """
        if self.model is None or self.weights is None:
            raise DataError(f"the selection of {self.method} has no weights to start from; train from scratch")
        if dropped_fields(self, encoder):
            raise DataError(f"the selection of {self.method} drops fields, and its weights are of all; train from scratch")
        model = _built(self.model, encoder)
        model.load_state_dict(self.weights)
        return compact(model, self, encoder)[0].state_dict()

    def save(self, path: str | Path) -> None:
        """Write a new folder: ``selection.json``, and where there are any ``values.parquet`` and ``weights.safetensors``.

        Raises:
            DataError: the folder exists already or cannot be written.
        """
        with new_folder(path) as part:
            files: list[str] = []
            if self.values is not None:
                files.append("values.parquet")
                pq.write_table(_as_table(self.values), part / files[-1], compression="zstd")
            if self.weights is not None:
                files.append("weights.safetensors")
                save_file({n: w.detach().cpu().contiguous() for n, w in self.weights.items()}, part / files[-1])
            data = {
                "format": _FORMAT,
                "method": self.method,
                "encoder_hash": self.encoder_hash,
                "fields": self.fields,
                "pairs": self.pairs,
                "scores": self.scores,
                "model": None if self.model is None else to_json(self.model),
                "report": self.report,
                "files": {name: sha256(part / name) for name in files},
            }
            write_json(part / "selection.json", data)

    @classmethod
    def load(cls, path: str | Path, table: Table = COMPONENTS) -> Selection:
        """Read what :meth:`save` wrote.

        Args:
            path: the folder.
            table: component classes by name, see :func:`ctrlib.artifact.load`.

        Raises:
            DataError: not a selection, another format, or a file missing or damaged.
            ConfigError: the model uses a component or option that this version does not know.
        """
        folder = Path(path)
        if not (folder / "selection.json").is_file():
            raise DataError(f"{folder} is not a selection (no selection.json); expected a folder written by Selection.save")
        try:
            data = json.loads((folder / "selection.json").read_text(encoding="utf-8"))
            if data["format"] != _FORMAT:
                raise DataError(f"selection {folder} has format {data['format']}; this version reads {_FORMAT}: search again")
            for name, digest in data["files"].items():
                if not (folder / name).is_file() or sha256(folder / name) != digest:
                    raise DataError(f"selection file {folder / name} is missing or damaged; copy the selection again")
            values = weights = None
            if "values.parquet" in data["files"]:
                values = _from_table(pq.read_table(folder / "values.parquet"))
            if "weights.safetensors" in data["files"]:
                weights = load_file(folder / "weights.safetensors")
            model = data["model"]
            return cls(
                method=data["method"],
                encoder_hash=data["encoder_hash"],
                fields=None if data["fields"] is None else tuple(data["fields"]),
                values=values,
                pairs=data["pairs"],
                scores={name: math.nan if score is None else score for name, score in data["scores"].items()},
                model=None if model is None else from_json(model, ModelComponent.Config, table, "model"),
                weights=weights,
                report=data["report"],
            )
        except (ConfigError, DataError):
            raise
        except (ValueError, KeyError, TypeError, AttributeError, OSError, SafetensorError) as error:
            raise DataError(f"selection {folder} is damaged ({error!r}); copy it again, or search again") from error


def _as_table(values: Mapping[str, Mask]) -> Any:
    """One row a vocabulary: its name, and a list of booleans."""
    offsets = np.cumsum([0, *(len(mask) for mask in values.values())])
    flags = np.concatenate([np.zeros(0, bool), *values.values()])
    kept = pa.LargeListArray.from_arrays(pa.array(offsets, pa.int64()), pa.array(flags, pa.bool_()))
    return pa.table({"vocabulary": pa.array(list(values), pa.string()), "kept": kept})


def _from_table(table: Any) -> dict[str, Mask]:
    return {
        name: kept.values.to_numpy(zero_copy_only=False)
        for name, kept in zip(table["vocabulary"].to_pylist(), table["kept"], strict=True)
    }


def apply_to_store(selection: Selection, store: Store, path: str | Path) -> Store:
    """A new store of the rows of ``store``, as :meth:`Selection.apply` encodes them, without reading raw rows.

    Raises:
        DataError: as :meth:`Selection.apply`; or the folder exists already or cannot be written.
    """
    derived = derive(selection, store.encoder)
    return store.derive(path, derived.encoder, derived.ids)


def compact(model: ModelComponent, selection: Selection, encoder: Encoder) -> tuple[ModelComponent, Encoder]:
    """The same function as a model with closed gates, with tables of the kept values only.

    Closed are the values that are not kept, which then count as padding, and all of the fields that are not kept, and of
    crosses whose pair is not memorised: their tokens are zero vectors. So the logits are those of ``model`` with these gates,
    whatever its interaction makes of a zero vector; the fields themselves stay. Rows of hashed and ``bucket`` fields are never
    pruned by value. The gates of what is kept must be 1.

    Args:
        model: after training, without its optimizer.
        selection: what is kept.
        encoder: of the data that the model was trained on.

    Returns:
        A new model on the same device, and the encoder that makes its batches.

    Raises:
        DataError: as :meth:`Selection.apply`; or a field that is not kept does not enter the model through its embedding.
    """
    derived = derive(selection, encoder, close=True)
    layout, closed = derived.encoder.layout, dropped_fields(selection, encoder)
    config = cast(ModelComponent.Config, model.config)
    embeddings = {name: part for name, part in model.named_modules() if isinstance(part, FeatureEmbedding)}
    read = {name for part in embeddings.values() for name in part.out.names}
    wanted = config.embedding.fields
    for name in layout.names if wanted is None else wanted:
        if name in closed and name not in read:
            raise DataError(
                f"field {name!r} is not kept, but {type(model).__name__} reads it beside its embedding; apply the selection "
                "and train again"
            )
    small = _built(_renamed(config, derived.owners), derived.encoder).to(next(model.parameters()).device)
    if small.embedding.out.names != model.embedding.out.names:
        raise DataError(
            f"without the fields that are not kept, the tokens would change places: {', '.join(small.embedding.out.names)}; "
            "apply the selection and train again"
        )
    ids: dict[str, tuple[str, Ids]] = {}
    for name, owner in derived.owners.items():
        same = np.arange(encoder.vocabularies[owner].size, dtype=np.int32)
        ids[name] = owner, derived.ids.get(name, same)
    sizes = {c.name: (c.table, c.vocab_size) for c in layout.sparse} | {
        c.name: (c.table, c.vocab_size) for c in layout.sequences
    }
    for table, size in (sizes[name] for name in sizes if name in closed):
        if table not in ids:  # quantile bins and time gaps, which have no vocabulary
            ids[table] = table, np.zeros(size, np.int32)
    for name, part in embeddings.items():
        cast(FeatureEmbedding, small.get_submodule(name)).take_over(part, ids, closed)
    state = model.state_dict()
    with torch.no_grad():
        for name, tensor in small.state_dict().items():
            if not any(name.startswith(f"{part}.") for part in embeddings):
                tensor.copy_(state[name])
    return small.train(model.training), derived.encoder


def _built(config: ModelComponent.Config, encoder: Encoder) -> ModelComponent:
    """A model whose weights are to be replaced: no random numbers are used up."""
    with torch.random.fork_rng(devices=[]):
        return build_model(config, encoder.layout)


def _renamed(config: ModelComponent.Config, owners: Mapping[str, str]) -> ModelComponent.Config:
    """The config with what its embedding says of single vocabularies also under their new names."""
    embedding = config.embedding
    dims = {**embedding.dims, **{new: embedding.dims[old] for new, old in owners.items() if old in embedding.dims}}
    frozen = dict.fromkeys([*embedding.frozen, *(new for new, old in owners.items() if old in embedding.frozen)])
    return replace(config, embedding=replace(embedding, dims=dims, frozen=tuple(frozen)))


@dataclass(frozen=True)
class Derived:
    """What becomes of an encoder.

    Attributes:
        encoder: the new one.
        ids: by field of the new encoder, the new id of every old one; fields that are not in it keep theirs.
        owners: by vocabulary of the new encoder, that of the old one from which it is.
    """

    encoder: Encoder
    ids: Mapping[str, Ids]
    owners: Mapping[str, str]


def derive(selection: Selection, encoder: Encoder, *, close: bool = False) -> Derived:
    """As :meth:`Selection.apply`.

    Args:
        close: leave dropped fields where they are, with an empty vocabulary each: all their ids are that of padding.
    """
    dropped = dropped_fields(selection, encoder)
    schema = encoder.schema
    kept = [f for f in schema.fields if f.name not in dropped]
    _check_values(selection, encoder, kept)
    heirs: dict[str, str] = {}  # of every vocabulary of a kept field, the field that owns it from now on
    for f in kept:
        heirs.setdefault(vocabulary_name(f), vocabulary_name(f) if vocabulary_name(f) not in dropped else f.name)
    fields: list[Field] = []
    vocabularies: dict[str, Vocabulary | HashBuckets] = {}
    ids: dict[str, Ids] = {}
    owners: dict[str, str] = {}
    for f in schema.fields:
        table = vocabulary_name(f)
        old = encoder.vocabularies.get(table)
        if f.name not in dropped:
            fields.append(_inherited(f, schema, heirs[table]))
            if old is not None:
                mask = (selection.values or {}).get(table)
                new, new_ids = (old, None) if mask is None or isinstance(old, HashBuckets) else old.keep(mask)
                vocabularies[heirs[table]], owners[heirs[table]] = new, table
                if new_ids is not None:
                    ids[f.name] = new_ids
        elif close:
            fields.append(_alone(f))
            if old is not None:
                vocabularies[f.name], owners[f.name] = _empty(old, f), table
                ids[f.name] = np.zeros(old.size, np.int32)
    names = {f.name for f in fields}
    numeric = {name: learned for name, learned in encoder.numeric.items() if name in names}
    gone = [f.name for f in schema.fields if f.name not in names and not isinstance(f, CrossField)]
    ignored = {**schema.ignored, **dict.fromkeys(gone, f"dropped by {selection.method}")}
    schema = replace(schema.with_only(fields), ignored=ignored)
    return Derived(Encoder(schema, vocabularies, numeric, encoder.clocks), ids, owners)


def _inherited(f: Field, schema: Schema, owner: str) -> Field:
    """The field, if the owner of its vocabulary is another one than before."""
    if not isinstance(f, SparseField | SequenceField) or owner == vocabulary_name(f):
        return f
    if owner != f.name:
        return replace(f, shares=owner)
    before = schema[vocabulary_name(f)]
    assert isinstance(before, SparseField | SequenceField)
    return replace(f, shares=None, min_count=before.min_count, max_size=before.max_size, hash_size=before.hash_size)


def _alone(f: Field) -> Field:
    """The field with a learned vocabulary of its own."""
    if isinstance(f, SparseField | SequenceField):
        return replace(f, shares=None, hash_size=None)
    return replace(f, hash_size=None) if isinstance(f, CrossField) else f


def _empty(old: Vocabulary | HashBuckets, f: Field) -> Vocabulary:
    """A vocabulary that gives every value the id of padding."""
    kind = old.values.type if isinstance(old, Vocabulary) else pa.int64() if isinstance(f, CrossField) else pa.large_string()
    return Vocabulary(pa.array([], kind), np.zeros(0, np.int64), 0, True)


def check_encoder(selection: Selection, encoder: Encoder) -> None:
    """Raise :class:`DataError` if the selection was made with another encoder."""
    if selection.encoder_hash != encoder.hash:
        raise DataError(
            f"the selection of {selection.method} was made with another encoder: its hash is {selection.encoder_hash[:12]}…, "
            f"that of this one {encoder.hash[:12]}…; apply it to the store that was searched, or search again"
        )


def dropped_fields(selection: Selection, encoder: Encoder) -> set[str]:
    """The fields that are not kept, and the time gaps that go with them; raises what :meth:`Selection.apply` says of fields and
    pairs."""
    check_encoder(selection, encoder)
    schema = encoder.schema
    names = [*(f.name for f in schema.fields), *(h.gaps for h in schema.histories if h.gaps is not None)]
    dropped: set[str] = set()
    if selection.fields is not None:
        for name in selection.fields:
            if name not in names:
                raise DataError(f"the selection keeps field {name!r}, which the data lacks{suggest(name, names)}")
        dropped |= set(names) - set(selection.fields)
        for h in schema.histories:
            if h.gaps is not None:  # an attribute of the behaviours that are kept: of none, there are no gaps
                dropped = dropped | {h.gaps} if dropped.issuperset(h.fields) else dropped - {h.gaps}
    crosses = {frozenset(f.of): f.name for f in schema.crosses}
    for pair, choice in (selection.pairs or {}).items():
        cross = crosses.get(_two_fields(pair, names))
        if cross is not None and choice != "memorize":
            dropped.add(cross)
        elif cross is None and choice == "memorize":
            raise DataError(
                f"the selection memorises the pair {pair!r}, but the data has no cross of it; add one (Schema.with_crosses)"
            )
    for f in schema.crosses:
        gone = [name for name in f.of if name in dropped]
        if gone and f.name not in dropped:
            raise DataError(
                f"the selection keeps the cross {f.name!r} but not field {gone[0]!r}, from whose ids it is made; keep both or "
                "neither"
            )
    if len(dropped) == len(names):
        raise DataError(f"the selection of {selection.method} keeps no field; select more of them")
    return dropped


def _two_fields(pair: str, names: list[str]) -> frozenset[str]:
    """The two fields of ``"user*item"``; names may themselves hold a ``*``."""
    for at in (i for i, letter in enumerate(pair) if letter == "*"):
        if pair[:at] in names and pair[at + 1 :] in names:
            return frozenset((pair[:at], pair[at + 1 :]))
    near = [f"{a}*{b}" for a in names for b in names if a != b]
    raise DataError(f"the selection has a pair {pair!r}, which is no pair of fields of the data{suggest(pair, near)}")


def refuse_crosses(who: str, fields: Iterable[Field]) -> None:
    """Raise :class:`DataError` if there is a cross among the fields of data of which ``who`` drops values."""
    crosses = [f.name for f in fields if isinstance(f, CrossField)]
    if crosses:
        raise DataError(
            f"{who} drops values, but the data has crosses ({', '.join(crosses[:3])}), whose keys are made of the ids that "
            "would change; select values of data that was prepared without crosses"
        )


def _check_values(selection: Selection, encoder: Encoder, kept: list[Field]) -> None:
    if selection.values is None:
        return
    refuse_crosses("the selection", kept)
    for name, mask in selection.values.items():
        vocabulary = encoder.vocabularies.get(name)
        if not isinstance(vocabulary, Vocabulary):
            learned = [n for n, v in encoder.vocabularies.items() if isinstance(v, Vocabulary)]
            why = "is hashed, so it has no values to drop" if vocabulary is not None else "is no vocabulary of the data"
            raise DataError(f"the selection has values of {name!r}, which {why}{suggest(name, learned)}")
        if mask.dtype != np.bool_ or mask.shape != (vocabulary.size,):
            raise DataError(
                f"the selection has {mask.dtype} values of shape {mask.shape} for vocabulary {name!r}; expected "
                f"{vocabulary.size} booleans, one for each id"
            )
    if not any(mask[OOV_ID:].any() for mask in selection.values.values()):
        raise DataError(f"the selection of {selection.method} keeps no value; lower its penalty (of optfs, lambda)")
