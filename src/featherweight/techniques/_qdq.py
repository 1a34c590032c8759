"""Writing the plan of integer islands into the graph: Q/DQ pairs, int32 biases, folded clips."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Note
from featherweight.graph import surgery
from featherweight.techniques import _units
from featherweight.techniques._islands import Islands
from featherweight.techniques._ranges import Grid
from featherweight.techniques._units import MARK, Unit

F32 = npt.NDArray[np.float32]


class Writer:
    """Adds nodes and shared constants to one model. Equal scales and zero points are stored once."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        self.namer = surgery.Namer(model)
        self._shared: dict[tuple[str, bytes, tuple[int, ...]], ir.Value] = {}

    def constant(self, array: npt.NDArray[np.generic], hint: str) -> ir.Value:
        """An initializer of the main graph with this content."""
        key = (array.dtype.str, array.tobytes(), array.shape)
        if key not in self._shared:
            self._shared[key] = surgery.add_initializer(self.model.graph, self.namer(hint), array)
        return self._shared[key]

    def pair(self, value: ir.Value, grid: Grid, hint: str) -> tuple[ir.Node, ir.Node]:
        """QuantizeLinear and DequantizeLinear of `value`, not yet in the graph."""
        scale = self.constant(np.asarray(grid.scale, np.float32), "scale")
        zero = self.constant(np.asarray(grid.zero_point, np.uint8), "zero_point")
        q = surgery.make_node(self.namer, "QuantizeLinear", [value, scale, zero], f"{hint}_q")
        dq = surgery.make_node(self.namer, "DequantizeLinear", [q.outputs[0], scale, zero], f"{hint}_dq")
        return q, dq

    def dequantized(
        self, codes: ir.Value, scale: npt.NDArray[np.float32], axis: int | None, dtype: type[np.generic], hint: str
    ) -> ir.Node:
        """DequantizeLinear of constant codes, not yet in the graph. `scale` () or (channels,).

        Gemm's kernel needs the zero point spelled out; MatMul's refuses one for codes of more than two axes.
        """
        attributes = {} if axis is None or scale.ndim == 0 else {"axis": axis}
        inputs = [codes, self.constant(scale.astype(np.float32), "scales")]
        if codes.shape is None or len(codes.shape) <= 2:
            inputs.append(self.constant(np.zeros(scale.shape, dtype), "zeros"))
        return surgery.make_node(self.namer, "DequantizeLinear", inputs, hint, attributes=attributes)


def write(model: ir.Model, islands: Islands, grids: dict[ir.Value, Grid], shifts: dict[ir.Node, F32]) -> list[Note]:
    """Edit `model` in place. `grids`: of every value in the plan; `shifts`: added to a unit's bias (channels,)."""
    writer = Writer(model)
    notes: list[Note] = []
    for unit in islands.units:
        notes += _bias(writer, unit, grids[unit.x], shifts.get(unit.node))
        unit.node.metadata_props.pop(MARK, None)
    for value in islands.inputs:
        q, dq = writer.pair(value, grids[value], value.name or "input")
        surgery.insert_after(value, [q, dq])
        dq.outputs[0].shape, dq.outputs[0].type = value.shape, value.type
        for node, index in islands.readers[value]:
            node.replace_input_with(index, dq.outputs[0])
    for last in islands.codes_out:
        _round_output(writer, islands, last, grids[last])
    return notes


def _round_output(writer: Writer, islands: Islands, last: ir.Value, grid: Grid) -> None:
    """Put Q/DQ behind the node that makes `last`; the pair's result takes over the name and all readers of `last`."""
    out = islands.before_fold.get(last, last)
    drop = islands.dropped.get(last, [])
    for node in drop:
        node.replace_input_with(0, None)
    name = last.name or "value"
    q, dq = writer.pair(out, grid, name)
    producer = out.producer()
    if producer is None or producer.graph is None:
        raise AssertionError("a rounded output has a producer in the main graph")
    producer.graph.insert_after(producer, [q, dq])
    result = dq.outputs[0]
    result.shape, result.type = last.shape, last.type
    readers = [(u.node, u.idx) for u in last.uses() if u.node is not q]
    for node, index in readers:
        node.replace_input_with(index, result)
    graph = producer.graph
    last.name = writer.namer(f"{name}_float")
    result.name = name
    for i, output in enumerate(graph.outputs):
        if output is last:
            graph.outputs[i] = result
    for node in reversed(drop):
        graph.remove(node, safe=True)


