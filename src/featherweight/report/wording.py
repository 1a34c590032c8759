"""The words of a report, shared by its terminal and HTML forms. Pure: data in, strings out.

Ratios follow one rule: a percentage is result over original, "3.92x smaller" its inverse.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from featherweight.core import Action, Attempt, Budget, Measurement, Note, Plan, Report
from featherweight.quantities import (
    format_bytes,
    format_count,
    format_drop,
    format_duration,
    format_metric,
    format_ms,
    format_p_value,
    format_percent,
    format_times,
)

_ACTION = re.compile(r"([\w.]+)\(([^()]*)\)")
_OBJECTIVES = {
    "size": "smallest size",
    "latency": "lowest latency",
    "memory": "lowest peak memory",
    "drop": "lowest drop",
}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of original against result. `ok` is None where there is no limit."""

    what: str
    original: str
    result: str
    change: str
    limit: str = ""
    ok: bool | None = None


@dataclass(frozen=True, slots=True)
class NoteGroup:
    """Notes of one text and the places they are about."""

    text: str
    places: tuple[str, ...]


def change_words(before: float | None, after: float | None, less: str, more: str) -> str:
    """'25.5%, 3.92x smaller' of 18.6 and 4.74 with less='smaller'; '' where one is unknown or zero."""
    if not before or not after:
        return ""
    ratio = after / before
    if abs(ratio - 1) < 0.005:
        return f"{format_percent(ratio)}, the same"
    return f"{format_percent(ratio)}, " + (
        f"{format_times(1 / ratio)} {less}" if ratio < 1 else f"{format_times(ratio)} {more}"
    )


def drop_words(m: Measurement) -> str:
    """'worse by 0.20 points', 'better by ...' or 'the same' of a drop; '' where not measured."""
    if m.drop is None:
        return ""
    amount = format_drop(abs(m.drop), m.metric_name)
    if float(amount.split()[0]) == 0:
        return "the same"
    return f"{'worse' if m.drop > 0 else 'better'} by {amount}"


def comparison_rows(original: Measurement, result: Measurement, budget: Budget | None = None) -> list[Row]:
    """Original against result, one row a measured quantity, with the limits of `budget`."""
    b = budget or Budget()
    rows = [
        Row(
            "size",
            format_bytes(original.size_bytes),
            format_bytes(result.size_bytes),
            change_words(original.size_bytes, result.size_bytes, "smaller", "larger"),
            _at_most(format_bytes, b.max_size_bytes),
            _within(result.size_bytes, b.max_size_bytes),
        )
    ]
    rows += _latency_rows(original, result, b)
    if result.peak_bytes is not None or b.max_peak_bytes is not None:
        rows.append(
            Row(
                "peak memory",
                "-" if original.peak_bytes is None else format_bytes(original.peak_bytes),
                "-" if result.peak_bytes is None else format_bytes(result.peak_bytes),
                change_words(original.peak_bytes, result.peak_bytes, "less", "more"),
                _at_most(format_bytes, b.max_peak_bytes),
                _within(result.peak_bytes, b.max_peak_bytes),
            )
        )
    if b.max_macs is not None or (
        result.macs is not None and original.macs is not None and result.macs != original.macs
    ):
        rows.append(
            Row(
                "MACs",
                "-" if original.macs is None else format_count(original.macs),
                "-" if result.macs is None else format_count(result.macs),
                change_words(original.macs, result.macs, "fewer", "more"),
                _at_most(format_count, b.max_macs),
                _within(result.macs, b.max_macs),
            )
        )
    if result.load_ms is not None:
        change = change_words(original.load_ms, result.load_ms, "faster", "slower")
        rows.append(Row("load time", format_ms(original.load_ms), format_ms(result.load_ms), change))
    return rows + _metric_rows(original, result, b)


def _metric_rows(original: Measurement, result: Measurement, b: Budget) -> list[Row]:
    """The metric, then its drop with interval and limit."""
    if result.metric is None and b.max_drop is None:
        return []
    name = result.metric_name or original.metric_name
    shown = (format_metric(original.metric, name), format_metric(result.metric, name))
    rows = [Row(name or "metric", *shown, drop_words(result))]
    if result.drop is not None or b.max_drop is not None:
        limit = "" if b.max_drop is None else format_drop(b.max_drop, name)
        drop = format_drop(result.drop, name)
        rows.append(Row("drop", "", drop, interval_words(result), limit, _within(result.drop, b.max_drop)))
    return rows


