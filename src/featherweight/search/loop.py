"""The loop of the search: solve, build, measure, correct the prediction, solve again.

Predictions add lone effects up, which misjudges both ways; so the loss a plan may be predicted to have is a knob
(`loss_cap`) that measurement turns: raised while the measured drop leaves room, lowered when it does not. Size,
latency and memory predictions are corrected by what the built file really showed.

Any-time: the best candidate so far is kept at each step; the time budget and Ctrl-C end the loop, not the run.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from featherweight.core import Attempt, Budget, Decision, Measurement, Objective, Plan
from featherweight.search.solve import Dimension, Table, solve

# A limit on a drop as measured is aimed at with this share of it, so that the holdout, which the search never sees, has
# room. A likely drop needs none: luck is taken out of it already.
HEADROOM = 0.8
# Two plans whose drops differ by less than this many standard errors are taken as equally accurate (the
# one-standard-error rule, Breiman et al. 1984, section 3.4.3): then the faster one wins.
STANDARD_ERRORS = 1.0
# Output noise-to-signal ratio taken as one unit when loss is weighed against size and latency.
LOSS_UNIT = 0.03
SMALLEST_STEP = 1.15


@dataclass(frozen=True, slots=True)
class Base:
    """The normalised float model, which effects are relative to.

    `latency_ms` is in the unit of the predicted effects (modelled); `measured_ms` is what the original really takes,
    where a limit in milliseconds made it worth measuring.
    """

    size_bytes: int
    latency_ms: float
    peak_bytes: int
    measured_ms: float | None = None
    macs: int = 0


@dataclass(frozen=True, slots=True)
class Correction:
    """What measuring taught about predictions: added to size and peak, multiplied onto the latency ratio."""

    size_bytes: int = 0
    peak_bytes: int = 0
    latency_factor: float = 1.0


@dataclass
class State:
    """What the loop knows at a moment.

    `complete` adds to a proposed plan what is decided outside the table (the structure it stands on). `met_cap`: the
    largest predicted loss found to stay within the limit of the drop.
    """

    table: Table
    budget: Budget
    base: Base
    measure: Callable[[Plan], Attempt]
    out_of_time: Callable[[], bool]
    max_candidates: int
    announce: Callable[[Attempt], None] = lambda _best: None
    complete: Callable[[Plan], Plan] = lambda plan: plan
    correction: Correction = field(default_factory=Correction)
    attempts: list[Attempt] = field(default_factory=list)
    best: Attempt | None = None
    interrupted: bool = False
    stop_reason: str = ""
    met_cap: float = 0.0

    def exhausted(self) -> bool:
        """True if no further candidate may be tried; says why in `stop_reason`."""
        if self.attempts and self.out_of_time():
            self.stop_reason = "the search ended when its time was used up"
        elif len(self.attempts) >= self.max_candidates:
            self.stop_reason = f"the search ended after the {self.max_candidates} candidates it may measure"
        return bool(self.stop_reason)


def search(state: State, *, first_loss_cap: float, enough: Callable[[Attempt], bool] | None = None) -> State:
    """Run the loop to its end, the time budget, or Ctrl-C; `state.best` is the best candidate that met the limits.

    `enough` ends the search early (the decision problem asks for any candidate within the limits).
    """
    try:
        if state.budget.minimize == "drop":
            _least_drop(state, enough)
        else:
            _least_cost(state, first_loss_cap, enough)
    except KeyboardInterrupt:
        state.interrupted = True
        state.stop_reason = "stopped by the user"
    return state


def objective_weights(minimize: Objective, base: Base) -> dict[Dimension, float]:
    """Weights of the solver's objective: what is minimised first; the rest decides between near-equals."""
    size, latency, peak = 1 / base.size_bytes, 1 / max(base.latency_ms, 1e-9), 1 / max(base.peak_bytes, 1)
    main: dict[Objective, dict[Dimension, float]] = {
        "size": {"size_bytes": size, "latency_ms": 0.05 * latency, "loss": 0.001 / LOSS_UNIT},
        # Bytes hardly count: fewer bits would use up the loss that removed channels turn into time.
        "latency": {"latency_ms": latency, "size_bytes": 0.02 * size, "loss": 0.01 / LOSS_UNIT},
        "memory": {
            "peak_bytes": peak,
            "size_bytes": 0.05 * size,
            "latency_ms": 0.02 * latency,
            "loss": 0.001 / LOSS_UNIT,
        },
        "drop": {"loss": 1 / LOSS_UNIT, "latency_ms": latency, "size_bytes": 0.02 * size},
    }
    return main[minimize]


