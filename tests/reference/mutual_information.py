"""Mutual information and its expectation value by value, in plain Python."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction


def mutual_information(x: Sequence[int], y: Sequence[int]) -> float:
    """I(x; y) in nats."""
    n, total = len(x), 0.0
    for v in set(x):
        for c in set(y):
            both = sum(a == v and b == c for a, b in zip(x, y, strict=True))
            if both:
                total += both / n * math.log(both * n / (x.count(v) * y.count(c)))
    return total


def expected_information(x: Sequence[int], y: Sequence[int]) -> float:
    """E[I] over all orders of y."""
    n, total = len(x), 0.0
    for v in set(x):
        for c in set(y):
            a, b = x.count(v), y.count(c)
            for k in range(max(1, a + b - n), min(a, b) + 1):
                chance = Fraction(math.comb(b, k) * math.comb(n - b, a - k), math.comb(n, a))
                total += float(chance) * k / n * math.log(n * k / (a * b))
    return total
