"""The curve of a distillation: each loss on its own axis, the best marked, what is no number left out."""

from __future__ import annotations

import math
import re

from featherweight.learn.result import Point
from featherweight.report.distillation import curve


def test_losses_of_different_kinds_have_their_own_axes() -> None:
    points = [Point(0, 0.0, None, 0.5, None), Point(10, 1.0, 30.0, 0.4, None), Point(20, 2.0, 20.0, 0.45, None)]
    both = curve(points).split("</svg>")
    assert len(both) == 3
    assert "validation loss" in both[0]
    assert "training loss" in both[1]
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)" r="3"', both[0])]
    assert max(heights) - min(heights) > 100  # not squeezed by the other loss
    assert f'cy="{max(heights):.1f}" r="5"' in both[0]  # the smallest loss is lowest on the page


def test_what_is_no_number_is_left_out() -> None:
    assert curve([Point(0, 0.0, None, math.nan, None), Point(1, 0.1, math.inf, math.nan, None)]) == ""
    found = curve([Point(0, 0.0, None, 1.0, None), Point(5, 0.1, math.nan, math.nan, None)])
    assert "nan" not in found
    assert found.count("<svg") == 1
