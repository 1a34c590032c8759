"""Lift a model to the opset the rest of featherweight is written for.

onnx's own converter does most operators. Those it gets wrong (tried against ONNX Runtime, operator by operator)
are hidden from it behind placeholders and rewritten here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import version_converter

from featherweight.errors import ModelError
from featherweight.graph import shapes, surgery

OPSET = 21
"""4-bit types and DequantizeLinear with blocks begin here."""
IR_VERSION = 10
_PLACEHOLDER = "featherweight.lift"

Values = Sequence[ir.Value | None]


def lift_opset(model: ir.Model) -> str:
    """Convert the default domain to opset 21 if it is older; newer ones stay.

    Raises ModelError naming the operator that cannot be converted.
    """
    old = model.opset_imports.get("", OPSET)
    model.ir_version = max(model.ir_version or IR_VERSION, IR_VERSION)
    if old >= OPSET:
        return ""
    if _unchanged(model, old):
        model.opset_imports[""] = OPSET
        return f"{old} -> {OPSET}, no operator changed"
    if model.functions:
        raise ModelError(f"the opset {old} cannot be lifted to {OPSET} with functions in the model; export it without")
    hidden = _hide(model, old)
    _convert(model, old)
    _rewrite_hidden(model, hidden)
    model.opset_imports.pop(_PLACEHOLDER, None)
    model.opset_imports[""] = OPSET
    return f"{old} -> {OPSET}"


def _unchanged(model: ir.Model, old: int) -> bool:
    """True if each operator has the same definition in both opsets."""
    for node in surgery.walk(model.graph):
        if node.domain == "":
            try:
                a = onnx.defs.get_schema(node.op_type, old, "").since_version
                b = onnx.defs.get_schema(node.op_type, OPSET, "").since_version
            except onnx.defs.SchemaError:
                return False
            if a != b:
                return False
    return True


def _hide(model: ir.Model, old: int) -> dict[str, int]:
    """Move operators that need our own rewriting into a domain the converter leaves alone."""
    hidden: dict[str, int] = {}
    for node in surgery.walk(model.graph):
        if node.domain == "" and (rule := _RULES.get(node.op_type)) and rule[0](node, old):
            node.domain = _PLACEHOLDER
            hidden[node.op_type] = hidden.get(node.op_type, 0) + 1
    if hidden:
        model.opset_imports[_PLACEHOLDER] = 1
    return hidden


def _convert(model: ir.Model, old: int) -> None:
    """Run onnx's converter on the graph without its large weights, then take its graph over."""
    proto, large = shapes.bare_proto(model)
    try:
        converted = ir.serde.deserialize_model(version_converter.convert_version(proto, OPSET))
    except (
        version_converter.ConvertError,
        onnx.shape_inference.InferenceError,
        onnx.checker.ValidationError,
        RuntimeError,
        ValueError,
        IndexError,
    ) as e:
        raise ModelError(
            f"the model's opset {old} cannot be lifted to {OPSET}: {str(e).strip()[:200]}; export it with a newer opset"
        ) from e
    graph = converted.graph
    for value, original in [(v, large[v.name]) for v in graph.inputs if v.name and v.name in large]:
        graph.inputs.remove(value)
        value.const_value = original.const_value
        value.type, value.shape = original.type, original.shape
        value.metadata_props.update(original.metadata_props)
        graph.register_initializer(value)
    stored = {name: v.const_value for g in model.graphs() for name, v in g.initializers.items() if g is not model.graph}
    for value in (v for g in converted.graphs() if g is not graph for v in g.initializers.values()):
        # Side files are known to our tensors only, so weights inside sub-graphs come back as they were.
        value.const_value = stored.get(value.name or "") or value.const_value
    _check_interface(model.graph, graph)
    for domain, version in model.graph.opset_imports.items():
        graph.opset_imports.setdefault(domain, version)
    graph.metadata_props.update(model.graph.metadata_props)
    model.graph = graph


def _check_interface(old: ir.Graph, new: ir.Graph) -> None:
    for a, b in ((old.inputs, new.inputs), (old.outputs, new.outputs)):
        if [v.name for v in a] != [v.name for v in b]:
            raise ModelError("lifting the opset lost an input or output of the model; export it with a newer opset")
        for left, right in zip(a, b, strict=True):
            right.type, right.shape = left.type, left.shape


def _rewrite_hidden(model: ir.Model, hidden: dict[str, int]) -> None:
    if not hidden:
        return
    namer = surgery.Namer(model)
    for node in list(surgery.walk(model.graph)):
        if node.domain == _PLACEHOLDER:
            new = _RULES[node.op_type][1](node, namer)
            surgery.insert_before(node, new)
            made = new[-1].outputs[0]
            surgery.replace_uses(node.outputs[0], made)
            surgery.remove_node(node)


