"""Layers: they sum over the channels of their input and make new ones."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels.cutting import Cutting
from featherweight.graph.channels.elementwise import _int
from featherweight.graph.channels.follow import Birth, Constraint, Following, Reader, Registered, Stored, register
from featherweight.graph.channels.slots import I64, lined_up, varying

RULES: Registered = {}


@register(RULES, "Conv", "ConvTranspose")
class Convolution:
    """Plain, grouped and depthwise convolutions of any rank, and their transposes."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Input channels go with columns of the weight, output channels with its rows."""
        source, weight = node.inputs[0], f.tensor(node, 1)
        groups = _int(node, "group", 1)
        if weight is None:
            f.freeze(node, "is convolved with a kernel that is computed")
            return
        channels = f.narrowed(node, source, 1, "is convolved along the axis of its channels")
        rank, transposed = len(weight.shape), node.op_type == "ConvTranspose"
        if groups > 1:
            out = self._grouped(node, f, weight, channels, groups)
        else:
            f.tie_reduced(node, weight, 0 if transposed else 1, channels)
            if channels is not None:
                width = int(np.prod(weight.shape[2:]))
                f.readers.append(Reader(weight.base.name or "", f.where(node), channels[None], width))
            out = f.axis(weight, 1 if transposed else 0, born_at=f.where(node))
        f.work[node] = [(1.0, [a for a in (channels, out) if a is not None])]
        _bias(node, f, 2, out)
        f.carry(node.outputs[0], out.reshape((1, -1) + (1,) * (rank - 2)))

    def _grouped(self, node: ir.Node, f: Following, weight: Stored, channels: I64 | None, groups: int) -> I64:
        transposed = node.op_type == "ConvTranspose"
        outputs = weight.shape[1] * groups if transposed else weight.shape[0]
        inputs = weight.shape[0] if transposed else weight.shape[1] * groups
        if channels is None:
            channels = f.slots.new((inputs,))
            f.slots.freeze(channels, f.where(node), "is convolved in groups whose inputs cannot be removed")
        # One axis of the weight serves all groups: it is cut as a whole (`_cut_grouped`), by the slots of the other.
        free = f.slots.new((weight.shape[1],))
        f.tie_axis(weight, 1, free)
        if weight.order != tuple(range(len(weight.shape))) or len(list(weight.base.uses())) > 1:
            f.slots.freeze(channels, f.where(node), "is convolved in groups by a weight with several readers")
        if transposed:
            f.tie_axis(weight, 0, channels)
            out = f.slots.new((outputs,))
            f.births.append(_birth(node, f, weight, out))
        else:
            out = f.axis(weight, 0, born_at=f.where(node))
        f.shares[weight.base] = [out] if inputs == groups else [channels, out]
        if inputs == groups:  # depthwise: a channel in, its own channels out
            f.slots.link(out.reshape(groups, -1), channels[:, None])
        else:
            for slots in (channels, out):
                f.constraints.append(Constraint(slots.reshape(groups, -1), equal=True))
            width = int(np.prod(weight.shape[2:]))
            f.readers.append(Reader(weight.base.name or "", f.where(node), channels.reshape(groups, -1), width))
        return out

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Cut weight and bias."""
        weight, source, target = c.f.tensor(node, 1), node.inputs[0], c.old(node.outputs[0])
        groups = _int(node, "group", 1)
        if weight is None or source is None:
            return
        transposed = node.op_type == "ConvTranspose"
        if groups > 1:
            out = self._cut_grouped(node, c, weight, groups)
        else:
            if (pair := c.narrowed(source, 1)) is not None:
                inner = 0 if transposed else 1
                own = c.f.stored[weight.base][weight.order[inner]]
                c.settle(node, weight, inner, c.moved(*pair, own))
            out = c.born(node, weight, 1 if transposed else 0)
        _cut_bias(node, c, 2, out)
        if target is not None:
            c.put(node, node.outputs[0], out.reshape((1, -1) + (1,) * (target.ndim - 2)))

    def _cut_grouped(self, node: ir.Node, c: Cutting, weight: Stored, groups: int) -> I64:
        source, transposed = node.inputs[0], node.op_type == "ConvTranspose"
        birth = next((b for b in c.f.births if b.node == c.f.where(node)), None)
        out = birth.slots if birth is not None else c.f.stored[weight.base][weight.order[0]]
        array = np.asarray(surgery.constant(weight.base))
        # (groups, rows of a group) masks of what stays
        stay_out = ~c.gone[out].reshape(groups, -1)
        inputs = weight.shape[0] if transposed else weight.shape[1] * groups
        ordered = np.arange(inputs).reshape(groups, -1)
        if source is not None and (pair := c.narrowed(source, 1)) is not None:
            ordered = c.moved(*pair, np.arange(inputs))
            alive = np.bincount(ordered // (inputs // groups), minlength=groups)
            keeps = alive > 0
            if not np.array_equal(keeps, stay_out.any(axis=1)) or len(set(alive[keeps])) != 1:
                raise c.refuse(node, "groups would be of different width")
            ordered = ordered.reshape(int(keeps.sum()), -1)
            if (ordered // (inputs // groups) != np.flatnonzero(keeps)[:, None]).any():
                raise c.refuse(node, "channels would change their group")
        counts = stay_out.sum(axis=1)
        if len(set(counts[counts > 0])) != 1:
            raise c.refuse(node, "groups would be of different width")
        living = np.flatnonzero(counts > 0)
        per_in, parts = inputs // groups, []
        for row, g in zip(ordered, living, strict=True):
            own_out = np.flatnonzero(stay_out[g])
            if transposed:
                parts.append(array[row][:, own_out])
            else:
                block = array[g * stay_out.shape[1] + own_out]
                parts.append(block[:, row - g * per_in])
        left = out[~c.gone[out]]
        if len(left) != len(out) or ordered.size != inputs:
            c.replace(node, weight, np.ascontiguousarray(np.concatenate(parts)))
            c.set_int(node, "group", len(living))
        return left


def _birth(node: ir.Node, f: Following, weight: Stored, slots: I64) -> Birth:
    return Birth(f.where(node), weight.base.name or "", slots)


def _bias(node: ir.Node, f: Following, index: int, out: I64) -> None:
    if index >= len(node.inputs) or node.inputs[index] is None:
        return
    tensor = f.tensor(node, index)
    if tensor is None:
        f.slots.freeze(out, f.where(node), "has a bias that is computed")
    elif tensor.shape == (len(out),):
        f.tie_axis(tensor, 0, out)


def _cut_bias(node: ir.Node, c: Cutting, index: int, left: I64) -> None:
    tensor = c.f.tensor(node, index)
    if tensor is None or tensor.base not in c.f.stored or not tensor.shape:
        return
    own = c.f.stored[tensor.base].get(tensor.order[0])
    out = c.old(node.outputs[0])
    if own is not None and out is not None:
        c.settle(node, tensor, 0, c.moved(out.reshape(-1), left, own))


@register(RULES, "Gemm")
class Product:
    """alpha A B + beta C with a stored B."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Channels of A on its reduced axis go with B's; B's other axis makes new ones."""
        source, weight = node.inputs[0], f.tensor(node, 1)
        if weight is None or f.is_constant(source or node.outputs[0]):
            f.freeze(node, "is multiplied with a matrix that is computed")
            return
        reduced, free = (1, 0) if _int(node, "transB", 0) else (0, 1)
        axis = 0 if _int(node, "transA", 0) else 1
        channels = f.narrowed(node, source, axis, "is multiplied along another axis")
        out = f.axis(weight, free, born_at=f.where(node))
        f.tie_reduced(node, weight, reduced, channels)
        if channels is not None:
            f.readers.append(Reader(weight.base.name or "", f.where(node), channels[None], 1))
        f.work[node] = [(1.0, [out] if channels is None else [channels, out])]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            f.follow_constant(node, 2, out.reshape(1, -1))
            if node.inputs[2] in f.at:
                f.freeze(node, "is added as a matrix", node.inputs[2])
        f.carry(node.outputs[0], out.reshape(1, -1))

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Cut the weight and what is added."""
        source, weight = node.inputs[0], c.f.tensor(node, 1)
        if weight is None or source is None or weight.base not in c.f.stored:
            return
        reduced, free = (1, 0) if _int(node, "transB", 0) else (0, 1)
        if (pair := c.narrowed(source, 0 if _int(node, "transA", 0) else 1)) is not None:
            own = c.f.stored[weight.base][weight.order[reduced]]
            c.settle(node, weight, reduced, c.moved(*pair, own))
        if weight.order[free] not in c.f.stored[weight.base]:
            return
        left = c.born(node, weight, free)
        full = c.f.stored[weight.base][weight.order[free]]
        if len(node.inputs) > 2 and node.inputs[2] is not None:
            c.settle_constant(node, 2, full.reshape(1, -1), left.reshape(1, -1))
        c.put(node, node.outputs[0], left.reshape(1, -1))


@register(RULES, "MatMul")
class MatrixProduct:
    """With a stored matrix it is a layer; of two activations (attention) it keeps what both have."""

    def link(self, node: ir.Node, f: Following) -> None:
        """See the class."""
        a, b = node.inputs[0], node.inputs[1]
        if a is None or b is None:
            return
        left, right = f.tensor(node, 0), f.tensor(node, 1)
        if right is not None and not f.is_constant(a):
            self._layer(node, f, a, right, right_side=True)
        elif left is not None and not f.is_constant(b):
            self._layer(node, f, b, left, right_side=False)
        elif a in f.at or b in f.at:
            self._activations(node, f, a, b)

    def _layer(self, node: ir.Node, f: Following, source: ir.Value, weight: Stored, *, right_side: bool) -> None:
        shape, out_shape = f.dims(source), f.dims(node.outputs[0])
        if shape is None or out_shape is None or len(shape) < 2 or any(n != 1 for n in weight.shape[:-2]):
            f.freeze(node, "is multiplied with a stack of matrices, or its shape is not known")
            for own in range(len(weight.shape)):
                f.tie_reduced(node, weight, own, None)
            return
        if len(weight.shape) < 2:
            alone = f.narrowed(node, source, len(shape) - 1, "is multiplied with a vector along another axis")
            f.tie_reduced(node, weight, 0, alone)
            if alone is not None:
                f.readers.append(Reader(weight.base.name or "", f.where(node), alone[None], 1))
            return
        last = len(weight.shape)
        reduced, free = (last - 2, last - 1) if right_side else (last - 1, last - 2)
        axis = len(shape) - 1 if right_side else len(shape) - 2
        made_on = len(out_shape) - 1 if right_side else len(out_shape) - 2
        carried = f.at.get(source)
        axes = () if carried is None else varying(carried)
        if carried is not None and axes and axis not in axes:
            # Channels on another axis pass; those the weight makes would be a second kind on one value.
            for own in (reduced, free):
                f.tie_reduced(node, weight, own, None)
            f.carry(node.outputs[0], carried.reshape((1,) * (len(out_shape) - len(shape)) + carried.shape))
            f.work[node] = [(1.0, [carried])]
            return
        if carried is not None and axes != (axis,):
            f.freeze(node, "is multiplied along one of two axes that carry channels", source)
        channels = f.narrowed(node, source, axis, "is multiplied along another axis")
        out = f.axis(weight, free, born_at=f.where(node))
        f.tie_reduced(node, weight, reduced, channels)
        if channels is not None:
            f.readers.append(Reader(weight.base.name or "", f.where(node), channels[None], 1))
        f.work[node] = [(1.0, [out] if channels is None else [channels, out])]
        f.carry(node.outputs[0], out.reshape(tuple(-1 if i == made_on else 1 for i in range(len(out_shape)))))

    def _activations(self, node: ir.Node, f: Following, a: ir.Value, b: ir.Value) -> None:
        """Batch axes (attention heads) go together and hold all else of them; a reduced axis is shared."""
        shapes = f.dims(a), f.dims(b), f.dims(node.outputs[0])
        if any(s is None or len(s) < 2 for s in shapes):
            f.freeze(node, "is multiplied with a value whose shape is not known")
            return
        rank = len(shapes[2] or ())
        sides = [lined_up(f.at[v], rank) if v in f.at else None for v in (a, b)]
        sizes = [(1,) * (rank - len(s or ())) + tuple(s or ()) for s in shapes[:2]]
        batch = tuple(range(rank - 2))
        heads = [x is not None and any(x.shape[i] > 1 for i in batch) for x in sides]
        reduced = (rank - 1, rank - 2)
        if any(heads):
            self._heads(node, f, sides, sizes)
            return
        k = [x is not None and x.shape[r] > 1 for x, r in zip(sides, reduced, strict=True)]
        other = [x is not None and x.shape[2 * rank - 3 - r] > 1 for x, r in zip(sides, reduced, strict=True)]
        if all(k) and not any(other) and sides[0] is not None and sides[1] is not None:
            f.slots.link(sides[0].reshape(-1), sides[1].reshape(-1))
            f.ends += [(node, 0), (node, 1)]
            f.work[node] = [(1.0, [sides[0].reshape(-1)])]
        elif sum(other) == 1 and not any(k):
            which = other.index(True)
            passed = sides[which]
            if passed is not None:
                f.work[node] = [(1.0, [passed])]
                f.carry(node.outputs[0], passed)
        else:
            f.freeze(node, "is multiplied with a value that does not carry the same channels")

    def _heads(
        self, node: ir.Node, f: Following, sides: list[I64 | None], sizes: list[tuple[int, ...]]
    ) -> None:  # fmt: skip
        """Whole heads: everything of one head is one unit, on both sides."""
        rank = len(sizes[0])
        batch = tuple(range(rank - 2))
        firsts: list[I64 | None] = []
        for x, size in zip(sides, sizes, strict=True):
            if x is None or not any(x.shape[i] > 1 for i in batch):
                if any(size[i] > 1 for y in sides if y is not None for i in batch if y.shape[i] > 1) or x is not None:
                    f.freeze(node, "is multiplied head by head with a value that has no heads to remove")
                    return
                firsts.append(None)
                continue
            first = x[..., :1, :1]
            f.slots.link(x, first)
            firsts.append(first)
        found = [x for x in firsts if x is not None]
        try:
            lead = next(x for x in found if all(m >= n for y in found for m, n in zip(x.shape, y.shape, strict=True)))
        except StopIteration:
            f.freeze(node, "is multiplied with heads on another axis")
            return
        for x in found:
            f.slots.link(x, lead)
        f.work[node] = [(1.0, [lead])]
        right = sides[1]
        if right is not None and right.shape[-1] > 1 and right.shape[:-2] == lead.shape[:-2]:
            width = right[..., :1, :]
            fresh = f.slots.new(width.shape)
            f.slots.link(fresh, width)
            f.carry(node.outputs[0], fresh)
        else:
            f.carry(node.outputs[0], lead)

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Cut the stored matrix, or follow heads."""
        a, b, out = node.inputs[0], node.inputs[1], node.outputs[0]
        if a is None or b is None:
            return
        left, right = c.f.tensor(node, 0), c.f.tensor(node, 1)
        if right is not None and not c.f.is_constant(a):
            self._cut_layer(node, c, a, right, right_side=True)
        elif left is not None and not c.f.is_constant(b):
            self._cut_layer(node, c, b, left, right_side=False)
        elif (full := c.old(out)) is not None:
            self._cut_activations(node, c, full)

    def _cut_layer(self, node: ir.Node, c: Cutting, source: ir.Value, weight: Stored, *, right_side: bool) -> None:
        out, old = node.outputs[0], c.old(source)
        full = c.old(out)
        axes = c.f.stored.get(weight.base, {})
        last = len(weight.shape)
        reduced, free = (0, 0) if last < 2 else (last - 2, last - 1) if right_side else (last - 1, last - 2)
        pair = None if old is None else c.narrowed(source, old.ndim - 1 if right_side else old.ndim - 2)
        own = axes.get(weight.order[reduced])
        if pair is not None and own is not None:
            c.settle(node, weight, reduced, c.moved(*pair, own))
        elif (
            old is not None
            and full is not None
            and full.size == old.size
            and np.array_equal(full.reshape(-1), old.reshape(-1))
        ):
            now = c.left(source)
            c.put(node, out, now.reshape((1,) * (full.ndim - now.ndim) + now.shape))
            return
        if last >= 2 and full is not None and weight.order[free] in axes:
            c.put(node, out, c.born(node, weight, free).reshape(tuple(-1 if n > 1 else 1 for n in full.shape)))

    def _cut_activations(self, node: ir.Node, c: Cutting, full: I64) -> None:
        for value in (node.inputs[1], node.inputs[0]):
            old = c.old(value)
            if old is None or value is None:
                continue
            now = lined_up(c.left(value), full.ndim)
            own = lined_up(old, full.ndim)
            if own.shape[-1] == full.shape[-1] and own[..., :1, :].shape == full.shape:
                own, now = own[..., :1, :], now[..., :1, :]
            elif own[..., :1, :1].shape == full.shape:
                own, now = own[..., :1, :1], now[..., :1, :1]
            elif own.shape != full.shape:
                continue
            c.put(node, node.outputs[0], c.moved(own, now, full).reshape(now.shape))
            return
        raise c.refuse(node, "no operand says what is left")
