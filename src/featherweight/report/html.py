"""A Report as one HTML page that needs nothing else: no scripts, no fonts, no links out."""

from __future__ import annotations

import html
import string
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path

from featherweight.core import Attempt, Measurement, Report
from featherweight.quantities import format_bytes, format_drop, format_duration, format_ms, format_percent
from featherweight.report import layers as layer_rows
from featherweight.report import svg, wording
from featherweight.whole import write_text

MOST_BARS = 40


def render(report: Report, *, title: str = "") -> str:
    """The whole page. Names from the model are escaped: they come from strangers."""
    name = title or str(report.facts.get("model") or "featherweight report")
    layers = layer_rows.read_layers(report.layers)
    content = "".join(
        [
            _head(report),
            _section("Measured on the saved files", _measured(report)),
            _section("Size against drop", _trade_off(report)),
            _section("Front", _attempts(report, report.front, techniques=True)),
            _section("Bytes per layer", _layers(layers)),
            _section("The whole model", _whole(layer_rows.read_whole(report.layers))),
            _section("Channels removed", _groups(layer_rows.read_groups(report.layers))),
            _section("Left alone, and notes", _notes(report)),
            _section("Attempts", _attempts(report, report.attempts)),
            _section("How", _facts(report)),
        ]
    )
    page = (files("featherweight.report") / "page.html").read_text(encoding="utf-8")
    return string.Template(page).substitute(title=html.escape(Path(name).name), content=content)


def write(report: Report, path: Path, *, title: str = "") -> None:
    """Write the page whole or not at all. Raises OutputError."""
    write_text(render(report, title=title), path)


