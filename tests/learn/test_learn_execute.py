"""The executor's own interface: feeds, fetched values, segments, what is trained, fences, errors, memory."""

from __future__ import annotations

import copy
import gc
import weakref

import numpy as np
import onnx_ir as ir
import pytest
from onnx import numpy_helper, parser

torch = pytest.importorskip("torch")
torch.set_num_threads(1)

from featherweight.errors import DataError, ModelError, RunError  # noqa: E402
from featherweight.graph import io  # noqa: E402
from featherweight.learn.execute import Executor  # noqa: E402
from featherweight.learn.ops import registry  # noqa: E402
from featherweight.runtime import ort  # noqa: E402

RNG = np.random.default_rng(0)


def model_of(text: str, weights: dict[str, np.ndarray], opsets: str = '"" : 21') -> ir.Model:
    """A graph in ONNX text with stored weights."""
    proto = parser.parse_model(f"<ir_version: 10, opset_import: [{opsets}]>\n{text}")
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(v), k) for k, v in weights.items())
    return ir.serde.deserialize_model(proto)


def w(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


CHAIN = """g (float[N, 4] x, float[N, 5] late) => (float[N, 3] y, float[N, 5] h2) {
    [first] a = MatMul(x, w1)
    [relu] h = Relu(a)
    [join] h2 = Add(h, late)
    [second] y = Gemm(h2, w2, b2)
}"""


def chain() -> ir.Model:
    return model_of(CHAIN, {"w1": w(4, 5), "w2": w(5, 3), "b2": w(3)})


def feeds() -> dict:
    return {"x": torch.from_numpy(w(2, 4)), "late": torch.from_numpy(w(2, 5))}


def test_outputs_come_in_the_graphs_order_and_values_by_name() -> None:
    executor, given = Executor(chain()), feeds()
    outputs = executor(given, fetch=["h", "a", "x"])
    assert list(outputs) == ["y", "h2", "h", "a", "x"]
    torch.testing.assert_close(outputs["h"], outputs["a"].relu())
    expected = ort.session(io.to_bytes(chain_like(executor))).run({k: v.numpy() for k, v in given.items()})
    np.testing.assert_allclose(outputs["y"].detach(), expected["y"], rtol=1e-5, atol=1e-5)


def chain_like(executor: Executor) -> ir.Model:
    """The chain with the executor's weights."""
    return executor.write_back(chain())


def test_segments_share_parameters_and_pass_gradients() -> None:
    executor, given = Executor(chain()), feeds()
    whole = executor(given, fetch=["h"])
    head, tail = executor.segment(["x"], ["h"]), executor.segment(["h", "late"], ["y", "h2"])
    h = head(given)["h"]
    parts = tail({"h": h, "late": given["late"]})
    torch.testing.assert_close(parts["y"], whole["y"])
    parts["y"].sum().backward()
    named = executor.parameters_by_name()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in named.values())
    assert list(executor.segment(["h2"], ["h2"])({"h2": h})) == ["h2"]


def test_a_segment_says_which_inputs_it_lacks() -> None:
    executor = Executor(chain())
    with pytest.raises(ModelError, match=r"\['y'\] also need the inputs \['late'\], but only \['h'\] are given"):
        executor.segment(["h"], ["y"])
    with pytest.raises(ModelError, match="'nothing' must be a tensor"):
        executor.segment(["nothing"], ["y"])
    with pytest.raises(DataError, match="'late'"):
        executor.segment(["h", "late"], ["y"])({"h": torch.zeros(1, 5)})


def test_wrong_feeds_and_names_are_named() -> None:
    executor = Executor(chain())
    with pytest.raises(DataError, match=r"missing: \['late'\]; unknown: \['z'\]"):
        executor({"x": torch.zeros(1, 4), "z": torch.zeros(1)})
    with pytest.raises(ModelError, match="'nothing'"):
        executor(feeds(), fetch=["nothing"])
    with pytest.raises(RunError, match="MatMul 'first' cannot be computed"):
        executor({"x": torch.zeros(1, 7), "late": torch.zeros(1, 5)})


