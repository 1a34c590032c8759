"""Encodings: worked examples by hand, and round trips against what ONNX Runtime computes."""

from __future__ import annotations

import multiprocessing.reduction
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from featherweight.errors import ModelError, TechniqueError
from featherweight.graph import encode, io, surgery

N = helper.make_node
SLACK_BYTES = 256


def reading_model(build, encoded: encode.Encoded) -> ir.Model:
    """y = x * W, W an initializer of the encoded shape that `attach` will replace."""
    integer = encode.decode(encoded).dtype == np.int8
    stored = np.zeros(encoded.shape, np.int8 if integer else np.float32)
    nodes = [N("Cast", ["W"], ["w"], to=TensorProto.FLOAT), N("Mul", ["x", "w"], ["y"])]
    if not integer:
        nodes = [N("Mul", ["x", "W"], ["y"])]
    return build(nodes, {"W": stored}, inputs={"x": [1]}, outputs={"y": encoded.shape or [1]})


def named(model: ir.Model, name: str) -> ir.Value:
    """The value of this name, stored or computed."""
    return next(v for g in model.graphs() for v in [*g.initializers.values(), *_outputs(g)] if v.name == name)


def _outputs(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs


def operators_after_load(model: ir.Model, folder) -> list[str]:
    """Operators of the graph as ONNX Runtime runs it."""
    ort = pytest.importorskip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.optimized_model_filepath = str(folder / "optimised.onnx")
    ort.InferenceSession(io.to_bytes(model), options, providers=["CPUExecutionProvider"])
    return [n.op_type for n in onnx.load(folder / "optimised.onnx").graph.node]


def random_encoded(kind: str, bits: int, shape: tuple[int, ...], seed: int) -> encode.Encoded:
    """An encoding of random codes; the seed also draws axis, blocks, groups and scale type."""
    rng = np.random.default_rng(seed)
    codes = rng.integers(-(1 << (bits - 1)), 1 << (bits - 1), shape)
    axis = int(rng.integers(len(shape)))
    placing = rng.integers(3)
    factor = rng.choice([np.float32, np.float16])
    if kind in ("linear", "dequantize"):
        make = getattr(encode, kind)
        if placing == 0:
            return make(codes, factor(0.37), bits)
        if placing == 1:
            return make(codes, rng.random(shape[axis]).astype(factor), bits, axis=axis)
        block = int(rng.integers(1, shape[axis] + 1))
        sizes = [-(-d // block) if i == axis else d for i, d in enumerate(shape)]
        return make(codes, rng.random(sizes).astype(factor), bits, axis=axis, block=block)
    if kind == "palette":
        levels = int(rng.integers(1, (1 << bits) + 1))
        groups = shape[0] if placing == 2 else 1
        book = rng.standard_normal((groups, levels)) * 20
        book = book.astype(np.int8 if placing == 1 else np.float32)
        return encode.palette(rng.integers(0, levels, shape), book[0] if groups == 1 else book, bits)
    if kind == "bitmask":
        mask = rng.random(shape) < rng.random()
        if placing == 0:
            return encode.bitmask(rng.standard_normal(int(mask.sum())).astype(np.float32), mask)
        scale = rng.random(shape[axis]).astype(factor)
        return encode.bitmask(codes[mask], mask, scale=scale, bits=bits, axis=axis)
    if kind == "float16":
        return encode.float16(rng.standard_normal(shape).astype(np.float32))
    return encode.int_tensor(codes, bits)


KINDS = ["linear", "dequantize", "palette", "bitmask", "float16", "int_tensor"]
SHAPES = st.lists(st.integers(1, 9), min_size=1, max_size=5).map(tuple)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kind=st.sampled_from(KINDS), bits=st.integers(2, 8), shape=SHAPES, seed=st.integers(0, 2**32))
def test_any_encoding_is_read_back_and_decoded_as_the_runtime_computes_it(build, run, kind, bits, shape, seed):
    encoded = random_encoded(kind, bits, shape, seed)
    check_round_trip(build, run, encoded)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("shape", [(64, 72), (33, 5, 3, 3)], ids=str)
def test_a_larger_tensor_round_trips_and_is_folded(build, run, tmp_path, kind, bits, shape):
    for seed in range(3):
        encoded = random_encoded(kind, bits, shape, seed)
        model = check_round_trip(build, run, encoded)
        kept = [] if kind != "dequantize" else ["DequantizeLinear"]
        assert operators_after_load(model, tmp_path) == [*kept, "Mul"]


def check_round_trip(build, run, encoded: encode.Encoded) -> ir.Model:
    """Attach, run, size, save, load, read: all must agree."""
    expected = encode.decode(encoded)
    model = reading_model(build, encoded)
    before = len(io.to_bytes(model)) - expected.nbytes
    decoded = encode.attach(model, model.graph.initializers["W"], encoded)
    assert (decoded.name, tuple(decoded.shape.numpy())) == ("W", encoded.shape)
    payload = io.to_bytes(model)
    onnx.checker.check_model(onnx.load_from_string(payload), full_check=True)
    [outputs] = run(payload, [{"x": np.ones(1, np.float32)}])
    np.testing.assert_array_equal(outputs["y"].reshape(encoded.shape), expected.astype(np.float32))
    grown = len(payload) - before
    assert abs(grown - encoded.nbytes - encode.shared_bytes(encoded)) <= SLACK_BYTES
    loaded = ir.serde.deserialize_model(onnx.load_from_string(payload))
    for each in (model, loaded):
        again = encode.read(each, named(each, "W"))
        assert again is not None
        assert (again.kind, again.nbytes) == (encoded.kind, encoded.nbytes)
        np.testing.assert_array_equal(encode.decode(again), expected)
    return model


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8])
def test_a_palette_of_every_width_round_trips(build, run, bits):
    rng = np.random.default_rng(bits)
    indices = rng.integers(0, 1 << bits, (50, 31))
    indices.flat[: 1 << bits] = np.arange(1 << bits)
    check_round_trip(build, run, encode.palette(indices, rng.standard_normal(1 << bits).astype(np.float32), bits))


