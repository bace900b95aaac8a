"""The encoded data set on disk: memory-mapped columns beside a manifest with the encoder's hash and a checksum per file.

A store is written under a temporary name and renamed when it is whole.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ctrlib.data.encoder import Encoded, Encoder, LeakCount, keep_behaviours
from ctrlib.data.source import BLOCK_ROWS, Source
from ctrlib.files import new_folder, sha256, write_json
from ctrlib.progress import track
from ctrlib.schema import BatchLayout, DataError, DenseColumn, Schema, SparseColumn

_FORMAT = 1


@dataclass(frozen=True)
class Split:
    """The encoded rows of one split, as tensors mapped from files. Shapes as in :class:`~ctrlib.batch.Batch`.

    ``sequences`` maps a field to its values [N] and offsets [rows + 1] (int64); of a nested one, ``inner`` has the offsets
    [M + 1] (int64) by which its M behaviours cut the values.
    """

    num_rows: int
    sparse: Tensor
    dense: Tensor
    sequences: Mapping[str, tuple[Tensor, Tensor]]
    labels: Tensor
    weight: Tensor | None
    group: Tensor | None
    inner: Mapping[str, Tensor] = field(default_factory=dict)


class _Writer:
    """Appends arrays to a raw little-endian file and hashes what it writes."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb")
        self._digest = hashlib.sha256()
        self._entry: dict[str, Any] = {"rows": 0}

    def append(self, array: npt.NDArray[Any]) -> None:
        data = np.ascontiguousarray(array)
        self._entry |= {"dtype": data.dtype.str, "row_shape": list(data.shape[1:]), "rows": self._entry["rows"] + len(data)}
        self._digest.update(data.data)
        self._file.write(data.data)

    def close(self) -> None:
        self._file.close()

    def entry(self) -> dict[str, Any]:
        return {**self._entry, "sha256": self._digest.hexdigest()}


class Store:
    """An encoded data set; make one with :meth:`create`, read one with :meth:`open`.

    Attributes:
        path: its folder.
        encoder: what encoded it.
        rows: rows by split name.
        leaks: by split name and history, how many ``behaviours`` of how many ``rows`` the leak guard dropped.
    """

    def __init__(self, path: Path, encoder: Encoder, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.encoder = encoder
        self._manifest = manifest
        self.rows: Mapping[str, int] = {name: split["rows"] for name, split in manifest["splits"].items()}
        self.leaks: Mapping[str, Mapping[str, Any]] = {n: split.get("leaks", {}) for n, split in manifest["splits"].items()}

    @staticmethod
    def is_store(path: str | Path) -> bool:
        """Whether a folder holds a store."""
        return (Path(path) / "manifest.json").is_file() and (Path(path) / "encoder.json").is_file()

    @classmethod
    def create(cls, path: str | Path, encoder: Encoder, sources: Mapping[str, Source]) -> Store:
        """Encode each source into a split of a new store; parts of one table (:func:`.split_rows`) in one pass over it.

        Raises:
            DataError: the folder exists and is not an unfinished store, cannot be written, or a value cannot be encoded.
        """
        with new_folder(path) as part:
            encoder.save(part)
            written: dict[str, Any] = {}
            for group in _by_table(sources):
                written |= _write_splits(part, encoder, group)
            splits = {name: written[name] for name in sources}
            manifest = {"format": _FORMAT, "encoder_hash": encoder.hash, "splits": splits}
            write_json(part / "manifest.json", manifest)
        return cls(Path(path), encoder, manifest)

    def derive(self, path: str | Path, encoder: Encoder, ids: Mapping[str, npt.NDArray[np.int32]]) -> Store:
        """A new store of the same rows as another encoder would encode them, made from the ids in this one.

        Args:
            path: folder of the new store.
            encoder: its fields are fields of this store; those that are not left out.
            ids: by field, the new id of every old one; ids of other fields stay.

        Raises:
            DataError: the folder exists or cannot be written.
        """
        layout = encoder.layout
        sparse = _places(self.encoder.layout.sparse, layout.sparse)
        dense = _places(self.encoder.layout.dense, layout.dense)
        with new_folder(path) as part:
            encoder.save(part)
            splits: dict[str, Any] = {}
            for name, rows in self.rows.items():
                split = self.split(name)
                with (
                    closing(_SplitWriter(part / name, layout)) as writer,
                    track(f"derive {name}", rows) as bar,
                ):
                    for start in range(0, rows, BLOCK_ROWS):
                        stop = min(start + BLOCK_ROWS, rows)
                        block = _encoded(split, start, stop, sparse, dense)
                        for at, column in enumerate(layout.sparse):
                            if column.name in ids:
                                block.sparse[:, at] = ids[column.name][block.sparse[:, at]]
                        sequences = {
                            field: (ids[field][values] if field in ids else values, lengths)
                            for field, (values, lengths) in block.sequences.items()
                        }
                        writer.append(replace(block, sequences=sequences))
                        bar.advance(stop - start)
                splits[name] = {**self._manifest["splits"][name], "files": writer.entries()}
            manifest = {**self._manifest, "encoder_hash": encoder.hash, "splits": splits}
            write_json(part / "manifest.json", manifest)
        return Store(Path(path), encoder, manifest)

    @classmethod
    def open(cls, path: str | Path, *, schema: Schema | None = None, verify: bool = True) -> Store:
        """Map an existing store.

        Args:
            path: its folder.
            schema: refuse the store if it was made with another schema.
            verify: compare the checksum of every file (reads everything once, about a second per GB).

        Raises:
            DataError: not a store, another format, another schema, a file missing or damaged, or raw files that changed since.
        """
        folder = Path(path)
        if not cls.is_store(folder):
            raise DataError(f"{folder} is not a prepared store (no manifest.json); make one with: ctrlib prepare")
        try:
            manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
            found = manifest["format"]
            if found != _FORMAT:
                raise DataError(f"store {folder} has format {found}; this version reads {_FORMAT}: prepare it again")
            encoder = Encoder.load(folder)
            if encoder.hash != manifest["encoder_hash"]:
                raise DataError(f"store {folder} was encoded by another encoder than the one beside it; prepare it again")
            if schema is not None and schema.to_json() != encoder.schema.to_json():
                raise DataError(
                    f"store {folder} was made with another schema ({_difference(schema, encoder.schema)}); prepare it again"
                )
            for name, split in manifest["splits"].items():
                _check_sources(folder, name, split["sources"])
                for file, entry in split["files"].items():
                    _check_file(folder / name / file, entry, verify)
                if split["files"]["sparse.bin"]["rows"] != split["rows"]:
                    raise DataError(f"store {folder}: manifest.json counts the rows of {name} in two ways; prepare it again")
        except DataError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"store {folder}: manifest.json is damaged ({error!r}); prepare it again") from error
        return cls(folder, encoder, manifest)

    def split(self, name: str) -> Split:
        """One split, mapped.

        Raises:
            DataError: the store has no split of that name.
        """
        if name not in self.rows:
            raise DataError(f"store {self.path} has no split {name!r}; it has {', '.join(self.rows)}")
        files = self._manifest["splits"][name]["files"]

        def mapped(file: str) -> Tensor:
            entry = files[file]
            shape = (entry["rows"], *entry["row_shape"])
            if 0 in shape:
                return torch.from_numpy(np.zeros(shape, entry["dtype"]))
            # copy-on-write: torch wants writable memory; nothing writes to it
            return torch.from_numpy(np.memmap(self.path / name / file, entry["dtype"], "c", shape=shape))

        sequences = {
            column.name: (mapped(f"values-{i}.bin"), mapped(f"offsets-{i}.bin"))
            for i, column in enumerate(self.encoder.layout.sequences)
        }
        return Split(
            num_rows=self.rows[name],
            sparse=mapped("sparse.bin"),
            dense=mapped("dense.bin"),
            sequences=sequences,
            labels=mapped("labels.bin"),
            weight=mapped("weight.bin") if "weight.bin" in files else None,
            group=mapped("group.bin") if "group.bin" in files else None,
            inner={
                column.name: mapped(f"inner-{i}.bin") for i, column in enumerate(self.encoder.layout.sequences) if column.nested
            },
        )


