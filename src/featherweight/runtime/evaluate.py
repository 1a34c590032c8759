"""Run a model over data in a child process and score it; the original's outputs are kept on disk and reused.

Memory is flat in the number of batches: one batch and the per-sample values are all that is held, and the original's
outputs (only what the metric reads of them) are memory-mapped. A metric over all outputs at once is the exception.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featherweight.errors import DataError
from featherweight.runtime.metrics import Metric, choose, get
from featherweight.runtime.outputs import Array, Outputs
from featherweight.runtime.sandbox import NotShippableError, Worker
from featherweight.runtime.scores import Float, Judged, agreement

INDEX = "reference.json"
SCHEMA = 1
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True)
class Evaluation:
    """A metric's value over some data. `per_sample` (n, ...) is None where the metric is one number over all.

    `changed`: share of samples whose winning class is not that of the stored reference; None without one or classes.
    """

    metric_name: str
    value: float
    per_sample: Float | None
    labels: Array | None
    n_samples: int
    changed: float | None = None


def evaluate(
    path: str | Path,
    batches: Any,
    metric: Metric,
    *,
    reference: str | Path | None = None,
    record_to: str | Path | None = None,
    worker: Worker | None = None,
    threads: int = 1,
    timeout_s: float | None = None,
    progress: ProgressCallback | None = None,
) -> Evaluation:
    """Score the model at `path` on `batches`.

    Args:
        path: the model file; or a folder of outputs that `record_outputs` filled, which are scored as they are.
        batches: an object with `batches()` (read in the child), or an iterable of batches: objects with `feeds`,
            `labels` and `n`. Its attribute `rows_per_sample` is honoured.
        metric: how to score.
        reference: folder that `record_to` filled for the same data, or the original model's file (run side by side).
        record_to: keep what the metric reads of this model's outputs there; with it, a metric that compares with the
            original compares this model with itself.
        worker: a child to use; None starts one.
        threads: of the runtime.
        timeout_s: of the whole evaluation, or of each batch when batches are sent one by one.
        progress: called with (batches done, batches in all; 0 if unknown).

    Raises:
        RunError, ChildCrashed: the model fails or dies.
        DataError: no batch; labels, outputs or the stored reference do not fit.
    """
    job = _Job(
        str(path),
        metric,
        None if reference is None else str(reference),
        None if record_to is None else str(record_to),
        int(getattr(batches, "rows_per_sample", 1)),
        threads,
    )
    if worker is None:
        with Worker() as own:
            return evaluate_in(own, job, batches, timeout_s, progress)
    return evaluate_in(worker, job, batches, timeout_s, progress)


def evaluate_in(
    worker: Worker, job: _Job, batches: Any, timeout_s: float | None, progress: ProgressCallback | None
) -> Evaluation:
    """Ship the data's recipe to the child if it can be, else send batch by batch."""
    doing = f"evaluating '{Path(job.path).name}'"
    if hasattr(batches, "batches") or isinstance(batches, list | tuple):
        try:
            return worker.call(_all, job, batches, timeout_s=timeout_s, progress=progress, doing=doing)
        except NotShippableError:  # e.g. a function of the user's script gives the data: it stays here
            pass
    total = _length(batches)
    worker.call(_begin, job, timeout_s=timeout_s, doing=doing)
    for done, batch in enumerate(_iterate(batches), start=1):
        feeds = dict(batch.feeds)
        worker.call(_step, feeds, batch.labels, batch.n, timeout_s=timeout_s, doing=f"{doing} on batch {done}")
        if progress is not None:
            progress(done, total)
    return worker.call(_finish, timeout_s=timeout_s, doing=doing)


def pick_metric(
    path: str | Path,
    batches: Any,
    name: str | None = None,
    *,
    output: str | None = None,
    worker: Worker,
    timeout_s: float | None = None,
) -> tuple[Metric, str]:
    """The named metric, or the one that fits the model's outputs on the first batch; and why, in words.

    Raises:
        DataError: no such metric or output, or the metric does not fit this data.
        RunError, ChildCrashed: the model fails on the first batch.
    """
    from featherweight.runtime.ort import run_model

    batch = next(iter(_iterate(batches)), None)
    if batch is None:
        raise DataError("choosing a metric needs at least one batch, but the data has none")
    rows = int(getattr(batches, "rows_per_sample", 1))
    doing = f"running '{Path(path).name}' on the first batch"
    (outputs,) = worker.call(run_model, str(path), [dict(batch.feeds)], timeout_s=timeout_s, doing=doing)
    if name is None:
        return choose(outputs, feeds=batch.feeds, labels=batch.labels, rows_per_sample=rows, n=batch.n, output=output)
    metric = get(name, output=output)
    if not metric.whole:
        metric.per_sample(outputs, outputs, batch.labels, rows, feeds=batch.feeds, n=batch.n)
    return metric, "as asked"


