"""Cutting: the removed slots leave every tensor, and what operators store of their shapes is rewritten.

The nodes are walked again in order. Each value gets the array of slots that are left, in the order in which they
now stand; a parameter takes the entries that belong to them. Where a rewritten graph could not stand (a rectangle
that is no longer one, slices that no longer lie together) the cut is refused as a whole.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.errors import ModelError
from featherweight.graph import surgery
from featherweight.graph.channels.follow import STANDARD, Following, Rule, Stored, constant_axes
from featherweight.graph.channels.slots import I64, positions, varying

KEPT = "featherweight.kept"
Array = npt.NDArray[Any]


class IllegalCutError(ModelError):
    """The slots to remove do not leave a graph that can stand."""


@dataclass
class Cutting:
    """The state of one cut. Nothing is edited before `commit`: edits wait in `edits`."""

    f: Following
    gone: npt.NDArray[np.bool_]
    new: dict[ir.Value, I64] = field(default_factory=dict)
    axes: dict[ir.Value, dict[int, I64]] = field(default_factory=dict)
    replaced: dict[ir.Value, Array] = field(default_factory=dict)
    whole: dict[ir.Value, I64] = field(default_factory=dict)
    edits: list[Any] = field(default_factory=list)

    def refuse(self, node: ir.Node, text: str) -> IllegalCutError:
        """The error that refuses this cut."""
        return IllegalCutError(f"these channels cannot be removed together: at {self.f.where(node)} {text}")

    def old(self, value: ir.Value | None) -> I64 | None:
        """The value's slots before the cut; None if it carries none."""
        return None if value is None else self.f.at.get(value)

    def left(self, value: ir.Value) -> I64:
        """The value's slots after the cut, in their order."""
        return self.new[value] if value in self.new else self.f.at[value]

    def narrowed(self, value: ir.Value, axis: int) -> tuple[I64, I64] | None:
        """(before, after) slots along one axis of a value, as Following.narrowed gave them; None if it has none."""
        old = self.old(value)
        if old is None or old.shape[axis] == 1:
            return None
        now = self.left(value)
        before = np.moveaxis(old, axis, 0).reshape(old.shape[axis], -1)[:, 0]
        return before, np.moveaxis(now, axis, 0).reshape(now.shape[axis], -1)[:, 0]

    def put(self, node: ir.Node, value: ir.Value, array: I64) -> None:
        """Say what is left of an output. Raises IllegalCutError if it is empty or not what the mask says."""
        old = self.f.at.get(value)
        if old is None:
            return
        if array.size == 0:
            raise self.refuse(node, "nothing would be left")
        if array.size != int((~self.gone[old]).sum()) or self.gone[array].any():
            raise self.refuse(node, "what is left is no full rectangle")
        self.new[value] = array

    def moved(self, source: I64, left: I64, target: I64) -> I64:
        """`left` are slots of `source`; the slots at the same places of `target` (same shape as source)."""
        found: I64 = np.broadcast_to(target, source.shape).reshape(-1)[positions(source, left)]
        return found

    def settle(self, node: ir.Node, tensor: Stored, axis: int, left: I64) -> None:
        """Entries along one axis of a stored tensor, by slot, in order; every reader must want the same."""
        axes = self.axes.setdefault(tensor.base, {})
        own = tensor.order[axis]
        if own in axes and not np.array_equal(axes[own], left):
            raise self.refuse(node, f"{tensor.base.name!r} would have to be cut in two ways")
        axes[own] = left

    def born(self, node: ir.Node, tensor: Stored, axis: int) -> I64:
        """What is left of the channels that an axis of a stored tensor makes, in the stored order."""
        slots = self.f.stored[tensor.base][tensor.order[axis]]
        left = slots[~self.gone[slots]]
        if not left.size:
            raise self.refuse(node, "nothing would be left")
        self.settle(node, tensor, axis, left)
        return left

    def settle_constant(self, node: ir.Node, index: int, full: I64, left: I64) -> None:
        """Cut a stored tensor that meets channels element by element: `left` is what remains of `full`."""
        parts = constant_axes(node.inputs[index], full)
        if parts is None or not parts[1]:
            return
        tensor, axes, missing = parts
        for a in missing:
            full, left = full.take([0], axis=a), left.take([0], axis=a)
        if tensor.base in self.f.whole:
            own = self.f.whole[tensor.base]
            moved = self.moved(full.reshape(own.shape), left.reshape(left.shape[left.ndim - own.ndim :]), own)
            if tensor.base in self.whole and not np.array_equal(self.whole[tensor.base], moved):
                raise self.refuse(node, f"{tensor.base.name!r} would have to be cut in two ways")
            self.whole[tensor.base] = moved
        elif tensor.base in self.f.stored and len(axes) == 1:
            own = self.f.stored[tensor.base][tensor.order[axes[0]]]
            self.settle(node, tensor, axes[0], self.moved(full.reshape(-1), left.reshape(-1), own))

    def replace(self, node: ir.Node, tensor: Stored, array: Array) -> None:
        """Give a stored tensor with one reader another content altogether."""
        if tensor.base in self.replaced and self.replaced[tensor.base].shape != array.shape:
            raise self.refuse(node, f"{tensor.base.name!r} would have to be cut in two ways")
        self.replaced[tensor.base] = array

    def set_int(self, node: ir.Node, name: str, value: int) -> None:
        """Later: set an integer attribute."""
        self.edits.append(lambda _: node.attributes.__setitem__(name, ir.AttrInt64(name, value)))

    def set_input(self, node: ir.Node, index: int, values: Array) -> None:
        """Later: let an input read these stored numbers (its own copy)."""

        def edit(namer: surgery.Namer) -> None:
            graph = node.graph
            if not isinstance(graph, ir.Graph):
                raise ModelError(f"node {node.name!r} must be in a graph")
            made = surgery.add_initializer(graph, namer(f"{node.name}.{index}"), values)
            surgery.replace_input(node, index, made)

        self.edits.append(edit)

    def drop_input(self, node: ir.Node, index: int) -> None:
        """Later: make an optional input absent."""
        self.edits.append(lambda _: surgery.replace_input(node, index, None))

    def set_sizes(self, node: ir.Node, index: int, sizes: Mapping[int, int], rank: int) -> None:
        """Later: overwrite some entries of the shape that input `index` holds, stored or computed."""
        value = node.inputs[index]
        if not sizes or value is None:
            return
        known = surgery.constant(value)
        if known is not None:
            wanted = np.array(known, np.int64)
            for axis, size in sizes.items():
                wanted[axis] = size
            self.set_input(node, index, wanted)
            return
        self.edits.append(lambda namer: _overwrite(node, index, sizes, rank, namer))


