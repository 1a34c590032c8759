"""Codebooks: k-means in one dimension, and error-compensated assignment to a codebook.

Deep Compression (Han 2016, arXiv:1510.00149) clusters weights and forgets the inputs. Here importance is the
diagonal of C, the first codebook is an exact clustering of a histogram (dynamic programming), and codes are then
chosen with error feedback (see `_gptq`) in turn with least-squares codebooks, which is much better at few bits.

Rows may carry a scale, so that one codebook serves channels of different size. Transposed arrays as in `_gptq`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from featherweight.errors import TechniqueError
from featherweight.techniques import _gptq
from featherweight.techniques._scales import F32, I64, SMALLEST_SCALE

F64 = npt.NDArray[np.float64]
BINS = 448  # cells of the histogram that are clustered exactly; more than the most levels
FINE_BINS = 1 << 15  # for Lloyd's iterations: error of a bin is 2**-16 of the range
REFIT_FLOPS = 6e10  # a least-squares codebook costs levels * out * k^2; above this it is left out


@dataclass(frozen=True)
class Palette:
    """Indices uint8 (g, out, k) into `codebook` float32 (books, levels), times `scale` (g, out) where given.

    Row r of the g * out rows uses book r * books // (g * out). `error` and `row_error` as in `Quantized`.
    """

    indices: npt.NDArray[np.uint8]
    codebook: F32
    scale: F32 | None
    error: float
    row_error: F64

    def decoded(self) -> F32:
        """The weights the indices stand for, float32 (g, out, k)."""
        g, out, _ = self.indices.shape
        book = book_of_rows(g * out, len(self.codebook)).reshape(g, out, 1)
        value = self.codebook[book, self.indices]
        return value if self.scale is None else (value * self.scale[..., None]).astype(np.float32)


def book_of_rows(rows: int, books: int) -> I64:
    """Which codebook each of `rows` rows uses: equal contiguous runs."""
    return np.arange(rows) * books // rows


@dataclass
class CodebookGrid:
    """Values book[row, code] * scale[row]. `levels` (g, out, L) sorted; `scale` (g, out); `fixed` marks zeros."""

    levels: F32
    scale: F32
    fixed: npt.NDArray[np.bool_] | None = None

    def nearest(self, i: int, target: F32, codes: F32) -> tuple[F32, F32]:  # noqa: ARG002 - the Grid protocol
        """Nearest level. See _gptq.Grid."""
        wanted = target / self.scale
        edges = (self.levels[..., 1:] + self.levels[..., :-1]) * np.float32(0.5)
        if edges.strides[0] == 0 and edges.strides[1] == 0 and edges.size:
            code = np.searchsorted(edges[0, 0], wanted)
        else:
            code = (wanted[..., None] > edges).sum(axis=-1)
        if self.fixed is not None:
            code = np.where(self.fixed[:, i], np.abs(self.levels).argmin(axis=-1), code)
        value = np.take_along_axis(self.levels, code[..., None], axis=-1)[..., 0] * self.scale
        return code.astype(np.float32), value


def kmeans(values: F32, weights: F32, levels: int, *, pin_zero: bool = False) -> F32:
    """Sorted centroids (<= levels,) that minimise sum w (v - nearest)^2; distinct values <= levels give them all.

    `pin_zero` makes 0 one of the centroids. Deterministic: exact on a histogram, then Lloyd to convergence.
    """
    distinct = np.unique(values) if values.size <= 4096 else np.unique(values[:: max(1, values.size // 4096)])
    if len(distinct) <= levels:
        distinct = np.unique(values)
        if len(distinct) <= levels:
            return distinct.astype(np.float32)
    points, mass = _histogram(values, weights, FINE_BINS)
    if len(points) <= levels:
        return points.astype(np.float32)
    centroids = _first_centroids(points, mass, levels)
    total = np.concatenate([[0.0], np.cumsum(mass)])
    moment = np.concatenate([[0.0], np.cumsum(mass * points)])
    for _ in range(60):
        if pin_zero:
            centroids[np.abs(centroids).argmin()] = 0.0
        cuts = np.searchsorted(points, (centroids[1:] + centroids[:-1]) / 2)
        cuts = np.concatenate([[0], cuts, [len(points)]])
        weight = np.diff(total[cuts])
        moved = np.divide(np.diff(moment[cuts]), weight, out=centroids.copy(), where=weight > 0)
        if np.abs(moved - centroids).max() <= 1e-7 * np.abs(points).max():
            break
        centroids = np.sort(moved)
    if pin_zero:
        centroids[np.abs(centroids).argmin()] = 0.0
    return np.unique(centroids.astype(np.float32))


def _histogram(values: F32, weights: F32, bins: int) -> tuple[F64, F64]:
    """Occupied bins as (weighted mean of its values, total weight); exact where few values are distinct."""
    flat, mass = values.ravel(), weights.ravel()
    low, high = float(flat.min()), float(flat.max())
    where = ((flat.astype(np.float64) - low) * ((bins - 1) / max(high - low, 1e-300))).astype(np.int64)
    weight = np.bincount(where, mass, bins)
    moment = np.bincount(where, mass * flat.astype(np.float64), bins)
    used = weight > 0
    return moment[used] / weight[used], weight[used].astype(np.float64)


def _first_centroids(points: F64, mass: F64, levels: int) -> F64:
    """Exact clustering of at most BINS cells, finer where density^(1/3) is high (Panter-Dite: so is the error)."""
    if len(points) > BINS:
        cumulative = np.cumsum(np.cbrt(mass))
        # Half by distance, so that no two far outliers share a cell.
        where = cumulative / cumulative[-1] + (points - points[0]) / (points[-1] - points[0])
        cell = np.minimum((where * (BINS / 2)).astype(np.int64), BINS - 1)
        weight = np.bincount(cell, mass, BINS).astype(np.float64)
        moment = np.bincount(cell, mass * points, BINS)
        points, mass = moment[weight > 0] / weight[weight > 0], weight[weight > 0]
    if len(points) <= levels:
        return points
    return _optimal(points, mass, levels)


def _optimal(points: F64, mass: F64, levels: int) -> F64:
    """Optimal 1-D k-means of weighted sorted points by dynamic programming (Wang and Song 2011)."""
    n = len(points)
    s0, s1, s2 = (np.concatenate([[0.0], np.cumsum(mass * points**p)]) for p in range(3))
    width = s0[None, :] - s0[:, None]
    first = s1[None, :] - s1[:, None]
    cost = (s2[None, :] - s2[:, None]) - np.divide(first**2, width, out=np.zeros_like(width), where=width > 0)
    cost = np.where(np.triu(np.ones_like(cost, bool), 1), np.maximum(cost, 0), np.inf)
    best = cost[0].copy()
    cut = np.zeros((levels, n + 1), np.int64)
    for level in range(1, levels):
        through = best[:, None] + cost
        cut[level] = through.argmin(axis=0)
        best = through[cut[level], np.arange(n + 1)]
    ends = [n]
    for level in range(levels - 1, 0, -1):
        ends.append(int(cut[level, ends[-1]]))
    edges = np.array([0, *ends[::-1]])
    weight = np.diff(s0[edges])
    return np.asarray(np.diff(s1[edges]) / np.where(weight > 0, weight, 1))


def quantize(
    W: F32,
    C: _gptq.Moments | None,
    *,
    bits: int,
    books: int = 1,
    row_scale: bool = False,
    damp: float = 0.01,
    sweeps: int = 3,
) -> Palette:
    """Best palette found for W (g, out, k) under C (g, k, k), its diagonal (g, k), or None.

    - `bits` 1..8: at most 2**bits levels. `books`: codebooks, one for each run of rows.
    - `row_scale`: each row also has a scale. `sweeps`: rounds of assignment and codebook re-fit.

    Weights that are exactly 0 stay so if they are 1 % or more. If W has no more distinct values than levels the
    result is exact. Raises TechniqueError as `_gptq.quantize` does.
    """
    if not 1 <= bits <= 8:
        raise TechniqueError(f"bits must be 1..8, but got {bits}")
    _gptq.check(W, C)
    g, out, k = W.shape
    if not 1 <= books <= g * out:
        raise TechniqueError(f"books must be 1..{g * out} (one for each row at most), but got {books}")
    Wt = np.ascontiguousarray(W.transpose(0, 2, 1), dtype=np.float32)
    C, level = _gptq.levelled(C)
    importance = _gptq.importance_of(C, g, k)
    pin = float((Wt == 0).mean()) >= 0.01
    scale = _row_scale(Wt, importance) if row_scale else np.ones((g, out), np.float32)
    # Groups count by how loud their inputs are; importance is level 1 in each group.
    loudness = (importance * level[:, None]).astype(np.float32) if C is not None else importance
    grid = _first_grid(Wt, loudness, scale, 2**bits, books, pin)
    codes, E = _gptq.plain(Wt, grid)
    weight = level[:, None]
    error = _gptq.row_errors(C, E) * weight
    total = float((_gptq.row_errors(C, Wt) * weight).sum())
    if C is not None and C.ndim == 3 and error.sum() > 0:
        order = np.argsort(-importance.sum(axis=0), kind="stable")
        moments = C[:, order[:, None], order]
        moved = replace(grid, fixed=None if grid.fixed is None else grid.fixed[:, order])
        found = _improve(Wt[:, order], moments, moved, level, books=books, damp=damp, sweeps=sweeps)
        if found[1].sum() < error.sum():
            codes, error, grid = found[0][:, np.argsort(order)], found[1], found[2]
    first_rows = np.searchsorted(book_of_rows(g * out, books), np.arange(books))
    book = grid.levels.reshape(g * out, -1)[first_rows]
    indices = np.ascontiguousarray(codes.transpose(0, 2, 1)).astype(np.uint8)
    return Palette(
        indices,
        np.ascontiguousarray(book),
        grid.scale if row_scale else None,
        float(error.sum()) / total if total > 0 else 0.0,
        error,
    )


def _row_scale(Wt: F32, importance: F32) -> F32:
    """Weighted root mean square of each row, (g, out); rows of zeros get 1."""
    mean = np.einsum("gk,gko,gko->go", importance, Wt, Wt, dtype=np.float64) / importance.sum(axis=1)[:, None]
    scale = np.sqrt(mean).astype(np.float32)
    return np.where(scale > SMALLEST_SCALE, scale, np.float32(1))


def _first_grid(Wt: F32, loudness: F32, scale: F32, levels: int, books: int, pin: bool) -> CodebookGrid:
    """Clustered codebooks (repeated to rows) before any compensation."""
    g, k, out = Wt.shape
    unit = (Wt / scale[:, None]).transpose(0, 2, 1).reshape(g * out, k)
    weight = (np.broadcast_to(loudness[:, None], (g, out, k)) * (scale**2)[..., None]).reshape(g * out, k)
    owner = book_of_rows(g * out, books)
    table = np.zeros((books, levels), np.float32)
    for b in range(books):
        rows = slice(*np.searchsorted(owner, [b, b + 1]))
        found = kmeans(unit[rows], weight[rows], levels, pin_zero=pin)
        # Unused levels repeat the last one, so they are never nearest.
        table[b] = np.concatenate([found, np.full(levels - len(found), found[-1], np.float32)])
    used = len(np.unique(table[0])) if books == 1 else levels
    fixed = Wt == 0 if pin else None
    return CodebookGrid(_spread(table[:, :used], g, out), scale, fixed)


def _spread(table: F32, g: int, out: int) -> F32:
    """Codebooks (books, L) -> levels of each row (g, out, L); a single book is a view without copies."""
    if len(table) == 1:
        return np.broadcast_to(table[0], (g, out, table.shape[1]))
    return table[book_of_rows(g * out, len(table))].reshape(g, out, -1)


def _improve(
    Wt: F32, C: F64, grid: CodebookGrid, level: F64, *, books: int, damp: float, sweeps: int
) -> tuple[F32, F64, CodebookGrid]:
    """Error feedback, then rounds of codebook re-fit and coordinate descent; the best round is kept."""
    H = _gptq.damped(C, damp)
    H32, raw = H.astype(np.float32), C.astype(np.float32)
    codes, E = _gptq.compensate(Wt, _gptq.feedback_factor(H), grid)
    best = (codes.copy(), _gptq.row_errors(raw, E) * level[:, None], grid)
    levels = grid.levels.shape[2]
    refit = levels * Wt.shape[2] * float(Wt.shape[1]) ** 2 * Wt.shape[0] <= REFIT_FLOPS and levels <= 32
    for _ in range(sweeps):
        if refit:
            grid = _refit(Wt, H32, grid, codes, E, level, books)
        changed = _gptq.descend(Wt, H32, grid, codes, E)
        error = _gptq.row_errors(raw, E) * level[:, None]
        if error.sum() < best[1].sum():
            best = (codes.copy(), error, grid)
        if not changed:
            break
    return best


def _refit(Wt: F32, H: F32, grid: CodebookGrid, codes: F32, E: F32, level: F64, books: int) -> CodebookGrid:
    """Least-squares codebooks given the codes; updates E in place. A pinned zero level stays zero."""
    g, _, out = Wt.shape
    levels = grid.levels.shape[2]
    owner = book_of_rows(g * out, books).reshape(g, 1, out)
    slot = (owner * levels + codes.astype(np.int64)).ravel()
    weight = level.astype(np.float32)[:, None, None]
    wide = np.broadcast_to(grid.scale[:, None], Wt.shape)
    size = books * levels
    gain = np.bincount(slot, (wide * (H @ E) * weight).ravel(), size).reshape(books, levels)
    curvature = np.zeros((books, levels, levels))
    for one in range(levels):
        picked = np.where(codes == one, wide, np.float32(0))
        if picked.any():
            pushed = np.bincount(slot, (wide * (H @ picked) * weight).ravel(), size)
            curvature[:, one] = pushed.reshape(books, levels)
    table = grid.levels.reshape(g * out, levels)[np.searchsorted(owner.ravel(), np.arange(books))].astype(np.float64)
    diagonal = np.einsum("bll->bl", curvature)
    diagonal += 1e-6 * diagonal.max(axis=1, keepdims=True) + 1e-30
    step = np.linalg.solve(curvature, gain[..., None])[..., 0]
    fresh = table + step
    if grid.fixed is not None:
        fresh[table == 0] = 0.0
    if (np.diff(fresh, axis=1) < 0).any():
        return grid  # levels crossed: codes and codebook no longer belong together
    moved = replace(grid, levels=_spread(fresh.astype(np.float32), g, out))
    taken = np.take_along_axis(moved.levels, codes.transpose(0, 2, 1).astype(np.int64), axis=2)
    E[...] = Wt - taken.transpose(0, 2, 1) * moved.scale[:, None]
    return moved
