"""The matrix view of weights, against matrix products written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from featherweight.graph import io
from featherweight.graph.weights import skipped, weights

N = helper.make_node
RNG = np.random.default_rng(0)


def f32(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def im2col(x: np.ndarray, kernel: tuple[int, int]) -> np.ndarray:
    """x (c, h, w) -> (positions, c * kh * kw), stride 1, no padding: the order (channel, kernel position)."""
    c, h, w = x.shape
    rows = []
    for i in range(h - kernel[0] + 1):
        for j in range(w - kernel[1] + 1):
            rows.append(x[:, i : i + kernel[0], j : j + kernel[1]].reshape(-1))
    assert rows[0].size == c * kernel[0] * kernel[1]
    return np.stack(rows)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_conv_is_its_matrix_times_the_unfolded_input(build, run, groups):
    w = f32(8, 4 // groups, 3, 3)
    model = build([N("Conv", ["x", "w"], ["y"], group=groups)], {"w": w}, inputs={"x": [1, 4, 6, 5]})
    [weight] = weights(model)
    matrix = weight.to_matrix(weight.array())
    assert matrix.shape == (groups, 8 // groups, 4 // groups * 9) == weight.matrix_shape
    x = f32(1, 4, 6, 5)
    got = run(model, [{"x": x}])[0]["y"][0]
    blocks = [im2col(part, (3, 3)) for part in np.split(x[0], groups)]
    expected = np.concatenate([(rows @ m.T).T.reshape(-1, 4, 3) for rows, m in zip(blocks, matrix, strict=True)])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert weight.channel_axis == 0
    assert weight.input_value.name == "x"


@pytest.mark.parametrize("groups", [1, 3])
def test_a_conv_transpose_matrix_has_output_channels_as_rows(build, run, groups):
    w = f32(6, 6 // groups, 1, 1)
    model = build([N("ConvTranspose", ["x", "w"], ["y"], group=groups)], {"w": w}, inputs={"x": [1, 6, 2, 2]})
    [weight] = weights(model)
    matrix = weight.to_matrix(weight.array())
    x = f32(1, 6, 2, 2)
    parts = np.split(x[0].reshape(6, -1), groups)
    expected = np.concatenate([m @ p for m, p in zip(matrix, parts, strict=True)]).reshape(1, 6, 2, 2)
    np.testing.assert_allclose(run(model, [{"x": x}])[0]["y"], expected, atol=1e-5)
    assert weight.channel_axis == (1 if groups == 1 else None)


def test_a_depthwise_conv_transpose_has_a_channel_axis(build):
    model = build([N("ConvTranspose", ["x", "w"], ["y"], group=6)], {"w": f32(6, 1, 3, 3)}, inputs={"x": [1, 6, 4, 4]})
    [weight] = weights(model)
    assert weight.channel_axis == 0
    assert weight.matrix_shape == (6, 1, 9)


@pytest.mark.parametrize(
    ("shape", "x", "matrix", "axis"),
    [
        ((5, 3), (4, 5), (1, 3, 5), 1),
        ((2, 5, 3), (2, 4, 5), (2, 3, 5), 2),
        ((5,), (4, 5), (1, 1, 5), None),
    ],
)
def test_a_matmul_weight_is_seen_transposed(build, run, shape, x, matrix, axis):
    model = build([N("MatMul", ["x", "w"], ["y"])], {"w": f32(*shape)}, inputs={"x": x})
    [weight] = weights(model)
    seen = weight.to_matrix(weight.array())
    assert seen.shape == matrix
    assert weight.channel_axis == axis
    feed = f32(*x)
    expected = np.stack([f @ m.T for f, m in zip(feed if len(shape) == 3 else feed[None], seen, strict=True)])
    np.testing.assert_allclose(run(model, [{"x": feed}])[0]["y"].reshape(-1), expected.reshape(-1), atol=1e-5)


def test_a_weight_on_the_left_has_its_rows_as_outputs(build):
    model = build([N("MatMul", ["w", "x"], ["y"])], {"w": f32(6, 8)}, inputs={"x": [8, 2]})
    [weight] = weights(model)
    assert (weight.uses[0].role, weight.matrix_shape, weight.channel_axis) == ("matmul_left", (1, 6, 8), 0)
    assert weight.input_value.name == "x"


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_weight_follows_trans_b(build, transposed):
    w = f32(3, 5) if transposed else f32(5, 3)
    model = build([N("Gemm", ["x", "w"], ["y"], transB=transposed)], {"w": w}, inputs={"x": [2, 5]})
    [weight] = weights(model)
    np.testing.assert_array_equal(weight.to_matrix(weight.array())[0], w if transposed else w.T)
    assert weight.channel_axis == (0 if transposed else 1)


def test_a_tied_table_appears_once_with_both_uses(build):
    nodes = [
        N("Gather", ["e", "ids"], ["h"]),
        N("Transpose", ["e"], ["et"], perm=[1, 0]),
        N("MatMul", ["h", "et"], ["y"], name="head"),
    ]
    model = build(nodes, {"e": f32(20, 6)}, inputs={"ids": [1, 3]}, input_type=TensorProto.INT64)
    [weight] = weights(model)
    assert [u.role for u in weight.uses] == ["gather", "matmul"]
    # The product is with the transposed table, so its rows are the output channels.
    np.testing.assert_array_equal(weight.to_matrix(weight.array())[0], weight.array())
    assert weight.channel_axis == 0
    assert weight.input_value.name == "h"


def test_a_gather_only_table_is_rows_by_dimension(build):
    nodes = [N("Gather", ["e", "ids"], ["y"], axis=1)]
    model = build(nodes, {"e": f32(6, 20)}, inputs={"ids": [3]}, input_type=TensorProto.INT64)
    [weight] = weights(model)
    assert weight.matrix_shape == (1, 20, 6)
    assert weight.channel_axis == 1
    assert weight.input_value is None


def test_weights_inside_loops_have_dotted_paths_and_captured_ones_count(cases_dir):
    [weight] = weights(io.load(cases_dir / "loop_body_with_gemm.onnx"))
    assert [u.path for u in weight.uses] == ["loop.step"]
    assert weight.graph.name != "body"
    names = [w.name for w in weights(io.load(cases_dir / "scan_body_with_outer_weight.onnx"))]
    assert names == ["Wx", "Wh"]


def test_recurrent_weights_have_their_directions_as_groups(cases_dir):
    found = {w.name: w for w in weights(io.load(cases_dir / "lstm_bidirectional_with_gaps.onnx"))}
    assert found["W"].matrix_shape == (2, 16, 5)
    assert found["R"].uses[0].role == "rnn_recurrent"
    assert found["R"].input_value is None


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("already_qdq", "already quantised"),
        ("weight_only_dq_then_transpose", "already quantised"),
        ("conv_weight_computed_at_run_time", "computed at run time"),
        ("model_local_function", "opaque"),
    ],
)
def test_what_is_left_alone_is_said(cases_dir, case, text):
    assert any(text in note.text for note in skipped(io.load(cases_dir / f"{case}.onnx")))


def test_a_product_of_two_activations_is_not_worth_a_note(build):
    assert not skipped(build([N("MatMul", ["a", "b"], ["y"])], {}, inputs={"a": [2, 3], "b": [3, 2]}))


def test_small_weights_can_be_left_out(build):
    model = build([N("MatMul", ["x", "w"], ["y"])], {"w": f32(5, 3)}, inputs={"x": [2, 5]})
    assert len(weights(model, min_elements=15)) == 1
    assert weights(model, min_elements=16) == []


SHAPES = {
    "Conv": st.tuples(st.sampled_from([2, 4, 6]), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    "ConvTranspose": st.tuples(st.sampled_from([2, 4, 6]), st.integers(1, 3), st.integers(1, 3)),
    "MatMul": st.lists(st.integers(1, 4), min_size=1, max_size=4).map(tuple),
    "Gemm": st.tuples(st.integers(1, 5), st.integers(1, 5)),
}


@settings(max_examples=60, deadline=None)
@given(data=st.data(), op=st.sampled_from(sorted(SHAPES)))
def test_from_matrix_undoes_to_matrix_exactly(build, data, op):
    shape = data.draw(SHAPES[op])
    attributes = {"group": data.draw(st.sampled_from([1, 2]))} if op.startswith("Conv") else {}
    if op == "Gemm":
        attributes = {"transB": data.draw(st.sampled_from([0, 1]))}
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    model = build([N(op, ["x", "w"], ["y"], **attributes)], {"w": array}, inputs={"x": ["a", "b", "c"]})
    for weight in weights(model):
        matrix = weight.to_matrix(array)
        assert matrix.ndim == 3
        assert matrix.flags.c_contiguous
        np.testing.assert_array_equal(weight.from_matrix(matrix), array)
        if weight.channel_axis is not None and weight.groups == 1:
            # One entry along the axis is one row of the matrix.
            np.testing.assert_array_equal(
                np.moveaxis(array, weight.channel_axis, 0).reshape(array.shape[weight.channel_axis], -1).sum(1),
                matrix[0].sum(1),
            )
