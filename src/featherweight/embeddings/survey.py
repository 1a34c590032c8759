"""One pass over a table: what compression must know of it, in memory far below that of the table.

Rows are looked at as direction and length: a unit vector times a gain. The error that counts is that of each row
relative to its length, weighted by how often its word is used, so that rare words' neighbours count too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.core import Progress, Silent
from featherweight.embeddings.table import F32, Table
from featherweight.errors import DataError

F64 = npt.NDArray[np.float64]
FREQUENCY_POWER = 0.5  # of a word's count: between counting each word once and each occurrence
HEAD_ROWS, TAIL_ROWS = 8192, 24576
MIN_NORM = 1e-30


@dataclass(frozen=True, eq=False)
class Survey:
    """Of a table (rows, dim): its words, lengths and statistics of its directions.

    `norms` float32 (rows,); `weights` (rows,) sum to 1, 0 for rows that are zero. `mean` (dim,) and `moment` (dim, dim)
    are weighted, of unit rows. `sample` are unit rows (n, dim) of row numbers `sample_rows`, `sample_weights` sum to 1.
    """

    words: list[str]
    norms: F32
    weights: F64
    mean: F32
    moment: F64
    sample: F32
    sample_rows: npt.NDArray[np.int64]
    sample_weights: F64

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self.norms)

    @property
    def dim(self) -> int:
        """Number of columns."""
        return len(self.mean)

    @property
    def n_zero(self) -> int:
        """Rows that are zero throughout."""
        return int(np.count_nonzero(self.norms == 0))

    @property
    def covariance(self) -> F64:
        """Weighted covariance (dim, dim) of the directions."""
        mean = self.mean.astype(np.float64)
        return self.moment - np.outer(mean, mean)


def survey(table: Table, *, counts: Mapping[str, int] | None = None, progress: Progress | None = None) -> Survey:
    """Read a table once.

    `counts`: occurrences of words; without, the word of row i is taken to come 1 / (i + 1) times as often as the first
    (Zipf), as tables are sorted by frequency. Raises DataError if no row is left.
    """
    shown = progress or Silent()
    shown.start("reading the vectors", table.rows)
    words: list[str] = []
    norm_parts: list[F32] = []
    head: list[F32] = []
    tail = _Tail(table.rows)
    dim = table.dim
    first, second, total = np.zeros(dim), np.zeros((dim, dim)), 0.0
    for block in table.blocks():
        start = len(words)
        words += block.words
        norms = np.sqrt(np.einsum("nd,nd->n", block.vectors, block.vectors, dtype=np.float64))
        unit = (block.vectors / np.maximum(norms, MIN_NORM)[:, None]).astype(np.float32)
        norm_parts.append(norms.astype(np.float32))
        raw = _raw_weights(block.words, start, counts, norms)
        first += raw @ unit
        second += (unit * raw[:, None].astype(np.float32)).T @ unit
        total += float(raw.sum())
        if start < HEAD_ROWS:
            head.append(unit[: HEAD_ROWS - start])
        tail.add(unit, start)
        shown.advance(len(block.words))
    if not words:
        raise DataError(f"{table.where} holds no usable row; {table.bad.total} were skipped")
    norms = np.concatenate(norm_parts)
    weights = _raw_weights(words, 0, counts, norms.astype(np.float64))
    if total <= 0:
        total = 1.0  # nothing but zero rows
    sample, rows = tail.joined(head, len(words))
    shares = _sample_weights(weights, rows, len(words))
    return Survey(
        words=words,
        norms=norms,
        weights=weights / max(float(weights.sum()), MIN_NORM),
        mean=(first / total).astype(np.float32),
        moment=second / total,
        sample=sample,
        sample_rows=rows,
        sample_weights=shares,
    )


def _raw_weights(words: list[str], start: int, counts: Mapping[str, int] | None, norms: F64) -> F64:
    """What a row counts, before normalising: 0 if it is zero."""
    if counts is None:
        often = 1.0 / np.arange(start + 1, start + 1 + len(words))
    else:
        often = np.array([counts.get(w, 0) for w in words], np.float64) + 0.5
    raw = often**FREQUENCY_POWER
    return np.asarray(np.where(norms > 0, raw, 0.0))


class _Tail:
    """Evenly spaced rows after the head: every step-th, so that any order of the table is sampled fairly."""

    def __init__(self, rows: int | None) -> None:
        known = (rows or 0) - HEAD_ROWS
        self._step = max(1, -(-known // TAIL_ROWS)) if rows is not None else 1
        self._parts: list[F32] = []
        self._rows: list[npt.NDArray[np.int64]] = []

    def add(self, unit: F32, start: int) -> None:
        """Take what is due of a block that starts at row `start`."""
        rows = np.arange(start, start + len(unit))
        due = (rows >= HEAD_ROWS) & ((rows - HEAD_ROWS) % self._step == 0)
        self._parts.append(unit[due])
        self._rows.append(rows[due])
        if sum(map(len, self._rows)) > 2 * TAIL_ROWS:
            # The length was not known: keep every second row from now on.
            self._step *= 2
            kept, parts = np.concatenate(self._rows), np.concatenate(self._parts)
            even = (kept - HEAD_ROWS) % self._step == 0
            self._rows, self._parts = [kept[even]], [parts[even]]

    def joined(self, head: list[F32], rows: int) -> tuple[F32, npt.NDArray[np.int64]]:
        """Head and tail with their row numbers."""
        first = np.arange(min(HEAD_ROWS, rows))
        return np.concatenate([*head, *self._parts]), np.concatenate([first, *self._rows])


def _sample_weights(weights: F64, sampled: npt.NDArray[np.int64], rows: int) -> F64:
    """Weights of sampled rows: those of the tail stand for all of the tail."""
    shares = weights[sampled].copy()
    inside = sampled >= HEAD_ROWS
    if inside.any():
        shares[inside] *= weights[min(HEAD_ROWS, rows) :].sum() / max(float(shares[inside].sum()), MIN_NORM)
    return np.asarray(shares / max(float(shares.sum()), MIN_NORM))
