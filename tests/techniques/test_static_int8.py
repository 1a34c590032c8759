"""static_int8: integer kernels are reached, results hold on CPUs that saturate, nothing wraps."""

from collections import Counter

import numpy as np
import onnx_ir as ir
import pytest

from featherweight.core import Action, Profile
from featherweight.errors import TechniqueError
from featherweight.graph import encode, io, surgery
from featherweight.graph import weights as graph_weights
from featherweight.runtime import ort
from featherweight.stats import collect
from featherweight.techniques import _kernels, _ranges, get, quantize_model
from featherweight.techniques._protocol import Context
from featherweight.techniques.static_int8 import rounded_codes
from featherweight.testing.contract import TechniqueContract


class TestContract(TechniqueContract):
    technique = "static_int8"
    size_slack_bytes = 1300  # Q/DQ nodes, scales and zero points of the activations around one node
    noise_factor = 6.0


class InProcess:
    def call(self, func, *args, timeout_s=None):
        return func(*args)


def profile(*, int8_dot: bool) -> Profile:
    return Profile("test", "x86_64", 1, 1 << 33, int8_dot)


def runner(model, feeds):
    session = ort.session(io.to_bytes(model))
    return [session.run(f) for f in feeds]


def text(array) -> str:
    return "{" + ", ".join(f"{v:.7g}" for v in np.asarray(array).ravel()) + "}"


def conv_net(w1, b1, w2, *, between="h = Relu(c)") -> ir.Model:
    """Conv -> `between` (reads c, makes h) -> Conv without bias."""
    return ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[n, {w1.shape[1]}, 6, 6] x) => (float[n, {w2.shape[0]}, 6, 6] y)
    <float{list(w1.shape)} w1 = {text(w1)}, float[{len(b1)}] b1 = {text(b1)}, float{list(w2.shape)} w2 = {text(w2)}>
    {{
      c = Conv<pads=[1, 1, 1, 1]>(x, w1, b1)
      {between}
      y = Conv(h, w2)
    }}
    """)


def named(model: ir.Model) -> ir.Model:
    for i, node in enumerate(model.graph):
        node.name = node.name or f"node{i}"
    return model


def built(model, data, *, int8_dot=False, bits=8, **options):
    stats = collect(model, data, worker=InProcess(), threads=1)
    ctx = Context(profile(int8_dot=int8_dot), stats)
    return quantize_model(model, stats, ctx, weight_bits=bits, **options)


def sqnr_db(model, quantized, feeds) -> float:
    a, b = runner(model, feeds), runner(quantized, feeds)
    power = sum(float(np.square(x["y"], dtype=np.float64).sum()) for x in a)
    error = sum(float(np.square(x["y"] - z["y"], dtype=np.float64).sum()) for x, z in zip(a, b, strict=True))
    return 10 * np.log10(power / error)


def operators(model) -> Counter:
    return Counter(n.op_type for n in model.graph)


def optimised(model, tmp_path) -> Counter:
    io.save(model, tmp_path / "m.onnx")
    return ort.optimised_ops(tmp_path / "m.onnx")


RNG = np.random.default_rng(0)
W1 = RNG.normal(size=(8, 3, 3, 3)).astype(np.float32) * 0.3
B1 = RNG.normal(size=8).astype(np.float32)
W2 = RNG.normal(size=(5, 8, 1, 1)).astype(np.float32) * 0.3
FEEDS = [{"x": RNG.normal(size=(2, 3, 6, 6)).astype(np.float32)} for _ in range(12)]


@pytest.mark.parametrize("int8_dot", [False, True])
def test_conv_relu_conv_is_integer_throughout(tmp_path, int8_dot):
    model = named(conv_net(W1, B1, W2))
    quantized, _ = built(model, FEEDS, int8_dot=int8_dot)
    ops = optimised(quantized, tmp_path)
    assert ops["QLinearConv"] == 2
    assert ops["Relu"] == ops["Conv"] == ops["FusedConv"] == 0
    assert sqnr_db(model, quantized, FEEDS) > 33


def test_caller_model_is_not_changed():
    model = named(conv_net(W1, B1, W2))
    before = io.to_bytes(model)
    built(model, FEEDS)
    assert io.to_bytes(model) == before


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_weight_bits_change_storage_not_kernels(tmp_path, bits):
    big = RNG.normal(size=(64, 32, 3, 3)).astype(np.float32)
    model = named(
        conv_net(RNG.normal(size=(32, 3, 3, 3)).astype(np.float32), np.zeros(32, np.float32), big[:, :, :1, :1])
    )
    quantized, _ = built(model, FEEDS, bits=bits)
    assert optimised(quantized, tmp_path)["QLinearConv"] == 2
    quality = sqnr_db(model, quantized, FEEDS)
    assert quality > {8: 33, 6: 24, 4: 12}[bits]


def test_gemm_alpha_and_beta_are_kept(tmp_path):
    w = RNG.normal(size=(6, 8)).astype(np.float32)
    model = named(
        ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[n, 8] x) => (float[n, 6] y)
    <float[6, 8] w = {text(w)}, float[6] b = {text(RNG.normal(size=6))}>
    {{ y = Gemm<alpha=0.5, beta=2.0, transB=1>(x, w, b) }}
    """)
    )
    feeds = [{"x": RNG.normal(size=(4, 8)).astype(np.float32)} for _ in range(8)]
    quantized, _ = built(model, feeds)
    assert optimised(quantized, tmp_path)["QGemm"] == 1
    assert sqnr_db(model, quantized, feeds) > 35


