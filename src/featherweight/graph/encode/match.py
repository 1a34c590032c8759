"""Compare a decode expression with the nodes of a model.

Matching is strict: same operators, attributes and types, constants of known content equal. Data leaves may have
any shape, since the shape tells the layout (how many values, which axis has scales).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from featherweight.graph.encode.sink import Fixed, Free, Op

Array = np.ndarray[Any, Any]
INDEX = "index"
"""Key under which the value that matched a Free leaf is found; all others are tensors."""
Found = dict[str, Any]


def constant(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Tensor of an initializer that no caller may override, or of a Constant node."""
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    node = value.producer()
    if node is None or node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    attr = node.attributes.get("value")
    return attr.as_tensor() if attr is not None and attr.type == ir.AttributeType.TENSOR else None


def match(tree: Any, value: ir.Value | None, found: Found, *, exact: bool) -> bool:
    """True if `value` is computed as `tree` says; data leaves are put in `found`.

    With `exact` data shapes and fixed contents must agree; without, only types of data and the operators.
    """
    if value is None:
        return False
    if isinstance(tree, Op):
        return _match_op(tree, value, found, exact=exact)
    if isinstance(tree, Free):
        return found.setdefault(INDEX, value) is value
    tensor = constant(value)
    if tensor is None:
        return False
    if isinstance(tree, Fixed):
        if not exact:
            return True
        return tensor.dtype == ir.DataType.from_numpy(tree.array.dtype) and np.array_equal(tensor.numpy(), tree.array)
    if tensor.dtype != tree.dtype or (exact and tuple(tensor.shape) != tree.shape):
        return False
    return found.setdefault(tree.key, tensor) is tensor


def _match_op(tree: Op, value: ir.Value, found: Found, *, exact: bool) -> bool:
    node = value.producer()
    if (
        node is None
        or node.op_type != tree.op_type
        or node.domain not in ("", "ai.onnx")
        or len(node.outputs) != 1
        or len(node.inputs) != len(tree.inputs)
        or not _same_attributes(tree, node, exact=exact)
    ):
        return False
    return all(match(t, v, found, exact=exact) for t, v in zip(tree.inputs, node.inputs, strict=True))


_DEFAULTS: dict[str, dict[str, Any]] = {
    "Cast": {"saturate": 1, "round_mode": "up"},
    "Gather": {"axis": 0},
    "Reshape": {"allowzero": 0},
    "CumSum": {"exclusive": 0, "reverse": 0},
    "DequantizeLinear": {"axis": 1, "block_size": 0, "output_dtype": 0},
    "Mod": {"fmod": 0},
}


def _same_attributes(tree: Op, node: ir.Node, *, exact: bool) -> bool:
    """Equal but for defaults, which another tool may have written out."""
    if not exact and node.op_type == "DequantizeLinear":
        return True  # its axis and block size are part of the layout that is still to be found
    if any(a.is_ref() for a in node.attributes.values()):
        return False
    defaults = _DEFAULTS.get(node.op_type, {})
    wanted = {**defaults, **dict(tree.attrs)}
    return wanted == {**defaults, **{k: a.value for k, a in node.attributes.items()}}
