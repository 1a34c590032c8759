"""Measuring candidates: on validation data while searching, on the holdout once at the end.

All runs happen in child processes, on saved and reloaded files, on the problem's bench.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.core import Attempt, Measurement, Plan
from featherweight.errors import RunError, TechniqueError
from featherweight.graph import cost, io
from featherweight.quantities import format_bytes
from featherweight.runtime import evaluate as ev
from featherweight.runtime import significance
from featherweight.runtime.metrics import Metric
from featherweight.search.baseline import LATENCY_FEEDS, QUICK_LATENCY_S, Baseline
from featherweight.search.candidates import build_numeric
from featherweight.search.problem import Problem, first_feeds
from featherweight.search.stage import Staged, numeric_part, stage_key, structure_part
from featherweight.techniques import Context

PROOF_LATENCY_S = 10.0


def measure_plan(problem: Problem, known: Baseline, ctx: Context, plan: Plan) -> Attempt:
    """Build, save, reload and measure one plan on validation data; a failure is an attempt with its cause.

    A plan measured before (in an interrupted run) is read from the journal.
    """
    plan = dataclasses.replace(plan, model_sha256=problem.model_sha256)
    before = problem.journal.find(plan)
    if before is not None:
        return dataclasses.replace(before, plan=plan)
    started = time.monotonic()
    index = len(problem.journal.attempts()) + 1
    problem.progress.start(f"candidate {index}", problem.splits.validation.n_batches)
    problem.progress.trying(summary(plan))
    measured: Measurement | None = None
    error = ""
    path = problem.work / "candidate.onnx"
    try:
        build_and_save(problem, ctx, plan, path)
        measured = measure_file(problem, known, path)
    except (RunError, TechniqueError) as e:
        error = str(e)
    attempt = Attempt(index, plan, measured, error, time.monotonic() - started)
    problem.journal.record(attempt)
    return attempt


def announce(problem: Problem, best: Attempt) -> None:
    """Show the best candidate so far."""
    m = best.measured
    if m is not None:
        problem.progress.best(f"{format_bytes(m.size_bytes)}, {m.metric_name} {m.metric:.4g}")


def build_and_save(problem: Problem, ctx: Context, plan: Plan, path: Path) -> None:
    """Apply the plan to the normalised model and save it; with structure in it, to the model after that stage.

    `ctx` is of the model that the numeric part goes on.
    """
    found = stage_of(problem, plan)
    if found is None:
        io.save(build_numeric(problem.model, plan, ctx, problem.techniques), path)
        return
    numeric = numeric_part(plan, problem.techniques, found.left)
    io.save(build_numeric(found.model, numeric, ctx, problem.techniques), path)


def stage_of(problem: Problem, plan: Plan) -> Staged | None:
    """The structure that a plan stands on, made before; None for a plan without structure."""
    structure = structure_part(plan, problem.techniques)
    return problem.stages.get(stage_key(problem.model_sha256, structure, problem.request.seed)) if structure else None


def measure_file(problem: Problem, known: Baseline, path: Path) -> Measurement:
    """One candidate on validation data; latency and memory only where the budget speaks of them."""
    evaluation = _on_validation(problem, known, path)
    b = problem.budget
    costs: dict[str, Any] = {}
    feeds = first_feeds(problem.splits.validation, LATENCY_FEEDS)
    if b.max_latency_ms is not None or b.max_latency_ratio is not None or b.minimize == "latency":
        costs |= _latency(problem, path, feeds, QUICK_LATENCY_S)
    if b.max_peak_bytes is not None or b.minimize == "memory":
        costs["peak_bytes"] = problem.bench.memory(path, feeds[0]).peak_bytes
    return _measurement(problem, known, path, evaluation, known.validation, costs)


def drop_of(problem: Problem, known: Baseline, path: Path) -> float | None:
    """The likely drop of one file on validation data."""
    problem.progress.start("measuring a structure alone", problem.splits.validation.n_batches)
    return _measurement(problem, known, path, _on_validation(problem, known, path), known.validation, {}).judged_drop


def _on_validation(problem: Problem, known: Baseline, path: Path) -> ev.Evaluation:
    return problem.bench.evaluate(
        path,
        problem.splits.validation,
        known.metric,
        reference=problem.work / "reference",
        threads=problem.profile.threads,
        progress=lambda _done, _total: problem.progress.advance(),
    )


def _latency(problem: Problem, path: Path, feeds: list[dict[str, np.ndarray]], seconds: float) -> dict[str, Any]:
    found = problem.bench.latency(problem.runnable, path, feeds, threads=problem.request.threads, time_limit_s=seconds)
    return {
        "latency_ms": found.candidate_ms,
        "p95_ms": _p95(problem, found.candidate_p95_ms),
        "latency_ratio": found.ratio,
    }


def _p95(problem: Problem, ms: float) -> float | None:
    """A prediction has no tail."""
    return ms if problem.bench.latency_from == "measured" else None


def _measurement(
    problem: Problem, known: Baseline, path: Path, after: ev.Evaluation, before: ev.Evaluation, costs: dict[str, Any]
) -> Measurement:
    """Value, paired drop with its interval and p-value, size and the given costs."""
    metric = known.metric
    drop = significance.paired(metric, before, after, seed=problem.request.seed)
    return Measurement(
        size_bytes=io.size_bytes(path),
        metric_name=metric.name,
        metric=after.value,
        drop=drop.value,
        drop_interval=drop.interval,
        p_value=drop.p_value,
        n_samples=after.n_samples,
        macs=cost.costs(io.load(path), input_shapes=problem.shapes()).macs,
        runtime=problem.bench.runtime,
        host=problem.bench.host,
        latency_from=problem.bench.latency_from,
        changed=after.changed,
        likely_drop=_likely(metric, before, after, drop),
        seed=problem.request.seed,
        **costs,
    )


def _likely(metric: Metric, before: ev.Evaluation, after: ev.Evaluation, drop: significance.Drop) -> float | None:
    """The drop to expect on other data, where the metric is one that tells."""
    if metric.name == "spearman" and before.per_sample is not None and after.per_sample is not None:
        return significance.likely_correlation(drop, before.value, before.per_sample, after.per_sample)
    return significance.likely(drop, after.changed)


def summary(plan: Plan) -> str:
    """A plan in a few words: how many sites each technique got at which parameters."""
    counts: dict[str, int] = {}
    for decision in plan.decisions:
        counts[str(decision)] = counts.get(str(decision), 0) + 1
    words = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{n} x {what}" for what, n in words[:4]) + (", ..." if len(words) > 4 else "")


def on_holdout(
    problem: Problem, known: Baseline, path: Path
) -> tuple[Measurement, Measurement, significance.Drop | None]:
    """Original and candidate on the holdout, in full: metric, paired drop, latency, memory, load time."""
    metric = known.metric
    data = problem.splits.holdout
    problem.progress.start("verifying on unseen data", 2 * data.n_batches)
    folder = problem.work / "reference-holdout"

    def scored(model: Path, **kw: Any) -> ev.Evaluation:
        return problem.bench.evaluate(
            model, data, metric, threads=problem.profile.threads,
            progress=lambda _done, _total: problem.progress.advance(), **kw,
        )  # fmt: skip

    before = scored(problem.runnable, record_to=folder)
    after = scored(path, reference=folder)
    feeds = first_feeds(data, LATENCY_FEEDS)
    how = "measuring" if problem.bench.latency_from == "measured" else "predicting"
    problem.progress.start(f"{how} latency, measuring memory")
    timing = problem.bench.latency(
        problem.runnable, path, feeds, threads=problem.request.threads, time_limit_s=PROOF_LATENCY_S
    )
    memory, before_memory = (problem.bench.memory(p, feeds[0]) for p in (path, problem.runnable))
    costs = {
        "latency_ms": timing.candidate_ms,
        "p95_ms": _p95(problem, timing.candidate_p95_ms),
        "latency_ratio": timing.ratio,
        "peak_bytes": memory.peak_bytes,
        "load_ms": memory.load_ms,
    }
    result = _measurement(problem, known, path, after, before, costs)
    value = metric.perfect if metric.perfect is not None else before.value
    original = dataclasses.replace(
        known.measurement,
        metric=value,
        n_samples=before.n_samples,
        latency_ms=timing.original_ms,
        p95_ms=_p95(problem, timing.original_p95_ms),
        peak_bytes=before_memory.peak_bytes,
        load_ms=before_memory.load_ms,
    )
    drop = None
    if result.drop is not None and result.drop_interval is not None:
        drop = significance.Drop(result.drop, result.drop_interval, "", result.p_value, n_samples=result.n_samples)
    return original, result, drop
