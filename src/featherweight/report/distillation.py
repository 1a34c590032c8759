"""A distillation in the terminal, as JSON and as one HTML page: what was lost, what came back, how it went."""

from __future__ import annotations

import html
import math
import string
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import RenderableType
from rich.text import Text

from featherweight.core import Measurement
from featherweight.quantities import (
    format_bytes,
    format_drop,
    format_duration,
    format_metric,
    format_ms,
    format_percent,
)
from featherweight.report.json import document, plain
from featherweight.report.svg import Axis
from featherweight.report.terminal import Column, Grid, heading, indented, lines
from featherweight.report.text import note_parts
from featherweight.whole import write_text

if TYPE_CHECKING:
    from featherweight.learn.result import Distilled, Point, Stage

WIDTH, HEIGHT = 760, 220
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 16, 30
MOST_BLOCKS = 12


def to_json(found: Distilled) -> str:
    """Text of report.json."""
    return document("distillation", {**plain(found), "recovered": found.recovered})


def write(found: Distilled, folder: Path) -> None:
    """report.json and report.html in the run folder, each whole or not at all. Raises OutputError."""
    write_text(to_json(found), folder / "report.json")
    write_text(render(found), folder / "report.html")


def headline(found: Distilled) -> str:
    """The result in one sentence."""
    name = found.after.metric_name
    change = f"{format_metric(found.before.metric, name)} -> {format_metric(found.after.metric, name)}"
    share = found.recovered
    if share is None:
        return f"{name} {change}; the student had lost nothing"
    lost = format_drop(found.before.drop, name)
    return (
        f"{name} {change}: {format_percent(share, 0)} of the {lost} lost came back in {format_duration(found.seconds)}"
    )


def parts(found: Distilled, *, everything: bool = False) -> list[RenderableType]:
    """Headline, the three models side by side, the stages, notes."""
    made: list[RenderableType] = [Text(headline(found), style="bold")]
    made += lines(
        [f"metric {found.after.metric_name}: {found.metric_reason}", *(f"loss of {x}" for x in found.losses)], "dim"
    )
    made += [heading("Measured on data kept aside", f"{found.after.n_samples} samples"), indented(_models(found))]
    gain = _gain_words(found)
    made += lines([gain], "dim")
    if found.stages:
        made += [heading("Stages"), indented(_stages(found))]
        blocks = [b for s in found.stages for b in s.blocks]
        if blocks:
            made += [
                heading("Blocks", "error of the answer relative to the teacher's"),
                indented(_blocks(blocks, everything)),
            ]
    peak = f"peak memory of training {format_bytes(found.peak_bytes)}"
    made += lines([f"{peak}; {found.facts.get('threads')} threads; augmentation {found.facts.get('augment')}"], "dim")
    return [*made, *note_parts(found.notes)]


def _gain_words(found: Distilled) -> str:
    name, ends = found.after.metric_name, found.gain_interval
    words = f"gained over the student as it was: {format_drop(found.gain, name)}"
    if ends is None:
        return words
    low, high = (format_drop(x, name, signed=True) for x in (ends.low, ends.high))
    return f"{words} ({format_percent(ends.level, 0)} interval {low} to {high})"


def _rows(found: Distilled) -> list[tuple[str, str, str, str, str, str]]:
    """Name, metric, drop, size, latency, peak of each model."""

    def row(name: str, m: Measurement) -> tuple[str, str, str, str, str, str]:
        drop = format_drop(m.drop, m.metric_name)
        return (
            name, format_metric(m.metric, m.metric_name), drop, format_bytes(m.size_bytes), format_ms(m.latency_ms),
            "-" if m.peak_bytes is None else format_bytes(m.peak_bytes),
        )  # fmt: skip

    stages = [row(f"after {s.name}" + ("" if s.kept else " (taken back)"), s.measured) for s in found.stages]
    return [row("teacher", found.teacher), row("student before", found.before), *stages, row("student", found.after)]


HEAD = ("", "metric", "drop", "size", "latency", "peak memory")


def _models(found: Distilled) -> Grid:
    grid = Grid([Column(HEAD[0]), *(Column(h, "right", optional=i if i > 2 else 0) for i, h in enumerate(HEAD[1:], 1))])
    for r in _rows(found):
        grid.add(*r)
    return grid


def _stage_row(s: Stage) -> tuple[str, str, str, str, str, str]:
    return (
        s.name, format_duration(s.seconds), str(s.steps), f"{s.loss_before:.4g}", f"{s.loss_after:.4g}",
        s.reason if s.kept else f"taken back; {s.reason}",
    )  # fmt: skip


STAGE_HEAD = ("stage", "time", "steps", "validation loss", "after", "ended as")


def _stages(found: Distilled) -> Grid:
    right = [Column(h, "right") for h in STAGE_HEAD[1:5]]
    grid = Grid([Column("stage"), *right, Column(STAGE_HEAD[5], cut="end", least=16)])
    for s in found.stages:
        grid.add(*_stage_row(s))
    return grid


