"""From what was found to a Report: verified on the holdout, written whole, with one outcome word."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from featherweight.core import Answer, Budget, Measurement, Plan, Report
from featherweight.graph import io
from featherweight.quantities import format_bytes, format_count, format_drop, format_ms, format_percent
from featherweight.runtime import significance
from featherweight.search import front, layers, loop, replay
from featherweight.search.baseline import Baseline
from featherweight.search.measured import build_and_save, on_holdout
from featherweight.search.passes import Found
from featherweight.search.prepare import context
from featherweight.search.problem import STAGES_FOLDER, Problem, emptied
from featherweight.search.request import DEFAULT_MAX_DROP

# What the original must be beaten by, in latency or in bytes, before it is given up: two runs of one file differ by
# some percent in latency, and tidying a graph alone saves about as much of a small file.
CLEARLY = 0.05


def finish(problem: Problem, known: Baseline, found: Found, *, save_anyway: bool) -> Report:
    """Build the best candidate (or the nearest), verify it on the holdout, write model and plan, report."""
    chosen = found.best or loop.nearest(problem.budget, found.attempts)
    if not found.attempts and not problem.budget.violations(known.measurement):
        return _nothing_pays(problem, known, found)
    if chosen is None or chosen.measured is None:
        errors = "; ".join(a.error for a in found.attempts if a.error)
        reason = f"no candidate could be measured: {errors or found.stop_reason}"
        return _untouched(problem, known, "not found", "not met", reason, found)
    path = problem.work / "candidate.onnx"
    ctx = found.ground_of(problem, chosen.plan).ctx
    if found.taught is not None and chosen is found.taught[0]:
        io.save(io.load(found.taught[1]), path)
    else:
        build_and_save(problem, ctx, chosen.plan, path)
    if io.size_bytes(path) >= problem.original_bytes and not _may_grow(problem, known):
        return _nothing_pays(problem, known, found)
    if found.interrupted:
        original, result, drop = known.measurement, chosen.measured, None
        problem.note("holdout", "stopped before the result was verified on unseen data; figures are of validation data")
    else:
        original, result, drop = on_holdout(problem, known, path)
    if not found.interrupted and not _pays(problem, known, chosen.plan, result):
        return _nothing_pays(problem, known, found)
    broken = problem.budget.violations(result)
    _say_what_is_uncertain(problem, drop)
    answer: Answer = "not found" if broken else "yes"
    outcome, reason = _outcome(found, _misses(problem.budget, result))
    plan = replay.sealed(problem, ctx, replace(chosen.plan, bound_bytes=found.bound_bytes))
    # Who set no limit gets the 8-bit model even where it loses more than the default: the report says by how much.
    if answer == "yes" or save_anyway or problem.request.goal == "plain-int8":
        replay.write(problem, plan, path)
    return _report(problem, answer, outcome, reason, plan, original, result, found)


def _may_grow(problem: Problem, known: Baseline) -> bool:
    """True where a node more may stand for fewer operations: to meet a limit the original breaks, or as was asked."""
    return bool(problem.budget.violations(known.measurement)) or problem.request.minimize in ("latency", "memory")


def _pays(problem: Problem, known: Baseline, plan: Plan, result: Measurement) -> bool:
    """False if the original is within the limits too and is about as good, so that it is better left alone."""
    if problem.budget.violations(known.measurement):
        return True
    if problem.request.minimize == "latency":
        return result.latency_ratio is None or result.latency_ratio < 1 - CLEARLY
    before, after = known.measurement.peak_bytes, result.peak_bytes
    if problem.request.minimize == "memory" and before is not None and after is not None:
        return after < (1 - CLEARLY) * before
    if plan.changed() or problem.budget.minimize == "size":
        return True
    return result.size_bytes <= (1 - CLEARLY) * problem.original_bytes


def _misses(budget: Budget, m: Measurement) -> list[str]:
    """What a measured result breaks, for people: the value found and the limit, rounded alike."""
    name = m.metric_name
    checks: tuple[tuple[str, float | None, float | None, Callable[[float], str]], ...] = (
        ("size", m.size_bytes, budget.max_size_bytes, format_bytes),
        ("latency", m.latency_ms, budget.max_latency_ms, format_ms),
        ("latency", m.latency_ratio, budget.max_latency_ratio, lambda r: f"{format_percent(r)} of the original's"),
        ("peak memory", m.peak_bytes, budget.max_peak_bytes, format_bytes),
        ("drop", m.drop, budget.max_drop, lambda d: format_drop(d, name)),
        ("count of MACs", m.macs, budget.max_macs, format_count),
    )
    return [
        f"{what} is {'not measured' if value is None else words(value)}, the limit {words(limit)}"
        for what, value, limit, words in checks
        if limit is not None and (value is None or value > limit)
    ]


def _outcome(found: Found, broken: list[str]) -> tuple[str, str]:
    if not broken:
        aside = (
            "" if found.best is not None else " (on validation data it was over one, or likely to be, so be careful)"
        )
        return "met", f"every limit holds on unseen data{aside}; {found.stop_reason}"
    if found.best is not None:
        return "not met", f"within the limits on validation data, but on unseen data the {'; the '.join(broken)}"
    tried = f"{len(found.attempts)} candidate{'' if len(found.attempts) == 1 else 's'}"
    return "not met", f"not found within {tried} ({found.stop_reason}); of the nearest, the {'; the '.join(broken)}"


def _say_what_is_uncertain(problem: Problem, drop: significance.Drop | None) -> None:
    limit = problem.budget.max_drop
    if drop is None or limit is None or drop.verdict(limit) != "undecided":
        return
    needed = significance.samples_needed(drop, limit)
    more = f"about {float(f'{needed:.2g}'):,.0f} would settle it" if needed else "more are needed"
    problem.note("holdout", f"{drop.n_samples} unseen samples leave open whether the drop is within its limit; {more}")


def finish_untouched(problem: Problem, known: Baseline) -> Report:
    """The original is already within the budget: it is the answer, byte for byte."""
    return _untouched(
        problem, known, "yes", "already fits", "the original is already within every limit; it is kept as it is", None
    )


def _nothing_pays(problem: Problem, known: Baseline, found: Found) -> Report:
    m = known.measurement
    met = not problem.budget.violations(m)
    reason = "nothing pays: no plan makes this model smaller or faster within the limits; the original is kept"
    return _untouched(problem, known, "yes" if met else "not found", "nothing pays", reason, found)


def finish_refused(problem: Problem, known: Baseline, refusal: str) -> Report:
    """A bound proves that no plan meets the limits."""
    return _untouched(problem, known, "no, proved", "proved impossible", refusal, None)


def _untouched(
    problem: Problem, known: Baseline, answer: Answer, outcome: str, reason: str, found: Found | None
) -> Report:
    """A report about the original itself; its file is copied where the answer is yes."""
    m = known.measurement
    plan = replay.sealed(problem, found.ground.ctx if found else context(problem, None), Plan(()))
    if answer == "yes":
        replay.write_original(problem, plan)
    return _report(problem, answer, outcome, reason, plan, m, m, found)


def _report(
    problem: Problem,
    answer: Answer,
    outcome: str,
    reason: str,
    plan: Plan,
    original: Measurement,
    result: Measurement,
    found: Found | None,
) -> Report:
    attempts = tuple(found.attempts) if found else ()
    notes = [
        *problem.notes,
        *(found.ground.ctx.notes if found else ()),
        *(found.ground.effects.refused if found else ()),
    ]
    problem.progress.start("writing the report")
    problem.facts["phase_seconds"] = {k: round(v, 2) for k, v in problem.progress.seconds.items()}
    problem.facts["seconds"] = round(time.monotonic() - problem.started, 1)
    problem.facts["model"] = problem.original.name
    problem.facts["asked"] = {"goal": problem.request.goal, "max_drop": problem.request.max_drop is not None}
    problem.facts["target"] = problem.profile.name
    problem.facts["structure_techniques"] = sorted(problem.of_stage(structure=True))
    facts = {k: v for k, v in problem.facts.items() if k not in ("macs", "input_shapes")}
    report = Report(
        problem.budget, answer, outcome, reason, plan, original, result, attempts, loop.pareto(list(attempts)),
        tuple(dict.fromkeys(notes)), layers.rows(problem, plan, found), facts,
    )  # fmt: skip
    emptied(problem.work, keep=STAGES_FOLDER if found is not None and found.interrupted else "")
    return report


def finish_front(problem: Problem, known: Baseline, found: Found) -> Report:
    """A report of the measured front; the budget's answer is yes if any point was measured."""
    points = loop.pareto(found.attempts)
    limit = DEFAULT_MAX_DROP if problem.budget.max_drop is None else problem.budget.max_drop
    best = front.headline(points, limit)
    m = known.measurement
    result = best.measured if best and best.measured else m
    words = f"the smallest that loses at most {format_drop(limit, m.metric_name)}"
    if result.judged_drop is not None and result.judged_drop > limit:
        words = "the one that loses least"
    reason = f"{len(points)} of {len(found.attempts)} measured candidates are on the front; {words} is named above"
    answer: Answer = "yes" if points else "not found"
    return _report(problem, answer, "front", reason, best.plan if best else Plan(()), m, result, found)
