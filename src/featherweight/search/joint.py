"""One program over structure and numbers: groups of channels and weights decided together.

What a group and a weight decide multiplies (a weight that shrinks has fewer bytes to save by rounding), and a linear
program adds. What is decided about the whole model (how many pixels it looks at) has few options, and each is tried.
The rest is solved in rounds: with the shares that the groups of the last round leave of each weight, and with what the
weights of the last round cost inside each group, until nothing changes. At a settled point the sum is
the product; of all rounds the best by the product counts.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from featherweight.core import Decision, Effect, Site, total
from featherweight.search.effects import SiteFacts
from featherweight.search.options import GroupOption, Option
from featherweight.search.solve import DIMENSIONS, Choice, Dimension, solve

ROUNDS = 4
TIME_LIMIT_S = 10.0
RELATIVE_GAP = 1e-3


@dataclass(frozen=True)
class Joint:
    """Options at all sites. `facts` are of weight sites and groups; `structural` of losses are scaled by `propose`."""

    sites: Mapping[str, Site]
    facts: Mapping[str, SiteFacts]
    weights: Mapping[str, list[Option]]
    groups: Mapping[str, list[GroupOption]]
    sized_by: dict[str, tuple[str, ...]] = field(default_factory=dict)
    worked_by: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def whole(self) -> tuple[str, ...]:
        """The groups that are decisions about the whole model."""
        return tuple(g for g in self.groups if self.sites[g].kind == "model")

    def __post_init__(self) -> None:
        for name in self.weights:
            nodes = set(self.sites[name].nodes)
            self.sized_by[name] = tuple(g for g in self.groups if name in self.sites[g].tensors)
            self.worked_by[name] = tuple(g for g in self.groups if nodes.intersection(self.sites[g].nodes))


@dataclass(frozen=True)
class Chosen:
    """One option a site, and what they come to together."""

    weights: dict[str, Option]
    groups: dict[str, GroupOption]
    effect: Effect
    structural: float

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """All decisions, groups first."""
        return (*(g.decision for g in self.groups.values()), *(o.decision for o in self.weights.values()))

    @property
    def changes_structure(self) -> bool:
        """True if a group shrinks or a layer is taken apart."""
        return any(not c.decision.keeps for c in self.groups.values()) or self.structural > 0


def propose(
    joint: Joint,
    caps: Mapping[Dimension, float],
    weights: Mapping[Dimension, float],
    *,
    scale: float = 1.0,
    start: Mapping[str, Decision] | None = None,
) -> Chosen | None:
    """The best joint choice under the caps on summed effects; None if no round found one that satisfies them.

    `scale`: what a unit of predicted structural loss was measured to be. `start`: decisions of an earlier plan.
    """
    best: Chosen | None = None
    allowed = caps.get("loss", math.inf)
    for options in itertools.product(*(joint.groups[name] for name in joint.whole)):
        if scale * sum(o.loss for o in options) <= allowed:
            found = _settled(fixed(joint, options), caps, weights, scale, start)
            best = best if found is None else _better(best, found, caps, weights)
    return best


def fixed(joint: Joint, options: Iterable[GroupOption]) -> Joint:
    """The space with nothing left to decide at the groups of these options."""
    return dataclasses.replace(joint, groups={**joint.groups, **{o.decision.site: [o] for o in options}})


def _settled(
    joint: Joint,
    caps: Mapping[Dimension, float],
    weights: Mapping[Dimension, float],
    scale: float,
    start: Mapping[str, Decision] | None,
) -> Chosen | None:
    """The best of the rounds from one starting point."""
    picked = {name: _starting(options, start) for name, options in joint.weights.items()}
    shrunk = {name: options[0] for name, options in joint.groups.items()}
    best: Chosen | None = None
    seen: set[tuple[Decision, ...]] = set()
    for _ in range(ROUNDS):
        table = _table(joint, picked, shrunk, scale)
        found = solve(table, caps, weights, time_limit_s=TIME_LIMIT_S, relative_gap=RELATIVE_GAP)
        if found is None:
            break
        by_site = {c.decision.site: c.decision for c in found.choices}
        picked = {n: next(o for o in opts if o.decision == by_site[n]) for n, opts in joint.weights.items()}
        shrunk = {n: next(o for o in opts if o.decision == by_site[n]) for n, opts in joint.groups.items()}
        now = judged(joint, picked, shrunk, scale)
        best = _better(best, now, caps, weights)
        if now.decisions in seen:
            break
        seen.add(now.decisions)
    return best


def judged(joint: Joint, picked: Mapping[str, Option], shrunk: Mapping[str, GroupOption], scale: float = 1.0) -> Chosen:
    """The effect of choices together, products and all, against everything kept."""
    effects = []
    for name, option in picked.items():
        facts = joint.facts[name]
        size = math.prod(shrunk[g].size for g in joint.sized_by[name])
        work = math.prod(shrunk[g].work for g in joint.worked_by[name])
        time = math.prod(shrunk[g].time for g in joint.worked_by[name])
        effects.append(
            Effect(
                round(option.size_bytes * size) - joint.sites[name].size_bytes,
                option.latency_ms * time - facts.latency_ms,
                round(option.resident_bytes * size) - facts.resident_bytes,
                option.loss + (scale - 1) * option.structural,
                round(option.macs * work) - facts.macs,
            )
        )
    for name, chosen in shrunk.items():
        rest = joint.facts[name].resident_bytes
        saved = -round(rest * (1 - chosen.size))
        effects.append(Effect(saved, 0.0, saved + chosen.activation_bytes, chosen.loss * scale, 0))
    structural = scale * (sum(o.structural for o in picked.values()) + sum(g.loss for g in shrunk.values()))
    return Chosen(dict(picked), dict(shrunk), total(effects), structural)


def _starting(options: list[Option], start: Mapping[str, Decision] | None) -> Option:
    """The option of an earlier plan, or the most accurate one that was not left out: usually to keep."""
    wanted = None if start is None else start.get(options[0].decision.site)
    return next((o for o in options if o.decision == wanted), options[0])


def _table(
    joint: Joint, picked: Mapping[str, Option], shrunk: Mapping[str, GroupOption], scale: float
) -> dict[str, list[Choice]]:
    """The linear program around one point: each site's options with all other sites as they are there."""
    table: dict[str, list[Choice]] = {}
    size = {n: math.prod(shrunk[g].size for g in gs) for n, gs in joint.sized_by.items()}
    work = {n: math.prod(shrunk[g].work for g in gs) for n, gs in joint.worked_by.items()}
    time = {n: math.prod(shrunk[g].time for g in gs) for n, gs in joint.worked_by.items()}
    for name, options in joint.weights.items():
        facts, bytes_now = joint.facts[name], joint.sites[name].size_bytes
        table[name] = [
            Choice(
                o.decision,
                Effect(
                    round(o.size_bytes * size[name]) - bytes_now,
                    o.latency_ms * time[name] - facts.latency_ms,
                    round(o.resident_bytes * size[name]) - facts.resident_bytes,
                    o.loss + (scale - 1) * o.structural,
                    round(o.macs * work[name]) - facts.macs,
                ),
            )
            for o in options
        ]
    for name, choices in joint.groups.items():
        held = _held(joint, name, picked, size, work, time)
        rest, at = joint.facts[name].resident_bytes, shrunk[name]
        table[name] = [
            Choice(
                g.decision,
                Effect(
                    round(held.size_bytes * (g.size / at.size - 1) - rest * (1 - g.size)),
                    held.latency_ms * (g.time / max(at.time, 1e-12) - 1),
                    round(held.peak_bytes * (g.size / at.size - 1) - rest * (1 - g.size)) + g.activation_bytes,
                    g.loss * scale,
                    round(held.macs * (g.work / max(at.work, 1e-12) - 1)),
                ),
            )
            for g in choices
        ]
    return table


