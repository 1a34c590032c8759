"""The multiple-choice knapsack behind a plan, as a mixed-integer program (HiGHS).

One binary variable for each (site, decision); exactly one decision a site; the summed effects stay under the caps.
Kellerer, Pferschy, Pisinger, "Knapsack Problems" (2004), chapter 11.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from featherweight.core import Decision, Effect, total
from featherweight.search.highs import binary_program

Dimension = Literal["size_bytes", "latency_ms", "peak_bytes", "loss", "macs"]
DIMENSIONS: tuple[Dimension, ...] = ("size_bytes", "latency_ms", "peak_bytes", "loss", "macs")


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision with its predicted effect."""

    decision: Decision
    effect: Effect


Table = Mapping[str, Sequence[Choice]]


@dataclass(frozen=True, slots=True)
class Solution:
    """The chosen decisions (in the table's order), their summed effect, and how far from optimal they may be."""

    choices: tuple[Choice, ...]
    effect: Effect
    objective: float
    gap: float


def matrix(choices: Sequence[Choice]) -> np.ndarray:
    """Effects as an array (choices, 5) float64 in the order of DIMENSIONS."""
    rows = [[float(getattr(c.effect, d)) for d in DIMENSIONS] for c in choices]
    return np.array(rows, np.float64).reshape(-1, len(DIMENSIONS))


def prune_dominated(choices: Sequence[Choice]) -> list[Choice]:
    """Drop decisions no better than another in any dimension; of equal ones the first stays. O(n^2), n is small."""
    m = matrix(choices)
    kept = []
    for i in range(len(choices)):
        no_worse = (m <= m[i]).all(axis=1)
        better = (m < m[i]).any(axis=1)
        earlier_twin = no_worse & ~better & (np.arange(len(choices)) < i)
        if not (no_worse & better).any() and not earlier_twin.any():
            kept.append(choices[i])
    return kept


def solve(
    table: Table,
    caps: Mapping[Dimension, float],
    weights: Mapping[Dimension, float],
    *,
    time_limit_s: float = 20.0,
    relative_gap: float = 1e-4,
) -> Solution | None:
    """Choose one decision a site minimising the weighted sum of effects under the caps on summed effects.

    `caps` and `weights` speak of changes against the baseline, as `Effect` does. Returns None if no assignment
    satisfies the caps (proved infeasible) or none was found in the time; ties are broken the same way each time.
    """
    sites = [prune_dominated(choices) for choices in table.values()]
    if not sites:
        nothing = all(cap >= 0 for cap in caps.values())
        return Solution((), Effect(), 0.0, 0.0) if nothing else None
    flat = [c for choices in sites for c in choices]
    effects = matrix(flat)
    scale = np.maximum(np.abs(effects).max(axis=0), 1e-30)  # rows of like size keep the solver's tolerances meaningful
    cost = sum(weights.get(d, 0.0) * effects[:, i] for i, d in enumerate(DIMENSIONS)) + np.zeros(len(flat))
    cost_scale = max(float(np.abs(cost).max()), 1e-30)

    owner = np.repeat(np.arange(len(sites)), [len(s) for s in sites])
    limited = [(i, caps[d]) for i, d in enumerate(DIMENSIONS) if d in caps and np.isfinite(caps[d])]
    rows = np.array([effects[:, i] / scale[i] for i, _ in limited]).reshape(len(limited), len(flat))
    limits = np.array([cap / scale[i] for i, cap in limited])
    found = binary_program(
        cost / cost_scale, owner, len(sites), rows, limits, time_limit_s=time_limit_s, relative_gap=relative_gap
    )
    if found is None:
        return None
    x, gap = found
    chosen = _pick(x, sites)
    effect = total(c.effect for c in chosen)
    if any(getattr(effect, d) > cap + 1e-6 * scale[DIMENSIONS.index(d)] for d, cap in caps.items()):
        return None
    objective = float(sum(weights.get(d, 0.0) * getattr(effect, d) for d in DIMENSIONS))
    return Solution(chosen, effect, objective, gap)


def _pick(x: np.ndarray, sites: Sequence[Sequence[Choice]]) -> tuple[Choice, ...]:
    """Round the solver's 0/1 vector to one choice a site."""
    picked, start = [], 0
    for choices in sites:
        picked.append(choices[int(np.argmax(x[start : start + len(choices)]))])
        start += len(choices)
    return tuple(picked)


def cheapest(table: Table, dimension: Dimension) -> Effect:
    """Sum over sites of each site's lowest value in `dimension`: the bound that proves a limit out of reach."""
    return total(min(choices, key=lambda c: getattr(c.effect, dimension)).effect for choices in table.values())
