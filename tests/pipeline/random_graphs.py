"""Random small networks for Hypothesis: a list of blocks becomes a model whose weights come from a seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

IMAGE_BLOCKS = (
    "conv3", "conv1", "stride2", "depthwise", "grouped", "batchnorm", "relu", "clip", "sigmoid", "residual", "concat",
    "squeeze_excite", "maxpool", "upsample",
)  # fmt: skip
TOKEN_BLOCKS = ("matmul", "bias", "layernorm", "gelu", "residual", "concat", "attention", "softmax", "gate")
SIDE, LENGTH, WORDS = 8, 5, 30


class Network:
    """Nodes and weights added one block at a time; `value` is the name of the last value, `width` its channels."""

    def __init__(self, seed: int, width: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.rng = np.random.default_rng(seed)
        self.value, self.width = "x", width

    def weight(self, *shape: int, mean: float = 0.0) -> str:
        """A new float weight of sensible size."""
        fan = max(int(np.prod(shape[1:])), 1)
        return self.stored((mean + self.rng.normal(size=shape) / np.sqrt(fan)).astype(np.float32))

    def stored(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(array, name))
        return name

    def add(self, op: str, *inputs: str, **attributes: object) -> str:
        """One node on the given inputs; its output becomes the last value."""
        self.value = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [self.value], f"n{len(self.nodes)}_{op}", **attributes))
        return self.value

    def conv(self, out: int, size: int, *, groups: int = 1, **attributes: object) -> str:
        """A Conv that keeps the size of the picture, with a bias half of the time."""
        inputs = [self.value, self.weight(out, self.width // groups, size, size)]
        if self.rng.random() < 0.5:
            inputs.append(self.weight(out))
        pads = [size // 2] * 4
        self.width = out
        return self.add("Conv", *inputs, kernel_shape=[size, size], pads=pads, group=groups, **attributes)


def image_block(net: Network, kind: str) -> None:
    """Append a block to a network on (N, width, H, W)."""
    x, width = net.value, net.width
    if kind in ("conv3", "conv1", "stride2"):
        size = 1 if kind == "conv1" else 3
        net.conv(int(net.rng.choice([8, 12, 16])), size, strides=[2, 2] if kind == "stride2" else [1, 1])
    elif kind == "depthwise":
        net.conv(width, 3, groups=width)
    elif kind == "grouped":
        net.conv(width, 3, groups=2)
    elif kind == "batchnorm":
        variance = net.stored(net.rng.uniform(0.2, 2, width).astype(np.float32))
        net.add("BatchNormalization", x, net.weight(width, mean=1), net.weight(width), net.weight(width), variance)
    elif kind in ("relu", "sigmoid"):
        net.add(kind.capitalize(), x)
    elif kind == "clip":
        net.add("Clip", x, net.stored(np.float32(0)), net.stored(np.float32(6)))
    elif kind == "residual":
        net.add("Add", x, net.conv(width, 3))
    elif kind == "concat":
        net.add("Concat", x, net.conv(8, 1), axis=1)
        net.width += width
    elif kind == "squeeze_excite":
        net.add("GlobalAveragePool", x)
        net.conv(4, 1)
        net.conv(width, 1)
        net.add("Mul", x, net.add("Sigmoid", net.value))
    elif kind == "maxpool":
        net.add("MaxPool", x, kernel_shape=[3, 3], pads=[1, 1, 1, 1])
    elif kind == "upsample":
        net.add("Resize", x, "", net.stored(np.array([1, 1, 2, 2], np.float32)), mode="nearest")


def token_block(net: Network, kind: str) -> None:
    """Append a block to a network on (N, length, width)."""
    x, width = net.value, net.width
    if kind == "matmul":
        net.width = int(net.rng.choice([12, 16, 24]))
        net.add("MatMul", x, net.weight(width, net.width))
    elif kind == "bias":
        net.add("Add", x, net.weight(width))
    elif kind == "layernorm":
        net.add("LayerNormalization", x, net.weight(width, mean=1), net.weight(width))
    elif kind == "gelu":
        half = net.stored(np.float32(0.5))
        inner = net.add("Erf", net.add("Mul", x, net.stored(np.float32(0.7071))))
        net.add("Mul", net.add("Mul", x, half), net.add("Add", inner, net.stored(np.float32(1))))
    elif kind == "residual":
        net.add("Add", net.add("Tanh", net.add("MatMul", x, net.weight(width, width))), x)
    elif kind == "concat":
        net.add("Concat", net.add("MatMul", x, net.weight(width, 8)), x, axis=-1)
        net.width += 8
    elif kind == "attention":
        q, k, v = (net.add("MatMul", x, net.weight(width, width)) for _ in range(3))
        scores = net.add("MatMul", q, net.add("Transpose", k, perm=[0, 2, 1]))
        net.add("Add", x, net.add("MatMul", net.add("Softmax", scores, axis=-1), v))
    elif kind == "softmax":
        net.add("Softmax", x, axis=-1)
    elif kind == "gate":
        net.add("Mul", x, net.add("Sigmoid", net.add("MatMul", x, net.weight(width, width))))


def image_network(kinds: list[str], seed: int) -> onnx.ModelProto:
    """(n, 3, 8, 8) -> the picture of the last block, and 5 classes."""
    net = Network(seed, 3)
    net.conv(8, 3)
    for kind in kinds:
        image_block(net, kind)
    picture = net.value
    net.add("Flatten", net.add("GlobalAveragePool", picture))
    net.add("Gemm", net.value, net.weight(5, net.width), net.weight(5), transB=1)
    return _model(net, ("x", TensorProto.FLOAT, ["n", 3, SIDE, SIDE]), {picture: 4, net.value: 2})


def token_network(kinds: list[str], seed: int) -> onnx.ModelProto:
    """(n, 5) token numbers -> (n, 5, 7)."""
    net = Network(seed, 16)
    net.add("Gather", net.weight(WORDS, 16), "x")
    for kind in kinds:
        token_block(net, kind)
    net.add("MatMul", net.value, net.weight(net.width, 7))
    return _model(net, ("x", TensorProto.INT64, ["n", LENGTH]), {net.value: 3})


def _model(net: Network, given: tuple[str, int, list[str | int]], outputs: dict[str, int]) -> onnx.ModelProto:
    graph = helper.make_graph(
        net.nodes,
        "random",
        [helper.make_tensor_value_info(*given)],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", *[None] * (r - 1)])
            for name, r in outputs.items()
        ],
        net.weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model)
    return model


def inputs_of(model: onnx.ModelProto, n: int, seed: int) -> np.ndarray:
    """n samples for the model's input."""
    rng = np.random.default_rng(seed)
    if model.graph.input[0].type.tensor_type.elem_type == TensorProto.INT64:
        return np.asarray(rng.integers(0, WORDS, (n, LENGTH)))
    return (rng.normal(size=(n, 3, SIDE, SIDE)) + rng.normal(size=(n, 3, 1, 1))).astype(np.float32)


@st.composite
def networks(draw: st.DrawFn) -> onnx.ModelProto:
    """A random image or token network of up to six blocks."""
    seed = draw(st.integers(0, 2**16))
    if draw(st.booleans()):
        return image_network(draw(st.lists(st.sampled_from(IMAGE_BLOCKS), max_size=6)), seed)
    return token_network(draw(st.lists(st.sampled_from(TOKEN_BLOCKS), max_size=6)), seed)


def save(model: onnx.ModelProto, folder: Path) -> tuple[Path, Path]:
    """The model and 24 samples as files."""
    onnx.save(model, folder / "random.onnx")
    np.savez(folder / "random.npz", x=inputs_of(model, 24, 1))
    return folder / "random.onnx", folder / "random.npz"
