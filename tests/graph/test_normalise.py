"""Normalising: numbers stay, the form is reached, the caller's model is untouched, failures are undone."""

from __future__ import annotations

import json
import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from featherweight.errors import ModelError, RunError
from featherweight.graph import batchnorm, io, repair
from featherweight.graph import normalise as module
from featherweight.graph.normalise import normalise
from featherweight.graph.weights import weights

N = helper.make_node
RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def bn(channels: int, prefix: str = "p") -> dict[str, np.ndarray]:
    """gamma (one negative), beta, mean, variance."""
    gamma = np.linspace(-1, 2, channels).astype(np.float32)
    return {
        f"{prefix}{k}": a
        for k, a in zip("sbmv", [gamma, f32(channels), f32(channels), np.abs(f32(channels))], strict=True)
    }


BN = ["ps", "pb", "pm", "pv"]


def op_types(model: ir.Model) -> set[str]:
    return {n.op_type for g in model.graphs() for n in g}


def check_form(model: ir.Model) -> None:
    nodes = [n for g in model.graphs() for n in g]
    node_names = [n.name for n in nodes]
    assert all(node_names)
    assert len(set(node_names)) == len(node_names)
    values = [v.name for g in model.graphs() for v in (*g.inputs, *g.initializers.values()) if not v.is_graph_output()]
    values += [o.name for n in nodes for o in n.outputs if o.name]
    assert len(set(values)) == len(values)
    assert model.opset_imports[""] >= 21
    assert "ai.onnx" not in model.opset_imports
    assert not model.functions
    assert not any(v.is_initializer() for v in model.graph.inputs)
    for graph in model.graphs():
        seen = set()
        for node in graph:
            assert all(p in seen for p in node.predecessors() if p.graph is graph)
            seen.add(node)
    assert not [n for n in nodes if n.op_type == "Constant" and not n.outputs[0].is_graph_output()]


def check(model: ir.Model, run, feeds, *, atol: float = 1e-5) -> module.Normalised:
    """Normalise and assert everything that must hold for any model."""
    before = io.to_bytes(model)
    expected = run(model, feeds)
    result = normalise(model, run=run, feeds=feeds)
    assert io.to_bytes(model) == before
    assert not [s for s in result.steps if s.rolled_back], result.steps
    check_form(result.model)
    for a, b in zip(expected, run(result.model, feeds), strict=True):
        assert list(a) == list(b)
        for name in a:
            np.testing.assert_allclose(b[name], a[name], rtol=1e-4, atol=atol)
    again = normalise(result.model, run=run, feeds=feeds)
    assert not again.changed, again.steps
    assert io.to_bytes(again.model) == io.to_bytes(result.model)
    for mine, theirs in (
        (result.model.graph.inputs, model.graph.inputs),
        (result.model.graph.outputs, model.graph.outputs),
    ):
        kept = [v for v in theirs if not v.is_initializer() or v.is_graph_output()]
        assert [(v.name, v.type, v.shape) for v in mine] == [(v.name, v.type, v.shape) for v in kept]
    return result


# -- shared cases ------------------------------------------------------------------------------------------


def case_names() -> list[str]:
    from pathlib import Path

    folder = Path(__file__).resolve().parents[3] / "shared" / "cases"
    return sorted(p.stem for p in folder.glob("*.onnx")) or ["none"]


@pytest.mark.parametrize("name", case_names())
def test_every_shared_case_that_can_run_keeps_its_outputs(cases_dir, run, name):
    path = cases_dir / f"{name}.json"
    if not path.exists():
        pytest.skip("not among the shared cases here")
    meta = json.loads(path.read_text())
    if not meta["runs"]:
        pytest.skip("the untouched model does not run")
    model = io.load(cases_dir / f"{name}.onnx")
    feeds = [dict(np.load(cases_dir / f"{name}.inputs.npz"))]
    result = check(model, run, feeds, atol=1e-4)
    atol = meta["oracle"].get("fold", {}).get("atol", 1e-4)
    expected = np.load(cases_dir / f"{name}.expected.npz")
    for key, value in run(result.model, feeds)[0].items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=atol)


