"""Arrays inside `.npz` archives, read by rows and never unpickled.

Declared shapes are checked against the archive's own sizes before anything is allocated. Members stored without
compression are read at their place in the file; compressed ones are decompressed as a stream.
"""

from __future__ import annotations

import math
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from featherweight.data.dataset import MAX_BATCH_BYTES, Array
from featherweight.errors import DataError

_DEFLATE_LIMIT = 1100  # deflate cannot expand more than 1032 times (zlib's technical notes)
_CHUNK_BYTES = 1 << 16
_READ_ERRORS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, NotImplementedError)


@dataclass(frozen=True, slots=True)
class Member:
    """One array of an archive: its shape, type and where its bytes lie (`start` in the file if stored, else None)."""

    archive: str
    key: str
    shape: tuple[int, ...]
    dtype: np.dtype[np.generic]
    fortran: bool
    header_bytes: int
    start: int | None

    @property
    def nbytes(self) -> int:
        """Bytes of the whole array."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def row_bytes(self) -> int:
        """Bytes of one row of the first axis."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    @property
    def label(self) -> str:
        """How a message names this array."""
        return f"array {self.key!r} of {self.archive}"


def members(path: Path) -> list[Member]:
    """Every array of an archive, from the headers alone. Raises DataError on anything malformed or hostile."""
    try:
        with path.open("rb") as raw:
            if raw.read(2) != b"PK":
                raise DataError(f"{path} is not an .npz archive; write it with numpy.savez(path, input_name=array)")
        with zipfile.ZipFile(path) as z:
            found = [_member(path, z, info) for info in z.infolist()]
    except _READ_ERRORS as e:
        raise DataError(f"{path} cannot be read as .npz ({e}); it is damaged or truncated: write it again") from e
    seen: set[str] = set()
    for m in found:
        if m.key in seen:
            raise DataError(f"{path} holds the key {m.key!r} twice; keep one of them")
        seen.add(m.key)
    return found


def _member(path: Path, z: zipfile.ZipFile, info: zipfile.ZipInfo) -> Member:
    key = info.filename.removesuffix(".npy")
    where = f"array {key!r} of {path}"
    if info.flag_bits & 1:
        raise DataError(f"{where} is encrypted; write the archive with numpy.savez")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise DataError(
            f"{where} is compressed by method {info.compress_type}; write the archive with "
            "numpy.savez or savez_compressed"
        )
    if info.file_size > _DEFLATE_LIMIT * info.compress_size + 1024:
        raise DataError(
            f"{where} claims {info.file_size} B out of {info.compress_size} B, more than zip can "
            "compress; write it again"
        )
    with z.open(info) as f:
        shape, fortran, dtype = _header(f, where)
        header_bytes = f.tell()
    if dtype.hasobject:
        raise DataError(
            f"{where} holds Python objects, which would have to be unpickled; save plain numbers "
            "(same shape in every row, or keys '<batch>::<input>')"
        )
    if dtype.names is not None:
        raise DataError(f"{where} has fields {dtype.names}; save each as its own array")
    expected = math.prod(shape) * dtype.itemsize
    if info.file_size - header_bytes != expected:
        raise DataError(
            f"{where} declares shape {shape} of {dtype.name}, that is {expected} B, but holds "
            f"{info.file_size - header_bytes} B; write it again"
        )
    start = _data_start(path, info) + header_bytes if info.compress_type == zipfile.ZIP_STORED else None
    return Member(str(path), key, shape, dtype, fortran, header_bytes, start)


def _header(f: IO[bytes], where: str) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    fmt = np.lib.format
    try:
        version = fmt.read_magic(f)
        read = fmt.read_array_header_1_0 if version == (1, 0) else fmt.read_array_header_2_0
        shape, fortran, dtype = read(f)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError) as e:
        raise DataError(f"{where} is not an array in .npy form ({e}); write it with numpy.savez") from e
    if any(s < 0 for s in shape):
        raise DataError(f"{where} declares shape {shape}; sizes must be >= 0")
    return tuple(int(s) for s in shape), bool(fortran), dtype


def _data_start(path: Path, info: zipfile.ZipInfo) -> int:
    with path.open("rb") as f:
        f.seek(info.header_offset)
        head = f.read(30)
    if len(head) < 30 or head[:4] != b"PK\x03\x04":
        raise DataError(f"{path} is damaged at byte {info.header_offset}; write it again")
    name_length, extra_length = struct.unpack("<HH", head[26:30])
    return int(info.header_offset + 30 + name_length + extra_length)


