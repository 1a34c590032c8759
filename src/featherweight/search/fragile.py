"""Fragile nodes: those that integer arithmetic hurts far more than its neighbours, found on the real kernels.

The model with every layer in integers is run beside the float one on a few calibration batches; nodes that add most
of the noise lose their integer options, one round after another, until the outputs are good or none stands out.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

from featherweight.core import Decision, Plan, Site
from featherweight.errors import RunError, TechniqueError
from featherweight.search.candidates import build_numeric
from featherweight.search.problem import Problem, child_runner, first_feeds
from featherweight.search.solve import Choice
from featherweight.techniques import Context, integer_names
from featherweight.techniques._fallback import ENOUGH_DB, compare, reference, suspects
from featherweight.techniques._plain import POOR_DB, WORTH_DB

ROUNDS = 8
FEEDS = 3


def find_fragile(problem: Problem, ctx: Context, table: Mapping[str, list[Choice]], sites: Mapping[str, Site]) -> None:
    """Add to `ctx.fragile` the nodes to keep in float arithmetic, each with a note; recorded in the journal."""
    found: dict[str, str] = problem.journal.phase("fragile", lambda: _measured(problem, ctx, table, sites))
    for name, text in found.items():
        ctx.note(name, text)
    ctx.fragile = frozenset(found)


def _measured(
    problem: Problem, ctx: Context, table: Mapping[str, list[Choice]], sites: Mapping[str, Site]
) -> dict[str, str]:
    plan = _all_integer(table, integer_names(problem.techniques.values()))
    if not plan.changed():
        return {}
    problem.progress.start("looking for fragile layers")
    runner = child_runner(problem.worker, problem.work)
    feeds = first_feeds(problem.splits.calibration, FEEDS)
    expected = reference(problem.model, runner, feeds)
    outputs = [v.name or "" for v in problem.model.graph.outputs]
    kept: dict[str, str] = {}
    best: tuple[float, dict[str, str]] | None = None
    for _ in range(ROUNDS):
        now = dataclasses.replace(ctx, fragile=frozenset(kept), notes=[])
        wanted = _without_fragile(plan, sites, kept)
        integer = {n for d in wanted.changed() for n in sites[d.site].nodes}
        try:
            built = build_numeric(problem.model, wanted, now, problem.techniques)
            seen = compare(built, expected, outputs, runner, feeds)
        except (RunError, TechniqueError) as e:
            return dict.fromkeys(sorted(integer), f"computed in float: the integer model cannot be built or run ({e})")
        gain = math.inf if best is None else seen.output_db - best[0]
        if best is None or gain >= WORTH_DB or (best[0] < POOR_DB and gain > 0):
            best = (seen.output_db, dict(kept))
        elif best[0] >= POOR_DB:
            break
        worst = suspects(problem.model, seen, integer, poor=seen.output_db < POOR_DB)
        if seen.output_db >= ENOUGH_DB or not worst:
            break
        for name in worst:
            kept[name] = f"computed in float: integers here left {seen.output_db:.1f} dB at the outputs"
    problem.worker.close()  # it holds the intermediate values of the largest runs
    return best[1] if best is not None else kept


def _all_integer(table: Mapping[str, list[Choice]], techniques: frozenset[str]) -> Plan:
    """Every site at its 8-bit integer option, where it has one (static before dynamic)."""
    decisions = []
    for choices in table.values():
        for name in sorted(techniques, reverse=True):
            match = [c.decision for c in choices if _is(c.decision, name)]
            if match:
                decisions.append(match[0])
                break
    return Plan(tuple(decisions))


def _is(decision: Decision, technique: str) -> bool:
    return any(a.technique == technique and a.get("weight_bits") == 8 for a in decision.actions)


def _without_fragile(plan: Plan, sites: Mapping[str, Site], kept: Iterable[str]) -> Plan:
    names = set(kept)
    return Plan(tuple(d for d in plan.decisions if not names.intersection(sites[d.site].nodes)))


def usable(
    table: Mapping[str, list[Choice]], sites: Mapping[str, Site], fragile: frozenset[str], integers: frozenset[str]
) -> dict[str, list[Choice]]:
    """The table without decisions for one of the `integers` techniques at sites that a fragile node reads."""

    def allowed(site: str, choice: Choice) -> bool:
        integer = any(a.technique in integers for a in choice.decision.actions)
        return not (integer and fragile.intersection(sites[site].nodes))

    return {site: [c for c in choices if allowed(site, c)] for site, choices in table.items()}
