"""`.npz` sources: (a) one array for each input, samples along the first axis; (b) keys `<batch>::<input>`.

Form (a): an array of the model's rank is cut into batches along its first axis; an array of one rank more holds a
whole feed in each row. Form (b) serves batches of different shapes. Labels are found under `labels`, `label` or `y`
unless an input has that name. A model with one input takes a file's only array whatever its name.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherweight.core import Note
from featherweight.data import arrays
from featherweight.data.arrays import Member, RowReader
from featherweight.data.dataset import Array, Dataset, InputSpec, Piece, castable, conform, grouped
from featherweight.errors import DataError

LABEL_NAMES = ("labels", "label", "y")
SEPARATOR = "::"


@dataclass(frozen=True)
class StackedNpz:
    """Form (a). `whole_rows`: each row of the arrays is a whole feed, so that rows cannot share a batch."""

    path: str
    columns: tuple[tuple[str, Member], ...]
    label_member: Member | None
    whole_rows: bool
    rows_per_sample: int = 1
    tags: tuple[str, ...] | None = None

    @property
    def where(self) -> str:
        """The path."""
        return self.path

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(name for name, _ in self.columns)

    @property
    def stackable(self) -> bool:
        """False if a row is a whole feed."""
        return not self.whole_rows

    @property
    def has_labels(self) -> bool:
        """True if the archive has labels."""
        return self.label_member is not None

    def sizes(self) -> npt.NDArray[np.int64]:
        """One sample each."""
        return np.ones(self.columns[0][1].shape[0], np.int64)

    def labels(self, atoms: Sequence[int]) -> Array | None:
        """Labels of these rows."""
        if self.label_member is None:
            return None
        with arrays.opened(Path(self.path)) as z, closing(RowReader(self.label_member, z)) as reader:
            order = np.argsort(np.asarray(atoms, np.int64), kind="stable")
            ascending = reader.rows([atoms[i] for i in order])
            out = np.empty_like(ascending)
            out[order] = ascending
            return out

    def read(self, groups: Sequence[tuple[int, ...]]) -> Iterator[Piece]:
        """One piece a group of rows."""
        with arrays.opened(Path(self.path)) as z:
            columns = {name: RowReader(m, z) for name, m in self.columns}
            label = RowReader(self.label_member, z) if self.label_member else None
            try:
                for group in groups:
                    feeds = {name: reader.rows(group) for name, reader in columns.items()}
                    if self.whole_rows:
                        feeds = {name: array[0] for name, array in feeds.items()}
                    yield Piece(_rows_name(group), feeds, label.rows(group) if label else None)
            finally:
                for reader in [*columns.values(), *([label] if label else [])]:
                    reader.close()


def _rows_name(group: tuple[int, ...]) -> str:
    if len(group) == 1:
        return str(group[0])
    return f"of rows {group[0]}..{group[-1]}"


@dataclass(frozen=True)
class KeyedNpz:
    """Form (b): each batch has its own arrays."""

    path: str
    keys: tuple[str, ...]
    feeds: tuple[tuple[tuple[str, Member], ...], ...]
    label_members: tuple[Member, ...]
    rows_per_sample: int = 1
    stackable: bool = False
    tags: tuple[str, ...] | None = None

    @property
    def where(self) -> str:
        """The path."""
        return self.path

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs."""
        return tuple(name for name, _ in self.feeds[0])

    @property
    def has_labels(self) -> bool:
        """True if every batch has labels."""
        return bool(self.label_members)

    def sizes(self) -> npt.NDArray[np.int64]:
        """Samples a batch: its labels, else the first axis if all inputs agree on it, else 1."""
        if self.label_members:
            return np.array([m.shape[0] if m.shape else 1 for m in self.label_members], np.int64)
        firsts = [{m.shape[0] if m.shape else 1 for _, m in feeds} for feeds in self.feeds]
        return np.array([max(1, next(iter(f))) if len(f) == 1 else 1 for f in firsts], np.int64)

    def labels(self, atoms: Sequence[int]) -> Array | None:
        """Labels of these batches, end to end. Raises DataError where their shapes cannot be joined."""
        if not self.label_members:
            return None
        with arrays.opened(Path(self.path)) as z:
            parts = [np.atleast_1d(arrays.read_whole(self.label_members[a], z)) for a in atoms]
        try:
            return np.concatenate(parts)
        except ValueError as e:
            raise DataError(f"{self.path}: the labels of the batches have different shapes ({e})") from e

    def read(self, groups: Sequence[tuple[int, ...]]) -> Iterator[Piece]:
        """One piece a batch."""
        with arrays.opened(Path(self.path)) as z:
            for (atom,) in groups:
                feeds = {name: arrays.read_whole(m, z) for name, m in self.feeds[atom]}
                label = np.atleast_1d(arrays.read_whole(self.label_members[atom], z)) if self.label_members else None
                yield Piece(repr(self.keys[atom]), feeds, label)


