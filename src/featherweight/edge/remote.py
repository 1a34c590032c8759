"""Measuring on another device: a `runtime.bench.Bench` whose models run under that device's `featherweight agent`.

Models and inputs go there once, named by their hash. Outputs come back and are scored here, with the same metrics as
ever; latency and memory are measured there.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from featherweight import errors
from featherweight.core import Interval, Note, Profile
from featherweight.edge import access
from featherweight.edge._link import Link, LinkError, Notice, quiet
from featherweight.edge.agent import API
from featherweight.edge.agent.tasks import read_batches, write_batches
from featherweight.errors import RemoteError, RunError
from featherweight.graph import io
from featherweight.quantities import format_bytes
from featherweight.runtime import evaluate as ev
from featherweight.runtime import targets
from featherweight.runtime.measure import LatencyResult, MemoryResult
from featherweight.runtime.metrics import Metric
from featherweight.runtime.outputs import Array
from featherweight.runtime.sandbox import Worker

__all__ = ["Access", "RemoteBench", "connect", "device_profile"]

TOKEN_VARIABLE = "FEATHERWEIGHT_AGENT_TOKEN"
PART_BYTES = 16 << 20
PART_BATCHES = 256
"""Inputs go in parts of about these sizes: a part and its outputs are what a device must have room for."""
_TRIES = 3
_SAID_ABOVE_BYTES = 1 << 20
ProgressCallback = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Access:
    """How to be let in: a token or the file with it (neither: the environment), and whose certificates to trust."""

    token: str | None = None
    token_file: Path | None = None
    ca: Path | None = None

    def secret(self) -> str | None:
        """The token, if there is one. Raises FeatherweightError if the file cannot be used."""
        if self.token is not None:
            return self.token
        if self.token_file is not None:
            return access.read_token(Path(self.token_file))
        return os.environ.get(TOKEN_VARIABLE) or None

    def __repr__(self) -> str:
        """Without the token."""
        return f"Access(token={'...' if self.token else None}, token_file={self.token_file}, ca={self.ca})"


def device_profile(url: str, *, token_file: Path | None = None, ca: Path | None = None) -> Profile:
    """The profile of the device whose agent answers at `url`. Raises RemoteError."""
    link = _link(url, Access(None, token_file, ca), quiet, None)
    try:
        return _profile(link)
    finally:
        link.close()


def connect(
    url: str,
    worker: Worker,
    *,
    let_in: Access | None = None,
    notice: Notice = quiet,
    patience_s: float | None = None,
) -> RemoteBench:
    """The bench of the agent at `url`; close it at the end.

    Args:
        url: `http://host:port` or `https://host:port`.
        worker: a child of this machine, which scores outputs.
        let_in: token and authorities; None: the token of the environment.
        notice: told in a few words when the agent is waited for.
        patience_s: how long a lost link is tried again; None: 15 s.

    Raises:
        RemoteError: nothing answers, or it is no agent, of another version, or refuses the token.
    """
    link = _link(url, let_in or Access(), notice, patience_s)
    try:
        _, about = link.ask("GET", "/v1/version")
        if not isinstance(about, dict) or about.get("api") != API:
            theirs = about.get("api") if isinstance(about, dict) else None
            raise RemoteError(
                f"the agent at {link.url} speaks version {theirs!r} of the interface, but this featherweight speaks "
                f"{API}; install the same featherweight on both"
            )
        return RemoteBench(link, worker, _profile(link), str(about.get("runtime", "")))
    except BaseException:
        link.close()
        raise


def _link(url: str, let_in: Access, notice: Notice, patience_s: float | None) -> Link:
    return Link(url, token=let_in.secret(), ca=let_in.ca, patience_s=patience_s, notice=notice)


def _profile(link: Link) -> Profile:
    _, raw = link.ask("GET", "/v1/profile")
    return targets.profile_from_json(json.dumps(raw), where=f"the profile of the agent at {link.url}")


class RemoteBench:
    """Measures on the device of an agent. See `connect`, and `runtime.bench.Bench` for the calls."""

    latency_from = "measured"

    def __init__(self, link: Link, worker: Worker, profile: Profile, runtime: str) -> None:
        """`profile` is the device's own."""
        self.host = f"{profile.name} (agent)"
        self.runtime = runtime
        self.profile: Profile | None = replace(profile, name=self.host)
        self._threads = profile.threads
        self._link, self._worker = link, worker
        self._folder = tempfile.TemporaryDirectory(prefix="featherweight-remote-")
        self._hashes: dict[tuple[str, int, int], str] = {}
        self._parts: dict[int, tuple[Any, list[_Part]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections and forget what was prepared for sending."""
        self._link.close()
        self._folder.cleanup()

    def notes(self) -> tuple[Note, ...]:
        """What a report should say about where it was measured."""
        from featherweight.runtime import ort

        found = [Note("target", f"measured on {self.host} at {self._link.url}, runtime {self.runtime}")]
        if self.runtime != ort.VERSION:
            found.append(Note("target", f"the device runs ONNX Runtime {self.runtime}, this machine {ort.VERSION}"))
        if not self._link.encrypted:
            found.append(
                Note("target", "the link is not encrypted: use https:// or an ssh tunnel outside trusted nets")
            )
        return tuple(found)

    def evaluate(
        self,
        path: str | Path,
        batches: Any,
        metric: Metric,
        *,
        reference: Path | None = None,
        record_to: Path | None = None,
        threads: int = 1,
        progress: ProgressCallback | None = None,
    ) -> ev.Evaluation:
        """Run the model there on all batches, part by part, and score its outputs here.

        Raises RunError, ChildCrashed (the model failed there), RemoteError, DataError.
        """
        parts = self._prepared(batches)
        names = None if metric.output is None else [metric.output]
        total = sum(len(part.counts) for part in parts)
        with tempfile.TemporaryDirectory(prefix="outputs-", dir=self._folder.name) as folder:
            recorded = Path(folder) / "recorded"
            ev.record_outputs(recorded, self._outputs(Path(path), parts, names, threads, Path(folder), total, progress))
            return ev.evaluate(recorded, batches, metric, reference=reference, record_to=record_to, worker=self._worker)

    def latency(
        self,
        original: str | Path,
        candidate: str | Path,
        feeds: Sequence[Mapping[str, Array]],
        *,
        threads: int = 1,
        time_limit_s: float = 20.0,
    ) -> LatencyResult:
        """Both models in turns there. Raises RunError, ChildCrashed, RemoteError."""
        (first, files), (second, more) = self._model(Path(original)), self._model(Path(candidate))
        data, sent = self._feeds(feeds)
        job = {
            "kind": "latency", "original": first, "candidate": second, "feeds": [data],
            "threads": threads, "time_limit_s": time_limit_s,
        }  # fmt: skip
        found = self._run(job, {**files, **more, **sent})
        interval = Interval(**found.pop("ratio_interval"))
        return LatencyResult(ratio_interval=interval, cpus=tuple(found.pop("cpus")), **found)

    def memory(self, path: str | Path, feeds: Mapping[str, Array]) -> MemoryResult:
        """Load and run there. Raises RunError, ChildCrashed, RemoteError."""
        model, files = self._model(Path(path))
        data, sent = self._feeds([feeds])
        return MemoryResult(**self._run({"kind": "memory", "model": model, "feeds": [data]}, {**files, **sent}))

    # -- what is sent --------------------------------------------------------------------------------------

    def _model(self, path: Path) -> tuple[dict[str, Any], dict[str, Path]]:
        """A model's description in a job, and its files by hash."""
        first, *beside = io.files(path)
        files = {self._hash(file): file for file in (first, *beside)}
        named = {file.relative_to(path.parent).as_posix(): self._hash(file) for file in beside}
        return {"file": self._hash(first), **({"beside": named} if named else {})}, files

    def _feeds(self, feeds: Sequence[Mapping[str, Array]]) -> tuple[str, dict[str, Path]]:
        """Inputs to measure with; the same ones give the same file."""
        path = Path(self._folder.name) / "feeds.npz"
        write_batches(path, feeds)
        sha256 = self._hash(path)
        kept = path.with_name(f"{sha256}.npz")
        path.replace(kept)
        return sha256, {sha256: kept}

    def _prepared(self, batches: Any) -> list[_Part]:
        """All batches of a dataset in files of moderate size, written once."""
        known = self._parts.get(id(batches))
        if known is not None:
            return known[1]
        parts = [self._written(number, part) for number, part in enumerate(_cut(batches))]
        self._parts[id(batches)] = (batches, parts)  # held, so that its id is not given to another
        return parts

    def _written(self, number: int, part: list[Any]) -> _Part:
        path = Path(self._folder.name) / f"part-{len(self._parts)}-{number}.npz"
        write_batches(path, [batch.feeds for batch in part])
        return _Part(path, self._hash(path), tuple(batch.n for batch in part))

    def _hash(self, file: Path) -> str:
        status = file.stat()
        key = (str(file), status.st_mtime_ns, status.st_size)
        if key not in self._hashes:
            with file.open("rb") as f:
                self._hashes[key] = hashlib.file_digest(f, "sha256").hexdigest()
        return self._hashes[key]

    # -- what is run ---------------------------------------------------------------------------------------

    def _outputs(
        self, path: Path, parts: list[_Part], names: list[str] | None, threads: int, folder: Path, total: int,
        progress: ProgressCallback | None,
    ) -> Iterator[tuple[Mapping[str, Array], int]]:  # fmt: skip
        """Outputs of every batch in order, with its number of samples."""
        model, files = self._model(path)
        before = 0
        for part in parts:
            job: dict[str, Any] = {
                "kind": "outputs", "model": model, "feeds": [part.sha256], "threads": min(threads, self._threads)
            }  # fmt: skip
            if names is not None:
                job["outputs"] = names

            def shown(done: int, _total: int, before: int = before) -> None:
                if progress is not None:
                    progress(before + done, total)

            found = self._run(job, {**files, part.sha256: part.path}, shown)
            shown(len(part.counts), total)  # the stream may have ended before it told of the last batches
            file = folder / "outputs.npz"
            self._link.fetch(f"/v1/files/{found['outputs']}", file)
            yield from zip(read_batches(file), part.counts, strict=True)
            before += len(part.counts)

    def _run(
        self, job: dict[str, Any], files: Mapping[str, Path], progress: ProgressCallback | None = None
    ) -> dict[str, Any]:
        """The result of a job. A restarted agent gets it again; raises what the job failed with, or RemoteError."""
        for _ in range(_TRIES):
            asked = {**job, "id": secrets.token_hex(16)}
            status, answer = self._link.ask("POST", "/v1/jobs", body=asked, ok=(200, 202, 409))
            if status == 409:
                self._send({sha256: files[sha256] for sha256 in answer.get("missing", ()) if sha256 in files})
                status, answer = self._link.ask("POST", "/v1/jobs", body=asked, ok=(200, 202, 409))
            if status == 409:
                continue  # files were evicted for another client's in between
            final = self._followed(asked["id"], progress)
            if final is not None:
                return self._outcome(final)
            self._link.notice(f"the agent at {self._link.url} was restarted; asking it again")
        raise RemoteError(
            f"the agent at {self._link.url} lost its job {_TRIES} times: it was restarted or its files were removed; "
            "look at its log, and give it a larger --quota or less memory to use (--max-memory)"
        )

    def _send(self, files: Mapping[str, Path]) -> None:
        for sha256, file in files.items():
            size = file.stat().st_size
            if size > _SAID_ABOVE_BYTES:
                self._link.notice(f"sending {format_bytes(size)} to {self.host}")
            self._link.send_file(f"/v1/files/{sha256}", file, size)

    def _followed(self, job_id: str, progress: ProgressCallback | None) -> dict[str, Any] | None:
        """The job once it has ended; None if the agent knows it no more. Interrupted, the job is cancelled."""
        try:
            return self._link.again(lambda: self._watched(job_id, progress))  # type: ignore[no-any-return]
        except BaseException:
            self._forget(job_id)
            raise

    def _watched(self, job_id: str, progress: ProgressCallback | None) -> dict[str, Any] | None:
        queued = done = 0
        for status, job in self._link.lines(f"/v1/jobs/{job_id}/events", ok=(200, 404)):
            if status == 404:
                return None
            if job["state"] in ("done", "failed", "cancelled"):
                found: dict[str, Any] = job
                return found
            if job.get("position", 0) != queued:
                queued = job.get("position", 0)
                if queued:
                    self._link.notice(f"waiting for {queued} other jobs on {self.host}")
            if progress is not None and job.get("done", 0) > done:
                done = job["done"]
                progress(done, job["total"])
        raise LinkError("the stream of a job ended before the job")

    def _forget(self, job_id: str) -> None:
        """Nobody waits for this job any more; a device that is gone need not hear it."""
        self._link.once("POST", f"/v1/jobs/{job_id}/cancel")

    def _outcome(self, job: dict[str, Any]) -> dict[str, Any]:
        if job["state"] == "done":
            result: dict[str, Any] = job["result"]
            return result
        if job["state"] == "cancelled":
            raise RemoteError(f"the job on {self.host} was cancelled there: the agent is stopping, or someone ended it")
        error = job.get("error", {})
        kind = getattr(errors, str(error.get("type")), RunError)
        if not (isinstance(kind, type) and issubclass(kind, errors.FeatherweightError)):
            kind = RunError
        raise kind(f"on {self.host}: {error.get('message', 'the job failed')}")


@dataclass(frozen=True, slots=True)
class _Part:
    """Some consecutive batches in one file."""

    path: Path
    sha256: str
    counts: tuple[int, ...]


def _cut(batches: Any) -> Iterator[list[Any]]:
    """Runs of consecutive batches of about PART_BYTES, of PART_BATCHES at most."""
    part: list[Any] = []
    held = 0
    for batch in batches.batches():
        part.append(batch)
        held += sum(np.asarray(a).nbytes for a in batch.feeds.values())
        if held >= PART_BYTES or len(part) >= PART_BATCHES:
            yield part
            part, held = [], 0
    if part:
        yield part
