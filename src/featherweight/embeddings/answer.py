"""Both problems of a table: is there one within the budget, and which is best. Answered in the words of any report."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any

from featherweight.core import Answer, Attempt, Measurement, Note, Plan, Report
from featherweight.embeddings.compressed import Compressed
from featherweight.embeddings.compressing import Search, drop_of, size_of
from featherweight.errors import BudgetError


@dataclass(frozen=True, eq=False)
class Result:
    """What was asked and measured, the table that came out (None if there is none), and its words."""

    report: Report
    table: Compressed | None
    words: list[str]


def compress(search: Search) -> Result:
    """Answer the search's budget: with `max_size_bytes` the nearest table of that size, with `max_drop` alone the
    smallest one. The report says yes, no (with the bound that proves it) or not found. Raises BudgetError without
    either limit.
    """
    budget, started = search.budget, time.monotonic()
    if budget.max_size_bytes is not None:
        best = search.at_size(budget.max_size_bytes)
    elif budget.max_drop is not None:
        best = search.smallest(budget.max_drop)
    else:
        raise BudgetError("compressing a table needs a limit: give --max-size or --max-drop (or --frontier)")
    return _result(search, best, time.monotonic() - started)


def frontier(search: Search, points: int) -> Result:
    """Measure `points` sizes. The report's front are the attempts that no other beats; its result is the nearest."""
    started = time.monotonic()
    tried = search.front(points)
    best = min(tried, key=drop_of, default=None)
    result = _result(search, best, time.monotonic() - started)
    return replace(result, report=replace(result.report, outcome="front", reason=f"{len(tried)} sizes were measured"))


def _result(search: Search, best: Attempt | None, seconds: float) -> Result:
    if best is None or best.measured is None:
        return Result(_refused(search, seconds), None, search.found.words)
    over = search.budget.violations(best.measured)
    reason = over[0] if over else "every limit holds, measured on the table that is saved"
    answer: Answer = "not found" if over else "yes"
    report = _report(search, seconds, answer, "not met" if over else "met", reason, best.plan, best.measured)
    return Result(report, search.built[best.index], search.found.words)


def _refused(search: Search, seconds: float) -> Report:
    """No candidate at all: proved for a size, as the words and the smallest codes take more."""
    limit = search.budget.max_size_bytes
    if limit is None:
        reason = f"no table of at most a quarter of the size keeps the drop within {search.budget.max_drop}"
        return _report(search, seconds, "not found", "not met", reason, Plan(()), search.baseline)
    least = search.least()
    reason = f"size: no plan reaches {limit} B; the words and the smallest codes take {least} B"
    return _report(
        search, seconds, "no, proved", "proved impossible", reason, Plan((), bound_bytes=least), search.baseline
    )


def _report(
    search: Search, seconds: float, answer: Answer, outcome: str, reason: str, plan: Plan, result: Measurement
) -> Report:
    found, source = search.found, search.source
    facts: dict[str, Any] = {
        "model": source.where, "format": source.kind, "words": found.rows, "columns": found.dim,
        "zero_rows": found.n_zero, "seconds": seconds,
    }  # fmt: skip
    notes = [
        Note(source.bad.first[cause], f"{count} rows left out: {cause}") for cause, count in source.bad.counts.items()
    ]
    if not source.named:
        notes.append(Note(source.where, "no list of words beside it, so words are row numbers; give --vocabulary"))
    return Report(
        budget=search.budget, answer=answer, outcome=outcome, reason=reason, plan=plan, baseline=search.baseline,
        result=result, attempts=tuple(search.attempts), front=front(search.attempts), notes=tuple(notes), facts=facts,
    )  # fmt: skip


def front(attempts: list[Attempt]) -> tuple[Attempt, ...]:
    """Attempts that no other beats in both size and drop, smallest first."""
    kept: list[Attempt] = []
    for attempt in sorted(attempts, key=lambda a: (size_of(a), drop_of(a))):
        if not kept or drop_of(attempt) < drop_of(kept[-1]):
            kept.append(attempt)
    return tuple(kept)
