"""Constant expressions: what is computed from stored tensors alone.

Law: an expression is computed only if the result takes no more bytes than the stored tensors it makes unnecessary.
So a decoder of compressed weights stays, a tied weight stays tied, and nothing absurd is ever allocated.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference.op_run import RuntimeContextError, RuntimeImplementationError

from featherweight.graph import surgery

SLACK_BYTES = 1024
"""Shapes, axes and vectors may grow the model by this much an expression; matrices may not."""
LAYOUT = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_UNKNOWN = 1 << 62
_ARITHMETIC = LAYOUT | {
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Neg", "Abs", "Exp", "Log", "Reciprocal", "Cast", "Concat", "Slice",
    "Gather", "Shape", "Size", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare",
    "Range", "ConstantOfShape", "Expand", "Tile", "Where", "Equal", "Less", "Greater", "Not", "And", "Or", "Min",
    "Max", "Mod", "Floor", "Ceil", "Sigmoid", "Tanh", "Softplus", "Relu", "MatMul", "Trilu", "Pad", "Sign", "Split",
    "GreaterOrEqual", "LessOrEqual", "Xor",
}  # fmt: skip
_Array = np.ndarray[Any, Any]
_Env = dict[ir.Value, _Array]


def fold_expressions(model: ir.Model, *, inputs_below_bytes: int = _UNKNOWN) -> str:
    """Replace constant expressions by their values, in place; `inputs_below_bytes` skips those that read more."""
    known: dict[ir.Value, bool] = {}
    ends = []
    for graph in model.graphs():
        for node in graph:
            for output in node.outputs:
                if surgery.is_constant(output, known) and _is_end(output, known):
                    ends.append((graph, output))
    namer = surgery.Namer(model)
    total = sum(_fold_end(graph, end, namer, inputs_below_bytes) for graph, end in ends)
    if total:
        surgery.remove_unused(model)
    return f"{total} constant expressions computed" if total else ""


def fold_small(model: ir.Model, *, below_bytes: int) -> int:
    """Compute every node whose inputs are stored tensors below `below_bytes` each, in place; returns how many.

    For scratch copies: results may be larger than what they free, but not by more than `below_bytes`.
    """
    total = 0
    for graph in model.graphs():
        namer = surgery.Namer(model)
        for node in list(graph):
            if node.domain != "" or node.op_type not in _ARITHMETIC or any(o.is_graph_output() for o in node.outputs):
                continue
            tensors = [None if v is None else surgery.constant_tensor(v) for v in node.inputs]
            stored = [t for v, t in zip(node.inputs, tensors, strict=True) if v is not None]
            if not stored or any(t is None or t.dtype == ir.DataType.STRING or t.nbytes >= below_bytes for t in stored):
                continue
            results = _evaluated(node, [surgery.constant(v) for v in node.inputs], below_bytes)
            if results is None:
                continue
            for output, result in zip(node.outputs, results, strict=True):
                name = output.name or namer("constant")
                output.name = namer(f"{name}_replaced")
                surgery.replace_uses(output, surgery.add_initializer(graph, name, result))
            surgery.remove_node(node)
            total += 1
    return total


def _evaluated(node: ir.Node, arrays: list[_Array | None], limit: int) -> list[_Array] | None:
    """The node's results; None where it cannot be computed here or they take more than `limit` bytes."""
    if _lower_bound(node, arrays) > limit:
        return None
    try:
        results = evaluate(node, arrays)
    except CANNOT:
        return None
    fits = len(results) == len(node.outputs) and sum(r.nbytes for r in results) <= limit
    return results if fits else None


def _is_end(value: ir.Value, known: dict[ir.Value, bool]) -> bool:
    """True if something that is not constant reads the value."""
    readers = [node for node, _ in value.uses()]
    return any(not all(surgery.is_constant(o, known) for o in n.outputs) for n in readers)


