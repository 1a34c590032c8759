"""Rescaled models compute the same function; a ruined channel is rescued; ceilings are respected."""

import numpy as np
import onnx_ir as ir
import pytest

from featherweight.graph import io
from featherweight.graph.normalise import normalise
from featherweight.runtime import ort
from featherweight.stats import collect
from featherweight.techniques import _equalise

RNG = np.random.default_rng(0)


class InProcess:
    def call(self, func, *args, timeout_s=None):
        return func(*args)


def text(array) -> str:
    return "{" + ", ".join(f"{v:.7g}" for v in np.asarray(array).ravel()) + "}"


def outputs(model, feeds):
    session = ort.session(io.to_bytes(model))
    return [session.run(f)["y"] for f in feeds]


def outlier_net(between: str) -> ir.Model:
    w1, w2 = RNG.normal(size=(8, 6)).astype(np.float32), RNG.normal(size=(6, 4)).astype(np.float32)
    w1[:, 2] *= 200
    w2[2] /= 200
    model = ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[n, 8] x) => (float[n, 4] y)
    <float[8, 6] w1 = {text(w1)}, float[6] b = {text(RNG.normal(size=6))}, float[6, 4] w2 = {text(w2)}>
    {{ c = Gemm(x, w1, b) {between} y = MatMul(h, w2) }}
    """)
    return normalise(model, run=None).model


FEEDS = [{"x": RNG.normal(size=(4, 8)).astype(np.float32)} for _ in range(10)]


@pytest.mark.parametrize("between", ["h = Relu(c)", "h = LeakyRelu(c)", "s = Sigmoid(c) h = Mul(c, s)"])
def test_outlier_channel_is_evened_out_and_the_function_kept(between):
    model = outlier_net(between)
    stats = collect(model, FEEDS, worker=InProcess(), threads=1)
    even, even_stats = _equalise.equalise(model, stats)
    assert even is not model
    for a, b in zip(outputs(model, FEEDS), outputs(even, FEEDS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
    fresh = collect(even, FEEDS, worker=InProcess(), threads=1)
    x = next(n for n in even.graph if n.op_type == "MatMul").inputs[0].name
    spread = fresh.values[x].channel_high
    assert spread.max() / np.median(spread) < 60
    # Statistics are carried over by arithmetic; they must be those of the rescaled model.
    np.testing.assert_allclose(even_stats.values[x].channel_high, spread, rtol=1e-4)
    np.testing.assert_allclose(even_stats.second_moment("w2"), fresh.second_moment("w2"), rtol=1e-3, atol=1e-4)


def test_clipped_channels_stay_below_their_ceiling():
    model = outlier_net("lo = Constant<value_float=0.0>() hi = Constant<value_float=6.0>() h = Clip(c, lo, hi)")
    stats = collect(model, FEEDS, worker=InProcess(), threads=1)
    even, _ = _equalise.equalise(model, stats)
    for a, b in zip(outputs(model, FEEDS), outputs(even, FEEDS), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_nothing_to_gain_gives_the_model_back():
    w = RNG.normal(size=(8, 4)).astype(np.float32)
    model = ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[n, 8] x) => (float[n, 4] y)
    <float[8, 4] w = {text(w)}>
    {{ y = MatMul(x, w) }}
    """)
    stats = collect(model, FEEDS, worker=InProcess(), threads=1)
    same, same_stats = _equalise.equalise(model, stats)
    assert same is model
    assert same_stats is stats


def test_the_given_model_is_not_changed():
    model = outlier_net("h = Relu(c)")
    before = io.to_bytes(model)
    _equalise.equalise(model, collect(model, FEEDS, worker=InProcess(), threads=1))
    assert io.to_bytes(model) == before
