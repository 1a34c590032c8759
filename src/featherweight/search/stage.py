"""The structure stage of a plan: channels removed, layers taken apart, weights solved anew, statistics read again.

Its order: what changes the whole model, statistics; then all groups of channels at once, recover, statistics; then what
replaces single layers, recover, statistics. Weights are solved anew against the answers of the model as the first step
left it: before that step its values had other shapes.
The result is a float model on which the numeric part of the plan goes on. It is dear (passes over the data), so it is
kept by the structure part of the plan: a search tries many numeric plans on one structure.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import onnx_ir as ir

from featherweight.core import Action, Decision, Plan, Site, SiteKind
from featherweight.errors import ModelError, PlanError
from featherweight.graph import io, surgery
from featherweight.graph.weights import weights
from featherweight.stats import Statistics
from featherweight.techniques import Context, Technique

#: Metadata of a staged model: JSON {site: [weights that hold what is left of it]}.
LEFT = "featherweight.structure"
#: Name of its file, in the work folder and in the run folder.
FILE = "structure.onnx"
Left = Mapping[str, tuple[str, ...]]
#: What sites are about, in the order in which they are changed.
STEPS: tuple[SiteKind, ...] = ("model", "channel_group", "weight")


@dataclass(frozen=True)
class Staged:
    """A float model after its structure stage, saved at `path`, with the statistics of it.

    `left`: for each decided weight that was taken apart, the weights that hold what is left of it.
    """

    key: str
    decisions: tuple[Decision, ...]
    model: ir.Model
    path: Path
    left: Left
    stats: Statistics | None


class Between(Protocol):
    """What happens between the steps of the stage; needs data."""

    def recover(self, original: ir.Model, reduced: ir.Model) -> ir.Model:
        """`reduced` with its weights solved anew, so that its layers answer like the original's."""
        ...

    def statistics(self, model: ir.Model) -> Statistics | None:
        """Calibration statistics of `model`."""
        ...


def structure_part(plan: Plan, techniques: Mapping[str, Technique]) -> tuple[Decision, ...]:
    """The decisions of a plan that change the graph, in the plan's order, without their numeric actions."""
    found = []
    for decision in plan.changed():
        actions = tuple(a for a in decision.actions if _structural(a, techniques))
        if actions:
            found.append(Decision(decision.site, actions))
    return tuple(found)


def numeric_part(plan: Plan, techniques: Mapping[str, Technique], left: Left) -> Plan:
    """The rest of the plan, about the weights of the model after its structure stage.

    A chain's numeric actions go on at each weight that is left of its site.
    """
    decisions = []
    for decision in plan.changed():
        actions = tuple(a for a in decision.actions if not _structural(a, techniques))
        if actions:
            decisions += [Decision(name, actions) for name in left.get(decision.site, (decision.site,))]
    return dataclasses.replace(plan, decisions=tuple(decisions))


def whole_plan(sites: Iterable[str], structure: Sequence[Decision], numeric: Plan, left: Left) -> Plan:
    """One plan of a structure part and decisions on what it left: the inverse of `structure_part` and `numeric_part`.

    `sites`: those of the model before; each is decided about, then what remains. Where all weights left of a site
    are treated alike they are one chain; else each has a decision of its own.
    """
    chosen, shape = numeric.by_site(), {d.site: d.actions for d in structure}
    done: set[str] = set()
    decisions: list[Decision] = []
    for site in dict.fromkeys([*shape, *sites]):
        parts = left.get(site, (site,))
        tails = {chosen[p].actions if p in chosen else () for p in parts}
        together = len(tails) == 1
        decisions.append(Decision(site, shape.get(site, ()) + (tails.pop() if together else ())))
        done.update(parts if together else ())
    decisions += [d for d in numeric.decisions if d.site not in done]
    return dataclasses.replace(numeric, decisions=tuple(decisions))


def stage_key(model_sha256: str, decisions: Iterable[Decision], seed: int) -> str:
    """Name of the structure that these decisions make of one model."""
    raw = [[d.site, [a.to_json() for a in d.actions]] for d in decisions]
    return hashlib.sha256(json.dumps([model_sha256, seed, raw], sort_keys=True).encode()).hexdigest()[:16]


