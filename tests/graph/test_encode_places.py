"""Encodings where weights really are: under every weighted operator, in sub-graphs, behind foreign nodes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from featherweight.errors import TechniqueError
from featherweight.graph import encode, io

N = helper.make_node
RNG = np.random.default_rng(0)
DECODE_OPS = {"BitwiseOr", "Cast", "Mul", "Reshape", "Slice", "Div", "Mod", "Range", "CumSum", "Where"}


def codes(shape: tuple[int, ...], bits: int) -> np.ndarray:
    return RNG.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)


def optimised(model: ir.Model, folder) -> onnx.ModelProto:
    """The graph as ONNX Runtime runs it."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(io.to_bytes(model), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimised.onnx")


def operators(graph: onnx.GraphProto) -> list[str]:
    """Operators of a graph and its sub-graphs."""
    found = []
    for node in graph.node:
        found.append(node.op_type)
        for a in node.attribute:
            found += operators(a.g) if a.type == onnx.AttributeProto.GRAPH else []
    return found


def same_as_float(run, model: ir.Model, encoded: encode.Encoded, name: str, feeds: dict[str, Any], graph=None) -> None:
    """The encoded model computes bit for bit what the float model with the decoded weight does."""
    graph = graph or model.graph
    value = graph.initializers[name]
    value.const_value = ir.tensor(encode.decode(encoded), name=name)
    expected = run(model, [feeds])[0]
    encode.attach(model, value, encoded)
    actual = run(model, [feeds])[0]
    for key in expected:
        np.testing.assert_array_equal(actual[key], expected[key])


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


NODES = {
    "MatMul": (N("MatMul", ["x", "W"], ["y"]), (16, 24), {"x": f32(3, 16)}),
    "Gemm": (N("Gemm", ["x", "W"], ["y"], transB=1), (24, 16), {"x": f32(3, 16)}),
    "Conv": (N("Conv", ["x", "W"], ["y"], pads=[1, 1, 1, 1]), (9, 5, 3, 3), {"x": f32(1, 5, 7, 7)}),
    "Conv1d": (N("Conv", ["x", "W"], ["y"]), (9, 5, 3), {"x": f32(1, 5, 11)}),
    "Conv3d": (N("Conv", ["x", "W"], ["y"]), (4, 2, 3, 2, 3), {"x": f32(1, 2, 5, 5, 5)}),
    "ConvTranspose": (N("ConvTranspose", ["x", "W"], ["y"], strides=[2, 2]), (5, 7, 3, 3), {"x": f32(1, 5, 4, 4)}),
    "LSTM": (N("LSTM", ["x", "W", "R"], ["y"], hidden_size=6), (1, 24, 5), {"x": f32(4, 1, 5)}),
    "PRelu": (N("PRelu", ["x", "W"], ["y"]), (5,), {"x": f32(3, 5)}),
}


@pytest.mark.parametrize("op", NODES)
@pytest.mark.parametrize("bits", [8, 5, 4, 3, 2])
def test_weights_of_every_operator_compute_what_their_decoded_values_do(build, run, tmp_path, op, bits):
    node, shape, feeds = NODES[op]
    stored = {"W": np.zeros(shape, np.float32)} | ({"R": f32(1, 24, 6)} if op == "LSTM" else {})
    model = build([node], stored, inputs={k: v.shape for k, v in feeds.items()})
    encoded = encode.linear(codes(shape, bits), RNG.random(shape[0]).astype(np.float32), bits, axis=0)
    same_as_float(run, model, encoded, "W", feeds)
    assert not DECODE_OPS & set(operators(optimised(model, tmp_path).graph))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_integer_kernels_are_reached_whatever_the_width_of_the_stored_weight(build, run, tmp_path, bits):
    """The int8 tensor of `int_tensor` under Q/DQ is a QLinearConv at run time."""
    shape, n = (8, 6, 3, 3), 8
    stored = {
        "W": np.zeros(shape, np.int8), "ws": RNG.random(n).astype(np.float32), "wz": np.zeros(n, np.int8),
        "s": np.array(0.02, np.float32), "z": np.array(128, np.uint8),
    }  # fmt: skip
    nodes = [
        N("DequantizeLinear", ["W", "ws", "wz"], ["w"], axis=0),
        N("QuantizeLinear", ["x", "s", "z"], ["q"]),
        N("DequantizeLinear", ["q", "s", "z"], ["d"]),
        N("Conv", ["d", "w"], ["c"]),
        N("QuantizeLinear", ["c", "s", "z"], ["cq"]),
        N("DequantizeLinear", ["cq", "s", "z"], ["y"]),
    ]
    model = build(nodes, stored, inputs={"x": [1, 6, 8, 8]})
    same_as_float(run, model, encode.int_tensor(codes(shape, bits), bits), "W", {"x": f32(1, 6, 8, 8)})
    # The runtime may lay the activation out anew (Transpose), which depends on the CPU.
    assert {*operators(optimised(model, tmp_path).graph)} - {"Transpose"} == {
        "QuantizeLinear", "QLinearConv", "DequantizeLinear",
    }  # fmt: skip


