"""Bring weights to where they are used: Constant nodes, casts and layout changes in front of them are folded.

Law: folding never unties a weight and never touches quantised weights. A folded Cast from half precision is
remembered, so that the weight can be stored as it came: see `restore_storage`.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from featherweight.errors import ModelError
from featherweight.graph import surgery
from featherweight.graph.expressions import CANNOT, LAYOUT, evaluate
from featherweight.graph.weights import FLOAT_TYPES, STORED_DTYPE

_TINY_BYTES = 512
"""Below this a Cast costs as much as it saves."""


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


def flush_denormals(model: ir.Model) -> str:
    """Set weights to zero that are too small to be normal float32 numbers; small tensors (epsilons) stay as they are.

    Many processors take a hundred times as long for a product with one, and the runtime gives no way to say that they
    are zero once a process has opened a session. No sum of such products reaches what float32 can tell apart.
    """
    flushed = tensors = 0
    for value in [v for g in model.graphs() for v in g.initializers.values()]:
        tensor = surgery.constant_tensor(value)
        if (
            tensor is None
            or tensor.dtype != ir.DataType.FLOAT
            or len(tensor.shape) < 2
            or tensor.size < _TINY_BYTES // 4
        ):
            continue
        array = tensor.numpy()
        tiny = (np.abs(array) < np.finfo(np.float32).tiny) & (array != 0)
        if found := int(tiny.sum()):
            surgery.set_initializer(value, np.where(tiny, np.float32(0), array))
            flushed, tensors = flushed + found, tensors + 1
    return f"{flushed} values below float32's normal range in {tensors} weights are zero" if flushed else ""


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
    if not same or not (first.op_type in LAYOUT or _widens(first, tensor)):
        return len(copies)
    try:
        result = evaluate(first, [surgery.constant(v) for v in first.inputs])[0]
    except CANNOT:
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
    if node.op_type != "Cast" or "to" not in node.attributes or tensor.dtype not in FLOAT_TYPES:
        return False
    to = ir.DataType(node.attributes["to"].as_int())
    return to == tensor.dtype or (to == ir.DataType.FLOAT and tensor.dtype != ir.DataType.FLOAT)


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
            if stored is None or array is None or value.is_graph_output() or array.nbytes < _TINY_BYTES:
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
