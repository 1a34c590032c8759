"""Connections to a server of the Open Inference Protocol: metadata, health, inference. Nothing is sent twice."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from featherweight.edge.access import client_tls, is_loopback
from featherweight.edge.protocol import (
    LENGTH_HEADER,
    Array,
    Packed,
    ProtocolError,
    Spec,
    json_tensor,
    pack,
    read_message,
    read_specs,
    split_body,
    unpack,
    write_message,
)
from featherweight.errors import FeatherweightError, MissingExtraError

try:
    import urllib3
    from urllib3.exceptions import ConnectTimeoutError, HTTPError, NewConnectionError, SSLError
    from urllib3.exceptions import TimeoutError as LinkTimeout
except ImportError as e:
    raise MissingExtraError("a client of a server needs the package 'urllib3'; install featherweight[edge]") from e

MAX_ANSWER_BYTES = 256 << 20
_KINDS = {429: "busy", 503: "busy", 400: "rejected", 413: "rejected", 422: "rejected"}


class LinkError(FeatherweightError):
    """A request to the server has no answer.

    `kind`: 'connect' (nothing was sent), 'lost' (sent, then broken), 'timeout', 'busy' (503, 429), 'rejected' (400,
    413, 422: this request is wrong), 'refused' (another status), 'protocol' (an answer that is none).
    """

    def __init__(self, kind: str, message: str) -> None:
        """As the attributes."""
        super().__init__(message)
        self.kind = kind


@dataclass(frozen=True, slots=True)
class Metadata:
    """What the server says about itself and one model."""

    inputs: tuple[Spec, ...]
    outputs: tuple[Spec, ...]
    extensions: frozenset[str]


@dataclass(frozen=True, slots=True)
class Reply:
    """Outputs of one inference, and the bytes of its bodies."""

    outputs: dict[str, Array]
    sent_bytes: int
    received_bytes: int


def read_url(url: str) -> tuple[str, str | None]:
    """Base URL, and the model's name if the URL ends in /v2/models/NAME. Raises FeatherweightError for no http URL."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or parts.username:
        shown = f"{parts.scheme}://{parts.hostname or ''}"  # the rest may hold a secret
        raise FeatherweightError(
            f"a server must be given like https://host:8000, without name, password or query, but got {shown!r}"
        )
    path, _, rest = parts.path.partition("/v2/models/")
    path = path.rstrip("/").removesuffix("/v2")
    return f"{parts.scheme}://{parts.netloc}{path}", rest.partition("/")[0] or None


