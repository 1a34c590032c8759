"""The original as a teacher: run by ONNX Runtime, which is several times faster than training is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import torch
from torch import Tensor

from featherweight.data import Dataset
from featherweight.errors import ModelError
from featherweight.graph import io, surgery
from featherweight.learn import _tensors, augment
from featherweight.learn.augment import Augment
from featherweight.runtime import ort

Array = npt.NDArray[Any]
#: Answers to data that never change are kept, up to this many bytes.
KEPT_BYTES = 512 << 20


class Teacher:
    """A model that also answers with some of its inner tensors."""

    def __init__(self, model: ir.Model, inner: Sequence[str], folder: Path, *, threads: int) -> None:
        """`inner`: names of tensors to give beside the outputs; the model with them is saved in `folder`."""
        copy = surgery.copy_model(model)
        values = {v.name: v for node in copy.graph for v in node.outputs}
        present = {v.name for v in copy.graph.outputs}
        for name in inner:
            if name not in values:
                raise ModelError(f"the teacher must have the tensor {name!r}, but it has not")
            if name not in present:
                copy.graph.outputs.append(values[name])
        path = folder / "teacher.onnx"
        io.save(copy, path)
        self._session = ort.session(path, threads=threads)

    def __call__(self, feeds: Mapping[str, Array], names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Outputs and inner tensors (of `names`) for one batch. Raises RunError."""
        found = self._session.run({n: np.asarray(x) for n, x in feeds.items()}, names)
        return {n: _tensors.from_array(np.ascontiguousarray(x)) for n, x in found.items()}


@dataclass(frozen=True)
class Lesson:
    """One micro-batch: what goes in, what the teacher answers, labels where they are used. `n` samples."""

    feeds: dict[str, Tensor]
    answers: dict[str, Tensor]
    labels: Tensor | None
    n: int


class Lessons:
    """The training data as micro-batches of a step, drawn by seed and step alone, so that resuming needs no state.

    `batch`: samples a step, at least one unit; `micro`: samples at a time. A model that takes a fixed number of rows
    gets them unit by unit. `names`: tensors the teacher is asked for; None: all it can give. `stackable`: any number of
    samples is a batch. `keep`: bytes of the teacher's answers that are kept, where the same come back.
    """

    def __init__(
        self, dataset: Dataset, teacher: Teacher, *, batch: int, micro: int, seed: int, how: Augment, labels: bool,
        names: Sequence[str] | None = None, keep: int = 0,
    ) -> None:  # fmt: skip
        self.dataset, self._teacher, self._how, self._labels = dataset, teacher, how, labels
        self._names = names
        self._units = dataset.units()
        sizes = dataset.origin.sizes()
        each = max(1, int(sizes[list(self._units[0])].sum()))
        self._per_step = max(1, min(batch // each, len(self._units)))
        self.stackable = dataset.origin.stackable and not dataset.fixed
        self._per_micro = max(1, min(micro // each, self._per_step)) if self.stackable else 1
        self.batch = self._per_step * each
        self.micro = self._per_micro * each
        self._seed = seed
        self._kept: dict[tuple[int, ...], dict[str, Tensor]] = {}
        self._keep, self._kept_bytes = keep, 0

    @property
    def augmented(self) -> bool:
        """True if the same atom comes back changed."""
        return self._how.any

    @property
    def steps_an_epoch(self) -> int:
        """Steps until every unit was seen once; what does not fill a step waits for another order."""
        return max(1, len(self._units) // self._per_step)

    def step(self, step: int) -> Iterator[Lesson]:
        """The micro-batches of one step."""
        epoch, at = divmod(step, self.steps_an_epoch)
        order = np.random.default_rng([self._seed, 1, epoch]).permutation(len(self._units))
        chosen = order[at * self._per_step : (at + 1) * self._per_step]
        for start in range(0, len(chosen), self._per_micro):
            units = [self._units[i] for i in chosen[start : start + self._per_micro]]
            rng = np.random.default_rng([self._seed, 2, step, start])
            yield self.lesson(tuple(a for u in units for a in u), rng)

    def epoch(self) -> Iterator[Lesson]:
        """The micro-batches of the first epoch."""
        for step in range(self.steps_an_epoch):
            yield from self.step(step)

    def lesson(self, group: tuple[int, ...], rng: np.random.Generator) -> Lesson:
        """Some atoms as a lesson."""
        feeds = augment.read(self.dataset, group, self._how, rng)
        if self._how.mixes:
            feeds = augment.mixed(feeds, self._how, rng)
        labels = None
        if self._labels:
            found = self.dataset.origin.labels(group)
            labels = None if found is None else torch.from_numpy(np.asarray(found))
        n = int(self.dataset.origin.sizes()[list(group)].sum())
        return Lesson(as_tensors(feeds), self._answers(group, feeds), labels, n)

    def _answers(self, group: tuple[int, ...], feeds: Mapping[str, Array]) -> dict[str, Tensor]:
        """The teacher's, kept where single atoms come back unchanged."""
        if self._how.any:
            return self._teacher(feeds, self._names)
        if group in self._kept:
            return self._kept[group]
        found = self._teacher(feeds, self._names)
        size = sum(x.nbytes for x in found.values())
        if len(group) == 1 and self._kept_bytes + size <= self._keep:
            self._kept[group] = found
            self._kept_bytes += size
        return found


def as_tensors(feeds: Mapping[str, Array]) -> dict[str, Tensor]:
    """Arrays as torch tensors; images with their channels last in memory, which torch's kernels want."""
    tensors = {n: _tensors.from_array(np.ascontiguousarray(x)) for n, x in feeds.items()}
    return {
        n: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 and x.is_floating_point() else x
        for n, x in tensors.items()
    }
