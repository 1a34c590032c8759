"""What a data source is, and the `Dataset` every other part reads: re-iterable, streaming, picklable.

A source is made of *atoms*: samples where several may share a batch (stacked arrays, images, sentences), whole
batches where the user fixed them. A `Dataset` is a source and the atoms of each of its batches; it holds paths,
never arrays, so that a child process can read it and memory does not grow with the number of batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt

from featherweight.core import Note
from featherweight.errors import DataError

Array = npt.NDArray[np.generic]
Feeds = dict[str, Array]
Dim = int | str | None
MAX_BATCH_BYTES = 2 << 30


@dataclass(frozen=True, slots=True)
class InputSpec:
    """One input of a model: `shape` holds sizes, names of symbolic axes, None for unknown; None if the rank is
    unknown.
    """

    name: str
    dtype: np.dtype[np.generic]
    shape: tuple[Dim, ...] | None

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", np.dtype(self.dtype))
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))

    @property
    def rank(self) -> int | None:
        """Number of axes, if known."""
        return None if self.shape is None else len(self.shape)

    @property
    def rows(self) -> int | None:
        """Fixed size of the first axis, if it is fixed."""
        first = self.shape[0] if self.shape else None
        return first if isinstance(first, int) else None


@dataclass(frozen=True, slots=True)
class Batch:
    """What one call of the model takes. `n` samples; labels (n, ...); `name` says where it came from."""

    index: int
    feeds: Feeds
    labels: Array | None
    n: int
    name: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """A batch as a source gives it: its name, arrays by input name, labels (n, ...) if there are any."""

    name: str
    feeds: Feeds
    labels: Array | None = None


class Source(Protocol):
    """Where atoms come from. Holds paths and numbers only, so that pickling it is cheap."""

    @property
    def where(self) -> str:
        """The path or name a message should give."""
        ...

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the model's inputs that are filled."""
        ...

    @property
    def stackable(self) -> bool:
        """True if several atoms may share a batch."""
        ...

    @property
    def has_labels(self) -> bool:
        """True if every atom has a label."""
        ...

    @property
    def rows_per_sample(self) -> int:
        """Rows of the model's batch axis that belong to one sample."""
        ...

    @property
    def tags(self) -> tuple[str, ...] | None:
        """Split each atom was assigned to by the user: calibration, validation, holdout or ''; None without
        such a column.
        """
        ...

    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples in each atom, (atoms,)."""
        ...

    def labels(self, atoms: Sequence[int]) -> Array | None:
        """Labels of these atoms, (samples, ...), without reading the inputs."""
        ...

    def read(self, groups: Sequence[tuple[int, ...]]) -> Iterator[Piece]:
        """One piece for each group of atoms, in order; fastest when atoms ascend."""
        ...


@dataclass(frozen=True)
class Dataset:
    """A re-iterable stream of batches. Picklable: holds the recipe, not the arrays.

    `groups` are the atoms of each batch, `batch_size` how many atoms a batch gets when batches are made anew, `fixed`
    that they never are (the model takes exactly so many rows, which may be steps of one sequence), `notes` what was
    assumed or converted.
    """

    origin: Source
    groups: tuple[tuple[int, ...], ...]
    batch_size: int = 1
    fixed: bool = False
    dtypes: tuple[tuple[str, np.dtype[np.generic]], ...] = ()
    notes: tuple[Note, ...] = field(default=(), compare=False)

    @property
    def source(self) -> str:
        """Where the data came from."""
        return self.origin.where

    @property
    def n_batches(self) -> int:
        """Number of batches."""
        return len(self.groups)

    @property
    def n_samples(self) -> int:
        """Number of samples over all batches."""
        return int(sum(self._batch_sizes()))

    @property
    def has_labels(self) -> bool:
        """True if every sample has a label."""
        return self.origin.has_labels

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs every batch fills."""
        return self.origin.input_names

    @property
    def rows_per_sample(self) -> int:
        """Rows of the batch axis to a sample: 2 where rows 2i and 2i+1 are the two sentences of sample i."""
        return self.origin.rows_per_sample

    def _batch_sizes(self) -> list[int]:
        sizes = self.origin.sizes()
        return [int(sizes[list(g)].sum()) for g in self.groups]

    def batches(self) -> Iterator[Batch]:
        """Read the batches in order, one in memory at a time. Raises DataError naming what cannot be read."""
        wanted = dict(self.dtypes)
        pieces = self.origin.read(self.groups)
        for index, (piece, n) in enumerate(zip(pieces, self._batch_sizes(), strict=True)):
            feeds = {
                name: conform(array, wanted.get(name, array.dtype), f"batch {piece.name}, input {name!r}")
                for name, array in piece.feeds.items()
            }
            yield Batch(index, feeds, piece.labels, n, piece.name)

    def subset(self, batches: Sequence[int]) -> Dataset:
        """The dataset of these batches (positions in this one), in the order given."""
        return dataclasses.replace(self, groups=tuple(self.groups[i] for i in batches))

    def units(self) -> list[tuple[int, ...]]:
        """What a split may deal out: single atoms, or whole batches if they are fixed."""
        return list(self.groups) if self.fixed else [(a,) for a in self.atoms()]

    def of_units(self, units: Sequence[tuple[int, ...]]) -> Dataset:
        """The dataset of these units, put into batches of `batch_size` anew unless batches are fixed."""
        if self.fixed:
            return dataclasses.replace(self, groups=tuple(units))
        atoms = [a for unit in units for a in unit]
        return dataclasses.replace(self, groups=grouped(atoms, self.batch_size if self.origin.stackable else 1))

    def atoms(self) -> list[int]:
        """The atoms of all batches, in order."""
        return [a for g in self.groups for a in g]

    def labels(self) -> Array | None:
        """Labels of all samples in the order of `batches()`, (n_samples, ...), or None."""
        return self.origin.labels(self.atoms()) if self.has_labels else None