def propose(
    state: State, *, loss_cap: float = math.inf, weights: Mapping[Dimension, float] | None = None
) -> Plan | None:
    """Solve for the best plan under the budget as corrected so far; None if the program has no solution."""
    caps = caps_of(state.budget, state.base, state.correction)
    caps["loss"] = loss_cap
    found = solve(state.table, caps, weights or objective_weights(state.budget.minimize, state.base))
    if found is None:
        return None
    return state.complete(Plan(tuple(c.decision for c in found.choices), found.effect, found.gap))


def caps_of(budget: Budget, base: Base, fix: Correction) -> dict[Dimension, float]:
    """The budget's resource limits as limits on summed effects, as corrected so far."""
    caps: dict[Dimension, float] = {}
    if budget.max_size_bytes is not None:
        caps["size_bytes"] = budget.max_size_bytes - base.size_bytes - fix.size_bytes
    if budget.max_peak_bytes is not None:
        caps["peak_bytes"] = budget.max_peak_bytes - base.peak_bytes - fix.peak_bytes
    if budget.max_macs is not None:
        caps["macs"] = budget.max_macs - base.macs
    ratio = _latency_ratio_limit(budget, base)
    if ratio is not None:
        caps["latency_ms"] = base.latency_ms * (ratio / fix.latency_factor - 1)
    return caps


def _latency_ratio_limit(budget: Budget, base: Base) -> float | None:
    """The tighter of the two latency limits as a ratio to the original."""
    ratios = [budget.max_latency_ratio] if budget.max_latency_ratio is not None else []
    if budget.max_latency_ms is not None and base.measured_ms:
        ratios.append(budget.max_latency_ms / base.measured_ms)
    return min(ratios) if ratios else None


def aimed_drop(limit: float, m: Measurement | None) -> float:
    """What the drop that `m` is judged by should be at most, for this limit."""
    return limit if m is not None and m.likely_drop is not None else HEADROOM * limit


def within(budget: Budget, m: Measurement, *, headroom: bool = True) -> bool:
    """True if `m` meets the limits as measured, and its likely drop, or where there is none its drop with headroom."""
    aimed = budget
    if budget.max_drop is not None and headroom:
        aimed = replace(budget, max_drop=aimed_drop(budget.max_drop, m))
    return not budget.violations(m) and not aimed.violations(replace(m, drop=m.judged_drop))


def _try(state: State, plan: Plan) -> Attempt:
    """Measure a plan, remember it, and learn from how its prediction missed."""
    attempt = state.measure(plan)
    state.attempts.append(attempt)
    if attempt.measured is not None:
        _learn(state, plan, attempt.measured)
        if within(state.budget, attempt.measured) and _better(state.budget, attempt.measured, state.best):
            state.best = attempt
            state.announce(attempt)
    return attempt


def _learn(state: State, plan: Plan, m: Measurement) -> None:
    base, predicted = state.base, plan.predicted
    factor = state.correction.latency_factor
    if m.latency_ratio is not None and base.latency_ms > 0:
        factor = m.latency_ratio / max(1 + predicted.latency_ms / base.latency_ms, 0.02)
    peak = state.correction.peak_bytes
    if m.peak_bytes is not None:
        peak = m.peak_bytes - base.peak_bytes - predicted.peak_bytes
    state.correction = Correction(m.size_bytes - base.size_bytes - predicted.size_bytes, peak, factor)


