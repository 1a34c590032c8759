"""What every HTTP service here shares: who may ask, how much, for how long, and how it ends.

Built on aiohttp. A service is an `aiohttp.web.Application` made by `application`; it answers errors as
`{"error": "..."}`, compares its token in constant time, bounds each body in bytes and seconds, and finishes what it
has begun when told to stop. Nothing secret is logged: neither headers nor query strings nor bodies.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import signal
import ssl
import time
import zlib
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from featherweight.edge.access import is_loopback
from featherweight.errors import FeatherweightError, MissingExtraError

try:
    from aiohttp import web
except ImportError as e:
    raise MissingExtraError("an HTTP service needs the package 'aiohttp'; install featherweight[edge]") from e

Answer = web.StreamResponse
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_RETRY_AFTER_S = 1
_DRAIN_POLL_S = 0.02
_log = logging.getLogger("featherweight.http")
# The library logs each malformed request with a traceback; strangers must not be able to fill a disk with them.
_library_log = logging.getLogger("featherweight.http.wire")
_library_log.setLevel(logging.CRITICAL)


class RequestError(FeatherweightError):
    """A request that is answered with an error status. The message goes to the client: never put a secret in it."""

    def __init__(self, status: int, message: str, *, headers: dict[str, str] | None = None) -> None:
        """`status` is an HTTP status of 400 or more."""
        super().__init__(message)
        self.status = status
        self.headers = headers or {}

    @classmethod
    def busy(cls, message: str, retry_after_s: int = _RETRY_AFTER_S) -> RequestError:
        """503 with the seconds after which asking again makes sense."""
        return cls(503, message, headers={"Retry-After": str(retry_after_s)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What one request, and all of them together, may take."""

    body_bytes: int = 64 << 20
    """Of one body, after decompression."""
    held_bytes: int = 512 << 20
    """Of all bodies being read or worked on at once; more are answered 503."""
    body_s: float = 30.0
    """For a body to arrive."""
    answer_s: float = 60.0
    """For an answer to be taken by the client."""
    idle_s: float = 60.0
    """For a connection to bring its next request line and headers."""
    header_bytes: int = 8190
    """Of one header line; there may be 100 of them."""


@dataclass(slots=True)
class State:
    """What changes while a service runs."""

    token: bytes | None
    open_paths: frozenset[str]
    limits: Limits
    hosts: frozenset[str] | None
    draining: bool = False
    active: int = 0
    """Requests begun and not yet answered."""
    held_bytes: int = 0
    held: dict[int, int] = field(default_factory=dict)
    """Bytes held by each request, by its id()."""
    on_answer: list[Callable[[web.Request, int, float], None]] = field(default_factory=list)
    """Called after each request with its status and seconds."""


_STATE: web.AppKey[State] = web.AppKey("featherweight_state", State)


def application(
    *,
    token: str | None,
    limits: Limits | None = None,
    open_paths: Iterable[str] = (),
    hosts: Iterable[str] | None = None,
) -> web.Application:
    """An application with the checks of this module around every route.

    Args:
        token: bearer token each request must carry; None asks for none, and then refuses requests from web pages.
        limits: None takes the defaults.
        open_paths: exact paths that answer without the token, such as health checks.
        hosts: names the Host header may have when there is no token; None: loopback names only.
    """
    kept = limits or Limits()
    app = web.Application(middlewares=[_errors, _access], client_max_size=kept.body_bytes)
    allowed = None if token is not None else frozenset(hosts if hosts is not None else ("localhost",))
    app[_STATE] = State(None if token is None else token.encode(), frozenset(open_paths), kept, allowed)
    return app


def state(app: web.Application) -> State:
    """The running state of an application made by `application`."""
    return app[_STATE]


def log_access(app: web.Application, logger: logging.Logger) -> None:
    """Log one line a request at INFO: address, method, path, status, milliseconds. No header, query or body."""

    def tell(request: web.Request, status: int, seconds: float) -> None:
        logger.info("%s %s %r %d %.1f ms", request.remote, request.method, request.path[:200], status, 1e3 * seconds)

    app[_STATE].on_answer.append(tell)