def test_what_is_trained_are_weights_and_only_those_that_were_chosen() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        [n] a = BatchNormalization(x, gamma, beta, mean, var)
        [c] b = Clip(a, low, high)
        [d] s = Div(b, eight)
        [p] q = Pow(s, two)
        [m] t = Where(mask, q, fill)
        [g] e = MatMul(t, w)
        [add] f = Add(e, bias)
        [attend] k = Add(f, far)
        [switch] y = MatMul(k, triangle)
    }"""
    weights = {"gamma": w(4), "beta": w(4), "mean": w(4), "var": np.ones(4, np.float32), "low": np.float32(-1),
               "high": np.float32(1), "eight": np.float32(8), "two": np.float32(2), "w": w(4, 4), "bias": w(4),
               "mask": np.array([True, False, True, True]), "far": np.array([[0, -3.4e38, 0, 0]], np.float32),
        "triangle": np.tril(np.ones((4, 4), np.float32)), "fill": np.full(4, -np.inf, np.float32)}  # fmt: skip
    model = model_of(text, weights)
    assert set(Executor(model).parameters_by_name()) == {"gamma", "beta", "w", "bias"}
    assert set(Executor(model, trainable=lambda name: name == "bias").parameters_by_name()) == {"bias"}
    assert not Executor(model, trainable=lambda name: False).parameters_by_name()


def test_tied_weights_are_one_parameter_and_stay_tied() -> None:
    model = model_of("g (float[N, 4] x) => (float[N, 4] y) { a = MatMul(x, w) t = Transpose(w) y = MatMul(a, t) }",
                     {"w": w(4, 4)})  # fmt: skip
    executor = Executor(model)
    assert list(executor.parameters_by_name()) == ["w"]
    executor({"x": torch.ones(1, 4)})["y"].sum().backward()
    with torch.no_grad():
        executor.parameters_by_name()["w"].add_(1.0)
    written = executor.write_back(model)
    assert list(written.graph.initializers) == ["w"]
    np.testing.assert_allclose(written.graph.initializers["w"].const_value.numpy(),
                               model.graph.initializers["w"].const_value.numpy() + 1)  # fmt: skip


def test_write_back_changes_only_what_was_trained() -> None:
    model = chain()
    before = io.to_bytes(model)
    executor = Executor(model, trainable=lambda name: name == "w2")
    with torch.no_grad():
        executor.parameters_by_name()["w2"].mul_(2.0)
    written = executor.write_back(model)
    assert io.to_bytes(model) == before
    for name in ("w1", "b2"):
        stored = [m.graph.initializers[name].const_value.tobytes() for m in (model, written)]
        assert stored[0] == stored[1]
    written.graph.initializers["w2"].const_value = model.graph.initializers["w2"].const_value
    assert io.to_bytes(written) == before
    other = model_of("g (float[N, 4] x) => (float[N, 4] y) { y = Relu(x) }", {})
    with pytest.raises(ModelError, match="must hold the tensor 'w2'"):
        executor.write_back(other)


def test_unknown_operators_are_fenced_run_by_the_runtime_and_listed() -> None:
    text = """g (float[4, 4] x) => (float[4, 4] y) {
        [before] a = MatMul(x, w1)
        [odd] b = com.microsoft.Inverse(a)
        [after] y = MatMul(b, w2)
    }"""
    model = model_of(text, {"w1": w(4, 4), "w2": w(4, 4)}, '"" : 21, "com.microsoft" : 1')
    executor = Executor(model)
    (note,) = executor.fenced
    assert note.where == "com.microsoft::Inverse 'odd'"
    assert "no gradient passes" in note.text
    x = w(4, 4)
    y = executor({"x": torch.from_numpy(x)})["y"]
    np.testing.assert_allclose(y.detach(), ort.session(io.to_bytes(model)).run({"x": x})["y"], rtol=1e-3, atol=1e-3)
    y.sum().backward()
    named = executor.parameters_by_name()
    assert named["w2"].grad is not None
    assert named["w1"].grad is None


def test_an_operator_that_nobody_knows_is_named_when_it_is_reached() -> None:
    model = model_of("g (float[4] x) => (float[4] y) { [n] y = nobody.Knows(x) }", {}, '"" : 21, "nobody" : 1')
    executor = Executor(model)
    with pytest.raises(RunError, match=r"nobody::Knows 'n' is not known here, and ONNX Runtime cannot run it"):
        executor({"x": torch.zeros(4)})


def test_functions_and_constant_nodes_are_seen_through() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        c = Constant<value = float[4] {1.0, 2.0, 3.0, 4.0}>()
        a = Mul(x, c)
        y = own.Twice(a)
    }
    <domain: "own", opset_import: ["" : 21]>
    Twice (v) => (r) { r = Add(v, v) }"""
    model = model_of(text, {}, '"" : 21, "own" : 1')
    executor = Executor(model)
    torch.testing.assert_close(executor({"x": torch.ones(1, 4)})["y"].detach(), torch.tensor([[2.0, 4, 6, 8]]))
    with torch.no_grad():
        executor.parameters_by_name()["c"].fill_(5.0)
    written = executor.write_back(model)
    assert ort.session(io.to_bytes(written)).run({"x": np.ones((1, 4), np.float32)})["y"].tolist() == [[10.0] * 4]


def test_an_input_with_a_default_may_be_left_out_or_given() -> None:
    model = model_of("g (float[4] x, float[4] w) => (float[4] y) { y = Mul(x, w) }", {"w": np.full(4, 3, np.float32)})
    executor = Executor(model)
    x = torch.ones(4)
    assert executor({"x": x})["y"].tolist() == [3.0] * 4
    assert executor({"x": x, "w": torch.full((4,), 2.0)})["y"].tolist() == [2.0] * 4


