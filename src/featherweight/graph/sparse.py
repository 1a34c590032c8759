"""Sparse tensors of a file become dense ones, within bounded memory: everything behind the door is dense."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import onnx

from featherweight.errors import ModelError
from featherweight.graph import validate

MAX_SPARSE_BYTES = 1 << 28
"""A sparse tensor is stored dense from here on, so what it may grow to is bounded."""


def densify(proto: onnx.ModelProto, where: Path) -> None:
    """Turn sparse initializers and constants into dense tensors, in place; sub-graphs and functions included.

    Raises ModelError where one is malformed, or would be too large when dense.
    """
    for graph in validate.graphs(proto.graph):
        for sparse in graph.sparse_initializer:
            graph.initializer.append(_dense(sparse, where))
        del graph.sparse_initializer[:]
        _densify_nodes(graph.node, where)
    for function in proto.functions:
        _densify_nodes(function.node, where)


def _densify_nodes(nodes: Iterable[onnx.NodeProto], where: Path) -> None:
    for node in nodes:
        for attr in node.attribute:
            if node.op_type == "Constant" and attr.name == "sparse_value" and attr.HasField("sparse_tensor"):
                dense = _dense(attr.sparse_tensor, where)
                attr.Clear()
                attr.name, attr.type = "value", onnx.AttributeProto.TENSOR
                attr.t.CopyFrom(dense)


def _dense(sparse: onnx.SparseTensorProto, where: Path) -> onnx.TensorProto:
    name = sparse.values.name
    validate.check_tensor(sparse.values, where)
    validate.check_tensor(sparse.indices, where)
    n = 1
    for d in sparse.dims:
        n *= d
    try:
        values = onnx.numpy_helper.to_array(sparse.values)
        indices = onnx.numpy_helper.to_array(sparse.indices).astype(np.int64)
    except (ValueError, TypeError, OSError, onnx.checker.ValidationError) as e:
        raise ModelError(f"{where}: the sparse tensor {name!r} is malformed: {e}") from e
    if n * values.itemsize > MAX_SPARSE_BYTES or any(d < 0 for d in sparse.dims):
        raise ModelError(
            f"{where}: the sparse tensor {name!r} must be below {MAX_SPARSE_BYTES} B when dense, "
            f"but its shape is {list(sparse.dims)}; store it dense"
        )
    if indices.ndim == 2 and indices.shape[1] == len(sparse.dims):
        strides = np.cumprod([1, *reversed(sparse.dims[1:])])[::-1].astype(np.int64)
        inside = bool(((indices >= 0) & (indices < np.array(sparse.dims))).all())
        indices = indices @ strides
    else:
        inside = indices.ndim == 1
    inside = inside and indices.shape == (values.size,) and bool(((indices >= 0) & (indices < n)).all())
    if not inside:
        raise ModelError(f"{where}: the indices of the sparse tensor {name!r} do not fit its shape; it is corrupt")
    dense = np.zeros(n, values.dtype)
    dense[indices] = values.reshape(-1)
    return onnx.numpy_helper.from_array(dense.reshape(tuple(sparse.dims)), name)
