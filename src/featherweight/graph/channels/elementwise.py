"""Operators that treat every channel alike: element by element with broadcasting, over space, or by one parameter."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels.cutting import Cutting
from featherweight.graph.channels.follow import Following, Registered, register
from featherweight.graph.channels.slots import I64, lined_up, positions, varying

RULES: Registered = {}


@register(
    RULES,
    "Add", "Sub", "Mul", "Div", "Pow", "Mod", "Min", "Max", "Sum", "Mean", "Where", "PRelu", "And", "Or", "Xor",
    "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "BitShift", "Relu", "LeakyRelu",
    "ThresholdedRelu", "Elu", "Selu", "Celu", "Sigmoid", "HardSigmoid", "HardSwish", "Swish", "Tanh", "Clip",
    "Softplus", "Softsign", "Mish", "Gelu", "Erf", "Exp", "Log", "Sqrt", "Reciprocal", "Neg", "Abs", "Floor",
    "Ceil", "Round", "Sign", "Not", "Sin", "Cos", "Tan", "Asin", "Acos", "Atan", "Sinh", "Cosh", "Asinh",
    "Acosh", "Atanh", "IsNaN", "IsInf", "Cast", "CastLike", "Identity", "Dropout", "Shrink",
)  # fmt: skip
class Elementwise:
    """y[i] = f(a[i], b[i], ...) with broadcasting: what meets at one place goes together."""

    def link(self, node: ir.Node, f: Following) -> None:
        """The input with channels along most axes leads; the others and stored operands are linked to it."""
        out, carrying = node.outputs[0], [v for v in node.inputs if v is not None and v in f.at]
        if not carrying:
            return
        shape = f.dims(out) or _broadcast(node, f)
        lead = _lead(node, f, len(shape)) if shape is not None else None
        if shape is None or lead is None or any(lead.shape[a] != shape[a] for a in varying(lead)):
            f.freeze(node, "meets channels of another axis, or its shape is not known")
            return
        for index, value in enumerate(node.inputs):
            if value is None or (node.op_type == "CastLike" and index == 1):
                continue
            if value in f.summed:
                f.slots.tie(f.summed[value], f.where(node), "a sum over these channels is combined with them again")
            if value in f.at:
                f.slots.link(lined_up(f.at[value], lead.ndim), lead)
            else:
                f.follow_constant(node, index, lead)
        f.carry(out, lead)

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """What is left of the lead is what is left of the output; every other operand must agree."""
        full = c.old(node.outputs[0])
        if full is None:
            return
        left = None
        for value in node.inputs:
            old = c.old(value)
            if old is not None and value is not None and np.array_equal(lined_up(old, full.ndim), full):
                left = lined_up(c.left(value), full.ndim)
                break
        if left is None:
            raise c.refuse(node, "no operand says what is left")
        for index, value in enumerate(node.inputs):
            old = c.old(value)
            if value is None or (node.op_type == "CastLike" and index == 1):
                continue
            if old is None:
                c.settle_constant(node, index, full, left)
                continue
            own = np.broadcast_to(lined_up(old, full.ndim), full.shape)
            now = lined_up(c.left(value), full.ndim)
            wanted = own.reshape(-1)[positions(full, left)]
            fits = all(n in (1, m) for n, m in zip(now.shape, left.shape, strict=True))
            if not fits or not np.array_equal(np.broadcast_to(now, left.shape), wanted):
                raise c.refuse(node, f"{value.name!r} would no longer fit")
        c.put(node, node.outputs[0], left)


def _broadcast(node: ir.Node, f: Following) -> tuple[int, ...] | None:
    """The output's shape from its inputs', where inference does not know it."""
    shapes = [f.dims(v) for v in node.inputs if v is not None]
    known = [s for s in shapes if s is not None]
    if len(known) < len(shapes):
        return None
    try:
        found = np.broadcast_shapes(*known)
    except ValueError:
        return None
    f.sizes.setdefault(node.outputs[0].name or "", found)
    return found


def _lead(node: ir.Node, f: Following, rank: int) -> I64 | None:
    """The operand whose channels vary along every axis that any operand's do; None if there is none."""
    arrays = [lined_up(f.at[v], rank) for v in node.inputs if v is not None and v in f.at]
    axes = {a for array in arrays for a in varying(array)}
    return next((array for array in arrays if set(varying(array)) == axes), None)


