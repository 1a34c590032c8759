"""Running sums over batches whose memory does not depend on how many batches there are."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

BINS = 2048
FLUSH_ROWS = 1024
FLUSH_VALUES = 1 << 23
CHUNK_ROWS = 8192  # rows multiplied in float32 before they are added to the float64 total


@dataclass
class Moments:
    """Sums of x and x x^T over rows; x (groups, rows, k). Products in float32, totals in float64.

    Rows wait until there are enough for one large product: adding k x k totals in float64 for every small batch
    would cost more than the products.
    """

    groups: int
    k: int
    diagonal: bool = False
    rows: int = 0
    total: F64 = field(init=False)
    first: F64 = field(init=False)
    waiting: list[F32] = field(default_factory=list)
    held: int = 0

    def __post_init__(self) -> None:
        shape = (self.groups, self.k) if self.diagonal else (self.groups, self.k, self.k)
        self.total = np.zeros(shape, np.float64)
        self.first = np.zeros((self.groups, self.k), np.float64)

    def add(self, x: F32) -> None:
        """Add rows; those with a NaN or infinity are left out."""
        if not np.isfinite(x.sum()):
            x = x[:, np.isfinite(x).all(axis=(0, 2))]
        self.waiting.append(x)
        self.held += x.shape[1]
        if self.held >= FLUSH_ROWS or self.held * self.groups * self.k >= FLUSH_VALUES:
            self.flush()

    def flush(self) -> None:
        """Add the rows that wait to the totals."""
        if not self.waiting:
            return
        x = self.waiting[0] if len(self.waiting) == 1 else np.concatenate(self.waiting, axis=1)
        self.waiting, self.held = [], 0
        for a in range(0, x.shape[1], CHUNK_ROWS):
            part = x[:, a : a + CHUNK_ROWS]
            if self.diagonal:
                self.total += np.einsum("gnk,gnk->gk", part, part)
            else:
                self.total += np.matmul(part.transpose(0, 2, 1), part)
            self.first += part.sum(axis=1)
        self.rows += x.shape[1]


@dataclass
class Histogram:
    """Counts over BINS equal bins of a range that doubles when a value falls outside; no second pass needed.

    Doubling merges neighbouring bins, so no count is ever lost or guessed.
    """

    low: float = 0.0
    width: float = 0.0  # of one bin; 0 until the first value other than 0
    counts: npt.NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    zeros_before: int = 0

    def add(self, values: F32) -> None:
        """Count finite values."""
        if not values.size:
            return
        least, most = float(values.min()), float(values.max())
        if self.width == 0.0:
            if least == most == 0.0:
                self.zeros_before += values.size
                return
            reach = max(abs(least), abs(most), 1e-30)
            self.low = 0.0 if least >= 0 else -reach
            self.width = (reach * (1 + 1e-6) - self.low) / BINS
            self.counts[self._bin(0.0)] += self.zeros_before
        while least < self.low:
            self._double(down=True)
        while most >= self.low + self.width * BINS:
            self._double(down=False)
        at = ((values.ravel() - np.float32(self.low)) * np.float32(1 / self.width)).astype(np.int32)
        self.counts += np.bincount(np.clip(at, 0, BINS - 1), minlength=BINS)

    def _bin(self, value: float) -> int:
        return min(max(int((value - self.low) / self.width), 0), BINS - 1)

    def _double(self, *, down: bool) -> None:
        merged = self.counts.reshape(-1, 2).sum(axis=1)
        half = BINS // 2
        self.counts = np.zeros(BINS, np.int64)
        if down:
            self.counts[half:] = merged
            self.low -= self.width * BINS
        else:
            self.counts[:half] = merged
        self.width *= 2

    def edges(self) -> F64:
        """BINS + 1 bin edges."""
        return self.low + self.width * np.arange(BINS + 1, dtype=np.float64)


@dataclass
class Reservoir:
    """A uniform sample of `capacity` rows (channels,) of everything seen (Vitter's algorithm R, vectorised)."""

    capacity: int
    channels: int
    seen: int = 0
    kept: F32 = field(init=False)

    def __post_init__(self) -> None:
        self.kept = np.zeros((self.capacity, self.channels), np.float32)

    def add(self, rows: F32, rng: np.random.Generator) -> None:
        """Offer rows (n, channels)."""
        free = min(max(self.capacity - self.seen, 0), len(rows))
        if free:
            self.kept[self.seen : self.seen + free] = rows[:free]
        rest = rows[free:]
        if len(rest):
            index = self.seen + free + np.arange(1, len(rest) + 1)
            slot = (rng.random(len(rest)) * index).astype(np.int64)
            hit = slot < self.capacity
            self.kept[slot[hit]] = rest[hit]
        self.seen += len(rows)

    def rows(self) -> F32:
        """The sample (min(seen, capacity), channels)."""
        return self.kept[: min(self.seen, self.capacity)]
