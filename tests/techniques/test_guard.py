"""Float layers between integer ones stay float on the real runtime, which would round their weights by itself."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from featherweight.core import Action, Decision, Plan, Profile
from featherweight.graph import io
from featherweight.runtime import ort
from featherweight.search.candidates import all_sites, build
from featherweight.stats import collect
from featherweight.techniques import Context, all_techniques
from featherweight.techniques._guard import guard

CHANNELS = 8


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
    assert list(all_sites(model, techniques.values())) == ["w1", "w2", "w3"]
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