def _fold_end(graph: ir.Graph, end: ir.Value, namer: surgery.Namer, below: int) -> bool:
    cone = _cone(end)
    if end.is_graph_output() or cone is None:
        return False
    stored = {v for node in cone for v in node.inputs if v is not None and v.producer() is None}
    tensors = [t for v in stored if (t := surgery.constant_tensor(v)) is not None]
    if not tensors or any(t.dtype == ir.DataType.STRING or t.nbytes >= below for t in tensors):
        return False
    freed = _freed_bytes(cone, end, stored)
    if _declared_bytes(end) > freed + SLACK_BYTES:
        return False
    result = _evaluate_cone(cone, end, limit=4 * sum(t.nbytes for t in tensors) + (1 << 20))
    if result is None:
        return False
    is_matrix = result.ndim >= 2 and result.dtype.kind not in "iub"
    if result.nbytes > freed + (0 if is_matrix else SLACK_BYTES):
        return False
    name = end.name or namer("constant")
    end.name = namer(f"{name}_replaced")
    surgery.replace_uses(end, surgery.add_initializer(graph, name, result))
    return True


def _cone(end: ir.Value) -> list[ir.Node] | None:
    """The nodes that compute `end`, in order; None if one of them is not ours to compute."""
    order: list[ir.Node] = []
    seen: set[ir.Node] = set()
    stack = [(end.producer(), False)]
    while stack:
        node, entered = stack.pop()
        if node is None or (node in seen and not entered):
            continue
        if entered:
            order.append(node)
            continue
        if node.domain != "" or node.op_type not in _ARITHMETIC or not any(v is not None for v in node.inputs):
            return None
        seen.add(node)
        stack.append((node, True))
        stack.extend((v.producer(), False) for v in node.inputs if v is not None)
    return order or None


def _freed_bytes(cone: list[ir.Node], end: ir.Value, stored: set[ir.Value]) -> int:
    """Bytes of the stored tensors that nobody reads once `end` is computed."""
    dying: set[ir.Node] = set()
    for node in reversed(cone):
        if all(o is end or all(n in dying for n, _ in o.uses()) for o in node.outputs):
            dying.add(node)
    unread = [v for v in stored if not v.is_graph_output() and all(n in dying for n, _ in v.uses())]
    return sum(t.nbytes for v in unread if (t := surgery.constant_tensor(v)) is not None)


def _declared_bytes(value: ir.Value) -> int:
    """Bytes by the recorded shape, 0 if it is not known."""
    if value.shape is None or value.dtype is None or any(not isinstance(d, int) for d in value.shape):
        return 0
    return int(np.prod([float(d) for d in value.shape if isinstance(d, int)])) * value.dtype.bitwidth // 8


def _evaluate_cone(cone: list[ir.Node], end: ir.Value, *, limit: int) -> _Array | None:
    """The value of `end`; None where a step cannot be computed or would allocate more than `limit` bytes."""
    env: _Env = {}
    for node in cone:
        arrays = [None if v is None else env[v] if v in env else surgery.constant(v) for v in node.inputs]
        if _lower_bound(node, arrays) > limit:
            return None
        try:
            results = evaluate(node, arrays)
        except CANNOT:
            return None
        if len(results) != len(node.outputs):
            return None
        env.update(zip(node.outputs, results, strict=True))
    return env.get(end)


def _lower_bound(node: ir.Node, arrays: list[_Array | None]) -> int:
    """Bytes the result will surely have, known before computing it."""
    given = [a for a in arrays if a is not None]
    match node.op_type:
        case "ConstantOfShape":
            return _elements(given[0])
        case "Expand" | "Tile":
            return _elements(given[1]) if len(given) > 1 else _UNKNOWN
        case "Range":
            ends = [float(a.reshape(-1)[0]) if a.size else 0.0 for a in given]
            return int(abs(ends[1] - ends[0]) / abs(ends[2])) if len(ends) == 3 and ends[2] else _UNKNOWN
        case "Pad":
            return int(np.abs(given[1].astype(np.float64)).sum()) if len(given) > 1 else _UNKNOWN
        case "MatMul" | "Gather":
            return 0 if max(a.size for a in given) <= 1 << 20 else _UNKNOWN
        case op if op in _BROADCAST:
            try:
                return _elements(np.array(np.broadcast_shapes(*(a.shape for a in given)), np.float64))
            except ValueError:
                return _UNKNOWN
        case _:
            return 0


