"""Model files from strangers: a clear ModelError, bounded memory, nothing written, nothing read elsewhere."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from featherweight.errors import ModelError
from featherweight.graph import io
from featherweight.graph.normalise import normalise

N = helper.make_node


def good() -> onnx.ModelProto:
    w = np.arange(600, dtype=np.float32).reshape(20, 30)
    graph = helper.make_graph(
        [N("MatMul", ["x", "w"], ["y"], name="fc")],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 20])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 30])],
        [numpy_helper.from_array(w, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture
def refused(tmp_path: Path) -> Callable[..., str]:
    """Write bytes or a proto as a model file, load it, and give the error's text."""

    def check(content: bytes | onnx.ModelProto, name: str = "m.onnx") -> str:
        file = tmp_path / name
        file.write_bytes(content if isinstance(content, bytes) else content.SerializeToString())
        before = sorted(os.listdir(tmp_path))
        with pytest.raises(ModelError) as caught:
            io.load(file)
        assert sorted(os.listdir(tmp_path)) == before
        assert str(file) in str(caught.value)
        return str(caught.value)

    return check


def external(location: str, **fields: object) -> onnx.ModelProto:
    model = good()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, **fields}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, str(value)
    return model


@pytest.mark.parametrize(
    ("head", "name", "says"),
    [
        (b"PK\x03\x04rest", "m.pt", "PyTorch.*torch.onnx.export"),
        (b"PK\x03\x04rest", "m.keras", "Keras archive"),
        (b"PK\x03\x04rest", "m.onnx", "zip archive; unpack"),
        (b"\x80\x02}q\x00", "m.pth", "pickle.*never opened"),
        (b"\x89HDF\r\n\x1a\n", "m.h5", "HDF5"),
        (b"\x1c\0\0\0TFL3", "m.tflite", "TensorFlow Lite"),
        (b'\x10\0\0\0\0\0\0\0{"a": 1}', "m.safetensors", "safetensors.*weights without a graph"),
        (b"GGUF\3\0\0\0", "m.gguf", "GGUF"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "m.onnx", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "m.onnx", "web page.*download it again"),
        (b'{"a": 1}', "m.json", "JSON"),
        (b'<?xml version="1.0"?>', "m.xml", "XML"),
        (b"\x1c\0\0\0ORTM", "m.ort", "ONNX Runtime .ort"),
        (b"", "m.onnx", "empty"),
        (b"hello, this is text", "m.onnx", "truncated or corrupt"),
    ],
)
def test_another_format_is_named_with_the_way_out(refused, head, name, says):
    import re

    assert re.search(says, refused(head, name))


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ModelError, match="does not exist"):
        io.load(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match=r"is a folder; it holds no \.onnx file"):
        io.load(tmp_path)
    (tmp_path / "model.onnx").write_bytes(good().SerializeToString())
    with pytest.raises(ModelError, match=r"give model\.onnx inside it"):
        io.load(tmp_path)


@pytest.mark.parametrize("keep", [1, 10, 100, 1000, -1, -600])
def test_a_truncated_file_is_refused(refused, keep):
    assert refused(good().SerializeToString()[:keep])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.binary(min_size=1, max_size=300))
def test_random_bytes_never_give_another_error(tmp_path, data):
    (tmp_path / "r.onnx").write_bytes(data)
    with pytest.raises(ModelError):
        io.load(tmp_path / "r.onnx")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, 2600), byte=st.integers(0, 255))
def test_a_flipped_byte_gives_a_model_or_a_model_error(tmp_path, position, byte):
    data = bytearray(good().SerializeToString())
    data[position % len(data)] = byte
    (tmp_path / "f.onnx").write_bytes(bytes(data))
    try:
        model = io.load(tmp_path / "f.onnx")
        io.to_bytes(normalise(model, run=None).model)
    except ModelError:
        pass


def test_sub_graphs_nested_too_deeply_are_refused(refused):
    def varint(n: int) -> bytes:
        out = b""
        while n > 127:
            out, n = out + bytes([n & 127 | 128]), n >> 7
        return out + bytes([n])

    def field(number: int, payload: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(payload)) + payload

    graph = b""
    for _ in range(3000):
        graph = field(1, field(5, field(1, b"a") + field(6, graph)))  # node { attribute { name, g } }
    assert "nested deeper" in refused(field(7, graph))


