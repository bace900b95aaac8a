"""Amazon Grocery and Gourmet Food: reviews as behaviour sequences, with the category of every item.

    python datasets/amazon_grocery.py --raw DIR --out DIR [--train-negatives 4] [--eval-negatives 99] [--seed 0]

The raw folder holds train.csv, dev.csv and test.csv (user_id, item_id, time, separated by tabs or commas; five or more
interactions a user, the last two in dev and test) and item_meta.csv (item_id, i_category). Writes train.parquet, valid.parquet,
test.parquet and schema.json.

An impression is an interaction or a random item that the user did not meet; its history are the user's interactions before.
Times are days: interactions of the same day stand in the order of the file, and the leak guard of the schema drops those that
are of the day of the impression, since their order is not known.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING or __package__:
    from . import common, sequences
else:  # a script: Python looks in this folder, not in the project's, and ctrlib need not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import common
    import sequences
from ctrlib.schema import DataError, History, Schema, SequenceField, SparseField

TERMS = (
    "Amazon reviews (J. McAuley, UCSD): for research; cite J. McAuley, C. Targett, Q. Shi and A. van den Hengel, 'Image-based\n"
    "Recommendations on Styles and Substitutes', SIGIR 2015. Selection and split: the ReChorus repository."
)
TRAIN, DEV, TEST, META = "train.csv", "dev.csv", "test.csv", "item_meta.csv"
_KNOWN_AS = "the file of the ReChorus reproduction"
KNOWN = {
    TRAIN: common.KnownFile(2_697_544, "a8fe88b78470e7b14c0a4abbb9f83679d8ad3d8c0cc9ee555b8783aac9133a6a", _KNOWN_AS),
    DEV: common.KnownFile(325_353, "e201b197e33aca2491cdc3c237d9ffddc115614e7a05f918f608007e8bcb3cad", _KNOWN_AS),
    TEST: common.KnownFile(325_614, "f047d364c773ae23f9faf57d90b99c780cba15fa4e3bb54f2d50d7234bb05d9a", _KNOWN_AS),
    META: common.KnownFile(2_315_367, "697e8ff67fafd77662cdf8e586a09a4f9f60b18e85ea0c0a346134a8201092ac", _KNOWN_AS),
}


def make_schema() -> Schema:
    """User, item and category; the history has item and category too, and is guarded by its times. Sessions are GAUC groups."""
    return Schema(
        fields=(
            SparseField(name="user", side="context"),
            SparseField(name="item"),
            SparseField(name="category"),
            SequenceField(name="hist_item", side="context", ordered=True, shares="item"),
            SequenceField(name="hist_category", side="context", ordered=True, shares="category"),
        ),
        labels=("label",),
        group="session",
        time="time",
        histories=(History(name="history", fields=("hist_item", "hist_category"), times="hist_time"),),
    )


def _read(path: Path, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """[rows, columns] of the named columns of a file with a header."""
    with path.open(encoding="utf-8", newline="") as file:
        head = file.readline()
        reader = csv.reader(file, delimiter="\t" if "\t" in head else ",")
        columns = next(csv.reader([head.strip()], delimiter="\t" if "\t" in head else ","), [])
        missing = [name for name in names if name not in columns]
        if missing:
            raise DataError(
                f"{path}: no column {', '.join(missing)} in its first line {head[:80]!r}; expected {', '.join(names)}"
            )
        at = [columns.index(name) for name in names]
        rows: list[list[int]] = []
        for number, cells in enumerate(reader, start=2):
            try:
                rows.append([int(cells[i]) for i in at])
            except (ValueError, IndexError):
                raise DataError(
                    f"{path}, line {number}: {','.join(cells)[:80]!r}; expected integers {', '.join(names)}"
                ) from None
    return np.array(rows, np.int64).reshape(-1, len(names))


def read(raw: Path) -> sequences.Interactions:
    """All interactions and the categories of the items.

    Raises:
        DataError: a file is missing or is not what its name says, an item has no category, or the last two interactions of a
            user are not those of dev and test.
    """
    common.require_files(raw, TRAIN, DEV, TEST, META)
    for name in KNOWN:
        common.check_known(raw / name, KNOWN)
    parts = [_read(raw / name, ("user_id", "item_id", "time")) for name in (TRAIN, DEV, TEST)]
    meta = _read(raw / META, ("item_id", "i_category"))
    user_M, item_M, time_M = np.concatenate(parts).T
    part_M = np.repeat(np.arange(3), [len(part) for part in parts])
    order = np.lexsort((np.arange(len(user_M)), time_M, part_M, user_M))  # of the same day: as in the file
    user_M, item_M, time_M, part_M = user_M[order], item_M[order], time_M[order], part_M[order]
    back = np.flatnonzero((user_M[1:] == user_M[:-1]) & (time_M[1:] < time_M[:-1]))
    if back.size:
        raise DataError(
            f"{raw}: user {user_M[back[0]]} has times in {DEV} or {TEST} before those in {TRAIN}; expected later ones"
        )
    ids, first = np.unique(meta[:, 0], return_index=True)
    code_M = np.minimum(np.searchsorted(ids, item_M), len(ids) - 1)
    unknown = np.flatnonzero(ids[code_M] != item_M)
    if unknown.size:
        raise DataError(
            f"{raw}: item {item_M[unknown[0]]} of user {user_M[unknown[0]]} is not in {META}; expected every item there"
        )
    items = {"item": pa.array(ids, pa.int32()), "category": pa.array(meta[first, 1], pa.int32())}
    data = sequences.Interactions(user=user_M, item=code_M, time=time_M, items=items)
    for split, places in data.leave_one_out().items():
        wrong = places[part_M[places] != sequences.SPLITS.index(split)]
        if wrong.size:
            user = user_M[wrong[0]]
            raise DataError(
                f"{raw}: user {user} does not have exactly its last interaction in {TEST} and the one before in {DEV}"
            )
    return data


def prepare(
    raw: Path, out: Path, *, train_negatives: int = 4, eval_negatives: int = 99, seed: int = 0
) -> tuple[common.OutputFile, ...]:
    """Write the three splits and the schema.

    Columns: ``label`` int8; ``session``, ``user``, ``item``, ``category`` int32; ``hist_item``, ``hist_category`` lists of
    int32, ``hist_time`` lists of int64; ``time`` int64, seconds since 1970.

    Args:
        raw: folder of the raw files.
        out: folder to write to.
        train_negatives: of each training impression.
        eval_negatives: of each validation and test impression.
        seed: of the negatives.

    Returns:
        The files of train, validation and test, in this order.

    Raises:
        DataError: see :func:`read`.
    """
    data = read(raw)
    return sequences.write(data, make_schema(), out, train_negatives, eval_negatives, seed, TERMS)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    return sequences.main(prepare, __doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
