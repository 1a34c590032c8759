"""Sizes, times and fractions as people write them, and as we print them: the one place for both.

Decimal units (1 MB = 1,000,000 B) unless written with an i (1 MiB = 1,048,576 B), as on a disk's label.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from featherweight.errors import BudgetError

SIZE_UNITS = {
    "": 1,
    "b": 1,
    "k": 10**3,
    "kb": 10**3,
    "m": 10**6,
    "mb": 10**6,
    "g": 10**9,
    "gb": 10**9,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}
COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
TIME_UNITS_MS = {"us": 1e-3, "µs": 1e-3, "ms": 1.0, "s": 1e3, "sec": 1e3}
DURATION_UNITS_S = {"h": 3600.0, "m": 60.0, "min": 60.0, "s": 1.0, "sec": 1.0}
PERCENT_METRICS = frozenset({"accuracy", "top1", "top5", "agreement"})

_NUMBER = r"(\d+(?:[_,]\d{3})*(?:\.\d+)?(?:[eE][+-]?\d+)?|\.\d+)"
_QUANTITY = re.compile(rf"\s*{_NUMBER}\s*([a-zµA-Z%]*)\s*")
_DURATION_PART = re.compile(rf"{_NUMBER}\s*([a-zA-Z]+)\s*")


def _split(text: str, what: str, example: str) -> tuple[float, str]:
    """Number and unit of `text`. Raises BudgetError naming the law, the text and an example."""
    match = _QUANTITY.fullmatch(text)
    if match is None:
        raise BudgetError(f"{what} must be a number with a unit, but got {text!r}; write it like {example}")
    number = float(re.sub(r"[_,]", "", match.group(1)))
    return _finite(number, what), match.group(2)


def _finite(value: float, what: str) -> float:
    """Return `value`. Raises BudgetError if it is NaN, infinite or a bool."""
    if isinstance(value, bool) or not math.isfinite(value):
        raise BudgetError(f"{what} must be a finite number, but got {value!r}")
    return float(value)


def parse_size(text: str | int | float, original_bytes: int | None = None) -> int:
    """Bytes of '5MB', '500kB', '4.5MiB', '25%' of `original_bytes`, or of a plain count of bytes.

    Fractions of a byte are dropped, so that a limit is never loosened.

    Raises:
        BudgetError: not a size, not above zero, or a percentage of an unknown original.
    """
    return _amount(
        text, original_bytes, "a size", SIZE_UNITS, "B, kB, MB, GB, KiB, MiB, GiB or %", "'5MB', '4.5MiB' or '25%'"
    )


def parse_count(text: str | int | float, original: int | None = None) -> int:
    """A count of '300M', '1.2G', '70%' of `original`, or of a plain number; fractions are dropped.

    Raises:
        BudgetError: not a count, not above zero, or a percentage of an unknown original.
    """
    return _amount(text, original, "a count", COUNT_UNITS, "k, M, G, T or %", "'300M' or '70%'")


def _amount(
    text: str | int | float, whole: int | None, what: str, units: Mapping[str, int], listed: str, examples: str
) -> int:
    """A number with one of `units`, or a percentage of `whole`, rounded down; at least 1."""
    if isinstance(text, str):
        number, unit = _split(text, what, examples)
        if unit == "%":
            if whole is None:
                raise BudgetError(f"{what} in percent needs an original to compare with, but got {text!r} alone")
            amount = number * whole / 100
        elif unit.lower() in units:
            amount = number * units[unit.lower()]
        else:
            raise BudgetError(f"the unit of {what} must be {listed}, but got {text!r}; write it like {examples}")
    else:
        amount = _finite(text, what)
    found = math.floor(amount + 1e-6)  # 1.1 kB is 1100.0000000000002 B
    if found < 1:
        least = "1 B" if what == "a size" else "1"
        raise BudgetError(f"{what} must be at least {least}, but got {text!r}; for a part of the original write '25%'")
    return found


def parse_latency(text: str | int | float) -> tuple[float | None, float | None]:
    """(ms, None) of '8ms', '0.008s', '800us' or a plain number of milliseconds; (None, ratio) of '60%'.

    Raises:
        BudgetError: not a time, not above zero, or text without a unit.
    """
    if not isinstance(text, str):
        number, unit = _finite(text, "a latency"), "ms"
    else:
        number, unit = _split(text, "a latency", "'8ms' or '60%'")
    if unit == "%":
        ms, ratio = None, number / 100
    elif unit.lower() in TIME_UNITS_MS:
        ms, ratio = number * TIME_UNITS_MS[unit.lower()], None
    else:
        raise BudgetError(f"a latency must have the unit ms, s, us or %, but got {text!r}; write it like '8ms'")
    if not (ms or ratio or 0) > 0:
        raise BudgetError(f"a latency must be above zero, but got {text!r}")
    return ms, ratio


def parse_fraction(text: str | int | float) -> float:
    """0.01 of '1%', '0.01' or 0.01; 3.0 of '3dB' (a drop of a metric in decibels).

    A bare number of 1 or more is refused: `1` is meant as one percent by some and as everything by others.

    Raises:
        BudgetError: not a fraction, negative, or a bare number of 1 or more.
    """
    if isinstance(text, str):
        number, unit = _split(text, "a drop", "'1%' or '0.01'")
    else:
        number, unit = _finite(text, "a drop"), ""
    if number < 0:
        raise BudgetError(f"a drop must be at least 0, but got {text!r}")
    if unit == "%":
        return number / 100
    if unit.lower() == "db":
        return number
    if unit:
        raise BudgetError(f"the unit of a drop must be % or dB or none, but got {text!r}; write it like '1%'")
    if number >= 1:
        raise BudgetError(
            f"a drop without a unit must be below 1, but got {text!r}; for one hundredth write '1%' or 0.01"
        )
    return number


def parse_duration(text: str | int | float) -> float:
    """Seconds of '10m', '90s', '1h30m', or of a plain number of seconds.

    Raises:
        BudgetError: not a duration or not above zero.
    """
    if isinstance(text, str):
        seconds, position, stripped = 0.0, 0, text.strip()
        for match in _DURATION_PART.finditer(stripped):
            if match.start() != position or match.group(2).lower() not in DURATION_UNITS_S:
                break
            seconds += float(match.group(1)) * DURATION_UNITS_S[match.group(2).lower()]
            position = match.end()
        if not stripped or position != len(stripped):
            raise BudgetError(f"a duration must be like '10m', '90s' or '1h30m', but got {text!r}")
    else:
        seconds = _finite(text, "a duration")
    if not seconds > 0:
        raise BudgetError(f"a duration must be above zero, but got {text!r}")
    return seconds


def format_bytes(n: float) -> str:
    """'4.74 MB', '512 B': three significant digits, decimal units."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= 0.9995 * factor:
            return f"{_three_digits(n / factor)} {unit}"
    return f"{n:.0f} B"


