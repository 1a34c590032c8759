"""Bare arrays of vectors: .npy, .safetensors, a table inside an ONNX model. Their words lie in a file beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.embeddings import safetensors, vocabulary
from featherweight.embeddings.table import Bad, Block, Stream, Table, check_shape
from featherweight.errors import DataError

Rows = Callable[[int, int], npt.NDArray[Any]]
PICKLED = "nothing is unpickled here, since a pickle can run any code"


def npy_table(path: Path, *, words: Path | None = None, skip_bad: bool = False) -> Table:
    """The Table of a .npy of floats (rows, dim). Raises DataError for pickled objects, other types and shapes."""
    try:
        with path.open("rb") as file:
            major = np.lib.format.read_magic(file)[0]
            reader = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = reader(file)
            start = file.tell()
    except (ValueError, OSError) as e:
        raise DataError(f"{path} is no .npy file: {e}") from e
    if dtype.hasobject:
        raise DataError(f"{path} holds pickled Python objects: {PICKLED}; save the vectors as a float array")
    _check(str(path), shape, dtype.kind == "f", str(dtype))
    rows, dim = shape
    if path.stat().st_size < start + rows * dim * dtype.itemsize:
        raise DataError(f"{path} says {rows} x {dim} {dtype}, but the file ends early; it is cut off")
    mapped = np.memmap(path, dtype, "r", start, (rows, dim), order="F" if fortran else "C")
    take = (lambda a, b: mapped[a:b]) if fortran else _file_rows(path, start, dtype, dim)
    return _table(path, f".npy {dtype.name}", rows, dim, take, words, skip_bad)


def safetensors_table(
    path: Path, *, tensor: str | None = None, words: Path | None = None, skip_bad: bool = False
) -> Table:
    """The Table of one float (rows, dim) tensor: the one called `tensor`, else the largest."""
    header = safetensors.read_header(path)
    fits = {n: t for n, t in header.tensors.items() if t.dtype in safetensors.FLOATS and len(t.shape) == 2}
    if tensor is None and not fits:
        raise DataError(f"{path} has no float tensor (rows, dim); it holds {_listed(header.tensors)}")
    name = tensor if tensor is not None else max(fits, key=lambda n: fits[n].nbytes)
    if name not in header.tensors:
        raise DataError(f"{path} has no tensor {name!r}; it holds {_listed(header.tensors)}")
    found = header.tensors[name]
    _check(f"{path}: {name!r}", found.shape, found.dtype in safetensors.FLOATS, found.dtype)
    take = _file_rows(path, found.start, safetensors.DTYPES[found.dtype], found.shape[1])
    return _table(path, f"safetensors {name!r} {found.dtype}", found.shape[0], found.shape[1], take, words, skip_bad)


def onnx_table(path: Path, *, tensor: str | None = None, words: Path | None = None, skip_bad: bool = False) -> Table:
    """The Table of a weight that a Gather of an ONNX model reads: the one called `tensor`, else the largest."""
    from featherweight.graph import io
    from featherweight.graph.weights import weights

    gathered = {
        w.name: w for w in weights(io.load(path)) if len(w.shape) == 2 and any(u.role == "gather" for u in w.uses)
    }
    if not gathered:
        raise DataError(f"{path} has no table (rows, dim) that a Gather reads")
    name = tensor if tensor is not None else max(gathered, key=lambda n: gathered[n].size_bytes)
    if name not in gathered:
        raise DataError(f"{path} has no gathered table {name!r}; it has {_listed(gathered)}")
    array = gathered[name].array()
    return _table(path, f"ONNX {name!r}", len(array), array.shape[1], lambda a, b: array[a:b], words, skip_bad)


def _check(where: str, shape: tuple[int, ...], is_float: bool, dtype: str) -> None:
    if not is_float or len(shape) != 2:
        raise DataError(f"{where} must be floats of shape (rows, dim), but got {dtype} {shape}")
    check_shape(where, *shape)


def _listed(names: Any) -> str:
    shown = [repr(n) for n in list(names)[:8]]
    return ", ".join(shown) + (f" and {len(names) - 8} more" if len(names) > 8 else "") or "nothing"


def _file_rows(path: Path, start: int, dtype: np.dtype[Any], dim: int) -> Rows:
    """Rows by reading, not mapping: a pass over the file then takes no memory but its block."""

    def take(first: int, end: int) -> npt.NDArray[Any]:
        with path.open("rb") as file:
            file.seek(start + first * dim * dtype.itemsize)
            return np.fromfile(file, dtype, (end - first) * dim).reshape(-1, dim)

    return take


def _table(path: Path, kind: str, rows: int, dim: int, take: Rows, words: Path | None, skip_bad: bool) -> Table:
    where = words if words is not None else vocabulary.beside(path)
    named = vocabulary.read_words(where, rows) if where is not None else None
    return Table(
        str(path), kind, rows, dim, _stream(rows, take, named), "row", named is not None, bad=Bad(str(path), skip_bad)
    )


def _stream(rows: int, take: Rows, words: list[str] | None) -> Stream:
    def stream(size: int, bad: Bad) -> Iterator[Block]:  # noqa: ARG001  # arrays have no raw faults
        for start in range(0, rows, size):
            end = min(start + size, rows)
            names = words[start:end] if words is not None else [str(i) for i in range(start, end)]
            with np.errstate(over="ignore"):
                yield Block(names, np.ascontiguousarray(take(start, end), np.float32), range(start + 1, end + 1))

    return stream
