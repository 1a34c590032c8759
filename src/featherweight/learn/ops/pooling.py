"""Pooling: windows, global, with uneven pads, ceil_mode and count_include_pad."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import ModelError
from featherweight.learn.ops.linear import pad_spatial, pairs, same_pads
from featherweight.learn.ops.registry import Call, Kernel, operator

_MAX: dict[int, Callable[..., Tensor]] = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVERAGE: dict[int, Callable[..., Tensor]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}
Pads = list[tuple[int, int]]


class _Window:
    """Kernel, strides, dilations and the pads a given input size needs."""

    def __init__(self, call: Call) -> None:
        kernel = call.integers("kernel_shape")
        if kernel is None or not 1 <= len(kernel) <= 3:
            raise ModelError(f"{call.where}: windows over 1 to 3 axes are known here, but kernel_shape is {kernel}")
        self.rank, self.kernel = len(kernel), kernel
        self.strides = call.integers("strides") or [1] * self.rank
        self.dilations = call.integers("dilations") or [1] * self.rank
        self.auto = call.text("auto_pad", "NOTSET")
        self.ceil = bool(call.integer("ceil_mode", 0))
        self._pads = pairs(call.integers("pads") if self.auto == "NOTSET" else None, self.rank)

    def pads(self, sizes: Sequence[int]) -> tuple[Pads, Pads]:
        """Pads as the node says, and those with which plain windows give the same outputs (ceil_mode made explicit)."""
        if self.auto.startswith("SAME"):
            given = same_pads(sizes, self.kernel, self.strides, self.dilations, self.auto == "SAME_LOWER")
            return given, given
        if not self.ceil:
            return self._pads, self._pads
        wide = []
        for size, k, s, d, (low, high) in zip(
            sizes, self.kernel, self.strides, self.dilations, self._pads, strict=True
        ):
            reach = d * (k - 1) + 1
            count = -(-(size + low + high - reach) // s) + 1
            if (count - 1) * s >= size + low:  # a window must start inside the input or the begin pad
                count -= 1
            wide.append((low, max((count - 1) * s + reach - size - low, high)))
        return self._pads, wide


@operator("MaxPool")
def max_pool(call: Call) -> Kernel:
    """Greatest of each window; the second output holds flat indices."""
    window, column_major = _Window(call), call.integer("storage_order", 0)
    indices = call.n_outputs > 1
    if indices and column_major:
        raise ModelError(f"{call.where}: column-major indices are not known here")
    pool = _MAX[window.rank]

    def run(x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        kind = x.dtype
        values = x if x.is_floating_point() else x.float()
        _, pads = window.pads(x.shape[2:])
        plain = not indices and all(low == high <= k // 2 for (low, high), k in zip(pads, window.kernel, strict=True))
        if plain:
            begins = [low for low, _ in pads]
            return pool(values, window.kernel, window.strides, begins, window.dilations).to(kind)
        padded = pad_spatial(values, pads, -torch.inf)
        y, places = pool(padded, window.kernel, window.strides, 0, window.dilations, return_indices=True)
        return (y.to(kind), _in_input(places, x, padded, pads)) if indices else y.to(kind)

    return run


def _in_input(places: Tensor, x: Tensor, padded: Tensor, pads: Pads) -> Tensor:
    """Flat indices into one padded plane -> flat indices into all of the unpadded input."""
    left, total, stride = places, torch.zeros_like(places), 1
    for axis in reversed(range(x.ndim - 2)):
        size = padded.shape[axis + 2]
        total = total + (left % size - pads[axis][0]) * stride
        left, stride = left // size, stride * x.shape[axis + 2]
    plane = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1])
    return total + (plane * stride).reshape(*plane.shape, *(1,) * (x.ndim - 2))


@operator("AveragePool")
def average_pool(call: Call) -> Kernel:
    """Mean of each window; pads count where `count_include_pad` says so, what ceil_mode adds never does."""
    window, include = _Window(call), bool(call.integer("count_include_pad", 0))
    pool = _AVERAGE[window.rank]
    plain_dilation = all(d == 1 for d in window.dilations)

    def run(x: Tensor) -> Tensor:
        given, wide = window.pads(x.shape[2:])
        even = all(low == high <= k // 2 for (low, high), k in zip(given, window.kernel, strict=True))
        if plain_dilation and given == wide and even:
            begins = [low for low, _ in given]
            return pool(x, window.kernel, window.strides, begins, count_include_pad=include)
        counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
        extra = [(0, w[1] - g[1]) for g, w in zip(given, wide, strict=True)]
        counted = pad_spatial(counted, given, 1.0 if include else 0.0)
        share = _window_sum(pad_spatial(counted, extra), window)
        return _window_sum(pad_spatial(x, wide), window) / share

    return run


def _window_sum(x: Tensor, window: _Window) -> Tensor:
    """Sum of each window, dilated windows by strided slices."""
    if all(d == 1 for d in window.dilations):
        size = 1
        for k in window.kernel:
            size *= k
        return _AVERAGE[window.rank](x, window.kernel, window.strides) * size
    for axis, (k, s, d) in enumerate(zip(window.kernel, window.strides, window.dilations, strict=True)):
        reach = d * (k - 1) + 1
        x = x.unfold(axis + 2, reach, s)[..., ::d].sum(-1)
    return x


@operator("GlobalAveragePool")
def global_average_pool(_call: Call) -> Kernel:
    """Mean over all spatial axes, kept as 1."""
    return lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True) if x.ndim > 2 else x


@operator("GlobalMaxPool")
def global_max_pool(_call: Call) -> Kernel:
    """Greatest over all spatial axes, kept as 1."""

    def run(x: Tensor) -> Tensor:
        return x.flatten(2).amax(2).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))

    return run


@operator("LpPool")
def lp_pool(call: Call) -> Kernel:
    """p-norm of each window."""
    window, p = _Window(call), call.integer("p", 2)

    def run(x: Tensor) -> Tensor:
        _, pads = window.pads(x.shape[2:])
        return _window_sum(pad_spatial(x.abs().pow(p), pads), window).pow(1.0 / p)

    return run


@operator("GlobalLpPool")
def global_lp_pool(call: Call) -> Kernel:
    """p-norm over all spatial axes, kept as 1."""
    p = call.integer("p", 2)

    def run(x: Tensor) -> Tensor:
        total = x.abs().pow(p).flatten(2).sum(2).pow(1.0 / p)
        return total.reshape(*x.shape[:2], *(1,) * (x.ndim - 2))

    return run
