"""Find weights stored as codes, and the grid each stays on.

Two families: DequantizeLinear of stored codes (with zero points and blocks, as any tool writes it), and the encodings
of `graph.encode`, which its own reader recognises. Anything else that is computed from codes stays as it is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn

from featherweight.core import Note
from featherweight.errors import ModelError
from featherweight.graph import surgery
from featherweight.graph.encode import Encoded, decode, read, recipes, rows
from featherweight.graph.encode.make import arrays_of
from featherweight.graph.encode.match import INDEX, match
from featherweight.graph.encode.sink import NARROW_FLOATS, Free, Tree
from featherweight.learn import _grids, _tensors
from featherweight.learn._trained import Holder, Trained, find_value, stored_tensor

_LAYOUT_OPS = frozenset({"Transpose", "Reshape", "Identity", "Squeeze", "Unsqueeze", "Cast", "Flatten", "Slice"})
_LOOKUP_OPS = frozenset({"Mul", "Gather", "Reshape", "Slice", "ReduceSum", "Cast"})
_INTEGER_WEIGHTS = {"MatMulInteger": (0, 1), "ConvInteger": (1,), "QLinearMatMul": (0, 3), "QLinearConv": (3, 8)}
"""Inputs of integer products that hold codes of weights (or of a bias)."""
_CODES = frozenset({*_tensors.RANGES, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


def find(model: ir.Model, notes: list[Note]) -> list[Trained]:
    """Every encoded weight of a model, tied codes once; what stays frozen is noted."""
    if not any(v.const_value is not None and v.const_value.dtype in _CODES for v in _stored_values(model)):
        return []
    found: dict[Any, Trained] = {}
    seen: set[ir.Value] = set()
    for value in _boundaries(model):
        while value not in seen:
            seen.add(value)
            key, trained = (
                _dequantized(model, value, notes)
                or _recognised(model, value, notes)
                or _integers(model, value)
                or (None, None)
            )
            if trained is not None:
                _tie(found, key, trained, notes)
                break
            node = value.producer()
            if node is None or node.op_type not in _LAYOUT_OPS or node.inputs[0] is None:
                break
            value = node.inputs[0]
    return list(found.values())


def _stored_values(model: ir.Model) -> Iterator[ir.Value]:
    for graph in model.graphs():
        yield from graph.initializers.values()
        for node in graph:
            if node.op_type == "Constant":
                tensor = stored_tensor(node.outputs[0])
                if tensor is not None:
                    node.outputs[0].const_value = tensor
                    yield node.outputs[0]


def _boundaries(model: ir.Model) -> Iterator[ir.Value]:
    """Computed constants that something not constant reads, and rows of tables that stay coded; last ones first."""
    known: dict[ir.Value, bool] = {}
    inside: set[ir.Node] = set()
    for node in reversed(list(surgery.walk(model.graph))):
        if node in inside or all(surgery.is_constant(o, known) for o in node.outputs):
            continue
        if node.op_type in _LOOKUP_OPS and node.domain in ("", "ai.onnx"):
            encoded = read(model, node.outputs[0])
            if encoded is not None and encoded.kind == "lookup":
                inside.update(_chain(node, encoded))
                yield node.outputs[0]
                continue
        places = _INTEGER_WEIGHTS.get(node.op_type, ())
        for i, value in enumerate(node.inputs):
            coded = value is not None and (value.producer() is not None or i in places)
            if coded and value is not None and surgery.is_constant(value, known):
                yield value


def _chain(node: ir.Node, encoded: Encoded) -> set[ir.Node]:
    """The nodes that decode a lookup."""
    leaves: dict[str, Any] = {}
    match(_tree(encoded), node.outputs[0], leaves, exact=True)
    index, chain, stack = leaves.get(INDEX), set(), [node]
    while stack:
        current = stack.pop()
        chain.add(current)
        stack.extend(p for v in current.inputs if v is not None and v is not index and (p := v.producer()) is not None)
    return chain


def _tie(found: dict[Any, Trained], key: Any, trained: Trained, notes: list[Note]) -> None:
    """Codes read in several places are one weight, if their scales agree."""
    first = found.get(key)
    if first is None:
        found[key] = trained
    elif [p.name for p in first.parts] == [p.name for p in trained.parts]:
        found[key] = dataclasses.replace(first, values=first.values + trained.values, reads=first.reads + trained.reads)
    else:
        notes.append(Note(trained.name, "its codes are read with different scales; this place stays as it is"))


Found = tuple[Any, Trained] | None


def _dequantized(model: ir.Model, value: ir.Value, notes: list[Note]) -> Found:
    """DequantizeLinear of codes that are stored, or decoded to integers by one of our encodings."""
    node = value.producer()
    if node is None or node.op_type != "DequantizeLinear" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    source, scale = node.inputs[0], node.inputs[1]
    zero_value = node.inputs[2] if len(node.inputs) > 2 else None
    step, zero, codes = (_content(v) for v in (scale, zero_value, source))
    if step is None or (zero_value is not None and zero is None):
        return None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    block = node.attributes["block_size"].as_int() if "block_size" in node.attributes else 0
    tensor = stored_tensor(source)
    if tensor is not None and codes is not None:
        limits = _tensors.RANGES.get(tensor.dtype)
        if limits is None:
            notes.append(Note(value.name or "", f"codes of type {tensor.dtype.name} are not trained"))
            return None
        grid = _grids.Affine(*limits, axis=axis % max(codes.ndim, 1), block=block, zero=zero)
        initial = _decoded(grid, codes, step)
        store = _Codes(source.name or "", grid)
        return source, Trained(value.name or "", initial, (value,), grid, (scale,), ((),), store)
    return _over_integers(model, value, source, scale, zero, axis, block)


def _content(value: ir.Value | None) -> Tensor | None:
    tensor = stored_tensor(value)
    return None if tensor is None or tensor.dtype not in _tensors.HELD else _tensors.from_ir(tensor)


def _decoded(grid: _grids.Affine, codes: Tensor, step: Tensor) -> Tensor:
    """What codes stand for, at least in float32, as the runtime computes it."""
    from featherweight.learn.ops.quantizing import along

    wide = torch.promote_types(step.dtype, torch.float32)
    value = codes.to(wide)
    if grid.zero is not None:
        value = value - along(grid.zero.to(wide), codes, grid.axis, grid.block)
    return value * along(step.to(wide), codes, grid.axis, grid.block)


def _over_integers(
    model: ir.Model, value: ir.Value, source: ir.Value, scale: ir.Value, zero: Tensor | None, axis: int, block: int
) -> Found:
    """DequantizeLinear of integers that are themselves encoded (packed fields, or an int8 codebook)."""
    encoded, step = read(model, source), _content(scale)
    if encoded is None or step is None:
        return None
    integers = torch.from_numpy(np.array(decode(encoded)))
    layout = encoded.layout
    place = axis % max(integers.ndim, 1)
    half = 1 << (layout.bits - 1)
    affine = _grids.Affine(-half, half - 1, axis=place, block=block, zero=zero)
    initial = _decoded(affine, integers, step)
    name = value.name or ""
    if encoded.kind == "int_tensor":
        store = _Fields(source.name or "", affine, "codes")
        return source, Trained(name, initial, (value,), affine, (scale,), ((),), store)
    if encoded.kind == "palette" and layout.integer:
        leaves = _leaves(encoded, source)
        book = _holder(model, leaves["codebook"])
        grid = _grids.Levels(_grids.Book(layout.groups, layout.levels), place, block, zero)
        store = _Fields(source.name or "", grid, "indices")
        return source, Trained(name, initial, (value,), grid, (scale, book), ((),), store)
    return None


def _recognised(model: ir.Model, value: ir.Value, notes: list[Note]) -> Found:
    """One of our own encodings."""
    node = value.producer()
    encoded = None if node is None else read(model, value)
    if encoded is None or encoded.kind == "int_tensor" or (encoded.kind == "palette" and encoded.layout.integer):
        return None
    layout = encoded.layout
    if layout.stages > 1:
        notes.append(Note(value.name or "", "a sum of codebook vectors keeps its codes; its codebooks are trained"))
        return None
    if node is not None and node.op_type == "Cast" and value.dtype in NARROW_FLOATS:
        return None  # read behind the Cast: the value in front of it is the weight
    leaves = _leaves(encoded, value)
    grid, part_key, field = _grid(encoded)
    index = leaves.pop(INDEX, None)
    first = next(k for k in leaves if k not in ("codebook", "scale", "mask"))
    holder = _holder(model, leaves[first])
    parts = (_holder(model, leaves[part_key]),) if part_key else ()
    initial = torch.from_numpy(np.array(decode(encoded))).float()
    name = (holder.name if index is not None else value.name) or ""
    store = _Fields(value.name or "", grid, field)
    reads = ((index,),) if index is not None else ((),)
    return holder, Trained(name, initial, (value,), grid, parts, reads, store)


def _integers(model: ir.Model, value: ir.Value) -> Found:
    """Codes that an integer product reads: trained in units of their scale."""
    if not any(i in _INTEGER_WEIGHTS.get(n.op_type, ()) for n, i in value.uses()):
        return None
    name, tensor = value.name or "", stored_tensor(value)
    if tensor is not None and tensor.dtype in _tensors.RANGES:
        whole = _grids.Whole(*_tensors.RANGES[tensor.dtype])
        codes = _tensors.from_ir(tensor).float()
        return value, Trained(name, codes, (value,), whole, (), ((),), _Integers(name, whole))
    encoded = read(model, value)
    if encoded is None:
        return None
    codes = torch.from_numpy(np.array(decode(encoded))).float()
    if encoded.kind == "int_tensor":
        half = 1 << (encoded.layout.bits - 1)
        whole = _grids.Whole(-half, half - 1)
        return value, Trained(name, codes, (value,), whole, (), ((),), _Fields(name, whole, "codes"))
    if encoded.kind == "palette" and encoded.layout.integer:
        book = _grids.Book(encoded.layout.groups, encoded.layout.levels)
        part = _holder(model, _leaves(encoded, value)["codebook"])
        return value, Trained(name, codes, (value,), book, (part,), ((),), _Fields(name, book, "indices"))
    return None


def _grid(encoded: Encoded) -> tuple[nn.Module, str, str]:
    """Grid, the stored array it needs besides codes, and the field that codes are."""
    layout = encoded.layout
    half = 1 << (layout.bits - 1)
    kind = layout.inner if encoded.kind == "lookup" else encoded.kind
    if kind == "float16":
        return _grids.Half(torch.float16), "", "values"
    if kind == "palette":
        grid: Any = _grids.Book(layout.groups, layout.levels)
        made = grid, "codebook", "indices"
    elif kind == "product":
        grid = _grids.Vectors(layout.groups, layout.levels)
        made = grid, "codebook", "indices"
    elif kind == "bitmask":
        mask = torch.from_numpy(np.array(encoded.fields["mask"]).astype(np.float32))
        if not layout.integer:
            return _grids.Masked(mask, None), "", "values"
        return _grids.Masked(mask, _Stored(-half, half - 1, layout)), "scale", "values"
    else:
        grid = _Stored(-half, half - 1, layout)
        made = grid, "scale", "codes"
    if encoded.kind == "lookup":
        own_scales = kind == "linear" and (layout.axis == 0 or bool(layout.block))
        return _grids.Rows(grid, own_scales), made[1], made[2]
    return made


class _Stored(_grids.Affine):
    """`Affine` without zero point whose scale is stored in the shape in which it multiplies the codes."""

    def __init__(self, low: int, high: int, layout: Any) -> None:
        looked_up = layout.kind == "lookup"  # then the weight is some rows, with their part of the scales
        super().__init__(low, high, axis=-1 if looked_up else layout.axis or 0, block=0 if looked_up else layout.block)
        self._shape = layout.scale_shape
        self._rows = looked_up and (layout.axis == 0 or bool(layout.block))

    def forward(self, latent: Tensor, scale: Tensor) -> Tensor:
        """The latent weight rounded to its grid."""
        return super().forward(latent, scale) if self._rows else super().forward(latent, scale.reshape(self._shape))

    def spacing(self, latent: Tensor, scale: Tensor) -> Tensor:
        """Distance between neighbours."""
        return super().spacing(latent, scale if self._rows else scale.reshape(self._shape))

    def codes(self, latent: Tensor, scale: Tensor) -> Tensor:
        """Integer codes."""
        return super().codes(latent, scale if self._rows else scale.reshape(self._shape))


def _tree(encoded: Encoded) -> Any:
    if encoded.kind == "lookup":
        return rows.emit(Tree(), encoded.layout, Free())
    return recipes.emit(Tree(), encoded.layout)


def _leaves(encoded: Encoded, value: ir.Value) -> dict[str, Any]:
    """The stored tensors of an encoding by key, and the index value of a lookup."""
    leaves: dict[str, Any] = {}
    node = value.producer()
    inner = value
    if not match(_tree(encoded), inner, leaves, exact=True):
        leaves.clear()
        if node is None or node.inputs[0] is None or not match(_tree(encoded), node.inputs[0], leaves, exact=True):
            raise ModelError(f"the encoding of {value.name!r} was read but cannot be found again")
    return leaves


def _holder(model: ir.Model, tensor: ir.TensorProtocol) -> ir.Value:
    found = Holder.all(model).get(id(tensor))
    if found is None:
        raise ModelError("a stored tensor of an encoding is in no graph of the model")
    return found.value


@dataclass(frozen=True)
class _Codes:
    """Stores plain codes of a DequantizeLinear."""

    name: str
    grid: _grids.Affine

    def __call__(self, model: ir.Model, latent: Tensor, parts: Sequence[Tensor]) -> None:
        holder = Holder.find(model, self.name)
        old = _tensors.from_ir(holder.tensor)
        with torch.no_grad():
            new = self.grid.codes(latent, *parts).cpu()
            moved = self.grid(latent, *parts).cpu() != _decoded(self.grid, old, parts[0].cpu()).to(latent.dtype)
        if bool(moved.any()):
            holder.replace(torch.where(moved, new, old.to(new.dtype)).numpy())


@dataclass(frozen=True)
class _Integers:
    """Stores codes that are trained as such."""

    name: str
    grid: _grids.Whole

    def __call__(self, model: ir.Model, latent: Tensor, parts: Sequence[Tensor]) -> None:
        del parts
        holder, new = Holder.find(model, self.name), self.grid.codes(latent).cpu()
        if not torch.equal(new, _tensors.from_ir(holder.tensor).to(new.dtype)):
            holder.replace(new.numpy())


@dataclass(frozen=True)
class _Fields:
    """Stores codes of one of our encodings, by reading it again from the model and packing the new ones alike."""

    name: str
    grid: Any
    field: str

    def __call__(self, model: ir.Model, latent: Tensor, parts: Sequence[Tensor]) -> None:
        value = find_value(model, self.name)
        encoded = None if value is None else read(model, value)
        if value is None or encoded is None:
            raise ModelError(f"the model must hold the encoded weight {self.name!r} that was trained, but it does not")
        old = np.asarray(encoded.fields[self.field])
        with torch.no_grad():
            codes = self.grid.codes(latent, *parts).cpu().numpy()
        if encoded.kind == "bitmask":
            codes = codes[np.asarray(encoded.fields["mask"])]
        codes = codes.astype(old.dtype).reshape(old.shape)
        candidate = dataclasses.replace(encoded, fields={**encoded.fields, self.field: codes})
        if encoded.kind != "lookup" and encoded.kind != "bitmask" and codes.size == latent.numel():
            moved = np.asarray(decode(candidate)) != np.asarray(decode(encoded))
            codes = np.where(moved.reshape(old.shape), codes, old)
            candidate = dataclasses.replace(encoded, fields={**encoded.fields, self.field: codes})
        if np.array_equal(codes, old):
            return
        arrays, leaves, holders = arrays_of(candidate), _leaves(encoded, value), Holder.all(model)
        for key, tensor in leaves.items():
            if key not in (INDEX, "scale", "codebook", "mask"):
                holders[id(tensor)].replace(arrays[key])
