"""The data types: limits and what breaks them."""

from __future__ import annotations

import pytest

from featherweight.core import Budget, Measurement


def test_violations_give_both_values():
    found = Budget(max_size_bytes=100, max_drop=0.01).violations(Measurement(12_345_678, "accuracy", drop=0.02))
    assert found == ["size 12345678 B is over the limit of 100", "drop 0.02 (accuracy) is over the limit of 0.01"]


def test_what_was_not_measured_cannot_meet_a_limit():
    found = Budget(max_latency_ms=5.0).violations(Measurement(120))
    assert found == ["latency is over the limit of 5: it was not measured"]


def test_macs_are_a_limit_like_the_others():
    budget = Budget(max_macs=300)
    assert budget.limited
    assert budget.violations(Measurement(1, macs=300)) == []
    assert budget.violations(Measurement(1, macs=301)) == ["MACs 301 a call is over the limit of 300"]
    assert budget.violations(Measurement(1)) == ["MACs is over the limit of 300: it was not measured"]


@pytest.mark.parametrize(
    ("budget", "asks"),
    [
        (Budget(max_size_bytes=10, minimize="drop"), False),
        (Budget(max_drop=0.01, minimize="size"), False),
        (Budget(max_drop=0.01, minimize="latency"), True),
        (Budget(max_drop=0.01, minimize="memory"), True),
        (Budget(max_peak_bytes=10, minimize="drop"), True),
        (Budget(max_macs=10, minimize="drop"), True),
        (Budget(max_size_bytes=10, max_latency_ratio=0.5, minimize="drop"), True),
    ],
)
def test_a_budget_asks_for_work_where_operations_or_activations_count(budget, asks):
    assert budget.asks_for_work is asks
