"""The three ways a search goes: a plain 8-bit model, the best plan under a budget, a whole front."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from featherweight.core import Action, Budget, Decision
from featherweight.graph import cost
from featherweight.search import bounds, front, widen
from featherweight.search.baseline import Baseline, base, interface
from featherweight.search.fragile import find_fragile
from featherweight.search.loop import propose, search
from featherweight.search.passes import (
    NO_CAP,
    Found,
    first_cap,
    integers,
    nothing_yet,
    run_pass,
    state_of,
    usable_table,
)
from featherweight.search.prepare import Ground, context, statistics, survey
from featherweight.search.problem import Problem
from featherweight.search.solve import Choice

# Sites with a choice of integer technique must hold this share of the work for both to be worth measuring.
CONTESTED_SHARE = 0.3


def fit(problem: Problem, known: Baseline, *, first_is_enough: bool) -> Found:
    """The best plan for the objective under the limits; a refusal where a bound proves there is none.

    Numbers alone come first; structure is added where they do not do, or where it may do better.
    """
    refusal = _refused_at_once(problem, known)
    if refusal is not None:
        return dataclasses.replace(nothing_yet(problem), refusal=refusal)
    ground = survey(problem, context(problem, statistics(problem)), with_gains=True)
    find_fragile(problem, ground.ctx, ground.effects.table, ground.sites)
    found = Found(ground)
    start = base(problem, known)
    table = usable_table(problem, ground)
    wider = widen.Wider(problem, known, found, table)
    bound = bounds.size_bound(problem.budget, ground.effects.table, ground.sites, start.size_bytes)
    out_of_reach = bound.proves_no or _over_macs(problem, known)
    if out_of_reach or not wider.possible:
        work = bounds.Bound(
            "MACs",
            known.measurement.macs or 0,
            problem.budget.max_macs,
            "the layers as they are: no technique in use removes work",
            "a call",
        )
        proofs = [bound, work] if not wider.possible else wider.proofs()
        found.bound_bytes = next((int(b.reachable) for b in proofs if b.what == "size"), None)
        found.refusal = bounds.refusal(proofs)
    if found.refusal is None:
        if not out_of_reach and table:
            share = wider.share_of_numbers(problem.request.max_candidates)
            cap = first_cap(problem.budget)
            run_pass(problem, known, found, table, cap=cap, enough=first_is_enough, candidates=share)
        if wider.wanted():
            wider.search(enough=first_is_enough)
    return found


def _over_macs(problem: Problem, known: Baseline) -> bool:
    """True if only a change of structure can meet the limit on MACs: rounding numbers changes none."""
    limit, macs = problem.budget.max_macs, known.measurement.macs
    return limit is not None and macs is not None and macs > limit


def plain_int8(problem: Problem, known: Baseline, *, first_is_enough: bool) -> Found:
    """Every layer at 8 bits, on integer kernels where they are faster; what hurts stays in float, by measurement."""
    ctx = context(problem, statistics(problem))
    found = Found(survey(problem, ctx, with_gains=False, admit=stores_eight_bits))
    find_fragile(problem, ctx, found.ground.effects.table, found.ground.sites)
    for table in _variants(problem, found.ground):
        run_pass(problem, known, found, table, cap=NO_CAP, enough=first_is_enough, candidates=1)
        if found.interrupted:
            return found
    if found.best is None:
        found.ground = survey(problem, ctx, with_gains=True, admit=stores_eight_bits)
        table = usable_table(problem, found.ground)
        worst = propose(state_of(problem, known, found, table))
        cap = NO_CAP if worst is None else max(worst.predicted.loss / 3, 1e-8)
        run_pass(problem, known, found, table, cap=cap, enough=first_is_enough)
    if found.best is not None and found.best.measured is not None and not found.interrupted:
        ratio = found.best.measured.latency_ratio
        if ratio is not None and ratio >= 1 and _used(found.best.plan.decisions) & integers(problem):
            table = without(usable_table(problem, found.ground), integers(problem))
            run_pass(problem, known, found, table, cap=NO_CAP, enough=first_is_enough, candidates=1)
    return found


def fronts(problem: Problem, known: Baseline, points: int) -> Found:
    """Measure the most accurate plan at `points` sizes between 8 and 2 bits a weight, most of them at the bend."""
    drop = None if problem.request.max_drop is None else problem.budget.max_drop
    problem.budget = dataclasses.replace(problem.budget, max_drop=drop, minimize="drop")
    ground = survey(problem, context(problem, statistics(problem)), with_gains=True)
    find_fragile(problem, ground.ctx, ground.effects.table, ground.sites)
    found = Found(ground)
    start = base(problem, known)
    table = usable_table(problem, ground)
    ends = [front.size_at(bits, start.size_bytes, table) for bits in (front.WIDEST_BITS, front.NARROWEST_BITS)]
    seen: list[tuple[int, float]] = []
    problem.progress.start("measuring the front", points)
    for i in range(points):
        limit = ends[i] if i < len(ends) else front.next_size(seen)
        budget = Budget(max_size_bytes=limit, minimize="drop")
        state = state_of(problem, known, found, table, budget=budget, candidates=2)
        search(state, first_loss_cap=NO_CAP)
        drops = [a.measured.judged_drop for a in state.attempts if a.measured is not None]
        seen.append((limit, min((d for d in drops if d is not None), default=math.inf)))
        found.attempts.extend(a for a in state.attempts if a not in found.attempts)
        found.interrupted = state.interrupted
        problem.progress.advance()
        if state.interrupted or problem.out_of_time():
            return found
    widen.Wider(problem, known, found, table).front(seen)
    return found


def _refused_at_once(problem: Problem, known: Baseline) -> str | None:
    """What can be proved before any statistics are read: memory from the interface, size at one bit a weight."""
    shapes = dict(interface(problem))
    proofs = [bounds.memory_bound(problem.budget, shapes)]
    if problem.budget.max_size_bytes is not None:
        weights = cost.costs(problem.model, input_shapes=problem.shapes()).weight_bytes
        whole = base(problem, known).size_bytes
        rest = max(whole - weights, 0)
        shrinks = bool(problem.of_stage(structure=True))  # whole channels may go, so that no bit is left of a weight
        least = rest if shrinks else rest + weights // 32
        binding = f"{'' if shrinks else 'one bit for each weight and '}{rest} B of graph"
        proofs.append(bounds.Bound("size", least, problem.budget.max_size_bytes, binding))
    return bounds.refusal(proofs)


def _variants(problem: Problem, ground: Ground) -> list[dict[str, list[Choice]]]:
    """The 8-bit tables worth measuring: the solver's own choice, and each integer technique alone where contested."""
    table = usable_table(problem, ground)
    macs = problem.facts.get("macs", {})

    def work(site: str) -> float:
        return float(sum(macs.get(n, 0) or 0 for n in ground.sites[site].nodes))

    names = integers(problem)
    contested = [s for s, cs in table.items() if len(_used(c.decision for c in cs) & names) > 1]
    share = sum(map(work, contested)) / max(sum(map(work, table)), 1.0)
    if share < CONTESTED_SHARE:
        return [table]
    return [without(table, {t}) for t in sorted(names)]


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
