"""How exact the differentiable executor is on real networks, and what it costs beside a plain torch module.

`python -m benchmarks.executor FOLDER` reads the ONNX files of FOLDER (as `benchmarks.models` writes them). For
networks of convolutions the same layers are also built as torch modules; forward and backward of both are timed in
turn, in processor time, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from featherweight.graph import io
from featherweight.learn.execute import Executor
from featherweight.runtime import ort

SIZES = ((1, 7), (2, 16), (5, 33))
"""(batch, other symbolic axes)."""
WIDTHS = {"ppocr_rec": 8}
"""Symbolic axes of images are longer by this factor."""


def feeds(session: ort.Session, batch: int, length: int, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Random inputs of one size: ids below 1000, masks with a short last row."""
    rng = np.random.default_rng(seed)
    made: dict[str, np.ndarray[Any, Any]] = {}
    for info in session.inputs:
        shape = [d if isinstance(d, int) else (batch if i == 0 else length) for i, d in enumerate(info.shape)]
        if info.dtype != "int64":
            made[info.name] = rng.standard_normal(shape).astype(np.float32)
        elif "mask" in info.name:
            made[info.name] = np.ones(shape, np.int64)
            made[info.name][-1, length // 2 + 1 :] = 0
        else:
            made[info.name] = np.zeros(shape, np.int64) if "type" in info.name else rng.integers(0, 1000, shape)
    return made


def tensors(arrays: dict[str, np.ndarray[Any, Any]]) -> dict[str, torch.Tensor]:
    """As torch takes them."""
    return {k: torch.from_numpy(v) for k, v in arrays.items()}


def difference(path: Path, executor: Executor) -> float:
    """Largest absolute difference from ONNX Runtime over all sizes and outputs."""
    session, worst = ort.session(path), 0.0
    for seed, (batch, length) in enumerate(SIZES):
        arrays = feeds(session, batch, length * WIDTHS.get(path.stem, 1), seed)
        with torch.no_grad():
            mine = executor(tensors(arrays))
        for name, expected in session.run(arrays).items():
            worst = max(worst, float(np.abs(mine[name].numpy() - expected).max()))
    return worst


class Native(nn.Module):
    """A network of convolutions as torch modules, called in order. Raises KeyError for other operators."""

    def __init__(self, graph: ir.Graph) -> None:
        super().__init__()
        self._steps: list[tuple[Callable[..., Any], list[str], str]] = []
        self._layers = nn.ModuleList()
        self._input, self._output = str(graph.inputs[0].name), str(graph.outputs[0].name)
        for node in graph:
            make = {"Conv": _conv, "Gemm": _linear, "Clip": _relu6, "Add": _add, "GlobalAveragePool": _pool,
                    "Flatten": _flatten, "Relu": _relu}[node.op_type]  # fmt: skip
            layer: Any = make(node)
            if isinstance(layer, nn.Module):
                self._layers.append(layer)
            reads = [str(v.name) for v in node.inputs if v is not None and not v.is_initializer()]
            self._steps.append((layer, reads, str(node.outputs[0].name)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        values = {self._input: x}
        for layer, reads, name in self._steps:
            values[name] = layer(*[values[r] for r in reads])
        return values[self._output]


def _array(value: ir.Value | None) -> torch.Tensor:
    if value is None or value.const_value is None:
        raise KeyError("a weight must be stored")
    return torch.from_numpy(np.array(value.const_value.numpy()))


def _conv(node: ir.Node) -> nn.Module:
    given = {k: a.value for k, a in node.attributes.items()}
    weight, group = _array(node.inputs[1]), int(given.get("group", 1))
    pads, strides = list(given.get("pads", [0] * 4)), tuple(given.get("strides", (1, 1)))
    bias = len(node.inputs) > 2
    kernel, even = (weight.shape[2], weight.shape[3]), pads[:2] == pads[2:]
    layer = nn.Conv2d(weight.shape[1] * group, weight.shape[0], kernel, strides,
                      (pads[0], pads[1]) if even else 0, groups=group, bias=bias)  # fmt: skip
    layer.weight.data = weight
    if layer.bias is not None:
        layer.bias.data = _array(node.inputs[2])
    return layer if even else nn.Sequential(nn.ZeroPad2d((pads[1], pads[3], pads[0], pads[2])), layer)


def _linear(node: ir.Node) -> nn.Module:
    weight = _array(node.inputs[1])
    weight = weight if "transB" in node.attributes and node.attributes["transB"].value else weight.t().contiguous()
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight.data, layer.bias.data = weight, _array(node.inputs[2])
    return layer


def _relu6(_node: ir.Node) -> nn.Module:
    return nn.ReLU6()


def _relu(_node: ir.Node) -> nn.Module:
    return nn.ReLU()


def _add(_node: ir.Node) -> Callable[..., Any]:
    return torch.add


def _pool(_node: ir.Node) -> nn.Module:
    return nn.AdaptiveAvgPool2d(1)


def _flatten(_node: ir.Node) -> nn.Module:
    return nn.Flatten()


def step(run: Callable[[], torch.Tensor]) -> float:
    """Seconds of processor time of one forward and backward."""
    start = time.process_time()
    run().square().mean().backward()  # type: ignore[no-untyped-call]
    return time.process_time() - start


def compare(model: ir.Model, executor: Executor, batch: int, turns: int) -> dict[str, float] | None:
    """Seconds a step of both, taken in turn; None for networks that are not rebuilt."""
    try:
        native = Native(model.graph)
    except KeyError:
        return None
    name = str(model.graph.inputs[0].name)
    x = torch.randn(batch, 3, 224, 224)
    runs: dict[str, Callable[[], torch.Tensor]] = {
        "executor": lambda: executor({name: x})[str(model.graph.outputs[0].name)],
        "native": lambda: native(x),
    }
    times: dict[str, list[float]] = {k: [step(run)] for k, run in runs.items()}
    times = {k: [] for k in times}  # the first step of each is not counted
    for _ in range(turns):
        for key, run in runs.items():
            times[key].append(step(run))
    medians = {k: statistics.median(v) for k, v in times.items()}
    return {**medians, "ratio": statistics.median(a / b for a, b in zip(*times.values(), strict=True))}


def main() -> None:
    """Print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    print(
        f"{'network':<14} {'build s':>8} {'weights':>8} {'difference':>11} {'step s':>8} {'native s':>9} {'ratio':>6}"
    )
    for path in sorted(asked.folder.glob("*.onnx")):
        model = io.load(path)
        start = time.perf_counter()
        executor = Executor(model)
        built = time.perf_counter() - start
        row: dict[str, Any] = {"network": path.stem, "build_s": built, "fenced": [n.where for n in executor.fenced],
                               "weights": len(executor.parameters_by_name()),
                               "difference": difference(path, executor)}  # fmt: skip
        row.update(compare(model, executor, asked.batch, asked.turns) or {})
        rows.append(row)
        times = [f"{row[k]:.2f}" if k in row else "-" for k in ("executor", "native", "ratio")]
        print(f"{path.stem:<14} {built:>8.2f} {row['weights']:>8} {row['difference']:>11.1e} {times[0]:>8} "
              f"{times[1]:>9} {times[2]:>6}", flush=True)  # fmt: skip
    if asked.json is not None:
        asked.json.write_text(json.dumps({"batch": asked.batch, "turns": asked.turns, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
