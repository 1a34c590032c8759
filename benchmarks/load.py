"""A closed loop of clients on keep-alive connections: each sends its next request when it has its answer."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Load:
    """What a closed loop measured; seconds of each request in `times`."""

    clients: int
    seconds: float
    times: tuple[float, ...]
    errors: int

    @property
    def per_second(self) -> float:
        """Answers a second, of all clients together."""
        return len(self.times) / self.seconds

    def quantile_ms(self, q: float) -> float:
        """A quantile of the requests' times."""
        return float(np.quantile(self.times, q)) * 1e3


def http_request(path: str, body: bytes, json_length: int | None) -> bytes:
    """The bytes of one POST."""
    extra = f"Inference-Header-Content-Length: {json_length}\r\n" if json_length is not None else ""
    return (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/octet-stream\r\n{extra}"
        f"Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def http_client(port: int, request: bytes) -> tuple[Callable[[], bool], Callable[[], None]]:
    """Functions: send the request and read the answer (True for 200), and close."""
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask() -> bool:
        connection.sendall(request)
        received = b""
        while b"\r\n\r\n" not in received:
            received += _more(connection)
        head, _, rest = received.partition(b"\r\n\r\n")
        length = next(
            int(v) for k, _, v in (h.partition(b":") for h in head.split(b"\r\n")) if k.lower() == b"content-length"
        )
        left = length - len(rest)
        while left > 0:
            left -= len(_more(connection))
        return head.startswith(b"HTTP/1.1 200")

    return ask, connection.close


def _more(connection: socket.socket) -> bytes:
    chunk = connection.recv(1 << 18)
    if not chunk:
        raise ConnectionError("the server closed the connection")
    return chunk


def closed_loop(
    make: Callable[[], tuple[Callable[[], bool], Callable[[], None]]], clients: int, seconds: float, most: int = 10**9
) -> Load:
    """Run `clients` for `seconds` (or `most` requests in all). The first request of each client is not counted."""
    times: list[list[float]] = [[] for _ in range(clients)]
    errors = [0] * clients
    ready, ended = threading.Barrier(clients + 1), threading.Event()

    def run(number: int) -> None:
        ask, close = make()
        ask()
        ready.wait()
        while not ended.is_set() and len(times[number]) < most // clients:
            started = time.perf_counter()
            good = ask()
            times[number].append(time.perf_counter() - started)
            errors[number] += not good
        close()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(clients)]
    for thread in threads:
        thread.start()
    ready.wait()
    started = time.perf_counter()
    if most == 10**9:
        ended.wait(seconds)
        ended.set()
        took = time.perf_counter() - started
    for thread in threads:
        thread.join()
    if most != 10**9:
        took = time.perf_counter() - started
    return Load(clients, took, tuple(t for one in times for t in one), sum(errors))