def grouped(atoms: Sequence[int], size: int) -> tuple[tuple[int, ...], ...]:
    """Atoms in runs of `size`; the last may be shorter."""
    return tuple(tuple(atoms[i : i + size]) for i in range(0, len(atoms), size))


def is_float(dtype: np.dtype[np.generic]) -> bool:
    """True for float types, those of ml_dtypes included (numpy calls their kind 'V')."""
    return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float"))


def castable(found: np.dtype[np.generic], wanted: np.dtype[np.generic]) -> bool:
    """Whether arrays of one type may be given where the model wants the other.

    Floats become floats, integers become integers (values are checked), bool becomes integer. Integers never become
    floats: pixels 0..255 given to a model that wants normalised floats would run, and mean nothing.
    """
    if found == wanted or (is_float(found) and is_float(wanted)):
        return True
    if wanted.kind in "iu":
        return found.kind in "iub"
    return found.kind in "US" and wanted.kind in "OUS"


def conform(array: Array, wanted: np.dtype[np.generic], where: str) -> Array:
    """`array` in the type the model wants. Raises DataError where `castable` forbids it or a value does not fit."""
    if array.dtype == wanted:
        return array
    if not castable(array.dtype, wanted):
        raise DataError(
            f"{where}: the model wants {wanted.name}, but the data is {array.dtype.name}; "
            f"{_way_out(array.dtype, wanted)}"
        )
    if wanted.kind in "iu" and array.size:
        limits = np.iinfo(wanted.name)
        low, high = int(array.min()), int(array.max())
        if low < limits.min or high > limits.max:
            bad = low if low < limits.min else high
            raise DataError(
                f"{where}: the value {bad} does not fit the model's {wanted.name} ({limits.min}..{limits.max})"
            )
    if wanted.kind in "OUS":
        return array.astype(object) if wanted.kind == "O" else array
    with np.errstate(over="ignore"):  # an overflow becomes inf, which the check for finite values reports
        return array.astype(wanted)


def _way_out(found: np.dtype[np.generic], wanted: np.dtype[np.generic]) -> str:
    if is_float(wanted) and found.kind in "iu":
        return f"prepare it as the model was trained (scale, mean, std) and save it as {wanted.name}"
    return f"save it as {wanted.name}"
