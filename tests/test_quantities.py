"""Quantities as written and as printed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from featherweight import quantities as q
from featherweight.errors import BudgetError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("5MB", 5_000_000),
        ("5 mb", 5_000_000),
        ("500kB", 500_000),
        ("4.5MiB", 4_718_592),
        ("1GiB", 2**30),
        ("25%", 250),
        ("33.3%", 333),
        ("12345", 12345),
        ("1_000_000 B", 1_000_000),
        ("2,500,000", 2_500_000),
        ("1e6", 1_000_000),
        (77, 77),
        (77.9, 77),
        ("0.3GB", 300_000_000),
        ("1.1kB", 1100),
    ],
)
def test_size_is_read_as_written(text: str | float, expected: int) -> None:
    assert q.parse_size(text, 1000) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("5XB", "unit of a size must be B, kB, MB, GB, KiB, MiB, GiB or %, but got '5XB'"),
        ("", "must be a number with a unit"),
        ("-5MB", "but got '-5MB'; write it like '5MB'"),
        ("0", "at least 1 B, but got '0'"),
        (0.25, "write '25%'"),
        (True, "finite number"),
        (math.nan, "finite number"),
        (math.inf, "finite number"),
        ("five", "but got 'five'"),
        ("1e999MB", "finite"),
    ],
)
def test_malformed_size_is_refused_with_law_and_value(text: str | float, says: str) -> None:
    with pytest.raises(BudgetError) as caught:
        q.parse_size(text, 1000)
    assert says in str(caught.value)


def test_percent_of_nothing_is_refused() -> None:
    with pytest.raises(BudgetError, match="needs an original"):
        q.parse_size("25%")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8ms", (8.0, None)),
        ("0.008s", (8.0, None)),
        ("800us", (0.8, None)),
        ("60%", (None, 0.6)),
        (8, (8.0, None)),
        (" 1.5 MS ", (1.5, None)),
    ],
)
def test_latency_is_ms_or_a_ratio(text: str | float, expected: tuple[float | None, float | None]) -> None:
    assert q.parse_latency(text) == pytest.approx(expected)


@pytest.mark.parametrize("text", ["8", "8 parsecs", "0ms", "0%", "fast", 0, -1, math.nan])
def test_malformed_latency_is_refused(text: str | float) -> None:
    with pytest.raises(BudgetError, match="latency"):
        q.parse_latency(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1%", 0.01), ("0.01", 0.01), (0.01, 0.01), (0, 0.0), ("0", 0.0), ("3dB", 3.0), (".5", 0.5)],
)
def test_fraction_is_read_as_written(text: str | float, expected: float) -> None:
    assert q.parse_fraction(text) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "says"),
    [("1", "write '1%' or 0.01"), (1, "write '1%'"), (-0.1, "at least 0"), ("1MB", "% or dB")],
)
def test_ambiguous_or_malformed_drop_is_refused(text: str | float, says: str) -> None:
    with pytest.raises(BudgetError) as caught:
        q.parse_fraction(text)
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("10m", 600), ("90s", 90), ("1h30m", 5400), ("1h 30min", 5400), (45, 45), ("0.5h", 1800)],
)
def test_duration_is_seconds(text: str | float, expected: float) -> None:
    assert q.parse_duration(text) == expected


@pytest.mark.parametrize("text", ["10", "", "h", "10x", "m10", "10m x", 0, "0s", math.inf])
def test_malformed_duration_is_refused(text: str | float) -> None:
    with pytest.raises(BudgetError, match="duration"):
        q.parse_duration(text)


@given(st.integers(1, 10**13))
def test_printed_bytes_read_back_within_their_digits(n: int) -> None:
    back = q.parse_size(q.format_bytes(n))
    assert abs(back - n) <= 0.006 * n


@given(st.floats(1e-3, 1e6))
def test_printed_latency_reads_back_within_its_digits(ms: float) -> None:
    back, ratio = q.parse_latency(q.format_ms(ms))
    assert ratio is None
    assert back == pytest.approx(ms, rel=0.006, abs=6e-6)


@pytest.mark.parametrize(
    ("n", "shown"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (4_744_000, "4.74 MB"),
        (999_999, "1.00 MB"),
        (18_600_000, "18.6 MB"),
        (2.5e12, "2,500 GB"),
    ],
)
def test_bytes_are_printed_with_three_digits(n: float, shown: str) -> None:
    assert q.format_bytes(n) == shown


def test_other_quantities_are_printed_plainly() -> None:
    assert [q.format_ms(v) for v in (None, 0.0, 0.83, 6.713, 1240.0)] == [
        "-",
        "0.00 ms",
        "830 µs",
        "6.71 ms",
        "1.24 s",
    ]
    assert [q.format_duration(v) for v in (7.64, 37.6, 125, 4200)] == ["7.6 s", "38 s", "2 min 05 s", "1 h 10 min"]
    assert [q.format_count(v) for v in (17, 1200, 385e6)] == ["17", "1.20 k", "385 M"]
    assert q.format_metric(0.878, "accuracy") == "87.80%"
    assert q.format_metric(0.99512, "cosine") == "0.9951"
    assert q.format_metric(31.42, "sqnr") == "31.4 dB"
    assert q.format_drop(0.004, "accuracy") == "0.40 points"
    assert q.format_drop(-0.00001, "accuracy", signed=True) == "0.00 points"
    assert q.format_drop(0.004, "spearman", signed=True) == "+0.0040"
    assert q.format_times(3.918) == "3.92x"


@pytest.mark.parametrize(
    ("p", "words"),
    [
        (None, "not tested"),
        (0.8, "no difference shown (p = 0.80)"),
        (0.03, "probably a real difference (p = 0.030)"),
        (1e-9, "a real difference (p < 0.001)"),
    ],
)
def test_p_value_is_said_in_words(p: float | None, words: str) -> None:
    assert q.format_p_value(p) == words


@pytest.mark.parametrize(
    ("text", "expected"), [("300M", 300_000_000), ("1.2G", 1_200_000_000), ("70%", 700), ("5k", 5000), (12.9, 12)]
)
def test_counts_as_people_write_them(text, expected):
    assert q.parse_count(text, 1000) == expected


@pytest.mark.parametrize("text", ["3 apples", "0", "-5", "", "5MB"])
def test_what_is_no_count_is_refused(text):
    with pytest.raises(BudgetError, match="count"):
        q.parse_count(text, 1000)


def test_a_share_of_an_unknown_count_is_refused():
    with pytest.raises(BudgetError, match=r"a count in percent needs an original to compare with, but got '70%' alone"):
        q.parse_count("70%")
