"""Operators that join, part and pick channels, and those that ask for a shape."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels.cutting import Cutting
from featherweight.graph.channels.elementwise import _int
from featherweight.graph.channels.follow import Following, Registered, register, stored
from featherweight.graph.channels.slots import I64, positions, varying

RULES: Registered = {}


@register(RULES, "Concat")
class Joining:
    """Joined along the channels, each input keeps its own; along another axis, the inputs' channels go together."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Fresh slots for each place, so that a tensor joined with itself has its channels twice."""
        shape, carrying = f.dims(node.outputs[0]), [v for v in node.inputs if v is not None and v in f.at]
        if not carrying:
            return
        sizes = [f.dims(v) for v in node.inputs]
        if shape is None or any(s is None for s in sizes):
            f.freeze(node, "is joined with a value of unknown shape")
            return
        axis = _int(node, "axis", 0) % len(shape)
        axes = {a for v in carrying for a in varying(f.at[v])}
        # An input of one channel carries no slots of its own, but takes a place.
        if axes == {axis}:
            parts = []
            for v, size in zip(node.inputs, sizes, strict=True):
                length = size[axis] if size is not None else 0
                part = f.slots.new(tuple(length if a == axis else 1 for a in range(len(shape))))
                if v is not None and v in f.at:
                    f.slots.link(part, f.at[v])
                elif part.size:
                    f.slots.freeze(part, f.where(node), "comes from a value whose channels cannot be removed")
                parts.append(part)
            f.carry(node.outputs[0], np.concatenate(parts, axis=axis))
        elif axis not in axes:
            lead = f.at[carrying[0]]
            for index, v in enumerate(node.inputs):
                if v is not None and v in f.at and f.at[v].shape == lead.shape:
                    f.slots.link(f.at[v], lead)
                else:
                    f.follow_constant(node, index, lead)
            f.carry(node.outputs[0], lead)
        else:
            f.freeze(node, "is joined along one axis and carries channels on another")

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Join what is left."""
        out = node.outputs[0]
        full = c.old(out)
        if full is None:
            return
        axis = _int(node, "axis", 0) % full.ndim
        if varying(full) != (axis,):
            self._cut_across(node, c, full)
            return
        parts, start = [], 0
        for v in node.inputs:
            size = c.f.dims(v)
            length = size[axis] if size is not None else 0
            part = full.take(range(start, start + length), axis=axis)
            start += length
            old = c.old(v)
            if old is not None and v is not None:
                part = c.moved(old, c.left(v), part).reshape(c.left(v).shape)
            parts.append(part)
        c.put(node, out, np.concatenate(parts, axis=axis))

    def _cut_across(self, node: ir.Node, c: Cutting, full: I64) -> None:
        lead = next(v for v in node.inputs if v is not None and c.old(v) is not None)
        left = c.moved(c.f.at[lead], c.left(lead), full).reshape(c.left(lead).shape)
        for index, v in enumerate(node.inputs):
            old = c.old(v)
            if old is None or v is None:
                c.settle_constant(node, index, full, left)
            elif not np.array_equal(c.moved(old, c.left(v), full).reshape(c.left(v).shape), left):
                raise c.refuse(node, "the joined inputs would no longer match")
        c.put(node, node.outputs[0], left)


@register(RULES, "Split")
class Parting:
    """Each output has its stretch of the channels."""

    def link(self, node: ir.Node, f: Following) -> None:
        """The same slots, in parts."""
        source = node.inputs[0]
        if source is None or source not in f.at:
            return
        array = f.at[source]
        axis, sizes = _int(node, "axis", 0) % array.ndim, [f.dims(v) for v in node.outputs]
        if array.shape[axis] == 1:
            for v in node.outputs:
                f.carry(v, array)
            return
        if any(s is None for s in sizes) or axis in f.open_axes(source, array):
            f.freeze(node, "is split into parts of unknown size", source)
            return
        start = 0
        for v, size in zip(node.outputs, sizes, strict=True):
            length = size[axis] if size is not None else 0
            part = array.take(range(start, start + length), axis=axis)
            start += length
            f.carry(v, part)
            if part.size == 1:
                f.slots.freeze(part, f.where(node), "is the only channel of a part")

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Parts shrink; each must still be one stretch."""
        source = node.inputs[0]
        old = c.old(source)
        if source is None or old is None or all(c.old(v) is None for v in node.outputs):
            return
        left, axis = c.left(source), _int(node, "axis", 0) % old.ndim
        if old.shape[axis] == 1:
            for v in node.outputs:
                if c.old(v) is not None:
                    c.put(node, v, left)
            return
        start, before, lengths = 0, 0, []
        for v in node.outputs:
            size = c.f.dims(v)
            wanted = old.take(range(before, before + (size[axis] if size else 0)), axis=axis)
            before += wanted.shape[axis]
            each = left.size // left.shape[axis]
            count, odd = divmod(int((~c.gone[wanted]).sum()), each)
            part = left.take(range(start, start + count), axis=axis) if start + count <= left.shape[axis] else left
            if odd or count == 0 or not np.isin(part, wanted).all():
                raise c.refuse(node, "the parts are no longer stretches")
            lengths.append(count)
            start += count
            if c.old(v) is not None:
                c.put(node, v, part)
        if start != left.shape[axis]:
            raise c.refuse(node, "the parts are no longer stretches")
        if lengths and left.shape[axis] != old.shape[axis]:
            c.set_input(node, 1, np.array(lengths, np.int64))
            c.edits.append(lambda _: node.attributes.pop("num_outputs", None))


