"""The best cut by maximum flow, exact over every cut of the graph, not only those of one order.

Minimise the device costs of the head + the server costs of the tail + the cost of each tensor that crosses + the cost
of each output that comes back, over all heads that are closed upwards. After Neurosurgeon (Kang 2017), which cuts
chains, and DADS (Hu 2019), which cuts a DAG by minimum cut. Two things are added: a tensor with several readers is paid
once (a vertex of its own between its maker and its readers), and a cheap block may run on both sides (one vertex for
"runs on the device", one for "runs on the server").

The flow is scipy's Dinic: it is a base dependency, compiled, and takes integers, so that a cut is never a matter of
floating-point luck. Costs are scaled to 30 bits of the best known total; no cut below it is lost by more than half a
unit an edge, and the scale is tightened until that is below 1e-5 of the answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_matrix, csr_matrix
from scipy.sparse.csgraph import breadth_first_order, maximum_flow

from featherweight.edge.cuts import CutGraph
from featherweight.errors import ModelError

_SCALE = 1 << 29
_NEVER = (1 << 30) + (1 << 28)
_ROUNDS = 6


@dataclass(frozen=True)
class CutCosts:
    """What is summed, in one unit (milliseconds, bytes, joules, money); `inf` forbids.

    By position: of a block on the device and on the server, of sending a tensor to the server, and of bringing an
    output back that the server makes. What is absent costs nothing.
    """

    device: Mapping[int, float] = field(default_factory=dict)
    server: Mapping[int, float] = field(default_factory=dict)
    send: Mapping[int, float] = field(default_factory=dict)
    back: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """A head, the tensors sent in the graph's order, the cheap blocks that run there and those here, and the total."""

    head: frozenset[int]
    wire: tuple[int, ...]
    rerun: frozenset[int]
    kept: frozenset[int]
    total: float

    @property
    def here(self) -> frozenset[int]:
        """All blocks that run on the device."""
        return self.head | self.kept


def best(graph: CutGraph, costs: CutCosts) -> Cut:
    """The cheapest of all cuts, everything on one side included. Raises ModelError where each is forbidden."""
    return _solve(graph, costs, frozenset(), frozenset())


def best_proper(graph: CutGraph, costs: CutCosts) -> Cut | None:
    """The cheapest cut with at least one block on each side; None for a model that has none or where all are forbidden.

    A head that is not empty holds a block nothing precedes, a tail one that nothing follows: each pair is tried.
    """
    first = [i for i in graph.proper if not graph.parents[i]]
    followed = {p for i in range(len(graph.blocks)) for p in graph.parents[i] if not graph.blocks[i].cheap}
    last = [i for i in graph.proper if i not in followed]
    free = best(graph, costs) if not _all_forbidden(costs) else None
    if free is not None and 0 < len(free.head) < len(graph.proper):
        return free
    found: Cut | None = None
    for a in first:
        for b in last:
            if a == b:
                continue
            try:
                cut = _solve(graph, costs, frozenset({a}), frozenset({b}))
            except ModelError:
                continue
            if found is None or cut.total < found.total:
                found = cut
    return found


def wire_of(graph: CutGraph, head: frozenset[int], send: Mapping[int, float] | None = None) -> Cut:
    """The cheapest way to serve the tail of one given cut: what is sent, what is run again. By default in bytes."""
    prices = {t: float(v.nbytes) for t, v in enumerate(graph.tensors)} if send is None else send
    tail = frozenset(graph.proper) - head
    needed = {t for i in tail for t in graph.blocks[i].reads}
    needed |= {t for t, v in enumerate(graph.tensors) if v.is_output and _late(graph, t, head)}
    ready = {t for t in needed if t not in graph.maker or graph.maker[t] in head}
    if not any(graph.blocks[graph.maker[t]].cheap for t in needed - ready):
        wire, cheap = tuple(sorted(ready)), frozenset(i for i, b in enumerate(graph.blocks) if b.cheap)
        kept, _ = _useful(graph, head, wire, cheap, frozenset())
        return Cut(head, wire, frozenset(), kept, sum(prices.get(t, 0.0) for t in wire))
    return _solve(graph, CutCosts(send=prices), head, tail, blocks=_relevant(graph, needed))


