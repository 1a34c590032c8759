"""Second moments fit for extrapolation: covariances shrunk toward their diagonals where there were few rows.

With fewer rows than dimensions a sample covariance is singular, and error compensation hides its error in directions
that were merely not seen. Shrinking toward the diagonal keeps it honest (Ledoit and Wolf 2004, with a fixed intensity
k / (k + ROWS_WEIGHT n) in place of the estimated one).
"""

from __future__ import annotations

import dataclasses

import numpy as np

from featherweight.stats.statistics import MomentStats, Statistics

# Rows of one sample resemble each other, so that they count for less than as many independent ones.
ROWS_WEIGHT = 4.0


def shrunk(stats: Statistics) -> Statistics:
    """The same statistics with every full second moment shrunk; means, ranges and counts stay."""
    return dataclasses.replace(stats, moments={name: shrunk_moments(m) for name, m in stats.moments.items()})


def shrunk_moments(found: MomentStats) -> MomentStats:
    """E[x x^T] with its covariance part moved toward the diagonal; a diagonal second moment stays."""
    if found.second.ndim != 3 or found.rows == 0:
        return found
    k = found.second.shape[-1]
    keep = 1 - k / (k + ROWS_WEIGHT * found.rows)
    outer = found.mean[:, :, None] * found.mean[:, None, :]
    covariance = found.second - outer
    diagonal = np.maximum(np.einsum("gii->gi", covariance), 0.0)
    covariance *= keep
    np.einsum("gii->gi", covariance)[...] = diagonal
    return dataclasses.replace(found, second=covariance + outer)
