"""What was decided at each site, as rows of the report."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx_ir as ir

from featherweight.core import Decision, Note, Plan
from featherweight.graph import surgery
from featherweight.graph.weights import Weight, weights
from featherweight.search.effects import modelled_latency_ms
from featherweight.search.measured import stage_of
from featherweight.search.passes import Found
from featherweight.search.prepare import Ground
from featherweight.search.problem import Problem
from featherweight.search.stage import Staged, numeric_part
from featherweight.techniques import _units


def rows(problem: Problem, plan: Plan, found: Found | None) -> tuple[dict[str, Any], ...]:
    """One row a weight, then one for each change to the whole model and each group of channels that was narrowed.

    A weight: node, operator, shape, decision, bytes before and after, MACs before and after, integer or not, why kept.
    A change to the whole model: its name and decision. A group: its name, channels before and after.
    """
    if found is None:
        return ()
    ground, made = found.ground, stage_of(problem, plan)
    after = found.ground_of(problem, plan)
    names = {path: node for node, path in surgery.paths(problem.model).items()}
    numeric = plan if made is None else numeric_part(plan, problem.techniques, made.left)
    chosen, narrowed = plan.by_site(), numeric.by_site()
    macs = problem.node_macs()
    why = _reasons([*ground.ctx.notes, *ground.effects.refused])
    by_name = {w.name: w for w in weights(problem.model)}
    made_rows: list[dict[str, Any]] = []
    for site in ground.sites.values():
        decision = chosen.get(site.name)
        parts = (site.name,) if made is None else made.left.get(site.name, (site.name,))
        node = names.get(site.nodes[0]) if site.nodes else None
        tail = [narrowed[p] for p in parts if p in narrowed]
        integer = any(problem.techniques[a.technique].integer for d in tail for a in d.actions)
        work = sum(macs.get(n, 0) or 0 for n in site.nodes)
        left = sum(after.facts[p].macs for p in parts if p in after.facts) if made is not None else work
        noted = "; ".join(t for p, t in why if p in {site.name, *site.nodes})
        made_rows.append(
            {
                "layer": site.nodes[0] if site.nodes else site.name,
                "tensor": site.name,
                "op": node.op_type if node is not None else "",
                "shape": _shape(problem.model, site.name),
                "decision": _words(decision, parts, narrowed),
                "before_bytes": site.size_bytes,
                "after_bytes": sum(_bytes_after(after, p, narrowed.get(p)) for p in parts),
                "macs": int(work),
                "macs_after": int(left),
                "int8": integer,
                "float_cost_ms": 0.0 if integer else round(modelled_latency_ms(left), 4),
                "why": "" if integer else noted or _usual_reason(problem, by_name.get(site.name), decision),
            }
        )
    return (*made_rows, *([] if made is None else _structure_rows(problem, made)))


def _words(decision: Decision | None, parts: tuple[str, ...], chosen: Mapping[str, Decision]) -> str:
    """The decision; where the parts left of a weight were treated differently, each of them."""
    words = str(decision) if decision is not None else "keep"
    own = [str(chosen[p]) for p in parts if p in chosen]
    alike = len(parts) == 1 or len(set(own)) <= 1
    return words if alike else f"{words} -> {' and '.join(own)}"


def _bytes_after(ground: Ground, name: str, decision: Decision | None) -> int:
    """Predicted bytes of one weight of the model that the numeric part goes on."""
    site = ground.sites.get(name)
    if site is None:
        return 0
    effect = next((c.effect for c in ground.effects.table[name] if c.decision == decision), None)
    return site.size_bytes + (effect.size_bytes if effect is not None else 0)


def _structure_rows(problem: Problem, made: Staged) -> list[dict[str, Any]]:
    """What was decided about the whole model; channels before and after of each group, by the axis of its first tensor
    that shrank.
    """
    stored = {w.name for w in weights(problem.model)}
    structural = problem.of_stage(structure=True)
    used = {a.technique for d in made.decisions if d.site not in stored for a in d.actions}
    sites = {s.name: s for name in sorted(used) for s in structural[name].sites(problem.model)}
    rows: list[dict[str, Any]] = []
    for decision in made.decisions:
        if decision.site not in sites:
            continue
        row: dict[str, Any] = {"layer": decision.site, "decision": str(decision)}
        if sites[decision.site].kind == "model":
            rows.append({**row, "kind": "model"})
            continue
        for tensor in sites[decision.site].tensors:
            pairs = zip(_shape(problem.model, tensor), _shape(made.model, tensor), strict=False)
            shrunk = [(before, after) for before, after in pairs if before != after]
            if shrunk:
                break
        else:
            shrunk = [(0, 0)]
        rows.append({**row, "kind": "channels", "channels": shrunk[0][0], "channels_after": shrunk[0][1]})
    return rows


def _usual_reason(problem: Problem, weight: Weight | None, decision: Decision | None) -> str:
    """Why a site that no note speaks of did not become integer: it cannot, or the search weighed it so."""
    if decision is None or decision.keeps:
        return "kept: no form of it pays for the bytes and the noise it adds within the limits"
    refusal = None if weight is None else _units.refusal(problem.model, weight)
    return f"computed in float: {refusal or 'stored smaller, and integers do not pay here'}"


def _shape(model: ir.Model, tensor: str) -> list[int]:
    value = model.graph.initializers.get(tensor)
    if value is None or value.const_value is None:
        return []
    return [int(d) for d in value.const_value.shape.numpy()]


def _reasons(notes: list[Note]) -> list[tuple[str, str]]:
    return list(dict.fromkeys((n.where, n.text) for n in notes))
