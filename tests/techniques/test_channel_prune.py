"""channel_prune holds the contract of all techniques, and its own promises."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from featherweight.core import Action, Profile, Silent, Site
from featherweight.errors import TechniqueError
from featherweight.graph import channels as ch
from featherweight.graph import io, surgery
from featherweight.graph.normalise import normalise
from featherweight.runtime import ort
from featherweight.search.options import structure_options
from featherweight.stats import collect
from featherweight.techniques import Context, get
from featherweight.testing.contract import TechniqueContract

PROFILE = Profile("p", "x86_64", 1, 1 << 30, False)
PRUNE = get("channel_prune")


class TestChannelPrune(TechniqueContract):
    technique = "channel_prune"


def linear_pair(width: int, seed: int = 0) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    """x (N, 6) -> Gemm -> (N, width) -> Relu -> Gemm -> (N, 3), and calibration batches."""
    rng = np.random.default_rng(seed)
    model = ir.from_proto(
        onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 6] x) => (float[N, 3] y) {
          [fc1] h = Gemm<transB = 1>(x, w1, b1)
          [act] a = Relu(h)
          [fc2] y = Gemm<transB = 1>(a, w2, b2)
        }""")
    )
    shapes = {"w1": (width, 6), "b1": (width,), "w2": (3, width), "b2": (3,)}
    for name, shape in shapes.items():
        surgery_value = next(v for n in model.graph for v in n.inputs if v is not None and v.name == name)
        array = rng.normal(size=shape).astype(np.float32)
        surgery_value.const_value = ir.Tensor(array, name=name)
        surgery_value.type, surgery_value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(shape)
        model.graph.register_initializer(surgery_value)
    return model, [{"x": rng.normal(size=(64, 6)).astype(np.float32)} for _ in range(4)]


def edit(model: ir.Model, **arrays: np.ndarray) -> None:
    for name, array in arrays.items():
        surgery.set_initializer(model.graph.initializers[name], array.astype(np.float32))


def array(model: ir.Model, name: str) -> np.ndarray:
    found = surgery.constant(model.graph.initializers[name])
    assert found is not None
    return found


def context(model: ir.Model, feeds: list[dict[str, np.ndarray]] | None) -> Context:
    return Context(PROFILE, None if feeds is None else collect(model, feeds, seed=0))


def pruned(model: ir.Model, keep: int, ctx: Context, site: Site | None = None) -> ir.Model:
    copy = surgery.copy_model(model)
    PRUNE.apply(copy, site or next(iter(PRUNE.sites(model))), Action.of("channel_prune", keep=keep), ctx)
    PRUNE.finish(copy, ctx)
    return copy


def run(model: ir.Model, feed: dict[str, np.ndarray]) -> np.ndarray:
    return ort.session(io.to_bytes(model)).run(feed)["y"]


def test_dead_channels_go_first_and_change_nothing():
    model, feeds = linear_pair(8)
    w1, b1 = array(model, "w1").copy(), array(model, "b1").copy()
    w1[[2, 5]], b1[[2, 5]] = 0, [-1, 0]  # never above zero
    edit(model, w1=w1, b1=b1)
    ctx = context(model, feeds)
    site = next(iter(PRUNE.sites(model)))
    assert PRUNE.estimate(model, site, Action.of("channel_prune", keep=6), ctx).noise < 1e-9
    assert Action.of("channel_prune", keep=6) in list(PRUNE.options(model, site, ctx))
    cut = pruned(model, 6, ctx)
    np.testing.assert_array_equal(array(cut, "w1"), w1[[0, 1, 3, 4, 6, 7]])
    np.testing.assert_array_equal(array(cut, "w2"), array(model, "w2")[:, [0, 1, 3, 4, 6, 7]])
    np.testing.assert_array_equal(run(cut, feeds[0]), run(model, feeds[0]))


def test_a_copy_of_another_channel_costs_nothing_as_its_weight_moves_over():
    model, feeds = linear_pair(8)
    w1, b1 = array(model, "w1").copy(), array(model, "b1").copy()
    w1[4], b1[4] = 2 * w1[1], 2 * b1[1]
    edit(model, w1=w1, b1=b1)
    cut = pruned(model, 7, context(model, feeds))
    np.testing.assert_allclose(run(cut, feeds[0]), run(model, feeds[0]), atol=2e-3)
    assert array(cut, "w1").shape == (7, 6)


