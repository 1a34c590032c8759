"""Block by block: each block of the student learns to answer as the teacher does there, from what it really gets.

The blocks before it are done, so errors do not pile up (as in `recover`, but by gradients through the whole block: Li
2021, BRECQ, arXiv:2102.05426). What blocks read and should answer lies in files, one a micro-batch.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featherweight.core import Progress
from featherweight.errors import RunError
from featherweight.learn import losses
from featherweight.learn.blocks import Block
from featherweight.learn.execute import Executor
from featherweight.learn.losses import Projection
from featherweight.learn.result import Block as BlockDone
from featherweight.learn.rounding import Rounding
from featherweight.learn.teacher import Lesson, Lessons, as_tensors
from featherweight.learn.training import Check, Keeper, Outcome, Recipe, Trainer, Work, first_check

#: Bytes of all files together, and the share of the free disk; fewer samples are taken where they do not fit.
FILES_BYTES, FREE_SHARE = 4 << 30, 0.25
#: Of these bytes, for checking.
CHECK_SHARE = 0.125
#: Data that come back changed are drawn once for so many seconds of the stage, at most so often.
VIEW_S, MOST_VIEWS = 60.0, 8
#: Values up to here are kept as halves, where those are off by no more of their power.
MOST_HALF, HALF_ERROR = 6e4, 1e-6
#: Positions of a step: of large maps a few samples say as much as a whole micro-batch, in a fraction of the time.
POSITIONS = 2048
#: Relative error up to which a part of a micro-batch counts as answered like the whole.
PART_ERROR = 1e-3
#: The least cost of a block over that of all: one with few operations has weights too.
LEAST_COST = 0.02
#: Of the stage's time, for drawing.
DRAW_SHARE = 0.15
#: Learning rate over the relative error of a block, and its limits: few codes need to move where little is wrong.
#: Plain floats need not go as far as the next code, and learn their inputs by heart the sooner.
RATE, LEAST_RATE, MOST_RATE, MOST_RATE_FLOATS = 0.03, 5e-3, 2e-2, 1e-2
#: Highest rate, and weight of the penalty on moves that are not whole relative to the error, of learned rounding.
RATE_MOVES, PENALTY = 1e-3, 0.1
WHOLE = slice(None)


@dataclass(frozen=True)
class Blockwise:
    """What the stage works on. `costs`: work of each block, in any unit; `recipe`: how it is trained at a highest rate;
    `answer`: the loss of the outputs; `rate`: of all blocks, None: by each one's error; `learned`: learned rounding.
    """

    executor: Executor
    blocks: Sequence[Block]
    costs: Sequence[float]
    recipe: Callable[[float], Recipe]
    units: Mapping[str, Tensor]
    outputs: Sequence[str]
    answer: Callable[[Mapping[str, Tensor], Lesson], Tensor]
    seed: int = 0
    rate: float | None = None
    learned: bool = False

    def ends(self, block: Block) -> tuple[list[str], list[str]]:
        """The teacher's tensors that a block is taught by, and the student's."""
        if block.end is None:
            return list(self.outputs), list(self.outputs)
        return [block.end.teacher], [block.end.student]


class Files:
    """Micro-batches of tensors as .npy files: feeds, the teacher's answers at each place, the student's starts.

    `n` of them; those from `checked` on are of validation data. Inner floats are kept as halves where those are nearer
    to them than any student is; what goes in, and the outputs `whole`, as they are: they may be numbers of things.
    """

    def __init__(self, folder: Path, whole: Sequence[str] = ()) -> None:
        self.folder, self._whole = folder, frozenset(whole)
        self.n = self.checked = 0
        self.stackable = False
        self._names: dict[str, dict[str, int]] = {}
        self._wide: dict[tuple[str, str], torch.dtype] = {}

    def fill(
        self, lessons: Lessons, checks: Lessons, places: Sequence[str], views: int, progress: Progress,
        enough: Callable[[], bool] = lambda: False,
    ) -> None:  # fmt: skip
        """Draw the data `views` times, or until there is `enough`, and the validation data once; ask the teacher."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        self.n, self.stackable = 0, lessons.stackable
        most = min(FILES_BYTES, FREE_SHARE * shutil.disk_usage(self.folder).free)
        steps = lessons.steps_an_epoch * (views if lessons.augmented else 1)
        progress.start("asking the teacher for its inner answers", steps + checks.steps_an_epoch)
        self._draw(lessons, steps, places, most * (1 - CHECK_SHARE), progress, enough)
        self.checked = self.n
        self._draw(checks, checks.steps_an_epoch, places, most * CHECK_SHARE, progress, lambda: False)

    def _draw(
        self, lessons: Lessons, steps: int, places: Sequence[str], most: float, progress: Progress,
        enough: Callable[[], bool],
    ) -> None:  # fmt: skip
        """Micro-batches of some steps, at least one, as long as they fit into `most` bytes."""
        used, first = 0, self.n
        for step in range(steps):
            for lesson in lessons.step(step):
                if self.n > first and (used >= most or enough()):
                    return
                used += self.put("feeds", self.n, lesson.feeds)
                used += self.put("theirs", self.n, {p: lesson.answers[p] for p in places})
                self.n += 1
            progress.advance()

    def put(self, kind: str, i: int, tensors: Mapping[str, Tensor]) -> int:
        """Keep some tensors of micro-batch `i`; the bytes they take."""
        used = 0
        for k, (name, x) in enumerate(tensors.items()):
            self._names.setdefault(kind, {})[name] = k
            kept = x.detach().contiguous()
            if x.dtype == torch.float32 and kind != "feeds" and name not in self._whole:
                kept = _narrowed(kept)
            np.save(self.folder / f"{kind}-{k}-{i}.npy", kept.numpy())
            self._wide[kind, name] = x.dtype
            used += kept.nbytes
        return used

    def get(self, kind: str, i: int, names: Sequence[str], rows: slice = WHOLE) -> dict[str, Tensor]:
        """Some tensors of micro-batch `i`, or `rows` of it, in the type they came in."""
        arrays = {n: np.array(self._map(kind, n, i)[rows] if rows != WHOLE else self._map(kind, n, i)) for n in names}
        return {n: x.to(self._wide[kind, n]) for n, x in as_tensors(arrays).items()}

    def shape(self, kind: str, name: str, i: int) -> tuple[int, ...]:
        """Of a tensor of micro-batch `i`."""
        return tuple(self._map(kind, name, i).shape)

    def _map(self, kind: str, name: str, i: int) -> npt.NDArray[Any]:
        found: npt.NDArray[Any] = np.load(self.folder / f"{kind}-{self._names[kind][name]}-{i}.npy", mmap_mode="r")
        return found

    def names(self, kind: str) -> list[str]:
        """Names of the tensors of a kind."""
        return list(self._names[kind])

    def has(self, kind: str, name: str) -> bool:
        """True if a tensor of that name is kept."""
        return name in self._names.get(kind, {})

    def become(self, kind: str, other: str) -> None:
        """Tensors of one kind take the place of those of another."""
        names = self._names.pop(kind)
        self._wide |= {(other, n): self._wide.pop((kind, n)) for n in names}
        for k in names.values():
            for i in range(self.n):
                (self.folder / f"{kind}-{k}-{i}.npy").replace(self.folder / f"{other}-{k}-{i}.npy")
        self._names[other] = names