def parse_json(body: bytes) -> Any:
    """The JSON value in `body`. Raises RequestError(400) for anything JSON does not allow, NaN and depth included."""

    def refuse(word: str) -> Any:
        raise RequestError(400, f"JSON has no number {word}; send such values as binary tensor data")

    try:
        return json.loads(body.decode("utf-8"), parse_constant=refuse)
    except RecursionError:
        raise RequestError(400, "the JSON is nested too deeply") from None
    except UnicodeDecodeError as e:
        raise RequestError(400, f"the JSON must be UTF-8, but it is not at byte {e.start}") from None
    except ValueError as e:
        raise RequestError(400, f"the body is not JSON: {str(e)[:200]}") from None


def json_answer(value: Any, *, status: int = 200, headers: dict[str, str] | None = None) -> web.Response:
    """A JSON response. `value` must hold finite numbers only."""
    body = json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    return web.Response(body=body, status=status, content_type="application/json", headers=headers)


async def read_body(request: web.Request) -> bytes:
    """The whole body, decompressed (gzip or deflate), within the limits of bytes and seconds.

    Raises RequestError: 400 truncated or corrupt, 408 too slow, 413 too large, 415 another encoding, 503 when all
    bodies together exceed what is held at once.
    """
    limits = request.app[_STATE].limits
    length = request.content_length
    if length is not None and length > limits.body_bytes:
        raise _too_large(limits)
    expand = _decompressor(request.headers.get("Content-Encoding", "identity"), limits)
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(limits.body_s):
            async for chunk in request.content.iter_any():
                part = expand(chunk)
                hold(request, len(part))
                parts.append(part)
    except TimeoutError:
        raise RequestError(
            408, f"the body must arrive within {limits.body_s:g} s", headers={"Connection": "close"}
        ) from None
    except (web.RequestPayloadError, ConnectionError, zlib.error) as e:
        raise RequestError(400, f"the body is cut off or corrupt ({type(e).__name__})") from None
    parts.append(expand(b""))
    return b"".join(parts)


def hold(request: web.Request, size: int) -> None:
    """Count bytes held for this request until it is answered. Raises RequestError when it, or all, hold too many."""
    now = request.app[_STATE]
    held = now.held.get(id(request), 0) + size
    if held > now.limits.body_bytes:
        raise _too_large(now.limits)
    if now.held_bytes + size > now.limits.held_bytes:
        raise RequestError.busy("the server holds as much data as it may; ask again later")
    now.held[id(request)] = held
    now.held_bytes += size


def _too_large(limits: Limits) -> RequestError:
    return RequestError(413, f"a body must have at most {limits.body_bytes} bytes", headers={"Connection": "close"})


def _decompressor(encoding: str, limits: Limits) -> Callable[[bytes], bytes]:
    """A function over chunks; an empty one ends the stream. It never makes more bytes than a body may have."""
    name = encoding.strip().lower()
    if name in ("", "identity"):
        return lambda chunk: chunk
    if name not in ("gzip", "deflate"):
        raise RequestError(415, f"Content-Encoding must be gzip, deflate or identity, but got {name[:40]!r}")
    stream = zlib.decompressobj(wbits=31 if name == "gzip" else 15)

    def expand(chunk: bytes) -> bytes:
        if not chunk and not stream.eof:
            raise RequestError(400, "the compressed body is cut off")
        found = stream.decompress(chunk, limits.body_bytes + 1) if chunk else b""
        if stream.unconsumed_tail:
            raise _too_large(limits)
        return found

    return expand


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every failure becomes an error JSON; what a handler did not foresee says nothing of the server's inside."""
    now = request.app[_STATE]
    started = time.perf_counter()
    now.active += 1
    try:
        response = await _answered(request, handler)
        _release(request, now)
        _harden(response, now)
        await _send(request, response, now.limits)
        seconds = time.perf_counter() - started
        for tell in now.on_answer:
            tell(request, response.status, seconds)
    finally:
        _release(request, now)
        now.active -= 1
    return response


def _release(request: web.Request, now: State) -> None:
    now.held_bytes -= now.held.pop(id(request), 0)


