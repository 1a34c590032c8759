"""Store constant tensors in few bytes as standard ONNX nodes, and read them back.

An encoding is orthogonal to the technique that chose the values: pure functions turn arrays into `Encoded`,
`attach` writes one into a model, `read` recognises it in any loaded model, `decode` gives exactly the values the
runtime computes. Everything but `dequantize` and `lookup` is folded by the runtime at load.
"""

from __future__ import annotations

from featherweight.graph.encode.layout import Encoded
from featherweight.graph.encode.make import bitmask, block4, decode, dequantize, float16, int_tensor, linear, palette
from featherweight.graph.encode.recipes import shared_bytes, sizes
from featherweight.graph.encode.recognise import read
from featherweight.graph.encode.rows import lookup
from featherweight.graph.encode.write import attach, attach_lookup

__all__ = [
    "Encoded",
    "attach",
    "attach_lookup",
    "bitmask",
    "block4",
    "decode",
    "dequantize",
    "float16",
    "int_tensor",
    "linear",
    "lookup",
    "palette",
    "read",
    "shared_bytes",
    "sizes",
]