def _node(
    namer: surgery.Namer, of: ir.Node, op_type: str, inputs: Values, **attributes: int | float | str | list[int]
) -> ir.Node:
    return surgery.make_node(namer, op_type, inputs, of.name or op_type, attributes=attributes)


def _const(namer: surgery.Namer, of: ir.Node, array: np.ndarray) -> ir.Value:
    if of.graph is None or not isinstance(of.graph, ir.Graph):
        raise ModelError(f"node {of.name!r} must be in a graph")
    return surgery.add_initializer(of.graph, namer(f"{of.name or of.op_type}.const"), array)


def _resize(node: ir.Node, namer: surgery.Namer) -> list[ir.Node]:
    """Upsample-7/9 and Resize-10: source = target / scale; nearest rounds down, but up on axes that shrink."""
    given = node.attributes.get("scales")
    scales = node.inputs[1] if given is None else _const(namer, node, np.array(given.as_floats(), np.float32))
    known = surgery.constant(scales)
    mode = node.attributes["mode"].as_string() if "mode" in node.attributes else "nearest"
    mode = "linear" if mode in ("linear", "bilinear") else mode
    common: dict[str, int | float | str | list[int]] = {"mode": mode, "coordinate_transformation_mode": "asymmetric"}
    if mode != "nearest":
        return [_node(namer, node, "Resize", [node.inputs[0], None, scales], **common)]
    rounding = {"floor": np.maximum(known, 1), "ceil": np.minimum(known, 1)} if known is not None else {"floor": None}
    nodes: list[ir.Node] = []
    source = node.inputs[0]
    for nearest, factors in rounding.items():
        if factors is not None and (factors == 1).all() and not (nodes == [] and nearest == "ceil"):
            continue
        by = scales if factors is None else _const(namer, node, factors.astype(np.float32))
        nodes.append(_node(namer, node, "Resize", [source, None, by], nearest_mode=nearest, **common))
        source = nodes[-1].outputs[0]
    return nodes


def _hardmax(node: ir.Node, namer: surgery.Namer) -> list[ir.Node]:
    """Before opset 13 the axes from `axis` on were one axis."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    shape = _node(namer, node, "Shape", [node.inputs[0]])
    flat = _node(namer, node, "Flatten", [node.inputs[0]], axis=axis)
    hard = _node(namer, node, "Hardmax", [flat.outputs[0]], axis=1)
    back = _node(namer, node, "Reshape", [hard.outputs[0], shape.outputs[0]])
    return [shape, flat, hard, back]


def _per_position_norm(node: ir.Node, namer: surgery.Namer) -> list[ir.Node]:
    """BatchNormalization-7 with spatial=0: one mean and variance for every element of a sample."""
    x, scale, bias, mean, variance = node.inputs[:5]
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    eps = _const(namer, node, np.array(epsilon, np.float32))
    nodes = [_node(namer, node, "Add", [variance, eps])]
    nodes.append(_node(namer, node, "Sqrt", [nodes[-1].outputs[0]]))
    nodes.append(_node(namer, node, "Sub", [x, mean]))
    nodes.append(_node(namer, node, "Div", [nodes[-1].outputs[0], nodes[-2].outputs[0]]))
    nodes.append(_node(namer, node, "Mul", [nodes[-1].outputs[0], scale]))
    nodes.append(_node(namer, node, "Add", [nodes[-1].outputs[0], bias]))
    return nodes


def _group_norm(node: ir.Node, namer: surgery.Namer) -> list[ir.Node]:
    """GroupNormalization-18 scales a whole group (21: each channel), which is InstanceNormalization over groups."""
    x, scale, bias = node.inputs[:3]
    groups = node.attributes["num_groups"].as_int()
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    shape = _node(namer, node, "Shape", [x])
    split = _node(namer, node, "Reshape", [x, _const(namer, node, np.array([0, groups, -1], np.int64))])
    norm = _node(namer, node, "InstanceNormalization", [split.outputs[0], scale, bias], epsilon=epsilon)
    back = _node(namer, node, "Reshape", [norm.outputs[0], shape.outputs[0]])
    return [shape, split, norm, back]


def _is_spatial_0(node: ir.Node, old: int) -> bool:
    return old < 9 and "spatial" in node.attributes and node.attributes["spatial"].as_int() == 0


_Rule = tuple[Callable[[ir.Node, int], bool], Callable[[ir.Node, surgery.Namer], list[ir.Node]]]
_RULES: dict[str, _Rule] = {
    "Upsample": (lambda _, old: old < 10, _resize),
    "Resize": (lambda _, old: old == 10, _resize),
    "Hardmax": (lambda _, old: old < 13, _hardmax),
    "BatchNormalization": (_is_spatial_0, _per_position_norm),
    "GroupNormalization": (lambda _, old: 18 <= old < 21, _group_norm),
}
