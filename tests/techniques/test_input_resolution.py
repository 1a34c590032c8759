"""input_resolution holds the contract of all techniques, and its own promises."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherweight.core import Action, Profile, Silent
from featherweight.errors import TechniqueError
from featherweight.graph import cost, io, repair, surgery
from featherweight.runtime import ort
from featherweight.search.options import structure_options
from featherweight.techniques import Context, get
from featherweight.testing.contract import TechniqueContract

PROFILE = Profile("p", "x86_64", 1, 1 << 30, False)
SMALLER = get("input_resolution")
POOLED = "[pool] p = GlobalAveragePool(h) [flat] f = Flatten(p) [fc] y = Gemm<transB = 1>(f, wc)"


class TestInputResolution(TechniqueContract):
    technique = "input_resolution"


def network(
    declared: str = "float[N, 3, 32, 32] x", entry: str = "x", before: str = "", head: str = POOLED,
    output: str = "float[N, 5] y", classes: int = 4, middle: str = "",
) -> ir.Model:  # fmt: skip
    """Two convolutions of stride 2 and a head: maps of 32, 16 and 8 places a side."""
    model = ir.from_proto(
        onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({declared}) => ({output}) {{
          {before}
          [c1] a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>({entry}, w1)
          {middle}
          [r1] b = Relu({"a2" if middle else "a"})
          [c2] h = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]>(b, w2)
          {head}
        }}""")
    )
    rng = np.random.default_rng(0)
    shapes = {"w1": (6, 3, 3, 3), "w2": (4, 6, 3, 3), "wc": (5, classes), "mean": (1, 3, 1, 1), "map": (1, 4, 8, 8)} | {
        "wg": (6, 6, 1, 1)
    }
    found = {v.name: v for n in model.graph for v in n.inputs if v is not None and v.name in shapes}
    for value in found.values():
        array = rng.normal(size=shapes[value.name]).astype(np.float32)
        value.const_value = ir.Tensor(array, name=value.name)
        value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(array.shape)
        model.graph.register_initializer(value)
    constants = {"split": (0, 2, 3, 16, 16), "join": (0, 6, 16, 16), "chan": (1,), "five": (5,)}
    for name, sizes in constants.items():
        for value in {v for n in model.graph for v in n.inputs if v is not None and v.name == name}:
            value.const_value = ir.Tensor(np.array(sizes, np.int64), name=name)
            value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape((len(sizes),))
            model.graph.register_initializer(value)
    return model


def context(**shapes: tuple[int, ...]) -> Context:
    return Context(PROFILE, input_shapes=shapes)


def offered(model: ir.Model, ctx: Context) -> list[tuple[int, int]]:
    (site,) = SMALLER.sites(model)
    return [(a.get("rows"), a.get("columns")) for a in SMALLER.options(model, site, ctx)]


def smaller(model: ir.Model, rows: int, columns: int, ctx: Context | None = None) -> ir.Model:
    copy = surgery.copy_model(model)
    (site,) = SMALLER.sites(copy)
    SMALLER.apply(copy, site, Action.of("input_resolution", rows=rows, columns=columns), ctx or context())
    return copy


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return next(iter(ort.session(io.to_bytes(model)).run({"x": x}).values()))


