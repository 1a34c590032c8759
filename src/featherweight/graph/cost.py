"""What a model costs by its graph alone: bytes, multiply-accumulates, planned peak of activations, training memory.

These are counts, not measurements. Rules of the activation peak (those ONNX Runtime's planner follows in essence):
nodes run in stored order; a tensor lives from its node to its last reader; inputs of the model live throughout, its
outputs to the end; what depends on constants only is computed at load and is no activation; Reshape and its like
share their input's buffer; an element-wise node writes into an input of the same size that nobody reads later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from featherweight.graph import shapes, surgery
from featherweight.graph.macs import node_macs
from featherweight.graph.weights import FLOAT_TYPES, stored_size_bytes

Optimizer = Literal["sgd", "momentum", "adam"]
OPTIMIZER_STATES: dict[Optimizer, int] = {"sgd": 0, "momentum": 1, "adam": 2}
"""Values the optimiser keeps for each weight (Adam: first and second moment; Kingma & Ba, ICLR 2015)."""

_ALIASES = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Dropout"})
IN_PLACE = frozenset(
    {
        "Relu", "LeakyRelu", "PRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Tanh",
        "Clip", "Softplus", "Softsign", "Mish", "Gelu", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Neg",
        "Abs", "Floor", "Ceil", "Round", "Sign", "Not", "Add", "Sub", "Mul", "Div", "Sum", "Max", "Min",
        "Softmax", "LogSoftmax", "BatchNormalization", "Pow", "Where",
    }
)  # fmt: skip
_SAVES_OUTPUT = frozenset({"Relu", "Sigmoid", "Tanh", "Softmax", "LogSoftmax", "Exp", "Sqrt", "Reciprocal", "Clip"})
_SAVES_NOTHING = frozenset(
    {
        "Add", "Sub", "Sum", "Concat", "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Identity",
        "Split", "Slice", "Pad", "AveragePool", "GlobalAveragePool", "ReduceMean", "ReduceSum", "Neg", "Shape",
        "Size", "Expand", "Tile", "Cast", "DepthToSpace", "SpaceToDepth", "Resize", "Dropout",
    }
)  # fmt: skip


@dataclass(frozen=True)
class NodeCost:
    """One node. `name` is dotted inside sub-graphs; `macs` counts all runs of a loop body (None: shapes unknown).

    `weight_bytes` are the stored bytes it reads, a tied weight counted at its first reader; `output_bytes` one run.
    """

    name: str
    op_type: str
    macs: int | None
    weight_bytes: int
    output_bytes: int | None


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes to train all float weights in float32."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """Everything that is in memory at once."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True)
class Costs:
    """Costs of a model at given input shapes. `unknown` are tensors whose shape is not known and counted as 0."""

    nodes: tuple[NodeCost, ...]
    weight_bytes: int
    macs: int
    peak_activation_bytes: int
    peak_node: str
    unknown: tuple[str, ...]
    batch: int
    trainable: int
    saved_bytes: int

    def train_bytes(self, optimizer: Optimizer = "adam", batch: int | None = None) -> TrainingMemory:
        """Memory to train every float weight: weights, gradients, optimiser state, activations kept for the way back.

        Activations scale with `batch` (default: the batch of the shapes given, axis 0 of the first input). A tensor
        is kept if a derivative needs it: inputs of layers and products, outputs of activation functions.
        """
        weights = 4 * self.trainable
        scale = (batch or self.batch) / self.batch
        return TrainingMemory(
            weights, weights, OPTIMIZER_STATES[optimizer] * weights, math.ceil(self.saved_bytes * scale)
        )


