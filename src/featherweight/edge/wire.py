"""Tensors made small for a slow link: 8-bit codes with a scale a channel, and zstd. Format: docs/serve.md.

    x ~ low[c] + scale[c] * code,   code in 0..255,   scale[c] = (max[c] - min[c]) / 255

so that each value is off by at most scale[c] / 2 (asymmetric linear quantization: Jacob et al. 2018, "Quantization and
training of neural networks for efficient integer-arithmetic-only inference"). A packet tells its own type and shape;
it is an extension of ours on top of the Open Inference Protocol, used only with servers that announce it.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import numpy.typing as npt

from featherweight.edge.protocol import ProtocolError
from featherweight.errors import MissingExtraError

try:
    import zstandard
except ImportError as e:
    raise MissingExtraError("packing tensors needs the package 'zstandard'; install featherweight[edge]") from e

EXTENSION = "featherweight_wire"
"""Announced in the server's metadata; a tensor sent so has the parameter of the same name, with the encoding's name."""
ENCODINGS = ("int8", "int8+zstd", "zstd")
MAX_RANK = 8
_MAGIC = b"FWT1"
_HEAD = struct.Struct("<4sBBBB")  # magic, codes (0 plain, 1 eight bits), zstd (0, 1), axis (255: none), rank
_NO_AXIS = 255
_LEVEL = 3
_SMALL_VALUES = 256
"""Below this many values 8 bits save less than their scales cost; such tensors are sent plain."""

F32 = npt.NDArray[np.float32]


def channel_axis(shape: tuple[int, ...]) -> int | None:
    """The axis that gets a scale each: channels of images (axis 1 of 4 and 5), the last of sequences (rank 3).

    None (one scale for all) where that axis is so long that scales would weigh more than a sixteenth of the codes.
    """
    axis = 1 if len(shape) >= 4 else len(shape) - 1
    if len(shape) < 2:
        return None
    return axis if 16 * 8 * shape[axis] <= math.prod(shape) else None


def encode(value: F32, encoding: str) -> bytes | None:
    """A float32 tensor as a packet; None where it cannot or need not be coded (few values, NaN or infinity).

    The caller then sends it plain: nothing is ever changed more than the formula says.
    """
    if encoding not in ENCODINGS:
        raise ValueError(f"encoding must be one of {', '.join(ENCODINGS)}, but got {encoding!r}")
    if value.dtype != np.float32 or value.size < _SMALL_VALUES or value.ndim > MAX_RANK:
        return None
    eight, packed = encoding.startswith("int8"), encoding.endswith("zstd")
    axis = channel_axis(value.shape) if eight else None
    if eight:
        if not np.isfinite(value).all():
            return None
        payload = _quantized(value, axis)
    else:
        payload = np.ascontiguousarray(value, "<f4").tobytes()
    if packed:
        payload = zstandard.ZstdCompressor(level=_LEVEL).compress(payload)
    head = _HEAD.pack(_MAGIC, int(eight), int(packed), _NO_AXIS if axis is None else axis, value.ndim)
    return head + struct.pack(f"<{value.ndim}I", *value.shape) + payload


def _quantized(value: F32, axis: int | None) -> bytes:
    """lows, scales (float32, one a channel), then the codes."""
    others = None if axis is None else tuple(a for a in range(value.ndim) if a != axis)
    low = np.asarray(value.min(axis=others, keepdims=True), np.float64)
    high = np.asarray(value.max(axis=others, keepdims=True), np.float64)
    low32 = low.astype("<f4")
    scale = ((high - low) / 255).astype("<f4")
    steps = np.where(scale > 0, scale, 1).astype(np.float32)
    codes = np.clip(np.rint((value - low32) / steps), 0, 255).astype(np.uint8)
    return b"".join([low32.tobytes(), scale.tobytes(), codes.tobytes()])


def decode(packet: bytes | memoryview, shape: tuple[int, ...]) -> F32:
    """The tensor of a packet, which must have the declared `shape`.

    Memory is taken only once the packet's sizes agree with it. Raises ProtocolError for a packet that is not one.
    """
    if len(packet) < _HEAD.size:
        raise ProtocolError(f"a packed tensor must have at least {_HEAD.size} bytes, but got {len(packet)}")
    magic, eight, packed, axis, rank = _HEAD.unpack_from(packet)
    if magic != _MAGIC or eight > 1 or packed > 1 or rank > MAX_RANK or (axis != _NO_AXIS and axis >= rank):
        raise ProtocolError("a packed tensor must begin with FWT1 and known codes; this one does not")
    start = _HEAD.size + 4 * rank
    if len(packet) < start or struct.unpack_from(f"<{rank}I", packet, _HEAD.size) != shape:
        raise ProtocolError(f"a packed tensor must have the declared shape {list(shape)}, but has another")
    count = math.prod(shape)
    channels = 1 if axis == _NO_AXIS else shape[axis]
    size = count + 8 * channels if eight else 4 * count
    payload = _inflated(packet[start:], size) if packed else packet[start:]
    if len(payload) != size:
        raise ProtocolError(f"a packed tensor of shape {list(shape)} must hold {size} bytes, but holds {len(payload)}")
    if not eight:
        return np.frombuffer(payload, "<f4").astype(np.float32).reshape(shape)
    along = tuple(channels if a == axis else 1 for a in range(rank))
    low = np.frombuffer(payload, "<f4", channels).reshape(along)
    scale = np.frombuffer(payload, "<f4", channels, 4 * channels).reshape(along)
    if not (np.isfinite(low).all() and np.isfinite(scale).all()):
        raise ProtocolError("the scales of a packed tensor must be finite numbers")
    codes = np.frombuffer(payload, np.uint8, count, 8 * channels).reshape(shape)
    with np.errstate(over="ignore"):
        return np.asarray(low + scale * codes.astype(np.float32), np.float32)


def _inflated(data: bytes | memoryview, size: int) -> bytes:
    """Decompress to exactly `size` bytes; a frame that announces another size is refused before it is opened."""
    try:
        announced = zstandard.get_frame_parameters(data).content_size
        if announced != size:
            raise ProtocolError(f"a packed tensor must hold {size} bytes, but announces {announced}")
        return zstandard.ZstdDecompressor(max_window_size=1 << 27).decompress(
            data, max_output_size=size, allow_extra_data=False
        )
    except zstandard.ZstdError as e:
        raise ProtocolError(f"a packed tensor cannot be decompressed: {str(e)[:120]}") from None
