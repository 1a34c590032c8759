"""Store constant tensors in few bytes as standard ONNX nodes, and read them back.

An encoding is orthogonal to the technique that chose the values: pure functions turn arrays into `Encoded`,
`attach` writes one into a model, `read` recognises it in any loaded model, `decode` gives exactly the values the
runtime computes. Everything but `dequantize` and `lookup` is folded by the runtime at load, and then costs nothing.

Which one, by what it costs at load (ONNX Runtime 1.32, one 30522 x 384 table, float: 45 MiB, peak 89 MiB):

- `linear`, `palette`: float speed. Peak 145 to 157 MiB at 8 and 4 bits, 140 to 195 at 2 and 1, 200 to 275 at others:
  the runtime keeps all intermediates of all weights until its folding pass ends.
- `bitmask`: the dearest, peak 360 to 420 MiB. It is for the file, not for memory.
- `product`: runs of columns as vectors of a codebook, below 1 bit a value; `palette`'s costs when folded.
- `lookup`, for vocabularies: peak 22 MiB at 8 bits, 11 at 4, 8 at 3; 128 rows take 0.02 ms at 8 bits and 0.1 to 0.8 ms
  otherwise, instead of 0.01.
- `dequantize`, for a MatMul's (or an untransposed Gemm's) second input alone: peak 11 to 40 MiB where float has 32
  (1024 x 4096), and a third of float's latency for one row; activations are rounded to 8 bits by the kernel.
"""

from __future__ import annotations

from featherweight.graph.encode.layout import Encoded
from featherweight.graph.encode.make import (
    bitmask,
    block4,
    decode,
    dequantize,
    float16,
    int_tensor,
    linear,
    palette,
    product,
)
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
    "product",
    "read",
    "shared_bytes",
    "sizes",
]