def train_blocks(
    job: Blockwise,
    lessons: Lessons,
    checks: Lessons,
    folder: Path,
    *,
    views: int,
    by_time: bool,
    seconds: float,
    keeper: Callable[[int], Keeper] | None,
    start: tuple[int, Mapping[str, Any], Mapping[str, Tensor]] | None,
    progress: Progress,
    stop: Callable[[], bool],
    clock: Callable[[], float],
) -> tuple[list[BlockDone], list[Outcome]]:
    """Train each block in order; `seconds` are shared by what blocks cost.

    `checks`: validation data, unchanged; `views`: how often the data are drawn at most (see `views_for`); `by_time`:
    fewer where that takes long.
    `start`: block, trainer's state and tensors of a checkpoint; blocks before it are done. `clock`: seconds used by the
    stage so far.
    """
    files = Files(folder, job.outputs)
    places = list(dict.fromkeys(n for b in job.blocks for n in job.ends(b)[0]))
    drawn_until = clock() + DRAW_SHARE * seconds if by_time else math.inf
    files.fill(lessons, checks, places, views, progress, lambda: stop() or clock() > drawn_until)
    first = 0 if start is None else start[0]
    costs = [max(c, LEAST_COST * math.fsum(job.costs)) for c in job.costs]
    results, outcomes = [], []
    for k, block in enumerate(job.blocks):
        if k >= first:
            share = costs[k] / math.fsum(costs[k:])
            here = start if k == first else None
            if here is not None:
                _as_at_first(job, k, here[2])
            taught = _Taught(job, block, files, k)
            if taught.parameters:
                error = taught.first() if here is None else first_check(here[1])
                spent = 0.0 if here is None else float(here[1]["seconds"])
                left = max((seconds - clock()) * share, 0.0) + spent
                trainer = Trainer(
                    taught.work(), job.recipe(taught.rate(error)), seconds=left,
                    keeper=keeper(k) if keeper else None, progress=progress,
                    name=f"block {k + 1} of {len(job.blocks)}", stop=stop,
                )  # fmt: skip
                if here is not None:
                    trainer.resume(here[1], here[2])
                outcome = trainer.run()
                taught.rounding.settle()
                best = min(p.check for p in outcome.curve)
                name = "outputs" if block.end is None else block.end.student
                results.append(BlockDone(name, outcome.curve[0].check, best, outcome.steps))
                outcomes.append(outcome)
                if outcome.interrupted:
                    break
        segment = job.executor.segment(block.starts, job.ends(block)[1])
        _advance(files, block, segment, job.blocks[k + 1].starts if k + 1 < len(job.blocks) else ())
    shutil.rmtree(folder, ignore_errors=True)
    return results, outcomes


