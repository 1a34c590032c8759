"""The one enumerator of weights: which stored tensors multiply activations, seen as matrices.

Every technique and all statistics use the same view: `to_matrix` gives (groups, out, k), where k is the
reduced dimension in the order in which an unfolded input (im2col: channel, then kernel position) has it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Note
from featherweight.graph import surgery

Role = Literal["matmul", "matmul_left", "gemm", "conv", "conv_transpose", "gather", "rnn_input", "rnn_recurrent"]
FloatArray = npt.NDArray[np.float32]

FLOAT_TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
STORED_DTYPE = "featherweight.stored_dtype"
"""Value metadata: the narrower type the file really stores, where a Cast behind the weight was folded."""
QUANTISED_OPS = frozenset(
    {
        "DequantizeLinear", "QLinearConv", "QLinearMatMul", "MatMulInteger", "ConvInteger", "MatMulNBits",
        "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "QGemm", "QAttention", "GatherBlockQuantized",
        "DynamicQuantizeLSTM", "MatMulBnb4", "QMoE", "MatMulFpQ4", "QLinearConvTranspose", "ConvIntegerToFloat",
    }
)  # fmt: skip
_STANDARD = ("", "ai.onnx")
_WEIGHT_INPUTS = {
    "MatMul": (0, 1), "Gemm": (1,), "Conv": (1,), "ConvTranspose": (1,), "Gather": (0,),
    "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2),
}  # fmt: skip


@dataclass(frozen=True)
class WeightUse:
    """One place that reads a weight. `index` is the input of `node`; `path` its name, dotted in sub-graphs.

    `layout` are the Transpose nodes between the stored tensor and that input, in order (usually none).
    """

    node: ir.Node
    index: int
    role: Role
    groups: int
    path: str
    layout: tuple[ir.Node, ...] = ()

    @property
    def input_value(self) -> ir.Value | None:
        """The activation this use multiplies (the indices for a gather); None where the graph does not show it."""
        if self.role == "rnn_recurrent":
            return None
        return self.node.inputs[1 if self.role in ("matmul_left", "gather") else 0]


@dataclass(frozen=True)
class Weight:
    """A stored float tensor and all its uses as a weight; a tied one appears once with every use.

    `size_bytes` is what the file stores (2 bytes an element where a Cast up from half precision was folded).
    """

    name: str
    value: ir.Value
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    uses: tuple[WeightUse, ...]
    size_bytes: int
    graph: ir.Graph

    @property
    def main_use(self) -> WeightUse:
        """The first use that multiplies; the first use at all for a table that is only gathered."""
        return next((u for u in self.uses if u.role != "gather"), self.uses[0])

    @property
    def groups(self) -> int:
        """First axis of the matrix view."""
        return self.matrix_shape[0]

    @property
    def input_value(self) -> ir.Value | None:
        """The activation the main use multiplies; None for a gather or a recurrent weight."""
        return None if self.main_use.role == "gather" else self.main_use.input_value

    def array(self) -> FloatArray:
        """The stored values widened to float32, in the stored layout. Treat as read-only."""
        array = surgery.constant(self.value)
        if array is None:
            raise ValueError(f"weight {self.name!r} must still be an initializer, but it was replaced; enumerate again")
        return np.asarray(array).astype(np.float32, copy=False)

    def to_matrix(self, array: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """`array` (stored layout) -> (groups, out, k), C-contiguous, same dtype."""
        view = self._view
        return np.ascontiguousarray(array.reshape(view.split).transpose(view.order).reshape(view.matrix))

    def from_matrix(self, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Exact inverse of `to_matrix`: (groups, out, k) -> stored layout, same dtype."""
        view = self._view
        parts = matrix.reshape(tuple(view.split[i] for i in view.order))
        return np.ascontiguousarray(parts.transpose(np.argsort(view.order)).reshape(self.shape))

    @property
    def matrix_shape(self) -> tuple[int, int, int]:
        """(groups, out, k)."""
        return self._view.matrix

    def seen_shape(self, use: WeightUse) -> tuple[int, ...]:
        """Shape as the node of `use` reads it, behind the Transposes of its layout."""
        return tuple(self.shape[i] for i in _layout_permutation(use, len(self.shape)))

    @property
    def channel_axis(self) -> int | None:
        """Axis of the *stored* layout with one entry per output channel, for per-channel scales; None if none.

        A grouped ConvTranspose has none: its axis 1 holds out/group channels that repeat over the groups.
        """
        axis = _channel_axis(self.main_use, self.shape)
        return None if axis is None else _layout_permutation(self.main_use, len(self.shape))[axis]

    @cached_property
    def _view(self) -> _MatrixView:
        return _matrix_view(self.main_use, self.shape)


