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
import torch
from torch import Tensor, nn

from featherweight.core import Progress
from featherweight.learn import losses
from featherweight.learn.blocks import Block
from featherweight.learn.execute import Executor
from featherweight.learn.losses import Projection
from featherweight.learn.result import Block as BlockDone
from featherweight.learn.teacher import Lessons, as_tensors
from featherweight.learn.training import Check, Keeper, Outcome, Recipe, Trainer, Work

#: Bytes of all files together; fewer samples are taken where they do not fit.
FILES_BYTES = 4 << 30
#: One micro-batch in so many is for checking.
CHECK_SHARE = 8
#: Times that the data are drawn (augmented differently each time).
VIEWS = 2


@dataclass(frozen=True)
class Blockwise:
    """What the stage works on. `costs`: work of each block, in any unit."""

    executor: Executor
    blocks: Sequence[Block]
    costs: Sequence[float]
    recipe: Recipe
    units: Mapping[str, Tensor]
    seed: int = 0


class Files:
    """Micro-batches of tensors as .npy files: feeds, the teacher's answers at each place, the student's starts."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.n = 0
        self._names: dict[str, dict[str, int]] = {}

    def fill(self, lessons: Lessons, places: Sequence[str], progress: Progress) -> None:
        """Draw the data and ask the teacher, once."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        steps = lessons.steps_an_epoch * (VIEWS if lessons.augmented else 1)
        progress.start("asking the teacher for its inner answers", steps)
        used = 0
        for step in range(steps):
            for lesson in lessons.step(step):
                answers = {p: lesson.answers[p] for p in places}
                used += self._size(answers) + self._size(lesson.feeds)
                if self.n and used > FILES_BYTES:
                    return
                self.put("feeds", self.n, lesson.feeds)
                self.put("theirs", self.n, answers)
                self.n += 1
            progress.advance()

    @staticmethod
    def _size(tensors: Mapping[str, Tensor]) -> int:
        return sum(x.nbytes for x in tensors.values())

    def put(self, kind: str, i: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep some tensors of micro-batch `i`."""
        for k, (name, x) in enumerate(tensors.items()):
            self._names.setdefault(kind, {})[name] = k
            np.save(self.folder / f"{kind}-{k}-{i}.npy", x.detach().contiguous().numpy())

    def get(self, kind: str, i: int, names: Sequence[str]) -> dict[str, Tensor]:
        """Some tensors of micro-batch `i`."""
        at = self._names[kind]
        arrays = {n: np.load(self.folder / f"{kind}-{at[n]}-{i}.npy") for n in names}
        return as_tensors(arrays)

    def has(self, kind: str, name: str) -> bool:
        """True if a tensor of that name is kept."""
        return name in self._names.get(kind, {})

    def forget(self, kind: str) -> None:
        """Its files are about to be written over."""
        self._names.pop(kind, None)


def train_blocks(
    job: Blockwise,
    lessons: Lessons,
    folder: Path,
    *,
    seconds: float,
    keeper: Callable[[int], Keeper] | None,
    start: tuple[int, Mapping[str, Any], Mapping[str, Tensor]] | None,
    progress: Progress,
    stop: Callable[[], bool],
    clock: Callable[[], float],
) -> tuple[list[BlockDone], list[Outcome]]:
    """Train each block in order; `seconds` are shared by what blocks cost.

    `start`: block, trainer's state and tensors of a checkpoint; blocks before it are done. `clock`: seconds used by the
    stage so far.
    """
    files = Files(folder)
    files.fill(lessons, [b.end.teacher for b in job.blocks], progress)
    first = 0 if start is None else start[0]
    results, outcomes = [], []
    for k, block in enumerate(job.blocks):
        segment = job.executor.segment(block.starts, [block.end.student])
        if k >= first:
            share = job.costs[k] / max(math.fsum(job.costs[k:]), 1e-12)
            work = _work(job, block, segment, files, k)
            if work is not None:
                trainer = Trainer(
                    work, job.recipe, seconds=max((seconds - clock()) * share, 0.0),
                    keeper=keeper(k) if keeper else None, progress=progress,
                    name=f"block {k + 1} of {len(job.blocks)}", stop=stop,
                )  # fmt: skip
                if start is not None and k == first:
                    trainer.resume(start[1], start[2])
                outcome = trainer.run()
                best = min(p.check for p in outcome.curve)
                results.append(BlockDone(block.end.student, outcome.curve[0].check, best, outcome.steps))
                outcomes.append(outcome)
                if outcome.interrupted:
                    break
        _advance(files, block, segment, job.blocks[k + 1].starts if k + 1 < len(job.blocks) else ())
    shutil.rmtree(folder, ignore_errors=True)
    return results, outcomes


def _starts(files: Files, names: Sequence[str], i: int) -> dict[str, Tensor]:
    """What a block reads: inputs of the graph, and the student's tensor from the block before."""
    feeds = [n for n in names if files.has("feeds", n)]
    inner = [n for n in names if n not in feeds]
    found = files.get("feeds", i, feeds)
    return found | (files.get("ours", i, inner) if inner else {})


@torch.no_grad()
def _advance(
    files: Files, block: Block, segment: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], following: Sequence[str]
) -> None:
    """Let the student go on through a block that is done."""
    if block.end.student not in following:
        return
    for i in range(files.n):
        made = segment(_starts(files, block.starts, i))
        files.forget("ours")
        files.put("ours", i, made)


def _work(
    job: Blockwise, block: Block, segment: Callable[[Mapping[str, Tensor]], dict[str, Tensor]], files: Files, k: int
) -> Work | None:
    """The training of one block; None where it has nothing to train."""
    known = job.executor.parameters_by_name()
    parameters: dict[str, nn.Parameter] = {n: known[n] for n in block.weights if n in known}
    if not parameters:
        return None
    ours, theirs = block.end.student, block.end.teacher
    checked = [i for i in range(files.n) if i % CHECK_SHARE == CHECK_SHARE - 1] or [files.n - 1]
    trained = [i for i in range(files.n) if i not in checked] or [0]
    projection = None if block.end.axis is None else Projection(block.end.axis)
    if projection is not None:
        with torch.no_grad():
            made = segment(_starts(files, block.starts, trained[0]))[ours]
        projection.fit(made, files.get("theirs", trained[0], [theirs])[theirs])

    def loss(i: int) -> Tensor:
        made = segment(_starts(files, block.starts, i))[ours]
        wanted = files.get("theirs", i, [theirs])[theirs]
        return losses.relative(made if projection is None else projection(made), wanted)

    def of_step(step: int) -> Iterator[Callable[[], Tensor]]:
        epoch, at = divmod(step, len(trained))
        order = np.random.default_rng([job.seed, 3, k, epoch]).permutation(len(trained))
        yield lambda: loss(trained[order[at]])

    @torch.no_grad()
    def check() -> Check:
        return Check(math.fsum(float(loss(i)) for i in checked) / len(checked))

    fixed = {} if projection is None or projection.weight is None else {ours: projection.weight}
    return Work(parameters, {n: job.units[n] for n in parameters}, of_step, check, fixed)


__all__ = ["Blockwise", "train_blocks"]
