"""What this machine can do at best: multiply-accumulates per second through ONNX Runtime's own matrix kernels.

A model's MACs over the peak is a floor under its time, in float and in int8: it says how much a faster model could
still gain. Measured on this machine and on these kernels, not taken from a data sheet.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from featherweight.errors import RunError
from featherweight.runtime.sandbox import Worker
from featherweight.runtime.targets import quiet_cpus

ROWS, DEPTH, COLUMNS = 384, 768, 768


@dataclass(frozen=True, slots=True)
class Peaks:
    """10^9 multiply-accumulates per second of a (384 x 768) by (768 x 768) product: best and median of the calls."""

    float_gmacs: float
    int8_gmacs: float
    float_median_gmacs: float
    int8_median_gmacs: float
    threads: int

    def float_floor_ms(self, macs: int) -> float:
        """Least time of so many MACs in float."""
        return macs / self.float_gmacs / 1e6

    def int8_floor_ms(self, macs: int) -> float:
        """Least time of so many MACs in int8."""
        return macs / self.int8_gmacs / 1e6


def gemm_peaks(*, threads: int = 1, seconds: float = 1.0, worker: Worker | None = None) -> Peaks:
    """Measure both peaks, interleaved call by call for about `seconds`, in a child process."""
    if not seconds > 0:
        raise RunError(f"seconds must be > 0, but got {seconds}")
    if worker is not None:
        return worker.call(_peaks, threads, seconds, doing="measuring matrix speed")
    with Worker(cpus=quiet_cpus(threads)) as own:
        return own.call(_peaks, threads, seconds, doing="measuring matrix speed")


def _peaks(threads: int, seconds: float) -> Peaks:
    from featherweight.runtime import ort

    rng = np.random.default_rng(0)
    sides: list[tuple[Any, dict[str, Any], list[float]]] = [
        (ort.session(float_matmul(), threads=threads), {"x": rng.standard_normal((ROWS, DEPTH), np.float32)}, []),
        (ort.session(int8_matmul(), threads=threads), {"x": rng.integers(0, 255, (ROWS, DEPTH), np.uint8)}, []),
    ]
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(sides[0][2]) < 5:
        for session, feeds, times in sides:
            start = time.perf_counter_ns()
            session.run(feeds)
            times.append(float(time.perf_counter_ns() - start))
    macs = ROWS * DEPTH * COLUMNS
    floats, ints = sides[0][2], sides[1][2]
    best, middle = ([macs / f(t) for t in (floats, ints)] for f in (min, statistics.median))
    return Peaks(best[0], best[1], middle[0], middle[1], threads)


def float_matmul() -> bytes:
    """Float32 product y = x w, w constant."""
    from onnx import TensorProto, helper, numpy_helper

    w = np.random.default_rng(1).standard_normal((DEPTH, COLUMNS), np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    return _model([node], [numpy_helper.from_array(w, "w")], TensorProto.FLOAT, TensorProto.FLOAT)


def int8_matmul() -> bytes:
    """Product of x uint8 and constant w int8 within 6 bits (no pair saturates on any CPU), requantised to uint8."""
    from onnx import TensorProto, helper, numpy_helper

    w = np.random.default_rng(1).integers(-63, 64, (DEPTH, COLUMNS), np.int8)
    constants = {
        "x_scale": np.float32(0.02),
        "x_zero": np.uint8(128),
        "w": w,
        "w_scale": np.float32(0.01),
        "w_zero": np.int8(0),
        "y_scale": np.float32(0.1),
        "y_zero": np.uint8(128),
    }
    node = helper.make_node(
        "QLinearMatMul", ["x", "x_scale", "x_zero", "w", "w_scale", "w_zero", "y_scale", "y_zero"], ["y"]
    )
    tensors = [numpy_helper.from_array(np.asarray(v), k) for k, v in constants.items()]
    return _model([node], tensors, TensorProto.UINT8, TensorProto.UINT8)


def _model(nodes: list[Any], tensors: list[Any], x_type: int, y_type: int) -> bytes:
    from onnx import helper

    x = helper.make_tensor_value_info("x", x_type, [ROWS, DEPTH])
    y = helper.make_tensor_value_info("y", y_type, [ROWS, COLUMNS])
    graph = helper.make_graph(nodes, "peak", [x], [y], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())
