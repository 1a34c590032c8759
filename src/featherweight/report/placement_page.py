"""A placement as files: placement.json, placement.html (one file, no scripts) and placement.png."""

from __future__ import annotations

import html
import string
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from featherweight.quantities import format_bytes, format_count, format_ms
from featherweight.report import placement_chart
from featherweight.report import placement_text as text
from featherweight.report.json import document, plain
from featherweight.whole import whole_file, write_text

if TYPE_CHECKING:
    from featherweight.edge.asking import Asked
    from featherweight.edge.breakeven import Winners


def write(asked: Asked, won: Winners, folder: Path) -> None:
    """Write the three files, each whole or not at all. Raises OutputError."""
    write_text(to_json(asked, won), folder / "placement.json")
    write_text(render(asked, won), folder / "placement.html")
    with whole_file(folder / "placement.png") as file:
        file.write(placement_chart.to_png(won))


def to_json(asked: Asked, won: Winners | None = None) -> str:
    """Text of placement.json: what was asked, every option with all its figures, break-evens, who wins where."""
    q = asked.question
    rows = []
    for row in asked.placement.rows:
        raw: dict[str, Any] = plain(row)
        raw["money"] = {**raw["money"], "total": row.cost}
        rows.append(raw)
    content = {
        "answer": asked.placement.answer,
        "reason": asked.placement.reason,
        "best": None if asked.placement.best is None else asked.placement.best.option,
        "goal": q.goal,
        "currency": asked.prices.currency,
        "asked": {
            "load": plain(q.load),
            "rules": plain(q.rules),
            "wire": q.wire,
            "electricity_per_kwh": q.per_kwh,
            "device": {"name": q.device.name, "sources": plain(q.device.sources)},
            "models": [
                {"name": w.name, "file": w.path.name, "size_bytes": w.file_bytes, "upload_bytes": w.upload_bytes}
                for w in q.works
            ],
            "places": [{"name": p.name, "link": plain(p.link), "offer": _offer(p.offer)} for p in q.places],
        },
        "options": rows,
        "break_evens": plain(asked.break_evens),
        "winners": None if won is None else plain(won),
    }
    return document("placement", content)


def _offer(offer: Any) -> dict[str, Any]:
    raw: dict[str, Any] = plain(offer)
    raw["profile"] = {"name": offer.profile.name, "sources": plain(offer.profile.sources)}
    return raw


def render(asked: Asked, won: Winners) -> str:
    """The whole page. Names from the model and from tables are escaped: they come from strangers."""
    found = asked.placement
    css = {"yes": "met", "no, proved": "proved"}.get(found.answer, "missed")
    head = (
        f'<header><span class="outcome {css}">{html.escape(found.answer.upper())}</span>'
        f"<p>{html.escape(text.best_words(found.best))}</p><p>{html.escape(found.reason)}</p>"
        f"<p class='dim'>{html.escape(text.asked_words(asked))}</p></header>"
    )
    content = head + "".join(
        f"<section><h2>{html.escape(title)}</h2>{part}</section>"
        for title, part in (
            ("Options side by side", _options(asked)),
            ("Who wins over bandwidth and load", f'<div class="plot">{placement_chart.to_svg(won)}</div>'),
            ("Money a month", _money(asked)),
            ("Where the splits cut", _cuts(asked)),
            ("Break-even", _break_evens(asked)),
            ("What this rests on", _notes(asked)),
            ("Sources", _sources(asked)),
        )
        if part
    )
    page = (files("featherweight.report") / "page.html").read_text(encoding="utf-8")
    title = html.escape(f"Where {asked.question.works[0].path.name} should run")
    return (
        string.Template(page).substitute(title=title, content=content).replace("max-width: 860px", "max-width: 1200px")
    )


