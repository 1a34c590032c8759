"""Operators that draw random numbers: new ones at every call, from torch's generator, or a seed of their own."""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor

from featherweight.learn import _tensors
from featherweight.learn.ops.registry import Call, Kernel, operator


def _generator(call: Call) -> torch.Generator | None:
    seed = call.attr("seed")
    return None if seed is None else torch.Generator().manual_seed(hash(float(seed)) & 0xFFFFFFFF)


def _kind(call: Call, like: Tensor | None) -> torch.dtype:
    named = call.attr("dtype")
    if named is None:
        return torch.float32 if like is None else like.dtype
    return _tensors.held(ir.DataType(int(named)))


def _normal(call: Call) -> Kernel:
    mean, scale, generator = call.real("mean", 0.0), call.real("scale", 1.0), _generator(call)
    shape = call.integers("shape")

    def run(like: Tensor | None = None) -> Tensor:
        size = shape if like is None else list(like.shape)
        return (torch.randn(size or (), generator=generator) * scale + mean).to(_kind(call, like))

    return run


def _uniform(call: Call) -> Kernel:
    low, high, generator = call.real("low", 0.0), call.real("high", 1.0), _generator(call)
    shape = call.integers("shape")

    def run(like: Tensor | None = None) -> Tensor:
        size = shape if like is None else list(like.shape)
        return (torch.rand(size or (), generator=generator) * (high - low) + low).to(_kind(call, like))

    return run


operator("RandomNormal", "RandomNormalLike", gradient="none")(_normal)
operator("RandomUniform", "RandomUniformLike", gradient="none")(_uniform)


@operator("Bernoulli", gradient="none")
def bernoulli(call: Call) -> Kernel:
    """1 with the probability that the input is."""
    generator = _generator(call)
    return lambda p: torch.bernoulli(p, generator=generator).to(_kind(call, p))


@operator("Multinomial", gradient="none")
def multinomial(call: Call) -> Kernel:
    """Classes drawn by unnormalised log probabilities."""
    count, generator = call.integer("sample_size", 1), _generator(call)
    kind = _tensors.held(ir.DataType(call.integer("dtype", int(ir.DataType.INT32))))
    return lambda x: torch.multinomial(torch.softmax(x, -1), count, True, generator=generator).to(kind)
