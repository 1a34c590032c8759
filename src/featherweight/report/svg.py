"""Plots as SVG text, no library: the trade-off of size against drop, and bytes per layer.

Colours come from the page's CSS classes, so that the plots follow a dark page.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

from featherweight.core import Attempt, Budget, Measurement, Report
from featherweight.quantities import PERCENT_METRICS, format_bytes, format_drop, format_percent
from featherweight.report.layers import Layer, runs_as
from featherweight.report.wording import technique_words

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 76, 24, 22, 54
ROW = 19


@dataclass(frozen=True, slots=True)
class Point:
    """One dot: `x` in bytes, `y` in the metric's unit; `kind` is its CSS class, `square` where structure changed."""

    x: float
    y: float
    kind: str
    label: str
    square: bool = False


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear scale from values to pixels."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        """Pixel of a value, kept inside the plot."""
        share = (value - self.low) / (self.high - self.low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def ticks(self, about: int = 6) -> list[float]:
        """Round values inside the range: steps of 1, 2 or 5 times a power of ten."""
        raw = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(raw))
        step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def points(report: Report) -> list[Point]:
    """The original, every measured attempt, the front and the result; those without a drop have no place."""
    front = {a.index for a in report.front}
    made = [Point(report.baseline.size_bytes, 0.0, "original", f"original: {format_bytes(report.baseline.size_bytes)}")]
    seen: dict[int, Attempt] = {a.index: a for a in (*report.attempts, *report.front)}
    for attempt in seen.values():
        m = attempt.measured
        if m is not None and m.drop is not None:
            kind = "front" if attempt.index in front else "attempt"
            words = technique_words(attempt.plan)
            made.append(
                Point(m.size_bytes, m.drop, kind, f"#{attempt.index}: {_label(m)}; {words}", _changed(report, attempt))
            )
    if report.result.drop is not None:
        made.append(Point(report.result.size_bytes, report.result.drop, "result", f"result: {_label(report.result)}"))
    return made


def _changed(report: Report, attempt: Attempt) -> bool:
    """True if the plan changes the structure: removes channels or takes layers apart."""
    names = set(report.facts.get("structure_techniques", ()))
    return any(a.technique in names for d in attempt.plan.changed() for a in d.actions)


def _label(m: Measurement) -> str:
    latency = "" if m.latency_ratio is None else f", latency {format_percent(m.latency_ratio)}"
    return f"{format_bytes(m.size_bytes)}, drop {format_drop(m.drop, m.metric_name)}{latency}"


def trade_off(report: Report) -> str:
    """Scatter of size against drop with the budget's limits; '' if no more than the original has a place."""
    dots = points(report)
    if len(dots) < 2:
        return ""
    b, name = report.budget, report.result.metric_name
    xs = [p.x for p in dots] + ([b.max_size_bytes] if b.max_size_bytes and b.max_size_bytes < 1.5 * dots[0].x else [])
    ys = [p.y for p in dots] + ([b.max_drop] if b.max_drop is not None else [])
    low, high = min(0.0, *ys), max(ys)
    margin = 0.08 * ((high - low) or 0.01)
    x = Axis(0, max(xs) * 1.05, LEFT, WIDTH - RIGHT)
    y = Axis(low - margin, high + margin, HEIGHT - BOTTOM, TOP)
    parts = [*_allowed(x, y, b), *_axes(x, y, name), *_limits(x, y, b, name), _front_line(x, y, dots)]
    order = {"attempt": 0, "front": 1, "original": 2, "result": 3}
    parts += [_dot(x, y, p) for p in sorted(dots, key=lambda p: order[p.kind])]
    return (
        f'<svg class="plot" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="size against drop">'
        + "".join(parts)
        + "</svg>"
    )


def _text(x: float, y: float, words: str, css: str = "", anchor: str = "start", extra: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{css}" text-anchor="{anchor}" {extra}>{html.escape(words)}</text>'


def _axes(x: Axis, y: Axis, name: str) -> list[str]:
    """Grid lines, tick labels and titles of both axes."""
    percent = name in PERCENT_METRICS
    parts = []
    for value in x.ticks():
        at = x.at(value)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.end}" y2="{y.start}" class="grid"/>')
        parts.append(_text(at, y.start + 18, "0" if not value else format_bytes(value), "tick", "middle"))
    for value in y.ticks(5):
        at = y.at(value)
        shown = f"{100 * value:.4g}" if percent else f"{value:.4g}"
        css = "zero" if abs(value) < 1e-12 else "grid"
        parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}" class="{css}"/>')
        parts.append(_text(x.start - 8, at + 4, "0" if css == "zero" else shown, "tick", "end"))
    unit = "points" if percent else "dB" if name == "sqnr" else ""
    title = f"drop in {name or 'metric'}{f' ({unit})' if unit else ''}, up is worse"
    middle = (y.start + y.end) / 2
    parts.append(_text((x.start + x.end) / 2, HEIGHT - 12, "size of the file, left is better", "axis", "middle"))
    parts.append(_text(18, middle, title, "axis", "middle", f'transform="rotate(-90 18 {middle:.1f})"'))
    return parts


