"""Whole models: what was cut is solved anew against the original, in order, exactly where that is possible."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from featherweight.errors import DataError
from featherweight.graph import io, surgery
from featherweight.graph.channels import KEPT
from featherweight.recover import recover
from featherweight.runtime import ort


class InProcess:
    """Runs the child's function here: the tests look at its numbers, not at the sandbox."""

    def call(self, func, *args, progress=None, doing=""):
        return func(*args, progress=progress)


def model(text, **arrays):
    """A model in ONNX text with these float32 weights."""
    found = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]>\n' + text)
    for name, array in arrays.items():
        value = next(v for node in found.graph for v in node.inputs if v is not None and v.name == name)
        value.const_value = ir.Tensor(np.ascontiguousarray(array, np.float32), name=name)
        value.shape, value.type = ir.Shape(array.shape), ir.TensorType(ir.DataType.FLOAT)
        found.graph.register_initializer(value)
    return found


def cut(source, kept=None, **arrays):
    """A copy with other arrays; `kept`: {value: "axis:indices"}."""
    copy = surgery.copy_model(source)
    for name, array in arrays.items():
        surgery.set_initializer(copy.graph.initializers[name], np.ascontiguousarray(array, np.float32))
    for node in copy.graph:
        for value in node.outputs:
            value.shape = None
            if kept and value.name in kept:
                value.metadata_props[KEPT] = kept[value.name]
    return copy


def outputs(m, feeds):
    session = ort.session(io.to_bytes(m))
    return [next(iter(session.run(f).values())) for f in feeds]


def error(a, b, feeds):
    """Mean squared difference of the first output, relative to a's spread."""
    x, y = np.concatenate(outputs(a, feeds)), np.concatenate(outputs(b, feeds))
    return float(((x - y) ** 2).mean() / x.var())


def rows(shape, batches=8, seed=0, mix=None):
    rng = np.random.default_rng(seed)
    found = [rng.normal(size=shape).astype(np.float32) for _ in range(batches)]
    return [{"x": f if mix is None else (f @ mix).astype(np.float32)} for f in found]


def faded(m, name, factor):
    """Multiply what reads the value `name`: damage in a node that has no weights to solve."""
    value = next(v for n in m.graph for v in n.outputs if v.name == name)
    reader = next(iter(value.uses()))
    namer = surgery.Namer(m)
    stored = surgery.add_initializer(m.graph, namer("factor"), np.asarray(factor, np.float32))
    product = surgery.make_node(namer, "Mul", [value, stored], "faded")
    surgery.insert_before(reader.node, [product])
    surgery.replace_input(reader.node, reader.idx, product.outputs[0])
    return m


TWO = """g (float[n, 6] x) => (float[n, 3] y) {
  h = Gemm<transB = 1>(x, w1, b1)
  y = Gemm<transB = 1>(h, w2, b2)
}"""


def test_removed_inputs_that_are_mixtures_of_the_others_are_made_up_for_exactly():
    rng = np.random.default_rng(0)
    w1, b1 = rng.normal(size=(8, 6)), rng.normal(size=8)
    w1[6], w1[7] = w1[0] - 2 * w1[1], w1[2] + w1[3]  # hidden units 6 and 7 say nothing new
    w2, b2 = rng.normal(size=(3, 8)), rng.normal(size=3)
    original = model(TWO, w1=w1, b1=b1, w2=w2, b2=b2)
    reduced = cut(original, {"h": "1:0,1,2,3,4,5"}, w1=w1[:6], b1=b1[:6], w2=w2[:, :6])
    feeds = rows((40, 6))
    assert error(original, reduced, feeds) > 0.1
    assert recover(original, reduced, feeds, worker=InProcess()).model is reduced
    assert error(original, reduced, rows((50, 6), seed=9)) < 1e-8


def test_layers_that_nothing_reached_are_not_touched():
    rng = np.random.default_rng(1)
    arrays = {"w1": rng.normal(size=(8, 6)), "b1": rng.normal(size=8), "w2": rng.normal(size=(3, 8)), "b2": np.zeros(3)}
    original = model(TWO, **arrays)
    same = recover(original, cut(original), rows((10, 6)), worker=InProcess())
    assert same.solved == ()
    reduced = cut(original, {"h": "1:0,1,2"}, w1=arrays["w1"][:3], b1=arrays["b1"][:3], w2=arrays["w2"][:, :3])
    solved = recover(original, reduced, rows((10, 6)), worker=InProcess()).solved
    assert [s.weight for s in solved] == ["w2"]
    assert np.array_equal(surgery.constant(reduced.graph.initializers["w1"]), arrays["w1"][:3].astype(np.float32))


