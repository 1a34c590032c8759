"""Resize and Upsample: nearest, linear and cubic, each axis on its own as a product with a small matrix.

Interpolation is linear in the image, so one axis is one matrix (output size, input size) made from the coordinates; it
is exact for every coordinate mode, and its gradient is its transpose. Where torch's own kernel computes the same, that
is used.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import ModelError
from featherweight.learn.ops.registry import Call, Kernel, ints, operator


def _source(x: float, scale: float, out: int, size: int, mode: str, roi: tuple[float, float]) -> float:
    """Coordinate in the input of output place x."""
    match mode:
        case "half_pixel":
            return (x + 0.5) / scale - 0.5
        case "pytorch_half_pixel":
            return (x + 0.5) / scale - 0.5 if out > 1 else 0.0
        case "half_pixel_symmetric":
            adjustment = out / (scale * size)
            return size / 2 * (1 - adjustment) + (x + 0.5) / scale - 0.5
        case "align_corners":
            return x * (size - 1) / (out - 1) if out > 1 else 0.0
        case "asymmetric":
            return x / scale
        case "tf_half_pixel_for_nn":
            return (x + 0.5) / scale
        case "tf_crop_and_resize":
            start, end = roi
            if out > 1:
                return start * (size - 1) + x * (end - start) * (size - 1) / (out - 1)
            return 0.5 * (start + end) * (size - 1)
        case _:
            raise ModelError(f"the coordinate mode {mode!r} of Resize is not known here")


def _nearest(x: float, mode: str) -> int:
    match mode:
        case "round_prefer_floor":
            return math.ceil(x - 0.5)
        case "round_prefer_ceil":
            return math.floor(x + 0.5)
        case "floor":
            return math.floor(x)
        case _:
            return math.ceil(x)


def _taps(x: float, interpolation: str, a: float, stretch: float) -> list[tuple[int, float]]:
    """(input place, weight) for one output; `stretch` > 1 widens the filter against aliasing."""
    support = (1.0 if interpolation == "linear" else 2.0) * stretch
    first, last = math.floor(x - support) + 1, math.ceil(x + support) - 1
    first, last = min(first, math.floor(x)), max(last, math.floor(x) + 1)
    weigh = _triangle if interpolation == "linear" else lambda d: _cubic(d, a)
    return [(i, weigh((i - x) / stretch)) for i in range(first, last + 1)]


def _triangle(d: float) -> float:
    return max(1.0 - abs(d), 0.0)


def _cubic(d: float, a: float) -> float:
    """Keys 1981, convolution interpolation."""
    d = abs(d)
    if d <= 1:
        return ((a + 2) * d - (a + 3)) * d * d + 1
    return (((d - 5) * d + 8) * d - 4) * a if d < 2 else 0.0


Settings = tuple[str, str, str, float, bool, float, bool]


@lru_cache(maxsize=256)
def _matrix(size: int, out: int, scale: float, roi: tuple[float, float], settings: Settings) -> tuple[Tensor, Tensor]:
    """(out, size) weights in float64, and which outputs lie outside (tf_crop_and_resize)."""
    interpolation, coordinates, rounding, a, exclude, _, antialias = settings
    matrix, outside = torch.zeros((out, size), dtype=torch.float64), torch.zeros(out, dtype=torch.bool)
    for x in range(out):
        place = _source(float(x), scale, out, size, coordinates, roi)
        if coordinates == "tf_crop_and_resize" and not 0 <= place <= size - 1:
            outside[x] = True
            continue
        if interpolation == "nearest":
            matrix[x, min(max(_nearest(place, rounding), 0), size - 1)] = 1.0
            continue
        stretch = max(1.0 / scale, 1.0) if antialias else 1.0
        taps = _taps(place, interpolation, a, stretch)
        if exclude or antialias:
            taps = [(i, w) for i, w in taps if 0 <= i < size] if exclude else taps
            total = sum(w for _, w in taps)
            taps = [(i, w / total) for i, w in taps]
        for i, weight in taps:
            matrix[x, min(max(i, 0), size - 1)] += weight
    return matrix, outside


def _along(x: Tensor, axis: int, matrix: Tensor, nearest: bool) -> Tensor:
    if nearest:
        return x.index_select(axis, matrix.argmax(1).to(x.device))
    moved = torch.matmul(x.movedim(axis, -1), matrix.to(dtype=x.dtype, device=x.device).t())
    return moved.movedim(-1, axis)


def resize(
    x: Tensor, sizes: Sequence[int], scales: Sequence[float], rois: Sequence[tuple[float, float]], settings: Settings
) -> Tensor:
    """X resized to `sizes`; `scales` are what coordinates are computed with, one an axis."""
    if _is_torch_nearest(x, sizes, scales, settings):
        return functional.interpolate(x, list(sizes[2:]), mode="nearest")
    kind = x.dtype
    value = x if x.is_floating_point() or settings[0] == "nearest" else x.float()
    for axis, (out, scale, roi) in enumerate(zip(sizes, scales, rois, strict=True)):
        if out == x.shape[axis] and scale == 1.0 and settings[1] != "tf_crop_and_resize":
            continue
        matrix, outside = _matrix(x.shape[axis], out, scale, roi, settings)
        value = _along(value, axis, matrix, settings[0] == "nearest")
        if bool(outside.any()):
            shape = [1] * value.ndim
            shape[axis] = out
            value = torch.where(outside.reshape(shape), torch.full_like(value, settings[5]), value)
    return value.to(kind)


def _is_torch_nearest(x: Tensor, sizes: Sequence[int], scales: Sequence[float], settings: Settings) -> bool:
    """Whole-number enlargement by the floor of asymmetric coordinates: the common upsampling, by torch's own kernel."""
    if settings[0] != "nearest" or not 3 <= x.ndim <= 5 or not x.is_floating_point():
        return False
    whole = all(s == int(s) and n == d * int(s) for s, n, d in zip(scales, sizes, x.shape, strict=True))
    exact = settings[1] == "asymmetric" and settings[2] == "floor"
    exact = exact or (settings[1] in ("half_pixel", "pytorch_half_pixel") and settings[2] == "round_prefer_floor"
                      and all(s == 1 or s % 2 == 0 for s in scales))  # fmt: skip
    return whole and exact and scales[0] == scales[1] == 1


