"""The measurements behind a distillation: saved files, reloaded, on the holdout, in a child process."""

from __future__ import annotations

import dataclasses
import platform
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from featherweight.core import Measurement
from featherweight.data import Dataset
from featherweight.graph import io
from featherweight.runtime import evaluate as ev
from featherweight.runtime import measure, ort, significance
from featherweight.runtime.metrics import Metric
from featherweight.runtime.sandbox import Worker
from featherweight.search.baseline import LATENCY_FEEDS
from featherweight.search.problem import first_feeds

if TYPE_CHECKING:
    from featherweight.learn.distill import Asked


class Proof:
    """Compares files with the teacher on data nobody trained on. A context manager over its child process."""

    metric: Metric
    reason: str

    def __init__(self, teacher: Path, student: Path, holdout: Dataset, asked: Asked, work: Path, threads: int) -> None:
        self._teacher, self._student, self._holdout, self._asked = teacher, student, holdout, asked
        self._reference = work / "reference"
        self._threads = threads
        self._worker = Worker()

    def __enter__(self) -> Self:
        self._worker.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._worker.__exit__(kind, error, tb)

    def before(self) -> None:
        """Choose the metric, and measure teacher and student as they are. Raises DataError, RunError."""
        chosen = ev.pick_metric(self._teacher, self._holdout, self._asked.metric, worker=self._worker)
        self.metric, self.reason = chosen
        self._original = self._evaluate(self._teacher, record=True)
        self._start = self._evaluate(self._student)
        self._worker.close()  # a fresh child later: this one holds memory that training may need

    def _evaluate(self, path: Path, *, record: bool = False) -> ev.Evaluation:
        where: dict[str, Any] = {"record_to": self._reference} if record else {"reference": self._reference}
        return ev.evaluate(path, self._holdout, self.metric, worker=self._worker, threads=self._threads, **where)

    def measured(self, path: Path, evaluation: ev.Evaluation | None = None, **costs: Any) -> Measurement:
        """One file on the holdout against the teacher."""
        found = self._evaluate(path) if evaluation is None else evaluation
        drop = significance.paired(self.metric, self._original, found, seed=self._asked.seed)
        self._last = found
        return Measurement(
            io.size_bytes(path), metric_name=self.metric.name, metric=found.value, drop=drop.value,
            drop_interval=drop.interval, p_value=drop.p_value, n_samples=found.n_samples, runtime=ort.VERSION,
            host=platform.node(), seed=self._asked.seed, **costs,
        )  # fmt: skip

    def final(self, path: Path) -> tuple[Measurement, Measurement, Measurement, significance.Drop]:
        """Teacher, the student before and after, and what was gained (positive is better), with latency and memory."""
        feeds = first_feeds(self._holdout, LATENCY_FEEDS)
        timing = measure.latency(self._teacher, path, feeds, threads=1)
        memory = [measure.memory(p, feeds[0]) for p in (self._teacher, path)]
        perfect = self.metric.perfect
        teacher = dataclasses.replace(
            self.measured(self._teacher, self._original), metric=self._original.value if perfect is None else perfect,
            drop=0.0, drop_interval=None, p_value=None, latency_ms=timing.original_ms, p95_ms=timing.original_p95_ms,
            latency_ratio=1.0, peak_bytes=memory[0].peak_bytes, load_ms=memory[0].load_ms,
        )  # fmt: skip
        before = self.measured(self._student, self._start)
        after = self.measured(
            path, latency_ms=timing.candidate_ms, p95_ms=timing.candidate_p95_ms, latency_ratio=timing.ratio,
            peak_bytes=memory[1].peak_bytes, load_ms=memory[1].load_ms,
        )  # fmt: skip
        return teacher, before, after, self._gain(self._last)

    def _gain(self, after: ev.Evaluation) -> significance.Drop:
        """The drop from after to before: both scored alike, so a paired comparison of the two."""
        return significance.drop_interval(
            dataclasses.replace(self.metric, perfect=None), after.per_sample, self._start.per_sample,
            self._start.labels, values=(after.value, self._start.value), seed=self._asked.seed,
        )  # fmt: skip
