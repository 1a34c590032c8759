"""Operators that act on each element alone, with broadcasting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import reduce

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.learn.ops.registry import Call, Gradient, Kernel, operator

_UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf,
    "Exp": torch.exp, "Log": torch.log, "Neg": torch.neg, "Reciprocal": torch.reciprocal, "Relu": torch.relu,
    "Sigmoid": torch.sigmoid, "Sin": torch.sin, "Sinh": torch.sinh,
    "Softplus": functional.softplus, "Softsign": functional.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh, "HardSwish": functional.hardswish,
    "Mish": functional.mish,
}  # fmt: skip
_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "Ceil": torch.ceil, "Floor": torch.floor, "Round": torch.round, "Sign": torch.sign, "Not": torch.logical_not,
    "IsNaN": torch.isnan, "BitwiseNot": torch.bitwise_not,
}  # fmt: skip
_BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"Add": torch.add, "Sub": torch.sub, "Mul": torch.mul}
_COMPARE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor, "Equal": torch.eq,
    "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip


def _plain(function: Callable[..., Tensor]) -> Callable[[Call], Kernel]:
    """An operator whose kernel is one torch function without attributes."""
    return lambda _call: function


def _register(table: Mapping[str, Callable[..., Tensor]], gradient: Gradient, since: int = 1) -> None:
    for name, function in table.items():
        operator(name, gradient=gradient, since=since)(_plain(function))


_register(_UNARY, "exact")
_register(_STEPS, "none")
_register(_COMPARE, "none")
_register(_BINARY, "exact", 7)


def _old_broadcast(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Call], Kernel]:
    """Before opset 7 the second operand was laid along `axis` of the first."""

    def build(call: Call) -> Kernel:
        axis = call.attr("axis")
        if not call.integer("broadcast", 0) or axis is None:
            return function

        def run(a: Tensor, b: Tensor) -> Tensor:
            after = a.ndim - (int(axis) % a.ndim) - b.ndim
            return function(a, b.reshape(*b.shape, *(1,) * after))

        return run

    return build


def _divide(a: Tensor, b: Tensor) -> Tensor:
    if a.is_floating_point() or b.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


_register({"Div": _divide}, "exact", 7)
for _name, _both in {**_BINARY, "Div": _divide}.items():
    operator(_name)(_old_broadcast(_both))


@operator("Pow")
def power(call: Call) -> Kernel:
    """X ** y in the type of x; a constant exponent is read once, which makes squares cheap."""
    exponent = call.constant(1)
    if exponent is not None and exponent.numel() == 1 and exponent.ndim <= 1:
        fixed = float(exponent.reshape(()).item())

        def squared(x: Tensor, _y: Tensor) -> Tensor:
            return x.pow(fixed) if x.is_floating_point() else x.pow(_y).to(x.dtype)

        return squared
    return lambda x, y: torch.pow(x, y).to(x.dtype)


@operator("Mod", gradient="none")
def modulo(call: Call) -> Kernel:
    """Remainder with the sign of the divisor, or of the dividend with `fmod`."""
    return torch.fmod if call.integer("fmod", 0) else torch.remainder


@operator("BitShift", gradient="none")
def bit_shift(call: Call) -> Kernel:
    """Unsigned shift by elements of the second input."""
    left = call.text("direction", "LEFT") == "LEFT"

    def run(x: Tensor, by: Tensor) -> Tensor:
        wide, count = x.long(), by.long()
        return ((wide << count) if left else (wide >> count)).to(x.dtype)

    return run


def _broadcast_fold(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Call], Kernel]:
    return lambda _call: lambda *xs: reduce(function, xs)


operator("Max")(_broadcast_fold(torch.maximum))
operator("Min")(_broadcast_fold(torch.minimum))
operator("Sum")(_broadcast_fold(torch.add))


@operator("Mean")
def mean(_call: Call) -> Kernel:
    """Mean of the inputs, broadcast."""
    return lambda *xs: reduce(torch.add, xs) / len(xs)


@operator("Where", since=9)
def where(_call: Call) -> Kernel:
    """Elements of the second input where the first is true, of the third elsewhere."""
    return torch.where


@operator("Clip")
def clip_attributes(call: Call) -> Kernel:
    """Limits as attributes, before opset 11."""
    low, high = call.real("min", -math.inf), call.real("max", math.inf)
    if math.isfinite(low) and math.isfinite(high) and low < high:
        return lambda x: functional.hardtanh(x, low, high)
    return lambda x: torch.clamp(x, low, high)


@operator("Clip", since=11)
def clip(call: Call) -> Kernel:
    """Limits as inputs, each optional; constant ones are read once."""
    fixed = [None if (c := call.constant(i)) is None else c.reshape(()).item() for i in (1, 2)]
    if all(fixed[i - 1] is not None or not call.has(i) for i in (1, 2)):
        low, high = fixed
        if low is None and high is None:
            return lambda x, *_: x
        if low == 0 and high is None:
            return lambda x, *_: torch.relu(x)
        if low is not None and high is not None and low > high:
            return lambda x, *_: torch.full_like(x, high)
        if low is not None and high is not None:
            # One fused kernel for the gradient, where clamp takes several.
            return lambda x, *_: functional.hardtanh(x, low, high) if x.is_floating_point() else x.clamp(low, high)
        return lambda x, *_: torch.clamp(x, low, high)

    def run(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
        x = x if low is None else torch.maximum(x, low.to(x.dtype))
        return x if high is None else torch.minimum(x, high.to(x.dtype))

    return run


@operator("LeakyRelu")
def leaky_relu(call: Call) -> Kernel:
    """max(x, 0) + alpha min(x, 0)."""
    alpha = call.real("alpha", 0.01)
    return lambda x: functional.leaky_relu(x, alpha)


@operator("PRelu")
def prelu(_call: Call) -> Kernel:
    """As LeakyRelu with a broadcast slope."""
    return lambda x, slope: torch.where(x < 0, x * slope, x)


@operator("Elu")
def elu(call: Call) -> Kernel:
    """Alpha (exp(x) - 1) below 0."""
    alpha = call.real("alpha", 1.0)
    return lambda x: functional.elu(x, alpha)


@operator("Celu")
def celu(call: Call) -> Kernel:
    """Alpha (exp(x / alpha) - 1) below 0."""
    alpha = call.real("alpha", 1.0)
    return lambda x: functional.celu(x, alpha)


@operator("Selu")
def selu(call: Call) -> Kernel:
    """Gamma (alpha (exp(x) - 1)) below 0, gamma x above."""
    alpha, gamma = call.real("alpha", 1.67326319217681884765625), call.real("gamma", 1.05070102214813232421875)
    return lambda x: gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


@operator("ThresholdedRelu")
def thresholded_relu(call: Call) -> Kernel:
    """X above alpha, 0 elsewhere."""
    alpha = call.real("alpha", 1.0)
    return lambda x: torch.where(x > alpha, x, torch.zeros_like(x))


@operator("HardSigmoid")
def hard_sigmoid(call: Call) -> Kernel:
    """Alpha x + beta, cut to 0..1."""
    alpha, beta = call.real("alpha", 0.2), call.real("beta", 0.5)
    return lambda x: torch.clamp(x * alpha + beta, 0.0, 1.0)


@operator("Shrink")
def shrink(call: Call) -> Kernel:
    """X + bias below -lambd, x - bias above lambd, 0 between."""
    lambd, bias = call.real("lambd", 0.5), call.real("bias", 0.0)

    def run(x: Tensor) -> Tensor:
        zero = torch.zeros_like(x)
        return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero))

    return run


@operator("Swish")
def swish(call: Call) -> Kernel:
    """X sigmoid(alpha x)."""
    alpha = call.real("alpha", 1.0)
    return functional.silu if alpha == 1.0 else lambda x: x * torch.sigmoid(alpha * x)


@operator("Gelu")
@operator("Gelu", domain="com.microsoft")
def gelu(call: Call) -> Kernel:
    """Gaussian error linear unit, exact or by tanh."""
    approximate = call.text("approximate", "none")
    return lambda x: functional.gelu(x, approximate=approximate)


@operator("FastGelu", domain="com.microsoft")
def fast_gelu(_call: Call) -> Kernel:
    """Gelu by tanh of x, or of x + bias."""

    def run(x: Tensor, bias: Tensor | None = None) -> Tensor:
        return functional.gelu(x if bias is None else x + bias, approximate="tanh")

    return run


@operator("BiasGelu", domain="com.microsoft")
def bias_gelu(_call: Call) -> Kernel:
    """Gelu of x + bias."""
    return lambda x, bias: functional.gelu(x + bias)


@operator("QuickGelu", domain="com.microsoft")
def quick_gelu(call: Call) -> Kernel:
    """X sigmoid(alpha x)."""
    alpha = call.real("alpha", 1.702)
    return lambda x: x * torch.sigmoid(alpha * x)


@operator("Identity")
def identity(_call: Call) -> Kernel:
    """The input."""
    return lambda x: x


@operator("Dropout")
def dropout(call: Call) -> Kernel:
    """The input: a graph is executed as at inference. The mask, where asked for, is all true."""
    if call.n_outputs < 2:
        return lambda x, *_: x
    return lambda x, *_: (x, torch.ones_like(x, dtype=torch.bool))


@operator("IsInf", gradient="none")
def is_inf(call: Call) -> Kernel:
    """Truth of being infinite, of the signs asked for."""
    negative, positive = call.integer("detect_negative", 1), call.integer("detect_positive", 1)

    def run(x: Tensor) -> Tensor:
        found = torch.isinf(x)
        if not negative:
            found = found & (x > 0)
        return found if positive else found & (x < 0)

    return run
