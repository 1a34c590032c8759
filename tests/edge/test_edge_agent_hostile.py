"""Whatever is sent, and whatever a model does: a clear refusal or a failed job, the agent alive, nothing leaked."""

from __future__ import annotations

import hashlib
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp")

import agent_helpers
from agent_helpers import TOKEN, Agent, feeds, model, running

from featherweight.edge.agent import jobs

HEAD = f"Host: a\r\nAuthorization: Bearer {TOKEN}\r\n"
NO_HASH = "0" * 64


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    work = tmp_path_factory.mktemp("agent")
    limits: dict[str, Any] = {"max_file_bytes": 1 << 20, "quota_bytes": 2 << 20, "most_waiting": 2, "uploads": 3}
    with running(work, idle_s=1.0, least_bytes_per_s=1 << 40, max_seconds=30.0, **limits) as found:
        yield found
        assert found.alive()
        said = found.log.getvalue()
        assert TOKEN not in said
        assert str(work) not in said
        assert not list((work / "arriving").iterdir())
        assert not list((work / "jobs").iterdir())


@pytest.fixture(autouse=True)
def alive(agent: Agent) -> Iterator[None]:
    yield
    assert agent.alive()
    assert agent.service._uploads == agent.service._streams == 0


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def put(length: str, body: bytes, name: str = NO_HASH) -> bytes:
    return f"PUT /v1/files/{name} HTTP/1.1\r\n{HEAD}{length}\r\n\r\n".encode() + body


# -- bodies ------------------------------------------------------------------------------------------------


def test_an_upload_over_the_limit_is_refused_by_its_length(agent: Agent) -> None:
    status, answer = agent.ask("PUT", f"/v1/files/{NO_HASH}", b"x" * ((1 << 20) + 1))
    assert (status, "1048576" in answer["error"]) == (413, True)


def test_a_chunked_body_without_end_is_cut_at_the_limit(agent: Agent) -> None:
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    assert status_of(agent.raw(put("Transfer-Encoding: chunked", chunk * 64))) == 413
    assert agent.service.store.used_bytes <= 2 << 20


def test_wrong_bytes_are_refused(agent: Agent) -> None:
    status, answer = agent.ask("PUT", f"/v1/files/{NO_HASH}", b"other bytes")
    assert (status, hashlib.sha256(b"other bytes").hexdigest() in answer["error"]) == (422, True)
    assert agent.ask("HEAD", f"/v1/files/{NO_HASH}")[0] == 404


def test_a_body_cut_short_leaves_nothing(agent: Agent) -> None:
    before = agent.service.store.used_bytes
    agent.raw(put("Content-Length: 1000", b"x" * 10), end=True)
    agent.raw(put("Transfer-Encoding: chunked", b"ff\r\nxx"), end=True)
    for _ in range(100):
        if agent.service._uploads == 0:
            break
        time.sleep(0.02)
    assert agent.service.store.used_bytes == before


def test_slow_clients_are_sent_away(agent: Agent) -> None:
    assert status_of(agent.raw(put("Content-Length: 1000", b"x" * 10))) == 408  # then silence
    with socket.create_connection(("127.0.0.1", agent.port), timeout=20) as s:
        s.sendall(put("Content-Length: 1000", b""))
        drips = threading.Event()

        def drip() -> None:
            while not drips.wait(0.2):
                try:
                    s.sendall(b"x")
                except OSError:
                    return

        thread = threading.Thread(target=drip)
        thread.start()
        answer = s.recv(65536)
        drips.set()
        thread.join()
    assert status_of(answer) == 408


def test_too_many_uploads_at_once_get_503(agent: Agent) -> None:
    opened = [socket.create_connection(("127.0.0.1", agent.port)) for _ in range(3)]
    for s in opened:
        s.sendall(put("Content-Length: 1000", b"x"))
    for _ in range(200):
        if agent.service._uploads == 3:
            break
        time.sleep(0.01)
    data = b"one more"
    status, _ = agent.ask("PUT", f"/v1/files/{hashlib.sha256(data).hexdigest()}", data)
    for s in opened:
        s.close()
    assert status == 503
    for _ in range(200):
        if agent.service._uploads == 0:
            break
        time.sleep(0.02)
    agent.put(data)


