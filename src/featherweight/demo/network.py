"""Write a network node by node, as a PyTorch exporter leaves it after folding (no BatchNormalization left)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 18


class Network:
    """A graph under construction: `weight` and `node` return the name of the value they make."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._nodes: list[onnx.NodeProto] = []
        self._weights: dict[str, onnx.TensorProto] = {}
        self._inputs: list[onnx.ValueInfoProto] = []
        self._outputs: list[onnx.ValueInfoProto] = []

    def input(self, name: str, shape: Sequence[int | str], *, dtype: int = TensorProto.FLOAT) -> str:
        """Declare a graph input; a string in `shape` is a symbolic axis."""
        self._inputs.append(helper.make_tensor_value_info(name, dtype, list(shape)))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> None:
        """Declare the float32 value `name` a graph output."""
        self._outputs.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, list(shape)))

    def weight(self, name: str, array: np.ndarray | np.generic) -> str:
        """Add an initializer; the same name twice is one tensor."""
        self._weights.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def node(self, op_type: str, inputs: Sequence[str], output: str, *, place: int = 0, **attributes: Any) -> str:
        """Add a node with one output, named like it; `place` counts the optional outputs left out before it."""
        outputs = [""] * place + [output]
        self._nodes.append(helper.make_node(op_type, list(inputs), outputs, name=f"/{output}/{op_type}", **attributes))
        return output

    def save(self, path: Path) -> None:
        """Write a checked file of opset 18 (IR version 10)."""
        graph = helper.make_graph(self._nodes, self._name, self._inputs, self._outputs, list(self._weights.values()))
        model = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="featherweight.demo"
        )
        model.ir_version = 10
        onnx.checker.check_model(model, full_check=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        onnx.save(model, path)


def fold_batch_norm(
    tensors: Mapping[str, np.ndarray], conv: str, norm: str, *, epsilon: float
) -> tuple[np.ndarray, np.ndarray]:
    """(o, i/g, kh, kw) f32 weight and (o,) f32 bias of conv followed by inference-mode batch norm.

    With s = gamma / sqrt(var + epsilon): w' = s w, b' = beta - s mean (the convolutions have no bias).
    """
    gamma, beta, mean, var = (
        tensors[f"{norm}.{part}"].astype(np.float64) for part in ("weight", "bias", "running_mean", "running_var")
    )
    s = gamma / np.sqrt(var + epsilon)
    w = tensors[f"{conv}.weight"].astype(np.float64) * s[:, None, None, None]
    return w.astype(np.float32), (beta - s * mean).astype(np.float32)


def conv_norm(
    net: Network,
    x: str,
    tensors: Mapping[str, np.ndarray],
    conv: str,
    norm: str,
    *,
    epsilon: float,
    pads: Sequence[int],
    stride: int = 1,
    relu6: bool = True,
) -> str:
    """Conv with its batch norm folded in, then ReLU6 unless told otherwise. `pads` as in ONNX (h, w, h, w)."""
    w, b = fold_batch_norm(tensors, conv, norm, epsilon=epsilon)
    group = w.shape[0] if w.shape[1] == 1 and w.shape[0] > 1 else 1
    y = net.node(
        "Conv",
        [x, net.weight(f"{conv}.weight", w), net.weight(f"{conv}.bias", b)],
        f"{conv}.y",
        kernel_shape=list(w.shape[2:]),
        strides=[stride, stride],
        pads=list(pads),
        group=group,
    )
    if not relu6:
        return y
    zero, six = net.weight("zero", np.array(0, np.float32)), net.weight("six", np.array(6, np.float32))
    return net.node("Clip", [y, zero, six], f"{conv}.relu6")


def classifier(net: Network, x: str, weight: np.ndarray, bias: np.ndarray, *, name: str) -> None:
    """Global average pool, flatten and a dense layer (classes, channels) to the output `logits`."""
    pooled = net.node("GlobalAveragePool", [x], "pooled")
    flat = net.node("Flatten", [pooled], "features", axis=1)
    parts = [flat, net.weight(f"{name}.weight", weight), net.weight(f"{name}.bias", bias)]
    net.node("Gemm", parts, "logits", transB=1)
    net.output("logits", ["batch", weight.shape[0]])
