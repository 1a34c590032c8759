"""Where a student and its teacher can be compared inside, and the blocks between such places.

A place is a tensor of both graphs through which all that is computed from weights must pass: all paths meet there, but
for masks and shapes, which hold nothing learned. Between two places lies a block, taught by itself from what the
student really feeds it (Li 2021, BRECQ, arXiv:2102.05426).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from featherweight.graph import surgery

Shape = tuple[int, ...]
#: A place is inside a block if it is wider than one at most so many places before and one behind.
HILL = 2


@dataclass(frozen=True)
class Pair:
    """A tensor of the teacher and the student's that stands for it. `axis`: where widths differ; None if equal."""

    teacher: str
    student: str
    axis: int | None = None


@dataclass(frozen=True)
class Block:
    """Nodes of the student from some tensors to the pair's, or, without a pair, to the outputs.

    `starts`: its inputs; `weights`: what it may train.
    """

    starts: tuple[str, ...]
    end: Pair | None
    weights: tuple[str, ...]
    nodes: tuple[str, ...] = ()


def meeting_places(graph: ir.Graph) -> list[str]:
    """Tensors that everything learned passes, in order: at such a point no other learned value is still to be read.

    The graph must be sorted. A value is learned if it depends on an input and on a stored float of two or more axes.
    """
    nodes = list(graph)
    last: dict[ir.Value, int] = {}
    for i, node in enumerate(nodes):
        for value in surgery.reads(node):
            last[value] = i
    for value in graph.outputs:
        last[value] = len(nodes)
    learned: set[ir.Value] = set()
    live: set[ir.Value] = set()
    known: dict[ir.Value, bool] = {}
    found = []
    for i, node in enumerate(nodes):
        reads = list(surgery.reads(node))
        live -= {v for v in reads if last.get(v, -1) <= i}
        if any(v in learned for v in reads) or _learns(reads, known):
            made = [v for v in node.outputs if v in last and not surgery.is_constant(v, known)]
            learned.update(made)
            live.update(made)
            if len(live) == 1 and made and made[0] in live and not made[0].is_graph_output():
                found.append(made[0].name or "")
    return found


def same_places(teacher: ir.Model, student: ir.Model) -> bool:
    """True if the student is the teacher block for block, whatever its widths; both graphs must be sorted."""
    theirs = meeting_places(teacher.graph)
    return bool(theirs) and theirs == meeting_places(student.graph)


def _learns(reads: Sequence[ir.Value], known: dict[ir.Value, bool]) -> bool:
    """True if the node joins a value of the data with a weight: a constant float of two or more axes."""
    fixed = [v for v in reads if surgery.is_constant(v, known)]
    if len(fixed) == len(reads):
        return False
    return any(_rank(v) > 1 and _is_float(v) for v in fixed)


def _rank(value: ir.Value) -> int:
    if value.const_value is not None:
        return len(value.const_value.shape.numpy())
    return 2 if value.shape is None else len(value.shape)


def _is_float(value: ir.Value) -> bool:
    return value.dtype is None or value.dtype.is_floating_point()


def pairs(
    student: ir.Model,
    shapes: tuple[Mapping[str, Shape], Mapping[str, Shape]],
    named: Sequence[tuple[str, str]] = (),
) -> list[Pair]:
    """Meeting places of the student that stand for tensors of the teacher, in the student's order.

    Tensors of one name are taken to mean the same, and those `named` (teacher, student). `shapes`: concrete ones of
    both. Kept are pairs of equal shape, and those that differ on the one axis of channels; of places that follow each
    other without a matrix between them the last of the largest (a map says more than its mean: Wang 2022, MiR,
    arXiv:2201.02620), and of the rest the narrow ones: the trunk between wide inner layers.
    """
    theirs, ours = shapes
    partner = {name: name for name in theirs} | {s: t for t, s in named}
    found = []
    for name in meeting_places(student.graph):
        other = partner.get(name)
        if other is None or other not in theirs or name not in ours:
            continue
        axis = _axis(theirs[other], ours[name])
        if axis is not False:
            found.append(Pair(other, name, axis))
    found = _thinned(student, found, ours)
    widths = [_width(ours[p.student]) for p in found]
    hills = [
        any(w > x for x in widths[max(i - HILL, 0) : i]) and any(w > x for x in widths[i + 1 : i + 1 + HILL])
        for i, w in enumerate(widths)
    ]
    return [p for p, hill in zip(found, hills, strict=True) if not hill]


def _width(shape: Shape) -> int:
    """Channels of a tensor."""
    return shape[-1 if len(shape) < 4 else 1]


