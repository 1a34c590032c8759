"""What crosses a cut and what does not: late inputs, early outputs, shapes, masks, quantizers, bodies, side files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from featherweight.edge import cuts, listing, mincut, split
from featherweight.edge.listing import compare_halves, list_cuts
from featherweight.errors import ModelError, OutputError
from featherweight.graph import encode, io, surgery
from featherweight.runtime import ort

RNG = np.random.default_rng(0)
FLOAT = TensorProto.FLOAT


def weight(name: str, *shape: int) -> onnx.TensorProto:
    return numpy_helper.from_array(RNG.normal(size=shape).astype(np.float32), name)


def info(name: str, *shape: int | str, dtype: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, list(shape))


def saved(
    path: Path, nodes: list[onnx.NodeProto], inputs: list[Any], outputs: list[Any], stored: list[onnx.TensorProto]
) -> Path:
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save(model, path)
    return path


def node(op: str, inputs: list[str], outputs: list[str], **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs, outputs, outputs[0] + "/" + op, **attributes)


def graph_of(path: Path, **shapes: tuple[int, ...]) -> cuts.CutGraph:
    return cuts.cut_graph(cuts.prepare(io.load(path)), input_shapes=shapes)


def check_every_cut(path: Path, feeds: dict[str, Any], folder: Path) -> list[split.Split]:
    """Write and run each cut; returns what was written."""
    whole = ort.session(path).run(feeds)
    made = []
    graph = graph_of(path, **{k: v.shape for k, v in feeds.items()})
    for k, head in enumerate(graph.downsets()):
        found = split.split(path, mincut.wire_of(graph, head), folder / str(k))
        front, back = ort.session(found.head), ort.session(found.tail)
        first = front.run({i.name: feeds[i.name] for i in front.inputs})
        sent = {t.name: first[t.name] if t.source == "head" else feeds[t.name] for t in found.wire}
        second = back.run(sent)
        for name, side in found.outputs.items():
            np.testing.assert_allclose((first if side == "head" else second)[name], whole[name], rtol=1e-5, atol=1e-5)
        made.append(found)
    return made


def test_skips_late_inputs_and_early_outputs(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx",
        [
            node("MatMul", ["x", "w0"], ["a"]),
            node("Relu", ["a"], ["early"]),
            node("MatMul", ["a", "w1"], ["b"]),
            node("Add", ["b", "late"], ["c"]),
            node("Add", ["c", "a"], ["y"]),
        ],
        [info("x", "batch", 8), info("late", "batch", 8)],
        [info("early", "batch", 8), info("y", "batch", 8)],
        [weight("w0", 8, 8), weight("w1", 8, 8)],
    )
    feeds = {n: RNG.normal(size=(3, 8)).astype(np.float32) for n in ("x", "late")}
    check_every_cut(path, feeds, tmp_path)
    made = split.split(path, "b", tmp_path / "at_b")
    assert made.parts[0].inputs == ("x",)
    assert made.parts[1].inputs == ("late", "a", "b")
    assert [(t.name, t.source) for t in made.wire] == [("late", "input"), ("a", "head"), ("b", "head")]
    # The Relu does not lead to b, so it stays behind; asked for too, its result is an output and no wire tensor.
    assert made.outputs == {"early": "tail", "y": "tail"}
    made = split.split(path, ["b", "early"], tmp_path / "both")
    assert made.outputs == {"early": "head", "y": "tail"}
    assert "early" not in {t.name for t in made.wire}
    assert ort.session(made.tail).inputs[0].shape == ("batch", 8)
    assert {t.size_bytes for t in made.wire} == {32}


def test_a_weight_of_both_halves_is_in_both(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx",
        [
            node("Identity", ["w"], ["copy"]),
            node("MatMul", ["x", "w"], ["a"]),
            node("MatMul", ["a", "copy"], ["y"]),
        ],
        [info("x", 2, 8)],
        [info("y", 2, 8)],
        [weight("w", 8, 8)],
    )
    (made,) = check_every_cut(path, {"x": RNG.normal(size=(2, 8)).astype(np.float32)}, tmp_path)
    assert [t.name for t in made.wire] == ["a"]
    assert made.parts[0].weight_bytes == made.parts[1].weight_bytes == 256


def test_masks_and_shapes_are_computed_again_where_that_sends_less(tmp_path: Path) -> None:
    one = numpy_helper.from_array(np.array(1.0, np.float32), "one")
    big = numpy_helper.from_array(np.array(-1e4, np.float32), "big")
    axes = numpy_helper.from_array(np.array([1], np.int64), "axes")
    path = saved(
        tmp_path / "m.onnx",
        [
            node("Cast", ["mask"], ["m0"], to=FLOAT),
            node("Sub", ["one", "m0"], ["m1"]),
            node("Mul", ["m1", "big"], ["m2"]),
            node("Unsqueeze", ["m2", "axes"], ["m3"]),
            node("Shape", ["x"], ["s"]),
            node("Expand", ["m3", "s"], ["m4"]),
            node("Softmax", ["x"], ["a"], axis=-1),
            node("Add", ["a", "m4"], ["b"]),
            node("Softmax", ["b"], ["c"], axis=-1),
            node("Add", ["c", "m4"], ["y"]),
        ],
        [info("x", 1, 16, 16), info("mask", 1, 16, dtype=TensorProto.INT64)],
        [info("y", 1, 16, 16)],
        [one, big, axes],
    )
    feeds = {"x": RNG.normal(size=(1, 16, 16)).astype(np.float32), "mask": np.ones((1, 16), np.int64)}
    check_every_cut(path, feeds, tmp_path)
    made = split.split(path, "c", tmp_path / "at_c")
    # c (1 kB), the shape (24 B), and of the mask its 16 floats, never the expanded kilobyte.
    assert sum(t.size_bytes for t in made.wire) == 1024 + 24 + 64
    assert "m4" not in {t.name for t in made.wire}
    assert any("Expand" in name for name in made.rerun)


def test_a_quantizer_stays_with_what_it_quantizes(tmp_path: Path) -> None:
    scale = numpy_helper.from_array(np.array(0.05, np.float32), "scale")
    zero = numpy_helper.from_array(np.array(128, np.uint8), "zero")
    path = saved(
        tmp_path / "m.onnx",
        [
            node("QuantizeLinear", ["x", "scale", "zero"], ["xq"]),
            node("DequantizeLinear", ["xq", "scale", "zero"], ["xd"]),
            node("Conv", ["xd", "w"], ["a"], pads=[1, 1, 1, 1]),
            node("Relu", ["a"], ["r"]),
            node("QuantizeLinear", ["r", "scale", "zero"], ["q"]),
            node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
            node("Conv", ["d", "w2"], ["b"], pads=[1, 1, 1, 1]),
            node("Add", ["b", "d"], ["y"]),
        ],
        [info("x", 1, 4, 8, 8)],
        [info("y", 1, 4, 8, 8)],
        [scale, zero, weight("w", 4, 4, 3, 3), weight("w2", 4, 4, 3, 3)],
    )
    graph = graph_of(path)
    assert [b.op_types for b in graph.blocks if len(b.nodes) > 1] == [("Conv", "Relu", "QuantizeLinear")]
    feeds = {"x": RNG.normal(size=(1, 4, 8, 8)).astype(np.float32)}
    for made in check_every_cut(path, feeds, tmp_path):
        # Codes cross, not floats: the DequantizeLinear is cheap and runs where it is read.
        assert {t.dtype for t in made.wire if t.name in ("q", "d", "r", "a")} <= {"uint8"}


def test_an_encoded_weight_and_a_looked_up_table_stay_whole(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx",
        [
            node("Gather", ["table", "ids"], ["rows"]),
            node("MatMul", ["rows", "w"], ["a"]),
            node("Relu", ["a"], ["b"]),
            node("MatMul", ["b", "w2"], ["y"]),
        ],
        [info("ids", 1, 5, dtype=TensorProto.INT64)],
        [info("y", 1, 5, 16)],
        [weight("table", 64, 16), weight("w", 16, 16), weight("w2", 16, 16)],
    )
    model = io.load(path)
    table = encode.linear(RNG.integers(-7, 8, size=(64, 16)).astype(np.int8), 0.1, 4)
    encode.attach_lookup(model, model.graph.initializers["table"], table)
    square = encode.linear(RNG.integers(-3, 4, size=(16, 16)).astype(np.int8), 0.1, 3)
    encode.attach(model, model.graph.initializers["w2"], square)
    io.save(model, tmp_path / "coded.onnx")
    graph = graph_of(tmp_path / "coded.onnx")
    # The many nodes of the decoder are one block; those that decode a stored weight depend on no input and are none.
    assert len(graph.proper) == 4
    feeds = {"ids": np.array([[1, 2, 3, 60, 5]])}
    for made in check_every_cut(tmp_path / "coded.onnx", feeds, tmp_path):
        assert len(made.wire) == 1


def test_what_a_body_captures_crosses_too(tmp_path: Path) -> None:
    body = [
        helper.make_graph([node(op, ["a", "b"], [f"{op}_out"])], op, [], [info(f"{op}_out", 2, 4)])
        for op in ("Add", "Sub")
    ]
    path = saved(
        tmp_path / "m.onnx",
        [
            node("Relu", ["x"], ["a"]),
            node("Sin", ["x"], ["b"]),
            node("ReduceSum", ["a"], ["total"], keepdims=0),
            node("Greater", ["total", "limit"], ["is_large"]),
            node("If", ["is_large"], ["c"], then_branch=body[0], else_branch=body[1]),
            node("Tanh", ["c"], ["y"]),
        ],
        [info("x", 2, 4)],
        [info("y", 2, 4)],
        [numpy_helper.from_array(np.array(1.0, np.float32), "limit")],
    )
    feeds = {"x": RNG.normal(size=(2, 4)).astype(np.float32)}
    made = check_every_cut(path, feeds, tmp_path)
    assert any({"a", "b", "is_large"} <= {t.name for t in m.wire} for m in made)


def test_a_sequence_is_never_on_the_wire(tmp_path: Path) -> None:
    path = saved(
        tmp_path / "m.onnx",
        [
            node("Relu", ["x"], ["a"]),
            node("SequenceConstruct", ["a", "x"], ["list"]),
            node("ConcatFromSequence", ["list"], ["b"], axis=0),
            node("Neg", ["b"], ["y"]),
        ],
        [info("x", 2, 4)],
        [info("y", 4, 4)],
        [],
    )
    made = check_every_cut(path, {"x": RNG.normal(size=(2, 4)).astype(np.float32)}, tmp_path)
    assert len(made) == 2
    with pytest.raises(ModelError, match="'list' is none"):
        split.split(path, "list", tmp_path / "no")


def chain(folder: Path) -> Path:
    return saved(
        folder / "chain.onnx",
        [node("MatMul", ["x", "w0"], ["a"]), node("Relu", ["a"], ["b"]), node("MatMul", ["b", "w1"], ["y"])],
        [info("x", "n", 64)],
        [info("y", "n", 64)],
        [weight("w0", 64, 16), weight("w1", 16, 64)],
    )


def test_weights_in_a_side_file_stay_outside(tmp_path: Path) -> None:
    model = io.load(chain(tmp_path))
    (tmp_path / "big").mkdir()
    io.save(model, tmp_path / "big" / "m.onnx", external=True)
    made = split.split(tmp_path / "big" / "m.onnx", "b", tmp_path / "out")
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert {"head.onnx", "head.onnx.data", "tail.onnx", "tail.onnx.data", "split.json"} == names
    assert compare_halves(tmp_path / "big" / "m.onnx", made).equal


def test_the_description_says_what_was_written(tmp_path: Path) -> None:
    path = chain(tmp_path)
    made = split.split(path, 2, tmp_path / "out", input_shapes={"x": (5, 64)})
    raw = json.loads((tmp_path / "out" / "split.json").read_text())
    assert (raw["schema"], raw["kind"]) == (1, "split")
    assert raw["model"]["sha256"] == io.sha256(path)
    assert raw["head"]["sha256"] == io.sha256(made.head)
    assert raw["tail"]["macs"] == 5 * 16 * 64
    assert raw["wire"] == [
        {"name": "b", "dtype": "float32", "shape": ["n", 16], "size_bytes": 320, "int8_bytes": 88, "source": "head"}
    ]
    assert raw["outputs"] == {"y": "tail"}
    again = split.split(path, 2, tmp_path / "again", input_shapes={"x": (5, 64)})
    assert again.head.read_bytes() == made.head.read_bytes()


def test_the_given_model_is_not_changed_and_names_stay(tmp_path: Path) -> None:
    path = chain(tmp_path)
    before = path.read_bytes()
    made = split.split(path, "a", tmp_path / "out")
    assert path.read_bytes() == before
    whole = {n.name for n in io.load(path).graph}
    halves = [surgery.names(io.load(p)) for p in (made.head, made.tail)]
    assert whole <= halves[0] | halves[1]


@pytest.mark.parametrize(
    ("cut", "law"),
    [
        (0, "from 1 to 2"),
        (3, "from 1 to 2"),
        (-1, "from 1 to 2"),
        ("nowhere", "'nowhere' is none"),
        ("x", "none for the head"),
        ("y", "none for the tail"),
        ([], "'no name' is none"),
    ],
)
def test_a_cut_that_does_not_exist_is_refused(cut: Any, law: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=law):
        split.split(chain(tmp_path), cut, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_auto_is_the_smallest_wire_or_says_that_none_pays(tmp_path: Path) -> None:
    made = split.split(chain(tmp_path), "auto", tmp_path / "out")
    assert made.wire_bytes == 64
    wide = saved(
        tmp_path / "wide.onnx",
        [node("MatMul", ["x", "w0"], ["a"]), node("MatMul", ["a", "w1"], ["y"])],
        [info("x", 1, 4)], [info("y", 1, 4)], [weight("w0", 4, 32), weight("w1", 32, 4)],
    )  # fmt: skip
    with pytest.raises(ModelError, match="fewer bytes than the inputs' 16 B, but the smallest is 128 B"):
        split.split(wide, "auto", tmp_path / "wide")


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    with pytest.raises(OutputError, match="is a file"):
        split.split(chain(tmp_path), 1, tmp_path / "out")
    assert (tmp_path / "out").read_text() == "mine"


def test_a_head_must_hold_what_it_depends_on(tmp_path: Path) -> None:
    graph = graph_of(chain(tmp_path))
    with pytest.raises(ModelError, match="but it has 'b/Relu' without 'a/MatMul'"):
        graph.check(frozenset({1}))


def test_the_list_of_cuts_counts_each_side(tmp_path: Path) -> None:
    found = list_cuts(chain(tmp_path), input_shapes={"x": (2, 64)})
    assert [(c.number, c.wire, c.wire_bytes, c.int8_bytes) for c in found.cuts] == [
        (1, ("a",), 128, 40),
        (2, ("b",), 128, 40),
    ]
    assert [(c.head_macs, c.tail_macs) for c in found.cuts] == [(2048, 2048), (2048, 2048)]
    assert found.input_bytes == 512


def test_types_the_inference_does_not_know_are_asked_of_the_runtime(tmp_path: Path) -> None:
    fused = helper.make_node("FusedMatMul", ["x", "w"], ["a"], "fused", domain="com.microsoft", alpha=2.0)
    graph = helper.make_graph(
        [fused, node("Relu", ["a"], ["y"])], "g", [info("x", 2, 4)], [info("y", 2, 4)], [weight("w", 4, 4)]
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=10), path)
    (made,) = check_every_cut(path, {"x": RNG.normal(size=(2, 4)).astype(np.float32)}, tmp_path)
    assert [(t.name, t.dtype) for t in made.wire] == [("a", "float32")]


def test_a_half_that_computes_something_else_is_found(tmp_path: Path) -> None:
    path = chain(tmp_path)
    made = split.split(path, "b", tmp_path / "out")
    tail = io.load(made.tail)
    value = tail.graph.initializers["w1"]
    surgery.set_initializer(value, surgery.constant(value) * np.float32(1.01))
    io.save(tail, made.tail)
    with pytest.raises(ModelError, match="must equal the whole, but differ by"):
        compare_halves(path, made)


def test_halves_that_round_differently_are_compared_without_fusions(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {True: (1, 0.5, 0.02, False), False: (1, 0.0, 0.0, True)}
    monkeypatch.setattr(listing, "_difference", lambda *_, optimize: found[optimize])
    check = listing.Check(*listing._compared("whole", "head", "tail", [], {}, {}))
    assert (check.equal, check.relative, check.as_written) == (True, 0.02, 0.0)
    found[False] = (1, 0.5, 0.02, False)
    assert not listing.Check(*listing._compared("whole", "head", "tail", [], {}, {})).equal


def test_a_hundred_thousand_cuts_are_enough(tmp_path: Path) -> None:
    names = [f"t{i}" for i in range(20)]
    path = saved(
        tmp_path / "m.onnx",
        [*(node("Sin", ["x"], [n]) for n in names), node("Sum", names, ["y"])],
        [info("x", 2)], [info("y", 2)], [],
    )  # fmt: skip
    with pytest.raises(ModelError, match="at most 1000 cuts"):
        list(graph_of(path).downsets(1000))
    assert isinstance(io.load(path), ir.Model)
