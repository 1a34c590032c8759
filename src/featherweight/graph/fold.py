"""Bring weights to where they are used: Constant nodes, casts, layout changes and constant arithmetic are folded.

Law: folding never makes the stored model larger (by more than `SLACK_BYTES` an expression), never unties a weight
and never touches quantised weights. A folded Cast from half precision is remembered, see `restore_storage`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx.reference.op_run import RuntimeContextError, RuntimeImplementationError
from onnx_ir.passes import common

from featherweight.errors import ModelError
from featherweight.graph import surgery
from featherweight.graph.weights import FLOAT_TYPES, STORED_DTYPE

SLACK_BYTES = 1024
_LAYOUT = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
_ARITHMETIC = _LAYOUT | {
    "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Neg", "Abs", "Exp", "Log", "Reciprocal", "Cast", "Concat", "Slice",
    "Gather", "Shape", "Size", "ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceL2", "ReduceSumSquare",
    "Range", "ConstantOfShape", "Expand", "Tile", "Where", "Equal", "Less", "Greater", "Not", "And", "Or", "Min",
    "Max", "Mod", "Floor", "Ceil", "Sigmoid", "Tanh", "Softplus", "Relu", "MatMul", "Trilu", "Pad", "Sign", "Split",
}  # fmt: skip
_Array = np.ndarray[Any, Any]


def lift_constants(model: ir.Model) -> str:
    """Turn Constant nodes of every kind into initializers, in their own graph."""
    before = _constants(model)
    try:
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    except ValueError as e:
        raise ModelError(f"a Constant node holds something unknown: {e}; save the model and load it again") from e
    n = before - _constants(model)
    return f"{n} Constant nodes" if n else ""


def _constants(model: ir.Model) -> int:
    return sum(n.op_type == "Constant" for g in model.graphs() for n in g)


def fold_into_weights(model: ir.Model) -> str:
    """Apply Identity, Cast and layout nodes to the initializer in front of them, as long as all its readers agree."""
    total = 0
    while n := sum(_fold_readers(v) for g in model.graphs() for v in list(g.initializers.values())):
        total += n
    return f"{total} nodes folded into their weight" if total else ""


def _fold_readers(value: ir.Value) -> int:
    """Fold the readers of one initializer if they all are the same operation; returns how many went."""
    tensor = surgery.constant_tensor(value)
    if tensor is None or value.is_graph_output():
        return 0
    copies = [n for n, _ in value.uses() if n.op_type == "Identity" and n.domain == "" and not _is_output(n)]
    for node in copies:
        surgery.replace_uses(node.outputs[0], value, keep=[node])
        surgery.remove_node(node)
    uses = list(value.uses())
    if not uses:
        return len(copies)
    first = uses[0][0]
    same = all(i == 0 and _same_operation(n, first) and not _is_output(n) for n, i in uses)
    if not same or not (first.op_type in _LAYOUT or _widens(first, tensor)):
        return len(copies)
    try:
        result = _evaluate(first)[0]
    except _CANNOT:
        return len(copies)
    stored = value.metadata_props.get(STORED_DTYPE)
    if first.op_type == "Cast" and stored is None:
        value.metadata_props[STORED_DTYPE] = tensor.dtype.name
    for node, _ in uses:
        surgery.replace_uses(node.outputs[0], value, keep=[node])
        surgery.remove_node(node)
    surgery.set_initializer(value, result, dtype=_type_after(first, tensor))
    return len(copies) + len(uses)


def _type_after(node: ir.Node, tensor: ir.TensorProtocol) -> ir.DataType:
    return ir.DataType(node.attributes["to"].as_int()) if node.op_type == "Cast" else tensor.dtype


def _is_output(node: ir.Node) -> bool:
    return len(node.outputs) != 1 or node.outputs[0].is_graph_output()


def _same_operation(a: ir.Node, b: ir.Node) -> bool:
    if a is b:
        return a.domain == "" and _others_constant(a)
    if (a.domain, a.op_type, len(a.inputs)) != (b.domain, b.op_type, len(b.inputs)) or a.domain != "":
        return False
    if {k: v.value for k, v in a.attributes.items()} != {k: v.value for k, v in b.attributes.items()}:
        return False
    return _others_constant(a) and all(_equal(x, y) for x, y in zip(a.inputs[1:], b.inputs[1:], strict=True))


def _others_constant(node: ir.Node) -> bool:
    return all(v is None or surgery.constant_tensor(v) is not None for v in node.inputs[1:])


def _equal(a: ir.Value | None, b: ir.Value | None) -> bool:
    left, right = surgery.constant(a), surgery.constant(b)
    return a is b or (left is not None and right is not None and np.array_equal(left, right))


def _widens(node: ir.Node, tensor: ir.TensorProtocol) -> bool:
    """A Cast between float types whose result holds every value of the input exactly."""
    if node.op_type != "Cast" or tensor.dtype not in FLOAT_TYPES:
        return False
    to = ir.DataType(node.attributes["to"].as_int())
    return to == tensor.dtype or (to == ir.DataType.FLOAT and tensor.dtype != ir.DataType.FLOAT)


def fold_expressions(model: ir.Model, *, inputs_below_bytes: int = 1 << 62) -> str:
    """Compute what depends on constants only, where the result is not larger than what it replaces.

    `inputs_below_bytes` leaves alone what reads a larger constant.
    """
    total = 0
    namer = surgery.Namer(model)
    for graph in model.graphs():
        for node in list(graph):
            total += _fold_expression(node, graph, namer, inputs_below_bytes)
    if total:
        surgery.remove_unused(model)
    return f"{total} constant expressions computed" if total else ""


def _fold_expression(node: ir.Node, graph: ir.Graph, namer: surgery.Namer, below: int) -> bool:
    if node.domain != "" or node.op_type not in _ARITHMETIC or not node.inputs:
        return False
    if any(o.is_graph_output() for o in node.outputs):
        return False
    tensors = [surgery.constant_tensor(v) for v in node.inputs if v is not None]
    if not tensors or any(t is None or t.dtype == ir.DataType.STRING or t.nbytes >= below for t in tensors):
        return False
    if node.op_type == "Cast" and not _cast_may_fold(node, tensors[0]):
        return False
    freed = sum(
        t.nbytes for v in {v for v in node.inputs if v is not None}
        if len(list(v.uses())) == 1 and not v.is_graph_output() and (t := surgery.constant_tensor(v)) is not None
    )  # fmt: skip
    if _lower_bound(node) > freed + SLACK_BYTES:
        return False
    try:
        results = _evaluate(node)
    except _CANNOT:
        return False
    if len(results) != len(node.outputs) or sum(r.nbytes for r in results) > freed + SLACK_BYTES:
        return False
    for output, result in zip(node.outputs, results, strict=True):
        name = output.name or namer("constant")
        output.name = namer(f"{name}_replaced")
        value = surgery.add_initializer(graph, name, result)
        surgery.replace_uses(output, value)
    surgery.remove_node(node)
    return True


def _cast_may_fold(node: ir.Node, tensor: ir.TensorProtocol | None) -> bool:
    """A large Cast up is a storage form (8-bit codes, half precision): folding it would undo a compression."""
    if tensor is None or "to" not in node.attributes:
        return False
    to = ir.DataType(node.attributes["to"].as_int())
    return tensor.nbytes <= SLACK_BYTES and to not in (ir.DataType.STRING, ir.DataType.BFLOAT16)


def _lower_bound(node: ir.Node) -> int:
    """Bytes the result will surely have, known before computing it, so that nothing absurd is ever allocated."""
    if node.op_type in ("ConstantOfShape", "Expand", "Tile", "Range"):
        given = surgery.constant(node.inputs[0 if node.op_type == "ConstantOfShape" else 1])
        if node.op_type == "Range":
            ends = [surgery.constant(v) for v in node.inputs[:3]]
            if any(e is None for e in ends) or float(ends[2]) == 0:  # type: ignore[arg-type]
                return 1 << 62
            return int(abs((float(ends[1]) - float(ends[0])) / float(ends[2])))  # type: ignore[arg-type]
        if given is None:
            return 1 << 62
        n = 1
        for d in given.reshape(-1):
            n *= max(int(d), 0)
        return n
    if node.op_type == "Pad":
        pads = surgery.constant(node.inputs[1]) if len(node.inputs) > 1 else None
        return 1 << 62 if pads is None else int(np.abs(pads.astype(np.float64)).sum())
    shapes = [t.shape.numpy() for v in node.inputs if (t := surgery.constant_tensor(v)) is not None]
    if node.op_type in ("MatMul", "Gather"):
        sizes = [int(np.prod(s, dtype=np.float64)) for s in shapes]
        return 0 if max(sizes) <= 1 << 20 else 1 << 62
    if node.op_type in _BROADCAST:
        try:
            return int(np.prod(np.broadcast_shapes(*shapes), dtype=np.float64))
        except ValueError:
            return 1 << 62
    return 0


_BROADCAST = frozenset(
    {"Add", "Sub", "Mul", "Div", "Pow", "Where", "Equal", "Less", "Greater", "And", "Or", "Min", "Max", "Mod"}
)
_CANNOT = (
    RuntimeImplementationError, RuntimeContextError, ValueError, TypeError, IndexError, KeyError, NotImplementedError,
    AttributeError, RuntimeError, ZeroDivisionError, OverflowError, MemoryError,
)  # fmt: skip
"""What the reference implementation raises where it lacks an operator or type; the node then simply stays."""


def _evaluate(node: ir.Node) -> list[_Array]:
    """Run one node with constant inputs; layout and casts by numpy, the rest by onnx's reference implementation."""
    arrays = [surgery.constant(v) for v in node.inputs]
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


