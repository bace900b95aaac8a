"""What the scripts for behaviour sequences share: leave-one-out splits, sessions with negatives, histories as lists.

Every interaction of a user is an impression that was clicked. Together with random items that the user did not meet
(:func:`ctrlib.data.negatives.sample_negatives`) it is a session; the history of its rows are the user's interactions before.
What counts as met is what a split knows: for training rows the training rows, for validation also those of validation.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

if TYPE_CHECKING or __package__:
    from . import common
else:  # imported by a script: Python looks in this folder, not in the project's, and ctrlib need not be installed
    sys.path.append(str(Path(__file__).resolve().parents[1]))
    import common
from ctrlib.data.negatives import sample_negatives
from ctrlib.schema import Schema

Ints = npt.NDArray[np.int64]
SPLITS = ("train", "valid", "test")
_SESSIONS = 4096  # written at a time


@dataclass(frozen=True, kw_only=True)
class Interactions:
    """What users did, one user after the other, oldest first.

    Attributes:
        user: [M] the user of each interaction; equal ones follow one another.
        item: [M] its item, as a place in the arrays of ``items``.
        time: [M] its time, never falling for a user; ``None``: only the order is known.
        items: by column name, an Arrow array with what is known of each item; lists are attributes with several values.
    """

    user: Ints
    item: Ints
    time: Ints | None
    items: Mapping[str, Any]

    @property
    def first(self) -> Ints:
        """For every interaction, the place of the first one of its user."""
        begins = np.flatnonzero(np.append(True, self.user[1:] != self.user[:-1]))
        return np.repeat(begins, np.diff(np.append(begins, len(self.user))))

    def leave_one_out(self) -> dict[str, Ints]:
        """Places of the test rows (the last of each user), validation rows (the one before) and training rows (all others).

        The first interaction of a user, which has no history, is a training row too: so models learn what to do without one.
        Users with fewer than three interactions have training rows only.
        """
        first_M = self.first
        at_M = np.arange(len(first_M))
        size_M = np.bincount(first_M, minlength=len(first_M))[first_M]
        left_M = np.where(size_M < 3, 2, first_M + size_M - 1 - at_M)
        return {"train": at_M[left_M >= 2], "valid": at_M[left_M == 1], "test": at_M[left_M == 0]}

    def schema(self) -> pa.Schema:
        """Of what :meth:`sessions` gives."""
        fields = [("label", pa.int8()), ("session", pa.int32()), ("user", pa.int32())]
        fields += [(name, array.type) for name, array in self.items.items()]
        fields += [(f"hist_{name}", pa.list_(array.type)) for name, array in self.items.items()]
        if self.time is not None:
            fields += [("hist_time", pa.list_(pa.int64())), ("time", pa.int64())]
        return pa.schema(fields)

    def sessions(self, places_S: Ints, known_K: Ints, negatives: int, seed: tuple[int, int]) -> Iterator[Any]:
        """The rows of some impressions, session by session, as Arrow tables; no negative is an item of ``known_K``, the places
        of what may be known of users.

        A session has 1 + ``negatives`` rows in random order (so that scores that are all equal find the positive by chance
        only). ``session`` is the place of its positive among all interactions, and so different for every one.
        """
        first_M = self.first
        num_items = len(next(iter(self.items.values())))
        drawn_SC = sample_negatives(first_M[places_S], first_M[known_K], self.item[known_K], num_items, negatives, seed=seed)
        items_SC = np.concatenate([self.item[places_S, None], drawn_SC], axis=1)
        order_SC = np.argsort(np.random.default_rng((*seed, 1)).random(items_SC.shape), axis=1)
        items_SC = np.take_along_axis(items_SC, order_SC, axis=1)
        for start in range(0, len(places_S), _SESSIONS):
            stop = start + _SESSIONS
            yield self._rows(places_S[start:stop], items_SC[start:stop], order_SC[start:stop] == 0, first_M)

    def _rows(self, places_S: Ints, items_SC: Ints, label_SC: npt.NDArray[np.bool_], first_M: Ints) -> Any:
        place_R = np.repeat(places_S, items_SC.shape[1])
        lengths_R = place_R - first_M[place_R]
        ends_R = np.cumsum(lengths_R)
        past_N = np.repeat(first_M[place_R] - (ends_R - lengths_R), lengths_R) + np.arange(int(lengths_R.sum()))
        offsets = pa.array(np.append(0, ends_R), pa.int32())
        item_R, behaviour_N = pa.array(items_SC.ravel()), pa.array(self.item[past_N])
        columns = {
            "label": label_SC.ravel().astype(np.int8),
            "session": place_R.astype(np.int32),
            "user": self.user[place_R].astype(np.int32),
        }
        columns |= {name: array.take(item_R) for name, array in self.items.items()}
        columns |= {
            f"hist_{name}": pa.ListArray.from_arrays(offsets, array.take(behaviour_N)) for name, array in self.items.items()
        }
        if self.time is not None:
            columns["hist_time"] = pa.ListArray.from_arrays(offsets, pa.array(self.time[past_N]))
            columns["time"] = self.time[place_R]
        return pa.table(columns, schema=self.schema())


def write(
    data: Interactions, schema: Schema, out: Path, train_negatives: int, eval_negatives: int, seed: int, terms: str
) -> tuple[common.OutputFile, ...]:
    """Write the sessions of each split to ``out``, and the schema."""
    files = []
    known = np.zeros(0, np.int64)
    for number, (split, places) in enumerate(data.leave_one_out().items()):
        count = train_negatives if split == "train" else eval_negatives
        known = np.append(known, places)  # held-out interactions of later splits decide nothing, not even what is no negative
        sessions = data.sessions(places, known, count, (seed, number))
        files.append(common.write_parquet(sessions, data.schema(), out / f"{split}.parquet"))
        lengths = (places - data.first[places]).tolist()
        print(f"{split}: {len(places):,} sessions, mean history {sum(lengths) / max(len(lengths), 1):.2f}")
    schema.save(out / "schema.json")
    law = f"uniform over items not met by then, seed {seed}"
    print(f"negatives: {train_negatives} a training session, {eval_negatives} else; {law}")
    print(terms)
    return tuple(files)


class Prepare(Protocol):
    """``prepare`` of a script: raw folder and output folder → files."""

    def __call__(self, raw: Path, out: Path, *, train_negatives: int, eval_negatives: int, seed: int) -> object: ...


def main(prepare: Prepare, description: str | None, argv: Sequence[str] | None) -> int:
    """The command line of a script that uses :func:`write`, whose raw folder must be given; returns the exit status."""
    parser = common.argument_parser(description)
    parser.add_argument("--train-negatives", type=int, default=4, help="of each training impression (default: 4)")
    parser.add_argument("--eval-negatives", type=int, default=99, help="of each validation and test impression (default: 99)")
    parser.add_argument("--seed", type=int, default=0, help="of the negatives (default: 0)")
    args = parser.parse_args(argv)
    if args.raw is None:
        parser.error("these files have no address to download them from: give their folder with --raw")
    return common.run(
        lambda: prepare(
            args.raw, args.out, train_negatives=args.train_negatives, eval_negatives=args.eval_negatives, seed=args.seed
        )
    )
