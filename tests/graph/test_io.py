"""Loading, saving and measuring model files."""

from __future__ import annotations

import errno
import os
import resource
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from featherweight.errors import ModelError, OutputError
from featherweight.graph import io, surgery

N = helper.make_node


@pytest.fixture
def model(build):
    rng = np.random.default_rng(0)
    w = rng.standard_normal((64, 48)).astype(np.float32)
    return build([N("MatMul", ["x", "w"], ["y"], name="fc")], {"w": w}, inputs={"x": ["n", 64]})


def weight(model: ir.Model) -> np.ndarray:
    return model.graph.initializers["w"].const_value.numpy()


@pytest.mark.parametrize("external", [None, False, True])
def test_a_saved_model_is_the_same_after_loading(model, tmp_path, external):
    io.save(model, tmp_path / "m.onnx", external=external)
    assert io.to_bytes(io.load(tmp_path / "m.onnx")) == io.to_bytes(model)


def test_equal_models_give_equal_bytes_and_the_file_is_those_bytes(model, tmp_path):
    io.save(model, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_bytes() == io.to_bytes(model) == io.to_bytes(surgery.copy_model(model))


def test_saving_twice_gives_the_same_files(model, tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        io.save(model, tmp_path / name / "m.onnx", external=True)
    for file in ("m.onnx", "m.onnx.data"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_size_counts_the_side_file_once(model, tmp_path):
    io.save(model, tmp_path / "m.onnx", external=True)
    files = [tmp_path / "m.onnx", tmp_path / "m.onnx.data"]
    assert io.size_bytes(files[0]) == sum(f.stat().st_size for f in files)
    assert files[1].stat().st_size == 64 * 48 * 4
    assert io.files(files[0]) == files


def test_sha256_changes_with_the_weights_in_the_side_file(model, tmp_path):
    io.save(model, tmp_path / "m.onnx", external=True)
    before = io.sha256(tmp_path / "m.onnx")
    surgery.set_initializer(model.graph.initializers["w"], weight(model) + 1)
    io.save(model, tmp_path / "m.onnx", external=True)
    assert io.sha256(tmp_path / "m.onnx") != before


def test_both_files_may_be_moved_together(model, tmp_path, monkeypatch):
    (tmp_path / "a").mkdir()
    io.save(model, tmp_path / "a" / "m.onnx", external=True)
    os.rename(tmp_path / "a", tmp_path / "b")
    monkeypatch.chdir("/")
    loaded = io.load(tmp_path / "b" / "m.onnx")
    np.testing.assert_array_equal(weight(loaded), weight(model))


def test_external_weights_are_mapped_not_read(build, tmp_path):
    big = build([N("MatMul", ["x", "w"], ["y"])], {"w": np.ones((512, 256), np.float32)}, inputs={"x": [1, 512]})
    io.save(big, tmp_path / "m.onnx", external=True)
    assert isinstance(io.load(tmp_path / "m.onnx").graph.initializers["w"].const_value, ir.ExternalTensor)


def test_a_model_can_be_saved_over_its_own_side_file(build, tmp_path):
    w = np.arange(512 * 256, dtype=np.float32).reshape(512, 256)
    big = build([N("MatMul", ["x", "w"], ["y"])], {"w": w}, inputs={"x": [1, 512]})
    path = tmp_path / "m.onnx"
    io.save(big, path, external=True)
    for _ in range(2):
        io.save(io.load(path), path, external=True)
    np.testing.assert_array_equal(weight(io.load(path)), w)


def test_an_external_model_can_be_saved_as_one_file(build, tmp_path):
    w = np.arange(512 * 256, dtype=np.float32).reshape(512, 256)
    io.save(
        build([N("MatMul", ["x", "w"], ["y"])], {"w": w}, inputs={"x": [1, 512]}), tmp_path / "m.onnx", external=True
    )
    io.save(io.load(tmp_path / "m.onnx"), tmp_path / "one.onnx", external=False)
    os.remove(tmp_path / "m.onnx.data")
    np.testing.assert_array_equal(weight(io.load(tmp_path / "one.onnx")), w)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.int4, ml_dtypes.uint4, np.float16, np.int8, np.bool_])
@pytest.mark.parametrize("external", [False, True])
def test_every_storage_type_survives(model, tmp_path, dtype, external):
    array = (np.arange(64 * 96) % 7).astype(dtype).reshape(64, 96)
    surgery.add_initializer(model.graph, "extra", array)
    io.save(model, tmp_path / "m.onnx", external=external)
    loaded = io.load(tmp_path / "m.onnx").graph.initializers["extra"].const_value
    assert loaded.dtype.numpy() == np.dtype(dtype)
    np.testing.assert_array_equal(loaded.numpy().astype(np.float32), array.astype(np.float32))


def test_saving_leaves_the_model_unchanged(model, tmp_path):
    before = io.to_bytes(model)
    io.save(model, tmp_path / "m.onnx", external=True)
    assert io.to_bytes(model) == before
    assert not isinstance(model.graph.initializers["w"].const_value, ir.ExternalTensor)


def test_no_second_record_of_types_is_written(model):
    proto = onnx.load_from_string(io.to_bytes(model))
    assert "w" not in {v.name for v in proto.graph.value_info}


def test_a_missing_folder_is_an_output_error(model, tmp_path):
    with pytest.raises(OutputError, match="does not exist; create it first"):
        io.save(model, tmp_path / "none" / "m.onnx")


def test_a_folder_as_output_is_an_output_error(model, tmp_path):
    with pytest.raises(OutputError, match=r"must be a file, but .* is a folder"):
        io.save(model, tmp_path)


@pytest.mark.parametrize("external", [False, True])
def test_a_full_disk_leaves_nothing_behind_and_the_old_file_intact(model, tmp_path, monkeypatch, external):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(io, "_write", full)
    with pytest.raises(OutputError, match="the disk is full"):
        io.save(model, target, external=external)
    assert os.listdir(tmp_path) == ["m.onnx"]
    assert target.read_bytes() == b"old"


@pytest.mark.skipif(sys.platform != "linux", reason="file size limits are set the POSIX way")
def test_a_real_write_error_leaves_nothing_behind(build, tmp_path):
    big = build([N("MatMul", ["x", "w"], ["y"])], {"w": np.ones((512, 256), np.float32)}, inputs={"x": [1, 512]})
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old[1]))
    try:
        for external in (False, True):
            with pytest.raises(OutputError, match="cannot be written"):
                io.save(big, tmp_path / "m.onnx", external=external)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == []


