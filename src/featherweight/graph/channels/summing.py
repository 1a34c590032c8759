"""Sums over axes: channels of other axes pass, those summed over end here."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels.cutting import Cutting
from featherweight.graph.channels.elementwise import _int
from featherweight.graph.channels.follow import Following, Registered, register
from featherweight.graph.channels.slots import I64

RULES: Registered = {}


@register(
    RULES, "ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceProd",
)  # fmt: skip
class Summing:
    """A sum over other axes lets channels pass; a sum over channels ends them, unless it meets them again."""

    SUMS = frozenset({"ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare"})

    #: What makes the answer over fewer channels that over all with the others at zero; None: times the share left.
    MENDED: ClassVar[dict[str, tuple[str, float | None]]] = {
        "ReduceMean": ("Mul", None), "ReduceMax": ("Max", 0.0), "ReduceMin": ("Min", 0.0)
    }  # fmt: skip

    def link(self, node: ir.Node, f: Following) -> None:
        """See the class."""
        source, out = node.inputs[0], node.outputs[0]
        if source is None or source not in f.at:
            return
        array, axes = f.at[source], _reduced(node, f.at[source].ndim)
        if axes is None:
            f.freeze(node, f"goes through {node.op_type} over axes that are not known", source)
            return
        over = [a for a in axes if array.shape[a] > 1]
        if over:
            first = array.transpose([*[a for a in range(array.ndim) if a not in over], *over])
            rows = first.reshape(-1, int(np.prod([array.shape[a] for a in over])))
            if node.op_type not in self.SUMS:
                f.freeze(node, f"goes through {node.op_type} over these channels", source)
                return
            if len(rows) == 1:
                f.summed[out] = rows
                f.ends.append((node, 0))
                return
            f.slots.tie(rows, f.where(node), "a sum over these channels keeps their other axis")
            for a in over:
                array = array.take([0], axis=a)
        f.carry(out, self._shaped(node, array, axes))

    def _shaped(self, node: ir.Node, array: I64, axes: tuple[int, ...]) -> I64:
        if _int(node, "keepdims", 1):
            return array
        return array.reshape(tuple(n for a, n in enumerate(array.shape) if a not in axes))

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Over fewer channels the answer is brought to what it was with the others at zero."""
        source, out = node.inputs[0], node.outputs[0]
        old = c.old(source)
        if source is None or old is None:
            return
        now = c.left(source)
        axes = _reduced(node, old.ndim) or ()
        if c.old(out) is not None:
            for a in axes:
                now = now.take([0], axis=a) if now.shape[a] > 1 else now
            c.put(node, out, self._shaped(node, now, axes))
        elif now.size != old.size and node.op_type in self.MENDED:
            op_type, number = self.MENDED[node.op_type]
            with_number = now.size / old.size if number is None else number
            c.edits.append(lambda namer: _behind(out, op_type, with_number, namer))


def _behind(value: ir.Value, op_type: str, number: float, namer: surgery.Namer) -> None:
    graph = surgery.graph_of(value)
    dtype = value.dtype.numpy() if value.dtype is not None else np.dtype(np.float32)
    by = surgery.add_initializer(graph, namer(f"{value.name}.share"), np.array(number, dtype))
    node = surgery.make_node(namer, op_type, [value, by], f"{value.name}.mended")
    node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
    surgery.insert_after(value, [node])
    surgery.replace_uses(value, node.outputs[0], keep=[node])


def _reduced(node: ir.Node, rank: int) -> tuple[int, ...] | None:
    """Axes that are summed over; None if they are computed."""
    if "axes" in node.attributes:
        return tuple(a % rank for a in node.attributes["axes"].as_ints())
    value = node.inputs[1] if len(node.inputs) > 1 else None
    found = surgery.constant(value)
    if value is not None and found is None:
        return None
    if found is None or found.size == 0:
        return () if _int(node, "noop_with_empty_axes", 0) else tuple(range(rank))
    return tuple(int(a) % rank for a in found.reshape(-1))