def _places(old: Sequence[SparseColumn | DenseColumn], new: Sequence[SparseColumn | DenseColumn]) -> list[int]:
    at = {column.name: i for i, column in enumerate(old)}
    return [at[column.name] for column in new]


def _encoded(split: Split, start: int, stop: int, sparse: list[int], dense: list[int]) -> Encoded:
    """Rows of a split as they were encoded, with some of the columns, in memory of their own."""

    def taken(tensor: Tensor | None) -> Any:
        return None if tensor is None else tensor[start:stop].numpy()

    sequences, inner = {}, {}
    for name, (values, offsets) in split.sequences.items():
        bounds = offsets[start : stop + 1].numpy()
        first, last = bounds[0], bounds[-1]
        if name in split.inner:
            cuts = split.inner[name][first : last + 1].numpy()
            inner[name] = np.diff(cuts).astype(np.int32)
            first, last = cuts[0], cuts[-1]
        sequences[name] = values[first:last].numpy(), np.diff(bounds).astype(np.int32)
    return Encoded(
        taken(split.sparse)[:, sparse],
        taken(split.dense)[:, dense],
        sequences,
        labels=taken(split.labels),
        weight=taken(split.weight),
        group=taken(split.group),
        inner=inner,
    )


def _by_table(sources: Mapping[str, Source]) -> list[dict[str, Source]]:
    """The sources in groups, each of selections that were made together."""
    groups: dict[object, dict[str, Source]] = {}
    for name, source in sources.items():
        groups.setdefault(name if source.codes is None else id(source.codes), {})[name] = source
    return list(groups.values())


