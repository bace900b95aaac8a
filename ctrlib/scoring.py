"""Probabilities of a table, written as a table: what ``ctrlib predict`` does."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ctrlib import artifact
from ctrlib.config import ConfigError
from ctrlib.data.graph import node_ids
from ctrlib.data.source import open_source
from ctrlib.files import new_file
from ctrlib.node_artifact import is_node_run, load_nodes
from ctrlib.schema import DataError


def predict_run(run: str | Path, data: object, out: str | Path, *, edges: object = None) -> int:
    """Write the probabilities of a saved model as Parquet, under a temporary name, renamed when whole.

    Args:
        run: a run or artifact folder, or a run on nodes.
        data: raw rows, labels not needed; of a run on nodes a table of new nodes, or ``None`` for all known ones.
        out: the new file. Of rows it has a column for each label, in the order of the rows; of nodes their ids, and a column
            ``probability_CLASS`` for each class; of the ``artifact/`` of a run on nodes the latter, without looking at edges.
        edges: of the new nodes, see :meth:`.NodeArtifact.predict_new`.

    Returns:
        The number of rows.

    Raises:
        DataError: ``out`` exists; or as :meth:`.Artifact.predict` and :meth:`.NodeArtifact.predict_new`.
        ConfigError: rows without data, or with edges.
    """
    target = Path(out)
    if target.exists():
        raise DataError(f"{target} exists; choose another name, or remove it")
    if not target.parent.is_dir():
        raise DataError(f"{target.parent} is no folder; make it, or choose another place for {target.name}")
    table = _of_nodes(run, data, edges) if is_node_run(run) else _of_rows(run, data, edges)
    try:
        with new_file(target) as part:
            pq.write_table(table, part)
    except OSError as error:
        raise DataError(f"{target} cannot be written: {error}") from error
    return int(table.num_rows)


def _of_rows(run: str | Path, data: object, edges: object) -> pa.Table:
    loaded = artifact.load(run)
    if data is None or edges is not None:
        raise ConfigError(f"{run} is a run on rows; name a table of rows, and no edges")
    found = loaded.predict(data)
    columns = [found] if found.ndim == 1 else list(found.T)
    names = [f"probability_{c}" for c in loaded.schema.classes] or loaded.schema.labels
    return pa.table(dict(zip(names, columns, strict=True)))


def _of_nodes(run: str | Path, data: object, edges: object) -> pa.Table:
    loaded = load_nodes(run)
    column = loaded.columns["id"]
    if data is None:
        if edges is not None:
            raise ConfigError("edges are of new nodes; name their table too")
        ids, found = loaded.ids, loaded.predict()
    else:
        table = open_source(data, "the table of new nodes")
        found = loaded.predict_new(table, edges)
        ids = node_ids(table, column)
    return pa.table([ids, *found.T], names=[column, *(f"probability_{c}" for c in loaded.classes)])
