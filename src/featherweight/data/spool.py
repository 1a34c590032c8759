"""Batches written to disk once, so that decoding happens once and a child process can read any of them.

A spool folder holds `index.json` and, for each input, one file of raw bytes, batch after batch. It is written
beside its
place and renamed when complete; a failure leaves nothing behind.
"""

from __future__ import annotations

import atexit
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from featherweight.core import Progress, Silent
from featherweight.data.checks import check_batch, verify
from featherweight.data.dataset import Array, Batch, Dataset, InputSpec, Piece, grouped
from featherweight.errors import DataError, OutputError

FORMAT = 1
_LABELS = "labels"


def named_dtype(name: str) -> np.dtype[np.generic]:
    """The type of a name, those of ml_dtypes (bfloat16, float8...) included."""
    try:
        dtype: np.dtype[np.generic] = np.dtype(name)
    except TypeError:
        import ml_dtypes

        dtype = np.dtype(getattr(ml_dtypes, name))
    return dtype


@dataclass(frozen=True, slots=True)
class Column:
    """One file of a spool. `shapes`, `starts` and `dtypes` have one entry a batch, or a single one if all are
    alike.
    """

    file: str
    shapes: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    dtypes: tuple[str, ...]

    def part(self, batch: int) -> tuple[int, tuple[int, ...], np.dtype[np.generic]]:
        """Byte offset, shape and type of one batch."""
        return self.starts[batch], self.shapes[batch], named_dtype(self.dtypes[batch if len(self.dtypes) > 1 else 0])


