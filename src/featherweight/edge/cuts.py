"""A model as blocks and tensors, and what crosses when some blocks run here and the rest elsewhere.

A *cut* is a set of blocks that is closed upwards: with a block, everything it depends on. Its blocks are the head, the
others the tail. A block is one node, or nodes that must not be parted: a quantizer with what it quantizes, the decoder
of a looked-up table, makers and readers of sequences. What depends on no input is in no block: both sides keep what
they need of it. *Cheap* blocks (shape arithmetic, masks, DequantizeLinear, ...) may run on both sides, where that
sends fewer bytes; they are in no cut, each cut finds their best place.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import onnx_ir as ir

from featherweight.edge import _grouping as grouping
from featherweight.edge import _runtime_types
from featherweight.errors import DataError, ModelError
from featherweight.graph import cost, repair, shapes, surgery


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor that some block reads or that the model gives. Bytes are of one call, 0 where the shape is not known.

    `wire_bytes` is what int8 would take: one byte an element and a scale and zero point for floats, other types as
    they are. `raw`: an input of the model or made from inputs alone by casts, layout changes and element-wise steps.
    """

    name: str
    dtype: ir.DataType | None
    shape: tuple[int | str | None, ...] | None
    nbytes: int
    wire_bytes: int
    is_input: bool
    is_output: bool
    raw: bool


@dataclass(frozen=True, slots=True)
class Block:
    """Nodes that stay together. `reads` and `writes` are positions in the graph's tensors; `nodes` are names."""

    name: str
    nodes: tuple[str, ...]
    op_types: tuple[str, ...]
    macs: int
    weight_bytes: int
    output_bytes: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    cheap: bool = False


@dataclass(frozen=True)
class CutGraph:
    """Blocks in an order in which they can run, and the tensors between them. `unknown`: tensors without a size."""

    blocks: tuple[Block, ...]
    tensors: tuple[Tensor, ...]
    unknown: tuple[str, ...] = ()

    @cached_property
    def proper(self) -> tuple[int, ...]:
        """Positions of the blocks a cut is made of, in order."""
        return tuple(i for i, b in enumerate(self.blocks) if not b.cheap)

    @cached_property
    def maker(self) -> dict[int, int]:
        """Position of the block that writes each tensor; inputs of the model have none."""
        return {t: i for i, b in enumerate(self.blocks) for t in b.writes}

    @cached_property
    def readers(self) -> dict[int, tuple[int, ...]]:
        """Positions of the blocks that read each tensor."""
        found: dict[int, list[int]] = {}
        for i, b in enumerate(self.blocks):
            for t in b.reads:
                found.setdefault(t, []).append(i)
        return {t: tuple(bs) for t, bs in found.items()}

    @cached_property
    def parents(self) -> tuple[frozenset[int], ...]:
        """For each block the proper blocks it directly depends on, seen through cheap ones."""
        found: list[frozenset[int]] = []
        for b in self.blocks:
            above: set[int] = set()
            for t in b.reads:
                i = self.maker.get(t)
                if i is not None:
                    above |= found[i] if self.blocks[i].cheap else {i}
            found.append(frozenset(above))
        return tuple(found)

    def above(self, wanted: Iterable[int]) -> frozenset[int]:
        """The proper blocks among `wanted` and all that they depend on."""
        stack, seen = list(wanted), set()
        while stack:
            i = stack.pop()
            if i not in seen:
                seen.add(i)
                stack.extend(self.parents[i])
        return frozenset(i for i in seen if not self.blocks[i].cheap)

    def check(self, head: frozenset[int]) -> None:
        """Raise ModelError unless `head` is a cut: proper blocks, closed upwards, neither none nor all."""
        late = next(((i, p) for i in sorted(head) for p in sorted(self.parents[i]) if p not in head), None)
        if late is not None:
            names = [self.blocks[i].name for i in late]
            raise ModelError(
                f"a head must hold all that its nodes depend on, but it has {names[0]!r} without {names[1]!r}; "
                "cut at tensors, then the head is completed for you"
            )
        if not head or len(head) == len(self.proper):
            where = "head" if not head else "tail"
            raise ModelError(
                f"a cut must leave at least one node on each side, but the {where} would be empty "
                f"(the model has {len(self.proper)} blocks); choose another cut: featherweight split MODEL --list"
            )

    def linear(self) -> Iterator[frozenset[int]]:
        """The cuts after each but the last block, in stored order; together they visit every block once."""
        for k in range(1, len(self.proper)):
            yield frozenset(self.proper[:k])

    def downsets(self, most: int = 100_000) -> Iterator[frozenset[int]]:
        """Every cut. Raises ModelError above `most` of them: their number can double with each block."""
        count = 0
        level: set[frozenset[int]] = {frozenset()}
        while level:
            grown: set[frozenset[int]] = set()
            for head in level:
                if 0 < len(head) < len(self.proper):
                    count += 1
                    if count > most:
                        raise ModelError(f"at most {most} cuts can be listed, but there are more; use `linear`")
                    yield head
                grown.update(head | {i} for i in self.proper if i not in head and self.parents[i] <= head)
            level = grown


