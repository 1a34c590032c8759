"""Which input columns a layer can lose, by the closed-form error after the best compensation (structured OBS).

Optimal Brain Surgeon (Hassibi and Stork 1993) in blocks of columns: with C = E[x x^T] and H = C^-1, removing the
columns S of W costs tr(W_S H_SS^-1 W_S^T) when all others are re-solved, and leaves W - W_S H_SS^-1 H_S: and
H - H_:S H_SS^-1 H_S:. Every cost depends on W through W^T W alone, so one step takes a few products with the columns
of H and W^T W; they are brought up to date in runs, as one matrix product, and made afresh from C now and then.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featherweight.errors import TechniqueError

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

DAMPING = 1e-6
"""Share of C's mean diagonal added to it: C of unseen directions, or of two equal inputs, is singular."""
RUN = 64  # columns removed between two matrix-matrix updates
AFRESH = 0.75  # H is inverted anew when no more than this share of its columns is left


def removal_order(
    weights: Sequence[F32],
    seconds: Sequence[F64],
    blocks: Sequence[Sequence[IntArray]],
    scales: Sequence[float],
    *,
    besides: F64 | None = None,
    damping: float = DAMPING,
) -> tuple[IntArray, F64]:
    """Greedy order in which to remove units that several matrices read.

    `weights[i]` (out_i, k_i) and `seconds[i]` (k_i, k_i) are consumer i and the second moments (or covariance) of its
    input; unit u owns columns `blocks[i][u]` of it (may be empty). Each step removes the unit that adds least to
    sum_i scales[i] * tr(dW_i C_i dW_i^T), the remaining columns of every consumer being re-solved, and what it costs
    besides (`besides`, (units,), in the same unit; not part of `errors`).

    Returns `order` (units,) and `errors` (units, consumers): the unscaled error of consumer i after n + 1 removals,
    under C_i + damping * mean(diag C_i) * I. The last one of a consumer whose columns all belong to units is its
    whole signal. Ties go to the lower unit.

    Raises:
        TechniqueError: shapes that do not agree, a column owned twice, values that are not finite.
    """
    _check(weights, seconds, blocks, scales)
    units = len(blocks[0]) if blocks else 0
    sides = [
        _Side.start(w, c, [np.asarray(b, np.int64) for b in own], damping)
        for w, c, own in zip(weights, seconds, blocks, strict=True)
    ]
    order, errors = np.zeros(units, np.int64), np.zeros((units, len(sides)))
    alive = np.ones(units, bool)
    total = np.zeros(len(sides))
    for n in range(units):
        costs = np.stack([side.costs() for side in sides])
        scaled = np.asarray(scales, np.float64) @ costs + (0.0 if besides is None else besides)
        u = int(np.argmin(np.where(alive, scaled, np.inf)))
        total += costs[:, u]
        order[n], errors[n], alive[u] = u, total, False
        for side in sides:
            side.remove(u)
    return order, errors


def resolved(W: F32, C: F64, keep_columns: IntArray, *, damping: float = DAMPING) -> F32:
    """The columns `keep_columns` of W (out, k) re-solved so that tr(dW C dW^T) is least: float32 (out, kept).

    Ridge least squares: C (k, k) with damping * mean(diag C) added to its diagonal, so that where C knows nothing
    the old values stay. What changed of the mean output, (W - W') E[x], is for the caller's bias.

    Raises:
        TechniqueError: shapes that do not agree, or values that are not finite.
    """
    keep = np.asarray(keep_columns, np.int64)
    _check([W], [C], [[keep]], [1.0])
    wide, H = W.astype(np.float64), damped(C, damping)
    gone = np.setdiff1d(np.arange(W.shape[1]), keep)
    if not len(gone) or not len(keep):
        return np.ascontiguousarray(W[:, keep], dtype=np.float32)
    moved = np.linalg.solve(H[np.ix_(keep, keep)], H[np.ix_(keep, gone)] @ wide[:, gone].T).T
    return np.ascontiguousarray(wide[:, keep] + moved, dtype=np.float32)


