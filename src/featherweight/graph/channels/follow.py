"""Following channels through a graph: each operator's rule says how its inputs' slots become its outputs'.

A value that carries channels has an array of slots with one axis for each axis of the value, of size 1 where the
channels do not depend on it: (1, C, 1, 1) behind a convolution, (1, 1, heads, width) behind the Reshape of an
attention. A value without such an array can lose nothing. Stored tensors have slots for each of their axes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np
import onnx_ir as ir

from featherweight.graph import surgery
from featherweight.graph.channels import sizes
from featherweight.graph.channels.slots import I64, Slots, lined_up, varying

if TYPE_CHECKING:
    from featherweight.graph.channels.cutting import Cutting

STANDARD = ("", "ai.onnx")


class Rule(Protocol):
    """One operator: `link` follows slots, `cut` (see cutting.py) does the same on what is left of them."""

    def link(self, node: ir.Node, f: Following) -> None:
        """Give the outputs their slots, link what goes together."""
        ...

    def cut(self, node: ir.Node, c: Cutting) -> None:
        """Put what is left on the outputs, edit parameters and attributes."""
        ...


@dataclass(frozen=True)
class Birth:
    """An axis of a stored tensor whose entries make channels: removable where nothing else forbids it."""

    node: str
    tensor: str
    slots: I64


@dataclass(frozen=True)
class Reader:
    """A weight that sums over channels: slots (groups, channels), each owning `width` columns of its matrix."""

    tensor: str
    node: str
    slots: I64
    width: int


@dataclass(frozen=True)
class Constraint:
    """Slots (rows, n) that must stay a full rectangle.

    `equal`: every row must lose as many as the others; otherwise whole rows may go as well.
    """

    rows: I64
    equal: bool


@dataclass
class Following:
    """What is known while the nodes are followed, and what the cut reads afterwards."""

    model: ir.Model
    sizes: dict[str, tuple[int, ...]]
    names: Mapping[ir.Node, str]
    given: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    slots: Slots = field(default_factory=Slots)
    at: dict[ir.Value, I64] = field(default_factory=dict)
    stored: dict[ir.Value, dict[int, I64]] = field(default_factory=dict)
    whole: dict[ir.Value, I64] = field(default_factory=dict)
    births: list[Birth] = field(default_factory=list)
    readers: list[Reader] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)
    shares: dict[ir.Value, list[I64]] = field(default_factory=dict)
    work: dict[ir.Node, list[tuple[float, list[I64]]]] = field(default_factory=dict)
    summed: dict[ir.Value, I64] = field(default_factory=dict)
    ends: list[tuple[ir.Node, int]] = field(default_factory=list)
    handled: set[tuple[ir.Node, int]] = field(default_factory=set)
    constant: dict[ir.Value, bool] = field(default_factory=dict)
    spread: bool = False
    _other: list[dict[str, tuple[int, ...]]] | None = None

    def is_open(self, value: ir.Value | None, axis: int) -> bool:
        """True if the size of this axis differs from call to call, as where channels are merged with the batch.

        A size with which nothing fits any more says nothing: constants may fix what the inputs leave open.
        """
        here = self.dims(value)
        if value is None or here is None or surgery.constant_tensor(value) is not None:
            return False
        found = [there for other in self.other_sizes() if (there := other.get(value.name or "")) is not None]
        return any(len(here) != len(there) or here[axis] != there[axis] for there in found)

    def other_sizes(self) -> list[dict[str, tuple[int, ...]]]:
        """Shapes with one open axis at another size, for each of them; found once, before the model is edited."""
        if self._other is None:
            self._other = [sizes.concrete(self.model, self.given, other=axis) for axis in sizes.open_axes(self.model)]
        return self._other

    def open_axes(self, value: ir.Value, array: I64) -> tuple[int, ...]:
        """Axes of open size along which channels `array` of `value` are different ones, not places of the same."""
        suspects = [a for a in varying(array) if self.is_open(value, a)]
        if not suspects:
            return ()
        classes = self.slots.classes()[array]
        return tuple(a for a in suspects if (classes != classes.take([0], axis=a)).any())

    def dims(self, value: ir.Value | None) -> tuple[int, ...] | None:
        """The value's concrete shape, None if it is not known."""
        if value is None:
            return None
        tensor = surgery.constant_tensor(value)
        if tensor is not None:
            return tuple(int(d) for d in tensor.shape.numpy())
        return self.sizes.get(value.name or "")

    def is_constant(self, value: ir.Value) -> bool:
        """True if the value depends on no input of the model."""
        return surgery.is_constant(value, self.constant)

    def where(self, node: ir.Node) -> str:
        """The node's name, dotted inside sub-graphs."""
        return self.names.get(node, node.name or node.op_type)

    def carry(self, value: ir.Value, array: I64) -> None:
        """Give a value its slots; an axis of one entry can lose nothing and is not followed."""
        if array.size > 1:
            self.at[value] = array

    def freeze(self, node: ir.Node, text: str, *values: ir.Value | None) -> None:
        """What these inputs of `node` carry must stay (default: all its inputs)."""
        for value in values or tuple(node.inputs):
            if value is not None and value in self.at:
                self.slots.freeze(self.at[value], self.where(node), text)

    def narrowed(self, node: ir.Node, value: ir.Value | None, axis: int, text: str) -> I64 | None:
        """Slots (channels,) along one axis of a value; those along its other axes are held together.

        None if the value carries nothing there; what it carries elsewhere is then frozen, as `text` says.
        """
        array = None if value is None else self.at.get(value)
        if array is None:
            return None
        if array.shape[axis] == 1:
            self.slots.freeze(array, self.where(node), text)
            return None
        rows = np.moveaxis(array, axis, 0).reshape(array.shape[axis], -1)
        if rows.shape[1] > 1:
            self.slots.tie(rows, self.where(node), "all of one channel goes together")
        return np.ascontiguousarray(rows[:, 0])

    def tensor(self, node: ir.Node, index: int) -> Stored | None:
        """The stored tensor at an input, seen through Transposes; None if it is computed or absent."""
        value = node.inputs[index] if index < len(node.inputs) else None
        found = stored(value)
        if found is not None:
            self.handled.add((node, index))
        return found

    def axis(self, tensor: Stored, axis: int, *, born_at: str = "") -> I64:
        """Slots of one axis of a stored tensor as the node sees it; `born_at`: its entries make channels there."""
        base, own = tensor.base, tensor.order[axis]
        if base in self.whole:
            slots = self.slots.new((int(tensor.shape[axis]),))
            self.slots.freeze(self.whole[base], born_at, "its tensor is also read in another form")
            self.slots.freeze(slots, born_at, "its tensor is also read in another form")
            return self.stored.setdefault(base, {}).setdefault(own, slots)
        axes = self.stored.setdefault(base, {})
        if own not in axes:
            axes[own] = self.slots.new((int(tensor.shape[axis]),))
        if born_at and not any(np.array_equal(b.slots, axes[own]) for b in self.births if b.tensor == base.name):
            self.births.append(Birth(born_at, base.name or "", axes[own]))
        return axes[own]

    def tie_axis(self, tensor: Stored, axis: int, slots: I64) -> None:
        """Entries along one axis of a stored tensor go with `slots` (n,)."""
        base, own = tensor.base, tensor.order[axis]
        if base not in self.whole and own not in self.stored.setdefault(base, {}):
            self.stored[base][own] = slots
        else:
            self.slots.link(self.axis(tensor, axis), slots)

    def tie_reduced(self, node: ir.Node, tensor: Stored, axis: int, channels: I64 | None) -> None:
        """The axis of a weight that a layer sums over goes with its input's channels, or stays if it has none."""
        if channels is not None:
            self.tie_axis(tensor, axis, channels)
        else:
            self.slots.freeze(self.axis(tensor, axis), self.where(node), "reads a value that cannot lose channels")

    def follow_constant(self, node: ir.Node, index: int, full: I64) -> None:
        """A stored tensor combined element by element with channels `full` is cut with them."""
        parts = constant_axes(node.inputs[index], full)
        if parts is None:
            value = node.inputs[index]
            shape = self.dims(value)
            if shape is None or any(n != 1 for a, n in _seen(shape, full.ndim) if full.shape[a] > 1):
                self.slots.freeze(full, self.where(node), "meets a value whose channels cannot be followed")
            return
        self.handled.add((node, index))
        tensor, axes, missing = parts
        if not axes:
            return
        along = full
        for a in missing:  # one entry of the tensor serves all of them
            self.slots.link(along, along.take([0], axis=a))
            along = along.take([0], axis=a)
        if len(axes) == 1:
            self.tie_axis(tensor, axes[0], along.reshape(-1))
        elif tensor.base in self.stored or tensor.order != tuple(range(len(tensor.order))):
            self.slots.freeze(along, self.where(node), "meets a stored tensor that is also read in another form")
        elif tensor.base in self.whole:
            same = self.whole[tensor.base].shape == along.shape[full.ndim - len(tensor.shape) :]
            if same:
                self.slots.link(self.whole[tensor.base], along.reshape(self.whole[tensor.base].shape))
            else:
                self.slots.freeze(along, self.where(node), "meets a stored tensor that is also read in another form")
        else:
            self.whole[tensor.base] = along.reshape(along.shape[full.ndim - len(tensor.shape) :])


