"""Random networks out of every construct the engine follows, built from a list of block names and a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

SIDE = 8
TOKENS = 5


class Builder:
    """An ONNX graph being written; `x` is the running value, `c` its channels, `hw` its side (0: tokens)."""

    def __init__(self, seed: int, *, tokens: bool) -> None:
        self.rng = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.stored: list[onnx.TensorProto] = []
        self.x, self.c, self.hw = "x", 4, 0 if tokens else SIDE

    def const(self, array: np.ndarray) -> str:
        name = f"k{len(self.stored)}"
        self.stored.append(numpy_helper.from_array(np.array(array, order="C"), name))
        return name

    def weight(self, *shape: int) -> str:
        fan = max(int(np.prod(shape[1:])), 1)
        return self.const((self.rng.normal(size=shape) / np.sqrt(fan)).astype(np.float32))

    def ints(self, *values: int) -> str:
        return self.const(np.array(values, np.int64))

    def node(self, op: str, *inputs: str, outputs: int = 1, **attributes: object) -> list[str]:
        names = [f"v{len(self.nodes)}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op, list(inputs), names, name=f"n{len(self.nodes)}_{op}", **attributes))
        return names

    def one(self, op: str, *inputs: str, **attributes: object) -> str:
        return self.node(op, *inputs, **attributes)[0]

    def conv(self, x: str, cin: int, cout: int, k: int = 1, group: int = 1, *, bias: bool = True) -> str:
        inputs = [x, self.weight(cout, cin // group, k, k)] + ([self.weight(cout)] if bias else [])
        return self.one("Conv", *inputs, kernel_shape=[k, k], group=group, pads=[k // 2] * 4)

    def linear(self, x: str, cin: int, cout: int) -> str:
        return self.one("Add", self.one("MatMul", x, self.weight(cin, cout)), self.weight(cout))


Block = Callable[[Builder], None]


def _conv(b: Builder) -> None:
    out = int(b.rng.choice([4, 6, 8]))
    b.x, b.c = b.one("Relu", b.conv(b.x, b.c, out, int(b.rng.choice([1, 3])))), out


def _depthwise(b: Builder) -> None:
    b.x = b.one("Clip", b.conv(b.x, b.c, b.c, 3, b.c), b.const(np.float32(-1)), b.const(np.float32(6)))


def _depthwise_multiplier(b: Builder) -> None:
    b.x, b.c = b.conv(b.x, b.c, 2 * b.c, 3, b.c, bias=False), 2 * b.c


def _grouped(b: Builder) -> None:
    b.x = b.one("LeakyRelu", b.conv(b.x, b.c, b.c, 3, 2))


def _residual(b: Builder) -> None:
    inner = b.one("Relu", b.conv(b.x, b.c, 6))
    b.x = b.one("Add", b.x, b.conv(inner, 6, b.c))


def _concat_self(b: Builder) -> None:
    b.x, b.c = b.one("Concat", b.x, b.x, axis=1), 2 * b.c


def _branches(b: Builder) -> None:
    left, right = b.conv(b.x, b.c, 3), b.conv(b.x, b.c, 5, 3)
    b.x, b.c = b.one("Concat", left, b.one("Sigmoid", right), axis=-3), 8


def _split(b: Builder) -> None:
    wide = b.conv(b.x, b.c, 8)
    first, second = b.node("Split", wide, b.ints(3, 5), outputs=2, axis=1)
    b.x, b.c = b.one("Concat", second, b.one("Tanh", first), axis=1), 8


def _glu(b: Builder) -> None:
    first, second = b.node("Split", b.conv(b.x, b.c, 12), outputs=2, axis=1, num_outputs=2)
    b.x, b.c = b.one("Mul", first, b.one("Sigmoid", second)), 6


def _slices(b: Builder) -> None:
    wide = b.conv(b.x, b.c, 8)
    head = b.one("Slice", wide, b.ints(0), b.ints(3), b.ints(1))
    tail = b.one("Slice", wide, b.ints(3), b.ints(2**31 - 1), b.ints(1), b.ints(1))
    b.x, b.c = b.one("Concat", b.one("Relu", tail), head, axis=1), 8


def _gather(b: Builder) -> None:
    wide = b.conv(b.x, b.c, 6)
    b.x, b.c = b.one("Gather", wide, b.ints(5, 0, 3, 3, -2), axis=1), 5


def _shuffle(b: Builder) -> None:
    wide, n = b.conv(b.x, b.c, 8), b.hw
    parts = b.one("Reshape", wide, b.ints(0, 2, 4, n, n))
    b.x, b.c = b.one("Reshape", b.one("Transpose", parts, perm=[0, 2, 1, 3, 4]), b.ints(-1, 8, n, n)), 8


def _squeeze_excite(b: Builder) -> None:
    pooled = b.one("GlobalAveragePool", b.x)
    gate = b.one("HardSigmoid", b.conv(b.one("Relu", b.conv(pooled, b.c, 4)), 4, b.c))
    b.x = b.one("Mul", b.x, gate)


def _squeeze_excite_linear(b: Builder) -> None:
    pooled = b.one("ReduceMean", b.x, b.ints(2, 3), keepdims=0)
    gate = b.one("Sigmoid", b.one("Gemm", pooled, b.weight(b.c, b.c), b.weight(b.c), transB=1))
    b.x = b.one("Mul", b.x, b.one("Unsqueeze", gate, b.ints(2, 3)))


def _spatial_gate(b: Builder) -> None:
    mean = b.one("ReduceMean", b.x, b.ints(1), keepdims=1)
    other = b.one(str(b.rng.choice(["ReduceSum", "ReduceMax", "ReduceMin"])), b.x, b.ints(1), keepdims=1)
    gate = b.one("Sigmoid", b.conv(b.one("Concat", mean, other, axis=1), 2, 1, 3))
    b.x = b.one("Mul", b.x, gate)


def _ghost(b: Builder) -> None:
    primary = b.one("Relu", b.conv(b.x, b.c, 4))
    b.x, b.c = b.one("Concat", primary, b.conv(primary, 4, 4, 3, 4), axis=1), 8


def _batch_norm(b: Builder) -> None:
    b.x = b.one("Elu", b.x)
    params = [b.weight(b.c), b.weight(b.c), b.weight(b.c), b.const(np.ones(b.c, np.float32))]
    b.x = b.one("BatchNormalization", b.x, *params)


def _instance_norm(b: Builder) -> None:
    b.x = b.one("InstanceNormalization", b.x, b.weight(b.c), b.weight(b.c))


def _group_norm(b: Builder) -> None:
    wide = b.conv(b.x, b.c, 8)
    b.x, b.c = b.one("GroupNormalization", wide, b.weight(8), b.weight(8), num_groups=4), 8


def _group_norm_spelled(b: Builder) -> None:
    wide, n = b.conv(b.x, b.c, 8), b.hw
    rows = b.one("Reshape", wide, b.ints(0, 2, -1))
    rows = b.one("InstanceNormalization", rows, b.const(np.ones(2, np.float32)), b.const(np.zeros(2, np.float32)))
    shaped = b.one("Reshape", rows, b.ints(-1, 8, n, n))
    b.x, b.c = b.one("Add", b.one("Mul", shaped, b.weight(8, 1, 1)), b.weight(1, 8, 1, 1)), 8


def _layer_norm_islands(b: Builder) -> None:
    wide = b.one("Transpose", b.conv(b.x, b.c, 6), perm=[0, 2, 3, 1])
    inner = b.one("Relu", b.linear(wide, 6, 8))
    back = b.one("LayerNormalization", b.linear(inner, 8, 6), b.weight(6), b.weight(6), axis=-1)
    b.x, b.c = b.one("Transpose", back, perm=[0, 3, 1, 2]), 6


def _norm_spelled(b: Builder) -> None:
    _residual(b)
    mean = b.one("ReduceMean", b.x, b.ints(1), keepdims=1)
    centred = b.one("Sub", b.x, mean)
    spread = b.one("ReduceMean", b.one("Mul", centred, centred), b.ints(1), keepdims=1)
    b.x = b.one("Div", centred, b.one("Sqrt", b.one("Add", spread, b.const(np.float32(1e-3)))))


def _pixel_shuffle(b: Builder) -> None:
    wide, mode = b.conv(b.x, b.c, 16), str(b.rng.choice(["DCR", "CRD"]))
    up = b.one("DepthToSpace", wide, blocksize=2, mode=mode)
    b.x, b.c = b.one("MaxPool", up, kernel_shape=[2, 2], strides=[2, 2]), 4


def _space_to_depth(b: Builder) -> None:
    down = b.one("SpaceToDepth", b.conv(b.x, b.c, 3), blocksize=2)
    b.x, b.c = b.one("Resize", b.conv(down, 12, 4), "", b.const(np.array([1, 1, 2, 2], np.float32)), mode="nearest"), 4


def _conv_transpose(b: Builder) -> None:
    group = int(b.rng.choice([1, 2]))
    w = b.weight(b.c, 6 // group, 2, 2) if b.c % group == 0 else b.weight(b.c, 6, 2, 2)
    group = group if b.c % group == 0 else 1
    up = b.one("ConvTranspose", b.x, w, b.weight(6), kernel_shape=[2, 2], strides=[2, 2], group=group)
    b.x, b.c = b.one("AveragePool", up, kernel_shape=[2, 2], strides=[2, 2]), 6


def _parameters(b: Builder) -> None:
    scaled = b.one("Mul", b.x, b.weight(b.c, 1, 1))
    b.x = b.one("PRelu", b.one("Add", scaled, b.weight(1, b.c, 1, 1)), b.weight(b.c, 1, 1))


def _pad_and_pool(b: Builder) -> None:
    padded = b.one("Pad", b.x, b.ints(0, 0, 1, 1, 0, 0, 1, 1))
    b.x = b.one("AveragePool", padded, kernel_shape=[3, 3])


def _dynamic_shape(b: Builder) -> None:
    wide = b.conv(b.x, b.c, 6)
    shape = b.one("Shape", wide)
    lead = b.one("Slice", shape, b.ints(0), b.ints(1))
    half = b.one("Reshape", wide, b.one("Concat", lead, b.ints(3, 2, b.hw, b.hw), axis=0))
    b.x, b.c = b.one("Reshape", b.one("Relu", half), shape), 6


def _merged_with_batch(b: Builder) -> None:
    flat = b.one("Tanh", b.one("Reshape", b.x, b.ints(-1, b.hw * b.hw)))
    b.x = b.one("Reshape", flat, b.ints(-1, b.c, b.hw, b.hw))


def _over_space(b: Builder) -> None:
    op = str(b.rng.choice(["ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp"]))
    seen = b.one(op, b.x, b.ints(2, 3), keepdims=1)
    top = b.one("GlobalMaxPool", b.one("LpNormalization", b.x, axis=3, p=2))
    chosen = b.one("Where", b.one("Greater", seen, b.const(np.float32(0.5))), seen, top)
    b.x = b.one(
        "Mul", b.one("LRN", b.x, size=1) if b.rng.integers(2) else b.x, b.one("Tile", chosen, b.ints(1, 1, 1, 1))
    )


def _sums_along(b: Builder) -> None:
    summed = b.one("CumSum", b.x, b.const(np.array(3, np.int64)))
    best, place = b.node("TopK", summed, b.ints(1), outputs=2, axis=3)
    found = b.one("Cast", b.one("Add", place, b.one("ArgMax", b.x, axis=3, keepdims=1)), to=TensorProto.FLOAT)
    b.x = b.one("Add", b.x, b.one("Mul", best, b.one("Sin", found)))


def _mlp(b: Builder) -> None:
    inner = b.one("Gelu", b.linear(b.x, b.c, 12))
    b.x = b.one("Add", b.x, b.linear(inner, 12, b.c))


def _pre_norm(b: Builder) -> None:
    normal = b.one("LayerNormalization", b.x, b.weight(b.c), b.weight(b.c), axis=-1)
    b.x = b.linear(b.one("Relu", b.linear(normal, b.c, 10)), 10, b.c)


def _heads(b: Builder, x: str, n: int, size: int) -> str:
    return b.one("Transpose", b.one("Reshape", x, b.ints(0, 0, n, size)), perm=[0, 2, 1, 3])


def _attend(b: Builder, q: str, k: str, v: str, width: int) -> str:
    score = b.one("MatMul", q, b.one("Transpose", k, perm=[0, 1, 3, 2]))
    mixed = b.one("MatMul", b.one("Softmax", b.one("Mul", score, b.const(np.float32(0.5))), axis=-1), v)
    return b.one("Reshape", b.one("Transpose", mixed, perm=[0, 2, 1, 3]), b.ints(0, 0, width))


def _attention(b: Builder) -> None:
    q, k, v = (_heads(b, b.linear(b.x, b.c, 12), 4, 3) for _ in range(3))
    b.x = b.one("Add", b.x, b.linear(_attend(b, q, k, v, 12), 12, b.c))


def _attention_packed(b: Builder) -> None:
    packed = b.node("Split", b.linear(b.x, b.c, 36), outputs=3, axis=-1, num_outputs=3)
    q, k, v = (_heads(b, p, 4, 3) for p in packed)
    b.x = b.linear(_attend(b, q, k, v, 12), 12, b.c)


def _attention_stacked(b: Builder) -> None:
    stacked = b.one("Reshape", b.linear(b.x, b.c, 36), b.ints(0, 0, 3, 4, 3))
    stacked = b.one("Transpose", stacked, perm=[2, 0, 3, 1, 4])
    if b.rng.integers(2):
        q, k, v = (b.one("Gather", stacked, b.const(np.array(i, np.int64)), axis=0) for i in range(3))
    else:
        cuts = [b.one("Slice", stacked, b.ints(i), b.ints(i + 1), b.ints(0)) for i in range(3)]
        q, k, v = (b.one("Squeeze", c, b.ints(0)) for c in cuts)
    b.x = b.one("Add", b.x, b.linear(_attend(b, q, k, v, 12), 12, b.c))


def _attention_grouped(b: Builder) -> None:
    q = _heads(b, b.linear(b.x, b.c, 12), 4, 3)
    pairs = []
    for _ in range(2):
        small = b.one("Unsqueeze", _heads(b, b.linear(b.x, b.c, 6), 2, 3), b.ints(2))
        wide = b.one("Expand", small, b.ints(1, 2, 2, TOKENS, 3))
        pairs.append(b.one("Reshape", wide, b.ints(0, 4, TOKENS, 3)))
    b.x = b.one("Add", b.x, b.linear(_attend(b, q, pairs[0], pairs[1], 12), 12, b.c))


def _attention_one_head(b: Builder) -> None:
    q, k, v = (b.linear(b.x, b.c, n) for n in (6, 6, 8))
    weights = b.one("Softmax", b.one("MatMul", q, b.one("Transpose", k, perm=[0, 2, 1])), axis=-1)
    b.x = b.linear(b.one("MatMul", weights, v), 8, b.c)


def _attention_folded(b: Builder) -> None:
    """Heads in the batch axis, as torch's MultiheadAttention has them."""
    if b.rng.integers(2):  # behind batch and heads as axes
        q, k, v = (b.one("Reshape", _heads(b, b.linear(b.x, b.c, 12), 4, 3), b.ints(-1, TOKENS, 3)) for _ in range(3))
        out = _folded(b, q, k, v)
        four = b.one("Reshape", out, b.ints(-1, 4, TOKENS, 3))
        mixed = b.one("Reshape", b.one("Transpose", four, perm=[0, 2, 1, 3]), b.ints(0, 0, 12))
    else:  # (length, batch, width) to (length, batch * heads, size)
        first = b.one("Transpose", b.x, perm=[1, 0, 2])
        q, k, v = (
            b.one("Transpose", b.one("Reshape", b.linear(first, b.c, 12), b.ints(TOKENS, -1, 3)), perm=[1, 0, 2])
            for _ in range(3)
        )
        out = b.one("Transpose", _folded(b, q, k, v), perm=[1, 0, 2])
        mixed = b.one("Transpose", b.one("Reshape", out, b.ints(TOKENS, -1, 12)), perm=[1, 0, 2])
    b.x = b.one("Add", b.x, b.linear(mixed, 12, b.c))


