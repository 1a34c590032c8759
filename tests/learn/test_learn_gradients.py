"""Every registered operator: its gradient against finite differences in float64, its values against ONNX Runtime.

One line a form of an operator in `CHECKS`; an operator registered without one, and without the mark that it has no
gradient, fails `test_no_operator_is_unchecked`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from featherweight.graph import io  # noqa: E402
from featherweight.learn.ops import Call, find, operators  # noqa: E402
from featherweight.runtime import ort  # noqa: E402

RNG = np.random.default_rng(0)


def x(*shape: int, low: float | None = None, high: float = 1.0) -> np.ndarray:
    """Random values: normal, or uniform in low..high."""
    return RNG.standard_normal(shape) if low is None else RNG.uniform(low, high, shape)


def i(*values: Any) -> np.ndarray:
    """int64 values."""
    return np.array(values[0] if len(values) == 1 and isinstance(values[0], list) else values, np.int64)


def n(value: int) -> np.ndarray:
    """One int64 without axes."""
    return np.array(value, np.int64)


@dataclass
class Check:
    """One node: inputs (float64 ones are differentiated unless fixed), attributes, outputs, opset."""

    op: str
    inputs: list[np.ndarray | None]
    attrs: dict[str, Any] = field(default_factory=dict)
    outputs: int = 1
    opset: int = 21
    domain: str = ""
    fixed: tuple[int, ...] = ()
    runtime: bool = True

    @property
    def label(self) -> str:
        return f"{self.domain and 'ms::'}{self.op}/{self.opset}{sorted(self.attrs)}"


def C(op: str, *inputs: Any, outputs: int = 1, opset: int = 21, domain: str = "", fixed: Any = (),
      runtime: bool = True, **attrs: Any) -> Check:  # fmt: skip
    return Check(op, list(inputs), attrs, outputs, opset, domain, tuple(fixed), runtime)


MS = "com.microsoft"
UNARY = [
    "Abs", "Asinh", "Atan", "Cos", "Cosh", "Erf", "Exp", "Neg", "Relu", "Sigmoid", "Sin", "Sinh", "Softplus",
    "Softsign", "Tan", "Tanh", "Identity",
]  # fmt: skip
REDUCE = ["ReduceSum", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceL1", "ReduceL2", "ReduceSumSquare"]
LOGS = ["ReduceLogSum", "ReduceLogSumExp"]

CHECKS: list[Check] = [
    *(C(op, x(2, 3)) for op in UNARY),
    *(C(op, x(2, 3, low=-0.9, high=0.9)) for op in ("Acos", "Asin", "Atanh")),
    *(C(op, x(2, 3, low=1.2, high=3)) for op in ("Acosh", "Log", "Sqrt", "Reciprocal")),
    C("HardSwish", x(3, 4) * 3), C("Mish", x(3, 4), opset=22), C("LeakyRelu", x(3, 4), alpha=0.3),
    C("PRelu", x(2, 3, 2), x(3, 1)), C("Elu", x(3, 4), alpha=0.7), C("Celu", x(3, 4), alpha=0.7),
    C("Selu", x(3, 4), alpha=1.5, gamma=0.7), C("ThresholdedRelu", x(3, 4), alpha=0.2),
    C("HardSigmoid", x(3, 4) * 3, alpha=0.3, beta=0.4), C("Shrink", x(3, 4), lambd=0.4, bias=0.2),
    C("Swish", x(3, 4), alpha=0.5, opset=24, runtime=False), C("Swish", x(3, 4), opset=24, runtime=False),
    C("Gelu", x(3, 4)), C("Gelu", x(3, 4), approximate="tanh"), C("Gelu", x(3, 4), domain=MS),
    C("FastGelu", x(3, 4), x(4), domain=MS), C("FastGelu", x(3, 4), domain=MS), C("BiasGelu", x(3, 4), x(4), domain=MS),
    C("QuickGelu", x(3, 4), domain=MS, alpha=1.2), C("Dropout", x(3, 4), opset=13), C("Dropout", x(3, 4), outputs=2),
    *(C(op, x(2, 3), x(3)) for op in ("Add", "Sub", "Mul")), C("Div", x(2, 3), x(3, low=1, high=2)),
    *(C(op, x(2, 3, 4), x(3), axis=1, broadcast=1, opset=6, runtime=False) for op in ("Add", "Sub", "Mul")),
    C("Div", x(2, 3), x(2, 3, low=1, high=2), opset=6, runtime=False),
    C("Pow", x(2, 3, low=1, high=2), x(3)), C("Pow", x(2, 3), np.array(2.0), fixed=[1]),
    *(C(op, x(2, 3), x(3), x(2, 1)) for op in ("Max", "Min", "Sum", "Mean")),
    C("Where", np.array([[True, False, True]]), x(2, 3), x(1, 3)), C("Clip", x(3, 4), min=-0.5, max=0.4, opset=6),
    C("Clip", x(3, 4), np.array(-0.5), np.array(0.4), fixed=[1, 2]), C("Clip", x(3, 4), None, np.array(0.4), fixed=[2]),
    C("Clip", x(3, 4), np.array(0.0), fixed=[1]),
    C("MatMul", x(2, 3, 4), x(4, 5)), C("MatMul", x(4), x(2, 4, 5)), C("Gemm", x(3, 4), x(4, 5), x(5)),
    C("Gemm", x(4, 3), x(5, 4), x(3, 1), transA=1, transB=1, alpha=0.5, beta=2.0), C("Gemm", x(3, 4), x(4, 5)),
    C("FusedMatMul", x(2, 3, 4), x(2, 5, 4), transB=1, alpha=0.3, domain=MS),
    C("Einsum", x(2, 3), x(3, 4), equation="ij,jk->ik"),
    C("Conv", x(2, 4, 6, 5), x(6, 2, 3, 2), x(6), group=2, strides=[2, 1], pads=[1, 0, 0, 1], dilations=[1, 2]),
    C("Conv", x(1, 2, 7), x(3, 2, 4), auto_pad="SAME_LOWER", strides=[2]),
    C("Conv", x(1, 1, 3, 2, 3), x(2, 1, 2, 2, 2)),
    C("ConvTranspose", x(1, 4, 3, 4), x(4, 2, 3, 3), x(4), group=2, strides=[2, 2], pads=[1, 0, 0, 1]),
    C("ConvTranspose", x(1, 2, 4), x(2, 3, 3), x(3), strides=[2], output_padding=[1], pads=[0, 1]),
    C("BatchNormalization", x(2, 3, 4), x(3), x(3), x(3), x(3, low=0.5, high=2)), C("LRN", x(1, 5, 2, 2), size=3),
    C("InstanceNormalization", x(2, 3, 5), x(3), x(3)), C("GroupNormalization", x(2, 4, 3), x(4), x(4), num_groups=2),
    C("GroupNormalization", x(2, 4, 3), x(2), x(2), num_groups=2, opset=18),
    C("LayerNormalization", x(2, 3, 4), x(3, 4), x(3, 4), axis=1), C("LayerNormalization", x(2, 4), x(4), outputs=3),
    C("SimplifiedLayerNormalization", x(2, 4), x(4), runtime=False),
    C("RMSNormalization", x(2, 4), x(4), opset=23), C("MeanVarianceNormalization", x(2, 2, 3, 3)),
    C("SkipLayerNormalization", x(2, 3, 4), x(2, 3, 4), x(4), x(4), x(4), domain=MS),
    C("LpNormalization", x(3, 4), axis=0, p=2), C("LpNormalization", x(3, 4), p=1),
    C("Softmax", x(2, 3, 4), axis=1), C("Softmax", x(2, 3, 4), axis=1, opset=11), C("LogSoftmax", x(2, 3, 4), axis=1),
    C("LogSoftmax", x(2, 3, 4), axis=2, opset=11),
    C("MaxPool", x(2, 2, 6, 5), kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 0, 1], ceil_mode=1),
    C("MaxPool", x(1, 2, 7), kernel_shape=[3], dilations=[2], pads=[1, 1], outputs=2),
    C("AveragePool", x(2, 2, 6, 5), kernel_shape=[3, 2], strides=[2, 2], pads=[1, 0, 0, 1], count_include_pad=1),
    C("AveragePool", x(1, 2, 7), kernel_shape=[3], strides=[2], pads=[1, 1], ceil_mode=1),
    C("AveragePool", x(1, 2, 6, 6), kernel_shape=[2, 2], dilations=[2, 1], pads=[0, 1, 1, 0]),
    C("GlobalAveragePool", x(2, 3, 4, 2)), C("GlobalMaxPool", x(2, 3, 4, 2)), C("GlobalLpPool", x(2, 3, 4), p=3),
    C("LpPool", x(1, 2, 6, 6), kernel_shape=[2, 3], strides=[2, 2], p=2),
    C("LSTM", x(3, 2, 4), x(2, 12, 4), x(2, 12, 3), x(2, 24), None, x(2, 2, 3), x(2, 2, 3), hidden_size=3,
      direction="bidirectional", outputs=3),
    C("LSTM", x(3, 2, 4), x(1, 12, 4), x(1, 12, 3), x(1, 24), np.array([2, 3], np.int32), x(1, 2, 3), x(1, 2, 3),
      x(1, 9), hidden_size=3, outputs=3),
    C("GRU", x(3, 2, 4), x(1, 9, 4), x(1, 9, 3), x(1, 18), None, x(1, 2, 3), hidden_size=3, outputs=2),
    C("GRU", x(3, 2, 4), x(1, 9, 4), x(1, 9, 3), x(1, 18), hidden_size=3, linear_before_reset=1, direction="reverse",
      outputs=2),
    C("RNN", x(3, 2, 4), x(2, 3, 4), x(2, 3, 3), hidden_size=3, direction="bidirectional", outputs=2,
      activations=["Tanh", "Affine"], activation_alpha=[0.5], activation_beta=[0.1]),
    *(C(op, x(2, 3, 4, low=0.5, high=2), axes=[0, 2], keepdims=0, opset=11) for op in (*REDUCE, *LOGS)),
    *(C(op, x(2, 3, 4, low=0.5, high=2), i(-1)) for op in (*REDUCE, *LOGS)),
    *(C(op, x(2, 3, low=0.5, high=2), noop_with_empty_axes=1) for op in ("ReduceSum", "ReduceMean")),
    C("CumSum", x(2, 3), n(1), exclusive=1, reverse=1), C("TopK", x(3, 5), i(2), axis=1, outputs=2),
    C("TopK", x(3, 5), k=2, axis=1, outputs=2, opset=9), C("Det", x(2, 3, 3)), C("Trilu", x(3, 4), n(1), upper=0),
    C("Pad", x(2, 3), pads=[1, 0, 0, 2], mode="reflect", opset=10), C("Pad", x(2, 3), i(1, 0, -1, 2), np.array(0.5),
      fixed=[2]), C("Pad", x(2, 4), i(2, 1), None, i(1), mode="edge"), C("Pad", x(2, 4), i(2, 1), None, i(-1),
      mode="reflect"), C("Pad", x(2, 4), i(0, 2, 0, 3), mode="wrap"),
    C("Upsample", x(1, 1, 3, 3), mode="nearest", scales=[1.0, 1.0, 2.0, 1.5], opset=8),
    C("Upsample", x(1, 1, 3, 3), np.array([1, 1, 2, 1.5]), mode="linear", fixed=[1], opset=9),
    C("Resize", x(1, 1, 3, 3), np.array([1, 1, 2.0, 1.5]), mode="linear", fixed=[1], opset=10),
    C("Resize", x(1, 1, 4, 3), None, np.array([1, 1, 1.5, 2.0]), mode="cubic", fixed=[2]),
    C("Resize", x(1, 1, 4, 3), None, None, i(3, 5), axes=[2, 3], mode="linear", antialias=1),
    C("Resize", x(1, 2, 3, 3), None, np.array([1, 1, 2, 2.0]), mode="nearest", fixed=[2]),
    C("Reshape", x(2, 6), shape=[0, 3, -1], opset=4, runtime=False), C("Reshape", x(2, 6), i(0, 3, -1)),
    C("Flatten", x(2, 3, 4), axis=-1), C("Transpose", x(2, 3, 4), perm=[2, 0, 1]), C("Transpose", x(2, 3)),
    C("Squeeze", x(2, 1, 3), axes=[1], opset=11), C("Squeeze", x(2, 1, 3), i(1)), C("Squeeze", x(2, 1, 3)),
    C("Unsqueeze", x(2, 3), axes=[0, 3], opset=11), C("Unsqueeze", x(2, 3), i(0, -1)),
    C("Concat", x(2, 3), x(2, 1), axis=1), C("Split", x(5, 2), split=[2, 3], opset=11, outputs=2),
    C("Split", x(5, 2), i(2, 3), outputs=2), C("Split", x(5, 2), num_outputs=2, outputs=2),
    C("Slice", x(5, 4), starts=[1], ends=[-1], axes=[0], opset=9), C("Slice", x(5, 4), i(3, 0), i(-99, 3), i(0, 1),
      i(-2, 2)), C("Expand", x(2, 1), i(3, 1, 4)), C("Tile", x(2, 3), i(2, 1)),
    C("Cast", x(2, 3), to=11, runtime=False), C("CastLike", x(2, 3), np.array(1.0), fixed=[1]),
    C("DepthToSpace", x(1, 8, 2, 3), blocksize=2), C("DepthToSpace", x(1, 8, 2, 3), blocksize=2, mode="CRD"),
    C("SpaceToDepth", x(1, 2, 4, 6), blocksize=2), C("Gather", x(4, 3), i([[0, -1], [2, 2]])),
    C("Gather", x(4, 3), n(1), axis=1), C("GatherElements", x(3, 3), i([[0, -1, 1]])),
    C("GatherND", x(2, 3, 4), i([[1], [0]]), batch_dims=1), C("GatherND", x(2, 3, 4), i([[1, -1], [0, 2]])),
    C("ScatterElements", x(3, 3), i([[1, 0, 2]]), x(1, 3)), C("Scatter", x(3, 3), i([[1, 0, 2]]), x(1, 3), opset=9),
    C("ScatterElements", x(3, 3), i([[1, 1, 2]]), x(1, 3), axis=1, reduction="add"),
    C("ScatterND", x(4, 3), i([[1], [3]]), x(2, 3)), C("ScatterND", x(4, 3), i([[1], [1]]), x(2, 3), reduction="add"),
    C("Compress", x(3, 2), np.array([True, False, True]), axis=0), C("Compress", x(3, 2), np.array([False, True])),
    C("ReverseSequence", x(4, 2), i(3, 2)), C("ReverseSequence", x(2, 4), i(3, 2), batch_axis=0, time_axis=1),
]  # fmt: skip

BY_OTHER_TESTS = {
    ("", "If"), ("", "Loop"), ("", "Scan"),  # bodies need a graph: below
    ("", "QuantizeLinear"), ("", "DequantizeLinear"), (MS, "DequantizeLinear"), ("", "DynamicQuantizeLinear"),
    # straight-through: against their smooth stand-in, and by training, elsewhere
    ("", "MatMulInteger"), ("", "ConvInteger"), ("", "QLinearMatMul"), ("", "QLinearConv"), (MS, "MatMulNBits"),
}  # fmt: skip


def node_of(check: Check) -> ir.Node:
    values = []
    for k, array in enumerate(check.inputs):
        if array is None:
            values.append(None)
            continue
        kind = ir.DataType.FLOAT if array.dtype == np.float64 else ir.DataType.from_numpy(array.dtype)
        values.append(ir.Value(name=f"i{k}", type=ir.TensorType(kind), shape=ir.Shape(array.shape)))
    outputs = [ir.Value(name=f"o{k}") for k in range(check.outputs)]
    return ir.node(check.op, values, attributes=check.attrs, domain=check.domain, outputs=outputs, name="n")


def kernel_of(check: Check, tensors: list[Any], *, known: bool) -> Any:
    form = find(node_of(check), check.opset)
    assert form is not None
    constants = tuple(t if known and (check.inputs[k] is None or not moving(check, k)) else None
                      for k, t in enumerate(tensors))  # fmt: skip
    return form.build(Call(node_of(check), check.opset, constants, {}))


def moving(check: Check, k: int) -> bool:
    """True for inputs that are differentiated."""
    array = check.inputs[k]
    return array is not None and array.dtype == np.float64 and k not in check.fixed


@pytest.mark.parametrize("known", [True, False], ids=["constants", "computed"])
@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.label)
def test_gradient_agrees_with_finite_differences(check: Check, known: bool) -> None:
    tensors = [None if a is None else torch.from_numpy(np.array(a)) for a in check.inputs]
    kernel = kernel_of(check, tensors, known=known)
    places = [k for k in range(len(tensors)) if moving(check, k)]

    def function(*given: Any) -> tuple[Any, ...]:
        full = list(tensors)
        for k, value in zip(places, given, strict=True):
            full[k] = value
        result = kernel(*full)
        results = result if isinstance(result, tuple) else (result,)
        return tuple(r for r in results if r.is_floating_point())

    # Many inputs: one random direction instead of each alone.
    fast = sum(tensors[k].numel() for k in places) > 40
    assert torch.autograd.gradcheck(function, [tensors[k].clone().requires_grad_() for k in places], fast_mode=fast)


@pytest.mark.parametrize("check", [c for c in CHECKS if c.runtime], ids=lambda c: c.label)
def test_values_are_those_of_onnx_runtime(check: Check) -> None:
    node = node_of(check)
    arrays = [None if a is None else np.asarray(a, np.float32 if a.dtype == np.float64 else None) for a in check.inputs]
    opsets = {"": check.opset, check.domain: check.opset if not check.domain else 1}
    graph = ir.Graph(
        [v for v in node.inputs if v is not None], node.outputs, nodes=[node], opset_imports=opsets, name="g"
    )
    feeds = {f"i{k}": a for k, a in enumerate(arrays) if a is not None}
    expected = ort.session(io.to_bytes(ir.Model(graph, ir_version=10)), optimize=False).run(feeds)
    tensors = [None if a is None else torch.from_numpy(np.array(a)) for a in arrays]
    result = kernel_of(check, tensors, known=True)(*tensors)
    results = result if isinstance(result, tuple) else (result,)
    for k, array in expected.items():
        mine = results[int(k[1:])].numpy()
        assert mine.shape == array.shape
        assert mine.dtype == array.dtype
        np.testing.assert_allclose(mine, array, rtol=1e-5, atol=1e-5)


def test_no_operator_is_unchecked() -> None:
    covered = {id(find(node_of(c), c.opset)) for c in CHECKS}
    unchecked = [
        (form.domain, form.op_type, form.since)
        for form in operators()
        if form.gradient != "none" and id(form) not in covered and (form.domain, form.op_type) not in BY_OTHER_TESTS
    ]
    assert not unchecked, f"operators without a check of their gradient: {unchecked}"