@dataclass(frozen=True)
class _MatrixView:
    """`array.reshape(split).transpose(order).reshape(matrix)` is the matrix."""

    split: tuple[int, ...]
    order: tuple[int, ...]
    matrix: tuple[int, int, int]


def _layout_permutation(use: WeightUse, rank: int) -> tuple[int, ...]:
    """Axis i of the tensor as the node sees it is axis result[i] of the stored one."""
    permutation = tuple(range(rank))
    for node in use.layout:
        given = node.attributes.get("perm")
        step = tuple(given.as_ints()) if given is not None else tuple(reversed(range(rank)))
        permutation = tuple(permutation[i] for i in step)
    return permutation


def _matrix_view(use: WeightUse, stored: tuple[int, ...]) -> _MatrixView:
    rank = len(stored)
    permutation = _layout_permutation(use, rank)
    seen = [stored[i] for i in permutation]
    # Parts of the axes the node sees: an axis that holds (groups, rest) is split in two.
    parts = [[(axis, 0)] for axis in range(rank)]
    sizes = {(axis, 0): size for axis, size in enumerate(seen)}
    if use.role in ("conv", "conv_transpose"):
        parts[0] = [(0, 0), (0, 1)]
        sizes[0, 0], sizes[0, 1] = use.groups, seen[0] // use.groups
    group, out, reduced = _axis_roles(use, rank, parts)
    labels = [part for axis in np.argsort(permutation) for part in parts[axis]]
    order = tuple(labels.index(p) for p in (*group, *out, *reduced))
    matrix = (_count(group, sizes), _count(out, sizes), _count(reduced, sizes))
    return _MatrixView(tuple(sizes[p] for p in labels), order, matrix)


_Parts = list[tuple[int, int]]


def _axis_roles(use: WeightUse, rank: int, parts: list[_Parts]) -> tuple[_Parts, _Parts, _Parts]:
    """Which parts are groups, output channels and reduced, each in order."""
    flat = [p[0] for p in parts]
    if use.role in ("matmul", "matmul_left"):
        if rank == 1:
            return [], [], flat
        last, before = flat[-1:], flat[-2:-1]
        return (flat[:-2], last, before) if use.role == "matmul" else (flat[:-2], before, last)
    if use.role == "gemm":
        return ([], flat[:1], flat[1:]) if _int(use.node, "transB", 0) else ([], flat[1:], flat[:1])
    if use.role == "conv":
        return [(0, 0)], [(0, 1)], flat[1:]
    if use.role == "conv_transpose":
        return [(0, 0)], flat[1:2], [(0, 1), *flat[2:]]
    if use.role == "gather":
        axis = _int(use.node, "axis", 0) % rank
        return [], [flat[axis]], flat[:axis] + flat[axis + 1 :]
    return flat[:1], flat[1:2], flat[2:]


