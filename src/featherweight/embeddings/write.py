"""Vectors in the formats that others read: word2vec text and binary, .npy with its words, and our own safetensors."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
import numpy.typing as npt

from featherweight.embeddings import safetensors, vocabulary
from featherweight.embeddings.table import Block
from featherweight.errors import OutputError
from featherweight.whole import whole_file

FORMAT = "featherweight words 1"
VECTORS = "vectors"
ENTRY_BYTES = 100  # of the header, for one array
HEADER_BYTES = 24  # room for "rows dim", which is known last


def write_vectors(path: str | Path, blocks: Iterable[Block], dim: int) -> int:
    """Write blocks in the format that the ending of `path` names; returns the number of rows.

    .txt, .vec: word2vec text. .bin: word2vec binary. .npy: float32, words in NAME.vocab.txt beside it. .safetensors:
    our own indexed form. Raises OutputError for another ending, or if the file cannot be written.
    """
    where = Path(path)
    write = WRITERS.get(where.suffix)
    if write is None:
        raise OutputError(f"the ending of a vectors file must be one of {', '.join(WRITERS)}, but got {where.name!r}")
    return write(where, blocks, dim)


def write_text(path: Path, blocks: Iterable[Block], dim: int) -> int:
    """word2vec text; every float32 is written so that it is read back bit for bit."""

    def rows(file: IO[bytes], block: Block) -> None:
        for word, vector in zip(block.words, block.vectors, strict=True):
            numbers = " ".join(map(str, vector))
            file.write(f"{_one_token(word)} {numbers}\n".encode("utf-8", "surrogatepass"))

    return _word2vec(path, blocks, dim, rows)


def write_binary(path: Path, blocks: Iterable[Block], dim: int) -> int:
    """word2vec binary, little-endian."""

    def rows(file: IO[bytes], block: Block) -> None:
        data = block.vectors.astype("<f4", copy=False)
        for word, vector in zip(block.words, data, strict=True):
            file.write(_one_token(word).encode("utf-8", "surrogatepass") + b" " + vector.tobytes() + b"\n")

    return _word2vec(path, blocks, dim, rows)


def _one_token(word: str) -> str:
    """A word as these formats can hold it: their separator is a space, and so is every white space to their readers."""
    return "_".join(word.split()) if any(c.isspace() for c in word) else word


def _word2vec(path: Path, blocks: Iterable[Block], dim: int, write: Callable[[IO[bytes], Block], None]) -> int:
    with whole_file(path) as file:
        file.write(b" " * HEADER_BYTES + b"\n")
        count = 0
        for block in blocks:
            write(file, block)
            count += len(block.words)
        file.seek(0)
        file.write(f"{count} {dim}".encode().ljust(HEADER_BYTES))
    return count


def write_npy(path: Path, blocks: Iterable[Block], dim: int) -> int:
    """A float32 .npy, and its words beside it, one a line."""
    words: list[str] = []
    with whole_file(path) as file:
        room = _npy_header(file, 0, dim)
        for block in blocks:
            file.write(block.vectors.astype("<f4", copy=False).tobytes())
            words += block.words
        file.seek(0)
        if _npy_header(file, len(words), dim) != room:
            raise OutputError(f"{path}: the header of a .npy changed its length")
    with whole_file(path.with_name(f"{path.stem}.vocab.txt")) as file:
        file.write("".join(f"{_one_token(w)}\n" for w in words).encode("utf-8", "surrogatepass"))
    return len(words)


def _npy_header(file: IO[bytes], rows: int, dim: int) -> int:
    """Write the header with room for any number of rows; returns its length."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({rows}, {dim}), }}"
    file.write(b"\x93NUMPY\x01\x00" + (118).to_bytes(2, "little") + text.ljust(117).encode() + b"\n")
    return file.tell()


def write_indexed(path: Path, blocks: Iterable[Block], dim: int) -> int:
    """Our own form with plain float32 vectors: any safetensors reader takes it; see docs/formats.md."""
    words: list[str] = []

    def vectors() -> Iterator[npt.NDArray[np.float32]]:
        for block in blocks:
            words.extend(block.words)
            yield block.vectors

    with whole_file(path) as file:
        out = safetensors.Writer(file, {"format": FORMAT})
        out.add_parts(VECTORS, vectors(), np.float32, (dim,))
        add_words(out, words)
        out.close()
    return len(words)


def write_coded(path: Path, words: Sequence[str], coded: Coded) -> None:
    """Our own form with coded vectors. Raises OutputError."""
    with whole_file(path) as file:
        _put_coded(file, words, coded)


def coded_bytes(words: Sequence[str] | vocabulary.Packed, coded: Coded) -> int:
    """Bytes of the file that `write_coded` makes, without making it."""
    counter = _Counter()
    _put_coded(counter, words, coded)
    return counter.size


class Coded(Protocol):
    """What a compressed table gives to be stored."""

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Arrays by name."""
        ...

    def metadata(self) -> dict[str, str]:
        """How to read them."""
        ...


class _Counter(io.RawIOBase):
    """A file that only counts."""

    def __init__(self) -> None:
        self.size = self._at = 0

    def write(self, data: Any) -> int:
        n = memoryview(data).nbytes
        self._at += n
        self.size = max(self.size, self._at)
        return n

    def seek(self, offset: int, whence: int = 0) -> int:
        del whence
        self._at = offset
        return offset


def _put_coded(file: Any, words: Sequence[str] | vocabulary.Packed, coded: Coded) -> None:
    arrays, metadata = coded.arrays(), {"format": FORMAT, **coded.metadata()}
    room = len(json.dumps(metadata)) + ENTRY_BYTES * 2 * (len(arrays) + 6)
    room += -(8 + room) % safetensors.ALIGN
    out = safetensors.Writer(file, metadata, header_bytes=room)
    for name, array in arrays.items():
        out.add(name, array)
    add_words(out, words)
    out.close()


def add_words(out: safetensors.Writer, words: Sequence[str] | vocabulary.Packed) -> None:
    """The words and their index."""
    packed = words if isinstance(words, vocabulary.Packed) else vocabulary.pack(words)
    out.add("words.offsets", packed.offsets)
    out.add("words.order", packed.order)
    out.add("words.text", packed.text)


WRITERS: dict[str, Callable[[Path, Iterable[Block], int], int]] = {
    ".txt": write_text,
    ".vec": write_text,
    ".bin": write_binary,
    ".npy": write_npy,
    ".safetensors": write_indexed,
}