def test_only_biases_take_a_mean_error_away():
    rng = np.random.default_rng(2)
    w1, b1, w2, b2 = rng.normal(size=(8, 6)), 5 + rng.normal(size=8), rng.normal(size=(3, 8)), rng.normal(size=3)
    original = model(TWO, w1=w1, b1=b1, w2=w2, b2=b2)
    reduced = cut(original, {"h": "1:0,1,2,3,4"}, w1=w1[:5], b1=b1[:5], w2=w2[:, :5])
    feeds = rows((40, 6))
    recover(original, reduced, feeds, worker=InProcess(), biases_only=True)
    assert np.array_equal(surgery.constant(reduced.graph.initializers["w2"]), w2[:, :5].astype(np.float32))
    difference = np.concatenate(outputs(original, feeds)) - np.concatenate(outputs(reduced, feeds))
    assert np.allclose(difference.mean(axis=0), 0, atol=1e-4)


def test_a_layer_without_a_bias_gets_one_and_a_shared_one_its_own():
    text = """g (float[n, 6] x) => (float[n, 4] y, float[n, 4] z) {
      h = Gemm<transB = 1>(x, w1, b1)
      y = Gemm<transB = 1>(h, w2)
      z = Gemm<transB = 1>(h, w3, b1)
    }"""
    rng = np.random.default_rng(3)
    arrays = {"w1": rng.normal(size=(4, 6)), "b1": 3 + rng.normal(size=4)}
    arrays |= {"w2": rng.normal(size=(4, 4)), "w3": rng.normal(size=(4, 4))}
    original = model(text, **arrays)
    reduced = cut(original, w2=arrays["w2"] * 0, w3=arrays["w3"] * 0)
    recover(original, reduced, rows((40, 6)), worker=InProcess())
    assert error(original, reduced, rows((50, 6), seed=9)) < 1e-6
    assert np.array_equal(surgery.constant(reduced.graph.initializers["b1"]), arrays["b1"].astype(np.float32))


def test_gemm_with_factors_and_matmul_with_its_sum():
    text = """g (float[n, 6] x) => (float[n, 4] y) {
      h = Gemm<alpha = 0.5, beta = 2.0>(x, w1, b1)
      m = MatMul(h, w2)
      y = Add(b2, m)
    }"""
    rng = np.random.default_rng(4)
    arrays = {"w1": rng.normal(size=(6, 8)), "b1": rng.normal(size=8), "w2": rng.normal(size=(8, 4)), "b2": np.ones(4)}
    original = model(text, **arrays)
    reduced = cut(original, w1=arrays["w1"] * 0.1, b1=arrays["b1"] * 0, b2=np.zeros(4))
    got = recover(original, reduced, rows((40, 6)), worker=InProcess())
    assert [s.target for s in got.solved] == ["h", "y"]
    assert error(original, reduced, rows((50, 6), seed=9)) < 1e-8


CONVOLUTIONS = """g (float[n, 4, 9, 9] x) => (float[n, 3, 4, 4] y) {
  c = Conv<kernel_shape = [1, 1]>(x, w0, b0)
  d = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2], group = 4>(c, w1, b1)
  y = Conv<kernel_shape = [2, 2], dilations = [1, 1]>(d, w2, b2)
}"""


@pytest.mark.parametrize("changed", ["w1", "w2"])
def test_depthwise_strided_and_dense_convolutions_find_their_weights_again(changed):
    rng = np.random.default_rng(5)
    shapes = {"w0": (4, 4, 1, 1), "b0": (4,), "w1": (4, 1, 3, 3), "b1": (4,), "w2": (3, 4, 2, 2), "b2": (3,)}
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    original = model(CONVOLUTIONS, **arrays)
    reduced = cut(original, **{changed: arrays[changed] + rng.normal(size=shapes[changed])})
    feeds = rows((20, 4, 9, 9))
    recover(original, reduced, feeds, worker=InProcess())
    found = surgery.constant(reduced.graph.initializers[changed])
    assert np.allclose(found, arrays[changed], atol=1e-3)


@pytest.mark.parametrize(
    ("op", "x", "w"),
    [
        ("Conv<kernel_shape = [3], group = 2>", (10, 4, 12), (6, 2, 3)),
        ("Conv<kernel_shape = [2, 2, 2]>", (10, 3, 4, 5, 6), (2, 3, 2, 2, 2)),
        ("Conv<auto_pad = \"SAME_UPPER\", kernel_shape = [3], strides = [2]>", (10, 3, 11), (5, 3, 3)),
        ("ConvTranspose<kernel_shape = [3, 3], strides = [2, 2]>", (10, 3, 5, 5), (3, 2, 3, 3)),
        ("ConvTranspose<kernel_shape = [2], group = 2, output_padding = [1], strides = [3]>", (10, 4, 6), (4, 3, 2)),
    ],
)  # fmt: skip
def test_convolutions_of_any_kind_find_their_weights_again(op, x, w):
    rank = ", ".join(["n", *map(str, x[1:])])
    text = f"g (float[{rank}] x) => (float[{', '.join('nabcd'[: len(x)])}] y) {{ y = {op}(x, w) }}"
    rng = np.random.default_rng(6)
    original = model(text, w=rng.normal(size=w))
    reduced = cut(original, w=rng.normal(size=w))
    recover(original, reduced, rows(x), worker=InProcess())
    assert error(original, reduced, rows(x, seed=9)) < 1e-6