def _channel_axis(use: WeightUse, stored: tuple[int, ...]) -> int | None:
    """Axis of the output channels in the layout that the node sees."""
    rank = len(stored)
    if use.role in ("matmul", "matmul_left"):
        return None if rank == 1 else rank - (1 if use.role == "matmul" else 2)
    if use.role == "gemm":
        return 0 if _int(use.node, "transB", 0) else 1
    if use.role == "conv_transpose":
        if use.groups == 1:
            return 1
        seen = [stored[i] for i in _layout_permutation(use, rank)]
        return 0 if seen[0] == use.groups and seen[1] == 1 else None
    if use.role == "gather":
        return _int(use.node, "axis", 0) % rank
    return 0 if use.role == "conv" else 1


def weights(model: ir.Model, *, min_elements: int = 0) -> list[Weight]:
    """All float initializers used as weights, in order of first use; sub-graphs and captured tensors included.

    Tensors in front of which something is computed are not listed; see `skipped`.
    """
    uses: dict[ir.Value, list[WeightUse]] = {}
    known: dict[ir.Value, bool] = {}
    for node, path in surgery.paths(model).items():
        for index in _weight_inputs(node) if len(node.inputs) > 1 else ():
            stored, layout = _stored(node.inputs[index])
            if stored is None or stored.dtype not in FLOAT_TYPES:
                continue
            role = _role(node, index, stored, known)
            if role is not None:
                groups = _groups(node, role, stored, layout)
                uses.setdefault(stored, []).append(WeightUse(node, index, role, groups, path, layout))
    found = []
    for value, places in uses.items():
        tensor = value.const_value
        if tensor is None or tensor.size < max(min_elements, 1):
            continue
        size = stored_size_bytes(value)
        shape = tuple(int(d) for d in tensor.shape.numpy())
        found.append(
            Weight(value.name or "", value, shape, tensor.dtype.numpy(), tuple(places), size, surgery.graph_of(value))
        )
    return found


def stored_size_bytes(value: ir.Value) -> int:
    """Bytes of an initializer in the file: in its narrower stored type if a Cast was folded into it."""
    tensor = value.const_value
    if tensor is None:
        return 0
    stored = value.metadata_props.get(STORED_DTYPE)
    return tensor.size * ir.DataType[stored].bitwidth // 8 if stored else tensor.nbytes


def _weight_inputs(node: ir.Node) -> Iterator[int]:
    if node.domain in _STANDARD:
        for index in _WEIGHT_INPUTS.get(node.op_type, ()):
            if index < len(node.inputs) and node.inputs[index] is not None:
                yield index


def _stored(value: ir.Value | None) -> tuple[ir.Value | None, tuple[ir.Node, ...]]:
    """The initializer behind `value` and the Transposes between; None if something else is in the way."""
    layout: list[ir.Node] = []
    while value is not None and (node := value.producer()) is not None:
        if node.domain not in _STANDARD or node.op_type not in ("Transpose", "Identity"):
            return None, ()
        if node.op_type == "Transpose":
            layout.insert(0, node)
        value = node.inputs[0]
    if value is None or surgery.constant_tensor(value) is None:
        return None, ()
    return value, tuple(layout)


def _role(node: ir.Node, index: int, stored: ir.Value, known: dict[ir.Value, bool]) -> Role | None:
    """The role of a stored tensor at one input; None if it is no weight there."""
    rank = len(stored.shape) if stored.shape is not None else 0
    match node.op_type:
        case "MatMul":
            other = node.inputs[1 - index]
            if rank == 0 or surgery.is_constant(other, known):
                return None
            return "matmul" if index == 1 else "matmul_left"
        case "Gemm":
            return "gemm" if rank == 2 and not surgery.is_constant(node.inputs[0], known) else None
        case "Conv" | "ConvTranspose":
            if rank < 3 or surgery.is_constant(node.inputs[0], known):
                return None
            return "conv" if node.op_type == "Conv" else "conv_transpose"
        case "Gather":
            return "gather" if rank >= 2 and not surgery.is_constant(node.inputs[1], known) else None
        case _:
            return ("rnn_input" if index == 1 else "rnn_recurrent") if rank == 3 else None


