"""Between tensors of an ONNX graph and those of torch.

torch computes on fewer integer types than ONNX has, so 16 to 64-bit unsigned ones are held wider, and codes of less
than 8 bits in 8. What leaves a graph is cast to the type that the graph declares (see `as_declared`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from featherweight.errors import ModelError

_T = ir.DataType
HELD: dict[ir.DataType, torch.dtype] = {
    _T.FLOAT: torch.float32, _T.DOUBLE: torch.float64, _T.FLOAT16: torch.float16, _T.BFLOAT16: torch.bfloat16,
    _T.INT8: torch.int8, _T.INT16: torch.int16, _T.INT32: torch.int32, _T.INT64: torch.int64, _T.BOOL: torch.bool,
    _T.UINT8: torch.uint8, _T.UINT16: torch.int32, _T.UINT32: torch.int64, _T.UINT64: torch.int64,
    _T.INT4: torch.int8, _T.UINT4: torch.uint8,
    _T.FLOAT8E4M3FN: torch.float32, _T.FLOAT8E4M3FNUZ: torch.float32,
    _T.FLOAT8E5M2: torch.float32, _T.FLOAT8E5M2FNUZ: torch.float32,
}  # fmt: skip
"""The torch type in which a tensor of each ONNX type is held; strings and complex numbers have none."""

FLOATS = frozenset({_T.FLOAT, _T.DOUBLE, _T.FLOAT16, _T.BFLOAT16})
"""Types that carry gradients."""

RANGES: dict[ir.DataType, tuple[int, int]] = {
    _T.UINT4: (0, 15), _T.INT4: (-8, 7), _T.UINT8: (0, 255), _T.INT8: (-128, 127),
    _T.UINT16: (0, 65535), _T.INT16: (-32768, 32767), _T.INT32: (-(2**31), 2**31 - 1),
}  # fmt: skip
"""Least and greatest code of each type that QuantizeLinear and DequantizeLinear know."""
for _kind in _T:
    if _kind.name in ("UINT2", "INT2"):  # newer releases of the format
        HELD[_kind] = torch.uint8 if _kind.name == "UINT2" else torch.int8
        RANGES[_kind] = (0, 3) if _kind.name == "UINT2" else (-2, 1)


def held(dtype: ir.DataType) -> torch.dtype:
    """The torch type for `dtype`. Raises ModelError for strings and other types without arithmetic."""
    if dtype not in HELD:
        raise ModelError(f"tensors of type {dtype.name} cannot be computed on here; cut them off the graph first")
    return HELD[dtype]


def from_ir(tensor: ir.TensorProtocol) -> Tensor:
    """A torch copy of a stored tensor. Raises ModelError for types without arithmetic."""
    kind = held(tensor.dtype)
    array = np.asarray(tensor.numpy())
    if tensor.dtype == _T.BFLOAT16:
        return torch.from_numpy(array.astype(np.float32)).to(torch.bfloat16)
    if tensor.dtype in (_T.UINT16, _T.UINT32, _T.UINT64):
        array = array.astype(np.int64)
    elif array.dtype.kind not in "fiub" or tensor.dtype not in FLOATS:
        # ml_dtypes' own types (int4, float8) have no torch counterpart by buffer.
        array = array.astype(torch.empty(0, dtype=kind).numpy().dtype)
    return torch.from_numpy(np.array(array, order="C")).to(kind)


def from_array(array: np.ndarray[Any, Any]) -> Tensor:
    """A torch tensor of a numpy array as the runtime gives or takes it."""
    return from_ir(ir.Tensor(np.ascontiguousarray(array) if array.ndim else array))


def to_array(tensor: Tensor, dtype: ir.DataType) -> np.ndarray[Any, Any]:
    """A numpy array of ONNX type `dtype`: values rounded to narrower floats as numpy does."""
    plain = tensor.detach().cpu()
    if plain.dtype == torch.bfloat16:
        plain = plain.float()
    return np.array(plain.numpy().astype(dtype.numpy()), order="C")


def as_declared(tensor: Tensor, dtype: ir.DataType | None) -> Tensor:
    """`tensor` in the type its graph declares; codes are held as floats so that gradients pass."""
    if dtype is None or dtype not in HELD or HELD[dtype] == tensor.dtype:
        return tensor
    if dtype in FLOATS or not tensor.is_floating_point():
        return tensor  # float64 and wider integers are the caller's wish
    return tensor.to(HELD[dtype])
