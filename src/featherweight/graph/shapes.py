"""Types and shapes by inference. Large weights are left out of what the inference reads, so size does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from featherweight.graph import expressions, surgery

_HIDDEN_BYTES = 1024
_SMALL_BYTES = 8192
_ROUNDS = 16
"""Shapes computed from shapes computed from shapes: each round settles one level."""


@dataclass(frozen=True)
class Known:
    """What inference says of one tensor; None where it does not know."""

    type: ir.TypeProtocol | None
    shape: ir.Shape | None

    @property
    def sizes(self) -> tuple[int, ...] | None:
        """The shape if every axis is known."""
        if self.shape is None or any(not isinstance(d, int) for d in self.shape):
            return None
        return tuple(int(d) for d in self.shape if isinstance(d, int))


def bare_proto(model: ir.Model) -> tuple[onnx.ModelProto, dict[str, ir.Value]]:
    """The graph without its large weights, which become inputs; returns it with those weights by name."""
    bare = surgery.copy_model(model)
    large = {}
    for name, value in list(bare.graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes <= _HIDDEN_BYTES or value.is_graph_output():
            continue
        large[name] = model.graph.initializers[name]
        bare.graph.initializers.pop(name)
        if not value.is_graph_input():
            bare.graph.inputs.append(value)
        value.const_value = None
    return surgery.to_proto(bare), large


def infer(model: ir.Model, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Known]:
    """Inferred type and shape by tensor name, sub-graphs included; inputs take the shapes given.

    Names must be unique (as after normalising). Where inference fails nothing is known: the answer lacks the tensor.
    With concrete inputs, shapes that the graph computes from other shapes are computed too.
    """
    if not input_shapes:
        return _infer_once(model)
    work = surgery.copy_model(model)
    for value in work.graph.inputs:
        if value.name and value.name in input_shapes:
            value.shape = ir.Shape(input_shapes[value.name])
    for value in work.graph.outputs:
        # A declared symbolic size would win over the one that follows from the inputs.
        value.shape = None
    known: dict[str, Known] = {}
    for _ in range(_ROUNDS):
        known.update(_infer_once(work))
        if not _fix_computed_shapes(work, known):
            break
        expressions.fold_small(work, below_bytes=_SMALL_BYTES)
        for value in (v for g in work.graphs() for v in g.initializers.values() if v.name):
            known[value.name or ""] = Known(value.type, value.shape)
    return known


def _fix_computed_shapes(model: ir.Model, known: Mapping[str, Known]) -> int:
    """Replace Shape nodes whose answer is known by that answer; returns how many."""
    fixed = 0
    namer = surgery.Namer(model)
    for graph in model.graphs():
        for node in list(graph):
            source = node.inputs[0] if node.op_type == "Shape" and node.inputs else None
            found = known.get(source.name or "") if source is not None else None
            if found is None or found.sizes is None or node.outputs[0].is_graph_output():
                continue
            start = node.attributes["start"].as_int() if "start" in node.attributes else 0
            end = node.attributes["end"].as_int() if "end" in node.attributes else len(found.sizes)
            answer = surgery.add_initializer(
                graph, namer(f"{node.name}.known"), np.array(found.sizes[start:end], np.int64)
            )
            surgery.replace_uses(node.outputs[0], answer)
            surgery.remove_node(node)
            fixed += 1
    return fixed


def _infer_once(model: ir.Model) -> dict[str, Known]:
    proto, _ = bare_proto(model)
    for node in proto.graph.node:
        if node.op_type in _SAME_SHAPE and not node.domain:
            # Operators defined as functions have no inference of their own; their shape is that of their input.
            node.op_type = "Identity"
            del node.input[1:], node.output[1:], node.attribute[:]
    try:
        inferred = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False)
        found = ir.serde.deserialize_model(inferred)
        if _data_stay_small(found):
            inferred = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
            found = ir.serde.deserialize_model(inferred)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, RuntimeError, ValueError):
        return {}
    return {
        v.name: Known(v.type, v.shape)
        for g in found.graphs()
        for v in (*g.inputs, *(o for n in g for o in n.outputs))
        if v.name
    }


def _data_stay_small(model: ir.Model) -> bool:
    """Whether onnx's propagation of values is safe: it allocates every element of every integer vector.

    A hostile file would else take all memory by one ConstantOfShape.
    """
    largest = 0
    expands = False
    for graph in model.graphs():
        for value in graph.inputs:
            largest = max([largest, *(d for d in value.shape or () if isinstance(d, int))])
        for stored in graph.initializers.values():
            array = surgery.constant(stored)
            if array is not None and array.dtype.kind in "iu" and array.size:
                sizes = np.abs(array.astype(np.float64))
                largest = max(largest, int(sizes[~np.isin(sizes, _NO_LIMIT)].max(initial=0)))
        for node in graph:
            expands |= node.op_type in _EXPANDING
            for output in node.outputs:
                shape = Known(output.type, output.shape).sizes
                if shape is not None and len(shape) == 1 and shape[0] > _VECTOR and output.dtype in _INTEGERS:
                    return False
    return not expands or largest <= _VECTOR


_SAME_SHAPE = frozenset({"GroupNormalization", "RMSNormalization", "MeanVarianceNormalization"})
_EXPANDING = frozenset({"ConstantOfShape", "Expand", "Tile", "Range", "Pad", "OneHot", "EyeLike"})
_INTEGERS = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
_VECTOR = 100_000
_NO_LIMIT = (2.0**31 - 1, 2.0**31, 2.0**63)
"""Ends of a Slice that mean 'to the end', not a length."""