def _settings(call: Call, coordinates: str) -> Settings:
    mode = call.text("mode", "nearest")
    if mode not in ("nearest", "linear", "cubic"):
        raise ModelError(f"{call.where}: the mode {mode!r} is not known here")
    return (
        mode, call.text("coordinate_transformation_mode", coordinates), call.text("nearest_mode", "round_prefer_floor"),
        call.real("cubic_coeff_a", -0.75), bool(call.integer("exclude_outside", 0)),
        call.real("extrapolation_value", 0.0), bool(call.integer("antialias", 0)),
    )  # fmt: skip


def _by_scales(x: Tensor, scales: Sequence[float], settings: Settings) -> Tensor:
    sizes = [math.floor(d * s) for d, s in zip(x.shape, scales, strict=True)]
    return resize(x, sizes, scales, [(0.0, 1.0)] * x.ndim, settings)


@operator("Upsample", since=7)
def upsample_attribute(call: Call) -> Kernel:
    """Scales as an attribute; asymmetric coordinates, floor."""
    scales, settings = [float(s) for s in call.attr("scales") or []], _old(call)
    return lambda x: _by_scales(x, scales, settings)


def _old(call: Call) -> Settings:
    """The one way that Upsample and the first Resize know."""
    mode = "linear" if call.text("mode", "nearest") in ("linear", "bilinear") else "nearest"
    return (mode, "asymmetric", "floor", -0.75, False, 0.0, False)


def _floats(tensor: Tensor) -> list[float]:
    return [float(v) for v in tensor.reshape(-1).tolist()]


@operator("Upsample", since=9)
@operator("Resize", since=10)
def upsample(call: Call) -> Kernel:
    """Scales as the second input; asymmetric coordinates, floor."""
    settings = _old(call)
    return lambda x, scales: _by_scales(x, _floats(scales), settings)


@operator("Resize", since=11)
def resize_inputs(call: Call) -> Kernel:
    """Scales or sizes as inputs, on all axes or (opset 18) those named, the aspect ratio kept if asked."""
    settings, axes = _settings(call, "half_pixel"), call.integers("axes")
    policy = call.text("keep_aspect_ratio_policy", "stretch")
    pick: Callable[[Sequence[float]], float] | None = {"not_larger": min, "not_smaller": max}.get(policy)

    def run(x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
        places = [a % x.ndim for a in axes] if axes is not None else list(range(x.ndim))
        factors, wanted = [1.0] * x.ndim, list(x.shape)
        rois = [(0.0, 1.0)] * x.ndim
        if roi is not None and roi.numel() == 2 * len(places) and settings[1] == "tf_crop_and_resize":
            bounds = _floats(roi)
            for i, axis in enumerate(places):
                rois[axis] = (bounds[i], bounds[i + len(places)])
        if sizes is not None and sizes.numel():
            given = ints(sizes)
            ratios = [n / x.shape[a] for n, a in zip(given, places, strict=True)]
            if pick is not None:
                ratio = pick(ratios)
                ratios = [ratio] * len(places)
                given = [math.floor(x.shape[a] * ratio + 0.5) for a in places]
            for axis, n, ratio in zip(places, given, ratios, strict=True):
                wanted[axis], factors[axis] = n, ratio
        elif scales is not None and scales.numel():
            for axis, factor, (start, end) in zip(places, _floats(scales), [rois[a] for a in places], strict=True):
                factors[axis] = factor
                wanted[axis] = math.floor(x.shape[axis] * (end - start) * factor)
        else:
            raise ModelError(f"{call.where} must be given scales or sizes")
        return resize(x, wanted, factors, rois, settings)

    return run
