"""Matrices as products of two thinner ones, best for the inputs a layer really sees; arithmetic only.

The error of W' in place of W is tr((W - W') C (W - W')^T) with C the second moments of the inputs. For a free
product of rank r the best W' keeps the r largest singular values of W C^(1/2) (Wang 2024, SVD-LLM, arXiv:2403.07378);
all ranks come from one decomposition. Where the inner factor is given (it has some structure), the outer one is a
least-squares problem with a closed form. C is (g, k, k), its diagonal (g, k), or None for the identity.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
Moments = F64 | None
#: The covariance keeps at least half of what lies off its diagonal.
MOST_SHRUNK = 0.5
FLOOR = 1e-7  # of the mean diagonal, added to it
TINY = 1e-13  # of the largest eigenvalue: what float64 cannot tell from zero


@dataclass(frozen=True)
class Pair:
    """W = outer inner with outer (g, out, n), inner (g, n, k), n = min(out, k); prefixes are the best of their rank.

    `energy` (g, n): what component i adds to tr(W C W^T), in falling order. inner x has unit variances.
    """

    outer: F64
    inner: F64
    energy: F64

    def cut(self, rank: int) -> tuple[F64, F64]:
        """The two factors of that rank."""
        return self.outer[:, :, :rank], self.inner[:, :rank]

    def error(self, rank: int) -> float:
        """tr((W - W') C (W - W')^T) of the product of that rank, summed over groups."""
        return tail(self.energy, rank)


def tail(energy: F64, rank: int) -> float:
    """Energy (g, n) that components from `rank` on hold, summed over groups."""
    return float(np.maximum(energy[:, rank:], 0.0).sum())


def steadied(C: Moments, mean: F64 | None, rows: int) -> Moments:
    """C (g, k, k) or (g, k) fit for choosing what to leave out: its covariance shrunk toward the diagonal.

    `mean` (g, k) is E[x] where C is E[x x^T], None where C is the covariance already; `rows`: how many independent
    rows it may count as. The best directions for the rows seen are not the best for others; the intensity
    k / (k + rows) brings the predicted error near that of fresh data, and lowers what is found there.
    """
    if C is None:
        return None
    k = C.shape[-1]
    out = np.array(C, dtype=np.float64)
    if out.ndim == 2:
        level = out.mean(axis=1, keepdims=True)
        return out + np.where(level > 0, FLOOR * level, 1.0)
    outer = 0.0 if mean is None else mean[:, :, None] * mean[:, None, :]
    out -= outer
    diagonal = np.einsum("gii->gi", out)
    kept = np.maximum(diagonal, 0.0)
    out *= 1 - min(k / (k + max(rows, 1)), MOST_SHRUNK)
    level = kept.mean(axis=1, keepdims=True)
    diagonal[...] = kept + np.where(level > 0, FLOOR * level, 1.0)
    out = 0.5 * (out + out.transpose(0, 2, 1))
    return np.asarray(out + outer, np.float64)


def times(M: F64, C: Moments) -> F64:
    """M (g, n, k) -> M C."""
    if C is None:
        return M
    return M * C[:, None] if C.ndim == 2 else M @ C


def power(W: F64, C: Moments) -> float:
    """tr(W C W^T) summed over groups; W (g, out, k)."""
    return float(np.einsum("gok,gok->", times(W, C), W))


def triangular(C: F64) -> F64:
    """L (g, k, k), lower, with L L^T = C; an indefinite C is damped until it has one."""
    mean = np.einsum("gii->gi", C).mean(axis=1)[:, None, None]
    for extra in (0.0, 1e-6, 1e-4, 1e-2, 1.0):
        try:
            return np.asarray(np.linalg.cholesky(C + extra * mean * np.eye(C.shape[1]) if extra else C))
        except np.linalg.LinAlgError:
            continue
    spread = np.sqrt(np.maximum(np.einsum("gii->gi", C), 0.0) + np.abs(mean[:, 0]) + 1e-30)
    return np.asarray(spread[:, :, None] * np.eye(C.shape[1]))


def pair(W: F64, C: Moments = None) -> Pair:
    """The best products of every rank of W (g, out, k). Rows of W that are zero stay exactly zero."""
    _, out, k = W.shape
    alive = np.any(W, axis=2, keepdims=True)
    if out <= k:
        energy, U = _falling(times(W, C) @ W.transpose(0, 2, 1))
        U = U * alive
        size = _sizes(energy)
        return Pair(U * size, (U.transpose(0, 2, 1) @ W) / size.transpose(0, 2, 1), energy)
    if C is None or C.ndim == 2:
        root: F64 = np.ones((len(W), k)) if C is None else np.sqrt(C)
        WL = W * root[:, None]
        energy, V = _falling(WL.transpose(0, 2, 1) @ WL)
        return Pair(np.asarray((WL @ V) * alive), V.transpose(0, 2, 1) / root[:, None], energy)
    L = triangular(C)
    WL = W @ L
    energy, V = _falling(WL.transpose(0, 2, 1) @ WL)
    inner = np.linalg.solve(L.transpose(0, 2, 1), V).transpose(0, 2, 1)
    return Pair(np.asarray((WL @ V) * alive), np.asarray(inner), energy)


def _falling(S: F64) -> tuple[F64, F64]:
    """Eigenvalues (g, n), falling and >= 0, and eigenvectors (g, n, n) in columns."""
    values, vectors = np.linalg.eigh(S)
    return np.maximum(values[:, ::-1], 0.0), np.ascontiguousarray(vectors[:, :, ::-1])


def _sizes(energy: F64) -> F64:
    """Standard deviation (g, 1, n) of each component, never 0."""
    top = energy.max(axis=1, keepdims=True)
    return np.asarray(np.sqrt(np.maximum(energy, np.where(top > 0, TINY * top, 1.0)))[:, None], np.float64)


@dataclass(frozen=True)
class Onto:
    """What remains of W when only inner x is known: `gram` (g, n, n) = inner C inner^T, `cross` (g, out, n)."""

    gram: F64
    cross: F64
    whole: float

    def solve(self, n: int | None = None) -> F64:
        """The best outer factor (g, out, n) for the first n rows of the inner one."""
        gram, cross = self.gram[:, :n, :n], self.cross[:, :, :n]
        return np.asarray(np.linalg.solve(_ridge(gram), cross.transpose(0, 2, 1)).transpose(0, 2, 1))

    def error(self, n: int | None = None) -> float:
        """tr((W - outer inner) C (W - outer inner)^T) of the best outer factor for the first n rows."""
        return self.errors([self.gram.shape[1] if n is None else n])[0]

    def errors(self, counts: list[int]) -> list[float]:
        """`error` of several prefixes, from one triangular factorisation."""
        L = triangular(_ridge(self.gram))
        explained = np.square(np.linalg.solve(L, self.cross.transpose(0, 2, 1))).sum(axis=2)
        return [max(self.whole - float(explained[:, :n].sum()), 0.0) for n in counts]


def _ridge(gram: F64) -> F64:
    """Safe to solve with: rows that depend on others would else explode."""
    out = np.array(gram)
    diagonal = np.einsum("gii->gi", out)
    diagonal += 1e-10 * diagonal.mean(axis=1, keepdims=True) + 1e-30
    return out


def onto(W: F64, C: Moments, inner: F64) -> Onto:
    """Prepare the least-squares problem min over outer of tr((W - outer inner) C (W - outer inner)^T)."""
    seen = times(inner, C)
    return Onto(seen @ inner.transpose(0, 2, 1), W @ seen.transpose(0, 2, 1), power(W, C))


def spread(inner: F64, C: Moments) -> F64:
    """Standard deviation (g, n) of inner x, never 0: divided by it, what passes between two layers has one scale."""
    variance = np.einsum("gnk,gnk->gn", times(inner, C), inner)
    top = variance.max(axis=1, keepdims=True)
    return np.asarray(np.sqrt(np.maximum(variance, np.where(top > 0, TINY * top, 1.0))), np.float64)
