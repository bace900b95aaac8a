"""As many features for every node, drawn once before training: how the data of the CatGCN paper was made."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ctrlib.data.source import open_source
from ctrlib.data.subgraphs import first_of_each
from ctrlib.schema import DataError


def sample_bags(nodes: object, column: str, size: int = 10, seed: int = 42) -> Any:
    """The table with ``size`` values in every list of a column: drawn without replacement where it has as many, else with.

    NOTE[DIFF] the paper's notebooks draw node after node by NumPy's old generator; here all at once, so other values come up.

    Args:
        nodes: a table; see :func:`~ctrlib.data.source.open_source`.
        column: of lists, none empty.
        size: values of each.
        seed: of the draws.

    Returns:
        An Arrow table with the same columns.

    Raises:
        DataError: the column holds no lists, a list is empty, or a size below 1.
    """
    table = open_source(nodes, "the table of nodes")
    table.require([column], ", whose lists are to be sampled")
    if size < 1:
        raise DataError(f"size is {size}; expected 1 or more")
    lists = table.column(column)
    if not (pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)):
        raise DataError(f"column {column!r} holds {lists.type}; expected lists of values")
    counts = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False).astype(np.int64)
    if (counts == 0).any():
        raise DataError(f"column {column!r}, {table.locate(int(np.argmin(counts)))}: the list is empty; expected a value")
    rng = np.random.default_rng(seed)
    starts = np.cumsum(counts) - counts
    at = starts[:, None] + (rng.random((len(counts), size)) * counts[:, None]).astype(np.int64)  # with replacement
    owner = np.repeat(np.arange(len(counts)), counts)
    kept = first_of_each(owner, rng.random(len(owner)), size)
    many = counts >= size
    at[many] = kept[many[owner[kept]]].reshape(-1, size)
    values = pc.list_flatten(lists).take(pa.array(at.ravel()))
    sampled = pa.LargeListArray.from_arrays(np.arange(len(counts) + 1, dtype=np.int64) * size, values)
    columns = {name: sampled if name == column else table.column(name) for name in table.types}
    return pa.table(columns)