@dataclass(frozen=True)
class Spooled:
    """A spool folder as a source. Atoms are samples if all batches stack along their first axis, else batches."""

    folder: str
    origin: str
    columns: tuple[tuple[str, Column], ...]
    label_column: Column | None
    counts: tuple[int, ...]
    stackable: bool
    rows_per_sample: int
    tags: tuple[str, ...] | None
    names: tuple[str, ...]

    @property
    def where(self) -> str:
        """Where the data came from before it was spooled."""
        return self.origin

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(name for name, _ in self.columns)

    @property
    def has_labels(self) -> bool:
        """True if labels were spooled."""
        return self.label_column is not None

    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples an atom."""
        return np.ones(sum(self.counts), np.int64) if self.stackable else np.array(self.counts, np.int64)

    def labels(self, atoms: Sequence[int]) -> Array | None:
        """Labels of these atoms, end to end."""
        if self.label_column is None:
            return None
        with self._open(self.label_column) as f:
            return np.concatenate([self._array(f, self.label_column, a, 1) for a in atoms])

    def read(self, groups: Sequence[tuple[int, ...]]) -> Iterator[Piece]:
        """One piece a group."""
        with ExitStack() as stack:
            files = [(n, stack.enter_context(self._open(c)), c) for n, c in self.columns]
            label = stack.enter_context(self._open(self.label_column)) if self.label_column else None
            for group in groups:
                feeds = {n: _joined([self._array(f, c, a, self.rows_per_sample) for a in group]) for n, f, c in files}
                labels = None
                if label is not None and self.label_column is not None:
                    labels = _joined([self._array(label, self.label_column, a, 1) for a in group])
                yield Piece(self.names[group[0]] if self.names else str(group[0]), feeds, labels)

    def _open(self, column: Column) -> IO[bytes]:
        path = Path(self.folder) / column.file
        try:
            return path.open("rb")
        except OSError as e:
            raise DataError(f"spooled data {path} is gone ({e.strerror}); spool it again") from e

    def _array(self, f: IO[bytes], column: Column, atom: int, rows: int) -> Array:
        if self.stackable:
            _, shape, dtype = column.part(0)
            shape = (rows, *shape[1:])
            start = atom * math.prod(shape) * dtype.itemsize
        else:
            start, shape, dtype = column.part(atom)
        f.seek(start)
        size = math.prod(shape) * dtype.itemsize
        data = bytearray(f.read(size))
        if len(data) != size:
            raise DataError(f"spooled data {column.file} of {self.origin} is cut short; spool it again")
        return np.frombuffer(data, dtype).reshape(shape)


def _joined(parts: list[Array]) -> Array:
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


class _Writer:
    """Appends batches to the files of a spool and remembers their shapes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, IO[bytes]] = {}
        self.shapes: dict[str, list[tuple[int, ...]]] = {}
        self.starts: dict[str, list[int]] = {}
        self.dtypes: dict[str, list[str]] = {}
        self.counts: list[int] = []
        self.names: list[str] = []
        self.bytes = 0

    def add(self, batch: Batch) -> None:
        arrays = dict(batch.feeds)
        known = [k for k in self.files if k != _key(_LABELS, label=True)]
        if self.counts and sorted(known) != sorted(_key(n) for n in arrays):
            raise DataError(
                f"batch {batch.name or batch.index} has inputs {sorted(arrays)}, but the ones before "
                f"had {sorted(k[2:] for k in known)}"
            )
        if self.counts and (batch.labels is not None) != (_key(_LABELS, label=True) in self.files):
            raise DataError(
                f"batch {batch.name or batch.index} {'has' if batch.labels is not None else 'lacks'} "
                "labels, unlike the ones before"
            )
        for name, array in arrays.items():
            self._append(_key(name), array)
        if batch.labels is not None:
            self._append(_key(_LABELS, label=True), batch.labels)
        self.counts.append(batch.n)
        self.names.append(batch.name)

    def _append(self, key: str, array: Array) -> None:
        if key not in self.files:
            self.files[key] = (self.folder / f"{len(self.files)}.bin").open("wb")
            self.shapes[key], self.starts[key], self.dtypes[key] = [], [], []
        array = np.ascontiguousarray(array).reshape(array.shape)
        if array.dtype.kind == "O":
            array = array.astype("U")
        f = self.files[key]
        self.starts[key].append(f.tell())
        f.write(array.tobytes())
        self.shapes[key].append(array.shape)
        self.dtypes[key].append(_dtype_name(array.dtype))
        self.bytes += array.nbytes

    def finish(self, *, rows_per_sample: int, pad_free: bool) -> dict[str, Any]:
        for f in self.files.values():
            f.flush()
            os.fsync(f.fileno())
            f.close()
        stackable = pad_free and all(
            self._stacks(k, 1 if k == _key(_LABELS, label=True) else rows_per_sample) for k in self.files
        )
        columns = {}
        for number, key in enumerate(self.files):
            dtypes = self.dtypes[key]
            columns[key] = {
                "file": f"{number}.bin",
                "shapes": self.shapes[key][:1] if stackable else self.shapes[key],
                "starts": self.starts[key][:1] if stackable else self.starts[key],
                "dtypes": dtypes[:1] if len(set(dtypes)) == 1 else dtypes,
            }
        index = {"format": FORMAT, "columns": columns, "counts": self.counts, "stackable": stackable}
        (self.folder / "index.json").write_text(json.dumps(index), "utf-8")
        return index

    def _stacks(self, key: str, rows: int) -> bool:
        shapes = self.shapes[key]
        alike = len({s[1:] for s in shapes}) == 1 and len(set(self.dtypes[key])) == 1
        return alike and all(s and s[0] == n * rows for s, n in zip(shapes, self.counts, strict=True))

    def close(self) -> None:
        for f in self.files.values():
            f.close()


def _key(name: str, *, label: bool = False) -> str:
    """Inputs and labels must not clash, whatever an input is called."""
    return ("l:" if label else "i:") + name


def _dtype_name(dtype: np.dtype[np.generic]) -> str:
    return dtype.str if dtype.kind in "US" else dtype.newbyteorder("=").name if dtype.kind != "V" else dtype.name