@dataclass(frozen=True)
class _Job:
    path: str
    metric: Metric
    reference: str | None
    record_to: str | None
    rows_per_sample: int
    threads: int


class _Run:
    """In the child: sessions and what has been gathered so far."""

    def __init__(self, job: _Job) -> None:
        from featherweight.runtime import ort

        self.job = job
        # A model that ran elsewhere is here as its outputs.
        self.recorded = Reference(Path(job.path)) if Path(job.path).is_dir() else None
        self.session: Any = None if self.recorded else ort.session(job.path, threads=job.threads)
        wanted = job.metric.output
        known = {o.name for o in self.session.outputs} if self.session else set()
        self.wanted = [wanted] if wanted in known else None
        self.original: Any = None
        self.stored: Reference | None = None
        if job.reference is not None and Path(job.reference).is_dir():
            self.stored = Reference(Path(job.reference))
        elif job.reference is not None:
            self.original = ort.session(job.reference, threads=job.threads)
        self.recorder = _Recorder(Path(job.record_to)) if job.record_to else None
        self.scores: list[Float] = []
        self.same: list[Float] = []
        self.labels: list[Array | None] = []
        self.kept: list[dict[str, Array]] = []
        self.done = 0
        self.n = 0

    def step(self, feeds: Mapping[str, Array], labels: Array | None, n: int) -> None:
        metric = self.job.metric
        if self.recorded is not None:
            outputs = metric.select(self.recorded.batch(self.done, n), feeds)
        else:
            outputs = metric.select(self.session.run(feeds, self.wanted), feeds)
        theirs: Outputs | None = None
        if self.stored is not None:
            theirs = self.stored.batch(self.done, n)
        elif self.original is not None and metric.needs_reference:
            theirs = metric.select(self.original.run(feeds, self.wanted), feeds)
        elif self.recorder is not None:
            theirs = outputs
        if self.recorder is not None:
            self.recorder.add(outputs, n)
        if metric.whole:
            self.kept.append(outputs)
        else:
            rows = self.job.rows_per_sample
            scores = metric.per_sample(outputs, theirs, labels, rows, n=n)
            self.scores.append(np.full(n, scores) if scores.ndim == 0 else scores)
            if self.stored is not None and theirs is not None and _classes(metric, outputs, n):
                self.same.append(agreement(Judged(outputs, theirs, None, 1, n)))
        self.labels.append(labels)
        self.done += 1
        self.n += n

    def finish(self) -> Evaluation:
        metric = self.job.metric
        if self.n == 0:
            raise DataError(f"the metric {metric.name} needs at least one sample, but the data has none")
        if self.stored is not None and self.stored.n_batches != self.done:
            raise DataError(f"the stored reference is of {self.stored.n_batches} batches, but the data has {self.done}")
        if self.recorder is not None:
            self.recorder.close()
        present = [x for x in self.labels if x is not None]
        labels = np.concatenate(present) if len(present) == len(self.labels) else None
        if metric.whole:
            scores = metric.per_sample(_joined(self.kept, metric.name), None, labels, n=self.n)
        else:
            scores = np.concatenate(self.scores)
        value = metric.aggregate(scores, labels)
        changed = 1 - float(np.concatenate(self.same).mean()) if self.same else None
        return Evaluation(metric.name, value, scores if scores.ndim else None, labels, self.n, changed)


def _classes(metric: Metric, outputs: Outputs, n: int) -> bool:
    """True if each sample has one answer: the highest of its class scores."""
    return metric.name == "accuracy" and all(
        x.ndim == 2 and x.shape[0] == n and x.shape[1] > 1 for x in outputs.values()
    )


_current: _Run | None = None


