"""The loop: steps under a schedule, checks on validation data, the best kept, checkpoints, an honest end.

What is trained comes as `Work`; the loop knows nothing of networks. All that decides how it goes on is in its state, so
that a run that was killed ends where the same run would have ended that was not.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featherweight.core import Progress
from featherweight.errors import DataError
from featherweight.learn.optimiser import Adam
from featherweight.learn.result import Point
from featherweight.learn.schedule import Pace, Schedule, first_plan
from featherweight.learn.stopping import Watch
from featherweight.quantities import format_duration

CHECKS = 24
#: Seconds between checkpoints.
CHECKPOINT_S = 60.0
#: A gradient may be this many times its usual norm before it is scaled down.
SPIKE = 2.0
#: Steps before a plan by time; the first of them, which asks for memory, says nothing about the pace.
PROBE_STEPS = 3
#: What a rate is multiplied by where so many checks in a row say that it does harm (the first steps always do some),
#: and the share of the schedule in which that is looked for.
RETREAT, RETREAT_AFTER, RETREAT_UNTIL = 0.3, 3, 0.5


@dataclass(frozen=True)
class Check:
    """What was seen on validation data: the loss that decides, and the metric by its name."""

    loss: float
    metric: float | None = None


@dataclass(frozen=True)
class Work:
    """What is trained.

    `parameters` and `units` by name (see `optimiser.Adam`). `losses(step, done)` gives the micro-batches of a step
    (`done`: share of the schedule, 0..1), each a function that returns a loss, already weighted so that their gradients
    add up. `check` looks at validation data. `fixed`: tensors that were solved for before the first step; a checkpoint
    keeps them and gives them back in place.
    """

    parameters: Mapping[str, nn.Parameter]
    units: Mapping[str, Tensor]
    losses: Callable[[int, float], Iterator[Callable[[], Tensor]]]
    check: Callable[[], Check]
    fixed: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """`rate`: the highest learning rate; `ema`: decay of the averaged weights, 0 for none; `patience`: checks without a
    better one, and not falling, before the end; `most_steps`: fixes the plan, so that it does not depend on the clock;
    `retreats`: how often the loop may go back to the best weights and on at a lower rate, where validation data says
    that the rate undoes what the student had.
    """

    rate: float
    decay: float = 0.0
    ema: float = 0.0
    patience: int = CHECKS // 2
    most_steps: int | None = None
    checks: int = CHECKS
    retreats: int = 0


@dataclass(frozen=True)
class Outcome:
    """How a stage ended. `best_step` -1: nothing was better than before the first step. `rate`: the highest at last."""

    steps: int
    planned: int
    seconds: float
    best_step: int
    reason: str
    curve: tuple[Point, ...]
    interrupted: bool = False
    rate: float = 0.0


class Keeper(Protocol):
    """Where the loop keeps its state."""

    def write(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Keep it, whole or not at all."""
        ...


@dataclass
class _State:
    step: int = 0
    schedule: Schedule | None = None
    every: int = 1
    watch: Watch = field(default_factory=Watch)
    curve: list[Point] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    norm: float = 0.0
    seconds: float = 0.0
    retreats: int = 0
    restarted: int = 0  # the step from which the optimiser's averages are

    def to_json(self) -> dict[str, Any]:
        return {
            "step": self.step,
            "schedule": None if self.schedule is None else self.schedule.to_json(),
            "every": self.every,
            "watch": self.watch.to_json(),
            "curve": [dataclasses.asdict(p) for p in self.curve],
            "losses": self.losses,
            "norm": self.norm,
            "seconds": self.seconds,
            "retreats": self.retreats,
            "restarted": self.restarted,
        }

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> _State:
        try:
            plan = raw["schedule"]
            return cls(
                int(raw["step"]),
                None if plan is None else Schedule.from_json(plan),
                int(raw["every"]),
                Watch.from_json(raw["watch"]),
                [Point(**p) for p in raw["curve"]],
                list(raw["losses"]),
                float(raw["norm"]),
                float(raw["seconds"]),
                int(raw.get("retreats", 0)),
                int(raw.get("restarted", 0)),
            )
        except (KeyError, TypeError, ValueError) as e:
            raise DataError(f"the checkpoint's state is malformed ({type(e).__name__}: {e}); begin anew") from e


def first_check(state: Mapping[str, Any]) -> float:
    """The loss on validation data before the first step, of a state that was kept. Raises DataError."""
    curve = _State.from_json(state).curve
    if not curve:
        raise DataError("the checkpoint's state holds no check on validation data; begin anew")
    return curve[0].check