def prepare(model: ir.Model) -> ir.Model:
    """A copy that can be cut: unique names, sorted, functions inlined, weights no longer listed as inputs.

    No number changes. Raises ModelError for a cycle or functions that cannot be inlined.
    """
    copy = surgery.copy_model(model)
    surgery.read_small(copy)
    for step in (repair.merge_opsets, repair.fix_names, repair.demote_inputs, repair.inline_functions):
        step(copy)
    repair.fix_names(copy)
    repair.sort_nodes(copy)
    return copy


def concrete_inputs(model: ir.Model, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs: as given, else as declared with open sizes 1. Raises DataError for an unknown name."""
    declared = {v.name: v.shape for v in model.graph.inputs if v.name and not v.is_initializer()}
    unknown = sorted(set(given) - set(declared))
    if unknown:
        raise DataError(f"shapes may be given for the inputs {sorted(declared)}, but got one for {unknown}")
    found = {}
    for name, shape in declared.items():
        if name in given:
            if shape is not None and len(shape) != len(given[name]):
                raise DataError(f"input {name!r} has {len(shape)} axes {list(shape)}, but got the shape {given[name]}")
            found[name] = tuple(given[name])
        elif shape is not None:
            found[name] = tuple(d if isinstance(d, int) else 1 for d in shape)
    return found


def cut_graph(model: ir.Model, *, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> CutGraph:
    """Blocks and tensors of a prepared model; symbolic sizes of inputs not in `input_shapes` count as 1."""
    graph = model.graph
    sizes = shapes.infer(model, concrete_inputs(model, input_shapes or {}))
    open_axes = any(not isinstance(d, int) for v in graph.inputs for d in v.shape or (None,))
    known = shapes.infer(model) if open_axes else sizes
    const: dict[ir.Value, bool] = {}
    nodes = [n for n in graph if not (n.outputs and all(surgery.is_constant(o, const) for o in n.outputs))]
    reads = {n: tuple(dict.fromkeys(v for v in surgery.reads(n) if not surgery.is_constant(v, const))) for n in nodes}
    types = {v: v.type or getattr(known.get(v.name or ""), "type", None) for n in nodes for v in n.outputs}
    raw = _raw(graph, nodes, reads)
    group = grouping.groups(model, nodes, reads, types, const)
    cheap = grouping.cheap(nodes, reads, raw, group)
    costs = _node_costs(model, input_shapes or {})
    builder = _Builder(model, known, sizes, raw)
    members: dict[int, list[ir.Node]] = {}
    for n in nodes:
        members.setdefault(group[n], []).append(n)
    users: dict[ir.Value, set[ir.Node]] = {}
    for n in nodes:
        for v in reads[n]:
            users.setdefault(v, set()).add(n)
    blocks = []
    for part in _ordered(members, reads, group, {n: i for i, n in enumerate(nodes)}):
        inside = set(part)
        outer = dict.fromkeys(v for n in part for v in reads[n] if v.producer() not in inside)
        made = [o for n in part for o in n.outputs if o.is_graph_output() or users.get(o, inside) - inside]
        last = part[-1]
        blocks.append(
            Block(
                name=last.name or last.op_type,
                nodes=tuple(n.name or "" for n in part),
                op_types=tuple(n.op_type for n in part),
                macs=sum(costs[n.name or ""].macs for n in part),
                weight_bytes=sum(costs[n.name or ""].weight_bytes for n in part),
                output_bytes=sum(costs[n.name or ""].output_bytes for n in part),
                reads=tuple(builder.number(v) for v in outer),
                writes=tuple(builder.number(v) for v in made),
                cheap=all(n in cheap for n in part),
            )
        )
    return CutGraph(tuple(blocks), _typed(model, builder.tensors), tuple(sorted(builder.unknown)))


def _typed(model: ir.Model, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """The tensors, with types that inference could not tell asked of the runtime."""
    missing = [v.name for v in tensors if v.dtype is None]
    told = _runtime_types.ask(model, missing) if missing else {}
    for t, v in enumerate(tensors):
        if v.name in told:
            dtype, shape = told[v.name]
            exact = tuple(d for d in shape if isinstance(d, int))
            nbytes, wire = grouping.tensor_bytes(exact if len(exact) == len(shape) else None, dtype)
            tensors[t] = dataclasses.replace(v, dtype=dtype, shape=shape, nbytes=nbytes, wire_bytes=wire)
    return tuple(tensors)


@dataclass(frozen=True, slots=True)
class _Costs:
    macs: int
    weight_bytes: int
    output_bytes: int


def _node_costs(model: ir.Model, input_shapes: Mapping[str, tuple[int, ...]]) -> dict[str, _Costs]:
    """Costs of each node of the main graph, its sub-graphs' included."""
    counted = iter(cost.costs(model, input_shapes=input_shapes).nodes)
    found = {}
    for node in model.graph:
        inner = 1 + sum(1 for body in surgery.bodies(node) for _ in surgery.walk(body))
        lines = [next(counted) for _ in range(inner)]
        found[node.name or ""] = _Costs(
            sum(c.macs or 0 for c in lines),
            sum(c.weight_bytes for c in lines),
            sum(c.output_bytes or 0 for c in lines),
        )
    return found


def _raw(
    graph: ir.Graph, nodes: Iterable[ir.Node], reads: Mapping[ir.Node, tuple[ir.Value, ...]]
) -> frozenset[ir.Value]:
    """Inputs, and what is made from inputs alone by steps that keep them readable."""
    raw = {v for v in graph.inputs if not v.is_initializer()}
    for n in nodes:
        if n.op_type in grouping.KEEPS_READABLE and reads[n] and all(v in raw for v in reads[n]):
            raw.update(n.outputs)
    return frozenset(raw)


def _ordered(
    members: Mapping[int, list[ir.Node]],
    reads: Mapping[ir.Node, tuple[ir.Value, ...]],
    group: Mapping[ir.Node, int],
    position: Mapping[ir.Node, int],
) -> Iterator[list[ir.Node]]:
    """Groups so that each comes after what it reads; among those ready, in stored order of their last nodes."""
    above: dict[int, set[int]] = {g: set() for g in members}
    below: dict[int, set[int]] = {g: set() for g in members}
    for g, part in members.items():
        for n in part:
            for v in reads[n]:
                maker = v.producer()
                if maker is not None and group[maker] != g:
                    above[g].add(group[maker])
                    below[group[maker]].add(g)
    waiting = {g: len(a) for g, a in above.items()}
    ready = [(position[members[g][-1]], g) for g, n in waiting.items() if n == 0]
    heapq.heapify(ready)
    while ready:
        _, g = heapq.heappop(ready)
        yield members[g]
        for b in below[g]:
            waiting[b] -= 1
            if not waiting[b]:
                heapq.heappush(ready, (position[members[b][-1]], b))


def _symbol(name: str | None) -> str | None:
    """A symbolic size's name, None for those that inference made up."""
    return None if name is None or name.startswith("unk__") else name


class _Builder:
    """Numbers tensors as they are met."""

    def __init__(
        self,
        model: ir.Model,
        known: Mapping[str, shapes.Known],
        sizes: Mapping[str, shapes.Known],
        raw: frozenset[ir.Value],
    ) -> None:
        self._known, self._sizes, self._raw = known, sizes, raw
        self._inputs = set(model.graph.inputs)
        self._numbers: dict[ir.Value, int] = {}
        self.tensors: list[Tensor] = []
        self.unknown: set[str] = set()
        for value in model.graph.inputs:
            if not value.is_initializer():
                self.number(value)

    def number(self, value: ir.Value) -> int:
        """Position of a tensor, made on first sight."""
        if value not in self._numbers:
            self._numbers[value] = len(self.tensors)
            self.tensors.append(self._tensor(value))
        return self._numbers[value]

    def _tensor(self, value: ir.Value) -> Tensor:
        name = value.name or ""
        known, sized = self._known.get(name), self._sizes.get(name)
        type_ = value.type or (known.type if known else None) or (sized.type if sized else None)
        dtype = type_.dtype if isinstance(type_, ir.TensorType) else None
        shape = value.shape if value in self._inputs or known is None or known.shape is None else known.shape
        exact = sized.sizes if sized is not None else None
        if exact is None and shape is not None and all(isinstance(d, int) for d in shape):
            exact = tuple(int(d) for d in shape if isinstance(d, int))
        if exact is None:
            self.unknown.add(name)
        nbytes, wire = grouping.tensor_bytes(exact, dtype)
        dims = None if shape is None else tuple(d if isinstance(d, int) else _symbol(d.value) for d in shape)
        return Tensor(
            name, dtype, dims, nbytes, wire, value in self._inputs, value.is_graph_output(), value in self._raw
        )
