"""The joint program against enumeration of the products it stands for."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from featherweight.core import Action, Decision, Effect, Site
from featherweight.search import joint as program
from featherweight.search.effects import SiteFacts
from featherweight.search.joint import Joint, fixed, judged, propose
from featherweight.search.options import NODE_MS, GroupOption, Option, undominated, weight_options
from featherweight.search.solve import Choice
from featherweight.techniques import Estimate
from search.fake_techniques import SVD


def option(site: str, share: float, loss: float, speed: float = 1.0) -> Option:
    action = Action.of("bits", share=share)
    return Option(Decision(site, (action,) if share < 1 else ()), 1000 * share, 10 * speed, 1000 * share, 1e6, loss)


def example() -> Joint:
    """Two weights of 1000 B and 10 ms in one group, a third alone."""
    sites = {n: Site(n, "weight", (n,), (f"{n}.node",), 1000) for n in ("a", "b", "c")}
    sites["g"] = Site("g", "channel_group", ("a", "b"), ("a.node", "b.node"), 2000)
    facts = {n: SiteFacts(10.0, 1000, 1.0, 1_000_000) for n in ("a", "b", "c")} | {"g": SiteFacts(0.0, 0)}
    weights = {
        n: [option(n, 1.0, 0.0), option(n, 0.25, 0.01, 0.6), option(n, 0.125, k * 0.04)]
        for n, k in (("a", 1), ("b", 2), ("c", 3))
    }
    groups = {
        "g": [
            GroupOption(Decision("g", () if keep == 1 else (Action.of("prune", keep=keep),)), keep, keep, loss, keep)
            for keep, loss in ((1, 0.0), (0.75, 0.02), (0.5, 0.06), (0.25, 0.3))
        ]
    }
    return Joint(sites, facts, weights, groups)


def test_bytes_and_time_of_weights_and_groups_multiply():
    joint = example()
    picked = {n: joint.weights[n][1] for n in "abc"}
    both = judged(joint, picked, {"g": joint.groups["g"][2]})
    assert both.effect.size_bytes == 125 + 125 + 250 - 3000
    assert both.effect.latency_ms == pytest.approx(3 + 3 + 6 - 30)
    assert both.effect.macs == 500_000 + 500_000 + 1_000_000 - 3_000_000
    assert both.effect.loss == pytest.approx(0.03 + 0.06)
    assert judged(joint, picked, {"g": joint.groups["g"][2]}, scale=0.5).effect.loss == pytest.approx(0.03 + 0.03)


@pytest.mark.parametrize("dimension", ["size_bytes", "latency_ms"])
@pytest.mark.parametrize("cap", [0.03, 0.05, 0.08, 0.12, 0.2, 0.5])
def test_rounds_settle_near_the_best_product(dimension, cap):
    joint = example()
    found = propose(joint, {"loss": cap}, {dimension: 1.0})
    best = min(
        getattr(e, dimension)
        for *ws, g in itertools.product(*joint.weights.values(), joint.groups["g"])
        if (e := judged(joint, dict(zip("abc", ws, strict=True)), {"g": g}).effect).loss <= cap + 1e-9
    )
    assert found is not None
    assert found.effect.loss <= cap + 1e-6
    start = 3000 if dimension == "size_bytes" else 30
    assert start + getattr(found.effect, dimension) <= 1.15 * (start + best)


def test_a_cap_on_macs_is_met_by_groups_alone():
    found = propose(example(), {"macs": -900_000}, {"loss": 1.0})
    assert found is not None
    assert found.groups["g"].decision.actions == (Action.of("prune", keep=0.5),)
    assert found.effect.macs == -1_000_000
    assert propose(example(), {"macs": -1_600_000}, {"loss": 1.0}) is None


def test_a_chain_has_the_share_of_the_bytes_and_each_factors_noise():
    site = Site("w", "weight", ("w",), ("n",), 4000)
    facts = SiteFacts(10.0, 4000, gain=2.0, macs=1000)
    numeric = [
        Choice(Decision("w"), Effect()),
        Choice(Decision("w", (Action.of("q", bits=8),)), Effect(-3000, -4, 0, 0.01)),
    ]
    factor = Decision("w", (Action.of("svd", rank=4),))

    found = weight_options(site, facts, numeric, [(factor, Estimate(2000, 0.1, 0.5), SVD)], None)
    chain = next(o for o in found if len(o.decision.actions) == 2)
    assert chain.decision.actions == (Action.of("svd", rank=4), Action.of("q", bits=8))
    assert (chain.size_bytes, chain.macs) == (500, 500)
    assert chain.latency_ms == pytest.approx(6 * 0.5 + NODE_MS)
    assert chain.loss == pytest.approx(0.1 * 2 + 2 * 0.01)
    assert chain.structural == pytest.approx(0.2)


def test_a_factor_that_saves_no_work_comes_out_slower():
    site = Site("w", "weight", ("w",), ("n",), 4000)
    factor = (Decision("w", (Action.of("svd", rank=4),)), Estimate(3900, 0.1, 1.0), SVD)
    found = weight_options(site, SiteFacts(10.0, 4000, macs=1000), [Choice(Decision("w"), Effect())], [factor], None)
    assert {o.decision.keeps: o.latency_ms for o in found}[False] > 10.0


def test_of_equal_options_the_first_stays_and_worse_ones_go():
    a, b, c = option("w", 0.5, 0.1), option("w", 0.5, 0.1), option("w", 0.6, 0.2)
    assert undominated([a, b, c]) == [a]
    d = option("w", 0.4, 0.3)
    assert undominated([c, a, d]) == [a, d]


def test_a_width_off_the_kernels_multiple_costs_time_but_no_work():
    joint = example()
    odd = GroupOption(Decision("g", (Action.of("prune", keep=0.74),)), 0.74, 0.74, 0.02, 0.74 * 1.4)
    joint.groups["g"].append(odd)
    fast = propose(joint, {"loss": 0.03}, {"latency_ms": 1.0})
    light = propose(joint, {"loss": 0.03}, {"macs": 1.0})
    assert fast is not None
    assert light is not None
    assert fast.groups["g"].decision != odd.decision
    assert light.groups["g"].decision == odd.decision


def seen_smaller() -> Joint:
    """The same, and a decision about the whole model: 9/16 or 1/4 of the places, at a loss."""
    joint = example()
    view = Site("view", "model", (), ("a.node", "b.node", "c.node"), 0)
    options = [
        GroupOption(
            Decision("view", () if share == 1 else (Action.of("smaller", share=share),)), 1.0, share, loss, share
        )
        for share, loss in ((1, 0.0), (9 / 16, 0.05), (1 / 4, 0.2))
    ]
    sites, facts = {**joint.sites, "view": view}, {**joint.facts, "view": SiteFacts(0.0, 0)}
    return Joint(sites, facts, joint.weights, {**joint.groups, "view": options})


@pytest.mark.parametrize("least", [-500_000, -1_200_000, -1_700_000, -2_400_000, -2_500_000])
def test_a_decision_about_the_whole_model_is_as_good_as_the_best_of_all_products(least):
    joint = seen_smaller()
    found = propose(joint, {"macs": least}, {"loss": 1.0})
    whole = {n: o[0] for n, o in joint.weights.items()}
    possible = [judged(joint, whole, {"g": g, "view": v}) for g in joint.groups["g"] for v in joint.groups["view"]]
    best = min(c.effect.loss for c in possible if c.effect.macs <= least)
    assert found is not None
    assert found.effect.macs <= least
    assert found.effect.loss == pytest.approx(best)


def test_what_is_fixed_stays_and_what_alone_costs_too_much_is_not_tried(monkeypatch):
    joint = seen_smaller()
    keep = joint.groups["view"][0]
    assert propose(fixed(joint, [keep]), {"macs": -1_700_000}, {"loss": 1.0}) is None
    tried = []
    monkeypatch.setattr(program, "_settled", lambda space, *_: tried.append(space.groups["view"][0].work))
    propose(joint, {"loss": 0.1}, {"latency_ms": 1.0})
    assert tried == [1, 9 / 16]
    propose(joint, {"loss": 0.1}, {"latency_ms": 1.0}, scale=3.0)
    assert tried == [1, 9 / 16, 1]


def test_memory_of_activations_falls_with_the_view():
    joint = seen_smaller()
    view = [dataclasses.replace(g, activation_bytes=-1000 * i) for i, g in enumerate(joint.groups["view"])]
    joint = dataclasses.replace(joint, groups={**joint.groups, "view": view})
    found = propose(joint, {"peak_bytes": -3500}, {"loss": 1.0})
    assert found is not None
    assert found.effect.peak_bytes <= -3500
    assert found.groups["view"].activation_bytes < 0
