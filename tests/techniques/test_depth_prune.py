"""depth_prune holds the contract of all techniques, and leaves exactly the branch out that it was asked to."""

from __future__ import annotations

import json

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from featherweight.core import Action, Decision, Profile
from featherweight.errors import TechniqueError
from featherweight.graph import io, surgery
from featherweight.runtime import ort
from featherweight.search.stage import cut_only
from featherweight.techniques import Context, all_techniques, get
from featherweight.testing.contract import TechniqueContract

PROFILE = Profile("p", "x86_64", 1, 1 << 30, False)
DROP = get("depth_prune")
OUT = Action.of("depth_prune")


class TestDepthPrune(TechniqueContract):
    technique = "depth_prune"
    size_slack_bytes = 2000  # the nodes go too, which the estimate does not count


def three_branches() -> ir.Model:
    """y = x3 @ w, x_{i+1} = x_i + relu(x_i @ a_i) @ b_i: widths 16 inside, 8 outside."""
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 8] x) => (float[N, 3] y) {
          [u0] u0 = MatMul(x, a0) [r0] r0 = Relu(u0) [v0] v0 = MatMul(r0, b0) [sum0] x1 = Add(x, v0)
          [u1] u1 = MatMul(x1, a1) [r1] r1 = Relu(u1) [v1] v1 = MatMul(r1, b1) [sum1] x2 = Add(v1, x1)
          [u2] u2 = MatMul(x2, a2) [r2] r2 = Relu(u2) [v2] v2 = MatMul(r2, b2) [sum2] x3 = Add(x2, v2)
          [last] y = MatMul(x3, w)
        }""")
    )
    rng = np.random.default_rng(0)
    shapes = {f"{k}{i}": s for i in range(3) for k, s in (("a", (8, 16)), ("b", (16, 8)))} | {"w": (8, 3)}
    for name, shape in shapes.items():
        value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        value.const_value = ir.Tensor((rng.normal(size=shape) / 4).astype(np.float32), name=name)
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        model.graph.register_initializer(value)
    return model


def by_hand(model: ir.Model, x: np.ndarray, kept: tuple[int, ...]) -> np.ndarray:
    stored = {k: v.const_value.numpy() for k, v in model.graph.initializers.items() if v.const_value is not None}
    for i in kept:
        x = x + np.maximum(x @ stored[f"a{i}"], 0) @ stored[f"b{i}"]
    return x @ stored["w"]


@pytest.mark.parametrize(("gone", "kept"), [((0,), (1, 2)), ((1,), (0, 2)), ((2, 1), (0,)), ((0, 1, 2), ())])
def test_what_is_left_computes_what_the_other_branches_do(gone: tuple[int, ...], kept: tuple[int, ...]):
    model = three_branches()
    decisions = [Decision(f"branch into sum{i}", (OUT,)) for i in gone]
    cut = cut_only(model, decisions, Context(PROFILE), all_techniques())
    x = np.random.default_rng(1).normal(size=(5, 8)).astype(np.float32)
    np.testing.assert_allclose(
        ort.session(io.to_bytes(cut)).run({"x": x})["y"], by_hand(model, x, kept), rtol=1e-5, atol=1e-6
    )
    assert {n.name for n in cut.graph} == {f"{k}{i}" for i in kept for k in ("u", "r", "v", "sum")} | {"last"}
    assert set(cut.graph.initializers) == {f"{k}{i}" for i in kept for k in ("a", "b")} | {"w"}
    assert "featherweight" not in json.dumps(dict(cut.graph.metadata_props))


def test_channels_and_branches_are_cut_in_one_plan():
    model = three_branches()
    techniques = all_techniques()
    prune = techniques["channel_prune"]
    sites = {s.tensors: s for s in prune.sites(model)}
    inner = next(s for t, s in sites.items() if "a0" in t and "w" not in t)
    for order in (1, -1):  # whichever is decided about first
        decisions = [Decision("branch into sum2", (OUT,)), Decision(inner.name, (Action.of("channel_prune", keep=8),))][
            ::order
        ]
        cut = cut_only(model, decisions, Context(PROFILE), techniques)
        shapes = {k: tuple(v.shape or ()) for k, v in cut.graph.initializers.items()}
        assert shapes == {"a0": (8, 8), "b0": (8, 8), "a1": (8, 16), "b1": (16, 8), "w": (8, 3)}


def test_a_site_holds_all_that_goes_with_it():
    model = three_branches()
    site = next(iter(DROP.sites(model)))
    assert (site.name, site.kind, site.tensors, site.size_bytes) == (
        "branch into sum0",
        "branch",
        ("a0", "b0"),
        4 * 2 * 8 * 16,
    )
    assert site.nodes == ("u0", "r0", "v0", "sum0")
    estimate = DROP.estimate(model, site, OUT, Context(PROFILE))
    assert (estimate.size_bytes, estimate.work) == (0, 0.0)


def test_a_branch_with_a_layer_that_shall_stay_stays():
    model = three_branches()
    ctx = Context(PROFILE, keep_float=frozenset({"v1"}))
    offered = [bool(list(DROP.options(model, site, ctx))) for site in DROP.sites(model)]
    assert offered == [True, False, True]
    assert [n.text for n in ctx.notes] == ["its branch stays: v1 was asked to stay as it is"]


def test_preview_leaves_the_model_alone():
    model = three_branches()
    before = io.to_bytes(model)
    site = next(iter(DROP.sites(model)))
    seen = DROP.preview(model, site, OUT, Context(PROFILE))
    assert io.to_bytes(model) == before
    assert len(seen.graph) == len(model.graph) - 4


def test_what_is_no_branch_is_refused():
    model = three_branches()
    site = next(iter(DROP.sites(model)))
    cut = surgery.copy_model(model)
    DROP.apply(cut, site, OUT, Context(PROFILE))
    DROP.finish(cut, Context(PROFILE))
    with pytest.raises(TechniqueError, match="must be a residual branch of this model, but 'branch into sum0' is none"):
        DROP.apply(cut, site, OUT, Context(PROFILE))
