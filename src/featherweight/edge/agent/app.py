"""The agent's HTTP interface: files in and out by hash, jobs, and what the device is. Described by openapi.json."""

from __future__ import annotations

import asyncio
import contextlib
import json
import shutil
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

import featherweight
from featherweight.core import Profile
from featherweight.edge import http
from featherweight.edge.agent import API
from featherweight.edge.agent.jobs import Job, Jobs
from featherweight.edge.agent.requests import read_job
from featherweight.edge.agent.store import (
    KEPT_FREE_BYTES,
    SHA256,
    Incoming,
    Store,
    StoreFullError,
    TooLargeError,
    WrongHashError,
)
from featherweight.edge.http import RequestError, json_answer
from featherweight.errors import OutputError
from featherweight.runtime import targets

__all__ = ["Route", "Service", "Settings", "make_app", "openapi"]

OPEN_PATHS = ("/v1/health", "/openapi.json")
_BLOCK = 1 << 20  # bytes hashed and written at a time
_BEAT_S = 5.0  # a stream of events says at least so often that it lives
_QUIET_S = 0.1  # and at most so often what changed
_MAX_JSON = 1 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What an agent may use of its device."""

    work: Path
    profile: Profile
    runtime: str
    quota_bytes: int = 8 << 30
    max_file_bytes: int = 4 << 30
    kept_free_bytes: int = KEPT_FREE_BYTES
    max_seconds: float = 1800.0
    most_waiting: int = 16
    memory_limit_bytes: int | None = None
    uploads: int = 4
    streams: int = 32
    idle_s: float = 30.0
    """Longest silence in the middle of an upload or a download."""
    least_bytes_per_s: int = 16 << 10
    """Slower uploads are ended, so that a few cannot occupy the agent for ever."""
    patience_s: float = 20.0
    """How long the running job may go on when the agent is told to stop."""


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path and every status it may answer with."""

    method: str
    path: str
    handler: Handler
    statuses: tuple[int, ...]


