"""MovieLens-1M for cold start: who likes what, split by item and by user, and the rows that models learn from."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ctrlib.data.store import Store
from ctrlib.experiment import DataOptions, prepare
from ctrlib.schema import Field, Schema, SequenceField, SparseField
from datasets import movielens

ROOT = Path(__file__).resolve().parents[2]
RAW = Path(os.environ.get("CTRLIB_DATA", ROOT.parent / "shared" / "data")) / "movielens-1m"

USER_FIELDS = ("user_id", "gender", "age", "occupation", "region")
ITEM_FIELDS = ("movie_id", "release_year", "genres", "title")
TITLE = "title"
IDS = ("user_id", "movie_id")
POSITIVE = 4  # stars
COLD, FEW, CHECK = 0.1, 0.1, 0.05  # shares of items; CHECK: cold ones for validation
COLD_USERS = 0.1
FEW_CLICKS = 5
HELD_OUT = 0.1  # of the interactions with warm items, for test, and as many for validation
NEGATIVES = 4

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Catalogue:
    """Users and items that have a positive, a row each, and the positives as pairs of rows."""

    users: pa.Table
    items: pa.Table
    liker: Ints
    liked: Ints


@dataclass(frozen=True)
class Parts:
    """Which positives are for what. ``kind`` of every item is ``warm``, ``few``, ``cold`` or ``check`` (cold, validation).

    ``train``, ``valid`` and ``test`` select positives of users that are not cold; ``cold_users`` those of cold users and warm
    items, which are for test too.
    """

    kind: npt.NDArray[np.str_]
    train: Bools
    valid: Bools
    test: Bools
    cold_users: Bools


def read(folder: Path = RAW) -> Catalogue:
    """The positives among the ratings of ``datasets/movielens.py``; users and items without any are left out.

    Raises:
        DataError: a file is missing or is not what its name says.
    """
    found = movielens.read(folder, folder)
    liked = found.stars >= POSITIVE
    user_rows, user_P = np.unique(found.user_row[liked], return_inverse=True)
    item_rows, item_P = np.unique(found.movie_row[liked], return_inverse=True)
    users, items = found.users.take(user_rows), found.movies.take(item_rows)
    users = users.append_column("region", pc.utf8_slice_codeunits(users["zip"], 0, 2))  # postal codes: the first two digits
    return Catalogue(users, items, user_P, item_P)


def sample(catalogue: Catalogue, positives: int, seed: int = 0) -> Catalogue:
    """So many random positives, with their users and items: for a quick look."""
    chosen = np.random.default_rng(seed).permutation(len(catalogue.liker))[:positives]
    users, user_P = np.unique(catalogue.liker[chosen], return_inverse=True)
    items, item_P = np.unique(catalogue.liked[chosen], return_inverse=True)
    return Catalogue(catalogue.users.take(users), catalogue.items.take(items), user_P, item_P)


def split(catalogue: Catalogue, seed: int) -> Parts:
    """Cut the positives; only random numbers of ``seed`` decide."""
    rng = np.random.default_rng([seed, 1])
    user_P, item_P = catalogue.liker, catalogue.liked
    num_items, num_users = catalogue.items.num_rows, catalogue.users.num_rows
    kind_I = np.full(num_items, "warm", dtype="<U5")
    order, first = rng.permutation(num_items), 0
    for kind, share in (("cold", COLD), ("few", FEW), ("check", CHECK)):
        count = round(share * num_items)
        kind_I[order[first : first + count]] = kind
        first += count
    cold_U = np.isin(np.arange(num_users), rng.permutation(num_users)[: round(COLD_USERS * num_users)])
    kind_P, known_P = kind_I[item_P], ~cold_U[user_P]
    draw_P = rng.random(len(user_P))
    few_P = known_P & (kind_P == "few") & (_place(item_P, draw_P, known_P) < FEW_CLICKS)
    warm_P = known_P & (kind_P == "warm")
    train = few_P | (warm_P & (draw_P >= 2 * HELD_OUT))
    valid = (warm_P & (draw_P >= HELD_OUT) & ~train) | (known_P & (kind_P == "check"))
    test = known_P & ~train & ~valid
    return Parts(kind_I, train, valid, test, ~known_P & (kind_P == "warm"))


def checked(parts: Parts) -> Parts:
    """The validation interactions in the place of those of test, and the cold items for validation as the cold ones."""
    kind = np.select([parts.kind == "check", parts.kind == "cold"], ["cold", "none"], parts.kind)
    return replace(parts, kind=kind, test=parts.valid, cold_users=np.zeros_like(parts.valid))


def _place(item_P: Ints, draw_P: npt.NDArray[np.float64], among_P: Bools) -> Ints:
    """The place of every pair among the chosen pairs of its item, by their draws."""
    order = np.lexsort((draw_P, ~among_P, item_P))
    first = np.flatnonzero(np.r_[True, np.diff(item_P[order]) != 0])
    place = np.arange(len(order)) - np.repeat(first, np.diff(np.r_[first, len(order)]))
    back = np.empty_like(place)
    back[order] = place
    return back


def rows(catalogue: Catalogue, parts: Parts, seed: int) -> Mapping[str, pa.Table]:
    """Training and validation rows: the positives, and ``NEGATIVES`` random items for each.

    Negatives of training rows are drawn alike from all items with a training positive, those of validation rows from the items
    of the same kind; never one that the user likes in the rows known by then (training; for validation also validation). Which
    items are liked in test is not looked at. Groups are a user's rows with items that are cold, and those with others.
    """
    rng = np.random.default_rng([seed, 2])
    num_items = catalogue.items.num_rows
    user_P, item_P = catalogue.liker, catalogue.liked
    code_P = user_P * num_items + item_P
    learned = np.unique(item_P[parts.train])
    pools = {"train": [(parts.train, learned)]}
    check_P = parts.kind[item_P] == "check"
    check = np.flatnonzero(parts.kind == "check")
    pools["valid"] = [(parts.valid & ~check_P, learned), (parts.valid & check_P, check)]
    tables: dict[str, pa.Table] = {}
    for name, wanted in pools.items():
        known = np.unique(code_P[parts.train | (parts.valid if name == "valid" else False)])
        users, items, labels = [], [], []
        for chosen, pool in wanted:
            positive = np.flatnonzero(chosen)
            user = np.repeat(user_P[positive], NEGATIVES)
            item = rng.choice(pool, len(user)) if len(pool) else np.zeros(0, dtype=np.int64)
            user = user[: len(item)]
            for _ in range(100):
                again = np.flatnonzero(np.isin(user * num_items + item, known))
                if not len(again):
                    break
                item[again] = rng.choice(pool, len(again))
            # a user who likes the whole pool has no negative in it
            fine = ~np.isin(user * num_items + item, known)
            users += [user_P[positive], user[fine]]
            items += [item_P[positive], item[fine]]
            labels += [np.ones(len(positive), dtype=np.int8), np.zeros(int(fine.sum()), dtype=np.int8)]
        user, item = np.concatenate(users), np.concatenate(items)
        tables[name] = table(
            catalogue, user, item, label=np.concatenate(labels), group=2 * user + (parts.kind[item] == "check")
        )
    return tables


def table(catalogue: Catalogue, user: Ints, item: Ints, **more: npt.NDArray[Any]) -> pa.Table:
    """Rows of fields, for pairs of a user and an item."""
    of_user, of_item = catalogue.users.take(user), catalogue.items.take(item)
    columns = {name: of_user[name] for name in USER_FIELDS} | {name: of_item[name] for name in ITEM_FIELDS}
    return pa.table(columns | {name: pa.array(values) for name, values in more.items()})


def schema() -> Schema:
    """The fields of :func:`table`."""
    context: list[Field] = [SparseField(name=name, side="context") for name in USER_FIELDS]
    bags: list[Field] = [SequenceField(name="genres"), SequenceField(name="title", min_count=2)]
    fields = (*context, SparseField(name="movie_id"), SparseField(name="release_year"), *bags)
    return Schema(fields=fields, labels=("label",), group="group")


def store(catalogue: Catalogue, parts: Parts, seed: int, folder: Path) -> Store:
    """The training and validation rows, encoded. Items without a training positive are unseen values."""
    found = rows(catalogue, parts, seed)
    for name, part in found.items():
        pq.write_table(part, folder / f"{name}.parquet")
    options = DataOptions(schema=schema(), valid=str(folder / "valid.parquet"))
    return prepare(str(folder / "train.parquet"), folder / "store", options)