@pytest.mark.parametrize("dims", [[2**40, 2**40], [2**62, 4], [-1, 600], [10, 30], [2**31, 2**31, 2**31], [20, 30, 0]])
def test_a_shape_that_disagrees_with_the_bytes_is_refused(refused, dims):
    model = good()
    tensor = model.graph.initializer[0]
    del tensor.dims[:]
    tensor.dims.extend(dims)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    text = refused(model)
    assert "'w'" in text
    assert str(dims[0]) in text
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


@pytest.mark.parametrize("kind", [0, 99, 12345])
def test_an_unknown_data_type_is_refused(refused, kind):
    model = good()
    model.graph.initializer[0].data_type = kind
    assert f"unknown data type {kind}" in refused(model)


def test_values_in_the_wrong_field_are_refused(refused):
    model = good()
    model.graph.initializer[0].ClearField("raw_data")
    assert "must hold 600 values" in refused(model)


def test_a_tensor_inside_an_attribute_is_checked_too(refused):
    model = good()
    node = N("Constant", [], ["c"], value=numpy_helper.from_array(np.zeros(4, np.float32)))
    node.attribute[0].t.dims[0] = 2**50
    model.graph.node.append(node)
    assert "must hold" in refused(model)


@pytest.mark.parametrize(
    ("dims", "indices", "says"),
    [([2**40], [0, 1], "must be below"), ([5], [0, 7], "do not fit"), ([5], [-1, 2], "do not fit")],
)
def test_a_sparse_tensor_cannot_grow_or_point_outside(refused, dims, indices, says):
    model = good()
    values = helper.make_tensor("s", TensorProto.FLOAT, [2], [1.0, 2.0])
    where = helper.make_tensor("i", TensorProto.INT64, [2], indices)
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, where, dims))
    assert says in refused(model)


@pytest.mark.parametrize(
    "location", ["../secret", "a/../../secret", "/etc/passwd", "..\\secret", "C:\\secret", "\\\\host\\share", "a\0b"]
)
def test_external_data_outside_the_folder_is_refused(refused, tmp_path, location):
    (tmp_path.parent / "secret").write_bytes(b"x" * 2400)
    text = refused(external(location))
    assert "must lie in the model's folder" in text


def test_a_link_that_leaves_the_folder_is_refused(refused, tmp_path):
    outside = tmp_path.parent / "outside.bin"
    outside.write_bytes(b"x" * 2400)
    (tmp_path / "w.bin").symlink_to(outside)
    assert "is a link to" in refused(external("w.bin"))


def test_a_hard_link_is_refused(refused, tmp_path):
    outside = tmp_path.parent / "hard.bin"
    outside.write_bytes(b"x" * 2400)
    os.link(outside, tmp_path / "w.bin")
    assert "hard links" in refused(external("w.bin"))