def test_codes_times_scales_by_hand():
    codes = np.array([[-4, 3], [1, -2]])
    per_row = encode.decode(encode.linear(codes, np.array([0.5, 2.0], np.float32), 3, axis=0))
    np.testing.assert_array_equal(per_row, np.array([[-2.0, 1.5], [2.0, -4.0]], np.float32))
    blocks = np.array([[1.0, 10.0]], np.float32)
    by_block = encode.decode(encode.linear(codes, blocks.reshape(2, 1), 3, axis=1, block=2))
    np.testing.assert_array_equal(by_block, np.array([[-4.0, 3.0], [10.0, -20.0]], np.float32))


def test_the_last_block_may_be_short():
    codes = np.ones((5, 1), np.int8)
    scale = np.array([[1.0], [2.0], [3.0]], np.float32)
    decoded = encode.decode(encode.linear(codes, scale, 4, axis=0, block=2))
    np.testing.assert_array_equal(decoded[:, 0], [1, 1, 2, 2, 3])


def test_groups_of_a_palette_have_their_own_codebook_by_hand():
    book = np.array([[1.0, 2.0], [-1.0, -2.0]], np.float32)
    decoded = encode.decode(encode.palette(np.array([[0, 1], [1, 1], [0, 0], [1, 0]]), book, 1))
    np.testing.assert_array_equal(decoded, [[1, 2], [2, 2], [-1, -1], [-2, -1]])


def test_a_bitmask_puts_values_in_place_by_hand():
    mask = np.array([[False, True, False], [True, False, False]])
    decoded = encode.decode(encode.bitmask(np.array([5.0, 7.0], np.float32), mask))
    np.testing.assert_array_equal(decoded, [[0, 5, 0], [7, 0, 0]])


