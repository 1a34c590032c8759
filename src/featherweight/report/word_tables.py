"""Reports about tables of word vectors: compressed, trained, compared."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from featherweight.core import Report
from featherweight.quantities import format_bytes, format_count, format_drop, format_percent
from featherweight.report.front import plot_parts
from featherweight.report.terminal import Column, Grid, heading, indented
from featherweight.report.text import attempt_parts, fact_parts, measured_parts, note_parts, outcome_parts, pairs
from featherweight.report.wording import decision_words, places_words

if TYPE_CHECKING:
    from featherweight.embeddings.comparing import Compared
    from featherweight.embeddings.distil import Distilled
    from featherweight.embeddings.train import Trained


def compressed_parts(report: Report, *, frontier: bool = False) -> list[RenderableType]:
    """A compressed table's report: outcome, numbers, what each run of columns became, attempts or the front."""
    if frontier:
        return [
            *outcome_parts(report, asked=False),
            *plot_parts(report),
            *_front_parts(report),
            *note_parts(report.notes),
        ]
    return [
        *outcome_parts(report),
        *measured_parts(report.baseline, report.result, report.budget, samples="item"),
        *_plan_parts(report),
        *note_parts(report.notes),
        *attempt_parts(report.attempts, report.budget),
        *fact_parts(report),
    ]


def _plan_parts(report: Report) -> list[RenderableType]:
    """Runs of columns by what was done to them."""
    if not report.plan.decisions:
        return []
    groups: dict[str, list[str]] = {}
    for decision in report.plan.decisions:
        groups.setdefault(decision_words(str(decision)), []).append(decision.site)
    made = Grid([Column("what", cut="end"), Column("where", cut="middle", least=20)])
    for words, sites in groups.items():
        made.add(words, places_words(sites, most=3))
    return [heading("Decided"), indented(made)]


def _front_parts(report: Report) -> list[RenderableType]:
    made = Grid([Column(n, "right") for n in ("size", "times smaller", report.result.metric_name, "drop")])
    for a in report.front:
        if a.measured is not None:
            m = a.measured
            times = f"{report.baseline.size_bytes / m.size_bytes:.1f}x"
            made.add(format_bytes(m.size_bytes), times, f"{m.metric or 0:.4f}", format_drop(m.drop, m.metric_name))
    base = f"the float32 table has {format_bytes(report.baseline.size_bytes)}"
    return [heading("Front", base), indented(made)]


def trained_parts(found: Trained, dim: int, written: Sequence[Path]) -> list[RenderableType]:
    """What was learnt, how fast, and how the loss fell."""
    rows = {
        "words": f"{len(found.words)} of {dim} numbers each",
        "corpus": f"{format_count(found.corpus_words)} words",
        "speed": f"{found.words_per_s:,.0f} words/s",
    }
    if found.resumed_at:
        rows["resumed"] = f"after epoch {found.resumed_at}"
    parts: list[RenderableType] = [Text("TRAINED", style="bold green"), pairs(rows)]
    if found.loss:
        made = Grid([Column("epoch", "right"), Column("loss a word", "right")])
        for epoch, loss in enumerate(found.loss, 1):
            made.add(str(epoch), f"{loss:.4f}")
        parts += [heading("Loss"), indented(made)]
    return [*parts, Text.assemble("\nwritten to ", (", ".join(map(str, written)), "bold"))]


def comparison_parts(rows: Sequence[Compared], one: str, other: str | None) -> list[RenderableType]:
    """Scores side by side."""
    columns = [Column("score", cut="end"), Column(one, "right", cut="middle", least=8)]
    columns += [] if other is None else [Column(other, "right", cut="middle", least=8), Column("change", "right")]
    made = Grid([*columns, Column("items", "right"), Column("left out", "right", optional=1)])
    for r in rows:
        cells = [r.name, _number(r.value)]
        if other is not None:
            cells += [_number(r.other), "" if r.other is None else _number(r.other - r.value, "+")]
        made.add(*cells, str(r.n), str(r.left_out))
    return [made]


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None or math.isnan(value) else f"{value:{sign}.4f}"


def distilled_parts(found: Distilled, out: Path) -> list[RenderableType]:
    """Size of the table and what its axes hold."""
    rows, columns = found.vectors.shape
    facts = {
        "table": f"{rows} tokens of {columns} numbers, {format_bytes(found.vectors.nbytes)}",
        "variance": f"{format_percent(found.kept)} kept",
        "zero rows": str(int((~found.vectors.any(axis=1)).sum())),
    }
    return [Text("DISTILLED", style="bold green"), pairs(facts), Text.assemble("\nwritten to ", (str(out), "bold"))]
