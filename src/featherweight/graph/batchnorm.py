"""Fold BatchNormalization into the layer in front of it.

y = (conv(x, W) + b - mean) * gamma / sqrt(var + eps) + beta = conv(x, W * s) + (b - mean) * s + beta, with
s = gamma / sqrt(var + eps), computed in float64 because a variance near zero makes s large.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.weights import FLOAT_TYPES

Float64 = npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Affine:
    """Per channel: y = x * scale + shift."""

    scale: Float64
    shift: Float64


def candidates(model: ir.Model) -> list[str]:
    """Names of the BatchNormalization nodes that may be folded."""
    return [n.name or "" for g in model.graphs() for n in g if _plan(n) is not None]


def fold_batchnorms(model: ir.Model, names: Collection[str] | None = None) -> int:
    """Fold all foldable ones (or those of `names`); returns how many went. Needs unique node names.

    Left alone: in training mode, parameters not constant, the layer's result or weights used elsewhere too.
    """
    folded = 0
    namer = surgery.Namer(model)
    for graph in model.graphs():
        for node in list(graph):
            if names is not None and node.name not in names:
                continue
            plan = _plan(node)
            if plan is not None:
                plan(node, namer)
                folded += 1
    return folded


_Fold = Callable[[ir.Node, surgery.Namer], None]


def _plan(node: ir.Node) -> _Fold | None:
    """How to fold this node, None if it cannot be proved equal."""
    if node.op_type != "BatchNormalization" or node.domain != "":
        return None
    source = node.inputs[0] if node.inputs else None
    layer = source.producer() if source is not None else None
    if source is None or layer is None or layer.domain != "" or layer.graph is not node.graph:
        return None
    if source.is_graph_output() or len(list(source.uses())) != 1 or affine(node) is None:
        return None
    match layer.op_type:
        case "Conv" | "ConvTranspose":
            return _fold_conv if _own_weight(layer) and _optional_constant(layer, 2) else None
        case "Gemm":
            return _fold_gemm if _own_weight(layer) and _optional_constant(layer, 2) else None
        case "MatMul":
            return _fold_matmul if _own_weight(layer) and _is_plain_matmul(layer) else None
        case "Add":
            return _fold_biased_matmul if _biased_matmul(layer) is not None else None
        case _:
            return None


def affine(node: ir.Node) -> _Affine | None:
    """The per-channel scale and shift (channels,) float64 of a BatchNormalization; None if not constant or training."""
    if "training_mode" in node.attributes and node.attributes["training_mode"].as_int() != 0:
        return None
    if "spatial" in node.attributes and node.attributes["spatial"].as_int() == 0:
        return None
    if any(list(o.uses()) or o.is_graph_output() for o in node.outputs[1:]) or len(node.inputs) < 5:
        return None
    arrays = [surgery.constant(v) for v in node.inputs[1:5]]
    if any(a is None or a.ndim != 1 for a in arrays):
        return None
    gamma, beta, mean, variance = (np.asarray(a).astype(np.float64) for a in arrays)
    epsilon = float(np.float32(node.attributes["epsilon"].as_float())) if "epsilon" in node.attributes else 1e-5
    with np.errstate(all="ignore"):
        scale = gamma / np.sqrt(variance + epsilon)
    shift = beta - mean * scale
    return _Affine(scale, shift) if np.isfinite(scale).all() and np.isfinite(shift).all() else None


def _own_weight(layer: ir.Node) -> bool:
    """The weight is a constant float that only this layer reads, so a tied one stays tied."""
    weight = layer.inputs[1] if len(layer.inputs) > 1 else None
    tensor = surgery.constant_tensor(weight)
    if weight is None or tensor is None or weight.is_graph_output():
        return False
    return len(list(weight.uses())) == 1 and (tensor.dtype in FLOAT_TYPES or tensor.dtype == ir.DataType.DOUBLE)


def _optional_constant(layer: ir.Node, index: int) -> bool:
    given = layer.inputs[index] if len(layer.inputs) > index else None
    return given is None or surgery.constant_tensor(given) is not None


def _is_plain_matmul(layer: ir.Node) -> bool:
    """Both operands of rank 2: only then are BatchNormalization's channels the columns of the weight."""
    x, w = layer.inputs[0], layer.inputs[1]
    ranks = [len(v.shape) if v is not None and v.shape is not None else -1 for v in (x, w)]
    return ranks == [2, 2]


def _biased_matmul(add: ir.Node) -> tuple[ir.Node, int] | None:
    """(the MatMul, index of the constant bias) if `add` is MatMul + vector."""
    for index in (0, 1):
        bias, other = add.inputs[index], add.inputs[1 - index]
        array = surgery.constant(bias)
        layer = other.producer() if other is not None else None
        if array is None or other is None or layer is None or layer.op_type != "MatMul" or layer.domain != "":
            continue
        alone = len(list(other.uses())) == 1 and not other.is_graph_output() and layer.graph is add.graph
        if alone and _is_plain_matmul(layer) and _own_weight(layer):
            columns = surgery.constant_tensor(layer.inputs[1])
            n = int(columns.shape.numpy()[1]) if columns is not None else -1
            if array.size in (1, n) and array.shape[-1:] in ((n,), (1,), ()):
                return layer, index
    return None


