"""From a plan to a model: the one place where decisions become edits, used by the search and by `apply` alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx_ir as ir

from featherweight.core import STAGES, Decision, Plan, Site
from featherweight.errors import PlanError
from featherweight.graph import fold, surgery
from featherweight.graph.weights import weights
from featherweight.techniques import Context, Technique


def all_sites(model: ir.Model, techniques: Iterable[Technique]) -> dict[str, Site]:
    """Every place where any of the techniques could act, by name, in topological order of first use."""
    found: dict[str, Site] = {}
    for technique in techniques:
        for site in technique.sites(model):
            found.setdefault(site.name, site)
    order = {w.name: i for i, w in enumerate(weights(model))}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def build(model: ir.Model, plan: Plan, ctx: Context, techniques: Mapping[str, Technique]) -> ir.Model:
    """Apply a plan to a copy of the (normalised) model, stage by stage; `model` is not changed.

    Raises PlanError if the plan names a site or technique this model or installation does not have.
    """
    result = surgery.copy_model(model)
    sites = all_sites(result, techniques.values())
    _check(plan, sites, techniques)
    current: dict[str, tuple[Site, ...]] = {d.site: (sites[d.site],) for d in plan.changed()}
    for stage in STAGES:
        used: dict[str, Technique] = {}
        for decision in plan.changed():
            for action in decision.actions:
                technique = techniques[action.technique]
                if technique.stage != stage:
                    continue
                used[technique.name] = technique
                left: list[Site] = []
                for site in current[decision.site]:
                    left.extend(technique.apply(result, site, action, ctx.for_technique(technique)))
                current[decision.site] = tuple(left)
        for technique in used.values():
            technique.finish(result, ctx.for_technique(technique))
    fold.restore_storage(result)
    return result


def _check(plan: Plan, sites: Mapping[str, Site], techniques: Mapping[str, Technique]) -> None:
    unknown = [d.site for d in plan.changed() if d.site not in sites]
    if unknown:
        raise PlanError(
            f"the plan decides about {unknown[0]!r}, which this model does not have; is it another model's plan?"
        )
    absent = sorted({a.technique for d in plan.decisions for a in d.actions} - techniques.keys())
    if absent:
        raise PlanError(
            f"the plan uses technique {absent[0]!r}, which is not installed; known: {', '.join(techniques)}"
        )


def complete(plan: Plan, sites: Iterable[str]) -> Plan:
    """The plan with an explicit `keep` for each site it does not mention, in the order of `sites`."""
    import dataclasses

    chosen = plan.by_site()
    return dataclasses.replace(plan, decisions=tuple(chosen.get(s, Decision(s)) for s in sites))
