"""Which weights become zero, and what the others become to make up for it (SparseGPT, Frantar and Alistarh 2023).

The column sweep of SparseGPT (arXiv:2301.00774) in the factored form of `_gptq`: with C = (I + U) D (I + U)^T, zeroing
weight i of a row costs D_i t_i^2, where t_i is the weight plus what earlier columns left to make up. So the cheapest
of each block of columns go, all rows together; how many a block loses is set by ranking D_i w_i^2 over the whole
matrix. Coordinate descent then brings the kept weights to their best. Inside, arrays are (groups, k, out).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.errors import TechniqueError
from featherweight.techniques import _gptq
from featherweight.techniques._gptq import F64, Moments
from featherweight.techniques._scales import F32, I64

Mask = npt.NDArray[np.bool_]
BLOCK = 64  # columns whose zeros are chosen at once
SWEEPS = 32
WORTH = 0.003  # coordinate descent ends when a sweep takes away less than this share of the error
DAMP = 0.01


@dataclass(frozen=True)
class Pattern:
    """At most `kept` of each `of` neighbours along the reduced dimension are not zero (N:M); 0 of 0: anywhere."""

    kept: int = 0
    of: int = 0

    def __bool__(self) -> bool:
        return self.of > 0


ANYWHERE = Pattern()


@dataclass(frozen=True)
class Pruned:
    """`mask` (g, out, k) of the weights kept, `values` (g, out, k) float32, zero elsewhere, and the error
    tr(dW C dW^T) / tr(W C W^T) of the values.
    """

    mask: Mask
    values: F32
    error: float


@dataclass
class _Free:
    """A `_gptq.Grid` without rounding: any value where `mask` (g, k, out), zero elsewhere."""

    mask: Mask

    def nearest(self, i: int, target: F32, codes: F32) -> tuple[F32, F32]:  # noqa: ARG002 the Grid's names
        value = np.where(self.mask[:, i], target, np.float32(0))
        return value, value


def prune(W: F32, C: Moments | None, *, sparsity: float, pattern: Pattern = ANYWHERE, damp: float = DAMP) -> Pruned:
    """Zero the share `sparsity` of W (g, out, k) that costs least under C = E[x x^T], and re-solve the rest.

    `C` is (g, k, k), its diagonal (g, k), or None. Exactly round(sparsity * W.size) weights go (more only if more are
    zero already); with a `pattern` `of - kept` of each group of neighbours (of a last short group what exceeds
    `kept`), whatever `sparsity` says. Weights that are zero stay zero. Never worse than zeroing as many by
    C_ii w_i^2, or by |w_i|, without making up for it.

    Raises:
        TechniqueError: a sparsity or pattern out of range, or shapes that do not fit.
    """
    _gptq.check(W, C)
    _check(sparsity, pattern)
    Wt = np.ascontiguousarray(W.transpose(0, 2, 1))
    unit = _gptq.power_of_two(Wt)
    Wt = Wt / unit
    level_C, level = _gptq.levelled(C)
    importance = _gptq.importance_of(level_C, *W.shape[::2])
    gone = round(sparsity * W.size)
    weight = np.broadcast_to(level[:, None, None], (len(W), 1, 1)).astype(np.float32)
    plain = [by_score(score, Wt, gone, pattern) for score in (importance[:, :, None] * weight * Wt**2, np.abs(Wt))]
    trials = [(mask, np.where(mask, np.float32(0), Wt)) for mask in plain]

    def error_of(E: F32) -> float:
        return float((_gptq.row_errors(level_C, E) * level[:, None]).sum())

    errors = [error_of(E) for _, E in trials]
    if level_C is not None and level_C.ndim == 3:
        sweep = _Sweep.start(Wt, level_C, importance, weight, pattern, damp)
        trials.append(sweep.polished(*sweep.zeros(gone)))
        errors.append(error_of(trials[-1][1]))
        first = int(np.argmin(errors))
        if first < len(plain):  # a plain choice is rarely better; its kept weights make up for it too
            trials.append(sweep.polished(trials[first][0][:, sweep.order], trials[first][1][:, sweep.order]))
            errors.append(error_of(trials[-1][1]))
    mask, E = trials[int(np.argmin(errors))]
    values = np.where(mask, (Wt - E) * unit, np.float32(0)).astype(np.float32)
    total = error_of(Wt)
    return Pruned(
        np.ascontiguousarray((mask & (values != 0)).transpose(0, 2, 1)),
        np.ascontiguousarray(values.transpose(0, 2, 1)),
        min(errors) / total if total > 0 else 0.0,
    )


@dataclass(frozen=True)
class _Sweep:
    """A weight (g, k, out) with its columns in `order`, and what compensation needs."""

    W: F32
    raw: F32
    H: F32
    U: F32
    pivots: F32
    order: I64
    pattern: Pattern

    @classmethod
    def start(cls, Wt: F32, C: F64, importance: F32, weight: F32, pattern: Pattern, damp: float) -> _Sweep:
        """`weight` (g, 1, 1) undoes the levelling of C between groups."""
        order = _order(importance, pattern)
        inner = C[:, order[:, None], order]
        H = _gptq.damped(inner, damp)
        U = _gptq.feedback_factor(H)
        pivots = _pivots(H, U).astype(np.float32)[:, :, None] * weight
        return cls(Wt[:, order], inner.astype(np.float32), H.astype(np.float32), U, pivots, order, pattern)

    def zeros(self, gone: int) -> tuple[Mask, F32]:
        """Choose zeros block by block with error feedback: mask (g, k, out), E = W - values, in `order`."""
        W, k = self.W, self.W.shape[1]
        size = max(1, BLOCK // self.pattern.of) * self.pattern.of if self.pattern else BLOCK
        first = by_score(self.pivots * W**2, W, gone, self.pattern)
        mask, E = np.zeros(W.shape, bool), np.zeros_like(W)
        for a in range(0, k, size):
            b = min(a + size, k)
            target = W[:, a:b] + self.U[:, :a, a:b].transpose(0, 2, 1) @ E[:, :a]
            quota = int(np.count_nonzero(~first[:, a:b]))
            mask[:, a:b] = by_score(self.pivots[:, a:b] * target**2, W[:, a:b], quota, self.pattern)
            for i in range(a, b):
                t = target[:, i - a]
                if i > a:
                    t = t + np.matmul(self.U[:, None, a:i, i], E[:, a:i])[:, 0]
                E[:, i] = W[:, i] - np.where(mask[:, i], t, np.float32(0))
        return mask, E

    def polished(self, mask: Mask, E: F32) -> tuple[Mask, F32]:
        """Kept weights brought to their best by coordinate descent: (mask, E), columns in their own places."""
        best, free, back = E.copy(), _Free(mask), np.argsort(self.order)
        left = float(_gptq.row_errors(self.raw, E).sum())
        for _ in range(SWEEPS):
            _gptq.descend(self.W, self.H, free, np.zeros_like(E), E)
            before, left = left, float(_gptq.row_errors(self.raw, E).sum())
            if left > (1 - WORTH) * before:
                break
        # What damping made worse under C itself is taken back, row by row.
        better = _gptq.row_errors(self.raw, E) < _gptq.row_errors(self.raw, best)
        return mask[:, back], np.where(better[:, None], E, best)[:, back]


def pivots(C: Moments | None, groups: int, k: int, *, damp: float = DAMP) -> F64:
    """What one unit of error in each column costs once later columns made up for it, (groups, k): D of C's factors.

    Columns are taken by falling importance; a diagonal C is its own, no C is ones.
    """
    if C is None:
        return np.ones((groups, k))
    if C.ndim == 2:
        return np.asarray(C, np.float64)
    order = _order(np.einsum("gii->gi", C), Pattern())
    H = _gptq.damped(C[:, order[:, None], order], damp)
    return np.asarray(_pivots(H, _gptq.feedback_factor(H))[:, np.argsort(order)])


def _order(importance: npt.NDArray[np.floating], pattern: Pattern) -> I64:
    """Important columns first, neighbours of an N:M group together."""
    weight = importance.sum(axis=0, dtype=np.float64)
    k = len(weight)
    if not pattern:
        return np.asarray(np.argsort(-weight, kind="stable"))
    owner = np.arange(k) // pattern.of
    mean = np.bincount(owner, weight) / np.bincount(owner)
    short = owner == k // pattern.of  # a group without all its members goes last, or no other would start a group
    return np.asarray(np.lexsort((np.arange(k), owner, -mean[owner], short)))


def _pivots(H: F64, U: F32) -> F64:
    """D (g, k) of H = (I + U) D (I + U)^T: what is left of H's diagonal, last column first."""
    V = U.astype(np.float64)
    diagonal = np.einsum("gii->gi", H)
    D = diagonal.copy()
    for i in range(D.shape[1] - 2, -1, -1):
        D[:, i] -= np.einsum("gj,gj->g", V[:, i, i + 1 :] ** 2, D[:, i + 1 :])
    return np.asarray(np.maximum(D, 1e-9 * diagonal))


