"""A bench for a device that is not here: accuracy is measured here, latency is predicted from the device's profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from featherweight.core import Interval, Note, Profile
from featherweight.edge.predict import latency_of_file
from featherweight.runtime import evaluate as ev
from featherweight.runtime.bench import Feeds, Here
from featherweight.runtime.measure import LatencyResult, MemoryResult
from featherweight.runtime.metrics import Metric
from featherweight.runtime.sandbox import Worker
from featherweight.runtime.targets import THIS, is_this_machine, load_profile


def device_of(target: object) -> Profile | None:
    """The profile of a named target or file if it is a device to predict for; None for this machine and "portable".

    Raises DataError for a name or file that is no profile.
    """
    if not isinstance(target, str | Path) or target == THIS:
        return None
    profile = load_profile(target)
    return None if profile.arch == "any" or is_this_machine(profile) or not profile.predicts else profile


class Predicting:
    """Bench of one profile; see `runtime.bench.Bench`."""

    latency_from = "predicted"

    def __init__(self, profile: Profile, worker: Worker) -> None:
        """`worker` runs evaluations here."""
        self._here = Here(worker)
        self._worker = worker
        self.profile: Profile | None = profile
        self._device = profile
        self.host = f"{self._here.host}; latency predicted for {profile.name}"
        self.runtime = self._here.runtime

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
        """Measured here."""
        return self._here.evaluate(
            path, batches, metric, reference=reference, record_to=record_to, threads=threads, progress=progress
        )

    def latency(
        self,
        original: str | Path,
        candidate: str | Path,
        feeds: Sequence[Feeds],
        *,
        threads: int = 1,  # noqa: ARG002  # the profile's own are what was measured there
        time_limit_s: float = 20.0,  # noqa: ARG002
    ) -> LatencyResult:
        """Predicted for both; the interval is the ratio itself, for a prediction has no spread of its own."""
        first = self._mean_ms(original, feeds)
        second = first if candidate == original else self._mean_ms(candidate, feeds)
        ratio = second / first
        return LatencyResult(
            first, second, first, second, first, second, ratio, Interval(ratio, ratio), 0, self._device.threads, ()
        )

    def _mean_ms(self, path: str | Path, feeds: Sequence[Feeds]) -> float:
        """Mean over the feeds; those of the same shapes are looked at once."""
        kinds: dict[tuple[tuple[str, tuple[int, ...]], ...], float] = {}
        total = 0.0
        for one in feeds:
            shapes = tuple((name, tuple(array.shape)) for name, array in sorted(one.items()))
            if shapes not in kinds:
                kinds[shapes] = latency_of_file(path, self._device, one, worker=self._worker).ms
            total += kinds[shapes]
        return total / len(feeds)

    def memory(self, path: str | Path, feeds: Feeds) -> MemoryResult:
        """Measured here, with the same runtime."""
        return self._here.memory(path, feeds)

    def notes(self) -> tuple[Note, ...]:
        """What is predicted and what is not."""
        name = self._device.name
        return (
            Note(
                name,
                "latency is predicted from its profile, not measured; the metric and peak memory are measured here",
            ),
        )
