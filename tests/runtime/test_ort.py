"""The door to ONNX Runtime: results, silence, and causes in words."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import small_models
from onnx import TensorProto, helper

from featherweight.errors import RunError
from featherweight.runtime import ort

W = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], np.float32)


@pytest.fixture
def linear(tmp_path):
    return small_models.linear(tmp_path / "linear.onnx", W)


def test_outputs_come_by_name(linear):
    session = ort.session(linear)
    x = np.array([[1, 0, 2]], np.float32)
    assert [i.name for i in session.inputs] == ["x"]
    assert session.inputs[0].shape == ("rows", 3)
    assert session.outputs[0].dtype == "float32"
    np.testing.assert_array_equal(session.run({"x": x})["y"], x @ W)
    np.testing.assert_array_equal(ort.run_model(linear.read_bytes(), [{"x": x}])[0]["y"], x @ W)


def test_asking_for_some_outputs_gives_those(tmp_path):
    nodes = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Exp", ["a"], ["b"])]
    path = small_models.save(tmp_path / "two.onnx", nodes, [("x", [2])], [("a", [2]), ("b", [2])])
    x = np.array([0, 1], np.float32)
    assert list(ort.run_model(path, [{"x": x}], outputs=["a"])[0]) == ["a"]
    with pytest.raises(RunError, match=r"has the outputs \['a', 'b'\], but \['c'\] was asked for"):
        ort.session(path).run({"x": x}, ["c"])


def test_an_initializer_that_is_an_input_may_be_overridden(tmp_path):
    nodes = [helper.make_node("Mul", ["x", "s"], ["y"])]
    path = small_models.save(
        tmp_path / "m.onnx", nodes, [("x", [1]), ("s", [1])], [("y", [1])], {"s": np.array([2], np.float32)}
    )
    session, x = ort.session(path), np.array([3], np.float32)
    assert session.run({"x": x})["y"] == 6
    assert session.run({"x": x, "s": np.array([5], np.float32)})["y"] == 15


@pytest.mark.parametrize(
    ("feeds", "text"),
    [
        ({}, r"takes the inputs \['x'\], but got \[\]; missing: \['x'\]"),
        ({"x": np.zeros((1, 3), np.float32), "z": np.zeros(1)}, r"unknown: \['z'\]"),
        ({"x": np.zeros((1, 4), np.float32)}, "an input has the wrong shape.*Got: 4 Expected: 3"),
        ({"x": np.zeros((1, 3))}, r"an input has the wrong type.*tensor\(double\).*tensor\(float\)"),
    ],
)
def test_a_wrong_input_is_told_in_words(linear, feeds, text):
    with pytest.raises(RunError, match=text):
        ort.session(linear).run(feeds)


def test_an_unknown_operator_is_named(tmp_path):
    nodes = [helper.make_node("Frobnicate", ["x"], ["y"], name="frob")]
    path = small_models.save(tmp_path / "f.onnx", nodes, [("x", [1])], [("y", [1])])
    with pytest.raises(RunError, match=r"cannot load 'f.onnx': this runtime does not know an operator.*Frobnicate"):
        ort.session(path)


def test_an_operator_without_a_kernel_is_named(tmp_path):
    nodes = [helper.make_node("LRN", ["x"], ["y"], name="a", size=3)]
    wide = TensorProto.DOUBLE
    path = small_models.save(tmp_path / "f.onnx", nodes, [("x", [1, 3, 2, 2], wide)], [("y", [1, 3, 2, 2], wide)])
    with pytest.raises(RunError, match=r"has no kernel for an operator with these types.*LRN"):
        ort.session(path)


def test_broken_files_are_told_apart(tmp_path):
    with pytest.raises(RunError, match=r"must be a file, but '.*absent.onnx' is not one"):
        ort.session(tmp_path / "absent.onnx")
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x08\x12")
    with pytest.raises(RunError, match=r"cannot load 'cut.onnx': the file is not an ONNX model or is cut off"):
        ort.session(tmp_path / "cut.onnx")


def test_shapes_that_clash_inside_the_model_are_told(tmp_path):
    nodes = [helper.make_node("Add", ["x", "z"], ["y"], name="sum")]
    path = small_models.save(tmp_path / "a.onnx", nodes, [("x", ["a"]), ("z", ["b"])], [("y", ["c"])])
    with pytest.raises(RunError, match=r"shapes inside the model do not fit this input.*sum"):
        ort.session(path).run({"x": np.zeros(2, np.float32), "z": np.zeros(3, np.float32)})


def test_threads_must_be_positive(linear):
    with pytest.raises(RunError, match="threads must be >= 1, but got 0"):
        ort.session(linear, threads=0)


def test_the_runtime_prints_nothing(tmp_path):
    nodes = [helper.make_node("Frobnicate", ["x"], ["y"])]
    path = small_models.save(tmp_path / "f.onnx", nodes, [("x", [1])], [("y", [1])])
    code = (
        "from featherweight.runtime import ort\nfrom featherweight.errors import RunError\n"
        f"try:\n    ort.session({str(path)!r})\nexcept RunError:\n    pass\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    assert done.stderr == ""


def test_optimised_ops_shows_fusion(tmp_path):
    path = small_models.conv_relu(tmp_path / "c.onnx")
    ops = ort.optimised_ops(path)
    assert ops["Relu"] == 0
    assert ops["Conv"] + ops["FusedConv"] == 1
    out = ort.optimised_graph(path, tmp_path)
    assert out.parent == tmp_path
    assert out.is_file()


def test_class_probabilities_of_scikit_learn_become_an_array():
    got = ort._as_array([{0: 0.25, 1: 0.75}, {0: 0.5, 1: 0.5}])
    np.testing.assert_array_equal(got, np.array([[0.25, 0.75], [0.5, 0.5]], np.float32))


def test_only_ort_imports_onnxruntime():
    from pathlib import Path

    import featherweight

    package = Path(featherweight.__file__).parent
    using = [p.relative_to(package).as_posix() for p in package.rglob("*.py") if "import onnxruntime" in p.read_text()]
    assert [u for u in using if u.startswith("runtime/")] == ["runtime/ort.py"]
