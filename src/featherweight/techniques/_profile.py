"""What estimates of weight-only techniques share: a sample of rows, their importance, what compensation leaves.

Plain rounding of row w errs by sum_i C_ii (w_i - rounded_i)^2. Error feedback leaves the share that the pivots D
of C = (I + U) D (I + U)^T are of its diagonal, so an estimate needs no rounding with feedback.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.graph.weights import Weight
from featherweight.techniques import _absorb, _gptq
from featherweight.techniques._protocol import Context

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
#: Measured over the layers of EfficientNet-Lite0: error found / (plain error * pivots), 0.90 to 0.94 at all widths.
COMPENSATION = 0.92
ESTIMATE_ROWS = 192


@dataclass(frozen=True)
class RowProfile:
    """Rows looked at (g, rows, k), importance (g, k), share `left` (g,) after compensation, `row_weight` (1, rows):
    how many rows each stands for, `signal` E||y - mean y||^2, `added_bytes` of a bias that was not there.
    """

    rows: F32
    importance: F32
    left: F64
    row_weight: F64
    signal: float
    added_bytes: int


def refusal(weight: Weight, ctx: Context) -> str:
    """Why this weight keeps its float values, or ''."""
    kept = [use.path for use in weight.uses if use.path in ctx.keep_float or use.node.name in ctx.keep_float]
    if kept:
        return f"{kept[0]} was asked to stay float"
    if not np.isfinite(weight.array()).all():
        return "it holds NaN or infinity"
    return ""


def profile(weight: Weight, ctx: Context) -> RowProfile:
    """Cached facts for estimates. Rows beyond ESTIMATE_ROWS are sampled evenly."""
    key = ("row profile", ctx.stats.key if ctx.stats else "", weight.name)
    if key in ctx.cache:
        cached: RowProfile = ctx.cache[key]
        return cached
    matrix = weight.to_matrix(weight.array())
    g, out, k = matrix.shape
    found = _absorb.moments(weight, ctx)
    step = max(1, out // max(1, ESTIMATE_ROWS // g))
    picked = np.arange(0, out, step)
    counts = _absorb.row_weights(weight, ctx)
    row_weight = np.full((1, len(picked)), out / len(picked))
    if counts is not None:
        row_weight = row_weight * counts[picked]
    importance, left = np.ones((g, k), np.float32), np.ones(g)
    if found.matrix is not None:
        wide = found.matrix if found.matrix.ndim == 2 else np.einsum("gii->gi", found.matrix)
        importance = np.maximum(wide, 1e-30).astype(np.float32)
        left = COMPENSATION * pivot_share(found.matrix) if found.matrix.ndim == 3 else left
    signal = _absorb.signal(matrix, found, weight, ctx)
    added = _absorb.added_bytes(_absorb.slot(weight)) if found.mean is not None else 0
    facts = RowProfile(np.ascontiguousarray(matrix[:, picked]), importance, left, row_weight, signal, added)
    ctx.cache[key] = facts
    return facts


def pivot_share(C: F64) -> F64:
    """Share (g,) of plain rounding's error that error feedback leaves: the pivots of C over its diagonal."""
    diagonal = np.einsum("gii->gi", C)
    order = np.argsort(-diagonal.sum(axis=0), kind="stable")
    H = _gptq.damped(C[:, order[:, None], order], 0.01)
    try:
        lower = np.linalg.cholesky(H[:, ::-1, ::-1])
    except np.linalg.LinAlgError:
        return np.ones(len(C))
    pivots = np.square(np.einsum("gii->gi", lower), dtype=np.float64).sum(axis=1)
    return np.asarray(np.minimum(pivots / np.einsum("gii->g", H), 1.0))
