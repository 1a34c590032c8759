"""The three ways a search goes: a plain 8-bit model, the best plan under a budget, a whole front."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from featherweight.core import Action, Attempt, Budget, Decision
from featherweight.graph import cost
from featherweight.search import bounds, front
from featherweight.search.baseline import Baseline, base, interface
from featherweight.search.effects import Effects
from featherweight.search.fragile import find_fragile, usable
from featherweight.search.loop import State, propose, search, within
from featherweight.search.measured import announce, measure_plan
from featherweight.search.prepare import Ground, context, statistics, survey
from featherweight.search.problem import Problem, first_feeds
from featherweight.search.solve import Choice
from featherweight.techniques import integer_names

# Output noise that costs about one unit of drop, as a first guess; the loop corrects it by measuring.
LOSS_PER_DROP = 3.0
NO_CAP = 25.0
# Sites with a choice of integer technique must hold this share of the work for both to be worth measuring.
CONTESTED_SHARE = 0.3


@dataclass
class Found:
    """What a search came back with."""

    ground: Ground
    attempts: list[Attempt] = field(default_factory=list)
    best: Attempt | None = None
    refusal: str | None = None
    bound_bytes: int | None = None
    stop_reason: str = ""
    interrupted: bool = False


def fit(problem: Problem, known: Baseline, *, first_is_enough: bool) -> Found:
    """The best plan for the objective under the limits; a refusal where a bound proves there is none."""
    refusal = _refused_at_once(problem, known)
    if refusal is not None:
        return Found(Ground(context(problem, None), {}, Effects({}, ())), refusal=refusal)
    ground = survey(problem, context(problem, statistics(problem)), with_gains=True)
    find_fragile(problem, ground.ctx, ground.effects.table, ground.sites)
    found = Found(ground)
    start = base(problem, known)
    bound = bounds.size_bound(problem.budget, ground.effects.table, ground.sites, start.size_bytes)
    found.bound_bytes = int(bound.reachable)
    found.refusal = bounds.refusal([bound])
    if found.refusal is None:
        _run(
            problem,
            known,
            found,
            _usable(problem, ground),
            first_cap=_first_cap(problem.budget),
            enough=first_is_enough,
        )
    return found


def plain_int8(problem: Problem, known: Baseline, *, first_is_enough: bool) -> Found:
    """Every layer at 8 bits, on integer kernels where they are faster; what hurts stays in float, by measurement."""
    ctx = context(problem, statistics(problem))
    found = Found(survey(problem, ctx, with_gains=False, admit=stores_eight_bits))
    find_fragile(problem, ctx, found.ground.effects.table, found.ground.sites)
    for table in _variants(problem, found.ground):
        _run(problem, known, found, table, first_cap=NO_CAP, enough=first_is_enough, candidates=1)
        if found.interrupted:
            return found
    if found.best is None:
        found.ground = survey(problem, ctx, with_gains=True, admit=stores_eight_bits)
        table = _usable(problem, found.ground)
        worst = propose(_state(problem, known, found, table))
        cap = NO_CAP if worst is None else max(worst.predicted.loss / 3, 1e-8)
        _run(problem, known, found, table, first_cap=cap, enough=first_is_enough)
    if found.best is not None and found.best.measured is not None and not found.interrupted:
        ratio = found.best.measured.latency_ratio
        if ratio is not None and ratio >= 1 and _used(found.best.plan.decisions) & _integers(problem):
            table = without(_usable(problem, found.ground), _integers(problem))
            _run(problem, known, found, table, first_cap=NO_CAP, enough=first_is_enough, candidates=1)
    return found


def fronts(problem: Problem, known: Baseline, points: int) -> Found:
    """Measure the most accurate plan at `points` sizes between 8 and 2 bits a weight, most of them at the bend."""
    drop = None if problem.request.max_drop is None else problem.budget.max_drop
    problem.budget = dataclasses.replace(problem.budget, max_drop=drop, minimize="drop")
    ground = survey(problem, context(problem, statistics(problem)), with_gains=True)
    find_fragile(problem, ground.ctx, ground.effects.table, ground.sites)
    found = Found(ground)
    start = base(problem, known)
    table = _usable(problem, ground)
    ends = [front.size_at(bits, start.size_bytes, table) for bits in (front.WIDEST_BITS, front.NARROWEST_BITS)]
    seen: list[tuple[int, float]] = []
    problem.progress.start("measuring the front", points)
    for i in range(points):
        limit = ends[i] if i < len(ends) else front.next_size(seen)
        budget = Budget(max_size_bytes=limit, minimize="drop")
        state = _state(problem, known, found, table, budget=budget, candidates=2)
        search(state, first_loss_cap=NO_CAP)
        drops = [a.measured.drop for a in state.attempts if a.measured is not None and a.measured.drop is not None]
        seen.append((limit, min(drops, default=math.inf)))
        found.attempts.extend(a for a in state.attempts if a not in found.attempts)
        found.interrupted = state.interrupted
        problem.progress.advance()
        if state.interrupted or problem.out_of_time():
            break
    return found


def _usable(problem: Problem, ground: Ground) -> dict[str, list[Choice]]:
    return usable(ground.effects.table, ground.sites, ground.ctx.fragile, _integers(problem))


def _integers(problem: Problem) -> frozenset[str]:
    return integer_names(problem.techniques.values())


def _refused_at_once(problem: Problem, known: Baseline) -> str | None:
    """What can be proved before any statistics are read: memory from the interface, size at one bit a weight."""
    shapes = dict(interface(problem))
    proofs = [bounds.memory_bound(problem.budget, shapes)]
    if problem.budget.max_size_bytes is not None:
        weights = cost.costs(problem.model, input_shapes=_shapes(problem)).weight_bytes
        whole = base(problem, known).size_bytes
        least = max(whole - weights, 0) + weights // 32
        binding = f"one bit for each weight and {max(whole - weights, 0)} B of graph"
        proofs.append(bounds.Bound("size", least, problem.budget.max_size_bytes, binding))
    return bounds.refusal(proofs)


def _shapes(problem: Problem) -> dict[str, tuple[int, ...]]:
    return {name: a.shape for name, a in first_feeds(problem.splits.calibration, 1)[0].items()}


def _first_cap(budget: Budget) -> float:
    return min(LOSS_PER_DROP * budget.max_drop, NO_CAP) if budget.max_drop else 0.05


def _state(
    problem: Problem,
    known: Baseline,
    found: Found,
    table: Mapping[str, Sequence[Choice]],
    *,
    budget: Budget | None = None,
    candidates: int | None = None,
) -> State:
    left = max(problem.request.max_candidates - len(found.attempts), 1) if candidates is None else candidates
    return State(
        table,
        budget or problem.budget,
        base(problem, known),
        lambda plan: measure_plan(problem, known, found.ground.ctx, plan),
        problem.out_of_time,
        left,
        lambda best: announce(problem, best),
    )


def _run(
    problem: Problem,
    known: Baseline,
    found: Found,
    table: Mapping[str, Sequence[Choice]],
    *,
    first_cap: float,
    enough: bool,
    candidates: int | None = None,
) -> None:
    """One search over `table`; what it found is added to `found`."""
    state = _state(problem, known, found, table, candidates=candidates)
    state.best = found.best
    good: Callable[[Attempt], bool] | None = None
    if enough:
        good = lambda a: a.measured is not None and within(problem.budget, a.measured)  # noqa: E731
    search(state, first_loss_cap=first_cap, enough=good)
    known_before = {a.index for a in found.attempts}
    found.attempts.extend(a for a in state.attempts if a.index not in known_before)
    found.best, found.stop_reason = state.best, state.stop_reason
    found.interrupted = found.interrupted or state.interrupted


def _variants(problem: Problem, ground: Ground) -> list[dict[str, list[Choice]]]:
    """The 8-bit tables worth measuring: the solver's own choice, and each integer technique alone where contested."""
    table = _usable(problem, ground)
    macs = problem.facts.get("macs", {})

    def work(site: str) -> float:
        return float(sum(macs.get(n, 0) or 0 for n in ground.sites[site].nodes))

    integers = _integers(problem)
    contested = [s for s, cs in table.items() if len(_used(c.decision for c in cs) & integers) > 1]
    share = sum(map(work, contested)) / max(sum(map(work, table)), 1.0)
    if share < CONTESTED_SHARE:
        return [table]
    return [without(table, {t}) for t in sorted(integers)]


def _used(decisions: Iterable[Decision]) -> set[str]:
    """Names of the techniques in the decisions."""
    return {a.technique for d in decisions for a in d.actions}


def stores_eight_bits(action: Action) -> bool:
    """True for actions that store weights in plain 8 bits, not in blocks."""
    return bool(action.get("weight_bits", action.get("bits", 0)) == 8 and not action.get("block", 0))


def without(table: Mapping[str, Sequence[Choice]], names: frozenset[str] | set[str]) -> dict[str, list[Choice]]:
    """The table without decisions that use any of the techniques."""
    return {
        site: [c for c in choices if not any(a.technique in names for a in c.decision.actions)]
        for site, choices in table.items()
    }


__all__ = ["Found", "fit", "fronts", "plain_int8", "stores_eight_bits", "without"]
