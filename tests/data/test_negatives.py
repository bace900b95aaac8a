"""Negatives: not met, never twice, all sets equally likely, from the seed alone."""

from __future__ import annotations

from collections import Counter
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from ctrlib.data.negatives import sample_negatives
from ctrlib.schema import DataError

USERS, ITEMS = np.array([0, 0, 0, 2, 2, 5]), np.array([1, 3, 3, 0, 5, 2])


def test_items_that_the_user_never_met() -> None:
    impressions = np.array([0, 2, 5, 5, 3, 0, 7])
    found = sample_negatives(impressions, USERS, ITEMS, 6, 4, seed=1)
    assert found.shape == (7, 4)
    for user, items in zip(impressions.tolist(), found.tolist(), strict=True):
        met = set(ITEMS[user == USERS].tolist())
        assert len(set(items)) == 4
        assert not met & set(items)
        assert set(items) <= set(range(6))


def test_the_seed_alone_decides() -> None:
    impressions = np.arange(200) % 6
    one = sample_negatives(impressions, USERS, ITEMS, 50, 9, seed=(3, 1))
    assert np.array_equal(one, sample_negatives(impressions, USERS[::-1], ITEMS[::-1], 50, 9, seed=(3, 1)))
    assert not np.array_equal(one, sample_negatives(impressions, USERS, ITEMS, 50, 9, seed=(3, 2)))


def test_all_sets_are_equally_likely() -> None:
    # User 0 met items 1 and 3 of 7: five are left, of which three are drawn: ten sets.
    n = 20_000
    found = sample_negatives(np.zeros(n, np.int64), USERS, ITEMS, 7, 3, seed=0)
    counts = Counter(tuple(sorted(items)) for items in found.tolist())
    assert set(counts) == set(combinations((0, 2, 4, 5, 6), 3))
    chi_square = sum((count - n / 10) ** 2 / (n / 10) for count in counts.values())
    assert chi_square < 27.9  # of nine degrees of freedom, one in a thousand is larger
    places = [Counter(column.tolist()) for column in found.T]  # and the order says nothing
    assert all(abs(count / n - 0.2) < 0.015 for place in places for count in place.values())


def test_all_that_is_left() -> None:
    found = sample_negatives(np.array([0] * 30), USERS, ITEMS, 6, 4, seed=0)
    assert {tuple(sorted(items)) for items in found.tolist()} == {(0, 2, 4, 5)}
    assert sample_negatives(np.zeros(0, np.int64), USERS, ITEMS, 6, 4, seed=0).shape == (0, 4)
    assert sorted(sample_negatives(np.array([4]), USERS[:0], ITEMS[:0], 3, 3, seed=0)[0].tolist()) == [0, 1, 2]


@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("shift", [0, 100, 5_000_000_000, 2**62])
def test_numbers_of_users_of_any_size(kind: type[np.integer[Any]], shift: int) -> None:
    """The same items as for users 0, …, n, whatever they are called: neither memory nor products grow with the numbers."""
    if shift > np.iinfo(kind).max - 10:
        kind = np.int64
    impressions = np.array([0, 2, 5, 5, 3, 0, 7])
    expected = sample_negatives(impressions, USERS, ITEMS, 50_000, 4, seed=1)
    found = sample_negatives(
        (impressions + shift).astype(kind), (USERS + shift).astype(kind), ITEMS.astype(kind), 50_000, 4, seed=1
    )
    assert np.array_equal(found, expected)
    most = np.arange(49_000)  # of 50,000 items: a product that overflows would forget that they were met
    of_one = np.full(len(most), shift + 90).astype(kind)
    left = sample_negatives(of_one[:5], of_one, most.astype(np.int32), 50_000, 9, seed=0)
    assert left.min() >= 49_000


def test_types_that_have_no_common_integer_type() -> None:
    """2⁶⁰ as int64 and 2⁶⁰ + 1 as uint64 are two users, though one number as float64."""
    seen = np.full(4, 2**60 + 1, np.uint64)
    found = sample_negatives(np.full(50, 2**60), seen, np.arange(4, dtype=np.uint64), 6, 2, seed=0)
    assert set(found.ravel()) == set(range(6))


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(DataError, match="user 2 has met all but 4 of 6 items, so 5 negatives cannot be drawn"):
        sample_negatives(np.array([7, 2]), USERS, ITEMS, 6, 5, seed=0)
    with pytest.raises(DataError, match="items run from 0 to 5; expected 0 to 4: number them first"):
        sample_negatives(np.array([0]), USERS, ITEMS, 5, 1, seed=0)
    with pytest.raises(DataError, match="count is -1; expected 0 or more"):
        sample_negatives(np.array([0]), USERS, ITEMS, 6, -1, seed=0)
    with pytest.raises(DataError, match=f"there are {len(USERS)} users and 1 items that were met; expected pairs"):
        sample_negatives(np.array([0]), USERS, ITEMS[:1], 6, 1, seed=0)
    with pytest.raises(DataError, match="users or items are float64; expected integers"):
        sample_negatives(np.array([0.5]), USERS, ITEMS, 6, 1, seed=0)
    with pytest.raises(DataError, match="a user or item has the number 9223372036854775808; expected less"):
        sample_negatives(np.array([2**63], np.uint64), USERS, ITEMS, 6, 1, seed=0)
    with pytest.raises(DataError, match="a user has a number below 0"):
        sample_negatives(np.array([-1]), USERS, ITEMS, 6, 1, seed=0)