@pytest.mark.parametrize("bits", [8, 5, 4, 3])
@pytest.mark.parametrize("block", [0, 32])
def test_dequantize_in_front_of_a_matmul_becomes_the_n_bit_kernel(build, run, tmp_path, bits, block):
    k, n = 128, 48
    model = build([N("MatMul", ["x", "W"], ["y"])], {"W": np.zeros((k, n), np.float32)}, inputs={"x": [2, k]})
    scale = RNG.random((k // block, n) if block else n).astype(np.float32) / k
    encoded = encode.dequantize(codes((k, n), bits), scale, bits, axis=0 if block else 1, block=block)
    encode.attach(model, model.graph.initializers["W"], encoded)
    [node] = [n for n in optimised(model, tmp_path).graph.node if n.op_type == "MatMulNBits"]
    assert {a.name: a.i for a in node.attribute}["bits"] == (4 if bits == 4 else 8)
    x = f32(2, k)
    expected = x.astype(np.float64) @ encode.decode(encoded).astype(np.float64)
    # The kernel rounds activations to 8 bits a block.
    np.testing.assert_allclose(run(model, [{"x": x}])[0]["y"], expected, atol=0.02 * np.abs(expected).max())


def loop_model(build) -> ir.Model:
    """Three turns of h = h @ W + h @ O; W lives in the body, O is captured from outside."""
    body = helper.make_graph(
        [
            N("Identity", ["cond"], ["cond_out"]),
            N("MatMul", ["h", "W"], ["a"]),
            N("MatMul", ["h", "O"], ["b"]),
            N("Add", ["a", "b"], ["h_out"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("cond", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, [2, 16]),
        ],
        [
            helper.make_tensor_value_info("cond_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h_out", TensorProto.FLOAT, [2, 16]),
        ],
        [numpy_helper.from_array(np.zeros((16, 16), np.float32), "W")],
    )
    stored = {"O": np.zeros((16, 16), np.float32), "n": np.array(3, np.int64), "c": np.array(True)}
    return build([N("Loop", ["n", "c", "x"], ["y"], body=body)], stored, inputs={"x": [2, 16]})


@pytest.mark.parametrize("bits", [5, 4, 3, 2])
def test_weights_inside_a_loop_and_captured_from_outside_it(build, run, tmp_path, bits):
    model = loop_model(build)
    feeds = {"x": f32(2, 16)}
    inner = next(g for g in model.graphs() if g is not model.graph)
    scale = (RNG.random(16) * 0.1).astype(np.float32)
    layout = encode.linear(codes((16, 16), bits), scale, bits, axis=1)
    book = f32(1 << bits)
    table = encode.palette(RNG.integers(0, 1 << bits, (16, 16)), book, bits)
    same_as_float(run, model, layout, "W", feeds, inner)
    same_as_float(run, model, table, "O", feeds)
    assert not DECODE_OPS & set(operators(optimised(model, tmp_path).graph))
    loaded = ir.serde.deserialize_model(onnx.load_from_string(io.to_bytes(model)))
    values = {o.name: o for g in loaded.graphs() for n in g for o in n.outputs}
    assert encode.read(loaded, values["W"]) == layout
    assert encode.read(loaded, values["O"]) == table


def test_a_float16_graph_keeps_its_type(build, run):
    nodes = [N("Cast", ["x"], ["h"], to=10), N("MatMul", ["h", "W"], ["c"]), N("Cast", ["c"], ["y"], to=1)]
    model = build(nodes, {"W": np.zeros((16, 8), np.float16)}, inputs={"x": [2, 16]})
    encoded = encode.linear(codes((16, 8), 5), RNG.random(8).astype(np.float32), 5, axis=1)
    decoded = encode.attach(model, model.graph.initializers["W"], encoded)
    assert decoded.dtype == ir.DataType.FLOAT16
    assert encode.read(model, decoded) == encoded
    x = f32(2, 16).astype(np.float16)
    expected = x.astype(np.float32) @ encode.decode(encoded).astype(np.float16).astype(np.float32)
    actual = run(model, [{"x": x.astype(np.float32)}])[0]["y"]
    np.testing.assert_allclose(actual, expected, rtol=2e-2, atol=0.1)


def test_attaching_after_somebody_sorted_the_graph_keeps_it_in_order(build, run):
    model = build(
        [N("Mul", ["x", "A"], ["a"]), N("Mul", ["a", "B"], ["y"])],
        {"A": np.zeros((80, 80), np.float32), "B": np.zeros((80, 80), np.float32)},
        inputs={"x": [1]},
        outputs={"y": [80, 80]},
    )
    first = encode.linear(codes((80, 80), 3), 0.5, 3)
    encode.attach(model, model.graph.initializers["A"], first)
    # A legal order in which the shared tables do not lead.
    early = ir.node("Neg", [model.graph.inputs[0]], name="early")
    model.graph.insert_before(model.graph[0], early)
    second = encode.linear(codes((80, 80), 3), 0.5, 3)
    encode.attach(model, model.graph.initializers["B"], second)
    onnx.checker.check_model(onnx.load_from_string(io.to_bytes(model)), full_check=True)
    expected = encode.decode(first) * encode.decode(second)
    np.testing.assert_array_equal(run(model, [{"x": np.ones(1, np.float32)}])[0]["y"], expected)


def test_a_foreign_value_with_the_name_of_a_shared_table_is_not_used(build, run):
    model = build(
        [N("Neg", ["x"], ["fw.d2"]), N("Mul", ["fw.d2", "A"], ["y"])],
        {"A": np.zeros((80, 80), np.float32)},
        inputs={"x": [1]},
    )
    encoded = encode.linear(codes((80, 80), 2), 0.5, 2)
    encode.attach(model, model.graph.initializers["A"], encoded)
    np.testing.assert_array_equal(run(model, [{"x": -np.ones(1, np.float32)}])[0]["y"], encode.decode(encoded))


FOREIGN = {
    "an input": [N("Mul", ["x", "s"], ["W"])],
    "a sum": [N("Cast", ["q"], ["f"], to=1), N("Add", ["f", "s"], ["W"])],
    "another type": [N("Cast", ["q"], ["f"], to=11), N("Cast", ["f"], ["W"], to=1)],
    "a zero point": [N("DequantizeLinear", ["q", "s", "z"], ["W"])],
    "a computed scale": [N("Cast", ["q"], ["f"], to=1), N("Exp", ["s"], ["e"]), N("Mul", ["f", "e"], ["W"])],
    "another axis": [N("Cast", ["u"], ["i"], to=6), N("Gather", ["b", "i"], ["W"], axis=1)],
    "another domain": [N("Cast", ["q"], ["f"], to=1), N("Mul", ["f", "s"], ["W"], domain="org.other")],
    "int64 indices": [N("Cast", ["u"], ["i"], to=7), N("Gather", ["b", "i"], ["W"])],
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_nodes_are_not_mistaken(build, case):
    stored = {
        "q": np.zeros((4, 4), np.int8), "u": np.zeros((4, 4), np.uint8), "s": np.array(0.5, np.float32),
        "z": np.array(1, np.int8), "b": f32(4, 4),
    }  # fmt: skip
    model = build(FOREIGN[case], stored, inputs={"x": [4, 4]}, outputs={"W": None}, domains={"org.other": 1})
    assert encode.read(model, next(o for n in model.graph for o in n.outputs if o.name == "W")) is None
    assert encode.read(model, model.graph.inputs[0]) is None
    assert encode.read(model, model.graph.initializers["s"]) is None


def test_an_encoding_with_changed_constants_is_not_read(build):
    model = build([N("Mul", ["x", "W"], ["y"])], {"W": np.zeros((200, 200), np.float32)}, inputs={"x": [1]})
    decoded = encode.attach(model, model.graph.initializers["W"], encode.linear(codes((200, 200), 3), 0.5, 3))
    assert encode.read(model, decoded) is not None
    levels = next(
        v for v in model.graph.initializers.values() if v.const_value.size == 4 and v.dtype == ir.DataType.INT8
    )
    levels.const_value = ir.tensor(levels.const_value.numpy() + np.int8(1), name=levels.name)
    assert encode.read(model, decoded) is None


# -- look-ups ------------------------------------------------------------------------------------------------


def table_model(build, shape: tuple[int, int], rank: int, *, known: bool = True) -> ir.Model:
    """y = W[i], with indices of a rank that the graph may or may not tell."""
    source = "i" if known else "j"
    nodes = [N("Gather", ["W", source], ["y"])]
    if not known:
        nodes.insert(0, N("Squeeze", ["i"], ["j"]))
    return build(
        nodes,
        {"W": np.zeros(shape, np.float32)},
        inputs={"i": [f"d{a}" for a in range(rank)]},
        outputs={"y": [*(f"e{a}" for a in range(rank)), shape[1]]},
        input_type=TensorProto.INT64,
    )


def random_table(shape: tuple[int, int], bits: int, seed: int) -> encode.Encoded:
    """A table that can be looked up, with the placing of its scales drawn."""
    rng = np.random.default_rng(seed)
    rows, dim = shape
    placing = rng.integers(6)
    if placing == 0 or bits == 1:
        levels = int(rng.integers(1, (1 << bits) + 1))
        return encode.palette(rng.integers(0, levels, shape), rng.standard_normal(levels).astype(np.float32), bits)
    grid = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    factor = rng.choice([np.float32, np.float16])
    if placing == 1:
        return encode.linear(grid, factor(0.3), bits)
    if placing in (2, 3):
        return encode.linear(grid, rng.random(shape[placing - 2]).astype(factor), bits, axis=int(placing - 2))
    block = int(rng.choice([b for b in range(1, dim + 1) if dim % b == 0]))
    return encode.linear(grid, rng.random((rows, dim // block)).astype(factor), bits, axis=1, block=block)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.integers(1, 8), shape=st.tuples(st.integers(1, 60), st.integers(1, 40)), rank=st.integers(0, 3),
    known=st.booleans(), seed=st.integers(0, 2**32),
)  # fmt: skip
def test_rows_looked_up_are_the_rows_of_the_decoded_table(build, run, bits, shape, rank, known, seed):
    encoded = encode.lookup(random_table(shape, bits, seed))
    model = table_model(build, shape, rank, known=known)
    before = len(io.to_bytes(model)) - 4 * shape[0] * shape[1]
    encode.attach(model, model.graph.initializers["W"], encoded)
    payload = io.to_bytes(model)
    onnx.checker.check_model(onnx.load_from_string(payload), full_check=True)
    assert abs(len(payload) - before - encoded.nbytes - encode.shared_bytes(encoded)) <= 256
    index = np.random.default_rng(seed).integers(-shape[0], shape[0], [2, 3, 4][:rank])
    expected = encode.decode(encoded)[index if known else index.squeeze()]
    np.testing.assert_array_equal(run(payload, [{"i": index}])[0]["y"], expected)
    loaded = ir.serde.deserialize_model(onnx.load_from_string(payload))
    again = encode.read(loaded, loaded.graph.outputs[0])
    assert again is not None
    assert again.kind == "lookup"
    np.testing.assert_array_equal(encode.decode(again), encode.decode(encoded))


def test_a_lookup_is_not_folded_and_takes_an_empty_index(build, run, tmp_path):
    encoded = encode.lookup(encode.linear(codes((50, 24), 4), 0.5, 4))
    model = table_model(build, (50, 24), 2)
    encode.attach(model, model.graph.initializers["W"], encoded)
    assert run(model, [{"i": np.zeros((0, 3), np.int64)}])[0]["y"].shape == (0, 3, 24)
    largest = max(np.prod(t.dims) for t in optimised(model, tmp_path).graph.initializer)
    assert largest <= 50 * 24 // 2


def test_two_readers_of_a_table_share_its_codes(build, run):
    table = np.zeros((64, 32), np.float32)
    nodes = [N("Gather", ["W", "i"], ["a"]), N("Gather", ["W", "a2"], ["b"]), N("Add", ["a", "b"], ["y"])]
    model = build(nodes, {"W": table, "a2": np.array([5, 6])}, inputs={"i": [2]}, input_type=TensorProto.INT64)
    encoded = encode.linear(codes((64, 32), 4), RNG.random(64).astype(np.float32), 4, axis=0)
    encode.attach_lookup(model, model.graph.initializers["W"], encoded)
    dense = encode.decode(encoded)
    expected = dense[[1, 2]] + dense[[5, 6]]
    np.testing.assert_array_equal(run(model, [{"i": np.array([1, 2])}])[0]["y"], expected)
    assert io.stored_bytes(model) < 64 * 32 // 2 + 64 * 4 + 200


def test_lookups_are_refused_where_rows_are_not_taken(build):
    model = build([N("MatMul", ["x", "W"], ["y"])], {"W": np.zeros((4, 8), np.float32)}, inputs={"x": [1, 4]})
    table = encode.linear(codes((4, 8), 4), 0.5, 4)
    with pytest.raises(TechniqueError, match=r"must be a Gather on axis 0, but 'W' is input 1 of MatMul"):
        encode.attach_lookup(model, model.graph.initializers["W"], table)
    with pytest.raises(TechniqueError, match="attach it folded"):
        encode.lookup(encode.linear(codes((4, 8, 2), 4), 0.5, 4))
    with pytest.raises(TechniqueError, match="must divide its 8 columns"):
        encode.lookup(encode.linear(codes((4, 8), 4), np.ones((4, 3), np.float32), 4, axis=1, block=3))
    axis1 = build([N("Gather", ["W", "i"], ["y"], axis=1)], {"W": np.zeros((4, 8), np.float32)},
                  inputs={"i": [1]}, input_type=TensorProto.INT64)  # fmt: skip
    with pytest.raises(TechniqueError, match="axis 0"):
        encode.attach_lookup(axis1, axis1.graph.initializers["W"], table)
