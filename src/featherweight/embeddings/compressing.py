"""The search for a compressed table: candidates by the solver, each really built and measured.

Bytes against weighted error are a multiple-choice knapsack over runs of columns (`search.solve`); around it stand the
choices that change every run: turned or plain columns, and how many words are kept.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import numpy.typing as npt

from featherweight.core import (
    Action,
    Attempt,
    Budget,
    Decision,
    Effect,
    Measurement,
    Plan,
    Progress,
    Silent,
)
from featherweight.embeddings import choices, cutting, quality
from featherweight.embeddings.build import build
from featherweight.embeddings.compressed import Compressed
from featherweight.embeddings.survey import Survey, survey
from featherweight.embeddings.table import F32, Table
from featherweight.embeddings.tasks import Task
from featherweight.search.solve import Solution, solve

LADDER = (4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96)  # times smaller than float32
TABLE = "table"
NEAR, FAR = 1.15, 2.0  # candidates predicted within this of the best are built too
TEXTS, TEXT_WORDS = 2000, 12
Use = Literal["words", "texts"]
MOST_BUILT, MOST_JUDGED = 2, 4
MEASURED_ROWS = 20_000  # among which neighbours are looked for
REFINEMENTS = 2

SizeOf = Callable[[list[str], Compressed | None], int]
Rows = Callable[[npt.NDArray[np.int64]], F32]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A space, the rows kept, the solver's answer for a size."""

    space: choices.Space
    cut: cutting.Cut | None
    solution: Solution
    loss: float
    size: int
    flatten: float = 0.0

    def plan(self) -> Plan:
        """The decisions, those about the whole table first."""
        kept = 0 if self.cut is None else len(self.cut.rows)
        action = Action.of("columns", space=self.space.name, kept_rows=kept)
        decisions = (Decision(TABLE, (action,)), *(c.decision for c in self.solution.choices))
        return Plan(decisions, Effect(size_bytes=self.size, loss=self.loss), self.solution.gap)


