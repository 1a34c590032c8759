"""A Report in the terminal: outcome, original against result, layers, what was left alone, attempts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from featherweight.core import Attempt, Budget, Measurement, Note, Report
from featherweight.quantities import (
    format_bytes,
    format_count,
    format_drop,
    format_duration,
    format_ms,
    format_percent,
)
from featherweight.report import layers as layer_rows
from featherweight.report import wording
from featherweight.report.terminal import Column, Grid, bullets, heading, indented, lines, to_text

MOST_ATTEMPTS = 8
MOST_REASONS = 8
MOST_GROUPS = 12
NAMES = ("original", "result")
ANSWER_STYLES = {"yes": "bold green", "no, proved": "bold red", "not found": "bold yellow"}


def render(report: Report, *, width: int = 80, all_layers: bool = False) -> str:
    """The whole report as plain text of `width` columns."""
    return to_text(report_parts(report, all_layers=all_layers), width=width)


def report_parts(report: Report, *, all_layers: bool = False) -> list[RenderableType]:
    """The sections of a report, in reading order."""
    return [
        *outcome_parts(report),
        *measured_parts(report.baseline, report.result, report.budget, samples=wording.samples_word(report)),
        *layer_parts(report, everything=all_layers),
        *group_parts(report, everything=all_layers),
        *note_parts(report.notes, everything=all_layers),
        *attempt_parts(report.attempts, report.budget, everything=all_layers),
        *fact_parts(report),
    ]


def outcome_parts(report: Report, *, asked: bool = True) -> list[RenderableType]:
    """The outcome word, what was gained, the sentence behind it, and what was asked."""
    style = ANSWER_STYLES.get(report.answer, "bold")
    first = Text(wording.outcome_word(report), style=style)
    if report.result != report.baseline:
        first.append_text(Text("  ").append(wording.headline(report.baseline, report.result), style="bold"))
    words = f"asked: {wording.asked_words(report)}"
    reason = lines([report.reason]) if report.reason else []
    return [first, *reason, *(lines([words], "dim") if asked else [])]


def measured_parts(
    original: Measurement,
    result: Measurement,
    budget: Budget | None = None,
    *,
    names: tuple[str, str] = NAMES,
    samples: str = "unseen sample",
) -> list[RenderableType]:
    """Original and result side by side, with limits where there are any, and how sure the drop is.

    Where the result is the original there is one column of numbers. `samples`: what the drop was measured on, in the
    singular.
    """
    rows = wording.comparison_rows(original, result, budget)
    alone, limited = result == original, any(row.limit for row in rows)
    columns = [Column(""), Column(names[0], "right")]
    if not alone:
        columns += [Column(names[1], "right"), Column(f"{names[1]} / {names[0]}", cut="end")]
    made = Grid([*columns, Column("at most", "right"), Column("")] if limited else columns)
    for row in rows:
        cells: list[str | Text] = [row.what, row.result if alone else row.original]
        cells += [] if alone else [Text(row.result, style="bold"), row.change]
        cells += [row.limit, verdict(row.ok)] if limited else []
        made.add(*cells)
    evidence = wording.evidence_words(result, samples)
    parts: list[RenderableType] = [heading("Measured", "on the saved files"), indented(made)]
    return parts + (lines([evidence]) if evidence else [])


def verdict(ok: bool | None) -> Text:
    """'ok', 'OVER' or nothing."""
    return Text("" if ok is None else "ok" if ok else "OVER", style="green" if ok else "bold red")


def layer_parts(report: Report, *, everything: bool) -> list[RenderableType]:
    """What was decided: by decision, then by layer with a total."""
    all_layers = layer_rows.read_layers(report.layers)
    if not all_layers:
        return []
    shown = layer_rows.chosen(all_layers, everything=everything)
    hidden = len(all_layers) - sum(1 for layer in shown if layer.count == 1)
    detail = f"{len(all_layers)} layers" + (
        f", the largest {len(all_layers) - hidden} one by one; --all-layers for all" if hidden else ""
    )
    parts: list[RenderableType] = [heading("Decided per layer", detail)]
    if hidden:
        parts += [indented(decision_table(layer_rows.by_decision(all_layers))), Text("")]
    total = layer_rows.summed(all_layers, "total")
    reasons = wording.note_groups(Note(layer.name, layer.why) for layer in shown if layer.why and layer.count == 1)
    words = [Text(f"{wording.places_words(g.places)}: {g.text}", style="dim") for g in reasons[:MOST_REASONS]]
    return [*parts, indented(layer_table(shown, total)), *([bullets(words)] if words else [])]


def group_parts(report: Report, *, everything: bool) -> list[RenderableType]:
    """What was changed in the whole model, and channels that were removed, by group; nothing if none were."""
    whole = layer_rows.read_whole(report.layers)
    parts: list[RenderableType] = []
    if whole:
        parts = [heading("The whole model"), *lines([f"{what}: {decision}" for what, decision in whole])]
    groups = layer_rows.read_groups(report.layers)
    if not groups:
        return parts
    shown = groups if everything else groups[:MOST_GROUPS]
    rest = "" if len(shown) == len(groups) else f", the first {len(shown)}; --all-layers for all"
    made = Grid([Column("channels of", cut="middle", least=28), Column("before", "right"), Column("after", "right")])
    for group in shown:
        made.add(group.name.removeprefix("channels of "), str(group.channels), str(group.after))
    detail = f"in {len(groups)} group{'s' if len(groups) > 1 else ''} that go together{rest}"
    return [*parts, heading("Channels removed", detail), indented(made)]


def decision_table(groups: Sequence[layer_rows.Layer]) -> Grid:
    """One row a decision."""
    numbers = [Column(name, "right") for name in ("layers", "before", "after", "MACs")]
    made = Grid([Column("decision", cut="end"), *numbers])
    for g in groups:
        cells = (g.name, str(g.count), format_bytes(g.before_bytes), format_bytes(g.after_bytes))
        made.add(*cells, _macs(g.macs))
    return made


def layer_table(shown: Sequence[layer_rows.Layer], total: layer_rows.Layer) -> Grid:
    """One row a layer and a total; narrow terminals go without shape, operator and MACs."""
    costs = bool(total.float_cost_ms)
    kinds = any(layer.int8 is not None for layer in shown)
    columns = [
        Column("layer", cut="middle", least=28),
        Column("op", optional=3),
        Column("shape", optional=4),
        Column("decision", cut="end", least=16),
        Column("before", "right"),
        Column("after", "right"),
        Column("MACs", "right", optional=2),
    ]
    made = Grid(
        [
            *columns,
            *([Column("runs in", optional=1)] if kinds else []),
            *([Column("float cost", "right")] if costs else []),
        ]
    )
    for layer in [*shown, total]:
        bold = "bold" if layer is total else "dim" if layer.count > 1 else ""
        cells = [layer.name, layer.op, layer.shape, "" if layer is total else layer.decision]
        cells += [format_bytes(layer.before_bytes), format_bytes(layer.after_bytes), _macs(layer.macs)]
        cells += [layer_rows.runs_as(layer)] if kinds else []
        cells += [format_ms(layer.float_cost_ms) if layer.float_cost_ms else ""] if costs else []
        if layer is total:
            made.rule()
        made.add(*cells, style=bold)
    return made


def _macs(macs: int) -> str:
    return format_count(macs) if macs else "-"


def note_parts(notes: Sequence[Note], *, everything: bool = False) -> list[RenderableType]:
    """What was left alone or assumed, and why; equal reasons together."""
    groups = wording.note_groups(notes)
    if not groups:
        return []
    texts = []
    for group in groups:
        places = wording.places_words(group.places, most=len(group.places) if everything else 4)
        texts.append(Text.assemble(group.text, (f"  ({places})" if places else "", "dim")))
    return [heading("Left alone, and notes"), bullets(texts)]


def attempt_parts(attempts: Sequence[Attempt], budget: Budget, *, everything: bool = False) -> list[RenderableType]:
    """The candidates really built and measured, the last ones of many."""
    if not attempts:
        return []
    shown = attempts if everything else attempts[-MOST_ATTEMPTS:]
    last = f", the last {len(shown)}" if len(shown) < len(attempts) else ""
    detail = f"{len(attempts)} built and measured on validation data{last}"
    errors = wording.note_groups(Note(f"attempt {a.index}", a.error) for a in attempts if a.error)
    failed = [Text.assemble((wording.places_words(g.places), "red"), f": {g.text}") for g in errors]
    parts: list[RenderableType] = [heading("Attempts", detail), indented(attempt_table(shown, budget))]
    return [*parts, bullets(failed)] if failed else parts


def attempt_table(attempts: Sequence[Attempt], budget: Budget) -> Grid:
    """One row an attempt; latency is result over original."""
    columns = [Column(name, "right") for name in ("#", "size", "drop", "latency")]
    made = Grid(
        [*columns, Column("took", "right", optional=2), Column("", cut="end"), Column("plan", cut="end", optional=1)]
    )
    for a in attempts:
        words, fine = wording.attempt_words(a, budget)
        m = a.measured
        size, drop, latency = "-", "-", "-"
        if m is not None:
            size, latency = format_bytes(m.size_bytes), format_percent(m.latency_ratio, 0)
            drop = format_drop(m.drop, m.metric_name)
        result = Text(words, style="green" if fine else "red" if m is None else "")
        took = format_duration(a.seconds)
        made.add(str(a.index), size, drop, latency, took, result, wording.plan_words(a.plan))
    return made


def fact_parts(report: Report) -> list[RenderableType]:
    """How it was measured: runtime, host, seed and the plain facts."""
    m = report.result
    rows = [
        ("runtime", wording.runtime_words(m)),
        ("host", m.host),
        ("seed", str(m.seed)),
        *wording.fact_rows(report.facts),
    ]
    if report.plan.bound_bytes is not None:
        rows.append(("no plan can be smaller than", format_bytes(report.plan.bound_bytes)))
    if report.plan.gap is not None:
        rows.append(("plan within", f"{format_percent(report.plan.gap)} of the best predicted"))
    return [heading("How"), pairs(dict(r for r in rows if r[1]))]


def pairs(rows: Mapping[str, str]) -> RenderableType:
    """Names and values, aligned; values wrap."""
    made = Table.grid(padding=(0, 2, 0, 0))
    made.add_column(style="dim", no_wrap=True)
    made.add_column()
    for key, value in rows.items():
        made.add_row(key, Text(value))
    return indented(made)
