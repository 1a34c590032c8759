"""Repeated blocks of a network, found from the graph alone: the layers of an encoder, the blocks of a residual stage.

The trunk is a chain of tensors each of which everything before it must pass (post-dominators; Lengauer & Tarjan 1979
name them so). Between two neighbours of the chain lies a segment; segments are compared by operators, attributes and
shapes of weights, never by names. A period in that sequence is a stack of equal blocks, and as a block's input and
output have the same shape, any of them can be left out.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels.sizes import concrete

_METADATA = frozenset({"Shape", "Size"})
"""Readers of a tensor's shape alone: no data flows through them."""
_SMALL = 64
"""Stored numbers of at most this many elements are part of a block's form if they are integers (shapes, axes)."""

_DEEP = 12
"""Expressions beside the trunk (masks, shapes, decoded weights) are followed so far, then told apart by name."""


@dataclass(frozen=True)
class Block:
    """One repeat: it reads `start` of the trunk and makes `end`; `nodes` in graph order, `stack` numbers its stack."""

    start: ir.Value
    end: ir.Value
    nodes: tuple[ir.Node, ...]
    stack: int


@dataclass(frozen=True)
class _Segment:
    start: ir.Value
    end: ir.Value
    nodes: tuple[ir.Node, ...]
    form: str
    branches: bool
    weights: bool


def blocks(model: ir.Model, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> tuple[Block, ...]:
    """The repeated residual blocks of a sorted model with unique names, in order along the trunk.

    Stacks of at least two equal blocks, each with weights and with a branch around a part of it. `input_shapes` as in
    `graph.channels.analyse`. The model is not changed. Empty if nothing repeats.
    """
    sizes = concrete(model, input_shapes)
    best: list[_Segment] = []
    stacks: list[tuple[int, int, int]] = []
    for trunk in _trunks(model.graph):
        segments = _segments(trunk, sizes)
        own = _stacks(segments)
        if _covered(segments, own) > _covered(best, stacks):
            best, stacks = segments, own
    segments = best
    found: list[Block] = []
    for first, period, repeats in stacks:
        for r in range(repeats):
            part = segments[first + r * period : first + (r + 1) * period]
            nodes = tuple(n for s in part for n in s.nodes)
            found.append(Block(part[0].start, part[-1].end, nodes, first))
    order = {id(s.start): i for i, s in enumerate(segments)}
    found.sort(key=lambda b: order[id(b.start)])
    numbers = {stack: i for i, stack in enumerate(dict.fromkeys(b.stack for b in found))}
    return tuple(Block(b.start, b.end, b.nodes, numbers[b.stack]) for b in found)


def _readers(value: ir.Value) -> list[ir.Node]:
    """Nodes through which the value's data flow on; a body's reader counts as the node that holds the body."""
    return [n for n in value.consumers() if n.op_type not in _METADATA]


def _covered(segments: Sequence[_Segment], stacks: Sequence[tuple[int, int, int]]) -> int:
    return sum(len(s.nodes) for first, period, n in stacks for s in segments[first : first + period * n])


def _trunks(graph: ir.Graph) -> list[list[ir.Value]]:
    """Chains of post-dominators, as tensors, first to last: one from each input, and the longest from a first node.

    An input with a second use (a mask made of the token ids) has no chain, the node behind it (an embedding) has. The
    tree of post-dominators in one pass, as a graph without cycles allows (Cooper, Harvey & Kennedy 2001).
    """
    inputs = [v for v in graph.inputs if not v.is_initializer()]
    nodes = list(graph)
    made: list[list[ir.Value]] = [*([v] for v in inputs), *(list(n.outputs) for n in nodes)]
    index = {node: i for i, node in enumerate(nodes, len(inputs))}
    for node, i in list(index.items()):
        index |= {n: i for g in surgery.bodies(node) for n in surgery.walk(g)}
    last = len(made)
    parent, depth = [last] * (last + 1), [0] * (last + 1)
    for i in range(last - 1, -1, -1):
        meets: int | None = None
        for value in made[i]:
            following = [index[n] for n in _readers(value)] + [last] * value.is_graph_output()
            for j in following:
                meets = j if meets is None else _common(parent, meets, j)
        parent[i] = last if meets is None else meets
        depth[i] = depth[parent[i]] + 1 if meets is not None else 0
    entries = [i for n, i in index.items() if n.graph is graph and not any(p in index for p in n.predecessors())]
    ways = [i for i in range(len(inputs)) if depth[i]]
    first = max((i for i in entries if depth[i]), key=lambda i: (depth[i], -i), default=last)
    return [_chain(made, parent, at) for at in dict.fromkeys([*ways, first])]


def _chain(made: Sequence[Sequence[ir.Value]], parent: Sequence[int], at: int) -> list[ir.Value]:
    chain: list[ir.Value] = []
    while at < len(made):
        data = [v for v in made[at] if _readers(v) or v.is_graph_output()]
        if len(data) == 1:
            chain.append(data[0])
        at = parent[at]
    return chain


def _common(parent: Sequence[int], a: int, b: int) -> int:
    """The nearest common ancestor; ancestors have larger numbers."""
    while a != b:
        if a < b:
            a = parent[a]
        else:
            b = parent[b]
    return a


def _segments(trunk: Sequence[ir.Value], sizes: Mapping[str, tuple[int, ...]]) -> list[_Segment]:
    found = []
    for start, end in itertools.pairwise(trunk):
        inside = _between(start, end)
        forms = _Forms(start, inside, sizes)
        shapes = (sizes.get(start.name or ""), sizes.get(end.name or ""))
        text = f"{forms.of(end)} {len(inside)} {shapes}"
        branches = len(_readers(start)) > 1
        found.append(_Segment(start, end, tuple(inside), text, branches, forms.weights))
    return found


def _between(start: ir.Value, end: ir.Value) -> dict[ir.Node, None]:
    """Nodes on a path from `start` to `end`, in graph order."""
    after: set[ir.Node] = set()
    stack = list(start.consumers())
    last = end.producer()
    while stack:
        node = stack.pop()
        if node in after:
            continue
        after.add(node)
        if node is not last:
            stack.extend(n for o in node.outputs for n in o.consumers())
    wanted: set[ir.Node] = set()
    back = [last] if last is not None else []
    while back:
        node = back.pop()
        if node in wanted or node not in after:
            continue
        wanted.add(node)
        back.extend(p for p in node.predecessors())
    graph = last.graph if last is not None else None
    return {n: None for n in graph or () if n in wanted}


class _Forms:
    """Digests of the expressions inside one segment: what is computed from its start, whatever it is called."""

    def __init__(self, start: ir.Value, inside: Mapping[ir.Node, None], sizes: Mapping[str, tuple[int, ...]]) -> None:
        self._start, self._inside, self._sizes = start, inside, sizes
        self._done: dict[ir.Value, str] = {}
        self.weights = False

    def of(self, value: ir.Value | None) -> str:
        """The digest of a value."""
        if value is None:
            return "-"
        if value is self._start:
            return "start"
        for node in self._inside:
            if node.outputs[0] not in self._done:
                self._add(node)
        return self._done.get(value) or self._outside(value)

    def _add(self, node: ir.Node) -> None:
        inputs = [
            "start" if v is self._start else "-" if v is None else self._done.get(v) or self._outside(v)
            for v in node.inputs
        ]
        attributes = [f"{k}={_attribute(a)}" for k, a in sorted(node.attributes.items())]
        digest = _digest([node.domain, node.op_type, *inputs, *attributes])
        for i, output in enumerate(node.outputs):
            self._done[output] = f"{digest}.{i}"

    def _outside(self, value: ir.Value, depth: int = 0) -> str:
        """What comes from beside the trunk: stored tensors by type and shape, expressions by what they are made of."""
        stored = surgery.constant_tensor(value)
        if stored is not None:
            shape = tuple(stored.shape.numpy())
            text = f"{stored.dtype.name}{shape}"
            if stored.dtype.is_integer() and stored.size <= _SMALL and len(shape) <= 1:
                return f"{text}={stored.numpy().tolist()}"
            self.weights |= len(shape) > 1
            return text
        node = value.producer()
        if node is None or depth > _DEEP or any(True for _ in surgery.bodies(node)):
            return f"own {value.name}"
        source = node.inputs[0] if node.inputs else None
        if node.op_type in _METADATA and source is not None and (source.name or "") in self._sizes:
            return f"{node.op_type}{self._sizes[source.name or '']}"
        inputs = ["-" if v is None else self._outside(v, depth + 1) for v in node.inputs]
        attributes = [f"{k}={_attribute(a)}" for k, a in sorted(node.attributes.items())]
        return _digest([node.domain, node.op_type, str(value.index()), *inputs, *attributes])


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _attribute(attribute: ir.Attr) -> str:
    if attribute.is_ref() or attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS):
        return f"own {id(attribute)}"
    if attribute.type == ir.AttributeType.TENSOR:
        tensor = attribute.as_tensor()
        return f"{tensor.dtype.name}{tuple(tensor.shape.numpy())}"
    return str(attribute.value)