def _options(asked: Asked) -> str:
    rows = []
    for r in asked.placement.rows:
        parts = [text.plain_ms(v) for v in (r.device_ms, r.up_ms, r.network_ms, r.queue_ms, r.server_ms, r.down_ms)]
        rows.append(
            (r.option, *parts, text.plain_ms(r.mean_ms), text.plain_ms(r.p95_ms), text.format_energy(r.energy_j),
             text.format_money(r.cost), f"{100 * r.availability:.4g}%", r.data, r.offline,
             "; ".join(r.breaks) or "ok")
        )  # fmt: skip
    head = ("option", "device", "up", "network", "wait", "server", "down", "mean ms", "p95 ms", "energy", "a month",
            "available", "privacy", "offline", "rules")  # fmt: skip
    return _table(head, rows, numeric=range(1, 12))


def _money(asked: Asked) -> str:
    names = ("compute", "hardware", "power", "requests", "egress", "upkeep")
    rows = [
        (r.option, *(text.format_money(getattr(r.money, n)) for n in names), text.format_money(r.cost),
         str(r.servers or "-"), f"{r.utilisation:.1%}" if r.servers else "-")
        for r in asked.placement.rows
    ]  # fmt: skip
    head = ("option", *names, "total", "servers", "busy at peak")
    return _table(head, rows, numeric=range(1, 10))


def _cuts(asked: Asked) -> str:
    rows = [
        (r.option, ", ".join(r.after), ", ".join(r.wire[:6]) + (" ..." if len(r.wire) > 6 else ""),
         format_bytes(r.up_bytes))
        for r in asked.placement.rows if r.kind == "split"
    ]  # fmt: skip
    return _table(("split", "after", "sends", "bytes"), rows, numeric={3}) if rows else ""


def _break_evens(asked: Asked) -> str:
    rows = [(e.below, format_count(e.requests_a_month), e.above) for e in asked.break_evens]
    return _table(("cheaper below", "requests a month", "cheaper from there on"), rows, numeric={1}) if rows else ""


def _notes(asked: Asked) -> str:
    q = asked.question
    words = [
        *text.note_words(asked),
        f"servers are bought so that at the peak rate ({q.load.peak:g} times the mean) each is busy at most "
        f"{q.load.most_utilisation:.0%}; waiting follows M/D/c",
        "a call takes one round trip on an open connection, TCP's slow start, and the bytes at the link's rate; p95 "
        "adds up each part's 95th percentile, so it is an upper estimate",
        f"electricity {q.per_kwh:g} {asked.prices.currency}/kWh; a month is 730 hours; free shares of a cloud are "
        "counted as if nothing else used them",
    ]
    words += [
        f"{p.name}: {p.link.up_mbit_s:g}/{p.link.down_mbit_s:g} Mbit/s up/down, round trip {format_ms(p.link.rtt_ms)} "
        f"(p95 {format_ms(p.link.rtt_p95_ms)}), loss {p.link.loss:.2%}, down {p.link.outage:.2%} of the time"
        for p in q.places
    ]
    return f"<ul>{''.join(f'<li>{html.escape(w)}</li>' for w in words)}</ul>"


def _sources(asked: Asked) -> str:
    q = asked.question
    rows = [(q.device.name, *s) for s in q.device.sources]
    for p in q.places:
        rows += [(p.offer.label, *s) for s in (*p.offer.sources, *p.offer.profile.sources)]
        rows += [(p.link.name, *s) for s in p.link.sources]
    rows += [("electricity", *s) for s in asked.prices.sources]
    return _table(("what", "figures", "from", "date"), dict.fromkeys(rows))


def _table(header: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    right = set(numeric)

    def cell(tag: str, i: int, words: str) -> str:
        css = "num" if i in right else "fine" if words == "ok" else ""
        return f"<{tag}{f' class={css!r}' if css else ''}>{html.escape(words)}</{tag}>"

    head = "".join(cell("th", i, w) for i, w in enumerate(header))
    body = "".join(f"<tr>{''.join(cell('td', i, w) for i, w in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
