"""Reading and writing elements by index, and tensors made of nothing but indices."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from featherweight.errors import ModelError
from featherweight.learn import _tensors
from featherweight.learn.ops.registry import Call, Kernel, ints, operator


def _wrapped(index: Tensor, size: int) -> Tensor:
    """Negative indices counted from the end; as int64."""
    index = index.long()
    return torch.where(index < 0, index + size, index)


@operator("Gather")
def gather(call: Call) -> Kernel:
    """Slices along an axis; a table read by rows is an embedding."""
    axis = call.integer("axis", 0)
    fixed = call.constant(1)
    single = int(fixed.item()) if fixed is not None and fixed.ndim == 0 else None

    def run(x: Tensor, index: Tensor) -> Tensor:
        along = axis % x.ndim
        if single is not None:
            return x.select(along, single)
        index = _wrapped(index.to(x.device), x.shape[along])
        if along == 0 and x.ndim == 2 and x.is_floating_point():
            return functional.embedding(index, x)
        picked = x.index_select(along, index.reshape(-1))
        return picked.reshape(*x.shape[:along], *index.shape, *x.shape[along + 1 :])

    return run


@operator("GatherElements")
def gather_elements(call: Call) -> Kernel:
    """One element for each index, along an axis."""
    axis = call.integer("axis", 0)
    return lambda x, index: torch.gather(x, axis, _wrapped(index.to(x.device), x.shape[axis]))


@operator("GatherND")
def gather_nd(call: Call) -> Kernel:
    """Slices named by tuples of indices, in batches of `batch_dims` leading axes."""
    batch = call.integer("batch_dims", 0)

    def run(x: Tensor, index: Tensor) -> Tensor:
        depth = index.shape[-1]
        lead = x.shape[:batch]
        flat = x.reshape(-1, *x.shape[batch:])
        rows = index.to(x.device).reshape(flat.shape[0], -1, depth)
        parts = [torch.arange(flat.shape[0], device=x.device)[:, None].expand(rows.shape[:2])]
        parts += [_wrapped(rows[..., i], flat.shape[i + 1]) for i in range(depth)]
        picked = flat[tuple(parts)]
        return picked.reshape(*lead, *index.shape[batch:-1], *x.shape[batch + depth :])

    return run


_REDUCTIONS = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter")
def scatter_elements(call: Call) -> Kernel:
    """A copy with single elements replaced or combined along an axis."""
    axis, reduction = call.integer("axis", 0), call.text("reduction", "none")

    def run(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        index = _wrapped(index.to(x.device), x.shape[axis])
        if reduction == "none":
            return x.scatter(axis, index, updates)
        return x.scatter_reduce(axis, index, updates, _REDUCTIONS[reduction])

    return run


@operator("ScatterND")
def scatter_nd(call: Call) -> Kernel:
    """A copy with slices replaced, or added to."""
    reduction = call.text("reduction", "none")
    if reduction not in ("none", "add"):
        raise ModelError(f"{call.where}: reduction must be none or add here, but is {reduction!r}")

    def run(x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
        index = index.to(x.device)
        parts = tuple(_wrapped(index[..., i], x.shape[i]) for i in range(index.shape[-1]))
        return x.index_put(parts, updates, accumulate=reduction == "add")

    return run


@operator("OneHot", gradient="none")
def one_hot(call: Call) -> Kernel:
    """off/on values at the index along a new axis."""
    axis = call.integer("axis", -1)

    def run(index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
        n = int(depth.reshape(()).item())
        hot = _wrapped(index, n).unsqueeze(-1) == torch.arange(n, device=index.device)
        return torch.where(hot, values[1], values[0]).movedim(-1, axis)

    return run


@operator("NonZero", gradient="none")
def non_zero(_call: Call) -> Kernel:
    """Indices of what is not 0, one column an element."""
    return lambda x: torch.nonzero(x).t().contiguous() if x.ndim else torch.nonzero(x.reshape(1)).t()[:0]


@operator("Compress")
def compress(call: Call) -> Kernel:
    """Slices (or elements) where the condition holds."""
    axis = call.attr("axis")

    def run(x: Tensor, condition: Tensor) -> Tensor:
        kept = torch.nonzero(condition).reshape(-1)
        return x.reshape(-1).index_select(0, kept) if axis is None else x.index_select(int(axis), kept)

    return run


@operator("ReverseSequence")
def reverse_sequence(call: Call) -> Kernel:
    """The first entries along time of each sample in reverse."""
    batch, time = call.integer("batch_axis", 1), call.integer("time_axis", 0)

    def run(x: Tensor, lengths: Tensor) -> Tensor:
        steps = torch.arange(x.shape[time], device=x.device)
        count = lengths.to(x.device).long()[:, None]
        index = torch.where(steps < count, count - 1 - steps, steps)
        if batch > time:
            index = index.t()
        shape = [1] * x.ndim
        shape[batch], shape[time] = x.shape[batch], x.shape[time]
        return torch.gather(x, time, index.reshape(shape).expand(x.shape))

    return run


@operator("Constant", gradient="none")
def constant(call: Call) -> Kernel:
    """What the node holds."""
    import onnx_ir as ir

    found = next(((k, a) for k, a in call.node.attributes.items() if k.startswith("value")), None)
    if found is None or found[0] in ("value_string", "value_strings"):
        raise ModelError(f"{call.where} holds no numbers")
    name, attribute = found
    if name == "value":
        held = _tensors.from_ir(attribute.as_tensor())
    else:
        kind = ir.DataType.FLOAT if "float" in name else ir.DataType.INT64
        held = torch.tensor(attribute.value, dtype=_tensors.held(kind))
    return lambda: held


@operator("ConstantOfShape", gradient="none")
def constant_of_shape(call: Call) -> Kernel:
    """One value everywhere."""
    given = call.node.attributes.get("value")
    value = torch.zeros(1) if given is None else _tensors.from_ir(given.as_tensor())
    return lambda shape: value.reshape(()).expand(ints(shape)).clone()


@operator("Range", gradient="none")
def arange(_call: Call) -> Kernel:
    """start, start + delta... below limit."""
    return lambda start, limit, delta: torch.arange(
        start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device
    )


@operator("EyeLike", gradient="none")
def eye_like(call: Call) -> Kernel:
    """Ones on diagonal k of a matrix of the same shape."""
    import onnx_ir as ir

    k, dtype = call.integer("k", 0), call.attr("dtype")

    def run(x: Tensor) -> Tensor:
        kind = x.dtype if dtype is None else _tensors.held(ir.DataType(int(dtype)))
        rows = torch.arange(x.shape[0], device=x.device)[:, None]
        return (torch.arange(x.shape[1], device=x.device) - rows == k).to(kind)

    return run


@operator("Unique", gradient="none")
def unique(call: Call) -> Kernel:
    """Different values (or slices), with indices and counts."""
    axis, ordered, outputs = call.attr("axis"), call.integer("sorted", 1), call.n_outputs
    if not ordered:
        raise ModelError(f"{call.where}: the order of first appearance is not known here")

    def run(x: Tensor) -> tuple[Tensor, ...]:
        flat = x.reshape(-1) if axis is None else x
        along = 0 if axis is None else int(axis)
        values, inverse, counts = torch.unique(flat, return_inverse=True, return_counts=True, dim=along)
        first = torch.full((len(counts),), len(inverse), dtype=torch.long)
        first = first.scatter_reduce(0, inverse, torch.arange(len(inverse)), "amin")
        return (values, first, inverse, counts)[:outputs]

    return run
