"""Which axes of the inputs stay open, and examples of other sizes along them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from featherweight.errors import DataError

if TYPE_CHECKING:
    import torch

Axes = dict[str, dict[int, str]]
"""Name of an input to its open axes, each with the name of its size."""
Named = Sequence[tuple[str, "torch.Tensor"]]
BATCH, SEQUENCE = "batch", "sequence"


def open_axes(inputs: Named, dynamic: Any) -> Axes:
    """The axes to leave open.

    `dynamic`: None guesses (below), False leaves none open, else {input: {axis: name}} or {input: [axis, ...]}.
    Guess: the first axis is the batch in all inputs that share its size with the first input; the second axis of token
    ids, masks and series (rank 2 of integers or truth values, rank 3) is the sequence; the same sizes elsewhere in
    truth values and masks of rank 2 follow it. An axis that the module computes with as a number closes again later.
    Raises DataError for an input or an axis that is not there.
    """
    if dynamic is False:
        return {name: {} for name, _ in inputs}
    if dynamic is not None:
        return _given(inputs, dynamic)
    ranked = [t for _, t in inputs if t.dim()]
    if not ranked:
        return {name: {} for name, _ in inputs}
    batch = ranked[0].shape[0]
    length = next((t.shape[1] for t in ranked if _is_series(t) and t.shape[0] == batch), None)
    found: Axes = {}
    for name, tensor in inputs:
        axes: dict[int, str] = {}
        if tensor.dim() and tensor.shape[0] == batch:
            axes[0] = BATCH
            if _is_series(tensor):
                axes[1] = SEQUENCE
        elif tensor.dim() == 2 and length is not None and tuple(tensor.shape) == (length, length):
            axes = {0: SEQUENCE, 1: SEQUENCE}
        found[name] = axes
    return found


def _is_series(tensor: torch.Tensor) -> bool:
    return (tensor.dim() == 2 and not tensor.is_floating_point()) or tensor.dim() == 3


def _given(inputs: Named, dynamic: Mapping[str, Any]) -> Axes:
    known = dict(inputs)
    found: Axes = {name: {} for name in known}
    for name, axes in dynamic.items():
        if name not in known:
            raise DataError(f"dynamic names the input {name!r}, but the inputs are {', '.join(known)}")
        named = dict(axes) if isinstance(axes, Mapping) else {a: (BATCH if a == 0 else f"{name}_{a}") for a in axes}
        for axis, label in named.items():
            if not isinstance(axis, int) or not 0 <= axis < known[name].dim():
                raise DataError(f"dynamic opens axis {axis!r} of {name!r}, which has axes 0 to {known[name].dim() - 1}")
            found[name][axis] = str(label)
    sizes: dict[str, int] = {}
    for name, tensor in inputs:
        for axis, label in found[name].items():
            if sizes.setdefault(label, tensor.shape[axis]) != tensor.shape[axis]:
                raise DataError(
                    f"dynamic calls two axes {label!r} whose examples have the sizes {sizes[label]} and "
                    f"{tensor.shape[axis]}; name them apart, or give examples of one size"
                )
    return found


def sizes_of(inputs: Named, axes: Axes) -> dict[str, int]:
    """The size behind each axis name."""
    return {label: t.shape[axis] for name, t in inputs for axis, label in axes[name].items()}


def resized(inputs: Named, axes: Axes, sizes: Mapping[str, int]) -> list[tuple[str, torch.Tensor]]:
    """The examples cut or repeated to other sizes, so that ids, masks and offsets keep sensible values."""
    import torch

    made = []
    for name, tensor in inputs:
        for axis, label in axes[name].items():
            size, now = sizes.get(label, tensor.shape[axis]), tensor.shape[axis]
            if size > now > 0:
                tensor = torch.cat([tensor] * -(-size // now), dim=axis)
            if size != tensor.shape[axis]:
                tensor = tensor.narrow(axis, 0, size)
        made.append((name, tensor.contiguous()))
    return made


def tracing_sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    """Sizes to trace with: at least 2, as PyTorch takes the sizes 0 and 1 for constants."""
    return {label: max(size, 2) for label, size in sizes.items()}


def trial_sizes(sizes: Mapping[str, int]) -> list[dict[str, int]]:
    """Sizes to check with: batch 1 and 3, other axes as given and about half as long. One trial where none is open."""
    if not sizes:
        return [{}]
    first = {label: 1 if label == BATCH else size for label, size in sizes.items()}
    second = {label: 3 if label == BATCH else _other(size) for label, size in sizes.items()}
    return [first, second]


def _other(size: int) -> int:
    return size + 1 if size < 3 else size // 2 + 1
