"""Tables in use: a word's vector, the nearest words. Our own form stays on disk; only what is asked for is read."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherweight.embeddings import safetensors, vocabulary
from featherweight.embeddings.table import F32, Bad, Block, Table
from featherweight.embeddings.vocabulary import Packed
from featherweight.embeddings.write import FORMAT, VECTORS
from featherweight.errors import DataError

Rows = Callable[[npt.NDArray[np.int64]], F32]
WORD_ARRAYS = ("words.offsets", "words.order", "words.text")
CHUNK_ROWS = 1 << 14


class Words:
    """A table of word vectors: `words["cat"]` is float32 (dim,). Made by `load` or `from_arrays`."""

    def __init__(self, packed: Packed, rows: Rows, dim: int, *, where: str = "") -> None:
        """`rows` gives the vectors float32 (n, dim) of n row numbers."""
        self._packed, self._rows = packed, rows
        self.dim, self.where = dim, where

    def __len__(self) -> int:
        return len(self._packed)

    def __contains__(self, word: object) -> bool:
        return isinstance(word, str) and self._packed.find(word) is not None

    def __iter__(self) -> Iterator[str]:
        return (self._packed.word(i) for i in range(len(self)))

    def __getitem__(self, word: str) -> F32:
        """The vector of one word. Raises KeyError with near words."""
        return np.asarray(self.vectors([word])[0])

    def row(self, word: str) -> int:
        """Row number of a word. Raises KeyError with near words."""
        found = self._packed.find(word)
        if found is None:
            near = difflib.get_close_matches(word, self._sample(), n=3) if len(self) <= CHUNK_ROWS else []
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise KeyError(f"{word!r} is not among the {len(self)} words{hint}")
        return found

    def _sample(self) -> list[str]:
        return list(self)

    def word(self, row: int) -> str:
        """The word of a row."""
        return self._packed.word(row)

    def vectors(self, words: Sequence[str]) -> F32:
        """Vectors float32 (len(words), dim). Raises KeyError at the first unknown word."""
        return self.rows([self.row(w) for w in words])

    def rows(self, rows: Sequence[int] | npt.NDArray[np.integer]) -> F32:
        """Vectors float32 (len(rows), dim) of row numbers."""
        return self._rows(np.asarray(rows, np.int64).reshape(-1))

    def blocks(self, rows: int = CHUNK_ROWS) -> Iterator[F32]:
        """All vectors, some rows at a time."""
        for start in range(0, len(self), rows):
            yield self._rows(np.arange(start, min(start + rows, len(self))))

    def mean(self, words: Iterable[str]) -> F32:
        """Mean vector float32 (dim,) of those words that are known; zeros if none is."""
        known = [r for w in words if (r := self._packed.find(w)) is not None]
        return self.rows(known).mean(axis=0) if known else np.zeros(self.dim, np.float32)

    def similarity(self, one: str, other: str) -> float:
        """Cosine of two words' vectors; 0 if one of them is zero."""
        a, b = self.vectors([one, other])
        size = float(np.linalg.norm(a) * np.linalg.norm(b))
        return float(a @ b) / size if size else 0.0

    def most_similar(self, to: str | npt.NDArray[np.floating], n: int = 10) -> list[tuple[str, float]]:
        """The n nearest words by cosine with their cosines, nearest first; a word given is not among them."""
        own = self.row(to) if isinstance(to, str) else -1
        target = self.rows([own])[0] if isinstance(to, str) else np.asarray(to, np.float32)
        if target.shape != (self.dim,):
            raise DataError(f"a vector to compare with must have shape ({self.dim},), but got {target.shape}")
        target = target / max(float(np.linalg.norm(target)), 1e-30)
        best: list[tuple[float, int]] = []
        start = 0
        for block in self.blocks():
            cosines = block @ target / np.maximum(np.linalg.norm(block, axis=1), 1e-30)
            if start <= own < start + len(block):
                cosines[own - start] = -np.inf
            k = min(n, len(cosines))
            top = np.argpartition(-cosines, max(k - 1, 0))[:k]
            best = sorted([*best, *((-float(cosines[i]), start + int(i)) for i in top)])[:n]
            start += len(block)
        return [(self._packed.word(row), -negative) for negative, row in best if np.isfinite(negative)]


