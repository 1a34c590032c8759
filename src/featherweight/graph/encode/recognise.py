"""Find out which encoding, if any, a value of a loaded model is the result of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir

from featherweight.graph.encode import make, recipes
from featherweight.graph.encode.layout import Encoded, Layout
from featherweight.graph.encode.match import Found, constant, match
from featherweight.graph.encode.sink import INT8, Op, Tree


def read(model: ir.Model, value: ir.Value) -> Encoded | None:
    """The encoding that `value` is decoded from, or None if it is anything else.

    Works on models written by `attach`, also after saving and loading; structure and constants are compared, never
    names. An int8 initializer reads as an 8-bit `int_tensor`, which is how that is written.
    """
    del model  # part of the interface: a value alone does not say which model it belongs to
    if value.producer() is None:
        tensor = constant(value)
        if tensor is None or tensor.dtype != INT8 or not tensor.size:
            return None
        return make.int_tensor(tensor.numpy(), 8)
    for template, tree in _templates_of(value):
        found: Found = {}
        if not match(tree, value, found, exact=False):
            continue
        for layout in _layouts(template, value, found):
            encoded = _confirm(layout, value)
            if encoded is not None:
                return encoded
    return None


def _confirm(layout: Layout, value: ir.Value) -> Encoded | None:
    found: Found = {}
    if not match(recipes.emit(Tree(), layout), value, found, exact=True):
        return None
    arrays = {key: _numpy(tensor) for key, tensor in found.items()}
    encoded = make.from_arrays(arrays, layout)
    if "offsets" in arrays and not np.array_equal(arrays["offsets"].reshape(-1), make.arrays_of(encoded)["offsets"]):
        return None
    return encoded


def _numpy(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    array = np.asarray(tensor.numpy())
    if tensor.dtype == ir.DataType.INT4:
        return array.astype(np.int8)
    return array.astype(np.uint8) if tensor.dtype == ir.DataType.UINT4 else array


def _templates_of(value: ir.Value) -> Iterator[tuple[Layout, Op]]:
    node = value.producer()
    if node is None or node.domain not in ("", "ai.onnx"):
        return
    for template, tree in _templates():
        if tree.op_type == node.op_type and len(tree.inputs) == len(node.inputs):
            yield template, tree


@lru_cache(maxsize=1)
def _templates() -> tuple[tuple[Layout, Op], ...]:
    """One layout for each structure an expression can have, on a small shape, with its expression."""
    found: list[tuple[Layout, Op]] = []
    layouts = dict.fromkeys(layout for template in _candidates() for layout in recipes.stored(template))
    for layout in layouts:
        tree = recipes.emit(Tree(), layout)
        if isinstance(tree, Op):
            found.append((layout, tree))
    return tuple(found)


def _candidates() -> Iterator[Layout]:
    for shape in ((8,), (9,), (2, 8), (3, 3)):  # with and without padding, rank 1 needs no last Reshape
        for half in (False, True):
            for bits in range(2, 9):
                for block in (0, 1, 2, 3):
                    axis = 0 if block else None
                    yield Layout("linear", shape, bits, axis=axis, block=block, half_scale=half)
                yield Layout("dequantize", shape, bits, half_scale=half)
            for bits in (4, 8):
                yield Layout("bitmask", shape, bits, integer=True, half_scale=half)
        yield Layout("bitmask", shape, 32)
        yield Layout("float16", shape)
        for bits in range(1, 9):
            yield Layout("int_tensor", shape, max(bits, 2))
            for groups in (1, shape[0]):
                for integer in (False, True):
                    yield Layout("palette", shape, bits, groups=groups, levels=1, integer=integer)


def _layouts(template: Layout, value: ir.Value, found: Found) -> Iterator[Layout]:
    """The layouts of this structure that the shapes of the data allow."""
    shape = _shape(template, value, found)
    if shape is None:
        return
    base = dataclasses.replace(template, shape=shape, axis=None, block=0)
    if template.kind == "palette":
        rows = shape[0] if shape else 1
        size = math.prod(found["codebook"].shape.numpy())
        groups = 1 if template.groups == 1 else _groups(found)
        if groups and rows % groups == 0 and size % groups == 0:
            yield dataclasses.replace(base, groups=groups, levels=size // groups)
    elif template.kind == "bitmask":
        base = dataclasses.replace(base, nnz=math.prod(found["values"].shape.numpy()) - 1)
        yield from _with_axis(base, found) if template.integer else [base]
    elif template.kind == "linear" or template.kind == "dequantize":
        yield from _with_axis(base, found)
    else:
        yield base


def _groups(found: Found) -> int:
    offsets = found["offsets"].numpy().reshape(-1)
    return len(np.unique(offsets))


def _with_axis(layout: Layout, found: Found) -> Iterator[Layout]:
    """Every placing of the scales that gives the stored scale's shape."""
    stored = tuple(found["scale"].shape.numpy())
    rank = len(layout.shape)
    options = [layout, *(dataclasses.replace(layout, axis=axis) for axis in range(rank))]
    if layout.kind != "bitmask":
        for axis in range(rank):
            # (..., blocks, 1, ...) for linear, (..., blocks, ...) for dequantize
            count = stored[axis] if axis < len(stored) else 0
            for block in _block_sizes(layout.shape[axis], count, found, axis):
                options.append(dataclasses.replace(layout, axis=axis, block=block))
    for option in options:
        expected = option.scale_shape if option.kind == "dequantize" else recipes.broadcast_scale_shape(option)
        if expected == stored:
            yield option


def _block_sizes(size: int, count: int, found: Found, axis: int) -> Iterator[int]:
    """Block lengths that cut `size` entries in `count` blocks; stored blocked codes tell which."""
    if count <= 0:
        return
    codes = found.get("codes")
    if codes is not None and len(codes.shape) > axis + 1 and codes.shape.numpy()[axis] == count:
        yield codes.shape.numpy()[axis + 1]
    low = -(-size // count)
    high = low if count == 1 else (size - 1) // (count - 1)
    yield from (b for b in range(low, max(low, high) + 1) if -(-size // b) == count)


def _shape(template: Layout, value: ir.Value, found: Found) -> tuple[int, ...] | None:
    """Shape of the decoded value: as the model says, else from the stored data."""
    if value.shape is not None and all(isinstance(d, int) for d in value.shape):
        return tuple(int(d) for d in value.shape)  # type: ignore[arg-type]
    for key in ("values", "codes"):
        if key in found and template.kind != "bitmask" and not template.block:
            return tuple(found[key].shape.numpy())
    node = value.producer()
    while node is not None and node.op_type not in ("Reshape", "Slice"):
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    target = constant(node.inputs[1]) if node is not None and node.op_type == "Reshape" else None
    return tuple(int(d) for d in target.numpy()) if target is not None else None
