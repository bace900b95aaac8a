"""Mutual information of pairs of fields and the label."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from ctrlib.schema import BatchLayout, DataError, SparseColumn
from ctrlib.search.pair_information import PairInformation, information_by_choice, pair_information
from tests.search.planted import HandStore, fields, plain, random_sign_pair, split


def store(x_NF: list[list[int]], y_N: list[int]) -> HandStore:
    x = np.array(x_NF)
    return HandStore(plain(x.shape[1], int(x.max()) + 1), {"train": split(x, np.array(y_N), int(x.max()) + 1, crosses=False)})


def test_by_hand() -> None:
    # Pairs (0, 0), (0, 1), (1, 0), (1, 1), with labels 0 0 | 1 | 1 | 0: y is known from the pair, and H(y) is of 2 in 5.
    hand = store([[0, 0], [0, 0], [0, 1], [1, 0], [1, 1]], [0, 0, 1, 1, 0])
    [found] = pair_information(hand.store()).values()
    entropy = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    assert found.information == pytest.approx(entropy)
    # four pairs with labels, four pairs, two labels: (4 − 4 − 2 + 1) / 10
    assert found.corrected == pytest.approx(entropy + 0.1)
    assert (found.values, found.once) == (4, 0.6)


def test_against_the_definition() -> None:
    x, y = random_sign_pair(400, 4, 0)
    hand = HandStore(fields(4, 4), {"train": split(x, y, 4)})
    found = pair_information(hand.store())
    assert list(found) == ["f0*f1", "f0*f2", "f0*f3", "f1*f2", "f1*f3", "f2*f3"]
    total = 0.0
    for a in range(4):
        for b in range(4):
            for label in (False, True):
                here = (x[:, 1] == a) & (x[:, 3] == b)
                both, alone, labels = (here & (y == label)).mean(), here.mean(), (y == label).mean()
                total += both * math.log(both / (alone * labels)) if both else 0.0
    assert found["f1*f3"].information == pytest.approx(total)


def test_the_correction_takes_off_what_noise_seems_to_tell() -> None:
    x, y = random_sign_pair(20_000, 20, 1)
    found = pair_information(HandStore(fields(4, 20), {"train": split(x, y, 20)}).store())
    assert found["f2*f3"].information > 0.008  # 399 / 40,000, of values that tell nothing
    assert abs(found["f2*f3"].corrected) < 0.002
    assert found["f0*f1"].corrected > 0.3


def test_means_by_choice() -> None:
    information = {"a*b": PairInformation(1.0, 0.5, 3, 0.0), "a*c": PairInformation(2.0, 1.0, 3, 0.0)}
    information["b*c"] = PairInformation(4.0, 3.0, 3, 0.0)
    means = information_by_choice(information, {"a*b": "memorize", "a*c": "naive", "b*c": "memorize"})
    assert means == {"memorize": (2.5, 1.75), "naive": (2.0, 1.0)}
    with pytest.raises(DataError, match=r"no information on the pair 'c\*b'"):
        information_by_choice(information, {"c*b": "naive"})


def test_which_label() -> None:
    hand = store([[0, 0], [0, 1], [1, 0], [1, 1]], [0, 1, 1, 0])
    hand.layout = BatchLayout(hand.layout.sparse, labels=("click", "buy"))
    labels = torch.tensor([[0.0, 1], [1, 1], [1, 1], [0, 1]])
    old = hand.splits["train"]
    hand.splits = {"train": type(old)(4, old.sparse, old.dense, {}, labels, None, None)}
    with pytest.raises(DataError, match="the data has click, buy; name one"):
        pair_information(hand.store())
    with pytest.raises(DataError, match="no label 'bye'; did you mean 'buy'"):
        pair_information(hand.store(), label="bye")
    assert pair_information(hand.store(), label="click")["f0*f1"].information == pytest.approx(math.log(2))
    assert pair_information(hand.store(), label="buy")["f0*f1"].information == pytest.approx(0)


def test_fewer_than_two_fields_have_no_pairs() -> None:
    hand = HandStore(BatchLayout((SparseColumn("f0", 5, "f0"),)), {"train": split(np.zeros((3, 1), int), np.ones(3), 3)})
    assert pair_information(hand.store()) == {}