class _SplitWriter:
    """Appends encoded rows to the files of one split."""

    def __init__(self, folder: Path, layout: BatchLayout) -> None:
        folder.mkdir()
        self._folder = folder
        self._sequences = [column.name for column in layout.sequences]
        self._ends: dict[str, int] = {}  # of the offsets in a file
        self._files: dict[str, _Writer] = {}
        self.leaks = LeakCount()
        for i, column in enumerate(layout.sequences):
            for name in (f"offsets-{i}.bin", *([f"inner-{i}.bin"] if column.nested else [])):
                self._append(name, np.zeros(1, np.int64))

    def append(self, block: Encoded) -> None:
        self._append("sparse.bin", block.sparse)
        self._append("dense.bin", block.dense)
        self._append("labels.bin", block.labels)
        self._append("weight.bin", block.weight)
        self._append("group.bin", block.group)
        for i, name in enumerate(self._sequences):
            values, lengths = block.sequences[name]
            self._append(f"values-{i}.bin", values)
            self._append_offsets(f"offsets-{i}.bin", lengths)
            if name in block.inner:
                self._append_offsets(f"inner-{i}.bin", block.inner[name])
        self.leaks.add(block)

    def _append_offsets(self, file: str, lengths: npt.NDArray[np.int32]) -> None:
        ends = self._ends.get(file, 0) + np.cumsum(lengths, dtype=np.int64)
        self._append(file, ends)
        if len(ends):
            self._ends[file] = int(ends[-1])

    def _append(self, file: str, array: npt.NDArray[Any] | None) -> None:
        if array is not None:
            if file not in self._files:
                self._files[file] = _Writer(self._folder / file)
            self._files[file].append(array)

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def entries(self) -> dict[str, Any]:
        return {name: file.entry() for name, file in self._files.items()}


def _write_splits(folder: Path, encoder: Encoder, sources: Mapping[str, Source]) -> dict[str, Any]:
    """Encode selections of one table side by side; returns what the manifest says of each."""
    for name, source in sources.items():
        if source.num_rows == 0:
            raise DataError(f"{source.name}: no rows for the split {name!r}; expected at least one")
    first = next(iter(sources.values()))
    together = first.joined(sources.values()) if len(sources) > 1 else first
    with ExitStack() as stack:
        writers = {name: stack.enter_context(closing(_SplitWriter(folder / name, encoder.layout))) for name in sources}
        bar = stack.enter_context(track(f"encode {', '.join(sources)}", together.num_rows))
        codes = together.codes[together.chosen()] if len(sources) > 1 and together.codes is not None else None
        done = 0
        for block in stack.enter_context(closing(encoder.encode(together))):
            rows = len(block.sparse)
            for name, writer in writers.items():
                writer.append(block if codes is None else _part(block, codes[done : done + rows] == sources[name].picks[0]))
            done += rows
            bar.advance(rows)
    written: dict[str, Any] = {}
    for name, source in sources.items():
        writer = writers[name]
        written[name] = {"rows": source.num_rows, "sources": source.fingerprint(), "files": writer.entries()}
        if writer.leaks.found:
            written[name]["leaks"] = writer.leaks.found
        writer.leaks.log(f"split {name!r}")
    return written


def _part(block: Encoded, chosen: npt.NDArray[np.bool_]) -> Encoded:
    """The chosen rows of a block."""
    at = np.flatnonzero(chosen)

    def take(array: npt.NDArray[Any] | None) -> Any:
        return None if array is None else array.take(at, axis=0)

    sequences, inner = {}, {}
    for name, (values, lengths) in block.sequences.items():
        values, *rest = keep_behaviours(np.repeat(chosen, lengths), values, block.inner.get(name))
        sequences[name] = values, take(lengths)
        if rest:
            [inner[name]] = rest
    return Encoded(
        take(block.sparse),
        take(block.dense),
        sequences,
        labels=take(block.labels),
        weight=take(block.weight),
        group=take(block.group),
        inner=inner,
        leaks={name: take(dropped) for name, dropped in block.leaks.items()},
    )


def _check_file(path: Path, entry: Mapping[str, Any], verify: bool) -> None:
    expected = entry["rows"] * int(np.prod(entry["row_shape"], dtype=np.int64)) * np.dtype(entry["dtype"]).itemsize
    size = path.stat().st_size if path.is_file() else None
    if size != expected:
        found = "is missing" if size is None else f"has {size} bytes; expected {expected}"
        raise DataError(f"store file {path} {found}: the store is damaged; prepare it again")
    if verify and sha256(path) != entry["sha256"]:
        raise DataError(f"store file {path}: its checksum differs from the manifest; the store is damaged: prepare it again")


def _check_sources(folder: Path, split: str, sources: list[dict[str, Any]]) -> None:
    for entry in sources:
        raw = Path(entry["path"])
        if raw.is_file() and [raw.stat().st_size, raw.stat().st_mtime_ns] != [entry["bytes"], entry["mtime_ns"]]:
            raise DataError(
                f"store {folder} is stale: {raw}, from which its {split} rows came, has changed since; prepare it again"
            )


def _difference(wanted: Schema, found: Schema) -> str:
    a, b = ({f.name: f for f in s.fields} for s in (wanted, found))
    changed = [n for n in dict.fromkeys([*a, *b]) if a.get(n) != b.get(n)]
    return f"fields that differ: {', '.join(changed[:5])}" if changed else "its labels, group, time, weight or order differ"
