"""What an encoding looks like before any array exists: enough to know its bytes and to write its nodes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from featherweight.errors import TechniqueError

Kind = Literal["linear", "dequantize", "palette", "product", "bitmask", "float16", "int_tensor", "lookup"]
Form = Literal["int8", "int4", "planes"]
KINDS: tuple[Kind, ...] = (
    "linear", "dequantize", "palette", "product", "bitmask", "float16", "int_tensor", "lookup",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """The shape of an encoding.

    `bits` is the width of a code, `form` how codes are stored: a tensor of that type, or packed fields of 4, 2
    and 1 bits ("planes"). `axis` and `block` place the scales: none, one a channel of `axis`, or one for each
    `block` entries along `axis` (the last block may be short). `groups` > 1: a codebook for each of that many
    equal runs along axis 0; of a `product`, along axis 1. `stages`: codebooks whose vectors add up in a `product`.
    `nnz`: stored values of a bitmask. `half_scale`: scales (of a `product`, codebooks) stored as float16.
    `inner`: for a lookup, the kind that is looked up. `rank` is that of its indices, -1 if unknown.
    """

    kind: Kind
    shape: tuple[int, ...]
    bits: int = 16
    form: Form = "int8"
    axis: int | None = None
    block: int = 0
    groups: int = 1
    levels: int = 0
    stages: int = 1
    nnz: int = 0
    half_scale: bool = False
    integer: bool = False
    inner: Kind = "linear"
    rank: int = 1

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """() per tensor, (channels,) per channel, the tensor's shape with `axis` divided by `block` per block."""
        if self.axis is None:
            return ()
        if not self.block:
            return (self.shape[self.axis],)
        return (*self.shape[: self.axis], self.n_blocks, *self.shape[self.axis + 1 :])

    @property
    def n_blocks(self) -> int:
        """Blocks along `axis`, a short last one included."""
        return -(-self.shape[self.axis or 0] // self.block)

    @property
    def blocked_shape(self) -> tuple[int, ...]:
        """The shape with `axis` split in (blocks, block), padded to whole blocks."""
        axis = self.axis or 0
        return (*self.shape[:axis], self.n_blocks, self.block, *self.shape[axis + 1 :])

    def canonical(self) -> Layout:
        """The same with one scale placed per tensor: fewer bytes, and the runtime refuses one block in all."""
        one = self.axis is not None and math.prod(self.scale_shape) == 1
        return replace(self, axis=None, block=0) if one else self

    @property
    def book_levels(self) -> int:
        """Levels a codebook is stored with: all that a byte's fields can name where whole bytes are looked up."""
        by_byte = self.form == "planes" and self.groups == 1 and len(digits(self.bits)) == 1
        return 1 << self.bits if by_byte else self.levels

    @property
    def book_shape(self) -> tuple[int, int]:
        """Shape of a product's codebooks as stored: all vectors of all codebooks, one under another."""
        return (self.stages * self.groups * self.levels, self.shape[1] // self.groups)

    @property
    def product_codes(self) -> Layout:
        """The layout of a product's codes alone: (rows, stages * groups), one code a column."""
        return replace(self, shape=(self.shape[0], self.stages * self.groups), groups=1, stages=1)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """The shape in which codes are unpacked."""
        return self.blocked_shape if self.block and self.kind == "linear" else self.shape


@dataclass(frozen=True, eq=False)
class Encoded:
    """A constant tensor in coded form: pure arrays, no graph.

    `nbytes` is what it adds to a model file (its arrays and decode nodes; the tables shared by all encodings of
    a model, `shared_bytes`, not counted). `fields` are its arrays: `codes` or `indices`, `scale`, `codebook`, `mask`,
    `values`.
    """

    kind: Kind
    shape: tuple[int, ...]
    nbytes: int
    fields: Mapping[str, Any]
    layout: Layout

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Encoded):
            return NotImplemented
        return (
            self.layout == other.layout
            and self.fields.keys() == other.fields.keys()
            and all(np.array_equal(v, other.fields[k]) for k, v in self.fields.items())
        )

    __hash__ = None  # type: ignore[assignment]


def require_elements(shape: tuple[int, ...], kind: str) -> None:
    """Raises TechniqueError for an empty tensor."""
    if math.prod(shape) == 0:
        raise TechniqueError(
            f"a tensor must have at least one element to be encoded as {kind}, but its shape is {shape}; "
            "leave it as it is"
        )


def require_bits(bits: int, low: int, high: int, kind: str) -> None:
    """Raises TechniqueError unless low <= bits <= high."""
    if not low <= bits <= high:
        raise TechniqueError(f"bits of a {kind} encoding must be in {low}..{high}, but got {bits}")


def require_codes(codes: np.ndarray[Any, Any], bits: int, *, signed: bool, kind: str) -> None:
    """Raises TechniqueError unless codes are integers that fit `bits`."""
    if not np.issubdtype(codes.dtype, np.integer):
        raise TechniqueError(f"codes of a {kind} encoding must be integers, but their type is {codes.dtype}")
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    least, most = int(codes.min()), int(codes.max())
    if least < low or most > high:
        raise TechniqueError(
            f"codes of {bits} bits must be in {low}..{high}, but got {least}..{most}; clip them or use more bits"
        )


@lru_cache(maxsize=65536)
def digits(bits: int) -> tuple[tuple[int, int], ...]:
    """The stored fields of a code as (width, position of its lowest bit), widest and lowest first."""
    fields, position = [], 0
    for width in (4, 2, 1):
        if bits - position >= width:
            fields.append((width, position))
            position += width
    return tuple(fields)