def _fold_conv(node: ir.Node, namer: surgery.Namer) -> None:
    layer, a = _layer(node), _affine_of(node)
    weight = _array(layer.inputs[1])
    if layer.op_type == "Conv":
        by_channel = a.scale.reshape(-1, *([1] * (weight.ndim - 1)))
        scaled = weight * by_channel
    else:
        # ConvTranspose stores (in, out / groups, ...): output channel g * out/groups + j is row block g, column j.
        groups = layer.attributes["group"].as_int() if "group" in layer.attributes else 1
        per_group = weight.reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
        by_channel = a.scale.reshape(groups, 1, weight.shape[1], *([1] * (weight.ndim - 2)))
        scaled = (per_group * by_channel).reshape(weight.shape)
    old = _array(layer.inputs[2]) if len(layer.inputs) > 2 and layer.inputs[2] is not None else np.zeros(())
    _store(layer, 1, scaled, namer)
    _store(layer, 2, old * a.scale + a.shift, namer)
    _finish(node, layer)


def _fold_gemm(node: ir.Node, namer: surgery.Namer) -> None:
    layer, a = _layer(node), _affine_of(node)
    weight = _array(layer.inputs[1])
    transposed = "transB" in layer.attributes and layer.attributes["transB"].as_int() != 0
    beta = float(np.float32(layer.attributes["beta"].as_float())) if "beta" in layer.attributes else 1.0
    old = _array(layer.inputs[2]) if len(layer.inputs) > 2 and layer.inputs[2] is not None else np.zeros(())
    _store(layer, 1, weight * (a.scale[:, None] if transposed else a.scale), namer)
    _store(layer, 2, old * beta * a.scale + a.shift, namer)
    layer.attributes.pop("beta", None)
    _finish(node, layer)


def _fold_matmul(node: ir.Node, namer: surgery.Namer) -> None:
    layer, a = _layer(node), _affine_of(node)
    dtype = _type(layer.inputs[1])
    _store(layer, 1, _array(layer.inputs[1]) * a.scale, namer)
    graph = surgery.graph_of(layer.outputs[0])
    shift = surgery.add_initializer(graph, namer(f"{node.name}.shift"), _as(a.shift, dtype), dtype=dtype)
    add = surgery.make_node(namer, "Add", [layer.outputs[0], shift], f"{node.name}.biased")
    surgery.insert_before(node, [add])
    surgery.replace_uses(node.outputs[0], add.outputs[0])
    surgery.remove_node(node)


def _fold_biased_matmul(node: ir.Node, namer: surgery.Namer) -> None:
    add, a = _layer(node), _affine_of(node)
    found = _biased_matmul(add)
    if found is None:
        return
    layer, index = found
    bias = _array(add.inputs[index])
    _store(layer, 1, _array(layer.inputs[1]) * a.scale, namer)
    _store(add, index, bias * a.scale + a.shift, namer, like=layer.inputs[1])
    _finish(node, add)


def _layer(node: ir.Node) -> ir.Node:
    source = node.inputs[0]
    layer = source.producer() if source is not None else None
    if layer is None:
        raise ValueError(f"{node.name} has no layer in front of it")
    return layer


def _affine_of(node: ir.Node) -> _Affine:
    found = affine(node)
    if found is None:
        raise ValueError(f"{node.name} is not constant")
    return found


def _array(value: ir.Value | None) -> Float64:
    array = surgery.constant(value)
    if array is None:
        raise ValueError("a constant is needed")
    return np.asarray(array).astype(np.float64)


def _type(value: ir.Value | None) -> ir.DataType:
    tensor = surgery.constant_tensor(value)
    if tensor is None:
        raise ValueError("a constant is needed")
    return tensor.dtype


def _as(array: Float64, dtype: ir.DataType) -> npt.NDArray[Any]:
    with np.errstate(over="ignore"):
        return array.astype(dtype.numpy())


def _store(node: ir.Node, index: int, array: Float64, namer: surgery.Namer, like: ir.Value | None = None) -> None:
    """Let input `index` be `array`: in place if only this node reads it, else (or if absent) as a new initializer."""
    value = node.inputs[index] if index < len(node.inputs) else None
    dtype = _type(like if like is not None else node.inputs[1])
    if value is not None and len(list(value.uses())) == 1 and not value.is_graph_output():
        value.metadata_props.clear()
        surgery.set_initializer(value, _as(array, dtype), dtype=dtype)
        return
    graph = surgery.graph_of(node.outputs[0])
    hint = f"{value.name}" if value is not None else f"{node.name}.bias"
    surgery.replace_input(node, index, surgery.add_initializer(graph, namer(hint), _as(array, dtype), dtype=dtype))


def _finish(node: ir.Node, layer: ir.Node) -> None:
    """Let the layer make what the BatchNormalization made, under its name."""
    output, made = node.outputs[0], layer.outputs[0]
    name, type_, shape = output.name, output.type, output.shape
    is_output = output.is_graph_output()
    surgery.replace_uses(output, made)
    surgery.remove_node(node)
    if not is_output:
        made.name, made.type, made.shape = name, type_ or made.type, shape or made.shape