def costs(
    model: ir.Model,
    *,
    input_shapes: Mapping[str, tuple[int, ...]] | None = None,
    observed_shapes: Mapping[str, tuple[int, ...]] | None = None,
) -> Costs:
    """Count the costs of a model with unique names (as after normalising).

    Symbolic sizes of inputs not named in `input_shapes` are taken as 1. `observed_shapes` (tensor name -> shape,
    measured in a real run) win over inference, which stops at operators it does not know.
    """
    sizes = _Sizes(model, _inputs(model, input_shapes or {}), observed_shapes or {})
    nodes = tuple(_node_costs(model, sizes))
    peak = _peak(model.graph, sizes)
    first = next(iter(model.graph.inputs), None)
    shape = sizes.shape(first) if first is not None else None
    values = [v for g in model.graphs() for v in g.initializers.values()]
    trainable = sum(t.size for v in values if (t := surgery.constant_tensor(v)) is not None and t.dtype in FLOAT_TYPES)
    return Costs(
        nodes=nodes,
        weight_bytes=sum(stored_size_bytes(v) for v in values),
        macs=sum(n.macs or 0 for n in nodes),
        peak_activation_bytes=peak[0],
        peak_node=peak[1],
        unknown=tuple(sorted(sizes.unknown)),
        batch=max(shape[0], 1) if shape else 1,
        trainable=trainable,
        saved_bytes=_saved_bytes(model, sizes),
    )


