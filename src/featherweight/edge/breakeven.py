"""At which number of requests a month one option becomes cheaper than another, and who wins where."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

from featherweight.core import Progress, Silent
from featherweight.edge import prices
from featherweight.edge.links import Link
from featherweight.edge.place import Placement, Question, Row, all_rows, decide, place_breaks, with_devices
from featherweight.edge.queueing import servers_needed
from featherweight.errors import DataError

LEAST, MOST = 1.0, 1e10
_POINTS = 400
_STEPS = 60


@dataclass(frozen=True, slots=True)
class BreakEven:
    """Below `requests_a_month` the one is cheaper, from there on the other; the crossing nearest to today's load."""

    below: str
    above: str
    requests_a_month: float


@dataclass(frozen=True)
class Winners:
    """Who is best for each uplink (Mbit/s, rows of `cells`' columns) and load (requests a month, `cells`' rows).

    A cell is a position in `options`, or -1 where nothing keeps the rules. `here`: the question asked.
    """

    uplinks: tuple[float, ...]
    loads: tuple[float, ...]
    cells: tuple[tuple[int, ...], ...]
    options: tuple[str, ...]
    here: tuple[float, float]
    goal: str
    link: str


def cost_at(question: Question, row: Row, requests_a_month: float) -> float:
    """Money a month of one option at another load; servers are bought for the peak as before."""
    load = dataclasses.replace(question.load, requests_a_month=requests_a_month)
    asked = dataclasses.replace(question, load=load)
    found = next((p for p in question.places if p.name == row.place), None)
    money = prices.Money()
    if found is not None:
        servers = 0
        if found.offer.kind != "serverless":
            servers = servers_needed(
                load.per_second * load.peak, row.server_ms, found.offer.workers, load.most_utilisation
            )
        money = prices.month(
            found.offer, requests=requests_a_month, busy_ms=row.server_ms, down_bytes=row.down_bytes, servers=servers,
            per_kwh=question.per_kwh,
        )  # fmt: skip
    return with_devices(asked, money, row.energy_j).total


def crossing(a: Callable[[float], float], b: Callable[[float], float], near: float) -> float | None:
    """Where a and b change places, nearest to `near` on a scale of ratios; None if nowhere from LEAST to MOST.

    Costs go up in steps (a server more), so there may be several crossings.
    """
    ratio = (MOST / LEAST) ** (1 / (_POINTS - 1))
    at = [LEAST * ratio**k for k in range(_POINTS)]
    sign = [_sign(a(x) - b(x)) for x in at]
    found = []
    last = None
    for k, s in enumerate(sign):
        if s == 0:
            continue
        if last is not None and s != sign[last]:
            found.append(_bisect(a, b, at[last], at[k]))
        last = k
    return min(found, key=lambda x: abs(math.log(x / near)), default=None)


def _sign(x: float) -> int:
    return (x > 1e-9) - (x < -1e-9)


def _bisect(a: Callable[[float], float], b: Callable[[float], float], low: float, high: float) -> float:
    begun = _sign(a(low) - b(low))
    for _ in range(_STEPS):
        middle = math.sqrt(low * high)
        if _sign(a(middle) - b(middle)) in (begun, 0):
            low = middle
        else:
            high = middle
    return high


def break_evens(question: Question, placement: Placement) -> tuple[BreakEven, ...]:
    """For each pair of places, of the cheapest option at each that keeps the rules (all, where none does)."""
    kept = [r for r in placement.rows if not r.breaks] or list(placement.rows)
    cheapest: dict[str, Row] = {}
    for row in kept:
        old = cheapest.get(row.place)
        if old is None or (row.cost, row.p95_ms) < (old.cost, old.p95_ms):
            cheapest[row.place] = row
    rows = list(cheapest.values())
    found = []
    for i, a in enumerate(rows):
        for b in rows[i + 1 :]:
            one, other = _cost(question, a), _cost(question, b)
            at = crossing(one, other, question.load.requests_a_month)
            if at is not None:
                below, above = (a, b) if one(at / 1.0001) < other(at / 1.0001) else (b, a)
                found.append(BreakEven(below.option, above.option, at))
    return tuple(sorted(found, key=lambda e: e.requests_a_month))


def _cost(question: Question, row: Row) -> Callable[[float], float]:
    return lambda requests: cost_at(question, row, requests)


def winners(question: Question, *, size: int = 25, progress: Progress | None = None) -> Winners:
    """The best option over uplink and load: both a factor of 100 either way; down goes with up.

    The public links are varied; where the rules leave none of them, those inside the site.
    """
    progress = progress or Silent()
    allowed = [p for p in question.places if not place_breaks(question.rules, p.zone)] or list(question.places)
    varied = [p for p in allowed if p.link.public] or allowed
    if not varied:
        raise DataError("a chart over bandwidth needs at least one server, but none was asked for")
    base = varied[0].link
    uplinks = tuple(base.up_mbit_s * 10 ** (4 * k / (size - 1) - 2) for k in range(size))
    loads = tuple(question.load.requests_a_month * 10 ** (4 * k / (size - 1) - 2) for k in range(size))
    names: list[str] = []
    columns: list[list[int]] = []
    progress.start("who wins", size)
    for uplink in uplinks:
        factor = uplink / base.up_mbit_s
        places = [dataclasses.replace(p, link=_scaled(p.link, factor)) if p in varied else p for p in question.places]
        column = []
        for requests in loads:
            load = dataclasses.replace(question.load, requests_a_month=requests)
            asked = dataclasses.replace(question, places=places, load=load)
            best = decide(asked, all_rows(asked)).best
            column.append(-1 if best is None else _position(names, best.option))
        columns.append(column)
        progress.advance()
    cells = tuple(tuple(column[r] for column in columns) for r in range(size))
    return Winners(
        uplinks, loads, cells, tuple(names), (base.up_mbit_s, question.load.requests_a_month), question.goal, base.name
    )


def _scaled(link: Link, factor: float) -> Link:
    return dataclasses.replace(link, up_mbit_s=link.up_mbit_s * factor, down_mbit_s=link.down_mbit_s * factor)


def _position(names: list[str], name: str) -> int:
    if name not in names:
        names.append(name)
    return names.index(name)