def _latency_rows(original: Measurement, result: Measurement, b: Budget) -> list[Row]:
    """Median with its limits, then p95; the ratio is the interleaved one, not the quotient of the medians."""
    if result.latency_ms is None:
        if b.max_latency_ms is None and b.max_latency_ratio is None:
            return []
        return [Row("latency", format_ms(original.latency_ms), "-", "not measured", _latency_limit(b), False)]
    ratio = result.latency_ratio
    change = "" if ratio is None else change_words(1.0, ratio, "faster", "slower")
    checks = (_within(result.latency_ms, b.max_latency_ms), _within(ratio, b.max_latency_ratio))
    known = [c for c in checks if c is not None]
    ok = all(known) if known else None
    rows = [
        Row(
            "latency" if result.latency_from == "measured" else f"latency, {result.latency_from}",
            format_ms(original.latency_ms),
            format_ms(result.latency_ms),
            change,
            _latency_limit(b),
            ok,
        )
    ]
    if result.p95_ms is not None:
        rows.append(Row("latency, p95", format_ms(original.p95_ms), format_ms(result.p95_ms), ""))
    return rows


def _latency_limit(b: Budget) -> str:
    """The latency limits in words."""
    parts = [format_ms(b.max_latency_ms)] if b.max_latency_ms is not None else []
    parts += [format_percent(b.max_latency_ratio)] if b.max_latency_ratio is not None else []
    return " and ".join(parts)


def _at_most(form: Any, limit: float | None) -> str:
    return "" if limit is None else str(form(limit))


def _within(value: float | None, limit: float | None) -> bool | None:
    return None if limit is None else value is not None and value <= limit


def interval_words(m: Measurement) -> str:
    """'95%: -0.60 to +1.00' of the drop's interval, + is worse; '' where there is none."""
    if m.drop_interval is None:
        return ""
    i = m.drop_interval
    low, high = (format_drop(v, m.metric_name, signed=True).partition(" ")[0] for v in (i.low, i.high))
    return f"{i.level:.0%}: {low} to {high}"


def evidence_words(m: Measurement, samples: str = "unseen sample") -> str:
    """On how many samples the drop was measured, and the paired test in words; '' without a metric."""
    if m.drop is None or (m.drop == 0 and m.drop_interval is None and m.p_value is None):
        return ""  # not measured, or the original itself
    count = f"{m.n_samples:,} {samples}{'s' if m.n_samples != 1 else ''}"
    return count if m.p_value is None else f"{count}; paired test: {format_p_value(m.p_value)}"


def runtime_words(m: Measurement) -> str:
    """The runtime with its name; a bare version is ONNX Runtime's."""
    return f"onnxruntime {m.runtime}" if m.runtime[:1].isdigit() else m.runtime


def samples_word(report: Report) -> str:
    """What the drop of a report was measured on: a front is not verified on unseen data."""
    return "validation sample" if report.outcome == "front" else "unseen sample"


def outcome_word(report: Report) -> str:
    """The one outcome in capitals, e.g. 'MET'."""
    return (report.outcome or ("met" if report.ok else "not met")).replace("_", " ").upper()


def headline(original: Measurement, result: Measurement) -> str:
    """'3.92x smaller, 1.52x faster, accuracy worse by 0.20 points' of measured values."""
    parts = []
    size = change_words(original.size_bytes, result.size_bytes, "smaller", "larger")
    parts.append("same size" if size.endswith("the same") else size.partition(", ")[2])
    if result.latency_ratio is not None:
        speed = change_words(1.0, result.latency_ratio, "faster", "slower")
        said = "" if result.latency_from == "measured" else f" ({result.latency_from})"
        parts.append(("same latency" if speed.endswith("the same") else speed.partition(", ")[2]) + said)
    drop = drop_words(result)
    if drop:
        parts.append(f"{result.metric_name} {drop}")
    return ", ".join(p for p in parts if p)


def asked_words(report: Report) -> str:
    """What was asked, and what was taken by default where nothing was."""
    name = report.result.metric_name
    asked: Mapping[str, Any] = report.facts.get("asked", {})
    limit = report.budget.max_drop
    if asked.get("goal") == "plain-int8" and limit is not None:
        return f"nothing in particular; so a fast 8-bit model with a drop of at most {format_drop(limit, name)}"
    by_default = limit is not None and asked.get("max_drop") is False
    return budget_words(report.budget, name) + ("; the limit on the drop is the default" if by_default else "")


def budget_words(budget: Budget, metric_name: str = "") -> str:
    """'size at most 5.00 MB, drop at most 1.00 points; smallest size wanted'."""
    limits = []
    if budget.max_size_bytes is not None:
        limits.append(f"size at most {format_bytes(budget.max_size_bytes)}")
    if _latency_limit(budget):
        limits.append(f"latency at most {_latency_limit(budget)}")
    if budget.max_peak_bytes is not None:
        limits.append(f"peak memory at most {format_bytes(budget.max_peak_bytes)}")
    if budget.max_macs is not None:
        limits.append(f"MACs at most {format_count(budget.max_macs)}")
    if budget.max_drop is not None:
        limits.append(f"drop at most {format_drop(budget.max_drop, metric_name)}")
    return f"{', '.join(limits) or 'no limits'}; {_OBJECTIVES[budget.minimize]} wanted"


