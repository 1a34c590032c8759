"""Small models and data for whole runs, written to a folder; also what child scripts of the tests import."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CLASSES = 8


def convnet(folder: Path, *, width: int = 32, seed: int = 0) -> Path:
    """Conv - Relu - depthwise Conv - Relu - Conv - pool - Gemm with a symbolic batch; about 60 kB at width 32."""
    rng = np.random.default_rng(seed)

    def init(name: str, *shape: int) -> onnx.TensorProto:
        fan = max(int(np.prod(shape[1:])), 1)
        return numpy_helper.from_array((rng.normal(size=shape) / np.sqrt(fan)).astype(np.float32), name)

    nodes = [
        helper.make_node("Conv", ["x", "w1", "b1"], ["c1"], "stem", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu1"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "depthwise", pads=[1, 1, 1, 1], group=width),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("Conv", ["r2", "w3", "b3"], ["c3"], "body", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c3"], ["r3"], "relu3"),
        helper.make_node("GlobalAveragePool", ["r3"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w4", "b4"], ["logits"], "head", transB=1),
    ]
    weights = [
        init("w1", width, 3, 3, 3), init("b1", width), init("w2", width, 1, 3, 3), init("b2", width),
        init("w3", width, width, 3, 3), init("b3", width), init("w4", CLASSES, width), init("b4", CLASSES),
    ]  # fmt: skip
    graph = helper.make_graph(
        nodes,
        "convnet",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, 12, 12])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", CLASSES])],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "convnet.onnx"
    onnx.save(model, path)
    return path


def samples(folder: Path, model: Path, *, n: int = 120, seed: int = 1, labelled: bool = True) -> Path:
    """n inputs; labels are the model's own answers with a few wrong, so that accuracy is about 0.95."""
    import onnxruntime as ort

    rng = np.random.default_rng(seed)
    x = (rng.normal(size=(n, 3, 12, 12)) + rng.normal(size=(n, 3, 1, 1))).astype(np.float32)
    path = folder / ("labelled.npz" if labelled else "unlabelled.npz")
    if not labelled:
        np.savez(path, x=x)
        return path
    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    labels = session.run(None, {"x": x})[0].argmax(axis=1)
    wrong = rng.choice(n, n // 20, replace=False)
    labels[wrong] = (labels[wrong] + 1) % CLASSES
    np.savez(path, x=x, labels=labels)
    return path
