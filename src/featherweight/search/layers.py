"""What was decided at each site, as rows of the report."""

from __future__ import annotations

from typing import Any

from featherweight.core import Decision, Note, Plan
from featherweight.graph import surgery
from featherweight.graph.weights import Weight, weights
from featherweight.search.effects import modelled_latency_ms
from featherweight.search.prepare import Ground
from featherweight.search.problem import Problem
from featherweight.techniques import _units


def rows(problem: Problem, plan: Plan, ground: Ground | None) -> tuple[dict[str, Any], ...]:
    """One row a site: node, operator, shape, decision, bytes before and after, MACs, integer or not, why kept."""
    if ground is None:
        return ()
    names = {path: node for node, path in surgery.paths(problem.model).items()}
    chosen = plan.by_site()
    macs = problem.facts.get("macs", {})
    why = _reasons([*ground.ctx.notes, *ground.effects.refused])
    by_name = {w.name: w for w in weights(problem.model)}
    found = []
    for site in ground.sites.values():
        decision = chosen.get(site.name)
        node = names.get(site.nodes[0]) if site.nodes else None
        work = sum(macs.get(n, 0) or 0 for n in site.nodes)
        integer = decision is not None and any(problem.techniques[a.technique].integer for a in decision.actions)
        effect = next((c.effect for c in ground.effects.table[site.name] if c.decision == decision), None)
        places = {site.name, *site.nodes}
        noted = "; ".join(t for p, t in why if p in places)
        found.append(
            {
                "layer": site.nodes[0] if site.nodes else site.name,
                "tensor": site.name,
                "op": node.op_type if node is not None else "",
                "shape": _shape(problem, site.name),
                "decision": str(decision) if decision is not None else "keep",
                "before_bytes": site.size_bytes,
                "after_bytes": site.size_bytes + (effect.size_bytes if effect is not None else 0),
                "macs": int(work),
                "int8": integer,
                "float_cost_ms": 0.0 if integer else round(modelled_latency_ms(work), 4),
                "why": "" if integer else noted or _usual_reason(problem, by_name.get(site.name), decision),
            }
        )
    return tuple(found)


def _usual_reason(problem: Problem, weight: Weight | None, decision: Decision | None) -> str:
    """Why a site that no note speaks of did not become integer: it cannot, or the search weighed it so."""
    if decision is None or decision.keeps:
        return "kept: no form of it pays for the bytes and the noise it adds within the limits"
    refusal = None if weight is None else _units.refusal(problem.model, weight)
    return f"computed in float: {refusal or 'stored smaller, and integers do not pay here'}"


def _shape(problem: Problem, tensor: str) -> list[int]:
    value = problem.model.graph.initializers.get(tensor)
    if value is None or value.const_value is None:
        return []
    return [int(d) for d in value.const_value.shape.numpy()]


def _reasons(notes: list[Note]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((n.where, n.text) for n in notes))
