"""Amazon Beauty as S3-Rec uses it: behaviour sequences, and for every item a set of attributes.

    python datasets/beauty.py --raw DIR --out DIR [--train-negatives 4] [--eval-negatives 99] [--seed 0]

The raw folder holds Beauty.txt (a line a user: "user item item …" in order of time; the times themselves are not known) and
Beauty_item2attributes.json (lists of attribute ids by item). Writes train.parquet, valid.parquet, test.parquet and schema.json.

An impression is an interaction or a random item that the user did not meet; its history are the user's interactions before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
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
    "Recommendations on Styles and Substitutes', SIGIR 2015. Selection and attributes: Zhou et al., S3-Rec, arXiv:2008.07873."
)
BEHAVIOURS, ATTRIBUTES = "Beauty.txt", "Beauty_item2attributes.json"
KNOWN = {
    BEHAVIOURS: common.KnownFile(
        1_090_094, "226cce9c3105299ca0db9615d7d3fb32b3175e90da43100ae352599f0f0107b8", "the file of the S3-Rec repository"
    ),
    ATTRIBUTES: common.KnownFile(
        305_674, "129e40f67486f6877eff0f5318cfa8530ee8ac23d8b0d1de04e1bb7a2ba0b2d4", "the file of the S3-Rec repository"
    ),
}


def make_schema() -> Schema:
    """User, item and its attributes; the history has both too, several attributes a behaviour. Sessions are GAUC groups."""
    return Schema(
        fields=(
            SparseField(name="user", side="context"),
            SparseField(name="item"),
            SequenceField(name="attributes"),
            SequenceField(name="hist_item", side="context", ordered=True, shares="item"),
            SequenceField(name="hist_attributes", side="context", ordered=True, nested=True, shares="attributes"),
        ),
        labels=("label",),
        group="session",
        histories=(History(name="history", fields=("hist_item", "hist_attributes")),),
    )


def read(raw: Path) -> sequences.Interactions:
    """All interactions and the attributes of the items; an item that the second file lacks has none.

    Raises:
        DataError: a file is missing or is not what its name says.
    """
    common.require_files(raw, BEHAVIOURS, ATTRIBUTES)
    for name in KNOWN:
        common.check_known(raw / name, KNOWN)
    users: list[int] = []
    lists: list[list[int]] = []
    with (raw / BEHAVIOURS).open(encoding="ascii", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            try:
                user, *behaviours = map(int, line.split())
            except ValueError:
                raise DataError(
                    f"{raw / BEHAVIOURS}, line {number}: {line[:80]!r}; expected integers, the user first"
                ) from None
            users.append(user)
            lists.append(behaviours)
    if len(set(users)) < len(users):
        raise DataError(f"{raw / BEHAVIOURS}: {len(users) - len(set(users))} users have two lines; expected one line for each")
    try:
        known = json.loads((raw / ATTRIBUTES).read_text(encoding="utf-8"))
        attributes = {int(item): [int(value) for value in values] for item, values in known.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(f"{raw / ATTRIBUTES}: {error}; expected lists of integers by item") from error
    ids, item_M = np.unique(np.concatenate([np.array(one, np.int64) for one in lists]), return_inverse=True)
    items = {
        "item": pa.array(ids, pa.int32()),
        "attributes": pa.array([attributes.get(item, []) for item in ids.tolist()], pa.list_(pa.int32())),
    }
    user_M = np.repeat(np.array(users, np.int64), [len(one) for one in lists])
    return sequences.Interactions(user=user_M, item=item_M.astype(np.int64), time=None, items=items)


def prepare(
    raw: Path, out: Path, *, train_negatives: int = 4, eval_negatives: int = 99, seed: int = 0
) -> tuple[common.OutputFile, ...]:
    """Write the three splits and the schema.

    Columns: ``label`` int8; ``session``, ``user``, ``item`` int32; ``attributes`` lists of int32; ``hist_item`` lists of int32;
    ``hist_attributes`` lists of lists of int32.

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
