"""Structure where numbers alone do not do, or where it may do better.

A structure is dear: building it, solving its weights anew and reading its statistics take passes over the data. So a
few are tried, each the structure part of the best joint plan (`joint`) under a cap on the predicted loss. How much of
the predicted loss is real is measured on the float model before any number is rounded; then the numeric part is
searched again on that model, with its own statistics. What does not beat the best so far by measurement is dropped.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

from featherweight.core import Budget, Decision, Effect, Plan
from featherweight.errors import PlanError, RunError, TechniqueError
from featherweight.graph import cost, io
from featherweight.graph.weights import weights
from featherweight.quantities import format_drop
from featherweight.search import bounds, curves, joint, loop, stage
from featherweight.search.baseline import Baseline, base
from featherweight.search.effects import modelled_latency_ms
from featherweight.search.joint import Chosen
from featherweight.search.measured import announce, drop_of, measure_plan
from featherweight.search.options import Structure, structure_options
from featherweight.search.passes import Found, first_cap, searched, take, usable_table
from featherweight.search.prepare import probed_gains, staged, survey
from featherweight.search.problem import Problem
from featherweight.search.solve import Choice, Dimension
from featherweight.search.space import decision_space
from featherweight.search.stage import Staged
from featherweight.search.teaching import teachable
from featherweight.search.trial import Trial, fragile, noise_of, planned_bytes, shifted
from featherweight.techniques import Context

#: Structures built and measured at most, numeric candidates tried on each, and structures tried for a front.
MOST_STRUCTURES = 6
CANDIDATES_EACH = 3
MOST_FOR_A_FRONT = 3
#: How often a proposal that is over the limit on operations is made anew.
MOST_CORRECTIONS = 6
SMALLEST_STEP = 1.3
SCALES = (0.02, 50.0)
#: What many changes lose together over the sum of what each loses alone, before it is measured: about three on
#: EfficientNet-Lite0, where too small a guess costs a structure that is built for nothing.
FIRST_SCALE = 3.0
Outcome = Literal["met", "missed", "rescaled", "unsolved", "nothing"]


class Wider:
    """The search for structure, from where the search over numbers alone came to."""

    def __init__(self, problem: Problem, known: Baseline, found: Found, table: dict[str, list[Choice]]) -> None:
        self.problem, self.known, self.found, self.table = problem, known, found, table
        self.base = base(problem, known)
        self.scale = FIRST_SCALE
        #: Predicted structural loss of the last proposal before scaling, and the scale it was made with.
        self.asked, self.scale_asked = 0.0, FIRST_SCALE
        self.tried: dict[str, Outcome] = {}
        #: Operations by which a structure once built was over their limit: the next one is asked for so many fewer.
        self.over_macs = 0.0
        self.keep_all = False

    @property
    def possible(self) -> bool:
        """True if any technique may change the structure."""
        return bool(self.problem.of_stage(structure=True))

    def share_of_numbers(self, candidates: int) -> int:
        """How many of the candidates go to numbers alone."""
        return candidates - candidates // 3 if self.possible else candidates

    def wanted(self) -> bool:
        """True if structure may help: a limit is missed, or there is something to minimise within a drop."""
        budget, found = self.problem.budget, self.found
        if not self.possible or found.interrupted or self._exhausted():
            return False
        return found.best is None or (budget.minimize != "drop" and budget.max_drop is not None)

    def proofs(self) -> list[bounds.Bound]:
        """The least bytes and MACs that structure and numbers together can reach."""
        space = decision_space(self.problem, self.found.ground, self.table, self.estimated, self.gains)
        return bounds.structure_bounds(self.problem.budget, space, self.base, self._floor())

    def search(self, *, enough: bool) -> None:
        """Try structures until none is left that promises more; what is found is added to `found`."""
        try:
            self._search(self.problem.budget, enough=enough)
        except KeyboardInterrupt:
            self.found.interrupted, self.found.stop_reason = True, "stopped by the user"

    def front(self, seen: Sequence[tuple[int, float]]) -> None:
        """Structures at the sizes where numbers alone begin to lose; `seen` are (bytes, drop)."""
        if not self.possible or self.found.interrupted or self.structure.empty:
            return
        self.keep_all = True
        worse = sorted((size for size, drop in seen if drop > 0), reverse=True)
        try:
            for size in worse[: min(MOST_FOR_A_FRONT, max(len(seen) // 3, 1))]:
                if self.problem.out_of_time():
                    return
                self._one(Budget(max_size_bytes=size, minimize="drop"), math.inf, enough=False, candidates=2)
        except KeyboardInterrupt:
            self.found.interrupted, self.found.stop_reason = True, "stopped by the user"

    @cached_property
    def estimated(self) -> Structure:
        """All that structure can do, estimated in closed form on the model as it is."""
        techniques = list(self.problem.of_stage(structure=True).values())
        integer = any(t.integer for t in self.problem.techniques.values())
        return structure_options(
            self.problem.model, techniques, self._ctx(), self.gains, self.problem.progress,
            integer=integer, whole=self.problem.budget.asks_for_work,
        )  # fmt: skip

    @cached_property
    def structure(self) -> Structure:
        """The same, with the losses of groups on curves through a few real cuts."""
        if self.estimated.empty:
            return self.estimated
        return curves.measured(self.problem, self.estimated, self._ctx(), self.known.metric)

    def _ctx(self) -> Context:
        return dataclasses.replace(self.found.ground.ctx, gains=self.gains)

    @cached_property
    def gains(self) -> dict[str, float]:
        """Gain of each weight."""
        known = {name: facts.gain for name, facts in self.found.ground.facts.items()}
        return known or probed_gains(self.problem, self.found.ground.ctx, weights(self.problem.model))

    @cached_property
    def joint(self) -> joint.Joint:
        """Options of all weights and groups."""
        return decision_space(self.problem, self.found.ground, self.table, self.structure, self.gains)

    def _search(self, budget: Budget, *, enough: bool) -> None:
        if self.structure.empty:
            return
        low, high = 0.0, math.inf
        cap = math.inf if budget.minimize == "drop" else self._first_cap(budget)
        for _ in range(MOST_STRUCTURES):
            if self._exhausted():
                return
            outcome = self._one(budget, cap, enough=enough, candidates=CANDIDATES_EACH)
            if outcome == "nothing" or self.found.interrupted or (enough and self.found.best is not None):
                return
            if not math.isfinite(cap) or outcome == "rescaled":
                continue
            if outcome == "unsolved":
                cap *= 2
                continue
            met, at = outcome == "met", self.asked
            low, high = (max(low, at), high) if met else (low, min(high, at))
            if high / max(low, 1e-12) < SMALLEST_STEP:
                return
            wanted = math.sqrt(low * high) if low and math.isfinite(high) else at * 2 if met else at / 2
            cap += self.scale * wanted - self.scale_asked * at

    def _first_cap(self, budget: Budget) -> float:
        """The loss that the limit of the drop is likely to allow, by the best plan so far."""
        known = max(self.found.met_cap, 0.0) or first_cap(budget)
        best = self.found.best
        if best is None or best.measured is None or best.measured.judged_drop is None or budget.max_drop is None:
            return known
        room = loop.aimed_drop(budget.max_drop, best.measured) / max(best.measured.judged_drop, 1e-9)
        return max(known, best.plan.predicted.loss * min(max(room, 1.0), 4.0))

    def _one(self, budget: Budget, cap: float, *, enough: bool, candidates: int) -> Outcome:
        """Build the best structure under the cap and search its numbers.

        met: a candidate stayed within the limits; missed: none did, or the structure alone is over the limit of the
        drop; rescaled: without such a limit, the structure alone lost more than was predicted, which the next proposal
        takes into account; unsolved: the cap leaves no room for the other limits; nothing: none is worth trying.
        """
        caps = loop.caps_of(budget, self.base, self.found.correction)
        caps["loss"] = cap
        start = self.found.best.plan.by_site() if self.found.best else None
        chosen = self._proposed(budget, caps, start)
        if chosen is None:
            return "unsolved" if math.isfinite(cap) else "nothing"
        self.asked, self.scale_asked = chosen.structural / self.scale, self.scale
        decisions = stage.structure_part(Plan(chosen.decisions), self.problem.techniques)
        key = stage.stage_key(self.problem.model_sha256, decisions, self.problem.request.seed)
        if not decisions or (key in self.tried and not math.isfinite(cap)):
            return "nothing"
        if key not in self.tried:
            self.tried[key] = self._outcome(decisions, budget, cap, enough=enough, candidates=candidates)
        return self.tried[key]

    def _outcome(
        self, decisions: Sequence[Decision], budget: Budget, cap: float, *, enough: bool, candidates: int
    ) -> Outcome:
        """Build one structure and search its numbers."""
        built = self._built(decisions)
        if built is None:
            return "missed"
        made, noise = built
        self.scale = min(max(noise / max(self.asked, 1e-12), SCALES[0]), SCALES[1])
        outcome = self._outcome_alone(made, budget, over=noise > cap)
        if outcome is not None:
            self.problem.stages.pop(made.key, None)
            return outcome
        trial = self._trial(made, noise)
        if budget.max_macs is not None and trial.base.macs > budget.max_macs:
            over = trial.base.macs - budget.max_macs
            self.over_macs += 1.1 * over
            self.problem.note("structure", f"{len(decisions)} change(s) left {over} MACs too many: more was taken away")
            self.problem.stages.pop(made.key, None)
            return "rescaled"
        met = self._numbers(trial, budget, cap, enough=enough, candidates=candidates)
        return "met" if met else "missed"

    def _proposed(
        self, budget: Budget, caps: dict[Dimension, float], start: Mapping[str, Decision] | None
    ) -> Chosen | None:
        """The best joint choice whose operations, counted on the model cut so, are within the limit.

        What groups save together is a product, which the program adds up: so the limit is tightened by what was over.
        """
        weights, space = loop.objective_weights(budget.minimize, self.base), self.joint
        if budget.max_macs is not None:
            caps["macs"] = caps.get("macs", 0.0) - self.over_macs
        for _ in range(MOST_CORRECTIONS):
            chosen = joint.propose(space, caps, weights, scale=self.scale, start=start)
            if chosen is None and space is not self.joint:
                chosen = joint.propose(self.joint, caps, weights, scale=self.scale, start=start)
            if chosen is None or budget.max_macs is None:
                return chosen
            space = joint.fixed(self.joint, [chosen.groups[name] for name in self.joint.whole])  # corrections are small
            decisions = stage.structure_part(Plan(chosen.decisions), self.problem.techniques)
            try:
                techniques = self.problem.of_stage(structure=True)
                model = stage.cut_only(self.problem.model, decisions, self._ctx(), techniques)
            except TechniqueError:
                return chosen  # building it says why
            over = cost.costs(model, input_shapes=self.problem.shapes()).macs - budget.max_macs
            if over <= 0:
                return chosen
            caps["macs"] = caps.get("macs", 0.0) - 1.1 * over
        return None

    def _built(self, decisions: Sequence[Decision]) -> tuple[Staged, float] | None:
        """The structure and its measured output noise, or None after noting why it cannot be."""
        problem = self.problem
        try:
            made = staged(problem, self._ctx(), decisions)
            noise = problem.journal.phase(f"noise of {made.key}", lambda: noise_of(problem, made, self.known.metric))
            return made, noise
        except (TechniqueError, PlanError, RunError) as e:
            problem.note("structure", f"a structure of {len(decisions)} changes could not be built: {e}")
            return None

    def _outcome_alone(self, made: Staged, budget: Budget, *, over: bool) -> Outcome | None:
        """Why the numbers of a structure need not be searched: it has lost too much already; None if they do.

        Measuring the drop takes a second, searching numbers many; `over`: the noise is over the cap on the loss.
        """
        if budget.max_drop is None:
            return "rescaled" if over else None
        problem = self.problem
        try:
            found = problem.journal.phase(f"drop of {made.key}", lambda: drop_of(problem, self.known, made.path))
        except RunError as e:
            problem.note("structure", f"a structure of {len(made.decisions)} changes could not be run: {e}")
            return "missed"
        most = loop.HEADROOM * budget.max_drop  # the rest is for the numbers
        if problem.request.recover == "distill":  # what misses by little may be taught
            most = teachable(budget.max_drop)
        if found is None or found <= most:
            return None
        name = self.known.metric.name
        problem.note(
            "structure",
            f"{len(made.decisions)} change(s) alone lose {format_drop(found, name)}, where {format_drop(most, name)} "
            "is aimed at, judged on validation data: numbers were not searched there",
        )
        return "missed"

    def _trial(self, made: Staged, noise: float) -> Trial:
        """What can be done to the numbers of a structure, estimated with its own statistics."""
        ground = self.found.ground
        own = dataclasses.replace(self.problem, model=made.model, model_path=made.path, facts={})
        gains = dict(self.gains)
        for site, names in made.left.items():
            gains.update(dict.fromkeys(names, self.gains.get(site, 1.0)))
        ctx = dataclasses.replace(ground.ctx, stats=made.stats, cache={}, fragile=fragile(ground, made), gains=gains)
        table = survey(own, ctx, with_gains=False, gains=gains)
        macs = own.macs()
        start = loop.Base(
            io.size_bytes(made.path),
            max(modelled_latency_ms(macs), 1e-6),
            self.base.peak_bytes + planned_bytes(own) - planned_bytes(self.problem),
            self.base.measured_ms,
            macs,
        )
        return Trial(own, made, table, noise, start)

    def _numbers(self, trial: Trial, budget: Budget, cap: float, *, enough: bool, candidates: int) -> bool:
        """Search the numeric part on one structure; True if a candidate stayed within the limits."""
        found, own, made = self.found, trial.problem, trial.staged
        before, here = found.best, trial.base
        offset = Effect(
            here.size_bytes - self.base.size_bytes, here.latency_ms - self.base.latency_ms,
            here.peak_bytes - self.base.peak_bytes, trial.noise,
            here.macs - self.base.macs,
        )  # fmt: skip
        left = self.problem.request.max_candidates - len(found.attempts)
        state = loop.State(
            usable_table(own, trial.ground),
            budget,
            here,
            lambda plan: shifted(measure_plan(own, self.known, trial.ground.ctx, plan), offset),
            own.out_of_time,
            max(min(candidates, left), 1),
            lambda best: announce(own, best),
            lambda plan: stage.whole_plan(found.ground.sites, made.decisions, plan, made.left),
            loop.Correction(latency_factor=found.correction.latency_factor * here.latency_ms / self.base.latency_ms),
        )
        correction, met_cap, reason = found.correction, found.met_cap, found.stop_reason
        inner = min(max(cap - trial.noise, 0.15 * cap), 25.0)
        take(found, searched(state, found, cap=inner, enough=enough))
        found.correction, found.met_cap = correction, met_cap  # those are of the model with its structure whole
        # That its few candidates are used up says nothing of the whole search.
        telling = found.best is not before and len(state.attempts) < state.max_candidates
        found.stop_reason = found.stop_reason if telling else reason or found.stop_reason
        wanted = found.best or loop.nearest(self.problem.budget, found.attempts)
        if self.keep_all or wanted in state.attempts:
            found.grounds[made.key] = trial.ground
        else:
            self.problem.stages.pop(made.key, None)  # its statistics are large, and it is on disk
        return any(a.measured is not None and loop.within(budget, a.measured) for a in state.attempts)

    def _exhausted(self) -> bool:
        spent = len(self.found.attempts) >= self.problem.request.max_candidates
        return spent or self.problem.out_of_time()

    def _floor(self) -> bounds.Floor | None:
        """The model with every group at its narrowest; None if they cannot all be cut."""
        problem = self.problem
        narrow = [min(g, key=lambda o: (o.size, o.work)).decision for g in self.estimated.groups.values() if len(g) > 1]
        try:
            model = stage.cut_only(
                problem.model, narrow, self._ctx(),
                problem.of_stage(structure=True),
            )  # fmt: skip
        except TechniqueError:
            return None
        return bounds.floor_of(model, problem.shapes(), narrow)
