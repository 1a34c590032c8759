"""Float layers between integer ones stay float on the real runtime, which would round their weights by itself."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from featherweight.core import Action, Decision, Plan, Profile
from featherweight.graph import io
from featherweight.runtime import ort
from featherweight.search.candidates import all_sites, build
from featherweight.stats import collect
from featherweight.techniques import Context, all_techniques
from featherweight.techniques._guard import guard

CHANNELS = 8


def optimised(model: ir.Model) -> list[str]:
    """Operators that the runtime really runs, with repetition."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "m.onnx"
        io.save(model, path)
        return list(ort.optimised_ops(path).elements())


def three_layers(*, seed: int = 0) -> ir.Model:
    """1x1 Conv, Clip, depthwise Conv, Clip, 1x1 Conv; the depthwise kernel of a dead channel is 1000 times larger.

    With one scale for the whole depthwise weight all its other channels would be rounded to zero.
    """
    rng = np.random.default_rng(seed)
    w1 = rng.uniform(0.2, 1, (CHANNELS, 3, 1, 1)).astype(np.float32)
    w1[0] *= -1
    w2 = rng.uniform(0.05, 0.1, (CHANNELS, 1, 3, 3)).astype(np.float32)
    w2[0] *= 1000
    w3 = rng.normal(size=(4, CHANNELS, 1, 1)).astype(np.float32)

    def text(array: np.ndarray) -> str:
        return "{" + ", ".join(f"{v:.7g}" for v in array.ravel()) + "}"

    return ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[n, 3, 6, 6] x) => (float[n, 4, 6, 6] y)
    <float[{CHANNELS}, 3, 1, 1] w1 = {text(w1)}, float[{CHANNELS}, 1, 3, 3] w2 = {text(w2)},
     float[4, {CHANNELS}, 1, 1] w3 = {text(w3)}, float zero = {{0}}, float six = {{6}}>
    {{
      [n0] a = Conv(x, w1)
      [n1] b = Clip(a, zero, six)
      [n2] c = Conv<pads=[1, 1, 1, 1], group={CHANNELS}>(b, w2)
      [n3] d = Clip(c, zero, six)
      [n4] y = Conv(d, w3)
    }}
    """)


def test_a_float_layer_between_integer_ones_keeps_its_precision():
    model = three_layers()
    rng = np.random.default_rng(1)
    feeds = [{"x": rng.uniform(0, 1, (1, 3, 6, 6)).astype(np.float32)} for _ in range(8)]
    ctx = Context(Profile("test", "x86_64", 1, 1 << 33, int8_dot=True), collect(model, feeds))
    techniques = all_techniques()
    assert [n for n, s in all_sites(model, techniques.values()).items() if s.kind == "weight"] == ["w1", "w2", "w3"]
    plan = Plan(tuple(Decision(s, (Action.of("static_int8", weight_bits=8),)) for s in ("w1", "w3")))
    built = build(model, plan, ctx, techniques)
    reference = ort.session(io.to_bytes(model)).run(feeds[0])["y"]
    for optimize in (False, True):
        y = ort.session(io.to_bytes(built), optimize=optimize).run(feeds[0])["y"]
        noise = float(((y - reference) ** 2).sum() / (reference**2).sum())
        assert noise < 10**-1.5, f"{-10 * np.log10(noise):.1f} dB with optimize={optimize}"


def test_only_layers_in_the_pattern_are_guarded():
    model = ir.from_onnx_text("""
    <ir_version: 10, opset_import: ["" : 21]>
    net (uint8[1, 2, 4, 4] q, float s, uint8 z, float[2, 2, 1, 1] w) => (uint8[1, 2, 4, 4] y, float[1, 2, 4, 4] f) {
      x = DequantizeLinear(q, s, z)
      a = Conv(x, w)
      r = Relu(a)
      y = QuantizeLinear(r, s, z)
      f = Conv(x, w)
    }
    """)
    assert guard(model) == 1
    conv = next(n for n in model.graph if n.op_type == "Conv" and n.outputs[0].name == "a")
    clip = conv.inputs[0].producer()
    assert clip.op_type == "Clip"
    assert len(clip.inputs) == 1
    assert guard(model) == 0


@pytest.mark.parametrize("shape", ["2, 8", "2, 5, 8"], ids=["2-D", "3-D"])
@pytest.mark.parametrize("after", ["y0 = Add(m, b)", "a = Add(m, b) y0 = Relu(a)"], ids=["add", "add-relu"])
def test_a_matmul_that_becomes_a_gemm_is_guarded_too(shape, after):
    weights = ", ".join(f"{v:.6g}" for v in np.random.default_rng(0).normal(size=64))
    model = ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["" : 21]>
    net (float[{shape}] x) => (float[{shape}] y)
    <float[8, 8] w = {{{weights}}}, float[8] b = {{1, 2, 3, 4, 5, 6, 7, 8}}, float s = {{0.05}}, uint8 z = {{128}}>
    {{
      q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z)
      m = MatMul(d, w) {after}
      q2 = QuantizeLinear(y0, s, z) y = DequantizeLinear(q2, s, z)
    }}
    """)
    for i, node in enumerate(model.graph):
        node.name = f"n{i}"
    assert guard(model) == 1
    ops = optimised(model)
    assert not any(op.startswith(("QGemm", "QLinear")) for op in ops), ops
    assert sum(op == "DequantizeLinear" for op in ops) == 2, "the runtime rounded the weight or the bias"
