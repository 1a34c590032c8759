"""What each encoding costs: bytes in the file, time and memory to load, latency against float.

    python -m benchmarks.encodings                     # the MatMul and the embedding table of the documentation
    python -m benchmarks.encodings --shape 512x512 --json encodings.json

Each model is loaded in a fresh child process. Peak memory is that of the load above a process that has loaded
an empty model; latency is the minimum over calls, interleaved with float, as a ratio to float.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from featherweight.graph import encode, io

Array = np.ndarray[Any, Any]
MIB = 1 << 20


def encodings(shape: tuple[int, int], *, table: bool, seed: int = 0) -> Iterator[tuple[str, encode.Encoded]]:
    """Every kind and width on random codes of `shape`; scales per output channel (per row of a table)."""
    rng = np.random.default_rng(seed)
    axis = 0 if table else 1
    scale = rng.random(shape[axis]).astype(np.float32)
    for bits in range(8, 1, -1):
        codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape, dtype=np.int8)
        yield f"linear {bits}", encode.linear(codes, scale, bits, axis=axis)
        if table:
            yield f"lookup linear {bits}", encode.lookup(encode.linear(codes, scale, bits, axis=axis))
        else:
            yield f"dequantize {bits}", encode.dequantize(codes, scale, bits, axis=axis)
    for bits in range(8, 0, -1):
        indices = rng.integers(0, 1 << bits, shape).astype(np.uint8)
        book = rng.standard_normal(1 << bits).astype(np.float32)
        yield f"palette {bits}", encode.palette(indices, book, bits)
        if table:
            yield f"lookup palette {bits}", encode.lookup(encode.palette(indices, book, bits))
    indices = rng.integers(0, 16, shape).astype(np.uint8)
    yield "palette 4, 2 groups", encode.palette(indices, rng.standard_normal((2, 16)).astype(np.float32), 4)
    codes = rng.integers(-8, 8, shape, dtype=np.int8)
    blocks = rng.random((shape[0] // 32, shape[1]) if not table else (shape[0], shape[1] // 32)).astype(np.float32)
    yield "linear 4, block 32", encode.linear(codes, blocks, 4, axis=1 - axis, block=32)
    if not table:
        yield "block4, block 32", encode.block4(codes, blocks, axis=0, block=32)
        yield "block4, f16 scale", encode.block4(codes, blocks.astype(np.float16), axis=0, block=32)
    mask = rng.random(shape) < 0.3
    count = int(mask.sum())
    yield "bitmask 30 %", encode.bitmask(rng.standard_normal(count).astype(np.float32), mask)
    yield "bitmask 30 %, int8", encode.bitmask(rng.integers(-127, 128, count), mask, scale=scale, axis=axis)
    yield "float16", encode.float16(rng.standard_normal(shape).astype(np.float32))


def model(shape: tuple[int, int], *, table: bool, encoded: encode.Encoded | None) -> ir.Model:
    """MatMul(x, W), or Gather(W, i) for a table, with W as float or encoded."""
    rows, columns = shape
    stored = np.zeros(shape) if encoded is not None else np.random.default_rng(1).standard_normal(shape)
    tensor = ir.tensor(stored.astype(np.float32), name="W")
    weight = ir.Value(name="W", const_value=tensor, type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
    output = ir.Value(name="y", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", columns]))
    if table:
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["n"]))
        node = ir.node("Gather", [weight, x], outputs=[output], name="read")
    else:
        x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["n", rows]))
        node = ir.node("MatMul", [x, weight], outputs=[output], name="read")
    graph = ir.Graph([x], [output], nodes=[node], initializers=[weight], opset_imports={"": 21}, name="bench")
    made = ir.Model(graph, ir_version=10)
    if encoded is not None:
        encode.attach(made, weight, encoded)
    return made


def _status_kib(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1])
    raise RuntimeError(f"/proc/self/status must have {key}; this benchmark needs Linux")


def _session(path: str) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def child(empty: str, path: str, float_path: str, feed: str) -> dict[str, float]:
    """Load `path` once, measured; then time it call by call against float."""
    _session(empty)
    base = _status_kib("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    start = time.perf_counter()
    session = _session(path)
    load_ms = (time.perf_counter() - start) * 1e3
    peak, resident = _status_kib("VmHWM") - base, _status_kib("VmRSS") - base
    reference, x = _session(float_path), {"x": np.load(feed)}
    times: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(40):
        for i, each in enumerate((reference, session)):
            start = time.perf_counter()
            each.run(None, x)
            times[i].append(time.perf_counter() - start)
    return {
        "load_ms": load_ms,
        "peak_mb": peak / 1024,
        "resident_mb": resident / 1024,
        "ratio": min(times[1]) / min(times[0]),
        "run_ms": min(times[1]) * 1e3,
    }


def measure(shape: tuple[int, int], *, table: bool, repeats: int, show: Callable[[dict[str, Any]], None]) -> None:
    """Measure float, then every encoding of `shape`."""
    rng = np.random.default_rng(2)
    with tempfile.TemporaryDirectory() as folder:
        empty, float_path, feed = (str(Path(folder, n)) for n in ("empty.onnx", "float.onnx", "x.npy"))
        io.save(model((8, 8), table=table, encoded=None), empty)
        io.save(model(shape, table=table, encoded=None), float_path)
        np.save(
            feed, rng.integers(0, shape[0], 128) if table else rng.standard_normal((1, shape[0])).astype(np.float32)
        )
        show(_row("float", float_path, empty, float_path, feed, repeats))
        for name, encoded in encodings(shape, table=table):
            path = str(Path(folder, "candidate.onnx"))
            io.save(model(shape, table=table, encoded=encoded), path)
            show({**_row(name, path, empty, float_path, feed, repeats), "nbytes": encoded.nbytes})


def _row(name: str, path: str, empty: str, float_path: str, feed: str, repeats: int) -> dict[str, Any]:
    runs = []
    for _ in range(repeats):
        command = [sys.executable, "-m", "benchmarks.encodings", "--child", empty, path, float_path, feed]
        runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    best = {key: min(run[key] for run in runs) for key in runs[0]}
    return {"name": name, "bytes": Path(path).stat().st_size, **best}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="append", help="rows x columns of a MatMul weight, e.g. 1024x4096")
    parser.add_argument("--table", action="append", help="rows x columns of an embedding table, e.g. 30522x384")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(*arguments.child)))
        return
    asked = [(s, False) for s in arguments.shape or []] + [(s, True) for s in arguments.table or []]
    results: dict[str, list[dict[str, Any]]] = {}
    for text, table in asked or [("1024x4096", False), ("30522x384", True)]:
        rows, columns = (int(v) for v in text.split("x"))
        print(f"\n{'table' if table else 'MatMul'} {text}, float {rows * columns * 4 / MIB:.1f} MiB")
        print(f"{'encoding':22}{'bytes':>12}{'load ms':>10}{'peak MiB':>10}{'kept MiB':>10}{'run ms':>9}{'/ float':>9}")

        rows_shown = results.setdefault(text, [])

        def show(row: dict[str, Any], into: list[dict[str, Any]] = rows_shown) -> None:
            into.append(row)
            figures = f"{row['bytes']:12d}{row['load_ms']:10.1f}{row['peak_mb']:10.1f}{row['resident_mb']:10.1f}"
            print(f"{row['name']:22}{figures}{row['run_ms']:9.3f}{row['ratio']:9.2f}", flush=True)

        measure((rows, columns), table=table, repeats=arguments.repeats, show=show)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