def spool(
    dataset: Dataset,
    folder: str | Path,
    *,
    inputs: Sequence[InputSpec] | None = None,
    n_classes: int | None = None,
    max_bytes: int | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Write all batches of a dataset to `folder` and return the dataset that reads them from there.

    With `inputs` each batch is checked on its way (see `check_batch`), which saves a second pass. `folder`
    must not exist.
    Raises OutputError (exists, not writable, full disk, over max_bytes): nothing is left behind. Raises
    DataError as reading does.
    """
    bar = progress or Silent()
    bar.start("preparing data", dataset.n_batches)
    if inputs is not None:
        verify(dataset)

    def batches() -> Iterator[Batch]:
        for batch in dataset.batches():
            if inputs is not None:
                check_batch(batch, inputs, n_classes=n_classes)
            yield batch
            bar.advance()

    origin = write(
        batches(),
        Path(folder),
        where=dataset.source,
        rows_per_sample=dataset.rows_per_sample,
        pad_free=dataset.origin.stackable,
        max_bytes=max_bytes,
    )
    tags = _tags(dataset, origin)
    origin = dataclasses.replace(origin, tags=tags)
    n = len(origin.sizes())
    groups = _groups(origin) if origin.stackable else grouped(range(n), 1)
    return dataclasses.replace(dataset, origin=origin, groups=groups, fixed=dataset.fixed and origin.stackable)


def _groups(origin: Spooled) -> tuple[tuple[int, ...], ...]:
    groups, at = [], 0
    for n in origin.counts:
        groups.append(tuple(range(at, at + n)))
        at += n
    return tuple(groups)


def _tags(dataset: Dataset, origin: Spooled) -> tuple[str, ...] | None:
    tags = dataset.origin.tags
    if tags is None:
        return None
    if origin.stackable:
        return tuple(tags[a] for a in dataset.atoms())
    return tuple(tags[g[0]] for g in dataset.groups)


def write(
    batches: Iterable[Batch],
    folder: Path,
    *,
    where: str,
    rows_per_sample: int = 1,
    pad_free: bool = True,
    max_bytes: int | None = None,
) -> Spooled:
    """Write batches to a new folder, atomically. `pad_free`: their rows may be put into other batches later.

    Raises OutputError and leaves nothing behind; DataError where a batch's inputs differ from those before, or
    there is none.
    """
    if folder.exists():
        raise OutputError(f"the spool folder {folder} exists already; remove it or give another")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    except OSError as e:
        raise OutputError(
            f"prepared data cannot be written to {folder.parent} ({e.strerror or e}); give another folder"
        ) from e
    writer = _Writer(temporary)
    try:
        with closing(writer):
            for batch in batches:
                writer.add(batch)
                if max_bytes is not None and writer.bytes > max_bytes:
                    raise OutputError(
                        f"prepared data of {where} is over {max_bytes} B after {len(writer.counts)} "
                        "batches; give fewer or raise the limit"
                    )
            if not writer.counts:
                raise DataError(f"calibration data is empty: {where} gave no batch; give at least one")
            index = writer.finish(rows_per_sample=rows_per_sample, pad_free=pad_free)
        temporary.replace(folder)
    except OSError as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OutputError(
            f"prepared data cannot be written to {folder} ({e.strerror or e}); free some space or give another folder"
        ) from e
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return _spooled(folder, where, index, writer.names, rows_per_sample)


def _spooled(folder: Path, where: str, index: dict[str, Any], names: list[str], rows_per_sample: int) -> Spooled:
    columns = {
        key: Column(c["file"], tuple(map(tuple, c["shapes"])), tuple(c["starts"]), tuple(c["dtypes"]))
        for key, c in index["columns"].items()
    }
    label = columns.pop(_key(_LABELS, label=True), None)
    counts = tuple(index["counts"])
    stackable = bool(index["stackable"])
    if stackable:
        names = [n for n, count in zip(names, counts, strict=True) for _ in range(count)]
    inputs = tuple((key[2:], c) for key, c in columns.items())
    return Spooled(str(folder.resolve()), where, inputs, label, counts, stackable, rows_per_sample, None, tuple(names))


def temporary_folder() -> Path:
    """A folder that is removed when this process ends."""
    folder = tempfile.mkdtemp(prefix="featherweight-data-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
