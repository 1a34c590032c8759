"""What the runtime's integer kernels need, found by dumping optimised graphs (ONNX Runtime 1.32, CPU).

Conv: Q/DQ on input, weight and output, int32 bias -> QLinearConv (1-D to 3-D). Gemm: int32 bias along the last axis,
alpha and beta 1 -> QGemm, float or 8-bit output. MatMul: constant on the right, per channel -> MatMulIntegerToFloat
or QLinearMatMul. No integer kernel: ConvTranspose, MatMul with a per-channel constant on the left, LSTM/GRU, Gather.
On CPUs without an 8-bit dot product, `vpmaddubsw` adds neighbouring u8 x s8 products in 16 bits and saturates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

#: Integer in, integer out with its own scales.
ARITHMETIC = ("Add", "Mul", "Concat", "AveragePool", "GlobalAveragePool", "LeakyRelu", "Sigmoid", "Where")
#: Codes pass through unchanged: the output has the input's scale and zero point.
LAYOUT = (
    "MaxPool",
    "Reshape",
    "Transpose",
    "Flatten",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Split",
    "DepthToSpace",
    "Expand",
    "Identity",
)
#: Folded into the rounding of the output before them when their bounds are constant.
CLIPS = ("Relu", "Clip")
BIAS_LIMIT = 2**30  # leaves the accumulator a factor of two for the products


def reduction_order(in_channels: int, kernel: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """Columns of Weight.to_matrix (in_channel, *kernel) in the kernels' order: kernel position, then in_channel."""
    positions = int(np.prod(kernel, dtype=np.int64))
    return np.arange(in_channels * positions).reshape(in_channels, positions).T.ravel()


def saturating_dot(x: npt.NDArray[np.uint8], w: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """Product of x (n, k) u8 with w (out, k) s8, both in kernel order, as vpmaddubsw does it: (n, out).

    Sums of two neighbouring products saturate at 16 bits.
    """
    odd = x.shape[1] % 2
    a = np.pad(x.astype(np.int64), ((0, 0), (0, odd)))
    b = np.pad(w.astype(np.int64), ((0, 0), (0, odd)))
    products = a[:, None, :] * b[None]
    pairs = products[..., 0::2] + products[..., 1::2]
    total: npt.NDArray[np.int64] = np.clip(pairs, -32768, 32767).sum(axis=-1)
    return total


def pair_excess(codes: npt.NDArray[np.int8], order: npt.NDArray[np.int64]) -> int:
    """Greatest |c| + |c'| of neighbours 2i, 2i + 1 of `order`; codes (g, out, k). At most 127 cannot saturate."""
    wide = np.abs(codes.astype(np.int64))[..., order]
    if wide.shape[-1] % 2:
        wide = np.concatenate([wide, np.zeros((*wide.shape[:-1], 1), np.int64)], axis=-1)
    return int((wide[..., 0::2] + wide[..., 1::2]).max(initial=0))
