"""A client's connection to an agent: what may go wrong on a network, told in words with the way out.

A request that fails on its way is sent again for a while, as each can be repeated: files are named by their hash,
jobs by an id the client chose. Redirects are not followed, because the token is for one address only.
"""

from __future__ import annotations

import contextlib
import json
import ssl
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from featherweight.edge import access
from featherweight.errors import MissingExtraError, RemoteError

try:
    import urllib3
    from urllib3 import exceptions as u3
except ImportError as e:
    raise MissingExtraError("measuring on another device needs 'urllib3'; install featherweight[edge]") from e

CONNECT_S = 5.0
READ_S = 30.0  # an agent says something every 5 s while a job runs
PATIENCE_S = 15.0
BUSY_S = 1800.0
_FIRST_PAUSE_S = 0.2
_BLOCK = 1 << 18
Notice = Callable[[str], None]
LinkError = u3.HTTPError
"""What `Link.lines` raises when the link is lost; `Link.again` asks again."""


def quiet(text: str) -> None:
    """The Notice that tells nobody."""


class Link:
    """Requests to one agent. Every failure is a RemoteError."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None,
        ca: Path | None = None,
        patience_s: float | None = None,
        busy_s: float | None = None,
        notice: Notice = quiet,
    ) -> None:
        """`patience_s`: how long a lost link may stay lost. `busy_s`: how long a full agent is waited for.

        None takes PATIENCE_S and BUSY_S.
        """
        parts = _checked(url)
        self.url = f"{parts.scheme}://{parts.netloc}"
        self.encrypted = parts.scheme == "https" or access.is_loopback(parts.hostname or "")
        self._prefix = parts.path.rstrip("/")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}
        self._has_token = token is not None
        self._patience_s = PATIENCE_S if patience_s is None else patience_s
        self._busy_s = BUSY_S if busy_s is None else busy_s
        self.notice = notice
        timeout = urllib3.Timeout(connect=CONNECT_S, read=READ_S)
        tls: dict[str, Any] = {"ssl_context": access.client_tls(ca)} if parts.scheme == "https" else {}
        self._pool = urllib3.PoolManager(maxsize=2, timeout=timeout, retries=False, blocksize=_BLOCK, **tls)

    def ask(self, method: str, path: str, *, body: Any = None, ok: tuple[int, ...] = (200,)) -> tuple[int, Any]:
        """Status and JSON of a request with a JSON body or none; other statuses than `ok` are RemoteErrors."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data is not None else {}

        def send() -> tuple[int, Any]:
            with self._open(method, path, ok, body=data, headers=headers) as answer:
                return answer.status, _json(self.url, answer.data) if answer.data else None

        found: tuple[int, Any] = self._kept_up(send)
        return found

    def once(self, method: str, path: str) -> None:
        """One request without a body, never repeated, of which nobody awaits the outcome: a lost link is no error."""
        with contextlib.suppress(u3.HTTPError):
            answer = self._pool.request(
                method, f"{self.url}{self._prefix}{path}", headers=self._headers, redirect=False, timeout=2.0
            )
            answer.close()

    def send_file(self, path: str, file: Path, size_bytes: int) -> None:
        """Stream a file's bytes with PUT."""

        def send() -> None:
            with file.open("rb") as f, self._open(
                "PUT", path, (200, 201), body=f,
                headers={"Content-Length": str(size_bytes), "Content-Type": "application/octet-stream"},
            ) as answer:  # fmt: skip
                answer.read()

        self._kept_up(send)

    def fetch(self, path: str, file: Path) -> None:
        """Stream the bytes of an answer into a file."""

        def receive() -> None:
            with self._open("GET", path, (200,)) as answer, file.open("wb") as f:
                for block in answer.stream(_BLOCK):
                    f.write(block)
                expected = answer.headers.get("Content-Length")
                if expected is not None and f.tell() != int(expected):
                    raise u3.ProtocolError(f"{f.tell()} of {expected} bytes came")

        self._kept_up(receive)

    def lines(self, path: str, *, ok: tuple[int, ...] = (200,)) -> Iterator[tuple[int, Any]]:
        """Status and JSON line by line of a streamed answer. A lost link ends it with u3.HTTPError: ask again."""
        with self._open("GET", path, ok) as answer:
            rest = b""
            for block in answer.stream(_BLOCK, decode_content=False):
                *lines, rest = (rest + block).split(b"\n")
                for line in lines:
                    yield answer.status, _json(self.url, line)
            if rest:
                yield answer.status, _json(self.url, rest)

    def again(self, action: Callable[[], Any]) -> Any:
        """Run something that raises u3.HTTPError on a lost link, again while there is patience."""
        return self._kept_up(action)

    def close(self) -> None:
        """Close the connections."""
        self._pool.clear()

    def _kept_up(self, action: Callable[[], Any]) -> Any:
        """Repeat on a lost link (for `patience_s`) and a busy agent (for `busy_s`)."""
        pause, lost_since, busy_since = _FIRST_PAUSE_S, 0.0, 0.0
        while True:
            try:
                return action()
            except Busy as e:
                lost_since, now = 0.0, time.monotonic()
                busy_since = busy_since or now
                if now - busy_since > self._busy_s:
                    raise RemoteError(
                        f"the agent at {self.url} was busy for {self._busy_s:g} s ({e}); try again later, or start it "
                        "with a larger --queue"
                    ) from None
                self.notice(f"the agent at {self.url} is busy ({e}); waiting")
                time.sleep(e.after_s)
            except u3.HTTPError as e:
                fault = _fatal(self.url, e)
                if fault is not None:
                    raise RemoteError(fault) from e
                now = time.monotonic()
                lost_since = lost_since or now
                if now - lost_since + pause > self._patience_s:
                    raise RemoteError(_lost(self.url, e, self._patience_s)) from e
                time.sleep(pause)
                pause = min(2 * pause, 2.0)

    def _open(self, method: str, path: str, ok: tuple[int, ...], **kw: Any) -> _Closing:
        """An answer of one of the statuses `ok`, its body not yet read. Raises RemoteError, Busy, u3.HTTPError."""
        headers = {**self._headers, "Accept-Encoding": "identity", **kw.pop("headers", {})}
        answer = self._pool.request(
            method, f"{self.url}{self._prefix}{path}", headers=headers, redirect=False, preload_content=False, **kw
        )
        if answer.status in ok:
            return _Closing(answer)
        with _Closing(answer):
            words = _error_words(answer)
        if answer.status == 503:
            raise Busy(words or "503", answer.headers.get("Retry-After"))
        raise RemoteError(self._refusal(answer.status, words))

    def _refusal(self, status: int, words: str) -> str:
        if status == 401:
            found = "does not accept this token" if self._has_token else "wants a token"
            return (
                f"the agent at {self.url} {found}; give the one it was started with by --target-token-file FILE "
                "or in FEATHERWEIGHT_AGENT_TOKEN"
            )
        if not words:
            return f"what answers at {self.url} is not a featherweight agent (status {status}); check host and port"
        way_out = {
            413: "; start the agent with a larger --max-file",
            507: "; start the agent with a larger --quota, or on a larger disk",
        }.get(status, "")
        return f"the agent at {self.url} answered {status}: {words}{way_out}"