def test_a_full_quota_evicts_what_is_not_needed_and_else_says_507(agent: Agent) -> None:
    names = [agent.put(bytes([i]) * 900_000) for i in range(3)]
    assert agent.ask("HEAD", f"/v1/files/{names[0]}")[0] == 404
    agent.service.store.pin(names[1:])
    data = b"n" * 900_000
    status, answer = agent.ask("PUT", f"/v1/files/{hashlib.sha256(data).hexdigest()}", data)
    agent.service.store.unpin(names[1:])
    assert (status, "2.10 MB" in answer["error"]) == (507, True)


def test_a_body_in_another_encoding_is_refused(agent: Agent) -> None:
    assert agent.ask("PUT", f"/v1/files/{NO_HASH}", b"x", headers={"Content-Encoding": "gzip"})[0] == 415


@pytest.mark.parametrize(
    "path",
    [
        "/v1/files/../../etc/passwd", "/v1/files/%2e%2e%2f%2e%2e%2fetc%2fpasswd", "/v1/files/..%5c..%5cx",
        f"/v1/files/{NO_HASH}/../../x", "/v1/files/", "/v1/files/%00", f"/v1/files/{NO_HASH.upper()}x",
        "/v1/files/lock", "/v1/jobs/../files/x", "/v1/files/" + "a" * 4000, "//v1/version/..", "/v1/files/%f0%28%8c%28",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_path_tricks_find_nothing(agent: Agent, method: str, path: str) -> None:
    before = sorted(agent.service.settings.work.rglob("*"))
    answer = agent.raw(f"{method} {path} HTTP/1.1\r\n{HEAD}Content-Length: 0\r\nConnection: close\r\n\r\n".encode())
    assert 400 <= status_of(answer) < 500
    assert b"root:" not in answer
    assert str(agent.service.settings.work).encode() not in answer
    assert sorted(agent.service.settings.work.rglob("*")) == before


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 1000 + b"\r\n", b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/jobs HTTP/1.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)  # fmt: skip
def test_what_is_no_request_ends_the_connection(agent: Agent, data: bytes) -> None:
    answer = agent.raw(data, end=True)
    assert answer == b"" or 400 <= status_of(answer) < 500


# -- jobs ------------------------------------------------------------------------------------------------


def test_a_full_queue_says_503_and_jobs_can_be_cancelled(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.tasks, "memory", agent_helpers.hangs)
    job = {"kind": "memory", "model": {"file": agent.put(model())}, "feeds": [agent.put(feeds())]}
    first = agent.ask("POST", "/v1/jobs", job)[1]
    agent.until(first["id"], ("running",))
    waiting = [agent.ask("POST", "/v1/jobs", job)[1] for _ in range(2)]
    assert [w["position"] for w in waiting] == [1, 2]
    status, answer = agent.ask("POST", "/v1/jobs", job)
    assert (status, "2 jobs wait" in answer["error"]) == (503, True)
    assert agent.ask("DELETE", f"/v1/files/{job['feeds'][0]}")[0] == 409
    assert agent.ask("POST", f"/v1/jobs/{waiting[0]['id']}/cancel")[1]["state"] == "cancelled"
    assert agent.ask("GET", f"/v1/jobs/{waiting[1]['id']}")[1]["position"] == 1
    assert agent.ask("POST", f"/v1/jobs/{first['id']}/cancel")[1]["state"] == "cancelled"
    agent.until(waiting[1]["id"], ("running",))
    time.sleep(0.5)  # the child is there, and what it does cannot be interrupted politely
    assert agent.ask("POST", f"/v1/jobs/{waiting[1]['id']}/cancel")[1]["state"] == "cancelled"
    assert agent.ask("DELETE", f"/v1/files/{job['feeds'][0]}")[0] == 204


def test_a_client_that_does_not_read_is_dropped(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    name = agent.put(np.random.default_rng(0).bytes(1 << 20))
    with socket.create_connection(("127.0.0.1", agent.port)) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        for _ in range(16):
            s.sendall(f"GET /v1/files/{name} HTTP/1.1\r\n{HEAD}\r\n".encode())
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            try:
                s.sendall(b"\r\n")
            except OSError:
                break
            time.sleep(0.05)
        else:
            pytest.fail("the connection is still open")