def _inputs(model: ir.Model, given: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    found = {}
    for value in model.graph.inputs:
        if value.name and value.name in given:
            found[value.name] = tuple(given[value.name])
        elif value.name and value.shape is not None and not value.is_initializer():
            found[value.name] = tuple(d if isinstance(d, int) else 1 for d in value.shape)
    return found


class _Sizes:
    """Shapes and bytes of every tensor: observed, else inferred; remembers what it could not tell."""

    def __init__(
        self, model: ir.Model, inputs: Mapping[str, tuple[int, ...]], observed: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._known = shapes.infer(model, inputs)
        self._inputs, self._observed = inputs, observed
        self._constant: dict[ir.Value, bool] = {}
        self.unknown: set[str] = set()

    def shape(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The full shape, None if unknown or absent."""
        if value is None:
            return None
        tensor = surgery.constant_tensor(value)
        if tensor is not None:
            return tuple(tensor.shape.numpy())
        name = value.name or ""
        if name in self._observed:
            return tuple(self._observed[name])
        if name in self._inputs:
            return self._inputs[name]
        known = self._known.get(name)
        if known is not None and known.sizes is not None:
            return known.sizes
        if value.shape is not None and all(isinstance(d, int) for d in value.shape):
            return tuple(int(d) for d in value.shape if isinstance(d, int))
        return None

    def nbytes(self, value: ir.Value) -> int:
        """Bytes at run time; 0 (and noted) where the shape is unknown."""
        shape = self.shape(value)
        if shape is None:
            if value.name:
                self.unknown.add(value.name)
            return 0
        known = self._known.get(value.name or "")
        dtype = value.dtype or (known.type.dtype if known is not None and known.type is not None else None)
        width = dtype.bitwidth if dtype is not None and dtype != ir.DataType.STRING else 32
        return -(-math.prod(shape) * width // 8)

    def is_constant(self, value: ir.Value | None) -> bool:
        """True for what is computed when the model is loaded."""
        return surgery.is_constant(value, self._constant)


def _node_costs(model: ir.Model, sizes: _Sizes) -> Iterator[NodeCost]:
    paths = surgery.paths(model)
    counted: set[ir.Value] = set()

    def visit(graph: ir.Graph, runs: int | None) -> Iterator[NodeCost]:
        for node in graph:
            weight_bytes = 0
            for value in node.inputs:
                if value is not None and value not in counted and surgery.constant_tensor(value) is not None:
                    counted.add(value)
                    weight_bytes += stored_size_bytes(value)
            at_load = bool(node.outputs) and all(sizes.is_constant(o) for o in node.outputs)
            once = 0 if at_load else node_macs(
                node, [sizes.shape(v) for v in node.inputs], [sizes.shape(v) for v in node.outputs]
            )  # fmt: skip
            macs = 0 if once == 0 else None if once is None or runs is None else once * runs
            output = 0 if at_load else sum(sizes.nbytes(o) for o in node.outputs if o.name)
            yield NodeCost(paths[node], node.op_type, macs, weight_bytes, output)
            for body in surgery.bodies(node):
                trips = _trips(node, sizes)
                yield from visit(body, None if trips is None or runs is None else runs * trips)

    yield from visit(model.graph, 1)


def _trips(node: ir.Node, sizes: _Sizes) -> int | None:
    """How often the body runs: known for Scan and for a Loop with a constant count (its upper bound); 1 for If."""
    if node.op_type == "Loop":
        count = surgery.constant(node.inputs[0])
        return None if count is None or count.size != 1 else int(count.reshape(-1)[0])
    if node.op_type == "Scan" and "num_scan_inputs" in node.attributes:
        n = node.attributes["num_scan_inputs"].as_int()
        axes = node.attributes["scan_input_axes"].as_ints() if "scan_input_axes" in node.attributes else [0] * n
        shape = sizes.shape(node.inputs[-n]) if axes and 0 < n <= len(node.inputs) else None
        return None if shape is None or not -len(shape) <= axes[0] < len(shape) else shape[axes[0]]
    return 1 if node.op_type == "If" else None


def _peak(graph: ir.Graph, sizes: _Sizes) -> tuple[int, str]:
    """(bytes, name of the node) where most activations live at once; tensors of outer graphs are not counted here."""
    order = list(graph)
    root = _buffers(graph, order)
    last: dict[ir.Value, int] = {}
    for position, node in enumerate(order):
        for value in _reads(node):
            last[root.get(value, value)] = position
    forever = {root.get(v, v) for v in graph.outputs}
    inputs = [v for v in graph.inputs if not surgery.is_constant(v)]
    live = sum(sizes.nbytes(v) for v in inputs)
    peak, where = live, ""
    held = set(inputs)
    for position, node in enumerate(order):
        new = [o for o in node.outputs if o.name and root.get(o, o) is o and not sizes.is_constant(o)]
        reused = _reused(node, position, last, forever, held - set(inputs), root, sizes)
        inside = max((_peak(body, sizes)[0] for body in surgery.bodies(node)), default=0)
        added = sum(sizes.nbytes(o) for o in new)
        saved = sizes.nbytes(reused) if reused is not None else 0
        if live + added - saved + inside > peak:
            peak, where = live + added - saved + inside, node.name or node.op_type
        live += added
        held.update(new)
        done = {v for v in held if v not in forever and v not in inputs and last.get(v, position) <= position}
        live -= sum(sizes.nbytes(v) for v in done)
        held -= done
    return peak, where


def _buffers(graph: ir.Graph, order: list[ir.Node]) -> dict[ir.Value, ir.Value]:
    """For tensors that share another's buffer: the tensor that owns it."""
    root: dict[ir.Value, ir.Value] = {}
    for node in order:
        source = node.inputs[0] if node.inputs else None
        if node.op_type not in _ALIASES or source is None or node.outputs[0].is_graph_output():
            continue
        owner = root.get(source, source)
        if owner.producer() is not None and owner.graph is graph:
            root[node.outputs[0]] = owner
    return root


def _reads(node: ir.Node) -> Iterator[ir.Value]:
    """Everything a node needs: its inputs and what its bodies capture."""
    yield from (v for v in node.inputs if v is not None)
    for body in surgery.bodies(node):
        yield from (v for v in body.outputs)
        for inner in body:
            yield from _reads(inner)


def _reused(
    node: ir.Node, position: int, last: Mapping[ir.Value, int], forever: set[ir.Value], held: set[ir.Value],
    root: Mapping[ir.Value, ir.Value], sizes: _Sizes,
) -> ir.Value | None:  # fmt: skip
    """The input whose buffer an element-wise node takes over for its output."""
    if node.op_type not in IN_PLACE or len([o for o in node.outputs if o.name]) != 1:
        return None
    size = sizes.nbytes(node.outputs[0])
    for value in node.inputs:
        if value is None:
            continue
        owner = root.get(value, value)
        if owner in held and owner not in forever and last.get(owner) == position and sizes.nbytes(owner) == size:
            return owner
    return None


def _saved_bytes(model: ir.Model, sizes: _Sizes) -> int:
    """Bytes of the distinct activations that the backward pass reads."""
    saved: dict[ir.Value, int] = {}
    for graph in model.graphs():
        root = _buffers(graph, list(graph))
        for node in graph:
            if node.op_type in _SAVES_NOTHING or all(sizes.is_constant(o) for o in node.outputs):
                continue
            kept = node.outputs[:1] if node.op_type in _SAVES_OUTPUT else node.inputs
            for value in kept:
                if value is None or sizes.is_constant(value):
                    continue
                owner = root.get(value, value)
                saved[owner] = sizes.nbytes(owner)
    return sum(saved.values())
