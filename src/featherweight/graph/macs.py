"""Multiply-accumulates of one node from the shapes of its tensors.

One MAC is one product and one addition. Operators without products of activations and weights count as 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir

Shape = tuple[int, ...]
Shapes = Sequence[Shape | None]


def node_macs(node: ir.Node, inputs: Shapes, outputs: Shapes) -> int | None:
    """MACs of one run of `node`; 0 for operators that multiply no matrices, None if a needed shape is unknown.

    `inputs` and `outputs` are the shapes in order, None where absent or unknown.
    """
    rule = _RULES.get(node.op_type)
    if rule is None:
        return 0
    try:
        return rule(node, inputs, outputs)
    except _UnknownShapeError:
        return None


class _UnknownShapeError(Exception):
    """A shape that is needed is not known."""


def _need(shapes: Shapes, index: int) -> Shape:
    shape = shapes[index] if index < len(shapes) else None
    if shape is None:
        raise _UnknownShapeError
    return shape


def _conv(weight_index: int) -> Callable[[ir.Node, Shapes, Shapes], int]:
    def rule(_: ir.Node, inputs: Shapes, outputs: Shapes) -> int:
        # Weight (out, in/groups, *kernel): each output element sums in/groups * kernel products.
        return math.prod(_need(outputs, 0)) * math.prod(_need(inputs, weight_index)[1:])

    return rule


def _conv_transpose(_: ir.Node, inputs: Shapes, __: Shapes) -> int:
    # Weight (in, out/groups, *kernel): each input element is spread by out/groups * kernel products.
    return math.prod(_need(inputs, 0)) * math.prod(_need(inputs, 1)[1:])


def _matmul(_: ir.Node, inputs: Shapes, outputs: Shapes) -> int:
    left = _need(inputs, 0)
    return math.prod(_need(outputs, 0)) * (left[-1] if left else 1)


def _gemm(node: ir.Node, inputs: Shapes, outputs: Shapes) -> int:
    transposed = "transA" in node.attributes and node.attributes["transA"].as_int() != 0
    return math.prod(_need(outputs, 0)) * _need(inputs, 0)[0 if transposed else 1]


def _matmul_nbits(node: ir.Node, inputs: Shapes, _: Shapes) -> int:
    k, n = node.attributes["K"].as_int(), node.attributes["N"].as_int()
    return math.prod(_need(inputs, 0)[:-1]) * k * n


def _recurrent(_: ir.Node, inputs: Shapes, __: Shapes) -> int:
    # W (directions, gates * hidden, in), R (directions, gates * hidden, hidden); x (time, batch, in) in any order.
    steps = math.prod(_need(inputs, 0)[:2])
    return steps * (math.prod(_need(inputs, 1)) + math.prod(_need(inputs, 2)))


def _einsum(node: ir.Node, inputs: Shapes, _: Shapes) -> int:
    terms = node.attributes["equation"].as_string().replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, index in zip(terms, range(len(inputs)), strict=False):
        shape = _need(inputs, index)
        if "." in term or len(term) != len(shape):
            raise _UnknownShapeError
        for label, size in zip(term, shape, strict=True):
            sizes[label] = max(size, sizes.get(label, 1))
    return math.prod(sizes.values()) if len(terms) > 1 else 0


_RULES: dict[str, Callable[[ir.Node, Shapes, Shapes], int]] = {
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _conv_transpose,
    "MatMul": _matmul,
    "FusedMatMul": _matmul,
    "MatMulInteger": _matmul,
    "QLinearMatMul": _matmul,
    "DynamicQuantizeMatMul": _matmul,
    "MatMulIntegerToFloat": _matmul,
    "Gemm": _gemm,
    "QGemm": _gemm,
    "MatMulNBits": _matmul_nbits,
    "Einsum": _einsum,
    **dict.fromkeys(("LSTM", "GRU", "RNN"), _recurrent),
}
