"""A compressed table: row i is gain[i] * (mean + columns[i] @ basis), every part of it in few bits.

The parts are those of graph.encode, so the same arrays are decoded here in numpy, from a mapped file, and by standard
operators in an ONNX model.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from featherweight.embeddings import safetensors
from featherweight.embeddings.table import F32
from featherweight.errors import DataError
from featherweight.graph import encode
from featherweight.graph.encode import make
from featherweight.graph.encode.layout import KINDS, Encoded, Layout

Array = npt.NDArray[Any]
CODING = "coding"
ROW_ARRAYS = ("codes", "field4", "field2", "field1")


@dataclass(frozen=True, eq=False)
class Part:
    """A coded table (rows, width): `arrays` as graph.encode stores them for look-ups, perhaps mapped from a file."""

    layout: Layout
    arrays: Mapping[str, Array]

    @classmethod
    def of(cls, encoded: Encoded) -> Part:
        """The part of an encoding that can be looked up."""
        looked_up = encoded if encoded.kind == "lookup" else encode.lookup(encoded)
        return cls(looked_up.layout, make.arrays_of(looked_up))

    @property
    def nbytes(self) -> int:
        """Bytes of its arrays."""
        return sum(a.nbytes for a in self.arrays.values())

    @property
    def width(self) -> int:
        """Columns it decodes to."""
        return self.layout.shape[1]

    def rows(self, index: npt.NDArray[np.int64]) -> F32:
        """Decoded rows float32 (len(index), width); only these rows are read."""
        taken = {
            k: np.asarray(a[index]) if k in ROW_ARRAYS or self._by_row(k) else np.asarray(a)
            for k, a in self.arrays.items()
        }
        few = dataclasses.replace(self.layout, shape=(len(index), self.layout.shape[1]))
        if not len(index):
            return np.zeros(few.shape, np.float32)
        return np.asarray(encode.decode(make.from_arrays(taken, few)), np.float32)

    def _by_row(self, key: str) -> bool:
        return key == "scale" and self.layout.axis == 0

    def encoded(self) -> Encoded:
        """As graph.encode knows it."""
        return make.from_arrays({k: np.asarray(a) for k, a in self.arrays.items()}, self.layout)


def joined(parts: Sequence[Part]) -> Part:
    """Parts of one table, coded alike, one under another."""
    rows = sum(p.layout.shape[0] for p in parts)
    layout = dataclasses.replace(parts[0].layout, shape=(rows, parts[0].width))
    arrays = {
        k: np.concatenate([p.arrays[k] for p in parts]) if k in ROW_ARRAYS and len(parts) > 1 else a
        for k, a in parts[0].arrays.items()
    }
    return Part(layout, arrays)


@dataclass(frozen=True, eq=False)
class Compressed:
    """See the module's text. `columns` lie side by side; `gain` has one column (None: 1); `basis` (k, dim) turns
    columns into directions (None: they are those already); `mean` float32 (dim,) or None; `row_of` (rows,) sends each
    row to the one that is kept in its place (None: itself). `place` (dim,), only without a basis: where each column
    stands among the stored ones; past the last is a column of zeros.
    """

    columns: tuple[Part, ...]
    gain: Part | None
    basis: Part | None
    mean: F32 | None
    place: npt.NDArray[np.uint16] | None
    row_of: npt.NDArray[np.unsignedinteger[Any]] | None
    dim: int

    @property
    def n_rows(self) -> int:
        """Rows of the table, those that share a kept one counted each."""
        return self.kept if self.row_of is None else len(self.row_of)

    @property
    def kept(self) -> int:
        """Rows that are stored."""
        parts = (*self.columns, *((self.gain,) if self.gain else ()))
        return int(parts[0].layout.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in self.arrays().values())

    def rows(self, index: npt.NDArray[np.int64]) -> F32:
        """Decoded vectors float32 (len(index), dim)."""
        try:
            return self._decoded(np.asarray(index, np.int64))
        except (IndexError, ValueError) as e:
            raise DataError(f"the coded table holds an index that is out of range ({e}); the file is damaged") from e

    def _decoded(self, at: npt.NDArray[np.int64]) -> F32:
        if self.row_of is not None:
            at = np.asarray(self.row_of[at], np.int64)
        parts = [part.rows(at) for part in self.columns]
        made = np.concatenate(parts, axis=1) if parts else np.zeros((len(at), self.dim), np.float32)
        if parts and self.basis is not None:
            made = made @ self.basis.rows(np.arange(self.basis.layout.shape[0]))
        elif parts and self.place is not None:
            made = np.concatenate([made, np.zeros((len(at), 1), np.float32)], axis=1)[:, self.place]
        if self.mean is not None:
            made = made + self.mean
        return np.asarray(made * self.gain.rows(at) if self.gain is not None else made, np.float32)

    def arrays(self) -> dict[str, Array]:
        """Everything to store, by name."""
        found: dict[str, Array] = {}
        for name, part in self._named():
            found |= {f"{name}.{key}": array for key, array in part.arrays.items()}
        if self.mean is not None:
            found["mean"] = self.mean
        if self.place is not None:
            found["place"] = self.place
        if self.row_of is not None:
            found["row_of"] = self.row_of
        return found

    def metadata(self) -> dict[str, str]:
        """The layouts, as one JSON text."""
        layouts = {name: dataclasses.asdict(part.layout) for name, part in self._named()}
        return {CODING: json.dumps({"dim": self.dim, "columns": len(self.columns), "layouts": layouts})}

    def _named(self) -> list[tuple[str, Part]]:
        named = [(f"columns{i}", part) for i, part in enumerate(self.columns)]
        named += [("gain", self.gain)] if self.gain is not None else []
        return named + ([("basis", self.basis)] if self.basis is not None else [])


def from_header(header: safetensors.Header) -> Compressed:
    """The table of a file, mapped. Raises DataError where arrays and layouts do not fit together."""
    try:
        raw = json.loads(header.metadata[CODING])
        dim, count = int(raw["dim"]), int(raw["columns"])
        layouts = {name: _layout(entry) for name, entry in raw["layouts"].items()}
        columns = tuple(_part(header, f"columns{i}", layouts) for i in range(count))
        gain = _part(header, "gain", layouts) if "gain" in layouts else None
        basis = _part(header, "basis", layouts) if "basis" in layouts else None
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{header.path}: its coding is malformed ({type(e).__name__}: {e})") from e
    mean = np.asarray(header.mapped("mean"), np.float32) if "mean" in header.tensors else None
    row_of = header.mapped("row_of") if "row_of" in header.tensors else None
    place = np.asarray(header.mapped("place")) if "place" in header.tensors else None
    made = Compressed(columns, gain, basis, mean, place, row_of, dim)
    width = sum(part.width for part in columns)
    rows = {part.layout.shape[0] for part in (*columns, *((gain,) if gain else ()))}
    inner = basis.layout.shape if basis is not None else (width if place is not None else dim, dim)
    if not rows or len(rows) > 1 or (columns and (width, dim) != inner) or (mean is not None and mean.shape != (dim,)):
        raise DataError(
            f"{header.path}: the parts of its coding do not fit together ({rows} rows, {width} columns, {dim=})"
        )
    return made


def _layout(entry: Mapping[str, Any]) -> Layout:
    fields = {**entry, "shape": tuple(entry["shape"])}
    layout = Layout(**fields)
    if layout.kind != "lookup" or layout.inner not in KINDS or len(layout.shape) != 2 or min(layout.shape) < 1:
        raise ValueError(f"no looked-up table: {entry}")
    return layout


def _part(header: safetensors.Header, name: str, layouts: Mapping[str, Layout]) -> Part:
    layout = layouts[name]
    prefix = f"{name}."
    arrays = {n[len(prefix) :]: header.mapped(n) for n in header.tensors if n.startswith(prefix)}
    wrong = [k for k, a in arrays.items() if k in ROW_ARRAYS and (a.ndim != 2 or len(a) != layout.shape[0])]
    if wrong or not arrays:
        raise ValueError(f"{name} has no rows of {layout.shape}")
    return Part(layout, arrays)
