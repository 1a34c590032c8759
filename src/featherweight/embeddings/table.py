"""A table of word vectors as a stream of blocks, so that one larger than memory can be read, checked and changed.

Readers give raw blocks; what must hold in every format (finite numbers, no word twice) is checked here, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.errors import DataError

F32 = npt.NDArray[np.float32]
BLOCK_BYTES = 1 << 23
MAX_DIM = 1 << 16
MAX_WORD_BYTES = 4096


@dataclass
class Bad:
    """What to do about a line that cannot be used: stop with an error that names it, or skip and count.

    `counts` are skipped lines by cause, `first` the first place of each cause.
    """

    where: str
    skip: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)

    def __call__(self, place: str, cause: str, detail: str = "") -> None:
        """One bad place. Raises DataError with place and cause unless skipping."""
        if not self.skip:
            raise DataError(
                f"{self.where} {place}: {cause}{f' ({detail})' if detail else ''}; "
                "mend the file, or leave such lines out with --skip-bad"
            )
        self.counts[cause] = self.counts.get(cause, 0) + 1
        self.first.setdefault(cause, place)

    @property
    def total(self) -> int:
        """Places skipped in the last pass."""
        return sum(self.counts.values())


@dataclass(frozen=True)
class Block:
    """Some rows in file order: `words` and `vectors` float32 (len(words), dim); `places` where each stands, from 1."""

    words: list[str]
    vectors: F32
    places: Sequence[int]


Stream = Callable[[int, Bad], Iterator[Block]]


@dataclass
class Table:
    """A table on disk. `rows` as the file says, None if only reading it through tells; `kind` is its format in words.

    `unit` is what `places` count ("line" or "row"); `named` is False where no vocabulary was found and words are row
    numbers; `counts`, where known, hold how often each row's word occurs.
    """

    where: str
    kind: str
    rows: int | None
    dim: int
    stream: Stream
    unit: str = "line"
    named: bool = True
    bad: Bad = field(default_factory=lambda: Bad(""))
    _twice: dict[int, str] | None = None

    def blocks(self, rows: int | None = None) -> Iterator[Block]:
        """Checked blocks of at most `rows` rows, by default about 8 MB. Each call reads the file anew.

        Raises DataError naming line and cause: unreadable lines, numbers that are not finite, a word that comes
        twice. With `bad.skip` those are left out and counted; of a word that comes twice the first stays.
        """
        size = max(1, rows or BLOCK_BYTES // (4 * self.dim))
        self.bad.counts.clear()
        self.bad.first.clear()
        # A whole pass finds the words that come twice; later passes know their places and need not remember all words.
        known, seen, twice = self._twice, dict[str, int](), dict[int, str]()
        for block in self.stream(size, self.bad):
            good = np.array(np.isfinite(block.vectors).all(axis=1), ndmin=1)
            for i, (word, place) in enumerate(zip(block.words, block.places, strict=True)):
                if not good[i]:
                    self._not_finite(block, i)
                elif not word:
                    self.bad(f"{self.unit} {place}", "the word is empty")
                    good[i] = False
                elif known is not None:
                    if place in known:
                        self.bad(f"{self.unit} {place}", "the word comes twice", known[place])
                        good[i] = False
                elif seen.setdefault(word, place) != place:
                    twice[place] = f"{word!r}, first in {self.unit} {seen[word]}"
                    self.bad(f"{self.unit} {place}", "the word comes twice", twice[place])
                    good[i] = False
            if good.all():
                yield block
            elif good.any():
                at = np.flatnonzero(good)
                yield Block([block.words[int(i)] for i in at], block.vectors[at], [block.places[int(i)] for i in at])
        if known is None:
            self._twice = twice

    def _not_finite(self, block: Block, i: int) -> None:
        column = int(np.flatnonzero(~np.isfinite(block.vectors[i]))[0])
        value = block.vectors[i, column]
        self.bad(
            f"{self.unit} {block.places[i]}",
            "a number is not finite",
            f"{value} in column {column + 1} of {block.words[i]!r}",
        )

    def read(self) -> tuple[list[str], F32]:
        """All words and vectors float32 (rows, dim). Raises DataError as `blocks` does, and if nothing is left."""
        words: list[str] = []
        parts: list[F32] = []
        for block in self.blocks():
            words += block.words
            parts.append(block.vectors)
        if not parts:
            raise DataError(
                f"{self.where} holds no usable row{f'; {self.bad.total} were skipped' if self.bad.total else ''}"
            )
        return words, parts[0] if len(parts) == 1 else np.concatenate(parts)


def check_shape(where: str, rows: int, dim: int) -> None:
    """Raises DataError for a table without rows or columns, or wider than any real one."""
    if rows < 1 or not 1 <= dim <= MAX_DIM:
        raise DataError(f"{where} must hold at least 1 row and 1 to {MAX_DIM} columns, but says {rows} x {dim}")


def from_arrays(where: str, words: Sequence[str], vectors: npt.NDArray[Any], *, kind: str = "arrays") -> Table:
    """A Table over arrays in memory (vectors (rows, dim), any float type)."""
    if vectors.ndim != 2 or len(words) != len(vectors):
        raise DataError(
            f"{where} must be (rows, dim) with a word a row, but got {vectors.shape} and {len(words)} words"
        )
    check_shape(where, *vectors.shape)

    def stream(size: int, bad: Bad) -> Iterator[Block]:  # noqa: ARG001  # nothing raw can be bad here
        for start in range(0, len(words), size):
            part = np.ascontiguousarray(vectors[start : start + size], np.float32)
            yield Block(list(words[start : start + size]), part, range(start + 1, start + 1 + len(part)))

    return Table(where, kind, len(words), vectors.shape[1], stream, "row", bad=Bad(where))
