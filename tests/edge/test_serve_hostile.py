"""What strangers send: every request gets a clear 4xx, the server stays alive, and nothing of its inside leaks."""

from __future__ import annotations

import gzip
import json
import socket
import struct
import zlib

import numpy as np
import pytest

pytest.importorskip("aiohttp")

import serving
from onnx import helper
from serving import FLOAT, INT64, image, save, tensor, weights

from featherweight.edge import http as blocks
from featherweight.edge import protocol, wire

TOKEN = "0123456789abcdef-token"
GOOD = {"inputs": [tensor("image", image())]}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    nodes = [helper.make_node("Gather", ["table", "x"], ["y"])]
    table = save(
        folder / "table.onnx", nodes, [("x", INT64, ["n", "k"])], [("y", FLOAT, ["n", "k"])], {"table": weights(5)}
    )
    nodes = [helper.make_node("Log", ["x"], ["y"])]
    log = save(folder / "log.onnx", nodes, [("x", FLOAT, ["n"])], [("y", FLOAT, ["n"])])
    limits = blocks.Limits(body_bytes=100_000, body_s=0.15, idle_s=0.15)
    with serving.serving([serving.whole(folder), table, log], token=TOKEN, limits=limits) as running:
        yield running


def alive(server):
    return server.infer("whole", GOOD)[0] == 200


def wrong(**changes):
    return {"inputs": [{**GOOD["inputs"][0], **changes}]}


REQUESTS = {
    "no inputs": {},
    "empty inputs": {"inputs": []},
    "inputs no list": {"inputs": {"a": 1}},
    "a list": [1, 2],
    "null": None,
    "two of one": {"inputs": GOOD["inputs"] * 2},
    "unknown input": wrong(name="other"),
    "one too many": {"inputs": [*GOOD["inputs"], tensor("more", np.zeros(1))]},
    "wrong type": wrong(datatype="FP64"),
    "wrong rank": wrong(shape=[1, 192]),
    "wrong axis": wrong(shape=[1, 3, 4, 16]),
    "no rows": wrong(shape=[0, 3, 8, 8], data=[]),
    "negative": wrong(shape=[-1, 3, 8, 8]),
    "huge axis": wrong(shape=[10**12, 3, 8, 8]),
    "more than declared": wrong(data=[0.5] * 193),
    "less than declared": wrong(data=[0.5] * 191),
    "texts": wrong(data=["0"] * 192),
    "no such output": {**GOOD, "outputs": [{"name": "other"}]},
    "output twice": {**GOOD, "outputs": [{"name": "logits"}] * 2},
    "outputs no list": {**GOOD, "outputs": "logits"},
    "classification": {**GOOD, "outputs": [{"name": "logits", "parameters": {"classification": 2}}]},
    "id a number": {**GOOD, "id": 7},
    "id long": {**GOOD, "id": "x" * 300},
    "parameters a list": {**GOOD, "parameters": []},
    "binary without bytes": wrong(data=None, parameters={"binary_data_size": 768}),
    "packed as JSON": wrong(parameters={wire.EXTENSION: "int8"}),
    "packed as nothing": wrong(parameters={wire.EXTENSION: 5}),
}  # fmt: skip


@pytest.mark.parametrize("name", list(REQUESTS))
def test_wrong_requests_are_400_with_the_law(server, name):
    status, answer = server.infer("whole", REQUESTS[name])
    assert status == 400
    assert 10 < len(answer["error"]) < 600
    assert alive(server)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"\xff\xfe", b"[" * 90_000, b'{"a":' * 15_000, b'{"inputs": NaN}', b'{"inputs": [Infinity]}',
        b"9" * 5000,
        json.dumps(GOOD).encode()[:-20], json.dumps(GOOD).replace("0.", "NaN, 0.", 1).encode(), b'"\\ud800"',
    ],
)  # fmt: skip
def test_bodies_that_are_no_json_are_400(server, body):
    status, _, answer = server.ask("POST", "/v2/models/whole/infer", body)
    assert status == 400
    assert json.loads(answer)["error"]
    assert alive(server)


