"""The terminal report: everything a user must see, at any width."""

from __future__ import annotations

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.text import Text

from featherweight.core import Attempt, Budget, Measurement, Note, Plan, Report
from featherweight.report import comparison, layers, text, wording
from featherweight.report.terminal import Column, Grid, shortened, to_text


@pytest.mark.parametrize("width", [80, 100, 120])
@pytest.mark.parametrize("everything", [False, True])
def test_report_fits_its_width(report: Report, width: int, everything: bool) -> None:
    shown = text.render(report, width=width, all_layers=everything)
    assert max(cell_len(line) for line in shown.splitlines()) <= width
    numbers = re.findall(r"\S*…", shown.partition("Decided per layer")[2].partition("Left alone")[0])
    assert not [n for n in numbers if n[0].isdigit()], "a number is never cut"


def test_report_shows_outcome_numbers_evidence_and_limits(report: Report) -> None:
    shown = text.render(report)
    first = shown.splitlines()[0]
    assert first == "MET  3.92x smaller, 1.52x faster, accuracy worse by 0.20 points"
    assert re.search(r"size +18\.6 MB +4\.74 MB +25\.5%, 3\.92x smaller +5\.00 MB +ok", shown)
    assert re.search(r"latency +12\.1 ms +7\.95 ms +65\.7%, 1\.52x faster +70\.0% +ok", shown)
    assert re.search(r"peak memory +44\.1 MB +29\.0 MB", shown)
    assert re.search(r"drop +0\.20 points +95%: -0\.60 to \+1\.00 +1\.00 points +ok", shown)
    assert "350 unseen samples; paired test: no difference shown (p = 0.81)" in shown


def test_exceeded_limit_is_marked(report: Report) -> None:
    tight = dataclasses.replace(report, budget=Budget(max_size_bytes=1_000_000), answer="not found", outcome="not met")
    shown = text.render(tight)
    assert shown.startswith("NOT MET")
    assert re.search(r"size .* 1\.00 MB  OVER", shown)


def test_long_model_is_summed_and_all_layers_shows_each(report: Report) -> None:
    short, full = text.render(report, width=120), text.render(report, width=120, all_layers=True)
    assert "28 smaller layers" in short
    assert "40 layers, the largest 12 one by one; --all-layers for all" in short
    assert "smaller layers" not in full
    assert full.count("/Conv ") == 40
    total = sum(int(item["before_bytes"]) for item in report.layers)
    for shown in (short, full):
        assert re.search(rf"total .*{total / 1e6:.2f} MB", shown)


def test_float_layer_shows_its_cost_and_reason(report: Report) -> None:
    shown = text.render(report, width=120, all_layers=True)
    assert re.search(r"conv1/Conv .* keep .* float +310 µs", shown)
    assert "fragile: integer compute costs 9 dB here" in shown


def test_equal_notes_are_grouped_and_names_with_brackets_survive(report: Report) -> None:
    shown = " ".join(text.render(report, width=120).split())
    assert "both inputs are computed: no weight here (/se/mul0, /se/mul1, /se/mul2 and 6 more)" in shown
    assert "(/head/[odd]name)" in shown


def test_failed_attempt_shows_its_error_in_full(report: Report) -> None:
    assert "- attempt 2: the child process was killed (signal 9, out of memory?)" in text.render(report)


def test_report_without_measurements_says_so(report: Report) -> None:
    bare = Report(
        Budget(max_latency_ms=8.0), "no, proved", "proved impossible", "", Plan(()), Measurement(10), Measurement(10)
    )
    shown = text.render(bare)
    assert shown.startswith("PROVED IMPOSSIBLE\n")
    assert re.search(r"latency +- +8\.00 ms +OVER", shown)
    assert "result" not in shown


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ("static_int8(weight_bits=8)", "static_int8 8 bit"),
        ("weight_nbit(bits=4, block=32)", "weight_nbit 4 bit, block 32"),
        ("weight_nbit(bits=4, block=0)", "weight_nbit 4 bit"),
        ("sparse(bits=4, sparsity=0.5)", "sparse 4 bit, 50% zeros, file size only"),
        ("sparse(bits=3, pattern=2:4)", "sparse 3 bit, pattern 2:4, file size only"),
        ("low_rank(rank=32) -> weight_nbit(bits=4)", "low_rank rank 32 -> weight_nbit 4 bit"),
        ("float16()", "float16"),
        ("", "keep"),
        ("keep", "keep"),
    ],
)
def test_decision_is_said_shortly(raw: str, words: str) -> None:
    assert wording.decision_words(raw) == words