def _elements(shape: _Array) -> int:
    return int(min(float(np.prod(np.maximum(shape.astype(np.float64), 0))), float(_UNKNOWN)))


_BROADCAST = frozenset({
    "Add", "Sub", "Mul", "Div", "Pow", "Where", "Equal", "Less", "Greater", "And", "Or", "Min", "Max", "Mod",
    "GreaterOrEqual", "LessOrEqual", "Xor",
})  # fmt: skip
CANNOT = (
    RuntimeImplementationError, RuntimeContextError, ValueError, TypeError, IndexError, KeyError, NotImplementedError,
    AttributeError, RuntimeError, ZeroDivisionError, OverflowError, MemoryError,
)  # fmt: skip
"""What the reference implementation raises where it lacks an operator or type; the node then simply stays."""


def evaluate(node: ir.Node, arrays: list[_Array | None]) -> list[_Array]:
    """Run one node on given inputs; layout and casts by numpy, the rest by onnx's reference implementation."""
    simple = _SIMPLE.get(node.op_type)
    if simple is not None:
        return [simple(node, arrays)]
    from onnx.reference import ReferenceEvaluator

    inputs = [ir.Value(name=f"i{k}") if a is not None else None for k, a in enumerate(arrays)]
    outputs = [ir.Value(name=f"o{k}") for k in range(len(node.outputs))]
    lone = ir.node(node.op_type, inputs, attributes=dict(node.attributes), outputs=outputs)
    version = node.graph.opset_imports.get("") if isinstance(node.graph, ir.Graph) else None
    graph = ir.Graph(
        [v for v in inputs if v is not None], outputs, nodes=[lone], opset_imports={"": version or 21}, name="lone"
    )
    proto = ir.serde.serialize_model(ir.Model(graph, ir_version=10))
    feeds = {f"i{k}": a for k, a in enumerate(arrays) if a is not None}
    with np.errstate(all="ignore"):
        found = ReferenceEvaluator(proto).run(None, feeds)
    return [np.asarray(f) for f in found]


def _axes(node: ir.Node, arrays: list[_Array | None]) -> tuple[int, ...] | None:
    if len(arrays) > 1 and arrays[1] is not None:
        return tuple(int(i) for i in arrays[1].reshape(-1))
    return tuple(node.attributes["axes"].as_ints()) if "axes" in node.attributes else None


def _first(arrays: list[_Array | None]) -> _Array:
    if arrays[0] is None:
        raise ValueError("the first input must be constant")
    return arrays[0]


def _transpose(node: ir.Node, arrays: list[_Array | None]) -> _Array:
    perm = node.attributes["perm"].as_ints() if "perm" in node.attributes else None
    return _first(arrays).transpose(perm)


def _reshape(node: ir.Node, arrays: list[_Array | None]) -> _Array:
    array = _first(arrays)
    target = arrays[1] if len(arrays) > 1 else None
    if target is None:
        raise ValueError("Reshape without a constant shape")
    zero = "allowzero" in node.attributes and node.attributes["allowzero"].as_int() != 0
    return array.reshape([array.shape[i] if d == 0 and not zero else int(d) for i, d in enumerate(target)])


def _unsqueeze(node: ir.Node, arrays: list[_Array | None]) -> _Array:
    return np.expand_dims(_first(arrays), _axes(node, arrays) or ())


def _squeeze(node: ir.Node, arrays: list[_Array | None]) -> _Array:
    return np.squeeze(_first(arrays), _axes(node, arrays))


def _flatten(node: ir.Node, arrays: list[_Array | None]) -> _Array:
    array = _first(arrays)
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    axis = axis + array.ndim if axis < 0 else axis
    return array.reshape(int(np.prod(array.shape[:axis])), -1)


def _cast(node: ir.Node, arrays: list[_Array | None]) -> _Array:
    return _first(arrays).astype(ir.DataType(node.attributes["to"].as_int()).numpy())


_SIMPLE: dict[str, Callable[[ir.Node, list[_Array | None]], _Array]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Unsqueeze": _unsqueeze,
    "Squeeze": _squeeze,
    "Flatten": _flatten,
    "Cast": _cast,
}