class Connection:
    """A thread-safe pool of connections to one server.

    Args:
        base: URL before /v2.
        token: bearer token, sent over TLS or loopback only (unless `plain_token`).
        ca: PEM file of the authorities to trust; None: the system's.
        size: connections kept.
        plain_token: allow the token to cross a network unencrypted.
    """

    def __init__(
        self, base: str, *, token: str | None = None, ca: Path | None = None, size: int = 8, plain_token: bool = False
    ) -> None:
        parts = urlsplit(base)
        if token is not None and parts.scheme == "http" and not plain_token and not is_loopback(parts.hostname or ""):
            raise FeatherweightError(f"a token must not be sent unencrypted, but {base} is not https; use https")
        self._base = base
        self._headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        context = client_tls(ca) if parts.scheme == "https" else None
        self._pool = urllib3.PoolManager(1, maxsize=size, retries=False, ssl_context=context)

    def close(self) -> None:
        """Close every idle connection; later requests open new ones (old ones may hang on a link that was down)."""
        self._pool.clear()

    def ready(self, timeout_s: float) -> None:
        """Ask for the server's health. Raises LinkError."""
        self._ask("GET", "/v2/health/ready", None, {}, timeout_s)

    def metadata(self, model: str, timeout_s: float) -> Metadata:
        """What the server says of `model`. Raises LinkError."""
        end = time.monotonic() + timeout_s
        server = self._json("/v2", timeout_s)
        found = self._json(f"/v2/models/{quote(model, safe='')}", max(end - time.monotonic(), 0.01))
        extensions = server.get("extensions")
        names = frozenset(map(str, extensions)) if isinstance(extensions, list) else frozenset()
        try:
            return Metadata(
                read_specs(found.get("inputs"), "inputs"), read_specs(found.get("outputs"), "outputs"), names
            )
        except ProtocolError as e:
            raise LinkError("protocol", f"the server's metadata of model {model!r} is wrong: {e}") from e

    def infer(
        self, model: str, feeds: Mapping[str, Array | Packed], *, outputs: Sequence[str], timeout_s: float, binary: bool
    ) -> Reply:
        """Run `model` there. `binary` sends and asks for raw tensors. Raises LinkError; nothing is repeated."""
        asked = [{"name": name, **({"parameters": {"binary_data": True}} if binary else {})} for name in outputs]
        tensors: list[Packed | Mapping[str, Any]] = []
        for name, value in feeds.items():
            if isinstance(value, Packed):
                tensors.append(value)
            else:
                tensors.append(pack(name, value) if binary else json_tensor(name, value))
        identity = secrets.token_hex(8)  # optional in the protocol, but KServe's server fails without one
        body, length = write_message({"id": identity, "outputs": asked}, "inputs", tensors)
        headers = {"Content-Type": "application/json" if length is None else "application/octet-stream"}
        if length is not None:
            headers[LENGTH_HEADER] = str(length)
        path = f"/v2/models/{quote(model, safe='')}/infer"
        received, json_length = self._ask("POST", path, body, headers, timeout_s)
        try:
            header, raw = split_body(received, json_length)
            message = read_message(header, raw, "outputs")
            found = {given.name: unpack(given) for given in message.tensors}
        except (ProtocolError, ValueError, RecursionError) as e:
            raise LinkError("protocol", f"the answer of model {model!r} is wrong: {e}") from e
        if message.header.get("id", identity) != identity:
            raise LinkError("protocol", f"the answer of model {model!r} belongs to another request")
        missing = sorted(set(outputs) - found.keys())
        if missing:
            raise LinkError(
                "protocol", f"the answer of model {model!r} must have {sorted(outputs)}; missing: {missing}"
            )
        return Reply({name: found[name] for name in outputs}, len(body), len(received))

    def _json(self, path: str, timeout_s: float) -> dict[str, Any]:
        body, _ = self._ask("GET", path, None, {}, timeout_s)
        try:
            found = json.loads(body)
        except (ValueError, RecursionError) as e:
            raise LinkError("protocol", f"the answer to {path} is not JSON") from e
        if not isinstance(found, dict):
            raise LinkError("protocol", f"the answer to {path} is not a JSON object")
        return found

    def _ask(
        self, method: str, path: str, body: bytes | None, headers: Mapping[str, str], timeout_s: float
    ) -> tuple[bytes, str | None]:
        """Body and JSON length of a 200 answer. Each wait ends at the deadline; the bytes of an answer are bounded."""
        end = time.monotonic() + timeout_s
        timeout = urllib3.Timeout(connect=timeout_s, read=timeout_s)
        try:
            response = self._pool.request(
                method, self._base + path, body=body, headers={**self._headers, **headers}, timeout=timeout,
                preload_content=False, redirect=False, decode_content=False,
            )  # fmt: skip
            try:
                received = _read(response, end)
            except BaseException:
                response.close()  # what is still to come must not be taken for the answer to the next request
                raise
            response.release_conn()
        except (NewConnectionError, ConnectTimeoutError, SSLError) as e:
            raise LinkError("connect", f"cannot connect to {self._base}: {_reason(e)}") from e
        except LinkTimeout as e:
            raise LinkError("timeout", f"no answer from {self._base} within {timeout_s:.3g} s") from e
        except (HTTPError, OSError) as e:
            raise LinkError("lost", f"the connection to {self._base} broke: {_reason(e)}") from e
        if response.status != 200:
            kind = _KINDS.get(response.status, "refused")
            said = received[:200].decode("utf-8", "replace")
            raise LinkError(kind, f"{self._base}{path} answered {response.status}: {said}")
        return received, response.headers.get(LENGTH_HEADER)


def _read(response: urllib3.BaseHTTPResponse, end: float) -> bytes:
    """The body. Raises LinkError past `end` or beyond the limit of bytes."""
    parts, size = [], 0
    while chunk := response.read(1 << 16):
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_ANSWER_BYTES:
            raise LinkError("protocol", f"an answer must have at most {MAX_ANSWER_BYTES} bytes, but it has more")
        if time.monotonic() > end:
            raise LinkError("timeout", "the answer did not arrive in time")
    return b"".join(parts)


def _reason(e: BaseException) -> str:
    return str(e).rpartition(": ")[2][:160] or type(e).__name__
