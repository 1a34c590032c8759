"""Integers of 8 to 1 bits as packed bytes, and the nodes that unpack them.

8 and 4 bits are tensor types of their own. Other widths are split into fields of 4, 2 and 1 bits (5 = 4 + 1);
the runtime unpacks a byte of 2-bit or 1-bit fields by one look-up in a table of 256 rows that it computes itself
from a range. The look-up puts the field in place, sign included, so fields are joined by BitwiseOr. The runtime
keeps every intermediate until its folding pass ends, so few and narrow (int8) intermediates are what keeps
load-time memory low: 4.5 B an element for 5 bits where shift-and-mask takes 6.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from featherweight.graph.encode.layout import Layout, digits
from featherweight.graph.encode.sink import INT4, INT8, INT32, UINT4, UINT8, H, Sink, cast

Array = np.ndarray[Any, Any]


def shared_digits(sink: Sink[H], width: int) -> H:
    """Table (256, 8 / width) int32: the fields of each byte, lowest first; made once a model."""

    def span(s: Sink[H]) -> H:
        zero, stop, step = (s.fixed(np.array(v, np.int32)) for v in (0, 256, 1))
        return s.op("Reshape", s.op("Range", zero, stop, step), s.fixed(np.array([256, 1], np.int64)))

    def table(s: Sink[H]) -> H:
        powers = np.array([1 << p for p in range(0, 8, width)], np.int32)
        shifted = s.op("Div", s.shared("fw.b", span), s.fixed(powers))
        return s.op("Mod", shifted, s.fixed(np.array(1 << width, np.int32)))

    return sink.shared(f"fw.d{width}", table)


def shared_placed(sink: Sink[H], width: int, position: int, *, signed: bool, lanes: int) -> H:
    """Table int8 of the fields at their position in the code; the top field of signed codes carries the sign."""

    def table(s: Sink[H]) -> H:
        values = np.arange(1 << width)
        if signed:
            values = np.where(values >= 1 << (width - 1), values - (1 << width), values)
        placed = s.op("Gather", s.fixed((values << position).astype(np.int8)), shared_digits(s, width))
        if width == 1 and lanes == 4:
            placed = s.op("Reshape", placed, s.fixed(np.array([256, 2, 4], np.int64)))
        return placed

    return sink.shared(f"fw.{width}.{position}{'s' if signed else 'u'}{lanes}", table)


def packed_shapes(bits: int, n: int) -> dict[int, tuple[int, ...]]:
    """Shape of the stored array of each field width for n codes; a 4-bit field is UINT4, others bytes."""
    widths = [w for w, _ in digits(bits)]
    if widths == [1]:
        return {1: (-(-n // 8),)}
    if 1 in widths:
        q = -(-n // 8)
        return {w: {4: (q, 2, 4), 2: (q, 2), 1: (q,)}[w] for w in widths}
    q = -(-n // 4)
    return {w: {4: (q, 4), 2: (q,)}[w] for w in widths}


def padded_size(bits: int, n: int) -> int:
    """Number of codes the packed arrays hold."""
    return -(-n // 8) * 8 if bits % 2 else -(-n // 4) * 4


def emit(sink: Sink[H], layout: Layout, shape: tuple[int, ...], *, signed: bool) -> H:
    """The codes, unpacked, in `shape`: INT4/UINT4, or int8/uint8 for the other forms."""
    if layout.form == "int8":
        return sink.data("codes", shape, INT8 if signed else UINT8)
    if layout.form == "int4":
        return sink.data("codes", shape, INT4 if signed else UINT4)
    n = int(np.prod(shape))
    fields = digits(layout.bits)
    shapes = packed_shapes(layout.bits, n)
    lanes = 8 if fields == ((1, 0),) else 4
    joined: H | None = None
    for i, (width, position) in enumerate(fields):
        if width == 4:
            part = cast(sink, sink.data("field4", shapes[4], UINT4), INT8)
        else:
            table = shared_placed(sink, width, position, signed=signed and i == len(fields) - 1, lanes=lanes)
            stored = sink.data(f"field{width}", shapes[width], UINT8)
            part = sink.op("Gather", table, cast(sink, stored, INT32))
        joined = part if joined is None else sink.op("BitwiseOr", joined, part)
    assert joined is not None, "a code has at least one field"
    return trim(sink, joined, padded_size(layout.bits, n), shape)


def trim(sink: Sink[H], value: H, stored: int, shape: tuple[int, ...]) -> H:
    """Drop the padding of a value with `stored` elements and give it its shape."""
    n = int(np.prod(shape))
    if stored == n:
        return sink.op("Reshape", value, sink.fixed(np.array(shape, np.int64)))
    flat = sink.op("Reshape", value, sink.fixed(np.array([-1], np.int64)))
    cut = sink.op("Slice", flat, sink.fixed(np.array([0], np.int64)), sink.fixed(np.array([n], np.int64)))
    return cut if len(shape) == 1 else sink.op("Reshape", cut, sink.fixed(np.array(shape, np.int64)))


def pack(codes: Array, layout: Layout) -> dict[str, Array]:
    """Codes (any shape, int) -> the arrays `emit` asks for; 4-bit ones still one a byte."""
    if layout.form != "planes":
        return {"codes": codes}
    flat = codes.reshape(-1).astype(np.int16) & ((1 << layout.bits) - 1)
    total = padded_size(layout.bits, flat.size)
    flat = np.pad(flat, (0, total - flat.size)).astype(np.uint8)
    shapes = packed_shapes(layout.bits, codes.size)
    out: dict[str, Array] = {}
    for width, position in digits(layout.bits):
        field = (flat >> position) & ((1 << width) - 1)
        out[f"field{width}"] = (field if width == 4 else pack_bytes(field, width)).reshape(shapes[width])
    return out


def unpack(arrays: dict[str, Array], layout: Layout, shape: tuple[int, ...], *, signed: bool) -> Array:
    """Inverse of `pack`: int8 (signed) or uint8 codes in `shape`."""
    if layout.form != "planes":
        return arrays["codes"].astype(np.int8 if signed else np.uint8).reshape(shape)
    total = np.zeros(padded_size(layout.bits, int(np.prod(shape))), np.uint8)
    for width, position in digits(layout.bits):
        stored = arrays[f"field{width}"]
        field = stored.astype(np.uint8).reshape(-1) if width == 4 else unpack_bytes(stored.reshape(-1), width)
        total |= field << np.uint8(position)
    total = total[: int(np.prod(shape))].reshape(shape)
    if not signed:
        return total
    wide = total.astype(np.int16)
    return np.where(wide >= 1 << (layout.bits - 1), wide - (1 << layout.bits), wide).astype(np.int8)


def pack_bytes(field: Array, width: int) -> Array:
    """uint8 values < 2**width, length a multiple of 8/width -> bytes, first value in the lowest bits."""
    lanes = field.astype(np.uint8).reshape(-1, 8 // width)
    out = np.zeros(len(lanes), np.uint8)
    for i in range(lanes.shape[1]):
        out |= lanes[:, i] << np.uint8(i * width)
    return out


def unpack_bytes(stored: Array, width: int) -> Array:
    """Inverse of `pack_bytes`."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    return ((stored.astype(np.uint8)[:, None] >> shifts) & np.uint8((1 << width) - 1)).reshape(-1)
