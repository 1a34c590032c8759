"""Small graphs for the graph tests, and a runner that takes models the way the pipeline does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from featherweight.errors import RunError
from featherweight.graph import io

Feeds = Sequence[Mapping[str, np.ndarray]]


def make_proto(
    nodes: Sequence[onnx.NodeProto],
    stored: Mapping[str, np.ndarray],
    *,
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str] | None] | None = None,
    opset: int = 21,
    ir_version: int = 10,
    domains: Mapping[str, int] | None = None,
    functions: Sequence[onnx.FunctionProto] = (),
    input_type: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    """One model from its parts; outputs default to `y` of unknown shape."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info(n, input_type, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in (outputs or {"y": None}).items()],
        [numpy_helper.from_array(a, n) for n, a in stored.items()],
    )
    imports = [helper.make_opsetid("", opset), *(helper.make_opsetid(d, v) for d, v in (domains or {}).items())]
    model = helper.make_model(graph, opset_imports=imports, functions=list(functions))
    model.ir_version = ir_version
    return model


@pytest.fixture(scope="session")
def proto() -> Callable[..., onnx.ModelProto]:
    """Build an onnx.ModelProto: see `make_proto`."""
    return make_proto


@pytest.fixture(scope="session")
def build() -> Callable[..., ir.Model]:
    """Build an ir.Model with the arguments of `make_proto`."""
    return lambda *a, **k: ir.serde.deserialize_model(make_proto(*a, **k))


def run_model(model: ir.Model | onnx.ModelProto | bytes, feeds: Feeds) -> list[dict[str, Any]]:
    """Outputs by name on ONNX Runtime, in this process; RunError if it refuses."""
    ort = pytest.importorskip("onnxruntime")
    if isinstance(model, ir.Model):
        model = io.to_bytes(model)
    elif isinstance(model, onnx.ModelProto):
        model = model.SerializeToString()
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    try:
        session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        wanted = {i.name for i in session.get_inputs()}
        return [
            dict(zip(names, session.run(None, {k: v for k, v in f.items() if k in wanted}), strict=True)) for f in feeds
        ]
    except Exception as e:  # the runtime has no common base class
        raise RunError(str(e)) from e


@pytest.fixture(scope="session")
def run() -> Callable[..., list[dict[str, Any]]]:
    """The Runner that normalise takes."""
    return run_model
