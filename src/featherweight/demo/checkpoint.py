"""Read a PyTorch checkpoint of plain tensors without PyTorch and without executing anything in it.

Both forms are read: the zip archive written since PyTorch 1.6 and the stream of pickles written before. A
pickle can name any callable, so the reader below resolves an allow-list of six names and refuses all others.
"""

from __future__ import annotations

import collections
import io
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

# Restricted on purpose (see _Reader.find_class): no name outside the allow-list is ever resolved.
import pickle  # noqa: TID251 isort: skip

import numpy as np

from featherweight.errors import ModelError

_MAGIC = 0x1950A86A20F9469CFC6C
_STORAGE_DTYPES = {
    "FloatStorage": np.dtype("<f4"),
    "DoubleStorage": np.dtype("<f8"),
    "HalfStorage": np.dtype("<f2"),
    "LongStorage": np.dtype("<i8"),
    "IntStorage": np.dtype("<i4"),
    "ShortStorage": np.dtype("<i2"),
    "CharStorage": np.dtype("<i1"),
    "ByteStorage": np.dtype("<u1"),
    "BoolStorage": np.dtype("?"),
}


@dataclass(frozen=True)
class _Storage:
    """A flat buffer named in the pickle; its bytes lie elsewhere in the file."""

    key: str
    dtype: np.dtype[Any]
    numel: int


@dataclass(frozen=True)
class _View:
    """A tensor: a strided window on a storage."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


def read_checkpoint(path: Path, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """Tensors by name, in file order, from a `.pth` holding one flat state dict (or one under the key `entry`).

    Raises ModelError if the file is neither form, is truncated, or names anything but tensors.
    """
    try:
        if zipfile.is_zipfile(path):
            views, buffers = _read_zip(path)
        else:
            views, buffers = _read_stream(path)
        views = views if entry is None else views[entry]
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, IndexError, zipfile.BadZipFile) as e:
        raise ModelError(f"{path.name} is not a readable PyTorch checkpoint of plain tensors: {e}") from e
    if not isinstance(views, dict) or not all(isinstance(v, _View) for v in views.values()):
        raise ModelError(f"{path.name} must hold one flat dictionary of tensors, but got {type(views).__name__}")
    return {str(name): _materialise(str(name), view, buffers) for name, view in views.items()}


def _materialise(name: str, view: _View, buffers: dict[str, np.ndarray]) -> np.ndarray:
    """A contiguous copy of one view; every element must lie inside its storage."""
    flat = buffers[view.storage.key]
    if len(view.shape) != len(view.strides) or min((*view.shape, *view.strides, view.offset), default=0) < 0:
        raise ModelError(f"tensor {name!r} has shape {view.shape} with strides {view.strides}")
    last = view.offset + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
    if math.prod(view.shape) and last >= flat.size:
        raise ModelError(f"tensor {name!r} reaches element {last} of a storage of {flat.size}")
    step = flat.dtype.itemsize
    strided = np.lib.stride_tricks.as_strided(flat[view.offset :], view.shape, [s * step for s in view.strides])
    return np.ascontiguousarray(strided).reshape(view.shape)


def _view(storage: _Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: object) -> _View:
    """Stand-in for `torch._utils._rebuild_tensor_v2`."""
    if not isinstance(storage, _Storage):
        raise pickle.UnpicklingError(f"a tensor must be built on a storage, but got {type(storage).__name__}")
    return _View(storage, int(offset), tuple(map(int, shape)), tuple(map(int, strides)))


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _view,
    ("torch._utils", "_rebuild_parameter"): lambda view, *_: view,
}


class _Reader(pickle.Unpickler):
    """An unpickler that knows dictionaries, numbers, strings and tensors, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        """Resolve an allow-listed name. Raises UnpicklingError on all others."""
        if module == "torch" and name in _STORAGE_DTYPES:
            return _STORAGE_DTYPES[name]
        found = _ALLOWED.get((module, name))
        if found is None:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which is not a tensor; nothing was run")
        return found

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage reference: ("storage", dtype, key, location, numel, ...)."""
        kind, dtype, key, _location, numel = pid[:5]
        if kind != "storage" or not isinstance(dtype, np.dtype):
            raise pickle.UnpicklingError(f"it refers to {kind!r} where a storage belongs")
        if len(pid) > 5 and pid[5] is not None:
            raise pickle.UnpicklingError("it uses views of storages, written before PyTorch 0.4")
        return _Storage(str(key), dtype, int(numel))


def _read_zip(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The archive form: `<root>/data.pkl` and one member `<root>/data/<key>` a storage."""
    with zipfile.ZipFile(path) as archive:
        pickles = [n for n in archive.namelist() if n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"an archive must hold one data.pkl, but got {len(pickles)}")
        root = pickles[0].removesuffix("data.pkl")
        views = _Reader(io.BytesIO(archive.read(pickles[0]))).load()
        buffers = {}
        for storage in _storages(views):
            raw = archive.read(f"{root}data/{storage.key}")
            buffers[storage.key] = np.frombuffer(raw, storage.dtype, storage.numel)
    return views, buffers


def _read_stream(path: Path) -> tuple[Any, dict[str, np.ndarray]]:
    """The old form: pickles of magic, version, system, state dict, keys; then (int64 count, data) a storage."""
    with path.open("rb") as f:
        magic = _Reader(f).load()
        if magic != _MAGIC:
            raise ValueError("it starts with neither a zip archive nor PyTorch's magic number")
        version, system = _Reader(f).load(), _Reader(f).load()
        if version != 1001 or not system.get("little_endian", True):
            raise ValueError(f"protocol 1001, little-endian, is read, but got {version}, {system}")
        views, keys = _Reader(f).load(), _Reader(f).load()
        known = {s.key: s for s in _storages(views)}
        buffers = {str(key): _read_buffer(f, known[str(key)]) for key in keys}
    return views, buffers


def _read_buffer(f: IO[bytes], storage: _Storage) -> np.ndarray:
    """One storage of the old form; the count in front of it must be the one promised."""
    count = int(np.frombuffer(f.read(8), "<i8", 1)[0])
    if count != storage.numel:
        raise ValueError(f"storage {storage.key} has {count} elements, but {storage.numel} were promised")
    return np.frombuffer(f.read(count * storage.dtype.itemsize), storage.dtype, count)


def _storages(views: Any) -> list[_Storage]:
    """The distinct storages under the tensors of a state dict and of dictionaries in it (an optimiser's state)."""
    found: dict[str, _Storage] = {}
    for value in views.values():
        inner = [value.storage] if isinstance(value, _View) else _storages(value) if isinstance(value, dict) else []
        found.update({storage.key: storage for storage in inner})
    return list(found.values())