def test_codes_on_a_saturating_kernel_give_the_exact_product():
    rng = np.random.default_rng(5)
    w = rng.normal(size=(1, 16, 27)).astype(np.float32) * rng.gamma(1, 1, (1, 16, 27)).astype(np.float32)
    order = _kernels.reduction_order(3, (3, 3))
    codes, _ = rounded_codes(w, None, bits=8, pairs=order)
    x = np.full((4, 27), 255, np.uint8)
    ordered = codes[0][:, order]
    np.testing.assert_array_equal(_kernels.saturating_dot(x, ordered), x.astype(np.int64) @ ordered.astype(np.int64).T)
    free, _ = rounded_codes(np.abs(w) + 1, None, bits=8, pairs=None)
    wide = free[0][:, order]
    assert (_kernels.saturating_dot(x, wide) != x.astype(np.int64) @ wide.astype(np.int64).T).any()


def test_kernel_order_is_position_then_channel():
    # Columns are (in_channel, kernel position): channel 0 has 0..3, channel 1 has 4..7.
    np.testing.assert_array_equal(_kernels.reduction_order(2, (2, 2)), [0, 4, 1, 5, 2, 6, 3, 7])


@pytest.mark.parametrize("seed", range(3))
def test_every_stored_pair_fits_a_saturating_kernel(seed):
    rng = np.random.default_rng(seed)
    w1 = rng.standard_t(2, size=(8, 3, 3, 3)).astype(np.float32)
    w2 = rng.standard_t(2, size=(5, 8, 1, 1)).astype(np.float32)
    quantized, _ = built(named(conv_net(w1, B1, w2)), FEEDS, int8_dot=False)
    seen = 0
    for node in quantized.graph:
        if node.op_type != "DequantizeLinear" or node.inputs[0].dtype != ir.DataType.INT8:
            continue
        codes = encode.decode(encode.read(quantized, node.inputs[0]))
        matrix = codes.reshape(1, codes.shape[0], -1)
        assert _kernels.pair_excess(matrix, _kernels.reduction_order(codes.shape[1], codes.shape[2:])) <= 127
        seen += 1
    assert seen == 2