class Service:
    """The handlers and what they work on."""

    def __init__(self, settings: Settings) -> None:
        """Recover the work folder. Raises OutputError if it cannot be used."""
        self.settings = settings
        self.store = Store(
            settings.work, quota_bytes=settings.quota_bytes, max_file_bytes=settings.max_file_bytes,
            kept_free_bytes=settings.kept_free_bytes,
        )  # fmt: skip
        most_output = min(settings.max_file_bytes, settings.quota_bytes // 2)
        try:
            self.jobs = Jobs(
                self.store, settings.work / "jobs", most_waiting=settings.most_waiting,
                memory_limit_bytes=settings.memory_limit_bytes, max_output_bytes=most_output,
            )  # fmt: skip
        except OSError as e:
            raise OutputError(f"the work folder {settings.work} cannot be used: {e.strerror or e}") from e
        self._uploads = 0
        self._streams = 0
        self._document = _described(settings)

    def routes(self) -> tuple[Route, ...]:
        """Every route; statuses that the shared checks give (401, 500) included."""
        common = (401, 500)
        return (
            Route("GET", "/openapi.json", self.description, (200,)),
            Route("GET", "/v1/health", self.health, (200, 503)),
            Route("GET", "/v1/version", self.version, (200, *common)),
            Route("GET", "/v1/profile", self.profile, (200, *common)),
            Route("GET", "/v1/status", self.status, (200, *common)),
            Route("HEAD", "/v1/files/{sha256}", self.file_head, (200, 404, *common)),
            Route("GET", "/v1/files/{sha256}", self.file_get, (200, 404, 503, *common)),
            Route("PUT", "/v1/files/{sha256}", self.file_put, (200, 201, 400, 408, 413, 415, 422, 503, 507, *common)),
            Route("DELETE", "/v1/files/{sha256}", self.file_delete, (204, 404, 409, *common)),
            Route("GET", "/v1/jobs", self.job_list, (200, *common)),
            Route("POST", "/v1/jobs", self.job_post, (200, 202, 400, 408, 409, 413, 415, 422, 503, *common)),
            Route("GET", "/v1/jobs/{id}", self.job_get, (200, 404, *common)),
            Route("GET", "/v1/jobs/{id}/events", self.job_events, (200, 404, 503, *common)),
            Route("POST", "/v1/jobs/{id}/cancel", self.job_cancel, (200, 404, 409, *common)),
        )

    # -- about the agent -----------------------------------------------------------------------------------

    async def description(self, _request: web.Request) -> web.StreamResponse:
        """The OpenAPI document."""
        return json_answer(self._document)

    async def health(self, request: web.Request) -> web.StreamResponse:
        """Open to everybody, so it says nothing but this."""
        if http.state(request.app).draining:
            raise RequestError(503, "the agent is stopping")
        return json_answer({"status": "ok"})

    async def version(self, _request: web.Request) -> web.StreamResponse:
        """What a client must know before anything else."""
        named = {"name": self.settings.profile.name, "version": featherweight.__version__}
        return json_answer({"api": API, **named, "runtime": self.settings.runtime})

    async def profile(self, _request: web.Request) -> web.StreamResponse:
        """The device, in the form of a profile file."""
        return json_answer(json.loads(targets.to_json(self.settings.profile)))

    async def status(self, _request: web.Request) -> web.StreamResponse:
        """How full the agent is and what it takes."""
        waiting, running = self.jobs.counts()
        return json_answer(
            {
                "waiting": waiting,
                "running": running,
                "most_waiting": self.settings.most_waiting,
                "files": len(self.store),
                "used_bytes": self.store.used_bytes,
                "quota_bytes": self.settings.quota_bytes,
                "max_file_bytes": self.settings.max_file_bytes,
                "max_seconds": self.settings.max_seconds,
            }
        )

    # -- files ---------------------------------------------------------------------------------------------

    def _kept(self, request: web.Request) -> tuple[str, int]:
        sha256 = request.match_info["sha256"]
        size = self.store.size(sha256) if SHA256.fullmatch(sha256) else None
        if size is None:
            raise RequestError(404, "the agent has no file of this hash")
        return sha256, size

    async def file_head(self, request: web.Request) -> web.StreamResponse:
        """Whether a file is here."""
        _, size = self._kept(request)
        return web.Response(headers={"Content-Length": str(size), "Content-Type": "application/octet-stream"})

    async def file_get(self, request: web.Request) -> web.StreamResponse:
        """The bytes of a file, in blocks that must be taken in time."""
        sha256, size = self._kept(request)
        self._stream_begins()
        try:
            with self.store.path(sha256).open("rb") as f:
                answer = web.StreamResponse(headers={"Content-Type": "application/octet-stream", **_plain_headers()})
                answer.content_length = size
                await answer.prepare(request)
                with contextlib.suppress(ConnectionError):  # a client that has gone needs no answer
                    while block := await asyncio.to_thread(f.read, _BLOCK):
                        await self._write(request, answer, block)
            return answer
        finally:
            self._streams -= 1

    async def file_put(self, request: web.Request) -> web.StreamResponse:
        """Take a file: streamed to disk, bounded in bytes and time, kept only if it has the hash in its address."""
        sha256 = request.match_info["sha256"]
        if not SHA256.fullmatch(sha256):
            raise RequestError(422, "a file's address must end in its SHA-256 in 64 lower-case hexadecimal digits")
        if request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise RequestError(415, "a file is sent as it is, without Content-Encoding", headers=_closing())
        size = self.store.size(sha256)
        if size is not None:
            return json_answer({"sha256": sha256, "size_bytes": size}, headers=_closing())
        if self._uploads >= self.settings.uploads or http.state(request.app).draining:
            raise RequestError.busy("the agent takes no more uploads now; ask again later")
        self._uploads += 1
        try:
            arriving = self.store.incoming(request.content_length)
            try:
                await self._receive(request, arriving)
                arriving.finish(sha256)
            finally:
                arriving.abort()
        except TooLargeError as e:
            raise RequestError(413, str(e), headers=_closing()) from None
        except StoreFullError as e:
            raise RequestError(507, str(e), headers=_closing()) from None
        except WrongHashError as e:
            raise RequestError(422, str(e)) from None
        finally:
            self._uploads -= 1
        return json_answer({"sha256": sha256, "size_bytes": arriving.size_bytes}, status=201)

    async def _receive(self, request: web.Request, arriving: Incoming) -> None:
        """Move the body to disk block by block. Raises RequestError: 400 cut off, 408 too slow."""
        loop = asyncio.get_running_loop()
        started, held, total = loop.time(), bytearray(), 0
        try:
            while True:
                async with asyncio.timeout(self.settings.idle_s):
                    chunk = await request.content.readany()
                total += len(chunk)
                held += chunk
                if len(held) >= _BLOCK or (held and not chunk):
                    arriving.reserve(total)
                    await asyncio.to_thread(arriving.write, bytes(held))
                    held.clear()
                if not chunk:
                    break
                if loop.time() - started > self.settings.idle_s + total / self.settings.least_bytes_per_s:
                    raise TimeoutError
        except TimeoutError:
            raise RequestError(
                408,
                f"an upload must bring something every {self.settings.idle_s:g} s and "
                f"{self.settings.least_bytes_per_s} bytes a second on average",
                headers=_closing(),
            ) from None
        except (web.RequestPayloadError, aiohttp.ClientError, ConnectionError, EOFError) as e:
            raise RequestError(400, f"the body was cut off ({type(e).__name__})", headers=_closing()) from None
        if request.content_length is not None and total != request.content_length:
            raise RequestError(400, "the body was cut off", headers=_closing())
        await asyncio.to_thread(arriving.settle)

    async def file_delete(self, request: web.Request) -> web.StreamResponse:
        """Forget a file that no job needs."""
        sha256, _ = self._kept(request)
        if self.store.pinned(sha256):
            raise RequestError(409, "a job that waits or runs needs this file; cancel it first")
        self.store.remove(sha256)
        return web.Response(status=204)

    # -- jobs ----------------------------------------------------------------------------------------------

    def _job(self, request: web.Request) -> Job:
        job = self.jobs.get(request.match_info["id"])
        if job is None:
            raise RequestError(404, "the agent knows no job of this id; it may have been restarted since")
        return job

    async def job_list(self, _request: web.Request) -> web.StreamResponse:
        """All jobs remembered."""
        return json_answer({"jobs": [self.jobs.view(job) for job in self.jobs.all()]})

    async def job_post(self, request: web.Request) -> web.StreamResponse:
        """Queue a job; asked again under the same id, it is the same job."""
        if request.content_type != "application/json":
            raise RequestError(415, "a job is described in JSON; set Content-Type: application/json")
        raw = http.parse_json(await http.read_body(request))
        asked = read_job(raw, max_seconds=self.settings.max_seconds)
        if asked.threads > self.settings.profile.threads:
            most = self.settings.profile.threads
            raise RequestError(422, f"threads must be at most {most} on this device, but is {asked.threads}")
        before = self.jobs.get(asked.id) if asked.id else None
        if before is not None:
            if before.asked != asked:
                raise RequestError(409, "another job has this id; choose a new one")
            return json_answer(self.jobs.view(before))
        missing = self.store.missing(asked.hashes())
        if missing:
            return json_answer(
                {"error": f"{len(missing)} files of this job are not here; send them first", "missing": missing},
                status=409,
            )
        if http.state(request.app).draining:
            raise RequestError.busy("the agent is stopping")
        if self.jobs.full:
            raise RequestError.busy(f"{self.settings.most_waiting} jobs wait already; ask again later", 5)
        return json_answer(self.jobs.view(self.jobs.submit(asked)), status=202)

    async def job_get(self, request: web.Request) -> web.StreamResponse:
        """One job as it is now."""
        return json_answer(self.jobs.view(self._job(request)))

    async def job_events(self, request: web.Request) -> web.StreamResponse:
        """The job as JSON, a line for every change, until one line says how it ended."""
        job = self._job(request)
        self._stream_begins()
        try:
            answer = web.StreamResponse(headers={"Content-Type": "application/x-ndjson", **_plain_headers()})
            await answer.prepare(request)
            with contextlib.suppress(ConnectionError):
                await self._follow(request, answer, job)
            return answer
        finally:
            self._streams -= 1

    async def _follow(self, request: web.Request, answer: web.StreamResponse, job: Job) -> None:
        while True:
            changed, final = job.changed, job.final
            line = json.dumps(self.jobs.view(job), allow_nan=False, separators=(",", ":"))
            await self._write(request, answer, line.encode() + b"\n")
            if final:
                return
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_BEAT_S):
                    await changed.wait()
                await asyncio.sleep(_QUIET_S)

    async def job_cancel(self, request: web.Request) -> web.StreamResponse:
        """End a job; one that has ended stays as it is."""
        job = self._job(request)
        if job.final:
            raise RequestError(409, f"the job has ended already: {job.state}")
        await self.jobs.cancel(job)
        return json_answer(self.jobs.view(job))

    # -- plumbing ------------------------------------------------------------------------------------------

    def _stream_begins(self) -> None:
        if self._streams >= self.settings.streams:
            raise RequestError.busy("the agent answers as many streams as it may; ask again later")
        self._streams += 1

    async def _write(self, request: web.Request, answer: web.StreamResponse, data: bytes) -> None:
        """Send one block; whoever does not take it in time is dropped."""
        try:
            async with asyncio.timeout(self.settings.idle_s):
                await answer.write(data)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("the client does not read") from None

    async def started(self, _app: web.Application) -> None:
        """Begin to work."""
        self.jobs.start()

    async def stopped(self, _app: web.Application) -> None:
        """End what runs and leave the work folder tidy."""
        await self.jobs.stop(self.settings.patience_s)
        shutil.rmtree(self.settings.work / "jobs", ignore_errors=True)


