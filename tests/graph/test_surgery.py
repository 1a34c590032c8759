"""Edits keep the graph whole, and a copy shares no mutable thing with its source."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from featherweight.errors import ModelError
from featherweight.graph import io, surgery

N = helper.make_node


@pytest.fixture
def model(build):
    nodes = [
        N("Constant", [], ["k"], value=numpy_helper.from_array(np.ones(3, np.float32), "k")),
        N("MatMul", ["x", "w"], ["a"], name="fc"),
        N("Add", ["a", "k"], ["y"], name="add"),
    ]
    return build(nodes, {"w": np.ones((2, 3), np.float32)}, inputs={"x": [1, 2]})


def test_a_copy_can_be_renamed_and_edited_without_touching_the_source(model):
    before = io.to_bytes(model)
    copy = surgery.copy_model(model)
    copy.graph.initializers["w"].name = "other"
    copy.graph[0].attributes["value"].as_tensor().name = "renamed"
    surgery.set_initializer(copy.graph.initializers["other"], np.zeros((2, 3), np.float32))
    copy.graph[2].name = "changed"
    assert io.to_bytes(model) == before


def test_a_copy_shares_the_weights_bytes(model, tmp_path):
    io.save(model, tmp_path / "m.onnx")
    loaded = io.load(tmp_path / "m.onnx")
    copy = surgery.copy_model(loaded)
    a, b = (m.graph.initializers["w"].const_value.numpy() for m in (loaded, copy))
    assert np.shares_memory(a, b)


def test_an_unsorted_model_can_be_copied(build):
    model = build([N("Neg", ["t"], ["y"]), N("Relu", ["x"], ["t"])], {}, inputs={"x": [2]})
    assert io.to_bytes(surgery.copy_model(model)) == io.to_bytes(model)


def test_fresh_names_avoid_nodes_and_tensors_everywhere(model):
    assert surgery.fresh_name(model, "free") == "free"
    assert surgery.fresh_name(model, "fc") == "fc_2"
    namer = surgery.Namer(model)
    assert [namer("w"), namer("w"), namer("w")] == ["w_2", "w_3", "w_4"]


def test_an_initializer_is_added_typed_and_not_over_another(model):
    value = surgery.add_initializer(model.graph, "v", np.ones((2, 2), np.int8))
    assert value.dtype == ir.DataType.INT8
    assert value.shape == ir.Shape([2, 2])
    with pytest.raises(ModelError, match="'w' exists; use fresh_name"):
        surgery.add_initializer(model.graph, "w", np.ones(1, np.float32))


def test_replacing_an_output_keeps_the_interface(model, run):
    output = model.graph.outputs[0]
    node = surgery.make_node(surgery.Namer(model), "Neg", [output], "negated")
    surgery.insert_after(output, [node])
    surgery.replace_uses(output, node.outputs[0], keep=[node])
    assert [v.name for v in model.graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(model, [{"x": np.ones((1, 2), np.float32)}])[0]["y"], [[-3, -3, -3]])


def test_replacing_an_output_by_an_input_copies_it(build, run):
    model = build([N("Neg", ["x"], ["y"])], {}, inputs={"x": [2]})
    surgery.replace_uses(model.graph.outputs[0], model.graph.inputs[0], keep=[model.graph[0]])
    surgery.remove_unused(model)
    np.testing.assert_array_equal(run(model, [{"x": np.array([1, 2], np.float32)}])[0]["y"], [1, 2])


def test_an_optional_input_can_be_set_and_taken_away(build):
    model = build([N("Conv", ["x", "w"], ["y"])], {"w": np.ones((1, 1, 1, 1), np.float32)}, inputs={"x": [1, 1, 2, 2]})
    bias = surgery.add_initializer(model.graph, "b", np.ones(1, np.float32))
    surgery.replace_input(model.graph[0], 2, bias)
    assert list(model.graph[0].inputs)[2] is bias
    surgery.replace_input(model.graph[0], 2, None)
    assert surgery.remove_unused(model) == 1


def test_used_things_cannot_be_removed(model):
    with pytest.raises(ModelError, match="'fc' is still read"):
        surgery.remove_node(model.graph[1])
    with pytest.raises(ModelError, match="'w' is still read"):
        surgery.remove_initializer(model.graph.initializers["w"])


def test_constness_follows_the_graph(build):
    nodes = [
        N("Neg", ["w"], ["a"]),
        N("Add", ["a", "x"], ["b"]),
        N("RandomNormalLike", ["w"], ["r"]),
        N("Add", ["b", "r"], ["y"]),
    ]
    model = build(nodes, {"w": np.ones(2, np.float32)}, inputs={"x": [2]})
    values = {o.name: o for n in model.graph for o in n.outputs}
    assert {k: surgery.is_constant(v) for k, v in values.items()} == {"a": True, "b": False, "r": False, "y": False}
    assert surgery.is_constant(None)


def test_a_weight_that_the_caller_may_override_is_not_constant(cases_dir):
    model = io.load(cases_dir / "initializers_listed_as_inputs_ir3.onnx")
    assert surgery.constant(model.graph.initializers["c1.w"]) is None


def test_text_in_a_protobuf_is_read_out():
    proto = numpy_helper.from_array(np.array([b"a", b"bc"], object), "words")
    read = surgery.materialise(ir.TensorProtoTensor(proto))
    assert (read.name, list(read.shape)) == ("words", [2])
    assert read.numpy().tolist() == [b"a", b"bc"]


def test_what_only_a_removed_body_reads_goes_too(build):
    """A node that nobody needs takes with it what its sub-graph captured, weights included."""
    body = helper.make_graph(
        [N("Mul", ["h", "w"], ["inside"])],
        "then",
        [],
        [helper.make_tensor_value_info("inside", TensorProto.FLOAT, None)],
    )
    nodes = [
        N("Neg", ["x"], ["y"]), N("Abs", ["x"], ["h"]), N("If", ["c"], ["lost"], then_branch=body, else_branch=body)
    ]  # fmt: skip
    model = build(nodes, {"w": np.ones(2, np.float32), "c": np.array(True)}, inputs={"x": [2]})
    assert [v.name for v in model.graph.outputs] == ["y"]
    surgery.remove_unused(model)
    assert [n.op_type for n in model.graph] == ["Neg"]
    assert not model.graph.initializers