def open_npz(path: Path, inputs: Sequence[InputSpec], *, batch_size: int = 1, labels: str | bool = True) -> Dataset:
    """The dataset of an archive. `labels`: True finds them by the usual names, a text names them, False ignores them.

    Raises DataError: empty, names that do not match the model's, counts that differ, hostile or damaged members.
    """
    found = arrays.members(path)
    if not found:
        raise DataError(f"calibration data is empty: {path} holds no arrays; give at least one batch")
    keyed = [SEPARATOR in m.key for m in found]
    if any(keyed) and not all(keyed):
        raise DataError(
            f"{path} mixes keys '<batch>{SEPARATOR}<input>' ({found[keyed.index(True)].key!r}) with plain keys "
            f"({found[keyed.index(False)].key!r}); use one form"
        )
    wanted = _label_names(inputs, labels)
    return (_keyed if all(keyed) else _stacked)(path, found, inputs, wanted, batch_size)


def _label_names(inputs: Sequence[InputSpec], labels: str | bool) -> tuple[str, ...]:
    if labels is False:
        return ()
    names = LABEL_NAMES if labels is True else (labels,)
    return tuple(n for n in names if n not in {i.name for i in inputs})


def _stacked(
    path: Path, found: list[Member], inputs: Sequence[InputSpec], wanted: tuple[str, ...], batch_size: int
) -> Dataset:
    by_key = {m.key: m for m in found}
    label = next((by_key.pop(n) for n in wanted if n in by_key), None)
    if wanted and label is None and wanted[0] not in LABEL_NAMES:
        raise DataError(f"{path} has no labels array {wanted[0]!r}; it holds {sorted(by_key)}")
    renamed, notes = match_names(by_key, inputs, str(path))
    columns = tuple((i.name, by_key[renamed[i.name]]) for i in inputs)
    counted = [*columns, *([("labels", label)] if label else [])]
    for name, m in counted:
        if not m.shape:
            raise DataError(f"{path}: {name!r} is a single number; its first axis must be samples")
    counts = {name: m.shape[0] for name, m in counted}
    if len(set(counts.values())) > 1:
        raise DataError(f"{path}: all arrays must have the same number of rows, but got {counts}")
    n = columns[0][1].shape[0]
    if n == 0:
        raise DataError(f"calibration data is empty: the arrays of {path} have 0 rows; give at least one sample")
    whole_rows = _whole_rows(path, columns, inputs)
    fixed = {i.rows for i in inputs if i.rows is not None and i.rank}
    size = 1 if whole_rows else (max(fixed) if fixed else batch_size)
    if not whole_rows and len(fixed) > 1:
        raise DataError(
            f"{path}: the model's inputs have different fixed first axes {sorted(fixed)}; use keys "
            f"'<batch>{SEPARATOR}<input>'"
        )
    groups = grouped(range(n), size)
    if fixed and not whole_rows and n % size:
        if n < size:
            raise DataError(f"{path}: the model takes {size} rows a call, but the data has {n}; give at least {size}")
        groups = groups[:-1]
        notes.append(
            Note(str(path), f"the model takes {size} rows a call: the last {n % size} of {n} rows are not used")
        )
    dtypes = wanted_types([(name, m.dtype, "") for name, m in columns], inputs, str(path), notes)
    origin = StackedNpz(str(path), columns, label, whole_rows)
    return Dataset(origin, groups, size, bool(fixed) and not whole_rows, dtypes, tuple(notes))