def make_app(service: Service, *, token: str, idle_s: float = 60.0) -> web.Application:
    """The application. Every route but health and the description needs the token."""
    limits = http.Limits(body_bytes=_MAX_JSON, held_bytes=32 * _MAX_JSON, body_s=service.settings.idle_s, idle_s=idle_s)
    app = http.application(token=token, limits=limits, open_paths=OPEN_PATHS)
    for route in service.routes():
        app.router.add_route(route.method, route.path, route.handler)
    app.on_startup.append(service.started)
    app.on_shutdown.append(service.stopped)
    return app


def openapi() -> str:
    """Text of the OpenAPI 3.1 document."""
    return (resources.files("featherweight.edge.agent") / "openapi.json").read_text(encoding="utf-8")


def _described(settings: Settings) -> dict[str, Any]:
    """The document with the limits of this agent in it."""
    document: dict[str, Any] = json.loads(openapi())
    for name in ("OutputsJob", "LatencyJob", "MemoryJob", "ScoreJob"):
        fields = document["components"]["schemas"][name]["properties"]
        fields["threads"]["maximum"] = settings.profile.threads
        for seconds in ("timeout_s", "time_limit_s"):
            if seconds in fields:
                fields[seconds]["maximum"] = settings.max_seconds
    return document


def _closing() -> dict[str, str]:
    return {"Connection": "close"}


def _plain_headers() -> dict[str, str]:
    return {"X-Content-Type-Options": "nosniff", "Cache-Control": "no-store", "Server": "featherweight"}
