"""float16 holds the contract of all techniques; half-precision graphs are right on hostile constructs."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from featherweight.core import Action, Profile, Site
from featherweight.errors import TechniqueError
from featherweight.graph import io, surgery
from featherweight.runtime import ort
from featherweight.techniques import Context, get
from featherweight.techniques.float16 import misfit
from featherweight.testing import graphs
from featherweight.testing.contract import TechniqueContract

WHOLE = Action.of("float16", compute=True)


class TestFloat16(TechniqueContract):
    technique = "float16"

    def test_rounding_is_no_worse_than_plain(self, model: str) -> None:
        pytest.skip("float16 is not integer rounding; its noise is held to the estimate")


def context(**options) -> Context:
    return Context(Profile("p", "x86_64", 1, 1 << 30, False), **options)


def converted(model: ir.Model, ctx: Context) -> ir.Model:
    copy = surgery.copy_model(model)
    (left,) = get("float16").apply(copy, Site("model", "model", (), (), 0), WHOLE, ctx)
    assert left.kind == "model"
    return copy


def sqnr_db(wanted: np.ndarray, found: np.ndarray) -> float:
    wanted, found = wanted.astype(np.float64), found.astype(np.float64)
    same = np.isinf(wanted) & (wanted == found)
    wanted, found = np.where(same, 0, wanted), np.where(same, 0, found)
    noise = np.square(wanted - found).sum()
    return np.inf if noise == 0 else 10 * np.log10(np.square(wanted).sum() / noise)


@pytest.mark.parametrize("name", graphs.NAMES)
def test_half_graph_keeps_its_interface_and_its_results(name):
    small = graphs.build(name)
    half = converted(small.model, context())
    saved = io.to_bytes(half)
    proto = onnx.load_from_string(saved)
    onnx.checker.check_model(proto, full_check=True)
    assert any(t.data_type == onnx.TensorProto.FLOAT16 for t in proto.graph.initializer)
    before, after = ort.session(io.to_bytes(small.model)), ort.session(saved)
    for feed in small.feeds:
        wanted, found = before.run(feed), after.run(feed)
        assert wanted.keys() == found.keys()
        for key in wanted:
            assert found[key].dtype == wanted[key].dtype
            assert sqnr_db(wanted[key], found[key]) > 45


@pytest.mark.parametrize(
    "name", ["fp16_conversion_inner_casts", "fp16_conversion_resize_opset10", "where_minus_infinity_constant"]
)
def test_known_hostile_cases_convert(name, cases_dir: Path):
    bound = json.loads((cases_dir / f"{name}.json").read_text())["oracle"]["fp16"]["min_sqnr_db"]
    model = io.load(cases_dir / f"{name}.onnx")
    after = ort.session(io.to_bytes(converted(model, context())))
    inputs = dict(np.load(cases_dir / f"{name}.inputs.npz"))
    expected = np.load(cases_dir / f"{name}.expected.npz")
    found = after.run(inputs)
    for key in expected.files:
        assert found[key].shape == expected[key].shape
        assert sqnr_db(expected[key], found[key]) > bound


def text_model(body: str, arrays: dict[str, np.ndarray]) -> ir.Model:
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + body)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in arrays.items())
    return ir.from_proto(proto)


def results(model: ir.Model, ctx: Context, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    before = ort.session(io.to_bytes(model)).run({"x": x})["y"]
    return before, ort.session(io.to_bytes(converted(model, ctx))).run({"x": x})["y"]


def test_overflowing_node_is_fenced_and_said_so():
    body = "g (float[N, 4] x) => (float[N, 4] y) { [big] h = Div(x, scale)  [small] y = Mul(h, back) }"
    model = text_model(body, {"scale": np.float32([1e-9]), "back": np.float32([1e-8])})
    ctx = context()
    wanted, found = results(model, ctx, np.float32([[1, 2, 3, 4]]))
    np.testing.assert_allclose(found, wanted, rtol=2e-3)
    assert any(n.where == "big" and "1e-09" in n.text for n in ctx.notes)


def test_observed_range_fences_a_node():
    from featherweight.stats import collect

    body = "g (float[N, 4] x) => (float[N, 4] y) { [square] h = Mul(x, x)  [root] y = Sqrt(h) }"
    model = text_model(body, {})
    x = np.float32([[1, 300, 500, 4]])
    stats = collect(model, [{"x": x}])
    wanted, found = results(model, context(stats=stats), x)
    if stats.range("h") is not None:
        np.testing.assert_allclose(found, wanted, rtol=2e-3)
    kept = context(keep_float=frozenset({"square", "root"}))
    np.testing.assert_allclose(results(model, kept, x)[1], wanted, rtol=2e-3)


def test_huge_mask_constant_is_clamped():
    body = """g (float[N, 4] x) => (float[N, 4] y) {
      [mask] m = Where(on, x, far)  [soft] y = Softmax<axis = 1>(m) }"""
    on = np.array([[True, False, True, True]])
    model = text_model(body, {"on": on, "far": np.float32([-3.4e38])})
    wanted, found = results(model, context(), np.float32([[1, 2, 3, 4]]))
    np.testing.assert_allclose(found, wanted, atol=2e-3)


def test_output_that_is_also_used_inside_keeps_its_name():
    body = "g (float[N, 4] x) => (float[N, 4] h, float[N, 4] y) { h = Exp(x)  y = Neg(h) }"
    model = text_model(body, {})
    after = ort.session(io.to_bytes(converted(model, context()))).run({"x": np.float32([[0, 1, 2, 3]])})
    np.testing.assert_allclose(after["h"], -after["y"])


def test_values_that_do_not_fit_are_refused_with_the_law():
    assert "above float16's 65504" in misfit(np.float32([1e5, 1]))
    assert "below float16's normal range" in misfit(np.float32([1e-7, 2e-7]))
    assert misfit(np.float32([1e-7, 2.0, 0.0])) == ""
    model = text_model(
        "g (float[N, 8] x) => (float[N, 8] y) { [fc] y = MatMul(x, w) }", {"w": np.full((8, 8), 1e5, np.float32)}
    )
    technique, ctx = get("float16"), context()
    (site,) = technique.sites(model)
    assert list(technique.options(model, site, ctx)) == []
    assert "not stored as float16: its largest magnitude 1e+05" in ctx.notes[0].text
    with pytest.raises(TechniqueError, match="float16 cannot store 'w'"):
        technique.apply(model, site, Action.of("float16"), ctx)


def test_compute_is_for_whole_models_only():
    small = graphs.build("gemm_matmul")
    technique = get("float16")
    site = next(iter(technique.sites(small.model)))
    with pytest.raises(TechniqueError, match="converts a whole model"):
        technique.apply(surgery.copy_model(small.model), site, WHOLE, context())
