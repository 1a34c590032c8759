"""Ridge least squares of one layer from running sums, its strength chosen on rows that were held out.

Minimises sum ||y - W x - b||^2 + n ridge ||(W - W_now) D^(1/2)||^2 with D the mean squares of the inputs: a ridge
toward the weights the layer has now, in units of its inputs, so that what the data do not show stays as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]

RIDGES = (1e-6, 1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)
LEAST_GAIN, MOST_GAIN = 1e-3, 2.0  # by which an output is scaled to vary as its target does
CHUNK_ROWS = 8192  # rows multiplied in float32 before they are added to the float64 total


@dataclass
class Sums:
    """Running sums over rows x (g, n, k), y (g, n, o), both less a fixed shift that keeps them well conditioned.

    `xx` (g, k, k), `yx` (g, o, k), `yy` (g, o), `x` (g, k), `y` (g, o): sums; `rows`: their number.
    """

    x_shift: F32
    y_shift: F32
    xx: F64
    yx: F64
    yy: F64
    x: F64
    y: F64
    rows: int

    @classmethod
    def start(cls, x: F32, y: F32, *, centred: bool) -> Sums:
        """Empty sums, shifted by the means of the first rows if `centred`."""
        g, _, k = x.shape
        o = y.shape[2]
        x_shift, y_shift = np.zeros((g, 1, k), np.float32), np.zeros((g, 1, o), np.float32)
        x, y = _finite(x, y)
        if centred and x.shape[1]:
            x_shift, y_shift = x.mean(axis=1, keepdims=True), y.mean(axis=1, keepdims=True)
        sums = (np.zeros((g, k, k)), np.zeros((g, o, k)), np.zeros((g, o)), np.zeros((g, k)), np.zeros((g, o)))
        return cls(x_shift, y_shift, *sums, 0)

    def empty(self) -> Sums:
        """Sums of no rows with the same shifts."""
        g, o, k = self.yx.shape
        sums = (np.zeros((g, k, k)), np.zeros((g, o, k)), np.zeros((g, o)), np.zeros((g, k)), np.zeros((g, o)))
        return Sums(self.x_shift, self.y_shift, *sums, 0)

    def add(self, x: F32, y: F32) -> None:
        """Add rows; those with a NaN or infinity are left out."""
        x, y = _finite(x, y)
        for a in range(0, x.shape[1], CHUNK_ROWS):
            xs, ys = x[:, a : a + CHUNK_ROWS] - self.x_shift, y[:, a : a + CHUNK_ROWS] - self.y_shift
            self.xx += np.matmul(xs.transpose(0, 2, 1), xs)
            self.yx += np.matmul(ys.transpose(0, 2, 1), xs)
            self.yy += np.einsum("gno,gno->go", ys, ys, dtype=np.float64)
            self.x += xs.sum(axis=1, dtype=np.float64)
            self.y += ys.sum(axis=1, dtype=np.float64)
        self.rows += x.shape[1]

    def plus(self, other: Sums) -> Sums:
        """Both together; they must have the same shifts."""
        return Sums(
            self.x_shift, self.y_shift, self.xx + other.xx, self.yx + other.yx, self.yy + other.yy,
            self.x + other.x, self.y + other.y, self.rows + other.rows,
        )  # fmt: skip

    def about(self, x_mean: F64, y_mean: F64) -> tuple[F64, F64, F64]:
        """Mean xx, yx, yy of the rows less x_mean (g, k), y_mean (g, o), which are relative to the shifts."""
        n = max(self.rows, 1)
        x, y = self.x / n, self.y / n
        cross = x[:, :, None] * x_mean[:, None, :]
        xx = self.xx / n - cross - cross.transpose(0, 2, 1) + x_mean[:, :, None] * x_mean[:, None, :]
        yx = self.yx / n - y_mean[:, :, None] * x[:, None, :] - (y - y_mean)[:, :, None] * x_mean[:, None, :]
        yy = self.yy / n - 2 * y * y_mean + y_mean**2
        return xx, yx, yy


def _finite(x: F32, y: F32) -> tuple[F32, F32]:
    """The rows that hold neither NaN nor infinity."""
    if np.isfinite(x.sum()) and np.isfinite(y.sum()):
        return x, y
    good = np.isfinite(x).all(axis=(0, 2)) & np.isfinite(y).all(axis=(0, 2))
    return x[:, good], y[:, good]


@dataclass(frozen=True)
class Solution:
    """`matrix` (g, o, k), `bias` (g, o) of a layer; errors are mean squares of all outputs on held-out rows.

    `ridge`: the strength chosen; None if the weights stayed and only the bias moved.
    """

    matrix: F64
    bias: F64
    before: float
    after: float
    ridge: float | None


def solve(
    fit: Sums, held: Sums, matrix: F32 | F64, bias: F32 | F64, *, has_bias: bool, spread: bool = False,
    ridges: Sequence[float] = RIDGES,
) -> Solution:  # fmt: skip
    """The weights and bias that bring the layer nearest to its target.

    `matrix` (g, o, k), `bias` (g, o): those it has now. `held` chooses the ridge; the answer is then fitted to all
    rows. Weights that do not lower the error there stay, as does the bias. No `ridges`: only the bias is solved.
    `spread`: outputs are scaled to vary as their targets do (see `_lively`).
    """
    start, old = matrix.astype(np.float64), bias.astype(np.float64)
    if not fit.rows or not held.rows:
        return Solution(start, old, float("nan"), float("nan"), None)
    before = _error(held, start, _relative(held, start, old))
    best, after = _Choice(start, old, None), before
    if has_bias:
        shift = _free_bias(fit, start)
        error = _error(held, start, shift)
        if error < after:
            best, after = _Choice(start, _absolute(fit, start, shift), None), error
    prepared = _Prepared.of(fit, start, has_bias)
    for ridge in ridges:
        moved = prepared.weights(ridge)
        if moved is None:
            continue
        shift = _free_bias(fit, moved) if has_bias else _relative(fit, moved, old)
        error = _error(held, moved, shift)
        if error < after:
            best, after = _Choice(moved, _absolute(fit, moved, shift), ridge), error
    found = _on_all_rows(fit.plus(held), start, best, before, after, has_bias)
    return _lively(fit.plus(held), found) if has_bias and spread else found


def _lively(sums: Sums, found: Solution) -> Solution:
    """Outputs scaled so that each varies as much as its target does.

    Least squares on inputs with errors predicts less than there is (attenuation); layer after layer the signal would
    fade. Matching the spread costs little error and keeps it (Jordan 2023, arXiv:2211.08403, for merged networks).
    """
    n = max(sums.rows, 1)
    xx, _, yy = sums.about(sums.x / n, sums.y / n)
    own = np.einsum("gok,gok->go", found.matrix @ xx, found.matrix)
    factor = np.clip(np.sqrt(np.maximum(yy, 0) / np.maximum(own, 1e-30)), 1.0, MOST_GAIN)
    factor[(factor < 1 + LEAST_GAIN) | ~np.isfinite(factor)] = 1.0
    if (factor == 1.0).all():
        return found
    matrix = found.matrix * factor[:, :, None]
    bias = _absolute(sums, matrix, _free_bias(sums, matrix))
    return Solution(matrix, bias, found.before, found.after, found.ridge)


@dataclass(frozen=True)
class _Choice:
    matrix: F64
    bias: F64
    ridge: float | None


def _on_all_rows(every: Sums, start: F64, best: _Choice, before: float, after: float, has_bias: bool) -> Solution:
    if after >= before:
        return Solution(best.matrix, best.bias, before, after, None)
    matrix: F64 | None = best.matrix
    if best.ridge is not None:
        matrix = _Prepared.of(every, start, has_bias).weights(best.ridge)
    if matrix is None:
        return Solution(best.matrix, best.bias, before, after, best.ridge)
    bias = _absolute(every, matrix, _free_bias(every, matrix)) if has_bias else best.bias
    return Solution(matrix, bias, before, after, best.ridge)


@dataclass(frozen=True)
class _Prepared:
    """Normal equations in inputs scaled to unit mean square: (A + ridge I) M^T = R^T, W = W_now + M / scale."""

    now: F64
    A: F64
    R: F64
    scale: F64

    @classmethod
    def of(cls, sums: Sums, now: F64, has_bias: bool) -> _Prepared:
        n = max(sums.rows, 1)
        means = (sums.x / n, sums.y / n) if has_bias else (np.zeros_like(sums.x), np.zeros_like(sums.y))
        xx, yx, _ = sums.about(*means)
        diagonal = np.maximum(np.einsum("gii->gi", xx), 0.0)
        level = diagonal.mean(axis=1, keepdims=True)
        scale = np.sqrt(np.maximum(diagonal, 1e-6 * level))
        scale[scale == 0] = 1.0
        A = xx / (scale[:, :, None] * scale[:, None, :])
        R = (yx - now @ xx) / scale[:, None, :]
        return cls(now, A, R, scale)

    def weights(self, ridge: float) -> F64 | None:
        """(g, o, k) at this strength; None where the equations cannot be solved."""
        k = self.A.shape[1]
        try:
            moved = np.linalg.solve(self.A + ridge * np.eye(k), self.R.transpose(0, 2, 1)).transpose(0, 2, 1)
        except np.linalg.LinAlgError:
            return None
        found = self.now + moved / self.scale[:, None, :]
        return found if np.isfinite(found).all() else None


def _free_bias(sums: Sums, matrix: F64) -> F64:
    """The bias (relative to the shifts) with which the mean error of these rows is zero."""
    n = max(sums.rows, 1)
    return np.asarray(sums.y / n - np.einsum("gok,gk->go", matrix, sums.x / n))


def _relative(sums: Sums, matrix: F64, bias: F64) -> F64:
    """`bias` for inputs and outputs less the shifts."""
    return np.asarray(bias - _of_shifts(sums, matrix))


def _absolute(sums: Sums, matrix: F64, bias: F64) -> F64:
    return np.asarray(bias + _of_shifts(sums, matrix))


def _of_shifts(sums: Sums, matrix: F64) -> F64:
    """What the layer's target has more than its answer to the shifts."""
    return np.asarray(sums.y_shift[:, 0] - np.einsum("gok,gk->go", matrix, sums.x_shift[:, 0].astype(np.float64)))


def _error(sums: Sums, matrix: F64, bias: F64) -> float:
    """Mean over rows of ||y - W x - bias||^2, all relative to the shifts."""
    xx, yx, yy = sums.about(np.zeros_like(sums.x), bias)
    moved = matrix @ xx
    return float(yy.sum() - 2 * np.sum(yx * matrix) + np.sum(moved * matrix))
