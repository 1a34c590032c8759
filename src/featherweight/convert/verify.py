"""The converted file against its source: the same inputs, at several sizes, output by output."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featherweight.convert import axes as fw_axes
from featherweight.errors import ModelError
from featherweight.runtime import ort

if TYPE_CHECKING:
    import torch

TOLERANCE = 1e-4
"""Largest difference of an output, on top of the same fraction of its largest magnitude (float32)."""
HALF_TOLERANCE = 1e-2
INTEGER_TOLERANCE = 1e-3
"""Fraction of integer outputs (a class map) that may flip through rounding."""
SEED = 0

Outputs = Sequence[tuple[str, "torch.Tensor"]]
Call = Callable[[Sequence["torch.Tensor"]], Outputs]
"""The source: tensors in the order of the inputs, to named outputs."""


class DifferentError(ModelError):
    """An output of the converted model is not the source's."""


@dataclass(frozen=True)
class Check:
    """What was compared: the largest absolute difference of a float output, where, and the sizes tried."""

    largest: float
    output: str
    sizes: tuple[Mapping[str, int], ...]
    shapes: Mapping[str, tuple[tuple[int, ...], ...]]
    """Of each output, at each of the sizes."""


def check(path: Path, call: Call, inputs: fw_axes.Named, axes: fw_axes.Axes, label: str) -> Check:
    """Run both on varied examples of each size. Raises DifferentError, RunError, ModelError if the source is random."""
    session = ort.session(path)
    largest, where = 0.0, ""
    tried = []
    shapes: dict[str, tuple[tuple[int, ...], ...]] = {}
    for number, sizes in enumerate(fw_axes.trial_sizes(fw_axes.sizes_of(inputs, axes))):
        tensors = _varied(fw_axes.resized(inputs, axes, sizes), seed=SEED + number)
        try:
            expected = call([t for _, t in tensors])
        except Exception:
            if not number or not sizes:
                raise
            continue  # the source takes no such size itself
        if not number:
            _check_repeats(expected, call([t for _, t in tensors]), label)
        feeds = {name: t.numpy() for name, t in tensors if name in {i.name for i in session.inputs}}
        found = session.run(feeds)
        for name, tensor in expected:
            difference = _difference(tensor.detach().numpy(), found.get(name), name, sizes, label)
            if difference >= largest:
                largest, where = difference, name
            shapes[name] = (*shapes.get(name, ()), tuple(tensor.shape))
        tried.append(sizes)
    return Check(largest, where, tuple(tried), shapes)


def _varied(inputs: fw_axes.Named, *, seed: int) -> list[tuple[str, torch.Tensor]]:
    """Other float values of the same scale: what was baked in from the examples would show."""
    import torch

    rng = torch.Generator().manual_seed(seed)
    return [
        (name, t * (1 + 0.1 * torch.randn(t.shape, generator=rng, dtype=t.dtype)) if t.is_floating_point() else t)
        for name, t in inputs
    ]


def _check_repeats(first: Outputs, second: Outputs, label: str) -> None:
    for (name, a), (_, b) in zip(first, second, strict=True):
        if a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all()):
            continue
        raise ModelError(
            f"{label} must give the same outputs for the same inputs, but {name!r} changes from call to call; remove "
            "the randomness (dropout that ignores eval mode?) or the state it keeps"
        )


def _difference(
    expected: npt.NDArray[Any], found: npt.NDArray[Any] | None, name: str, sizes: Mapping[str, int], label: str
) -> float:
    at = f" at {', '.join(f'{k} {v}' for k, v in sizes.items())}" if sizes else ""
    if found is None:
        raise DifferentError(f"the ONNX model of {label} lacks the output {name!r}")
    if expected.shape != found.shape:
        raise DifferentError(
            f"output {name!r} of the ONNX model has the shape {found.shape}{at}, but {label} gives {expected.shape}"
        )
    if expected.size == 0:
        return 0.0
    if expected.dtype.kind not in "fc":
        flipped = float(np.mean(expected != found))
        if flipped > INTEGER_TOLERANCE:
            raise DifferentError(
                f"output {name!r} of the ONNX model differs from {label} in {flipped:.1%} of values{at}"
            )
        return 0.0
    a, b = expected.astype(np.float64), found.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    gap = float(np.max(np.where(same, 0.0, np.abs(np.where(same, 0, a) - np.where(same, 0, b)))))
    tolerance = HALF_TOLERANCE if expected.dtype.itemsize < 4 else TOLERANCE
    allowed = tolerance * (1 + float(np.max(np.abs(a[np.isfinite(a)]), initial=0.0)))
    if not gap <= allowed:
        raise DifferentError(
            f"output {name!r} of the ONNX model differs from {label} by {gap:.3g}{at}, but at most {allowed:.1g} is "
            "allowed; the exporter wrote something else than the source computes"
        )
    return gap
