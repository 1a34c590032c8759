"""Requests that wait together run together: a bounded queue in front of one model, emptied in batches.

Only requests whose inputs agree in every axis but the first share a batch. A free worker takes what is there at once
when requests come one by one; when the last batches held several, it waits for as many again, but never longer than
`max_delay_s` counted from the oldest request, nor than a run usually takes: more waiting than that costs more than the
run it saves (adaptive batching after Crankshaw et al. 2017, "Clipper").
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from featherweight.edge.http import RequestError
from featherweight.edge.protocol import Array
from featherweight.edge.serve.models import Model

Key = tuple[Any, ...]


@dataclass(slots=True, eq=False)
class Job:
    """One request in the queue. `gone` tells whether its client still waits."""

    feeds: Mapping[str, Array]
    outputs: tuple[str, ...]
    rows: int
    answer: asyncio.Future[dict[str, Array]]
    gone: Callable[[], bool]
    arrived: float = field(default_factory=time.perf_counter)
    waited_s: float = 0.0

    @property
    def key(self) -> Key:
        """Equal for jobs that may share a batch."""
        return (self.outputs, *((n, a.dtype.str, a.shape[1:]) for n, a in sorted(self.feeds.items())))


@dataclass(frozen=True, slots=True)
class Ran:
    """What one batch was, for metrics."""

    requests: int
    rows: int
    seconds: float


class Batcher:
    """The queue of one model. Made and used within one event loop; models run in `pool`.

    Args:
        model: what runs.
        pool: threads that run it.
        workers: batches that run at once.
        max_batch: rows of one batch.
        max_delay_s: how long a request may be held back for company while a worker is free.
        queue: requests that may wait; one more is refused with 503.
        on_batch: told of each batch.
    """

    def __init__(
        self, model: Model, pool: ThreadPoolExecutor, *, workers: int, max_batch: int, max_delay_s: float, queue: int,
        on_batch: Callable[[Ran], None],
    ) -> None:  # fmt: skip
        self.model = model
        self._pool = pool
        self._max_batch = max_batch if model.batched else 1
        self._max_delay_s = max_delay_s if self._max_batch > 1 else 0.0
        self._queue = queue
        self._on_batch = on_batch
        self._waiting: OrderedDict[Key, deque[Job]] = OrderedDict()
        self._count = 0
        self._usual = 1.0  # requests a batch, moving average
        self._run_s = max_delay_s  # of a run, moving average
        self._free = workers
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Requests in the queue now."""
        return self._count

    async def run(
        self, feeds: Mapping[str, Array], outputs: tuple[str, ...], rows: int, gone: Callable[[], bool]
    ) -> tuple[dict[str, Array], Job]:
        """Queue a checked request and wait for its outputs. Raises RequestError: 503 when the queue is full."""
        if self._count >= self._queue:
            raise RequestError.busy(f"{self._count} requests wait for model {self.model.name} already; ask again later")
        job = Job(feeds, outputs, rows, asyncio.get_running_loop().create_future(), gone)
        self._waiting.setdefault(job.key, deque()).append(job)
        self._count += 1
        self._dispatch()
        return await job.answer, job

    def _dispatch(self) -> None:
        """Start what may start now; set the clock for what is held back."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._free and self._waiting:
            wait_s, key = min(
                ((self._wait_s(held), key) for key, held in self._waiting.items()), key=lambda pair: pair[0]
            )
            if wait_s > 0:
                self._timer = asyncio.get_running_loop().call_later(wait_s, self._dispatch)
                return
            batch = self._take(key)
            if not batch:
                continue
            self._usual += 0.3 * (len(batch) - self._usual)
            self._free -= 1
            task = asyncio.get_running_loop().create_task(self._run_batch(batch))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _wait_s(self, held: deque[Job]) -> float:
        """How long these jobs should still be held back; the longer due, the smaller."""
        waited_s = time.perf_counter() - held[0].arrived
        if len(held) >= round(self._usual) or sum(job.rows for job in held) >= self._max_batch:
            return -waited_s
        return min(self._max_delay_s, self._run_s) - waited_s

    def _take(self, key: Key) -> list[Job]:
        """The oldest jobs of a queue, as many as a batch may hold; those nobody waits for any more are dropped."""
        batch: list[Job] = []
        held = self._waiting[key]
        rows, now = 0, time.perf_counter()
        while held and (not batch or rows + held[0].rows <= self._max_batch):
            job = held.popleft()
            self._count -= 1
            if job.answer.done() or job.gone():
                job.answer.cancel()
                continue
            job.waited_s = now - job.arrived
            rows += job.rows
            batch.append(job)
        if not held:
            del self._waiting[key]
        return batch

    async def _run_batch(self, batch: Sequence[Job]) -> None:
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        try:
            results = await loop.run_in_executor(self._pool, _run_jobs, self.model, batch)
        except Exception as e:  # each request answers it
            results = [e] * len(batch)
        finally:
            self._free += 1
        for job, result in zip(batch, results, strict=True):
            if job.answer.done():
                continue
            if isinstance(result, BaseException):
                job.answer.set_exception(result)
            else:
                job.answer.set_result(result)
        took_s = time.perf_counter() - started
        self._run_s += 0.3 * (took_s - self._run_s)
        self._on_batch(Ran(len(batch), sum(j.rows for j in batch), took_s))
        self._dispatch()


def _run_jobs(model: Model, batch: Sequence[Job]) -> list[dict[str, Array] | BaseException]:
    """Outputs of each job. Where a batch fails, each job runs alone: one bad request must not fail its neighbours."""
    if len(batch) > 1:
        try:
            return list(_run_together(model, batch))
        except RequestError:
            pass
    results: list[dict[str, Array] | BaseException] = []
    for job in batch:
        try:
            results.append(model.run(job.feeds, job.outputs))
        except Exception as e:  # handed to the request that caused it
            results.append(e)
    return results


def _run_together(model: Model, batch: Sequence[Job]) -> list[dict[str, Array]]:
    names = batch[0].feeds.keys()
    outputs = model.run({n: np.concatenate([job.feeds[n] for job in batch]) for n in names}, batch[0].outputs)
    rows = sum(job.rows for job in batch)
    for name, value in outputs.items():
        if value.shape[:1] != (rows,):
            raise RequestError(500, f"output {name!r} has not one row for each of the batch")
    found, at = [], 0
    for job in batch:
        found.append({name: value[at : at + job.rows] for name, value in outputs.items()})
        at += job.rows
    return found
