"""Checks made before any work: emptiness, names, shapes, types, NaN and infinity, labels; likeness of two
datasets.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from featherweight.core import Note, Progress, Silent
from featherweight.data import arrays
from featherweight.data.dataset import Array, Batch, Dataset, InputSpec, castable, is_float
from featherweight.data.npz import StackedNpz, shown
from featherweight.errors import DataError

_SEEN_BATCHES = 256


def check(
    dataset: Dataset,
    inputs: Sequence[InputSpec],
    *,
    n_classes: int | None = None,
    id_limits: Mapping[str, int] | None = None,
    role: str = "calibration",
    progress: Progress | None = None,
) -> None:
    """Read every batch once and compare it with the model's inputs; memory flat in the number of batches.

    `n_classes`: labels must be integers in 0..n_classes-1. `id_limits`: for an input of ids, how many there are.
    Raises DataError naming batch, input and the first bad position.
    """
    if dataset.n_batches == 0:
        raise DataError(f"{role} data is empty: {dataset.source} holds no batch; give at least one")
    bar = progress or Silent()
    bar.start(f"checking {role} data", dataset.n_batches)
    verify(dataset)
    for batch in dataset.batches():
        check_batch(batch, inputs, n_classes=n_classes, id_limits=id_limits)
        bar.advance()


def verify(dataset: Dataset) -> None:
    """Compare the checksums of data that are read by rows, past zip's own check. Raises DataError naming the damage."""
    if isinstance(dataset.origin, StackedNpz):
        arrays.verify_checksums(Path(dataset.origin.path))


def check_batch(
    batch: Batch,
    inputs: Sequence[InputSpec],
    *,
    n_classes: int | None = None,
    id_limits: Mapping[str, int] | None = None,
) -> None:
    """Compare one batch with the model's inputs. Raises DataError naming batch, input and the first bad position."""
    where = f"batch {batch.name or batch.index}"
    names = [i.name for i in inputs]
    for name in batch.feeds:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
            hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
            raise DataError(f"{where} has an input {name!r}, but the model's inputs are {names}{hint}")
    axes: dict[str, tuple[int, str]] = {}
    for spec in inputs:
        if spec.name not in batch.feeds:
            raise DataError(f"{where} lacks the model's input {spec.name!r}; it has {list(batch.feeds)}")
        array = batch.feeds[spec.name]
        here = f"{where}, input {spec.name!r}"
        _check_shape(array, spec, here, axes)
        if array.dtype != spec.dtype and not (array.dtype.kind in "US" and castable(array.dtype, spec.dtype)):
            raise DataError(f"{here}: the model wants {spec.dtype.name}, but the data is {array.dtype.name}")
        _check_finite(array, here)
        _check_ids(array, (id_limits or {}).get(spec.name), here)
    _check_labels(batch, n_classes, where)


def _check_shape(array: Array, spec: InputSpec, here: str, axes: dict[str, tuple[int, str]]) -> None:
    if spec.shape is None:
        return
    if array.ndim != len(spec.shape):
        raise DataError(
            f"{here}: the model wants rank {len(spec.shape)} {shown(spec)}, but got rank {array.ndim} {array.shape}"
        )
    for axis, (want, got) in enumerate(zip(spec.shape, array.shape, strict=True)):
        if isinstance(want, int) and want != got:
            raise DataError(
                f"{here}: the model wants shape {shown(spec)}, but got {array.shape} (axis {axis}: "
                f"{want} expected, {got} found)"
            )
        if got == 0:
            raise DataError(f"{here}: shape {array.shape} has no elements; drop this batch")
        if isinstance(want, str) and want:
            size, first = axes.setdefault(want, (got, spec.name))
            if size != got:
                raise DataError(
                    f"{here}: axis {want!r} is {got} here, but {size} in input {first!r}; it must be "
                    "one size within a batch"
                )


def _check_finite(array: Array, here: str) -> None:
    if not is_float(array.dtype) and array.dtype.kind != "c":
        return
    good = np.isfinite(array if array.dtype.kind in "fc" else array.astype(np.float32))
    if not good.all():
        at = tuple(int(i) for i in np.unravel_index(int(np.argmin(good)), array.shape))
        value = float(array[at])
        count = int(good.size - np.count_nonzero(good))
        raise DataError(
            f"{here}: {value} at position {list(at)} (the first of {count} of {good.size}); values "
            "must be finite: mend or drop this batch"
        )


def _check_ids(array: Array, limit: int | None, here: str) -> None:
    if limit is None or array.dtype.kind not in "iu" or not array.size:
        return
    # An ONNX Gather counts negative ids from the end.
    bad = (array >= limit) | (array < -limit)  # type: ignore[operator]
    if bad.any():
        at = tuple(int(i) for i in np.unravel_index(int(np.argmax(bad)), array.shape))
        raise DataError(
            f"{here}: id {int(array[at])} at position {list(at)} is outside 0..{limit - 1}; is this "
            "the model's tokenizer?"
        )