def test_a_residual_branch_takes_over_the_error_of_the_other_operand():
    text = """g (float[n, 6] x) => (float[n, 6] y) {
      s = Gemm<transB = 1>(x, w0)
      h = Relu(x)
      m = MatMul(x, w1)
      p = Add(m, b1)
      y = Add(s, p)
    }"""
    rng = np.random.default_rng(7)
    arrays = {"w0": rng.normal(size=(6, 6)), "w1": rng.normal(size=(6, 6)), "b1": rng.normal(size=6)}
    original = model(text, **arrays)
    # Half of the shortcut is lost in a node that has no weights to solve.
    reduced = cut(original)
    faded(reduced, "s", np.float32(0.5))
    got = recover(original, reduced, rows((40, 6)), worker=InProcess())
    assert [s.target for s in got.solved] == ["y"]
    assert error(original, reduced, rows((50, 6), seed=9)) < 1e-8
    want = arrays["w1"] + 0.5 * arrays["w0"].T
    assert np.allclose(surgery.constant(reduced.graph.initializers["w1"]), want, atol=1e-3)


def test_solving_in_order_beats_solving_every_layer_for_itself():
    text = """g (float[n, 12] x) => (float[n, 4] y) {
      a = Gemm<transB = 1>(x, w1, b1)
      r = Relu(a)
      b = Gemm<transB = 1>(r, w2, b2)
      s = Relu(b)
      y = Gemm<transB = 1>(s, w3, b3)
    }"""
    rng = np.random.default_rng(8)
    arrays = {"w1": rng.normal(size=(24, 12)), "w2": rng.normal(size=(24, 24)) / 5, "w3": rng.normal(size=(4, 24))}
    arrays |= {"b1": rng.normal(size=24), "b2": rng.normal(size=24), "b3": rng.normal(size=4)}
    original, feeds, fresh = model(text, **arrays), rows((60, 12), 10), rows((200, 12), seed=9)
    alone = cut(original, w3=arrays["w3"] * 0.5)
    recover(original, alone, feeds, worker=InProcess())
    one_shot, whole = (faded(cut(original, w3=arrays["w3"] * 0.5), "s", rng.uniform(0.3, 1, 24)) for _ in range(2))
    for name in ("w3", "b3"):  # solved on the inputs that the layer has in the original
        found = surgery.constant(alone.graph.initializers[name])
        surgery.set_initializer(one_shot.graph.initializers[name], found)
    recover(original, whole, feeds, worker=InProcess())
    assert error(original, one_shot, fresh) > 0.01
    assert error(original, whole, fresh) < 1e-8


def test_few_bytes_take_fewer_samples_and_say_so():
    rng = np.random.default_rng(9)
    w1, b1, w2, b2 = rng.normal(size=(8, 6)), rng.normal(size=8), rng.normal(size=(3, 8)), rng.normal(size=3)
    original = model(TWO, w1=w1, b1=b1, w2=w2, b2=b2)
    reduced = cut(original, {"h": "1:0,1,2,3"}, w1=w1[:4], b1=b1[:4], w2=w2[:, :4])
    got = recover(original, reduced, rows((16, 6), 64), worker=InProcess(), max_bytes=16 * 6 * 4 * 12)
    assert "of 1024 samples" in got.notes[0].text


def test_the_same_seed_gives_the_same_weights():
    rng = np.random.default_rng(10)
    shapes = {"w0": (4, 4, 1, 1), "b0": (4,), "w1": (4, 1, 3, 3), "b1": (4,), "w2": (3, 4, 2, 2), "b2": (3,)}
    original = model(CONVOLUTIONS, **{name: rng.normal(size=shape) for name, shape in shapes.items()})

    def once():
        reduced = cut(original, w1=np.zeros((4, 1, 3, 3)))
        return io.to_bytes(recover(original, reduced, rows((3, 4, 9, 9), 50), worker=InProcess(), seed=3).model)

    assert once() == once()


def test_no_data_is_an_error():
    rng = np.random.default_rng(11)
    original = model("g (float[n, 6] x) => (float[n, 3] y) { y = MatMul(x, w) }", w=rng.normal(size=(6, 3)))
    reduced = cut(original, w=np.zeros((6, 3)))
    with pytest.raises(DataError, match="the dataset is empty"):
        recover(original, reduced, [], worker=InProcess())


def test_through_a_child_process(tmp_path: Path):
    rng = np.random.default_rng(12)
    w1, b1, w2, b2 = rng.normal(size=(8, 6)), rng.normal(size=8), rng.normal(size=(3, 8)), rng.normal(size=3)
    original = model(TWO, w1=w1, b1=b1, w2=w2, b2=b2)
    reduced = cut(original, w2=w2 * 0.5)
    said = []
    recover(original, reduced, rows((40, 6)), progress=lambda done, total: said.append((done, total)))
    assert said[-1] == (1, 1)
    assert error(original, reduced, rows((50, 6), seed=9)) < 1e-8