def test_clashing_node_names_are_repaired_where_the_runtime_refuses_them(cases_dir, run):
    model = io.load(cases_dir / "duplicate_node_names.onnx")
    feeds = [dict(np.load(cases_dir / "duplicate_node_names.inputs.npz"))]
    with pytest.raises(RunError):
        run(model, feeds)
    result = normalise(model, run=run, feeds=feeds)
    check_form(result.model)
    assert len(run(result.model, feeds)) == 1


# -- batch normalisation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [1, 2, 6])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_batchnorm_folds_into_convolutions(build, run, op, groups, bias):
    w = f32(6, 6 // groups, 3, 3)
    nodes = [
        N(op, ["x", "w", "c"] if bias else ["x", "w", ""], ["t"], group=groups, name="conv"),
        N("BatchNormalization", ["t", *BN], ["y"], name="bn", epsilon=1e-3),
    ]
    stored = {"w": w, **bn(6), **({"c": f32(6)} if bias else {})}
    model = build(nodes, stored, inputs={"x": ["n", 6, 5, 5]})
    result = check(model, run, [{"x": f32(2, 6, 5, 5)}])
    assert op_types(result.model) == {op}


@pytest.mark.parametrize("transposed", [0, 1])
@pytest.mark.parametrize("bias", [None, (4,), (1, 4), (), (3, 4)])
def test_batchnorm_folds_into_gemm_with_alpha_and_beta(build, run, transposed, bias):
    stored = {"w": f32(4, 5) if transposed else f32(5, 4), **bn(4)}
    if bias is not None:
        stored["c"] = f32(*bias) if bias else np.array(0.7, np.float32)
    gemm = N("Gemm", ["x", "w", *(["c"] if bias is not None else [])], ["t"], transB=transposed, alpha=0.5, beta=-2.0)
    model = build([gemm, N("BatchNormalization", ["t", *BN], ["y"])], stored, inputs={"x": [3, 5]})
    assert op_types(check(model, run, [{"x": f32(3, 5)}]).model) == {"Gemm"}


@pytest.mark.parametrize("order", [["t", "c"], ["c", "t"], None])
def test_batchnorm_folds_into_matmul_with_and_without_bias(build, run, order):
    nodes = [N("MatMul", ["x", "w"], ["t"])]
    if order:
        nodes.append(N("Add", order, ["u"]))
    nodes.append(N("BatchNormalization", ["u" if order else "t", *BN], ["y"]))
    stored = {"w": f32(5, 4), **bn(4), **({"c": f32(4)} if order else {})}
    result = check(build(nodes, stored, inputs={"x": ["n", 5]}), run, [{"x": f32(3, 5)}])
    assert op_types(result.model) == {"MatMul", "Add"}


def test_batchnorm_over_the_middle_axis_of_a_matmul_is_left(build, run):
    nodes = [N("MatMul", ["x", "w"], ["t"]), N("BatchNormalization", ["t", *BN], ["y"])]
    result = check(build(nodes, {"w": f32(5, 4), **bn(4)}, inputs={"x": [2, 4, 5]}), run, [{"x": f32(2, 4, 5)}])
    assert "BatchNormalization" in op_types(result.model)


def test_zero_variance_is_folded_in_double_precision():
    """The scale of float32 arithmetic would be off in the 7th digit; of float64 not."""
    node = ir.node("BatchNormalization", [ir.Value(name="x")], name="bn")
    graph = ir.Graph([], [], nodes=[node], name="g")
    from featherweight.graph import surgery

    for i, array in enumerate([np.full(1, 3.0), np.zeros(1), np.full(1, 1e3), np.zeros(1)]):
        value = surgery.add_initializer(graph, f"v{i}", array.astype(np.float32))
        surgery.replace_input(node, i + 1, value)
    found = batchnorm.affine(node)
    assert found.scale[0] == pytest.approx(3 / math.sqrt(1e-5), rel=1e-12)
    assert found.shift[0] == pytest.approx(-3e3 / math.sqrt(1e-5), rel=1e-12)


@pytest.mark.parametrize(
    "why", ["training", "weight read twice", "result read twice", "result is an output", "parameters vary"]
)
def test_batchnorm_is_left_where_folding_is_not_provably_equal(build, run, why):
    nodes = [N("Conv", ["x", "w"], ["t"]), N("BatchNormalization", ["t", *BN], ["y"])]
    stored, inputs, outputs = {"w": f32(4, 4, 1, 1), **bn(4)}, {"x": [1, 4, 3, 3]}, {"y": None}
    feeds = {"x": f32(1, 4, 3, 3)}
    if why == "training":
        nodes[1] = N("BatchNormalization", ["t", *BN], ["y", "m", "v"], training_mode=1)
    elif why == "weight read twice":
        nodes.append(N("Conv", ["x", "w"], ["z"]))
        outputs["z"] = None
    elif why == "result read twice":
        nodes.append(N("Relu", ["t"], ["z"]))
        outputs["z"] = None
    elif why == "result is an output":
        outputs["t"] = None
    else:
        inputs["ps"] = [4]
        feeds["ps"] = stored.pop("ps")
    result = check(build(nodes, stored, inputs=inputs, outputs=outputs), run, [feeds])
    assert "BatchNormalization" in op_types(result.model)


def test_a_shared_bias_keeps_its_value_for_the_other_reader(build, run):
    nodes = [
        N("Conv", ["x", "w", "c"], ["t"]),
        N("BatchNormalization", ["t", *BN], ["a"]),
        N("Conv", ["x", "v", "c"], ["b"]),
        N("Add", ["a", "b"], ["y"]),
    ]
    stored = {"w": f32(4, 4, 1, 1), "v": f32(4, 4, 1, 1), "c": f32(4), **bn(4)}
    result = check(build(nodes, stored, inputs={"x": [1, 4, 3, 3]}), run, [{"x": f32(1, 4, 3, 3)}])
    np.testing.assert_array_equal(result.model.graph.initializers["c"].const_value.numpy(), stored["c"])


# -- weights behind other nodes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "stored"),
    [
        ([N("Cast", ["v"], ["w"], to=1)], f32(5, 4).astype(np.float16)),
        ([N("Transpose", ["v"], ["w"])], f32(4, 5)),
        ([N("Cast", ["v"], ["c"], to=1), N("Transpose", ["c"], ["w"], perm=[1, 0])], f32(4, 5).astype(np.float16)),
        ([N("Identity", ["v"], ["a"]), N("Identity", ["a"], ["w"])], f32(5, 4)),
        ([N("Squeeze", ["v", "axes"], ["w"])], f32(1, 5, 4)),
        ([N("Reshape", ["v", "shape"], ["w"])], f32(20)),
        ([N("Flatten", ["v"], ["w"], axis=1)], f32(5, 2, 2)),
    ],
)
def test_a_weight_is_found_behind_cast_and_layout(build, run, nodes, stored):
    constants = {"v": stored, "axes": np.array([0]), "shape": np.array([5, 4])}
    model = build([*nodes, N("MatMul", ["x", "w"], ["y"])], constants, inputs={"x": ["n", 5]})
    result = check(model, run, [{"x": f32(3, 5)}])
    assert op_types(result.model) == {"MatMul"}
    [weight] = weights(result.model)
    assert weight.shape == (5, 4)
    assert weight.size_bytes == stored.nbytes