def by_score(score: F32, W: F32, gone: int, pattern: Pattern) -> Mask:
    """Mask (g, k, out) without the `gone` lowest scores, or what the pattern leaves; zeros of W go first."""
    score = np.where(W != 0, score, np.float32(-1))
    if not pattern:
        flat = score.ravel()
        mask = np.ones(flat.size, bool)
        mask[np.argpartition(flat, gone - 1)[:gone] if gone else []] = False
        return np.asarray(mask.reshape(score.shape) & (W != 0))
    g, k, out = score.shape
    missing = -k % pattern.of
    padded = np.pad(score, ((0, 0), (0, missing), (0, 0)), constant_values=-2)
    groups = padded.reshape(g, -1, pattern.of, out)
    rank = np.argsort(np.argsort(-groups, axis=2, kind="stable"), axis=2, kind="stable")
    return np.asarray((rank < pattern.kept).reshape(g, -1, out)[:, :k] & (W != 0))


def _check(sparsity: float, pattern: Pattern) -> None:
    if not 0 <= sparsity < 1:
        raise TechniqueError(f"sparsity must be in 0..1 (the share of zeros), but got {sparsity}")
    if pattern and not 0 < pattern.kept < pattern.of:
        raise TechniqueError(f"of N:M, 0 < N < M must hold, but got {pattern.kept}:{pattern.of}")
