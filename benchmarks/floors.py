"""What no compression can beat: bytes of the weights at each width, time of the MACs at the machine's peak."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_ROWS, _WIDTH = 512, 1024
_REPEATS = 60
_PRODUCTS, _RECURRENT = ("Conv", "Gemm", "MatMul"), ("LSTM", "GRU")


@dataclass(frozen=True)
class Floors:
    """`bytes_at`: all weight matrices at that many bits, and nothing else. Rates are MAC/s of one thread."""

    bytes_at: dict[int, int]
    macs: int
    float_rate: float
    int8_rate: float

    @property
    def float_ms(self) -> float:
        """Time of the MACs at the measured float peak."""
        return self.macs / self.float_rate * 1e3

    @property
    def int8_ms(self) -> float:
        """Time of the MACs at the measured int8 peak."""
        return self.macs / self.int8_rate * 1e3


def floors(path: Path, feed: dict[str, np.ndarray]) -> Floors:
    """Floors of one call of the model at `path` with `feed`."""
    model = onnx.load(path)
    weights = sum(
        int(np.prod(w.dims)) for w in model.graph.initializer if w.data_type == TensorProto.FLOAT and len(w.dims) > 1
    )
    return Floors({b: -(-weights * b // 8) for b in range(8, 0, -1)}, macs(model, feed), *peaks())


def macs(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> int:
    """Multiply-accumulates of one call, from the shapes seen in a run: see `macs_by_node`."""
    return sum(macs_by_node(model, feed).values())


def macs_by_node(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, int]:
    """The same by the name of each node's output: Conv, Gemm, MatMul, LSTM and GRU (their default layout)."""
    import onnxruntime as ort

    shapes = {w.name: tuple(w.dims) for w in model.graph.initializer}
    nodes = [n for n in model.graph.node if n.op_type in (*_PRODUCTS, *_RECURRENT)]
    read = {v for n in nodes for v in n.input[: 3 if n.op_type in _RECURRENT else 2]}
    names = sorted((read | {_output(n) for n in nodes}) - shapes.keys() - feed.keys())
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    kept = {o.name for o in probe.graph.output}
    probe.graph.output.extend(onnx.ValueInfoProto(name=v) for v in names if v not in kept)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    shapes.update({k: v.shape for k, v in feed.items()})
    shapes.update({name: out.shape for name, out in zip(names, session.run(names, feed), strict=True)})
    return {_output(node): _node_macs(node, shapes) for node in nodes}


def _output(node: onnx.NodeProto) -> str:
    return str(next(o for o in node.output if o))


def _node_macs(node: onnx.NodeProto, shapes: dict[str, tuple[int, ...]]) -> int:
    if node.op_type in _RECURRENT:
        # Steps and batch, times the input's and the state's matrices.
        return int(np.prod(shapes[node.input[0]][:2]) * sum(np.prod(shapes[w]) for w in node.input[1:3]))
    # A convolution's reduction is its kernel's volume; else the left factor's last axis (no transA here).
    reduced = np.prod(shapes[node.input[1]][1:]) if node.op_type == "Conv" else shapes[node.input[0]][-1]
    return int(np.prod(shapes[_output(node)]) * reduced)


def peaks() -> tuple[float, float]:
    """(float32, uint8 x int8) MAC/s of one thread on a 512 x 1024 x 1024 product, the best of 60 calls."""
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(_ROWS, _WIDTH)).astype(np.float32), rng.normal(size=(_WIDTH, _WIDTH)).astype(np.float32)
    ints = (
        rng.integers(0, 256, (_ROWS, _WIDTH)).astype(np.uint8),
        rng.integers(-63, 64, (_WIDTH, _WIDTH)).astype(np.int8),
    )
    return _rate("MatMul", *floats, TensorProto.FLOAT), _rate("MatMulInteger", *ints, TensorProto.INT32)


def _rate(op_type: str, a: np.ndarray, b: np.ndarray, out: int) -> float:
    import onnxruntime as ort

    graph = helper.make_graph(
        [helper.make_node(op_type, ["a", "b"], ["y"])],
        "peak",
        [helper.make_tensor_value_info("a", helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)],
        [helper.make_tensor_value_info("y", out, (_ROWS, _WIDTH))],
        [numpy_helper.from_array(b, "b")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    best = float("inf")
    for _ in range(_REPEATS):
        started = time.perf_counter()
        session.run(None, {"a": a})
        best = min(best, time.perf_counter() - started)
    return _ROWS * _WIDTH * _WIDTH / best
