"""Kinds of files, told without torch: what is refused, with which way out."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest

from featherweight.convert import is_convertible, to_onnx
from featherweight.convert.folder import Folder
from featherweight.errors import ModelError


@pytest.mark.parametrize(
    ("name", "tool"),
    [
        ("m.keras", "model.export('model.onnx', format='onnx')"), ("m.h5", "tf2onnx.convert --keras m.h5"),
        ("m.tflite", "tf2onnx.convert --tflite m.tflite"), ("m.pb", "tf2onnx.convert --saved-model"),
        ("m.mlmodel", "onnxmltools"), ("m.gguf", "gguf_file='m.gguf'"), ("m.pdmodel", "paddle2onnx"),
        ("m.safetensors", "without a graph"),
    ],
)  # fmt: skip
def test_other_formats_name_the_tool(name, tool, tmp_path):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError) as refused:
        is_convertible(tmp_path / name)
    assert tool in str(refused.value)


def test_a_saved_model_folder(tmp_path):
    (tmp_path / "saved_model.pb").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"tf2onnx.convert --saved-model"):
        is_convertible(tmp_path)


def test_onnx_and_what_is_absent_are_left_to_the_reader_of_onnx(tmp_path):
    assert not is_convertible(tmp_path / "model.onnx")
    assert not is_convertible(tmp_path)
    assert not is_convertible(3)


@pytest.mark.parametrize("name", ["m.pt", "m.pth", "m.bin", "m.ckpt", "m.pkl"])
def test_a_pickle_says_what_it_is_and_two_ways_out(name, tmp_path):
    (tmp_path / name).write_bytes(b"PK\x03\x04")
    with pytest.raises(ModelError) as refused:
        to_onnx(tmp_path / name, tmp_path / "out.onnx")
    for part in ("pickle", "can run any code", "safetensors", "--trust"):
        assert part in str(refused.value)


def folder(path: Path, config: dict, *, weights: bytes | None = None) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if weights is not None:
        (path / "model.safetensors").write_bytes(weights)
    return path


def tensors(dtype: str = "F32", nbytes: int = 4, there: int = 4) -> bytes:
    header = json.dumps({"w": {"dtype": dtype, "shape": [1], "data_offsets": [0, nbytes]}}).encode()
    return struct.pack("<Q", len(header)) + header + b"\0" * there


BERT = {"model_type": "bert", "architectures": ["BertModel"]}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({**BERT, "auto_map": {"AutoModel": "modeling.Evil"}}, "auto_map"),
        ({**BERT, "quantization_config": {"quant_method": "gptq"}}, r"quantized already \(gptq\)"),
        ([], "JSON object"),
    ],
)
def test_folders_that_are_not_read(config, says, tmp_path):
    with pytest.raises(ModelError, match=says):
        Folder.of(folder(tmp_path / "f", config, weights=tensors()))


def test_only_safetensors(tmp_path):
    path = folder(tmp_path / "f", BERT)
    with pytest.raises(ModelError, match="holds no"):
        Folder.of(path)
    (path / "pytorch_model.bin").write_bytes(b"PK")
    with pytest.raises(ModelError, match=r"can run any code.*safe_serialization=True"):
        Folder.of(path)


@pytest.mark.parametrize(
    "weights", [b"", b"\xff" * 8, tensors()[:20], tensors(there=2), tensors().replace(b"data_offsets", b"data_offsetz")]
)
def test_truncated_weights(weights, tmp_path):
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        Folder.of(folder(tmp_path / "f", BERT, weights=weights))


def test_half_precision_is_told(tmp_path):
    assert Folder.of(folder(tmp_path / "f", BERT, weights=tensors("BF16"))).stored_half == "bfloat16"


def test_an_adapter(tmp_path):
    path = folder(tmp_path / "f", BERT, weights=tensors())
    (path / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelError, match="merge"):
        Folder.of(path)


def test_modules_stay_inside_the_folder(tmp_path):
    path = folder(tmp_path / "f", BERT, weights=tensors())
    (path / "modules.json").write_text(json.dumps([{"path": "../../etc", "type": "x.Transformer"}]))
    with pytest.raises(ModelError, match="outside the folder"):
        Folder.of(path)
