"""Ranges of 8-bit activations: the clipping that loses least at the consumers' outputs. Pure arithmetic.

Unsigned 8 bits, asymmetric, one scale a tensor. Zero is always a code (padding and Relu stay exact).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.stats import ValueStats

F32 = npt.NDArray[np.float32]

LEVELS = 255
SMALLEST_SCALE = 1e-30  # far above float32 subnormals, whose reciprocal overflows
SEARCH_VALUES = 1 << 15
SHRINKS = tuple(float(s) for s in np.linspace(1.0, 0.3, 36))
#: Output ranges that hold whatever calibration saw.
FIXED = {"Softmax": (0.0, 1.0), "Sigmoid": (0.0, 1.0), "HardSigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0)}


@dataclass(frozen=True)
class Grid:
    """u8 grid: value = (code - zero_point) * scale; `scale` is exact in float32 and > 0."""

    scale: float
    zero_point: int

    @property
    def low(self) -> float:
        """Least representable value."""
        return -self.zero_point * self.scale

    @property
    def high(self) -> float:
        """Greatest representable value."""
        return (LEVELS - self.zero_point) * self.scale

    def round(self, x: F32) -> F32:
        """X -> nearest representable values, float32, same shape."""
        scale, zero = np.float32(self.scale), np.float32(self.zero_point)
        code = np.rint(x / scale)
        code += zero
        np.clip(code, 0, LEVELS, out=code)
        code -= zero
        code *= scale
        rounded: F32 = code.astype(np.float32, copy=False)
        return rounded


def grid_of(low: float, high: float) -> Grid:
    """Range -> grid that holds it and zero; a range without width (or not finite) gives scale 1."""
    low, high = min(low, 0.0), max(high, 0.0)
    if not np.isfinite(high - low):
        raise ValueError(f"a range must be finite, but got [{low}, {high}]")
    scale = float(np.float32((high - low) / LEVELS))
    if scale < SMALLEST_SCALE:
        return Grid(1.0, 0)
    return Grid(scale, int(np.clip(np.rint(-low / scale), 0, LEVELS)))


def best_grid(
    stats: ValueStats,
    *,
    importance: F32 | None = None,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    clip: bool = True,
) -> Grid:
    """The grid with the least weighted squared error over the sampled rows of one activation.

    Args:
        importance: (channels,) >= 0, what a squared error in each channel costs at the consumers' outputs.
        bounds: of a folded Relu or Clip; the grid reaches no further.
        clip: False takes the whole observed range.
    """
    low, high = max(stats.low, bounds[0]), min(stats.high, bounds[1])
    low, high = min(low, 0.0), max(high, 0.0)
    full = grid_of(low, high)
    if not clip or stats.rows.size == 0 or high - low < SMALLEST_SCALE:
        return full
    rows, weight = _sample(stats.rows, importance)
    rows = np.clip(rows, low, high)
    best, best_error = full, _error(rows, weight, full)
    for shrink in SHRINKS[1:]:
        trial = grid_of(low * shrink, high * shrink)
        error = _error(rows, weight, trial)
        if error < best_error:
            best, best_error = trial, error
    if low < 0 < high:
        best, _ = _refine(rows, weight, best, best_error, (low, high))
    return best


def _refine(rows: F32, weight: F32 | None, best: Grid, error: float, limits: tuple[float, float]) -> tuple[Grid, float]:
    """Move each end alone: a long tail on one side only is clipped on that side only."""
    for _ in range(2):
        low, high = best.low, best.high
        trials: Iterable[Grid] = [
            *(grid_of(max(low * f, limits[0]), high) for f in (0.6, 0.8, 0.9, 1.1, 1.25, 1.6)),
            *(grid_of(low, min(high * f, limits[1])) for f in (0.6, 0.8, 0.9, 1.1, 1.25, 1.6)),
        ]
        for trial in trials:
            found = _error(rows, weight, trial)
            if found < error:
                best, error = trial, found
    return best, error


def _sample(rows: F32, importance: F32 | None) -> tuple[F32, F32 | None]:
    """At most SEARCH_VALUES values; importance of mean 1, or None where it does not fit the rows."""
    keep = max(1, SEARCH_VALUES // rows.shape[1])
    if len(rows) > keep:
        rows = rows[:: -(-len(rows) // keep)]
    if importance is None or importance.shape != (rows.shape[1],):
        return rows, None
    mean = float(importance.mean())
    if not (np.isfinite(mean) and mean > 0):
        return rows, None
    return rows, (importance / mean).astype(np.float32)


def _error(rows: F32, weight: F32 | None, grid: Grid) -> float:
    error = grid.round(rows)
    error -= rows
    np.square(error, out=error)
    by_channel = error.mean(axis=0)
    return float(by_channel.mean() if weight is None else (by_channel * weight).mean())
