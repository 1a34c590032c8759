"""What structure can do at each place, and what it costs: estimates of techniques and of chains, in closed form.

A chain `factor -> numeric` is not estimated anew; its effect follows from the two alone:

* bytes: those of the numeric action, times the factor's share of the bytes;
* noise: the factor's, plus the numeric action's once for each factor (each is rounded);
* time: the factor's share of the work at the rate of the numeric action, plus for each extra node a fixed cost, and
  the writing and reading of what passes between the factors (`between_ms`). A factor that saves too little work for
  that comes out slower than the layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from featherweight.core import Decision, Note, Progress, Site
from featherweight.errors import TechniqueError
from featherweight.graph.weights import Weight
from featherweight.search.effects import SiteFacts
from featherweight.search.solve import Choice
from featherweight.techniques import Context, Estimate, Technique

#: Milliseconds that one more node costs, whatever it does, and bytes a millisecond that pass through memory: rough
#: figures of one core of a small CPU, deterministic on purpose as the rates in `effects`.
NODE_MS = 0.004
BYTES_PER_MS = 8e6
#: Kernels work on blocks of so many channels; with another number a layer takes about so much longer. Measured with
#: ONNX Runtime 1.32 on AVX-512: float kernels want 8; depthwise integer kernels want 16, and with 8 more or less an
#: inverted bottleneck takes 1.6 times as long, which is more than removing half its channels saves.
FLOAT_MULTIPLE, INTEGER_MULTIPLE, UNALIGNED = 8, 16, 1.6
#: Layers that a technique puts in the place of one, where it does not say itself (`factors`).
USUAL_FACTORS = 2


@dataclass(frozen=True, slots=True)
class Option:
    """One decision at a weight: what the weight and its nodes cost then, before channels are removed around it.

    `structural` is the part of `loss` that comes from taking the layer apart.
    """

    decision: Decision
    size_bytes: float
    latency_ms: float
    resident_bytes: float
    macs: float
    loss: float
    structural: float = 0.0


@dataclass(frozen=True, slots=True)
class GroupOption:
    """One decision at a group of channels, or about the whole model: shares of bytes, work and time that are left, the
    loss, and the change of the planned peak of activations.
    """

    decision: Decision
    size: float
    work: float
    loss: float
    time: float
    activation_bytes: int = 0


@dataclass(frozen=True)
class Structure:
    """All that structure can do to a model. `groups` and `factors` by site; `refused`: why a place has no option."""

    sites: dict[str, Site]
    groups: dict[str, list[GroupOption]]
    factors: dict[str, list[tuple[Decision, Estimate, Technique]]]
    refused: tuple[Note, ...] = ()

    @property
    def empty(self) -> bool:
        """True if nothing can be done."""
        return not any(len(g) > 1 for g in self.groups.values()) and not any(self.factors.values())


def structure_options(
    model: ir.Model,
    techniques: Sequence[Technique],
    ctx: Context,
    gains: Mapping[str, float],
    progress: Progress,
    *,
    integer: bool = False,
    whole: bool = True,
) -> Structure:
    """Estimate every option of the structure techniques at every site. Layers kept in float are left alone.

    `integer`: what is left may compute in integers, whose kernels want other numbers of channels. `whole`: changes to
    the whole model count; they save operations and no bytes.
    """
    multiple = INTEGER_MULTIPLE if integer else FLOAT_MULTIPLE
    sites: dict[str, Site] = {}
    groups: dict[str, list[GroupOption]] = {}
    factors: dict[str, list[tuple[Decision, Estimate, Technique]]] = {}
    refused: list[Note] = []
    listed = [(t, s) for t in techniques for s in t.sites(model) if whole or s.kind != "model"]
    progress.start("estimating structure", len(listed))
    for technique, site in listed:
        progress.advance()
        if site.kind != "model" and ctx.keep_float.intersection(site.nodes):
            ctx.note(site.name, "its structure stays: you asked to keep it as it is")
            continue
        sites.setdefault(site.name, site)
        found = list(_estimated(model, technique, site, ctx))
        if site.kind in ("channel_group", "model"):
            options = groups.setdefault(site.name, [GroupOption(Decision(site.name), 1.0, 1.0, 0.0, 1.0)])
            for d, e in found:
                slower = slowed(technique, model, site, d, ctx, multiple)
                options.append(_group_option(d, e, site, gains, slower))
        else:
            useful = [(d, e, technique) for d, e in found if e.size_bytes < site.size_bytes or e.work < 1]
            factors.setdefault(site.name, []).extend(useful)
            if found and not useful:
                refused.append(Note(site.name, f"no gain: {technique.name} saves neither bytes nor work here"))
    return Structure(sites, groups, factors, tuple(refused))


def _estimated(model: ir.Model, technique: Technique, site: Site, ctx: Context) -> list[tuple[Decision, Estimate]]:
    found = []
    for action in technique.options(model, site, ctx):
        try:
            found.append((Decision(site.name, (action,)), technique.estimate(model, site, action, ctx)))
        except TechniqueError as e:
            ctx.note(site.name, f"{action}: {e}")
    return found


def _group_option(
    decision: Decision, e: Estimate, site: Site, gains: Mapping[str, float], slower: float
) -> GroupOption:
    usual = float(np.median(list(gains.values()))) if gains else 1.0
    loss = sum(max(noise, 0.0) * gains.get(name, usual) for name, noise in e.at) if e.at else max(e.noise, 0.0) * usual
    size = e.size_bytes / site.size_bytes if site.size_bytes else 1.0  # what has no weights leaves those of others
    return GroupOption(decision, size, e.work, loss, e.work * slower, e.activation_bytes)


def slowed(technique: Technique, model: ir.Model, site: Site, decision: Decision, ctx: Context, multiple: int) -> float:
    """What a number of channels off the kernels' multiple costs the layers around it, as a factor on their time."""
    count = getattr(technique, "channels", None)
    if count is None:
        return 1.0
    return UNALIGNED if count(model, site, decision.actions[0], ctx) % multiple else 1.0