def test_a_constant_channel_goes_into_the_bias():
    model, feeds = linear_pair(8)
    w1, b1 = array(model, "w1").copy(), array(model, "b1").copy()
    w1[3], b1[3] = 0, 5
    edit(model, w1=w1, b1=b1)
    cut = pruned(model, 7, context(model, feeds))
    np.testing.assert_allclose(run(cut, feeds[0]), run(model, feeds[0]), atol=1e-3)


def test_what_is_left_is_the_least_squares_solution():
    model, feeds = linear_pair(8)
    cut = pruned(model, 5, context(model, feeds))
    x = np.concatenate([f["x"] for f in feeds])
    hidden = np.maximum(x @ array(cut, "w1").T + array(cut, "b1"), 0)
    target = np.concatenate([run(model, f) for f in feeds])
    best = np.linalg.lstsq(np.c_[hidden, np.ones(len(hidden))], target, rcond=None)[0]
    found = np.concatenate([run(cut, f) for f in feeds])
    least = np.square(np.c_[hidden, np.ones(len(hidden))] @ best - target).sum()
    assert np.square(found - target).sum() <= 1.02 * least


def test_error_found_is_the_error_estimated():
    model, feeds = linear_pair(16, seed=3)
    ctx = context(model, feeds)
    site = next(iter(PRUNE.sites(model)))
    target = np.concatenate([run(model, f) for f in feeds])
    power = np.square(target - target.mean(axis=0)).sum()
    for keep in (14, 10, 6):
        estimate = PRUNE.estimate(model, site, Action.of("channel_prune", keep=keep), ctx)
        found = np.concatenate([run(pruned(model, keep, ctx), f) for f in feeds])
        assert np.square(found - target).sum() / power == pytest.approx(estimate.noise, rel=0.05)
        assert estimate.work == pytest.approx(keep / 16)


def test_a_smaller_keep_never_gives_a_larger_model():
    model, feeds = linear_pair(16)
    ctx = context(model, feeds)
    sizes = [len(io.to_bytes(pruned(model, keep, ctx))) for keep in range(1, 16)]
    assert sizes == sorted(sizes)
    site = next(iter(PRUNE.sites(model)))
    estimates = [PRUNE.estimate(model, site, Action.of("channel_prune", keep=k), ctx) for k in range(1, 16)]
    assert [e.noise for e in estimates] == sorted((e.noise for e in estimates), reverse=True)
    assert [e.size_bytes for e in estimates] == [4 * k * (6 + 1 + 3) for k in range(1, 16)]


def test_without_statistics_small_weights_go_first():
    model, _ = linear_pair(8)
    w2 = array(model, "w2").copy()
    w2[:, 6] *= 1e-4
    edit(model, w2=w2)
    cut = pruned(model, 7, context(model, None))
    np.testing.assert_array_equal(array(cut, "w2"), np.delete(w2, 6, axis=1))


def test_wide_groups_keep_multiples_of_eight():
    model, feeds = linear_pair(64)
    site = next(iter(PRUNE.sites(model)))
    keeps = [a.get("keep") for a in PRUNE.options(model, site, context(model, feeds))]
    assert keeps
    assert all(k % 8 == 0 for k in keeps)


@pytest.mark.parametrize(("integer", "multiple"), [(False, 8), (True, 16)])
def test_widths_off_the_kernels_multiple_are_known_to_be_slow(integer, multiple):
    model, feeds = linear_pair(128)
    found = structure_options(model, [PRUNE], context(model, feeds), {}, Silent(), integer=integer)
    (options,) = found.groups.values()
    kept = {o.decision.actions[0].get("keep"): o for o in options if not o.decision.keeps}
    assert {keep % 16 for keep in kept} == {0, 8}
    assert {keep for keep, o in kept.items() if o.time > o.work} == {k for k in kept if k % multiple}


