"""How many fields are kept, and Kendall's τ."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from ctrlib.config import ConfigError
from ctrlib.schema import CrossField, DataError, Schema, SparseField
from ctrlib.search.ranking import Top, best_fields, check_top, kendall_tau

SCHEMA = Schema(fields=tuple(SparseField(name=name) for name in "abcd"), labels=("y",))
SCORES = {"d": 3.0, "c": 1.0, "b": 2.0, "a": 1.0}


@pytest.mark.parametrize(
    ("top", "kept"), [(1, "d"), (2, "bd"), (3, "abd"), (4, "abcd"), (0.5, "bd"), (0.51, "abd"), (0.01, "d"), (1.0, "abcd")]
)
def test_the_best_in_the_order_of_the_schema(top: Top, kept: str) -> None:
    assert best_fields(SCHEMA, SCORES, top) == tuple(kept)


@pytest.mark.parametrize("top", [0, -1, 0.0, 1.5, float("nan")])
def test_no_such_share(top: Top) -> None:
    with pytest.raises(ConfigError, match=r"outrank.top is .*; expected a number of fields from 1 up, or a share"):
        check_top("outrank.top", top)


def test_more_than_there_are_and_no_number() -> None:
    with pytest.raises(ConfigError, match="top is 5, but the data has 4 fields"):
        best_fields(SCHEMA, SCORES, 5)
    with pytest.raises(DataError, match="the score of field 'b' is not a number"):
        best_fields(SCHEMA, SCORES | {"b": float("nan")}, 2)


def test_kendall_tau_by_hand() -> None:
    """Of ten pairs two are the other way round: (8 − 2)/10; of three with a tie, one of two: 2/√(3·2)."""
    a = dict(zip("abcde", [1.0, 2, 3, 4, 5], strict=True))
    assert kendall_tau(a, dict(zip("abcde", [2.0, 1, 3, 5, 4], strict=True))) == pytest.approx(0.6)
    assert kendall_tau(a, a) == 1
    assert kendall_tau(a, {name: -score for name, score in a.items()}) == -1
    assert kendall_tau({"a": 1, "b": 2, "c": 3}, {"c": 2, "b": 2, "a": 1}) == pytest.approx(2 / 6**0.5)
    assert np.isnan(kendall_tau(a, dict.fromkeys("abcde", 1.0)))


def test_kendall_tau_pair_by_pair() -> None:
    rng = np.random.default_rng(0)
    a, b = ({str(i): float(v) for i, v in enumerate(rng.integers(0, 9, 30))} for _ in range(2))
    pairs = [(np.sign(a[i] - a[j]), np.sign(b[i] - b[j])) for i, j in combinations(a, 2)]
    agree = sum(s * t for s, t in pairs)
    expected = agree / np.sqrt(sum(s != 0 for s, _ in pairs) * sum(t != 0 for _, t in pairs))
    assert kendall_tau(a, b) == pytest.approx(expected, abs=1e-12)


def test_different_fields() -> None:
    with pytest.raises(DataError, match="they differ in: b, c"):
        kendall_tau({"a": 1, "b": 2}, {"a": 1, "c": 2})
    with pytest.raises(DataError, match="same two fields or more"):
        kendall_tau({"a": 1}, {"a": 1})


def test_a_cross_is_never_kept_without_its_fields() -> None:
    """A field is worth its best cross at least, and comes before it: of a, c, a*c = 9 first a, then c, then the cross."""
    crossed = SCHEMA.with_crosses([("a", "c")])
    scores = {"a": 0.0, "b": 2.0, "c": 1.0, "d": 3.0, "a*c": 9.0}
    kept = [best_fields(crossed, scores, top) for top in range(1, 6)]
    assert kept == [("a",), ("a", "c"), ("a", "c", "a*c"), ("a", "c", "d", "a*c"), ("a", "b", "c", "d", "a*c")]
    assert best_fields(crossed, dict.fromkeys(scores, 1.0), 4) == ("a", "b", "c", "d")  # also where all are alike
    assert best_fields(crossed, scores | {"a*c": -1.0}, 4) == ("a", "b", "c", "d")


def test_crosses_that_stand_before_their_fields() -> None:
    crosses = tuple(CrossField(name=f"x{i}", of=(a, b)) for i, (a, b) in enumerate(combinations("abcd", 2)))
    schema = Schema(fields=(*crosses, *SCHEMA.fields), labels=("y",))
    rng = np.random.default_rng(0)
    for _ in range(50):
        scores = {f.name: float(rng.integers(0, 5)) for f in schema.fields}
        for top in range(1, 11):
            kept = best_fields(schema, scores, top)
            assert len(kept) == top
            assert all(set(cross.of) < set(kept) for cross in crosses if cross.name in kept)
