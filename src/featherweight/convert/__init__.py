"""What comes through the door: PyTorch modules, exported programs and Hugging Face folders become ONNX files."""

from __future__ import annotations

from featherweight.convert.door import Converted, is_convertible, to_onnx

__all__ = ["Converted", "is_convertible", "to_onnx"]