def _groups(node: ir.Node, role: Role, stored: ir.Value, layout: tuple[ir.Node, ...]) -> int:
    if role in ("conv", "conv_transpose"):
        return _int(node, "group", 1)
    probe = WeightUse(node, 0, role, 1, "", layout)
    tensor = surgery.constant_tensor(stored)
    return _matrix_view(probe, tuple(tensor.shape.numpy())).matrix[0] if tensor is not None else 1


def skipped(model: ir.Model) -> list[Note]:
    """Places that look like weights but are left alone, each with the reason."""
    notes = []
    known: dict[ir.Value, bool] = {}
    listed = {(u.node, u.index) for w in weights(model) for u in w.uses}
    for node, path in surgery.paths(model).items():
        text = _why_skipped(node, listed, known)
        if text:
            notes.append(Note(path, text))
    return notes


def _why_skipped(node: ir.Node, listed: set[tuple[ir.Node, int]], known: dict[ir.Value, bool]) -> str:
    if node.op_type in QUANTISED_OPS:
        constant = surgery.is_constant(node.inputs[0], known)
        of_activation = node.op_type == "DequantizeLinear" and not constant
        return "" if of_activation else f"already quantised ({node.op_type}); left as it is"
    if node.domain not in _STANDARD:
        held = sum(t.nbytes for v in node.inputs if (t := surgery.constant_tensor(v)) is not None)
        return f"{node.domain}::{node.op_type} is not a standard operator: opaque, left as it is" if held else ""
    if node.op_type in ("Loop", "Scan"):
        held = sum(t.nbytes for v in node.inputs if (t := surgery.constant_tensor(v)) is not None and t.size > 1)
        return f"{held} B of constants enter this {node.op_type} as state, not as weights; left alone" if held else ""
    if node.op_type == "Einsum":
        has = any(surgery.constant_tensor(v) is not None for v in node.inputs)
        return "Einsum with a stored operand is not taken apart; left as it is" if has else ""
    if len(node.inputs) < 2:
        return ""
    if node.op_type == "Gemm" and surgery.constant_tensor(node.inputs[0]) is not None:
        return "the stored operand of this Gemm is the left one; left as it is"
    for index in _weight_inputs(node):
        if (node, index) not in listed and (text := _why_not_stored(node, index, known)):
            return text
    return ""


def _why_not_stored(node: ir.Node, index: int, known: dict[ir.Value, bool]) -> str:
    value = node.inputs[index]
    tensor = surgery.constant_tensor(value)
    if tensor is not None:
        return "its weight is stored in double precision; left as it is" if tensor.dtype == ir.DataType.DOUBLE else ""
    if surgery.is_constant(value, known):
        producer = value.producer() if value is not None else None
        if producer is None or surgery.is_constant(node.inputs[1 - index if index < 2 else 0], known):
            return ""
        if _behind(value, "DequantizeLinear"):
            return "its weight is already quantised (DequantizeLinear); left as it is"
        return f"its weight is computed from constants ({producer.op_type}); left as it is"
    if node.op_type == "MatMul":
        return ""
    if value is not None and value.is_graph_input():
        return f"its weight {value.name!r} is an input of the model, so there is no constant to shrink"
    if node.op_type in ("Conv", "ConvTranspose", "Gemm", "LSTM", "GRU", "RNN"):
        return "its weight is computed at run time, so there is no constant to shrink"
    return ""


def _behind(value: ir.Value | None, op_type: str) -> bool:
    """True if a node of that type is among what a constant expression is computed by."""
    todo, seen = [value], set()
    while todo:
        current = todo.pop()
        node = current.producer() if current is not None else None
        if node is None or node in seen:
            continue
        if node.op_type == op_type:
            return True
        seen.add(node)
        todo.extend(node.inputs)
    return False


def _int(node: ir.Node, name: str, default: int) -> int:
    attr = node.attributes.get(name)
    return default if attr is None else attr.as_int()


def _count(labels: _Parts, sizes: dict[tuple[int, int], int]) -> int:
    return math.prod(sizes[p] for p in labels)
