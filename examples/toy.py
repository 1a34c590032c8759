"""A small classifier and its data, made on the spot, so that the other examples need no download."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save

CLASSES, WIDTH, HIDDEN, SAMPLES = 10, 64, 512, 1500


def write(folder: Path) -> tuple[Path, Path]:
    """Write `model.onnx` (x (batch, 64) -> logits (batch, 10)) and `data.npz` (x, labels); return both paths."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 2 * SAMPLES)
    x = (rng.normal(size=(CLASSES, WIDTH))[labels] + 1.6 * rng.normal(size=(2 * SAMPLES, WIDTH))).astype(np.float32)

    # A network without a training loop: random features, and a last layer solved by least squares.
    w1 = (rng.normal(size=(WIDTH, HIDDEN)) / WIDTH**0.5).astype(np.float32)
    b1 = rng.normal(size=HIDDEN).astype(np.float32)
    hidden = np.maximum(x[:SAMPLES] @ w1 + b1, 0)
    gram = hidden.T @ hidden + 10 * np.eye(HIDDEN, dtype=np.float32)
    w2 = np.linalg.solve(gram, hidden.T @ np.eye(CLASSES, dtype=np.float32)[labels[:SAMPLES]]).astype(np.float32)

    graph = helper.make_graph(
        [
            helper.make_node("Gemm", ["x", "w1", "b1"], ["h"], name="features"),
            helper.make_node("Relu", ["h"], ["r"], name="relu"),
            helper.make_node("MatMul", ["r", "w2"], ["logits"], name="classify"),
        ],
        "toy",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", CLASSES])],
        [numpy_helper.from_array(a, n) for n, a in (("w1", w1), ("b1", b1), ("w2", w2))],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)])
    model.ir_version = 10
    folder.mkdir(parents=True, exist_ok=True)
    save(model, folder / "model.onnx")
    np.savez(folder / "data.npz", x=x[SAMPLES:], labels=labels[SAMPLES:])
    return folder / "model.onnx", folder / "data.npz"


if __name__ == "__main__":
    print(*write(Path("toy")))
