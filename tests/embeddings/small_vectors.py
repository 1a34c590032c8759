"""A small table and ways to put it on disk as others do."""

from __future__ import annotations

import struct

import numpy as np

WORDS = ["the", "cat", "고양이", "naïve"]
VECTORS = np.array([[1, -2.5, 3], [0.1, 1e-7, -3e8], [0, 0, 0], [7, 8, 9.25]], np.float32)


def text_of(words=WORDS, vectors=VECTORS, *, header: bool = True) -> bytes:
    lines = [f"{len(words)} {vectors.shape[1]}"] if header else []
    lines += [f"{w} {' '.join(repr(float(x)) for x in v)}" for w, v in zip(words, vectors, strict=True)]
    return ("\n".join(lines) + "\n").encode()


def binary_of(words=WORDS, vectors=VECTORS, *, newline: bool = True) -> bytes:
    rows = [
        w.encode() + b" " + struct.pack(f"<{len(v)}f", *v) + (b"\n" if newline else b"")
        for w, v in zip(words, vectors, strict=True)
    ]
    return f"{len(words)} {vectors.shape[1]}\n".encode() + b"".join(rows)
