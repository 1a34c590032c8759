"""One pass of the loop over one table, and what a whole search has found so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from featherweight.core import Attempt, Budget, Plan
from featherweight.search.baseline import Baseline, base
from featherweight.search.effects import Effects
from featherweight.search.fragile import usable
from featherweight.search.loop import Correction, State, search, within
from featherweight.search.measured import announce, measure_plan, stage_of
from featherweight.search.prepare import Ground, context
from featherweight.search.problem import Problem
from featherweight.search.solve import Choice
from featherweight.techniques import integer_names

# Output noise that costs about one unit of drop, as a first guess; the loop corrects it by measuring.
LOSS_PER_DROP = 3.0
NO_CAP = 25.0


@dataclass
class Found:
    """What a search came back with.

    `met_cap` and `correction`: what measuring taught about predictions; `grounds`: what the structures tried stand
    on, by their key, as far as they are still of use; `taught`: the candidate that distillation made, and its file.
    """

    ground: Ground
    attempts: list[Attempt] = field(default_factory=list)
    best: Attempt | None = None
    refusal: str | None = None
    bound_bytes: int | None = None
    stop_reason: str = ""
    interrupted: bool = False
    met_cap: float = 0.0
    correction: Correction = field(default_factory=Correction)
    grounds: dict[str, Ground] = field(default_factory=dict)
    taught: tuple[Attempt, Path] | None = None

    def ground_of(self, problem: Problem, plan: Plan) -> Ground:
        """What a plan's numeric part stands on: the model's ground, or that of the structure it changes it to."""
        made = stage_of(problem, plan)
        return self.ground if made is None else self.grounds.get(made.key, self.ground)


def nothing_yet(problem: Problem) -> Found:
    """A search that has not begun."""
    return Found(Ground(context(problem, None), {}, Effects({}, ())))


def first_cap(budget: Budget) -> float:
    """The loss a first plan may be predicted to have."""
    return min(LOSS_PER_DROP * budget.max_drop, NO_CAP) if budget.max_drop else 0.05


def integers(problem: Problem) -> frozenset[str]:
    """Names of the techniques that compute in integers."""
    return integer_names(problem.techniques.values())


def usable_table(problem: Problem, ground: Ground) -> dict[str, list[Choice]]:
    """All decisions but integer ones at fragile nodes."""
    return usable(ground.effects.table, ground.sites, ground.ctx.fragile, integers(problem))


def state_of(
    problem: Problem,
    known: Baseline,
    found: Found,
    table: Mapping[str, Sequence[Choice]],
    *,
    budget: Budget | None = None,
    candidates: int | None = None,
) -> State:
    """The loop's state before its first candidate."""
    left = max(problem.request.max_candidates - len(found.attempts), 1) if candidates is None else candidates
    return State(
        table,
        budget or problem.budget,
        base(problem, known),
        lambda plan: measure_plan(problem, known, found.ground.ctx, plan),
        problem.out_of_time,
        left,
        lambda best: announce(problem, best),
    )


def run_pass(
    problem: Problem,
    known: Baseline,
    found: Found,
    table: Mapping[str, Sequence[Choice]],
    *,
    cap: float,
    enough: bool,
    candidates: int | None = None,
) -> None:
    """One search over `table`; what it found is added to `found`."""
    take(found, searched(state_of(problem, known, found, table, candidates=candidates), found, cap=cap, enough=enough))


def searched(state: State, found: Found, *, cap: float, enough: bool) -> State:
    """Run the loop from the best found so far; with `enough` it ends at the first candidate within the limits."""
    state.best = found.best
    budget = state.budget
    good: Callable[[Attempt], bool] | None = None
    if enough:
        good = lambda a: a.measured is not None and within(budget, a.measured)  # noqa: E731
    return search(state, first_loss_cap=cap, enough=good)


def take(found: Found, state: State) -> None:
    """Add what a pass found."""
    known_before = {a.index for a in found.attempts}
    found.attempts.extend(a for a in state.attempts if a.index not in known_before)
    found.best, found.stop_reason = state.best, state.stop_reason
    found.interrupted = found.interrupted or state.interrupted
    found.met_cap = max(found.met_cap, state.met_cap)
    found.correction = state.correction
