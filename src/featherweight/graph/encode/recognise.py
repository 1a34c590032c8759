"""Find out which encoding, if any, a value of a loaded model is the result of."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir

from featherweight.graph.encode import make, recipes, rows
from featherweight.graph.encode.layout import Encoded, Layout
from featherweight.graph.encode.match import INDEX, Found, constant, match
from featherweight.graph.encode.sink import INT8, NARROW_FLOATS, Free, Op, Tree

_MAX_INDEX_RANK = 6
_MAX_STAGES = 9


def read(model: ir.Model, value: ir.Value) -> Encoded | None:
    """The encoding that `value` is decoded from, or None if it is anything else.

    Works on models written by `attach`, also after saving and loading; structure and constants are compared, never
    names. `value` is the decoded tensor, or the decoded rows of a lookup. An int8 initializer reads as an 8-bit
    `int_tensor`, which is how that is written; a foreign DequantizeLinear of constants without zero point reads as
    `dequantize`, which is what it is. Behind a final Cast to float16 or bfloat16 the encoding before it is read.
    """
    del model  # part of the interface: a value alone does not say which model it belongs to
    node = value.producer()
    if node is not None and node.op_type == "Cast" and value.dtype in NARROW_FLOATS and node.inputs[0] is not None:
        value = node.inputs[0]
        node = value.producer()
    if node is None:
        tensor = constant(value)
        if tensor is None or tensor.dtype != INT8 or not tensor.size:
            return None
        return make.int_tensor(tensor.numpy(), 8)
    for template, tree in _templates().get((node.op_type, len(node.inputs)), ()):
        found: Found = {}
        if not match(tree, value, found, exact=False):
            continue
        layouts = _lookups(template, found) if template.kind == "lookup" else _layouts(template, value, found)
        for layout in layouts:
            encoded = _confirm(layout, value)
            if encoded is not None:
                return encoded
    return None


def _tree(layout: Layout) -> Any:
    return rows.emit(Tree(), layout, Free()) if layout.kind == "lookup" else recipes.emit(Tree(), layout)


def _confirm(layout: Layout, value: ir.Value) -> Encoded | None:
    found: Found = {}
    if not match(_tree(layout), value, found, exact=True):
        return None
    return make.from_arrays({key: _numpy(tensor) for key, tensor in found.items() if key != INDEX}, layout)


def _numpy(tensor: ir.TensorProtocol) -> np.ndarray[Any, Any]:
    array = np.asarray(tensor.numpy())
    if tensor.dtype == ir.DataType.INT4:
        return array.astype(np.int8)
    return array.astype(np.uint8) if tensor.dtype == ir.DataType.UINT4 else array


@lru_cache(maxsize=1)
def _templates() -> dict[tuple[str, int], list[tuple[Layout, Op]]]:
    """One layout for each structure an expression can have, on a small shape, by operator and count of inputs."""
    found: dict[tuple[str, int], list[tuple[Layout, Op]]] = {}
    layouts = dict.fromkeys(layout for template in _candidates() for layout in recipes.stored(template))
    for layout in [*layouts, *dict.fromkeys(_lookup_candidates())]:
        tree = _tree(layout)
        if isinstance(tree, Op):
            found.setdefault((tree.op_type, len(tree.inputs)), []).append((layout, tree))
    return found


def _candidates() -> Iterator[Layout]:
    # With and without padding of the codes and of the last block; rank 1 needs no last Reshape.
    for shape in ((8,), (9,), (7,), (2, 8), (3, 3)):
        for half in (False, True):
            for bits in range(2, 9):
                for block in (0, 1, 2):
                    yield Layout("linear", shape, bits, axis=0 if block else None, block=block, half_scale=half)
                yield Layout("dequantize", shape, bits, half_scale=half)
            for bits in range(2, 9):
                for nnz in (0, 7):  # with and without padding of the codes
                    yield Layout("bitmask", shape, bits, nnz=nnz, integer=True, half_scale=half)
        yield Layout("bitmask", shape, 32)
        yield Layout("float16", shape)
        for bits in range(1, 9):
            yield Layout("int_tensor", shape, max(bits, 2))
            if len(shape) == 2:
                for half in (False, True):
                    for stages in (1, 2):
                        yield Layout("product", shape, bits, groups=shape[1], levels=2, stages=stages, half_scale=half)
            for groups in {1, 2, shape[0]}:
                for integer in (False, True):
                    yield Layout("palette", shape, bits, groups=groups, levels=1, integer=integer)


def _lookup_candidates() -> Iterator[Layout]:
    for columns in (8, 9):
        for rank in (1, rows.UNKNOWN_RANK):
            for bits in range(1, 9):
                base = Layout("linear", (2, columns), bits, rank=rank)
                yield rows.lookup_layout(dataclasses.replace(base, kind="palette", levels=1))
                for stages, half in ((1, False), (1, True), (2, False), (2, True)):
                    product = dataclasses.replace(
                        base, kind="product", levels=1, groups=columns // stages, stages=stages, half_scale=half
                    )
                    yield rows.lookup_layout(product)
                for axis, block in ((None, 0), (0, 0), (1, columns)) if bits > 1 else ():
                    for half in (False, True):
                        yield rows.lookup_layout(dataclasses.replace(base, axis=axis, block=block, half_scale=half))


def _dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(d) for d in tensor.shape.numpy())


def _layouts(template: Layout, value: ir.Value, found: Found) -> Iterator[Layout]:
    """The layouts of this structure that the shapes of the data allow."""
    shape = _shape(template, value, found)
    if shape is None:
        return
    base = dataclasses.replace(template, shape=shape, axis=None, block=0)
    if template.kind == "product":
        yield from _products(template, shape, found)
    elif template.kind == "palette":
        book = _dims(found["codebook"])
        groups = book[0] if len(book) == 2 else 1
        if math.prod(book) and math.prod(shape) % groups == 0:
            yield dataclasses.replace(base, groups=groups, levels=book[-1])
    elif template.kind == "bitmask":
        bits = np.unpackbits(found["mask"].numpy(), bitorder="little")[: math.prod(shape)]
        base = dataclasses.replace(base, nnz=int(np.count_nonzero(bits)))
        yield from _with_axis(base, value, found) if template.integer else [base]
    elif template.kind in ("linear", "dequantize"):
        yield from _with_axis(base, value, found)
    else:
        yield base


def _with_axis(layout: Layout, value: ir.Value, found: Found) -> Iterator[Layout]:
    """Every placing of the scales that gives the stored scale's shape."""
    stored = _dims(found["scale"])
    rank = len(layout.shape)
    options = [layout, *(dataclasses.replace(layout, axis=axis) for axis in range(rank))]
    if layout.kind == "dequantize":
        node = value.producer()
        size = node.attributes.get("block_size") if node is not None else None
        if size is not None and size.value:
            options = [dataclasses.replace(layout, axis=a, block=int(size.value)) for a in range(rank)]
    elif layout.kind == "linear":
        blocked = _code_shape(value, found)
        if len(blocked) == rank + 1:
            options += [
                dataclasses.replace(layout, axis=a, block=blocked[a + 1]) for a in range(rank) if blocked[a + 1] > 0
            ]
    for option in options:
        expected = option.scale_shape if option.kind == "dequantize" else recipes.broadcast_scale_shape(option)
        if expected == stored:
            yield option


