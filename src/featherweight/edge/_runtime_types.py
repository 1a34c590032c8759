"""Types of tensors that shape inference cannot tell, asked of the runtime, which must know them to load the model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from featherweight.errors import ModelError, RunError
from featherweight.graph import io
from featherweight.runtime.sandbox import Worker

Shape = tuple[int | str | None, ...]
Found = dict[str, tuple[ir.DataType, Shape]]
_TIMEOUT_S = 300.0
_TYPES = (
    ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BOOL,
    ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32, ir.DataType.INT64,
    ir.DataType.UINT8, ir.DataType.UINT16, ir.DataType.UINT32, ir.DataType.UINT64,
)  # fmt: skip


def ask(model: ir.Model, names: Sequence[str]) -> Found:
    """Type and symbolic shape by name, of those the runtime can tell. The model is loaded in a child process."""
    try:
        proto = onnx.load_from_string(io.to_bytes(model))
        known = {o.name for o in proto.graph.output}
        proto.graph.output.extend(onnx.ValueInfoProto(name=n) for n in names if n not in known)
        with Worker() as worker:
            told = worker.call(output_types, proto.SerializeToString(), timeout_s=_TIMEOUT_S, doing="loading the model")
    except (RunError, ModelError):
        return {}
    dtypes = {str(np.dtype(d.numpy())): d for d in _TYPES}
    return {n: (dtypes[t], shape) for n, t, shape in told if n in set(names) and t in dtypes}


def output_types(model: bytes) -> list[tuple[str, str, Shape]]:
    """Name, numpy type and shape of each output of a loaded model; runs in the child."""
    from featherweight.runtime import ort

    return [(o.name, o.dtype, o.shape) for o in ort.session(model, optimize=False).outputs]
