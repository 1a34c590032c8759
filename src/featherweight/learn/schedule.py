"""How long a stage trains and how fast: warm-up, then half a cosine, stretched over the time that there is.

The rate is a function of the step and of a plan alone, never of the clock, so that a resumed run is the run it goes on
from. Time enters where the plan is made anew: every so many steps the pace so far says how many steps still fit, the
cosine is stretched to end there, and the new plan is stored with the checkpoint. (Loshchilov 2017, arXiv:1608.03983.)
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

#: The rate at the end over the highest rate.
FLOOR = 0.01
#: A new plan may at most double the steps left, and at least halve them: a pause of the machine is no law.
MOST_STRETCH = 2.0


@dataclass(frozen=True)
class Schedule:
    """A plan of `steps` steps of which the first `warmup` rise linearly.

    `since`, `share`: the step at which this plan was made and the share of the cosine done then.
    """

    steps: int
    warmup: int
    since: int = 0
    share: float = 0.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.warmup < 0 or not 0 <= self.share <= 1:
            raise ValueError(f"a schedule needs steps >= 1, warmup >= 0, share in 0..1, but got {self}")

    def done(self, step: int) -> float:
        """Share of the cosine at the beginning of `step`, 0..1."""
        left = max(self.steps - self.since, 1)
        return min(1.0, self.share + (1 - self.share) * (step - self.since) / left)

    def rate(self, step: int) -> float:
        """Factor of the highest learning rate at `step`: in (0, 1]."""
        rise = min(1.0, (step + 1) / (self.warmup + 1))
        return rise * (FLOOR + (1 - FLOOR) * (1 + math.cos(math.pi * self.done(step))) / 2)

    def stretched(self, step: int, steps: int) -> Schedule:
        """The plan made anew at `step` so that it ends at `steps`; the rate does not jump."""
        left = max(self.steps - step, 1)
        wanted = min(max(steps - step, math.ceil(left / MOST_STRETCH)), math.floor(left * MOST_STRETCH))
        return dataclasses.replace(self, steps=step + max(wanted, 1), since=step, share=self.done(step))

    def to_json(self) -> dict[str, Any]:
        """Plain numbers; floats survive JSON exactly."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, raw: dict[str, Any]) -> Schedule:
        """Read `to_json`'s form. Raises ValueError, TypeError or KeyError on anything else."""
        return cls(int(raw["steps"]), int(raw["warmup"]), int(raw["since"]), float(raw["share"]))


def first_plan(seconds: float, seconds_a_step: float, *, most: int | None = None) -> Schedule:
    """As many steps as fit into `seconds` at this pace, at most `most`; a twentieth of them, at most 100, warms up."""
    steps = max(1, int(seconds / max(seconds_a_step, 1e-6))) if math.isfinite(seconds) else most or 1
    steps = steps if most is None else min(steps, most)
    return Schedule(steps, min(steps // 20, 100))


class Pace:
    """Seconds a step, forgetting slowly: what the rest will take."""

    def __init__(self) -> None:
        self.seconds_a_step = 0.0
        self._seen = 0

    def add(self, seconds: float) -> None:
        """One step took `seconds`."""
        self._seen += 1
        weight = max(1 / self._seen, 0.05)
        self.seconds_a_step += weight * (seconds - self.seconds_a_step)
