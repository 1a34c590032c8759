"""One structure that was built and is tried: its own problem, and what it costs against the whole model."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from featherweight.core import Attempt, Effect
from featherweight.graph import cost
from featherweight.graph.weights import weights
from featherweight.runtime.metrics import Metric
from featherweight.search import loop
from featherweight.search.prepare import Ground
from featherweight.search.probe import child_divergence
from featherweight.search.problem import Problem, first_feeds
from featherweight.search.stage import Staged

#: Batches on which the noise of a changed structure is measured, and on until so many samples.
NOISE_BATCHES, NOISE_SAMPLES = 32, 150


@dataclass
class Trial:
    """One structure, built: a problem of its own, what can be done to its numbers, and its measured output noise."""

    problem: Problem
    staged: Staged
    ground: Ground
    noise: float
    base: loop.Base


def planned_bytes(problem: Problem) -> int:
    """Weights and the planned peak of activations of a problem's model, which moves as measured memory does."""
    found = cost.costs(problem.model, input_shapes=problem.shapes())
    return found.weight_bytes + found.peak_activation_bytes


def shifted(attempt: Attempt, offset: Effect) -> Attempt:
    """The attempt with its prediction against the whole model, not against its structure."""
    p = attempt.plan.predicted
    moved = Effect(
        p.size_bytes + offset.size_bytes, p.latency_ms + offset.latency_ms, p.peak_bytes + offset.peak_bytes,
        p.loss + offset.loss, p.macs + offset.macs,
    )  # fmt: skip
    return dataclasses.replace(attempt, plan=dataclasses.replace(attempt.plan, predicted=moved))


def fragile(ground: Ground, made: Staged) -> frozenset[str]:
    """Fragile nodes of the model with its structure whole, and what came in the place of such."""
    known = {w.name: w for w in weights(made.model)}
    found = set(ground.ctx.fragile)
    for site, names in made.left.items():
        if site in ground.sites and found.intersection(ground.sites[site].nodes):
            found.update(u.path for n in names if n in known for u in known[n].uses)
    return frozenset(found)


def noise_of(problem: Problem, made: Staged, metric: Metric) -> float:
    """Noise over signal of the changed structure in float, in what the metric reads, on validation data."""
    feeds = first_feeds(problem.splits.validation, NOISE_BATCHES, samples=NOISE_SAMPLES)
    found, _ = problem.worker.call(
        child_divergence, str(problem.model_path), str(made.path), feeds, problem.profile.threads, metric,
        doing="running a changed structure",
    )  # fmt: skip
    return float(found) if math.isfinite(found) else 1e6
