"""Negatives for implicit feedback: items that a user did not meet, from a fixed seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrlib.schema import DataError

Ints = npt.NDArray[np.int64]


def sample_negatives(
    users_N: npt.NDArray[np.integer[Any]],
    seen_users_M: npt.NDArray[np.integer[Any]],
    seen_items_M: npt.NDArray[np.integer[Any]],
    num_items: int,
    count: int,
    *,
    seed: int | Sequence[int],
) -> Ints:
    """For each of N impressions, ``count`` different items that its user did not meet.

    The law: uniform over all sets of ``count`` items of the catalogue 0, …, ``num_items`` − 1 without those that the user met
    in the given pairs; nothing depends on popularity. Impressions are independent of each other, those of one user too. For
    training rows give the pairs of training only: negatives that avoid held-out positives tell which they are.

    Args:
        users_N: [N] the user of each impression, 0 or more.
        seen_users_M, seen_items_M: [M] who met what, in any order; pairs may repeat. Integers of any kind and size.
        num_items: size of the catalogue.
        count: negatives an impression.
        seed: of the draw; the same seed and inputs give the same items.

    Returns:
        [N, count] items.

    Raises:
        DataError: arrays that are no integers below 2⁶³, users and items of unequal number, a negative ``count``, an item
            outside the catalogue, a negative user, or a user who has fewer than ``count`` items left.
    """
    if count < 0:
        raise DataError(f"count is {count}; expected 0 or more negatives for each impression")
    if len(seen_users_M) != len(seen_items_M):
        raise DataError(f"there are {len(seen_users_M)} users and {len(seen_items_M)} items that were met; expected pairs")
    # of one type, since arrays of int64 and uint64 are joined as float64
    users_N, seen_users_M, seen_items_M = (_integers(array) for array in (users_N, seen_users_M, seen_items_M))
    if len(seen_items_M) and not 0 <= seen_items_M.min() <= seen_items_M.max() < num_items:
        raise DataError(
            f"items run from {seen_items_M.min()} to {seen_items_M.max()}; expected 0 to {num_items - 1}: number them first"
        )
    if min(users_N.min(initial=0), seen_users_M.min(initial=0)) < 0:
        raise DataError("a user has a number below 0; expected 0 or more: number them first")
    # Users are numbered anew, so that neither memory nor a product of user and item depends on how large their numbers are.
    ids_U, user_A = np.unique(np.concatenate([users_N, seen_users_M]), return_inverse=True)
    number_N, seen_M = np.split(user_A.astype(np.int64), [len(users_N)])
    met_K = np.unique(seen_M * num_items + seen_items_M)
    left_N = num_items - np.bincount(met_K // num_items, minlength=len(ids_U))[number_N]
    if (left_N < count).any():
        at = int(np.argmin(left_N))
        raise DataError(
            f"user {users_N[at]} has met all but {left_N[at]} of {num_items} items, so {count} negatives cannot be drawn; ask "
            "for fewer, or leave the user out"
        )
    rng = np.random.default_rng(seed)
    items_NC = rng.integers(num_items, size=(len(users_N), count))
    open_O = np.arange(len(users_N))  # impressions that may have a wrong item
    while len(open_O):
        items_OC = items_NC[open_O]
        wrong_OC = _among(number_N[open_O, None] * num_items + items_OC, met_K) | _repeated(items_OC)
        # A draw that is wrong is drawn again: no item is treated unlike another, so all sets stay equally likely.
        items_OC[wrong_OC] = rng.integers(num_items, size=int(wrong_OC.sum()))
        items_NC[open_O] = items_OC
        open_O = open_O[wrong_OC.any(axis=1)]
    return items_NC


def _integers(array: npt.NDArray[np.integer[Any]]) -> Ints:
    if array.dtype.kind not in "iu" and array.size:
        raise DataError(f"users or items are {array.dtype}; expected integers: number them first")
    if array.dtype == np.uint64 and array.size and array.max() >= 2**63:
        raise DataError(f"a user or item has the number {array.max()}; expected less than 2⁶³: number them anew")
    return array.astype(np.int64)


def _among(keys: Ints, sorted_K: Ints) -> npt.NDArray[np.bool_]:
    if not len(sorted_K):
        return np.zeros(keys.shape, bool)
    at = np.minimum(np.searchsorted(sorted_K, keys), len(sorted_K) - 1)
    found: npt.NDArray[np.bool_] = sorted_K[at] == keys
    return found


def _repeated(items_OC: Ints) -> npt.NDArray[np.bool_]:
    """Which items of a row occur in it before."""
    order_OC = np.argsort(items_OC, axis=1, kind="stable")
    sorted_OC = np.take_along_axis(items_OC, order_OC, axis=1)
    repeated_OC = np.zeros(items_OC.shape, bool)
    np.put_along_axis(repeated_OC, order_OC[:, 1:], sorted_OC[:, 1:] == sorted_OC[:, :-1], axis=1)
    return repeated_OC
