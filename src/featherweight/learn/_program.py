"""A graph as a list of steps over numbered values: built once, constants folded once, run many times.

All graphs of a model, bodies of control flow included, share one numbering. A `Plan` is the part of the steps that
some outputs need; it drops each value after its last reader, so that without gradients a run holds what is alive.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.core import Note
from featherweight.errors import FeatherweightError, ModelError, RunError
from featherweight.graph import surgery
from featherweight.learn import _tensors
from featherweight.learn._fence import Fence
from featherweight.learn._fusing import gelu_argument
from featherweight.learn.ops import Call, Kernel, find
from featherweight.learn.ops.quantizing import fused_quantize
from featherweight.learn.ops.registry import describe

ABSENT = 0
"""The number of a value that is not there."""
_STANDARD = ("", "ai.onnx")


@dataclass(frozen=True, slots=True)
class Step:
    """One kernel, the numbers of what it reads and writes, and what it is in words."""

    kernel: Kernel
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    where: str


@dataclass(frozen=True)
class Plan:
    """Steps in order, and after each what is read no more."""

    steps: tuple[Step, ...]
    free: tuple[tuple[int, ...], ...]
    reads: tuple[int, ...]
    """Values that must be there before: inputs, parameters, constants."""

    def run(self, values: list[Any]) -> None:
        """Execute in place on the list of values. Raises RunError naming operator and node."""
        step: Step | None = None
        try:
            for step, free in zip(self.steps, self.free, strict=True):
                result = step.kernel(*[values[i] for i in step.inputs])
                if len(step.outputs) == 1:
                    values[step.outputs[0]] = result[0] if isinstance(result, tuple) else result
                else:
                    for number, value in zip(step.outputs, result, strict=False):
                        values[number] = value
                for number in free:
                    values[number] = None
        except FeatherweightError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError, ArithmeticError) as e:
            where = step.where if step is not None else "the graph"
            raise RunError(f"{where} cannot be computed: {' '.join(str(e).split())[:500]}") from e


@dataclass
class Body:
    """A sub-graph as a function of its inputs and of what it reads from outside (`captures`, by number)."""

    plan: Plan
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    captures: tuple[int, ...]
    program: Program
    given: dict[int, int] = field(default_factory=dict)
    """Number of a captured value -> its place among the captures of the node."""

    def __call__(self, inputs: Sequence[Any], outside: Sequence[Any]) -> list[Any]:
        """Outputs for these inputs; `outside` are all captures of the node."""
        values: list[Any] = [None] * self.program.size
        for number, place in self.given.items():
            values[number] = outside[place]
        for number, value in zip(self.inputs, inputs, strict=True):
            values[number] = value
        self.plan.run(values)
        return [values[i] for i in self.outputs]


@dataclass(frozen=True)
class Source:
    """A value made of parameters instead of by its node: `kernel` of the values `inputs`, numbered beforehand.

    `reads` are those of them that are computed in the graph.
    """

    kernel: Kernel
    inputs: tuple[int, ...]
    reads: tuple[ir.Value, ...]
    where: str


class Program:
    """The steps of a model; `sources` replaces the producers of some values (encoded weights)."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.numbers: dict[ir.Value, int] = {}
        self.size = 1
        self.constants: dict[int, Tensor] = {}
        self.steps: list[Step] = []
        self.sources: dict[ir.Value, Source] = {}
        self.parameters: set[int] = set()
        self.notes: list[Note] = []
        self._maker: dict[int, int] = {}
        self._calls: dict[ir.Node, Call] = {}

    def number(self, value: ir.Value | None) -> int:
        """The number of a value, given at first sight."""
        if value is None or (value.name == "" and value.producer() is None):
            return ABSENT
        if value not in self.numbers:
            self.numbers[value] = self.fresh()
        return self.numbers[value]

    def fresh(self) -> int:
        """A number for a value that is in no graph."""
        self.size += 1
        return self.size - 1

    def compile(self) -> None:
        """Make the steps of all nodes that an output needs. Raises ModelError for what cannot run at all."""
        self._compile(self.model.graph, self.model.graph.outputs)
        read = {i for step in self.steps for i in step.inputs}
        read.update(self.number(o) for o in self.model.graph.outputs)
        self.constants = {i: t for i, t in self.constants.items() if i in read}

    def _compile(self, graph: ir.Graph, outputs: Iterable[ir.Value]) -> None:
        for value in graph.initializers.values():
            self._store(value)
        wanted = needed(graph, outputs, self.sources)
        for node in graph:
            if node in wanted and not all(self.number(v) in self.parameters for v in node.outputs):
                self._add(node)
            for value in node.outputs:
                if value in self.sources:
                    self._add_source(value)

    def _store(self, value: ir.Value) -> None:
        number = self.number(value)
        if value in self.sources:
            self._add_source(value)
            return
        stored = value.const_value
        if number not in self.parameters and stored is not None and stored.dtype in _tensors.HELD:
            self.constants[number] = _tensors.from_ir(stored)

    def _add_source(self, value: ir.Value) -> None:
        source = self.sources[value]
        self._append(Step(source.kernel, source.inputs, (self.number(value),), source.where))

    def _append(self, step: Step) -> None:
        for number in step.outputs:
            self._maker[number] = len(self.steps)
        self.steps.append(step)

    def _add(self, node: ir.Node) -> None:
        opset = self.model.graph.opset_imports.get("" if node.domain in _STANDARD else node.domain, 1)
        call = Call(node, opset, tuple(self.constants.get(self.number(v)) for v in node.inputs), self._bodies(node))
        self._calls[node] = call
        kernel, inputs, foldable = self._kernel(node, call)
        captured = sorted({c for body in call.bodies.values() for c in body.captures})
        for body in call.bodies.values():
            body.given = {c: captured.index(c) for c in body.captures}
        inputs = (*inputs, *captured)
        outputs = tuple(self.number(v) for v in node.outputs[: call.n_outputs])
        step = Step(kernel, inputs, outputs, describe(node))
        foldable = foldable and all(i == ABSENT or i in self.constants for i in inputs)
        if not (foldable and self._fold(step)):
            self._append(step)

    def _kernel(self, node: ir.Node, call: Call) -> tuple[Kernel, tuple[int, ...], bool]:
        """Kernel, inputs, and whether it gives the same at every call."""
        inputs = tuple(self.number(v) for v in node.inputs)
        form = find(node, call.opset)
        if form is None:
            self.notes.append(Note(describe(node), "not known here: run by ONNX Runtime, and no gradient passes it"))
            return Fence(node, self.model), inputs, True
        fused = self._fused(node)
        if fused is not None:
            quantize = self._calls[fused]
            return fused_quantize(quantize), tuple(self.number(v) for v in fused.inputs), True
        x = gelu_argument(node, self._scalar)
        if x is not None:
            return functional.gelu, (self.number(x),), True
        try:
            return form.build(call), inputs, node.op_type not in surgery.RANDOM_OPS
        except ModelError as e:
            if call.bodies:
                raise
            self.notes.append(Note(describe(node), f"{e}: run by ONNX Runtime, and no gradient passes it"))
            return Fence(node, self.model), inputs, True

    def _fused(self, node: ir.Node) -> ir.Node | None:
        """The QuantizeLinear in front of a DequantizeLinear with the same scale and zero point."""
        if node.op_type != "DequantizeLinear" or node.inputs[0] is None:
            return None
        before = node.inputs[0].producer()
        if before is None or before.op_type != "QuantizeLinear" or before not in self._calls:
            return None
        if any(node.attributes.get(k) != before.attributes.get(k) and _value(node, k) != _value(before, k)
               for k in ("axis", "block_size")):  # fmt: skip
            return None
        pairs = list(zip(_padded(node), _padded(before), strict=True))[1:]
        return before if all(self._same(a, b) for a, b in pairs) else None

    def _scalar(self, value: ir.Value) -> float | None:
        found = self.constants.get(self.number(value))
        return float(found.item()) if found is not None and found.numel() == 1 else None

    def _same(self, a: ir.Value | None, b: ir.Value | None) -> bool:
        left, right = self.constants.get(self.number(a)), self.constants.get(self.number(b))
        if a is b:
            return True
        return left is not None and right is not None and left.dtype == right.dtype and torch.equal(left, right)

    def _bodies(self, node: ir.Node) -> dict[str, Body]:
        bodies = {}
        for name, attribute in node.attributes.items():
            if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
                bodies[name] = self._body(attribute.as_graph())
        return bodies

    def _body(self, graph: ir.Graph) -> Body:
        inputs = tuple(self.number(v) for v in graph.inputs)
        outputs = tuple(self.number(v) for v in graph.outputs)
        start = len(self.steps)
        self._compile(graph, graph.outputs)
        inner, self.steps = self.steps[start:], self.steps[:start]
        for step in inner:
            for number in step.outputs:
                self._maker.pop(number, None)
        plan = _plan(inner, outputs, inputs)
        captures = tuple(i for i in plan.reads if i not in inputs)
        return Body(plan, inputs, outputs, captures, self)

    def _fold(self, step: Step) -> bool:
        """Compute a step of constants now; False if that fails (then it fails, or not, when it is run)."""
        try:
            with torch.no_grad():
                result = step.kernel(*[self.constants.get(i) for i in step.inputs])
        except (FeatherweightError, RuntimeError, TypeError, ValueError, IndexError):
            return False
        for number, value in zip(step.outputs, result if isinstance(result, tuple) else (result,), strict=False):
            self.constants[number] = value
        return True

    def plan(self, inputs: Sequence[int], outputs: Sequence[int]) -> Plan:
        """The steps that lead to `outputs` when `inputs` are given."""
        given = set(inputs)
        needed: set[int] = set()
        stack = [i for i in outputs if i not in given]
        while stack:
            maker = self._maker.get(stack.pop())
            if maker is not None and maker not in needed:
                needed.add(maker)
                stack.extend(i for i in self.steps[maker].inputs if i not in given)
        return _plan([self.steps[i] for i in sorted(needed)], outputs, inputs)


