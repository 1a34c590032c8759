"""Rows of a layer's input and output at drawn places: x (groups, n, k) and y (groups, n, out) of one batch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.stats import padding
from featherweight.stats.windows import Window

Array = npt.NDArray[np.generic]
F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Geometry:
    """How a layer reads its input. `role` as in graph.weights; `window`: of a convolution; `flip`: input transposed."""

    role: str
    groups: int
    window: Window | None = None
    flip: bool = False


def places(
    geometry: Geometry,
    y_shape: tuple[int, ...],
    limit: int,
    rng: np.random.Generator,
    mask: npt.NDArray[np.bool_] | None = None,
) -> I64:
    """Which places of the output to look at: positions of each sample for a convolution, else rows of the batch.

    `mask`: (batch, length), False where a text has ended; rows of such places are left out.
    """
    if geometry.window is not None:
        return _drawn(np.arange(int(np.prod(y_shape[2:]))), limit, rng)
    limit *= max(y_shape[0], 1) if len(y_shape) > 1 else 1
    real = padding.rows_shown(y_shape, mask) if geometry.role != "matmul_left" else None
    return _drawn(np.arange(_count(geometry, y_shape)) if real is None else real, limit, rng)


def _drawn(found: I64, limit: int, rng: np.random.Generator) -> I64:
    return found if len(found) <= limit else found[np.sort(rng.choice(len(found), limit, replace=False))]


def _count(geometry: Geometry, y_shape: tuple[int, ...]) -> int:
    axis = -2 if geometry.role == "matmul_left" else -1
    return int(np.prod(y_shape)) // max(y_shape[axis], 1)


def samples(geometry: Geometry, y_shape: tuple[int, ...], at: I64) -> I64:
    """Index of the sample (first axis) that each row belongs to, (n,)."""
    if geometry.window is not None:
        return np.repeat(np.arange(y_shape[0]), len(at))
    return at * y_shape[0] // max(_count(geometry, y_shape), 1)


def output_rows(geometry: Geometry, y: Array, at: I64) -> F32:
    """Output of one batch -> (groups, n, out)."""
    if geometry.window is not None:
        n, c = y.shape[:2]
        taken = y.reshape(n, geometry.groups, c // geometry.groups, -1)[..., at]
        return _f32(taken.transpose(1, 0, 3, 2).reshape(geometry.groups, n * len(at), c // geometry.groups))
    rows = np.swapaxes(y, -1, -2) if geometry.role == "matmul_left" else y
    return _f32(rows.reshape(-1, rows.shape[-1])[at])[None]


def input_rows(geometry: Geometry, x: Array, at: I64) -> F32:
    """Input of one batch -> (groups, n, k), k in the order of Weight.to_matrix. Padding reads 0."""
    if geometry.window is None:
        rows = np.swapaxes(x, -1, -2) if geometry.role == "matmul_left" or geometry.flip else x
        return _f32(rows.reshape(-1, rows.shape[-1])[at])[None]
    window, groups = geometry.window, geometry.groups
    n, c = x.shape[:2]
    sizes = x.shape[2:]
    outs = window.layout(sizes)[1]
    where = np.stack(np.unravel_index(at, outs), axis=1).astype(np.int64).reshape(-1, len(outs))
    sources = window.sources(sizes, where)
    p, k = sources.shape
    taken = x.reshape(n, c, -1)[:, :, np.maximum(sources, 0)].astype(np.float32, copy=False)
    if (sources < 0).any():
        taken = taken * (sources >= 0)
    grouped = taken.reshape(n, groups, c // groups, p, k)
    return _f32(grouped.transpose(1, 0, 3, 2, 4).reshape(groups, n * p, c // groups * k))


def _f32(a: Array) -> F32:
    return np.ascontiguousarray(a, dtype=np.float32)
