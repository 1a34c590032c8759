"""Attention written out plainly: Q (heads, length, size) times K transposed, scaled, masked, softmax, times V.

The exporter's own form of `scaled_dot_product_attention` transposes K by way of three dimensions with sizes read at run
time, which neither a runtime's fusions nor whoever follows heads through the graph recognises.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch


def plain() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The translation table for `torch.onnx.export`."""
    return {torch.ops.aten.scaled_dot_product_attention.default: _attention}


def _attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    from onnxscript import opset18 as op
    from onnxscript.function_libs.torch_lib.ops import nn

    size = query.shape[-1] if query.shape is not None and len(query.shape) == 4 else None
    known = isinstance(size, int) and query.dtype == ir.DataType.FLOAT and not is_causal and not enable_gqa
    if not known or size is None or (attn_mask is not None and attn_mask.dtype != query.dtype):
        return nn.aten_scaled_dot_product_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa
        )
    factor = op.Constant(value_float=scale if scale is not None else 1 / math.sqrt(size))
    scores = op.Mul(op.MatMul(query, op.Transpose(key, perm=[0, 1, 3, 2])), factor)
    if attn_mask is not None:
        scores = op.Add(scores, attn_mask)
    return op.MatMul(op.Softmax(scores, axis=-1), value)
