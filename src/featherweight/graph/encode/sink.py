"""Where a decode sub-graph is written to. One recipe per kind serves four sinks, so they cannot disagree:

`Tally` adds up bytes, `Writer` (write.py) makes nodes in a model, `Tree` keeps the expression that `read`
compares with a model's nodes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import onnx_ir as ir

H = TypeVar("H")
Attrs = tuple[tuple[str, int | str], ...]

FLOAT, FLOAT16, INT8, UINT8, INT4, UINT4, INT32, INT64, BOOL = (
    ir.DataType.FLOAT,
    ir.DataType.FLOAT16,
    ir.DataType.INT8,
    ir.DataType.UINT8,
    ir.DataType.INT4,
    ir.DataType.UINT4,
    ir.DataType.INT32,
    ir.DataType.INT64,
    ir.DataType.BOOL,
)
NARROW_FLOATS = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


class Sink(Protocol[H]):
    """Takes the constants and operators of a recipe; `H` stands for a value."""

    def data(self, key: str, shape: tuple[int, ...], dtype: ir.DataType) -> H:
        """A constant that carries the tensor's own data."""
        ...

    def fixed(self, array: np.ndarray[Any, Any]) -> H:
        """A small constant that follows from the layout."""
        ...

    def op(self, op_type: str, *inputs: H, **attrs: int | str) -> H:
        """A node with one output."""
        ...

    def shared(self, name: str, build: Callable[[Sink[H]], H]) -> H:
        """A value made once for the whole model."""
        ...


def cast(sink: Sink[H], value: H, to: ir.DataType) -> H:
    """Cast to a type."""
    return sink.op("Cast", value, to=int(to))


def tensor_bytes(shape: tuple[int, ...], dtype: ir.DataType) -> int:
    """Bytes of a tensor's data, sub-byte types packed."""
    n = 1
    for d in shape:
        n *= d
    return -(-n * dtype.bitwidth // 8)


_NAME = 6  # a short generated name with its tag and length
_SHARED_NAME = 7


class Tally:
    """Adds up the bytes of what a recipe writes, in the protobuf form. Its values are all 0."""

    def __init__(self, name_bytes: int = _NAME) -> None:
        self.nbytes, self._name = 0, name_bytes
        self.shared_names: dict[str, int] = {}

    def data(self, key: str, shape: tuple[int, ...], dtype: ir.DataType) -> int:  # noqa: ARG002 the Sink's names
        raw = tensor_bytes(shape, dtype)
        self.nbytes += raw + 2 + self._name + 2 + sum(_varint(d) for d in shape) + 2 * _varint(raw)
        return 0

    def fixed(self, array: np.ndarray[Any, Any]) -> int:
        self.nbytes += array.nbytes + 2 + self._name + 2 + 2 * array.ndim + 2
        return 0

    def op(self, op_type: str, *inputs: int, **attrs: int | str) -> int:
        self.nbytes += 2 + self._name * (len(inputs) + 2) + 2 + len(op_type) + sum(9 + len(k) for k in attrs)
        return 0

    def shared(self, name: str, build: Callable[[Sink[int]], int]) -> int:
        if name not in self.shared_names:
            inner = Tally(_SHARED_NAME)
            inner.shared_names = self.shared_names
            build(inner)
            self.shared_names[name] = inner.nbytes
        return 0


def _varint(value: int) -> int:
    """Bytes of a field's tag and a length or dimension of this value."""
    return 2 if value < 128 else 3 if value < 1 << 14 else 4 if value < 1 << 21 else 5


@dataclass(frozen=True)
class Data:
    """Leaf of a Tree: data under a key."""

    key: str
    shape: tuple[int, ...]
    dtype: ir.DataType


@dataclass(frozen=True, eq=False)
class Fixed:
    """Leaf of a Tree: a constant of known content."""

    array: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Free:
    """Leaf of a Tree: any value, but the same one wherever it appears (the indices of a lookup)."""


@dataclass(frozen=True)
class Op:
    """Inner node of a Tree."""

    op_type: str
    inputs: tuple[Any, ...]
    attrs: Attrs


class Tree:
    """Keeps a recipe as an expression of Op, Data and Fixed."""

    def data(self, key: str, shape: tuple[int, ...], dtype: ir.DataType) -> Any:
        return Data(key, shape, dtype)

    def fixed(self, array: np.ndarray[Any, Any]) -> Any:
        return Fixed(array)

    def op(self, op_type: str, *inputs: Any, **attrs: int | str) -> Any:
        return Op(op_type, inputs, tuple(sorted(attrs.items())))

    def shared(self, name: str, build: Callable[[Sink[Any]], Any]) -> Any:  # noqa: ARG002 the Sink's names
        return build(self)
