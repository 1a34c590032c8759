"""An agent running in this process, requests to it, and what its children are made to do. Importable by children."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import hashlib
import http.client
import io
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from featherweight.core import Profile
from featherweight.edge import http as edge_http
from featherweight.edge.agent.app import Service, Settings, make_app

TOKEN = "token-of-the-tests-0123456789"
PROFILE = Profile("device", "x86_64", 2, 4 << 30, False)


class Agent:
    """A running agent. `seen` gets (method, route, status) of every answer."""

    def __init__(self, service: Service, port: int, log: io.StringIO) -> None:
        self.service, self.port, self.log = service, port, log
        self.url = f"http://127.0.0.1:{port}"
        self.seen: list[tuple[str, str, int]] = []

    def ask(
        self, method: str, path: str, body: Any = None, *, token: str | None = TOKEN,
        headers: dict[str, str] | None = None,
    ) -> tuple[int, Any]:  # fmt: skip
        """Status and JSON (or bytes) of one request; a dict or list is sent as JSON."""
        sent = dict(headers or {})
        if token is not None:
            sent.setdefault("Authorization", f"Bearer {token}")
        if isinstance(body, dict | list):
            body = json.dumps(body).encode()
            sent.setdefault("Content-Type", "application/json")
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=sent)
            answer = connection.getresponse()
            raw = answer.read()
            if "json" in answer.headers.get("Content-Type", "") and "ndjson" not in answer.headers["Content-Type"]:
                return answer.status, json.loads(raw or b"null")
            return answer.status, raw

    def put(self, data: bytes) -> str:
        """Upload; the hash."""
        name = hashlib.sha256(data).hexdigest()
        status, answer = self.ask("PUT", f"/v1/files/{name}", data)
        assert status in (200, 201), answer
        return name

    def run(self, job: dict[str, Any], seconds: float = 60.0) -> dict[str, Any]:
        """Queue a job and wait for its end."""
        status, answer = self.ask("POST", "/v1/jobs", job)
        assert status == 202, answer
        return self.until(answer["id"], ("done", "failed", "cancelled"), seconds)

    def until(self, job_id: str, states: tuple[str, ...], seconds: float = 60.0) -> dict[str, Any]:
        """The job once it is in one of these states."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            _, job = self.ask("GET", f"/v1/jobs/{job_id}")
            if job["state"] in states:
                return job
            time.sleep(0.02)
        raise AssertionError(f"the job is still {job}")

    def raw(self, data: bytes, *, end: bool = False) -> bytes:
        """What comes back for these bytes on a fresh connection; `end` half-closes after them."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=20) as s:
            with contextlib.suppress(ConnectionError):
                s.sendall(data)
                if end:
                    s.shutdown(socket.SHUT_WR)
            found = b""
            with contextlib.suppress(ConnectionError):
                while block := s.recv(65536):
                    found += block
            return found

    def alive(self) -> bool:
        """Whether it still answers."""
        return self.ask("GET", "/v1/health")[0] == 200


@contextlib.contextmanager
def running(work: Path, *, token: str = TOKEN, port: int = 0, tls: Any = None, **settings: Any) -> Iterator[Agent]:
    """An agent in a thread of this process; everything it logs is in `log`."""
    log = io.StringIO()
    watcher = logging.StreamHandler(log)
    logging.getLogger("featherweight").addHandler(watcher)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def begin() -> tuple[Agent, Any]:
        kept = {"patience_s": 0.0, "idle_s": 5.0, "kept_free_bytes": 0, **settings}
        service = Service(Settings(work=work, profile=PROFILE, runtime="1.0.test", **kept))
        app = make_app(service, token=token)
        agent = Agent(service, 0, log)
        edge_http.state(app).on_answer.append(
            lambda request, status, _seconds: agent.seen.append(_route(request, status))
        )
        runner, agent.port = await edge_http.start(app, "127.0.0.1", port, tls=tls)
        agent.url = f"{'https' if tls else 'http'}://127.0.0.1:{agent.port}"
        return agent, runner

    agent, runner = asyncio.run_coroutine_threadsafe(begin(), loop).result(20)
    try:
        yield agent
    finally:
        asyncio.run_coroutine_threadsafe(edge_http.drain(runner, 2.0), loop).result(20)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(5)
        loop.close()
        logging.getLogger("featherweight").removeHandler(watcher)


def _route(request: Any, status: int) -> tuple[str, str, int]:
    resource = request.match_info.route.resource
    return request.method, resource.canonical if resource is not None else request.path, status


def model(seed: int = 0, *, wide: int = 4, name: str = "y") -> bytes:
    """`name` = relu(x @ w), x (n, 4)."""
    w = np.random.default_rng(seed).normal(size=(4, wide)).astype(np.float32)
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], [name])]
    return _bytes(nodes, [numpy_helper.from_array(w, "w")], ("n", 4), (name, ("n", wide)))


def endless() -> bytes:
    """A loop of 2^62 rounds."""
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["go"], ["goes"]),
            helper.make_node("Add", ["h", "one"], ["more"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("h", TensorProto.FLOAT, ["n", 4]),
        ],
        [
            helper.make_tensor_value_info("goes", TensorProto.BOOL, []),
            helper.make_tensor_value_info("more", TensorProto.FLOAT, ["n", 4]),
        ],
    )
    stored = [
        numpy_helper.from_array(np.array(2**62, np.int64), "rounds"),
        numpy_helper.from_array(np.array(True), "yes"),
        numpy_helper.from_array(np.ones(4, np.float32), "one"),
    ]
    return _bytes(
        [helper.make_node("Loop", ["rounds", "yes", "x"], ["y"], body=body)], stored, ("n", 4), ("y", ("n", 4))
    )


def greedy(count: int = 2**40) -> bytes:
    """Small on disk; when run it asks for 16 bytes times `count`."""
    stored = [numpy_helper.from_array(np.array([count, 1], np.int64), "repeats")]
    return _bytes([helper.make_node("Tile", ["x", "repeats"], ["y"])], stored, ("n", 4), ("y", ("m", 4)))


def pointing_at(location: str, length: int = 64) -> bytes:
    """A model whose weight lies in another file."""
    from onnx import ModelProto

    proto = ModelProto.FromString(model())
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value
    return proto.SerializeToString()


def _bytes(nodes: Any, stored: Any, shape: Any, out: Any) -> bytes:
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(out[0], TensorProto.FLOAT, out[1])],
        stored,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()


def feeds(batches: int = 2, rows: int = 3, **other: Any) -> bytes:
    """An archive of inputs."""
    rng = np.random.default_rng(1)
    held = io.BytesIO()
    arrays = {f"{i:06d}::x": rng.normal(size=(rows, 4)).astype(np.float32) for i in range(batches)}
    np.savez(held, **{**arrays, **other})
    return held.getvalue()


# -- what children do in place of a task -------------------------------------------------------------------


def crashes(*args: Any) -> None:
    ctypes.string_at(0)


def hangs(*args: Any) -> None:
    time.sleep(600)


def fills_memory(*args: Any) -> None:
    kept = []
    while len(kept) < 4096:
        kept.append(np.ones(16 << 20, np.uint8))


def tells_where_it_is(model: str, *args: Any) -> None:
    raise ValueError(f"cannot open {model} nor {Path.home() / 'secret'}")
