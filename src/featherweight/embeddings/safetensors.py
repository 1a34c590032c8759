"""The safetensors format, read and written without a library: a header in JSON, then plain arrays.

https://github.com/huggingface/safetensors: 8 bytes of header length, the header (may end in spaces), the data without
holes. Nothing in it can run code; here every offset is checked before anything is read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from featherweight.errors import DataError, OutputError

DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype("<i8"), "I32": np.dtype("<i4"), "I16": np.dtype("<i2"), "I8": np.dtype("i1"),
    "U64": np.dtype("<u8"), "U32": np.dtype("<u4"), "U16": np.dtype("<u2"), "U8": np.dtype("u1"),
    "BOOL": np.dtype("?"),
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = ("F64", "F32", "F16", "BF16")
MAX_HEADER_BYTES = 100_000_000
ALIGN = 64


@dataclass(frozen=True)
class Tensor:
    """Where an array lies: `start` is its offset in the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Header:
    """The arrays of a file by name, and its metadata (texts)."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]

    def mapped(self, name: str) -> npt.NDArray[Any]:
        """One array, memory-mapped and read-only: nothing is read before it is used."""
        t = self.tensors[name]
        if not t.nbytes:
            return np.zeros(t.shape, DTYPES[t.dtype])
        return np.memmap(self.path, DTYPES[t.dtype], "r", t.start, t.shape)


def is_safetensors(path: Path, begin: bytes) -> bool:
    """True if the file's name or first bytes say so."""
    return path.suffix == ".safetensors" or (len(begin) > 8 and begin[8:9] == b"{" and begin[5:8] == b"\0\0\0")


def read_header(path: Path) -> Header:
    """The checked header. Raises DataError naming what is wrong."""
    try:
        with path.open("rb") as file:
            total = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(MAX_HEADER_BYTES, total - 8):
                raise DataError(f"{path} is no safetensors file: its header would have {length} bytes of {total}")
            raw = json.loads(file.read(length))
    except OSError as e:
        raise DataError(f"{path} cannot be read: {e.strerror or e}") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is no safetensors file: its header is not JSON ({e})") from e
    if not isinstance(raw, dict):
        raise DataError(f"{path} is no safetensors file: its header must be an object, but is {type(raw).__name__}")
    metadata = raw.pop("__metadata__", {})
    tensors = {name: _tensor(path, name, entry, 8 + length, total) for name, entry in raw.items()}
    texts = {k: v for k, v in metadata.items() if isinstance(v, str)} if isinstance(metadata, dict) else {}
    return Header(path, tensors, texts)


def _tensor(path: Path, name: str, entry: Any, base: int, total: int) -> Tensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        start, end = entry["data_offsets"]
        if dtype not in DTYPES:
            raise DataError(f"{path}: the type of {name!r} must be one of {', '.join(DTYPES)}, but got {dtype!r}")
        if not all(isinstance(d, int) and d >= 0 for d in (*shape, start, end)):
            raise ValueError("negative or not whole")
        tensor = Tensor(name, dtype, shape, base + start)
    except (KeyError, TypeError, ValueError) as e:
        raise DataError(f"{path}: the header's entry of {name!r} is malformed ({e}): {entry!r:.100}") from e
    if end - start != tensor.nbytes or base + end > total:
        raise DataError(
            f"{path}: {name!r} needs {tensor.nbytes} bytes, but its place is {start}..{end} of {total - base}; the "
            "file is cut off or its header is wrong"
        )
    return tensor


class Writer:
    """Writes arrays one after another, without knowing them all before; `close` puts the header in front."""

    def __init__(self, file: IO[bytes], metadata: Mapping[str, str], *, header_bytes: int = 8192 - 8) -> None:
        """`file` is open for writing at its start; `header_bytes` are kept free for the header."""
        self._file, self._metadata, self._room = file, dict(metadata), header_bytes
        self._entries: dict[str, Any] = {}
        self._at, self._pads = 0, 0
        file.write(b"\0" * (8 + header_bytes))

    def add(self, name: str, array: npt.NDArray[Any]) -> None:
        """One array as a whole."""
        self.add_parts(name, [array], array.dtype, array.shape[1:])

    def add_parts(
        self, name: str, parts: Iterable[npt.NDArray[Any]], dtype: npt.DTypeLike, row_shape: tuple[int, ...]
    ) -> int:
        """One array from parts along its first axis; returns its rows."""
        kind = np.dtype(dtype).newbyteorder("<") if np.dtype(dtype) != DTYPES["BF16"] else np.dtype(dtype)
        if self._at % ALIGN:
            missing = ALIGN - self._at % ALIGN
            self._pads += 1
            self._put(f"pad{self._pads}", np.zeros(missing, np.uint8))
        start, rows = self._at, 0
        for part in parts:
            data = np.ascontiguousarray(part, kind)
            self._file.write(data.data if data.size else b"")
            self._at += data.nbytes
            rows += len(data)
        self._entries[name] = self._entry(kind, (rows, *row_shape), start)
        return rows

    def _put(self, name: str, array: npt.NDArray[Any]) -> None:
        start = self._at
        self._file.write(array.tobytes())
        self._at += array.nbytes
        self._entries[name] = self._entry(array.dtype, array.shape, start)

    def _entry(self, dtype: np.dtype[Any], shape: tuple[int, ...], start: int) -> dict[str, Any]:
        return {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [start, self._at]}

    def close(self) -> None:
        """Write the header. Raises OutputError if it does not fit the room left for it."""
        header = json.dumps({"__metadata__": self._metadata, **self._entries}, separators=(",", ":")).encode()
        if len(header) > self._room:
            raise OutputError(f"the header takes {len(header)} bytes, but {self._room} were kept for it")
        self._file.seek(0)
        self._file.write(self._room.to_bytes(8, "little") + header.ljust(self._room))