def _allowed(x: Axis, y: Axis, b: Budget) -> list[str]:
    """The region inside the limits, shaded; nothing without a limit on size or drop."""
    if b.max_size_bytes is None and b.max_drop is None:
        return []
    right = x.end if b.max_size_bytes is None else x.at(b.max_size_bytes)
    top = y.end if b.max_drop is None else y.at(b.max_drop)
    box = f'x="{x.start}" y="{top:.1f}" width="{right - x.start:.1f}" height="{y.start - top:.1f}"'
    return [f'<rect {box} class="allowed"/>']


def _limits(x: Axis, y: Axis, b: Budget, name: str) -> list[str]:
    """The limits as labelled lines."""
    parts = []
    if b.max_size_bytes is not None and b.max_size_bytes <= x.high:
        at = x.at(b.max_size_bytes)
        parts.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y.end}" y2="{y.start}" class="limit"/>')
        parts.append(_text(at + 5, y.end + 10, f"at most {format_bytes(b.max_size_bytes)}", "limitname"))
    if b.max_drop is not None:
        at = y.at(b.max_drop)
        parts.append(f'<line x1="{x.start}" x2="{x.end}" y1="{at:.1f}" y2="{at:.1f}" class="limit"/>')
        parts.append(_text(x.end, at - 5, f"at most {format_drop(b.max_drop, name)}", "limitname", "end"))
    return parts


def _front_line(x: Axis, y: Axis, dots: Sequence[Point]) -> str:
    """Steps through the front: what is reached at each size is the best drop of what is not larger."""
    front = sorted((p.x, p.y) for p in dots if p.kind == "front")
    if len(front) < 2:
        return ""
    steps = [f"M{x.at(front[0][0]):.1f} {y.at(front[0][1]):.1f}"]
    steps += [f"H{x.at(px):.1f}V{y.at(py):.1f}" for px, py in front[1:]]
    return f'<path d="{"".join(steps)}" class="frontline"/>'


def _dot(x: Axis, y: Axis, p: Point) -> str:
    """A dot with its numbers as a tooltip; original and result are named."""
    cx, cy = x.at(p.x), y.at(p.y)
    radius = 7 if p.kind in ("result", "original") else 5
    tip = f"<title>{html.escape(p.label)}</title>"
    dot = f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}" class="{p.kind}">{tip}</circle>'
    if p.square:
        box = f'x="{cx - radius:.1f}" y="{cy - radius:.1f}" width="{2 * radius}" height="{2 * radius}"'
        dot = f'<rect {box} class="{p.kind}">{tip}</rect>'
    if p.kind not in ("result", "original"):
        return dot
    right = cx > WIDTH - 110
    return dot + _text(cx + (-12 if right else 12), cy + 18, p.kind, "dotname", "end" if right else "start")


def layer_bars(layers: Sequence[Layer]) -> str:
    """Bytes of each layer before (pale) and after (full), with what was decided; '' without layers."""
    if not layers:
        return ""
    most = max(max(layer.before_bytes, layer.after_bytes) for layer in layers) or 1
    name_width, bar_width, height = 270, 250, ROW * len(layers) + 8
    parts = []
    for i, layer in enumerate(layers):
        y = 4 + i * ROW
        before, after = (bar_width * v / most for v in (layer.before_bytes, layer.after_bytes))
        tip = f"{layer.name} {layer.op} {layer.shape}: {layer.decision}. {layer.why}".strip()
        css = "barafter" if runs_as(layer) != "float" else "barfloat"
        parts.append(
            f"<g><title>{html.escape(tip)}</title>"
            + _text(name_width - 10, y + 13, _middle_cut(layer.name, 36), "barname", "end")
            + f'<rect x="{name_width}" y="{y + 3}" width="{before:.1f}" height="13" class="barbefore"/>'
            + f'<rect x="{name_width}" y="{y + 3}" width="{after:.1f}" height="13" class="{css}"/>'
            + _text(name_width + max(before, after) + 8, y + 13, _bar_words(layer), "tick")
            + "</g>"
        )
    opening = f'<svg class="plot" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="bytes per layer">'
    return f"{opening}{''.join(parts)}</svg>"


def _bar_words(layer: Layer) -> str:
    sizes = format_bytes(layer.before_bytes)
    if layer.after_bytes != layer.before_bytes:
        sizes += f" to {format_bytes(layer.after_bytes)}"
    return f"{sizes}, {layer.decision}" if layer.decision else sizes


def _middle_cut(name: str, most: int) -> str:
    if len(name) <= most:
        return name
    tail = most * 2 // 3
    return f"{name[: most - 1 - tail]}…{name[-tail:]}"
