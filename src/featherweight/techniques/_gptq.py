"""Error-compensated rounding: codes that minimise tr(dW C dW^T), the error at the layer's output.

Three steps, all batched over groups: (1) sequential rounding with error feedback, GPTQ (Frantar 2022,
arXiv:2210.17323) in the factored form of LDLQ (Chee 2023, arXiv:2307.13304), which needs one Cholesky
factorisation and no inverse; (2) coordinate descent over single codes, which can only lower the error;
(3) scales re-fitted by least squares to the codes found. Rows keep the best of several starts, plain rounding
included, so no row is ever worse than plain rounding.

Inside, arrays are transposed: W (groups, k, out).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt

from featherweight.errors import TechniqueError
from featherweight.techniques import _scales
from featherweight.techniques._scales import F32, I64, LinearGrid

F64 = npt.NDArray[np.float64]
Moments = npt.NDArray[np.floating]
LAZY = 48  # columns between two matrix-matrix updates; inside, rank-one updates stay in cache

#: Factors on the first scale from which rounding is started; every row keeps its best.
STARTS = {8: (1.0,), 7: (1.0,), 6: (1.0, 0.93), 5: (1.0, 0.9), 4: (1.0, 0.9, 1.1), 3: (1.0, 0.87, 1.15)}
LOW_BIT_STARTS = (1.0, 0.8, 0.9, 1.15, 1.3)
PAIR_STARTS = (1.0, 0.93, 0.86, 0.79)


@dataclass(frozen=True)
class Quantized:
    """What `quantize` found: W ~ (codes - zero_point) * scale.

    `codes` int8 (g, out, k); `scale` float32 and `zero_point` int8 are (g, out), blocked: (g, out, blocks).
    `error`: tr(dW C dW^T) / tr(W C W^T) over all groups; `row_error` (g, out): tr(dw C dw^T) of each row.
    """

    codes: npt.NDArray[np.int8]
    scale: F32
    zero_point: npt.NDArray[np.int8] | None
    error: float
    row_error: F64
    block: int = 0

    def decoded(self) -> F32:
        """The weights the codes stand for, float32 (g, out, k)."""
        span = np.arange(self.codes.shape[2]) // self.block if self.block else np.zeros(1, np.int64)
        value = self.codes.astype(np.float32)
        if self.zero_point is not None:
            value -= np.atleast_3d(self.zero_point)[..., span].astype(np.float32)
        value *= np.atleast_3d(self.scale)[..., span]
        return value


class Grid(Protocol):
    """A set of allowed values for each weight."""

    def nearest(self, i: int, target: F32, codes: F32) -> tuple[F32, F32]:
        """Code and value nearest to `target` (g, out) at reduction index i, given the `codes` so far."""
        ...


def damped(C: Moments, damp: float) -> F64:
    """Positive definite float64 copy: `damp` times the mean diagonal is added; C = 0 becomes the identity."""
    H = np.array(C, dtype=np.float64)
    diagonal = np.einsum("gii->gi", H)
    mean = diagonal.mean(axis=1, keepdims=True)
    diagonal += np.where(mean > 0, damp * mean, 1.0)
    return H


def feedback_factor(H: F64) -> F32:
    """U (g, k, k) float32, strictly upper, with H = (I + U) D (I + U)^T and D diagonal."""
    for extra in (0.0, 0.01, 0.1, 1.0, 10.0):
        try:
            # Second moments summed in float32 can be slightly indefinite: damp more until they are not.
            lower = np.linalg.cholesky((damped(H, extra) if extra else H)[:, ::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        upper = lower[:, ::-1, ::-1]
        unit = upper / np.einsum("gii->gi", upper)[:, None, :]
        return np.asarray(np.triu(unit, 1), dtype=np.float32)
    raise TechniqueError(
        "second moments must be positive definite after damping, but are not even with 10 times the mean "
        "diagonal added; check that they are E[x x^T] of real data"
    )


def compensate(W: F32, U: F32, grid: Grid) -> tuple[F32, F32]:
    """Round index by index, feeding errors into the later ones. W (g, k, out) -> codes, E = W - decoded."""
    codes, E = np.zeros_like(W), np.zeros_like(W)
    k = W.shape[1]
    for a in range(0, k, LAZY):
        b = min(a + LAZY, k)
        target = W[:, a:b] + U[:, :a, a:b].transpose(0, 2, 1) @ E[:, :a]
        for i in range(a, b):
            t = target[:, i - a]
            if i > a:
                t = t + np.matmul(U[:, None, a:i, i], E[:, a:i])[:, 0]
            codes[:, i], value = grid.nearest(i, t, codes)
            E[:, i] = W[:, i] - value
    return codes, E


def descend(W: F32, H: F32, grid: Grid, codes: F32, E: F32) -> bool:
    """One sweep of exact coordinate descent over the codes, in place. Returns whether any value changed."""
    k = W.shape[1]
    inverse = 1 / np.einsum("gii->gi", H)[:, :, None]
    gradient = H @ E
    changed = False
    for a in range(0, k, LAZY):
        b = min(a + LAZY, k)
        moved = np.zeros((W.shape[0], b - a, W.shape[2]), np.float32)
        for i in range(a, b):
            slope = gradient[:, i]
            if i > a:
                slope = slope + np.matmul(H[:, None, i, a:i], moved[:, : i - a])[:, 0]
            code, value = grid.nearest(i, W[:, i] - E[:, i] + slope * inverse[:, i], codes)
            fresh = W[:, i] - value
            moved[:, i - a] = fresh - E[:, i]
            codes[:, i], E[:, i] = code, fresh
        if moved.any():
            changed = True
            gradient[:, b:] += H[:, b:, a:b] @ moved
    return changed


def plain(W: F32, grid: Grid) -> tuple[F32, F32]:
    """Round every weight alone, in order (pair limits hold). W (g, k, out) -> codes, E = W - decoded."""
    codes, E = np.zeros_like(W), np.empty_like(W)
    for i in range(W.shape[1]):
        codes[:, i], value = grid.nearest(i, W[:, i], codes)
        E[:, i] = W[:, i] - value
    return codes, E


def row_errors(C: Moments | None, E: F32) -> F64:
    """The trace of each row, (g, out). C (g, k, k), (g, k) a diagonal, or None (identity); E (g, k, out)."""
    if C is None:
        return np.asarray(np.einsum("gko,gko->go", E, E, dtype=np.float64))
    if C.ndim == 2:
        return np.asarray(np.einsum("gk,gko,gko->go", C, E, E, dtype=np.float64))
    pushed = C.astype(np.float32) @ E
    return np.asarray(np.maximum(np.einsum("gko,gko->go", pushed, E, dtype=np.float64), 0.0))


def refit_scale(W: F32, H: F32, grid: LinearGrid, codes: F32, E: F32) -> None:
    """Least-squares scale of every span given the codes, in place (Gauss-Seidel over spans)."""
    gradient = H @ E
    spans = grid.scale.shape[1]
    for s in range(spans):
        members = slice(None) if spans == 1 else np.flatnonzero(grid.span == s)
        steps = codes[:, members] - grid.zero[:, s, None]
        within = H if spans == 1 else H[:, members][:, :, members]
        curvature = np.einsum("gko,gko->go", steps, within @ steps, dtype=np.float64)
        gain = np.einsum("gko,gko->go", steps, gradient[:, members], dtype=np.float64)
        old = grid.scale[:, s]
        step = np.divide(gain, curvature, out=np.zeros_like(gain), where=curvature > 0)
        # A scale that halves or doubles means the codes no longer fit it: such a row keeps the old one.
        new = np.where(np.abs(step) < 0.5 * old, old + step, old).astype(np.float32)
        E[:, members] = W[:, members] - steps * new[:, None]
        grid.scale[:, s] = new
        if spans > 1:
            gradient += H[:, :, members] @ (steps * (old - new)[:, None])


def quantize_matrix(
    W: F32,
    C: Moments | None,
    *,
    bits: int,
    scale: F32 | None = None,
    block: int = 0,
    damp: float = 0.01,
    pair_safe: bool = False,
    reduction_order: npt.NDArray[np.integer] | None = None,
) -> tuple[npt.NDArray[np.int8], F32]:
    """`quantize` for callers that want only codes int8 (g, out, k) and scale float32 (g, out[, blocks])."""
    order = reduction_order
    q = quantize(W, C, bits=bits, scale=scale, block=block, damp=damp, pair_safe=pair_safe, reduction_order=order)
    return q.codes, q.scale


def quantize(
    W: F32,
    C: Moments | None,
    *,
    bits: int,
    scale: F32 | None = None,
    block: int = 0,
    symmetric: bool = True,
    damp: float = 0.01,
    pair_safe: bool = False,
    reduction_order: npt.NDArray[np.integer] | None = None,
    sweeps: int = 4,
    near: F32 | None = None,
) -> Quantized:
    """The best codes found for W (g, out, k) float32 under C = E[x x^T].

    `C` is (g, k, k), only its diagonal (g, k), or None (every weight is then rounded alone).

    - `bits` 2..8. 8-bit and pair-safe codes are within +-(2**(bits-1) - 1), others use every code.
    - `scale` (g, out) or (g, out, blocks) is kept as it is; None searches and re-fits scales.
    - `block`: reduction indices that share a scale; 0 is one scale a row. `symmetric=False`: zero points.
    - `damp`: share of C's mean diagonal added to it, against noise in C.
    - `pair_safe`: |code| + |code| <= 127 for neighbours 2i, 2i+1 of `reduction_order` (k,), None: 0..k-1.
    - `sweeps`: most rounds of coordinate descent and scale re-fit.
    - `near` (g, out, k): values to start from instead of W; where they are 0 the code is 0.

    Scales are finite and > 0; an all-zero span has scale 1; weights that are exactly 0 stay exactly 0.

    Raises:
        TechniqueError: wrong bits, shapes, or values that are not finite.
    """
    _check_grid(bits, block)
    check(W, C)
    g, _, k = W.shape
    unit = power_of_two(W)
    Wt = np.ascontiguousarray(W.transpose(0, 2, 1) / unit, dtype=np.float32)
    neart = None if near is None else np.ascontiguousarray(near.transpose(0, 2, 1) / unit, dtype=np.float32)
    C, level = levelled(C)
    importance = importance_of(C, g, k)
    grid = _scales.first_grid(
        Wt if neart is None else neart,
        importance,
        bits=bits,
        block=block,
        symmetric=symmetric,
        # Rows that vanish beside the largest weight have codes of zero at any scale; theirs would underflow.
        scale=None if scale is None else np.where(scale > 0, _scales.safe_scale(scale / unit), scale),
        pairs=_pairs(k, reduction_order) if pair_safe else None,
    )
    weight = (float(unit) ** 2 * level)[:, None]
    total = float((row_errors(C, Wt) * weight).sum())
    codes, error, grid = _choose(
        Wt, C, grid, importance, near=neart, damp=damp, bits=bits, free=scale is None, sweeps=sweeps
    )
    natural = codes.transpose(0, 2, 1)
    empty = ~np.logical_or.reduceat(Wt != 0, _scales.span_starts(k, block), axis=1)
    found = np.where(empty, np.float32(1), grid.scale * unit) if scale is None else None
    error = error * weight
    return Quantized(
        np.ascontiguousarray(natural.astype(np.int8)),
        np.ascontiguousarray(scale if found is None else _by_row(found, block), dtype=np.float32),
        None if symmetric else _by_row(grid.zero, block).astype(np.int8),
        float(error.sum()) / total if total > 0 else 0.0,
        error,
        block,
    )


def _choose(
    Wt: F32, C: F64 | None, grid: LinearGrid, importance: F32, *, near: F32 | None, damp: float, bits: int,
    free: bool, sweeps: int,
) -> tuple[F32, F64, LinearGrid]:  # fmt: skip
    """Codes in natural index order, row errors under the levelled C, and the grid they belong to."""
    if C is None or C.ndim == 2:
        origin = Wt if near is None else near
        codes, E = plain(origin, grid)
        E += Wt - origin
        return codes, row_errors(C, E), grid
    # Important inputs first: their errors can still be absorbed by all the others.
    order = np.argsort(-importance.sum(axis=0), kind="stable")
    grid = grid.permuted(order)
    starts = PAIR_STARTS if grid.mate is not None else STARTS.get(bits, LOW_BIT_STARTS)
    codes, error = _solve(
        Wt[:, order],
        C[:, order[:, None], order],
        grid,
        near=None if near is None else near[:, order],
        damp=damp,
        starts=starts if free and near is None else (1.0,),
        free=free,
        sweeps=sweeps,
    )
    return codes[:, np.argsort(order)], error, grid


def _by_row(spans: F32, block: int) -> F32:
    """(g, spans, out) -> (g, out), or (g, out, spans) if blocked."""
    rows = spans.transpose(0, 2, 1)
    return np.ascontiguousarray(rows if block else rows[..., 0])


def _solve(
    Wt: F32, C: Moments, grid: LinearGrid, *, near: F32 | None, damp: float, starts: tuple[float, ...], free: bool,
    sweeps: int,
) -> tuple[F32, F64]:  # fmt: skip
    """Best rows over all starts and plain rounding: codes, row errors. `grid` ends with their scales."""
    H, raw = damped(C, damp), C.astype(np.float32)
    U, H32 = feedback_factor(H), H.astype(np.float32)
    searched = replace(grid)
    codes, E, error = _rounded(Wt, raw, grid, free)
    first = (codes, error, replace(grid))
    trials = [(Wt, replace(grid, scale=grid.scale * np.float32(start))) for start in starts]
    for origin, trial in [*trials, *([] if near is None else [(near, searched)])]:
        new_codes, new_E = compensate(origin, U, trial)
        if origin is not Wt:
            new_E += Wt - origin
        if free:
            refit_scale(Wt, H32, trial, new_codes, new_E)
        new_error = row_errors(raw, new_E)
        better = new_error < error
        codes, E = np.where(better[:, None], new_codes, codes), np.where(better[:, None], new_E, E)
        error = np.where(better, new_error, error)
        grid.take_rows(better, trial)
    for _ in range(sweeps):
        if not descend(Wt, H32, grid, codes, E):
            break
        if free:
            refit_scale(Wt, H32, grid, codes, E)
    error = row_errors(raw, E)
    worse = first[1] < error
    grid.take_rows(worse, first[2])
    return np.where(worse[:, None], first[0], codes), np.where(worse, first[1], error)


def _rounded(Wt: F32, raw: F32, grid: LinearGrid, free: bool) -> tuple[F32, F32, F64]:
    """Plain rounding, rows at the better of the searched and the range-covering scale (set in `grid`)."""
    codes, E = plain(Wt, grid)
    error = row_errors(raw, E)
    if free and grid.scale.shape[1] == 1 and not grid.zero.any() and grid.mate is None:
        whole = replace(grid, scale=_scales.covering_scale(Wt, np.zeros(1, np.int64), grid.high))
        other_codes, other_E = plain(Wt, whole)
        other = row_errors(raw, other_E)
        better = other < error
        codes, E = np.where(better[:, None], other_codes, codes), np.where(better[:, None], other_E, E)
        error = np.where(better, other, error)
        grid.take_rows(better, whole)
    return codes, E, error


def _pairs(k: int, reduction_order: npt.NDArray[np.integer] | None) -> I64:
    """(k // 2, 2) indices that meet in one 16-bit accumulator."""
    order = np.arange(k) if reduction_order is None else np.asarray(reduction_order, np.int64)
    if not np.array_equal(np.sort(order), np.arange(k)):
        raise TechniqueError(f"reduction_order must be a permutation of 0..{k - 1}, but is not")
    return order[: k // 2 * 2].reshape(-1, 2)


def levelled(C: Moments | None) -> tuple[F64 | None, F64]:
    """C as float64 with mean diagonal 1 in each group (float32 products are then safe), and the divisors."""
    if C is None:
        return None, np.ones(1)
    wide = np.asarray(C, np.float64)
    diagonal = wide if wide.ndim == 2 else np.einsum("gii->gi", wide)
    mean = diagonal.mean(axis=1)
    level = np.where(mean > 0, mean, 1.0)
    return wide / level.reshape(-1, *[1] * (wide.ndim - 1)), level


def importance_of(C: F64 | None, groups: int, k: int) -> F32:
    """Diagonal (g, k) of a levelled C; dead inputs keep a small weight, no C gives ones."""
    if C is None:
        return np.ones((groups, k), np.float32)
    return np.maximum(C if C.ndim == 2 else np.einsum("gii->gi", C), 1e-4).astype(np.float32)


def _check_grid(bits: int, block: int) -> None:
    if not 2 <= bits <= 8:
        raise TechniqueError(f"bits must be 2..8, but got {bits}; 1 bit needs a palette")
    if block < 0:
        raise TechniqueError(f"block must be >= 0 (0: one scale a row), but got {block}")


def power_of_two(W: F32) -> np.float32:
    """At most the largest magnitude. Dividing by it is exact, and keeps squares of any weight in float32."""
    return np.float32(2.0 ** np.clip(np.floor(np.log2(max(float(np.abs(W).max()), 1e-30))), -100, 100))


def check(W: F32, C: Moments | None) -> None:
    """Raise TechniqueError unless W (g, out, k) and C are finite and of matching shape."""
    if W.ndim != 3 or 0 in W.shape:
        raise TechniqueError(f"weights must be (groups, out, k) and not empty, but got shape {W.shape}")
    if not np.isfinite(W).all():
        bad = int((~np.isfinite(W)).sum())
        raise TechniqueError(f"weights must be finite, but {bad} of {W.size} are not")
    if C is None:
        return
    g, _, k = W.shape
    if C.shape not in ((g, k, k), (g, k)):
        raise TechniqueError(f"second moments must be ({g}, {k}, {k}) or ({g}, {k}), but got {C.shape}")
    if not np.isfinite(C).all():
        raise TechniqueError("second moments must be finite, but are not: NaN or inf in the calibration data?")