def _all(job: _Job, batches: Any, progress: ProgressCallback | None = None) -> Evaluation:
    run = _Run(job)
    total = _length(batches)
    for batch in _iterate(batches):
        run.step(batch.feeds, batch.labels, batch.n)
        if progress is not None:
            progress(run.done, total)
    return run.finish()


def _begin(job: _Job) -> None:
    global _current
    _current = _Run(job)


def _step(feeds: dict[str, Array], labels: Array | None, n: int) -> None:
    if _current is None:
        raise DataError("an evaluation must begin before a batch is sent; the child was started anew in between")
    _current.step(feeds, labels, n)


def _finish() -> Evaluation:
    global _current
    run, _current = _current, None
    if run is None:
        raise DataError("an evaluation must begin before it ends; the child was started anew in between")
    return run.finish()


class Reference:
    """The original's outputs as stored by an evaluation with `record_to`; arrays are memory-mapped."""

    def __init__(self, folder: Path) -> None:
        try:
            raw = json.loads((folder / INDEX).read_text())
        except (OSError, ValueError) as e:
            raise DataError(f"a stored reference must hold a readable {INDEX}, but '{folder}' does not: {e}") from e
        if raw.get("schema") != SCHEMA:
            raise DataError(f"a stored reference must have schema {SCHEMA}, but '{folder}' has {raw.get('schema')!r}")
        self.folder = folder
        self._batches: list[dict[str, Any]] = raw["batches"]

    @property
    def n_batches(self) -> int:
        """How many batches are stored."""
        return len(self._batches)

    def batch(self, index: int, n: int) -> dict[str, Array]:
        """Outputs by name of one batch. Raises DataError if that batch is not there or had another size."""
        if index >= len(self._batches) or self._batches[index]["n"] != n:
            raise DataError(
                f"the stored reference must be of the same data, but batch {index} of {n} samples is not in it "
                f"({len(self._batches)} batches stored); evaluate the original on this data first"
            )
        found: dict[str, Array] = {}
        for name, (file, dtype, offset, shape) in self._batches[index]["outputs"].items():
            if 0 in shape:
                found[name] = np.zeros(shape, dtype)
            else:
                found[name] = np.memmap(self.folder / file, dtype, "r", offset=offset, shape=tuple(shape))
        return found


def record_outputs(folder: Path, batches: Iterable[tuple[Outputs, int]]) -> None:
    """Keep the outputs of a model that ran elsewhere: arrays by name and the number of samples, batch by batch.

    `evaluate` takes the folder in place of a model file.
    """
    recorder = _Recorder(folder)
    for outputs, n in batches:
        recorder.add(outputs, n)
    recorder.close()


class _Recorder:
    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / INDEX).unlink(missing_ok=True)  # until it is written again the folder is not a reference
        self.folder = folder
        self.files: dict[str, Any] = {}
        self.batches: list[dict[str, Any]] = []

    def add(self, outputs: Outputs, n: int) -> None:
        entry: dict[str, Any] = {}
        for name, value in outputs.items():
            if name not in self.files:
                self.files[name] = (self.folder / f"{len(self.files)}.bin").open("wb")
            file = self.files[name]
            entry[name] = (Path(file.name).name, value.dtype.str, file.tell(), list(value.shape))
            file.write(np.ascontiguousarray(value).data if value.size else b"")
        self.batches.append({"n": n, "outputs": entry})

    def close(self) -> None:
        for file in self.files.values():
            file.close()
        temporary = self.folder / f"{INDEX}.tmp"
        temporary.write_text(json.dumps({"schema": SCHEMA, "batches": self.batches}))
        temporary.replace(self.folder / INDEX)


def _joined(kept: list[dict[str, Array]], metric_name: str) -> dict[str, Array]:
    try:
        return {name: np.concatenate([np.atleast_1d(k[name]) for k in kept]) for name in kept[0]}
    except ValueError as e:
        raise DataError(
            f"the metric {metric_name} gets all outputs in one array, but their shapes differ between batches ({e}); "
            "set `per_batch = True` on the function to get them batch by batch"
        ) from e


def _iterate(batches: Any) -> Iterable[Any]:
    found: Iterable[Any] = batches.batches() if hasattr(batches, "batches") else batches
    return found


def _length(batches: Any) -> int:
    known = getattr(batches, "n_batches", None)
    if known is None and hasattr(batches, "__len__"):
        known = len(batches)
    return int(known or 0)