def test_half_precision_weights_go_back_to_their_stored_type(build, run):
    from featherweight.graph.fold import restore_storage

    stored = f32(64, 32).astype(np.float16)
    nodes = [N("Cast", ["v"], ["w"], to=1), N("MatMul", ["x", "w"], ["y"])]
    model = build(nodes, {"v": stored}, inputs={"x": ["n", 64]})
    feeds = [{"x": f32(3, 64)}]
    result = normalise(model, run=run, feeds=feeds).model
    grown = len(io.to_bytes(result))
    assert restore_storage(result) == 1
    assert len(io.to_bytes(result)) < grown - stored.nbytes + 200
    np.testing.assert_array_equal(run(result, feeds)[0]["y"], run(model, feeds)[0]["y"])


def test_a_tied_table_read_transposed_stays_one_tensor(build, run):
    nodes = [N("Gather", ["e", "i"], ["h"]), N("Transpose", ["e"], ["et"]), N("MatMul", ["h", "et"], ["y"])]
    model = build(nodes, {"e": f32(20, 6)}, inputs={"i": [3]}, input_type=TensorProto.INT64)
    result = check(model, run, [{"i": np.array([1, 5, 19])}])
    [weight] = weights(result.model)
    assert len(weight.uses) == 2


def test_equal_transposes_of_one_weight_are_folded_without_a_copy(build, run):
    nodes = [
        N("Transpose", ["v"], ["a"]),
        N("Transpose", ["v"], ["b"]),
        N("MatMul", ["x", "a"], ["s"]),
        N("MatMul", ["s", "b"], ["y"]),
    ]
    result = check(build(nodes, {"v": f32(5, 5)}, inputs={"x": ["n", 5]}), run, [{"x": f32(3, 5)}])
    [weight] = weights(result.model)
    assert len(weight.uses) == 2
    assert list(result.model.graph.initializers) == ["v"]