def _plan(steps: Sequence[Step], outputs: Sequence[int], inputs: Sequence[int]) -> Plan:
    made = {i for step in steps for i in step.outputs} - set(inputs)
    last: dict[int, int] = {}
    for place, step in enumerate(steps):
        for number in (*step.inputs, *step.outputs):
            if number in made:
                last[number] = place
    kept = set(outputs)
    free: list[list[int]] = [[] for _ in steps]
    for number, place in last.items():
        if number not in kept:
            free[place].append(number)
    reads = dict.fromkeys(i for step in steps for i in step.inputs if i not in made and i != ABSENT)
    reads.update(dict.fromkeys(i for i in outputs if i not in made))
    return Plan(tuple(steps), tuple(map(tuple, free)), tuple(reads))


def needed(graph: ir.Graph, outputs: Iterable[ir.Value], sources: Mapping[ir.Value, Source]) -> set[ir.Node]:
    """Nodes of one graph that its outputs depend on, not counting what is behind a replaced value."""
    found: set[ir.Node] = set()
    stack = list(outputs)
    while stack:
        value = stack.pop()
        if value in sources:
            stack.extend(sources[value].reads)
            continue
        node = value.producer()
        if node is None or node in found or node.graph is not graph:
            continue
        found.add(node)
        stack.extend(outer_reads(node))
    return found


def outer_reads(node: ir.Node) -> list[ir.Value]:
    """Inputs of a node and whatever the graphs inside it read."""
    reads = [v for v in node.inputs if v is not None]
    for attribute in node.attributes.values():
        if not attribute.is_ref() and attribute.type == ir.AttributeType.GRAPH:
            inner = attribute.as_graph()
            reads.extend(v for n in surgery.walk(inner) for v in n.inputs if v is not None)
            reads.extend(inner.outputs)
    return reads


def _value(node: ir.Node, name: str) -> int:
    found = node.attributes.get(name)
    return {"axis": 1}.get(name, 0) if found is None else int(found.value)


def _padded(node: ir.Node) -> list[ir.Value | None]:
    return [*node.inputs, None, None][:3]
