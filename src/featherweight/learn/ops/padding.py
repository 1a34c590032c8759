"""Padding in all modes, cropping included."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import ModelError
from featherweight.learn.ops.registry import Call, Kernel, ints, operator

Pairs = list[tuple[int, int]]


def _index(size: int, low: int, high: int, mode: str) -> list[int]:
    """Which element stands at each place of a padded axis."""
    places = range(-low, size + high)
    if mode == "edge":
        return [min(max(i, 0), size - 1) for i in places]
    if mode == "wrap":
        return [i % size for i in places]
    period = max(2 * (size - 1), 1)  # reflect: mirrored without repeating the border
    return [min(i % period, period - i % period) if size > 1 else 0 for i in places]


def pad(x: Tensor, pairs: Pairs, mode: str, value: float) -> Tensor:
    """(begin, end) for each axis of x; negative numbers crop."""
    if mode == "constant":
        flat = [p for pair in reversed(pairs) for p in pair]
        if x.dtype == torch.bool:
            return functional.pad(x.to(torch.uint8), flat, value=float(value)).bool()
        return functional.pad(x, flat, value=value)
    for axis, (low, high) in enumerate(pairs):
        cut = [(max(-p, 0)) for p in (low, high)]
        if any(cut):
            x = x.narrow(axis, cut[0], x.shape[axis] - sum(cut))
        low, high = max(low, 0), max(high, 0)
        if low or high:
            index = torch.tensor(_index(x.shape[axis], low, high, mode), device=x.device)
            x = x.index_select(axis, index)
    return x


def _pairs(call: Call, x: Tensor, pads: Sequence[int], axes: Sequence[int] | None) -> Pairs:
    found: Pairs = [(0, 0)] * x.ndim
    places = range(x.ndim) if axes is None else axes
    half = len(pads) // 2
    if half != len(list(places)):
        raise ModelError(f"{call.where}: pads must hold two numbers an axis, but has {len(pads)} for {x.ndim} axes")
    for axis, low, high in zip(places, pads[:half], pads[half:], strict=True):
        found[axis % x.ndim] = (low, high)
    return found


@operator("Pad")
def pad_attributes(call: Call) -> Kernel:
    """Pads as an attribute, before opset 11."""
    pads, mode = call.integers("pads") or call.integers("paddings") or [], call.text("mode", "constant")
    value = call.real("value", 0.0)
    return lambda x: pad(x, _pairs(call, x, pads, None), mode, value)


@operator("Pad", since=11)
def pad_inputs(call: Call) -> Kernel:
    """Pads, the value and (opset 18) axes as inputs; constant ones are read once."""
    mode, fixed, axes = call.text("mode", "constant"), call.fixed_ints(1), call.fixed_ints(3)
    constant = call.constant(2)
    known = 0.0 if not call.has(2) else (constant.item() if constant is not None and constant.numel() else None)
    if constant is not None and not constant.numel():
        known = 0.0

    def run(x: Tensor, pads: Tensor, value: Tensor | None = None, on: Tensor | None = None) -> Tensor:
        places = axes if axes is not None or on is None else ints(on)
        filler = known if known is not None or value is None else value.item()
        return pad(x, _pairs(call, x, ints(pads) if fixed is None else fixed, places), mode, filler or 0.0)

    return run
