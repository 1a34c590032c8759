"""A front is measured where it bends."""

from __future__ import annotations

import math

import pytest

from featherweight.core import Action, Attempt, Decision, Effect, Measurement, Plan
from featherweight.search import front
from featherweight.search.solve import Choice


def choice(size: int, *actions: Action) -> Choice:
    return Choice(Decision("w", actions), Effect(size_bytes=size))


def test_the_ends_are_the_files_of_eight_and_two_bits():
    options = [choice(-750, Action.of("static_int8", weight_bits=8)), choice(-960, Action.of("palette", bits=1))]
    options += [choice(-900, Action.of("weight_nbit", bits=3)), choice(0)]
    assert front.size_at(8, 1000, {"w": options}) == math.ceil(1.02 * 250)
    assert front.size_at(2, 1000, {"w": options}) == math.ceil(1.02 * 100)
    assert front.size_at(8, 1000, {"w": [choice(0)]}) == 1020


def test_the_next_size_lies_where_the_drop_changes_most():
    measured = [(400, 0.0), (100, 0.8), (200, 0.01)]
    assert front.next_size(measured) == 142
    assert front.next_size([(400, 0.0), (100, 0.0), (300, 0.0)]) == 174
    assert front.next_size([(400, 0.0), (100, math.inf)]) == pytest.approx(200, abs=1)


@pytest.mark.parametrize(("limit", "size"), [(0.01, 200), (0.9, 100), (-1.0, 400)])
def test_the_headline_is_the_smallest_that_loses_little(limit: float, size: int):
    drops = {100: 0.8, 200: 0.01, 400: 0.0}
    points = [Attempt(i, Plan(()), Measurement(s, drop=d)) for i, (s, d) in enumerate(drops.items())]
    found = front.headline(points, limit)
    assert found is not None
    assert found.measured.size_bytes == size
    assert front.headline([], limit) is None
