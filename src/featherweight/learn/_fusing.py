"""Chains of nodes that torch has one kernel for: fewer passes over memory, fewer values kept for the gradient.

Only the last node of a chain is replaced; the others stay for whoever else asks for their outputs, and cost nothing
where nobody does.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

Scalar = Callable[[ir.Value], float | None]
"""Content of a constant of one element; None for anything else."""
_CLOSE = 1e-6


def _made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == op_type and node.domain in ("", "ai.onnx") else None


def _scaled(value: ir.Value, scalar: Scalar) -> tuple[ir.Value, float] | None:
    """(x, c) where value = x * c by one Mul or Div with a constant."""
    node = _made_by(value, "Mul") or _made_by(value, "Div")
    if node is None or node.inputs[0] is None or node.inputs[1] is None:
        return None
    left, right = scalar(node.inputs[0]), scalar(node.inputs[1])
    if right is not None and right != 0:
        return node.inputs[0], 1 / right if node.op_type == "Div" else right
    return (node.inputs[1], left) if left is not None and node.op_type == "Mul" else None


def _erf_argument(value: ir.Value, scalar: Scalar) -> ir.Value | None:
    """X where value = 1 + erf(x / sqrt 2)."""
    add = _made_by(value, "Add")
    if add is None:
        return None
    for one, erf in (add.inputs, reversed(add.inputs)):
        node = _made_by(erf, "Erf")
        if one is None or scalar(one) != 1.0 or node is None or node.inputs[0] is None:
            continue
        found = _scaled(node.inputs[0], scalar)
        if found is not None and math.isclose(found[1], math.sqrt(0.5), rel_tol=1e-5):
            return found[0]
    return None


def _factors(value: ir.Value, stop: ir.Value | None, scalar: Scalar, depth: int = 3) -> tuple[list[ir.Value], float]:
    """What is multiplied to make `value`, constants apart; not taken apart further at `stop`."""
    node = _made_by(value, "Mul")
    if node is None or value is stop or depth == 0:
        return [value], 1.0
    found, product = [], 1.0
    for part in node.inputs:
        constant = None if part is None else scalar(part)
        if constant is not None:
            product *= constant
        elif part is not None:
            inner, factor = _factors(part, stop, scalar, depth - 1)
            found += inner
            product *= factor
    return found, product


def gelu_argument(node: ir.Node, scalar: Scalar) -> ir.Value | None:
    """X where the output of a Mul is x / 2 (1 + erf(x / sqrt 2)), in any order of its products; None if it is not."""
    if node.op_type != "Mul" or node.domain not in ("", "ai.onnx"):
        return None
    for part in _factors(node.outputs[0], None, scalar)[0]:
        x = _erf_argument(part, scalar)
        if x is None:
            continue
        factors, product = _factors(node.outputs[0], x, scalar)
        if {*factors} == {x, part} and len(factors) == 2 and abs(product - 0.5) < _CLOSE:
            return x
    return None
