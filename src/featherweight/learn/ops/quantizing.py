"""QuantizeLinear, DequantizeLinear and the integer products, with straight-through gradients.

Codes are held as floats of integer value, so that a gradient passes from a product back to what was quantized. What
is rounded passes its gradient unchanged where it is inside the range of the codes and none where it is cut off
(Bengio 2013, arXiv:1308.3432; the clipped form). A scale that is trained gets the gradient of Esser 2020 (LSQ,
arXiv:1902.08153): code - x / scale inside, the end of the range outside.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from featherweight.errors import ModelError
from featherweight.learn import _tensors
from featherweight.learn.ops.registry import Call, Kernel, operator

#: Elements from which a dot product's count may not fit into BLAS's integers.
_BLAS = 1 << 31
#: Types that a dot product does not round on its way.
_LONG = (torch.float32, torch.float64)


class RoundClip(torch.autograd.Function):
    """round(x) cut to low..high; the gradient passes where nothing was cut."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: Any, high: Any) -> Tensor:
        """Half rounds to even, as in the runtime."""
        rounded = torch.round(x)
        codes = rounded.clamp(low, high)
        ctx.save_for_backward(codes == rounded)
        return codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """The clipped straight-through estimate."""
        (inside,) = ctx.saved_tensors
        return torch.where(inside, grad, grad.new_zeros(())), None, None


class FakeQuantize(torch.autograd.Function):
    """(clip(round(x / scale) + zero) - zero) * scale in one step that keeps one byte an element for the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero: Any, low: Any, high: Any) -> Tensor:
        """`scale` and `zero` broadcast against x."""
        rounded = torch.div(x, scale).round_()
        low, high = low - zero, high - zero  # instead of adding the zero point to every element and taking it off
        wanted = ctx.needs_input_grad
        if not (wanted[0] or wanted[1]):
            return rounded.clamp_(low, high).mul_(scale)
        codes = rounded.clamp(low, high)
        ctx.inside = codes == rounded
        value = codes.mul_(scale)
        if wanted[1]:
            ctx.save_for_backward(x, value, scale)
        return value

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Clipped straight-through for x, LSQ for the scale."""
        to_x = torch.where(ctx.inside, grad, grad.new_zeros(())) if ctx.needs_input_grad[0] else None
        to_scale = None
        if ctx.needs_input_grad[1]:
            x, value, scale = ctx.saved_tensors
            # The sum of grad * (code - x / scale): by the values, so that no codes are made anew.
            apart = torch.where(ctx.inside, value - x, value)
            to_scale = summed_product(grad, apart, scale.shape) / scale
        return to_x, to_scale, None, None, None


