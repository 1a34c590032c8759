"""Checkpoints of a whole run: the loop's state, the student, and where the run stands."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from featherweight.core import Interval, Measurement
from featherweight.learn.result import Block, Point, Stage

if TYPE_CHECKING:
    from featherweight.learn.running import Run


class StageKeeper:
    """Keeps the loop's state together with where the run stands."""

    def __init__(self, run: Run, stage: str, block: int, done: Sequence[Stage]) -> None:
        self._run, self._stage, self._block, self._done = run, stage, block, tuple(done)

    def write(self, state: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        """One checkpoint of the whole run."""
        run = self._run
        began, loss_before, entry = run.entry if self._stage else (0.0, 0.0, {})
        document = {
            "stage": self._stage, "block": self._block, "trainer": state, "elapsed": run.elapsed(), "began": began,
            "loss_before": loss_before, "done": [dataclasses.asdict(s) for s in self._done],
        }  # fmt: skip
        student = run.student.parameters().items()
        everything = {f"student/{n}": p.detach() for n, p in student if f"now/{n}" not in tensors}
        everything |= {f"entry/{n}": x for n, x in entry.items()}
        steps = int(state.get("step", 0)) + 10**6 * self._block + 10**8 * len(self._done)
        run.checkpoints.write(steps, document, {**everything, **tensors})


def stage_from(raw: Mapping[str, Any]) -> Stage:
    """Read a stage from a checkpoint."""
    fields = dict(raw)
    measured = dict(fields.pop("measured"))
    interval = measured.pop("drop_interval", None)
    return Stage(
        **{k: v for k, v in fields.items() if k not in ("curve", "blocks", "rates")},
        measured=Measurement(**measured, drop_interval=None if interval is None else Interval(**interval)),
        curve=tuple(Point(**p) for p in fields["curve"]),
        blocks=tuple(Block(**b) for b in fields["blocks"]),
        rates=None if fields.get("rates") is None else tuple(fields["rates"]),
    )