def _code_shape(value: ir.Value, found: Found) -> tuple[int, ...]:
    """Shape of the codes before they are multiplied: stored, or that of the Reshape after unpacking."""
    if "codes" in found:
        return _dims(found["codes"])
    node = value.producer()
    while node is not None and node.op_type != "Cast":
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    inner = node.inputs[0].producer() if node is not None and node.inputs[0] is not None else None
    target = constant(inner.inputs[1]) if inner is not None and inner.op_type == "Reshape" else None
    return () if target is None else tuple(int(d) for d in target.numpy().reshape(-1))


def _shape(template: Layout, value: ir.Value, found: Found) -> tuple[int, ...] | None:
    """Shape of the decoded value: as the model says, else from the stored data or the last Reshape."""
    if value.shape is not None and all(isinstance(d, int) for d in value.shape):
        return tuple(int(d) for d in value.shape.numpy())
    for key in ("values", "codes"):
        if key in found and template.kind != "bitmask" and not template.block and template.groups == 1:
            return _dims(found[key])
    node = value.producer()
    while node is not None and node.op_type not in ("Reshape", "Slice"):
        node = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    target = constant(node.inputs[1]) if node is not None and node.op_type == "Reshape" else None
    return tuple(int(d) for d in target.numpy().reshape(-1)) if target is not None else None


def _products(template: Layout, shape: tuple[int, ...], found: Found) -> Iterator[Layout]:
    """Products of this shape whose codebooks have the stored shape."""
    vectors, width = _dims(found["codebook"])
    if len(shape) != 2 or not width or shape[1] % width or not shape[1]:
        return
    groups = shape[1] // width
    stages = (1,) if template.stages == 1 else range(2, _MAX_STAGES)
    for count in stages:
        if vectors and vectors % (count * groups) == 0:
            levels = vectors // (count * groups)
            yield dataclasses.replace(template, shape=shape, groups=groups, stages=count, levels=levels)


def _lookups(template: Layout, found: Found) -> Iterator[Layout]:
    """The looked-up tables that the stored rows allow; few, and `_confirm` leaves at most one."""
    count, stored = _dims(found[next(k for k in found if k == "codes" or k.startswith("field"))])
    width = 8 if "codes" in found else int(next(k for k in found if k.startswith("field"))[5:])
    padded = stored * 8 // width
    columns = range(padded, max(padded - 8, 0), -1) if "codes" not in found else (padded,)
    ranks = range(_MAX_INDEX_RANK) if template.rank != rows.UNKNOWN_RANK else (rows.UNKNOWN_RANK,)
    scale = _dims(found["scale"]) if "scale" in found else ()
    if template.inner == "product":
        for held in columns:
            for rank in ranks:
                for stages in (1,) if template.stages == 1 else range(2, _MAX_STAGES):
                    if held % stages == 0:
                        shape = (count, held // stages * _dims(found["codebook"])[1])
                        base = dataclasses.replace(template, rank=rank)
                        yield from (p for p in _products(base, shape, found) if p.stages == stages)
        return
    for dim in columns:
        options: list[dict[str, Any]] = [{"axis": None}, {"axis": 0}, {"axis": 1}]
        if len(scale) == 3 and scale[1] and dim % scale[1] == 0:
            options.append({"axis": 1, "block": dim // scale[1]})
        if template.inner == "palette":
            options = [{"levels": math.prod(_dims(found["codebook"]))}]
        for option in options:
            for rank in ranks:
                base = dataclasses.replace(template, shape=(count, dim), rank=rank, axis=None, block=0)
                layout = dataclasses.replace(base, **option)
                if template.inner == "palette" or rows.stored_scale_shape(layout) == scale:
                    yield layout
