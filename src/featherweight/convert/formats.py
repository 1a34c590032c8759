"""What kind of model a path is, told by its name and first bytes; for kinds that are not read, the tool that is needed.

Nothing here imports torch, unpickles or unpacks anything.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from featherweight.errors import ModelError

Kind = Literal["onnx", "program", "folder", "pickle"]

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_KERAS = (
    "is a Keras model; make ONNX of it first: in Keras 3 load it and call model.export('model.onnx', format='onnx'), "
    "or run `python -m tf2onnx.convert --keras {name} --output model.onnx` (package tf2onnx)"
)
_ELSEWHERE = {
    ".keras": _KERAS,
    ".h5": _KERAS,
    ".hdf5": _KERAS,
    ".tflite": (
        "is a TensorFlow Lite model; run `python -m tf2onnx.convert --tflite {name} --opset 18 --output model.onnx` "
        "(package tf2onnx), best on a float model, as one that is quantized already gains little"
    ),
    ".pb": (
        "is a TensorFlow graph; run `python -m tf2onnx.convert --saved-model FOLDER --output model.onnx`, or for a "
        "frozen graph `--graphdef {name} --inputs NAME:0 --outputs NAME:0` (package tf2onnx)"
    ),
    ".mlmodel": (
        "is a Core ML model; convert it with onnxmltools.convert_coreml (package onnxmltools), or better export the "
        "model it was made from"
    ),
    ".mlpackage": "is a Core ML program, which nothing turns into ONNX; export the model it was made from",
    ".gguf": (
        "is a GGUF file of quantized weights without a graph; load it with transformers' "
        "AutoModelForCausalLM.from_pretrained(folder, gguf_file='{name}'), call save_pretrained on the result and give "
        "that folder"
    ),
    ".pdmodel": (
        "is a PaddlePaddle model; run `paddle2onnx --model_dir . --model_filename {name} --save_file model.onnx` "
        "(package paddle2onnx)"
    ),
    ".safetensors": "holds weights without a graph; give the folder of its config.json, or export the module to .pt2",
}


def kind_of(path: Path) -> Kind:
    """How a model at `path` is read; "onnx" where nothing says otherwise, so that a missing file is reported as one.

    Raises ModelError for a format that another tool must convert, naming the tool.
    """
    if path.is_dir():
        if path.suffix.lower() == ".mlpackage":
            raise ModelError(f"{path} {_ELSEWHERE['.mlpackage']}")
        if (path / "saved_model.pb").is_file():
            raise ModelError(
                f"{path} is a TensorFlow SavedModel; run `python -m tf2onnx.convert --saved-model {path} "
                "--output model.onnx` (package tf2onnx)"
            )
        return "folder" if (path / "config.json").is_file() or (path / "modules.json").is_file() else "onnx"
    suffix = path.suffix.lower()
    if suffix == ".pt2":
        return "program"
    if suffix in PICKLES:
        return "pickle"
    if suffix in _ELSEWHERE and path.exists():
        raise ModelError(f"{path} {_ELSEWHERE[suffix].format(name=path.name)}")
    return "onnx"


def pickle_refusal(path: Path) -> str:
    """Why a pickled file is not opened, and the two ways out."""
    return (
        f"{path} is {_what(path)}: a Python pickle, and loading one can run any code that is hidden in it, so it is "
        "not opened. Two ways out: save the weights with safetensors (or the whole network with torch.export.save as "
        ".pt2) where the file was made; or, if you trust who made it, say --trust (trust=True in Python)"
    )


def _what(path: Path) -> str:
    try:
        with path.open("rb") as f:
            head = f.read(4)
    except OSError:
        head = b""
    if path.suffix.lower() == ".ckpt":
        return "a checkpoint (PyTorch Lightning or TensorFlow)"
    return "a PyTorch file" if head.startswith(b"PK") or path.suffix.lower() != ".pkl" else "a pickled object"
