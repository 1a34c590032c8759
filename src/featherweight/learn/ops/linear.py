"""Matrix products and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import ModelError
from featherweight.learn.ops.registry import Call, Kernel, operator

_CONV: dict[int, Callable[..., Tensor]] = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: functional.conv_transpose1d,
    2: functional.conv_transpose2d,
    3: functional.conv_transpose3d,
}


@operator("MatMul")
def matmul(_call: Call) -> Kernel:
    """Matrix product with broadcast leading axes."""
    return torch.matmul


@operator("Gemm")
def gemm(call: Call) -> Kernel:
    """Alpha A' B' + beta C, each transposed where the node says so."""
    alpha, beta = call.real("alpha", 1.0), call.real("beta", 1.0)
    trans_a, trans_b = call.integer("transA", 0), call.integer("transB", 0)

    def run(a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
        left, right = a.t() if trans_a else a, b.t() if trans_b else b
        if c is None or beta == 0:
            product = left @ right
            return product if alpha == 1 else product * alpha
        if c.ndim <= 1 or c.shape == (left.shape[0], right.shape[1]):
            return torch.addmm(c, left, right, beta=beta, alpha=alpha)
        product = left @ right
        return (product if alpha == 1 else product * alpha) + (c if beta == 1 else c * beta)

    return run


@operator("FusedMatMul", domain="com.microsoft")
def fused_matmul(call: Call) -> Kernel:
    """Alpha A' B' with the last two axes swapped where the node says so."""
    if call.integer("transBatchA", 0) or call.integer("transBatchB", 0):
        raise ModelError(f"{call.where}: transposed batch axes are not known here")
    alpha, trans_a, trans_b = call.real("alpha", 1.0), call.integer("transA", 0), call.integer("transB", 0)

    def run(a: Tensor, b: Tensor) -> Tensor:
        product = torch.matmul(a.mT if trans_a and a.ndim > 1 else a, b.mT if trans_b and b.ndim > 1 else b)
        return product if alpha == 1 else product * alpha

    return run


@operator("Einsum")
def einsum(call: Call) -> Kernel:
    """Sum of products named by an equation."""
    equation = call.text("equation", "")
    return lambda *xs: torch.einsum(equation, *xs)


def same_pads(sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int],
              lower: bool) -> list[tuple[int, int]]:  # fmt: skip
    """(begin, end) of each spatial axis for auto_pad SAME_UPPER or SAME_LOWER."""
    pads = []
    for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // s) - 1) * s + d * (k - 1) + 1 - size, 0)
        small = total // 2
        pads.append((total - small, small) if lower else (small, total - small))
    return pads


def pad_spatial(x: Tensor, pads: Sequence[tuple[int, int]], value: float = 0.0) -> Tensor:
    """Pad the last axes of x by (begin, end) each."""
    flat = [p for pair in reversed(pads) for p in pair]
    return functional.pad(x, flat, value=value) if any(flat) else x


def pairs(pads: Sequence[int] | None, rank: int) -> list[tuple[int, int]]:
    """The pads attribute (all begins, then all ends) as (begin, end) of each axis."""
    if pads is None:
        return [(0, 0)] * rank
    return list(zip(pads[:rank], pads[rank:], strict=True))


def spatial_rank(call: Call, index: int = 1) -> int:
    """Number of spatial axes, from the weight's shape or the attributes. Raises ModelError if nothing tells it."""
    value = call.node.inputs[index] if call.has(index) else None
    if value is not None and value.shape is not None:
        return len(value.shape) - 2
    found = call.constant(index)
    if found is not None:
        return found.ndim - 2
    for name, per_axis in (("kernel_shape", 1), ("strides", 1), ("dilations", 1), ("pads", 2)):
        given = call.integers(name)
        if given is not None:
            return len(given) // per_axis
    return -1