def _axis(a: Shape, b: Shape) -> int | bool | None:
    """None for equal shapes, the one differing axis (not the batch's), False where they do not fit."""
    if a == b:
        return None
    if len(a) != len(b) or len(a) < 2:
        return False
    differing = [i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y]
    wanted = len(a) - 1 if len(a) in (2, 3) else 1
    return wanted if differing == [wanted] else False


def _thinned(student: ir.Model, found: Sequence[Pair], shapes: Mapping[str, Shape]) -> list[Pair]:
    """Of neighbours with no matrix between them only the last of the largest; none of those behind the last matrix."""
    stored = student.graph.initializers
    between = weights_between(student, [p.student for p in found])
    matrices = [any(_rank(stored[n]) > 1 for n in names if n in stored) for names in between]
    kept: list[Pair] = []
    run: list[Pair] = []
    for pair, following in zip(found, matrices[1:], strict=True):
        run.append(pair)
        if following:
            kept.append(max(reversed(run), key=lambda p: math.prod(shapes[p.student])))
            run = []
    return kept


def weights_between(model: ir.Model, places: Sequence[str]) -> list[tuple[str, ...]]:
    """Names of constants, stored or computed, read before the first place, between neighbours, and after the last."""
    order = {v.name: i for i, node in enumerate(model.graph) for v in node.outputs}
    cuts = [order[p] for p in places]
    nodes = list(model.graph)
    known: dict[ir.Value, bool] = {}
    groups: list[tuple[str, ...]] = []
    for start, end in itertools.pairwise([-1, *cuts, len(nodes)]):
        stored: dict[str, None] = {}
        for node in nodes[start + 1 : end + 1]:
            if all(surgery.is_constant(v, known) for v in node.inputs if v is not None):
                continue
            for value in surgery.reads(node):
                if surgery.is_constant(value, known):
                    stored.update(dict.fromkeys(_roots(value)))
        groups.append(tuple(stored))
    return groups


def _roots(value: ir.Value) -> list[str]:
    """Names of a constant, of what it is computed from, and of all between: a weight kept as codes has its own name."""
    todo, found = [value], dict.fromkeys([value])
    while todo:
        producer = todo.pop().producer()
        more = [x for x in producer.inputs if x is not None and x not in found] if producer is not None else []
        found.update(dict.fromkeys(more))
        todo += more
    return [v.name or "" for v in found]


def blocks(student: ir.Model, places: Sequence[Pair]) -> list[Block]:
    """The blocks that end at the places, each from the one before (see `tail` for what is behind the last).

    A block also reads what is alive beside its start: inputs of the graph and what is made of them without weights.
    """
    between = weights_between(student, [p.student for p in places])
    inputs = tuple(v.name or "" for v in student.graph.inputs if not v.is_initializer())
    order = {v.name: i for i, node in enumerate(student.graph) for v in node.outputs}
    nodes = [node.name or "" for node in student.graph]
    found, starts, before = [], inputs, -1
    for place, weights in zip(places, between, strict=False):
        at = order[place.student]
        found.append(Block(starts, place, weights, tuple(nodes[before + 1 : at + 1])))
        before = at
        starts = reads_behind(student, place.student)
    return found


def tail(student: ir.Model, places: Sequence[Pair]) -> Block | None:
    """The block from the last place to the outputs; None without places, or if it holds no weight."""
    if not places:
        return None
    last = places[-1].student
    weights = weights_between(student, [last])[-1]
    at = next(i for i, node in enumerate(student.graph) if any(v.name == last for v in node.outputs))
    nodes = tuple(node.name or "" for node in student.graph)[at + 1 :]
    return Block(reads_behind(student, last), None, weights, nodes) if weights else None


def reads_behind(model: ir.Model, place: str) -> tuple[str, ...]:
    """What the part of a graph behind a place reads: the place, and inputs that are still needed."""
    inputs = [v.name or "" for v in model.graph.inputs if not v.is_initializer()]
    return (place, *(n for n in inputs if _beside(model, n, place)))


def _beside(model: ir.Model, name: str, place: str) -> bool:
    """True if an input is still needed, directly or through masks made of it, behind `place`."""
    nodes = list(model.graph)
    at = next(i for i, node in enumerate(nodes) if any(v.name == place for v in node.outputs))
    behind = {v for node in nodes[at + 1 :] for v in surgery.reads(node)}
    made = {v for node in nodes[at + 1 :] for v in node.outputs}
    todo, seen = [v for v in behind if v not in made and v.name != place], set()
    while todo:
        v = todo.pop()
        if v in seen or v.name == place:
            continue
        seen.add(v)
        if v.name == name:
            return True
        producer = v.producer()
        if producer is not None:
            todo.extend(x for x in surgery.reads(producer))
    return False
