"""Vectors of codebooks as an encoding: a worked example, and what the runtime computes."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from featherweight.errors import TechniqueError
from featherweight.graph import encode, io

N = helper.make_node
SLACK_BYTES = 256


def gather_model(build, shape: tuple[int, int], rank: int = 2) -> ir.Model:
    dims = [f"d{i}" for i in range(rank)]
    table = {"W": np.zeros(shape, np.float32)}
    return build(
        [N("Gather", ["W", "x"], ["y"])],
        table,
        inputs={"x": dims},
        outputs={"y": [*dims, shape[1]]},
        input_type=TensorProto.INT64,
    )


def drawn(rows: int, groups: int, width: int, bits: int, stages: int, half: bool, levels: int | None = None):
    rng = np.random.default_rng([rows, groups, width, bits, stages])
    levels = levels or 1 << bits
    book = rng.standard_normal((stages * groups, levels, width)).astype(np.float16 if half else np.float32)
    return encode.product(rng.integers(0, levels, (rows, stages * groups)), book, bits, stages=stages)


def test_columns_are_vectors_of_the_codebooks_by_hand() -> None:
    book = np.array([[[1, 2], [3, 4]], [[5, 6], [7, 8]]], np.float32)
    made = encode.product([[0, 1], [1, 0]], book, 1)
    assert encode.decode(made).tolist() == [[1, 2, 7, 8], [3, 4, 5, 6]]
    summed = encode.product([[0, 1], [1, 0]], book, 1, stages=2)
    assert encode.decode(summed).tolist() == [[1 + 7, 2 + 8], [3 + 5, 4 + 6]]


CASES = [
    (40, 3, 4, 8, 1, False, None),
    (40, 3, 4, 8, 2, True, 200),
    (33, 5, 2, 4, 1, True, None),
    (33, 1, 7, 5, 3, False, None),
    (20, 9, 1, 3, 1, True, None),
    (9, 2, 8, 6, 1, False, 50),
    (64, 4, 1, 1, 2, False, None),
    (50, 6, 2, 2, 1, True, 3),
]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("looked_up", [False, True])
def test_the_runtime_computes_what_decode_says(build, run, tmp_path, case, looked_up: bool) -> None:
    made = drawn(*case)
    if looked_up:
        made = encode.lookup(made)
    model = gather_model(build, made.shape)
    before = len(io.to_bytes(model)) - 4 * made.layout.size
    encode.attach(model, model.graph.initializers["W"], made)
    assert len(io.to_bytes(model)) - before <= made.nbytes + encode.shared_bytes(made) + SLACK_BYTES
    index = np.array([[0, case[0] - 1, 2], [1, 1, 5]])
    actual = run(model, [{"x": index}])[0]["y"]
    np.testing.assert_array_equal(actual, encode.decode(made)[index])
    io.save(model, tmp_path / "m.onnx")
    loaded = io.load(tmp_path / "m.onnx")
    name = "y" if looked_up else "W"
    value = next(v for n in loaded.graph for v in n.outputs if v.name == name)
    found = encode.read(loaded, value)
    assert found is not None
    assert found.kind == made.kind
    np.testing.assert_array_equal(encode.decode(found), encode.decode(made))


@pytest.mark.parametrize("case", CASES)
def test_bytes_are_known_from_shapes(case) -> None:
    rows, groups, width, bits, stages, half, levels = case
    made = drawn(*case)
    args = {"groups": groups, "stages": stages, "levels": levels, "half_scale": half}
    assert encode.sizes((rows, groups * width), "product", bits, **args) == made.nbytes
    looked_up = encode.sizes((rows, groups * width), "lookup", bits, inner="product", **args)
    assert looked_up == encode.lookup(made).nbytes
    payload = rows * stages * groups * bits / 8 + stages * groups * (levels or 1 << bits) * width * (2 if half else 4)
    assert payload <= made.nbytes + 1 <= payload * 1.35 + 900


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: encode.product([[0]], np.ones((1, 2), np.float32), 1), "must be float32 or float16 of shape"),
        (lambda: encode.product([[0]], np.ones((2, 2, 1), np.float32), 1), r"needs indices \(rows, 2\)"),
        (lambda: encode.product([[0, 0, 0]], np.ones((3, 2, 1), np.float32), 1, stages=2), "in 2 equal stages"),
        (lambda: encode.product([[1]], np.ones((1, 1, 1), np.float32), 1), "below the codebooks' 1 levels"),
        (lambda: encode.product([[0]], np.ones((1, 3, 1), np.float32), 1), "at most 2\\*\\*bits = 2"),
        (lambda: encode.product([[0]], np.full((1, 1, 1), np.nan, np.float32), 1), "must be finite"),
        (lambda: encode.product([[2]], np.ones((1, 3, 1), np.float32), 9), "must be in 1..8"),
    ],
)
def test_what_is_no_product_is_refused(call, words: str) -> None:
    with pytest.raises(TechniqueError, match=words):
        call()
