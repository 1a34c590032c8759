"""Chains in the place of layers: at full rank any geometry gives the layer's own outputs; work is what cost counts."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featherweight.core import Action, Profile, Site
from featherweight.errors import TechniqueError
from featherweight.graph import cost, io, surgery
from featherweight.graph.weights import STORED_DTYPE, weights
from featherweight.runtime import ort
from featherweight.stats import collect
from featherweight.techniques import (
    Context,
    _factor_graph,
    _factor_site,
    conv_cp,
    conv_depthwise_separable,
    conv_spatial,
    conv_tucker,
    get,
    low_rank,
)
from featherweight.testing import graphs

PROFILE = Profile("p", "x86_64", 1, 1 << 30, False)
METHODS = {m.METHOD.name: m.METHOD for m in (low_rank, conv_tucker, conv_cp, conv_spatial, conv_depthwise_separable)}
FULL = {
    "low_rank": (999,),
    "conv_tucker": (999, 999),
    "conv_spatial": (999,),
    "conv_depthwise_separable": (999,),
}
Feed = dict[str, np.ndarray]


def parsed(text: str, arrays: dict[str, np.ndarray], opset: int = 21) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in arrays.items())
    return ir.from_proto(proto)


def outputs(model: ir.Model, feed: Feed) -> list[np.ndarray]:
    saved = io.to_bytes(model)
    onnx.checker.check_model(onnx.load_from_string(saved), full_check=True)
    return list(ort.session(saved).run(feed).values())


def replaced(
    model: ir.Model, name: str, params: tuple[int, ...], ctx: Context, weight: str = "w"
) -> tuple[ir.Model, tuple[Site, ...]]:
    """A copy with the weight factorised, whether it pays or not."""
    work = surgery.copy_model(model)
    found = next(w for w in weights(work) if w.name == weight)
    assert _factor_site.reason(METHODS[name], found, ctx) in ("",) or "no gain" in _factor_site.reason(
        METHODS[name], found, ctx
    )
    return work, _factor_site.factorise(METHODS[name], work, _factor_site.layer(found, ctx), params)


def check_same(model: ir.Model, name: str, params: tuple[int, ...], feed: Feed, ctx: Context) -> ir.Model:
    work, _ = replaced(model, name, params, ctx)
    for old, new in zip(outputs(model, feed), outputs(work, feed), strict=True):
        assert old.shape == new.shape
        np.testing.assert_allclose(new, old, atol=1e-4 * max(np.abs(old).max(), 1e-3))
    return work


@st.composite
def convolutions(draw: Any, transposed: bool = False) -> tuple[ir.Model, Feed]:
    """A Conv of 1 to 3 spatial axes with any geometry, between two activations, and an input."""
    rank = draw(st.integers(1, 3))
    group, c, out = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    kernel = [draw(st.integers(1, 4 if rank < 3 else 3)) for _ in range(rank)]
    strides = [draw(st.integers(1, 3)) for _ in range(rank)]
    dilations = [draw(st.integers(1, 2)) for _ in range(rank)]
    auto = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if auto.startswith("SAME") or transposed:
        dilations = [1] * rank  # the runtime does not pad dilated kernels by itself
    pads = [draw(st.integers(0, 2)) for _ in range(2 * rank)] if auto == "NOTSET" else []
    if transposed:
        auto, pads = "NOTSET", [min(p, 1, kernel[i % rank] - 1) for i, p in enumerate(pads or [0] * 2 * rank)]
    sizes = [(kernel[i] - 1) * dilations[i] + draw(st.integers(1, 5)) for i in range(rank)]
    attributes = [f"group = {group}", f"strides = {strides}", f"dilations = {dilations}", f"kernel_shape = {kernel}"]
    attributes += [f'auto_pad = "{auto}"'] if auto != "NOTSET" else [f"pads = {pads}"]
    bias = draw(st.booleans())
    op = "ConvTranspose" if transposed else "Conv"
    ends = ", ".join("NMKLH"[: rank + 2])
    text = f"""g (float[N, {group * c}, {", ".join(map(str, sizes))}] x) => (float[{ends}] y) {{
      [before] a = Relu(x)
      [layer] h = {op}<{", ".join(attributes)}>(a, w{", b" if bias else ""})
      [after] y = Tanh(h)
    }}"""
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    shape = (group * c, out, *kernel) if transposed else (group * out, c, *kernel)
    arrays = {"w": (rng.normal(size=shape) / np.sqrt(c * np.prod(kernel))).astype(np.float32)}
    if bias:
        arrays["b"] = rng.normal(size=group * out).astype(np.float32)
    return parsed(text, arrays), {"x": rng.normal(size=(2, group * c, *sizes)).astype(np.float32)}


def exact_params(name: str, model: ir.Model) -> tuple[int, ...]:
    weight = weights(model)[0]
    return FULL.get(name, (2 * weight.matrix_shape[2],))


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=40, deadline=None, derandomize=True)
@given(convolutions())
def test_full_rank_is_the_layer_itself(name: str, case: tuple[ir.Model, Feed]) -> None:
    model, feed = case
    weight = weights(model)[0]
    if "position" in METHODS[name].why(weight) or "two axes" in METHODS[name].why(weight):
        return
    work = check_same(model, name, exact_params(name, model), feed, Context(PROFILE))
    nodes = {n.name: n for n in work.graph}
    assert nodes["layer"].outputs[0].name == "h"
    assert all(len(n.inputs) == 2 for n in work.graph if n.op_type == "Conv" and n is not nodes["layer"])


@settings(max_examples=30, deadline=None, derandomize=True)
@given(convolutions(transposed=True))
def test_full_rank_of_transposed_convolutions_is_the_layer_itself(case: tuple[ir.Model, Feed]) -> None:
    model, feed = case
    check_same(model, "low_rank", (999,), feed, Context(PROFILE))


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=25, deadline=None, derandomize=True)
@given(convolutions())
def test_work_is_what_the_graphs_cost(name: str, case: tuple[ir.Model, Feed]) -> None:
    model, feed = case
    weight = weights(model)[0]
    if METHODS[name].why(weight):
        return
    params = (2,) * len(METHODS[name].params)
    shapes = {"x": feed["x"].shape}
    ctx = Context(PROFILE, input_shapes=shapes)
    of = _factor_site.layer(weight, ctx)
    found = _factor_graph.work(
        model, weight, METHODS[name].shapes(of, params), METHODS[name].links(weight, params), ctx
    )
    work, _ = replaced(model, name, params, ctx)
    macs = [cost.costs(m, input_shapes=shapes).macs for m in (work, model)]
    assert found == pytest.approx(macs[0] / macs[1])


MATRICES = {
    "gemm": ("g (float[N, 12] x) => (float[N, 9] y) { [layer] y = Gemm<transB = 1>(x, w, b) }", (9, 12), (4, 12)),
    "gemm turned": (
        "g (float[12, N] x) => (float[N, 9] y) { [layer] y = Gemm<transA = 1, alpha = 0.5, beta = 3.0>(x, w, b) }",
        (12, 9),
        (12, 4),
    ),
    "gemm alone": ("g (float[N, 12] x) => (float[N, 9] y) { [layer] y = Gemm(x, w) }", (12, 9), (4, 12)),
    "matmul": ("g (float[B, N, 12] x) => (float[B, N, 9] y) { [layer] y = MatMul(x, w) }", (12, 9), (2, 4, 12)),
    "vector": ("g (float[12] x) => (float[9] y) { [layer] y = MatMul(x, w) }", (12, 9), (12,)),
    "unit": ("g (float[N, 12] x) => (float[1, N, 9] y) { [layer] y = MatMul(x, w) }", (1, 12, 9), (4, 12)),
    "batched": ("g (float[3, N, 12] x) => (float[3, N, 9] y) { [layer] y = MatMul(x, w) }", (3, 12, 9), (3, 4, 12)),
    "spread": ("g (float[N, 12] x) => (float[3, N, 9] y) { [layer] y = MatMul(x, w) }", (3, 12, 9), (4, 12)),
    "left": ("g (float[12, N] x) => (float[9, N] y) { [layer] y = MatMul(w, x) }", (9, 12), (12, 4)),
    "lefts": ("g (float[3, 12, N] x) => (float[3, 9, N] y) { [layer] y = MatMul(w, x) }", (3, 9, 12), (3, 12, 4)),
    "turned": (
        "g (float[N, 12] x) => (float[N, 9] y) { t = Transpose(w) [layer] y = MatMul(x, t) }", (9, 12), (4, 12),
    ),
    "turned twice": (
        """g (float[N, 12] x) => (float[N, 9] y) {
          i = Identity(w) t = Transpose(i) u = Transpose(t) [layer] y = MatMul(x, u) }""",
        (12, 9), (4, 12),
    ),
    "turned gemm": (
        "g (float[N, 12] x) => (float[N, 9] y) { t = Transpose<perm = [1, 0]>(w) [layer] y = Gemm(x, t, b) }",
        (9, 12), (4, 12),
    ),
    "turned conv": (
        """g (float[N, 3, 8, 8] x) => (float[N, 9, H, W] y) {
          t = Transpose<perm = [3, 2, 0, 1]>(w) [layer] y = Conv<strides = [2, 1]>(x, t, b) }""",
        (3, 3, 3, 9), (2, 3, 8, 8),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", MATRICES)
@pytest.mark.parametrize("seen", [True, False], ids=["statistics", "no data"])
def test_matrices_in_every_position_are_replaced_exactly(kind: str, seen: bool) -> None:
    text, shape, size = MATRICES[kind]
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=shape).astype(np.float32)}
    if ", b)" in text:
        arrays["b"] = rng.normal(size=9).astype(np.float32)
    model, feed = parsed(text, arrays), {"x": rng.normal(size=size).astype(np.float32)}
    ctx = Context(PROFILE, collect(model, [feed], seed=0) if seen else None)
    for name in METHODS if "Conv" in text else ("low_rank",):
        work = check_same(model, name, exact_params(name, model), feed, ctx)
        assert not any(n.op_type in ("Transpose", "Identity") for n in work.graph)
        assert "w" not in work.graph.initializers
        kept = next(n for n in work.graph if n.name == "layer")
        assert kept.outputs[0].name == "y"


TIED = """g (float[N, 3, 9, 9] x, float[N, 3, 9, 9] z) => (float[N, 8, A, B] y, float[N, 8, C, D] v) {
  [first] y = Conv<strides = [2, 2], pads = [1, 1, 1, 1]>(x, w, b)
  [second] v = Conv<dilations = [2, 1]>(z, w)
}"""


@pytest.mark.parametrize("name", METHODS)
def test_tied_weights_are_factorised_once_for_all_uses(name: str) -> None:
    rng = np.random.default_rng(0)
    arrays = {"w": rng.normal(size=(8, 3, 3, 3)).astype(np.float32), "b": rng.normal(size=8).astype(np.float32)}
    model = parsed(TIED, arrays)
    feed = {k: rng.normal(size=(2, 3, 9, 9)).astype(np.float32) for k in "xz"}
    for ctx in (Context(PROFILE), Context(PROFILE, collect(model, [feed], seed=0))):
        work = check_same(model, name, exact_params(name, model), feed, ctx)
        factors = [v for v in work.graph.initializers if v.startswith("w.factor")]
        assert all(len(list(work.graph.initializers[v].uses())) == 2 for v in factors)
        _, left = replaced(model, name, exact_params(name, model), ctx)
        assert all(len(site.nodes) == 2 for site in left)


REFUSED = {
    "several ways": (
        """g (int64[N] i) => (float[N, 20] y) { a = Gather(w, i) t = Transpose(w) y = MatMul(a, t) }""",
        "used in several ways",
    ),
    "layouts": (
        """g (float[N, 20] x) => (float[N, 20] y) { t = Transpose(w) a = MatMul(x, w) y = MatMul(a, t) }""",
        "different layouts",
    ),
    "other readers": (
        """g (float[N, 20] x) => (float[N, 20] y) { a = MatMul(x, w) s = ReduceMean<keepdims = 0>(w) y = Add(a, s) }""",
        "read in another way",
    ),
    "output": (
        """g (float[N, 20] x) => (float[N, 20] y, float[20, 20] w) { y = MatMul(x, w) }""",
        "read in another way",
    ),
    "vector": ("""g (float[N, 20] x) => (float[N] y) { y = MatMul(x, v) }""", "one row or column"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_taken_apart_says_why(kind: str) -> None:
    text, why = REFUSED[kind]
    rng = np.random.default_rng(0)
    name, shape = ("v", (70,)) if kind == "vector" else ("w", (20, 20))
    if kind == "vector":
        text = text.replace("20", "70")
    model = parsed(text, {name: rng.normal(size=shape).astype(np.float32)})
    ctx, technique = Context(PROFILE), get("low_rank")
    site = next(s for s in technique.sites(model) if s.name == name)
    assert list(technique.options(model, site, ctx)) == []
    assert any(why in note.text for note in ctx.notes), ctx.notes
    with pytest.raises(TechniqueError, match=why):
        technique.apply(model, site, Action.of("low_rank", rank=2), ctx)


def test_sites_are_those_of_other_techniques_and_of_the_right_kind() -> None:
    small = graphs.build("convolutions").model
    listed = {s.name: s for s in get("weight_nbit").sites(small)}
    assert [s.name for s in get("low_rank").sites(small)] == list(listed)
    for name in METHODS:
        assert all(listed[s.name] == s for s in get(name).sites(small))
    assert [s.name for s in get("conv_tucker").sites(small)] == ["w1", "w2", "w4"]
    recurrent = graphs.build("recurrent").model
    assert list(get("low_rank").sites(recurrent)) == []


def test_every_kind_of_site_without_an_option_says_no_gain() -> None:
    small = graphs.build("convolutions").model
    for name in METHODS:
        ctx = Context(PROFILE)
        empty = [s.name for s in get(name).sites(small) if not list(get(name).options(small, s, ctx))]
        assert {n.where for n in ctx.notes} == set(empty)
        assert all("no gain" in n.text for n in ctx.notes)


def test_rows_of_one_sample_count_for_few() -> None:
    small = graphs.build("convolutions")
    stats = collect(small.model, list(small.feeds), seed=0)
    found = {w.name: _factor_site.independent_rows(w, stats) for w in weights(small.model)}
    assert stats.n_samples == 6
    assert found["w5"] == stats.n_rows("w5") == 6
    assert found["w1"] == min(stats.n_rows("w1"), 6 * 8)  # maps of 6 x 6
    assert found["w4"] == min(stats.n_rows("w4"), 6 * 8)  # maps of 4 x 4


def exact_rank_model(rank: int = 4, dtype: Any = np.float32) -> tuple[ir.Model, Feed]:
    rng = np.random.default_rng(0)
    array = rng.normal(size=(48, rank)) @ rng.normal(size=(rank, 64)) / 8
    kind = "float" if dtype == np.float32 else "float16"
    text = f"g ({kind}[N, 48] x) => ({kind}[N, 64] y) {{ [layer] y = MatMul(x, w) }}"
    return parsed(text, {"w": array.astype(dtype)}), {"x": rng.normal(size=(5, 48)).astype(dtype)}


def test_an_exact_rank_is_offered_and_no_higher_one() -> None:
    model, feed = exact_rank_model()
    technique, ctx = get("low_rank"), Context(PROFILE)
    (site,) = technique.sites(model)
    found = list(technique.options(model, site, ctx))
    assert max(a.get("rank") for a in found) == 4
    assert technique.estimate(model, site, found[0], ctx).noise < 1e-11
    work = surgery.copy_model(model)
    left = technique.apply(work, site, found[0], ctx)
    assert [(s.name, s.size_bytes) for s in left] == [("w.factor0", 4 * 48 * 4), ("w.factor1", 4 * 64 * 4)]
    assert [s.name for s in technique.sites(work)] == ["w.factor0", "w.factor1"]
    np.testing.assert_allclose(outputs(work, feed)[0], outputs(model, feed)[0], atol=1e-5)


def test_half_precision_stays_half_precision() -> None:
    model, feed = exact_rank_model(dtype=np.float16)
    work, left = replaced(model, "low_rank", (4,), Context(PROFILE))
    assert {v.dtype for v in work.graph.initializers.values()} == {ir.DataType.FLOAT16}
    assert sum(s.size_bytes for s in left) == 2 * 4 * (48 + 64)
    np.testing.assert_allclose(outputs(work, feed)[0], outputs(model, feed)[0], atol=0.02)


def test_a_folded_cast_keeps_the_narrow_type_of_the_file() -> None:
    model, _ = exact_rank_model()
    model.graph.initializers["w"].metadata_props[STORED_DTYPE] = "FLOAT16"
    work, left = replaced(model, "low_rank", (4,), Context(PROFILE))
    for value in work.graph.initializers.values():
        assert value.metadata_props[STORED_DTYPE] == "FLOAT16"
        array = surgery.constant(value)
        assert array is not None
        np.testing.assert_array_equal(array, array.astype(np.float16).astype(np.float32))
    assert sum(s.size_bytes for s in left) == 2 * 4 * (48 + 64)


def test_symbolic_shapes_stay_symbolic() -> None:
    model, _ = exact_rank_model()
    work, _ = replaced(model, "low_rank", (4,), Context(PROFILE))
    proto = onnx.load_from_string(io.to_bytes(work))
    assert [d.dim_param or d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim] == ["N", 64]


def test_a_rank_that_saves_nothing_leaves_the_layer_and_says_so() -> None:
    model, _ = exact_rank_model()
    ctx, technique = Context(PROFILE), get("low_rank")
    (site,) = technique.sites(model)
    assert technique.apply(model, site, Action.of("low_rank", rank=40), ctx) == (site,)
    assert "w" in model.graph.initializers
    assert any("saves nothing" in note.text for note in ctx.notes)


@pytest.mark.parametrize("rank", [0, -1, 1.5, True, "4", None])
def test_ranks_must_be_whole_numbers(rank: Any) -> None:
    model, _ = exact_rank_model()
    technique = get("low_rank")
    (site,) = technique.sites(model)
    action = Action.of("low_rank") if rank is None else Action.of("low_rank", rank=rank)
    with pytest.raises(TechniqueError, match="rank of low_rank must be a whole number >= 1"):
        technique.apply(model, site, action, Context(PROFILE))


@pytest.mark.parametrize(("most", "wanted"), [(1, [1]), (7, [6, 4, 3, 2, 1]), (200, [176, 120, 80, 56, 40, 24])])
def test_the_ladder_is_geometric(most: int, wanted: list[int]) -> None:
    assert _factor_site.ladder(most) == wanted


def test_worth_is_the_price_of_fewer_bits() -> None:
    assert _factor_site.worth(0.02, 0.5, 0.5, 0.01)
    # Half the values in 4 bits are as many bytes as all in 2 bits, which add 15 times the noise of 4.
    assert _factor_site.worth(0.149, 0.5, 1.0, 0.01)
    assert not _factor_site.worth(0.151, 0.5, 1.0, 0.01)
    assert not _factor_site.worth(0.31, 0.5, 0.5, 0.01)
    assert not _factor_site.worth(0.6, 0.1, 0.1, 0.01)
    assert _factor_site.worth(1e-12, 0.99, 0.99, 0.0)
    assert not _factor_site.worth(1e-12, 1.1, 1.1, 0.0)
