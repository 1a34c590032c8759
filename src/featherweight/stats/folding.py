"""Which Relu and Clip nodes an unsigned 8-bit rounding of their output can stand for."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir


def clip_bounds(node: ir.Node) -> tuple[float, float] | None:
    """(low, high) of a Relu, or of a Clip with constant or absent bounds; None for anything else."""
    if node.op_type == "Relu":
        return 0.0, np.inf
    if node.op_type != "Clip":
        return None
    bounds = [-np.inf, np.inf]
    for i in (1, 2):
        value = node.inputs[i] if i < len(node.inputs) else None
        if value is None or not value.name:
            continue
        array = None if value.const_value is None else value.const_value.numpy()
        if array is None or array.size != 1 or np.isnan(array).any():
            return None
        bounds[i - 1] = float(array.reshape(()))
    return bounds[0], bounds[1]


def folds(node: ir.Node) -> tuple[float, float] | None:
    """The bounds of a Relu or Clip that folds into rounding: they hold zero and are not one point; else None."""
    bounds = clip_bounds(node)
    return bounds if bounds is not None and bounds[0] <= 0.0 <= bounds[1] and bounds[0] < bounds[1] else None


#: Producers whose rounding can take over a following Relu or Clip.
ROUNDED = ("Conv", "Gemm", "MatMul", "Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Where")
