"""Compute units: a Conv, Gemm or MatMul with a constant weight, its bias, and what may fold into its rounding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.errors import TechniqueError
from featherweight.stats import folding

if TYPE_CHECKING:
    from featherweight.graph.weights import Weight, WeightUse

#: Set on a node whose weight was given int8 codes, until `finish` has built its integer form.
MARK = "featherweight.static_int8"


@dataclass(frozen=True)
class Unit:
    """One integer compute node. `add` is the Add of a constant bias behind a MatMul; `out` is the value after it."""

    node: ir.Node
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    add: ir.Node | None
    out: ir.Value

    @property
    def needs_output_codes(self) -> bool:
        """True if the kernel exists only with a quantized output."""
        return self.node.op_type == "Conv"


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The Python value of an attribute, or `default`."""
    found = node.attributes.get(name)
    return default if found is None else found.value


def constant(value: ir.Value | None) -> npt.NDArray[Any] | None:
    """The array of a constant value, or None."""
    return None if value is None or value.const_value is None else value.const_value.numpy()


def activation(node: ir.Node, index: int) -> ir.Value | None:
    """Input `index` if it is there and not constant."""
    value = node.inputs[index] if index < len(node.inputs) else None
    return value if value is not None and value.name and value.const_value is None else None


def is_top_level(node: ir.Node, model: ir.Model) -> bool:
    """True for nodes of the main graph."""
    return node.graph is model.graph


def refusal(model: ir.Model, weight: Weight) -> str | None:
    """Why `weight` has no integer kernel, or None if it has one."""
    for use in weight.uses:
        reason = _refusal_of_use(model, weight, use)
        if reason is not None:
            return reason
    if weight.dtype != np.float32:
        return f"it computes in {weight.dtype.name}, and integer kernels sit between float32 values"
    if weight.value.is_graph_output():
        return "it is an output of the model, so its values must stay"
    known = {(use.node, use.index) for use in weight.uses}
    other = next((u.node for u in weight.value.uses() if (u.node, u.idx) not in known), None)
    if other is not None:
        return f"{other.op_type} {other.name!r} reads it as data"
    return None if weight.uses else "nothing reads it"


def _refusal_of_use(model: ir.Model, weight: Weight, use: WeightUse) -> str | None:
    node = use.node
    if not is_top_level(node, model):
        return "it is read inside a sub-graph, where activations were not observed"
    if use.role == "gather":
        return "it is a table that is looked up; store it with fewer bits (weight_nbit)"
    if use.role not in ("conv", "gemm", "matmul"):
        return f"the runtime has no integer kernel for {node.op_type} with this weight ({use.role})"
    if use.role == "gemm" and use.index != 1:
        return "the weight of this Gemm is its first input; the integer kernel wants it second"
    if use.role == "gemm" and attribute(node, "alpha", 1.0) != 1.0 and len(weight.uses) > 1:
        return "Gemm has an alpha and shares its weight"
    if use.role == "matmul" and int(np.prod(weight.shape[:-2], dtype=np.int64)) != 1:
        return "the weight is a batch of matrices; per-channel scales exist for one matrix only"
    if activation(node, 0) is None:
        return "its other input is constant"
    return None


def bias_add(node: ir.Node, channels: int) -> ir.Node | None:
    """The Add of a constant (channels,) vector that alone reads the output of MatMul `node`, or None."""
    out = node.outputs[0]
    readers = list(out.uses())
    if len(readers) != 1 or out.is_graph_output() or readers[0].node.op_type != "Add":
        return None
    add = readers[0].node
    vector = constant(add.inputs[1 - readers[0].idx])
    if vector is None or vector.dtype != np.float32 or vector.size != channels or vector.shape[-1:] != (channels,):
        return None
    rank = len(out.shape) if out.shape is not None else None
    fits = vector.ndim == 1 or (rank is not None and vector.ndim <= rank)
    return add if fits and add.graph is node.graph else None


def marked(model: ir.Model) -> Iterator[ir.Node]:
    """Nodes of the main graph that wait for their integer form, in order."""
    for node in model.graph:
        if MARK in node.metadata_props:
            yield node


def units(model: ir.Model) -> list[Unit]:
    """The units of all marked nodes."""
    found = []
    for node in marked(model):
        x, weight = node.inputs[0], node.inputs[1]
        if x is None or weight is None:
            continue
        add, out = None, node.outputs[0]
        bias = node.inputs[2] if node.op_type != "MatMul" and len(node.inputs) > 2 else None
        if node.op_type == "MatMul":
            channels = weight_channels(weight)
            add = bias_add(node, channels) if channels else None
            if add is not None:
                bias = next(v for v in add.inputs if v is not None and v.const_value is not None)
                out = add.outputs[0]
        found.append(Unit(node, x, weight, bias, add, out))
    return found


def weight_channels(weight: ir.Value) -> int:
    """Output channels of a dequantized weight: the length of its scale (0: one scale a tensor)."""
    producer = weight.producer()
    scale = constant(producer.inputs[1]) if producer is not None and producer.op_type == "DequantizeLinear" else None
    return int(scale.size) if scale is not None and scale.ndim == 1 else 0


def folded(out: ir.Value) -> tuple[ir.Value, list[ir.Node], tuple[float, float]]:
    """Follow a lone chain of Relu/Clip behind `out`: (last value, the nodes to drop, their common bounds).

    Only bounds that the rounding can stand for are folded: those that hold zero.
    """
    low, high, dropped = -np.inf, np.inf, []
    while not out.is_graph_output():
        readers = list(out.uses())
        if len(readers) != 1 or readers[0].idx != 0 or readers[0].node.graph is not _graph_of(out):
            break
        bounds = folding.folds(readers[0].node)
        if bounds is None:
            break
        low, high = max(low, bounds[0]), min(high, bounds[1])
        dropped.append(readers[0].node)
        out = readers[0].node.outputs[0]
    return out, dropped, (low, high)


def _graph_of(value: ir.Value) -> Any:
    producer = value.producer()
    return None if producer is None else producer.graph


def find(model: ir.Model, name: str) -> Weight:
    """The weight called `name`. Raises TechniqueError if the model has none (or no longer)."""
    from featherweight.graph import weights as graph_weights

    for weight in graph_weights.weights(model):
        if weight.name == name:
            return weight
    raise TechniqueError(f"a site must be a float weight of the model, but there is none called {name!r}")


def bias_vector(node: ir.Node, channels: int) -> npt.NDArray[np.float32] | None:
    """The constant bias of a Conv, Gemm (times beta) or MatMul + Add, (channels,) float32, or None."""
    if node.op_type == "MatMul":
        add = bias_add(node, channels)
        found = None if add is None else next((a for v in add.inputs if (a := constant(v)) is not None), None)
    else:
        found = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    if found is None or found.dtype != np.float32:
        return None
    beta = np.float32(attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else np.float32(1)
    if found.size == 1:
        return np.full(channels, found.reshape(()) * beta, np.float32)
    return (found.reshape(channels) * beta).astype(np.float32) if found.size == channels else None
