"""The original, measured on validation data: what every candidate is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from featherweight.core import Measurement
from featherweight.graph import io
from featherweight.runtime import evaluate as ev
from featherweight.runtime import metrics, ort
from featherweight.search.effects import modelled_latency_ms
from featherweight.search.loop import Base
from featherweight.search.problem import Problem, first_feeds

LATENCY_FEEDS = 4
QUICK_LATENCY_S = 4.0


@dataclass(frozen=True)
class Baseline:
    """The metric and why it was chosen, the original's scores on validation data, and what it costs."""

    metric: metrics.Metric
    why: str
    validation: ev.Evaluation
    measurement: Measurement


def measure_baseline(problem: Problem) -> Baseline:
    """Choose the metric and measure the original on validation data; its outputs are kept for paired comparison."""
    problem.progress.start("measuring the original", problem.splits.validation.n_batches)
    metric, why = ev.pick_metric(
        problem.runnable, problem.splits.validation, problem.request.metric, worker=problem.worker
    )
    evaluation = problem.bench.evaluate(
        problem.runnable,
        problem.splits.validation,
        metric,
        record_to=problem.work / "reference",
        threads=problem.profile.threads,
        progress=lambda _done, _total: problem.progress.advance(),
    )
    costs = problem.journal.phase("baseline", lambda: _baseline_costs(problem))
    value = metric.perfect if metric.perfect is not None else evaluation.value
    measured = Measurement(
        size_bytes=problem.original_bytes,
        metric_name=metric.name,
        metric=value,
        drop=0.0,
        n_samples=evaluation.n_samples,
        latency_ratio=1.0,
        macs=problem.macs(),
        runtime=problem.bench.runtime,
        host=problem.bench.host,
        latency_from=problem.bench.latency_from,
        seed=problem.request.seed,
        **costs,
    )
    problem.facts["metric"] = f"{metric.name}: {why}"
    return Baseline(metric, why, evaluation, measured)


def _baseline_costs(problem: Problem) -> dict[str, Any]:
    """Latency and peak memory of the original where the search steers by them; else they wait for the proof."""
    feeds = first_feeds(problem.splits.validation, LATENCY_FEEDS)
    costs: dict[str, Any] = {}
    if problem.budget.max_latency_ms is not None:
        alone = problem.bench.latency(
            problem.runnable, problem.runnable, feeds, threads=problem.request.threads, time_limit_s=QUICK_LATENCY_S
        )
        costs["latency_ms"] = alone.original_ms
        if problem.bench.latency_from == "measured":  # a prediction has no tail
            costs["p95_ms"] = alone.original_p95_ms
    if problem.budget.max_peak_bytes is not None or problem.budget.minimize == "memory":
        memory = problem.bench.memory(problem.runnable, feeds[0])
        costs |= {"peak_bytes": memory.peak_bytes, "load_ms": memory.load_ms}
    return costs


def base(problem: Problem, known: Baseline) -> Base:
    """What predicted effects are relative to: the normalised file, and the original's measured costs."""
    size = io.size_bytes(problem.model_path)
    modelled = max(modelled_latency_ms(problem.macs()), 1e-6)
    return Base(size, modelled, known.measurement.peak_bytes or 1, known.measurement.latency_ms, problem.macs())


def already_fits(problem: Problem, known: Baseline) -> bool:
    """True if the original is within resource limits and the user asked for nothing more."""
    asked = problem.request
    return asked.goal == "fit" and not problem.budget.violations(known.measurement)


def interface(problem: Problem) -> dict[str, tuple[tuple[int, ...], int]]:
    """Shape and bytes an element of each input and output at the data's shapes."""
    feeds = first_feeds(problem.splits.validation, 1)
    outputs = problem.worker.call(ort.run_model, str(problem.runnable), feeds, doing="reading output shapes")[0]
    return {n: (tuple(a.shape), a.dtype.itemsize) for n, a in {**feeds[0], **outputs}.items() if a.dtype != object}