@pytest.mark.parametrize("kind", ["value_float", "value_floats", "value_int", "value_ints", "value", "sparse_value"])
def test_every_kind_of_constant_node_becomes_an_initializer(tmp_path, proto, run, kind):
    values = helper.make_sparse_tensor(
        helper.make_tensor("v", 1, [2], [2.0, 3.0]), helper.make_tensor("i", 7, [2], [1, 3]), [5]
    )
    given = {
        "value_float": 2.5,
        "value_floats": [1.0, 2.0, 3.0, 4.0, 5.0],
        "value_int": 2,
        "value_ints": [1, 2, 3, 4, 5],
        "value": numpy_helper.from_array(f32(5)),
        "sparse_value": values,
    }[kind]
    nodes = [N("Constant", [], ["c"], **{kind: given}), N("Cast", ["c"], ["f"], to=1), N("Mul", ["x", "f"], ["y"])]
    (tmp_path / "m.onnx").write_bytes(proto(nodes, {}, inputs={"x": ["n", 5]}).SerializeToString())
    result = check(io.load(tmp_path / "m.onnx"), run, [{"x": f32(2, 5)}])
    assert op_types(result.model) == {"Mul"}


def test_weight_normalisation_is_computed_once(build, run):
    nodes = [
        N("ReduceL2", ["v", "axis"], ["l"], keepdims=1),
        N("Div", ["v", "l"], ["d"]),
        N("Mul", ["d", "gain"], ["w"]),
        N("MatMul", ["x", "w"], ["y"]),
    ]
    stored = {"v": f32(5, 40), "axis": np.array([1]), "gain": f32(5, 1)}
    assert op_types(check(build(nodes, stored, inputs={"x": [2, 5]}), run, [{"x": f32(2, 5)}]).model) == {"MatMul"}


def test_an_expression_that_would_grow_the_model_is_not_computed(build, run):
    nodes = [N("Expand", ["v", "s"], ["w"]), N("MatMul", ["x", "w"], ["y"])]
    model = build(nodes, {"v": f32(1, 64), "s": np.array([64, 64])}, inputs={"x": [2, 64]})
    assert "Expand" in op_types(check(model, run, [{"x": f32(2, 64)}]).model)


def test_integer_codes_behind_a_cast_are_not_widened(build, run):
    nodes = [N("Cast", ["q"], ["f"], to=1), N("Mul", ["f", "scale"], ["w"]), N("MatMul", ["x", "w"], ["y"])]
    stored = {"q": RNG.integers(-9, 9, (64, 64)).astype(np.int8), "scale": np.float32(0.1).reshape(())}
    result = check(build(nodes, stored, inputs={"x": [2, 64]}), run, [{"x": f32(2, 64)}])
    assert result.model.graph.initializers["q"].dtype == ir.DataType.INT8


