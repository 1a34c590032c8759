"""Costs against values worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from featherweight.graph import io, shapes
from featherweight.graph.cost import costs

N = helper.make_node


def z(*shape: int) -> np.ndarray:
    return np.zeros(shape, np.float32)


def by_name(model: ir.Model, **keywords: object) -> dict[str, int | None]:
    return {n.name: n.macs for n in costs(model, **keywords).nodes}


def test_macs_of_a_small_conv_net(build):
    nodes = [
        N("Conv", ["x", "w1"], ["a"], name="conv", pads=[1, 1, 1, 1], strides=[2, 2]),  # (8, 8, 8)
        N("Conv", ["a", "w2"], ["b"], name="depthwise", group=8, pads=[1, 1, 1, 1]),  # (8, 8, 8)
        N("Conv", ["b", "w3"], ["c"], name="point"),  # (12, 8, 8)
        N("ConvTranspose", ["c", "w4"], ["d"], name="up", strides=[2, 2], group=2),  # (6, 16, 16)
        N("GlobalAveragePool", ["d"], ["e"], name="pool"),
        N("Flatten", ["e"], ["f"], name="flat"),
        N("Gemm", ["f", "w5"], ["y"], name="head", transB=1),
    ]
    stored = {"w1": z(8, 3, 3, 3), "w2": z(8, 1, 3, 3), "w3": z(12, 8, 1, 1), "w4": z(12, 3, 2, 2), "w5": z(10, 6)}
    model = build(nodes, stored, inputs={"x": ["n", 3, 16, 16]})
    expected = {
        "conv": 8 * 8 * 8 * 27,
        "depthwise": 8 * 8 * 8 * 9,
        "point": 12 * 8 * 8 * 8,
        "up": 12 * 8 * 8 * 3 * 4,
        "pool": 0,
        "flat": 0,
        "head": 60,
    }
    assert by_name(model) == expected
    assert costs(model).macs == sum(expected.values())
    assert costs(model, input_shapes={"x": (5, 3, 16, 16)}).macs == 5 * sum(expected.values())
    assert costs(model).weight_bytes == 4 * (8 * 27 + 72 + 96 + 144 + 60)


@pytest.mark.parametrize(
    ("node", "stored", "inputs", "macs"),
    [
        (N("MatMul", ["x", "w"], ["y"]), {"w": z(5, 7)}, {"x": [2, 3, 5]}, 2 * 3 * 5 * 7),
        (N("MatMul", ["x", "w"], ["y"]), {"w": z(5)}, {"x": [3, 5]}, 15),
        (N("MatMul", ["a", "b"], ["y"]), {}, {"a": [2, 4, 8, 16], "b": [2, 4, 16, 8]}, 8 * 8 * 8 * 16),
        (N("Gemm", ["x", "w"], ["y"], transA=1), {"w": z(3, 7)}, {"x": [3, 2]}, 2 * 3 * 7),
        (N("Einsum", ["a", "b"], ["y"], equation="bij,bjk->bik"), {}, {"a": [2, 3, 4], "b": [2, 4, 5]}, 2 * 3 * 4 * 5),
        (N("Relu", ["x"], ["y"]), {}, {"x": [3, 5]}, 0),
        (
            N("LSTM", ["x", "w", "r"], ["", "y"], hidden_size=6, direction="bidirectional"),
            {"w": z(2, 24, 5), "r": z(2, 24, 6)},
            {"x": [7, 3, 5]},
            7 * 3 * 2 * 24 * (5 + 6),
        ),
    ],
)
def test_macs_of_one_operator(build, node, stored, inputs, macs):
    assert costs(build([node], stored, inputs=inputs)).macs == macs


def loop(proto, count: np.ndarray | None):
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [N("Identity", ["ci"], ["co"]), N("MatMul", ["s", "w"], ["s2"], name="step")],
        "body",
        [info("i", 7, []), info("ci", 9, []), info("s", 1, [2, 6])],
        [info("co", 9, []), info("s2", 1, [2, 6])],
    )
    stored = {"c": np.array(True), "w": z(6, 6), **({"n": count} if count is not None else {})}
    model = proto([N("Loop", ["n", "c", "x"], ["y"], body=body, name="loop")], stored, inputs={"x": [2, 6]})
    if count is None:
        model.graph.input.append(info("n", 7, []))
    return ir.serde.deserialize_model(model)


def test_a_loop_body_counts_as_often_as_it_runs(proto):
    assert by_name(loop(proto, np.array(4)))["loop.step"] == 4 * 2 * 36
    assert by_name(loop(proto, None))["loop.step"] is None


def test_a_scan_runs_once_a_step(cases_dir):
    model = io.load(cases_dir / "scan_body_with_outer_weight.onnx")
    found = by_name(model, input_shapes={"seq": (5, 2, 4)})
    assert (found["scan.bx"], found["scan.bh"]) == (5 * 2 * 4 * 6, 5 * 2 * 6 * 6)


def test_liveness_peak_of_a_small_graph(build):
    """Element-wise nodes work in place; the skip keeps its tensor alive."""
    nodes = [
        N("Conv", ["x", "w"], ["a"], name="wide"),  # a: 4 * 16 = 64 values
        N("Relu", ["a"], ["b"], name="relu"),  # in place of a
        N("Conv", ["b", "v"], ["c"], name="narrow"),  # c: 1 * 16 = 16 values
        N("Conv", ["c", "u"], ["d"], name="back"),  # d: 64 values, b waits for the sum
        N("Add", ["b", "d"], ["y"], name="sum"),  # in place of b or d
    ]
    stored = {"w": z(4, 2, 1, 1), "v": z(1, 4, 1, 1), "u": z(4, 1, 1, 1)}
    model = build(nodes, stored, inputs={"x": [1, 2, 4, 4]}, outputs={"y": [1, 4, 4, 4]})
    # x 32 + b 64 + c 16 + d 64 values of 4 bytes; after that c is gone.
    found = costs(model)
    assert found.peak_activation_bytes == 4 * (32 + 64 + 16 + 64)
    assert found.peak_node == "back"
    assert costs(model, input_shapes={"x": (3, 2, 4, 4)}).peak_activation_bytes == 3 * found.peak_activation_bytes


def test_reshape_needs_no_memory_but_keeps_its_source_alive(build):
    nodes = [
        N("Neg", ["x"], ["a"]),
        N("Reshape", ["a", "s"], ["r"]),
        N("MatMul", ["a", "w"], ["b"]),
        N("MatMul", ["r", "w2"], ["c"]),
        N("Identity", ["b"], ["p"]),
        N("Identity", ["c"], ["q"]),
    ]
    stored = {"s": np.array([2, 8]), "w": z(4, 4), "w2": z(8, 8)}
    model = build(nodes, stored, inputs={"x": [4, 4]}, outputs={"p": [4, 4], "q": [2, 8]})
    # x, a (= r), b; then c while r is read; then copies to the two outputs: x, b, c, p at most.
    assert costs(model).peak_activation_bytes == 4 * 16 * 4


def test_what_is_computed_at_load_is_no_activation(build):
    nodes = [N("Cast", ["q"], ["f"], to=1), N("Mul", ["f", "s"], ["w"]), N("MatMul", ["x", "w"], ["y"])]
    stored = {"q": np.zeros((64, 64), np.int8), "s": np.float32(0.1).reshape(())}
    found = costs(build(nodes, stored, inputs={"x": [1, 64]}, outputs={"y": [1, 64]}))
    assert found.peak_activation_bytes == 4 * 128
    assert found.macs == 64 * 64
    assert found.weight_bytes == 64 * 64 + 4


def test_a_tied_weight_is_counted_once(build):
    nodes = [N("MatMul", ["x", "w"], ["a"], name="one"), N("MatMul", ["a", "w"], ["y"], name="two")]
    found = costs(build(nodes, {"w": z(8, 8)}, inputs={"x": [1, 8]}))
    assert found.weight_bytes == 256
    assert [n.weight_bytes for n in found.nodes] == [256, 0]


def test_training_memory_of_a_perceptron(build):
    nodes = [
        N("Gemm", ["x", "w1", "b1"], ["a"]),  # keeps x: 8
        N("Relu", ["a"], ["h"]),  # keeps h: 16, which the next layer needs too
        N("Gemm", ["h", "w2"], ["o"]),
        N("Softmax", ["o"], ["y"]),  # keeps y: 4
    ]
    found = costs(build(nodes, {"w1": z(8, 16), "b1": z(16), "w2": z(16, 4)}, inputs={"x": ["n", 8]}))
    n = 4 * (8 * 16 + 16 + 16 * 4)
    memory = found.train_bytes("adam", batch=32)
    assert (memory.weights, memory.gradients, memory.optimizer) == (n, n, 2 * n)
    assert memory.activations == 32 * 4 * (8 + 16 + 4)
    assert memory.total == 4 * n + memory.activations
    assert found.train_bytes("sgd").optimizer == 0
    assert found.train_bytes("momentum").optimizer == n


def test_shapes_computed_by_the_graph_are_followed(build):
    nodes = [
        N("Shape", ["x"], ["s"]),
        N("Gather", ["s", "zero"], ["b"]),
        N("Concat", ["b", "rest"], ["t"], axis=0),
        N("Reshape", ["x", "t"], ["r"]),
        N("MatMul", ["r", "w"], ["y"], name="fc"),
    ]
    stored = {"zero": np.array([0]), "rest": np.array([-1]), "w": z(12, 5)}
    model = build(nodes, stored, inputs={"x": ["n", 3, 4]})
    assert by_name(model, input_shapes={"x": (7, 3, 4)})["fc"] == 7 * 12 * 5


def test_observed_shapes_reach_behind_unknown_operators(cases_dir):
    model = io.load(cases_dir / "microsoft_domain_fused_op.onnx")
    unseen = costs(model)
    assert unseen.unknown
    observed = dict.fromkeys(unseen.unknown, (1, 16))
    assert costs(model, observed_shapes=observed).unknown == ()


def test_integer_tensors_count_in_their_own_width(build):
    model = build(
        [N("Cast", ["i"], ["y"], to=1)], {}, inputs={"i": [10]}, outputs={"y": [10]}, input_type=TensorProto.INT64
    )
    assert costs(model).peak_activation_bytes == 80 + 40


def test_a_mask_made_from_ranges_has_a_known_shape(build):
    """Causal masks as exporters write them: positions compared with positions, both made from the input's length."""
    nodes = [
        N("Shape", ["x"], ["length"], start=1, end=2),
        N("Reshape", ["length", "scalar"], ["end"]),
        N("Range", ["zero", "end", "one"], ["positions"]),
        N("Unsqueeze", ["positions", "last"], ["column"]),
        N("LessOrEqual", ["positions", "column"], ["allowed"]),
        N("Where", ["allowed", "keep", "drop"], ["mask"]),
        N("Gather", ["table", "positions"], ["places"]),
        N("MatMul", ["mask", "x"], ["seen"]),
        N("Add", ["seen", "places"], ["y"]),
    ]
    stored = {
        "scalar": np.zeros(0, np.int64), "zero": np.array(0), "one": np.array(1), "last": np.array([1]),
        "keep": np.float32(0), "drop": np.float32(-1), "table": np.zeros((64, 64), np.float32),
    }  # fmt: skip
    model = build(nodes, {k: np.asarray(v) for k, v in stored.items()}, inputs={"x": ["batch", "length", 64]})
    known = shapes.infer(model, {"x": (2, 5, 64)})
    assert known["mask"].sizes == (5, 5)
    assert known["places"].sizes == (5, 64)
    assert known["y"].sizes == (2, 5, 64)