def test_bias_that_would_overflow_widens_only_its_channels():
    w = RNG.normal(size=(4, 1, 3, 3)).astype(np.float32)
    w[2] *= 1e-9
    bias = np.array([5, -5, 5, 5], np.float32)
    model = named(
        ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[n, 4, 6, 6] x) => (float[n, 4, 4, 4] y)
    <float[4, 1, 3, 3] w = {text(w)}, float[4] b = {text(bias)}>
    {{ y = Conv<group=4>(x, w, b) }}
    """)
    )
    feeds = [{"x": RNG.normal(size=(1, 4, 6, 6)).astype(np.float32)} for _ in range(8)]
    quantized, _ = built(model, feeds)
    assert sqnr_db(model, quantized, feeds) > 35
    out = runner(quantized, feeds[:1])[0]["y"]
    np.testing.assert_allclose(out[:, 2], 5, atol=0.1)


def test_relu_is_dropped_only_where_the_range_starts_at_zero():
    model = named(conv_net(W1, B1 - 2, W2))
    quantized, _ = built(model, FEEDS)
    assert operators(quantized)["Relu"] == 0
    zero = [n for n in quantized.graph if n.op_type == "QuantizeLinear" and n.inputs[0].producer() is not None]
    first = next(n for n in zero if n.inputs[0].producer().op_type == "Conv")
    assert first.inputs[2].const_value.numpy() == 0


def test_clip_bound_limits_the_range():
    model = named(
        conv_net(
            W1 * 9,
            B1,
            W2,
            between="lo = Constant<value_float=0.0>() hi = Constant<value_float=6.0>() h = Clip(c, lo, hi)",
        )
    )
    from featherweight.graph.normalise import normalise

    model = normalise(model, run=None).model
    quantized, _ = built(model, FEEDS)
    assert operators(quantized)["Clip"] == 0
    assert sqnr_db(model, quantized, FEEDS) > 33


def test_activation_that_is_always_zero_gives_finite_outputs():
    model = named(conv_net(W1, B1 - 1000, W2))
    quantized, _ = built(model, FEEDS)
    assert all(np.isfinite(r["y"]).all() for r in runner(quantized, FEEDS))


def test_node_kept_in_float_stays_float(tmp_path):
    model = named(conv_net(W1, B1, W2))
    stats = collect(model, FEEDS, worker=InProcess(), threads=1)
    ctx = Context(profile(int8_dot=True), stats, keep_float=frozenset({model.graph[0].name}))
    quantized, _ = quantize_model(model, stats, ctx)
    assert optimised(quantized, tmp_path)["QLinearConv"] == 1


def test_measured_fallback_rescues_a_fragile_node():
    w1 = W1.copy()
    w1[0] *= 3000  # one channel owns the range of the tensor between the two convolutions
    w2 = W2.copy()
    w2[:, 0] = 0
    model = named(conv_net(w1, B1, w2))
    plain, _ = built(model, FEEDS)
    safe, notes = built(model, FEEDS, runner=runner, feeds=FEEDS)
    assert sqnr_db(model, safe, FEEDS) > max(25, sqnr_db(model, plain, FEEDS))
    assert any("float" in n.text for n in notes) or sqnr_db(model, plain, FEEDS) > 25


def test_tiny_model_may_be_left_as_it_is():
    model = named(conv_net(W1[:, :, :1, :1], B1, W2))
    model.graph[0].attributes.pop("pads")
    model = named(
        ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[n, 2] x) => (float[n, 2] y)
    <float[2, 2] w = {text(W1[:2, 0, 0, :2])}>
    {{ y = MatMul(x, w) }}
    """)
    )
    feeds = [{"x": RNG.normal(size=(4, 2)).astype(np.float32)}]
    same, notes = built(model, feeds, never_grow=True)
    assert io.to_bytes(same) == io.to_bytes(model)
    assert "left as it was" in notes[0].text


def test_wrong_bits_are_refused_with_the_legal_ones():
    model = named(conv_net(W1, B1, W2))
    technique = get("static_int8")
    site = next(iter(technique.sites(model)))
    with pytest.raises(TechniqueError, match=r"one of \(8, 7.*got 9"):
        technique.apply(
            surgery.copy_model(model), site, Action.of("static_int8", weight_bits=9), Context(profile(int8_dot=True))
        )


def test_conv_transpose_is_no_site():
    model = named(
        ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[n, 2, 4, 4] x) => (float[n, 3, 6, 6] y)
    <float[2, 3, 3, 3] w = {text(RNG.normal(size=(2, 3, 3, 3)))}>
    {{ y = ConvTranspose(x, w) }}
    """)
    )
    assert len(graph_weights.weights(model)) == 1
    assert list(get("static_int8").sites(model)) == []


def test_grid_holds_zero_and_a_range_without_width_is_legal():
    assert _ranges.grid_of(0.0, 0.0) == _ranges.Grid(1.0, 0)
    grid = _ranges.grid_of(2.0, 6.0)
    assert grid.low == 0.0
    assert grid.high == pytest.approx(6.0, rel=1e-6)
    both = _ranges.grid_of(-1.0, 3.0)
    assert both.round(np.zeros(1, np.float32))[0] == 0.0
    with pytest.raises(ValueError, match="finite"):
        _ranges.grid_of(-np.inf, 1.0)
