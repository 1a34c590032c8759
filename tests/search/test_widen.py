"""How structures are chosen one after another: what was measured of one bounds the next."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from featherweight.core import Attempt, Budget, Measurement, Plan
from featherweight.errors import RunError
from featherweight.search import widen
from featherweight.search.loop import Base
from featherweight.search.passes import Found
from featherweight.search.widen import Wider


class Asking(Wider):
    """Asks for as much structure as the cap allows; it stays within the limits up to `most`.

    The noise a structure really makes grows otherwise than predicted, so that the scale changes with every one.
    """

    def __init__(self, most: float, power: float) -> None:
        self.most, self.power, self.log = most, power, []
        self.scale, self.asked, self.scale_asked = 3.0, 0.0, 3.0
        vars(self)["found"] = SimpleNamespace(interrupted=False, best=None)
        self.__dict__["structure"] = SimpleNamespace(empty=False)

    def _exhausted(self) -> bool:
        return False

    def _first_cap(self, budget: Budget) -> float:
        return 1.0

    def _one(self, budget, cap, *, enough, candidates):
        self.asked, self.scale_asked = cap / self.scale, self.scale
        self.scale = 2 * self.asked**self.power
        met = self.asked <= self.most
        self.log.append((self.asked, met))
        return "met" if met else "missed"


@pytest.mark.parametrize("power", [-0.7, 0.0, 0.8])
@pytest.mark.parametrize("most", [0.02, 0.2, 0.33, 1.5])
def test_each_structure_lies_between_what_met_and_what_missed(most, power):
    wider = Asking(most, power)
    wider._search(Budget(max_drop=0.01, minimize="latency"), enough=False)
    assert len(wider.log) > 1
    for i, (asked, _) in enumerate(wider.log[1:], start=1):
        before = wider.log[:i]
        assert all(asked > a if met else asked < a for a, met in before)


def alone(found: Any, *, max_drop=0.01, recover="ridge", over=False):
    """`_outcome_alone` of a structure whose likely drop is `found`; an error is raised."""

    def phase(_name, measure):
        return measure()

    notes = []
    problem = SimpleNamespace(
        journal=SimpleNamespace(phase=phase), request=SimpleNamespace(recover=recover),
        note=lambda where, text: notes.append(f"{where}: {text}"),
    )  # fmt: skip
    wider = Asking(1.0, 0.0)
    vars(wider).update(problem=problem, known=SimpleNamespace(metric=SimpleNamespace(name="accuracy")))
    made: Any = SimpleNamespace(key="k", path="p", decisions=("d",))
    with pytest.MonkeyPatch.context() as patch:

        def drop_of(*_):
            if isinstance(found, Exception):
                raise found
            return found

        patch.setattr(widen, "drop_of", drop_of)
        return wider._outcome_alone(made, Budget(max_drop=max_drop), over=over), notes


@pytest.mark.parametrize(
    ("drop", "recover", "outcome"),
    [(0.007, "ridge", None), (0.009, "ridge", "missed"), (0.009, "distill", None), (0.04, "distill", "missed")],
)
def test_a_structure_that_lost_too_much_alone_is_not_searched_unless_it_may_be_taught(drop, recover, outcome):
    assert alone(drop, recover=recover)[0] == outcome


def test_a_structure_that_lost_too_much_is_told_of():
    assert alone(0.012)[1] == [
        "structure: 1 change(s) alone lose 1.20 points, where 0.80 points is aimed at, judged on validation data: "
        "numbers were not searched there"
    ]
    assert alone(0.007)[1] == []


@pytest.mark.parametrize(("attempts", "told"), [(3, "of numbers"), (2, "of this structure")])
def test_that_the_candidates_of_one_structure_are_used_up_is_no_end_of_the_search(attempts, told, monkeypatch):
    best = Attempt(1, Plan(()), Measurement(size_bytes=1))
    found: Any = Found(SimpleNamespace(ctx=None, sites={}), best=None, stop_reason="of numbers")

    def searched(state, *_, **__):
        state.attempts, state.best = [best] * attempts, best
        state.stop_reason = "of this structure"
        return state

    monkeypatch.setattr(widen, "searched", searched)
    monkeypatch.setattr(widen, "usable_table", lambda *_: {})
    wider = Asking(1.0, 0.0)
    base = Base(size_bytes=1, latency_ms=1.0, peak_bytes=1)
    problem = SimpleNamespace(request=SimpleNamespace(max_candidates=40), budget=Budget(), out_of_time=lambda: False)
    vars(wider).update(problem=problem, base=base, known=None, found=found, keep_all=True)
    trial: Any = SimpleNamespace(
        problem=problem, base=base, noise=0.0, ground=SimpleNamespace(ctx=None),
        staged=SimpleNamespace(key="k", decisions=(), left={}),
    )  # fmt: skip
    assert wider._numbers(trial, Budget(), 1.0, enough=False, candidates=3)
    assert (found.best, found.stop_reason) == (best, told)


def test_without_a_limit_on_the_drop_the_noise_decides():
    assert alone(0.5, max_drop=None, over=True)[0] == "rescaled"
    assert alone(0.5, max_drop=None)[0] is None


def test_a_structure_that_cannot_be_run_is_noted_and_the_search_goes_on():
    outcome, notes = alone(RunError("the child died"))
    assert outcome == "missed"
    assert notes == ["structure: a structure of 1 changes could not be run: the child died"]


def test_a_structure_still_over_its_operations_is_asked_for_again_with_less(monkeypatch):
    """What is built may have more operations than were counted; the next proposal is asked for so many fewer."""
    notes, asked = [], []
    wider = Asking(1.0, 0.0)
    base = Base(size_bytes=1, latency_ms=1.0, peak_bytes=1, macs=1000)
    problem = SimpleNamespace(
        note=lambda where, text: notes.append(f"{where}: {text}"), stages={"k": 1}, model=None, of_stage=lambda **_: {},
    )  # fmt: skip
    made: Any = SimpleNamespace(key="k", decisions=("d",))
    vars(wider).update(problem=problem, base=base, over_macs=0.0)
    monkeypatch.setattr(wider, "_built", lambda _decisions: (made, 0.1))
    monkeypatch.setattr(wider, "_outcome_alone", lambda *_, **__: None)
    monkeypatch.setattr(wider, "_trial", lambda *_: SimpleNamespace(base=SimpleNamespace(macs=620)))
    budget = Budget(max_macs=600)
    assert wider._outcome(("d",), budget, float("inf"), enough=True, candidates=3) == "rescaled"
    assert notes == ["structure: 1 change(s) left 20 MACs too many: more was taken away"]
    assert problem.stages == {}

    def propose(_space, caps, *_, **__):
        asked.append(caps["macs"])

    monkeypatch.setattr(widen.joint, "propose", propose)
    vars(wider)["joint"] = None
    wider._proposed(budget, {"macs": -400.0}, None)
    assert asked == [pytest.approx(-422)]
