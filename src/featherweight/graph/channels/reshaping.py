"""Operators that only rearrange: every slot keeps its elements, which move to other axes."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels.cutting import Cutting
from featherweight.graph.channels.elementwise import _int
from featherweight.graph.channels.follow import Constraint, Following, Registered, register
from featherweight.graph.channels.slots import I64, positions, varying

RULES: Registered = {}
MOST_SLOTS = 1 << 24


@register(RULES, "Transpose")
class Transposing:
    """Axes change places."""

    def link(self, node: ir.Node, f: Following) -> None:
        """The same slots, transposed."""
        source = node.inputs[0]
        if source is not None and source in f.at:
            f.carry(node.outputs[0], f.at[source].transpose(_perm(node, f.at[source].ndim)))

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """The same, on what is left."""
        source = node.inputs[0]
        if source is not None and c.old(node.outputs[0]) is not None:
            left = c.left(source)
            c.put(node, node.outputs[0], left.transpose(_perm(node, left.ndim)))


def _perm(node: ir.Node, rank: int) -> tuple[int, ...]:
    found = node.attributes.get("perm")
    return tuple(found.as_ints()) if found is not None else tuple(reversed(range(rank)))


@register(RULES, "Reshape", "Flatten", "Squeeze", "Unsqueeze")
class Reshaping:
    """Elements keep their order in memory: axes are merged and split."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Each element of the output has the slot of the element it was."""
        source, out = node.inputs[0], node.outputs[0]
        if source is None or source not in f.at:
            return
        array, before, after = f.at[source], f.dims(source), f.dims(out)
        if before is None or after is None or math.prod(before) != math.prod(after) or 0 in before:
            f.freeze(node, f"goes through {node.op_type} to a shape that is not known", source)
            return
        inside, outside = _sides(array, before, after)
        if math.prod(inside) > MOST_SLOTS:
            f.freeze(node, f"goes through {node.op_type} to a shape too large to be followed", source)
            return
        moved = np.broadcast_to(array, inside).reshape(outside)
        compact = _compacted(moved)
        if len(np.unique(compact)) < compact.size:  # a channel became several places
            fresh = f.slots.new(compact.shape)
            f.slots.link(fresh, compact)
            compact, f.spread = fresh, True
        elif f.spread and len(varying(compact)) > 1:
            compact = _gathered(f, compact)
        axes = varying(compact)
        if any(_held_size(f, node, a) not in (-1, 0) for a in f.open_axes(out, compact)):
            f.freeze(node, f"goes through {node.op_type} to a size that also depends on the batch or a length", source)
            return
        if len(axes) > 1:
            rows = compact.reshape(compact.shape[axes[0]], -1)
            f.constraints.append(Constraint(rows, equal=False))
        f.carry(out, compact)

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Follow each element that is left, and rewrite the sizes that the node holds."""
        source, out = node.inputs[0], node.outputs[0]
        old, target = c.old(source), c.old(out)
        before, after = c.f.dims(source), c.f.dims(out)
        if source is None or old is None or target is None or before is None or after is None:
            return
        inside, outside = _sides(old, before, after)
        now = c.left(source)
        elements = _elements(old, now, inside)
        mask = ~c.gone[target]
        sizes = rectangle(mask)
        if sizes is None:
            raise c.refuse(node, "what is left is no full rectangle")
        shape = tuple(sizes[a] if target.shape[a] > 1 else outside[a] for a in range(len(outside)))
        if math.prod(shape) != elements.size:
            raise c.refuse(node, "what is left does not fill the new shape")
        places = np.broadcast_to(target, outside).reshape(-1)[elements.reshape(-1)].reshape(shape)
        rest = tuple(slice(None) if target.shape[a] > 1 else slice(0, 1) for a in range(len(outside)))
        compact = places[rest]
        if not np.array_equal(np.broadcast_to(compact, shape), places):
            raise c.refuse(node, "the channels that are left no longer lie in blocks")
        c.put(node, out, compact)
        if node.op_type == "Reshape":
            changed = {a: n for a, n in enumerate(compact.shape) if n != target.shape[a] and target.shape[a] > 1}
            found = [a for a in changed if c.f.is_open(out, a) and _held_size(c.f, node, a) in (-1, 0)]
            c.set_sizes(node, 1, {a: n for a, n in changed.items() if a not in found}, len(outside))


def _held_size(f: Following, node: ir.Node, axis: int) -> int | None:
    """The size that a Reshape holds for an axis of its output; -1 and 0 find themselves. None if it is computed."""
    if node.op_type != "Reshape":
        return -1
    if _int(node, "allowzero", 0):
        return None
    value = node.inputs[1]
    maker = value.producer() if value is not None else None
    parts = list(maker.inputs) if maker is not None and maker.op_type == "Concat" else [value]
    for part in parts:
        found, size = surgery.constant(part), f.dims(part)
        if size is None or len(size) != 1:
            return None
        if axis < size[0]:
            return None if found is None else int(found[axis])
        axis -= size[0]
    return None


def _gathered(f: Following, array: I64) -> I64:
    """Places of one channel that lie along an axis of their own again count as one, as heads behind their batch."""
    classes = f.slots.classes()[array]
    compact = _compacted(classes)
    if compact.shape == array.shape:
        return array
    fresh = f.slots.new(compact.shape)
    f.slots.link(fresh, array)
    return fresh


def _sides(array: I64, before: tuple[int, ...], after: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Full sizes of the axes that are merged or split together with one that carries channels, 1 elsewhere."""
    inside, outside = [1] * len(before), [1] * len(after)
    for left, right in blocks(before, after):
        if any(array.shape[a] > 1 for a in left):
            for a in left:
                inside[a] = before[a]
            for a in right:
                outside[a] = after[a]
    return tuple(inside), tuple(outside)


