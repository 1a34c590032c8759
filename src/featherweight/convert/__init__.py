"""What comes through the door: PyTorch modules, exported programs and Hugging Face folders become ONNX files."""

from __future__ import annotations

from featherweight.convert.door import Converted, is_convertible, to_onnx
from featherweight.convert.running import FILE, as_onnx, convert_file, forget, into_run

__all__ = ["FILE", "Converted", "as_onnx", "convert_file", "forget", "into_run", "is_convertible", "to_onnx"]