class RowReader:
    """Rows of one array. Use inside `opened`; asking in ascending order reads a compressed member once."""

    def __init__(self, member: Member, z: zipfile.ZipFile) -> None:
        self._m = member
        self._z = z
        self._stream: IO[bytes] | None = None
        self._next = 0
        direct = member.start is not None and not member.fortran
        self._file = Path(member.archive).open("rb") if direct else None  # noqa: SIM115
        self._whole: Array | None = None

    def rows(self, indices: Sequence[int]) -> Array:
        """Rows `indices`, (len(indices), *shape[1:]), writable. Raises DataError if bytes are missing or damaged."""
        m = self._m
        if len(indices) * m.row_bytes > MAX_BATCH_BYTES:
            raise DataError(
                f"{m.label}: {len(indices)} rows are {len(indices) * m.row_bytes} B, over the limit "
                f"of {MAX_BATCH_BYTES} B a batch; use a smaller batch"
            )
        if m.fortran:
            return np.asarray(self._all()[np.asarray(indices)])
        out = np.empty((len(indices), *m.shape[1:]), dtype=m.dtype)
        flat = out.view().reshape(len(indices), -1).view(np.uint8) if out.size else None
        for i, start, count in _runs(indices):
            data = self._bytes(start, count)
            if flat is not None:
                flat[i : i + count] = np.frombuffer(data, np.uint8).reshape(count, -1)
        return out

    def _bytes(self, start: int, count: int) -> bytes:
        m = self._m
        size = count * m.row_bytes
        try:
            if self._file is not None and m.start is not None:
                self._file.seek(m.start + start * m.row_bytes)
                data = self._file.read(size)
            else:
                data = self._sequential(start, size)
        except _READ_ERRORS as e:
            raise DataError(f"{m.label} is damaged near row {start} ({e}); write it again") from e
        if len(data) != size:
            raise DataError(f"{m.label} ends before row {start + count}; write it again")
        return data

    def _sequential(self, start: int, size: int) -> bytes:
        m = self._m
        if self._stream is None or start < self._next:
            self._close_stream()
            self._stream = self._z.open(m.key + ".npy" if m.key + ".npy" in self._z.NameToInfo else m.key)
            _skip(self._stream, m.header_bytes)
            self._next = 0
        _skip(self._stream, (start - self._next) * m.row_bytes)
        data = self._stream.read(size)
        self._next = start + (size // m.row_bytes if m.row_bytes else 0)
        return data

    def _all(self) -> Array:
        m = self._m
        if self._whole is None:
            if m.nbytes > MAX_BATCH_BYTES:
                raise DataError(
                    f"{m.label} is stored column by column and is too big to hold ({m.nbytes} B); "
                    "save numpy.ascontiguousarray(array)"
                )
            self._whole = read_whole(m, self._z)
        return self._whole

    def _close_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def close(self) -> None:
        """Let go of the file."""
        self._close_stream()
        if self._file is not None:
            self._file.close()


def _runs(indices: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """(position, first, count) of each run of consecutive indices."""
    i = 0
    while i < len(indices):
        j = i + 1
        while j < len(indices) and indices[j] == indices[j - 1] + 1:
            j += 1
        yield i, indices[i], j - i
        i = j


def _skip(stream: IO[bytes], size: int) -> None:
    while size > 0:
        got = len(stream.read(min(size, _CHUNK_BYTES)))
        if got == 0:
            raise EOFError("the data ends early")
        size -= got


@contextmanager
def opened(path: Path) -> Iterator[zipfile.ZipFile]:
    """The archive, open. Raises DataError where it cannot be."""
    try:
        z = zipfile.ZipFile(path)
    except _READ_ERRORS as e:
        raise DataError(f"{path} cannot be read as .npz ({e}); was it moved or replaced?") from e
    with z:
        yield z


def read_whole(member: Member, z: zipfile.ZipFile) -> Array:
    """One whole array, checksum verified. Raises DataError if it is damaged or over MAX_BATCH_BYTES."""
    if member.nbytes > MAX_BATCH_BYTES:
        raise DataError(
            f"{member.label} is {member.nbytes} B, over the limit of {MAX_BATCH_BYTES} B a batch; use smaller batches"
        )
    name = member.key + ".npy"
    try:
        with z.open(name if name in z.NameToInfo else member.key) as f:
            _skip(f, member.header_bytes)
            data = bytearray(f.read())
    except (*_READ_ERRORS, KeyError) as e:
        raise DataError(f"{member.label} is damaged ({e}); write it again") from e
    if len(data) != member.nbytes:
        raise DataError(f"{member.label} holds {len(data)} B, but {member.nbytes} B were declared; write it again")
    array = np.frombuffer(data, member.dtype)
    return array.reshape(member.shape, order="F" if member.fortran else "C")


def verify_checksums(path: Path) -> None:
    """Read every byte once and compare checksums. Raises DataError naming the damaged array."""
    name = ""
    try:
        with zipfile.ZipFile(path) as z:
            for info in z.infolist():
                name = info.filename.removesuffix(".npy")
                with z.open(info) as f:
                    _skip(f, info.file_size)
                    f.read(1)  # the checksum is compared when the end is reached
    except _READ_ERRORS as e:
        raise DataError(f"array {name!r} of {path} is damaged ({e}); write it again") from e