def test_values_beyond_a_type_are_refused(server):
    assert server.infer("whole", wrong(data=[1e300] * 192))[0] == 400
    given = {"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [2**63]}
    assert server.infer("table", {"inputs": [given]})[0] == 400


def test_values_the_model_refuses_are_400_without_paths_of_the_server(server):
    given = {"name": "x", "datatype": "INT64", "shape": [1, 1], "data": [99]}
    status, answer = server.infer("table", {"inputs": [given]})
    assert status == 400
    assert "/" not in answer["error"].replace("[E:onnxruntime", "").replace("Gather/", "")


def test_an_axis_longer_than_allowed_is_refused_before_it_is_read(server):
    given = {"name": "x", "datatype": "INT64", "shape": [1, 5000], "data": [0] * 5000}
    assert server.infer("table", {"inputs": [given]})[0] == 400


def test_an_answer_json_cannot_carry_is_422_and_binary_carries_it(server):
    given = tensor("x", np.array([-1.0]))
    assert server.infer("log", {"inputs": [given]})[0] == 422
    request = {"inputs": [given], "parameters": {"binary_data_output": True}}
    status, headers, body = server.ask("POST", "/v2/models/log/infer", json.dumps(request).encode())
    assert status == 200
    assert np.isnan(np.frombuffer(body[int(headers[protocol.LENGTH_HEADER]) :], "<f4")).all()


@pytest.mark.parametrize("length", ["5", "99999999", "-1", "abc", "9" * 30])
def test_json_lengths_that_lie(server, length):
    status, _, _ = server.ask(
        "POST", "/v2/models/whole/infer", json.dumps(GOOD).encode(), {protocol.LENGTH_HEADER: length}
    )
    assert status == 400


def test_bodies_too_large_are_413_whether_announced_or_not(server):
    assert server.ask("POST", "/v2/models/whole/infer", bytes(100_001))[0] == 413
    chunks = (bytes(1000) for _ in range(200))
    assert server.ask("POST", "/v2/models/whole/infer", chunks)[0] == 413
    assert alive(server)


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", gzip.compress(bytes(50_000_000)), 413),
        ("deflate", zlib.compress(bytes(50_000_000)), 413),
        ("gzip", gzip.compress(json.dumps(GOOD).encode())[:-9], 400),
        ("gzip", b"not gzip", 400),
        ("br", b"x", 415),
        ("gzip, gzip", b"x", 415),
    ],
)
def test_compressed_bodies(server, encoding, body, status):
    assert server.ask("POST", "/v2/models/whole/infer", body, {"Content-Encoding": encoding})[0] == status
    assert blocks.state(server.app).held_bytes == 0
    assert alive(server)


def test_a_packed_tensor_that_unpacks_to_more_than_a_body_is_413(server):
    value = np.zeros((400, 3, 8, 8), np.float32)
    packed = protocol.Packed(
        "image", "FP32", value.shape, wire.encode(value, "int8+zstd"), {wire.EXTENSION: "int8+zstd"}
    )
    body, length = protocol.write_message({}, "inputs", [packed])
    assert len(body) < 100_000
    assert server.ask("POST", "/v2/models/whole/infer", body, {protocol.LENGTH_HEADER: str(length)})[0] == 413
    forged = packed.raw[:8] + struct.pack("<4I", 1, 3, 8, 8) + packed.raw[24:]
    bad = protocol.Packed("image", "FP32", (1, 3, 8, 8), forged, {wire.EXTENSION: "int8+zstd"})
    body, length = protocol.write_message({}, "inputs", [bad])
    assert server.ask("POST", "/v2/models/whole/infer", body, {protocol.LENGTH_HEADER: str(length)})[0] == 400
    assert alive(server)


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/..%2f..%2fetc%2fpasswd", "/v2/models/../../etc/passwd", "/v2/models/whole%00", "/v2/models/%ff",
        "/v2/models/",
        "/v2/models/whole.onnx", "/v2/models/whole/versions/2", "/v2/models/whole/versions/..",
        "/v2/models/" + "a" * 5000,
        "//v2", "/v2/models/whole/infer/x", "/v2/models/%2e%2e",
    ],
)  # fmt: skip
def test_paths_lead_to_models_only(server, path):
    status, _, body = server.ask("GET", path)
    assert status in (400, 404, 405)
    assert b"root:" not in body
    assert len(body) < 1000
    assert alive(server)


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        f"Bearer {TOKEN}x",
        f"Bearer {TOKEN[:-1]}",
        f"Basic {TOKEN}",
        TOKEN,
        "Bearer \xff\xfe",
    ],
)
def test_tokens(server, header):
    sent = {} if header is None else {"Authorization": header}
    token, server.token = server.token, None
    try:
        for method, path in (
            ("GET", "/v2"),
            ("GET", "/metrics"),
            ("POST", "/v2/models/whole/infer"),
            ("GET", "/nowhere"),
        ):
            status, headers, body = server.ask(method, path, None, sent)
            assert status == 401
            assert headers["WWW-Authenticate"] == "Bearer"
            assert TOKEN.encode() not in body
        assert server.ask("GET", "/v2/health/live", None, sent)[0] == 200
    finally:
        server.token = token


