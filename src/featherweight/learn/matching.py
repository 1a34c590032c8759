"""End to end: the student's outputs and inner tensors against the teacher's, as one loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from featherweight.data import Dataset
from featherweight.errors import DataError
from featherweight.learn import losses
from featherweight.learn.blocks import Pair
from featherweight.learn.losses import Projection, Target
from featherweight.learn.teacher import Lesson, Lessons, Teacher, as_tensors
from featherweight.learn.training import Check
from featherweight.runtime.metrics import Metric

#: A tensor means the same in both graphs if the sizes of its channels agree but for this spread of logarithms.
SAME_SPREAD = 0.25
#: Share of a difference that scales alone may leave where they are its cause.
EXPLAINED = 0.25
Forward = Callable[[Mapping[str, Tensor], Sequence[str]], dict[str, Tensor]]


@dataclass(frozen=True)
class Weights:
    """How much each part of the loss counts beside the outputs. `labels`: share of the labels in the outputs' loss."""

    features: float = 1.0
    labels: float = 0.3
    temperature: float = 1.0


class Matching:
    """The loss of a lesson. `forward(feeds, names)` runs the student and gives outputs and inner tensors by name."""

    def __init__(self, forward: Forward, targets: Sequence[Target], pairs: Sequence[Pair], weights: Weights) -> None:
        self._forward, self._targets, self._weights = forward, tuple(targets), weights
        self.pairs = tuple(pairs) if weights.features > 0 else ()
        self._projections = {p.student: Projection(p.axis) for p in self.pairs if p.axis is not None}

    @property
    def inner(self) -> list[str]:
        """Tensors the teacher must give beside its outputs."""
        return [p.teacher for p in self.pairs]

    @property
    def fixed(self) -> dict[str, Tensor]:
        """The maps between features of different widths, by the student's tensor."""
        return {n: p.weight for n, p in self._projections.items() if p.weight is not None}

    @torch.no_grad()
    def fit(self, lessons: Iterable[Lesson], enough: Callable[[], bool] = lambda: False) -> None:
        """Solve the maps between features of different widths on as many lessons as that takes, or until `enough`."""
        wanted = [p for p in self.pairs if p.student in self._projections]
        for lesson in lessons if wanted else ():
            found = self._forward(lesson.feeds, [p.student for p in wanted])
            ready = [self._projections[p.student].add(found[p.student], lesson.answers[p.teacher]) for p in wanted]
            if all(ready) or enough():
                break
        for pair in wanted:
            self._projections[pair.student].solve()

    def __call__(self, lesson: Lesson) -> Tensor:
        """The loss of one micro-batch, a mean over its samples."""
        found = self._forward(lesson.feeds, [p.student for p in self.pairs])
        total = self.outputs(found, lesson)
        if self.pairs:
            parts = [self._feature(p, found[p.student], lesson.answers[p.teacher]) for p in self.pairs]
            total = total + self._weights.features * torch.stack(parts).mean()
        return total

    def _feature(self, pair: Pair, student: Tensor, teacher: Tensor) -> Tensor:
        projection = self._projections.get(pair.student)
        return losses.relative(student if projection is None else projection(student), teacher)

    def outputs(self, found: Mapping[str, Tensor], lesson: Lesson) -> Tensor:
        """The part of the loss that the outputs have, a mean over samples."""
        parts = []
        for target in self._targets:
            student, teacher = found[target.name], lesson.answers[target.name]
            mask = mask_for(lesson.feeds, student)
            part = losses.output_loss(target, student, teacher, temperature=self._weights.temperature, mask=mask)
            if lesson.labels is not None and target.kind in ("logits", "probabilities"):
                part = (1 - self._weights.labels) * part + self._weights.labels * self._labelled(
                    target, student, lesson
                )
            parts.append(part)
        return torch.stack(parts).mean()

    @staticmethod
    def _labelled(target: Target, student: Tensor, lesson: Lesson) -> Tensor:
        labels = lesson.labels
        rows = student.movedim(target.axis, -1).shape[:-1]
        if labels is None or labels.is_floating_point() or tuple(labels.shape) != tuple(rows):
            shape = None if labels is None else tuple(labels.shape)
            raise DataError(
                f"labels must be class numbers of shape {tuple(rows)} for {target.name!r}, but are {shape}; "
                "leave out --labels"
            )
        return losses.cross_entropy(student, labels, axis=target.axis, probabilities=target.kind == "probabilities")


