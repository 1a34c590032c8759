"""Normalisations and softmax. Statistics are those of the graph: training mode of an operator is not executed."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import ModelError
from featherweight.learn.ops.registry import Call, Kernel, operator


@operator("BatchNormalization")
def batch_norm(call: Call) -> Kernel:
    """(x - mean) / sqrt(var + epsilon) * scale + bias with the stored statistics."""
    epsilon = call.real("epsilon", 1e-5)
    if call.integer("training_mode", 0):
        raise ModelError(f"{call.where}: training_mode is not executed; export the model for inference")
    spatial = call.integer("spatial", 1)
    if not spatial:
        raise ModelError(f"{call.where}: statistics for each position (spatial=0) are not known here")

    def run(x: Tensor, scale: Tensor, bias: Tensor, average: Tensor, variance: Tensor) -> Tensor:
        same = scale.dtype == x.dtype == average.dtype and not (average.requires_grad or variance.requires_grad)
        if same and x.ndim > 1:
            return functional.batch_norm(x, average, variance, scale, bias, False, 0.0, epsilon)
        shape = (1, -1, *(1,) * (x.ndim - 2))
        factor = scale / torch.sqrt(variance + epsilon)
        y = x * factor.reshape(shape) + (bias - average * factor).reshape(shape)
        return y.to(x.dtype)

    return run


@operator("InstanceNormalization")
def instance_norm(call: Call) -> Kernel:
    """Each channel of each sample over its spatial axes."""
    epsilon = call.real("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        shape = (1, -1, *(1,) * (x.ndim - 2))
        axes = tuple(range(2, x.ndim))
        centred = x - x.mean(axes, keepdim=True)
        variance = centred.square().mean(axes, keepdim=True)
        return centred * torch.rsqrt(variance + epsilon) * scale.reshape(shape) + bias.reshape(shape)

    return run


@operator("GroupNormalization", since=18)
def group_norm_grouped(call: Call) -> Kernel:
    """Groups of channels; scale and bias one a group (opset 18)."""
    groups, epsilon = call.integer("num_groups", 1), call.real("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        repeat = x.shape[1] // groups
        return functional.group_norm(
            x, groups, scale.repeat_interleave(repeat), bias.repeat_interleave(repeat), epsilon
        )

    return run


@operator("GroupNormalization", since=21)
def group_norm(call: Call) -> Kernel:
    """Groups of channels; scale and bias one a channel."""
    groups, epsilon = call.integer("num_groups", 1), call.real("epsilon", 1e-5)
    return lambda x, scale, bias: functional.group_norm(x, groups, scale, bias, epsilon)


@operator("LayerNormalization")
def layer_norm(call: Call) -> Kernel:
    """Over all axes from `axis` on; mean and 1 / deviation where they are asked for."""
    axis, epsilon, outputs = call.integer("axis", -1), call.real("epsilon", 1e-5), call.n_outputs

    def run(x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        first = axis % x.ndim
        shape = list(x.shape[first:])
        if list(scale.shape) == shape and (bias is None or list(bias.shape) == shape):
            y = functional.layer_norm(x, shape, scale, bias, epsilon)
        else:  # scale and bias may broadcast
            y = functional.layer_norm(x, shape, None, None, epsilon) * scale
            y = y if bias is None else y + bias
        if outputs == 1:
            return y
        axes = tuple(range(first, x.ndim))
        average = x.mean(axes, keepdim=True)
        spread = torch.rsqrt((x - average).square().mean(axes, keepdim=True) + epsilon)
        return (y, average, spread)[:outputs]

    return run


@operator("RMSNormalization")
@operator("SimplifiedLayerNormalization")
def rms_norm(call: Call) -> Kernel:
    """X / sqrt(mean(x^2) + epsilon) * scale over all axes from `axis` on."""
    axis, epsilon = call.integer("axis", -1), call.real("epsilon", 1e-5)

    def run(x: Tensor, scale: Tensor) -> Tensor:
        axes = tuple(range(axis % x.ndim, x.ndim))
        return x * torch.rsqrt(x.square().mean(axes, keepdim=True) + epsilon) * scale

    return run


@operator("SkipLayerNormalization", domain="com.microsoft")
def skip_layer_norm(call: Call) -> Kernel:
    """LayerNormalization of x + skip + bias over the last axis."""
    epsilon = call.real("epsilon", 1e-12)
    if call.n_outputs > 1:
        raise ModelError(f"{call.where}: only its first output is known here")

    def run(x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        total = x + skip if bias is None else x + skip + bias
        return functional.layer_norm(total, total.shape[-1:], gamma, beta, epsilon)

    return run


@operator("LpNormalization")
def lp_normalization(call: Call) -> Kernel:
    """X over its 1- or 2-norm along one axis; 0 where that is 0."""
    axis, p = call.integer("axis", -1), call.integer("p", 2)

    def run(x: Tensor) -> Tensor:
        norm = torch.linalg.vector_norm(x, p, axis, keepdim=True)
        return torch.where(norm == 0, torch.zeros_like(x), x / torch.where(norm == 0, torch.ones_like(norm), norm))

    return run


@operator("MeanVarianceNormalization")
def mean_variance_norm(call: Call) -> Kernel:
    """(x - mean) / deviation over `axes`."""
    axes = tuple(call.integers("axes") or (0, 2, 3))

    def run(x: Tensor) -> Tensor:
        centred = x - x.mean(axes, keepdim=True)
        return centred / (centred.square().mean(axes, keepdim=True).sqrt() + 1e-9)

    return run


@operator("LRN")
def local_response(call: Call) -> Kernel:
    """X / (bias + alpha / size * sum of squares over near channels) ^ beta."""
    size, alpha = call.integer("size", 1), call.real("alpha", 1e-4)
    beta, bias = call.real("beta", 0.75), call.real("bias", 1.0)
    low, high = (size - 1) // 2, math.ceil((size - 1) / 2)

    def run(x: Tensor) -> Tensor:
        square = functional.pad(x.square().transpose(1, -1), (low, high)).unfold(-1, size, 1).sum(-1).transpose(1, -1)
        return x / (bias + alpha / size * square).pow(beta)

    return run


def _flattened(call: Call, log: bool) -> Kernel:
    axis = call.integer("axis", 1)

    def run(x: Tensor) -> Tensor:
        first = axis if axis < 0 else min(axis, x.ndim)
        matrix = x.reshape(*x.shape[:first], -1) if first != x.ndim else x.unsqueeze(-1)
        y = torch.log_softmax(matrix, -1) if log else torch.softmax(matrix, -1)
        return y.reshape(x.shape)

    return run


@operator("Softmax")
def softmax_flat(call: Call) -> Kernel:
    """Before opset 13: over all axes from `axis` on, seen as one."""
    return _flattened(call, False)


@operator("Softmax", since=13)
def softmax(call: Call) -> Kernel:
    """Over one axis."""
    axis = call.integer("axis", -1)
    return lambda x: torch.softmax(x, axis)


@operator("LogSoftmax")
def log_softmax_flat(call: Call) -> Kernel:
    """Before opset 13: over all axes from `axis` on, seen as one."""
    return _flattened(call, True)


@operator("LogSoftmax", since=13)
def log_softmax(call: Call) -> Kernel:
    """Over one axis."""
    axis = call.integer("axis", -1)
    return lambda x: torch.log_softmax(x, axis)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


@operator("Hardmax", gradient="none")
def hardmax_flat(call: Call) -> Kernel:
    """Before opset 13: 1 at the first greatest over all axes from `axis` on."""
    axis = call.integer("axis", 1)
    return lambda x: _hardmax(x.reshape(*x.shape[: axis % x.ndim], -1), -1).reshape(x.shape)


@operator("Hardmax", since=13, gradient="none")
def hardmax(call: Call) -> Kernel:
    """1 at the first greatest of one axis, 0 elsewhere."""
    axis = call.integer("axis", -1)
    return lambda x: _hardmax(x, axis)