def run_stage(
    model: ir.Model,
    decisions: Sequence[Decision],
    ctx: Context,
    techniques: Mapping[str, Technique],
    between: Between,
) -> tuple[ir.Model, dict[str, tuple[str, ...]], Statistics | None]:
    """Carry out the structure part of a plan on a copy of the model.

    Returns the float model, what is left of each site that was taken apart, and the statistics of that model. Raises
    PlanError if a decision is about a place the model does not have, TechniqueError if one is not legal.
    """
    original, result, stats = model, surgery.copy_model(model), ctx.stats
    left: dict[str, tuple[str, ...]] = {}
    for step, part in zip(STEPS, _steps(model, decisions, techniques), strict=True):
        if not part:
            continue
        left.update(_apply(result, part, dataclasses.replace(ctx, stats=stats, cache={}), techniques))
        if step == "model":
            original = surgery.copy_model(result)
        else:
            result = between.recover(original, result)
        stats = between.statistics(result)
    changed = {site: names for site, names in left.items() if names != (site,)}
    result.metadata_props[LEFT] = json.dumps(changed, sort_keys=True)
    return result, changed, stats


def cut_only(
    model: ir.Model, decisions: Sequence[Decision], ctx: Context, techniques: Mapping[str, Technique]
) -> ir.Model:
    """A copy of the model with these decisions carried out and nothing after: for counting. Raises TechniqueError."""
    result = surgery.copy_model(model)
    whole, groups, single = _steps(model, decisions, techniques)
    # Groups come first: what `ctx` keeps of them is numbered as the model was. Of the layers left it knows nothing.
    changed = dataclasses.replace(ctx, stats=None, cache={}) if groups else ctx
    for part, now in ((groups, ctx), (single, changed), (whole, changed)):
        if part:
            _apply(result, part, now, techniques)
    return result


def _steps(
    model: ir.Model, decisions: Sequence[Decision], techniques: Mapping[str, Technique]
) -> tuple[list[Decision], ...]:
    """The decisions of each step of the stage. A place that the model does not have counts as a group of channels."""
    known = {w.name for w in weights(model)}
    used = {a.technique for d in decisions if d.site not in known for a in d.actions}
    kinds = {s.name: s.kind for name in used if name in techniques for s in techniques[name].sites(model)}
    kinds.update(dict.fromkeys(known, "weight"))
    return tuple([d for d in decisions if kinds.get(d.site, "channel_group") == step] for step in STEPS)


def _apply(
    model: ir.Model, decisions: Sequence[Decision], ctx: Context, techniques: Mapping[str, Technique]
) -> dict[str, tuple[str, ...]]:
    """Apply the actions in place; the weights that hold what is left of each weight site."""
    used = {a.technique: techniques[a.technique] for d in decisions for a in d.actions}
    sites = {s.name: s for t in used.values() for s in t.sites(model)}
    left: dict[str, tuple[str, ...]] = {}
    for decision in decisions:
        if decision.site not in sites:
            raise PlanError(
                f"the plan changes the structure at {decision.site!r}, which this model does not have; "
                "is it another model's plan?"
            )
        current: tuple[Site, ...] = (sites[decision.site],)
        for action in decision.actions:
            technique = used[action.technique]
            current = tuple(s for site in current for s in technique.apply(model, site, action, ctx))
        if all(s.kind == "weight" for s in current):
            left[decision.site] = tuple(s.name for s in current)
    for technique in used.values():
        technique.finish(model, ctx)
    return left


def read(path: Path, key: str, decisions: Sequence[Decision], stats: Statistics | None) -> Staged:
    """A staged model from its file. Raises PlanError if the file is not one."""
    try:
        model = io.load(path)
        raw = json.loads(model.metadata_props[LEFT])
        left = {str(site): tuple(map(str, names)) for site, names in raw.items()}
    except (KeyError, ValueError, AttributeError, TypeError, ModelError) as e:
        raise PlanError(f"{path} must be the model after a run's structure stage, but is not: {e}") from e
    return Staged(key, tuple(decisions), model, path, left, stats)


def _structural(action: Action, techniques: Mapping[str, Technique]) -> bool:
    found = techniques.get(action.technique)
    return found is not None and found.stage == "structure"
