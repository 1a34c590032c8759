"""Which tensors become 8-bit: integer islands that stay connected, and what must not share a scale.

Compute units are given; glue nodes (Add, Concat, pooling, layout) join an island where codes already flow in and
all readers want codes. Tensors of very different ranges are not concatenated in one scale; graph outputs stay float.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir

from featherweight.stats import Statistics, folding
from featherweight.techniques import _kernels, _units
from featherweight.techniques._units import Unit

CONCAT_SPREAD = 4.0  # widest over narrowest range that one scale may serve: costs the narrow one 2 of 8 bits


@dataclass
class Islands:
    """The plan. `codes_out`: values whose producer rounds them (after folding), with the bounds of what was folded.

    `inputs`: float values that need their own rounding, for integer readers only. `tied`: value -> the value whose
    grid it shares. `dropped`: folded nodes by the value they end in.
    """

    units: list[Unit]
    glue: list[ir.Node] = field(default_factory=list)
    codes_out: dict[ir.Value, tuple[float, float]] = field(default_factory=dict)
    before_fold: dict[ir.Value, ir.Value] = field(default_factory=dict)
    dropped: dict[ir.Value, list[ir.Node]] = field(default_factory=dict)
    inputs: list[ir.Value] = field(default_factory=list)
    tied: dict[ir.Value, ir.Value] = field(default_factory=dict)
    readers: dict[ir.Value, list[tuple[ir.Node, int]]] = field(default_factory=dict)


def plan(model: ir.Model, stats: Statistics, units: list[Unit], keep_float: frozenset[str]) -> Islands:
    """Decide for every value and glue node of the main graph. The model is not changed."""
    by_node = {u.node: u for u in units}
    wanted = _wanted(model, by_node, keep_float)
    islands = Islands(units)
    for node in model.graph:
        unit = by_node.get(node)
        if unit is not None:
            _read(islands, unit.x, node, 0)
            last, drop, bounds = _units.folded(unit.out)
            if unit.needs_output_codes or (_all_want(last, wanted) and last.name in stats.values):
                _write(islands, unit.out, last, drop, bounds, stats)
        elif node.name not in keep_float:
            _glue(islands, node, stats, wanted)
    islands.inputs = [v for v in islands.readers if v not in islands.codes_out]
    return islands


def _read(islands: Islands, value: ir.Value, node: ir.Node, index: int) -> None:
    islands.readers.setdefault(value, []).append((node, index))


def _write(
    islands: Islands,
    out: ir.Value,
    last: ir.Value,
    drop: list[ir.Node],
    bounds: tuple[float, float],
    stats: Statistics,
) -> None:
    if drop and last.name not in stats.values:
        last, drop, bounds = out, [], (float("-inf"), float("inf"))
    islands.codes_out[last] = bounds
    islands.before_fold[last] = out
    islands.dropped[last] = drop


def _wanted(model: ir.Model, units: dict[ir.Node, Unit], keep_float: frozenset[str]) -> dict[ir.Value, bool]:
    """Optimistic, against the direction of flow: values all of whose readers could take codes."""
    wanted: dict[ir.Value, bool] = {}
    for node in reversed(list(model.graph)):
        for out in node.outputs:
            readers = list(out.uses())
            wanted[out] = bool(readers) and all(_could_take(u.node, u.idx, units, wanted, keep_float) for u in readers)
    for value in model.graph.inputs:
        wanted[value] = any(_could_take(u.node, u.idx, units, wanted, keep_float) for u in value.uses())
    return wanted


def _could_take(
    node: ir.Node, index: int, units: dict[ir.Node, Unit], wanted: dict[ir.Value, bool], keep_float: frozenset[str]
) -> bool:
    if node in units:
        return index == 0
    if node.name in keep_float:
        return False
    if folding.folds(node) is not None:
        return index == 0 and wanted.get(node.outputs[0], False)
    if node.op_type in _kernels.LAYOUT or is_nearest_resize(node):
        return index == 0 and all(wanted.get(out, False) for out in node.outputs)
    if node.op_type in _kernels.ARITHMETIC:
        return wanted.get(node.outputs[0], False) or node.op_type == "GlobalAveragePool"
    return False


def _all_want(value: ir.Value, wanted: dict[ir.Value, bool]) -> bool:
    return wanted.get(value, False) and not value.is_graph_output()


def is_nearest_resize(node: ir.Node) -> bool:
    """A Resize that only repeats values, so codes pass through."""
    mode = _units.attribute(node, "mode", "nearest")
    return node.op_type == "Resize" and (mode.decode() if isinstance(mode, bytes) else mode) == "nearest"


def _glue(islands: Islands, node: ir.Node, stats: Statistics, wanted: dict[ir.Value, bool]) -> None:
    """Make `node` integer if codes flow in, its kernel exists and its output is of use as codes."""
    ins = [(i, v) for i in range(len(node.inputs)) if (v := _units.activation(node, i)) is not None]
    if node.op_type in _kernels.LAYOUT or is_nearest_resize(node):
        source = _units.activation(node, 0)
        if source is None or source not in islands.codes_out or len(ins) != 1:
            return
        if any(out.is_graph_output() for out in node.outputs) and len(node.outputs) > 1:
            return
        if node.op_type == "MaxPool" and len(node.outputs) > 1:
            return
        islands.glue.append(node)
        _read(islands, source, node, 0)
        for out in node.outputs:
            islands.codes_out[out] = islands.codes_out[source]
            islands.tied[out] = source
        return
    if node.op_type not in _kernels.ARITHMETIC or not _arithmetic_fits(islands, node, ins, stats, wanted):
        return
    islands.glue.append(node)
    for i, value in ins:
        if node.op_type != "Where" or i > 0:
            _read(islands, value, node, i)
    last, drop, bounds = _units.folded(node.outputs[0])
    _write(islands, node.outputs[0], last, drop, bounds, stats)


def _arithmetic_fits(
    islands: Islands,
    node: ir.Node,
    ins: list[tuple[int, ir.Value]],
    stats: Statistics,
    wanted: dict[ir.Value, bool],
) -> bool:
    data = [v for i, v in ins if node.op_type != "Where" or i > 0]
    width = {"Add": 2, "Mul": 2, "Where": 2, "Concat": len(node.inputs)}.get(node.op_type, 1)
    if len(data) != width or not all(_known(v, stats) for v in data):
        return False
    inside = [v in islands.codes_out for v in data]
    last = _units.folded(node.outputs[0])[0]
    if not _known(last, stats) and not _known(node.outputs[0], stats):
        return False
    if node.op_type == "GlobalAveragePool":
        return all(inside) and not last.is_graph_output()
    if not _all_want(last, wanted):
        return False
    if node.op_type == "Concat":
        return all(inside) and _alike(data, stats)
    return any(inside) if width == 2 and node.op_type != "Where" else all(inside)


def _known(value: ir.Value, stats: Statistics) -> bool:
    found = stats.values.get(value.name or "")
    return found is not None and found.finite


def _alike(values: list[ir.Value], stats: Statistics) -> bool:
    """True if one scale can serve all: zero ranges fit anywhere."""
    widths = [max(v.high, 0.0) - min(v.low, 0.0) for v in (stats.values[x.name or ""] for x in values)]
    positive = [w for w in widths if w > 0]
    return not positive or max(positive) <= CONCAT_SPREAD * min(positive)