def summed_product(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    """Products of two tensors of one shape, summed to one that broadcasts to it; not made where that is a number."""
    if shape.numel() == 1 and a.dtype == b.dtype and a.dtype in _LONG and a.numel() < _BLAS:
        pictures = a.ndim == 4 and all(t.is_contiguous(memory_format=torch.channels_last) for t in (a, b))
        one, other = (t.permute(0, 2, 3, 1) if pictures else t for t in (a, b))
        if one.is_contiguous() and other.is_contiguous():
            return torch.dot(one.view(-1), other.view(-1)).reshape(shape)
    return (a * b).sum_to_size(shape)


def round_clip(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """Rounded and cut to low..high; see `RoundClip`."""
    codes: Tensor = RoundClip.apply(x, low, high)  # type: ignore[no-untyped-call]
    return codes


def fake_quantize(x: Tensor, scale: Tensor, zero: Tensor | float, low: float, high: float) -> Tensor:
    """X rounded to the grid of scale and zero; see `FakeQuantize`."""
    result: Tensor = FakeQuantize.apply(x, scale, zero, low, high)  # type: ignore[no-untyped-call]
    return result


def along(parameter: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """Scales or zero points in a shape that broadcasts against x: per tensor, channel of `axis`, or block along it."""
    if parameter.numel() == 1:
        return parameter.reshape(())
    if block:
        wide = parameter.repeat_interleave(block, axis)
        return wide.narrow(axis, 0, x.shape[axis]) if wide.shape[axis] != x.shape[axis] else wide
    if parameter.ndim == 1:
        shape = [1] * x.ndim
        shape[axis] = -1
        return parameter.reshape(shape)
    return parameter


def code_range(call: Call) -> tuple[int, int] | None:
    """Range of the codes that a QuantizeLinear makes; None for float8."""
    named = call.integer("output_dtype", 0)
    zero = call.node.inputs[2] if call.has(2) else None
    kind = ir.DataType(named) if named else (zero.dtype if zero is not None else ir.DataType.UINT8)
    if kind is None:
        found = call.constant(2)
        signed = found is not None and found.dtype == torch.int8
        kind = ir.DataType.INT8 if signed else ir.DataType.UINT8
    return _tensors.RANGES.get(kind)


@operator("QuantizeLinear", gradient="straight-through")
def quantize_linear(call: Call) -> Kernel:
    """clip(round(x / scale) + zero) as floats of integer value."""
    axis, block, limits = call.integer("axis", 1), call.integer("block_size", 0), code_range(call)
    if limits is None:
        raise ModelError(f"{call.where}: codes of this type are not known here")
    low, high = limits

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        step = along(scale, x, axis % max(x.ndim, 1), block)
        if zero is None:
            return round_clip(x / step, low, high)
        offset = along(zero.to(step.dtype), x, axis % max(x.ndim, 1), block)
        # Rounded before the zero point is added, as in the runtime: half-way cases differ for an odd zero point.
        return round_clip(x / step, low - offset, high - offset) + offset

    return run


@operator("DequantizeLinear", gradient="straight-through")
@operator("DequantizeLinear", domain="com.microsoft", gradient="straight-through")
def dequantize_linear(call: Call) -> Kernel:
    """(code - zero) * scale."""
    axis, block = call.integer("axis", 1), call.integer("block_size", 0)

    def run(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        place = axis % max(codes.ndim, 1)
        value = codes.to(scale.dtype)
        if zero is not None:
            value = value - along(zero.to(scale.dtype), codes, place, block)
        return value * along(scale, codes, place, block)

    return run


def fused_quantize(quantize: Call) -> Kernel:
    """QuantizeLinear followed by DequantizeLinear with the same scale and zero point, as one kernel."""
    axis, block, limits = quantize.integer("axis", 1), quantize.integer("block_size", 0), code_range(quantize)
    if limits is None:
        raise ModelError(f"{quantize.where}: codes of this type are not known here")
    low, high = limits
    constant = quantize.constant(2)
    fixed = float(constant.item()) if constant is not None and constant.numel() == 1 else None

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        place = axis % max(x.ndim, 1)
        step = along(scale, x, place, block)
        if zero is None:
            return fake_quantize(x, step, 0.0, low, high)
        offset = fixed if fixed is not None else along(zero.to(step.dtype), x, place, block)
        return fake_quantize(x, step, offset, low, high)

    return run


@operator("DynamicQuantizeLinear", gradient="straight-through")
def dynamic_quantize(_call: Call) -> Kernel:
    """uint8 codes, scale and zero point from the range of x itself; the last two pass no gradient."""

    def run(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
            scale = (high - low) / 255
            scale = torch.where(scale == 0, torch.ones_like(scale), scale)
            zero = torch.round(-low / scale).clamp(0, 255)
        return round_clip(x / scale, -zero, 255 - zero) + zero, scale, zero

    return run


def _minus(codes: Tensor, zero: Tensor | None, shape: list[int] | None = None) -> Tensor:
    value = codes if codes.is_floating_point() else codes.float()
    if zero is None:
        return value
    offset = zero.to(value.dtype)
    return value - (offset.reshape(shape) if shape is not None and offset.numel() > 1 else offset)


def _rows(zero: Tensor | None) -> list[int] | None:
    return [-1, 1] if zero is not None and zero.ndim == 1 else None


@operator("MatMulInteger", gradient="straight-through")
def matmul_integer(_call: Call) -> Kernel:
    """(A - zero) (B - zero), summed in floats."""

    def run(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
        return torch.matmul(_minus(a, a_zero, _rows(a_zero)), _minus(b, b_zero))

    return run


def _requantized(value: Tensor, scale: Tensor, y_scale: Tensor, y_zero: Tensor, kind: ir.DataType | None) -> Tensor:
    """Products of codes -> codes of the output."""
    low, high = _tensors.RANGES[kind if kind in _tensors.RANGES else ir.DataType.UINT8]
    zero = y_zero.to(value.dtype)
    return round_clip(value * (scale / y_scale), low - zero, high - zero) + zero


def _type_of(call: Call, index: int) -> ir.DataType | None:
    value = call.node.inputs[index] if call.has(index) else None
    return None if value is None else value.dtype


@operator("QLinearMatMul", gradient="straight-through")
def qlinear_matmul(call: Call) -> Kernel:
    """Matrix product of codes, rescaled and rounded to codes."""
    kind = _type_of(call, 7)

    def run(a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor,
            y_scale: Tensor, y_zero: Tensor) -> Tensor:  # fmt: skip
        product = torch.matmul(_minus(a, a_zero, _rows(a_zero)), _minus(b, b_zero))
        scale = (a_scale.reshape(-1, 1) if a_scale.ndim == 1 and a_scale.numel() > 1 else a_scale) * b_scale
        return _requantized(product, scale, y_scale, y_zero, kind)

    return run


@operator("QLinearConv", gradient="straight-through")
def qlinear_conv(call: Call) -> Kernel:
    """Convolution of codes with a bias in units of both scales, rescaled and rounded to codes."""
    from featherweight.learn.ops.linear import conv

    inner, kind = conv(call), _type_of(call, 7)

    def run(x: Tensor, x_scale: Tensor, x_zero: Tensor, w: Tensor, w_scale: Tensor, w_zero: Tensor,
            y_scale: Tensor, y_zero: Tensor, b: Tensor | None = None) -> Tensor:  # fmt: skip
        bias = None if b is None else b.to(x_scale.dtype)
        product = inner(_minus(x, x_zero), _minus(w, w_zero, [-1, *(1,) * (w.ndim - 1)]), bias)
        scale = x_scale * (w_scale if w_scale.numel() == 1 else w_scale.reshape(-1, *(1,) * (w.ndim - 2)))
        return _requantized(product, scale, y_scale, y_zero, kind)

    return run


@operator("MatMulNBits", domain="com.microsoft")
def matmul_nbits(call: Call) -> Kernel:
    """X W' with W stored in blocks of 2, 4 or 8 bits along the columns; W itself is not trained."""
    bits, block = call.integer("bits", 4), call.integer("block_size", 32)
    n, k = call.integer("N", 0), call.integer("K", 0)
    packed, scale, zero = call.constant(1), call.constant(2), call.constant(3)
    if packed is None or scale is None or call.has(4) or bits not in (2, 4, 8) or (call.has(3) and zero is None):
        raise ModelError(f"{call.where}: only stored weights of 2, 4 or 8 bits in order are known here")
    blocks = -(-k // block)
    codes = _unpacked(packed.reshape(n, blocks, -1), bits)[..., :block].to(scale.dtype)
    middle = torch.full((n, blocks, 1), float(1 << (bits - 1)), dtype=scale.dtype)
    if zero is not None:
        zeros = zero if zero.is_floating_point() else _unpacked(zero.reshape(n, -1), bits)
        middle = zeros.reshape(n, -1)[:, :blocks, None].to(scale.dtype)
    weight = ((codes - middle) * scale.reshape(n, blocks, 1)).reshape(n, -1)[:, :k].contiguous()

    def run(x: Tensor, _w: Tensor, _s: Tensor, _z: Tensor | None = None, _g: None = None,
            bias: Tensor | None = None) -> Tensor:  # fmt: skip
        return torch.nn.functional.linear(x, weight.to(x.dtype), bias)

    return run


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Fields of each byte, lowest first, along the last axis."""
    shifts = torch.arange(0, 8, bits, dtype=torch.int32)
    fields = (packed.to(torch.int32)[..., None] >> shifts) & ((1 << bits) - 1)
    return fields.reshape(*packed.shape[:-1], -1)


@operator("ConvInteger", gradient="straight-through")
def conv_integer(call: Call) -> Kernel:
    """Convolution of codes less their zero points, summed in floats."""
    from featherweight.learn.ops.linear import conv

    inner = conv(call)

    def run(x: Tensor, w: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None) -> Tensor:
        shape = [-1, *(1,) * (w.ndim - 1)]
        result: Tensor = inner(_minus(x, x_zero), _minus(w, w_zero, shape))
        return result

    return run