def test_nodes_asked_to_stay_are_left_alone():
    model, feeds = linear_pair(8)
    ctx = context(model, feeds)
    ctx.keep_float = frozenset({"fc2"})
    assert not list(PRUNE.options(model, next(iter(PRUNE.sites(model))), ctx))
    assert ctx.notes[0].text == "its channels stay: fc2 was asked to stay as it is"


@pytest.mark.parametrize("keep", [0, 9, -1])
def test_a_width_out_of_range_is_refused(keep):
    model, feeds = linear_pair(8)
    with pytest.raises(TechniqueError, match=r"keep must be 1\.\.8 for 'channels of fc1', which has 8 units, but got"):
        pruned(model, keep, context(model, feeds))


def test_a_site_of_another_model_is_refused():
    model, feeds = linear_pair(8)
    with pytest.raises(TechniqueError, match="a group of removable channels of this model, but 'channels of x'"):
        pruned(model, 4, context(model, feeds), Site("channels of x", "channel_group", (), (), 0))


def test_kept_channels_are_told():
    model, feeds = linear_pair(8)
    w1 = array(model, "w1").copy()
    b1 = array(model, "b1").copy()
    w1[[0, 7]], b1[[0, 7]] = 0, 0
    edit(model, w1=w1, b1=b1)
    cut = pruned(model, 6, context(model, feeds))
    value = next(v for n in cut.graph for v in n.outputs if v.name == "h")
    found = ch.kept(value)
    assert found is not None
    assert found[0] == 1
    assert found[1].tolist() == [1, 2, 3, 4, 5, 6]


def parsed(text: str, weights: dict[str, np.ndarray]) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for name, values in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.asarray(values), name))
    return normalise(ir.from_proto(proto), run=None).model


def noises(model: ir.Model, ctx: Context) -> dict[int, float]:
    """Estimated noise by units kept, of the only group."""
    (site,) = PRUNE.sites(model)
    return {int(a.get("keep")): PRUNE.estimate(model, site, a, ctx).noise for a in PRUNE.options(model, site, ctx)}


TWO_TOWERS = """g (float[N, 6] x, float[M, 6] z) => (float[N, M] y) {
  p = MatMul(x, w1)
  q = MatMul(z, w2)
  t = Transpose<perm = [1, 0]>(q)
  y = MatMul(p, t)
}"""


def towers(w1: np.ndarray, w2: np.ndarray) -> tuple[ir.Model, list[dict[str, np.ndarray]]]:
    rng = np.random.default_rng(7)
    feeds = [{n: rng.normal(size=(64, 6)).astype(np.float32) for n in "xz"} for _ in range(4)]
    return parsed(TWO_TOWERS, {"w1": w1, "w2": w2}), feeds


def test_channels_that_no_stored_weight_reads_are_not_free():
    """x w1 (z w2)^T: unit u gives E(x w1[:, u])^2 E(z w2[:, u])^2 of the product's power."""
    rng = np.random.default_rng(0)
    w1, w2 = (rng.normal(size=(6, 8)).astype(np.float32) for _ in range(2))
    w1[:, 3] *= 1e-3
    model, feeds = towers(w1, w2)
    ctx = context(model, feeds)
    found = noises(model, ctx)
    sides = [(np.concatenate([f[n] for f in feeds]) @ w) ** 2 for n, w in (("x", w1), ("z", w2))]
    power = np.sort(sides[0].mean(axis=0) * sides[1].mean(axis=0))
    assert found[7] == pytest.approx(power[0] / power.sum(), rel=1e-3)
    assert found[3] == pytest.approx(power[:5].sum() / power.sum(), rel=1e-3)
    np.testing.assert_allclose(array(pruned(model, 7, ctx), "w1"), np.delete(w1, 3, axis=1))
    assert noises(model, Context(PROFILE, None))[6] == pytest.approx(2 / 8), "nothing measured: all alike"