@torch.no_grad()
def rescaled(pair: Pair, student: Tensor, teacher: Tensor) -> bool:
    """True if the channels of the student's tensor are the teacher's on other scales: equalisation moved them.

    Two things must hold: log(rms of the teacher / rms of the student) spreads over channels (weighted by the teacher's
    energy), and one factor a channel explains most of the difference and of the teacher. A student that is
    merely damaged has the first without the second.
    """
    if pair.axis is not None or student.shape != teacher.shape or student.ndim < 2:
        return False
    axis = 1 if student.ndim >= 4 else student.ndim - 1
    ours, theirs = (x.double().movedim(axis, -1).flatten(0, -2) for x in (student, teacher))
    own, wanted, both = ours.square().sum(0), theirs.square().sum(0), (ours * theirs).sum(0)
    alive = (own > 0) & (wanted > 0)
    if not bool(alive.any()):
        return False
    weight = wanted[alive] / wanted[alive].sum()
    ratio = 0.5 * (wanted[alive] / own[alive]).log()
    spread = (weight * (ratio - (weight * ratio).sum()).square()).sum().sqrt()
    apart = (theirs - ours).square().sum(0)[alive].sum()
    left = (wanted - both.square() / own)[alive].sum()
    explained = float(left) < EXPLAINED * min(float(apart), float(wanted.sum()))
    return float(spread) > SAME_SPREAD and explained


@torch.no_grad()
def damage(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor], pairs: Sequence[Pair]) -> float:
    """Mean relative error of a student's inner tensors and outputs; 1 where nothing can be compared."""
    names = [(p.student, p.teacher) for p in pairs] + [(n, n) for n in own if n in theirs]
    both = [(own[s], theirs[t]) for s, t in dict.fromkeys(names)]
    fits = [(a, b) for a, b in both if a.shape == b.shape and a.is_floating_point() and b.is_floating_point()]
    errors = [float(losses.relative(a, b)) for a, b in fits]
    return sum(errors) / len(errors) if errors else 1.0


def mask_for(feeds: Mapping[str, Tensor], value: Tensor) -> Tensor | None:
    """The attention mask (rows, tokens) among the feeds that fits `value` (rows, tokens, d), if any."""
    if value.ndim != 3:
        return None
    fits = (x for n, x in feeds.items() if "mask" in n.lower() and x.ndim == 2 and x.shape == value.shape[:2])
    return next(fits, None)


def steps_of(lessons: Lessons, matching: Matching, step: int) -> Iterator[Callable[[], Tensor]]:
    """The micro-batches of a step, weighted by their samples."""
    for lesson in lessons.step(step):
        share = lesson.n / lessons.batch

        def loss(lesson: Lesson = lesson, share: float = share) -> Tensor:
            return matching(lesson) * share

        yield loss


class Checker:
    """Loss of the outputs and the metric over validation data that nothing is trained on.

    The teacher's answers are read once; the loss is the one trained with, at its temperature, without features and
    labels.
    """

    def __init__(
        self, forward: Forward, targets: Sequence[Target], dataset: Dataset, teacher: Teacher, metric: Metric,
        temperature: float = 1.0,
    ) -> None:  # fmt: skip
        self._forward, self._targets, self._dataset, self._metric = forward, targets, dataset, metric
        self._temperature = temperature
        names = [t.name for t in targets]
        self._answers = [teacher(b.feeds, names) for b in dataset.batches()]
        self._whole = metric.whole or not self._fits()

    def _fits(self) -> bool:
        """True if the metric can be read of the outputs that are matched."""
        return self._metric.output is None or self._metric.output in {t.name for t in self._targets}

    @torch.no_grad()
    def __call__(self, temperature: float | None = None) -> Check:
        """Look at all validation batches; `temperature`: another than that of training."""
        temperature = self._temperature if temperature is None else temperature
        total, samples, scores, labels = 0.0, 0, [], []
        for batch, answers in zip(self._dataset.batches(), self._answers, strict=True):
            feeds = as_tensors(batch.feeds)
            found = self._forward(feeds, ())
            for target in self._targets:
                mask = mask_for(feeds, found[target.name])
                loss = losses.output_loss(
                    target, found[target.name], answers[target.name], temperature=temperature, mask=mask
                )
                total += batch.n * float(loss) / len(self._targets)
            samples += batch.n
            if not self._whole:
                ours, theirs = ({t.name: x[t.name].numpy() for t in self._targets} for x in (found, answers))
                scores.append(
                    self._metric.per_sample(
                        ours, theirs, batch.labels, self._dataset.rows_per_sample, feeds=batch.feeds, n=batch.n
                    )
                )
                labels.append(batch.labels)
        known = [x for x in labels if x is not None]
        value = None
        if scores and all(s.ndim for s in scores):
            joined = np.concatenate(known) if len(known) == len(labels) and known else None
            value = self._metric.aggregate(np.concatenate(scores), joined)
        return Check(total / max(samples, 1), value)


__all__ = ["Checker", "Forward", "Matching", "Weights", "damage", "mask_for", "rescaled", "steps_of"]
