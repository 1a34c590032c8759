"""Where models are measured: on this machine, or wherever something with the same calls says it measured.

The search asks a `Bench` and never knows how far away it is.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from featherweight.core import Note, Profile
from featherweight.runtime import evaluate as ev
from featherweight.runtime import measure, ort
from featherweight.runtime.measure import LatencyResult, MemoryResult
from featherweight.runtime.metrics import Metric
from featherweight.runtime.outputs import Array
from featherweight.runtime.sandbox import Worker

__all__ = ["Bench", "Here"]

Feeds = Mapping[str, Array]


class Bench(Protocol):
    """Runs saved models and says what came out and what it took.

    `host` and `runtime` name where it was and which runtime, as reports show them; `profile` is the device's own,
    or None where the user's choice of a target decides. `latency_from` says what its latencies are: "measured", or
    "predicted" from a profile.
    """

    host: str
    latency_from: str
    runtime: str
    profile: Profile | None

    def evaluate(
        self,
        path: str | Path,
        batches: Any,
        metric: Metric,
        *,
        reference: Path | None = None,
        record_to: Path | None = None,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> ev.Evaluation:
        """As `runtime.evaluate.evaluate`."""
        ...

    def latency(
        self,
        original: str | Path,
        candidate: str | Path,
        feeds: Sequence[Feeds],
        *,
        threads: int = 1,
        time_limit_s: float = 20.0,
    ) -> LatencyResult:
        """As `runtime.measure.latency`."""
        ...

    def memory(self, path: str | Path, feeds: Feeds) -> MemoryResult:
        """As `runtime.measure.memory`."""
        ...

    def notes(self) -> tuple[Note, ...]:
        """What a report should say about where it was measured."""
        ...


class Here:
    """The machine that the search runs on."""

    profile: Profile | None = None
    latency_from = "measured"

    def __init__(self, worker: Worker) -> None:
        """`worker` runs evaluations; latency and memory take children of their own."""
        self.host = platform.node()
        self.runtime = ort.VERSION
        self._worker = worker

    def evaluate(
        self,
        path: str | Path,
        batches: Any,
        metric: Metric,
        *,
        reference: Path | None = None,
        record_to: Path | None = None,
        threads: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> ev.Evaluation:
        """Score a model in the child. Raises RunError, ChildCrashed, DataError."""
        return ev.evaluate(
            path, batches, metric, reference=reference, record_to=record_to, worker=self._worker, threads=threads,
            progress=progress,
        )  # fmt: skip

    def latency(
        self,
        original: str | Path,
        candidate: str | Path,
        feeds: Sequence[Feeds],
        *,
        threads: int = 1,
        time_limit_s: float = 20.0,
    ) -> LatencyResult:
        """Interleaved, a child each. Raises RunError, ChildCrashed."""
        return measure.latency(original, candidate, feeds, threads=threads, time_limit_s=time_limit_s)

    def memory(self, path: str | Path, feeds: Feeds) -> MemoryResult:
        """In a fresh child. Raises RunError, ChildCrashed."""
        return measure.memory(path, feeds)

    def notes(self) -> tuple[Note, ...]:
        """Nothing: it is where the report is read."""
        return ()
