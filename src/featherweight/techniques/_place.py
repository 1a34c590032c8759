"""From a matrix of codes to an encoding of the tensor in its stored layout: where its scales lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.errors import TechniqueError
from featherweight.graph import encode
from featherweight.graph import weights as graph_weights
from featherweight.graph.encode import recipes
from featherweight.graph.encode.layout import Encoded, Kind, Layout
from featherweight.graph.weights import Weight

F32 = npt.NDArray[np.float32]
#: Scales inside float16's normal range lose at most 2**-11 of themselves: noise below 1e-7 for half the bytes.
HALF_LOW, HALF_HIGH = 6.2e-5, 6e4


@dataclass(frozen=True)
class ScalePlace:
    """`axis` and `block` as encode.linear wants them; `rows` the matrix row of each scale, in the scale's shape."""

    axis: int
    block: int
    rows: npt.NDArray[np.int64]


def find(model: ir.Model, name: str) -> Weight:
    """The weight called `name`. Raises TechniqueError if the model has none."""
    for weight in graph_weights.weights(model):
        if weight.name == name:
            return weight
    raise TechniqueError(f"a weight site must name a stored float weight, but {name!r} is none in this model")


def row_place(weight: Weight) -> ScalePlace:
    """Where one scale a matrix row lies in the stored layout."""
    g, out, k = weight.matrix_shape
    ids = np.broadcast_to(np.arange(g * out).reshape(g, out, 1), (g, out, k))
    stored = weight.from_matrix(ids)
    constant = [a for a in range(stored.ndim) if (stored == stored.take([0], axis=a)).all()]
    varying = [a for a in range(stored.ndim) if a not in constant]
    if len(varying) <= 1:
        axis = varying[0] if varying else 0
        index = tuple(slice(None) if a == axis else 0 for a in range(stored.ndim))
        return ScalePlace(axis, 0, stored[index].astype(np.int64))
    if constant:
        # Two axes number the rows (directions and gates, batches and columns): one block spans a reduced axis.
        axis = max(constant, key=lambda a: stored.shape[a])
        return ScalePlace(axis, stored.shape[axis], stored.take([0], axis=axis).astype(np.int64))
    block = stored.shape[0] // g  # grouped ConvTranspose: groups lie along axis 0
    return ScalePlace(0, block, stored[::block].astype(np.int64))


def block_axis(weight: Weight) -> int | None:
    """Axis of the stored layout that is the whole reduced dimension, in order; None if there is no such axis."""
    g, out, k = weight.matrix_shape
    if g != 1 or k < 2 or len(weight.shape) < 2 or weight.main_use.role == "gather":
        return None
    small = weight.shape.count(k) and [a for a, n in enumerate(weight.shape) if n == k]
    if not small:
        return None
    stored = weight.from_matrix(np.broadcast_to(np.arange(k), (1, out, k)))
    for axis in small:
        line = np.arange(k).reshape(-1, *[1] * (stored.ndim - axis - 1))
        if (stored == line).all():
            return axis
    return None


def nbits_kernel(weight: Weight) -> bool:
    """True if the runtime can turn a blocked DequantizeLinear of this weight into MatMulNBits."""
    use = weight.uses[0]
    plain = len(weight.uses) == 1 and use.role == "matmul" and not use.layout
    return plain and len(weight.shape) == 2 and block_axis(weight) == 0


def encoded(weight: Weight, codes: npt.NDArray[np.int8], scale: F32, bits: int, block: int, *, nbits: bool) -> Encoded:
    """Codes (g, out, k) and scale (g, out[, blocks]) in the stored layout of `weight`."""
    stored = weight.from_matrix(codes)
    kept: npt.NDArray[np.floating] = scale
    if not nbits and scale.min() >= HALF_LOW and scale.max() <= HALF_HIGH:
        kept = scale.astype(np.float16)
    if not block:
        place = row_place(weight)
        return encode.linear(stored, kept.reshape(-1)[place.rows], bits, axis=place.axis, block=place.block)
    axis = block_axis(weight)
    if axis is None:
        raise TechniqueError(f"the reduced entries of {weight.name!r} are not one axis, so block must be 0")
    k = codes.shape[2]
    wide = weight.from_matrix(np.repeat(kept, block, axis=2)[..., :k])
    spread = wide.take(np.arange(0, k, block), axis=axis)
    writer = encode.dequantize if nbits else encode.linear
    return writer(stored, spread, bits, axis=axis, block=block)


def encoded_bytes(weight: Weight, bits: int, block: int, *, nbits: bool) -> int:
    """Bytes that `encoded` will take, from shapes alone (scales assumed to fit float16)."""
    if block:
        axis, size = block_axis(weight), block
    else:
        place = row_place(weight)
        axis, size = place.axis, place.block
    kind: Kind = "dequantize" if nbits else "linear"
    layout = Layout(kind, weight.shape, bits, axis=axis, block=size, half_scale=not nbits)
    return recipes.nbytes(recipes.cheapest(layout))
