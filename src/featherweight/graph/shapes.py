"""Types and shapes by inference. Large weights are left out of what the inference reads, so size does not matter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from featherweight.graph import surgery

_HIDDEN_BYTES = 1024


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
    return ir.serde.serialize_model(bare), large


def infer(model: ir.Model, input_shapes: Mapping[str, tuple[int, ...]] | None = None) -> dict[str, Known]:
    """Inferred type and shape by tensor name, sub-graphs included; inputs take the shapes given.

    Names must be unique (as after normalising). Where inference fails nothing is known: the answer lacks the tensor.
    """
    proto, _ = bare_proto(model)
    for value in proto.graph.input:
        sizes = (input_shapes or {}).get(value.name)
        if sizes is not None:
            del value.type.tensor_type.shape.dim[:]
            for size in sizes:
                value.type.tensor_type.shape.dim.add().dim_value = size
    if input_shapes:
        # Declared symbolic sizes would win over the ones that follow from the inputs.
        for output in proto.graph.output:
            output.type.tensor_type.ClearField("shape")
    try:
        proto = onnx.shape_inference.infer_shapes(proto, check_type=False, strict_mode=False, data_prop=True)
    except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
        return {}
    found = ir.serde.deserialize_model(proto)
    return {
        v.name: Known(v.type, v.shape)
        for g in found.graphs()
        for v in (*g.inputs, *(o for n in g for o in n.outputs))
        if v.name
    }
