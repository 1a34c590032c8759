"""Losses of groups on curves through measured cuts, and how two models' class scores are told apart."""

from __future__ import annotations

import math

import numpy as np
import pytest

from featherweight.core import Action, Decision
from featherweight.search.curves import in_one_unit, on_curve, that_ran
from featherweight.search.options import GroupOption
from featherweight.search.probe import divergence, output_noise


def options(*losses: float) -> list[GroupOption]:
    return [GroupOption(Decision("g"), 1 - i / 10, 1 - i / 10, loss, 1 - i / 10) for i, loss in enumerate(losses)]


def test_losses_lie_on_the_line_through_two_points():
    # In logarithms the points (0.01, 0.1) and (0.1, 10) have slope 2.
    found = on_curve(options(0.0, 0.01, 0.1, 0.0316227766, 0.001, 1.0), [(0.1, 10.0), (0.01, 0.1)])
    assert [o.loss for o in found] == pytest.approx([0.0, 0.1, 10.0, 1.0, 0.001, 1000.0], rel=1e-6)


def test_beyond_the_points_the_slope_is_between_one_and_two():
    steep = on_curve(options(0.1), [(0.001, 1e-6), (0.01, 1.0)])
    assert steep[0].loss == pytest.approx(100.0)
    flat = on_curve(options(0.1), [(0.001, 1.0), (0.01, 1.0)])
    assert flat[0].loss == pytest.approx(10.0)


def test_losses_never_fall_as_cuts_deepen():
    found = on_curve(options(0.001, 0.01, 0.02, 0.1), [(0.01, 0.5), (0.1, 0.1)])
    losses = [o.loss for o in found]
    assert losses == sorted(losses)


def test_without_points_the_prediction_stands():
    assert [o.loss for o in on_curve(options(0.0, 0.3), [])] == [0.0, 0.3]


def test_divergences_are_brought_to_the_unit_of_noise():
    runs = {"a": [[0.1, 0.2, 0.01], [0.2, 0.4, 0.02]], "b": [[0.1, 5.0, 0.001]]}
    assert in_one_unit(runs, classes=False)["b"] == [(0.1, 5.0)]
    found = in_one_unit(runs, classes=True)  # ratios 20, 20 and 5000: their median is 20
    assert [loss for _, loss in found["a"]] == pytest.approx([0.2, 0.4])
    assert [loss for _, loss in found["b"]] == pytest.approx([0.02])


def test_divergence_of_logits_and_of_probabilities_agree():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 7))
    p, q = (np.exp(x) / np.exp(x).sum(axis=-1, keepdims=True) for x in (a, b))
    expected = float(np.mean((p * np.log(p / q)).sum(axis=-1)))
    assert divergence({"y": a}, {"y": b}) == pytest.approx(expected)
    assert divergence({"y": p}, {"y": q}) == pytest.approx(expected)
    assert divergence({"y": a}, {"y": a}) == pytest.approx(0.0)


def test_outputs_without_classes_have_no_divergence():
    assert divergence({"y": np.ones(3)}, {"y": np.ones(3)}) is None
    assert math.isfinite(divergence({"y": np.ones((1, 2))}, {"y": np.zeros((1, 2))}) or 0.0)


def test_of_a_change_to_the_whole_model_only_what_ran_is_left():
    kept, small, smaller = (
        GroupOption(Decision("view", actions), 1.0, work, 1 - work, work)
        for work, actions in ((1.0, ()), (0.5, (Action.of("smaller", by=2),)), (0.25, (Action.of("smaller", by=4),)))
    )
    assert that_ran([kept, small, smaller], [[0.5, 0.1, None]]) == [kept, small]
    assert that_ran([kept, small, smaller], []) == [kept]


def test_of_runs_that_gave_no_numbers_nothing_is_left():
    small = GroupOption(Decision("view", (Action.of("smaller", by=2),)), 1.0, 0.5, 0.5, 0.5)
    assert that_ran([small], [[0.5, math.inf, None]]) == []


def test_outputs_of_other_shapes_are_infinitely_far_apart():
    assert output_noise({"y": np.ones((1, 2, 4), np.float32)}, {"y": np.ones((1, 2, 3), np.float32)}) == math.inf