def _whole_rows(path: Path, columns: tuple[tuple[str, Member], ...], inputs: Sequence[InputSpec]) -> bool:
    """Whether each row is a whole feed: rank one more than the model's, for all inputs alike."""
    ranks = {name: len(m.shape) for name, m in columns}
    extra = {i.name: ranks[i.name] - i.rank for i in inputs if i.rank is not None}
    if all(e == 0 for e in extra.values()):
        return False
    if all(e == 1 for e in extra.values()):
        return True
    spec, by = next((i, extra[i.name]) for i in inputs if extra.get(i.name, 0) not in (0,))
    shape = dict(columns)[spec.name].shape
    raise DataError(
        f"{path}: input {spec.name!r} has rank {spec.rank} {shown(spec)}, but its array has rank "
        f"{ranks[spec.name]} {shape}; "
        + (
            "give all inputs, or none, one feed a row"
            if by == 1
            else "the first axis must be samples, the others as in the model"
        )
    )


def _keyed(
    path: Path, found: list[Member], inputs: Sequence[InputSpec], wanted: tuple[str, ...], batch_size: int
) -> Dataset:
    batches: dict[str, dict[str, Member]] = {}
    for m in found:
        key, name = m.key.split(SEPARATOR, 1)
        batches.setdefault(key, {})[name] = m
    keys = sorted(batches, key=int) if all(k.isdecimal() for k in batches) else list(batches)
    labelled = {k: next((batches[k].pop(n) for n in wanted if n in batches[k]), None) for k in keys}
    without = [k for k in keys if labelled[k] is None]
    if without and len(without) < len(keys):
        raise DataError(f"{path}: batch {without[0]!r} has no labels, but others have; give all of them labels or none")
    notes: list[Note] = []
    feeds = []
    for key in keys:
        renamed, told = match_names(batches[key], inputs, f"batch {key!r} of {path}")
        notes = notes or told
        feeds.append(tuple((i.name, batches[key][renamed[i.name]]) for i in inputs))
    kinds = [(name, m.dtype, f"batch {k!r}, ") for k, f in zip(keys, feeds, strict=True) for name, m in f]
    dtypes = wanted_types(kinds, inputs, str(path), notes)
    if batch_size != 1:
        notes.append(Note(str(path), "batches are taken as they are keyed; the batch size asked for is not used"))
    origin = KeyedNpz(str(path), tuple(keys), tuple(feeds), tuple(m for m in labelled.values() if m is not None))
    return Dataset(origin, grouped(range(len(keys)), 1), 1, False, dtypes, tuple(notes))


def match_names(found: Iterable[str], inputs: Sequence[InputSpec], where: str) -> tuple[dict[str, str], list[Note]]:
    """For each input the key that fills it, and notes. Raises DataError with near matches where names differ."""
    keys, names = list(found), [i.name for i in inputs]
    if len(names) == 1 and len(keys) == 1 and keys != names:
        return {names[0]: keys[0]}, [
            Note(where, f"its only array, {keys[0]!r}, is taken for the model's only input, {names[0]!r}")
        ]
    missing = [n for n in names if n not in keys]
    unknown = [k for k in keys if k not in names]
    if missing:
        near = difflib.get_close_matches(missing[0], unknown or keys, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise DataError(f"{where} has no array for the model's input {missing[0]!r} (it has {keys}){hint}")
    if unknown:
        near = difflib.get_close_matches(unknown[0], names, n=3, cutoff=0.4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "; remove it, or name it as the labels"
        raise DataError(f"{where} has an array {unknown[0]!r}, but the model's inputs are {names}{hint}")
    return {n: n for n in names}, []


def wanted_types(
    found: Iterable[tuple[str, np.dtype[np.generic], str]], inputs: Sequence[InputSpec], where: str, notes: list[Note]
) -> tuple[tuple[str, np.dtype[np.generic]], ...]:
    """The type each input is read in; adds a Note for each kind of cast. Raises DataError for casts that are
    not safe.
    """
    specs = {i.name: i for i in inputs}
    told: set[tuple[str, str]] = set()
    for name, dtype, batch in found:
        spec = specs[name]
        if not castable(dtype, spec.dtype):
            conform(np.empty(0, dtype), spec.dtype, f"{where}: {batch}input {name!r}")
        if dtype.newbyteorder("=") != spec.dtype and dtype.kind not in "US" and (name, dtype.name) not in told:
            told.add((name, dtype.name))
            notes.append(Note(name, f"{where} holds {dtype.name}; converted to the model's {spec.dtype.name}"))
    return tuple((i.name, i.dtype) for i in inputs)


def shown(spec: InputSpec) -> str:
    """The shape of an input as a message shows it."""
    if spec.shape is None:
        return "[?]"
    return "[" + ", ".join("?" if d is None else str(d) for d in spec.shape) + "]"
