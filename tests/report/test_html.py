"""The HTML page: complete, self-contained, safe with strangers' names, drawn to scale."""

from __future__ import annotations

import dataclasses
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherweight.core import Budget, Measurement, Note, Plan, Report
from featherweight.report import front, html, layers, svg
from featherweight.report.terminal import to_text

VOID = {"meta", "br"}


class Balance(HTMLParser):
    """Collects open tags and every tag and attribute seen."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_page_is_well_formed_and_needs_nothing_else(report: Report, tmp_path: Path) -> None:
    html.write(report, tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    seen = Balance()
    seen.feed(page)
    assert seen.open == []
    assert not seen.tags & {"script", "link", "img", "iframe"}
    assert seen.links == []
    assert "http" not in page


def test_page_shows_outcome_numbers_and_every_section(report: Report) -> None:
    page = html.render(report)
    for words in ("MET", "4.74 MB", "3.92x smaller", "1.52x faster", "95%: -0.60 to +1.00", "no difference shown"):
        assert words in page
    for title in ("Measured", "Size against drop", "Front", "Bytes per layer", "Left alone", "Attempts", "How"):
        assert f"<h2>{title}" in page
    assert "signal 9, out of memory?" in page


def test_names_from_the_model_are_escaped(report: Report) -> None:
    evil = "<script>alert(1)</script>&\"'"
    layer = {**report.layers[0], "layer": evil, "why": evil, "decision": evil}
    changed = dataclasses.replace(report, layers=(layer,), notes=(Note(evil, evil),), facts={"model": evil})
    page = html.render(changed)
    assert "<script" not in page
    assert "&lt;script&gt;" in page


def test_report_of_nothing_makes_a_page() -> None:
    bare = Report(Budget(), "no, proved", "proved impossible", "", Plan(()), Measurement(10), Measurement(10))
    assert "PROVED IMPOSSIBLE" in html.render(bare)
    assert svg.trade_off(bare) == ""
    assert svg.layer_bars([]) == ""


def test_plots_are_xml(report: Report) -> None:
    bars = svg.layer_bars(layers.read_layers(report.layers))
    for plot in (svg.trade_off(report), bars):
        ET.fromstring(plot)
    assert bars.count('class="barfloat"') == sum(not item["int8"] for item in report.layers)


def circles(plot: str) -> dict[str, tuple[float, float]]:
    found = re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)" r="\d+" class="(\w+)"', plot)
    return {kind: (float(x), float(y)) for x, y, kind in found}


def test_dots_are_drawn_to_scale(report: Report) -> None:
    plot = svg.trade_off(report)
    at = circles(plot)
    assert at["result"][0] < at["original"][0]
    assert at["result"][1] < at["original"][1], "a drop above zero stands higher: svg's y grows downwards"
    left = svg.LEFT
    assert (at["result"][0] - left) / (at["original"][0] - left) == pytest.approx(4.74 / 18.6, rel=1e-3)


def test_limits_are_drawn_and_named(report: Report) -> None:
    plot = svg.trade_off(report)
    assert plot.count('class="limit"') == 2
    assert "at most 5.00 MB" in plot
    assert "at most 1.00 points" in plot


def test_bars_are_drawn_to_scale(report: Report) -> None:
    two = [
        {"layer": "a", "before_bytes": 100, "after_bytes": 25},
        {"layer": "b", "before_bytes": 50, "after_bytes": 50},
    ]
    widths = [float(w) for w in re.findall(r'<rect [^>]*width="([\d.]+)"', svg.layer_bars(layers.read_layers(two)))]
    assert [w / widths[0] for w in widths] == pytest.approx([1, 0.25, 0.5, 0.5], abs=0.001)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_inside(low: float, span: float) -> None:
    axis = svg.Axis(low, low + span, 0, 100)
    ticks = axis.ticks()
    assert 1 <= len(ticks) <= 14
    slack = span * 1e-6 + abs(low) * 1e-12  # rounding of float64 where the span is tiny beside the values
    assert all(low - slack <= t <= low + span + slack for t in ticks)


def test_front_in_the_terminal_has_plot_and_table(report: Report) -> None:
    shown = to_text(front.front_parts(report), width=80)
    assert max(len(line) for line in shown.splitlines()) <= 80
    assert re.search(r"2\.80 points \| +o", shown)
    assert re.search(r"0\.00 points \| +#", shown)
    rows = [line.split()[:3] for line in shown.splitlines() if re.match(r"  \d ", line)]
    assert rows == [["1", "2.90", "MB"], ["0", "4.74", "MB"]]
