"""The arithmetic of the benchmark of predictions."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks import predict

from featherweight.core import Profile
from featherweight.device import Kernel

ONE = Profile(
    "one", "x86_64", 1, 1, False, call_us=5.0, node_us=0.5,
    kernels=(Kernel("add", "float32", (64,), 2.0), Kernel("mul", "float32", (64,), 1.0)),
)  # fmt: skip


def test_the_less_of_two_measurements_counts() -> None:
    two = dataclasses.replace(ONE, call_us=6.0, node_us=0.4, kernels=(Kernel("add", "float32", (64,), 1.5),))
    found = predict.least(ONE, two)
    assert (found.call_us, found.node_us) == (5.0, 0.4)
    assert [k.us for k in found.kernels] == [1.5, 1.0]


def test_errors_are_relative_to_what_was_measured() -> None:
    rows = [predict.Row("a", 12.0, 10.0, 11.0, {"conv float32": 9.0}), predict.Row("b", 3.0, 4.0, 4.0, {"add": 3.0})]
    assert [r.error for r in rows] == [pytest.approx(0.2), pytest.approx(-0.25)]
    text = predict.table(ONE, rows)
    assert "Median error 22.5%, largest 25.0%, of 2 networks." in text
    assert "| a | 12 | 10 | 11 | +20% | conv float32 75% |" in text


def test_inputs_have_the_shapes_asked_for_and_nothing_extreme() -> None:
    image = predict.picture(3, 20, 30)
    assert image.shape == (1, 3, 20, 30)
    assert image.dtype == np.float32
    assert 0.1 < np.abs(image).max() < 4
    assert all(a.shape == (1, 7) for a in predict.tokens(7).values())
