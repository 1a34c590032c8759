"""What is remembered of one activation: extremes, channel extremes and means, a histogram, a sample of rows."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from featherweight.stats.accumulate import F32, F64, Histogram, Reservoir

SAMPLE_VALUES = 1 << 17  # values kept of each activation
LEAST_ROWS, MOST_ROWS = 128, 2048
POSITIONS = 48  # rows of each sample that are offered to histogram and reservoir


@dataclass
class ValueSummary:
    """Running summary of one activation. `axis` is its channel axis (1 or -1); rows are all other axes.

    `row_span`: largest quotient, inside one batch, of the greatest |x| of two samples that are not all zero.
    """

    axis: int
    low: float = np.inf
    high: float = -np.inf
    finite: bool = True
    row_span: float = 1.0
    count: int = 0
    channel_low: F32 | None = None
    channel_high: F32 | None = None
    channel_sum: F64 | None = None
    shape: tuple[int, ...] = ()
    histogram: Histogram = field(default_factory=Histogram)
    reservoir: Reservoir | None = None

    def add(
        self, x: npt.NDArray[np.floating], rng: np.random.Generator, real: npt.NDArray[np.int64] | None = None
    ) -> None:
        """Add one batch of values (any shape).

        `real`: of the rows of all samples in turn those that are no padding, None for all. `row_span` counts all, as
        the runtime does when it sets a scale.
        """
        self.shape = tuple(x.shape)
        if not x.size:
            return
        rows = as_rows(x, self.axis)
        self._span(rows, x)
        if real is not None:
            rows = rows.reshape(1, -1, rows.shape[2])[:, real]
        low, high = rows.min(axis=(0, 1)), rows.max(axis=(0, 1))
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            self.finite = False
            rows = np.where(np.isfinite(rows), rows, np.float32(0))
            low, high = rows.min(axis=(0, 1)), rows.max(axis=(0, 1))
        self.low, self.high = min(self.low, float(low.min())), max(self.high, float(high.max()))
        self._channels(rows, low, high)
        _, p, c = rows.shape
        most = POSITIONS if real is None else POSITIONS * x.shape[0]
        if p > most:
            rows = rows[:, np.sort(rng.choice(p, most, replace=False))]
        sample = np.ascontiguousarray(rows.reshape(-1, c), dtype=np.float32)
        self.histogram.add(sample)
        if self.reservoir is None:
            self.reservoir = Reservoir(min(max(SAMPLE_VALUES // c, LEAST_ROWS), MOST_ROWS), c)
        if self.reservoir.channels == c:
            self.reservoir.add(sample, rng)

    def _span(self, rows: F32, x: npt.NDArray[np.floating]) -> None:
        if x.ndim < 2 or x.shape[0] < 2:
            return
        tops = np.abs(rows).max(axis=(1, 2))
        tops = tops[np.isfinite(tops) & (tops > 0)]
        if tops.size:
            self.row_span = max(self.row_span, float(tops.max() / tops.min()))

    def _channels(self, rows: F32, low: F32, high: F32) -> None:
        total = rows.sum(axis=(0, 1), dtype=np.float32 if rows.shape[1] < 1 << 16 else np.float64)
        if self.channel_sum is None or self.channel_low is None or self.channel_high is None:
            self.channel_low, self.channel_high = low.copy(), high.copy()
            self.channel_sum = total.astype(np.float64)
        elif self.channel_sum.shape == total.shape:
            np.minimum(self.channel_low, low, out=self.channel_low)
            np.maximum(self.channel_high, high, out=self.channel_high)
            self.channel_sum += total
        else:
            return  # the channel axis itself varies between batches: extremes of the whole tensor only
        self.count += rows.shape[0] * rows.shape[1]


def as_rows(x: npt.NDArray[np.floating], axis: int) -> F32:
    """Array x (any shape) -> view or copy (samples, positions, channels) float32; rank below 2 is one sample."""
    if x.dtype != np.float32:
        x = x.astype(np.float32)
    if x.ndim == 0:
        return x.reshape(1, 1, 1)
    if x.ndim == 1:
        return x.reshape(1, 1, -1)
    if axis == 1 and x.ndim > 2:
        return x.reshape(x.shape[0], x.shape[1], -1).transpose(0, 2, 1)
    return x.reshape(x.shape[0], -1, x.shape[-1])