def test_float16_rounds_to_nearest_even_and_refuses_overflow():
    # Between 2048 and 4096 float16 has steps of 2.
    decoded = encode.decode(encode.float16(np.array([2049.0, 2051.0, np.inf], np.float32)))
    np.testing.assert_array_equal(decoded, [2048.0, 2052.0, np.inf])
    with pytest.raises(TechniqueError, match=r"up to 65504, but 1 values are larger \(up to 70000\)"):
        encode.float16(np.array([1.0, 7e4], np.float32))


def test_the_bits_in_the_file_are_the_codes():
    # 16 codes of 2 bits, lowest first: [0, 1, -2, -1] -> 0b11_10_01_00
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 21}, name="g"), ir_version=10)
    value = surgery.add_initializer(model.graph, "W", np.zeros(4096, np.float32))
    encode.attach(model, value, encode.linear(np.tile([0, 1, -2, -1], 1024), 1.0, 2))
    [packed] = [v for v in model.graph.initializers.values() if v.const_value.size == 1024]
    assert set(packed.const_value.numpy().tolist()) == {0b11100100}


@pytest.mark.parametrize(("bits", "expected"), [(8, 8), (7, 7), (6, 6), (5, 5), (4, 4), (3, 3), (2, 2)])
def test_a_large_tensor_takes_its_bits(bits, expected):
    nbytes = encode.sizes((1024, 4096), "linear", bits, axis=1)
    assert 0 <= nbytes - (1024 * 4096 * expected // 8 + 4096 * 4) < 700


def test_a_small_tensor_takes_the_form_with_the_fewest_bytes():
    tiny = [encode.sizes((10,), "linear", bits) for bits in (8, 7, 6, 5)]
    assert len(set(tiny)) == 1  # ten bytes saved do not pay for unpacking nodes
    assert encode.sizes((10,), "linear", 2) <= min(tiny)


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_needs_no_arrays(kind):
    encoded = random_encoded(kind, 5, (40, 30), 1)
    layout = encoded.layout
    options: dict[str, Any] = {"axis": layout.axis, "half_scale": layout.half_scale}
    if kind == "palette":
        options = {"groups": layout.groups, "levels": layout.levels, "integer": layout.integer}
    if kind == "bitmask":
        options |= {"nnz": layout.nnz, "scaled": layout.integer}
    if kind in ("linear", "dequantize"):
        options |= {"block": layout.block}
    if kind in ("float16", "int_tensor"):
        options = {}
    assert encode.sizes((40, 30), kind, 5, **options) == encoded.nbytes


def test_the_shared_tables_are_written_once(build):
    codes = np.random.default_rng(0).integers(-4, 4, (64, 64))
    nodes = [N("Add", ["x", "a"], ["s"]), N("Add", ["s", "b"], ["y"])]
    zeros = np.zeros((64, 64), np.float32)
    model = build(nodes, {"a": zeros, "b": zeros}, inputs={"x": [1]})
    lengths = [len(io.to_bytes(model)) - 2 * zeros.nbytes]
    for done, name in enumerate(["a", "b"], start=1):
        encoded = encode.linear(codes, 0.1, 3)
        encode.attach(model, model.graph.initializers[name], encoded)
        lengths.append(len(io.to_bytes(model)) - (2 - done) * zeros.nbytes)
    first, second = np.diff(lengths)
    assert first - second > 200
    assert abs(second - encoded.nbytes) <= SLACK_BYTES


def test_equal_and_non_contiguous_arrays_give_equal_encodings():
    codes = np.random.default_rng(0).integers(-8, 8, (12, 10))
    assert encode.linear(codes.T, 0.5, 4) == encode.linear(np.ascontiguousarray(codes.T), 0.5, 4)
    assert encode.linear(codes, 0.5, 4) != encode.linear(codes, 0.25, 4)
    assert encode.linear(np.full((3, 3), 7), 0.5, 4) == encode.linear(np.broadcast_to(7, (3, 3)), 0.5, 4)


def test_an_encoding_keeps_its_own_arrays():
    codes = np.ones((4, 4), np.int8)
    encoded = encode.int_tensor(codes, 4)
    codes[:] = 0
    assert encode.decode(encoded).all()
    encode.decode(encoded)[:] = 0
    assert encode.decode(encoded).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: encode.linear(np.zeros((0, 3), np.int8), 1.0, 4), r"at least one element.*\(0, 3\)"),
        (lambda: encode.linear(np.zeros(3, np.int8), 1.0, 1), r"must be in 2\.\.8, but got 1"),
        (lambda: encode.linear(np.array([8]), 1.0, 4), r"4 bits must be in -8\.\.7, but got 8\.\.8"),
        (lambda: encode.linear(np.zeros(3), 1.0, 4), "must be integers, but their type is float64"),
        (lambda: encode.linear(np.zeros((2, 3), int), np.ones(2, np.float32), 4, axis=1), r"\(3,\), but got \(2,\)"),
        (lambda: encode.linear(np.zeros(3, int), 1.0, 4, axis=1), r"axis .* must be in -1\.\.0, but got 1"),
        (lambda: encode.linear(np.zeros(3, int), 1.0, 4, block=2), "with an axis"),
        (lambda: encode.linear(np.zeros(3, int), float("nan"), 4), "scales must be finite"),
        (lambda: encode.palette(np.array([3]), np.zeros(3, np.float32), 2), "below the codebook's 3 levels"),
        (lambda: encode.palette(np.array([1]), np.zeros(2), 2), "float32 or int8"),
        (lambda: encode.palette(np.zeros((3, 1), int), np.zeros((2, 2), np.float32), 1), "divide the 3 rows"),
        (lambda: encode.bitmask(np.zeros(2, np.float32), np.ones(3, bool)), "each of its 3 set bits, but got 2"),
    ],
)
def test_wrong_arrays_are_refused_with_the_law_and_the_value(make, message):
    with pytest.raises(TechniqueError, match=message):
        make()