def _bias(writer: Writer, unit: Unit, grid: Grid, shift: F32 | None) -> list[Note]:
    """Store the unit's bias (plus `shift`) as int32 with scale sx * sw, where the kernel wants it."""
    producer = unit.weight.producer()
    scales = _units.constant(producer.inputs[1]) if producer is not None else None
    if scales is None:
        return []
    bias = _units.constant(unit.bias)
    channels = scales.size if scales.ndim == 1 else 0
    if bias is None and shift is None:
        return []
    beta = float(_units.attribute(unit.node, "beta", 1.0))
    vector = None if bias is None else as_vector(bias * np.float32(beta), channels)
    if bias is not None and vector is None:
        return _bias_behind(writer, unit, bias * np.float32(beta))
    if channels == 0:
        return []
    total = (np.zeros(channels, np.float32) if vector is None else vector) + (0 if shift is None else shift)
    total = total.astype(np.float32)
    if "beta" in unit.node.attributes:
        unit.node.attributes.pop("beta")
    if unit.node.op_type == "MatMul":
        if unit.add is None or bias is None:
            return []
        index = next(i for i, v in enumerate(unit.add.inputs) if v is unit.bias)
        if _may_become_gemm(unit):
            unit.add.replace_input_with(index, _int32(writer, unit, total, scales, grid))
        else:
            unit.add.replace_input_with(index, writer.constant(total.reshape(bias.shape), "bias"))
        return []
    surgery.replace_input(unit.node, 2, _int32(writer, unit, total, scales, grid))
    return []


def _int32(writer: Writer, unit: Unit, total: F32, scales: F32, grid: Grid) -> ir.Value:
    scale = (scales.astype(np.float32) * np.float32(grid.scale)).astype(np.float32)
    codes = np.clip(np.rint(total.astype(np.float64) / scale), -(2.0**31 - 1), 2.0**31 - 1).astype(np.int32)
    stored = writer.constant(codes, "bias_codes")
    dq = writer.dequantized(stored, scale, 0, np.int32, "bias")
    surgery.insert_before(unit.node, [dq])
    return dq.outputs[0]


def _may_become_gemm(unit: Unit) -> bool:
    """The runtime turns MatMul + Add into Gemm if it knows all sizes (or the rank is 2); Gemm needs an int32 bias."""
    shape = unit.x.shape
    if shape is None:
        return True
    return len(shape) == 2 or all(isinstance(d, int) for d in shape)


def _bias_behind(writer: Writer, unit: Unit, bias: F32) -> list[Note]:
    """A bias that is not one value an output channel moves into a float Add behind the node."""
    out = unit.node.outputs[0]
    surgery.replace_input(unit.node, 2, None)
    unit.node.attributes.pop("beta", None)
    add = surgery.make_node(writer.namer, "Add", [out, writer.constant(bias, "bias")], f"{out.name}_biased")
    surgery.insert_after(out, [add])
    add.outputs[0].shape, add.outputs[0].type = out.shape, out.type
    surgery.replace_uses(out, add.outputs[0], keep={add})
    return []


def as_vector(bias: F32, channels: int) -> F32 | None:
    """A Gemm or Conv bias as one value a channel, (channels,), or None if it is not (a full matrix, a column)."""
    if bias.size == 1:
        return np.full(channels, bias.reshape(()), np.float32) if channels else None
    if channels and bias.size == channels and bias.shape[-1] == channels:
        return bias.reshape(channels)
    return None
