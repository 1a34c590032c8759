"""weight_nbit holds the contract of all techniques, and its own promises."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from featherweight.core import Action, Profile, Site
from featherweight.errors import TechniqueError
from featherweight.graph import io, surgery
from featherweight.graph import weights as graph_weights
from featherweight.runtime import ort
from featherweight.stats import collect
from featherweight.techniques import Context, get
from featherweight.testing.contract import TechniqueContract, prepared


class TestWeightNbit(TechniqueContract):
    technique = "weight_nbit"


PROFILE = Profile("p", "x86_64", 1, 1 << 30, False)


def site_of(name: str, model: ir.Model) -> Site:
    return next(s for s in get("weight_nbit").sites(model) if s.name == name)


def applied(model: ir.Model, name: str, ctx: Context, **params) -> ir.Model:
    copy = surgery.copy_model(model)
    get("weight_nbit").apply(copy, site_of(name, model), Action.of("weight_nbit", **params), ctx)
    return copy


def run(model: ir.Model, feeds) -> np.ndarray:
    loaded = ort.session(io.to_bytes(model))
    return np.concatenate([next(iter(loaded.run(f).values())) for f in feeds])


@pytest.mark.parametrize(("model", "weight"), [("convolutions", "w1"), ("gemm_matmul", "w2"), ("gemm_matmul", "w3")])
def test_mean_error_goes_into_the_bias(model, weight):
    small, stats, _ = prepared(model)
    node = next(w for w in graph_weights.weights(small.model) if w.name == weight).uses[0].node
    wanted = "p" if weight == "w2" else node.outputs[0].name  # behind the Add that holds the bias of a MatMul

    def at_layer(changed: ir.Model) -> np.ndarray:
        value = next(o for n in changed.graph for o in n.outputs if o.name == wanted)
        changed.graph.outputs.clear()
        changed.graph.outputs.append(value)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        axes = (0,) if model == "gemm_matmul" else (0, 2, 3)
        return run(changed, small.feeds).mean(axis=axes, dtype=np.float64)

    original = at_layer(surgery.copy_model(small.model))
    moved = at_layer(applied(small.model, weight, Context(PROFILE, stats), bits=2))
    alone = at_layer(applied(small.model, weight, Context(PROFILE, None), bits=2))
    # Of a convolution only a sample of positions is seen.
    share = 0.5 if model == "convolutions" else 0.05
    assert np.abs(moved - original).max() < share * np.abs(alone - original).max()


def test_shared_bias_is_not_changed_for_others():
    body = """g (float[N, 8] x) => (float[N, 8] y, float[N, 8] z) {
      [one] y = Gemm(x, w1, b)  [two] z = Gemm(x, w2, b) }"""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]>\n' + body)
    arrays = {k: rng.normal(size=s).astype(np.float32) for k, s in (("w1", (8, 8)), ("w2", (8, 8)), ("b", (8,)))}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(v, k) for k, v in arrays.items())
    model = ir.from_proto(proto)
    x = {"x": (rng.normal(size=(50, 8)) + 1).astype(np.float32)}
    changed = applied(model, "w1", Context(PROFILE, collect(model, [x])), bits=3)
    before, after = ort.session(io.to_bytes(model)).run(x), ort.session(io.to_bytes(changed)).run(x)
    np.testing.assert_array_equal(before["z"], after["z"])
    assert np.abs(before["y"] - after["y"]).max() > 0


def test_tied_table_is_written_once_for_both_uses():
    small, stats, floats = prepared("tied_table")
    changed = applied(small.model, "words", Context(PROFILE, stats), bits=8)
    np.testing.assert_allclose(run(changed, small.feeds[:1]), floats[0]["y"], atol=0.02)
    assert not any(v.size > 500 for v in floats_stored(changed))


def floats_stored(model: ir.Model) -> list[np.ndarray]:
    arrays = [v.const_value.numpy() for v in model.graph.initializers.values() if v.const_value is not None]
    return [a for a in arrays if a.dtype == np.float32 and a.size != 24 * 24]


def test_kept_nodes_and_unfit_weights_leave_a_note():
    small, _, _ = prepared("gemm_matmul")
    technique = get("weight_nbit")
    ctx = Context(PROFILE, keep_float=frozenset({"fc1"}))
    assert list(technique.options(small.model, site_of("w1", small.model), ctx)) == []
    assert "fc1 was asked to stay float" in ctx.notes[0].text
    with pytest.raises(TechniqueError, match="cannot round 'w1'"):
        technique.apply(surgery.copy_model(small.model), site_of("w1", small.model), Action.of("weight_nbit"), ctx)


def test_bad_parameters_say_the_law():
    small, stats, _ = prepared("convolutions")
    for params, text in (
        ({"bits": 9}, "bits must be one of"),
        ({"bits": 4, "block": 32}, "its reduced entries are not one axis"),
        ({"bits": 4, "kernel": "cuda"}, "kernel must be 'fold' or 'nbits'"),
        ({"bits": 4, "kernel": "nbits", "block": 0}, "needs the right operand of one MatMul"),
    ):
        with pytest.raises(TechniqueError, match=text):
            applied(small.model, "w1", Context(PROFILE, stats), **params)


def test_estimate_orders_bits_and_is_near_the_truth():
    small, stats, _ = prepared("gemm_matmul")
    technique, ctx = get("weight_nbit"), Context(PROFILE, stats)
    found = [
        technique.estimate(small.model, site_of("w1", small.model), Action.of("weight_nbit", bits=b), ctx)
        for b in range(2, 9)
    ]
    assert [e.noise for e in found] == sorted((e.noise for e in found), reverse=True)
    assert all(b.size_bytes <= a.size_bytes for a, b in zip(found[1:], found, strict=False))


def test_matmul_nbits_is_reached(tmp_path):
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, 128] x) => (float[N, 64] y) { [fc] y = MatMul(x, w) }'
    )
    weight = rng.normal(size=(128, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    model = ir.from_proto(proto)
    x = {"x": rng.normal(size=(40, 128)).astype(np.float32)}
    changed = applied(model, "w", Context(PROFILE, collect(model, [x])), bits=4, block=32, kernel="nbits")
    path = tmp_path / "m.onnx"
    io.save(changed, path)
    assert "MatMulNBits" in ort.optimised_ops(path)
    wanted, found = x["x"] @ weight, run(changed, [x])
    assert np.square(found - wanted).mean() < 0.02 * np.square(wanted).mean()


@pytest.mark.parametrize("bits", [8, 5, 4, 3])
def test_vocabulary_stays_coded_and_padding_rows_zero(bits):
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(
        '<ir_version: 10, opset_import: ["" : 21]>\ng (int64[N] x) => (float[N, 24] y) { [words] y = Gather(w, x) }'
    )
    table = rng.normal(size=(3000, 24)).astype(np.float32)
    table[0] = 0
    proto.graph.initializer.append(onnx.numpy_helper.from_array(table, "w"))
    model = ir.from_proto(proto)
    x = {"x": np.array([0, 5, 2999, 5])}
    technique, ctx = get("weight_nbit"), Context(PROFILE)
    action = Action.of("weight_nbit", bits=bits)
    estimate = technique.estimate(model, site_of("w", model), action, ctx)
    changed = applied(model, "w", ctx, bits=bits)
    size = len(io.to_bytes(changed)) - len(io.to_bytes(model)) + table.nbytes
    assert abs(size - estimate.size_bytes) < 2500
    found = run(changed, [x])
    assert (found[0] == 0).all()
    error = np.square(found - table[x["x"]]).sum() / np.square(table[x["x"]]).sum()
    assert error < 4 * estimate.noise + 1e-6