def test_attach_refuses_what_it_cannot_replace(build):
    encoded = encode.linear(np.zeros((2, 2), int), 1.0, 4)
    model = build([N("Mul", ["x", "W"], ["y"])], {"W": np.zeros((2, 2), np.float32)}, inputs={"x": [1]})
    decoded = encode.attach(model, model.graph.initializers["W"], encoded)
    with pytest.raises(ModelError, match="computed or already encoded"):
        encode.attach(model, decoded, encoded)
    old = build([N("Mul", ["x", "W"], ["y"])], {"W": np.zeros((2, 2), np.float32)}, inputs={"x": [1]}, opset=13)
    with pytest.raises(ModelError, match="opset 21 or newer, but the model has 13"):
        encode.attach(old, old.graph.initializers["W"], encoded)
    wide = build([N("Mul", ["x", "W"], ["y"])], {"W": np.zeros((2, 3), np.float32)}, inputs={"x": [1]})
    with pytest.raises(ModelError, match=r"'W' is \(2, 3\) and the encoding \(2, 2\)"):
        encode.attach(wide, wide.graph.initializers["W"], encoded)
    settable = build([N("Mul", ["x", "W"], ["y"])], {"W": np.zeros((2, 2), np.float32)}, inputs={"x": [1], "W": [2, 2]})
    with pytest.raises(ModelError, match="callers may set"):
        encode.attach(settable, settable.graph.initializers["W"], encoded)


def test_an_encoding_travels_between_processes():
    ctx = multiprocessing.reduction.ForkingPickler
    encoded = encode.linear(np.arange(-4, 4), 0.5, 3)
    assert ctx.loads(ctx.dumps(encoded)) == encoded


def test_a_model_saved_and_loaded_with_its_data_beside_it_reads_the_same(build, tmp_path):
    encoded = encode.linear(np.random.default_rng(0).integers(-16, 16, (100, 100)), 0.5, 5)
    model = reading_model(build, encoded)
    encode.attach(model, model.graph.initializers["W"], encoded)
    io.save(model, tmp_path / "m.onnx", external=True)
    loaded = io.load(tmp_path / "m.onnx")
    assert encode.read(loaded, named(loaded, "W")) == encoded
