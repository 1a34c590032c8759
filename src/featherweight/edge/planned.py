"""Which operators a graph will execute, read off the graph alone, with the fusions ONNX Runtime makes in essence.

For graphs that cannot or need not run here. What is fused into a neighbour takes no time of its own: activations
and sums behind a convolution, quantize and dequantize around an operator with integer kernels.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from featherweight.edge.work import Executed, Tensor
from featherweight.graph import shapes as shape_inference
from featherweight.graph import surgery

_RUNTIME = {"FLOAT": "float", "DOUBLE": "double"}
_FREE_ACTIVATIONS = frozenset({"Relu", "Clip", "LeakyRelu", "HardSigmoid", "HardSwish"})
_PRICED_ACTIVATIONS = frozenset({"Sigmoid", "Tanh"})
_INTEGER = {"Conv": "QLinearConv", "MatMul": "QLinearMatMul", "Gemm": "QGemm", "Add": "QLinearAdd", "Mul": "QLinearMul",
            "Sigmoid": "QLinearSigmoid", "AveragePool": "QLinearAveragePool",
            "GlobalAveragePool": "QLinearGlobalAveragePool", "Concat": "QLinearConcat"}  # fmt: skip


def planned(
    model: ir.Model, input_shapes: Mapping[str, tuple[int, ...]]
) -> tuple[list[Executed], tuple[str, ...], frozenset[str]]:
    """(operators in order, nodes whose shapes are not known, nodes fused into others); bodies of If and Loop once."""
    plan = _Plan(model, input_shapes)
    done: list[Executed] = []
    unknown: list[str] = []
    names = surgery.paths(model)
    fused = set()
    for node in model.graph.all_nodes():
        if node.outputs and all(surgery.is_constant(o, plan.constants) for o in node.outputs if o.name):
            continue
        name = names.get(node, node.name or "")
        if plan.is_fused(node):
            fused.add(name)
            continue
        op = plan.operator(node, name)
        if op is None:
            unknown.append(name)
        else:
            done.append(op)
    return done, tuple(unknown), frozenset(fused)


class _Plan:
    """Shapes and types of tensors, and what the runtime folds into what."""

    def __init__(self, model: ir.Model, input_shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.inputs = default_shapes(model) | {k: tuple(v) for k, v in input_shapes.items()}
        self.known = shape_inference.infer(model, self.inputs)
        self.constants: dict[ir.Value, bool] = {}

    def tensor(self, value: ir.Value) -> Tensor | None:
        """Type and shape, None if not known."""
        stored = surgery.constant_tensor(value)
        known = self.known.get(value.name or "")
        dtype = value.dtype or (known.type.dtype if known is not None and known.type is not None else None)
        if stored is not None:
            dtype = stored.dtype
        name = "float" if dtype is None else _RUNTIME.get(dtype.name, dtype.name.lower())
        if stored is not None:
            return Tensor(name, tuple(stored.shape.numpy()))
        if value.name in self.inputs:
            return Tensor(name, self.inputs[value.name])
        if known is not None and known.sizes is not None:
            return Tensor(name, known.sizes)
        if value.shape is not None and all(isinstance(d, int) for d in value.shape):
            return Tensor(name, tuple(int(d) for d in value.shape if isinstance(d, int)))
        return None

    def operator(self, node: ir.Node, name: str) -> Executed | None:
        """The node as it runs, its type replaced by the integer kernel's where it has one."""
        integer = self.integer(node)
        read = [_behind(v) if integer else v for v in node.inputs if v is not None]
        inputs = [self.tensor(v) for v in read]
        outputs = [self.tensor(v) for v in node.outputs if v.name]
        if any(t is None for t in (*inputs, *outputs)):
            return None
        op_type = _INTEGER[node.op_type] if integer else node.op_type
        found = tuple(t for t in inputs if t is not None)
        if integer and op_type in ("QLinearConv", "QLinearMatMul", "QGemm"):
            found = (found[0], found[0], found[0], *found[1:])  # weights stand fourth there
        hidden = node.attributes["kernel_shape"].as_ints() if "kernel_shape" in node.attributes else ()
        taps = 1
        for k in hidden:
            taps *= k
        return Executed(
            name,
            op_type,
            found,
            tuple(t for t in outputs if t is not None),
            self.activation(node),
            taps if hidden else 0,
        )

    def integer(self, node: ir.Node) -> bool:
        """True if it stands between dequantize and quantize and has an integer kernel."""
        if node.op_type not in _INTEGER:
            return False
        data = (
            node.inputs[:2] if node.op_type not in ("Sigmoid", "AveragePool", "GlobalAveragePool") else node.inputs[:1]
        )
        return all(_made_by(v, "DequantizeLinear") for v in data) and _quantized_after(node)

    def activation(self, node: ir.Node) -> str:
        """The activation with a price that is fused behind a convolution."""
        after = _only_reader(node)
        if node.op_type == "Conv" and after is not None and after.op_type in _PRICED_ACTIVATIONS:
            return after.op_type
        return ""

    def is_fused(self, node: ir.Node) -> bool:
        """True if a neighbour does this node's work in its own pass."""
        before = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
        if node.op_type == "QuantizeLinear":
            source = _through_activation(before)
            return source is not None and self.integer(source)
        if node.op_type == "DequantizeLinear":
            return bool(node.outputs[0].uses()) and all(self.integer(u.node) for u in node.outputs[0].uses())
        if node.op_type in _FREE_ACTIVATIONS | _PRICED_ACTIVATIONS:
            return before is not None and _only_reader(before) is node and before.op_type in ("Conv", "Add", "Gemm")
        if node.op_type == "BatchNormalization":
            return before is not None and before.op_type == "Conv" and _only_reader(before) is node
        return False


def default_shapes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    """Shapes of the inputs with every open axis at 1."""
    return {
        v.name: tuple(d if isinstance(d, int) else 1 for d in v.shape)
        for v in model.graph.inputs
        if v.name and v.shape is not None and v.name not in model.graph.initializers
    }


def _behind(value: ir.Value) -> ir.Value:
    """What a dequantize reads, or the value itself."""
    made = value.producer()
    if made is not None and made.op_type == "DequantizeLinear" and made.inputs[0] is not None:
        return made.inputs[0]
    return value


def _made_by(value: ir.Value | None, op_type: str) -> bool:
    made = value.producer() if value is not None else None
    return made is not None and made.op_type == op_type


def _only_reader(node: ir.Node) -> ir.Node | None:
    uses = list(node.outputs[0].uses()) if node.outputs else []
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None


def _through_activation(node: ir.Node | None) -> ir.Node | None:
    """The node before an activation that a quantize absorbs."""
    if node is not None and node.op_type in ("Relu", "Clip") and node.inputs[0] is not None:
        return node.inputs[0].producer()
    return node


def _quantized_after(node: ir.Node) -> bool:
    after = _only_reader(node)
    if after is not None and after.op_type in ("Relu", "Clip"):
        after = _only_reader(after)
        return after is not None and after.op_type == "QuantizeLinear" and _starts_at_zero(after)
    return after is not None and after.op_type == "QuantizeLinear"


def _starts_at_zero(quantize: ir.Node) -> bool:
    """True if its least code stands for 0, so that it cuts off what an activation before it does."""
    zero = surgery.constant(quantize.inputs[2]) if len(quantize.inputs) > 2 else None
    return zero is None or bool((zero == np.iinfo(zero.dtype).min).all())
