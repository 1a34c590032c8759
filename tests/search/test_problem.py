"""The first batches of a dataset, by number and by samples."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from featherweight.search.problem import first_feeds


@pytest.mark.parametrize(
    ("each", "n", "samples", "batches"),
    [(1, 2, 0, 2), (1, 2, 5, 5), (4, 2, 5, 2), (4, 1, 5, 2), (1, 2, 99, 7), (1, 9, 0, 7)],
)
def test_batches_are_taken_until_both_are_enough_or_none_is_left(each, n, samples, batches):
    held: Any = SimpleNamespace(batches=lambda: (SimpleNamespace(feeds={"x": i}, n=each) for i in range(7)))
    assert first_feeds(held, n, samples=samples) == [{"x": i} for i in range(batches)]
