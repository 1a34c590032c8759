"""Operators that move elements or compute shapes: no arithmetic on values."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import ModelError
from featherweight.learn import _tensors
from featherweight.learn.ops.registry import Call, Kernel, ints, operator


@operator("Reshape")
def reshape_attribute(call: Call) -> Kernel:
    """Before opset 5 the shape is an attribute."""
    shape = call.integers("shape") or []
    return lambda x: x.reshape(_resolved(x, shape, False))


@operator("Reshape", since=5)
def reshape(call: Call) -> Kernel:
    """0 keeps an axis (unless `allowzero`), -1 takes what is left."""
    fixed, allow_zero = call.fixed_ints(1), bool(call.integer("allowzero", 0))

    def run(x: Tensor, shape: Tensor) -> Tensor:
        return x.reshape(_resolved(x, ints(shape) if fixed is None else fixed, allow_zero))

    return run


def _resolved(x: Tensor, shape: Sequence[int], allow_zero: bool) -> list[int]:
    if allow_zero or 0 not in shape:
        return list(shape)
    wanted = [x.shape[i] if d == 0 else d for i, d in enumerate(shape)]
    if 0 in wanted and -1 in wanted:  # torch cannot tell what -1 is of nothing; what the file says can
        known = math.prod(d for d in wanted if d != -1)
        wanted = [(0 if known == 0 else x.numel() // known) if d == -1 else d for d in wanted]
    return wanted


@operator("Flatten")
def flatten(call: Call) -> Kernel:
    """To a matrix, split before `axis`."""
    axis = call.integer("axis", 1)

    def run(x: Tensor) -> Tensor:
        first = axis % x.ndim if axis < 0 else axis
        return x.reshape(math.prod(x.shape[:first]), math.prod(x.shape[first:]))

    return run


@operator("Transpose")
def transpose(call: Call) -> Kernel:
    """Axes in the order of `perm`, reversed without it."""
    perm = call.integers("perm")
    return lambda x: x.permute(perm if perm is not None else tuple(reversed(range(x.ndim))))


def _axes_kernel(call: Call, apply: Callable[[Tensor, list[int] | None], Tensor], *, attribute: bool) -> Kernel:
    """A kernel whose axes are an attribute or the second input."""
    if attribute:
        axes = call.integers("axes")
        return lambda x: apply(x, axes)
    fixed = call.fixed_ints(1)
    if fixed is not None or not call.has(1):
        return lambda x, *_: apply(x, fixed)
    return lambda x, given: apply(x, ints(given))


def _squeeze(x: Tensor, axes: list[int] | None) -> Tensor:
    if axes is None:
        return x.squeeze()
    gone = {a % x.ndim for a in axes}
    if any(x.shape[a] != 1 for a in gone):
        raise ModelError(f"squeezed axes must be 1, but axes {axes} of {tuple(x.shape)} are not")
    return x.reshape([d for i, d in enumerate(x.shape) if i not in gone])


def _unsqueeze(x: Tensor, axes: list[int] | None) -> Tensor:
    rank = x.ndim + len(axes or ())
    for axis in sorted(a % rank for a in axes or ()):
        x = x.unsqueeze(axis)
    return x


def _with_axes(apply: Callable[[Tensor, list[int] | None], Tensor], attribute: bool) -> Callable[[Call], Kernel]:
    return lambda call: _axes_kernel(call, apply, attribute=attribute)


for _name, _apply in (("Squeeze", _squeeze), ("Unsqueeze", _unsqueeze)):
    operator(_name)(_with_axes(_apply, True))
    operator(_name, since=13)(_with_axes(_apply, False))


@operator("Concat")
def concat(call: Call) -> Kernel:
    """Along `axis`."""
    axis = call.integer("axis", 1)
    return lambda *xs: xs[0] if len(xs) == 1 else torch.cat(xs, axis)


def _split(x: Tensor, sizes: Sequence[int] | None, axis: int, parts: int) -> tuple[Tensor, ...]:
    if sizes is None:
        step = -(-x.shape[axis] // parts)
        sizes = [min(step, x.shape[axis] - i * step) for i in range(parts)]
    return tuple(torch.split(x, list(sizes), axis))


@operator("Split")
def split_attribute(call: Call) -> Kernel:
    """Sizes as an attribute, equal without it."""
    sizes, axis, parts = call.integers("split"), call.integer("axis", 0), len(call.node.outputs)
    return lambda x: _split(x, sizes, axis, parts)


@operator("Split", since=13)
def split(call: Call) -> Kernel:
    """Sizes as the second input, equal without it (the last may be short)."""
    axis, parts, fixed = call.integer("axis", 0), len(call.node.outputs), call.fixed_ints(1)
    if fixed is not None or not call.has(1):
        return lambda x, *_: _split(x, fixed, axis, parts)
    return lambda x, sizes: _split(x, ints(sizes), axis, parts)


def _bounds(start: int, end: int, step: int, size: int) -> range:
    """The places a slice takes. Unlike in Python, a start before the first element of a backward slice is that one."""
    start, end = start + (size if start < 0 else 0), end + (size if end < 0 else 0)
    if step > 0:
        return range(min(max(start, 0), size), min(max(end, 0), size), step)
    return range(min(max(start, 0), size - 1), min(max(end, -1), size - 1), step)


def _slice(x: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int], steps: Sequence[int]) -> Tensor:
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        axis %= x.ndim
        span = _bounds(start, end, step, x.shape[axis])
        if step == 1:
            x = x.narrow(axis, span.start, len(span))
        elif step > 0:
            x = x[(slice(None),) * axis + (slice(span.start, max(span.stop, span.start), step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(span), dtype=torch.long, device=x.device))
    return x


@operator("Slice")
def slice_attributes(call: Call) -> Kernel:
    """Bounds as attributes, before opset 10."""
    starts, ends = call.integers("starts") or [], call.integers("ends") or []
    axes = call.integers("axes") or list(range(len(starts)))
    return lambda x: _slice(x, starts, ends, axes, [1] * len(starts))


@operator("Slice", since=10)
def slice_inputs(call: Call) -> Kernel:
    """Bounds, axes and steps as inputs; constant ones are read once."""
    fixed = [call.fixed_ints(i) for i in range(5)]

    def run(x: Tensor, *given: Tensor | None) -> Tensor:
        bounds: list[list[int] | None] = []
        for i in range(1, 5):
            tensor = given[i - 1] if i - 1 < len(given) else None
            bounds.append(fixed[i] if fixed[i] is not None or tensor is None else ints(tensor))
        starts, ends = bounds[0] or [], bounds[1] or []
        axes = bounds[2] if bounds[2] is not None else list(range(len(starts)))
        return _slice(x, starts, ends, axes, bounds[3] or [1] * len(starts))

    return run


@operator("Expand")
def expand(call: Call) -> Kernel:
    """Broadcast to a shape, of which 1 keeps an axis."""
    fixed = call.fixed_ints(1)

    def run(x: Tensor, shape: Tensor) -> Tensor:
        target = ints(shape) if fixed is None else fixed
        return x.expand(np.broadcast_shapes(tuple(x.shape), tuple(target)))

    return run


@operator("Tile", since=6)
def tile(call: Call) -> Kernel:
    """Repeat along each axis."""
    fixed = call.fixed_ints(1)
    return lambda x, repeats: x.repeat(*(ints(repeats) if fixed is None else fixed)) if x.ndim else x


@operator("Shape", gradient="none")
def shape_of(call: Call) -> Kernel:
    """Sizes of the axes from `start` to `end`."""
    start, end = call.integer("start", 0), call.attr("end")
    return lambda x: torch.tensor(list(x.shape)[start : None if end is None else int(end)], dtype=torch.int64)


@operator("Size", gradient="none")
def size_of(_call: Call) -> Kernel:
    """Number of elements."""
    return lambda x: torch.tensor(x.numel(), dtype=torch.int64)


@operator("Cast")
def cast(call: Call) -> Kernel:
    """To another type. Codes that carry gradients stay floats until a float type is asked for."""
    import onnx_ir as ir

    to = ir.DataType(call.integer("to", 1))
    kind = _tensors.held(to)
    return lambda x: x.to(kind)


@operator("CastLike")
def cast_like(_call: Call) -> Kernel:
    """To the type of the second input."""
    return lambda x, like: x.to(like.dtype)


def space(x: Tensor, block: int) -> tuple[int, int, int, int]:
    """(batch, channels, height, width) of a 4-D tensor."""
    if x.ndim != 4 or block < 1:
        raise ModelError(f"blocks of space need a tensor of 4 axes and a block >= 1, but got {tuple(x.shape)}, {block}")
    return x.shape[0], x.shape[1], x.shape[2], x.shape[3]


@operator("DepthToSpace")
def depth_to_space(call: Call) -> Kernel:
    """Channels to blocks of pixels, depth or column first."""
    block, mode = call.integer("blocksize", 1), call.text("mode", "DCR")

    def run(x: Tensor) -> Tensor:
        if mode == "CRD":
            return functional.pixel_shuffle(x, block)
        n, c, h, w = space(x, block)
        parts = x.reshape(n, block, block, c // block**2, h, w).permute(0, 3, 4, 1, 5, 2)
        return parts.reshape(n, c // block**2, h * block, w * block)

    return run


@operator("SpaceToDepth")
def space_to_depth(call: Call) -> Kernel:
    """Blocks of pixels to channels."""
    block = call.integer("blocksize", 1)

    def run(x: Tensor) -> Tensor:
        n, c, h, w = space(x, block)
        parts = x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4)
        return parts.reshape(n, c * block**2, h // block, w // block)

    return run