def _better(budget: Budget, m: Measurement, best: Attempt | None) -> bool:
    """True if `m` is better than the best so far in the objective (ties: smaller, then less drop)."""
    if best is None or best.measured is None:
        return True

    def rank(x: Measurement) -> tuple[float, ...]:
        drop = math.inf if x.judged_drop is None else x.judged_drop
        latency = x.latency_ratio if x.latency_ratio is not None else math.inf
        peak = math.inf if x.peak_bytes is None else float(x.peak_bytes)
        order: dict[Objective, tuple[float, ...]] = {
            "size": (x.size_bytes, drop),
            "latency": (latency, x.size_bytes, drop),
            "memory": (peak, x.size_bytes, drop),
            "drop": (drop, latency, x.size_bytes),
        }
        return order[budget.minimize]

    return rank(m) < rank(best.measured)


def _least_cost(state: State, loss_cap: float, enough: Callable[[Attempt], bool] | None) -> None:
    """Minimise size, latency or memory: bisect the loss cap on the measured drop, in the logarithm."""
    met, missed = 0.0, math.inf
    seen: set[tuple[Decision, ...]] = set()
    while not state.exhausted():
        plan = propose(state, loss_cap=loss_cap)
        if plan is None:
            met = loss_cap  # too little loss allowed for the other limits: as if met, so that the cap rises
        elif plan.decisions in seen:
            if missed / max(met, 1e-12) < 4:
                state.stop_reason = "nothing untried is left between the best plan and those that lose too much"
                return
            met, missed = _unchanged(state, plan, met, missed, loss_cap)
        else:
            seen.add(plan.decisions)
            attempt = _try(state, plan)
            if enough is not None and enough(attempt):
                state.stop_reason = "a candidate within the limits was found"
                return
            ok = attempt.measured is not None and _drop_within(state.budget, attempt.measured)
            met, missed = (max(met, loss_cap), missed) if ok else (met, min(missed, loss_cap))
            state.met_cap = max(state.met_cap, loss_cap if ok else 0.0)
        loss_cap = _next_cap(state, met, missed, loss_cap)
        if not 1e-9 < loss_cap < 30 or missed / max(met, 1e-12) < SMALLEST_STEP:
            state.stop_reason = "the search closed in on the limit of the drop"
            return


def _unchanged(state: State, plan: Plan, met: float, missed: float, cap: float) -> tuple[float, float]:
    """The cap moved but the plan did not: it counts as what that plan was measured to be."""
    for attempt in state.attempts:
        if attempt.plan.decisions == plan.decisions:
            ok = attempt.measured is not None and _drop_within(state.budget, attempt.measured)
            return (max(met, cap), missed) if ok else (met, min(missed, cap))
    return met, missed


def _drop_within(budget: Budget, m: Measurement) -> bool:
    return budget.max_drop is None or within(Budget(max_drop=budget.max_drop), m)


def _next_cap(state: State, met: float, missed: float, cap: float) -> float:
    """Next loss cap: the middle of the bracket in logarithm, or a guess from the last drop while it is open."""
    if met > 0 and math.isfinite(missed):
        return math.sqrt(met * missed)
    last = state.attempts[-1].measured if state.attempts else None
    if last is None or last.judged_drop is None or state.budget.max_drop is None:
        return cap * 3 if met > 0 else cap / 3
    aim = aimed_drop(state.budget.max_drop, last)
    guess = aim / last.judged_drop if last.judged_drop > 0 else 4.0
    return cap * min(max(guess, 1.5), 4.0) if met > 0 else cap * max(min(guess * 0.9, 0.67), 0.1)


