"""Arrays -> Encoded -> arrays: no graph here. `decode` gives bit for bit what the runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np

from featherweight.errors import TechniqueError
from featherweight.graph.encode import codes as _codes
from featherweight.graph.encode import recipes
from featherweight.graph.encode import rows as _rows
from featherweight.graph.encode.layout import (
    Encoded,
    Kind,
    Layout,
    require_bits,
    require_codes,
    require_elements,
)

Array = np.ndarray[Any, Any]


def linear(codes: Array, scale: Array | float, bits: int, *, axis: int | None = None, block: int = 0) -> Encoded:
    """Codes (any shape) int of 2..8 bits, scale f32 or f16 -> value = code * scale, float32, folded at load.

    `scale` is () per tensor, (channels,) for `axis`, or the codes' shape with `axis` divided by `block`, rounded
    up. A float16 scale is stored as such and widened. Raises TechniqueError if codes or shapes do not fit.
    """
    return _scaled("linear", codes, scale, bits, axis=axis, block=block)


def dequantize(codes: Array, scale: Array | float, bits: int, *, axis: int | None = None, block: int = 0) -> Encoded:
    """As `linear`, but through DequantizeLinear, which the runtime keeps instead of folding it.

    In front of a MatMul's second input ONNX Runtime turns it into MatMulNBits (4 or 8 bits): no decoding at load, a
    fraction of the memory, faster than float, but its sums use activations rounded to 8 bits. Elsewhere it is
    computed at every call: use `linear` there.
    """
    return _scaled("dequantize", codes, scale, bits, axis=axis, block=block)


def block4(codes: Array, scale: Array, *, axis: int, block: int) -> Encoded:
    """`dequantize` with 4-bit codes and one scale for each `block` entries along `axis`."""
    return dequantize(codes, scale, 4, axis=axis, block=block)


def _scaled(kind: Kind, codes: Array, scale: Array | float, bits: int, *, axis: int | None, block: int) -> Encoded:
    codes, factor = np.asarray(codes), _scale_array(scale)
    require_elements(codes.shape, kind)
    require_bits(bits, 2, 8, kind)
    require_codes(codes, bits, signed=True, kind=kind)
    axis = _axis(axis, codes.ndim, kind)
    if block < 0 or (block and axis is None):
        raise TechniqueError(f"block must be 0, or > 0 with an axis, but got {block=} with {axis=}")
    layout = Layout(kind, codes.shape, bits, axis=axis, block=block, half_scale=factor.dtype == np.float16)
    if factor.shape != layout.scale_shape:
        raise TechniqueError(
            f"the scale of codes {codes.shape} with {axis=}, {block=} must have shape {layout.scale_shape}, "
            f"but got {factor.shape}"
        )
    layout = recipes.cheapest(layout.canonical())
    return encoded(layout, codes=codes.astype(np.int8), scale=factor.reshape(layout.scale_shape))


def _scale_array(scale: Array | float) -> Array:
    factor = np.asarray(scale)
    if factor.dtype not in (np.float32, np.float16):
        factor = factor.astype(np.float32)
    if not np.isfinite(factor).all():
        raise TechniqueError("scales must be finite, but some are not; check the weight for NaN or infinity")
    return factor


def _axis(axis: int | None, rank: int, kind: str) -> int | None:
    if axis is None:
        return None
    if not -rank <= axis < rank:
        raise TechniqueError(f"axis of a {kind} encoding must be in {-rank}..{rank - 1}, but got {axis}")
    return axis % rank


def palette(indices: Array, codebook: Array, bits: int) -> Encoded:
    """Indices (any shape) of 1..8 bits into codebook (levels,), or (groups, levels) with groups along axis 0.

    The codebook is float32 (value = codebook[index]) or int8 (an integer tensor, as `int_tensor` gives). With
    groups, rows are split into that many equal runs; each has its own codebook. Folded at load.
    """
    indices, book = np.asarray(indices), np.asarray(codebook)
    require_elements(indices.shape, "palette")
    require_bits(bits, 1, 8, "palette")
    require_codes(indices, bits, signed=False, kind="palette")
    if book.ndim not in (1, 2) or book.shape[-1] == 0 or book.dtype not in (np.float32, np.int8):
        raise TechniqueError(
            "a codebook must be float32 or int8 of shape (levels,) or (groups, levels), "
            f"but got {book.dtype} {book.shape}"
        )
    groups, levels = (1, len(book)) if book.ndim == 1 else book.shape
    rows = indices.shape[0] if indices.ndim else 1
    if groups > rows or rows % groups:
        raise TechniqueError(f"the groups of a codebook must divide the {rows} rows (axis 0), but got {groups}")
    if levels > 1 << bits or int(indices.max()) >= levels:
        raise TechniqueError(
            f"indices must be below the codebook's {levels} levels, and those at most 2**bits = {1 << bits}, "
            f"but the largest index is {int(indices.max())}"
        )
    layout = Layout("palette", indices.shape, bits, groups=groups, levels=levels, integer=book.dtype == np.int8)
    book = book.reshape(-1) if groups == 1 else book
    return encoded(recipes.cheapest(layout), indices=indices.astype(np.uint8), codebook=book)


def product(indices: Array, codebook: Array, bits: int, *, stages: int = 1) -> Encoded:
    """Rows of vectors, each a run of columns named by an index (Jegou 2011, product quantization, TPAMI 33).

    indices (rows, stages * groups) of 1..8 bits; codebook (stages * groups, levels, width) float32 or float16 (stored
    so, widened). Columns run in `groups` of `width`; index j of stage s picks from codebook s * groups + j, and the
    stages are summed (residual quantization). Shape (rows, groups * width), float32. Raises TechniqueError.
    """
    indices, book = np.asarray(indices), np.asarray(codebook)
    require_elements(indices.shape, "product")
    require_bits(bits, 1, 8, "product")
    require_codes(indices, bits, signed=False, kind="product")
    if book.ndim != 3 or book.size == 0 or book.dtype not in (np.float32, np.float16):
        raise TechniqueError(
            "the codebooks of a product must be float32 or float16 of shape (stages * groups, levels, width), "
            f"but got {book.dtype} {book.shape}"
        )
    count, levels, width = book.shape
    if indices.ndim != 2 or indices.shape[1] != count or stages < 1 or count % stages:
        raise TechniqueError(
            f"a product needs indices (rows, {count}), one a codebook, in {stages} equal stages, "
            f"but got {indices.shape}"
        )
    if levels > 1 << bits or int(indices.max()) >= levels:
        raise TechniqueError(
            f"indices must be below the codebooks' {levels} levels, and those at most 2**bits = {1 << bits}, "
            f"but the largest index is {int(indices.max())}"
        )
    if not np.isfinite(book).all():
        raise TechniqueError("codebooks must be finite, but some values are not; check the table for large values")
    shape = (len(indices), count // stages * width)
    half = book.dtype == np.float16
    layout = Layout("product", shape, bits, groups=count // stages, levels=levels, stages=stages, half_scale=half)
    return encoded(recipes.cheapest(layout), indices=indices.astype(np.uint8), codebook=book)


def bitmask(
    values: Array, mask: Array, *, scale: Array | float | None = None, bits: int = 8, axis: int | None = None
) -> Encoded:
    """Mask (any shape) bool; values (count of True,) in C order: float32, or with `scale` int codes of 2..8 bits.

    What the mask leaves out is zero. Scale is () or (channels,) for `axis`.
    """
    mask, values = np.asarray(mask, bool), np.asarray(values).reshape(-1)
    require_elements(mask.shape, "bitmask")
    count = int(np.count_nonzero(mask))
    if len(values) != count:
        raise TechniqueError(f"a bitmask needs one value for each of its {count} set bits, but got {len(values)}")
    if scale is None:
        layout = Layout("bitmask", mask.shape, 32, nnz=count)
        return encoded(recipes.cheapest(layout), mask=mask, values=values.astype(np.float32))
    require_bits(bits, 2, 8, "bitmask")
    if count:
        require_codes(values, bits, signed=True, kind="bitmask")
    factor, axis = _scale_array(scale), _axis(axis, mask.ndim, "bitmask")
    layout = Layout(
        "bitmask", mask.shape, bits, axis=axis, nnz=count, integer=True, half_scale=factor.dtype == np.float16
    )
    if factor.shape != layout.scale_shape:
        raise TechniqueError(f"the scale of this bitmask must have shape {layout.scale_shape}, but got {factor.shape}")
    layout = recipes.cheapest(layout.canonical())
    factor = factor.reshape(layout.scale_shape)
    return encoded(layout, mask=mask, values=values.astype(np.int8), scale=factor)


def float16(values: Array) -> Encoded:
    """Values rounded to float16 (nearest), widened at load. Raises TechniqueError where finite values overflow."""
    values = np.asarray(values)
    require_elements(values.shape, "float16")
    with np.errstate(over="ignore"):
        half = values.astype(np.float16)
    lost = np.isfinite(values) & ~np.isfinite(half)
    if lost.any():
        raise TechniqueError(
            f"float16 holds magnitudes up to 65504, but {int(lost.sum())} values are larger "
            f"(up to {float(np.abs(values[lost]).max()):.6g}); keep this tensor in float32"
        )
    return encoded(Layout("float16", values.shape), values=half)


def int_tensor(codes: Array, bits: int = 8) -> Encoded:
    """Codes (any shape) int of 2..8 bits -> an int8 tensor, for use under the DequantizeLinear of integer kernels."""
    codes = np.asarray(codes)
    require_elements(codes.shape, "int_tensor")
    require_bits(bits, 2, 8, "int_tensor")
    require_codes(codes, bits, signed=True, kind="int_tensor")
    return encoded(recipes.cheapest(Layout("int_tensor", codes.shape, bits)), codes=codes.astype(np.int8))


def encoded(layout: Layout, **fields: Array) -> Encoded:
    """Bundle fields with the size of their layout."""
    owned = {k: np.array(v, order="C") for k, v in fields.items()}
    return Encoded(layout.kind, layout.shape, recipes.nbytes(layout), owned, layout)


def decode(encoded: Encoded) -> Array:
    """The float32 (or int8) tensor, bit for bit as the runtime computes it."""
    layout, fields = encoded.layout, encoded.fields
    kind = layout.inner if layout.kind == "lookup" else layout.kind
    match kind:
        case "linear" | "dequantize":
            return _times_scale(fields["codes"], fields["scale"], layout)
        case "palette":
            return _look_up(fields["indices"], fields["codebook"], layout)
        case "product":
            return _sum_of_vectors(fields["indices"], fields["codebook"], layout)
        case "bitmask":
            dense = np.zeros(layout.shape, fields["values"].dtype)
            dense[fields["mask"]] = fields["values"]
            return _times_scale(dense, fields["scale"], layout) if layout.integer else dense
        case "float16":
            return np.asarray(fields["values"].astype(np.float32))
        case _:
            return np.array(fields["codes"])


def _times_scale(codes: Array, scale: Array, layout: Layout) -> Array:
    factor = scale.astype(np.float32)
    if layout.axis is not None and layout.block:
        size = layout.shape[layout.axis]
        factor = np.repeat(factor, layout.block, axis=layout.axis).take(np.arange(size), axis=layout.axis)
    elif layout.axis is not None:
        factor = factor.reshape(-1, *(1,) * (codes.ndim - layout.axis - 1))
    return np.asarray(codes.astype(np.float32) * factor)


def _look_up(indices: Array, book: Array, layout: Layout) -> Array:
    if layout.groups == 1:
        return np.asarray(book.reshape(-1)[indices])
    rows = layout.shape[0] // layout.groups
    group = np.repeat(np.arange(layout.groups), rows).reshape(-1, *(1,) * (indices.ndim - 1))
    return np.asarray(book[group, indices])


def _sum_of_vectors(indices: Array, book: Array, layout: Layout) -> Array:
    vectors = book.astype(np.float32)[np.arange(indices.shape[1]), indices]
    return np.asarray(vectors.reshape(len(indices), layout.stages, layout.shape[1]).sum(axis=1, dtype=np.float32))


def arrays_of(encoded: Encoded) -> dict[str, Array]:
    """The arrays a recipe stores, by key, in any shape with the right elements in C order."""
    layout, fields = encoded.layout, encoded.fields
    if layout.kind == "float16":
        return {"values": fields["values"]}
    if layout.kind == "bitmask":
        padded = np.append(fields["values"], np.zeros(1, fields["values"].dtype))
        mask = np.packbits(fields["mask"].reshape(-1), bitorder="little")
        if not layout.integer:
            return {"mask": mask, "values": padded}
        return {"mask": mask, "scale": fields["scale"], **_codes.pack(padded, layout)}
    if layout.kind == "lookup":
        if layout.inner == "palette":
            return {**_rows.pack_rows(fields["indices"], layout), "codebook": _stored_book(encoded)}
        if layout.inner == "product":
            return {**_rows.pack_rows(fields["indices"], layout.product_codes), "codebook": fields["codebook"]}
        return {**_rows.pack_rows(fields["codes"], layout), "scale": fields["scale"]}
    if layout.kind == "palette":
        return {**_codes.pack(fields["indices"], layout), "codebook": _stored_book(encoded)}
    if layout.kind == "product":
        return {**_codes.pack(fields["indices"], layout.product_codes), "codebook": fields["codebook"]}
    codes = fields["codes"]
    if layout.block and layout.kind == "linear" and layout.axis is not None:
        missing = layout.n_blocks * layout.block - layout.shape[layout.axis]
        codes = np.pad(codes, [(0, missing if i == layout.axis else 0) for i in range(codes.ndim)])
    packed = _codes.pack(codes.reshape(layout.code_shape), layout)
    return packed if layout.kind == "int_tensor" else {**packed, "scale": fields["scale"]}


def _stored_book(encoded: Encoded) -> Array:
    book: Array = encoded.fields["codebook"]
    missing = encoded.layout.book_levels - book.shape[-1]
    return np.pad(book, (0, missing), mode="edge") if missing else book


def from_arrays(arrays: dict[str, Array], layout: Layout) -> Encoded:
    """Inverse of `arrays_of`."""
    if layout.kind == "float16":
        return encoded(layout, values=arrays["values"].reshape(layout.shape))
    if layout.kind == "bitmask":
        mask = np.unpackbits(arrays["mask"], bitorder="little")[: layout.size].astype(bool).reshape(layout.shape)
        if not layout.integer:
            return encoded(layout, mask=mask, values=arrays["values"][:-1])
        values = _codes.unpack(arrays, layout, (layout.nnz + 1,), signed=True)[:-1]
        return encoded(layout, mask=mask, values=values, scale=arrays["scale"].reshape(layout.scale_shape))
    if "product" in (layout.kind, layout.inner):
        held = layout.product_codes
        if layout.kind == "lookup":
            indices = _rows.unpack_rows(arrays, held, signed=False)
        else:
            indices = _codes.unpack(arrays, held, held.shape, signed=False)
        book = arrays["codebook"].reshape(layout.stages * layout.groups, layout.levels, -1)
        return encoded(layout, indices=indices, codebook=book)
    if layout.kind == "lookup":
        codes = _rows.unpack_rows(arrays, layout, signed=layout.inner == "linear")
        if layout.inner == "palette":
            return encoded(layout, indices=codes, codebook=arrays["codebook"])
        return encoded(layout, codes=codes, scale=arrays["scale"].reshape(layout.scale_shape))
    if layout.kind == "palette":
        indices = _codes.unpack(arrays, layout, layout.shape, signed=False)
        return encoded(layout, indices=indices, codebook=arrays["codebook"])
    codes = _codes.unpack(arrays, layout, layout.code_shape, signed=True)
    if layout.kind == "int_tensor":
        return encoded(layout, codes=codes)
    if layout.block and layout.kind == "linear" and layout.axis is not None:
        joined = (*layout.shape[: layout.axis], -1, *layout.shape[layout.axis + 1 :])
        codes = codes.reshape(joined).take(np.arange(layout.shape[layout.axis]), axis=layout.axis)
    return encoded(layout, codes=codes, scale=arrays["scale"].reshape(layout.scale_shape))
