"""Small ONNX models for the tests, made with onnx.helper."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto, helper, numpy_helper


def save(path, nodes, inputs, outputs, tensors=(), opset=17):
    """Inputs and outputs as (name, shape) of float32, or (name, shape, type)."""

    def info(name, shape, kind=TensorProto.FLOAT):
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        nodes,
        "small",
        [info(*i) for i in inputs],
        [info(*o) for o in outputs],
        [numpy_helper.from_array(v, k) for k, v in dict(tensors).items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path


def linear(path, w, *, softmax=False):
    """y = x w, x (rows, k) -> y (rows, n)."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["z" if softmax else "y"], name="product")]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["z"], ["y"], name="soft"))
    k, n = w.shape
    return save(path, nodes, [("x", ["rows", k])], [("y", ["rows", n])], {"w": w.astype(np.float32)})


def conv_relu(path):
    """Conv -> Relu (fused by the runtime) -> GlobalAveragePool."""
    w = np.random.default_rng(0).standard_normal((16, 16, 3, 3)).astype(np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"], name="relu1"),
        helper.make_node("GlobalAveragePool", ["r"], ["y"], name="pool1"),
    ]
    return save(path, nodes, [("x", [1, 16, 32, 32])], [("y", [1, 16, 1, 1])], {"w": w})
