"""Other ways to make a table of vectors smaller, each at about the sizes asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]
Rows = Callable[[npt.NDArray[np.int64]], F32]


@dataclass(frozen=True)
class Peer:
    """A smaller table: bytes of all its arrays, and its rows."""

    name: str
    nbytes: int
    rows: Rows
    seconds: float = 0.0


def peers(table: F32, times: Sequence[int]) -> Iterator[Peer]:
    """float16, plain rounding by row, principal axes in float16 and in 8 bits, compress-fasttext's PQ."""
    half = table.astype(np.float16)
    yield Peer("float16 (gensim)", half.nbytes, lambda r: half[r].astype(np.float32))
    for bits in (8, 4, 2):
        yield rounded(table, bits)
    for ratio in times:
        yield axes(table, ratio, bits=16)
        yield axes(table, ratio, bits=8)
        found = fasttext_pq(table, ratio)
        if found is not None:
            yield found


def rounded(table: F32, bits: int) -> Peer:
    """Each row on a symmetric grid of its own, to nearest."""
    top = 2 ** (bits - 1) - 1
    scale = np.maximum(np.abs(table).max(axis=1, keepdims=True) / top, 1e-30).astype(np.float32)
    codes = np.clip(np.rint(table / scale), -top, top).astype(np.int8)
    size = table.size * bits // 8 + scale.nbytes
    return Peer(f"int{bits} by row", size, lambda r: codes[r] * scale[r])


def axes(table: F32, ratio: int, *, bits: int) -> Peer:
    """As many principal axes as fit: float16 numbers, or 8 bits by row."""
    rows, dim = table.shape
    mean = table.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov((table - mean).T.astype(np.float64)))
    width = bits // 8
    beside = 4 * dim + (4 * rows if bits == 8 else 0)
    k = max(1, int((table.nbytes / ratio - beside) / (width * rows + 4 * dim)))
    basis = np.ascontiguousarray(vectors[:, np.argsort(-values)[:k]], np.float32)
    columns = (table - mean) @ basis
    size = rows * k * width + basis.nbytes + beside
    if bits == 16:
        stored = columns.astype(np.float16)
        return Peer(f"PCA {k}, float16", size, lambda r: stored[r].astype(np.float32) @ basis.T + mean)
    inner = rounded(columns, 8)
    return Peer(f"PCA {k}, int8", size, lambda r: inner.rows(r) @ basis.T + mean)


def fasttext_pq(table: F32, ratio: int) -> Peer | None:
    """compress-fasttext's product quantization, 256 centroids; None where the package is not installed or cannot."""
    try:
        from compress_fasttext.quantization import quantize
    except ImportError:
        return None
    rows, dim = table.shape
    books = 256 * dim * 4
    fits = [q for q in range(1, dim + 1) if dim % q == 0 and rows * q + books <= table.nbytes / ratio]
    if not fits:
        return None
    started = time.monotonic()
    np.random.seed(0)
    made = quantize(table, max(fits), 256)
    decoded = np.stack([made[i] for i in range(rows)]).astype(np.float32)
    return Peer(
        f"compress-fasttext PQ {max(fits)}", rows * max(fits) + books, lambda r: decoded[r], time.monotonic() - started
    )