def test_a_rest_of_two_layers_is_not_summed(report: Report) -> None:
    rows = layers.read_layers(report.layers[:14])
    assert layers.chosen(rows) == rows
    assert len(layers.chosen(layers.read_layers(report.layers[:15]))) == 13


def test_note_groups_keep_order_and_each_place_once() -> None:
    notes = [Note("b", "x"), Note("a", "y"), Note("a", "x"), Note("b", "x")]
    assert [(g.text, g.places) for g in wording.note_groups(notes)] == [("x", ("b", "a")), ("y", ("a",))]


@given(
    st.lists(st.tuples(st.text(max_size=40), st.text("ab/_漢", max_size=60)), min_size=1, max_size=4),
    st.integers(30, 120),
)
def test_grid_never_exceeds_its_width(rows: list[tuple[str, str]], width: int) -> None:
    grid = Grid([Column("name", cut="end"), Column("path", cut="middle"), Column("n", "right", optional=1)])
    for first, second in rows:
        grid.add(" ".join(first.split()), second, "17")
    assert max((cell_len(line) for line in to_text([grid], width=width).splitlines()), default=0) <= width


@given(st.text("abc/漢", max_size=80), st.integers(0, 80))
def test_shortened_name_fits(name: str, width: int) -> None:
    assert cell_len(shortened(name, width, "end")) <= width
    assert cell_len(shortened(name, width, "middle")) <= width


def test_comparison_claims_no_unseen_samples(report: Report) -> None:
    @dataclasses.dataclass(frozen=True)
    class Comparison:
        original: Measurement
        candidate: Measurement
        metric_reason: str = "the data has class labels"
        notes: tuple[Note, ...] = ()

    shown = to_text(comparison.comparison_parts(Comparison(report.baseline, report.result)))
    assert shown.startswith("3.92x smaller, 1.52x faster")
    assert "original  candidate" in " ".join(shown.split()).replace(" candidate", "  candidate")
    assert "350 samples; paired test" in shown
    assert "unseen" not in shown


def test_cut_names_stay_different_where_they_can() -> None:
    grid = Grid([Column("layer", cut="middle", least=12)])
    for i in range(10, 20):
        grid.add(f"/features/block.{i}/depthwise/with/a/long/tail/Conv")
    shown = to_text([grid], width=30).splitlines()[2:]
    assert len(set(shown)) == 10


def test_what_was_not_asked_is_said_to_be_the_default(report: Report) -> None:
    limited = dataclasses.replace(report, budget=Budget(max_drop=0.01, minimize="latency"))
    nothing = dataclasses.replace(limited, facts={"asked": {"goal": "plain-int8", "max_drop": False}})
    assert wording.asked_words(nothing).startswith(
        "nothing in particular; so a fast 8-bit model with a drop of at most 1"
    )
    half = dataclasses.replace(limited, facts={"asked": {"goal": "minimize", "max_drop": False}})
    assert wording.asked_words(half).endswith("the limit on the drop is the default")
    assert "default" not in wording.asked_words(limited)


def test_a_path_is_never_broken_and_equal_reasons_are_said_once(report: Report) -> None:
    path = "/a/very long/" + "folder/" * 20 + "model.onnx: 1.23 kB"
    assert to_text([Text(path, no_wrap=True)], width=40) == path + "\n"
    rows = tuple({**row, "int8": False, "why": "integers do not pay here"} for row in report.layers[:3])
    shown = to_text(text.layer_parts(dataclasses.replace(report, layers=rows), everything=True), width=120)
    assert shown.count("integers do not pay here") == 1


@pytest.mark.parametrize(
    ("drop", "likely", "words"),
    [(0.0, 0.019, "over: drop (likely 1.90 points)"), (0.02, 0.004, "over: drop"), (0.0, 0.004, "within the budget")],
)
def test_an_attempt_says_whether_its_drop_is_over_or_likely_to_be(drop, likely, words):
    m = Measurement(size_bytes=1, metric_name="accuracy", drop=drop, likely_drop=likely)
    assert wording.attempt_words(Attempt(1, Plan(()), m), Budget(max_drop=0.01))[0] == words
