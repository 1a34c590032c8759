"""The loop against a world whose true effects differ from the predicted ones."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.core import Action, Attempt, Budget, Decision, Effect, Measurement, Plan
from featherweight.search.loop import HEADROOM, Base, State, nearest, pareto, search, within
from featherweight.search.solve import Choice

BASE = Base(size_bytes=10_000, latency_ms=10.0, peak_bytes=50_000)


def table(sites: int = 8) -> dict[str, list[Choice]]:
    """Sites of 1000 B with 8..2 bit options: loss quadruples with each bit; odd sites are 4 times as sensitive."""
    out = {}
    for i in range(sites):
        name = f"s{i}"
        choices = [Choice(Decision(name), Effect())]
        for bits in range(8, 1, -1):
            loss = (1 + 3 * (i % 2)) * 1e-6 * 4.0 ** (8 - bits)
            action = Action.of("t", bits=bits)
            choices.append(Choice(Decision(name, (action,)), Effect(int(1000 * bits / 32) - 1000, -0.5, 0, loss)))
        out[name] = choices
    return out


class World:
    """Measures plans: the true drop is `slope` times the predicted loss, the true size is 300 B more."""

    def __init__(self, slope: float = 3.0, power: float = 1.0) -> None:
        self.slope, self.power, self.plans = slope, power, []

    def __call__(self, plan: Plan) -> Attempt:
        self.plans.append(plan)
        drop = self.slope * plan.predicted.loss**self.power
        size = BASE.size_bytes + plan.predicted.size_bytes + 300
        ratio = 1 + plan.predicted.latency_ms / BASE.latency_ms
        m = Measurement(size_bytes=size, metric=1 - drop, drop=drop, latency_ratio=ratio, latency_ms=10 * ratio)
        return Attempt(len(self.plans), plan, m)


def run(budget: Budget, world: World, **kw) -> State:
    state = State(table(), budget, BASE, world, out_of_time=lambda: False, max_candidates=kw.pop("max_candidates", 12))
    return search(state, first_loss_cap=0.02, **kw)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 50), st.floats(0.7, 1.5), st.floats(0.005, 0.05))
def test_least_size_meets_the_drop_whatever_prediction_is_worth(slope, power, max_drop):
    state = run(Budget(max_drop=max_drop), World(slope, power))
    assert state.best is not None
    assert state.best.measured.drop <= max_drop
    assert state.best.measured.size_bytes < BASE.size_bytes
    assert len(state.attempts) <= 12


def test_least_size_comes_close_to_the_limit():
    state = run(Budget(max_drop=0.01), World(3.0))
    assert 0.004 < state.best.measured.drop <= 0.01 * 0.8


def test_a_lucky_candidate_is_judged_by_its_likely_drop():
    class Lucky(World):
        def __call__(self, plan: Plan) -> Attempt:
            attempt = super().__call__(plan)
            m = replace(attempt.measured, drop=0.0, likely_drop=attempt.measured.drop)
            return replace(attempt, measured=m)

    lucky, plain = run(Budget(max_drop=0.01), Lucky(3.0)), run(Budget(max_drop=0.01 / HEADROOM), World(3.0))
    assert lucky.best.plan.decisions == plain.best.plan.decisions
    assert lucky.best.measured.likely_drop <= 0.01


def test_what_is_over_the_limit_as_measured_is_never_within():
    m = Measurement(size_bytes=1, drop=0.013, likely_drop=0.006)
    assert not within(Budget(max_drop=0.01), m)
    assert within(Budget(max_drop=0.01), replace(m, drop=0.01))
    assert within(Budget(max_drop=0.01), replace(m, drop=0.0, likely_drop=0.0099))
    assert not within(Budget(max_drop=0.01), replace(m, drop=0.0, likely_drop=0.0101))
    assert not within(Budget(max_drop=0.01), replace(m, drop=0.0099, likely_drop=None))


def test_least_drop_corrects_its_size_prediction_until_the_file_fits():
    state = run(Budget(max_size_bytes=3500, minimize="drop"), World())
    assert state.best is not None
    assert 3300 < state.best.measured.size_bytes <= 3500


@settings(max_examples=15, deadline=None)
@given(st.integers(2800, 9000), st.integers(0, 3000))
def test_tighter_size_limit_never_gives_a_bigger_model(limit, tighten):
    loose = run(Budget(max_size_bytes=limit, minimize="drop"), World())
    tight = run(Budget(max_size_bytes=max(2800, limit - tighten), minimize="drop"), World())
    assert tight.best.measured.size_bytes <= loose.best.measured.size_bytes


def test_enough_stops_at_the_first_candidate_within_the_limits():
    budget = Budget(max_size_bytes=5000, max_drop=0.02, minimize="drop")
    state = run(budget, World(), enough=lambda a: within(budget, a.measured))
    assert len(state.attempts) <= 2
    assert "found" in state.stop_reason


def test_candidates_that_fail_to_build_do_not_end_the_search():
    world = World()

    def sometimes(plan: Plan) -> Attempt:
        done = world(plan)
        if len(world.plans) == 1:
            return Attempt(1, plan, None, error="the child process died with SIGSEGV")
        return done

    state = State(table(), Budget(max_drop=0.01), BASE, sometimes, lambda: False, 12)
    search(state, first_loss_cap=0.02)
    assert state.best is not None
    assert state.attempts[0].error


def test_a_technique_whose_plans_crash_is_set_aside_and_the_rest_searched():
    world = World()
    both = {}
    for site, choices in table().items():
        better = [
            Choice(Decision(site, (Action.of("crashes", bits=c.decision.actions[0].get("bits")),)), c.effect)
            for c in choices[1:]
        ]
        worse = [replace(c, effect=replace(c.effect, loss=2 * c.effect.loss)) for c in choices[1:]]
        both[site] = [choices[0], *better, *worse]

    def measure(plan: Plan) -> Attempt:
        done = world(plan)
        if any(a.technique == "crashes" for d in plan.decisions for a in d.actions):
            return replace(done, measured=None, error="the child process died with SIGSEGV")
        return done

    budget = Budget(max_size_bytes=5000, minimize="drop")
    state = search(State(both, budget, BASE, measure, lambda: False, 8), first_loss_cap=0.02)
    assert state.attempts[0].error
    assert state.best is not None
    assert state.best.measured.size_bytes <= 5000


def test_ctrl_c_keeps_the_best_so_far():
    world = World(slope=0.1)

    def stopped(plan: Plan) -> Attempt:
        if len(world.plans) == 2:
            raise KeyboardInterrupt
        return world(plan)

    state = State(table(), Budget(max_drop=0.5), BASE, stopped, lambda: False, 12)
    search(state, first_loss_cap=0.001)
    assert state.interrupted
    assert state.best is not None


def test_time_budget_ends_the_loop_and_says_so():
    world = World()
    state = State(table(), Budget(max_drop=0.01), BASE, world, lambda: len(world.plans) >= 1, 12)
    search(state, first_loss_cap=0.02)
    assert len(state.attempts) == 1
    assert state.stop_reason == "the search ended when its time was used up"


def attempt(i: int, size: int, drop: float | None, ratio: float = 1.0) -> Attempt:
    return Attempt(i, Plan(()), Measurement(size_bytes=size, drop=drop, latency_ratio=ratio))


def test_pareto_keeps_what_nothing_beats():
    a, b, c, d = attempt(1, 100, 0.3), attempt(2, 200, 0.1), attempt(3, 250, 0.2), attempt(4, 300, 0.0)
    assert pareto([d, c, b, a]) == (a, b, d)


def test_nearest_is_the_smallest_relative_excess():
    near, far = attempt(1, 105, 0.0), attempt(2, 150, 0.0)
    assert nearest(Budget(max_size_bytes=100), [far, near]) is near
    assert nearest(Budget(max_size_bytes=100), []) is None