def _blocks(blocks: Sequence[Any], everything: bool) -> Grid:
    grid = Grid(
        [Column("block", cut="middle"), Column("before", "right"), Column("after", "right"), Column("steps", "right")]
    )
    worst = sorted(blocks, key=lambda b: -b.before)[:MOST_BLOCKS]
    for b in blocks:
        if everything or b in worst:
            grid.add(b.name, f"{b.before:.4f}", f"{b.after:.4f}", str(b.steps))
    return grid


def render(found: Distilled) -> str:
    """The whole page. Names from the model are escaped: they come from strangers."""
    curves = "".join(
        f"<h2>Loss while training: {html.escape(s.name)}</h2>{curve(s.curve)}" for s in found.stages if len(s.curve) > 1
    )
    blocks = [(b.name, f"{b.before:.4f}", f"{b.after:.4f}", str(b.steps)) for s in found.stages for b in s.blocks]
    notes = "".join(f"<li>{html.escape(f'{n.where}: {n.text}')}</li>" for n in found.notes)
    facts = [_fact(k, v) for k, v in found.facts.items()]
    content = "".join(
        [
            f"<header><p><b>{html.escape(headline(found))}</b></p>"
            f"<p class='dim'>{html.escape(_gain_words(found))}</p>"
            f"<p class='dim'>{html.escape('; '.join(found.losses))}</p></header>",
            "<h2>Measured on data kept aside</h2>",
            _table(HEAD, _rows(found)),
            "<h2>Stages</h2>",
            _table(STAGE_HEAD, [_stage_row(s) for s in found.stages]),
            curves,
            f"<h2>Blocks</h2>{_table(('block', 'before', 'after', 'steps'), blocks)}" if blocks else "",
            f"<h2>Notes</h2><ul>{notes}</ul>" if notes else "",
            "<h2>How</h2>",
            _table(("", ""), [*facts, ("peak memory of training", format_bytes(found.peak_bytes))]),
        ]
    )
    page = (files("featherweight.report") / "page.html").read_text(encoding="utf-8")
    return string.Template(page).substitute(title="Distillation", content=content)


def _fact(name: str, value: Any) -> tuple[str, str]:
    """A fact in words: bytes with their unit, yes or no, numbers short."""
    if name.endswith("_bytes"):
        return name.removesuffix("_bytes").replace("_", " "), format_bytes(value)
    words = (
        ("no", "yes")[value]
        if isinstance(value, bool)
        else f"{value:.4g}"
        if isinstance(value, float)
        else _plain(value)
    )
    return name.replace("_", " "), words


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head) if any(head) else ""
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'


def curve(points: Sequence[Point]) -> str:
    """Validation loss and, below it on an axis of its own, mean training loss by step, as SVG.

    They are different sums: training counts inner tensors too, and sees changed data.
    """
    checks = [(p.step, p.check) for p in points if math.isfinite(p.check)]
    trained = [(p.step, p.train) for p in points if p.train is not None and math.isfinite(p.train)]
    most = max(points[-1].step, 1)
    drawn = [_panel(checks, most, "validation loss by step, the best marked", best=True)] if checks else []
    drawn += [_panel(trained, most, "training loss by step, inner tensors included")] if len(trained) > 1 else []
    return "".join(drawn)


def _panel(series: Sequence[tuple[int, float]], most: int, says: str, *, best: bool = False) -> str:
    """One line over the steps 0..most, with its axis and its legend."""
    values = [v for _, v in series]
    low, high = min(values), max(values)
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    x = Axis(0, most, LEFT, WIDTH - RIGHT)
    y = Axis(max(0.0, low - margin), high + margin, HEIGHT - BOTTOM, TOP)
    drawn = []
    for v in x.ticks():
        drawn.append(f'<text x="{x.at(v):.1f}" y="{y.start + 18}" class="tick" text-anchor="middle">{v:g}</text>')
    for v in y.ticks(4):
        at = y.at(v)
        drawn.append(f'<line x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}" class="grid"/>')
        drawn.append(f'<text x="{x.start - 8}" y="{at + 4:.1f}" class="tick" text-anchor="end">{v:.4g}</text>')
    path = " ".join(f"{x.at(a):.1f},{y.at(b):.1f}" for a, b in series)
    drawn.append(f'<polyline points="{path}" class="frontline"/>')
    if best:
        drawn += [f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="3" class="front"/>' for a, b in series]
        a, b = min(series, key=lambda at: at[1])
        drawn.append(f'<circle cx="{x.at(a):.1f}" cy="{y.at(b):.1f}" r="5" class="result"/>')
    box = f'class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{says}"'
    return f'<svg {box}>{"".join(drawn)}</svg><p class="legend">{says}</p>'