def test_an_interrupted_save_leaves_nothing_behind(model, tmp_path, monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(io, "_sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        io.save(model, tmp_path / "m.onnx", external=True)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "name", ["external_data_small", "all_axes_dynamic", "nodes_out_of_order", "loop_body_with_gemm"]
)
def test_shared_cases_survive_a_round_trip(cases_dir, tmp_path, run, name):
    feeds = [dict(np.load(cases_dir / f"{name}.inputs.npz"))]
    expected = np.load(cases_dir / f"{name}.expected.npz")
    io.save(io.load(cases_dir / f"{name}.onnx"), tmp_path / "m.onnx")
    for key, value in run((tmp_path / "m.onnx").read_bytes(), feeds)[0].items():
        np.testing.assert_allclose(value, expected[key], rtol=1e-5, atol=1e-5)


def test_every_shared_case_loads_or_says_why(cases_dir):
    for path in sorted(Path(cases_dir).glob("*.onnx")):
        if path.stem == "external_data_file_missing":
            with pytest.raises(ModelError, match=r"'external_data_file_missing.data' .* is missing"):
                io.load(path)
        else:
            assert len(io.load(path).graph)


@pytest.mark.slow
def test_a_model_over_2_gib_is_loaded_saved_and_loaded_again(build, tmp_path):
    model = build([N("MatMul", ["x", "w"], ["y"])], {"w": np.ones((2, 2), np.float32)}, inputs={"x": [1, 2]})
    io.save(model, tmp_path / "big.onnx")
    proto = onnx.load(tmp_path / "big.onnx")
    rows, columns = 8_800, 65_536
    with open(tmp_path / "w.bin", "wb") as f:
        f.truncate(rows * columns * 4)
        f.seek(4 * (rows * columns - 1))
        f.write(np.float32(3).tobytes())
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    del tensor.dims[:]
    tensor.dims.extend([rows, columns])
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", "w.bin"), ("offset", "0"), ("length", str(rows * columns * 4))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    (tmp_path / "big.onnx").write_bytes(proto.SerializeToString())

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    big = io.load(tmp_path / "big.onnx")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KiB: nothing was read
    io.save(big, tmp_path / "copy.onnx")
    os.remove(tmp_path / "w.bin")
    again = io.load(tmp_path / "copy.onnx").graph.initializers["w"].const_value
    assert again.shape.numpy() == (rows, columns)
    assert again.numpy()[-1, -1] == 3
    with pytest.raises(ModelError, match="below 2 GiB"):
        io.to_bytes(io.load(tmp_path / "copy.onnx"))