def damped(C: F64, damping: float) -> F64:
    """A float64 copy of C (k, k), made symmetric, with `damping` of its mean diagonal added; zeros become identity.

    Where that does not make it positive definite (few rows, stored in float32), ten times as much is added, and so on.
    """
    H = np.asarray(C, np.float64)
    H = (H + H.T) / 2
    level = float(np.trace(H)) / max(len(H), 1)
    diagonal, share = np.diag_indices_from(H), damping
    own = H[diagonal]
    H[diagonal] = own + (share * level if level > 0 else 1.0)
    while level > 0 and share < 1 and not _is_positive(H):
        share *= 10
        H[diagonal] = own + share * level
    return H


def _is_positive(H: F64) -> bool:
    try:
        np.linalg.cholesky(H)
    except np.linalg.LinAlgError:
        return False
    return True


@dataclass
class _Side:
    """One consumer while units go. `H`, `G` (= W^T W) hold the columns of the last run; `pending` updates since.

    `columns` (units, width) are positions in them, -1 pads; `Hu`, `Gu` (units, width, width) their blocks on the
    diagonal, always up to date (H padded with the identity, G with zeros).
    """

    C: F64
    N: F64  # factor of W times C: W on the columns left is N H
    H: F64
    G: F64
    kept: IntArray  # columns of C that H still has
    columns: IntArray
    Hu: F64
    Gu: F64
    fresh: int  # columns when H was last inverted
    m: list[F64]
    left: list[F64]
    right: list[F64]
    gone: list[IntArray]

    @classmethod
    def start(cls, W: F32, C: F64, own: Sequence[IntArray], damping: float) -> _Side:
        """Everything still there."""
        wide, H = W.astype(np.float64), damped(C, damping)
        if np.trace(C) <= 0:
            wide = np.zeros_like(wide)  # an input that is always zero costs nothing to lose
        if wide.shape[0] > wide.shape[1]:
            wide = np.asarray(np.linalg.qr(wide, mode="r"), np.float64)  # the same W^T W in fewer rows
        k = len(H)
        width = max((len(b) for b in own), default=0)
        columns = np.full((len(own), width), -1, np.int64)
        for u, block in enumerate(own):
            columns[u, : len(block)] = block
        empty = np.zeros((0, 0))
        side = cls(H, wide @ H, empty, empty, np.arange(k), columns, empty, empty, 0, [], [], [], [])
        side._invert()
        return side

    def costs(self) -> F64:
        """What removing each unit would add, (units,); 0 for units without columns here."""
        if self.columns.shape[1] == 0:
            return np.zeros(len(self.columns))
        if self.columns.shape[1] == 1:
            return np.asarray(np.maximum(self.Gu / self.Hu, 0.0)[:, 0, 0])
        return np.asarray(np.maximum(np.einsum("uii->u", np.linalg.solve(self.Hu, self.Gu)), 0.0))

    def remove(self, u: int) -> None:
        """Take unit u away; its own costs become 0."""
        own = self.columns[u][self.columns[u] >= 0]
        if not len(own):
            return
        m, left, right = self._update(own)
        self.m.append(m)
        self.left.append(left)
        self.right.append(right)
        self.gone.append(own)
        width = self.columns.shape[1]
        self.columns[u] = -1
        self.Hu[u], self.Gu[u] = np.eye(width), 0.0
        self._update_blocks(m, left, right)
        if sum(map(len, self.gone)) >= RUN:
            self._compact()

    def _update(self, own: IntArray) -> tuple[F64, F64, F64]:
        """m, l, r (columns, len(own)) with H' = H - m m^T and G' = G - l r^T - r l^T once `own` is removed."""
        h, g = self.H[:, own], self.G[:, own]
        if self.m:
            m, left, right = np.hstack(self.m), np.hstack(self.left), np.hstack(self.right)
            h = h - m @ m[own].T
            g = g - left @ right[own].T - right @ left[own].T
        lower = np.linalg.cholesky((h[own] + h[own].T) / 2)
        fresh = np.linalg.solve(lower, h.T).T
        left_new = np.linalg.solve(lower.T, fresh.T).T
        return fresh, left_new, g - left_new @ (g[own] / 2)

    def _update_blocks(self, m: F64, left: F64, right: F64) -> None:
        def of_units(a: F64) -> F64:
            return np.where(self.columns[..., None] >= 0, a[self.columns], 0.0)  # (units, width, removed)

        mu, lu, ru = of_units(m), of_units(left), of_units(right)
        cross = lu @ ru.transpose(0, 2, 1)
        self.Hu -= mu @ mu.transpose(0, 2, 1)
        self.Gu -= cross + cross.transpose(0, 2, 1)

    def _compact(self) -> None:
        """Bring H and G up to date on the columns left, or make them afresh from C."""
        stay = np.ones(len(self.kept), bool)
        stay[np.concatenate(self.gone)] = False
        place = np.append(np.where(stay, np.cumsum(stay) - 1, -1), -1)  # -1 stays -1
        self.columns, self.kept = place[self.columns], self.kept[stay]
        if len(self.kept) <= AFRESH * self.fresh:
            self._invert()
        else:
            m, left, right = (np.hstack(a)[stay] for a in (self.m, self.left, self.right))
            cross = left @ right.T
            self.H = self.H[np.ix_(stay, stay)] - m @ m.T
            self.G = self.G[np.ix_(stay, stay)] - cross - cross.T
        self.m, self.left, self.right, self.gone = [], [], [], []

    def _invert(self) -> None:
        """H and W^T W on the columns left, straight from C."""
        self.fresh = len(self.kept)
        H = np.linalg.inv(self.C[np.ix_(self.kept, self.kept)]) if self.fresh else np.zeros((0, 0))
        self.H = (H + H.T) / 2
        W = self.N[:, self.kept] @ self.H
        self.G = W.T @ W
        pad = self.columns < 0
        either = pad[:, :, None] | pad[:, None, :]
        rows, cols = self.columns[:, :, None], self.columns[:, None, :]
        eye = np.eye(self.columns.shape[1])
        self.Hu = np.where(either, eye, self.H[rows, cols]) if self.fresh else np.where(either, eye, 0.0)
        self.Gu = np.where(either, 0.0, self.G[rows, cols]) if self.fresh else np.zeros_like(self.Hu)


