"""Linear grids: the values a weight may take, and the search for each channel's or block's first scale.

All arrays are transposed, (groups, k, out), so that one reduction index is one contiguous row. A *span* is
the set of reduction indices that share one scale: all of them (per channel) or `block` neighbours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np
import numpy.typing as npt

from featherweight.errors import TechniqueError

F32 = npt.NDArray[np.float32]
I64 = npt.NDArray[np.int64]

#: Fractions of the range-covering scale that are tried. Below 8 bits clipping rare large weights pays.
RATIOS = {8: (1.0, 0.96, 0.92), 7: (1.0, 0.95, 0.9, 0.85), 6: (1.0, 0.95, 0.9, 0.85, 0.8)}
LOW_BIT_RATIOS = tuple(float(r) for r in np.linspace(1.0, 0.3, 22))
SMALLEST_SCALE = np.float32(1e-30)  # far from float32's subnormals, whose reciprocal overflows


@dataclass
class LinearGrid:
    """Values (code - zero) * scale with codes in low..high.

    `scale`, `zero` (g, spans, out); `span[i]` is the span of reduction index i. `mate[i]` is the index that
    shares a 16-bit accumulator with i (-1: none); then |code_i| + |code_mate| <= high. `fixed` (g, k, out)
    marks exact zeros, which stay exact.
    """

    scale: F32
    zero: F32
    low: int
    high: int
    span: I64
    mate: I64 | None = None
    fixed: npt.NDArray[np.bool_] | None = None

    def nearest(self, i: int, target: F32, codes: F32) -> tuple[F32, F32]:
        """Code and value nearest to `target` (g, out) at index i, given the `codes` chosen so far."""
        scale, zero = self.scale[:, self.span[i]], self.zero[:, self.span[i]]
        code = np.rint(target / scale)
        code += zero
        if self.mate is not None and self.mate[i] >= 0:
            room = self.high - np.abs(codes[:, self.mate[i]])
            code = np.clip(code, -room, room)
        else:
            np.clip(code, self.low, self.high, out=code)
        if self.fixed is not None:
            code = np.where(self.fixed[:, i], zero, code)
        return code, (code - zero) * scale

    def take_rows(self, keep: npt.NDArray[np.bool_], other: Self) -> None:
        """Take scale and zero of `other` for the rows (g, out) in `keep`."""
        self.scale = np.where(keep[:, None], other.scale, self.scale)
        self.zero = np.where(keep[:, None], other.zero, self.zero)

    def permuted(self, order: I64) -> Self:
        """The same grid for reduction indices taken in `order`."""
        mate = None
        if self.mate is not None:
            old = self.mate[order]
            mate = np.where(old >= 0, np.argsort(order)[old], -1)
        fixed = None if self.fixed is None else self.fixed[:, order]
        return replace(self, span=self.span[order], mate=mate, fixed=fixed)


def code_range(bits: int, *, pair_safe: bool = False) -> tuple[int, int]:
    """Lowest and highest code: 8 bits and pair-safe are symmetric, never -128; others use every code."""
    half = int(2 ** (bits - 1))
    return (1 - half if bits == 8 or pair_safe else -half), half - 1


def span_starts(k: int, block: int) -> I64:
    """First reduction index of each span; block 0 is one span for the whole channel."""
    return np.arange(0, k, block or max(k, 1))


def safe_scale(scale: npt.NDArray[np.floating]) -> F32:
    """Scales that are zero, near subnormal or not finite become 1 (their span is then all zeros)."""
    good = np.isfinite(scale) & (scale > SMALLEST_SCALE)
    return np.where(good, scale, np.float32(1)).astype(np.float32)


def covering_scale(w: F32, starts: I64, high: int) -> F32:
    """Largest magnitude over `high`: w (g, k, out) -> scale (g, spans, out); all-zero spans get 1."""
    return safe_scale(np.maximum.reduceat(np.abs(w), starts, axis=1) / np.float32(high))


def pair_scale(w: F32, pairs: I64, high: int) -> F32:
    """Per-channel scale (g, 1, out) at which the worst pair |w_a| + |w_b| fits in `high`; pairs (n, 2)."""
    size = np.abs(w)
    both = size[:, pairs[:, 0]] + size[:, pairs[:, 1]] if len(pairs) else size[:, :1]
    worst = np.maximum(both.max(axis=1, keepdims=True), size.max(axis=1, keepdims=True))
    return safe_scale(worst / np.float32(high))


def search(
    w: F32, importance: F32, *, bits: int, block: int, symmetric: bool, limits: tuple[int, int]
) -> tuple[F32, F32]:
    """Scale and zero point, each (g, spans, out) float32, of w (g, k, out) with importance (g, k) >= 0.

    Minimises sum_i importance_i (w_i - rounded_i)^2 of each span over a fixed list of clipping ratios; the
    whole range (ratio 1) is among them, so this is never worse than min/max scales. `limits`: lowest and
    highest code.
    """
    low, high = limits
    starts = span_starts(w.shape[1], block)
    lengths = np.diff(np.append(starts, w.shape[1]))
    base = covering_scale(w, starts, high)
    bottom = np.zeros_like(base)
    if not symmetric:
        bottom = np.minimum(np.minimum.reduceat(w, starts, axis=1), 0)
        base = safe_scale((np.maximum(np.maximum.reduceat(w, starts, axis=1), 0) - bottom) / (high - low))
    best_scale, best_zero = base, np.zeros_like(base)
    best: npt.NDArray[np.float64] | None = None
    for ratio in RATIOS.get(bits, LOW_BIT_RATIOS):
        scale = safe_scale(base * np.float32(ratio))
        zero = np.zeros_like(scale) if symmetric else np.clip(np.rint(low - bottom / scale), low, high)
        error = _span_errors(w, importance, scale, zero, lengths, limits)
        better = np.ones(error.shape, bool) if best is None else error < best
        best = error if best is None else np.where(better, error, best)
        best_scale, best_zero = np.where(better, scale, best_scale), np.where(better, zero, best_zero)
    return best_scale.astype(np.float32), best_zero.astype(np.float32)


def _span_errors(
    w: F32, importance: F32, scale: F32, zero: F32, lengths: I64, limits: tuple[int, int]
) -> npt.NDArray[np.float64]:
    """Weighted squared rounding error of each span, (g, spans, out)."""
    wide = scale if scale.shape[1] == 1 else np.repeat(scale, lengths, axis=1)
    shift = zero if zero.shape[1] == 1 else np.repeat(zero, lengths, axis=1)
    error = w / wide
    np.rint(error, out=error)
    error += shift
    np.clip(error, *limits, out=error)
    error -= shift
    error *= wide
    error -= w
    np.square(error, out=error)
    error *= importance[:, :, None]
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.asarray(np.add.reduceat(error, starts, axis=1, dtype=np.float64))


def first_grid(
    w: F32,
    importance: F32,
    *,
    bits: int,
    block: int = 0,
    symmetric: bool = True,
    scale: F32 | None = None,
    pairs: I64 | None = None,
) -> LinearGrid:
    """The grid before any compensation, in natural index order.

    `w` (g, k, out), `importance` (g, k). A given `scale` (g, out[, spans]) is used as it is; `pairs` (n, 2)
    are indices that must be pair-safe. Raises TechniqueError for a given scale of wrong shape or value.
    """
    k = w.shape[1]
    low, high = code_range(bits, pair_safe=pairs is not None)
    starts = span_starts(k, block)
    mate: I64 | None = None
    if pairs is not None and bits == 8:
        mate = np.full(k, -1, np.int64)
        mate[pairs[:, 0]], mate[pairs[:, 1]] = pairs[:, 1], pairs[:, 0]
    if scale is not None:
        first = _given(scale, (w.shape[0], len(starts), w.shape[2]))
        zero = np.zeros_like(first)
    elif mate is not None and pairs is not None:
        first = pair_scale(w, pairs, high)
        zero = np.zeros_like(first)
    else:
        limits = (low, high)
        first, zero = search(w, importance, bits=bits, block=block, symmetric=symmetric, limits=limits)
    zeros = w == 0
    span = np.searchsorted(starts, np.arange(k), side="right") - 1
    return LinearGrid(first, zero, low, high, span, mate, zeros if zeros.any() else None)


def _given(scale: F32, shape: tuple[int, int, int]) -> F32:
    """A caller's scale, transposed and checked."""
    wide = scale[..., None] if scale.ndim == 2 else scale
    first = np.ascontiguousarray(wide.transpose(0, 2, 1), dtype=np.float32)
    if first.shape != shape or not (np.isfinite(first) & (first > 0)).all():
        raise TechniqueError(
            f"scale must be finite, > 0 and of shape (groups, out[, blocks]) for {shape[1]} blocks, "
            f"but got shape {scale.shape} with smallest value {scale.min()}"
        )
    return first