class Trainer:
    """Trains some work for at most `seconds`; pauses between resumed runs are not counted."""

    def __init__(
        self,
        work: Work,
        recipe: Recipe,
        *,
        seconds: float,
        keeper: Keeper | None,
        progress: Progress,
        name: str = "training",
        stop: Callable[[], bool] = lambda: False,
    ) -> None:
        """`name`: of the phase shown; `stop`: asked after each step whether the user wants an end."""
        self._work, self._recipe, self._limit = work, recipe, seconds
        self._keeper, self._progress, self._name, self._stop = keeper, progress, name, stop
        self._written, self._check_s, self._warm = time.monotonic(), 0.0, False
        self._state = _State()
        self._adam = Adam(work.parameters, work.units, decay=recipe.decay)
        self._best = {n: p.detach().clone() for n, p in work.parameters.items()}
        self._average = {n: x.clone() for n, x in self._best.items()} if recipe.ema else {}
        self._pace, self._began, self._before = Pace(), time.monotonic(), 0.0

    def resume(self, state: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Go on from what the keeper was given. Raises DataError where it does not fit this work."""
        self._state = _State.from_json(state)
        try:
            with torch.no_grad():
                for name, p in self._work.parameters.items():
                    p.copy_(tensors[f"now/{name}"])
                    self._best[name].copy_(tensors[f"best/{name}"])
                for name, x in self._average.items():
                    x.copy_(tensors[f"average/{name}"])
                for name, x in self._work.fixed.items():
                    x.copy_(tensors[f"fixed/{name}"])
            self._adam.load(tensors, self._state.step - self._state.restarted)
        except (KeyError, RuntimeError) as e:
            raise DataError(f"the checkpoint is of another student: {e}; begin anew in a new folder") from e
        self._before = self._state.seconds

    def run(self) -> Outcome:
        """Train; the parameters hold the best weights at the end, also where the user stopped it."""
        state, interrupted, reason = self._state, False, "all planned steps were taken"
        self._began = time.monotonic()
        self._progress.start(self._name, state.schedule.steps if state.schedule else None)
        self._progress.advance(state.step)
        if not state.curve:
            self._look()
        while state.schedule is None or state.step < state.schedule.steps:
            self._advance()
            if self._stop():
                interrupted, reason = True, "stopped by the user"
                self.keep()
                break
            if state.watch.stalled(self._recipe.patience, [p.check for p in state.curve]):
                reason = f"the last {state.watch.since} checks on validation data brought nothing better"
                break
            if self._seconds() >= self._limit:
                reason = "the time budget is used up"
                break
        if state.curve[-1].step != state.step:
            self._look()
        with torch.no_grad():
            for name, p in self._work.parameters.items():
                p.copy_(self._best[name])
        planned = state.schedule.steps if state.schedule else 0
        return Outcome(
            state.step, planned, self._seconds(), state.watch.best_step, reason, tuple(state.curve), interrupted,
            self._rate(),
        )  # fmt: skip

    def _advance(self) -> None:
        """One step, and what comes after it."""
        state = self._state
        paced = state.step >= PROBE_STEPS and self._pace.seconds_a_step > 0  # a resumed run has no pace at first
        if state.schedule is None and (paced or self._recipe.most_steps is not None):
            self._plan()
        started = time.monotonic()
        self._train(state.schedule.rate(state.step) if state.schedule else 0.05)
        if self._warm:
            self._pace.add(time.monotonic() - started)
        self._warm = True
        state.step += 1
        self._progress.advance()
        if state.schedule is not None and state.step - state.curve[-1].step >= state.every:
            self._look()
            self._retreat(state.schedule.done(state.step))
            self._stretch()
        if self._keeper is not None and time.monotonic() - self._written >= CHECKPOINT_S:
            self.keep()

    def _rate(self) -> float:
        """The highest rate, as it is now."""
        return self._recipe.rate * RETREAT**self._state.retreats

    def _retreat(self, done: float) -> None:
        """Back to the best weights, and on at a lower rate, where the last checks say that this one does harm."""
        state = self._state
        may = done < RETREAT_UNTIL and state.retreats < self._recipe.retreats
        recent = [p.check for p in state.curve if p.step > state.restarted][-RETREAT_AFTER:]
        if not may or len(recent) < RETREAT_AFTER or not all(map(state.watch.harmed, recent)):
            return
        self._put(self._best)
        if self._average:
            self._average = {n: x.clone() for n, x in self._best.items()}
        self._adam = Adam(self._work.parameters, self._work.units, decay=self._recipe.decay)
        state.retreats, state.restarted, state.norm = state.retreats + 1, state.step, 0.0

    def keep(self) -> None:
        """Write a checkpoint now."""
        if self._keeper is None:
            return
        self._state.seconds = self._seconds()
        named: dict[str, Mapping[str, Tensor]] = {
            "now": self._work.parameters, "best": self._best, "average": self._average, "fixed": self._work.fixed
        }  # fmt: skip
        tensors = {f"{kind}/{n}": x.detach() for kind, many in named.items() for n, x in many.items()}
        self._keeper.write(self._state.to_json(), tensors | self._adam.state())
        self._written = time.monotonic()

    def _plan(self) -> None:
        """How many steps fit, with the checks in between."""
        left = self._limit - self._seconds()
        most = self._recipe.most_steps
        if most is None:
            plan = first_plan(left * 0.95, self._pace.seconds_a_step)
            plan = dataclasses.replace(plan, steps=plan.steps + self._state.step)
        else:
            plan = first_plan(math.inf, 1.0, most=most)
        self._state.schedule = plan
        self._state.every = max(1, plan.steps // self._recipe.checks)
        self._progress.start(self._name, plan.steps)
        self._progress.advance(self._state.step)

    def _stretch(self) -> None:
        """Fit the plan to the pace, unless the steps are fixed."""
        plan, left = self._state.schedule, self._limit - self._seconds()
        if plan is None or self._recipe.most_steps is not None or self._pace.seconds_a_step <= 0 or left <= 0:
            return
        checks_left = max(plan.steps - self._state.step, 0) / self._state.every
        fits = int((left - checks_left * self._check_s) / self._pace.seconds_a_step)
        plan = plan.stretched(self._state.step, self._state.step + max(fits, 1))
        # Checks that cost more than the steps between them would leave the plan ever fewer.
        least = math.ceil(self._check_s / self._pace.seconds_a_step)
        self._state.schedule, self._state.every = plan, max(1, least, plan.steps // self._recipe.checks)

    def _train(self, share: float) -> None:
        """One step at a share of the highest rate."""
        state, adam = self._state, self._adam
        adam.zero()
        total = 0.0
        done = state.schedule.done(state.step) if state.schedule else 0.0
        for loss_of in self._work.losses(state.step, done):
            loss = loss_of()
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        if not math.isfinite(total):
            raise DataError(f"the loss became {total} at step {state.step + 1}; use a smaller --learning-rate")
        norm = adam.clip(SPIKE * state.norm if state.norm else math.inf)
        state.norm = norm if not state.norm else 0.95 * state.norm + 0.05 * min(norm, SPIKE * state.norm)
        adam.step(self._rate() * share)
        state.losses.append(total)
        if self._average:
            decay = min(self._recipe.ema, (1 + state.step) / (10 + state.step))
            with torch.no_grad():
                for name, p in self._work.parameters.items():
                    self._average[name].lerp_(p, 1 - decay)

    def _look(self) -> None:
        """Check on validation data; keep what is best."""
        started = time.monotonic()
        state = self._state
        now = {}
        if self._average and state.step:
            now = {n: p.detach().clone() for n, p in self._work.parameters.items()}
            self._put(self._average)
        found = self._work.check()
        train = math.fsum(state.losses) / len(state.losses) if state.losses else None
        state.losses = []
        state.watch = state.watch.seen(state.step, found.loss)
        if state.watch.is_best(state.step):
            for name, p in self._work.parameters.items():
                self._best[name].copy_(p.detach())
        if now:
            self._put(now)
        state.curve.append(Point(state.step, self._seconds(), train, found.loss, found.metric))
        self._check_s = time.monotonic() - started
        self._tell(found, train)

    @torch.no_grad()
    def _put(self, tensors: Mapping[str, Tensor]) -> None:
        for name, p in self._work.parameters.items():
            p.copy_(tensors[name])

    def _tell(self, found: Check, train: float | None) -> None:
        """Loss, metric and time left, in a few words."""
        plan = self._state.schedule
        left = "" if plan is None else (plan.steps - self._state.step) * self._pace.seconds_a_step
        words = [] if train is None else [f"loss {train:.4g}"]
        words.append(f"validation loss {found.loss:.4g}")
        words += [] if found.metric is None else [f"metric {found.metric:.4g}"]
        words += [] if left == "" else [f"{format_duration(float(left))} left"]
        self._progress.trying(", ".join(words))
        best = self._state.watch
        self._progress.best(f"validation loss {best.best:.4g} at step {best.best_step}")

    def _seconds(self) -> float:
        return self._before + time.monotonic() - self._began
