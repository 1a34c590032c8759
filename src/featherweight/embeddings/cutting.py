"""A smaller vocabulary: rare words share the row of the nearest word that is kept."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.core import Progress, Silent
from featherweight.embeddings.quality import unit
from featherweight.embeddings.survey import Survey
from featherweight.embeddings.table import F32, Table

SHARES = (0.5, 0.25, 0.12)
MOST_WORK = 4e12  # multiplications of the search for nearest rows; above it no vocabulary is cut
PROBES = 512


@dataclass(frozen=True, eq=False)
class Cut:
    """Rows that stay (sorted), and the error that sharing them leaves: the weighted relative error of all rows cut."""

    rows: npt.NDArray[np.int64]
    error: float
    weight_left: float


def bytes_of(rows: int, kept: int) -> int:
    """Bytes of the list that sends each row to a kept one."""
    return rows * index_type(kept).itemsize


def index_type(kept: int) -> np.dtype[Any]:
    """The narrowest type of such a list."""
    return np.dtype(np.uint16) if kept <= 1 << 16 else np.dtype(np.uint32)


def cuts(table: Table, found: Survey, *, seed: int = 0, progress: Progress | None = None) -> list[Cut]:
    """The cuts worth trying, their errors measured on words drawn by weight. One pass over the table."""
    order = np.argsort(-found.weights, kind="stable")
    zero = np.flatnonzero(found.norms == 0)[:1]
    tried = []
    for share in SHARES:
        kept = np.union1d(order[: max(1, int(found.rows * share))], zero)
        if (found.rows - len(kept)) * len(kept) * found.dim <= MOST_WORK and len(kept) < found.rows:
            tried.append(kept)
    if not tried:
        return []
    probes = _probes(found, tried[0], seed)
    (progress or Silent()).start("looking for words that could share a row")
    inside = np.stack([np.isin(np.arange(found.rows), kept) for kept in tried])
    best = np.full((len(tried), len(probes)), -1.0, np.float32)
    asked = _rows(table, probes)
    start = 0
    for block in table.blocks():
        near = asked @ unit(block.vectors).T
        for k in range(len(tried)):
            mine = inside[k, start : start + len(block.vectors)]
            if mine.any():
                best[k] = np.maximum(best[k], near[:, mine].max(axis=1))
        start += len(block.vectors)
    weights = found.weights[probes]
    return [_cut(found, kept, weights, best[k]) for k, kept in enumerate(tried)]


def _probes(found: Survey, kept: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.int64]:
    """Words drawn from those that the mildest cut takes."""
    gone = np.setdiff1d(np.flatnonzero(found.norms), kept)
    if len(gone) <= PROBES:
        return gone
    return np.sort(np.random.default_rng(seed).choice(gone, PROBES, replace=False))


def _rows(table: Table, rows: npt.NDArray[np.int64]) -> F32:
    parts, start = [np.zeros((0, table.dim), np.float32)], 0
    for block in table.blocks():
        low, high = np.searchsorted(rows, [start, start + len(block.vectors)])
        parts.append(unit(block.vectors[rows[low:high] - start]))
        start += len(block.vectors)
    return np.concatenate(parts)


def _cut(found: Survey, kept: npt.NDArray[np.int64], weights: npt.NDArray[np.float64], best: F32) -> Cut:
    left = float(found.weights[kept].sum())
    mean = float(weights @ np.clip(2 - 2 * best.astype(np.float64), 0, 2)) / max(float(weights.sum()), 1e-30)
    return Cut(kept, (1 - left) * mean, left)


def row_of(table: Table, found: Survey, kept: npt.NDArray[np.int64]) -> npt.NDArray[np.unsignedinteger[Any]]:
    """For each row the number, among the kept ones, of itself or the nearest by cosine; zero rows go to a zero row."""
    stored = _rows(table, kept)
    made = np.zeros(found.rows, index_type(len(kept)))
    made[kept] = np.arange(len(kept))
    zero = np.flatnonzero(found.norms[kept] == 0)
    start = 0
    for block in table.blocks():
        rows = np.arange(start, start + len(block.vectors))
        start += len(block.vectors)
        gone = np.setdiff1d(rows, kept, assume_unique=True)
        for part in np.array_split(gone, max(1, len(gone) * len(kept) // 50_000_000 + 1)):
            if len(part):
                near = unit(block.vectors[part - rows[0]]) @ stored.T
                made[part] = near.argmax(axis=1)
        if len(zero):
            made[gone[found.norms[gone] == 0]] = zero[0]
    return made