def decision_words(decision: str) -> str:
    """'weight_nbit 4 bit, block 32 -> float16' of 'weight_nbit(bits=4, block=32) -> float16()'.

    Zeros are for the size of the file: 'sparse 4 bit, 50% zeros, file size only'.
    """
    return _ACTION.sub(lambda m: _action_words(m.group(1), m.group(2)), decision) or "keep"


def _action_words(technique: str, params: str) -> str:
    """One action with the parameters a reader wants: bits first, zero and false ones left out."""
    pairs = [p.strip().partition("=")[::2] for p in params.split(",") if "=" in p]
    bits = [f"{value} bit" for key, value in pairs if key.endswith("bits")]
    rest = [
        _parameter_words(key, value)
        for key, value in pairs
        if not key.endswith("bits") and value not in ("0", "False", "None", "")
    ]
    # The runtime multiplies zeros like any other value: a reader must not take them for speed.
    only = ["file size only"] if technique == "sparse" else []
    return " ".join([technique, ", ".join(bits + rest + only)]).strip()


def _parameter_words(key: str, value: str) -> str:
    """'block 32', 'compute', '50% zeros'."""
    if key == "sparsity" and value.replace(".", "", 1).isdecimal():
        return f"{format_percent(float(value), 0)} zeros"
    return key.replace("_", " ") if value == "True" else f"{key.replace('_', ' ')} {value}"


# Parameters that say how much of a structure stays: they differ from place to place, and a summary leaves them out.
_EXTENTS = frozenset({"keep", "rank", "rank_in", "rank_out", "ratio", "sparsity"})


def plan_words(plan: Plan) -> str:
    """'44 static_int8 8 bit, 12 channel_prune' by falling count; 'nothing changed' of an empty plan."""
    counts: dict[str, int] = {}
    for decision in plan.changed():
        bare = [Action(a.technique, tuple(p for p in a.params if p[0] not in _EXTENTS)) for a in decision.actions]
        words = decision_words(" -> ".join(map(str, bare)))
        counts[words] = counts.get(words, 0) + 1
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{n} {words}" for words, n in ordered) or "nothing changed"


def technique_words(plan: Plan) -> str:
    """Which techniques make a plan up, and at how many places: 'channel_prune x12, static_int8 x40, low_rank x3'."""
    counts: dict[str, int] = {}
    for decision in plan.changed():
        for action in decision.actions:
            counts[action.technique] = counts.get(action.technique, 0) + 1
    return ", ".join(f"{name} x{n}" for name, n in counts.items()) or "nothing changed"


def note_groups(notes: Iterable[Note]) -> list[NoteGroup]:
    """Notes of equal text together, in order of first appearance; places in order, each once."""
    groups: dict[str, dict[str, None]] = {}
    for note in notes:
        groups.setdefault(note.text, {})[note.where] = None
    return [NoteGroup(text, tuple(places)) for text, places in groups.items()]


def places_words(places: Sequence[str], most: int = 4) -> str:
    """'a, b, c and 12 more'."""
    named = [p for p in places if p]
    if len(named) <= most:
        return ", ".join(named)
    return f"{', '.join(named[: most - 1])} and {len(named) - most + 1} more"


def fact_rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Facts that are plain values, with names and units a reader knows; nested ones are left to the JSON."""
    rows = []
    for key, value in facts.items():
        if isinstance(value, bool):
            rows.append((key.replace("_", " "), "yes" if value else "no"))
        elif key == "seconds":
            rows.append(("took", format_duration(value)))
        elif isinstance(value, (int, float)) and key.endswith("_bytes"):
            rows.append((key.removesuffix("_bytes").replace("_", " "), format_bytes(value)))
        elif isinstance(value, (int, float)) and key.endswith("_ms"):
            rows.append((key.removesuffix("_ms").replace("_", " "), format_ms(value)))
        elif isinstance(value, float):
            rows.append((key.replace("_", " "), f"{value:.4g}"))
        elif isinstance(value, (str, int)) and str(value):
            rows.append((key.replace("_", " "), str(value)))
    return rows


def attempt_words(attempt: Attempt, budget: Budget) -> tuple[str, bool]:
    """('within the budget', True), what is over in short, or 'failed'; and whether it is within."""
    if attempt.measured is None:
        return "failed", False
    m = attempt.measured
    over = [v.partition(" is over ")[0].split(" ")[0] for v in budget.violations(m)]
    if budget.max_drop is not None and "drop" not in over and (m.likely_drop or 0.0) > budget.max_drop:
        over.append(f"drop (likely {format_drop(m.likely_drop, m.metric_name)})")
    if over:
        return f"over: {', '.join(dict.fromkeys(over))}", False
    return "within the budget" if budget.limited else "measured", True
