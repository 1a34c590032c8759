"""A real half-precision graph: every float32 value that may be float16 is, the interface is not.

Which inputs and outputs of an operator may be float16 is read from the operator's own schema at its own version,
so no list of special inputs can be out of date (Resize has its float32-only scales at different places in
different versions). What may not be float16, or would overflow, stays float32 between two Casts: it is *fenced*.
"""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx.defs
import onnx_ir as ir
import onnx_ir.passes.common

from featherweight.errors import TechniqueError
from featherweight.graph import surgery
from featherweight.techniques._protocol import Context

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
LARGEST = float(np.finfo(np.float16).max)
SMALLEST = float(np.finfo(np.float16).smallest_normal)
#: Activations seen above this share of the largest float16 are fenced: unseen data go further.
HEADROOM = 0.5
#: Large constants that only mean "very large" here: clamped instead of fenced.
CLAMPING = frozenset({"Where", "Add", "Sub", "Mul", "Max", "Min", "Clip", "Pad"})
#: Half precision is allowed by the schema but loses the meaning: random streams, counters, coordinates.
FENCED_OPS = frozenset(
    {
        "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli",
        "Range", "CumSum", "NonMaxSuppression", "RoiAlign", "GridSample", "QuantizeLinear", "DequantizeLinear",
        "DynamicQuantizeLinear", "STFT", "DFT", "MelWeightMatrix",
    }
)  # fmt: skip
#: Inputs that stay float32 although the schema would allow float16 in some versions.
FULL_INPUTS = {"Resize": (1, 2), "Upsample": (1,)}
CONTROL_FLOW = frozenset({"If", "Loop", "Scan"})