def _narrowed(x: Tensor) -> Tensor:
    """As halves, where they are near."""
    if x.numel() == 0 or not float(x.abs().max()) <= MOST_HALF:
        return x
    half = x.half()
    return half if float((half.float() - x).square().sum()) <= HALF_ERROR * float(x.square().sum()) else x


def views_for(seconds: float, steps: int | None, lessons: Lessons) -> int:
    """How often data that come back changed are drawn for a stage of so many seconds, or `steps` a block."""
    # A step of a block is a micro-batch at most.
    one = lessons.steps_an_epoch * max(1, lessons.batch // lessons.micro)
    wanted = seconds / VIEW_S if steps is None else steps / one
    return int(min(max(wanted, 1), MOST_VIEWS))


def _kinds(files: Files, names: Sequence[str]) -> dict[str, list[str]]:
    """What a block reads, by where it is: inputs of the graph, and the student's tensor from the block before."""
    feeds = [n for n in names if files.has("feeds", n)]
    return {"feeds": feeds, "ours": [n for n in names if n not in feeds]}


def _starts(files: Files, names: Sequence[str], i: int, rows: slice = WHOLE) -> dict[str, Tensor]:
    """The tensors that a block reads."""
    return {n: x for kind, some in _kinds(files, names).items() for n, x in files.get(kind, i, some, rows).items()}


@torch.no_grad()
def _as_at_first(job: Blockwise, k: int, tensors: Mapping[str, Tensor]) -> None:
    """Weights of a block as they were when its training began: what was found out then is found out again alike."""
    done = {n for b in job.blocks[:k] for n in b.weights}
    known = job.executor.parameters_by_name()
    for name in job.blocks[k].weights:
        if name in known and name not in done and f"entry/{name}" in tensors:
            known[name].copy_(tensors[f"entry/{name}"])


@torch.no_grad()
def _advance(
    files: Files, block: Block, segment: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], following: Sequence[str]
) -> None:
    """Let the student go on through a block that is done."""
    if block.end is None or block.end.student not in following:
        return
    for i in range(files.n):
        files.put("next", i, segment(_starts(files, block.starts, i)))
    files.become("next", "ours")