# -- sub-graphs, functions, names --------------------------------------------------------------------------


def nested_model(proto) -> onnx.ModelProto:
    """A Loop with an If inside, all branches capturing an outer weight and reusing names."""
    info = helper.make_tensor_value_info
    then = helper.make_graph([N("MatMul", ["s", "w"], ["r"], name="mm")], "b", [], [info("r", 1, None)])
    other = [
        N("MatMul", ["s", "w"], ["q"], name="mm"),
        N("Constant", [], ["k"], value_float=0.5),
        N("Mul", ["q", "k"], ["r"]),
    ]
    body = helper.make_graph(
        [
            N("Identity", ["ci"], ["co"]),
            N("ReduceSum", ["s"], ["sum"], keepdims=0),
            N("Less", ["sum", "zero"], ["cond"]),
            N(
                "If",
                ["cond"],
                ["s2"],
                then_branch=then,
                else_branch=helper.make_graph(other, "b", [], [info("r", 1, None)]),
            ),
        ],
        "body",
        [info("i", 7, []), info("ci", 9, []), info("s", 1, None)],
        [info("co", 9, []), info("s2", 1, None)],
    )
    stored = {"n": np.array(3), "c": np.array(True), "w": f32(5, 5) * np.float32(0.3), "zero": np.zeros((), np.float32)}
    return proto([N("Loop", ["n", "c", "x"], ["y"], body=body)], stored, inputs={"x": ["n", 5]}, opset=17, ir_version=8)


def test_nested_sub_graphs_keep_their_captures(proto, run):
    model = ir.serde.deserialize_model(nested_model(proto))
    result = check(model, run, [{"x": f32(2, 5)}, {"x": -np.abs(f32(2, 5))}])
    [weight] = weights(result.model)
    assert [u.path for u in weight.uses] == ["y.s2.mm", "y.s2.mm_2"]


def test_nested_functions_with_default_attributes_are_inlined(proto, run):
    inner = helper.make_function(
        "my", "F", ["a", "b"], ["o"], [N("MatMul", ["a", "b"], ["t"]), N("LeakyRelu", ["t"], ["o"])],
        [helper.make_opsetid("", 13)], ["alpha"],
    )  # fmt: skip
    attribute = inner.node[1].attribute.add()
    attribute.name, attribute.ref_attr_name, attribute.type = "alpha", "alpha", onnx.AttributeProto.FLOAT
    calls = [N("F", ["a", "b"], ["u"], domain="my", alpha=0.3), N("F", ["u", "b"], ["o"], domain="my", alpha=0.1)]
    outer = helper.make_function(
        "my", "G", ["a", "b"], ["o"], calls, [helper.make_opsetid("", 17), helper.make_opsetid("my", 1)]
    )
    model = proto(
        [N("G", ["x", "w"], ["h"], domain="my"), N("G", ["h", "w"], ["y"], domain="my")], {"w": f32(5, 5)},
        inputs={"x": ["n", 5]}, opset=17, ir_version=8, domains={"my": 1}, functions=[inner, outer],
    )  # fmt: skip
    result = check(ir.serde.deserialize_model(model), run, [{"x": f32(2, 5)}])
    assert op_types(result.model) == {"MatMul", "LeakyRelu"}


def test_unnamed_nodes_are_called_after_what_they_make(build):
    model = build([N("Relu", ["x"], ["t"]), N("Neg", ["t"], ["y"])], {}, inputs={"x": [2]})
    assert [n.name for n in normalise(model, run=None).model.graph] == ["t", "y"]


def test_stale_shapes_are_forgotten_but_the_interface_is_kept(proto, run):
    model = proto(
        [N("Relu", ["x"], ["t"]), N("Neg", ["t"], ["y"])], {}, inputs={"x": ["batch", 5]}, outputs={"y": ["b", 5]}
    )
    model.graph.value_info.append(helper.make_tensor_value_info("t", 1, [7, 7, 7]))
    result = check(ir.serde.deserialize_model(model), run, [{"x": f32(2, 5)}])
    [relu, _] = result.model.graph
    assert str(relu.outputs[0].shape) == "[batch,5]"