async def _answered(request: web.Request, handler: Handler) -> web.StreamResponse:
    """The response of the handler, or the one that its exception means."""
    try:
        return await handler(request)
    except RequestError as e:
        return json_answer({"error": str(e)}, status=e.status, headers=e.headers)
    except web.HTTPException as e:
        text = {404: "there is nothing at this path", 405: "this path does not take this method"}
        kept = {k: v for k, v in e.headers.items() if k == "Allow"}
        return json_answer({"error": text.get(e.status, e.reason)}, status=e.status, headers=kept)
    except Exception:
        _log.exception("a request to %r failed", request.path[:200])
        return json_answer({"error": "the server failed to answer this request"}, status=500)


def _harden(response: web.StreamResponse, now: State) -> None:
    if response.prepared:
        return
    response.headers.setdefault("X-Content-Type-Options", "nosniff")
    response.headers.setdefault("Cache-Control", "no-store")
    response.headers["Server"] = "featherweight"
    if response.headers.get("Connection") == "close" or now.draining:
        response.force_close()


async def _send(request: web.Request, response: web.StreamResponse, limits: Limits) -> None:
    """Write the answer here, so that a client that does not read is dropped after a while."""
    try:
        async with asyncio.timeout(limits.answer_s):
            await response.prepare(request)
            await response.write_eof()
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()
    except ConnectionError:
        pass  # the client has gone; there is nobody to tell


@web.middleware
async def _access(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Who may ask: the bearer of the token; without one, only programs here, not web pages in a browser."""
    now = request.app[_STATE]
    if now.token is None:
        _refuse_web_pages(request, now)
    elif request.path not in now.open_paths:
        scheme, _, given = request.headers.get("Authorization", "").partition(" ")
        matches = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), now.token)
        if scheme.lower() != "bearer" or not matches:
            raise RequestError(401, "this path needs the header Authorization: Bearer <token>", headers={
                "WWW-Authenticate": "Bearer", "Connection": "close",
            })  # fmt: skip
    return await handler(request)


def _refuse_web_pages(request: web.Request, now: State) -> None:
    """A page of any site can send requests to loopback, and rebind its own name to it; both show in headers."""
    if "Origin" in request.headers or request.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
        raise RequestError(403, "requests from web pages are refused while the server has no token")
    host = request.headers.get("Host", "localhost")
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
    if not is_loopback(name) and name not in (now.hosts or ()):
        raise RequestError(403, "the Host header must be a loopback name while the server has no token")


async def start(
    app: web.Application, host: str, port: int, *, tls: ssl.SSLContext | None = None
) -> tuple[web.AppRunner, int]:
    """Listen; the runner and the port really used (`port` 0 takes a free one). `drain` ends it.

    Raises FeatherweightError if the address cannot be had.
    """
    limits = app[_STATE].limits
    runner = web.AppRunner(
        app, access_log=None, keepalive_timeout=limits.idle_s, lingering_time=2.0, auto_decompress=False,
        max_line_size=limits.header_bytes, max_field_size=limits.header_bytes, max_headers=100,
        shutdown_timeout=1.0, handle_signals=False, logger=_library_log,
    )  # fmt: skip
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
    except OSError as e:
        await runner.cleanup()
        raise FeatherweightError(f"cannot listen on {host}:{port}: {e.strerror or e}; give another --port") from e
    return runner, int(runner.addresses[0][1])


async def run_until_stopped(
    app: web.Application,
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    drain_s: float = 30.0,
    on_ready: Callable[[int], None],
) -> None:
    """Serve until SIGTERM or SIGINT, then refuse new work, finish what was begun (at most `drain_s`), and return.

    `on_ready` gets the port once it is open.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    runner, real_port = await start(app, host, port, tls=tls)
    try:
        on_ready(real_port)
        await stop.wait()
    finally:
        await drain(runner, drain_s)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.remove_signal_handler(number)


async def drain(runner: web.AppRunner, drain_s: float) -> None:
    """Take no new connections, let requests in progress end (at most `drain_s`), then close everything.

    Here and not in the library's cleanup, which stops reading bodies that are still arriving.
    """
    now = runner.app[_STATE]
    now.draining = True
    for site in list(runner.sites):
        await site.stop()
    end = time.monotonic() + drain_s
    await runner.shutdown()  # the app's on_shutdown: called again by cleanup, so it must bear being called twice
    while now.active and time.monotonic() < end:
        await asyncio.sleep(_DRAIN_POLL_S)
    await runner.cleanup()
