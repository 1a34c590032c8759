"""Random shapes and attributes of the main operators, against ONNX Runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from featherweight.errors import RunError  # noqa: E402
from featherweight.graph import io  # noqa: E402
from featherweight.learn.execute import Executor  # noqa: E402
from featherweight.runtime import ort  # noqa: E402

QUICK = settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.filter_too_much])
Arrays = list[np.ndarray | None]


def compare(op: str, arrays: Arrays, attrs: dict[str, Any], *, outputs: int = 1, opset: int = 21, stored: int = 0,
            tolerance: float = 1e-4) -> None:  # fmt: skip
    """One node executed here and by the runtime; the last `stored` inputs are initializers."""
    values: list[ir.Value | None] = []
    for k, array in enumerate(arrays):
        if array is None:
            values.append(None)
            continue
        value = ir.Value(name=f"i{k}", type=ir.TensorType(ir.DataType.from_numpy(array.dtype)),
                         shape=ir.Shape([None] * array.ndim))  # fmt: skip
        if k >= len(arrays) - stored:
            value.const_value, value.shape = ir.tensor(array, name=value.name), ir.Shape(array.shape)
        values.append(value)
    results = [ir.Value(name=f"o{k}") for k in range(outputs)]
    if op == "QuantizeLinear" and values[2] is not None:
        results[0].type = values[2].type
    node = ir.node(op, values, attributes=attrs, outputs=results, name="n")
    inputs = [v for v in values if v is not None and v.const_value is None]
    constants = [v for v in values if v is not None and v.const_value is not None]
    graph = ir.Graph(inputs, node.outputs, nodes=[node], initializers=constants, opset_imports={"": opset}, name="g")
    model = ir.Model(graph, ir_version=10)
    feeds = {v.name: arrays[int(v.name[1:])] for v in inputs}
    try:
        expected = ort.session(io.to_bytes(model), optimize=False).run(feeds)
    except RunError:
        assume(False)
    got = Executor(model)({k: torch.from_numpy(np.array(v)) for k, v in feeds.items()})
    for name, array in expected.items():
        mine = got[name].detach().numpy()
        assert (mine.shape, mine.dtype) == (array.shape, array.dtype)
        np.testing.assert_allclose(mine, array, rtol=tolerance, atol=tolerance)


def normal(data: st.DataObject, *shape: int) -> np.ndarray:
    return np.random.default_rng(data.draw(st.integers(0, 99))).standard_normal(shape).astype(np.float32)


def draw_window(data: st.DataObject, rank: int, *, dilate: bool = True) -> dict[str, Any]:
    """Strides, dilations and pads or auto_pad."""
    small = st.lists(st.integers(1, 3), min_size=rank, max_size=rank)
    attrs: dict[str, Any] = {"strides": data.draw(small)}
    auto = data.draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto == "NOTSET":
        attrs["pads"] = data.draw(st.lists(st.integers(0, 2), min_size=2 * rank, max_size=2 * rank))
        if dilate:
            attrs["dilations"] = data.draw(small)
    else:
        attrs["auto_pad"] = auto
    return attrs


@QUICK
@given(st.data())
def test_conv(data) -> None:
    rank, group = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
    sizes, kernel = ([data.draw(st.integers(1, top)) for _ in range(rank)] for top in (9, 3))
    x = normal(data, data.draw(st.integers(1, 2)), 2 * group, *sizes)
    w = normal(data, group * data.draw(st.integers(1, 2)), 2, *kernel)
    b = [normal(data, len(w))] if data.draw(st.booleans()) else []
    compare("Conv", [x, w, *b], {"group": group, **draw_window(data, rank)}, stored=data.draw(st.integers(0, 1)))


@QUICK
@given(st.data())
def test_conv_transpose(data) -> None:
    rank, group = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 2))
    sizes, kernel = ([data.draw(st.integers(1, top)) for _ in range(rank)] for top in (5, 3))
    x, w = normal(data, 2, 2 * group, *sizes), normal(data, 2 * group, 2, *kernel)
    b = [normal(data, 2 * group)] if data.draw(st.booleans()) else []
    attrs = {"group": group, **draw_window(data, rank)}
    if "pads" in attrs and data.draw(st.booleans()):
        steps = [max(s, d) for s, d in zip(attrs["strides"], attrs["dilations"], strict=True)]
        attrs["output_padding"] = [data.draw(st.integers(0, s - 1)) for s in steps]
    compare("ConvTranspose", [x, w, *b], attrs)


@QUICK
@given(st.data(), st.sampled_from(["MaxPool", "AveragePool", "LpPool"]))
def test_pools(data, op) -> None:
    rank = data.draw(st.integers(1, 3))
    kernel = [data.draw(st.integers(1, 3)) for _ in range(rank)]
    x = normal(data, 2, 2, *(data.draw(st.integers(3, 9)) for _ in range(rank)))
    attrs = {"kernel_shape": kernel, **draw_window(data, rank)}
    if "pads" in attrs:  # pads as wide as the window would leave windows of pads alone
        attrs["pads"] = [min(p, k - 1) for p, k in zip(attrs["pads"], kernel * 2, strict=True)]
        attrs["ceil_mode"] = data.draw(st.integers(0, 1))
    reach = [d * (k - 1) + 1 for k, d in zip(kernel, attrs.get("dilations", [1] * rank), strict=True)]
    assume(all(r <= n for r, n in zip(reach, x.shape[2:], strict=True)))
    if op == "AveragePool":
        attrs["count_include_pad"] = data.draw(st.integers(0, 1))
    outputs = data.draw(st.integers(1, 2)) if op == "MaxPool" else 1
    compare(op, [x], attrs, outputs=outputs, opset=22 if op == "LpPool" else 21)


@QUICK
@given(st.data())
def test_gemm_and_matmul(data) -> None:
    m, k, n = (data.draw(st.integers(1, 5)) for _ in range(3))
    trans_a, trans_b = data.draw(st.integers(0, 1)), data.draw(st.integers(0, 1))
    a, b = normal(data, *((k, m) if trans_a else (m, k))), normal(data, *((n, k) if trans_b else (k, n)))
    bias = data.draw(st.sampled_from([None, (), (1,), (n,), (m, 1), (1, n), (m, n)]))
    c = [] if bias is None else [normal(data, *bias)]
    attrs = {"transA": trans_a, "transB": trans_b, "alpha": data.draw(st.sampled_from([1.0, 0.5])), "beta": 2.0}
    compare("Gemm", [a, b, *c], attrs, stored=data.draw(st.integers(0, 1)))
    left = data.draw(st.sampled_from([(k,), (m, k), (3, m, k), (2, 1, m, k)]))
    right = data.draw(st.sampled_from([(k,), (k, n), (3, k, n), (2, 3, k, n)]))
    compare("MatMul", [normal(data, *left), normal(data, *right)], {})


@QUICK
@given(st.data())
def test_pad(data) -> None:
    shape = data.draw(st.lists(st.integers(2, 5), min_size=1, max_size=4))
    mode = data.draw(st.sampled_from(["constant", "reflect", "edge"]))
    low = -1 if mode == "constant" else 0
    pads = [data.draw(st.integers(low, d - 1)) for d in shape * 2]
    value = np.array(data.draw(st.sampled_from([0.0, -1.5])), np.float32) if mode == "constant" else None
    if mode != "constant" or data.draw(st.booleans()):
        compare("Pad", [normal(data, *shape), np.array(pads)], {"mode": mode}, stored=data.draw(st.integers(0, 1)))
    else:
        compare("Pad", [normal(data, *shape), np.array(pads), value], {"mode": mode}, stored=2)


@QUICK
@given(st.data())
def test_slice(data) -> None:
    shape = data.draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    bound = st.integers(-8, 8)
    axes = data.draw(st.lists(st.integers(0, len(shape) - 1), min_size=1, max_size=len(shape), unique=True))
    starts, ends = ([data.draw(bound) for _ in axes] for _ in range(2))
    steps = [data.draw(st.sampled_from([-3, -2, -1, 1, 2, 3])) for _ in axes]
    bounds = [np.array(v, np.int64) for v in (starts, ends, axes, steps)]
    compare("Slice", [normal(data, *shape), *bounds], {}, stored=data.draw(st.sampled_from([0, 4])))


COORDINATES = ["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]


@settings(QUICK, max_examples=80)
@given(st.data())
def test_resize(data) -> None:
    mode = data.draw(st.sampled_from(["nearest", "linear", "cubic"]))
    x = normal(data, 1, 2, data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6)))
    attrs: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": data.draw(st.sampled_from(COORDINATES))}
    if mode == "nearest":
        rounding = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
        attrs["nearest_mode"] = data.draw(st.sampled_from(rounding))
    if data.draw(st.booleans()):
        # Powers of two: elsewhere float32 rounding of a coordinate decides which neighbour is nearest.
        scale = st.sampled_from([0.5, 1.0, 2.0, 4.0] if mode == "nearest" else [0.5, 0.8, 1.5, 2.0, 3.3])
        arrays: Arrays = [x, None, np.array([1, 1, data.draw(scale), data.draw(scale)], np.float32)]
    else:
        size = [d * f for d, f in zip(x.shape[2:], (2, 4), strict=True)]
        size = size if mode == "nearest" else [data.draw(st.integers(1, 9)) for _ in range(2)]
        arrays = [x, None, None, np.array([1, 2, *size], np.int64)]
    compare("Resize", arrays, attrs, opset=19, stored=data.draw(st.integers(0, 1)))


@QUICK
@given(st.data())
def test_reductions(data) -> None:
    ops = ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceLogSumExp"]
    op, shape = data.draw(st.sampled_from(ops)), data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    axes = data.draw(st.lists(st.integers(-len(shape), -1), max_size=len(shape), unique=True))
    attrs = {"keepdims": data.draw(st.integers(0, 1))}
    if data.draw(st.booleans()):
        compare(op, [normal(data, *shape), np.array(axes, np.int64)], attrs, stored=data.draw(st.integers(0, 1)))
    elif axes and op != "ReduceSum":
        compare(op, [normal(data, *shape)], {**attrs, "axes": axes}, opset=13)


@QUICK
@given(st.data(), st.sampled_from(["LSTM", "GRU", "RNN"]))
def test_recurrent(data, op) -> None:
    time, batch, width, hidden = (data.draw(st.integers(1, 4)) for _ in range(4))
    gates = {"LSTM": 4, "GRU": 3, "RNN": 1}[op]
    direction = data.draw(st.sampled_from(["forward", "reverse", "bidirectional"]))
    ways = 2 if direction == "bidirectional" else 1
    arrays: Arrays = [normal(data, time, batch, width), normal(data, ways, gates * hidden, width),
                      normal(data, ways, gates * hidden, hidden)]  # fmt: skip
    arrays.append(normal(data, ways, 2 * gates * hidden) if data.draw(st.booleans()) else None)
    lengths = np.array([data.draw(st.integers(1, time)) for _ in range(batch)], np.int32)
    arrays.append(lengths if data.draw(st.booleans()) else None)
    arrays += [normal(data, ways, batch, hidden)] * (2 if op == "LSTM" else 1) if data.draw(st.booleans()) else []
    attrs: dict[str, Any] = {"hidden_size": hidden, "direction": direction}
    if op == "GRU":
        attrs["linear_before_reset"] = data.draw(st.integers(0, 1))
    while arrays[-1] is None:
        arrays.pop()
    compare(op, arrays, attrs, outputs=3 if op == "LSTM" else 2)


@QUICK
@given(st.data())
def test_softmax_norms_and_gathers(data) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=2, max_size=4))
    axis = data.draw(st.integers(-len(shape), len(shape) - 1))
    x, opset = normal(data, *shape), data.draw(st.sampled_from([11, 21]))
    compare(data.draw(st.sampled_from(["Softmax", "LogSoftmax"])), [x], {"axis": axis}, opset=opset)
    tail = shape[axis % len(shape) :]
    compare("LayerNormalization", [x, normal(data, *tail), normal(data, *tail)], {"axis": axis}, opset=17)
    size = shape[axis]
    index = np.array(data.draw(st.lists(st.integers(-size, size - 1), min_size=1, max_size=4)), np.int64)
    index = index.reshape(()) if index.size == 1 else index
    compare("Gather", [x, index], {"axis": axis}, stored=data.draw(st.integers(0, 1)))
    target = [data.draw(st.sampled_from([1, d])) for d in shape]
    compare("Expand", [x.reshape(shape), np.array([2, *target], np.int64)], {}, stored=data.draw(st.integers(0, 1)))


@QUICK
@given(st.data())
def test_quantize_and_dequantize(data) -> None:
    rows, columns, axis = data.draw(st.integers(2, 6)), data.draw(st.integers(2, 6)), data.draw(st.integers(0, 1))
    kind = data.draw(st.sampled_from([np.uint8, np.int8, np.int16]))
    placing = data.draw(st.sampled_from(["tensor", "channel", "block"]))
    shape = {"tensor": (), "channel": ((rows, columns)[axis],)}.get(placing)
    attrs: dict[str, int] = {"axis": axis}
    if shape is None:
        attrs["block_size"] = block = data.draw(st.integers(1, (rows, columns)[axis]))
        shape = tuple(-(-d // block) if k == axis else d for k, d in enumerate((rows, columns)))
    scale = np.abs(normal(data, *shape)) + np.float32(0.05)
    zero = np.round(normal(data, *shape) * 3 + 8).clip(0, 20).astype(kind)
    x = normal(data, rows, columns) * 10
    info = np.iinfo(kind)
    codes = np.random.default_rng(0).integers(info.min, info.max + 1, (rows, columns)).astype(kind)
    compare("QuantizeLinear", [x, scale, zero], attrs)
    compare("DequantizeLinear", [codes, scale, zero], attrs, stored=data.draw(st.integers(0, 3)))
