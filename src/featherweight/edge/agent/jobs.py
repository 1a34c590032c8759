"""One job at a time, each in a child process of its own; the others wait in a bounded queue.

Two jobs at once would disturb each other's timings, so there are never two. What a job's model does to its child
(crash, hang, memory) is a failed job with the cause in words; the agent itself runs no model.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import secrets
import shutil
import sys
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import featherweight
from featherweight import errors
from featherweight.edge.agent import tasks
from featherweight.edge.agent.requests import Asked, ModelFiles
from featherweight.edge.agent.store import Store, digest_of
from featherweight.errors import FeatherweightError
from featherweight.runtime.sandbox import Worker

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINAL: tuple[State, ...] = ("done", "failed", "cancelled")
REMEMBERED = 256
_INTERRUPT_S = 0.05
_WARM_S = 20.0  # loading the runtime takes a small device seconds, and evaluations come as many jobs in a row
_log = logging.getLogger("featherweight.agent")


@dataclass
class Job:
    """A job and what became of it. Changes on the event loop only."""

    id: str
    asked: Asked
    state: State = "queued"
    done: int = 0
    total: int = 0
    result: dict[str, Any] | None = None
    error: dict[str, str] | None = None
    cancelling: bool = False
    worker: Worker | None = None
    version: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def final(self) -> bool:
        """True once nothing will change any more."""
        return self.state in FINAL

    def advance(self, done: int, total: int) -> None:
        """Take over what the child reported."""
        self.done, self.total = done, total
        self.touch()

    def touch(self) -> None:
        """Wake whoever waits for a change."""
        self.version += 1
        self.changed.set()
        self.changed = asyncio.Event()


class Jobs:
    """The queue and its one runner."""

    def __init__(
        self, store: Store, folder: Path, *, most_waiting: int, memory_limit_bytes: int | None, max_output_bytes: int
    ) -> None:
        """`folder` holds the files of the job that runs; it is emptied here."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        self._store, self._folder = store, folder
        self._most_waiting = most_waiting
        self._memory_limit_bytes = memory_limit_bytes
        self._max_output_bytes = max_output_bytes
        self._jobs: OrderedDict[str, Job] = OrderedDict()
        self._waiting: list[Job] = []
        self._running: Job | None = None
        self._arrived = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="featherweight-job")
        self._warm = Worker(memory_limit_bytes=memory_limit_bytes)
        self._roots = _roots(folder)

    def start(self) -> None:
        """Begin to work; call it on the running loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    def get(self, job_id: str) -> Job | None:
        """A job by its id; None if it is unknown or was forgotten."""
        return self._jobs.get(job_id)

    def all(self) -> list[Job]:
        """All jobs remembered, oldest first."""
        return list(self._jobs.values())

    @property
    def full(self) -> bool:
        """True if no more job may wait."""
        return len(self._waiting) >= self._most_waiting

    def counts(self) -> tuple[int, int]:
        """Jobs waiting and running."""
        return len(self._waiting), int(self._running is not None)

    def submit(self, asked: Asked) -> Job:
        """Queue a job, whose files are here; they stay until it ends."""
        job = Job(asked.id or secrets.token_hex(16), asked)
        self._store.pin(asked.hashes())
        self._jobs[job.id] = job
        self._waiting.append(job)
        self._arrived.set()
        old = [j for j in self._jobs.values() if j.final]
        for forgotten in old[: max(0, len(self._jobs) - REMEMBERED)]:
            del self._jobs[forgotten.id]
        return job

    def view(self, job: Job) -> dict[str, Any]:
        """The job as JSON."""
        shown: dict[str, Any] = {"id": job.id, "kind": job.asked.kind, "state": job.state}
        if job.state == "queued":
            shown["position"] = self._waiting.index(job) + 1 if job in self._waiting else 1
        if job.total:
            shown |= {"done": job.done, "total": job.total}
        if job.result is not None:
            shown["result"] = job.result
        if job.error is not None:
            shown["error"] = job.error
        return shown

    async def cancel(self, job: Job) -> None:
        """End a job: at once if it waits, by killing its child if it runs."""
        if job in self._waiting:
            self._waiting.remove(job)
            self._end(job, "cancelled")
            for other in self._waiting:
                other.touch()
            return
        job.cancelling = True
        while job.state == "running":  # the child may just be starting, so once is not enough
            if job.worker is not None:
                job.worker.interrupt()
            await asyncio.sleep(_INTERRUPT_S)

    async def stop(self, patience_s: float) -> None:
        """Take nothing more, let the running job end for a while, then kill it."""
        for job in list(self._waiting):
            await self.cancel(job)
        running = self._running
        deadline = asyncio.get_running_loop().time() + patience_s
        while running is not None and not running.final and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(_INTERRUPT_S)
        if running is not None:
            await self.cancel(running)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        self._warm.close()
        self._pool.shutdown(wait=False)

    async def _run(self) -> None:
        while True:
            while not self._waiting:
                self._arrived.clear()
                try:
                    async with asyncio.timeout(_WARM_S if self._warm.pid is not None else None):
                        await self._arrived.wait()
                except TimeoutError:
                    self._warm.close()
            job = self._waiting.pop(0)
            job.state, self._running = "running", job
            for touched in (job, *self._waiting):
                touched.touch()
            try:
                await self._do(job)
            finally:
                self._running = None

    async def _do(self, job: Job) -> None:
        folder = self._folder / job.id
        loop = asyncio.get_running_loop()

        def progress(done: int, total: int) -> None:
            loop.call_soon_threadsafe(job.advance, done, total)

        state: State = "done"
        try:
            work = loop.run_in_executor(self._pool, self._execute, job, folder, progress)
            job.result = self._kept(await work, folder)
        except FeatherweightError as e:
            state, job.error = "failed", {"type": _public_type(e), "message": scrubbed(str(e), self._roots)}
        except asyncio.CancelledError:
            state = "cancelled"
            raise
        except Exception as e:
            _log.error("a job of kind %s failed: %s", job.asked.kind, type(e).__name__)
            words = scrubbed(f"the job failed: {type(e).__name__}: {e}", self._roots)
            state, job.error = "failed", {"type": "RunError", "message": words[:2000]}
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            if job.cancelling and state == "failed":
                state, job.error = "cancelled", None
            self._end(job, state)

    def _end(self, job: Job, state: State) -> None:
        self._store.unpin(job.asked.hashes())
        job.state, job.worker = state, None
        job.touch()

    def _kept(self, found: dict[str, Any], folder: Path) -> dict[str, Any]:
        """The result; outputs, which lie in the job's folder, become a file of the store."""
        if "outputs" in found:
            self._store.take(folder / "outputs.npz", found["outputs"], found["size_bytes"])
        return found

    def _execute(self, job: Job, folder: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
        """On the job's thread: lay out its files, run it in a child, give its result as JSON-able values."""
        asked = job.asked
        folder.mkdir(mode=0o700)
        models = {role: str(self._laid_out(files, folder / role)) for role, files in asked.models}
        feeds = []
        for number, sha256 in enumerate(asked.feeds):
            feeds.append(str(folder / f"{number}.npz"))
            _link(self._store.path(sha256), Path(feeds[-1]))
        doing = f"working on a job of kind {asked.kind}"
        if asked.kind == "outputs":
            job.worker, out = self._warm, folder / "outputs.npz"
            batches = self._warm.call(
                tasks.outputs, models["model"], feeds, str(out), asked.outputs, asked.threads, self._max_output_bytes,
                progress=progress, timeout_s=asked.timeout_s, doing=doing,
            )  # fmt: skip
            sha256, size = digest_of(out)
            return {"outputs": sha256, "size_bytes": size, "batches": batches}
        self._warm.close()  # what it holds would be missing where memory and time are measured
        with Worker(memory_limit_bytes=self._memory_limit_bytes, timeout_s=asked.timeout_s) as worker:
            job.worker = worker
            if asked.kind == "latency":
                pair = (models["original"], models["candidate"])
                found = worker.call(tasks.latency, *pair, feeds, asked.threads, asked.time_limit_s, doing=doing)
                return dataclasses.asdict(found)
            if asked.kind == "memory":
                return dataclasses.asdict(worker.call(tasks.memory, models["model"], feeds, asked.threads, doing=doing))
            name, value, n_samples = worker.call(
                tasks.score, models["model"], models.get("original"), feeds[0], asked.metric, asked.threads,
                progress=progress, doing=doing,
            )  # fmt: skip
            return {"metric": name, "value": value, "n_samples": n_samples}

    def _laid_out(self, model: ModelFiles, folder: Path) -> Path:
        folder.mkdir(mode=0o700)
        path = folder / "model.onnx"
        _link(self._store.path(model.file), path)
        for name, sha256 in model.beside:
            beside = folder / name
            beside.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            shutil.copyfile(self._store.path(sha256), beside)  # weights with a second name are refused as not their own
        return path


def _link(source: Path, target: Path) -> None:
    """The same bytes at another name, without a copy where the file system allows it."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _public_type(error: FeatherweightError) -> str:
    for kind in type(error).__mro__:
        if kind.__module__ == errors.__name__:
            return kind.__name__
    return "RunError"


def _roots(folder: Path) -> tuple[str, ...]:
    """Where this device keeps things; none of a stranger's business."""
    package = Path(featherweight.__file__).parent
    places = [folder, folder.parent, package, Path(sys.prefix), Path(tempfile.gettempdir())]
    with contextlib.suppress(RuntimeError):
        places.append(Path.home())
    named = {str(p) for p in [*places, *(p.resolve() for p in places)] if len(p.parts) > 1}
    return tuple(sorted(named, key=len, reverse=True))


def scrubbed(text: str, roots: Iterable[str]) -> str:
    """`text` without the device's folders: what is left of a path begins inside them."""
    for root in roots:
        text = re.sub(re.escape(root) + r"(?![\w.-])[/\\]*([0-9a-f]{32}[/\\])?", "", text)
    return text
