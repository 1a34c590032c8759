"""Tables that stay coded in memory: the rows asked for are taken first and decoded after.

A folded table costs its float size in memory and the time to decode it all at load. A looked-up one costs neither, but
some microseconds a call for every few hundred rows. Rule: `lookup` for vocabularies, of which a call reads little;
folded for small tables read at most calls.
"""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import numpy as np

from featherweight.errors import TechniqueError
from featherweight.graph.encode.codes import Array, pack_bytes, shared_digits, shared_placed, unpack_bytes
from featherweight.graph.encode.layout import Encoded, Form, Layout, digits
from featherweight.graph.encode.sink import FLOAT, FLOAT16, INT8, INT32, UINT8, H, Sink, Tally, cast

UNKNOWN_RANK = -1


def lookup(encoded: Encoded) -> Encoded:
    """The same (rows, dim) table, written so that Gather takes coded rows and decodes only those.

    Takes a `linear` table (scale per tensor, row, column, or block of columns that divides dim), a `product`, or a
    `palette` of one codebook. Every reader must be a Gather on axis 0; `attach` checks it. Raises TechniqueError for
    anything else.
    """
    layout = encoded.layout
    fits = layout.kind in ("linear", "product") or (
        layout.kind == "palette" and layout.groups == 1 and not layout.integer
    )
    if not fits or len(layout.shape) != 2:
        raise TechniqueError(
            "only a linear, product or single-codebook palette table of shape (rows, dim) can be looked up, "
            f"but got {layout.kind} {layout.shape} with {layout.groups} codebooks; attach it folded instead"
        )
    if layout.block and (layout.axis != 1 or layout.shape[1] % layout.block):
        raise TechniqueError(
            f"blocks of a looked-up table must divide its {layout.shape[1]} columns (axis 1), "
            f"but got block {layout.block} on axis {layout.axis}"
        )
    new = lookup_layout(layout)
    return Encoded("lookup", encoded.shape, nbytes(new), encoded.fields, new)


def lookup_layout(layout: Layout) -> Layout:
    """The layout of the looked-up table for a folded one; codes are whole bytes a row."""
    form: Form = "int8" if layout.bits == 8 else "planes"
    return dataclasses.replace(layout, kind="lookup", inner=layout.kind, form=form)


@lru_cache(maxsize=65536)
def nbytes(layout: Layout) -> int:
    """Bytes of the table and the nodes of one Gather, shared tables not counted."""
    tally = Tally()
    emit(tally, layout, 0)
    return tally.nbytes - 40  # the Gather it replaces