def blocks(before: tuple[int, ...], after: tuple[int, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The least sets of neighbouring axes on both sides that hold the same number of elements."""
    found: list[tuple[tuple[int, ...], tuple[int, ...]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        left: list[int] = []
        right: list[int] = []
        m = n = 1
        while True:
            if (m < n or not left) and i < len(before):
                left.append(i)
                m *= before[i]
                i += 1
            elif (n < m or not right) and j < len(after):
                right.append(j)
                n *= after[j]
                j += 1
            else:
                break
            if m == n and left and right:
                break
        found.append((tuple(left), tuple(right)))
    return found


def _compacted(array: I64) -> I64:
    """The array with size 1 on every axis along which nothing changes."""
    for axis in range(array.ndim):
        first = array.take([0], axis=axis)
        if array.shape[axis] > 1 and np.array_equal(np.broadcast_to(first, array.shape), array):
            array = first
    return array


def _elements(old: I64, now: I64, inside: tuple[int, ...]) -> I64:
    """Old flat place (in an array of sizes `inside`) of each element that is left, in the new order."""
    coordinates = np.unravel_index(positions(old, now), old.shape)
    found = np.zeros((1,) * len(inside), np.int64)
    for a, size in enumerate(inside):
        stride = math.prod(inside[a + 1 :])
        if old.shape[a] > 1:
            found = found + coordinates[a] * stride
        elif size > 1:
            found = found + (np.arange(size) * stride).reshape([-1 if b == a else 1 for b in range(len(inside))])
    return found


def rectangle(mask: npt.NDArray[np.bool_]) -> tuple[int, ...] | None:
    """Sizes of the rectangle that the true places fill when rows close up; None if they do not.

    Whole slices may be missing along any axis; along at most one, the others may each miss different places.
    """
    axes = tuple(a for a, n in enumerate(mask.shape) if n > 1)
    total = int(mask.sum())
    sizes = [
        int(mask.any(axis=tuple(b for b in range(mask.ndim) if b != a)).sum()) if a in axes else 1
        for a in range(mask.ndim)
    ]
    if math.prod(sizes) == total:
        return tuple(sizes)
    for ragged in reversed(axes):
        others = math.prod(n for a, n in enumerate(sizes) if a != ragged)
        counts = mask.sum(axis=ragged)
        if others and total % others == 0 and set(np.unique(counts)) <= {0, total // others}:
            return tuple(total // others if a == ragged else n for a, n in enumerate(sizes))
    return None


@register(RULES, "DepthToSpace", "SpaceToDepth")
class DepthAndSpace:
    """Blocks of channels become pixels and back; the two modes differ in which channels form a block."""

    def link(self, node: ir.Node, f: Following) -> None:
        """All channels of one block go together."""
        source, out = node.inputs[0], node.outputs[0]
        if source is None or source not in f.at:
            return
        array = f.at[source]
        if varying(array) != (1,):
            f.freeze(node, f"goes through {node.op_type} on an axis of space", source)
            return
        deep = self._blocks(node, array.reshape(-1))
        if node.op_type == "DepthToSpace":
            fresh = f.slots.new((deep.shape[1],))
            f.slots.link(deep, fresh)
        else:
            fresh = f.slots.new(deep.shape)
            f.slots.link(fresh, deep)
            fresh = fresh.reshape(-1)
        f.carry(out, fresh.reshape(1, -1, 1, 1))

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Blocks close up; they must still be where the operator looks for them."""
        source, out = node.inputs[0], node.outputs[0]
        old, target = c.old(source), c.old(out)
        if source is None or old is None or target is None:
            return
        now = c.left(source).reshape(-1)
        before, target = self._blocks(node, old.reshape(-1)), target.reshape(-1)
        if node.op_type == "SpaceToDepth":
            rows = target.reshape(before.shape)
            places = [c.moved(b, now, t) for b, t in zip(list(before), list(rows), strict=True)]
            c.put(node, out, np.concatenate(places).reshape(1, -1, 1, 1))
            return
        blocks_left = list(self._blocks(node, now))
        left = c.moved(before[0], blocks_left[0], target)
        if not all(np.array_equal(c.moved(b, n, target), left) for b, n in zip(before, blocks_left, strict=True)):
            raise c.refuse(node, "the blocks of channels no longer match")
        c.put(node, out, left.reshape(1, -1, 1, 1))

    def _blocks(self, node: ir.Node, channels: I64) -> I64:
        """(places of a block, channels of the smaller depth)."""
        area = _int(node, "blocksize", 1) ** 2
        if node.op_type == "SpaceToDepth":
            return np.broadcast_to(channels, (area, len(channels)))
        mode = node.attributes.get("mode")
        if mode is not None and mode.as_string() == "CRD":
            return channels.reshape(-1, area).T
        return channels.reshape(area, -1)


@register(RULES, "Expand", "Resize", "Upsample", "Pad", "Tile")
class Resizing:
    """Other axes grow; the channels pass if their own axis does not."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Axes that carry channels must keep their size."""
        source, out = node.inputs[0], node.outputs[0]
        if source is None or source not in f.at:
            return
        after = f.dims(out)
        array = f.at[source]
        if after is None or len(after) < array.ndim:
            f.freeze(node, f"goes through {node.op_type} to a shape that is not known", source)
            return
        array = array.reshape((1,) * (len(after) - array.ndim) + array.shape)
        if any(after[a] != array.shape[a] for a in varying(array)) or not _quiet(node, array):
            f.freeze(node, f"goes through {node.op_type} along its own axis", source)
            return
        if f.open_axes(out, array):
            f.freeze(node, f"goes through {node.op_type} on an axis that is also the batch or a length", source)
            return
        f.carry(out, array)

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Sizes that the node holds are rewritten where they speak of channels."""
        source, out = node.inputs[0], node.outputs[0]
        target = c.old(out)
        if source is None or target is None:
            return
        now = c.left(source)
        left = now.reshape((1,) * (target.ndim - now.ndim) + now.shape)
        c.put(node, out, left)
        changed = {a: n for a, n in enumerate(left.shape) if n != target.shape[a] and target.shape[a] > 1}
        held = {"Expand": 1, "Resize": 3}.get(node.op_type)
        if changed and held is not None and held < len(node.inputs) and node.inputs[held] is not None:
            axes = node.attributes.get("axes")
            if axes is not None:
                order = [int(a) % target.ndim for a in axes.as_ints()]
                changed = {order.index(a): n for a, n in changed.items() if a in order}
                c.set_sizes(node, held, changed, len(order))
            else:
                c.set_sizes(node, held, changed, target.ndim)


def _quiet(node: ir.Node, array: I64) -> bool:
    """False where Pad may add at one end what it takes from the other, or Resize may pick from a region."""
    if node.op_type == "Resize":
        mode = node.attributes.get("coordinate_transformation_mode")
        return mode is None or mode.as_string() != "tf_crop_and_resize"
    if node.op_type != "Pad":
        return True
    pads, given = surgery.constant(node.inputs[1]), node.inputs[3] if len(node.inputs) > 3 else None
    axes = surgery.constant(given)
    if pads is None or (axes is None and given is not None):
        return False
    listed = [int(a) % array.ndim for a in axes] if axes is not None else list(range(array.ndim))
    moved = {a for i, a in enumerate(listed) if pads[i] or pads[i + len(listed)]}
    return not moved.intersection(varying(array))