def from_arrays(words: Sequence[str], vectors: npt.NDArray[np.floating], *, where: str = "") -> Words:
    """A table over arrays in memory: vectors (rows, dim)."""
    table = np.ascontiguousarray(vectors, np.float32)
    if table.ndim != 2 or len(words) != len(table):
        raise DataError(f"vectors must be (rows, dim) with a word a row, but got {table.shape} and {len(words)} words")
    return Words(vocabulary.pack(words), lambda rows: table[rows], table.shape[1], where=where)


def load(
    path: str | Path, *, vocabulary: str | Path | None = None, tensor: str | None = None, skip_bad: bool = False
) -> Words:
    """Open a table of vectors for use.

    A file that `featherweight words` wrote as .safetensors is mapped: nothing is read until a word is asked for. Any
    other format (see `open_table`) is read into memory. Raises DataError.
    """
    where = Path(path)
    if where.suffix == ".safetensors" and where.is_file():
        header = safetensors.read_header(where)
        if is_ours(header):
            return indexed(header)
    from featherweight.embeddings.opening import open_table

    table = open_table(where, vocabulary=vocabulary, tensor=tensor, skip_bad=skip_bad)
    words, vectors = table.read()
    return from_arrays(words, vectors, where=str(where))


def is_ours(header: safetensors.Header) -> bool:
    """True for a file that `featherweight words` wrote, of whichever version."""
    return header.metadata.get("format", "").startswith("featherweight words")


def as_table(header: safetensors.Header, *, skip_bad: bool = False) -> Table:
    """The Table of one of our own files, decoded."""
    words = indexed(header)

    def stream(size: int, bad: Bad) -> Iterator[Block]:  # noqa: ARG001  # nothing raw can be bad here
        for start in range(0, len(words), size):
            rows = range(start, min(start + size, len(words)))
            yield Block([words.word(i) for i in rows], words.rows(rows), [i + 1 for i in rows])

    where = str(header.path)
    return Table(where, FORMAT, len(words), words.dim, stream, "row", bad=Bad(where, skip_bad))


def indexed(header: safetensors.Header) -> Words:
    """Open one of our own files. Raises DataError for another version, or arrays that do not fit together."""
    found = header.metadata["format"]
    if found != FORMAT:
        raise DataError(f"{header.path} has the format {found!r}, but this version reads {FORMAT!r}")
    missing = [n for n in WORD_ARRAYS if n not in header.tensors]
    if missing:
        raise DataError(f"{header.path} must hold {', '.join(WORD_ARRAYS)}, but {missing[0]} is missing")
    offsets, order, text = (header.mapped(n) for n in WORD_ARRAYS)
    wanted = {"words.offsets": (("U32", "I64"), len(order) + 1), "words.order": (("U32",), len(order))}
    for name, (types, size) in wanted.items():
        t = header.tensors[name]
        if t.dtype not in types or t.shape != (size,):
            raise DataError(f"{header.path}: {name} must be {' or '.join(types)} ({size},), but is {t.dtype} {t.shape}")
    packed = Packed(text, offsets, order)
    if "coding" in header.metadata:
        from featherweight.embeddings.compressed import from_header

        coded = from_header(header)
        if coded.n_rows != len(order):
            raise DataError(f"{header.path} holds {len(order)} words, but its coding {coded.n_rows} rows")
        return Words(packed, coded.rows, coded.dim, where=str(header.path))
    vectors = header.tensors.get(VECTORS)
    if vectors is None or vectors.dtype != "F32" or len(vectors.shape) != 2 or vectors.shape[0] != len(order):
        raise DataError(f"{header.path} must hold float32 vectors ({len(order)}, dim), but they are {vectors}")
    mapped = header.mapped(VECTORS)
    return Words(packed, lambda r: np.asarray(mapped[r]), vectors.shape[1], where=str(header.path))
