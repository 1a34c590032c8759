"""Counters and histograms as Prometheus reads them (text format 0.0.4), for one event loop: no locks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Labels = tuple[tuple[str, str], ...]


class Counter:
    """A number that only grows, one for each set of labels."""

    kind = "counter"

    def __init__(self, name: str, text: str) -> None:
        self.name, self.text = name, text
        self._values: dict[Labels, float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        """Grow by `amount`."""
        key = tuple(sorted(labels.items()))
        self._values[key] = self._values.get(key, 0) + amount

    def lines(self) -> list[str]:
        """Its samples."""
        return [f"{self.name}{_braces(k)} {_number(v)}" for k, v in sorted(self._values.items())]


class Gauge:
    """A value read when asked for."""

    kind = "gauge"

    def __init__(self, name: str, text: str, read: Callable[[], Sequence[tuple[Labels, float]]]) -> None:
        self.name, self.text, self._read = name, text, read

    def lines(self) -> list[str]:
        """Its samples."""
        return [f"{self.name}{_braces(k)} {_number(v)}" for k, v in self._read()]


class Histogram:
    """How often a value was at most each bound."""

    kind = "histogram"

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text, self._bounds = name, text, tuple(bounds)
        self._counts: dict[Labels, list[int]] = {}
        self._sums: dict[Labels, float] = {}

    def add(self, value: float, **labels: str) -> None:
        """Count one value."""
        key = tuple(sorted(labels.items()))
        counts = self._counts.setdefault(key, [0] * (len(self._bounds) + 1))
        counts[bisect_left(self._bounds, value)] += 1
        self._sums[key] = self._sums.get(key, 0.0) + value

    def lines(self) -> list[str]:
        """Its samples: each bucket holds all values up to its bound."""
        found: list[str] = []
        for key, counts in sorted(self._counts.items()):
            total = 0
            for bound, count in zip((*map(_number, self._bounds), "+Inf"), counts, strict=True):
                total += count
                found.append(f"{self.name}_bucket{_braces((*key, ('le', bound)))} {total}")
            found.append(f"{self.name}_sum{_braces(key)} {_number(self._sums[key])}")
            found.append(f"{self.name}_count{_braces(key)} {total}")
        return found


def page(metrics: Sequence[Counter | Gauge | Histogram]) -> str:
    """The whole text of an answer to a scrape."""
    lines: list[str] = []
    for metric in metrics:
        lines += [f"# HELP {metric.name} {metric.text}", f"# TYPE {metric.name} {metric.kind}", *metric.lines()]
    return "\n".join(lines) + "\n"


def _braces(labels: Labels) -> str:
    inside = ",".join(f'{k}="{_escaped(v)}"' for k, v in labels)
    return f"{{{inside}}}" if inside else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))
