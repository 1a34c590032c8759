"""The integer program against brute force."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.core import Action, Decision, Effect, total
from featherweight.search.solve import Choice, cheapest, prune_dominated, solve


def choice(site: str, size: int, loss: float, latency: float = 0.0) -> Choice:
    return Choice(Decision(site, (Action.of("t", size=size, loss=loss),)), Effect(size, latency, 0, loss))


effects = st.tuples(st.integers(-100, 0), st.integers(0, 50), st.integers(-20, 5))
tables = st.lists(st.lists(effects, min_size=1, max_size=4), min_size=1, max_size=4)


def as_table(raw: list[list[tuple[int, int, int]]]) -> dict[str, list[Choice]]:
    return {f"s{i}": [choice(f"s{i}", s, float(lo), float(la)) for s, lo, la in row] for i, row in enumerate(raw)}


@settings(max_examples=60, deadline=None)
@given(tables, st.integers(0, 120), st.sampled_from(["size_bytes", "latency_ms"]))
def test_solution_equals_brute_force(raw, max_loss, objective):
    table = as_table(raw)
    best = min(
        (
            getattr(e, objective)
            for picked in itertools.product(*table.values())
            if (e := total(c.effect for c in picked)).loss <= max_loss
        ),
        default=None,
    )
    found = solve(table, {"loss": float(max_loss)}, {objective: 1.0}, relative_gap=0.0)
    if best is None:
        assert found is None
    else:
        assert found is not None
        assert getattr(found.effect, objective) == pytest.approx(best)
        assert found.effect.loss <= max_loss + 1e-6


@settings(max_examples=40, deadline=None)
@given(tables, st.integers(-300, 0), st.integers(0, 100))
def test_tighter_size_cap_never_gives_a_bigger_plan(raw, cap, tighten):
    table = as_table(raw)
    loose = solve(table, {"size_bytes": cap}, {"loss": 1.0}, relative_gap=0.0)
    tight = solve(table, {"size_bytes": cap - tighten}, {"loss": 1.0}, relative_gap=0.0)
    if tight is not None:
        assert loose is not None
        assert tight.effect.size_bytes <= cap - tighten
        assert tight.effect.loss >= loose.effect.loss - 1e-6


def test_dominated_decisions_go_and_of_twins_the_first_stays():
    a, b, c, d = choice("s", -10, 1.0), choice("s", -10, 2.0), choice("s", -20, 3.0), choice("s", -10, 1.0)
    assert prune_dominated([a, b, c, d]) == [a, c]


def test_cheapest_sums_each_sites_lowest_bytes():
    table = {"a": [choice("a", -5, 0.0), choice("a", -9, 1.0)], "b": [choice("b", 0, 0.0)]}
    assert cheapest(table, "size_bytes").size_bytes == -9


def test_no_sites_meets_only_caps_that_allow_no_change():
    assert solve({}, {"size_bytes": 0.0}, {"loss": 1.0}) is not None
    assert solve({}, {"size_bytes": -1.0}, {"loss": 1.0}) is None