class Busy(Exception):
    """The agent answered 503."""

    def __init__(self, words: str, retry_after: str | None) -> None:
        """`retry_after` is the header's text."""
        super().__init__(words)
        self.after_s = min(30.0, float(retry_after)) if retry_after and retry_after.isdigit() else 1.0


class _Closing:
    """Gives the connection back at the end of a block: to the pool if the answer was read, else closed."""

    def __init__(self, answer: urllib3.BaseHTTPResponse) -> None:
        self._answer = answer

    def __enter__(self) -> urllib3.BaseHTTPResponse:
        return self._answer

    def __exit__(self, *_: object) -> None:
        self._answer.close()
        self._answer.release_conn()


def _checked(url: str) -> Any:
    try:
        parts = urlsplit(url.strip())
        port = parts.port
    except ValueError as e:
        raise RemoteError(f"an agent's address must be like http://raspberrypi:8765, but {e}") from e
    del port
    if parts.username or parts.password:
        raise RemoteError("an agent's address must not hold credentials; give the token by --target-token-file FILE")
    if not parts.hostname or parts.query or parts.fragment:
        raise RemoteError(f"an agent's address must be like http://raspberrypi:8765, but got {url[:200]!r}")
    return parts._replace(scheme=parts.scheme.lower())


def _json(url: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        raise RemoteError(f"what answers at {url} is not a featherweight agent; check host and port") from None


def _error_words(answer: urllib3.BaseHTTPResponse) -> str:
    """The agent's own words; '' if it was not an agent that answered."""
    try:
        raw = json.loads(answer.read(1 << 16) or b"{}")
    except (ValueError, u3.HTTPError):
        return ""
    words = raw.get("error") if isinstance(raw, dict) else None
    return words[:1000] if isinstance(words, str) else ""


def _fatal(url: str, error: u3.HTTPError) -> str | None:
    """Words for what no waiting helps; None for what may pass."""
    cause = _cause(error)
    if isinstance(cause, ssl.SSLCertVerificationError):
        return (
            f"the certificate of {url} is not trusted ({cause.verify_message}); give the authority's certificate "
            "by --target-ca FILE, or the name the certificate is for"
        )
    if isinstance(cause, ssl.SSLError) and "WRONG_VERSION_NUMBER" in str(cause):
        return f"what answers at {url} does not speak TLS; use http:// if the agent was started without --tls-cert"
    if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return f"no secure connection to {url}: {cause.reason or cause}; check --target-ca and the agent's certificate"
    if isinstance(error, u3.NameResolutionError):
        return f"the host of {url} is not known; check the name, or use its address"
    if isinstance(error, u3.LocationParseError):
        return f"{url} is not an address; use http://HOST:PORT"
    return None


def _cause(error: BaseException) -> BaseException:
    """The innermost reason that urllib3 wraps."""
    for _ in range(8):
        inner = getattr(error, "reason", None)
        if not isinstance(inner, BaseException):
            inner = next((a for a in error.args if isinstance(a, BaseException)), None) or error.__cause__
        if inner is None or isinstance(error, ssl.SSLError):
            return error
        error = inner
    return error


def _lost(url: str, error: u3.HTTPError, patience_s: float) -> str:
    cause = _cause(error)
    if isinstance(error, u3.NewConnectionError) or isinstance(cause, ConnectionRefusedError):
        what = f"no agent answers at {url} ({getattr(cause, 'strerror', None) or 'no connection'})"
        return f"{what}; start one there with `featherweight agent`, or check the address, firewall or ssh tunnel"
    if isinstance(error, u3.ConnectTimeoutError):
        return f"no agent answers at {url} within {CONNECT_S:g} s; check the address, firewall or ssh tunnel"
    hint = ", or use https:// if the agent has a certificate" if url.startswith("http://") else ""
    return (
        f"the link to {url} was lost ({type(cause).__name__}) and not back after {patience_s:g} s; "
        f"check that the agent runs{hint}"
    )
