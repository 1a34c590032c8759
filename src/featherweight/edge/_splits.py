"""Cuts worth looking at between one device and one server."""

from __future__ import annotations

import math
from dataclasses import dataclass

from featherweight.edge import mincut
from featherweight.edge._compute import Times
from featherweight.edge.cuts import CutGraph
from featherweight.edge.links import Link
from featherweight.edge.mincut import Cut, CutCosts

_LINEAR = 6


@dataclass(frozen=True)
class Tried:
    """Cuts to evaluate in full, and a bound: no cut's computing and sending takes less than `least_ms`.

    Infinity where each cut sends something that must stay.
    """

    cuts: tuple[Cut, ...]
    least_ms: float


def costs(
    graph: CutGraph,
    here: Times,
    there: Times,
    link: Link,
    *,
    wire: str,
    raw_stays: bool,
    not_private: frozenset[str] = frozenset(),
    send_weight: float = 1.0,
    server_weight: float = 1.0,
) -> CutCosts:
    """Milliseconds of each block and tensor at the link's rate; a private input that must stay costs infinity."""
    up, down = link.up_mbit_s * 125.0, link.down_mbit_s * 125.0
    send, back = {}, {}
    for t, v in enumerate(graph.tensors):
        nbytes = v.wire_bytes if wire == "int8" and not v.is_input else v.nbytes
        stays = raw_stays and v.raw and v.name not in not_private
        send[t] = math.inf if stays else send_weight * nbytes / up
        if v.is_output:
            back[t] = v.nbytes / down
    return CutCosts(
        device=dict(enumerate(here.blocks)),
        server={i: server_weight * ms for i, ms in enumerate(there.blocks)},
        send=send,
        back=back,
    )


def candidates(
    graph: CutGraph,
    here: Times,
    there: Times,
    link: Link,
    *,
    wire: str,
    raw_stays: bool,
    not_private: frozenset[str] = frozenset(),
) -> Tried:
    """The best cut by time, the best where bytes or server time weigh more, and the best of the stored order.

    Bytes weigh more than the link's rate says while a connection is slow to start, and server time costs money, so the
    cut that is best in the end may be one of these.
    """
    common = {"wire": wire, "raw_stays": raw_stays, "not_private": not_private}
    plain = costs(graph, here, there, link, **common)  # type: ignore[arg-type]
    first = mincut.best_proper(graph, plain)
    if first is None:
        return Tried(_in_order(graph, plain), math.inf)
    found = {first.head: first}
    for send_weight, server_weight in ((3.0, 1.0), (10.0, 1.0), (1.0, 20.0)):
        weighed = costs(
            graph, here, there, link, send_weight=send_weight, server_weight=server_weight, **common  # type: ignore[arg-type]
        )  # fmt: skip
        cut = mincut.best_proper(graph, weighed)
        if cut is not None:
            found.setdefault(cut.head, cut)
    for cut in _in_order(graph, plain):
        found.setdefault(cut.head, cut)
    return Tried(tuple(found.values()), first.total)


def _in_order(graph: CutGraph, plain: CutCosts) -> tuple[Cut, ...]:
    """The best few cuts of the stored order; those that are forbidden only where there are no others."""
    dear = 1e6 + sum(v for v in plain.send.values() if math.isfinite(v))
    prices = {t: v if math.isfinite(v) else dear for t, v in plain.send.items()}
    tried = [mincut.wire_of(graph, head, prices) for head in _thinned(graph)]
    ranked = sorted(tried, key=lambda c: mincut.cost_of(graph, plain, c))
    return tuple(ranked[:_LINEAR])


def _thinned(graph: CutGraph, most: int = 200) -> list[frozenset[int]]:
    heads = list(graph.linear())
    return heads[:: max(1, math.ceil(len(heads) / most))]
