"""word2vec's binary form: a line "rows dim", then each word, a space, and dim little-endian float32."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from featherweight.embeddings.read_text import header, opened
from featherweight.embeddings.table import MAX_WORD_BYTES, Bad, Block, Stream, Table, check_shape
from featherweight.errors import DataError

CHUNK_BYTES = 1 << 22


def binary_table(path: Path, *, skip_bad: bool = False) -> Table:
    """The Table of a binary file. Raises DataError if header and size of the file contradict each other."""
    with opened(path) as file:
        first = file.readline(64)
        said = header(first)
    if said is None:
        raise DataError(f"{path} line 1 must be 'rows dim', but got {first[:40]!r}")
    rows, dim = said
    check_shape(f"{path} line 1", rows, dim)
    size, least = path.stat().st_size, len(first) + rows * (4 * dim + 2)
    if size < least and not path.name.endswith(".gz") and not skip_bad:
        raise DataError(
            f"{path} line 1 says {rows} rows of {dim} numbers, which take at least {least} bytes, but the file has "
            f"{size}; it is cut off or its header is wrong; --skip-bad reads what is there"
        )
    return Table(str(path), "word2vec binary", rows, dim, _stream(path, rows, dim), "row", bad=Bad(str(path), skip_bad))


def _stream(path: Path, rows: int, dim: int) -> Stream:
    width = 4 * dim

    def stream(size: int, bad: Bad) -> Iterator[Block]:
        with opened(path) as file:
            file.readline()
            held, at, done = b"", 0, 0
            while done < rows:
                n = min(size, rows - done)
                words: list[str] = []
                places: list[int] = []
                vectors = np.empty((n, dim), np.float32)
                for _ in range(n):
                    if len(held) - at < MAX_WORD_BYTES + width + 2:
                        held, at = held[at:] + file.read(CHUNK_BYTES), 0
                    while held[at : at + 1] in (b"\n", b"\r"):
                        at += 1
                    space = held.find(b" ", at, at + MAX_WORD_BYTES)
                    if space < 0 or space + 1 + width > len(held):
                        cause = (
                            "the file ends early" if len(held) - at < MAX_WORD_BYTES + width else "no word ends here"
                        )
                        bad(f"row {done + 1}", cause, f"line 1 says {rows} rows")
                        done = rows
                        break
                    done += 1
                    raw, vector_at, at = held[at:space], space + 1, space + 1 + width
                    try:
                        word = raw.decode("utf-8")
                    except UnicodeDecodeError:
                        bad(f"row {done}", "the word is not UTF-8", f"{raw[:40]!r}")
                        continue
                    vectors[len(words)] = np.frombuffer(held, "<f4", dim, vector_at)
                    words.append(word)
                    places.append(done)
                if words:
                    yield Block(words, vectors[: len(words)], places)

    return stream
