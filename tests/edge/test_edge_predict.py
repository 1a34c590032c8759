"""Predicted latency, by hand: one kernel, one graph, and what may never happen (more work in less time)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from featherweight.core import Profile
from featherweight.device import Kernel
from featherweight.edge.estimate import FEATURES, Estimator
from featherweight.edge.fitting import RUNTIME_BYTES, fits, loaded_bytes
from featherweight.edge.observe import executed, random_feeds
from featherweight.edge.planned import planned
from featherweight.edge.predict import PREDICTED, latency, latency_of_file
from featherweight.edge.work import Executed, Tensor, Work, conv_work, total_macs, works
from featherweight.errors import BudgetError
from featherweight.graph import io
from featherweight.runtime.profile_files import KERNEL_DIMS as DIMS

ROOF = Profile(
    "roof", "arm64", 1, 1 << 30, False, measured=False, rates={"float32": 2.0, "int8": 8.0}, memory_gb_per_s=4.0,
    call_us=100.0, node_us=3.0,
)  # fmt: skip


def conv_model(*, relu: bool = True) -> ir.Model:
    """(1, 8, 10, 10) -> Conv 3x3, 16 channels, padded -> Relu."""
    rng = np.random.default_rng(0)
    w = numpy_helper.from_array(rng.normal(size=(16, 8, 3, 3)).astype(np.float32), "w")
    nodes = [helper.make_node("Conv", ["x", "w"], ["c"], "conv", pads=[1, 1, 1, 1], kernel_shape=[3, 3])]
    if relu:
        nodes.append(helper.make_node("Relu", ["c"], ["y"], "relu"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 10, 10])],
        [helper.make_tensor_value_info("y" if relu else "c", TensorProto.FLOAT, [1, 16, 10, 10])],
        [w],
    )
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


# 10 * 10 outputs of 16 channels, 8 * 9 products each; read 8 * 100 + 16 * 8 * 9, written 16 * 100, 4 bytes each.
CONV_MACS = 100 * 16 * 8 * 9
CONV_BYTES = 4 * (8 * 100 + 16 * 8 * 9 + 16 * 100)


def test_a_convolution_takes_what_the_roofline_says() -> None:
    found = latency(conv_model(), ROOF)
    # 2 GMAC/s is 2000 MACs a microsecond; 4 GB/s 4000 bytes a microsecond.
    us = max(CONV_MACS / 2000, CONV_BYTES / 4000)
    assert us == pytest.approx(57.6)
    assert found.per_node["conv"] == pytest.approx((us + 3) / 1000)
    assert found.per_node["relu"] == 0.0  # fused into the convolution's pass
    assert found.ms == pytest.approx((us + 3 + 100) / 1000)
    assert found.label == PREDICTED == "predicted"
    assert found.from_measured == 0.0


def test_memory_is_the_limit_where_arithmetic_is_fast() -> None:
    fast = dataclasses.replace(ROOF, rates={"float32": 1e6}, memory_gb_per_s=0.5, node_us=None, call_us=None)
    assert latency(conv_model(), fast).ms == pytest.approx(CONV_BYTES / 500 / 1000)


def test_a_device_without_a_figure_has_no_such_limit() -> None:
    bare = Profile("bare", "arm64", 1, 1 << 30, False, rates={"float32": 2.0})
    assert latency(conv_model(), bare).ms == pytest.approx(CONV_MACS / 2000 / 1000)


def test_the_file_and_the_graph_agree(tmp_path) -> None:
    model = conv_model()
    io.save(model, tmp_path / "m.onnx")
    graph, file = latency(model, ROOF), latency_of_file(tmp_path / "m.onnx", ROOF)
    assert file.per_node["conv"] == pytest.approx(graph.per_node["conv"])
    # The runtime may turn its layout around the convolution, which is told; nothing else may come on top.
    assert graph.ms <= file.ms * 1.001 <= graph.ms + 0.05


def test_a_profile_that_knows_nothing_predicts_nothing() -> None:
    with pytest.raises(BudgetError, match="must have rates or measured kernels, but 'nothing' has neither"):
        latency(conv_model(), Profile("nothing", "arm64", 1, 1, False))


def test_open_axes_count_as_one_and_shapes_are_taken(tmp_path) -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 32])
    w = numpy_helper.from_array(np.ones((64, 32), np.float32), "w")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"], "mm")], "g", [x], [y], [w])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    slow = dataclasses.replace(ROOF, memory_gb_per_s=None, node_us=None, call_us=None)
    assert latency(model, slow).ms == pytest.approx(64 * 32 / 2000 / 1000)
    assert latency(model, slow, {"x": (7, 64)}).ms == pytest.approx(7 * 64 * 32 / 2000 / 1000)
    io.save(model, tmp_path / "m.onnx")
    assert latency_of_file(tmp_path / "m.onnx", slow, shapes={"x": (7, 64)}).ms == pytest.approx(7 * 64 * 32 / 2e6)


def test_what_cannot_be_told_is_told() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([helper.make_node("Own", ["x"], ["y"], "own", domain="mine")], "g", [x], [y])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    found = latency(ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=8)), ROOF)
    assert found.unknown == ("own",)


# --- what operators are -------------------------------------------------------------------------------------------


def floats(*shape: int) -> Tensor:
    return Tensor("float", shape)


@pytest.mark.parametrize(
    ("x", "w", "y", "kind", "dims"),
    [
        ((1, 32, 8, 8), (64, 32, 1, 1), (1, 64, 8, 8), "conv1x1", (32, 64, 64)),
        ((2, 32, 8, 8), (64, 32, 3, 3), (2, 64, 4, 4), "conv", (32, 64, 128, 32, 9)),
        ((1, 3, 8, 8), (16, 3, 3, 3), (1, 16, 4, 4), "conv_first", (3, 16, 64, 16, 9)),
        ((1, 32, 8, 8), (32, 1, 3, 3), (1, 32, 8, 8), "depthwise", (32, 64, 64, 9)),
        ((1, 32, 50), (64, 32, 5), (1, 64, 50), "conv_plain", (32, 64, 50, 50, 5)),
    ],
)
def test_convolutions_are_told_apart(x, w, y, kind, dims) -> None:
    work = conv_work(x, w, y, "float32", 0)
    assert (work.kind, work.dims) == (kind, dims)
    assert work.macs == math.prod(y) * math.prod(w[1:])


@pytest.mark.parametrize(
    ("op", "inputs", "outputs", "expected"),
    [
        ("MatMul", [floats(1, 5, 8), floats(8, 3)], [floats(1, 5, 3)], [("matmul", (5, 8, 3), 120)]),
        ("Gemm", [floats(2, 8), floats(3, 8)], [floats(2, 3)], [("matmul", (2, 8, 3), 48)]),
        (
            "MatMul",
            [floats(1, 4, 6, 2), floats(1, 4, 2, 6)],
            [floats(1, 4, 6, 6)],
            [("attention", (4, 6, 2, 6), 4 * 72)],
        ),
        ("Reshape", [floats(4)], [floats(2, 2)], []),
        ("If", [floats(1)], [floats(4)], []),
        ("Softmax", [floats(3, 7)], [floats(3, 7)], [("softmax", (3, 7), 0)]),
        ("Add", [floats(3, 7), floats(7)], [floats(3, 7)], [("add", (21,), 0)]),
        ("LSTM", [floats(5, 2, 3), floats(1, 16, 3), floats(1, 16, 4)], [floats(5, 1, 2, 4)],
         [("lstm", (5, 2, 3, 4), 10 * 16 * 7)]),
        ("GlobalAveragePool", [floats(1, 8, 4, 4)], [floats(1, 8, 1, 1)], [("reduce", (128,), 0)]),
    ],
)  # fmt: skip
def test_operators_become_jobs(op, inputs, outputs, expected) -> None:
    found = works(Executed("n", op, tuple(inputs), tuple(outputs)))
    assert [(w.kind, w.dims, w.macs) for w in found] == expected


def test_any_operator_with_odd_shapes_is_still_a_job() -> None:
    for op in ("Conv", "MatMul", "Gemm", "LSTM", "MatMulNBits", "Attention", "Einsum", "Softmax", "Gather", "MaxPool"):
        found = works(Executed("n", op, (floats(3),), (floats(),)))
        assert all(d >= 1 for w in found for d in w.dims), op


# --- from measured kernels ----------------------------------------------------------------------------------------


def product_kernels(gmacs: float = 5.0) -> tuple[Kernel, ...]:
    """Products that take 2 us and their arithmetic, exactly."""
    sizes = [(m, k, n) for m in (1, 16, 64) for k in (32, 256) for n in (32, 512)]
    return tuple(Kernel("matmul", "float32", s, 2.0 + math.prod(s) / (gmacs * 1e3)) for s in sizes)


def test_a_law_in_the_measurements_is_found_again() -> None:
    estimator = Estimator(dataclasses.replace(ROOF, kernels=product_kernels()))
    for dims in ((1, 32, 32), (8, 128, 128), (200, 300, 700)):
        us, how = estimator.us(Work("matmul", "float32", dims))
        assert how == "measured"
        assert us == pytest.approx(2.0 + math.prod(dims) / 5e3, rel=0.02)


def test_a_measured_size_is_read_off() -> None:
    line = tuple(Kernel("tanh", "float32", (size,), us) for size, us in ((10, 1.0), (100, 5.0), (1000, 100.0)))
    estimator = Estimator(dataclasses.replace(ROOF, kernels=line))
    for size, us in ((10, 1.0), (55, 3.0), (100, 5.0), (5, 0.5), (2000, 200.0)):
        assert estimator.us(Work("tanh", "float32", (size,)))[0] == pytest.approx(us)


def test_extreme_kernels_of_a_file_are_no_trouble() -> None:
    extreme = [((1, 1, 1), 1e-6), ((2**59, 2**59, 2**59), 1e-6), ((2**59, 1, 1), 1e17), ((1, 2, 3), 1e17)]
    kernels = tuple(Kernel("matmul", "float32", d, us) for d, us in extreme)
    us, _ = Estimator(dataclasses.replace(ROOF, kernels=kernels)).us(Work("matmul", "float32", (128, 128, 128)))
    assert math.isfinite(us)
    assert us >= 0


def test_precisions_stand_in_for_each_other() -> None:
    estimator = Estimator(dataclasses.replace(ROOF, kernels=product_kernels()))
    assert estimator.us(Work("matmul", "int8", (16, 32, 32)))[1] == "measured"
    job = Work("depthwise", "int8_dynamic", (8, 100, 100, 9), 7200, 100)
    us, rule = estimator.us(job)
    assert us == pytest.approx(7200 / 8000)
    assert rule == "roofline"


def test_every_kind_with_sizes_has_its_features() -> None:
    assert set(DIMS) == set(FEATURES)
    for kind, count in DIMS.items():
        assert (FEATURES[kind]((3,) * count, 8) >= 0).all()


SIZES = st.integers(1, 400)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from(sorted(DIMS)), st.integers(0, 4), st.integers(1, 300))
def test_the_fit_never_makes_more_work_faster(data, kind, axis, more) -> None:
    dims = data.draw(st.tuples(*[SIZES] * DIMS[kind]))
    points = data.draw(
        st.lists(
            st.tuples(st.tuples(*[SIZES] * DIMS[kind]), st.floats(0.01, 1e5)),
            min_size=3,
            max_size=8,
            unique_by=lambda p: p[0],
        )
    )
    kernels = tuple(Kernel(kind, "float32", d, us) for d, us in points)
    fit = Estimator(dataclasses.replace(ROOF, kernels=kernels))._fits[kind, "float32"]
    larger = tuple(d + more if i == axis % len(dims) else d for i, d in enumerate(dims))
    if kind in ("conv", "conv_plain", "conv_first"):
        larger = (max(larger[0], dims[0]), *larger[1:])
        if (dims[0] <= 4) != (larger[0] <= 4):
            return  # up to four channels are not blocked, so there the count has a step
    assert fit.fitted_us(larger) >= fit.fitted_us(dims) * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(
    macs=st.integers(0, 10**12), moved=st.integers(0, 10**12), more=st.integers(1, 10**9),
    rate=st.floats(0.01, 1e5), bandwidth=st.floats(0.01, 1e4),
)  # fmt: skip
def test_the_roofline_is_monotone(macs, moved, more, rate, bandwidth) -> None:
    profile = dataclasses.replace(ROOF, rates={"float32": rate}, memory_gb_per_s=bandwidth)
    us = Estimator(profile).roofline_us(Work("x", "float32", (1,), macs, moved))
    assert Estimator(profile).roofline_us(Work("x", "float32", (1,), macs + more, moved)) >= us
    assert Estimator(profile).roofline_us(Work("x", "float32", (1,), macs, moved + more)) >= us
    faster = dataclasses.replace(profile, rates={"float32": rate * 2}, memory_gb_per_s=bandwidth * 2)
    assert Estimator(faster).roofline_us(Work("x", "float32", (1,), macs, moved)) == pytest.approx(us / 2)


# --- what runs ----------------------------------------------------------------------------------------------------


def quantized_model(zero: int = 0) -> ir.Model:
    """x -> Q -> DQ -> Conv(int8 weights) -> Relu -> Q -> DQ; Q's codes start at -zero * scale."""
    rng = np.random.default_rng(0)
    stored = [
        numpy_helper.from_array(np.array(0.05, np.float32), "s"),
        numpy_helper.from_array(np.array(zero, np.uint8), "z"),
        numpy_helper.from_array(rng.integers(-60, 60, (16, 16, 1, 1)).astype(np.int8), "w"),
        numpy_helper.from_array(np.full(16, 0.01, np.float32), "ws"),
        numpy_helper.from_array(np.zeros(16, np.int8), "wz"),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "d"),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], "wd", axis=0),
        helper.make_node("Conv", ["d", "wd"], ["c"], "conv", kernel_shape=[1, 1]),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["q2"], "q2"),
        helper.make_node("DequantizeLinear", ["q2", "s", "z"], ["y"], "d2"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 16, 8, 8]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