@pytest.mark.parametrize("bias", [0.0, 50.0])
def test_branches_that_are_added_and_constants_count_where_they_end(bias: float):
    """A channel that one branch leaves at 0 lives by the other; one that never changes still moves a mean."""
    rng = np.random.default_rng(3)
    wa, wb = (rng.normal(size=(6, 8)).astype(np.float32) for _ in range(2))
    wa[:, 0], b = 0, np.zeros(8, np.float32)
    if bias:
        wb[:, 0], b[0] = 0, bias
    model = parsed(
        """g (float[N, 6] x) => (float[N] y) {
          [left] a = MatMul(x, wa)
          [right] c = MatMul(x, wb)
          [shift] d = Add(c, b)
          [sum] s = Add(a, d)
          y = ReduceMean<keepdims = 0>(s, axes)
        }""",
        {"wa": wa, "wb": wb, "b": b, "axes": np.array([1])},
    )
    feeds = [{"x": rng.normal(size=(64, 6)).astype(np.float32)} for _ in range(4)]
    ctx = context(model, feeds)
    x = np.concatenate([f["x"] for f in feeds])
    power = ((x @ wa + x @ wb + b) ** 2).mean(axis=0)
    assert noises(model, ctx)[7] == pytest.approx(power.min() / power.sum(), rel=1e-3)


def test_its_preview_answers_as_the_cut_model():
    rng = np.random.default_rng(1)
    w1, w2 = (rng.normal(size=(6, 8)).astype(np.float32) for _ in range(2))
    model, feeds = towers(w1, w2)
    ctx = context(model, feeds)
    (site,) = PRUNE.sites(model)
    feed = {"x": rng.normal(size=(4, 6)).astype(np.float32), "z": rng.normal(size=(5, 6)).astype(np.float32)}
    shown = PRUNE.preview(model, site, Action.of("channel_prune", keep=3), ctx)
    answers = [ort.session(io.to_bytes(m)).run(feed)["y"] for m in (shown, pruned(model, 3, ctx), model)]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-5)
    assert not np.allclose(answers[1], answers[2], rtol=0.1)


def test_its_preview_holds_where_channels_are_merged_with_places():
    """No mask fits an axis that channels share with places of any number."""
    rng = np.random.default_rng(4)
    model = parsed(
        """g (float[N, 3, h, w] x) => (float[N] y) {
          a = Conv(x, w0)
          b = Reshape(a, flat)
          y = ReduceMean<keepdims = 0>(b, axes)
        }""",
        {"w0": rng.normal(size=(8, 3, 1, 1)).astype(np.float32), "flat": np.array([0, -1]), "axes": np.array([1])},
    )
    feeds = [{"x": rng.normal(size=(2, 3, 5, 4)).astype(np.float32)} for _ in range(4)]
    ctx = context(model, feeds)
    (site,) = PRUNE.sites(model)
    shown = PRUNE.preview(model, site, Action.of("channel_prune", keep=3), ctx)
    answers = [ort.session(io.to_bytes(m)).run(feeds[0])["y"] for m in (shown, pruned(model, 3, ctx), model)]
    np.testing.assert_allclose(answers[0], answers[1], rtol=1e-4, atol=1e-6)
    assert not np.allclose(answers[1], answers[2], rtol=0.1)


def test_a_channel_that_only_a_mean_sees_is_not_dead():
    """Nothing reads unit 2 but the mean over all channels, that gates them."""
    rng = np.random.default_rng(2)
    w1, w2 = rng.normal(size=(6, 8)).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)
    w1[:, 2] *= 20
    w2[2] = 0
    model = parsed(
        """g (float[N, 6] x) => (float[N, 3] y) {
          a = MatMul(x, w1)
          m = ReduceMean<keepdims = 1>(a, axes)
          s = MatMul(m, one)
          g = Sigmoid(s)
          b = MatMul(a, w2)
          y = Mul(b, g)
        }""",
        {"w1": w1, "w2": w2, "axes": np.array([1]), "one": np.ones((1, 1), np.float32)},
    )
    feeds = [{"x": rng.normal(size=(64, 6)).astype(np.float32)} for _ in range(4)]
    ctx = context(model, feeds)
    assert min(noises(model, ctx).values()) > 0
    assert array(pruned(model, 7, ctx), "w2").all(), "unit 2, the loudest at the mean, is not the first to go"