@dataclass
class _Conversion:
    """Where each float32 value of the original now lives. A value is its own float32 or its own float16 version."""

    model: ir.Model
    fenced: Container[str]
    ctx: Context
    namer: surgery.Namer
    was_float: set[ir.Value] = field(default_factory=set)
    own_half: set[ir.Value] = field(default_factory=set)
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def version(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as float16 or float32; a Cast or a converted initializer is made once, where it is first needed."""
        if (value in self.own_half) == (dtype == HALF):
            return value
        if (value, dtype) not in self.casts:
            array = surgery.constant(value)
            self.casts[value, dtype] = (
                self._stored(value, array) if array is not None and dtype == HALF else self._cast(value, dtype)
            )
        return self.casts[value, dtype]

    def _stored(self, value: ir.Value, array: npt.NDArray[Any]) -> ir.Value:
        finite = np.where(np.isfinite(array), np.clip(array, -LARGEST, LARGEST), array)
        name = self.namer(f"{value.name}_half")
        return surgery.add_initializer(surgery.graph_of(value), name, finite.astype(np.float16))

    def _cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        hint = f"{value.name}_{'half' if dtype == HALF else 'full'}"
        node = surgery.make_node(self.namer, "Cast", [value], hint, attributes={"to": int(dtype)})
        surgery.insert_after(value, [node])
        node.outputs[0].type, node.outputs[0].shape = ir.TensorType(dtype), value.shape
        return node.outputs[0]


def convert(model: ir.Model, ctx: Context) -> tuple[str, ...]:
    """Make `model` (sorted) compute in float16 in place; returns the names of the fenced nodes.

    Nodes in `ctx.keep_float` and nodes whose observed outputs come near float16's limit are fenced. Inputs and
    outputs keep names and types. Raises TechniqueError if types cannot be inferred.
    """
    _infer_types(model)
    fenced: list[str] = []
    state = _Conversion(model, ctx.keep_float, ctx, surgery.Namer(model))
    for graph in model.graphs():
        values = [*graph.inputs, *graph.initializers.values(), *(o for n in graph for o in n.outputs)]
        state.was_float.update(v for v in values if _element(v) == FLOAT and isinstance(v.type, ir.TensorType))
    _graph(state, model.graph, fenced, fence_all=False)
    for i, value in enumerate(model.graph.outputs):
        if value in state.own_half:
            _restore_output(state, model.graph, i, value)
    surgery.remove_unused(model)
    return tuple(fenced)


def _infer_types(model: ir.Model) -> None:
    ir.passes.common.ShapeInferencePass()(model)
    for graph in model.graphs():
        for node in graph:
            unknown = [o.name for o in node.outputs if o.type is None and o.name and list(o.uses())]
            if unknown:
                raise TechniqueError(
                    f"half precision needs the type of every value, but {unknown[0]!r} of {node.op_type} node "
                    f"{node.name!r} has none; use float16 for single weights instead"
                )


def _element(value: ir.Value) -> ir.DataType | None:
    return None if value.type is None else value.type.dtype


def _graph(state: _Conversion, graph: ir.Graph, fenced: list[str], *, fence_all: bool) -> None:
    """Convert the nodes of one graph; a sub-graph's inputs are float16 unless all of it is fenced."""
    if graph is not state.model.graph and not fence_all:
        for value in graph.inputs:
            if value in state.was_float:
                _make_half(state, value)
    for node in list(graph):
        reason = "" if fence_all else _fence_reason(state, node)
        if reason:
            fenced.append(node.name or node.op_type)
            state.ctx.note(node.name or node.op_type, f"stays float32: {reason}")
        _node(state, node, fenced, full=fence_all or bool(reason))
    if graph is not state.model.graph:
        want = FLOAT if fence_all else HALF
        for i, value in enumerate(graph.outputs):
            if value in state.was_float:
                graph.outputs[i] = state.version(value, want)


def _node(state: _Conversion, node: ir.Node, fenced: list[str], *, full: bool) -> None:
    wanted = [FLOAT] * len(node.inputs) if full else _input_types(state, node)
    for i, value in enumerate(node.inputs):
        if value is not None and value in state.was_float:
            node.replace_input_with(i, state.version(value, wanted[i]))
    for body in surgery.bodies(node):
        _graph(state, body, fenced, fence_all=full)
    if full:
        return
    _retarget(node)
    for value, dtype in zip(node.outputs, _output_types(state, node), strict=True):
        if value in state.was_float and dtype == HALF:
            _make_half(state, value)


def _make_half(state: _Conversion, value: ir.Value) -> None:
    value.type = ir.TensorType(HALF)
    state.own_half.add(value)


def _retarget(node: ir.Node) -> None:
    """Attributes that name float32 as the output type now name float16."""
    for name in ("to", "dtype"):
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and attribute.as_int() == int(FLOAT):
            node.attributes[name] = ir.AttrInt64(name, int(HALF))
    value = node.attributes.get("value")
    if value is not None and value.type == ir.AttributeType.TENSOR and value.as_tensor().dtype == FLOAT:
        array = np.clip(value.as_tensor().numpy(), -LARGEST, LARGEST).astype(np.float16)
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(array))


def _restore_output(state: _Conversion, graph: ir.Graph, i: int, value: ir.Value) -> None:
    """The model's output is a float32 Cast that takes over the name of the value that became float16."""
    name = value.name or ""
    value.name = state.namer(f"{name}_half")
    cast = ir.node("Cast", [value], {"to": int(FLOAT)}, outputs=[ir.Value(name=name)], name=state.namer(f"{name}/Cast"))
    graph.append(cast)
    cast.outputs[0].type, cast.outputs[0].shape = ir.TensorType(FLOAT), value.shape
    graph.outputs[i] = cast.outputs[0]


def _schema(state: _Conversion, node: ir.Node) -> onnx.defs.OpSchema | None:
    version = node.version or state.model.opset_imports.get(node.domain)
    if version is None:
        return None
    try:
        return onnx.defs.get_schema(node.op_type, version, node.domain)
    except onnx.defs.SchemaError:
        return None


