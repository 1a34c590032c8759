"""Vectors as text: word2vec (a first line "rows dim"), fastText's .vec (the same) and GloVe (no first line)."""

from __future__ import annotations

import gzip
import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np

from featherweight.embeddings.table import F32, MAX_DIM, MAX_WORD_BYTES, Bad, Block, Stream, Table, check_shape
from featherweight.errors import DataError

NUMBER_BYTES = 64  # the longest a number may be written


def opened(path: Path) -> IO[bytes] | gzip.GzipFile:
    """The file's bytes, unpacked if it is a .gz."""
    with path.open("rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    return gzip.open(path) if packed else path.open("rb")


def header(line: bytes) -> tuple[int, int] | None:
    """(rows, dim) of word2vec's first line; None if it is anything else."""
    parts = line.split()
    if len(parts) == 2 and all(p.isdigit() and len(p) < 19 for p in parts):
        return int(parts[0]), int(parts[1])
    return None


def text_table(path: Path, *, skip_bad: bool = False) -> Table:
    """The Table of a text file. Raises DataError if the first line is no row and no header."""
    with opened(path) as file:
        first = _line(file, MAX_DIM, path, 1) or b""
        said = header(first)
        if said is not None:
            rows, dim = said
            check_shape(f"{path} line 1", rows, dim)
            return Table(str(path), "word2vec text", rows, dim, _stream(path, dim, rows), bad=Bad(str(path), skip_bad))
        columns = len(first.split()) - 1
    if columns < 2 or _numbers([first.split(maxsplit=1)[1]], columns) is None:
        raise DataError(
            f"{path} line 1 must be 'rows dim' or a word with its numbers, but got {first[:60]!r}; give vectors in "
            "word2vec, GloVe or fastText text, word2vec binary, .npy, .safetensors or .onnx"
        )
    return Table(str(path), "GloVe text", None, columns, _stream(path, columns, None), bad=Bad(str(path), skip_bad))


def _stream(path: Path, dim: int, rows: int | None) -> Stream:
    def stream(size: int, bad: Bad) -> Iterator[Block]:
        with opened(path) as file:
            at = 0
            if rows is not None:
                file.readline()
                at = 1
            for lines in _batches(_lines(file, dim, path, at), size):
                at += len(lines)
                block = _parsed(list(lines), at - len(lines) + 1, dim, bad)
                if block.words:
                    yield block
            if rows is not None and at - 1 != rows:
                bad("line 1", "the first line is wrong", f"it says {rows} rows, but {at - 1} follow")

    return stream


def _batches(lines: Iterator[bytes], size: int) -> Iterator[tuple[bytes, ...]]:
    while batch := tuple(itertools.islice(lines, size)):
        yield batch


def _lines(file: IO[bytes] | gzip.GzipFile, dim: int, path: Path, at: int) -> Iterator[bytes]:
    while (line := _line(file, dim, path, at + 1)) is not None:
        at += 1
        yield line


def _line(file: IO[bytes] | gzip.GzipFile, dim: int, path: Path, number: int) -> bytes | None:
    """One line without its end; None at the end of the file. Raises DataError for one too long to be a row."""
    limit = MAX_WORD_BYTES + NUMBER_BYTES * (dim + 1)
    try:
        line = file.readline(limit)
    except (OSError, EOFError) as e:
        raise DataError(f"{path} line {number} cannot be read: {e}; the file is cut off or damaged") from e
    if not line:
        return None
    if len(line) == limit and not line.endswith(b"\n"):
        raise DataError(
            f"{path} line {number} is longer than {limit} bytes, so it is no row of {dim} numbers; is it text?"
        )
    return line.rstrip(b"\r\n \t")


def _parsed(lines: list[bytes], first: int, dim: int, bad: Bad) -> Block:
    """Parse lines at once where all are in order, else one by one, which finds out which is not and why."""
    split = [_split(line, dim) for line in lines]
    if all(numbers is not None for _, numbers in split):
        values = _numbers([numbers for _, numbers in split if numbers is not None], dim)
        if values is not None:
            words = [_decoded(word) for word, _ in split]
            if None not in words:
                return Block([w for w in words if w is not None], values, range(first, first + len(lines)))
    words_left: list[str] = []
    places: list[int] = []
    rows: list[F32] = []
    for number, line in enumerate(lines, first):
        found = _row(line, dim, f"line {number}", bad)
        if found is not None:
            words_left.append(found[0])
            rows.append(found[1])
            places.append(number)
    vectors = np.concatenate(rows) if rows else np.zeros((0, dim), np.float32)
    return Block(words_left, vectors, places)


def _split(line: bytes, dim: int) -> tuple[bytes, bytes | None]:
    """The word and its numbers, None if their count is wrong. A word may hold spaces (GloVe's 840B has such)."""
    if b"\t" in line or b"  " in line:
        line = b" ".join(line.split())
    spaces = line.count(b" ")
    if spaces < dim:
        return line, None
    if spaces == dim:
        word, _, numbers = line.partition(b" ")
        return word, numbers
    at = len(line)
    for _ in range(dim):
        at = line.rfind(b" ", 0, at)
    return line[:at], line[at + 1 :]


def _numbers(texts: list[bytes], dim: int) -> F32 | None:
    """float32 (len(texts), dim); None if not every text is numbers throughout."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            values = np.fromstring(b" ".join(texts).decode("ascii"), np.float32, sep=" ")
        except (DeprecationWarning, ValueError, UnicodeDecodeError, RuntimeWarning):
            return None
    return values.reshape(len(texts), dim) if values.size == len(texts) * dim else None


def _decoded(word: bytes) -> str | None:
    try:
        return word.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _row(line: bytes, dim: int, place: str, bad: Bad) -> tuple[str, F32] | None:
    """One row with every check; None if it was skipped."""
    raw, numbers = _split(line, dim)
    shown = raw[:40].decode("utf-8", "replace").split(" ")[0]
    if numbers is None:
        found = max(len(line.split()) - 1, 0)
        bad(place, f"there must be {dim} numbers after the word", f"{found} after {shown!r}")
        return None
    values = _numbers([numbers], dim)
    if values is None:
        wrong = next((p for p in numbers.split() if not is_number(p)), b"")
        bad(place, "this is not a number", f"{wrong[:40].decode('utf-8', 'replace')!r} after {shown!r}")
        return None
    word = _decoded(raw)
    if word is None:
        bad(place, "the word is not UTF-8", f"{raw[:40]!r}")
        return None
    return word, values


def is_number(part: bytes) -> bool:
    """True if Python reads it as a number."""
    try:
        float(part)
    except ValueError:
        return False
    return True
