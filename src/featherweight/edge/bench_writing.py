"""A small ONNX model being written, operator by operator, and a chain of such models to be timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]


@dataclass
class Chain:
    """Models of `n` links, which `build(n)` gives as bytes.

    A link is `per_link` operators of the kind and `extra` more; `once`: there is nothing but one link more or less.
    """

    kind: str
    precision: str
    dims: tuple[int, ...]
    build: Callable[[int], bytes]
    feeds: dict[str, Array]
    per_link: int = 1
    extra: int = 0
    optimize: bool = True
    macs: int = 0
    once: bool = False


@dataclass
class Graph:
    """A model being written: nodes, stored tensors, inputs."""

    seed: int = 0
    nodes: list[Any] = field(default_factory=list)
    stored: list[Any] = field(default_factory=list)
    inputs: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)

    def input(self, name: str, shape: tuple[int, ...], dtype: str = "float32") -> str:
        """An input of the model."""
        from onnx import helper

        self.inputs.append(helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape))
        return name

    def weight(self, shape: tuple[int, ...], scale: float | None = None) -> str:
        """Random float32 weights that keep the size of what goes through."""
        fan = int(np.prod(shape[1:])) or 1
        return self.store((self.rng.normal(size=shape) * (fan**-0.5 if scale is None else scale)).astype(np.float32))

    def store(self, array: Array) -> str:
        """A stored tensor."""
        from onnx import numpy_helper

        name = f"t{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(array, name))
        return name

    def scalar(self, value: float, dtype: str = "float32") -> str:
        """A stored number."""
        return self.store(np.array(value, dtype))

    def node(self, op: str, *inputs: str, domain: str = "", **attributes: Any) -> str:
        """One operator; its (first) output."""
        from onnx import helper

        out = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [out], f"n{len(self.nodes)}", domain=domain, **attributes))
        return out

    def qdq(self, x: str) -> str:
        """Quantize and dequantize to uint8."""
        scale, zero = self.scalar(0.05), self.scalar(128, "uint8")
        return self.node("DequantizeLinear", self.node("QuantizeLinear", x, scale, zero), scale, zero)

    def weight_int8(self, shape: tuple[int, ...], axis: int) -> tuple[str, Array]:
        """Dequantized int8 weights, a scale a channel; and the scales."""
        codes = self.rng.integers(-63, 64, shape).astype(np.int8)
        scales = np.full(shape[axis], 0.002, np.float32)
        zero = self.store(np.zeros(shape[axis], np.int8))
        return self.node("DequantizeLinear", self.store(codes), self.store(scales), zero, axis=axis), scales

    def finish(self, out: str) -> bytes:
        """The model's bytes, with `out` as its output."""
        from onnx import TensorProto, helper

        y = helper.make_tensor_value_info(out, TensorProto.FLOAT, None)
        graph = helper.make_graph(self.nodes, "chain", self.inputs, [y], self.stored)
        opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
        return bytes(helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString())
