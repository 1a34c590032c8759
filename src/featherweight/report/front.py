"""The measured front in the terminal: a plot of size against drop and a table."""

from __future__ import annotations

from rich.console import RenderableType
from rich.text import Text

from featherweight.core import Report
from featherweight.quantities import format_bytes, format_drop, format_ms, format_percent, format_times
from featherweight.report import wording
from featherweight.report.svg import Axis, Point, points
from featherweight.report.terminal import Column, Grid, heading, indented
from featherweight.report.text import fact_parts, note_parts, outcome_parts

PLOT_WIDTH, PLOT_HEIGHT = 56, 14
MARKS = {
    "attempt": ("·", "dim"),
    "front": ("o", "bold cyan"),
    "front, structure changed": ("s", "bold magenta"),
    "original": ("#", "bold"),
    "result": ("*", "bold green"),
}


def front_parts(report: Report) -> list[RenderableType]:
    """Outcome, plot, table, notes."""
    parts: list[RenderableType] = [*outcome_parts(report, asked=False), *plot_parts(report)]
    if report.front:
        parts += [
            heading("Front", "measured; no other attempt is better in all of these"),
            indented(front_table(report)),
        ]
    return [*parts, *note_parts(report.notes), *fact_parts(report)]


def front_table(report: Report) -> Grid:
    """One row a point, smallest first."""
    predicted = any(a.measured is not None and a.measured.latency_from != "measured" for a in report.front)
    latency = "latency, predicted" if predicted else "latency"
    names = ("#", "size", "of original", "drop", "95%", latency, "faster")
    columns = [Column(name, "right", optional=2 if name == "95%" else 0) for name in names]
    made = Grid([*columns, Column("techniques", cut="end", optional=1)])
    for a in sorted(report.front, key=lambda a: a.measured.size_bytes if a.measured else 0):
        m = a.measured
        if m is None:
            continue
        of_original = format_percent(m.size_bytes / report.baseline.size_bytes)
        faster = format_times(1 / m.latency_ratio) if m.latency_ratio else "-"
        interval = wording.interval_words(m).partition(": ")[2]
        drop = format_drop(m.drop, m.metric_name)
        cells = (str(a.index), format_bytes(m.size_bytes), of_original, drop, interval, format_ms(m.latency_ms), faster)
        made.add(*cells, wording.technique_words(a.plan))
    return made


def plot_parts(report: Report) -> list[RenderableType]:
    """Size against drop in characters; nothing if only the original has a place."""
    dots = points(report)
    if len(dots) < 2:
        return []
    name = report.result.metric_name or report.baseline.metric_name
    worst, best = max(p.y for p in dots), min(p.y for p in dots)
    x = Axis(0, max(p.x for p in dots), 0, PLOT_WIDTH - 1)
    y = Axis(best, worst if worst > best else best + 0.01, PLOT_HEIGHT - 1, 0)
    rows = _grid(x, y, dots)
    labels = {0: format_drop(y.high, name), PLOT_HEIGHT - 1: format_drop(y.low, name)}
    wide = max(len(label) for label in labels.values())
    lines = [Text.assemble((f"{labels.get(i, ''):>{wide}} |", "dim"), row) for i, row in enumerate(rows)]
    right = format_bytes(x.high)
    lines.append(Text(f"{' ' * wide} +{'-' * PLOT_WIDTH}", style="dim"))
    lines.append(Text(f"{' ' * wide}  0{right:>{PLOT_WIDTH - 1}}", style="dim"))
    legend = Text.assemble(" " * (wide + 2))
    for kind in ("original", "front", "front, structure changed", "result", "attempt"):
        if any(_mark(p) == kind for p in dots):
            mark, style = MARKS[kind]
            legend.append_text(Text.assemble((mark, style), f" {kind}   "))
    return [heading("Size against drop", "left and down is better"), *(indented(line) for line in [*lines, legend])]


def _grid(x: Axis, y: Axis, dots: list[Point]) -> list[Text]:
    """The plot's rows; later kinds of MARKS cover earlier ones."""
    cells = [[(" ", "")] * PLOT_WIDTH for _ in range(PLOT_HEIGHT)]
    order = list(MARKS)
    for p in sorted(dots, key=lambda p: order.index(_mark(p))):
        cells[round(y.at(p.y))][round(x.at(p.x))] = MARKS[_mark(p)]
    return [Text.assemble(*row) for row in cells]


def _mark(p: Point) -> str:
    """Which of MARKS a point has."""
    return "front, structure changed" if p.kind == "front" and p.square else p.kind
