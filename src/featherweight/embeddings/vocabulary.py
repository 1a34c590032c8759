"""The words of a table: read from a list or a tokenizer, and packed so that one is found without reading the others."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.errors import DataError

BESIDE = (
    "{stem}.vocab.txt",
    "{stem}.words.txt",
    "vocab.txt",
    "{stem}-tokenizer.json",
    "{stem}.tokenizer.json",
    "tokenizer.json",
)


def beside(path: Path) -> Path | None:
    """The list of words that lies next to a file of bare vectors, by its usual names."""
    found = (path.with_name(name.format(stem=path.stem)) for name in BESIDE)
    return next((p for p in found if p.is_file()), None)


def read_words(path: Path, rows: int) -> list[str]:
    """`rows` words: one a line (what follows a tab is dropped), or those of a tokenizer.json by id.

    Ids that no token has are named `[id]`. Raises DataError if their number does not fit, or naming the bad line.
    """
    try:
        data = path.read_bytes()
    except OSError as e:
        raise DataError(f"the vocabulary {path} cannot be read: {e.strerror or e}") from e
    if path.suffix == ".json":
        return _of_tokenizer(path, data, rows)
    words = []
    lines = data.split(b"\n")
    if lines and not lines[-1]:
        lines.pop()
    for number, line in enumerate(lines, 1):
        try:
            words.append(line.rstrip(b"\r").split(b"\t")[0].decode("utf-8"))
        except UnicodeDecodeError as e:
            raise DataError(f"{path} line {number} is not UTF-8 ({e.reason} at byte {e.start}); convert it") from e
    if len(words) != rows:
        raise DataError(f"the vocabulary {path} must have a word for each of the {rows} rows, but it has {len(words)}")
    return words


def _of_tokenizer(path: Path, data: bytes, rows: int) -> list[str]:
    try:
        model: Any = json.loads(data)["model"]
        listed = model["vocab"]
        pairs = listed.items() if isinstance(listed, dict) else ((entry[0], i) for i, entry in enumerate(listed))
        ids = {int(i): str(token) for token, i in pairs}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path} is no tokenizer.json with a model's vocab ({type(e).__name__}: {e})") from e
    if ids and max(ids) >= rows:
        raise DataError(f"the tokenizer {path} has ids up to {max(ids)}, but the table has only {rows} rows")
    return [ids.get(i, f"[{i}]") for i in range(rows)]


def read_counts(path: Path) -> dict[str, int]:
    """Word counts: a word, a tab or space, and a whole number a line. Raises DataError naming the bad line."""
    found: dict[str, int] = {}
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                word, _, count = line.rstrip("\n").replace("\t", " ").rpartition(" ")
                if not word or not count.isdigit():
                    raise DataError(
                        f"{path} line {number} must be a word and its count, but got {line.rstrip()[:60]!r}"
                    )
                found[word] = int(count)
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"the counts {path} cannot be read: {e}") from e
    return found


@dataclass(frozen=True, eq=False)
class Packed:
    """Words as arrays that may be memory-mapped: one is found by bisection, no more than some twenty are read.

    Word i is text[offsets[i]:offsets[i + 1]] in UTF-8; `order` are the rows sorted by these bytes.
    """

    text: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.uint32] | npt.NDArray[np.int64]
    order: npt.NDArray[np.uint32]

    def __len__(self) -> int:
        return len(self.order)

    def _bytes(self, row: int) -> bytes:
        return self.text[int(self.offsets[row]) : int(self.offsets[row + 1])].tobytes()

    def word(self, row: int) -> str:
        """The word of one row."""
        return self._bytes(row).decode("utf-8", "replace")

    def find(self, word: str) -> int | None:
        """Row of a word, None if it is not there."""
        raw = word.encode("utf-8", "surrogatepass")
        low, high = 0, len(self.order)
        while low < high:
            middle = (low + high) // 2
            if self._bytes(int(self.order[middle])) < raw:
                low = middle + 1
            else:
                high = middle
        if low == len(self.order):
            return None
        row = int(self.order[low])
        return row if self._bytes(row) == raw else None


def pack(words: Sequence[str]) -> Packed:
    """Packed form of a list of words."""
    raw = [w.encode("utf-8", "surrogatepass") for w in words]
    offsets = np.zeros(len(raw) + 1, np.int64)
    np.cumsum(np.fromiter(map(len, raw), np.int64, len(raw)), out=offsets[1:])
    order = np.array(sorted(range(len(raw)), key=raw.__getitem__), np.uint32)
    narrow = offsets.astype(np.uint32) if offsets[-1] < 1 << 32 else offsets
    return Packed(np.frombuffer(b"".join(raw), np.uint8), narrow, order)
