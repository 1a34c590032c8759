"""dynamic_int8: one fused kernel, right numbers, refusals with reasons."""

import numpy as np
import onnx_ir as ir
import pytest

from featherweight.core import Action, Profile
from featherweight.errors import TechniqueError
from featherweight.graph import io, surgery
from featherweight.runtime import ort
from featherweight.stats import collect
from featherweight.techniques import get, quantize_model
from featherweight.techniques._protocol import Context
from featherweight.testing.contract import TechniqueContract


class TestContract(TechniqueContract):
    technique = "dynamic_int8"
    size_slack_bytes = 1200
    noise_factor = 6.0


class InProcess:
    def call(self, func, *args, timeout_s=None):
        return func(*args)


RNG = np.random.default_rng(0)


def text(array) -> str:
    return "{" + ", ".join(f"{v:.7g}" for v in np.asarray(array).ravel()) + "}"


def model_of(body: str, weights: dict[str, np.ndarray], *, x="n, 8", y="n, m") -> ir.Model:
    stored = ", ".join(f"float{list(w.shape)} {k} = {text(w)}" for k, w in weights.items())
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]>\nnet (float[{x}] x) => (float[{y}] y)\n<{stored}>\n{{ {body} }}'
    )
    for i, node in enumerate(model.graph):
        node.name = f"node{i}"
    return model


def applied(model, feeds, *, int8_dot=False):
    stats = collect(model, feeds, worker=InProcess(), threads=1)
    ctx = Context(Profile("p", "x86_64", 1, 1 << 33, int8_dot), stats)
    return quantize_model(model, stats, ctx, technique="dynamic_int8", store_rest=False)


def close(model, quantized, feeds) -> float:
    a, b = ort.session(io.to_bytes(model)), ort.session(io.to_bytes(quantized))
    pairs = [(a.run(f)["y"].astype(np.float64), b.run(f)["y"]) for f in feeds]
    return 10 * np.log10(sum((p**2).sum() for p, _ in pairs) / sum(((p - q) ** 2).sum() for p, q in pairs))


@pytest.mark.parametrize("int8_dot", [False, True])
def test_matmul_becomes_one_fused_kernel(tmp_path, int8_dot):
    w, b = RNG.normal(size=(8, 6)).astype(np.float32), RNG.normal(size=6).astype(np.float32)
    model = model_of("m = MatMul(x, w) y = Add(m, b)", {"w": w, "b": b}, x="n, t, 8", y="n, t, 6")
    feeds = [{"x": RNG.normal(size=(1, 5, 8)).astype(np.float32)} for _ in range(6)]
    quantized, _ = applied(model, feeds, int8_dot=int8_dot)
    io.save(quantized, tmp_path / "m.onnx")
    assert dict(ort.optimised_ops(tmp_path / "m.onnx")) == {"DynamicQuantizeMatMul": 1}
    assert close(model, quantized, feeds) > 35


def test_gemm_with_every_attribute_is_right():
    w, b = RNG.normal(size=(6, 8)).astype(np.float32), RNG.normal(size=(1, 6)).astype(np.float32)
    model = model_of("y = Gemm<alpha=0.5, beta=3.0, transA=1, transB=1>(x, w, b)", {"w": w, "b": b}, x="8, n")
    feeds = [{"x": RNG.normal(size=(8, 4)).astype(np.float32)} for _ in range(6)]
    quantized, _ = applied(model, feeds)
    assert close(model, quantized, feeds) > 33


def test_readers_of_one_activation_share_its_rounding():
    weights = {"a": RNG.normal(size=(8, 4)).astype(np.float32), "b": RNG.normal(size=(8, 4)).astype(np.float32)}
    model = model_of("p = MatMul(x, a) q = MatMul(x, b) y = Add(p, q)", weights)
    feeds = [{"x": RNG.normal(size=(1, 8)).astype(np.float32)} for _ in range(6)]
    quantized, _ = applied(model, feeds)
    assert sum(n.op_type == "DynamicQuantizeLinear" for n in quantized.graph) == 1


def test_rows_of_unequal_size_are_refused_with_the_reason():
    w = RNG.normal(size=(8, 6)).astype(np.float32)
    model = model_of("y = MatMul(x, w)", {"w": w})
    x = RNG.normal(size=(2, 8)).astype(np.float32)
    x[1] *= 300
    stats = collect(model, [{"x": x}], worker=InProcess(), threads=1)
    ctx = Context(Profile("p", "x86_64", 1, 1 << 33, True), stats)
    technique = get("dynamic_int8")
    site = next(iter(technique.sites(model)))
    assert list(technique.options(model, site, ctx)) == []
    assert "share one scale" in ctx.notes[0].text


def test_convolutions_are_refused():
    w = RNG.normal(size=(3, 2, 1, 1)).astype(np.float32)
    model = model_of("y = Conv(x, w)", {"w": w}, x="n, 2, 4, 4", y="n, 3, 4, 4")
    technique = get("dynamic_int8")
    assert list(technique.sites(model)) == []
    site = next(iter(get("static_int8").sites(model)))
    ctx = Context(Profile("p", "x86_64", 1, 1 << 33, True))
    with pytest.raises(TechniqueError, match="ConvInteger is slower"):
        technique.apply(surgery.copy_model(model), site, Action.of("dynamic_int8"), ctx)
