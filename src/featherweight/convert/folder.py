"""A Hugging Face folder, looked through before anything is loaded from it. Needs no extra."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from featherweight.convert.formats import pickle_refusal
from featherweight.errors import ModelError

MAX_JSON_BYTES = 64 << 20
_HALVES = {"F16": "float16", "BF16": "bfloat16", "F64": "float64"}
_EIGHTS = {"F8_E4M3", "F8_E5M2", "I8", "U8"}


@dataclass(frozen=True)
class Folder:
    """The folder of the transformer (of a sentence model: its first module), its config, and the outer folder."""

    path: Path
    outer: Path
    config: dict[str, Any]
    modules: tuple[dict[str, Any], ...] = ()
    stored_half: str = ""

    @classmethod
    def of(cls, path: Path) -> Folder:
        """Read the JSON files and the headers of the weights. Raises ModelError for what is not read, and why."""
        modules: tuple[dict[str, Any], ...] = ()
        inner = path
        if (path / "modules.json").is_file():
            listed = read_json(path / "modules.json")
            if not isinstance(listed, list) or not all(isinstance(m, dict) for m in listed) or not listed:
                raise ModelError(f"{path}/modules.json must list the modules of a sentence encoder")
            modules = tuple(listed)
            inner = inside(path, str(modules[0].get("path", "")))
        if not (inner / "config.json").is_file():
            raise ModelError(f"{inner} must hold config.json, but has none; give the folder of a whole model")
        config = read_json(inner / "config.json")
        if not isinstance(config, dict):
            raise ModelError(f"{inner}/config.json must be a JSON object")
        _check_config(inner, config)
        return cls(inner, path, config, modules, _check_weights(inner))


def read_json(path: Path) -> Any:
    """A JSON file. Raises ModelError if it is too large or is not JSON."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(f"{path} has more than {MAX_JSON_BYTES} B, which no configuration has")
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ModelError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise ModelError(f"{path} is not JSON ({e})") from e


def inside(root: Path, relative: str) -> Path:
    """A path within a folder. Raises ModelError if it leads out of it."""
    found = root / relative
    if Path(relative).is_absolute() or not found.resolve().is_relative_to(root.resolve()):
        raise ModelError(f"{root}/modules.json points to {relative!r}, outside the folder")
    return found


def _check_config(path: Path, config: dict[str, Any]) -> None:
    if config.get("auto_map"):
        raise ModelError(
            f"{path} brings model code of its own (auto_map in config.json), which is never run; export it to .pt2 in "
            "the environment where you trust that code: torch.export.save(torch.export.export(model, ...), 'model.pt2')"
        )
    if config.get("quantization_config"):
        method = config["quantization_config"].get("quant_method", "unknown") if isinstance(
            config["quantization_config"], dict) else "unknown"  # fmt: skip
        raise ModelError(f"{path} is quantized already ({method}); give the folder of the float model it was made from")


def _check_weights(path: Path) -> str:
    """The type of the stored weights where it is not float32, else ''. Raises ModelError where none can be read."""
    files = sorted(path.glob("*.safetensors"))
    if (path / "adapter_config.json").is_file():
        raise ModelError(f"{path} is an adapter (PEFT); merge it into its model (merge_and_unload) and save that")
    if not files:
        pickles = sorted(
            f for s in ("*.bin", "*.pt", "*.pth", "*.ckpt") for f in path.glob(s) if "optimizer" not in f.name
        )
        if pickles:
            raise ModelError(
                pickle_refusal(pickles[0]).partition(". Two ways out")[0]
                + ". Load the folder where you trust it and save it again as safetensors: "
                "AutoModel.from_pretrained(folder).save_pretrained(folder, safe_serialization=True)"
            )
        if any(path.glob("tf_model.h5")) or any(path.glob("flax_model.msgpack")):
            raise ModelError(
                f"{path} holds TensorFlow or Flax weights; load it in transformers and save it as safetensors"
            )
        onnx = sorted(path.glob("**/*.onnx"))
        raise ModelError(f"{path} holds no *.safetensors" + (f"; give {onnx[0]}" if onnx else ""))
    types = {t for f in files for t in _types(f)}
    if types & _EIGHTS and not types & {"F32", "F16", "BF16"}:
        raise ModelError(f"{path} stores its weights in 8 bits; give the folder of the float model")
    return ", ".join(sorted(_HALVES[t] for t in types & set(_HALVES)))


def _types(file: Path) -> set[str]:
    """Element types in a safetensors header. Raises ModelError if the file is not one or is truncated."""
    try:
        size = file.stat().st_size
        with file.open("rb") as f:
            length = struct.unpack("<Q", f.read(8))[0]
            if length > min(size, 100_000_000):
                raise ValueError("its header is longer than the file")
            entries = json.loads(f.read(length))
        entries.pop("__metadata__", None)
        end = max((e["data_offsets"][1] for e in entries.values()), default=0)
        if 8 + length + end > size:
            raise ValueError(f"it has {size} B of {8 + length + end}")
        return {str(e["dtype"]) for e in entries.values()}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, struct.error, RecursionError) as e:
        raise ModelError(f"{file} is not a whole safetensors file ({e}); download it again") from e
