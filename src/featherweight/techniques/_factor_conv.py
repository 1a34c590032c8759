"""Convolution kernels as products of thinner convolutions, best for the inputs they see; arithmetic only.

A kernel is W (g, out, c, *kernel) with c input channels a group; as a matrix (g, out, k) its columns are (channel,
position) in C order. Every decomposition gives an `inner` matrix (g, n, k) of some structure - what the layers before
the last one compute - whose last factor is the best one in closed form (`_factor.onto`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from featherweight.techniques._factor import F64, Moments, onto, pair, triangular

#: Up to as many unknowns depthwise kernels are solved jointly, in `ROUNDS` alternations.
JOINT = 1024
ROUNDS = 4
#: Products that all alternating least-squares rounds of one CP decomposition may take, and rounds at most and least.
CP_PRODUCTS = 2e9
CP_ROUNDS = (30, 5)


def channel_moments(C: Moments, channels: int) -> Moments:
    """Second moments between channels (g, c, c) (or (g, c)), averaged over kernel positions."""
    if C is None:
        return None
    g, positions = len(C), C.shape[1] // channels
    if C.ndim == 2:
        return np.asarray(C.reshape(g, channels, positions).mean(axis=2))
    return np.asarray(np.einsum("gcpdp->gcd", C.reshape(g, channels, positions, channels, positions)) / positions)


def channel_basis(W: F64, C: Moments) -> F64:
    """Directions of the input channels (g, n, c), the most useful first: Tucker's factor of the input mode."""
    g, _, c = W.shape[:3]
    rows = W.reshape(g, W.shape[1], c, -1).transpose(0, 1, 3, 2).reshape(g, -1, c)
    return pair(rows, channel_moments(C, c)).inner


def with_positions(basis: F64, positions: int) -> F64:
    """(g, n, c) -> inner matrix (g, n * positions, c * positions): the basis at every kernel position."""
    g, n, c = basis.shape
    wide = np.einsum("gnc,pq->gnpcq", basis, np.eye(positions))
    return np.asarray(wide.reshape(g, n * positions, c * positions))


def column_basis(W: F64, C: Moments) -> F64:
    """Filters along the first kernel axis (g, n, c, first), the most useful first (Jaderberg 2014)."""
    g, out, c, first = W.shape[:4]
    rest = math.prod(W.shape[4:])
    rows = W.reshape(g, out, c, first, rest).transpose(0, 1, 4, 2, 3).reshape(g, out * rest, c * first)
    if C is not None and C.ndim == 2:
        C = C.reshape(g, c * first, rest).mean(axis=2)
    elif C is not None:
        C = np.einsum("gaqbq->gab", C.reshape(g, c * first, rest, c * first, rest)) / rest
    return pair(rows, C).inner.reshape(g, -1, c, first)


def with_rest(basis: F64, rest: int) -> F64:
    """(g, n, c, first) -> inner matrix (g, n * rest, k): the filter at every position of the other kernel axes."""
    g, n, c, first = basis.shape
    return with_positions(basis.reshape(g, n, c * first), rest)


def depthwise_basis(W: F64, C: Moments) -> F64:
    """Spatial filters of each input channel by itself (g, c, n, positions), the most useful first."""
    g, out, c = W.shape[:3]
    positions = math.prod(W.shape[3:])
    rows = W.reshape(g, out, c, positions).transpose(0, 2, 1, 3).reshape(g * c, out, positions)
    own = None
    if C is not None and C.ndim == 2:
        own = C.reshape(g * c, positions)
    elif C is not None:
        own = np.einsum("gcpcq->gcpq", C.reshape(g, c, positions, c, positions)).reshape(g * c, positions, positions)
    return pair(rows, own).inner.reshape(g, c, -1, positions)


def by_channel(filters: F64) -> F64:
    """(g, c, m, positions) -> inner matrix (g, c * m, c * positions): filters act on their own channel only."""
    g, c, m, positions = filters.shape
    return np.asarray(np.einsum("gcmp,cd->gcmdp", filters, np.eye(c)).reshape(g, c * m, c * positions))


def refined_depthwise(W: F64, C: Moments, filters: F64) -> F64:
    """Depthwise filters (g, c, m, positions) and the layer behind them, solved for in turn; same shape.

    Minimises tr((W - outer inner) C (.)^T) over both; left as they are where there are more than JOINT unknowns.
    """
    g, c, m, positions = filters.shape
    k = c * positions
    if c * m * positions > JOINT:
        return filters
    matrix = W.reshape(g, -1, k)
    full = np.broadcast_to(np.eye(k), (g, k, k)) if C is None else C if C.ndim == 3 else C[:, :, None] * np.eye(k)
    own = full.reshape(g, c, positions, c, positions)
    best, least = filters, onto(matrix, C, by_channel(filters)).error()
    for _ in range(ROUNDS):
        outer = onto(matrix, C, by_channel(best)).solve()
        gram = (outer.transpose(0, 2, 1) @ outer).reshape(g, c, m, c, m)
        normal = np.einsum("gcmdn,gcpdq->gcmpdnq", gram, own).reshape(g, c * m * positions, -1)
        wanted = (outer.transpose(0, 2, 1) @ matrix @ full).reshape(g, c, m, c, positions)
        right = np.einsum("gcmcp->gcmp", wanted).reshape(g, -1, 1)
        mean = np.einsum("gii->gi", normal).mean(axis=1)[:, None, None]
        fresh = np.linalg.solve(normal + 1e-9 * (mean + 1e-30) * np.eye(normal.shape[1]), right).reshape(filters.shape)
        error = onto(matrix, C, by_channel(fresh)).error()
        if not error < least:
            break
        best, least = fresh, error
    return best


