"""From a plan to a model: the one place where decisions become edits, used by the search and by `apply` alike."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping

import onnx_ir as ir

from featherweight.core import STAGES, Plan, Site
from featherweight.errors import PlanError
from featherweight.graph import fold, surgery
from featherweight.graph.channels import KEPT
from featherweight.graph.weights import weights
from featherweight.search.stage import LEFT, Between, numeric_part, run_stage, structure_part
from featherweight.techniques import Context, Technique


def all_sites(model: ir.Model, techniques: Iterable[Technique]) -> dict[str, Site]:
    """Every place where any of the techniques could act, by name, in topological order of first use."""
    found: dict[str, Site] = {}
    for technique in techniques:
        for site in technique.sites(model):
            found.setdefault(site.name, site)
    order = {w.name: i for i, w in enumerate(weights(model))}
    return dict(sorted(found.items(), key=lambda item: order.get(item[0], len(order))))


def build(
    model: ir.Model,
    plan: Plan,
    ctx: Context,
    techniques: Mapping[str, Technique],
    *,
    between: Between | None = None,
) -> ir.Model:
    """Apply a plan to a copy of the (normalised) model, stage by stage; `model` is not changed.

    Where the plan changes the structure, that comes first, and `between` recovers and reads statistics again.
    Raises PlanError if the plan names a site or technique this model or installation does not have, or changes the
    structure and there is no `between`.
    """
    _check_techniques(plan, techniques)
    structure = structure_part(plan, techniques)
    if not structure:
        return build_numeric(model, plan, ctx, techniques)
    if between is None:
        raise PlanError("the plan changes the structure, which needs data; build it on the model after that stage")
    staged, left, stats = run_stage(model, structure, ctx, techniques, between)
    now = dataclasses.replace(ctx, stats=stats, cache={})
    return build_numeric(staged, numeric_part(plan, techniques, left), now, techniques)


def build_numeric(model: ir.Model, plan: Plan, ctx: Context, techniques: Mapping[str, Technique]) -> ir.Model:
    """Apply a plan without structure decisions to a copy of a model, which may have been through its structure stage.

    `ctx` holds the statistics of that model. Raises as `build`.
    """
    result = surgery.copy_model(model)
    result.metadata_props.pop(LEFT, None)
    _check_techniques(plan, techniques)
    if structure_part(plan, techniques):
        raise PlanError("the plan changes the structure; its numeric part goes on the model after that stage")
    numeric = {name: t for name, t in techniques.items() if t.stage != "structure"}
    sites = all_sites(result, numeric.values())
    _check_sites(plan, sites)
    current: dict[str, tuple[Site, ...]] = {d.site: (sites[d.site],) for d in plan.changed()}
    for stage in STAGES:
        used: dict[str, Technique] = {}
        for decision in plan.changed():
            for action in decision.actions:
                technique = numeric[action.technique]
                if technique.stage != stage:
                    continue
                used[technique.name] = technique
                left: list[Site] = []
                for site in current[decision.site]:
                    left.extend(technique.apply(result, site, action, ctx.for_technique(technique)))
                current[decision.site] = tuple(left)
        for technique in used.values():
            technique.finish(result, ctx.for_technique(technique))
    for value in _values(result):
        value.metadata_props.pop(KEPT, None)
    fold.restore_storage(result)
    return result


def _values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.inputs
        yield from graph.initializers.values()
        for node in graph:
            yield from node.outputs


def _check_sites(plan: Plan, sites: Mapping[str, Site]) -> None:
    unknown = [d.site for d in plan.changed() if d.site not in sites]
    if unknown:
        raise PlanError(
            f"the plan decides about {unknown[0]!r}, which this model does not have; is it another model's plan?"
        )


def _check_techniques(plan: Plan, techniques: Mapping[str, Technique]) -> None:
    absent = sorted({a.technique for d in plan.decisions for a in d.actions} - techniques.keys())
    if absent:
        raise PlanError(
            f"the plan uses technique {absent[0]!r}, which is not installed; known: {', '.join(techniques)}"
        )