def test_intermediate_values_are_dropped_after_their_last_reader() -> None:
    alive: list[weakref.ref] = []
    most = 0

    def build(call: registry.Call) -> registry.Kernel:
        def run(x):
            nonlocal most
            y = x + 1
            alive.append(weakref.ref(y))
            gc.collect()
            most = max(most, sum(r() is not None for r in alive))
            return y

        return run

    registry.operator("Probe", domain="test.only", gradient="none")(build)
    try:
        steps = " ".join(f"v{k + 1} = test.only.Probe(v{k})" for k in range(8))
        text = f"g (float[4] v0) => (float[4] v8) {{ {steps} }}"
        executor = Executor(model_of(text, {}, '"" : 21, "test.only" : 1'))
        with torch.no_grad():
            executor({"v0": torch.zeros(4)})
        assert most == 2  # the value read and the value made
    finally:
        registry._REGISTRY.pop(("test.only", "Probe"))


def test_copies_and_other_types_work() -> None:
    executor, given = Executor(chain()), feeds()
    twin = copy.deepcopy(executor)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert executor(given)["y"].abs().sum() > 0
    assert twin(given)["y"].abs().sum() == 0
    wide = Executor(chain()).double()({k: v.double() for k, v in given.items()})["y"]
    assert wide.dtype == torch.float64


def test_the_step_of_each_grid_is_known_and_rounded_weights_can_be_fed() -> None:
    text = """g (float[N, 4] x) => (float[N, 4] y) {
        w = DequantizeLinear<axis = 1>(codes, scale)
        q = QuantizeLinear(v, step, zero)
        d = DequantizeLinear(q, step, zero)
        [one] a = MatMul(x, w)
        [two] y = MatMul(a, d)
    }"""
    weights = {"codes": RNG.integers(-128, 127, (4, 4)).astype(np.int8), "scale": np.abs(w(4)) + 0.01, "v": w(4, 4),
               "step": np.float32(0.125), "zero": np.int8(0)}  # fmt: skip
    executor = Executor(model_of(text, weights))
    grids = executor.grids()
    assert {k: g.value for k, g in grids.items()} == {"w": "w", "v": "d"}
    torch.testing.assert_close(grids["w"].step.reshape(-1), torch.from_numpy(weights["scale"]))
    assert float(grids["v"].step) == 0.125
    part = executor.segment(["x", "w", "d"], ["y"])
    own = torch.eye(4, requires_grad=True)
    part({"x": torch.ones(1, 4), "w": own, "d": torch.eye(4)})["y"].sum().backward()
    assert own.grad is not None


GELUS = {
    "x (1 + erf) / 2": "a = Mul(x, t) y = Mul(a, half)",
    "(x / 2) (1 + erf)": "a = Mul(half, x) y = Mul(t, a)",
    "x ((1 + erf) / 2)": "a = Mul(t, half) y = Mul(x, a)",
}


@pytest.mark.parametrize("form", GELUS)
@pytest.mark.parametrize("root", ["r = Div(x, sqrt2)", "r = Mul(x, sqrt_half)"])
def test_a_gelu_in_pieces_is_one_step_and_its_pieces_can_still_be_asked_for(form, root) -> None:
    text = f"""g (float[N, 4] z) => (float[N, 4] y) {{
        x = Mul(z, z) {root} e = Erf(r) t = Add(e, one) {GELUS[form]}
    }}"""
    weights = {"one": np.float32(1), "half": np.float32(0.5), "sqrt2": np.float32(2**0.5),
               "sqrt_half": np.float32(0.5**0.5)}  # fmt: skip
    model = model_of(text, weights)
    executor = Executor(model)
    ends = [executor._program.number(executor._find(name)) for name in ("z", "y")]
    plan = executor._plan(ends[:1], ends[1:])
    assert len(plan.steps) == 2
    z = w(3, 4)
    outputs = executor({"z": torch.from_numpy(z)}, fetch=["t"])
    expected = ort.session(io.to_bytes(model), optimize=False).run({"z": z})["y"]
    np.testing.assert_allclose(outputs["y"], expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(outputs["t"], 1 + torch.erf(torch.from_numpy(z * z) / 2**0.5))


def test_what_only_looks_like_a_gelu_is_left_as_it_is() -> None:
    text = """g (float[N, 4] x, float[N, 4] u) => (float[N, 4] y) {
        r = Div(x, sqrt2) e = Erf(r) t = Add(e, one) a = Mul(u, t) y = Mul(a, half)
    }"""
    weights = {"one": np.float32(1), "half": np.float32(0.5), "sqrt2": np.float32(2**0.5)}
    model = model_of(text, weights)
    feeds_ = {"x": w(3, 4), "u": w(3, 4)}
    mine = Executor(model)({k: torch.from_numpy(v) for k, v in feeds_.items()})["y"]
    np.testing.assert_allclose(mine, ort.session(io.to_bytes(model)).run(feeds_)["y"], rtol=1e-5, atol=1e-6)
