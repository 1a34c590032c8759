"""The decode expression of each kind, written once against a Sink, and the bytes it takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from featherweight.graph.encode import codes, rows
from featherweight.graph.encode.layout import Encoded, Form, Kind, Layout
from featherweight.graph.encode.sink import (
    BOOL,
    FLOAT,
    FLOAT16,
    INT8,
    INT32,
    UINT8,
    H,
    Sink,
    Tally,
    cast,
)

_VALUE_INFO = 44  # the decoded value's own name, type and shape, which an initializer has in itself


def emit(sink: Sink[H], layout: Layout) -> H:
    """Write the decode expression of any kind but lookup; returns the decoded tensor."""
    match layout.kind:
        case "linear":
            return _linear(sink, layout)
        case "dequantize":
            return _dequantize(sink, layout)
        case "palette":
            return _palette(sink, layout)
        case "product":
            return _product(sink, layout)
        case "bitmask":
            return _bitmask(sink, layout)
        case "float16":
            return cast(sink, sink.data("values", layout.shape, FLOAT16), FLOAT)
        case "int_tensor":
            return _int8(sink, layout)
        case _:
            raise AssertionError(f"no recipe for {layout.kind}")


def _int8(sink: Sink[H], layout: Layout) -> H:
    stored = codes.emit(sink, layout, layout.shape, signed=True)
    return cast(sink, stored, INT8) if layout.form == "int4" else stored


def _scale(sink: Sink[H], layout: Layout, shape: tuple[int, ...]) -> H:
    scale = sink.data("scale", shape, FLOAT16 if layout.half_scale else FLOAT)
    return cast(sink, scale, FLOAT) if layout.half_scale else scale


def broadcast_scale_shape(layout: Layout) -> tuple[int, ...]:
    """Shape in which the scale multiplies the unpacked codes."""
    if layout.axis is None:
        return ()
    after = len(layout.shape) - layout.axis - 1
    if not layout.block:
        return (layout.shape[layout.axis], *(1,) * after)
    return (*layout.shape[: layout.axis], layout.n_blocks, 1, *layout.shape[layout.axis + 1 :])


def _linear(sink: Sink[H], layout: Layout) -> H:
    stored = codes.emit(sink, layout, layout.code_shape, signed=True)
    value = sink.op("Mul", cast(sink, stored, FLOAT), _scale(sink, layout, broadcast_scale_shape(layout)))
    return unblock(sink, layout, value)


def unblock(sink: Sink[H], layout: Layout, value: H) -> H:
    """Join (blocks, block) to one axis again and drop what pads the last block."""
    if not layout.block or layout.axis is None:
        return value
    axis, size = layout.axis, layout.shape[layout.axis]
    joined = (*layout.shape[:axis], layout.n_blocks * layout.block, *layout.shape[axis + 1 :])
    value = sink.op("Reshape", value, sink.fixed(np.array(joined, np.int64)))
    if joined == layout.shape:
        return value
    bounds = (sink.fixed(np.array([v], np.int64)) for v in (0, size, axis))
    return sink.op("Slice", value, *bounds)


def _dequantize(sink: Sink[H], layout: Layout) -> H:
    stored = codes.emit(sink, layout, layout.shape, signed=True)
    attrs = {} if layout.axis is None else {"axis": layout.axis}
    if layout.block:
        attrs["block_size"] = layout.block
    return sink.op("DequantizeLinear", stored, _scale(sink, layout, layout.scale_shape), **attrs)


def _codebook(sink: Sink[H], layout: Layout) -> H:
    shape = (layout.book_levels,) if layout.groups == 1 else (layout.groups, layout.levels)
    return sink.data("codebook", shape, INT8 if layout.integer else FLOAT)


def _palette(sink: Sink[H], layout: Layout) -> H:
    book = _codebook(sink, layout)
    if layout.form == "planes" and layout.bits in (1, 2) and layout.groups == 1:
        # A byte looks up its 8 / bits values at once: no index tensor as large as the result.
        table = sink.op("Gather", book, codes.shared_digits(sink, layout.bits))
        stored = sink.data(f"field{layout.bits}", codes.packed_shapes(layout.bits, layout.size)[layout.bits], UINT8)
        value = sink.op("Gather", table, cast(sink, stored, INT32))
        return codes.trim(sink, value, codes.padded_size(layout.bits, layout.size), layout.shape)
    if layout.groups == 1:
        return sink.op("Gather", book, cast(sink, codes.emit(sink, layout, layout.shape, signed=False), INT32))
    runs = (layout.groups, layout.size // layout.groups)
    index = cast(sink, codes.emit(sink, layout, runs, signed=False), INT32)
    value = sink.op("GatherElements", book, index, axis=1)
    return value if runs == layout.shape else sink.op("Reshape", value, sink.fixed(np.array(layout.shape, np.int64)))


def _product(sink: Sink[H], layout: Layout) -> H:
    held = layout.product_codes
    vectors = rows.product_vectors(sink, layout, codes.emit(sink, held, held.shape, signed=False))
    if layout.stages > 1:
        staged = np.array([layout.shape[0], layout.stages, layout.shape[1]], np.int64)
        vectors = sink.op("Reshape", vectors, sink.fixed(staged))
        return sink.op("ReduceSum", vectors, sink.fixed(np.array([1], np.int64)), keepdims=0)
    return sink.op("Reshape", vectors, sink.fixed(np.array(layout.shape, np.int64)))


def _bitmask(sink: Sink[H], layout: Layout) -> H:
    n = layout.size
    table = codes.shared_placed(sink, 1, 0, signed=False, lanes=8)
    packed = sink.data("mask", (-(-n // 8),), UINT8)
    mask = codes.trim(sink, sink.op("Gather", table, cast(sink, packed, INT32)), -(-n // 8) * 8, (n,))
    # Values before an element = its place among the values; one zero more, since a last gap points past them.
    place = sink.op("CumSum", cast(sink, mask, INT32), sink.fixed(np.array(0, np.int32)), exclusive=1)
    if not layout.integer:
        values, zero = sink.data("values", (layout.nnz + 1,), FLOAT), np.array(0, np.float32)
    else:
        values, zero = codes.emit(sink, layout, (layout.nnz + 1,), signed=True), np.array(0, np.int8)
        values = cast(sink, values, INT8) if layout.form == "int4" else values
    spread = sink.op("Where", cast(sink, mask, BOOL), sink.op("Gather", values, place), sink.fixed(zero))
    shaped = sink.op("Reshape", spread, sink.fixed(np.array(layout.shape, np.int64)))
    if not layout.integer:
        return shaped
    return sink.op("Mul", cast(sink, shaped, FLOAT), _scale(sink, layout, broadcast_scale_shape(layout)))


def forms(layout: Layout) -> tuple[Form, ...]:
    """The ways in which codes of this width can be stored."""
    if layout.kind == "float16" or layout.bits >= 8:
        return ("int8",)
    if layout.bits == 4:
        return ("int4",)
    return ("planes", "int4", "int8") if layout.bits < 4 else ("planes", "int8")


@lru_cache(maxsize=65536)
def cheapest(layout: Layout) -> Layout:
    """The layout with the form that takes the fewest bytes (a small tensor does not pay for unpacking nodes)."""
    return min(stored(layout), key=nbytes)


def stored(layout: Layout) -> Iterator[Layout]:
    """The layout in each form its codes can take; `bits` becomes what the form really holds."""
    for form in forms(layout):
        held = layout.bits if form == "planes" or layout.kind == "float16" or layout.bits > 8 else int(form[3:])
        yield dataclasses.replace(layout, form=form, bits=held)


@lru_cache(maxsize=65536)
def nbytes(layout: Layout) -> int:
    """Bytes the encoding adds to a file, shared tables not counted."""
    if layout.kind == "lookup":
        return rows.nbytes(layout)
    tally = Tally()
    emit(tally, layout)
    plain = layout.kind == "int_tensor" and layout.form == "int8"
    return tally.nbytes + (0 if plain else _VALUE_INFO)


@lru_cache(maxsize=4096)
def _shared_nbytes(layout: Layout) -> int:
    """Bytes of the tables this layout shares with every other encoding of a model (written once)."""
    tally = Tally()
    if layout.kind == "lookup":
        rows.emit(tally, layout, 0)
    else:
        emit(tally, layout)
    return sum(tally.shared_names.values())


def sizes(
    shape: tuple[int, ...], kind: Kind, bits: int, *, axis: int | None = None, block: int = 0, groups: int = 1,
    levels: int | None = None, nnz: int = 0, half_scale: bool = False, scaled: bool = False, integer: bool = False,
    stages: int = 1, inner: Kind = "linear",
) -> int:  # fmt: skip
    """`Encoded.nbytes` of a tensor of this shape without building it; remembered, so the search may call it freely.

    `axis`, `block`, `half_scale` as in `linear`; `groups`, `levels` (2**bits), `integer` (int8 codebook) as in
    `palette`; `groups`, `levels`, `stages`, `half_scale` as in `product`; `nnz` set bits of a `bitmask`, `scaled` if
    its values are codes. A `lookup` is of a table of kind `inner`.
    """
    if kind == "bitmask":
        width = bits if scaled else 32
        return _size(Layout(kind, shape, width, axis=axis, nnz=nnz, half_scale=half_scale, integer=scaled))
    if kind == "palette":
        levels = 1 << bits if levels is None else levels
        return _size(Layout(kind, shape, bits, groups=groups, levels=levels, integer=integer))
    if kind == "product":
        levels = 1 << bits if levels is None else levels
        return _size(Layout(kind, shape, bits, groups=groups, levels=levels, stages=stages, half_scale=half_scale))
    if kind == "lookup":
        levels = 0 if inner == "linear" else 1 << bits if levels is None else levels
        table = Layout(
            inner,
            shape,
            bits,
            axis=axis,
            block=block,
            groups=groups,
            levels=levels,
            stages=stages,
            half_scale=half_scale,
        )
        return nbytes(rows.lookup_layout(table if inner == "linear" else cheapest(table)))
    if kind in ("linear", "dequantize"):
        return _size(Layout(kind, shape, bits, axis=axis, block=block, half_scale=half_scale))
    return _size(Layout(kind, shape, bits if kind == "int_tensor" else 16))


@lru_cache(maxsize=65536)
def _size(layout: Layout) -> int:
    return nbytes(cheapest(layout.canonical()))


def shared_bytes(encoded: Encoded) -> int:
    """Bytes of the tables this encoding shares with every other one of a model; written once a model."""
    return _shared_nbytes(encoded.layout)
