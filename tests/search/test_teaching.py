"""Which candidate is worth the time of teaching."""

from __future__ import annotations

from featherweight.core import Attempt, Budget, Measurement, Plan
from featherweight.search.teaching import worth_teaching


def attempt(index: int, size: int, drop: float) -> Attempt:
    return Attempt(index, Plan(()), Measurement(size, metric_name="accuracy", metric=1 - drop, drop=drop))


def test_the_smallest_that_misses_by_little() -> None:
    budget = Budget(max_drop=0.01)
    best, near, smaller, far = attempt(1, 100, 0.005), attempt(2, 80, 0.02), attempt(3, 60, 0.03), attempt(4, 20, 0.5)
    assert worth_teaching(budget, best, [best, near, smaller, far]) is smaller
    assert worth_teaching(budget, None, [far]) is None
    assert worth_teaching(budget, attempt(9, 50, 0.0), [near, smaller]) is None


def test_without_a_limit_on_the_drop_the_best_is_taught() -> None:
    budget = Budget(max_size_bytes=90, minimize="drop")
    best, large = attempt(1, 80, 0.05), attempt(2, 200, 0.0)
    assert worth_teaching(budget, best, [best, large]) is best
    assert worth_teaching(budget, None, [large]) is None