def _folded(b: Builder, q: str, k: str, v: str) -> str:
    score = b.one("MatMul", q, b.one("Transpose", k, perm=[0, 2, 1]))
    return b.one("MatMul", b.one("Softmax", score, axis=-1), v)


def _recurrent(b: Builder) -> None:
    kind = str(b.rng.choice(["LSTM", "GRU", "RNN"]))
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[kind]
    two = bool(b.rng.integers(2))
    d, h = 1 + two, 6
    x = b.one("Transpose", b.x, perm=[1, 0, 2])
    given = [b.weight(d, gates * h, b.c), b.weight(d, gates * h, h), b.weight(d, 2 * gates * h)]
    direction = "bidirectional" if two else "forward"
    y = b.one(kind, x, *given, hidden_size=h, direction=direction)
    flat = b.one("Reshape", b.one("Transpose", y, perm=[2, 0, 1, 3]), b.ints(0, 0, d * h))
    b.x, b.c = flat, d * h


IMAGE_BLOCKS: dict[str, Block] = {
    f.__name__[1:]: f
    for f in (
        _conv, _depthwise, _depthwise_multiplier, _grouped, _residual, _concat_self, _branches, _split, _glu, _slices,
        _gather, _shuffle, _squeeze_excite, _squeeze_excite_linear, _spatial_gate, _ghost, _batch_norm, _instance_norm,
        _group_norm, _group_norm_spelled, _layer_norm_islands, _norm_spelled, _pixel_shuffle, _space_to_depth,
        _conv_transpose, _parameters, _pad_and_pool, _dynamic_shape, _merged_with_batch, _over_space, _sums_along,
    )
}  # fmt: skip
TOKEN_BLOCKS: dict[str, Block] = {
    f.__name__[1:]: f
    for f in (
        _mlp, _pre_norm, _attention, _attention_packed, _attention_stacked, _attention_grouped,
        _attention_one_head, _attention_folded, _recurrent,
    )
}  # fmt: skip