def _stacks(segments: Sequence[_Segment]) -> list[tuple[int, int, int]]:
    """(first segment, period, repeats) of every stack; larger ones claim their segments first."""
    numbers: dict[str, int] = {}
    forms = np.array([numbers.setdefault(s.form, len(numbers)) for s in segments])
    runs: list[tuple[int, int, int, int]] = []
    for period in range(1, len(forms) // 2 + 1):
        same = np.concatenate([[False], forms[period:] == forms[:-period], [False]])
        edges = np.flatnonzero(same[1:] != same[:-1])
        for a, b in zip(edges[::2], edges[1::2], strict=True):
            repeats = (int(b) - int(a)) // period + 1
            if repeats < 2:
                continue
            first = _phase(segments, int(a), int(b) + period - repeats * period)
            covered = segments[first : first + repeats * period]
            if any(s.weights for s in covered[:period]) and any(s.branches for s in covered[:period]):
                runs.append((sum(len(s.nodes) for s in covered), first, period, repeats))
    taken: set[int] = set()
    stacks = []
    for _, first, period, repeats in sorted(runs, key=lambda r: (-r[0], r[2])):
        own = set(range(first, first + period * repeats))
        if not own & taken:
            taken |= own
            stacks.append((first, period, repeats))
    return stacks


def _phase(segments: Sequence[_Segment], first: int, last: int) -> int:
    """Where the first block begins: from `first` to `last`, at the tensor that most nodes read (the residual trunk)."""
    return max(range(first, last + 1), key=lambda i: (len(_readers(segments[i].start)), -i))
