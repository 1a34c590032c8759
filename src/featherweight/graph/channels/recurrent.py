"""LSTM, GRU and RNN: hidden units of each direction."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels.cutting import Cutting
from featherweight.graph.channels.elementwise import _int
from featherweight.graph.channels.follow import Birth, Constraint, Following, Reader, Registered, register
from featherweight.graph.channels.slots import I64, varying

RULES: Registered = {}
W, R, B, INITIAL_H, INITIAL_C, P = 1, 2, 3, 5, 6, 7
# Axis of the hidden units in each stored input, and how many gates lie along it (0: as many as the operator has).
_STATES = (INITIAL_H, INITIAL_C)


@register(RULES, "LSTM", "GRU", "RNN")
class Recurrent:
    """Hidden units are rows of W and R (one a gate), columns of R, and channels of the outputs."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Input channels go with columns of W; each direction makes its own units, equally many."""
        source, w, r = node.inputs[0], f.tensor(node, W), f.tensor(node, R)
        if w is None or r is None or _int(node, "layout", 0):
            f.freeze(node, "goes through a recurrent layer whose weights are computed or whose batch comes first")
            return
        directions, hidden = r.shape[0], r.shape[2]
        carried = f.at.get(source) if source is not None else None
        if carried is not None and varying(carried) == (2,):
            f.tie_axis(w, 2, carried.reshape(-1))
            rows = np.repeat(carried.reshape(1, -1), directions, axis=0)
            f.readers.append(Reader(w.base.name or "", f.where(node), rows, 1))
        else:
            f.freeze(node, "enters a recurrent layer on another axis", source)
            f.tie_reduced(node, w, 2, None)
            carried = None
        units = f.slots.new((directions, hidden))
        for row in units:
            f.births.append(Birth(f.where(node), r.base.name or "", row))
        if directions > 1:
            f.constraints.append(Constraint(units, equal=True))
        f.readers.append(Reader(r.base.name or "", f.where(node), units, 1))
        outer, inner = float(w.shape[2]), float(hidden)
        both = outer + inner
        inputs = [] if carried is None else [carried]
        f.work[node] = [(outer / both, [units, *inputs]), (inner / both, [units, units])]
        f.shares[w.base], f.shares[r.base] = [units, *inputs], [units, units]
        self._see_parameters(node, f, units)
        for value, shape in zip(node.outputs, ((1, -1, 1), (-1, 1), (-1, 1)), strict=False):
            if value.name:
                f.carry(value, units.reshape((*shape, hidden) if shape[0] == 1 else (directions, 1, hidden)))

    def _see_parameters(self, node: ir.Node, f: Following, units: I64) -> None:
        """Every other input must be stored, zero, or absent; a weight has one reader."""
        for index, value in enumerate(node.inputs):
            if index in (0, 4) or value is None:
                continue
            tensor = f.tensor(node, index)
            if index in _STATES and _zero(value):
                continue
            if tensor is not None:
                f.shares.setdefault(tensor.base, [units])
            if tensor is None:
                f.slots.freeze(units, f.where(node), f"its input {index} is computed")
            elif len(list(tensor.base.uses())) > 1 or tensor.order != tuple(range(len(tensor.order))):
                f.slots.freeze(units, f.where(node), f"{tensor.base.name!r} has several readers")

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Take the rows and columns of the units that are left."""
        r = c.f.tensor(node, R)
        births = [b for b in c.f.births if b.node == c.f.where(node)]
        if r is None or not births:
            return
        units = np.stack([b.slots for b in births])
        stay = ~c.gone[units]
        counts = set(stay.sum(axis=1))
        if len(counts) != 1 or 0 in counts:
            raise c.refuse(node, "directions would have different widths")
        source, old = node.inputs[0], c.old(node.inputs[0])
        columns = None
        if source is not None and old is not None and varying(old) == (2,):
            size = old.size
            columns = c.moved(old.reshape(-1), c.left(source).reshape(-1), np.arange(size))
        for index in (W, R, B, INITIAL_H, INITIAL_C, P):
            self._cut_parameter(node, c, index, stay, columns)
        if not stay.all():
            c.set_int(node, "hidden_size", counts.pop())
        kept = units[stay].reshape(len(units), -1)
        for value, shape in zip(node.outputs, ((1, -1, 1), (-1, 1), (-1, 1)), strict=False):
            if c.old(value) is not None:
                whole = (*shape, kept.shape[1]) if shape[0] == 1 else (len(kept), 1, kept.shape[1])
                c.put(node, value, kept.reshape(whole))

    def _cut_parameter(
        self, node: ir.Node, c: Cutting, index: int, stay: np.ndarray, columns: I64 | None
    ) -> None:  # fmt: skip
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is None:
            return
        if index in _STATES and _zero(value):
            if not stay.all():
                c.drop_input(node, index)
            return
        tensor = c.f.tensor(node, index)
        if tensor is None:
            return
        array = np.asarray(surgery.constant(tensor.base))
        if not stay.all():
            array = np.stack([_units_of(part, keep, index) for part, keep in zip(array, stay, strict=True)])
        if index == W and columns is not None:
            array = array[..., columns]
            c.settle(node, tensor, 2, c.f.stored[tensor.base][2][columns])
        if array.shape != tensor.shape:
            c.replace(node, tensor, np.ascontiguousarray(array))


def _units_of(part: np.ndarray, keep: np.ndarray, index: int) -> np.ndarray:
    """One direction's stored input without the other units: gates lie one after another along the first axis."""
    if index in _STATES:  # (batch, hidden)
        states: np.ndarray = part[:, keep]
        return states
    gates = part.shape[0] // len(keep)
    rows: np.ndarray = part[np.tile(keep, gates)]
    return rows[:, keep] if index == R else rows


def _zero(value: ir.Value) -> bool:
    """True for a state that is all zero: the operator's default."""
    stored_values = surgery.constant(value)
    node = value.producer()
    if node is None or stored_values is not None:
        return stored_values is not None and not stored_values.any()
    if node.op_type == "ConstantOfShape":
        filled = node.attributes.get("value")
        return filled is None or not filled.as_tensor().numpy().any()
    if node.op_type in ("Expand", "Tile", "Reshape", "Unsqueeze", "Identity", "Transpose", "Cast"):
        source = node.inputs[0]
        return source is not None and _zero(source)
    return False