def weight_options(
    site: Site,
    facts: SiteFacts,
    numeric: Sequence[Choice],
    factors: Sequence[tuple[Decision, Estimate, Technique]],
    weight: Weight | None,
) -> list[Option]:
    """Keep, every numeric choice, every factor, and every factor with every numeric choice; dominated ones left out."""
    alone = [
        Option(
            c.decision,
            site.size_bytes + c.effect.size_bytes,
            facts.latency_ms + c.effect.latency_ms,
            facts.resident_bytes + c.effect.peak_bytes,
            facts.macs,
            c.effect.loss,
        )
        for c in numeric
    ] or [Option(Decision(site.name), site.size_bytes, facts.latency_ms, facts.resident_bytes, facts.macs, 0.0)]
    alone = undominated(alone)
    chains = []
    for decision, e, technique in factors:
        n = int(getattr(technique, "factors", USUAL_FACTORS))
        share = e.size_bytes / max(site.size_bytes, 1)
        extra = (n - 1) * NODE_MS + between_ms(facts, weight, share)
        structural = max(e.noise, 0.0) * facts.gain
        chains += [
            Option(
                Decision(site.name, decision.actions + o.decision.actions),
                o.size_bytes * share,
                o.latency_ms * e.work + extra,
                o.resident_bytes * share,
                o.macs * e.work,
                structural + n * o.loss,
                structural,
            )
            for o in alone
        ]
    return undominated(alone + chains)


def between_ms(facts: SiteFacts, weight: Weight | None, share: float) -> float:
    """Time to write and read what passes between the factors of one layer that keep `share` of its values.

    A layer of `out` by `k` is run at `macs / (out k)` positions; factors of `share out k` values pass about
    `share out k / (out + k)` numbers a position between them.
    """
    if weight is None or not facts.macs:
        return 0.0
    groups, out, k = weight.matrix_shape
    positions = facts.macs / max(groups * out * k, 1)
    inner = share * groups * out * k / max(out + k, 1)
    return 2 * 4 * positions * inner / BYTES_PER_MS


def undominated(options: Sequence[Option]) -> list[Option]:
    """Options that no other beats in everything; of equal ones the first. Scaling all alike keeps that order."""
    if not options:
        return []
    rows = np.array([(o.size_bytes, o.latency_ms, o.resident_bytes, o.macs, o.loss, o.structural) for o in options])
    kept: list[int] = []
    for i in np.lexsort(rows.T[::-1]):  # what comes later cannot dominate what comes before, but for equals
        if not kept or not (rows[kept] <= rows[i]).all(axis=1).any():
            kept.append(int(i))
    return [options[i] for i in sorted(kept)]