def build(names: Sequence[str], seed: int) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """A network of these blocks (of images, or of tokens), one layer before and one after them, and an input."""
    tokens = names[0] in TOKEN_BLOCKS
    b = Builder(seed, tokens=tokens)
    shape = [2, TOKENS, 4] if tokens else [2, 4, SIDE, SIDE]
    if tokens:
        b.x, b.c = b.linear(b.x, 4, 8), 8
    else:
        _conv(b)
    for name in names:
        block = (TOKEN_BLOCKS if tokens else IMAGE_BLOCKS)[name]
        if name == "grouped" and b.c % 2:
            _conv(b)
        if b.c > 24:
            _conv(b)
        block(b)
    if tokens:
        b.linear(b.x, b.c, 3)
    else:
        flat = b.one("Flatten", b.one("AveragePool", b.x, kernel_shape=[4, 4], strides=[4, 4]))
        b.one("Gemm", flat, b.weight(3, b.c * 4), b.weight(3), transB=1)
    b.nodes[-1].output[0] = "y"
    graph = helper.make_graph(
        b.nodes,
        "random",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape[1:]])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", *([TOKENS] if tokens else []), 3])],
        b.stored,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    feed = np.random.default_rng(seed + 1).normal(size=shape).astype(np.float32)
    return ir.from_proto(model), {"x": feed}
