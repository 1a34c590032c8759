"""Time and memory of the calibration pass for 100 and 10,000 tiny batches: memory must not grow with them.

python benchmarks/statistics.py
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir


def small_model() -> ir.Model:
    rng = np.random.default_rng(0)
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", 64]))
    values, nodes = x, []
    weights = []
    for i in range(4):
        tensor = ir.tensor(rng.normal(size=(64, 64)).astype(np.float32), name=f"w{i}")
        w = ir.Value(name=f"w{i}", const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([64, 64]))
        weights.append(w)
        nodes.append(ir.node("MatMul", [values, w], name=f"m{i}"))
        nodes.append(ir.node("Relu", [nodes[-1].outputs[0]], name=f"r{i}"))
        nodes[-2].outputs[0].name, nodes[-1].outputs[0].name = f"a{i}", f"h{i}"
        values = nodes[-1].outputs[0]
    return ir.Model(
        ir.Graph([x], [values], nodes=nodes, initializers=weights, opset_imports={"": 21}, name="net"), ir_version=10
    )


def batches(n: int) -> Iterator[dict[str, np.ndarray]]:
    rng = np.random.default_rng(1)
    for _ in range(n):
        yield {"x": rng.normal(size=(4, 64)).astype(np.float32)}


def measure(n: int) -> None:
    from featherweight.graph import io
    from featherweight.graph.weights import weights
    from featherweight.stats import streaming
    from featherweight.stats.reads import Tables, reads_of

    model = small_model()
    listed = weights(model)
    axes = streaming.value_axes(model)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        io.save(streaming.instrumented(model, set(axes)), path)
        start = time.perf_counter()
        streaming.stream(str(path), batches(n), reads_of(listed)[0], Tables.of(listed), axes, 256, 1, 0)
        seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"{n:8d} batches  {seconds:7.2f} s  {peak / 2**20:8.1f} MiB peak RSS", flush=True)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(int(sys.argv[1]))
    else:
        for count in (100, 10_000):
            subprocess.run([sys.executable, __file__, str(count)], check=True)