def _check(
    weights: Sequence[F32], seconds: Sequence[F64], blocks: Sequence[Sequence[IntArray]], scales: Sequence[float]
) -> None:
    """Raise TechniqueError unless everything fits together."""
    counts = {len(weights), len(seconds), len(blocks), len(scales)}
    if len(counts) != 1:
        raise TechniqueError(
            f"weights, seconds, blocks and scales must be as many, but got {len(weights)}, {len(seconds)}, "
            f"{len(blocks)} and {len(scales)}"
        )
    if len({len(b) for b in blocks}) > 1:
        raise TechniqueError(f"every consumer must name the same units, but got {[len(b) for b in blocks]} of them")
    for W, C, own in zip(weights, seconds, blocks, strict=True):
        if W.ndim != 2 or C.shape != (W.shape[1], W.shape[1]):
            raise TechniqueError(f"weights (out, k) need second moments (k, k), but got {W.shape} and {C.shape}")
        if not (np.isfinite(W).all() and np.isfinite(C).all()):
            raise TechniqueError("weights and second moments must be finite, but some are NaN or infinite")
        held = np.concatenate([np.asarray(b, np.int64).ravel() for b in own] or [np.zeros(0, np.int64)])
        if len(held) and (held.min() < 0 or held.max() >= W.shape[1]):
            raise TechniqueError(
                f"columns must be in 0..{W.shape[1] - 1}, but the units name {held.min()}..{held.max()}"
            )
        if len(np.unique(held)) != len(held):
            raise TechniqueError("a column must belong to one unit at most, but some belong to several")