def _least_drop(state: State, enough: Callable[[Attempt], bool] | None) -> None:
    """Minimise the drop under limits on size, latency, memory: solve, and correct until the built file fits them.

    Two views are tried: one that weighs latency a little (integer kernels), one that looks at the loss alone. Of
    two whose drops cannot be told apart the faster is kept.
    """
    base = state.base
    views: list[dict[Dimension, float]] = [
        objective_weights("drop", base),
        {"loss": 1 / LOSS_UNIT, "size_bytes": 1e-3 / base.size_bytes},
    ]
    found: list[Attempt] = []
    for weights in views:
        for _ in range(4):
            if state.exhausted():
                break
            plan = propose(state, weights=weights)
            if plan is None or any(a.plan.decisions == plan.decisions for a in state.attempts):
                break
            attempt = _try(state, plan)
            if enough is not None and enough(attempt):
                state.stop_reason = "a candidate within the limits was found"
                return
            if attempt.measured is None:
                state.table = without_most_used(state.table, plan)
            elif not replace(state.budget, max_drop=None).violations(attempt.measured):
                found.append(attempt)
                break
    if state.best is not None:
        state.best = _faster_of_equals(state, found) or state.best
    state.stop_reason = state.stop_reason or "of all plans that fit, the one predicted to lose least was measured"


def without_most_used(table: Table, plan: Plan) -> Table:
    """The table without the technique that `plan`, which could not be built or run, used at most sites.

    The cause is in the attempt; what else the plan used stays, so that the search goes on without the suspect.
    """
    offered = {a.technique for choices in table.values() for c in choices for a in c.decision.actions}
    counts = Counter(a.technique for d in plan.decisions for a in d.actions if a.technique in offered)
    if not counts:
        return table
    suspect = max(counts, key=lambda name: (counts[name], name))
    return {
        site: [c for c in choices if all(a.technique != suspect for a in c.decision.actions)]
        for site, choices in table.items()
    }


def _faster_of_equals(state: State, found: list[Attempt]) -> Attempt | None:
    """Among candidates whose drop is within one standard error of the least, the one predicted fastest."""
    ok = [a for a in found if a.measured is not None and within(state.budget, a.measured)]
    if not ok:
        return None
    least = min(ok, key=lambda a: a.judged_drop)
    width = 0.0
    if least.measured is not None and least.measured.drop_interval is not None:
        width = (least.measured.drop_interval.high - least.measured.drop_interval.low) / (2 * 1.96)
    equal = [a for a in ok if a.judged_drop <= least.judged_drop + STANDARD_ERRORS * width]
    return min(equal, key=lambda a: (a.plan.predicted.latency_ms, a.judged_drop))


def nearest(budget: Budget, attempts: list[Attempt]) -> Attempt | None:
    """The measured candidate that misses the limits by the least (sum of relative excesses)."""

    def excess(m: Measurement) -> float:
        pairs = (
            (m.size_bytes, budget.max_size_bytes),
            (m.latency_ms, budget.max_latency_ms),
            (m.latency_ratio, budget.max_latency_ratio),
            (m.peak_bytes, budget.max_peak_bytes),
            (m.macs, budget.max_macs),
        )
        over = sum(max(0.0, (v or 0) / limit - 1) for v, limit in pairs if limit is not None)
        if budget.max_drop is not None and m.judged_drop is not None:
            over += max(0.0, m.judged_drop - budget.max_drop) / max(budget.max_drop, 0.01)
        return over

    measured = [a for a in attempts if a.measured is not None]
    return min(measured, key=lambda a: excess(a.measured) if a.measured else math.inf, default=None)


def pareto(attempts: list[Attempt]) -> tuple[Attempt, ...]:
    """Measured candidates that no other beats in size, drop and (where measured) latency; sorted by size."""

    def point(m: Measurement) -> tuple[float, float, float]:
        return (m.size_bytes, math.inf if m.drop is None else m.drop, m.latency_ratio or 0.0)

    measured = [(a, point(a.measured)) for a in attempts if a.measured is not None]
    front = [
        (a, p)
        for i, (a, p) in enumerate(measured)
        if not any(
            all(x <= y for x, y in zip(q, p, strict=True)) and (q != p or j < i)
            for j, (_, q) in enumerate(measured)
            if j != i
        )
    ]
    return tuple(a for a, _ in sorted(front, key=lambda item: item[1]))
