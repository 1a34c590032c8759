"""From a matrix of codes to an encoding of the tensor in its stored layout: where its scales lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from featherweight.core import Site
from featherweight.errors import TechniqueError
from featherweight.graph import encode
from featherweight.graph import weights as graph_weights
from featherweight.graph.encode import Encoded
from featherweight.graph.encode.layout import Kind
from featherweight.graph.weights import Weight

F32 = npt.NDArray[np.float32]


@dataclass(frozen=True)
class ScalePlace:
    """`axis` and `block` as encode.linear wants them; `rows` the matrix row of each scale, in the scale's shape."""

    axis: int
    block: int
    rows: npt.NDArray[np.int64]


# Below this many elements the nodes that decode a weight cost more than they save.
MIN_ELEMENTS = 64
VOCABULARY_ROWS = 2048
HALF_HIGH = 6e4
HALF_STEP = 2.0**-25  # largest error of a float16 below its normal range
_places: dict[tuple[object, ...], ScalePlace] = {}


def sites(model: ir.Model) -> Iterator[Site]:
    """Every stored float weight that is worth encoding, in sub-graphs too."""
    for weight in graph_weights.weights(model, min_elements=MIN_ELEMENTS):
        nodes = tuple(use.path for use in weight.uses)
        yield Site(weight.name, "weight", (weight.name,), nodes, weight.size_bytes)


def find(model: ir.Model, name: str) -> Weight:
    """The weight called `name`. Raises TechniqueError if the model has none."""
    for weight in graph_weights.weights(model):
        if weight.name == name:
            return weight
    raise TechniqueError(f"a weight site must name a stored float weight, but {name!r} is none in this model")


def row_place(weight: Weight) -> ScalePlace:
    """Where one scale a matrix row lies in the stored layout. Remembered by layout, as it reads a whole tensor."""
    use = weight.main_use
    layout = tuple(str(node.attributes.get("perm")) for node in use.layout)
    key = (weight.shape, weight.matrix_shape, weight.channel_axis, use.role, use.groups, layout)
    if key not in _places:
        _places[key] = _row_place(weight)
    return _places[key]


def _row_place(weight: Weight) -> ScalePlace:
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
    # With one group and rows along one axis, the reduced entries are one axis if all others have size 1.
    place = row_place(weight)
    others = [a for a, n in enumerate(weight.shape) if a != place.axis and n > 1]
    one_axis = place.block == 0 and len(place.rows) == out and len(others) == 1
    return others[0] if one_axis and weight.shape[others[0]] == k else None


def nbits_kernel(weight: Weight) -> bool:
    """True if the runtime can turn a blocked DequantizeLinear of this weight into MatMulNBits."""
    use = weight.uses[0]
    plain = len(weight.uses) == 1 and use.role == "matmul" and not use.layout
    return plain and len(weight.shape) == 2 and block_axis(weight) == 0


def encoded(weight: Weight, codes: npt.NDArray[np.int8], scale: F32, bits: int, block: int, *, nbits: bool) -> Encoded:
    """Codes (g, out, k) and scale (g, out[, blocks]) in the stored layout of `weight`."""
    stored = weight.from_matrix(codes)
    kept: npt.NDArray[np.floating] = scale
    if not nbits and half_scale(scale, bits):
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


def half_scale(scale: F32, bits: int) -> bool:
    """True if float16 scales are precise enough: off by less than 2**-(bits + 3) of themselves.

    That adds under a hundredth to the noise of rounding to `bits`, and at most 1e-7.
    """
    smallest = HALF_STEP * 2.0 ** (min(bits, 8) + 3)
    return bool(scale.min() >= smallest and scale.max() <= HALF_HIGH)


def encoded_bytes(weight: Weight, bits: int, block: int, *, nbits: bool, half: bool) -> int:
    """Bytes that `encoded` will take, from shapes alone; `half`: with float16 scales."""
    if block:
        axis, size = block_axis(weight), block
    else:
        place = row_place(weight)
        axis, size = place.axis, place.block
    kind: Kind = "dequantize" if nbits else "lookup" if looked_up(weight) and not block else "linear"
    return encode.sizes(weight.shape, kind, bits, axis=axis, block=size, half_scale=half and not nbits)


def looked_up(weight: Weight) -> bool:
    """True for vocabularies: tables so long that a call reads few rows, which are then decoded one by one."""
    gathers = all(u.role == "gather" and not u.layout and gather_axis(u.node) == 0 for u in weight.uses)
    return gathers and len(weight.shape) == 2 and weight.shape[0] >= VOCABULARY_ROWS


def gather_axis(node: ir.Node) -> int:
    """The axis a Gather takes from."""
    axis = node.attributes.get("axis")
    return 0 if axis is None else int(axis.as_int())


def attach(model: ir.Model, weight: Weight, coded: Encoded) -> tuple[ir.Value, int]:
    """Write `coded` in place of the weight: the decoded value and the bytes it takes."""
    by_row = coded.kind in ("palette", "product") or (coded.kind == "linear" and not coded.layout.block)
    if looked_up(weight) and by_row and (coded.layout.groups == 1 or coded.kind == "product"):
        coded = encode.lookup(coded)
    return encode.attach(model, weight.value, coded), coded.nbytes