def test_a_model_that_is_itself_a_link_finds_its_data_in_the_store(tmp_path):
    """As in the cache of a model hub: the folder holds links into a store of blobs."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    (blobs / "aa").write_bytes(external("m.data").SerializeToString())
    (blobs / "bb").write_bytes(np.arange(600, dtype=np.float32).tobytes())
    (snapshot / "m.onnx").symlink_to(blobs / "aa")
    (snapshot / "m.data").symlink_to(blobs / "bb")
    model = io.load(snapshot / "m.onnx")
    assert model.graph.initializers["w"].const_value.numpy()[-1, -1] == 599
    assert io.size_bytes(snapshot / "m.onnx") == (blobs / "aa").stat().st_size + 2400


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"offset": 100}, "needs bytes 100..2500"),
        ({"offset": -5}, "needs bytes -5"),
        ({"length": 10}, "external length is 10 B"),
        ({"length": 2**60}, "external length is"),
        ({"offset": "zero"}, "whole numbers"),
        ({"offset": 2**70}, "needs bytes"),
    ],
)
def test_an_external_range_past_the_end_is_refused(refused, tmp_path, fields, says):
    (tmp_path / "w.bin").write_bytes(b"x" * 2400)
    assert says in refused(external("w.bin", **fields))


@pytest.mark.parametrize("location", ["gone.bin", ""])
def test_a_missing_side_file_is_named(refused, location):
    text = refused(external(location))
    assert "'gone.bin' with the weights (tensor 'w') is missing" in text if location else "no file is named" in text


def test_a_folder_or_pipe_as_side_file_is_refused(refused, tmp_path):
    (tmp_path / "d").mkdir()
    os.mkfifo(tmp_path / "p")
    for name in ("d", "p"):
        assert "not a regular file" in refused(external(name))


@pytest.mark.parametrize("opset", [0, 1, 6, 10_000, -3])
def test_an_opset_out_of_range_is_refused(refused, opset):
    model = good()
    model.opset_import[0].version = opset
    text = refused(model)
    assert f"but got {opset}" in text
    assert "opset must be 7.." in text


def test_contradictory_opsets_are_refused(refused):
    model = good()
    model.opset_import.append(helper.make_opsetid("ai.onnx", 13))
    assert "imported as 17 and 13" in refused(model)


def test_a_file_from_the_future_is_refused(refused):
    model = good()
    model.ir_version = 999
    assert "IR version must be <=" in refused(model)


def test_a_file_without_a_graph_is_refused(refused):
    assert "no" in refused(onnx.ModelProto(ir_version=8, producer_name="x" * 50))


def test_a_node_that_reads_nothing_that_exists_is_named(refused):
    model = good()
    model.graph.node[0].input[0] = "ghost"
    text = refused(model)
    assert "'fc' reads 'ghost'" in text


def test_an_output_nobody_makes_is_named(refused):
    model = good()
    model.graph.output[0].name = "ghost"
    assert "the graph output reads 'ghost'" in refused(model)


def test_a_cycle_is_a_model_error(tmp_path):
    model = good()
    model.graph.node.extend([N("Add", ["y", "b"], ["a"]), N("Neg", ["a"], ["b"])])
    model.graph.output[0].name = "b"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ModelError, match="no cycle"):
        normalise(io.load(tmp_path / "m.onnx"), run=None)


def test_a_recursive_function_is_left_and_reported(tmp_path):
    model = good()
    body = [helper.make_node("F", ["a"], ["o"], domain="my")]
    model.functions.append(helper.make_function("my", "F", ["a"], ["o"], body, [helper.make_opsetid("my", 1)]))
    model.opset_import.append(helper.make_opsetid("my", 1))
    model.graph.node.append(N("F", ["y"], ["z"], domain="my"))
    model.graph.output[0].name = "z"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    steps = normalise(io.load(tmp_path / "m.onnx"), run=None).steps
    assert any(s.rolled_back and "cannot be inlined" in s.detail for s in steps)


@pytest.mark.parametrize("op", ["ConstantOfShape", "Expand", "Tile", "Range", "Pad"])
def test_constants_that_would_explode_are_not_computed(tmp_path, op):
    model = good()
    huge = numpy_helper.from_array(np.array([2**40], np.int64), "huge")
    small = numpy_helper.from_array(np.array([1], np.int64), "small")
    scalars = [numpy_helper.from_array(np.array(v, np.int64), n) for n, v in (("lo", 0), ("hi", 2**40), ("step", 1))]
    pads = numpy_helper.from_array(np.array([0, 2**40], np.int64), "pads")
    inputs = {
        "ConstantOfShape": ["huge"],
        "Expand": ["small", "huge"],
        "Tile": ["small", "huge"],
        "Range": ["lo", "hi", "step"],
        "Pad": ["small", "pads"],
    }[op]
    model.graph.initializer.extend([huge, small, pads, *scalars])
    model.graph.node.extend([N(op, inputs, ["e"]), N("Cast", ["e"], ["ef"], to=1), N("Add", ["y", "ef"], ["z"])])
    model.graph.output[0].name = "z"
    del model.graph.output[0].type.tensor_type.shape.dim[:]
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    result = normalise(io.load(tmp_path / "m.onnx"), run=None).model
    assert op in {n.op_type for n in result.graph}