def padded_columns(layout: Layout) -> int:
    """Columns a packed row holds: whole bytes of each of its fields."""
    step = max(8 // width for width, _ in digits(layout.bits))
    return -(-layout.shape[1] // step) * step


def emit(sink: Sink[H], layout: Layout, index: H) -> H:
    """Decode the rows `index` of a table: its shape + (dim,)."""
    if layout.inner == "palette":
        return _palette_rows(sink, layout, index)
    if layout.inner == "product":
        return _product_rows(sink, layout, index)
    if layout.form == "int8":
        rows = cast(sink, sink.op("Gather", sink.data("codes", layout.shape, INT8), index), FLOAT)
    else:
        rows = _code_rows(sink, layout, index, signed=True)
    return _scaled(sink, layout, index, rows)


def _palette_rows(sink: Sink[H], layout: Layout, index: H) -> H:
    book = sink.data("codebook", (layout.book_levels,), FLOAT)
    if layout.form == "int8":
        rows = sink.op("Gather", sink.data("codes", layout.shape, UINT8), index)
        return sink.op("Gather", book, cast(sink, rows, INT32))
    fields = digits(layout.bits)
    if len(fields) == 1:
        width = fields[0][0]
        return _columns(sink, layout, index, _field_rows(sink, layout, index, width, _book_table(sink, book, width)))
    return sink.op("Gather", book, cast(sink, _code_rows(sink, layout, index, signed=False), INT32))


def _product_rows(sink: Sink[H], layout: Layout, index: H) -> H:
    codes = layout.product_codes
    if layout.form == "int8":
        picked = sink.op("Gather", sink.data("codes", codes.shape, UINT8), index)
    else:
        picked = _code_rows(sink, codes, index, signed=False)
    vectors = product_vectors(sink, layout, picked)
    if layout.stages == 1:
        return _shaped(sink, layout, index, vectors, layout.shape[1])
    staged = _shaped(sink, layout, index, vectors, layout.stages, layout.shape[1])
    return sink.op("ReduceSum", staged, sink.fixed(np.array([-2], np.int64)), keepdims=0)


def product_vectors(sink: Sink[H], layout: Layout, codes: H) -> H:
    """Codes (..., stages * groups) of a product -> the vectors they name, (..., stages * groups, width)."""
    book = sink.data("codebook", layout.book_shape, FLOAT16 if layout.half_scale else FLOAT)
    if layout.half_scale:
        book = cast(sink, book, FLOAT)
    first = np.arange(layout.stages * layout.groups, dtype=np.int32) * np.int32(layout.levels)
    return sink.op("Gather", book, sink.op("Add", cast(sink, codes, INT32), sink.fixed(first)))


def _book_table(sink: Sink[H], book: H, width: int) -> H:
    return sink.op("Gather", book, shared_digits(sink, width))


def _field_rows(sink: Sink[H], layout: Layout, index: H, width: int, table: H) -> H:
    """(index..., padded columns): one field of each code, by byte through `table`."""
    columns = padded_columns(layout)
    stored = sink.data(f"field{width}", (layout.shape[0], columns * width // 8), UINT8)
    values = sink.op("Gather", table, cast(sink, sink.op("Gather", stored, index), INT32))
    return _shaped(sink, layout, index, values, columns)


def _code_rows(sink: Sink[H], layout: Layout, index: H, *, signed: bool) -> H:
    """(index..., dim): codes of several fields as int8; of one signed field as float32 at once."""
    fields = digits(layout.bits)
    joined: H | None = None
    for i, (width, position) in enumerate(fields):
        top = signed and i == len(fields) - 1
        table = shared_placed(sink, width, position, signed=top, lanes=8 // width)
        if len(fields) == 1 and signed:
            table = _float_table(sink, width)
        part = _field_rows(sink, layout, index, width, table)
        joined = part if joined is None else sink.op("BitwiseOr", joined, part)
    assert joined is not None, "a code has at least one field"
    rows = _columns(sink, layout, index, joined)
    return cast(sink, rows, FLOAT) if signed and len(fields) > 1 else rows


def _float_table(sink: Sink[H], width: int) -> H:
    def table(s: Sink[H]) -> H:
        return cast(s, shared_placed(s, width, 0, signed=True, lanes=8 // width), FLOAT)

    return sink.shared(f"fw.{width}.f", table)


def _columns(sink: Sink[H], layout: Layout, index: H, rows: H) -> H:
    """Drop the columns that pad a row."""
    del index
    if padded_columns(layout) == layout.shape[1]:
        return rows
    bounds = (sink.fixed(np.array([v], np.int64)) for v in (0, layout.shape[1], -1))
    return sink.op("Slice", rows, *bounds)


def _shaped(sink: Sink[H], layout: Layout, index: H, value: H, *last: int) -> H:
    """Give `value` the shape (index..., *last); explicit sizes, so that an empty index works too."""
    if layout.rank == UNKNOWN_RANK:
        tail = sink.fixed(np.array(last, np.int64))
        return sink.op("Reshape", value, sink.op("Concat", sink.op("Shape", index), tail, axis=0))
    return sink.op("Reshape", value, sink.fixed(np.array([0] * layout.rank + list(last), np.int64)))


def stored_scale_shape(layout: Layout) -> tuple[int, ...]:
    """Shape of the scale as stored: what follows the rows broadcasts against the decoded ones."""
    if layout.axis == 0:
        return (layout.shape[0], 1)
    return (layout.shape[0], layout.n_blocks, 1) if layout.block else layout.scale_shape


def _scaled(sink: Sink[H], layout: Layout, index: H, rows: H) -> H:
    scale = sink.data("scale", stored_scale_shape(layout), FLOAT16 if layout.half_scale else FLOAT)
    if layout.axis == 0 or layout.block:
        scale = sink.op("Gather", scale, index)
    if layout.half_scale:
        scale = cast(sink, scale, FLOAT)
    if not layout.block:
        return sink.op("Mul", rows, scale)
    blocked = _shaped(sink, layout, index, rows, layout.n_blocks, layout.block)
    return _shaped(sink, layout, index, sink.op("Mul", blocked, scale), layout.shape[1])


def pack_rows(codes: Array, layout: Layout) -> dict[str, Array]:
    """Codes (rows, dim) -> the byte arrays `emit` asks for."""
    if layout.form == "int8":
        return {"codes": codes}
    wide = codes.astype(np.int16) & ((1 << layout.bits) - 1)
    wide = np.pad(wide, ((0, 0), (0, padded_columns(layout) - layout.shape[1]))).astype(np.uint8)
    return {
        f"field{width}": pack_bytes((wide >> position) & ((1 << width) - 1), width).reshape(len(codes), -1)
        for width, position in digits(layout.bits)
    }


def unpack_rows(arrays: dict[str, Array], layout: Layout, *, signed: bool) -> Array:
    """Inverse of `pack_rows`."""
    if layout.form == "int8":
        return arrays["codes"]
    total = np.zeros((layout.shape[0], padded_columns(layout)), np.uint8)
    for width, position in digits(layout.bits):
        field = unpack_bytes(arrays[f"field{width}"].reshape(-1), width).reshape(total.shape)
        total |= field << np.uint8(position)
    total = total[:, : layout.shape[1]]
    if not signed:
        return total
    spare = 8 - layout.bits
    return (total << np.uint8(spare)).view(np.int8) >> spare
