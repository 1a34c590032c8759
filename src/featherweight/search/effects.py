"""Effects: what every decision at every site is predicted to change, from arithmetic, without running it.

`loss` is the site's noise (closed form, from calibration second moments) times the site's gain: how much of the
noise at its consumers reaches the model's outputs, from a real run with a known perturbation (probe.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from featherweight.core import Action, Decision, Effect, Note, Progress, Site
from featherweight.errors import TechniqueError
from featherweight.search.solve import Choice
from featherweight.techniques import Context, Technique

# Rates of one core used where no measurement steers (deterministic on purpose, so that equal inputs give equal
# plans): only their ratio matters, as a tie-break between equally small or equally accurate plans.
FLOAT_MACS_PER_MS = 30e6
INT8_SPEEDUP = {True: 3.0, False: 1.6}


@dataclass(frozen=True)
class SiteFacts:
    """What one site costs in the float model: time and MACs of its nodes, and bytes resident when loaded."""

    latency_ms: float
    resident_bytes: int
    gain: float = 1.0
    macs: int = 0


@dataclass(frozen=True)
class Effects:
    """All decisions with their predicted effects by site, and why options were refused."""

    table: dict[str, list[Choice]]
    refused: tuple[Note, ...]


def build_effects(
    model: ir.Model,
    sites: Mapping[str, Site],
    techniques: Sequence[Technique],
    ctx: Context,
    facts: Mapping[str, SiteFacts],
    progress: Progress,
    *,
    admit: Callable[[Action], bool] = lambda _action: True,
) -> Effects:
    """Estimate every admitted option at every site; one that gains nothing is refused with a note."""
    table: dict[str, list[Choice]] = {}
    refused: list[Note] = []
    progress.start("estimating effects", len(sites))
    owned = {t.name: {s.name for s in t.sites(model)} for t in techniques}
    for name, site in sites.items():
        choices = [Choice(Decision(name), Effect())]
        table[name] = choices
        progress.advance()
        if ctx.keep_float.intersection(site.nodes):
            ctx.note(name, "left as it is: you asked to keep it in float")
            continue
        worthless: list[str] = []
        for technique in techniques:
            if name not in owned[technique.name]:
                continue
            for action in filter(admit, technique.options(model, site, ctx)):
                choice = _choice(model, site, action, technique, ctx, facts[name])
                if choice is None:
                    worthless.append(str(action))
                else:
                    choices.append(choice)
        if worthless and len(choices) == 1:
            refused.append(Note(name, f"no gain: none of {len(worthless)} options saves bytes, memory or time here"))
    return Effects(table, tuple(refused))


def _choice(
    model: ir.Model, site: Site, action: Action, technique: Technique, ctx: Context, facts: SiteFacts
) -> Choice | None:
    """One option with its effect; None if it gains nothing or the technique refuses it."""
    try:
        estimate = technique.estimate(model, site, action, ctx)
    except TechniqueError as e:
        ctx.note(site.name, f"{action}: {e}")
        return None
    integer = technique.integer
    latency = facts.latency_ms * (1 / INT8_SPEEDUP[ctx.profile.int8_dot] - 1) if integer else 0.0
    peak = -facts.resident_bytes * 3 // 4 if integer else 0
    size = estimate.size_bytes - site.size_bytes
    if size >= 0 and latency >= 0 and peak >= 0:
        return None
    return Choice(Decision(site.name, (action,)), Effect(size, latency, peak, max(estimate.noise, 0.0) * facts.gain))


def modelled_latency_ms(macs: float) -> float:
    """Float time of so many multiply-accumulates at the nominal rate of one core."""
    return macs / FLOAT_MACS_PER_MS