def _types(state: _Conversion, node: ir.Node, *, outputs: bool) -> list[ir.DataType]:
    """float16 where the schema allows it at that place, else float32."""
    schema = _schema(state, node)
    count = len(node.outputs) if outputs else len(node.inputs)
    if schema is None:
        return [FLOAT] * count
    formal = schema.outputs if outputs else schema.inputs
    allowed = {c.type_param_str: set(c.allowed_type_strs) for c in schema.type_constraints}
    found = []
    for i in range(count):
        place = formal[min(i, len(formal) - 1)]
        found.append(HALF if "tensor(float16)" in allowed.get(place.type_str, {place.type_str}) else FLOAT)
    return found


def _input_types(state: _Conversion, node: ir.Node) -> list[ir.DataType]:
    if node.op_type in CONTROL_FLOW:
        return [HALF] * len(node.inputs)
    found = _types(state, node, outputs=False)
    for i in FULL_INPUTS.get(node.op_type, ()) if node.domain in ("", "ai.onnx") else ():
        # Opset 10 has (X, scales), later versions (X, roi, scales, sizes): X is input 0 in all.
        if i < len(found):
            found[i] = FLOAT
    return found


def _output_types(state: _Conversion, node: ir.Node) -> list[ir.DataType]:
    if node.op_type in CONTROL_FLOW:
        return [HALF] * len(node.outputs)
    return _types(state, node, outputs=True)


def _fence_reason(state: _Conversion, node: ir.Node) -> str:
    """Why `node` must compute in float32, or ''."""
    floats = [v for v in (*node.inputs, *node.outputs) if v is not None and _touches_float(v)]
    if not floats or node.op_type in CONTROL_FLOW:
        return ""
    if (node.name or "") in state.fenced:
        return "asked for"
    if node.op_type in FENCED_OPS:
        return f"{node.op_type} loses its meaning in float16"
    if _schema(state, node) is None:
        return f"operator {node.domain}.{node.op_type} is unknown"
    if any(not isinstance(v.type, ir.TensorType) for v in floats):
        return "sequences are not converted"
    if node.op_type == "Constant" and "value" not in node.attributes:
        return "its value is a float32 attribute"
    if FLOAT in _core_types(state, node):
        return f"{node.op_type} has no float16 form in this opset"
    return _range_reason(state, node)


def _touches_float(value: ir.Value) -> bool:
    return _element(value) in (FLOAT, HALF)


def _core_types(state: _Conversion, node: ir.Node) -> set[ir.DataType]:
    """What the schema allows for the first input and the outputs."""
    first = _types(state, node, outputs=False)[:1] if node.inputs and node.inputs[0] is not None else []
    if node.op_type in ("Cast", "ConstantOfShape", "EyeLike"):
        first = []
    return {
        t
        for value, t in zip(
            (*node.inputs[:1], *node.outputs), (*first, *_types(state, node, outputs=True)), strict=False
        )
        if value is not None and _touches_float(value)
    }


def _range_reason(state: _Conversion, node: ir.Node) -> str:
    for value in node.inputs:
        array = surgery.constant(value)
        if value is None or value not in state.was_float or array is None or array.size == 0:
            continue
        size = np.abs(array[np.isfinite(array)])
        if size.max(initial=0) > LARGEST and node.op_type not in CLAMPING:
            return f"constant {value.name!r} is up to {size.max():.3g}, float16 ends at {LARGEST:.0f}"
        if size.max(initial=0) > 0 and array.size == 1 and size.max() < SMALLEST:
            return f"constant {value.name!r} is {size.max():.3g}, which float16 rounds away"
    stats = state.ctx.stats
    for value in (*node.inputs, *node.outputs) if stats is not None else ():
        found = stats.range(value.name or "") if stats is not None and value is not None else None
        if found is not None and max(-found[0], found[1]) > HEADROOM * LARGEST:
            return f"a value was seen at {max(-found[0], found[1]):.3g}, float16 ends at {LARGEST:.0f}"
    return ""
