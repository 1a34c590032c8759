"""What one executed operator has to do: its kind, its sizes, its multiply-accumulates and the bytes it moves.

The kinds are those `featherweight profile` measures (docs/formats.md); an operator that is none of them moves memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

Shape = tuple[int, ...]

WIDTHS = {"float": 4, "double": 8, "float16": 2, "bfloat16": 2, "int64": 8, "uint64": 8, "int32": 4, "uint32": 4,
          "int16": 2, "uint16": 2, "int8": 1, "uint8": 1, "bool": 1}  # fmt: skip
# Operators that give their input another shape; the runtime moves no byte for them.
FREE = frozenset({"Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity", "Shape", "Size", "Dropout"})
_CONTROL = frozenset({"If", "Loop", "Scan", "SequenceMap"})
_SLOW = {"Erf": "erf", "Gelu": "erf", "BiasGelu": "erf", "FastGelu": "tanh", "Tanh": "tanh", "Sigmoid": "sigmoid",
         "QuickGelu": "sigmoid", "HardSigmoid": "mul", "Exp": "exp", "Log": "exp", "Softplus": "exp", "Pow": "pow",
         "Sqrt": "mul", "Cast": "cast", "QuantizeLinear": "quantize",
         "DequantizeLinear": "quantize", "DynamicQuantizeLinear": "quantize_dynamic"}  # fmt: skip
_COPIES = frozenset({"Concat", "Slice", "Split", "Pad", "Expand", "Tile", "Gather", "GatherElements", "GatherND",
                     "Where", "ReorderInput", "ReorderOutput", "DepthToSpace", "SpaceToDepth"})  # fmt: skip
_REDUCES = ("Reduce", "GlobalAveragePool", "GlobalMaxPool", "ArgM")
_NORMS = frozenset({"LayerNormalization", "SkipLayerNormalization", "SimplifiedLayerNormalization",
                    "SkipSimplifiedLayerNormalization", "RMSNormalization", "InstanceNormalization",
                    "GroupNormalization", "BatchNormalization", "LpNormalization"})  # fmt: skip
INTEGER = "int8"
DYNAMIC = "int8_dynamic"
FLOAT = "float32"
NBITS = "int4"


class Tensor(NamedTuple):
    """Type (the runtime's word) and shape of one input or output."""

    dtype: str
    shape: Shape

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes."""
        return self.size * WIDTHS.get(self.dtype, 4)


class Executed(NamedTuple):
    """One operator as it runs: absent inputs are left out. `fused` names an activation done in the same pass."""

    name: str
    op_type: str
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    fused: str = ""
    hidden: int = 0


class Work(NamedTuple):
    """A kernel's job. `macs` and `moved_bytes` (read and written once each) are exact; `dims` as the kind has them."""

    kind: str
    precision: str
    dims: tuple[int, ...]
    macs: int = 0
    moved_bytes: int = 0


def works(op: Executed) -> list[Work]:
    """The jobs of one operator: none for what only renames, several for fused blocks."""
    if op.op_type in FREE or op.op_type in _CONTROL or not op.outputs:
        return []
    rule = _RULES.get(op.op_type)
    try:
        found = rule(op) if rule is not None else [_moving(op)]
    except (IndexError, ZeroDivisionError, ValueError):
        found = [_moving(op)]
    if op.fused in _SLOW:
        found.append(Work(_SLOW[op.fused], FLOAT, (max(op.outputs[0].size, 1),), 0, 0))
    return found


def _moved(op: Executed) -> int:
    return sum(t.nbytes for t in op.inputs) + sum(t.nbytes for t in op.outputs)


def _dims(*sizes: int) -> tuple[int, ...]:
    return tuple(max(int(s), 1) for s in sizes)


def _conv(weight: int) -> Callable[[Executed], list[Work]]:
    def rule(op: Executed) -> list[Work]:
        x, w, y = op.inputs[0].shape, op.inputs[weight].shape, op.outputs[0].shape
        precision = FLOAT if op.inputs[0].dtype.startswith(("float", "double")) else INTEGER
        return [conv_work(x, w, y, precision, _moved(op))]

    return rule


def conv_work(x: Shape, w: Shape, y: Shape, precision: str, moved_bytes: int) -> Work:
    """A convolution from the shapes of input (n, c, *size), weight (out, c / groups, *kernel) and output."""
    batch, channels, outs, taps = x[0], x[1], y[1], math.prod(w[2:])
    into, out = batch * math.prod(x[2:]), batch * math.prod(y[2:])
    macs = math.prod(y) * w[1] * taps
    groups = max(channels // max(w[1], 1), 1)
    if groups > 1 and groups >= channels and outs <= 2 * channels:
        kind, dims = "depthwise", _dims(outs, into, out, taps)
    elif len(x) != 4:
        kind, dims = "conv_plain", _dims(channels, outs, into, out, taps)
    elif channels <= 4:
        kind, dims = "conv_first", _dims(channels, outs, into, out, taps)
    elif taps == 1 and into == out and groups == 1:
        kind, dims = "conv1x1", _dims(channels, outs, out)
    else:
        kind, dims = "conv", _dims(channels // groups, outs, into * groups, out, taps)
    return Work(kind, precision, dims, macs, moved_bytes)


def _transposed_conv(op: Executed) -> list[Work]:
    x, w, y = op.inputs[0].shape, op.inputs[1].shape, op.outputs[0].shape
    taps, into = math.prod(w[2:]), x[0] * math.prod(x[2:])
    macs = math.prod(x) * w[1] * taps
    # Each input position spreads over its taps: a product (positions, in) x (in, out * taps), then sums.
    return [
        Work("matmul", FLOAT, _dims(into, x[1], w[1] * taps), macs, _moved(op)),
        Work("mul", FLOAT, _dims(math.prod(y) * 2), 0, 0),
    ]


def _matmul(weight: int, precision: str) -> Callable[[Executed], list[Work]]:
    def rule(op: Executed) -> list[Work]:
        a, b, y = op.inputs[0].shape, op.inputs[weight].shape, op.outputs[0].shape
        depth = a[-1]
        if op.op_type in ("Gemm", "QGemm", "FusedGemm"):
            depth = math.prod(b) // max(y[-1], 1)
        if len(b) > 2 and math.prod(b[:-2]) > 1:
            batch, m, n = math.prod(y[:-2]), y[-2], y[-1]
            depth = math.prod(a) // max(math.prod(a[:-2]) * m, 1)
            return [Work("attention", precision, _dims(batch, m, depth, n), batch * m * n * depth, _moved(op))]
        n = y[-1]
        m = math.prod(y) // max(n, 1)
        return [Work("matmul", precision, _dims(m, depth, n), m * n * depth, _moved(op))]

    return rule


def _nbits(op: Executed) -> list[Work]:
    depth, n = op.inputs[0].shape[-1], op.outputs[0].shape[-1]
    m = op.outputs[0].size // max(n, 1)
    return [Work("matmul", NBITS, _dims(m, depth, n), m * n * depth, _moved(op))]


def _recurrent(op: Executed) -> list[Work]:
    x, w, r = (t.shape for t in op.inputs[:3])
    dynamic = op.op_type.startswith("Dynamic")  # its weights lie transposed
    steps, batch, hidden, directions = x[0], x[1], r[1 if dynamic else -1], w[0]
    macs = steps * batch * (math.prod(w) + math.prod(r))
    kind = "gru" if op.op_type == "GRU" else "lstm"
    precision = DYNAMIC if dynamic else FLOAT
    return [Work(kind, precision, _dims(steps * directions, batch, x[2], hidden), macs, _moved(op))]


def _rows(kind: str) -> Callable[[Executed], list[Work]]:
    def rule(op: Executed) -> list[Work]:
        y = op.outputs[0].shape
        cols = y[-1] if y else 1
        found = [Work(kind, FLOAT, _dims(math.prod(y) // max(cols, 1), cols), 0, _moved(op))]
        if op.op_type.startswith("Skip"):
            found.append(Work("add", FLOAT, _dims(math.prod(y)), 0, 0))
        return found

    return rule


def _gather(op: Executed) -> list[Work]:
    y, table = op.outputs[0].shape, op.inputs[0].shape
    cols = table[-1] if len(table) > 1 and y and y[-1] == table[-1] else 1
    rows = math.prod(y) // max(cols, 1)
    if cols == 1 and rows <= 64:
        return []
    return [Work("gather", FLOAT, _dims(rows, cols), 0, 2 * op.outputs[0].nbytes)]


def _pool(op: Executed) -> list[Work]:
    x, y = op.inputs[0], op.outputs[0]
    precision = INTEGER if x.dtype in ("uint8", "int8") else FLOAT
    return [Work("pool", precision, _dims(x.size + y.size * (op.hidden or 4)), 0, _moved(op))]


def _attention(op: Executed) -> list[Work]:
    """Fused attention of a whole layer: x (batch, length, width), weight (width, 3 * inner)."""
    x, w = op.inputs[0].shape, op.inputs[1].shape
    batch, length, width = x[0], x[1], x[2]
    inner = w[-1] // 3
    heads = op.hidden or max(inner // 64, 1)
    return [
        Work("matmul", FLOAT, _dims(batch * length, width, w[-1]), batch * length * width * w[-1], _moved(op)),
        *_scores(batch * heads, length, length, max(inner // heads, 1)),
    ]


def _multi_head(op: Executed) -> list[Work]:
    q, k = op.inputs[0].shape, op.inputs[min(1, len(op.inputs) - 1)].shape
    heads = op.hidden or max(q[-1] // 64, 1)
    return _scores(q[0] * heads, q[1], k[1] if len(k) == 3 else q[1], max(q[-1] // heads, 1))


def _scores(batch: int, length: int, other: int, depth: int) -> list[Work]:
    macs = batch * length * other * depth
    return [
        Work("attention", FLOAT, _dims(batch, length, depth, other), macs, 0),
        Work("softmax", FLOAT, _dims(batch * length, other), 0, 0),
        Work("attention", FLOAT, _dims(batch, length, other, depth), macs, 0),
    ]


def _moving(op: Executed) -> Work:
    """An operator that reads and writes every element once."""
    x, y = (op.inputs[0] if op.inputs else op.outputs[0]), op.outputs[0]
    most = max((t.size for t in (*op.inputs[:2], *op.outputs)), default=1)
    kind, precision, size = "mul", FLOAT, most
    name = op.op_type.removeprefix("QLinear")
    if name in _SLOW:
        kind, size = _SLOW[name], y.size
    elif name == "Transpose":
        # Rows that stay together are copied whole; else every element goes its own way.
        kind, size = ("transpose_rows" if x.shape[-1:] == y.shape[-1:] else "transpose"), y.size
    elif name in _COPIES:
        kind, size = "copy", max(sum(t.size for t in op.outputs), 1)
    elif name.startswith(_REDUCES):
        across = x.shape and y.shape and x.shape[-1] == y.shape[-1] > 1
        kind, size = ("reduce_columns" if across else "reduce"), x.size
    elif name in ("Resize", "Upsample"):
        kind, size = "resize", y.size
    elif len(op.inputs) > 1 and name in ("Add", "Sub", "Sum"):
        kind = "add"
    if x.dtype in ("uint8", "int8") and kind in ("add", "mul", "sigmoid", "reduce"):
        precision = INTEGER
    return Work(kind, precision, _dims(size), 0, _moved(op))


def _einsum(op: Executed) -> list[Work]:
    a, b, y = op.inputs[0], op.inputs[1], op.outputs[0]
    depth = max(round(math.sqrt(a.size * b.size / max(y.size, 1))), 1)  # exact for a plain product
    n = max(b.size // depth, 1)
    return [Work("matmul", FLOAT, _dims(a.size // depth, depth, n), y.size * depth, _moved(op))]


_RULES: dict[str, Callable[[Executed], list[Work]]] = {
    "Conv": _conv(1),
    "FusedConv": _conv(1),
    "NhwcFusedConv": _conv(1),
    "ConvInteger": _conv(1),
    "QLinearConv": _conv(3),
    "ConvTranspose": _transposed_conv,
    "MatMul": _matmul(1, FLOAT),
    "FusedMatMul": _matmul(1, FLOAT),
    "Gemm": _matmul(1, FLOAT),
    "FusedGemm": _matmul(1, FLOAT),
    "MatMulInteger": _matmul(1, DYNAMIC),
    "MatMulIntegerToFloat": _matmul(1, DYNAMIC),
    "DynamicQuantizeMatMul": _matmul(1, DYNAMIC),
    "QLinearMatMul": _matmul(3, INTEGER),
    "QGemm": _matmul(3, INTEGER),
    "MatMulNBits": _nbits,
    "Einsum": _einsum,
    **dict.fromkeys(("LSTM", "GRU", "RNN", "DynamicQuantizeLSTM"), _recurrent),
    **dict.fromkeys(_NORMS, _rows("layernorm")),
    **dict.fromkeys(("Softmax", "LogSoftmax"), _rows("softmax")),
    "Gather": _gather,
    **dict.fromkeys(("MaxPool", "AveragePool", "QLinearAveragePool"), _pool),
    "Attention": _attention,
    "MultiHeadAttention": _multi_head,
}


def total_macs(found: Sequence[Work]) -> int:
    """Multiply-accumulates of all."""
    return sum(w.macs for w in found)