def _late(graph: CutGraph, tensor: int, head: frozenset[int]) -> bool:
    """True for what can only be made on the server."""
    maker = graph.maker.get(tensor)
    return maker is not None and not graph.above({maker}) <= head


def _relevant(graph: CutGraph, needed: Iterable[int]) -> frozenset[int]:
    """The cheap blocks that may have to run for the tensors needed."""
    stack, seen = list(needed), set()
    while stack:
        i = graph.maker.get(stack.pop())
        if i is not None and graph.blocks[i].cheap and i not in seen:
            seen.add(i)
            stack.extend(graph.blocks[i].reads)
    return frozenset(seen)


def _all_forbidden(costs: CutCosts) -> bool:
    return any(math.isinf(v) for v in costs.device.values()) and any(math.isinf(v) for v in costs.server.values())


class _Net:
    """Vertices 0 (device side) and 1 (server side), then those asked for; edges from device side to server side."""

    def __init__(self) -> None:
        self.size = 2
        self._from: list[int] = []
        self._to: list[int] = []
        self._capacity: list[float] = []

    def vertex(self) -> int:
        """A new vertex."""
        self.size += 1
        return self.size - 1

    def edge(self, a: int, b: int, capacity: float) -> None:
        """Pay `capacity` when `a` is on the device side and `b` on the server side."""
        if capacity > 0 and a != b:
            self._from.append(a)
            self._to.append(b)
            self._capacity.append(capacity)

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Edges with parallel ones summed."""
        summed = coo_matrix((self._capacity, (self._from, self._to)), shape=(self.size, self.size)).tocsr().tocoo()
        return summed.row, summed.col, summed.data


def _solve(
    graph: CutGraph,
    costs: CutCosts,
    on_device: frozenset[int],
    on_server: frozenset[int],
    blocks: frozenset[int] | None = None,
) -> Cut:
    net, places = _network(graph, costs, on_device, on_server, blocks)
    near = _min_cut(net)
    head = on_device if blocks is not None else frozenset(i for i in graph.proper if places.runs_here[i] in near)
    cheap = frozenset(i for i, b in enumerate(graph.blocks) if b.cheap)
    kept = frozenset(i for i in cheap if places.runs_here.get(i, 0) in near)
    rerun = frozenset(i for i in cheap if i in places.runs_there and places.runs_there[i] not in near)
    wire = tuple(sorted(t for t, v in places.needed.items() if v not in near and places.made_there(graph, t) in near))
    kept, rerun = _useful(graph, head, wire, kept, rerun)
    cut = Cut(head, wire, rerun, kept, 0.0)
    return dataclasses.replace(cut, total=cost_of(graph, costs, cut))


def _useful(
    graph: CutGraph, head: frozenset[int], wire: tuple[int, ...], kept: frozenset[int], rerun: frozenset[int]
) -> tuple[frozenset[int], frozenset[int]]:
    """Of the cheap blocks that could run here and there, those somebody needs."""
    outputs = {graph.maker[t] for t, v in enumerate(graph.tensors) if v.is_output and t in graph.maker}
    wanted = [*(graph.maker[t] for t in wire if t in graph.maker), *(outputs & kept)]
    wanted += [i for h in head for i in _makers(graph, h)]
    here = _closure(graph, wanted, kept)
    wanted = [i for i in outputs if i not in here]
    wanted += [i for b in graph.proper if b not in head for i in _makers(graph, b, but=wire)]
    return here, _closure(graph, wanted, rerun, but=wire)


def _makers(graph: CutGraph, block: int, but: tuple[int, ...] = ()) -> list[int]:
    """The blocks that make what a block reads, tensors in `but` left out."""
    return [graph.maker[t] for t in graph.blocks[block].reads if t in graph.maker and t not in but]


def _closure(graph: CutGraph, wanted: list[int], among: frozenset[int], but: tuple[int, ...] = ()) -> frozenset[int]:
    """The blocks of `among` that are wanted, directly or by one another."""
    found: set[int] = set()
    stack = list(wanted)
    while stack:
        i = stack.pop()
        if i in among and i not in found:
            found.add(i)
            stack += _makers(graph, i, but)
    return frozenset(found)


def cost_of(graph: CutGraph, costs: CutCosts, cut: Cut) -> float:
    """The sum a cut pays, added up from the costs themselves."""
    there = (*(i for i in graph.proper if i not in cut.head), *cut.rerun)
    total = sum(costs.send.get(t, 0.0) for t in cut.wire)
    total += sum(costs.device.get(i, 0.0) for i in cut.here) + sum(costs.server.get(i, 0.0) for i in there)
    late = (t for t, i in graph.maker.items() if i not in cut.here and graph.tensors[t].is_output)
    return total + sum(costs.back.get(t, 0.0) for t in late)


@dataclass
class _Places:
    """Vertices: of a block running on the device, of it running on the server, of a tensor needed on the server."""

    runs_here: dict[int, int] = field(default_factory=dict)
    runs_there: dict[int, int] = field(default_factory=dict)
    needed: dict[int, int] = field(default_factory=dict)

    def made_there(self, graph: CutGraph, tensor: int) -> int:
        """The vertex that is on the server side when the server makes the tensor itself; inputs never are."""
        maker = graph.maker.get(tensor)
        return 0 if maker is None else self.runs_there.get(maker, 0)


def _network(
    graph: CutGraph,
    costs: CutCosts,
    on_device: frozenset[int],
    on_server: frozenset[int],
    blocks: frozenset[int] | None,
) -> tuple[_Net, _Places]:
    net, places = _Net(), _Places()
    chosen: Iterable[int] = range(len(graph.blocks)) if blocks is None else sorted(blocks | on_device | on_server)
    for i in chosen:
        fixed = 0 if i in on_device else 1 if i in on_server else None
        v = fixed if fixed is not None else net.vertex()
        w = net.vertex() if graph.blocks[i].cheap else v
        places.runs_here[i], places.runs_there[i] = v, w
        net.edge(v, 1, costs.device.get(i, 0.0))
        net.edge(0, w, costs.server.get(i, 0.0))
        net.edge(w, v, math.inf)  # who does not run it on the server runs it on the device (a loop where v is w)
    for i in chosen:
        block = graph.blocks[i]
        here, there = places.runs_here[i], places.runs_there[i]
        for t in block.reads:
            maker = graph.maker.get(t)
            if maker is not None and maker in places.runs_here:
                net.edge(here, places.runs_here[maker], math.inf)
            if t not in places.needed:
                places.needed[t] = net.vertex()
                net.edge(places.made_there(graph, t), places.needed[t], costs.send.get(t, 0.0))
            net.edge(places.needed[t], there, math.inf)
        for t in block.writes:
            if graph.tensors[t].is_output:
                net.edge(0, here, costs.back.get(t, 0.0))
    return net, places


def _min_cut(net: _Net) -> frozenset[int]:
    """Vertices of the device side of a minimum cut."""
    a, b, capacity = net.arrays()
    finite = np.isfinite(capacity)
    # Everything on one side is a cut too; where both are forbidden the sum of all finite costs bounds the best.
    ends = (float(capacity[a == 0].sum()), float(capacity[b == 1].sum()), float(capacity[finite].sum()))
    bound = min(v for v in ends if math.isfinite(v)) or 1.0
    side: frozenset[int] = frozenset()
    for _ in range(_ROUNDS):
        scaled = np.where(
            finite, np.minimum(np.rint(np.where(finite, capacity, 0.0) * (_SCALE / bound)), _NEVER), _NEVER
        )
        kept = scaled > 0
        matrix = csr_matrix(
            (scaled[kept].astype(np.int32), (a[kept], b[kept])), shape=(net.size, net.size), dtype=np.int32
        )
        side = _source_side(matrix)
        inside = np.isin(a, list(side)) & ~np.isin(b, list(side))
        total = float(capacity[inside].sum())
        if math.isinf(total):
            raise ModelError("every cut is forbidden by the costs given; allow some block or tensor to move")
        if total > 0.5 * bound or total == 0.0:
            break
        bound = total * (1 + 1e-6)
    return side


def _source_side(matrix: csr_matrix) -> frozenset[int]:
    """What is still reachable from vertex 0 when a maximum flow to vertex 1 runs."""
    flow = maximum_flow(matrix, 0, 1).flow
    left = (matrix - flow).tocsr()
    left.data = np.maximum(left.data, 0)
    left.eliminate_zeros()
    reached = breadth_first_order(left, 0, directed=True, return_predecessors=False)
    return frozenset(int(v) for v in reached)
