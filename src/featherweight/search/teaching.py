"""A stage after the search: the original teaches a candidate that misses the limit on the drop by little, or the best.

Time is spent where it may change the answer: on the candidate that would be the best but for its drop; where the drop
has no limit, on the best. What comes out is measured like any other candidate, and its cost is told.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from featherweight import data as fwdata
from featherweight.core import Attempt, Budget, Measurement
from featherweight.data.feeds import is_function_name
from featherweight.errors import FeatherweightError
from featherweight.graph import io
from featherweight.quantities import format_drop, format_duration
from featherweight.search import loop
from featherweight.search.baseline import Baseline
from featherweight.search.measured import build_and_save, measure_file
from featherweight.search.passes import Found
from featherweight.search.problem import DEFAULT_TEACHING_S, Problem, input_specs, open_sources
from featherweight.search.replay import TAUGHT
from featherweight.search.request import most_calibration

#: A drop is missed by little up to the limit and this many times it more, or up to so many units of the metric more.
NEAR_TIMES, NEAR = 2.0, 0.02
#: A candidate is worth teaching if it is this much cheaper than the best that needs no teaching.
CHEAPER = 0.98
FOLDER = "distill"
#: Teach (problem, student, data, run folder, seconds): the file of the taught student, True if it was interrupted.
Teach = Callable[[Problem, Path, fwdata.Splits, Path, float], tuple[Path, bool]]


def teachable(limit: float) -> float:
    """The largest drop that teaching may bring within the limit."""
    return limit + max(NEAR_TIMES * limit, NEAR)


def worth_teaching(budget: Budget, best: Attempt | None, attempts: list[Attempt]) -> Attempt | None:
    """The measured candidate that teaching could make the answer, or None."""
    free = dataclasses.replace(budget, max_drop=None)
    able = [a for a in attempts if a.measured is not None and not free.violations(a.measured)]
    limit = budget.max_drop
    if limit is None:
        return best or min(able, key=lambda a: a.judged_drop, default=None)
    near = [a for a in able if limit < a.judged_drop <= teachable(limit)]
    if best is not None and best.measured is not None:
        near = [a for a in near if _cost(budget, a) < CHEAPER * _cost(budget, best)]
    return min(near, key=lambda a: (_cost(budget, a), a.judged_drop), default=None)


def teach(problem: Problem, known: Baseline, found: Found, learn: Teach) -> None:
    """Teach one candidate, measure it on validation data, and make it the best if it is; `found` is changed."""
    chosen = worth_teaching(problem.budget, found.best, found.attempts)
    if chosen is None or found.interrupted:
        if not found.interrupted:
            problem.note("recover", "nothing was distilled: no candidate missed the limit on the drop by little")
        return
    started = time.monotonic()
    student = problem.work / "student.onnx"
    build_and_save(problem, found.ground_of(problem, chosen.plan).ctx, chosen.plan, student)
    limit = problem.request.time_budget_s
    left = DEFAULT_TEACHING_S if limit is None else max(limit - (time.monotonic() - problem.started), 1.0)
    try:
        taught, found.interrupted = learn(problem, student, unread_parts(problem), problem.work.parent / FOLDER, left)
        measured = measure_file(problem, known, taught)
    except FeatherweightError as e:
        problem.note("recover", f"distillation failed, so its candidate stays as it was: {e}")
        return
    seconds = time.monotonic() - started
    path = problem.work / "taught.onnx"
    io.save(io.load(taught), path)
    options = dict(chosen.plan.options) | {TAUGHT: io.sha256(path)}
    plan = dataclasses.replace(chosen.plan, options=tuple(sorted(options.items())))
    attempt = Attempt(len(found.attempts) + 1, plan, measured, seconds=seconds)
    found.attempts.append(attempt)
    before = chosen.measured.judged_drop if chosen.measured is not None else None
    likely = "" if measured.likely_drop is None else "likely "
    name = measured.metric_name
    problem.note(
        "recover",
        f"candidate {chosen.index} was taught by the original for {format_duration(seconds)}: its {likely}drop went "
        f"from {format_drop(before, name)} to {format_drop(measured.judged_drop, name)} on validation data",
    )
    if loop.within(problem.budget, measured, headroom=False) and _better(problem.budget, measured, found.best):
        found.best, found.taught = attempt, (attempt, path)


def unread_parts(problem: Problem) -> fwdata.Splits:
    """The search's own parts as they are in their source, for what reads them in a way of its own (augmented images).

    The holdout is left out: in its place stands the validation data. What the user's code gave is not asked for again:
    another time it may come in another order, and the holdout among it.
    """
    request = problem.request
    if not all(in_files(s) for s in (request.data, request.calibration) if s is not None):
        return fwdata.Splits(problem.splits.calibration, problem.splits.validation, problem.splits.validation)
    inputs = input_specs(problem.model)
    first, evaluation = open_sources(request, inputs)
    most = most_calibration(request, problem.techniques, inputs)
    parts = fwdata.split(first, seed=request.seed, max_calibration=most, evaluation=evaluation)
    return fwdata.Splits(parts.calibration, problem.splits.validation, problem.splits.validation)


def in_files(source: Any) -> bool:
    """True for data that reads the same each time: a file or a folder."""
    return isinstance(source, str | Path) and not is_function_name(str(source))


def _better(budget: Budget, measured: Measurement, best: Attempt | None) -> bool:
    if best is None or best.measured is None:
        return True
    if budget.minimize == "drop":
        return (measured.judged_drop or 0.0) < (best.measured.judged_drop or 0.0)
    return _of(budget, measured) < _of(budget, best.measured)


def _cost(budget: Budget, attempt: Attempt) -> float:
    return float("inf") if attempt.measured is None else _of(budget, attempt.measured)


def _of(budget: Budget, m: Measurement) -> float:
    """What the objective minimises; bytes where it was not measured or is the drop."""
    value = {"latency": m.latency_ratio, "memory": m.peak_bytes}.get(budget.minimize)
    return float(m.size_bytes if value is None else value)