def test_no_ops_in_front_of_outputs_keep_the_output_names(build, run):
    nodes = [
        N("Neg", ["x"], ["a"]),
        N("Identity", ["a"], ["y"]),
        N("Identity", ["x"], ["z"]),
        N("Identity", ["a"], ["u"]),
        N("Dropout", ["a", "r", "train"], ["d"]),
        N("Relu", ["d"], ["v"]),
    ]
    stored = {"r": np.float32(0.5).reshape(()), "train": np.array(False)}
    model = build(nodes, stored, inputs={"x": [2, 3]}, outputs=dict.fromkeys("yzuv"))
    assert "Dropout" not in op_types(check(model, run, [{"x": f32(2, 3)}]).model)


def test_a_sequence_keeps_its_type(build, run):
    nodes = [N("SplitToSequence", ["x"], ["s"], axis=1), N("SequenceAt", ["s", "i"], ["y"])]
    check(build(nodes, {"i": np.array(1)}, inputs={"x": ["n", 3]}), run, [{"x": f32(2, 3)}])


# -- the checks themselves ---------------------------------------------------------------------------------


def test_a_step_that_moves_the_outputs_is_undone_and_reported(build, run, monkeypatch):
    def bad(model: ir.Model) -> str:
        model.graph[0].attributes["alpha"] = ir.AttrFloat32("alpha", 0.5)
        return "did harm"

    monkeypatch.setattr(module, "_AFTER", (("harm", bad),))
    model = build([N("LeakyRelu", ["x"], ["y"], alpha=0.1)], {}, inputs={"x": [2, 3]})
    feeds = [{"x": f32(2, 3)}]
    result = normalise(model, run=run, feeds=feeds)
    [harm] = [s for s in result.steps if s.name == "harm"]
    assert harm.rolled_back
    assert "did harm; undone: 'y' moved by" in harm.detail
    assert result.model.graph[0].attributes["alpha"].as_float() == pytest.approx(0.1)


def test_one_bad_batchnorm_does_not_keep_the_others(build, run, monkeypatch):
    nodes, stored, x = [], {}, "x"
    for i in range(5):
        stored |= {f"w{i}": f32(4, 4, 1, 1), **bn(4, f"p{i}")}
        nodes.append(N("Conv", [x, f"w{i}"], [f"t{i}"]))
        nodes.append(N("BatchNormalization", [f"t{i}", *(f"p{i}{k}" for k in "sbmv")], [f"o{i}"], name=f"bn{i}"))
        x = f"o{i}"
    nodes.append(N("Relu", [x], ["y"]))
    fold = batchnorm._fold_conv

    def faulty(node: ir.Node, namer: object) -> None:
        if node.name == "bn3":
            node.inputs[0].producer().attributes["strides"] = ir.AttrInt64s("strides", [2, 2])
        fold(node, namer)

    monkeypatch.setattr(batchnorm, "_fold_conv", faulty)
    feeds = [{"x": f32(1, 4, 6, 6)}]
    model = build(nodes, stored, inputs={"x": [1, 4, 6, 6]})
    result = normalise(model, run=run, feeds=feeds)
    assert [n.name for n in result.model.graph if n.op_type == "BatchNormalization"] == ["bn3"]
    assert any(s.rolled_back and "bn3" in s.detail for s in result.steps)


def test_a_model_the_runtime_refuses_is_an_error(build, run):
    model = build([N("NoSuchOp", ["x"], ["y"])], {}, inputs={"x": [2]})
    with pytest.raises(RunError, match="NoSuchOp"):
        normalise(model, run=run, feeds=[{"x": f32(2)}])