@pytest.mark.parametrize("zero", [0, 128])
def test_quantize_and_dequantize_become_an_integer_kernel(tmp_path, zero) -> None:
    """With codes below zero the Relu is not cut off by Q, and the runtime computes in float: both see that."""
    model = quantized_model(zero)
    ops, unknown, _ = planned(model, {})
    assert not unknown
    jobs = [w for op in ops for w in works(op)]
    assert [(w.kind, w.precision) for w in jobs if w.macs] == [("conv1x1", "float32" if zero else "int8")]
    io.save(model, tmp_path / "q.onnx")
    seen = executed(tmp_path / "q.onnx", random_feeds(tmp_path / "q.onnx", {}))
    assert [(w.kind, w.precision, w.macs) for op in seen for w in works(op) if w.macs] == [
        (w.kind, w.precision, w.macs) for w in jobs if w.macs
    ]


def test_an_absent_layer_norm_is_seen_where_the_runtime_fuses_it(tmp_path) -> None:
    """Mean, difference, square, root: nine nodes in the file, one kernel in the run."""
    nodes = [
        helper.make_node("ReduceMean", ["x"], ["m"], "mean", axes=[-1]),
        helper.make_node("Sub", ["x", "m"], ["d"], "sub"),
        helper.make_node("Pow", ["d", "two"], ["p"], "pow"),
        helper.make_node("ReduceMean", ["p"], ["v"], "var", axes=[-1]),
        helper.make_node("Add", ["v", "eps"], ["ve"], "eps_add"),
        helper.make_node("Sqrt", ["ve"], ["sd"], "sqrt"),
        helper.make_node("Div", ["d", "sd"], ["n"], "div"),
        helper.make_node("Mul", ["n", "g"], ["s"], "scale"),
        helper.make_node("Add", ["s", "b"], ["y"], "shift"),
    ]
    stored = [
        numpy_helper.from_array(np.array(v, np.float32), n)
        for n, v in (("two", 2.0), ("eps", 1e-5), ("g", np.ones(32)), ("b", np.zeros(32)))
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 4, 32]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    (tmp_path / "ln.onnx").write_bytes(model.SerializeToString())
    seen = executed(tmp_path / "ln.onnx", {"x": np.ones((1, 4, 32), np.float32)})
    assert [op.op_type for op in seen] == ["LayerNormalization"]
    assert [(w.kind, w.dims) for op in seen for w in works(op)] == [("layernorm", (4, 32))]