@operator("Conv")
def conv(call: Call) -> Kernel:
    """Convolution over 1 to 3 spatial axes, grouped, dilated, padded evenly or not."""
    group, auto = call.integer("group", 1), call.text("auto_pad", "NOTSET")
    given = (call.integers("strides"), call.integers("dilations"), call.integers("pads"))
    ready: dict[int, tuple[list[int], list[int], list[tuple[int, int]]]] = {}

    def settings(rank: int) -> tuple[list[int], list[int], list[tuple[int, int]]]:
        if rank not in ready:
            if rank not in _CONV:
                raise ModelError(f"{call.where}: 1 to 3 spatial axes are known here, but it has {rank}")
            strides, dilations = given[0] or [1] * rank, given[1] or [1] * rank
            ready[rank] = strides, dilations, pairs(given[2] if auto == "NOTSET" else None, rank)
        return ready[rank]

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        rank = w.ndim - 2
        strides, dilations, pads = settings(rank)
        if auto.startswith("SAME"):
            pads = same_pads(x.shape[2:], w.shape[2:], strides, dilations, auto == "SAME_LOWER")
        if all(low == high for low, high in pads):
            return _CONV[rank](x, w, b, strides, [low for low, _ in pads], dilations, group)
        return _CONV[rank](pad_spatial(x, pads), w, b, strides, 0, dilations, group)

    return run


@operator("ConvTranspose")
def conv_transpose(call: Call) -> Kernel:
    """Transposed convolution; pads cut the full result, output_padding and output_shape widen it."""
    group, auto = call.integer("group", 1), call.text("auto_pad", "NOTSET")
    given = [call.integers(n) for n in ("strides", "dilations", "pads", "output_padding", "output_shape")]

    def run(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
        rank = w.ndim - 2
        if rank not in _CONV_TRANSPOSE:
            raise ModelError(f"{call.where}: 1 to 3 spatial axes are known here, but it has {rank}")
        strides, dilations, extra = given[0] or [1] * rank, given[1] or [1] * rank, given[3] or [0] * rank
        pads = pairs(given[2] if auto == "NOTSET" else None, rank)
        full = [
            (size - 1) * s + d * (k - 1) + 1 + e
            for size, s, d, k, e in zip(x.shape[2:], strides, dilations, w.shape[2:], extra, strict=True)
        ]
        shape = given[4]
        if shape is not None or auto.startswith("SAME"):
            wanted = shape[-rank:] if shape else [n * s for n, s in zip(x.shape[2:], strides, strict=True)]
            pads = [_cut(f - n if shape else max(f - n, 0), auto) for f, n in zip(full, wanted, strict=True)]
        even = all(low == high >= 0 and e < max(s, d) for (low, high), e, s, d in
                   zip(pads, extra, strides, dilations, strict=True))  # fmt: skip
        if even:
            begins = [low for low, _ in pads]
            return _CONV_TRANSPOSE[rank](x, w, b, strides, begins, extra, group, dilations)
        y = _CONV_TRANSPOSE[rank](x, w, b, strides, 0, 0, group, dilations)
        y = pad_spatial(y, [(0, e) for e in extra])  # first, for it may be cut again
        y = pad_spatial(y, [(-low, -high) for low, high in pads])
        return y if b is None or not any(extra) else _bias_in_padding(y, b, full, pads, extra)

    return run


def _cut(total: int, auto: str) -> tuple[int, int]:
    """Split what must be cut off; the odd one at the end for SAME_UPPER, else at the beginning."""
    small = total // 2
    return (small, total - small) if auto == "SAME_UPPER" else (total - small, small)


def _bias_in_padding(
    y: Tensor, b: Tensor, full: Sequence[int], pads: Sequence[tuple[int, int]], extra: Sequence[int]
) -> Tensor:
    """Output padding holds the bias too: add it where functional.pad wrote zeros."""
    for axis, (size, (low, high), e) in enumerate(zip(full, pads, extra, strict=True)):
        written = size - e - low  # entries the product itself reaches
        missing = size - low - high - written
        if missing > 0:
            index = torch.arange(y.shape[axis + 2], device=y.device) >= written
            shape = [1] * y.ndim
            shape[axis + 2] = -1
            y = torch.where(index.reshape(shape), b.reshape(1, -1, *(1,) * (y.ndim - 2)).expand_as(y), y)
    return y
