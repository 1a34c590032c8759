"""A placement in the terminal: the answer, every option, what rules are broken, where the cheapest changes."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from featherweight.quantities import format_bytes, format_count, format_ms, format_percent
from featherweight.report.terminal import Column, Grid, bullets, heading, indented, lines

if TYPE_CHECKING:
    from featherweight.edge.asking import Asked
    from featherweight.edge.place import Row

STYLES = {"yes": "bold green", "no, proved": "bold red", "not found": "bold yellow"}
LEAVES = {"site": "site", "outside": "out"}
OFFLINE = {"yes": "yes", "without internet": "on site", "no": "no"}


def placement_parts(asked: Asked, out: Path | None = None) -> list[RenderableType]:
    """The sections, in reading order."""
    found = asked.placement
    return [
        Text.assemble((found.answer, STYLES[found.answer]), "  ", (best_words(found.best), "bold")),
        *lines([found.reason]),
        *lines([asked_words(asked)], "dim"),
        *_option_parts(asked),
        *_broken_parts(found.rows),
        *_cut_parts(found.rows),
        *_break_even_parts(asked),
        *lines(note_words(asked), "dim"),
        *([] if out is None else [Text.assemble("\nwritten to ", (str(out), "bold"), ": placement.json, .html, .png")]),
    ]


def best_words(best: Row | None) -> str:
    """The winner in one line."""
    if best is None:
        return "no placement within the rules"
    return f"{best.option}: p95 {format_ms(best.p95_ms)}, {format_money(best.cost)} a month"


def format_money(amount: float) -> str:
    """'12.30', '1,204': cents below a hundred."""
    return f"{amount:,.2f}" if abs(amount) < 100 else f"{amount:,.0f}"


def plain_ms(ms: float) -> str:
    """Milliseconds without their unit: '27.5', '-' for none, 'never' where there is no answer."""
    if math.isinf(ms):
        return "never"
    return "-" if ms < 0.005 else f"{ms:,.1f}" if ms >= 9.95 else f"{ms:.2f}"


def format_energy(joules: float | None) -> str:
    """'0.12 J', '35 mJ'; '-' where the device's power is not known."""
    if joules is None:
        return "-"
    return f"{joules:.2f} J" if joules >= 0.1 else f"{1e3 * joules:.3g} mJ"


def rule_words(asked: Asked) -> str:
    """The rules in words, '' where there are none."""
    rules = asked.question.rules
    words = []
    if rules.data_stays:
        words.append(f"{'data and features stay' if rules.features_stay else 'data stays'} on the {rules.data_stays}")
    if rules.offline:
        words.append(f"works without {'any network' if rules.offline == 'any' else 'the internet'}")
    if rules.max_latency_ms is not None:
        words.append(f"p95 at most {format_ms(rules.max_latency_ms)}")
    if rules.max_cost is not None:
        words.append(f"at most {format_money(rules.max_cost)} a month")
    return ", ".join(words)


def asked_words(asked: Asked) -> str:
    """What was asked, in one sentence."""
    q = asked.question
    rules = rule_words(asked) or "no rules"
    many = f", {q.load.devices:,} devices" if q.load.devices > 1 else ""
    return (
        f"asked: {format_count(q.load.requests_a_month)} requests a month, peak {q.load.peak:g}x{many}; {rules}; "
        f"device {q.device.name}; least {q.goal} first; money in {asked.prices.currency}"
    )


def _option_parts(asked: Asked) -> list[RenderableType]:
    made = Grid(
        [
            Column(""),
            Column("option", cut="middle", least=28),
            Column("device", "right", optional=3),
            Column("transfer", "right", optional=4),
            Column("wait", "right", optional=9),
            Column("server", "right", optional=5),
            Column("mean", "right", optional=2),
            Column("p95", "right"),
            Column("energy", "right", optional=1),
            Column("a month", "right"),
            Column("leaves", optional=7),
            Column("offline", optional=8),
        ]
    )
    for row in asked.placement.rows:
        transfer = row.up_ms + row.network_ms + row.down_ms
        made.add(
            "no" if row.breaks else "ok", row.option, plain_ms(row.device_ms), plain_ms(transfer),
            plain_ms(row.queue_ms), plain_ms(row.server_ms), plain_ms(row.mean_ms), plain_ms(row.p95_ms),
            format_energy(row.energy_j), format_money(row.cost), data_words(row), OFFLINE[row.offline],
            style="dim" if row.breaks else "bold" if row is asked.placement.best else "",
        )  # fmt: skip
    return [heading("Options", "milliseconds of one call at the peak rate"), indented(made)]


def data_words(row: Row) -> str:
    """What leaves the device, short."""
    if row.leaves == "device":
        return "nothing"
    what = "features" if row.data.startswith("features") else "input"
    return f"{what}: {LEAVES[row.leaves]}"


def _broken_parts(rows: Iterable[Row]) -> list[RenderableType]:
    broken = [Text.assemble((r.option, "bold"), ": ", "; ".join(r.breaks)) for r in rows if r.breaks]
    return [heading("Rules broken"), bullets(broken)] if broken else []


def _cut_parts(rows: Iterable[Row]) -> list[RenderableType]:
    made = Grid(
        [Column("split", cut="end", least=24), Column("after", cut="middle", least=20), Column("sends", "right"),
         Column("tensors", "right")]
    )  # fmt: skip
    for r in rows:
        if r.kind == "split":
            made.add(r.option, ", ".join(r.after), format_bytes(r.up_bytes), str(len(r.wire)))
    return [heading("Where the splits cut"), indented(made)] if made.rows else []


def _break_even_parts(asked: Asked) -> list[RenderableType]:
    found = [
        Text(f"above {format_count(e.requests_a_month)} requests a month {e.above} is cheaper than {e.below}")
        for e in asked.break_evens
    ]
    return [heading("Break-even"), bullets(found)] if found else []


def note_words(asked: Asked) -> list[str]:
    """What the figures rest on."""
    q = asked.question
    sources = sorted({r.source for r in asked.placement.rows})
    words = [f"compute times are {' and '.join(sources)}; prices: {price_words(asked)}"]
    if q.wire == "int8" and any(r.kind == "split" for r in asked.placement.rows):
        words.append("splits send 8 bits a value: check the accuracy with the halves before you rely on it")
    down = {p.link.name: p.link.outage for p in q.places if p.link.outage > 0}
    if down:
        shares = ", ".join(f"{n} {format_percent(o, 2)} of the time" for n, o in down.items())
        words.append(f"links are down {shares}: such calls get no answer without a local model to fall back on")
    return words


def price_words(asked: Asked) -> str:
    """Each offer compared, with the date and kind of its main source."""
    words = []
    for place in asked.question.places:
        rows = [s for s in place.offer.sources if s.fields.split()[0] in ("per_hour", "per_gb_s", "price")]
        date = rows[0].date if rows else "no date"
        kind = "assumed" if rows and rows[0].where.startswith("assumed") else "list price"
        words.append(f"{place.offer.label} ({kind}, {date})")
    return ", ".join(dict.fromkeys(words))