@register(RULES, "Slice", "Gather")
class Picking:
    """Some channels are picked by stored positions; picking along other axes lets them pass."""

    def link(self, node: ir.Node, f: Following) -> None:
        """A Gather from a stored table gives the table's other axis; else the picked slots."""
        source, out = node.inputs[0], node.outputs[0]
        if node.op_type == "Gather" and self._table(node, f):
            return
        if source is None or source not in f.at:
            self._no_channel_indices(node, f)
            return
        array = f.at[source]
        picked = self._picks(node, array)
        if picked is None:
            f.freeze(node, f"goes through {node.op_type}, whose positions cannot be followed", source)
            return
        self._no_channel_indices(node, f)
        moving = {a: i for a, i in picked.items() if array.shape[a] > 1}
        if set(moving).intersection(f.open_axes(source, array)):
            f.freeze(node, f"goes through {node.op_type} along an axis that is also the batch or a length", source)
            return
        for axis, indices in moving.items():
            taken = array.take(indices.reshape(-1), axis=axis)
            if len(np.unique(indices)) == 1 and varying(array) == (axis,):
                f.slots.freeze(taken, f.where(node), "is read alone")
                return
            array = f.slots.new(taken.shape) if len(np.unique(taken)) < taken.size else taken
            if array is not taken:
                f.slots.link(array, taken)
        f.carry(out, self._shaped(node, f, array))

    def _shaped(self, node: ir.Node, f: Following, array: I64) -> I64:
        """The array with the rank of the output: a Gather may drop its axis or make several of it."""
        if node.op_type == "Slice":
            return array
        axis, source = _int(node, "axis", 0) % array.ndim, node.inputs[1]
        rank = len(f.dims(source) or ())
        if array.shape[axis] > 1:
            return array  # picked by a list of positions: the axis stays
        return array.reshape((*array.shape[:axis], *[1] * rank, *array.shape[axis + 1 :]))

    def _no_channel_indices(self, node: ir.Node, f: Following) -> None:
        f.freeze(node, "is used as positions", *[v for v in node.inputs[1:] if v is not None])

    def _table(self, node: ir.Node, f: Following) -> bool:
        """Link a lookup in a stored table; False if the first input is no table."""
        table = stored(node.inputs[0])
        axis = _int(node, "axis", 0)
        if table is None or f.is_constant(node.inputs[1] or node.outputs[0]) or len(table.shape) != 2 or axis % 2:
            return False
        f.tensor(node, 0)  # now it is known how it is read
        self._no_channel_indices(node, f)
        f.slots.freeze(f.axis(table, 0), f.where(node), "rows are looked up by number")
        width, rank = f.axis(table, 1, born_at=f.where(node)), len(f.dims(node.outputs[0]) or ())
        if rank:
            f.carry(node.outputs[0], width.reshape((1,) * (rank - 1) + (-1,)))
        else:
            f.slots.freeze(width, f.where(node), "is looked up into a shape that is not known")
        return True

    def _picks(self, node: ir.Node, array: I64) -> dict[int, I64] | None:
        """Positions picked by axis; None if they are not stored or (a Gather) make axes of channels."""
        rank = array.ndim
        if node.op_type == "Gather":
            axis, found = _int(node, "axis", 0) % rank, surgery.constant(node.inputs[1])
            if array.shape[axis] == 1:
                return {}
            if found is None or found.ndim > 1:
                return None
            return {axis: np.where(found < 0, found + array.shape[axis], found).astype(np.int64)}
        given = [surgery.constant(v) if v is not None else None for v in node.inputs[1:5]]
        given += [None] * (4 - len(given))
        starts, ends, axes, steps = given
        if axes is None and len(node.inputs) > 3 and node.inputs[3] is not None:
            return None
        if axes is None:
            length = len(starts) if starts is not None else rank
            axes = np.arange(length)
        listed = [int(a) % rank for a in axes]
        if not any(array.shape[a] > 1 for a in listed):
            return {}
        if starts is None or ends is None or (steps is None and len(node.inputs) > 4 and node.inputs[4] is not None):
            return None
        if steps is not None and any(s != 1 and array.shape[a] > 1 for s, a in zip(steps, listed, strict=True)):
            return None
        picks = {}
        for a, first, last in zip(listed, starts, ends, strict=True):
            if array.shape[a] > 1:
                picks[a] = np.arange(array.shape[a])[int(first) : int(min(last, 2**62))]
        return picks if all(len(i) for i in picks.values()) else None

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Positions are rewritten to where the picked channels now stand."""
        source, out = node.inputs[0], node.outputs[0]
        if node.op_type == "Gather" and c.f.tensor(node, 0) is not None and c.old(source) is None:
            self._cut_table(node, c)
            return
        old, target = c.old(source), c.old(out)
        if source is None or old is None or target is None:
            return
        now = c.left(source)
        for axis, indices in (self._picks(node, old) or {}).items():
            alive = self._slices_left(node, c, old, now, axis)
            places = np.flatnonzero(np.isin(indices.reshape(-1), alive))
            where = np.searchsorted(alive, indices.reshape(-1)[places])
            if not len(places):
                raise c.refuse(node, "nothing would be left")
            if len(alive) < old.shape[axis]:
                self._rewrite(node, c, axis, old.ndim, where)
            before, now = old.take(indices.reshape(-1)[places], axis=axis), now.take(where, axis=axis)
            if len(np.unique(old.take(indices.reshape(-1), axis=axis))) < indices.size:
                now = target.reshape(old.take(indices.reshape(-1), axis=axis).shape).take(places, axis=axis)
            old = before
        c.put(node, out, self._shaped(node, c.f, now))

    def _slices_left(self, node: ir.Node, c: Cutting, old: I64, now: I64, axis: int) -> I64:
        """Old places along one axis of the slices that are left, rising; the same wherever one looks."""
        places = np.unravel_index(positions(old, now), old.shape)[axis]
        first = np.moveaxis(places, axis, 0).reshape(now.shape[axis], -1)
        if (first != first[:, :1]).any() or (np.diff(first[:, 0]) < 0).any():
            raise c.refuse(node, "the channels picked no longer lie together")
        return np.ascontiguousarray(first[:, 0])

    def _cut_table(self, node: ir.Node, c: Cutting) -> None:
        table, target = stored(node.inputs[0]), c.old(node.outputs[0])
        if table is not None and target is not None:
            c.put(node, node.outputs[0], c.born(node, table, 1).reshape((1,) * (target.ndim - 1) + (-1,)))

    def _rewrite(self, node: ir.Node, c: Cutting, axis: int, rank: int, where: I64) -> None:
        if node.op_type == "Gather":
            c.set_input(node, 1, where.astype(np.int64))
            return
        if not np.array_equal(where, np.arange(where[0], where[0] + len(where))):
            raise c.refuse(node, "the channels picked no longer lie together")
        axes = surgery.constant(node.inputs[3]) if len(node.inputs) > 3 and node.inputs[3] is not None else None
        starts, ends = (np.array(surgery.constant(node.inputs[i]), np.int64) for i in (1, 2))
        listed = [int(a) % rank for a in axes] if axes is not None else list(range(len(starts)))
        at = listed.index(axis)
        starts[at], ends[at] = where[0], where[-1] + 1
        c.set_input(node, 1, starts)
        c.set_input(node, 2, ends)


@register(RULES, "Shape", "Size")
class Asking:
    """What is computed from a shape keeps seeing the sizes before the cut; shapes that hold channels are rewritten."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Nothing is carried on; a size that is more than the number of channels cannot be put back."""
        source = node.inputs[0]
        if source is None or source not in f.at:
            return
        array = f.at[source]
        read = range(array.ndim)[_int(node, "start", 0) : _int(node, "end", array.ndim)]
        if node.op_type == "Size" or set(read).intersection(f.open_axes(source, array)):
            f.freeze(node, "has its size read, which also depends on the batch or a length", source)

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Put the old sizes in place of those that changed."""
        source = node.inputs[0]
        old = c.old(source)
        if source is None or old is None:
            return
        now = c.left(source)
        changed = {a: old.shape[a] for a in range(old.ndim) if now.shape[a] != old.shape[a]}
        if not changed:
            return
        if node.op_type == "Size":
            raise c.refuse(node, "the number of elements is used")
        start, end = _int(node, "start", 0), _int(node, "end", old.ndim)
        listed = list(range(old.ndim))[start:end]
        sizes = {listed.index(a): n for a, n in changed.items() if a in listed}
        if sizes:
            c.edits.append(lambda namer: _keep_sizes(node, sizes, len(listed), namer))


def _keep_sizes(node: ir.Node, sizes: dict[int, int], rank: int, namer: surgery.Namer) -> None:
    value = node.outputs[0]
    graph = surgery.graph_of(value)
    mask, fixed = np.zeros(rank, np.bool_), np.zeros(rank, np.int64)
    for axis, size in sizes.items():
        mask[axis], fixed[axis] = True, size
    stored_mask = surgery.add_initializer(graph, namer(f"{value.name}.cut"), mask)
    stored_sizes = surgery.add_initializer(graph, namer(f"{value.name}.size"), fixed)
    chosen = surgery.make_node(namer, "Where", [stored_mask, stored_sizes, value], f"{value.name}.before")
    chosen.outputs[0].type, chosen.outputs[0].shape = value.type, value.shape
    surgery.insert_after(value, [chosen])
    surgery.replace_uses(value, chosen.outputs[0], keep=[chosen])