@register(
    RULES,
    "MaxPool", "AveragePool", "LpPool", "GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool",
)  # fmt: skip
class Pooling:
    """Pools look at one channel at a time."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Axis 1 goes on; where MaxPool also says where it found the largest, that counts all channels."""
        if len(node.outputs) > 1 and node.outputs[1].uses():
            f.freeze(node, f"goes through {node.op_type}, whose positions are used", node.inputs[0])
            return
        _along_channel_axis(node, f)

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Nothing is stored of the channels."""
        _same(node, c)


@register(RULES, "Softmax", "LogSoftmax", "Hardmax", "LpNormalization", "CumSum", "ArgMax", "ArgMin", "TopK")
class AlongAxis:
    """Operators that mix along one axis: channels on it stay together, on other axes they pass."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Freeze what is mixed."""
        source = node.inputs[0]
        if source is None or source not in f.at:
            return
        array, axis = f.at[source], _axis(node, f.at[source].ndim)
        if axis is None or array.shape[axis] > 1:
            f.freeze(node, f"goes through {node.op_type}, which mixes these channels", source)
            return
        if node.op_type in ("ArgMax", "ArgMin") and not _int(node, "keepdims", 1):
            f.carry(node.outputs[0], array.reshape(tuple(n for a, n in enumerate(array.shape) if a != axis)))
            return
        for value in node.outputs:
            f.carry(value, array)

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Nothing is stored of the channels."""
        source = node.inputs[0]
        if source is None:
            return
        for value in node.outputs:
            old = c.old(value)
            if old is not None:
                left = c.left(source)
                axis = _axis(node, left.ndim)
                shape = left.shape if old.ndim == left.ndim else tuple(n for a, n in enumerate(left.shape) if a != axis)
                c.put(node, value, left.reshape(shape))


@register(RULES, "BatchNormalization", "InstanceNormalization", "GroupNormalization")
class ChannelNorm:
    """Norms with a parameter a channel; statistics over a group of channels hold the group together."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Parameters along axis 1 go with it."""
        source = node.inputs[0]
        if source is None or source not in f.at:
            return
        array = f.at[source]
        text = f"goes through {node.op_type} on another axis than that of its channels"
        channels = f.narrowed(node, source, 1, text)
        if channels is None:
            return
        if node.op_type == "GroupNormalization":
            groups = _int(node, "num_groups", 1)
            channels = self._group(node, f, channels, groups)
        for index in range(1, len(node.inputs)):
            tensor = f.tensor(node, index)
            if tensor is None or len(tensor.shape) != 1:
                f.freeze(node, "has parameters that are computed", source)
                return
            if tensor.shape[0] == len(channels):
                f.tie_axis(tensor, 0, channels)
            elif tensor.shape[0] != 1:
                f.tie_axis(tensor, 0, channels.reshape(tensor.shape[0], -1)[:, 0])
        f.carry(node.outputs[0], array)

    def _group(self, node: ir.Node, f: Following, channels: I64, groups: int) -> I64:
        rows = channels.reshape(groups, -1)
        f.slots.tie(rows, f.where(node), "group statistics are taken over these channels together")
        return channels

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Cut the parameters; a group norm loses whole groups."""
        source = node.inputs[0]
        old = c.old(source)
        if source is None or old is None or c.old(node.outputs[0]) is None:
            return
        left, pair = c.left(source), c.narrowed(source, 1)
        if pair is None:
            return
        rows, now = pair
        groups = _int(node, "num_groups", 1) if node.op_type == "GroupNormalization" else 1
        each = len(rows) // groups
        for index in range(1, len(node.inputs)):
            tensor = c.f.tensor(node, index)
            if tensor is None or tensor.base not in c.f.stored or tensor.order[0] not in c.f.stored[tensor.base]:
                continue
            own = c.f.stored[tensor.base][tensor.order[0]]
            if len(own) == len(rows):
                c.settle(node, tensor, 0, c.moved(rows, now, own))
            else:
                c.settle(node, tensor, 0, own[~c.gone[own]])
        if node.op_type == "GroupNormalization" and len(now) != len(rows):
            c.set_int(node, "num_groups", len(now) // each)
        c.put(node, node.outputs[0], left)


@register(RULES, "LayerNormalization", "RMSNormalization", "LRN", "MeanVarianceNormalization")
class AcrossChannels:
    """Norms whose statistics are taken over the channels: they pass only channels of other axes."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Axes from `axis` on are held together; those in front pass."""
        source = node.inputs[0]
        if source is None or source not in f.at:
            return
        array = f.at[source]
        default = 1 if node.op_type == "LRN" else -1
        first = _int(node, "axis", default) % array.ndim
        mixed = [a for a in varying(array) if a >= first]
        if mixed or node.op_type in ("LRN", "MeanVarianceNormalization"):
            f.freeze(node, f"goes through {node.op_type}, whose statistics are taken over these channels", source)
        f.carry(node.outputs[0], array)

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Nothing is stored of the channels."""
        _same(node, c)


def _along_channel_axis(node: ir.Node, f: Following) -> None:
    source = node.inputs[0]
    if source is None or source not in f.at:
        return
    if varying(f.at[source]) not in ((0,), (1,), (0, 1)):
        f.freeze(node, f"goes through {node.op_type} on an axis that it pools over", source)
        return
    for value in node.outputs:
        f.carry(value, f.at[source])


def _same(node: ir.Node, c: Cutting) -> None:
    """Outputs have what is left of the first input."""
    source = node.inputs[0]
    for value in node.outputs:
        if source is not None and c.old(value) is not None:
            c.put(node, value, c.left(source))


def _axis(node: ir.Node, rank: int) -> int | None:
    if node.op_type == "CumSum":
        found = surgery.constant(node.inputs[1])
        return None if found is None or found.size != 1 else int(found.reshape(-1)[0]) % rank
    default = 0 if node.op_type in ("ArgMax", "ArgMin") else -1
    return _int(node, "axis", default) % rank


def _int(node: ir.Node, name: str, default: int) -> int:
    found = node.attributes.get(name)
    return default if found is None else int(found.as_int())