@dataclass
class Search:
    """One search over one table. `size_of`: bytes of the file that a table makes (None: one of float32 vectors)."""

    source: Table
    size_of: SizeOf
    budget: Budget = field(default_factory=Budget)
    make_task: Callable[[list[str]], Task] | None = None
    counts: Mapping[str, int] | None = None
    use: Use = "words"
    cut_words: bool = True
    seed: int = 0
    progress: Progress = field(default_factory=Silent)
    attempts: list[Attempt] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.found: Survey = survey(self.source, counts=self.counts, progress=self.progress)
        self.task = None if self.make_task is None else self.make_task(self.found.words)
        self.spaces = [choices.measured(self.found, s, self.progress) for s in choices.spaces(self.found)]
        self.cuts: list[cutting.Cut] = []
        if self.cut_words and self.counts is not None:  # without counts nobody knows which words are rare
            self.cuts = cutting.cuts(self.source, self.found, seed=self.seed, progress=self.progress)
        rng = np.random.default_rng(self.seed)
        if self.use == "texts":
            self.texts = _drawn_texts(self.found, rng)
            self.rows = np.unique(self.texts)
            self.asked = np.arange(min(quality.QUERIES, TEXTS))
        else:
            self.rows = np.sort(rng.choice(self.found.rows, min(self.found.rows, MEASURED_ROWS), replace=False))
            self.asked = quality.spread(len(self.rows), self.found.weights[self.rows], quality.QUERIES, self.seed)
        self.near = self._near(_chosen_rows(self.source, self.rows))
        self.float_bytes = self.size_of(self.found.words, None)
        self.fixed = self.float_bytes - 4 * self.found.rows * self.found.dim
        self.baseline = self._measured(self.float_bytes, lambda rows: _chosen_rows(self.source, rows), None)
        self.built: dict[int, Compressed] = {}

    def _measured(self, size: int, rows: Rows, before: Measurement | None) -> Measurement:
        """Size and metric: of the task if there is one, else how many neighbours words, or texts, keep."""
        if self.task is not None:
            name, score = self.task.metric, self.task.score(rows)
        else:
            name = f"{'texts' if self.use == 'texts' else 'neighbours'}@{quality.NEIGHBOURS}"
            score = quality.Score(name, quality.shared(self.near, self._near(rows(self.rows))), len(self.asked))
        start = score.value if before is None or before.metric is None else before.metric
        return Measurement(size, name, score.value, start - score.value, n_samples=score.n, seed=self.seed)

    def _near(self, vectors: F32) -> npt.NDArray[np.int64]:
        if self.use == "texts":
            vectors = vectors[np.searchsorted(self.rows, self.texts)].mean(axis=1)
        return quality.nearest(quality.unit(vectors), self.asked, min(quality.NEIGHBOURS, len(vectors) - 1))

    def candidates(self, size: int) -> list[Candidate]:
        """What the solver makes of each space and cut at a file size, best predicted first.

        With a task to judge by, also what it makes where columns of little variance count as much as others.
        """
        made = []
        for errors in self.spaces:
            for cut in (None, *self.cuts):
                kept = self.found.rows if cut is None else len(cut.rows)
                beside = self.fixed + self._beside(errors.space, cut)
                true = {c.decision: c.effect.loss for found in errors.table(kept).values() for c in found}
                for flatten in (0.0, 1.0) if self.task is not None else (0.0,):
                    table = errors.table(kept, flatten=flatten)
                    found = solve(table, {"size_bytes": float(size - beside)}, {"loss": 1.0})
                    if found is not None:
                        error = sum(true[c.decision] for c in found.choices)
                        loss = error if cut is None else error * cut.weight_left + cut.error
                        total = found.effect.size_bytes + beside
                        made.append(Candidate(errors.space, cut, found, loss, total, flatten))
        return sorted(made, key=lambda c: c.loss)

    def _beside(self, space: choices.Space, cut: cutting.Cut | None) -> int:
        mean = 4 * self.found.dim if space.mean is not None else 2 * self.found.dim
        return mean + (0 if cut is None else cutting.bytes_of(self.found.rows, len(cut.rows)))

    def at_size(self, size: int) -> Attempt | None:
        """Build and measure the best candidates of a size; None if no candidate is that small."""
        found = self.candidates(size)
        if not found:
            return None
        # Means of many words average errors out, but not what every word lacks: the solver's order is trusted less.
        limit = (FAR if self.use == "texts" or self.task is not None else NEAR) * found[0].loss + 1e-12
        each = {(c.space.name, c.cut is None, c.flatten): c for c in reversed(found) if c.loss <= limit}
        near = sorted(each.values(), key=lambda c: c.loss)[: MOST_BUILT if self.task is None else MOST_JUDGED]
        tried = [self._fitted(c, size) for c in near]
        best = min(tried, key=lambda a: (size_of(a) > size, drop_of(a)))
        for attempt in tried:
            if attempt is not best:
                self.built.pop(attempt.index, None)
        return best

    def _fitted(self, candidate: Candidate, size: int) -> Attempt:
        """Build; where the file is larger than predicted, once more for so much less."""
        attempt = self._build(candidate)
        over = size_of(attempt) - size
        if over > 0:
            smaller = [c for c in self.candidates(size - over) if _alike(c, candidate)]
            if smaller:
                self.attempts.pop()
                return self._build(smaller[0])
        return attempt

    def _build(self, candidate: Candidate) -> Attempt:
        started = time.monotonic()
        self.progress.trying(f"{candidate.space.name}, {candidate.size} B predicted")
        cut = candidate.cut
        made = build(
            self.source, self.found, candidate.space, candidate.plan().decisions[1:],
            row_of=None if cut is None else cutting.row_of(self.source, self.found, cut.rows),
            kept_rows=None if cut is None else cut.rows, progress=self.progress,
        )  # fmt: skip
        measured = self._measured(self.size_of(self.found.words, made), made.rows, self.baseline)
        index = len(self.attempts) + 1
        self.built[index] = made
        attempt = Attempt(index, candidate.plan(), measured, seconds=time.monotonic() - started)
        self.attempts.append(attempt)
        return attempt

    def smallest(self, max_drop: float) -> Attempt | None:
        """The smallest table whose measured drop is within the limit: bisection over LADDER, then between two rungs."""
        low, high, best = 0, len(LADDER) - 1, None
        while low <= high:
            middle = (low + high) // 2
            attempt = self.at_size(self._rung(LADDER[middle]))
            if attempt is not None and drop_of(attempt) <= max_drop:
                best, low = attempt, middle + 1
            else:
                high = middle - 1
        if best is None:
            return None
        small, large = self._rung(LADDER[min(low, len(LADDER) - 1)]), size_of(best)
        for _ in range(REFINEMENTS):
            middle = round((small * large) ** 0.5)
            attempt = self.at_size(middle)
            if attempt is not None and drop_of(attempt) <= max_drop:
                best, large = attempt, size_of(attempt)
            else:
                small = middle
        return best

    def _rung(self, times: float) -> int:
        return self.fixed + round((self.float_bytes - self.fixed) / times)

    def least(self) -> int:
        """Bytes below which no candidate goes: every column dropped, the words and lengths kept."""
        smallest = [
            sum(min(c.effect.size_bytes for c in found) for found in errors.table(kept).values())
            + self._beside(errors.space, cut)
            for errors in self.spaces
            for cut in (None, *self.cuts)
            for kept in [self.found.rows if cut is None else len(cut.rows)]
        ]
        return self.fixed + min(smallest)

    def front(self, points: int) -> list[Attempt]:
        """Attempts at sizes from 4 to 96 times smaller, evenly spaced in ratio."""
        rungs = np.geomspace(LADDER[0], LADDER[-1], points)
        tried = [self.at_size(self._rung(float(t))) for t in rungs]
        return [a for a in tried if a is not None]


def _alike(one: Candidate, other: Candidate) -> bool:
    """True if they differ in size alone."""
    return one.space is other.space and one.cut is other.cut and one.flatten == other.flatten


def _drawn_texts(found: Survey, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Row numbers (TEXTS, TEXT_WORDS): words drawn by weight, with no meaning but their sum."""
    shares = found.weights if found.weights.any() else np.ones(found.rows)
    return rng.choice(found.rows, (TEXTS, TEXT_WORDS), p=shares / shares.sum())


def size_of(attempt: Attempt) -> int:
    """Bytes of an attempt's file."""
    return attempt.measured.size_bytes if attempt.measured is not None else 0


def drop_of(attempt: Attempt) -> float:
    """Measured drop of an attempt."""
    return (attempt.measured.drop if attempt.measured is not None else None) or 0.0


def _chosen_rows(table: Table, rows: npt.NDArray[np.int64]) -> F32:
    """Rows (sorted numbers) of a table by one pass over it."""
    parts, start = [np.zeros((0, table.dim), np.float32)], 0
    for block in table.blocks():
        low, high = np.searchsorted(rows, [start, start + len(block.vectors)])
        parts.append(block.vectors[rows[low:high] - start])
        start += len(block.vectors)
        if low == len(rows):
            break
    return np.concatenate(parts)