def bilinear(x: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Half-pixel centres, two neighbours, edges repeated."""
    n = x.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * n / size - 0.5, 0, n - 1)
    low = np.floor(at).astype(int)
    high, part = np.minimum(low + 1, n - 1), (at - low).astype(np.float32)
    part = part.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
    return np.take(x, low, axis) * (1 - part) + np.take(x, high, axis) * part


def test_options_are_multiples_of_the_total_stride_down_to_two_fifths():
    assert offered(network(), context()) == [(28, 28), (24, 24), (20, 20), (16, 16)]


def test_of_many_options_six_are_offered_from_large_to_small():
    found = offered(network("float[N, 3, 64, 64] x"), context())
    assert (len(found), found[0], found[-1]) == (6, (60, 60), (28, 28))
    assert found == sorted(found, reverse=True)
    assert all(rows % 4 == 0 for rows, _ in found)


def test_rows_and_columns_shrink_alike():
    assert offered(network("float[N, 3, 16, 32] x"), context()) == [(12, 24), (8, 16)]


def test_the_network_sees_the_image_bilinearly_smaller():
    x = np.random.default_rng(1).normal(size=(3, 3, 32, 32)).astype(np.float32)
    direct = run(network("float[N, 3, 24, 24] x"), bilinear(bilinear(x, 24, 2), 24, 3))
    assert run(smaller(network(), 24, 24), x) == pytest.approx(direct, abs=1e-5)


def test_work_is_that_of_the_smaller_maps():
    model = network()
    (site,) = SMALLER.sites(model)
    found = SMALLER.estimate(model, site, Action.of("input_resolution", rows=24, columns=24), context(x=(1, 3, 32, 32)))
    first, second = 27 * 6, 54 * 4  # a place of each convolution
    whole = first * 16**2 + second * 8**2
    assert found.work == pytest.approx((first * 12**2 + second * 6**2) / whole)
    assert found.noise == pytest.approx(1 - found.work)
    # The input lives throughout. The most is held at the second convolution before, and now at the first.
    pixels, first, second = 4 * 3, 4 * 6, 4 * 4
    before = pixels * 32**2 + first * 16**2 + second * 8**2
    after = pixels * (32**2 + 24**2) + first * 12**2
    assert found.activation_bytes == after - before


def test_work_behind_a_shuffle_of_channels_counts_and_behind_the_pooling_does_not():
    shuffle = (
        "[split] s = Reshape(a, split) [swap] t = Transpose<perm = [0, 2, 1, 3, 4]>(s) [join] a2 = Reshape(t, join)"
    )
    model = network(middle=shuffle)
    (site,) = SMALLER.sites(model)
    assert {"c1", "split", "join", "c2", "pool"} <= set(site.nodes)
    assert not {"flat", "fc"} & set(site.nodes)


@given(st.integers(8, 700), st.data())
def test_open_sizes_come_out_exactly_as_asked(rows, data):
    """A ratio is stored in float32 and its product rounded down: it must not end one pixel short."""
    to = data.draw(st.integers(1, rows))
    model = network("float[N, 3, R, C] x", head="", output="float[N, 4, r, c] h")
    found = smaller(model, to, to, context(x=(1, 3, rows, rows)))
    resize = next(n for n in found.graph if n.op_type == "Resize")
    ratio = surgery.constant(resize.inputs[2])
    assert [int(np.floor(np.float32(rows) * r)) for r in ratio] == [to, to]
    assert [int(np.floor(rows * float(r))) for r in ratio] == [to, to]  # as distillation multiplies


def test_open_sizes_follow_other_inputs_in_the_same_ratio():
    made = smaller(network("float[N, 3, R, C] x"), 24, 24, context(x=(1, 3, 32, 32)))
    x = np.random.default_rng(1).normal(size=(2, 3, 64, 64)).astype(np.float32)
    direct = run(network("float[N, 3, 48, 48] x"), bilinear(bilinear(x, 48, 2), 48, 3))
    assert run(made, x) == pytest.approx(direct, abs=1e-3)


def test_pixels_are_taken_behind_what_prepares_them():
    model = network("float[N, 32, 32, 3] x", "n", "[t] c = Transpose<perm = [0, 3, 1, 2]>(x) [s] n = Sub(c, mean)")
    (site,) = SMALLER.sites(model)
    assert site.name == "resolution of n"
    made = smaller(model, 24, 24, context(x=(1, 32, 32, 3)))
    kinds = [n.op_type for n in made.graph]
    assert kinds[:4] == ["Transpose", "Sub", "Resize", "Conv"]
    assert run(made, np.ones((2, 32, 32, 3), np.float32)).shape == (2, 5)


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ({"head": "", "output": "float[N, 4, 8, 8] h"}, "the output 'h' changes its shape with it"),
        (
            {"head": "[flat] f = Flatten(h) [fc] y = Gemm<transB = 1>(f, wc)", "classes": 256},
            "fc counts on a fixed number of places",
        ),
        ({"head": POOLED.replace("(h)", "(k)").replace("[pool]", "[pos] k = Add(h, map) [pool]")}, "not known"),
        ({"declared": "float[N, 3, R, C] x"}, "rows and columns of the input are not known"),
        ({"head": "m = ReduceMax(h, chan) y = Sigmoid(m)", "output": "float[N, 1, 8, 8] y"}, "the output 'y' changes"),
        (
            {"head": "[flat] f = Flatten(h) t, i = TopK(f, five) y = Identity(t)", "output": "float[N, 5] y"},
            "TopK behind it speaks of places",
        ),
    ],
)
@pytest.mark.parametrize("shapes_stored", [False, True])
def test_a_network_that_counts_its_places_keeps_them(parts, why, shapes_stored):
    model, ctx = network(**parts), context()
    if shapes_stored:
        repair.renew_shapes(model)
    assert offered(model, ctx) == []
    (note,) = ctx.notes
    assert why in note.text


def test_a_single_column_is_not_made_smaller():
    ctx = context()
    assert offered(network("float[N, 3, 32, 1] x"), ctx) == []
    assert ctx.notes[0].text == "no gain: of 32 x 1 places none can go in steps of 1"


@pytest.mark.parametrize("declared", ["float[N, 3] x", "float[N, 3, 32] x"])
def test_what_is_no_image_is_no_site(declared):
    model = ir.from_proto(
        onnx.parser.parse_model(f"""<ir_version: 10, opset_import: ["" : 21]>
        g ({declared}) => (float y) {{ y = ReduceMax<keepdims = 0>(x) }}""")
    )
    assert list(SMALLER.sites(model)) == []


@pytest.mark.parametrize("rows", [0, 33])
def test_other_sizes_are_refused(rows):
    with pytest.raises(TechniqueError, match=f"must become 1..32 rows of 1..32, but got {rows} x 24"):
        smaller(network(), rows, 24)


NORMED = """m = ReduceMean(a, chan) d = Sub(a, m) q = Mul(d, d) v = ReduceMean(q, chan) s = Sqrt(v) a2 = Div(d, s)"""


def test_shapes_behind_a_norm_over_channels_are_not_stale():
    """What reads only the means, and would keep a stored shape of the larger view, is counted at the smaller one."""
    model = network(middle=NORMED)
    repair.renew_shapes(model)
    (site,) = SMALLER.sites(model)
    found = SMALLER.estimate(model, site, Action.of("input_resolution", rows=24, columns=24), context())
    assert found.work == pytest.approx((27 * 6 * 12**2 + 54 * 4 * 6**2) / (27 * 6 * 16**2 + 54 * 4 * 8**2))
    made = smaller(model, 24, 24)
    counted = {n.name: n.macs for n in cost.costs(made).nodes}
    assert counted["c2"] == 54 * 4 * 6**2
    assert run(made, np.random.default_rng(0).normal(size=(1, 3, 32, 32)).astype(np.float32)).shape == (1, 5)


def test_steps_are_the_product_of_strides_whatever_the_border_takes():
    """33 places become 17 and 9: a stride of 4, though 33 / 9 is 3.7; gates of one place do not count."""
    gate = (
        "[g] p0 = GlobalAveragePool(a) [gc] p1 = Conv<strides = [3, 3], kernel_shape = [1, 1]>(p0, wg) a2 = Mul(a, p1)"
    )
    found = offered(network("float[N, 3, 33, 33] x", middle=gate), context())
    assert found == [(29, 28), (25, 24), (21, 20), (17, 16)]


@pytest.mark.parametrize("whole", [True, False])
def test_it_is_estimated_only_where_changes_to_the_whole_model_count(whole):
    model = network()
    found = structure_options(model, [SMALLER], context(), {}, Silent(), whole=whole)
    assert {name: len(options) for name, options in found.groups.items()} == ({"resolution of x": 5} if whole else {})
