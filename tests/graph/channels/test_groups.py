"""Groups, units and reasons of small graphs, worked out by hand."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from featherweight.graph import channels as ch
from featherweight.graph import io, surgery
from featherweight.graph.channels.reshaping import blocks, rectangle
from featherweight.graph.channels.slots import joined
from featherweight.graph.normalise import normalise
from featherweight.runtime import ort

HEAD = '<ir_version: 10, opset_import: ["" : 21]>\n'


def model(text: str, weights: dict[str, tuple[int, ...]], ints: dict[str, list[int]] | None = None) -> ir.Model:
    proto = onnx.parser.parse_model(HEAD + text)
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name))
    for name, values in (ints or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(np.array(values, np.int64), name))
    return normalise(ir.from_proto(proto), run=None).model


def shapes(found: ir.Model) -> dict[str, tuple[int, ...]]:
    return {n: v.const_value.shape.numpy() for n, v in found.graph.initializers.items() if v.const_value is not None}


def removed(group: ch.Group, *units: int) -> np.ndarray:
    return np.concatenate([group.units[u] for u in units])


def test_a_sum_couples_all_that_is_added():
    found = model(
        """g (float[N, 3, 4, 4] x) => (float[N, 2, 4, 4] y) {
          [stem] a = Conv(x, w0)
          [in] b = Conv(a, w1)
          [out] c = Conv(b, w2)
          s = Add(a, c)
          [last] y = Conv(s, w3)
        }""",
        {"w0": (5, 3, 1, 1), "w1": (4, 5, 1, 1), "w2": (5, 4, 1, 1), "w3": (2, 5, 1, 1)},
    )
    channels = ch.analyse(found)
    trunk, inner = channels.groups
    assert (trunk.name, len(trunk.units), trunk.makers) == ("channels of stem", 5, ("stem", "out"))
    assert {r.node for r in trunk.readings} == {"in", "last"}
    assert (inner.name, len(inner.units), inner.makers) == ("channels of in", 4, ("in",))
    ch.cut(channels, [*removed(trunk, 1), *removed(inner, 0, 3)])
    assert {k: v[:2] for k, v in shapes(found).items()} == {"w0": (4, 3), "w1": (2, 4), "w2": (4, 2), "w3": (2, 4)}


def test_offsets_of_a_concat_and_columns_of_its_reader():
    found = model(
        """g (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) {
          [a] p = Conv(x, wa)
          [b] q = Conv(x, wb)
          c = Concat<axis = 1>(p, x, q, p)
          [last] y = Conv(c, w)
        }""",
        {"wa": (3, 2, 1, 1), "wb": (4, 2, 1, 1), "w": (2, 12, 1, 1)},
    )
    a, b = ch.analyse(found).groups
    assert [r.columns[1].tolist() for r in a.readings] == [[1, 10]]
    assert [r.columns[3].tolist() for r in b.readings] == [[8]]


def test_heads_own_blocks_of_all_projections():
    weights = {f"w{n}": (6, 8) for n in "qkv"} | {"wo": (8, 6)}
    found = model(
        """g (float[N, 5, 6] x) => (float[N, 5, 6] y) {
          [q] q0 = MatMul(x, wq)
          [k] k0 = MatMul(x, wk)
          [v] v0 = MatMul(x, wv)
          q1 = Reshape(q0, heads)
          k1 = Reshape(k0, heads)
          v1 = Reshape(v0, heads)
          q2 = Transpose<perm = [0, 2, 1, 3]>(q1)
          k2 = Transpose<perm = [0, 2, 3, 1]>(k1)
          v2 = Transpose<perm = [0, 2, 1, 3]>(v1)
          score = MatMul(q2, k2)
          p = Softmax(score)
          m = MatMul(p, v2)
          t = Transpose<perm = [0, 2, 1, 3]>(m)
          f = Reshape(t, flat)
          [o] y = MatMul(f, wo)
        }""",
        weights,
        {"heads": [0, 0, 4, 2], "flat": [0, 0, 8]},
    )
    channels = ch.analyse(found)
    (heads,) = channels.groups
    assert (len(heads.units), channels.width(heads), heads.makers) == (4, 2, ("q", "k", "v"))
    assert [r.columns[3].tolist() for r in heads.readings] == [[6, 7]]
    ch.cut(channels, removed(heads, 0, 2))
    assert {k: v for k, v in shapes(found).items() if k.startswith("w")} == {
        "wq": (6, 4), "wk": (6, 4), "wv": (6, 4), "wo": (4, 6),
    }  # fmt: skip
    constants = [
        np.asarray(surgery.constant(v)).tolist()
        for v in found.graph.initializers.values()
        if v.dtype == ir.DataType.INT64
    ]
    assert sorted(constants) == [[0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 2, 2], [0, 0, 4]]
    assert ort.session(io.to_bytes(found)).run({"x": np.ones((1, 5, 6), np.float32)})["y"].shape == (1, 5, 6)


def test_groups_of_a_shuffle_may_lose_different_channels():
    found = model(
        """g (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) {
          [c1] a = Conv(x, w1)
          r = Reshape(a, split)
          t = Transpose<perm = [0, 2, 1, 3, 4]>(r)
          s = Reshape(t, join)
          [c2] y = Conv(s, w2)
        }""",
        {"w1": (8, 2, 1, 1), "w2": (2, 8, 1, 1)},
        {"split": [0, 2, 4, 4, 4], "join": [0, 8, 4, 4]},
    )
    channels = ch.analyse(found)
    (group,) = channels.groups
    assert [len(u) for u in group.units] == [2, 2, 2, 2]  # as it lies: channel i of both halves
    assert group.parts is not None
    assert group.parts.shape == (2, 4)
    w1, w2 = (np.asarray(surgery.constant(found.graph.initializers[n])).copy() for n in ("w1", "w2"))
    dropped = [group.parts[0][1], group.parts[1][2]]  # channels 1 and 6
    assert ch.cuttable(channels, [group.parts[0][0]]) == (
        "these channels cannot be removed together: at r what is left is no full rectangle"
    )
    ch.cut(channels, dropped)
    keep = [0, 2, 3, 4, 5, 7]
    np.testing.assert_array_equal(np.asarray(surgery.constant(found.graph.initializers["w1"])), w1[keep])
    # behind the shuffle the channels stood 0 4 1 5 2 6 3 7; now 0 4 2 5 3 7
    columns = [0, 1, 4, 3, 6, 7]
    np.testing.assert_array_equal(np.asarray(surgery.constant(found.graph.initializers["w2"])), w2[:, columns])


REASONS = [
    ("y = Relu(a)", {}, "y: is an output of the model"),
    ("[top] y = LayerNormalization(a, g, h)", {"g": (4,), "h": (4,)}, "top: goes through LayerNormalization, whose"),
    ("[soft] b = Softmax<axis = 1>(a)\n y = MatMul(b, w)", {"w": (4, 4)}, "soft: goes through Softmax, which mixes"),
    ("[ein] y = Einsum<equation = \"nc->nc\">(a)", {}, "ein: goes through Einsum, which cannot be followed"),
    ("[plus] b = Add(a, x4)\n y = MatMul(b, w)", {"w": (4, 4)}, "plus: meets a value whose channels"),
    ("[norm] b = ReduceL2(a)\n c = Div(a, b)\n y = MatMul(c, w)", {"w": (4, 4)}, "a sum over these channels"),
]  # fmt: skip


@pytest.mark.parametrize(("rest", "weights", "reason"), REASONS)
def test_why_channels_stay(rest: str, weights: dict[str, tuple[int, ...]], reason: str) -> None:
    inputs = "float[N, 3] x, float[N, 4] x4"
    found = model(
        f"g ({inputs}) => (float[N, 4] y) {{ [fc] a = MatMul(x, w0)\n unused = Identity(x4)\n {rest} }}",
        {"w0": (3, 4), **weights},
    )
    channels = ch.analyse(found)
    assert not any(g.name == "channels of fc" for g in channels.groups)
    (text,) = [n.text for n in channels.frozen if n.where == "fc"]
    assert text.startswith("its 4 channels stay: ")
    assert reason in text


def test_a_weight_with_another_reader_stays():
    found = model(
        """g (float[N, 3] x, float[N, 4] z) => (float[N, 2] y, float[N, 3] v) {
          [fc] a = Gemm(x, w0)
          w0t = Transpose(w0)
          [up] v = MatMul(z, w0t)
          [last] y = Gemm(a, w1)
        }""",
        {"w0": (3, 4), "w1": (4, 2)},
    )
    channels = ch.analyse(found)
    # x's channels of w0 are outputs of `up`; the 4 others are read by `up` from an input of the model: they may go
    # only if z's could, and inputs are never cut.
    assert not channels.groups


def test_bodies_are_followed_each_for_itself():
    found = model(
        """g (bool c, float[N, 3] x) => (float[N, 2] y) {
          y = If(c) <
            then_branch = t () => (float[N, 2] p) { [t1] h = MatMul(x, w1)  r = Relu(h) [t2] p = MatMul(r, w2) },
            else_branch = e () => (float[N, 2] q) { [e1] q = MatMul(x, w3) }
          >
        }""",
        {"w1": (3, 6), "w2": (6, 2), "w3": (3, 2)},
    )
    channels = ch.analyse(found)
    (group,) = channels.groups
    assert len(group.units) == 6
    x = np.ones((2, 3), np.float32)
    w2 = np.asarray(surgery.constant(found.graph.initializers["w2"])).copy()
    w2[[1, 4]] = 0
    surgery.set_initializer(found.graph.initializers["w2"], w2)
    expected = ort.session(io.to_bytes(found)).run({"c": np.array(True), "x": x})["y"]
    ch.cut(channels, removed(group, 1, 4))
    assert shapes(found)["w1"] == (3, 4)
    got = ort.session(io.to_bytes(found)).run({"c": np.array(True), "x": x})["y"]
    np.testing.assert_allclose(got, expected, atol=1e-6)


def test_the_model_is_untouched_when_a_cut_is_refused():
    found = model(
        """g (float[N, 2, 4, 4] x) => (float[N, 2, 4, 4] y) {
          [c1] a = Conv(x, w1)
          [c2] b = Conv<group = 2>(a, w2)
          [c3] y = Conv(b, w3)
        }""",
        {"w1": (8, 2, 1, 1), "w2": (6, 4, 1, 1), "w3": (2, 6, 1, 1)},
    )
    channels = ch.analyse(found)
    before = io.to_bytes(found)
    slots = channels.following.stored[found.graph.initializers["w1"]][0]
    with pytest.raises(ch.IllegalCutError, match="at c2 groups would be of different width"):
        ch.cut(channels, [channels.classes[slots[0]]])
    assert io.to_bytes(found) == before


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((2, 12), (2, 3, 4), [((0,), (0,)), ((1,), (1, 2))]),
        ((2, 3, 4, 5), (2, 12, 5), [((0,), (0,)), ((1, 2), (1,)), ((3,), (2,))]),
        ((6, 4), (4, 6), [((0, 1), (0, 1))]),
        ((2, 1, 3), (2, 3), [((0,), (0,)), ((1, 2), (1,))]),
        ((4,), (4, 1, 1), [((0,), (0,)), ((), (1,)), ((), (2,))]),
    ],
)
def test_blocks_of_a_reshape(before, after, expected):
    found = blocks(before, after)
    assert found == expected
    assert sorted(a for b in found for a in b[0]) == list(range(len(before)))
    assert sorted(a for b in found for a in b[1]) == list(range(len(after)))
    for left, right in found:
        assert np.prod([before[a] for a in left]) == np.prod([after[a] for a in right])


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (["111", "111"], (2, 3)),
        (["110", "011"], (2, 2)),
        (["101", "000"], (1, 2)),
        (["110", "111"], None),
        (["100", "001", "000"], (2, 1)),
    ],
)
def test_what_is_left_of_a_rectangle(rows, expected):
    assert rectangle(np.array([[c == "1" for c in row] for row in rows])) == expected


def test_joined_finds_components_as_a_search_does():
    rng = np.random.default_rng(0)
    for _ in range(20):
        n = int(rng.integers(1, 60))
        a, b = rng.integers(0, n, (2, int(rng.integers(0, n))))
        seen = list(range(n))
        for _ in range(n):
            for x, y in zip(a, b, strict=True):
                seen[x] = seen[y] = min(seen[x], seen[y])
        assert joined(n, a, b).tolist() == seen


def test_a_computed_size_that_mixes_channels_and_batch_freezes():
    found = model(
        """g (float[N, 3, 4, 4] x) => (float[N, 2, 4, 4] y) {
          [first] a = Conv(x, w0)
          n = Shape<start = 0, end = 1>(x)
          rows = Mul(n, four)
          sizes = Concat<axis = 0>(rows, rest)
          b = Reshape(a, sizes)
          c = Relu(b)
          d = Reshape(c, back)
          y = Conv(d, w1)
        }""",
        {"w0": (4, 3, 1, 1), "w1": (2, 4, 1, 1)},
        {"four": [4], "rest": [16], "back": [-1, 4, 4, 4]},
    )
    channels = ch.analyse(found)
    assert not channels.groups
    assert any("size that also depends on the batch" in note.text for note in channels.frozen)


def test_positions_of_a_pool_freeze():
    found = model(
        """g (float[N, 3, 4, 4] x) => (float[N, 2, 2, 2] y) {
          a = Conv(x, w0)
          p, at = MaxPool<kernel_shape = [2, 2], strides = [2, 2]>(a)
          f = Cast<to = 1>(at)
          s = Add(p, f)
          y = Conv(s, w1)
        }""",
        {"w0": (4, 3, 1, 1), "w1": (2, 4, 1, 1)},
    )
    channels = ch.analyse(found)
    assert not channels.groups
    assert any("MaxPool, whose positions are used" in note.text for note in channels.frozen)


def test_a_table_that_is_looked_up_along_its_width_freezes():
    found = model(
        """g (float[N, 6] x, int64[N] ids) => (float[N, 4] y) {
          e = Gather<axis = 1>(table, ids)
          m = ReduceMean<keepdims = 0>(e)
          a = MatMul(x, table)
          r = Relu(a)
          b = MatMul(r, w)
          y = Add(b, m)
        }""",
        {"table": (6, 10), "w": (10, 4)},
    )
    channels = ch.analyse(found)
    assert not channels.groups
    assert any("'table' is also read by" in note.text for note in channels.frozen)


@pytest.mark.parametrize(("op", "sign"), [("ReduceMax", -1.0), ("ReduceMin", 1.0)])
def test_the_largest_of_fewer_channels_still_counts_the_zeros(op: str, sign: float):
    """A channel that is always 0 is the largest of negative ones; without it something must stand for it."""
    found = model(
        f"""g (float[N, 3, 4, 4] x) => (float[N, 1, 4, 4] y) {{
          a = Conv(x, w0, b0)
          y = {op}<keepdims = 1>(a, axes)
        }}""",
        {"w0": (4, 3, 1, 1), "b0": (4,)},
        {"axes": [1]},
    )
    dead = np.array([1, 1, 0, 1], np.float32)
    surgery.set_initializer(found.graph.initializers["w0"], np.zeros((4, 3, 1, 1), np.float32))
    surgery.set_initializer(found.graph.initializers["b0"], sign * dead)
    feed = {"x": np.ones((1, 3, 4, 4), np.float32)}
    before = ort.session(io.to_bytes(found)).run(feed)["y"]
    assert not before.any()
    channels = ch.analyse(found)
    ch.cut(channels, removed(channels.groups[0], 2))
    np.testing.assert_array_equal(ort.session(io.to_bytes(found)).run(feed)["y"], before)


def test_a_constant_that_fixes_an_open_axis_does_not_freeze_what_is_behind_it():
    """Height and width are open in the interface, but a table of positions allows one size."""
    text = """g (float[N, 3, h, w] x) => (float[N, 16, 8] y) {
      p = Conv<kernel_shape = [8, 8], strides = [8, 8]>(x, patch)
      f = Reshape(p, flat)
      t = Transpose<perm = [0, 2, 1]>(f)
      e = Add(t, table)
      q = MatMul(e, wq)
      h1 = Reshape(q, heads)
      h2 = Tanh(h1)
      h3 = Reshape(h2, back)
      y = MatMul(h3, wo)
    }"""
    shapes_of = {"patch": (8, 3, 8, 8), "table": (1, 16, 8), "wq": (8, 8), "wo": (8, 8)}
    ints = {"flat": [0, 8, -1], "heads": [-1, 16, 2, 4], "back": [-1, 16, 8]}
    found = ch.analyse(model(text, shapes_of, ints), {"x": (2, 3, 32, 32)})
    assert "channels of q" in [g.name for g in found.groups]


def test_an_axis_name_has_one_size():
    text = """g (float[N, 6] x, float[1, N, 8] s) => (float[N, 3] y) {
      a = MatMul(x, w)
      l = Squeeze(s, zero)
      b = Add(a, l)
      c = Reshape(b, pairs)
      d = Tanh(c)
      e = Reshape(d, back)
      y = MatMul(e, v)
    }"""
    ints = {"zero": [0], "pairs": [-1, 4, 2], "back": [-1, 8]}
    found = model(text, {"w": (6, 8), "v": (8, 3)}, ints)
    following = ch.analyse(found, {"x": (8, 6), "s": (1, 8, 8)}).following
    value = next(v for node in found.graph for v in node.outputs if v.name == "c")
    assert [following.is_open(value, axis) for axis in range(3)] == [True, False, False]
