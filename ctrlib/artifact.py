"""A trained model as a folder that a service can load: schema, vocabularies, config, weights. JSON, Parquet, safetensors."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ctrlib import calibration
from ctrlib.batch import Batch
from ctrlib.calibration import Calibration
from ctrlib.config import ConfigError, Table, from_json, to_json
from ctrlib.data.encoder import Encoder, LeakCount
from ctrlib.data.source import Source, open_source
from ctrlib.files import WRITER, json_text, new_folder, sealed, sha256, write_json, write_text
from ctrlib.models.ctr import ModelComponent, build_model
from ctrlib.models.presets import COMPONENTS
from ctrlib.schema import DataError, Schema
from ctrlib.table import unallocated_tables
from ctrlib.training import Predictions, predict

_FORMAT = 2  # 1 had no calibration
_OLDEST = 1
_BLOCK_ROWS = 8192
_CALIBRATION = r"calibration-[0-9a-f]{12}\.json"
_FILES = ("schema.json", "encoder.json", "model.json", "weights.safetensors")


@dataclass(frozen=True)
class Explanation:
    """Something that a model shows of N rows: ``values`` [N, …], and the labels of each axis after the first."""

    values: npt.NDArray[np.float64]
    labels: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Artifact:
    """A model with everything it needs to score raw rows. Make one with :func:`save` and :func:`load`."""

    encoder: Encoder
    config: ModelComponent.Config
    model: ModelComponent
    info: Mapping[str, Any]
    calibration: tuple[Calibration, ...] = ()

    @property
    def schema(self) -> Schema:
        """The fields that :meth:`predict` reads."""
        return self.encoder.schema

    def require_rows(self, what: str) -> None:
        """Refuse what reads logits as clicks, where they are of classes and each row is a node of a graph.

        Raises:
            ConfigError: the model is one of nodes.
        """
        if self.schema.classes:
            raise ConfigError(
                f"{what} is for models of rows, and this is a run on nodes (label {self.schema.labels[0]!r} with "
                f"{len(self.schema.classes)} classes); use ctrlib.load_nodes(run), and the metrics in its metrics.json"
            )

    def predict(self, data: object) -> npt.NDArray[np.float64]:
        """Probabilities of raw rows, calibrated if the artifact has a calibration.

        Args:
            data: anything :func:`~ctrlib.data.source.open_source` accepts; labels are not needed.

        Returns:
            [N] probabilities, [N, T] for several labels, or [N, C] for classes; unseen values count as OOV, nulls as missing.

        Raises:
            DataError: a column is missing, or a value cannot be what its field says; names the column and the row.
        """
        table = self._open(data)
        if table.num_rows == 0:
            columns = len(self.schema.classes) or len(self.schema.labels)
            return np.zeros((0,) if columns == 1 else (0, columns))
        return self.calibrated(predict(self.model, self.batches(table, labels=False))).probability

    def calibrated(self, predictions: Predictions) -> Predictions:
        """What the model says, with calibrated logits."""
        return replace(predictions, logits=calibration.calibrate_tasks(self.calibration, predictions.logits))

    def explain(self, data: object) -> dict[str, Explanation]:
        """What the model has to show of raw rows, by name: attention, gates, strengths of pairs; empty where there is nothing.

        Attention maps of many rows are large: ask for those that are to be looked at. See :class:`~ctrlib.interactions.base.
        Interaction` for the names.

        Args:
            data: as for :meth:`predict`.

        Raises:
            DataError: as :meth:`predict`.
        """
        table = self._open(data)
        parts = {name: [np.zeros((0, *map(len, labels)))] for name, labels in self.model.axes.items()}
        where = next(self.model.parameters()).device
        for batch in self.batches(table, labels=False) if table.num_rows else ():
            for name, value in self.model.explain(batch.to(where)).items():
                parts[name].append(value.double().cpu().numpy())
        return {name: Explanation(np.concatenate(parts[name]), labels) for name, labels in self.model.axes.items()}

    def batches(self, data: object, *, labels: bool) -> Iterator[Batch]:
        """The rows, encoded, a few thousand at a time; in the end the log tells how many behaviours leak guards dropped."""
        table, leaks = open_source(data), LeakCount()
        for block in self.encoder.encode(table, labels=labels, block_rows=_BLOCK_ROWS):
            leaks.add(block)
            yield block.batch()
        leaks.log(table.name)

    def _open(self, data: object) -> Source:
        """The rows, of which there may be none; then the columns are checked here."""
        table = open_source(data)
        if table.num_rows == 0 and table.types:  # an empty list of rows has no columns to look at
            table.require(self.schema.inputs, ", which the model reads")
        return table


def save(path: str | Path, encoder: Encoder, model: ModelComponent, config: ModelComponent.Config) -> None:
    """Write an artifact: under a temporary name, renamed when whole.

    Raises:
        DataError: the folder exists already or cannot be written.
    """
    with new_folder(path) as part:
        encoder.save(part)
        write_json(part / "model.json", to_json(config))
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()},
            part / "weights.safetensors",
        )
        files = {str(p.relative_to(part)): sha256(p) for p in sorted(part.rglob("*")) if p.is_file() and p.name != WRITER}
        info = {
            "format": _FORMAT,
            "ctrlib": version("ctrlib"),
            "labels": list(encoder.schema.labels),
            "fields": list(model.embedding.out.names),
            "parameters": sum(p.numel() for p in model.parameters()),
            "encoder_hash": encoder.hash,
            "files": files,
        }
        write_json(part / "artifact.json", sealed(info))


def calibrate(path: str | Path, calibrations: Mapping[str, Calibration]) -> None:
    """Keep calibrations, by label, in the artifact (or that of a run), in place of those it had.

    Whoever loads it meanwhile gets the old ones or the new ones.

    Raises:
        DataError: not an artifact, or other labels than its own.
    """
    folder, info = _open(path)
    calibration.from_json(calibration.to_json(calibrations), info["labels"])
    content = json_text({"calibrations": calibration.to_json(calibrations)}) + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()
    name = f"calibration-{digest[:12]}.json"  # of its content: what a reader finds in artifact.json is the file that was meant
    write_text(folder / name, content)
    old = info.get("calibration")
    files = {file: found for file, found in info["files"].items() if file != old}
    info |= {"format": _FORMAT, "calibration": name, "files": {**files, name: digest}}
    write_json(folder / "artifact.json", sealed(info))
    if old is not None and old != name:
        (folder / old).unlink(missing_ok=True)  # who has read the old artifact.json, and not yet this, reads that again


def load(path: str | Path, table: Table = COMPONENTS) -> Artifact:
    """Read an artifact, or the artifact of a run folder. On a CPU its weights are mapped from the file, not copied: processes
    that serve one artifact share its tables.

    Args:
        path: a folder written by :func:`save`, or a run that holds one as ``artifact/``.
        table: component classes by name; pass a larger one for blocks of your own.

    Raises:
        DataError: not an artifact, another format, a file missing or damaged, or weights of another model.
        ConfigError: the model uses a component or option that this version does not know.
    """
    folder, info = _open(path)
    try:
        return _load(folder, info, table)
    except DataError:
        folder, now = _open(path)
        if now == info:
            raise
    return _load(folder, now, table)  # it was calibrated meanwhile


def _load(folder: Path, info: Mapping[str, Any], table: Table) -> Artifact:
    for name in {*_FILES, *info["files"], *([info["calibration"]] if "calibration" in info else [])}:
        if not (folder / name).is_file() or sha256(folder / name) != info["files"].get(name):
            raise DataError(f"artifact file {folder / name} is missing or damaged; copy the artifact again")
    encoder = Encoder.load(folder)
    config = from_json(read_json(folder / "model.json"), ModelComponent.Config, table, "model.json")
    with unallocated_tables():
        model = build_model(config, encoder.layout)
    if list(model.embedding.out.names) != info["fields"]:
        raise DataError(
            f"artifact {folder}: its fields {info['fields']} are not those of its schema {model.embedding.out.names}"
        )
    try:
        model.load_state_dict(load_file(folder / "weights.safetensors"), assign=True)
    except (SafetensorError, RuntimeError) as error:
        raise DataError(f"artifact {folder}: the weights do not fit the model ({str(error).splitlines()[0]})") from error
    model.eval()
    calibrations: tuple[Calibration, ...] = ()
    if (name := info.get("calibration")) is not None:
        calibrations = calibration.from_json(read_json(folder / name).get("calibrations", {}), encoder.schema.labels)
    return Artifact(encoder, config, model, info, calibrations)


def _open(path: str | Path) -> tuple[Path, dict[str, Any]]:
    """The folder of an artifact, and its ``artifact.json``."""
    folder = Path(path)
    if (folder / "artifact" / "artifact.json").is_file():
        folder = folder / "artifact"
    if not folder.is_dir():
        raise DataError(f"{folder}: there is no such folder; expected one written by ctrlib train")
    if not (folder / "artifact.json").is_file():
        raise DataError(f"{folder} is not an artifact (no artifact.json); expected a folder written by ctrlib train")
    file = folder / "artifact.json"
    info = read_json(file)
    found = info.get("format")
    if isinstance(found, int) and found > _FORMAT:
        raise DataError(
            f"artifact {folder} has format {found}, newer than this version reads ({_FORMAT}): install a newer ctrlib"
        )
    if not isinstance(found, int) or found < _OLDEST:
        raise DataError(f"artifact {folder} has format {found!r}; this version reads {_OLDEST} to {_FORMAT}: train it again")
    kinds = {"files": dict, "fields": list, "labels": list}
    if any(not isinstance(info.get(key), kind) for key, kind in kinds.items()) or (found >= 2 and info != sealed(info)):
        raise DataError(f"artifact file {file} is damaged or was changed; copy the artifact again")
    name = info.get("calibration")
    if name is not None and not (isinstance(name, str) and re.fullmatch(_CALIBRATION, name)):
        raise DataError(f"artifact file {file} names {name!r:.80} as its calibration, which is none: copy the artifact again")
    return folder, info


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of an artifact.

    Raises:
        DataError: the file is missing, damaged, or holds something else.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"artifact file {path} is missing or damaged ({error}); copy the artifact again") from error
    if not isinstance(data, dict):
        raise DataError(f"artifact file {path} holds a {type(data).__name__}; expected an object: copy the artifact again")
    return data