def restore_storage(model: ir.Model) -> int:
    """Store weights that came in half precision so again (with a Cast), where they are unchanged; returns how many.

    The inverse of folding the Cast: bit-exact, and called before saving so that an untouched weight does not grow.
    """
    restored = 0
    namer = surgery.Namer(model)
    for graph in list(model.graphs()):
        for value in list(graph.initializers.values()):
            stored = value.metadata_props.pop(STORED_DTYPE, None)
            array = surgery.constant(value)
            if stored is None or array is None or value.is_graph_output() or array.nbytes < SLACK_BYTES // 2:
                continue
            narrow = array.astype(ir.DataType[stored].numpy())
            if not np.array_equal(narrow.astype(array.dtype), array, equal_nan=True):
                continue
            name = value.name or namer("weight")
            small = surgery.add_initializer(graph, namer(f"{name}.stored"), narrow, dtype=ir.DataType[stored])
            value.name = namer(f"{name}.wide")
            widen = ir.node("Cast", [small], {"to": int(ir.DataType.FLOAT)}, name=namer(f"{name}/Cast"))
            surgery.insert_after(small, [widen])
            surgery.replace_uses(value, widen.outputs[0])
            surgery.remove_initializer(value)
            widen.outputs[0].name = name
            restored += 1
    return restored