def _overwrite(node: ir.Node, index: int, sizes: Mapping[int, int], rank: int, namer: surgery.Namer) -> None:
    """Where(mask, sizes, computed shape) in front of `node`."""
    graph, value = node.graph, node.inputs[index]
    if not isinstance(graph, ir.Graph) or value is None:
        raise ModelError(f"node {node.name!r} must be in a graph")
    mask, fixed = np.zeros(rank, np.bool_), np.zeros(rank, np.int64)
    for axis, size in sizes.items():
        mask[axis], fixed[axis] = True, size
    stored = [
        surgery.add_initializer(graph, namer(f"{node.name}.{what}"), a) for what, a in (("cut", mask), ("size", fixed))
    ]
    chosen = surgery.make_node(namer, "Where", [*stored, value], f"{node.name}.shape")
    surgery.insert_before(node, [chosen])
    node.replace_input_with(index, chosen.outputs[0])


def cut_slots(f: Following, rules: Mapping[str, Rule], gone: npt.NDArray[np.bool_], *, dry: bool = False) -> None:
    """Remove the slots where `gone` (all slots,) from the model that was followed, in place.

    `dry` only sees whether it could be done. Raises IllegalCutError; the model is then untouched.
    """
    c = Cutting(f, gone)
    _walk(f.model.graph, c, rules)
    for base, slots in f.stored.items():
        for axis, own in slots.items():
            if gone[own].any() and axis not in c.axes.get(base, {}) and base not in c.replaced:
                raise IllegalCutError(f"these channels cannot be removed: nothing cuts axis {axis} of {base.name!r}")
    if not dry:
        f.other_sizes()
        _commit(c)


def _walk(graph: ir.Graph, c: Cutting, rules: Mapping[str, Rule]) -> None:
    for node in graph:
        bodies = list(surgery.bodies(node))
        for body in bodies:
            _walk(body, c, rules)
        rule = rules.get(node.op_type) if node.domain in STANDARD and not bodies else None
        if rule is not None:
            rule.cut(node, c)


def _commit(c: Cutting) -> None:
    namer = surgery.Namer(c.f.model)
    for base, array in c.replaced.items():
        _store(base, array)
    for base, axes in c.axes.items():
        if base in c.replaced:
            continue
        cut_along: Array | None = surgery.constant(base)
        changed = False
        for axis, left in axes.items():
            old = c.f.stored[base][axis]
            if cut_along is not None and not np.array_equal(old, left):
                cut_along, changed = np.take(cut_along, positions(old, left), axis=axis), True
        if cut_along is not None and changed:
            _store(base, cut_along)
    for base, left in c.whole.items():
        whole, old = surgery.constant(base), c.f.whole[base]
        if whole is not None and not np.array_equal(old, left):
            _store(base, gathered(whole, old, left))
    for edit in c.edits:
        edit(namer)
    _restate(c)
    surgery.remove_unused(c.f.model)


def _store(base: ir.Value, array: Array) -> None:
    surgery.set_initializer(base, array, dtype=base.dtype)


def gathered(array: Array, old: I64, left: I64) -> Array:
    """Entries of `array` at the places that `left` had among `old`; both have an axis for each of the array's."""
    axes = varying(old)
    rest = [a for a in range(array.ndim) if a not in axes]
    moved = array.transpose(*axes, *rest).reshape(
        math.prod(array.shape[a] for a in axes), *[array.shape[a] for a in rest]
    )
    picked = moved[positions(old, left).reshape(-1)]
    shaped = picked.reshape(*[left.shape[a] for a in axes], *[array.shape[a] for a in rest])
    return np.ascontiguousarray(shaped.transpose(np.argsort([*axes, *rest])))


def _restate(c: Cutting) -> None:
    """Stored shapes of the values that were cut, and which channels of the original they keep."""
    for value, left in c.new.items():
        old = c.f.at[value]
        if np.array_equal(old, left):
            continue
        if value.shape is not None and len(value.shape) == old.ndim:
            value.shape = ir.Shape([left.shape[a] if old.shape[a] > 1 else d for a, d in enumerate(value.shape)])
        axes = varying(old)
        if len(axes) == 1 and not c.f.is_open(value, axes[0]):
            indices = positions(old, left).reshape(-1)
            earlier = kept(value)
            if earlier is not None and earlier[0] == axes[0]:
                indices = earlier[1][indices]
            value.metadata_props[KEPT] = f"{axes[0]}:{','.join(map(str, indices))}"


def kept(value: ir.Value) -> tuple[int, I64] | None:
    """(axis, indices into the original channels that are left, in order) of a value that was cut, else None."""
    text = value.metadata_props.get(KEPT)
    if not text:
        return None
    axis, indices = text.split(":")
    return int(axis), np.array([int(i) for i in indices.split(",")], np.int64)