def _check_labels(batch: Batch, n_classes: int | None, where: str) -> None:
    labels = batch.labels
    if labels is None:
        return
    if len(labels) != batch.n:
        raise DataError(f"{where}: {batch.n} samples need {batch.n} labels, but got {len(labels)}")
    if is_float(labels.dtype):
        _check_finite(labels, f"{where}, labels")
    if n_classes is None:
        return
    whole = labels.dtype.kind in "iub" or (labels.dtype.kind == "f" and not np.any(np.mod(labels, 1)))
    if not whole:
        raise DataError(
            f"{where}: labels must be class numbers 0..{n_classes - 1}, but got {labels.dtype.name} "
            f"{labels.ravel()[0]!s}"
        )
    bad = (labels < 0) | (labels >= n_classes)  # type: ignore[operator]
    if bad.any():
        value = int(labels[bad].ravel()[0])
        hint = "; are classes counted from 1?" if value == n_classes else ""
        raise DataError(f"{where}: label {value} is outside the model's classes 0..{n_classes - 1}{hint}")


@dataclass
class _Range:
    low: float = np.inf
    high: float = -np.inf
    total: float = 0.0
    squares: float = 0.0
    count: int = 0
    samples: list[npt.NDArray[np.float64]] = field(default_factory=list)

    def add(self, array: Array) -> None:
        values = array.astype(np.float64).ravel()
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.total += float(values.sum())
        self.squares += float(values @ values)
        self.count += values.size
        self.samples.append(values[:: max(1, values.size // 256)][:256].copy())

    @property
    def mean(self) -> float:
        return self.total / self.count

    @property
    def deviation(self) -> float:
        return float(np.sqrt(max(0.0, self.squares / self.count - self.mean**2)))


def likeness(calibration: Dataset, evaluation: Dataset) -> list[Note]:
    """What makes calibration data a poor stand-in for evaluation data; empty if nothing. Reads at most 256
    batches of each.

    Looks at ranges, means, shapes and batches that occur in both. Both must have passed `check`.
    """
    known, seen_here, shapes_here = _survey(calibration)
    other, seen_there, shapes_there = _survey(evaluation)
    notes = []
    both = len(seen_here & seen_there)
    if both and calibration is not evaluation:
        notes.append(
            Note(
                "data",
                f"{both} of {len(seen_there)} evaluation batches are also calibration batches; the "
                "result will look better than it is",
            )
        )
    for name in sorted(known.keys() & other.keys()):
        notes += _unlike(name, known[name], other[name])
    for name in sorted(shapes_here.keys() & shapes_there.keys()):
        unseen = shapes_there[name] - shapes_here[name]
        if unseen and not any(len(s) > 8 for s in (shapes_here[name], shapes_there[name])):
            notes.append(
                Note(
                    name,
                    f"evaluation has shapes {sorted(unseen)[:3]} that calibration lacks (it has "
                    f"{sorted(shapes_here[name])[:3]})",
                )
            )
    return notes


def _survey(dataset: Dataset) -> tuple[dict[str, _Range], set[bytes], dict[str, set[tuple[int, ...]]]]:
    step = max(1, -(-dataset.n_batches // _SEEN_BATCHES))
    ranges: dict[str, _Range] = {}
    shapes: dict[str, set[tuple[int, ...]]] = {}
    seen: set[bytes] = set()
    for batch in dataset.subset(range(0, dataset.n_batches, step)).batches():
        digest = hashlib.blake2b(digest_size=16)
        for name in sorted(batch.feeds):
            array = batch.feeds[name]
            digest.update(np.ascontiguousarray(array).tobytes())
            # The first axis is the batch's size, which may differ freely.
            shapes.setdefault(name, set()).add(array.shape[1:])
            if array.size and is_float(array.dtype):
                ranges.setdefault(name, _Range()).add(array)
        seen.add(digest.digest())
    return ranges, seen, shapes


def _unlike(name: str, known: _Range, other: _Range) -> list[Note]:
    notes = []
    shown_ranges = f"calibration {known.low:.4g}..{known.high:.4g}, evaluation {other.low:.4g}..{other.high:.4g}"
    width = known.high - known.low
    if width == 0:
        if other.low != known.low or other.high != known.high:
            notes.append(Note(name, f"calibration holds one value only: {shown_ranges}"))
        return notes
    values = np.concatenate(other.samples)
    outside = float(np.mean((values < known.low - 0.05 * width) | (values > known.high + 0.05 * width)))
    if outside > 0.01:
        notes.append(Note(name, f"{outside:.0%} of evaluation values are outside calibration's: {shown_ranges}"))
    elif other.high - other.low < 0.1 * width:
        notes.append(
            Note(
                name,
                f"evaluation fills under a tenth of calibration's range: {shown_ranges}; were they prepared alike?",
            )
        )
    scale = max(known.deviation, other.deviation)
    if scale > 0 and abs(known.mean - other.mean) > 0.5 * scale:
        notes.append(
            Note(
                name,
                f"means differ: calibration {known.mean:.4g}, evaluation {other.mean:.4g} (standard "
                f"deviation {scale:.4g})",
            )
        )
    return notes