def test_random_operators_do_not_look_like_harm(build, run):
    nodes = [N("RandomNormalLike", ["x"], ["r"]), N("Add", ["x", "r"], ["t"]), N("Identity", ["t"], ["y"])]
    result = normalise(build(nodes, {}, inputs={"x": [64]}), run=run, feeds=[{"x": f32(64)}])
    assert not [s for s in result.steps if s.rolled_back]


def test_contradictory_opsets_are_an_error(build):
    model = build([N("Relu", ["x"], ["y"])], {}, inputs={"x": [2]})
    model.opset_imports["ai.onnx"] = 13
    with pytest.raises(ModelError, match="imported as 21 and 13"):
        repair.merge_opsets(model)


# -- random graphs -----------------------------------------------------------------------------------------


@st.composite
def graphs(draw):
    """A chain of layers with skips, batch norms, casts, identities and constants, channels kept at 4."""
    nodes, stored, made = [], {}, ["x"]
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    for i in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(["conv", "bn", "relu", "add", "identity", "cast weight", "constant", "dropout"]))
        source, out = draw(st.sampled_from(made)), f"v{i}"
        if kind in ("conv", "cast weight"):
            groups = draw(st.sampled_from([1, 2, 4]))
            w = rng.standard_normal((4, 4 // groups, 1, 1)).astype(np.float16 if kind == "cast weight" else np.float32)
            shared = [
                n for n in stored if n.startswith("w") and stored[n].shape == w.shape and stored[n].dtype == w.dtype
            ]
            name = draw(st.sampled_from([f"w{i}", *shared]))
            stored.setdefault(name, w)
            if kind == "cast weight":
                nodes.append(N("Cast", [name], [f"c{i}"], to=1))
                name = f"c{i}"
            nodes.append(N("Conv", [source, name], [out], group=groups))
        elif kind == "bn":
            stored |= {f"b{i}{k}": (np.abs(rng.standard_normal(4)) + 0.1).astype(np.float32) for k in "sbmv"}
            nodes.append(N("BatchNormalization", [source, *(f"b{i}{k}" for k in "sbmv")], [out]))
        elif kind == "add":
            nodes.append(N("Add", [source, draw(st.sampled_from(made))], [out]))
        elif kind == "constant":
            nodes += [N("Constant", [], [f"k{i}"], value_float=0.5), N("Mul", [source, f"k{i}"], [out])]
        else:
            nodes.append(N({"relu": "Relu", "identity": "Identity", "dropout": "Dropout"}[kind], [source], [out]))
        made.append(out)
    outputs = draw(st.lists(st.sampled_from(made[1:]), min_size=1, max_size=3, unique=True))
    return nodes, stored, dict.fromkeys(sorted({*outputs, made[-1]}))


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(parts=graphs(), opset=st.sampled_from([13, 15, 17, 21]))
def test_random_graphs_keep_their_outputs_and_reach_a_fixed_point(build, run, parts, opset):
    nodes, stored, outputs = parts
    model = build(nodes, stored, inputs={"x": ["n", 4, 3, 3]}, outputs=outputs, opset=opset, ir_version=8)
    x = np.random.default_rng(1).standard_normal((2, 4, 3, 3)).astype(np.float32)
    check(model, run, [{"x": x}], atol=1e-4)


def test_denormal_weights_are_zero_and_small_settings_stay(build, run):
    w, bias = f32(16, 16), np.full(16, 1e-40, np.float32)
    w[::2] = np.float32(1e-39)
    model = build(
        [N("MatMul", ["x", "w"], ["t"]), N("Add", ["t", "b"], ["y"])], {"w": w, "b": bias}, inputs={"x": [2, 16]}
    )
    result = check(model, run, [{"x": f32(2, 16)}])
    (step,) = [s for s in result.steps if s.name == "denormal weights"]
    assert step.detail == "128 values below float32's normal range in 1 weights are zero"
    stored = {v.name: v.const_value.numpy() for v in result.model.graph.initializers.values()}
    np.testing.assert_array_equal(stored["w"], np.where(np.arange(16)[:, None] % 2 == 0, 0, w))
    np.testing.assert_array_equal(stored["b"], bias)