class _Taught:
    """One block in training: its loss on a micro-batch, with learned rounding where weights lie on grids of codes."""

    def __init__(self, job: Blockwise, block: Block, files: Files, k: int) -> None:
        done = {n for b in job.blocks[:k] for n in b.weights}  # what an earlier block reads too was taught there
        known = {n: p for n, p in job.executor.parameters_by_name().items() if p.requires_grad and n not in done}
        self._job, self._block, self._files, self._k = job, block, files, k
        self.rounding = Rounding(job.executor, [n for n in block.weights if n in known] if job.learned else [])
        self.parameters = {n: known[n] for n in block.weights if n in known and n not in self.rounding.names}
        self.parameters |= self.rounding.parameters()
        self._theirs, self._ours = job.ends(block)
        self._plain = job.executor.segment(block.starts, self._ours)
        self._segment = self._plain
        if self.rounding:
            self._segment = job.executor.segment([*block.starts, *self.rounding.values], self._ours)
        self._checked = range(files.checked, files.n)
        self._known: float | None = None
        self._projection: Projection | None = None
        if block.end is not None and block.end.axis is not None:
            self._projection = Projection(block.end.axis)
            self._solve(self._projection)
        self._trained = [(i, rows) for i in range(files.checked) for rows in self._parts(i)]
        if len(self._trained) > files.checked and not self._is_by_rows():
            self._trained = [(i, WHOLE) for i in range(files.checked)]

    def work(self) -> Work:
        """What the trainer needs."""
        units = {n: self._job.units[n] for n in self.parameters if n in self._job.units} | self.rounding.units()
        fixed = {}
        if self._projection is not None and self._projection.weight is not None:
            fixed[self._ours[0]] = self._projection.weight
        return Work(self.parameters, units, self._losses, self._check, fixed)

    @torch.no_grad()
    def _solve(self, projection: Projection) -> None:
        """The map from what the student has at the end of the block to what the teacher has there."""
        for i in range(self._files.checked):
            made = self._plain(_starts(self._files, self._block.starts, i))[self._ours[0]]
            if projection.add(made, self._files.get("theirs", i, self._theirs)[self._theirs[0]]):
                break
        projection.solve()

    def _parts(self, i: int) -> list[slice]:
        """Samples of a micro-batch that make a step: so many that they have enough positions."""
        files, end = self._files, self._block.end
        if end is None or not files.stackable:
            return [WHOLE]
        shape = files.shape("theirs", end.teacher, i)
        kinds = _kinds(files, self._block.starts)
        if {files.shape(k, n, i)[:1] for k, some in kinds.items() for n in some} != {shape[:1]} or len(shape) < 3:
            return [WHOLE]
        n, channels = shape[0], shape[1 if len(shape) == 4 else -1]
        each = math.ceil(n / min(max(math.prod(shape) // (channels * POSITIONS), 1), n))
        return [slice(at, at + each) for at in range(0, n, each)] if each < n else [WHOLE]

    @torch.no_grad()
    def _is_by_rows(self) -> bool:
        """True if the block answers parts of a micro-batch as it answers the whole, tried once for each size of one: a
        first axis need not be samples, and a block may take so many at a time only.
        """
        parts = [part for part in self._trained if part[1] != WHOLE]
        sizes = {i: self._files.shape("theirs", self._theirs[0], i)[0] for i, _ in parts}
        first = {n: i for i, n in reversed(sizes.items())}
        tried = [part for part in parts if part[0] in first.values()]
        return all(self._answers_alike(i, rows) for i, rows in tried)

    def _answers_alike(self, i: int, rows: slice) -> bool:
        """True if the block gives for some rows what it gives for them among the others."""
        whole = self._plain(_starts(self._files, self._block.starts, i))[self._ours[0]][rows]
        try:
            part = self._plain(_starts(self._files, self._block.starts, i, rows))[self._ours[0]]
        except RunError:
            return False
        return part.shape == whole.shape and float(losses.relative(part, whole)) <= PART_ERROR

    def _loss(self, i: int, rows: slice = WHOLE, *, hard: bool) -> Tensor:
        feeds = _starts(self._files, self._block.starts, i, rows)
        made = self._segment(feeds | (self.rounding.weights(hard=hard) if self.rounding else {}))
        wanted = self._files.get("theirs", i, self._theirs, rows)
        if self._block.end is None:
            given = self._files.get("feeds", i, self._files.names("feeds"))
            return self._job.answer(made, Lesson(given, wanted, None, 0))
        answer, theirs = made[self._ours[0]], wanted[self._theirs[0]]
        return losses.relative(answer if self._projection is None else self._projection(answer), theirs)

    def _losses(self, step: int, done: float) -> Iterator[Callable[[], Tensor]]:
        epoch, at = divmod(step, len(self._trained))
        order = np.random.default_rng([self._job.seed, 3, self._k, epoch]).permutation(len(self._trained))

        def loss() -> Tensor:
            fit = self._loss(*self._trained[order[at]], hard=False)
            return fit + PENALTY * fit.detach() * self.rounding.penalty(done) if self.rounding else fit

        yield loss

    def _check(self) -> Check:
        known, self._known = self._known, None
        return Check(self._error() if known is None else known)

    def first(self) -> float:
        """Loss on validation data before the first step."""
        self._known = self._error()
        return self._known

    @torch.no_grad()
    def _error(self) -> float:
        """Loss on validation data, with weights as a file will have them."""
        return math.fsum(float(self._loss(i, hard=True)) for i in self._checked) / len(self._checked)

    def rate(self, error: float) -> float:
        """The highest learning rate for a block that is off by so much before it is taught."""
        if self._job.rate is not None:
            return self._job.rate
        if self.rounding:
            return RATE_MOVES
        if self._block.end is None or not math.isfinite(error):
            return LEAST_RATE
        coded = not self._job.executor.grids().keys().isdisjoint(self.parameters)
        return min(max(RATE * error, LEAST_RATE), MOST_RATE if coded else MOST_RATE_FLOATS)


__all__ = ["Blockwise", "train_blocks", "views_for"]
