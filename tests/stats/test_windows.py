"""im2col rows times the weight matrix equal what the runtime's own convolution computes."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

from featherweight.runtime import ort
from featherweight.stats.windows import Window, columns

CASES = [
    {"x": (2, 4, 9), "w": (6, 4, 4), "pads": [1, 2]},
    {"x": (2, 4, 9), "w": (6, 2, 3), "group": 2, "strides": [2], "auto_pad": "SAME_UPPER"},
    {"x": (1, 3, 8, 7), "w": (5, 3, 3, 3), "pads": [1, 0, 2, 1], "strides": [2, 1]},
    {"x": (2, 6, 8, 7), "w": (6, 1, 3, 3), "group": 6, "dilations": [2, 1], "pads": [2, 1, 2, 1]},
    {"x": (1, 3, 8, 7), "w": (5, 3, 2, 2), "auto_pad": "SAME_LOWER"},
    {"x": (1, 3, 8, 7), "w": (5, 3, 3, 2), "auto_pad": "VALID"},
    {"x": (1, 4, 5, 6, 4), "w": (4, 2, 3, 2, 3), "group": 2, "pads": [1, 0, 1, 1, 1, 0]},
    {"x": (1, 4, 5), "w": (4, 3, 3), "transposed": True, "strides": [2], "output_padding": [1], "pads": [1, 0]},
    {"x": (1, 4, 5, 4), "w": (4, 3, 3, 3), "transposed": True, "strides": [2, 3], "pads": [1, 1, 1, 1], "group": 2},
    {"x": (1, 4, 5, 4), "w": (4, 3, 3, 3), "transposed": True, "strides": [2, 2], "output_shape": [10, 9]},
    {"x": (1, 4, 5, 4), "w": (4, 3, 2, 3), "transposed": True, "strides": [2, 2], "auto_pad": "SAME_UPPER"},
]


def reference(x, w, op, attributes):
    node = helper.make_node(op, ["x", "w"], ["y"], **attributes)
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ort.session(model.SerializeToString()).run({"x": x})["y"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c['w']}-{'t' if c.get('transposed') else 'c'}")
def test_rows_times_matrix_equal_the_convolution(case):
    rng = np.random.default_rng(0)
    attributes = {k: v for k, v in case.items() if k not in ("x", "w", "transposed")}
    x = rng.normal(size=case["x"]).astype(np.float32)
    w = rng.normal(size=case["w"]).astype(np.float32)
    transposed, groups, rank = case.get("transposed", False), case.get("group", 1), len(case["x"]) - 2
    expected = reference(x, w, "ConvTranspose" if transposed else "Conv", attributes)
    window = Window(
        kernel=w.shape[2:],
        strides=tuple(case.get("strides", [1] * rank)),
        dilations=tuple(case.get("dilations", [1] * rank)),
        pads=tuple(case.get("pads", [0] * 2 * rank)),
        auto_pad=case.get("auto_pad", "NOTSET"),
        transposed=transposed,
        output_padding=tuple(case.get("output_padding", ())),
        output_shape=tuple(case.get("output_shape", ())),
    )
    assert window.layout(x.shape[2:])[1] == expected.shape[2:]
    rows = columns(x, window, groups=groups, limit=10**9, rng=rng)
    if transposed:  # (in, out / g, *k) -> (g, out / g, in / g * k)
        split = w.reshape(groups, w.shape[0] // groups, w.shape[1], -1)
        matrix = split.transpose(0, 2, 1, 3).reshape(groups, w.shape[1], -1)
    else:
        matrix = w.reshape(groups, w.shape[0] // groups, -1)
    got = np.einsum("gnk,gok->gon", rows, matrix)  # (g, out / g, n * positions)
    got = got.reshape(-1, x.shape[0], int(np.prod(expected.shape[2:]))).transpose(1, 0, 2).reshape(expected.shape)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_drawn_positions_are_a_subset_and_repeatable():
    window = Window((3, 3), (1, 1), (1, 1), (1, 1, 1, 1))
    one = window.positions((9, 9), limit=10, rng=np.random.default_rng(3))
    two = window.positions((9, 9), limit=10, rng=np.random.default_rng(3))
    assert len(one) == 10
    assert len({tuple(p) for p in one}) == 10
    np.testing.assert_array_equal(one, two)
    assert one.max() < 9