@dataclass(frozen=True)
class Stored:
    """A stored tensor as a node sees it: axis i is axis `order[i]` of `base`; `shape` is what the node sees."""

    base: ir.Value
    order: tuple[int, ...]
    shape: tuple[int, ...]


def stored(value: ir.Value | None) -> Stored | None:
    """The initializer behind a value, through Transpose and Identity nodes; None if it is computed or absent."""
    steps: list[tuple[int, ...] | None] = []
    while value is not None and (node := value.producer()) is not None:
        if node.domain not in STANDARD or node.op_type not in ("Transpose", "Identity"):
            return None
        if node.op_type == "Transpose":
            perm = node.attributes.get("perm")
            steps.append(None if perm is None else tuple(perm.as_ints()))
        value = node.inputs[0]
    tensor = surgery.constant_tensor(value)
    if value is None or tensor is None:
        return None
    shape = tuple(int(d) for d in tensor.shape.numpy())
    order = tuple(range(len(shape)))
    for step in reversed(steps):
        order = tuple(order[i] for i in (step if step is not None else tuple(reversed(range(len(shape))))))
    return Stored(value, order, tuple(shape[i] for i in order))


def _seen(shape: tuple[int, ...], rank: int) -> Iterator[tuple[int, int]]:
    """(axis of the result, size) of a shape under broadcasting to `rank`."""
    return ((a + rank - len(shape), n) for a, n in enumerate(shape))