def format_ms(ms: float | None) -> str:
    """'6.71 ms', '1.24 s', '830 µs'; '-' where not measured."""
    if ms is None:
        return "-"
    if abs(ms) >= 999.5:
        return f"{_three_digits(ms / 1e3)} s"
    if 0 < abs(ms) < 0.9995:
        return f"{_three_digits(ms * 1e3)} µs"
    return f"{_three_digits(ms)} ms"


def format_count(n: float) -> str:
    """'385 M', '1.2 k', '17': counts of multiplications and parameters."""
    for unit, factor in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(n) >= 0.9995 * factor:
            return f"{_three_digits(n / factor)} {unit}"
    return f"{n:.0f}"


def format_percent(fraction: float | None, digits: int = 1) -> str:
    """'25.4%' of 0.254; '-' where not measured."""
    return "-" if fraction is None else f"{100 * fraction:.{digits}f}%"


def format_duration(seconds: float) -> str:
    """'0.4 s', '38 s', '2 min 05 s', '1 h 10 min'."""
    if 0 < seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def format_times(ratio: float | None) -> str:
    """'3.92x' of 3.92; '-' where not measured. The caller says what is over what."""
    return "-" if ratio is None else f"{_three_digits(ratio)}x"


def format_metric(value: float | None, name: str) -> str:
    """A metric's value in its usual unit: '87.8%', '31.4 dB', '0.9951'; '-' where not measured."""
    if value is None:
        return "-"
    if name in PERCENT_METRICS:
        return format_percent(value, 2)
    if name == "sqnr":
        return f"{value:.1f} dB"
    return f"{value:.4f}"


def format_drop(drop: float | None, name: str, *, signed: bool = False) -> str:
    """A difference of a metric: '0.40 points' for percentages, '1.2 dB', '0.0031'; '-' where not measured.

    `signed` writes the plus of a loss too, for the ends of an interval.
    """
    if drop is None:
        return "-"
    sign = "+" if signed else ""
    if name in PERCENT_METRICS:
        return f"{_no_minus_zero(100 * drop, 2, sign)} points"
    if name == "sqnr":
        return f"{_no_minus_zero(drop, 1, sign)} dB"
    return _no_minus_zero(drop, 4, sign)


def format_p_value(p: float | None) -> str:
    """A p-value in words: what a difference this large would mean if the two models were equal."""
    if p is None:
        return "not tested"
    shown = "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"
    if p < 0.01:
        return f"a real difference ({shown})"
    if p < 0.05:
        return f"probably a real difference ({shown})"
    return f"no difference shown ({shown})"


def _three_digits(x: float) -> str:
    """Three significant digits without an exponent, for values below about 1000."""
    digits = 0 if abs(x) >= 99.95 else 1 if abs(x) >= 9.995 else 2
    return f"{x:,.{digits}f}"


def _no_minus_zero(x: float, digits: int, sign: str) -> str:
    """Fixed digits; what rounds to zero has no sign."""
    shown = f"{x:{sign}.{digits}f}"
    return shown.lstrip("+-") if float(shown) == 0 else shown