def cp_rounds(size: int, rank: int) -> int:
    """Rounds that a CP decomposition of a kernel of `size` values may take; 0: too large."""
    rounds = int(CP_PRODUCTS / (2.0 * size * rank))
    return 0 if rounds < CP_ROUNDS[1] else min(rounds, CP_ROUNDS[0])


def cp_basis(W: F64, C: Moments, rank: int, seed: int) -> tuple[F64, list[F64]]:
    """CP of W (g, out, c, *kernel): channel mixtures (g, rank, c) and a filter (g, rank, size) a kernel axis.

    Alternating least squares (Lebedev 2015, arXiv:1412.6553) on the kernel whose input channels are whitened.
    """
    moments = channel_moments(C, W.shape[2])
    if moments is None:
        L = None
    elif moments.ndim == 2:
        L = np.sqrt(moments)[:, :, None] * np.eye(W.shape[2])
    else:
        L = triangular(moments)
    mixtures, filters = [], []
    for group, kernel in enumerate(W):
        seen = kernel if L is None else np.moveaxis(np.tensordot(kernel, L[group], axes=(1, 0)), -1, 1)
        modes = alternating(seen, rank, cp_rounds(kernel.size, rank), seed)
        mixing = modes[1] if L is None else np.linalg.solve(L[group].T, modes[1])
        mixtures.append(mixing.T)
        filters.append([mode.T for mode in modes[2:]])
    return np.stack(mixtures), [np.stack(axis) for axis in zip(*filters, strict=True)]


def cp_inner(mixtures: F64, filters: Sequence[F64]) -> F64:
    """(g, rank, c) and (g, rank, size) a kernel axis -> inner matrix (g, rank, k)."""
    inner = mixtures
    for axis in filters:
        inner = (inner[..., None] * axis[:, :, None]).reshape(*inner.shape[:2], -1)
    return inner


def alternating(T: F64, rank: int, rounds: int, seed: int) -> list[F64]:
    """Factors (size of mode, rank) of the tensor T whose sum of rank-1 terms is near T; unit columns but in mode 0.

    Mode 0 is contracted once a round for all others, so that a round takes two products with T.
    """
    rng = np.random.default_rng(seed)
    factors = []
    for mode, size in enumerate(T.shape):
        flat = np.moveaxis(T, mode, 0).reshape(size, -1)
        leading = np.linalg.eigh(flat @ flat.T)[1][:, ::-1][:, :rank]
        more = rng.normal(size=(size, max(rank - leading.shape[1], 0)))
        factors.append(_unit(np.concatenate([leading, more], axis=1)))
    flat = T.reshape(len(T), -1)
    for _ in range(max(rounds, 1)):
        seen = (flat.T @ factors[0]).reshape(*T.shape[1:], rank)
        factors[1] = _unit(_updated(factors, 1, _contracted(seen, factors[1:], 0)))
        seen = np.einsum("c...r,cr->...r", seen, factors[1])
        for mode in range(2, T.ndim):
            factors[mode] = _unit(_updated(factors, mode, _contracted(seen, factors[2:], mode - 2)))
        spread = factors[1]
        for other in factors[2:]:
            spread = (spread[:, None] * other[None]).reshape(-1, rank)
        factors[0] = _updated(factors, 0, flat @ spread)
    return factors


def _contracted(seen: F64, factors: Sequence[F64], keep: int) -> F64:
    """`seen` (sizes of the factors, rank) summed over all modes but `keep`, each term with its column."""
    for mode in reversed(range(len(factors))):
        if mode != keep:
            moved = np.moveaxis(seen, mode, -2)
            seen = np.einsum("...nr,nr->...r", moved, factors[mode])
    return seen


def _updated(factors: Sequence[F64], mode: int, product: F64) -> F64:
    """The best factor of one mode, the others given: product (size, rank) times the inverse of their Gram matrix."""
    rank = product.shape[1]
    gram = np.ones((rank, rank))
    for other, factor in enumerate(factors):
        if other != mode:
            gram *= factor.T @ factor
    ridge = 1e-8 * np.trace(gram) / rank + 1e-30
    return np.asarray(np.linalg.solve(gram + ridge * np.eye(rank), product.T).T)


def _unit(columns: F64) -> F64:
    norm = np.linalg.norm(columns, axis=0)
    return columns / np.where(norm > 0, norm, 1.0)
