"""Vector quantization: k-means in a few dimensions, products of codebooks, residual stages.

Jegou 2011 (product quantization, TPAMI 33); Chen 2010 (residual quantization, Sensors 10). Points carry weights. One
column alone is clustered by Lloyd's iterations on sorted values. Deterministic for a seed; tables with fewer distinct
rows than levels get exactly those rows.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
U8 = npt.NDArray[np.uint8]
ITERATIONS = 10
SCALAR_ITERATIONS = 40
CHUNK = 1 << 14


def kmeans(points: F32, weights: F64, levels: int, *, seed: int = 0, iterations: int = ITERATIONS) -> F32:
    """Centroids (<= levels, width) float32 that lower sum w |p - nearest|^2; points (n, width), weights (n,) >= 0.

    At most as many as there are distinct points of positive weight. A centroid that loses all its points moves to the
    point that is worst off. Raises nothing; no point at all gives one centroid of zeros.
    """
    used = weights > 0
    points, weights = points[used], weights[used]
    if not len(points):
        return np.zeros((1, points.shape[1]), np.float32)
    if points.shape[1] == 1:
        return _scalar(points[:, 0], weights, levels)[:, None]
    if len(points) <= 4 * levels:
        distinct = np.unique(points, axis=0)
        if len(distinct) <= levels:
            return np.asarray(distinct, np.float32)
    rng = np.random.default_rng(seed)
    chosen = (
        rng.choice(len(points), min(levels, len(points)), replace=False, p=weights / weights.sum())
        if (np.count_nonzero(weights) >= levels)
        else np.arange(min(levels, len(points)))
    )
    centroids = points[np.sort(chosen)].astype(np.float32)
    for _ in range(iterations):
        codes, error = nearest(points, centroids)
        mass = np.bincount(codes, weights, len(centroids))
        moved = np.stack(
            [np.bincount(codes, weights * points[:, d], len(centroids)) for d in range(points.shape[1])], axis=1
        )
        empty = mass <= 0
        centroids = np.divide(moved, mass[:, None], out=centroids.astype(np.float64), where=~empty[:, None])
        if empty.any():
            worst = np.argsort(-(error * weights), kind="stable")[: int(empty.sum())]
            centroids[np.flatnonzero(empty)[: len(worst)]] = points[worst]
        centroids = centroids.astype(np.float32)
    return np.asarray(np.unique(centroids, axis=0), np.float32)


def _scalar(values: F32, weights: F64, levels: int) -> F32:
    """Sorted centroids (<= levels,) of one column."""
    order = np.argsort(values, kind="stable")
    points, mass = values[order].astype(np.float64), weights[order]
    distinct = points[np.concatenate([[True], np.diff(points) > 0])]
    if len(distinct) <= levels:
        return np.asarray(distinct, np.float32)
    total = np.concatenate([[0.0], np.cumsum(mass)])
    moment = np.concatenate([[0.0], np.cumsum(mass * points)])
    # Half of the first centroids follow the mass, half the range, so that a far tail is not left out.
    shares = (np.arange(levels) + 0.5) / levels
    at = np.minimum(np.searchsorted(total[1:], shares * total[-1]), len(points) - 1)
    centroids = (points[at] + points[0] + (points[-1] - points[0]) * shares) / 2
    for _ in range(SCALAR_ITERATIONS):
        cuts = np.searchsorted(points, (centroids[1:] + centroids[:-1]) / 2)
        cuts = np.concatenate([[0], cuts, [len(points)]])
        weight = np.diff(total[cuts])
        moved = np.divide(np.diff(moment[cuts]), weight, out=centroids.copy(), where=weight > 0)
        if np.abs(moved - centroids).max() <= 1e-6 * np.abs(points).max():
            break
        centroids = np.sort(moved)
    return np.asarray(np.unique(centroids), np.float32)


def nearest(points: F32, book: F32) -> tuple[npt.NDArray[np.intp], F32]:
    """Index (n,) of the nearest centroid of each point, and the squared distance (n,)."""
    codes = np.empty(len(points), np.intp)
    error = np.empty(len(points), np.float32)
    half = np.einsum("lw,lw->l", book, book) / np.float32(2)
    for start in range(0, len(points), CHUNK):
        part = points[start : start + CHUNK]
        score = half - part @ book.T
        code = score.argmin(axis=1)
        codes[start : start + CHUNK] = code
        best = score[np.arange(len(part)), code]
        error[start : start + CHUNK] = np.maximum(np.einsum("nw,nw->n", part, part) + 2 * best, 0)
    return codes, error


def fit_product(
    sample: F32, weights: F64, *, width: int, bits: int, stages: int = 1, seed: int = 0, iterations: int = ITERATIONS
) -> npt.NDArray[np.float16]:
    """Codebooks (stages * groups, levels, width) float16 of a sample (n, groups * width).

    Each later stage is fitted to what the ones before leave. `levels` is at most 2**bits; codebooks with fewer
    distinct vectors repeat their last one.
    """
    groups = sample.shape[1] // width
    left = sample.reshape(len(sample), groups, width).copy()
    books: list[npt.NDArray[np.float16]] = []
    for stage in range(stages):
        for g in range(groups):
            points = np.ascontiguousarray(left[:, g])
            book = half(kmeans(points, weights, 1 << bits, seed=seed + stage * groups + g, iterations=iterations))
            if stage + 1 < stages:
                codes, _ = nearest(points, book.astype(np.float32))
                left[:, g] -= book[codes]
            books.append(book)
    levels = max(map(len, books))
    return np.stack([np.pad(b, ((0, levels - len(b)), (0, 0)), mode="edge") for b in books])


def half(book: F32) -> npt.NDArray[np.float16]:
    """A codebook in float16; what is beyond its range is cut."""
    return np.clip(book, -65504, 65504).astype(np.float16)


def encode_product(rows: F32, book: npt.NDArray[np.floating], *, stages: int = 1) -> U8:
    """Codes (n, stages * groups) uint8 of rows (n, groups * width): the nearest vector of each group and stage."""
    width, groups = book.shape[2], len(book) // stages
    left = rows.reshape(len(rows), groups, width)
    left = left.copy() if stages > 1 else left
    codes = np.empty((len(rows), len(book)), np.uint8)
    for j, vectors in enumerate(book.astype(np.float32)):
        points = np.ascontiguousarray(left[:, j % groups])
        if width == 1:
            found = _scalar_codes(points[:, 0], vectors[:, 0])
        else:
            found, _ = nearest(points, vectors)
        codes[:, j] = found
        if j // groups + 1 < stages:
            left[:, j % groups] -= vectors[found]
    return codes


def _scalar_codes(values: F32, book: F32) -> npt.NDArray[np.intp]:
    """Nearest entry of a sorted column of values."""
    return np.searchsorted((book[1:] + book[:-1]) / 2, values)


def decode_product(codes: U8, book: npt.NDArray[np.floating], *, stages: int = 1) -> F32:
    """Rows (n, groups * width) float32 that the codes name; as graph.encode decodes them."""
    picked = book.astype(np.float32)[np.arange(len(book)), codes]
    return np.asarray(picked.reshape(len(codes), stages, -1).sum(axis=1, dtype=np.float32))