def constant_axes(value: ir.Value | None, full: I64) -> tuple[Stored, tuple[int, ...], tuple[int, ...]] | None:
    """How a stored tensor meets channels `full`: its own axes that vary with them, and result axes it lacks.

    None if the value is no stored tensor.
    """
    found = stored(value)
    if found is None:
        return None
    rank = full.ndim
    has = {a: a - rank + len(found.shape) for a, n in _seen(found.shape, rank) if n > 1}
    axes = tuple(has[a] for a in varying(full) if a in has)
    return found, axes, tuple(a for a in varying(full) if a not in has)


def follow(model: ir.Model, rules: Mapping[str, Rule], given: Mapping[str, tuple[int, ...]] | None = None) -> Following:
    """Walk all nodes in order, bodies of control flow included. `given`: sizes of inputs, see `sizes.concrete`."""
    f = Following(model, sizes.concrete(model, given), surgery.paths(model), given or {})
    _walk(model.graph, f, rules)
    for value in model.graph.outputs:
        if value in f.at:
            f.slots.freeze(f.at[value], value.name or "", "is an output of the model")
    _freeze_other_uses(f)
    return f


def _walk(graph: ir.Graph, f: Following, rules: Mapping[str, Rule]) -> None:
    for node in graph:
        bodies = list(surgery.bodies(node))
        rule = rules.get(node.op_type) if node.domain in STANDARD else None
        if bodies:
            f.freeze(node, f"enters or leaves {node.op_type}, whose bodies are followed each for itself")
            for body in bodies:
                _walk(body, f, rules)
                for value in body.outputs:
                    if value in f.at:
                        f.slots.freeze(f.at[value], f.where(node), f"leaves the body of {node.op_type}")
            continue
        carries = any(v is not None and v in f.at for v in node.inputs)
        if rule is not None:
            rule.link(node, f)
        elif carries:
            domain = "" if node.domain in STANDARD else f"{node.domain}::"
            f.freeze(node, f"goes through {domain}{node.op_type}, which cannot be followed")
        _pass_sums_on(node, f)


CONTRACTIONS = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU", "RNN", "Einsum"})


def _pass_sums_on(node: ir.Node, f: Following) -> None:
    """A sum over channels stays one until a layer multiplies it: (x - mean) / deviation depends on all channels."""
    if node.op_type in CONTRACTIONS:
        return
    found = [f.summed[v] for v in node.inputs if v is not None and v in f.summed]
    for value in node.outputs:
        if found and value not in f.at and value not in f.summed:
            f.summed[value] = np.concatenate([s.reshape(1, -1) for s in found], axis=1) if len(found) > 1 else found[0]


def _freeze_other_uses(f: Following) -> None:
    """A stored tensor that is also read in a way nobody followed keeps its shape."""
    for base in [*f.stored, *f.whole]:
        other = next((node for node, index in _readers(base) if (node, index) not in f.handled), None)
        if other is None and not base.is_graph_output():
            continue
        where = f.where(other) if other is not None else "the model's outputs"
        for slots in [*f.stored.get(base, {}).values(), *([f.whole[base]] if base in f.whole else [])]:
            f.slots.freeze(slots, where, f"{base.name!r} is also read by {where}")


def _readers(value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
    for node, index in value.uses():
        if node.domain in STANDARD and node.op_type in ("Transpose", "Identity"):
            yield from _readers(node.outputs[0])
        else:
            yield node, index


Registered = dict[str, Rule]


def register(table: Registered, *op_types: str) -> Callable[[type[Rule]], type[Rule]]:
    """Class decorator: one instance of the rule serves these operators."""

    def add(kind: type[Rule]) -> type[Rule]:
        made = kind()
        table.update(dict.fromkeys(op_types, made))
        return kind

    return add


__all__ = ["Birth", "Constraint", "Following", "Reader", "Rule", "Stored", "follow", "lined_up", "stored"]