def raw(server, data, *, shut=False):
    """What comes back for raw bytes, until the server closes."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
        connection.sendall(data)
        if shut:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        while chunk := connection.recv(65536):
            received += chunk
    return received


HEAD = f"POST /v2/models/whole/infer HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\n".encode()


def test_a_body_that_never_ends_is_408_and_headers_that_never_end_are_dropped(server):
    assert b" 408 " in raw(server, HEAD + b"Content-Length: 10\r\n\r\nabc")
    assert raw(server, HEAD) == b""
    assert raw(server, b"") == b""
    assert blocks.state(server.app).active == 0
    assert alive(server)


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"Content-Length: 10\r\n\r\nabc",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nab",
    ],
)
def test_bodies_cut_off_do_no_harm(server, data):
    raw(server, data, shut=True)
    assert alive(server)


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(100) + b"\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        HEAD + b"Content-Length: -5\r\n\r\n",
        HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nabcde",
        HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n\r\n",
        HEAD + b"".join(b"h%d: 1\r\n" % i for i in range(500)) + b"\r\n",
        HEAD + b"x: " + b"a" * 20_000 + b"\r\n\r\n",
        b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused(server, data):
    answer = raw(server, data)
    assert answer == b"" or b" 400 " in answer.partition(b"\r\n")[0]
    assert b"Traceback" not in answer
    assert alive(server)


def test_more_bytes_at_once_than_the_server_may_hold_are_503(tmp_path):
    limits = blocks.Limits(body_bytes=100_000, held_bytes=1_000)
    with serving.serving([serving.whole(tmp_path)], limits=limits) as running:
        status, headers, _ = running.ask("POST", "/v2/models/whole/infer", bytes(5_000))
        assert status == 503
        assert headers["Retry-After"] == "1"
        assert blocks.state(running.app).held_bytes == 0


def test_without_a_token_web_pages_are_refused(tmp_path):
    with serving.serving([serving.whole(tmp_path)]) as running:
        assert running.ask("GET", "/v2")[0] == 200
        assert running.ask("GET", "/v2", None, {"Origin": "https://evil.example"})[0] == 403
        assert running.ask("GET", "/v2", None, {"Sec-Fetch-Site": "cross-site"})[0] == 403
        assert running.ask("GET", "/v2", None, {"Host": "rebound.example"})[0] == 403
        assert running.ask("GET", "/v2", None, {"Host": "localhost:8000"})[0] == 200
        assert running.ask("GET", "/v2", None, {"Host": "[::1]:8000"})[0] == 200


def test_an_error_inside_says_nothing(tmp_path, monkeypatch):
    with serving.serving([serving.whole(tmp_path)]) as running:

        def broken(*_):
            raise ValueError("secret of the inside")

        monkeypatch.setattr("featherweight.edge.serve.app._wanted_outputs", broken)
        status, answer = running.infer("whole", GOOD)
    assert status == 500
    assert "secret" not in json.dumps(answer)
