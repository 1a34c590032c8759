"""Reductions, cumulative sums, sorting."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from featherweight.learn.ops.registry import Call, Kernel, ints, operator

Axes = tuple[int, ...]


def _product(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    for axis in sorted((a % x.ndim for a in axes), reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x


def _log_sum(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    return torch.log(x.sum(axes, keepdim=keep))


def _mean(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    return x.double().mean(axes, keepdim=keep).trunc().to(x.dtype)


def _norm(x: Tensor, axes: Axes, keep: bool) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, 2, axes, keepdim=keep)
    return norm


_REDUCE: dict[str, tuple[int, Callable[[Tensor, Axes, bool], Tensor]]] = {
    "ReduceSum": (13, lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype)),
    "ReduceMean": (18, _mean),
    "ReduceMax": (18, lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMin": (18, lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": (18, _product),
    "ReduceL1": (18, lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": (18, _norm),
    "ReduceSumSquare": (18, lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "ReduceLogSum": (18, _log_sum),
    "ReduceLogSumExp": (18, lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep)),
}


def _builder(function: Callable[[Tensor, Axes, bool], Tensor], attribute: bool) -> Callable[[Call], Kernel]:
    """Axes as an attribute, or as the second input; none means all, or nothing with `noop_with_empty_axes`."""

    def build(call: Call) -> Kernel:
        keep, noop = bool(call.integer("keepdims", 1)), bool(call.integer("noop_with_empty_axes", 0))
        fixed = call.integers("axes") if attribute else call.fixed_ints(1)

        def run(x: Tensor, given: Tensor | None = None) -> Tensor:
            axes = fixed if fixed is not None or given is None else ints(given)
            if not axes:
                if noop and not attribute:
                    return x
                axes = list(range(x.ndim))
            return function(x, tuple(axes), keep) if x.ndim else function(x.reshape(1), (0,), False)

        return run

    return build


for _name, (_since, _function) in _REDUCE.items():
    operator(_name)(_builder(_function, True))
    operator(_name, since=_since)(_builder(_function, False))


def _arg(name: str) -> Callable[[Call], Kernel]:
    def build(call: Call) -> Kernel:
        axis, keep, last = (
            call.integer("axis", 0),
            bool(call.integer("keepdims", 1)),
            call.integer("select_last_index", 0),
        )
        function = torch.argmax if name == "ArgMax" else torch.argmin

        def run(x: Tensor) -> Tensor:
            if last:
                return x.shape[axis] - 1 - function(x.flip(axis), axis, keepdim=keep)
            # Of equal values torch may give any; the first is where a running extreme is reached.
            best = x.amax(axis, keepdim=True) if name == "ArgMax" else x.amin(axis, keepdim=True)
            return (x == best).to(torch.uint8).argmax(axis, keepdim=keep)

        return run

    return build


for _name in ("ArgMax", "ArgMin"):
    operator(_name, gradient="none")(_arg(_name))


@operator("CumSum")
def cumulative_sum(call: Call) -> Kernel:
    """Running sum along an axis, from the end with `reverse`, without the element itself with `exclusive`."""
    exclusive, reverse = call.integer("exclusive", 0), call.integer("reverse", 0)

    def run(x: Tensor, axis: Tensor) -> Tensor:
        along = int(axis.reshape(()).item())
        y = x.flip(along) if reverse else x
        total = torch.cumsum(y, along, dtype=x.dtype)
        if exclusive:
            total = total - y
        return total.flip(along) if reverse else total

    return run


def _top(x: Tensor, k: int, axis: int, largest: bool, is_sorted: bool) -> tuple[Tensor, Tensor]:
    del is_sorted  # sorted is one of the allowed orders
    order = torch.argsort(x, dim=axis, descending=largest, stable=True).narrow(axis, 0, k)
    return torch.gather(x, axis, order), order


@operator("TopK")
def top_k_attribute(call: Call) -> Kernel:
    """K as an attribute, before opset 10."""
    k, axis = call.integer("k", 1), call.integer("axis", -1)
    return lambda x: _top(x, k, axis, True, True)


@operator("TopK", since=10)
def top_k(call: Call) -> Kernel:
    """The k greatest (or least) along an axis and their indices; of equals the lower index first."""
    axis, largest, is_sorted = (
        call.integer("axis", -1),
        bool(call.integer("largest", 1)),
        bool(call.integer("sorted", 1)),
    )
    return lambda x, k: _top(x, int(k.reshape(()).item()), axis, largest, is_sorted)


@operator("Det")
def determinant(_call: Call) -> Kernel:
    """Determinant of the last two axes."""
    return lambda x: torch.linalg.det(x)


@operator("Trilu")
def triangle(call: Call) -> Kernel:
    """Upper or lower triangle of the last two axes from diagonal k."""
    upper = call.integer("upper", 1)

    def run(x: Tensor, k: Tensor | None = None) -> Tensor:
        diagonal = 0 if k is None else int(k.reshape(()).item())
        return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)

    return run