def _held(
    joint: Joint,
    group: str,
    picked: Mapping[str, Option],
    size: Mapping[str, float],
    work: Mapping[str, float],
    time: Mapping[str, float],
) -> Effect:
    """What the weights of a group cost at the point."""
    sized = [n for n, gs in joint.sized_by.items() if group in gs]
    worked = [n for n, gs in joint.worked_by.items() if group in gs]
    return Effect(
        round(sum(picked[n].size_bytes * size[n] for n in sized)),
        sum(picked[n].latency_ms * time[n] for n in worked),
        round(sum(picked[n].resident_bytes * size[n] for n in sized)),
        0.0,
        round(sum(picked[n].macs * work[n] for n in worked)),
    )


def _better(
    best: Chosen | None, now: Chosen, caps: Mapping[Dimension, float], weights: Mapping[Dimension, float]
) -> Chosen:
    """Of two choices the one that exceeds the caps less, then the better in the objective."""

    def rank(c: Chosen) -> tuple[float, float]:
        over = sum(
            max(0.0, getattr(c.effect, d) - cap) / max(abs(cap), 1e-9) for d, cap in caps.items() if math.isfinite(cap)
        )
        return (0.0 if over < 0.005 else over, sum(weights.get(d, 0.0) * getattr(c.effect, d) for d in DIMENSIONS))

    return now if best is None or rank(now) < rank(best) else best
