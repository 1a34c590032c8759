"""What distillation came to: measured on the saved file, reloaded, on data that nothing was trained or chosen on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from featherweight.core import Interval, Measurement, Note


@dataclass(frozen=True)
class Point:
    """One place on the curve. `train`: mean loss since the point before."""

    step: int
    seconds: float
    train: float | None
    check: float
    metric: float | None


@dataclass(frozen=True)
class Block:
    """One block of the layers stage: its error on micro-batches it was not trained on, relative to the teacher's."""

    name: str
    before: float
    after: float
    steps: int


@dataclass(frozen=True)
class Stage:
    """One stage. `loss_before`, `loss_after`: on validation data; `measured`: the saved file on the holdout.

    `kept`: False where it left the validation answers, not softened, further from the teacher's, so that its result was
    dropped. `rates`: the highest learning rate when it began and when it ended (end to end alone).
    """

    name: str
    seconds: float
    steps: int
    loss_before: float
    loss_after: float
    kept: bool
    reason: str
    measured: Measurement
    curve: tuple[Point, ...] = ()
    blocks: tuple[Block, ...] = ()
    rates: tuple[float, float] | None = None


@dataclass(frozen=True)
class Distilled:
    """The result of one run. `model`: the file; `teacher`, `before`, `after` are measured on the same holdout.

    `gain`: metric of `after` over `before`, paired, positive is better, with its interval.
    """

    out: Path
    model: Path
    teacher: Measurement
    before: Measurement
    after: Measurement
    gain: float
    gain_interval: Interval | None
    metric_reason: str
    losses: tuple[str, ...]
    stages: tuple[Stage, ...]
    seconds: float
    peak_bytes: int
    notes: tuple[Note, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    interrupted: bool = False

    @property
    def recovered(self) -> float | None:
        """Share of what the student had lost against its teacher that came back; None where it had lost nothing."""
        lost, left = self.before.drop, self.after.drop
        return None if lost is None or left is None or lost <= 0 else 1 - left / lost