def _section(title: str, content: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{content}</section>" if content else ""


def _head(report: Report) -> str:
    """Outcome, reason, request, and the three numbers people look for."""
    r, b = report.result, report.baseline
    css = {"yes": "met", "no, proved": "proved"}.get(report.answer, "missed")
    cards = [
        ("size", format_bytes(r.size_bytes), wording.change_words(b.size_bytes, r.size_bytes, "smaller", "larger"))
    ]
    if r.latency_ratio is not None:
        change = wording.change_words(1.0, r.latency_ratio, "faster", "slower")
        cards.append(
            (
                "latency" if r.latency_from == "measured" else f"{r.latency_from} latency",
                format_ms(r.latency_ms),
                change,
            )
        )
    if r.peak_bytes is not None:
        change = wording.change_words(b.peak_bytes, r.peak_bytes, "less", "more")
        cards.append(("peak memory", format_bytes(r.peak_bytes), change))
    if r.drop is not None:
        interval = wording.interval_words(r)
        cards.append((f"drop in {r.metric_name}", format_drop(r.drop, r.metric_name), interval))
    shown = "".join(
        f'<div class="card"><div class="what">{html.escape(what)}</div><div class="value">{html.escape(value)}</div>'
        f'<div class="change">{html.escape(change)}</div></div>'
        for what, value, change in cards
    )
    asked = wording.asked_words(report)
    return (
        f'<header><span class="outcome {css}">{html.escape(wording.outcome_word(report))}</span>'
        f"<p>{html.escape(report.reason)}</p><p class='dim'>asked: {html.escape(asked)}</p></header>"
        f'<div class="cards">{shown}</div>'
    )


def _measured(report: Report) -> str:
    rows = wording.comparison_rows(report.baseline, report.result, report.budget)
    body = [
        (r.what, r.original, r.result, r.change, r.limit, "" if r.ok is None else "ok" if r.ok else "OVER")
        for r in rows
    ]
    table = _table(("", "original", "result", "result / original", "at most", ""), body, numeric={1, 2, 4})
    evidence = wording.evidence_words(report.result, wording.samples_word(report))
    return table + (f"<p>{html.escape(evidence)}</p>" if evidence else "")


def _trade_off(report: Report) -> str:
    plot = svg.trade_off(report)
    if not plot:
        return ""
    result = "result" if report.outcome == "front" else "result, on unseen data"
    names = {
        "original": "original",
        "result": result,
        "front": "front, on validation data",
        "attempt": "other attempts",
    }
    legend = "".join(
        f'<span><svg width="12" height="12"><circle cx="6" cy="6" r="5" class="{css}"/></svg> {words}</span>'
        for css, words in names.items()
    )
    if any(p.square for p in svg.points(report)):
        square = '<rect x="1" y="1" width="10" height="10" class="front"/>'
        legend += f'<span><svg width="12" height="12">{square}</svg> square: structure changed too</span>'
    return f'{plot}<p class="legend">{legend}</p>'


def _layers(layers: Sequence[layer_rows.Layer]) -> str:
    if not layers:
        return ""
    total = layer_rows.summed(layers, "total")
    shown = layer_rows.chosen(layers, everything=len(layers) <= MOST_BARS, top=MOST_BARS)
    sums = f"{len(layers)} layers, {format_bytes(total.before_bytes)} before, {format_bytes(total.after_bytes)} after"
    groups = [
        (g.name, str(g.count), format_bytes(g.before_bytes), format_bytes(g.after_bytes))
        for g in layer_rows.by_decision(layers)
    ]
    decisions = _table(("decision", "layers", "before", "after"), groups, numeric={1, 2, 3})
    legend = (
        '<p class="legend"><span><i class="key barbefore"></i> before</span>'
        '<span><i class="key barafter"></i> after</span>'
        '<span><i class="key barfloat"></i> after, runs in float</span></p>'
    )
    bars = [layer for layer in shown if layer.count == 1]
    left = len(layers) - len(bars)
    rest = f"<p class='dim'>and {left} smaller layers</p>" if left else ""
    return f"<p>{sums}</p>{decisions}{legend}{svg.layer_bars(bars)}{rest}"


def _whole(changes: Sequence[tuple[str, str]]) -> str:
    return _table(("of", "decision"), changes) if changes else ""


def _groups(groups: Sequence[layer_rows.Group]) -> str:
    rows = [(g.name, str(g.channels), str(g.after)) for g in groups]
    return _table(("group", "channels before", "after"), rows, numeric={1, 2}) if rows else ""


def _notes(report: Report) -> str:
    items = "".join(
        f"<li>{html.escape(g.text)} <span class='dim'>{html.escape(wording.places_words(g.places, most=6))}</span></li>"
        for g in wording.note_groups(report.notes)
    )
    return f"<ul>{items}</ul>" if items else ""


def _attempts(report: Report, attempts: Sequence[Attempt], *, techniques: bool = False) -> str:
    """A row an attempt, with its plan, or only the techniques that make it up."""
    if not attempts:
        return ""
    rows = []
    for a in attempts:
        m, words = a.measured, wording.attempt_words(a, report.budget)[0]
        numbers = ("-", "-", "-") if m is None else _attempt_numbers(m)
        took = format_duration(a.seconds)
        made_of = wording.technique_words(a.plan) if techniques else wording.plan_words(a.plan)
        rows.append((str(a.index), *numbers, took, f"{words}: {a.error}" if a.error else words, made_of))
    last = "techniques" if techniques else "plan"
    return _table(("#", "size", "drop", "latency", "took", "", last), rows, numeric={0, 1, 2, 3, 4})


def _attempt_numbers(m: Measurement) -> tuple[str, str, str]:
    return format_bytes(m.size_bytes), format_drop(m.drop, m.metric_name), format_percent(m.latency_ratio, 0)


def _facts(report: Report) -> str:
    m = report.result
    rows = [
        ("runtime", wording.runtime_words(m)),
        ("host", m.host),
        ("seed", str(m.seed)),
        *wording.fact_rows(report.facts),
    ]
    return _table(("", ""), [r for r in rows if r[1]])


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table; columns in `numeric` are right-aligned, 'OVER' and 'ok' get their colour."""
    right = set(numeric)

    def cell(tag: str, i: int, words: str) -> str:
        css = " ".join(c for c in ("num" if i in right else "", {"OVER": "over", "ok": "fine"}.get(words, "")) if c)
        return f"<{tag}{f' class={css!r}' if css else ''}>{html.escape(words)}</{tag}>"

    head = "".join(cell("th", i, words) for i, words in enumerate(header)) if any(header) else ""
    body = "".join(f"<tr>{''.join(cell('td', i, words) for i, words in enumerate(row))}</tr>" for row in rows)
    top = f"<thead><tr>{head}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{top}<tbody>{body}</tbody></table></div>'