def test_denormal_weights_are_told() -> None:
    model = conv_model()
    array = np.full((16, 8, 3, 3), 1e-40, np.float32)
    model.graph.initializers["w"].const_value = ir.tensor(array, name="w")
    notes = latency(model, ROOF).notes
    assert [n.where for n in notes] == ["w"]
    assert "100% of its values are denormal" in notes[0].text


# --- does it fit --------------------------------------------------------------------------------------------------


def test_fitting_counts_weights_activations_and_runtime() -> None:
    model = conv_model(relu=False)
    found = fits(model, dataclasses.replace(ROOF, storage_bytes=1 << 20, runtime_bytes=1000))
    weights, peak = 16 * 8 * 9 * 4, 4 * (800 + 1600)
    assert (found.loaded_bytes, found.peak_bytes, found.runtime_bytes) == (weights, peak, 1000)
    assert found.memory_bytes == weights + peak + 1000
    assert found.ok
    assert not found.reasons
    assert fits(model, ROOF).runtime_bytes == RUNTIME_BYTES


def test_what_does_not_fit_says_why() -> None:
    tiny = dataclasses.replace(ROOF, storage_bytes=1000, memory_bytes=2000, runtime_bytes=1, onnxruntime=False)
    found = fits(conv_model(), tiny, file_bytes=5000)
    assert (found.storage, found.memory, found.runtime, found.ok) == (False, False, False, False)
    assert found.reasons[0] == "the file of 5.00 kB does not fit the storage of 1.00 kB"
    assert found.reasons[1].startswith("it needs 14.2 kB of memory (4.61 kB weights")
    assert found.reasons[2].startswith("ONNX Runtime does not run there")


def test_a_decoded_weight_counts_as_it_lies_in_memory() -> None:
    """4-bit indices into a codebook: 64 x 32 / 2 bytes in the file, 64 x 32 x 4 in memory; int8 codes stay int8."""
    stored = [
        numpy_helper.from_array(np.zeros((64, 32), np.uint8), "codes"),
        numpy_helper.from_array(np.ones(16, np.float32), "book"),
    ]
    nodes = [
        helper.make_node("Cast", ["codes"], ["i"], "cast", to=TensorProto.INT64),
        helper.make_node("Gather", ["book", "i"], ["w"], "gather"),
        helper.make_node("MatMul", ["x", "w"], ["y"], "mm"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32])
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert loaded_bytes(model) == 64 * 32 * 4
    codes = loaded_bytes(quantized_model())
    assert codes == 16 * 16 + 4 + 1  # weights' codes; the scale and zero of the activations


def test_macs_of_jobs_are_those_of_the_model() -> None:
    ops, _, _ = planned(conv_model(), {})
    assert total_macs([w for op in ops for w in works(op)]) == CONV_MACS
