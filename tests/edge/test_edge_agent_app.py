"""The agent's interface: every route as described, every job kind right, and what is refused."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp")

from agent_helpers import TOKEN, Agent, feeds, model, pointing_at, running

from featherweight.edge import http
from featherweight.edge.agent.app import openapi
from featherweight.edge.agent.requests import MAX_FEEDS, METRICS, read_job
from featherweight.runtime import ort, targets

DOCUMENT = json.loads(openapi())
NO_HASH = "0" * 64


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with running(tmp_path_factory.mktemp("agent"), max_file_bytes=1 << 20, quota_bytes=8 << 20) as found:
        yield found
        statuses = {(m.lower(), p): set(map(int, o["responses"])) for m, p, o in operations()}
        for method, route, status in found.seen:
            if route in DOCUMENT["paths"] and method.lower() in DOCUMENT["paths"][route]:
                assert status in statuses[method.lower(), route], f"{method} {route} {status} is not described"


def operations() -> list[tuple[str, str, Any]]:
    return [(m.upper(), path, o) for path, methods in DOCUMENT["paths"].items() for m, o in methods.items()]


def test_the_description_names_every_route_method_and_status(agent: Agent) -> None:
    described = {(m, p): sorted(map(int, o["responses"])) for m, p, o in operations()}
    assert described == {(r.method, r.path): sorted(r.statuses) for r in agent.service.routes()}
    status, served = agent.ask("GET", "/openapi.json", token=None)
    assert (status, served["paths"]) == (200, DOCUMENT["paths"])
    assert served["components"]["schemas"]["MemoryJob"]["properties"]["threads"]["maximum"] == 2
    for _, _, operation in operations():
        assert operation["summary"]
        assert operation["operationId"]


def test_the_description_agrees_with_what_is_read() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    assert set(schemas["ScoreJob"]["properties"]["metric"]["enum"]) == set(METRICS)
    assert schemas["OutputsJob"]["properties"]["feeds"]["maxItems"] == MAX_FEEDS
    references = set(re.findall(r'"#/components/(\w+/\w+)"', json.dumps(DOCUMENT)))
    there = {f"{kind}/{name}" for kind, names in DOCUMENT["components"].items() for name in names}
    assert references <= there


def test_what_is_said_about_the_device(agent: Agent) -> None:
    assert agent.ask("GET", "/v1/health", token=None) == (200, {"status": "ok"})
    status, version = agent.ask("GET", "/v1/version")
    assert (status, version["api"], version["name"]) == (200, 1, "device")
    _, profile = agent.ask("GET", "/v1/profile")
    assert targets.profile_from_json(json.dumps(profile)) == agent.service.settings.profile
    assert agent.ask("GET", "/v1/status")[1]["quota_bytes"] == 8 << 20


def test_every_route_but_two_wants_the_token(agent: Agent) -> None:
    for method, path, operation in operations():
        asked = path.replace("{sha256}", NO_HASH).replace("{id}", "0" * 32)
        for token in (None, "", "x" * len(TOKEN), TOKEN + "x", TOKEN[:-1], "ü" * 20):
            headers = {"Authorization": f"Bearer {token}".encode().decode("latin-1")} if token else {}
            status, _ = agent.ask(method, asked, token=None, headers=headers)
            assert (status == 401) == (operation.get("security") != []), (method, path, token)


def test_files_come_and_go(agent: Agent) -> None:
    data = b"some bytes" * 1000
    name = agent.put(data)
    assert agent.ask("GET", f"/v1/files/{name}") == (200, data)
    assert agent.ask("HEAD", f"/v1/files/{name}")[0] == 200
    assert agent.ask("PUT", f"/v1/files/{name}", data) == (200, {"sha256": name, "size_bytes": len(data)})
    assert agent.ask("DELETE", f"/v1/files/{name}")[0] == 204
    for method in ("HEAD", "GET", "DELETE"):
        assert agent.ask(method, f"/v1/files/{name}")[0] == 404


def test_outputs_are_the_models_own(agent: Agent) -> None:
    data = feeds(batches=3)
    job = agent.run({"kind": "outputs", "model": {"file": agent.put(model())}, "feeds": [agent.put(data)] * 2})
    assert job["state"] == "done", job
    assert (job["done"], job["total"], job["result"]["batches"]) == (6, 6, 6)
    _, raw = agent.ask("GET", f"/v1/files/{job['result']['outputs']}")
    found = np.load(io.BytesIO(raw))
    session = ort.session(model())
    given = np.load(io.BytesIO(data))
    for i in range(6):
        expected = session.run({"x": given[f"{i % 3:06d}::x"]})["y"]
        np.testing.assert_array_equal(found[f"{i:06d}::y"], expected)


def test_weights_beside_the_model_are_found(agent: Agent) -> None:
    weights = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float32).tobytes()
    beside = {"parts/weights.bin": agent.put(weights)}
    described = {"file": agent.put(pointing_at("parts/weights.bin")), "beside": beside}
    data = [agent.put(feeds())]
    job = agent.run({"kind": "outputs", "model": described, "feeds": data, "outputs": ["y"]})
    assert job["state"] == "done", job
    inside = agent.run({"kind": "outputs", "model": {"file": agent.put(model())}, "feeds": data})
    assert inside["result"]["outputs"] == job["result"]["outputs"]


def test_latency_and_memory_are_measured(agent: Agent) -> None:
    models = [{"file": agent.put(model(wide=w))} for w in (4, 64)]
    data = [agent.put(feeds())]
    job = agent.run(
        {"kind": "latency", "original": models[0], "candidate": models[1], "feeds": data, "time_limit_s": 0.2}
    )
    assert job["state"] == "done", job
    result = job["result"]
    assert 0 < result["original_ms"] <= result["original_p95_ms"]
    assert result["ratio_interval"]["low"] <= result["ratio"] <= result["ratio_interval"]["high"]
    job = agent.run({"kind": "memory", "model": models[0], "feeds": data, "threads": 2})
    assert job["state"] == "done", job
    assert job["result"]["load_ms"] > 0


def test_a_metric_is_computed_there(agent: Agent) -> None:
    x = np.random.default_rng(2).normal(size=(20, 4)).astype(np.float32)
    labels = ort.session(model()).run({"x": x})["y"].argmax(axis=1)
    labels[:5] = (labels[:5] + 1) % 4
    held = io.BytesIO()
    np.savez(held, x=x, labels=labels)
    first, data = {"file": agent.put(model())}, agent.put(held.getvalue())
    job = agent.run({"kind": "score", "model": first, "data": data, "metric": "accuracy"})
    assert job["result"] == {"metric": "accuracy", "value": 0.75, "n_samples": 20}
    job = agent.run({"kind": "score", "model": first, "original": first, "data": data, "metric": "agreement"})
    assert job["result"]["value"] == 1.0
    job = agent.run({"kind": "score", "model": first, "data": data, "metric": "agreement"})
    assert "original" in job["error"]["message"]


def test_events_tell_the_way_to_the_end(agent: Agent) -> None:
    job = {"kind": "outputs", "model": {"file": agent.put(model())}, "feeds": [agent.put(feeds(batches=40))]}
    _, queued = agent.ask("POST", "/v1/jobs", job)
    status, raw = agent.ask("GET", f"/v1/jobs/{queued['id']}/events")
    lines = [json.loads(line) for line in raw.splitlines()]
    assert status == 200
    assert lines[-1] == agent.ask("GET", f"/v1/jobs/{queued['id']}")[1]
    assert (lines[-1]["state"], lines[-1]["done"]) == ("done", 40)
    assert queued["id"] in [j["id"] for j in agent.ask("GET", "/v1/jobs")[1]["jobs"]]


def test_a_job_asked_again_under_its_id_is_the_same_job(agent: Agent) -> None:
    job = {
        "kind": "memory", "model": {"file": agent.put(model())}, "feeds": [agent.put(feeds())], "id": "ab" * 16
    }  # fmt: skip
    assert [agent.ask("POST", "/v1/jobs", job)[0] for _ in range(3)] == [202, 200, 200]
    assert agent.ask("POST", "/v1/jobs", {**job, "threads": 2})[0] == 409
    agent.until("ab" * 16, ("done",))
    assert agent.ask("POST", f"/v1/jobs/{'ab' * 16}/cancel")[0] == 409


def test_a_job_whose_files_are_not_here_names_them(agent: Agent) -> None:
    job = {"kind": "memory", "model": {"file": NO_HASH}, "feeds": [NO_HASH, "1" * 64]}
    status, answer = agent.ask("POST", "/v1/jobs", job)
    assert (status, answer["missing"]) == (409, [NO_HASH, "1" * 64])
    assert agent.ask("GET", f"/v1/jobs/{'0' * 32}")[0] == 404
    assert agent.ask("GET", f"/v1/jobs/{'0' * 32}/events")[0] == 404
    assert agent.ask("POST", f"/v1/jobs/{'0' * 32}/cancel")[0] == 404


GOOD: dict[str, Any] = {"kind": "outputs", "model": {"file": NO_HASH}, "feeds": [NO_HASH]}
WRONG: list[tuple[Any, str]] = [
    ([], "the body"),
    ({}, "kind"),
    ({**GOOD, "kind": "pickle"}, "kind"),
    ({**GOOD, "kind": ["outputs"]}, "kind"),
    ({"kind": "outputs", "feeds": [NO_HASH]}, "model"),
    ({**GOOD, "more": 1}, "more"),
    ({**GOOD, "model": NO_HASH}, "model"),
    ({**GOOD, "model": {"file": NO_HASH, "path": "x"}}, "model"),
    ({**GOOD, "model": {"file": "../" + NO_HASH}}, "model.file"),
    ({**GOOD, "model": {"file": NO_HASH.replace("0", "A")}}, "model.file"),
    ({**GOOD, "model": {"file": NO_HASH, "beside": [1]}}, "beside"),
    ({**GOOD, "feeds": []}, "feeds"),
    ({**GOOD, "feeds": NO_HASH}, "feeds"),
    ({**GOOD, "feeds": [None]}, "feeds"),
    ({**GOOD, "feeds": [NO_HASH] * 257}, "feeds"),
    ({**GOOD, "outputs": [""]}, "outputs"),
    ({**GOOD, "outputs": [1]}, "outputs"),
    ({**GOOD, "outputs": None}, "outputs"),
    ({**GOOD, "id": None}, "id"),
    ({**GOOD, "threads": 0}, "threads"),
    ({**GOOD, "threads": True}, "threads"),
    ({**GOOD, "threads": 2.5}, "threads"),
    ({**GOOD, "timeout_s": -1}, "timeout_s"),
    ({**GOOD, "timeout_s": 1e9}, "timeout_s"),
    ({**GOOD, "timeout_s": float("inf")}, "timeout_s"),
    ({**GOOD, "id": "../../x"}, "id"),
    ({"kind": "score", "model": {"file": NO_HASH}, "data": NO_HASH, "metric": "os:system"}, "metric"),
    *[
        ({**GOOD, "model": {"file": NO_HASH, "beside": {name: NO_HASH}}}, "beside")
        for name in (
            "", ".", "..", "../x", "/etc/passwd", "a/../b", "a//b", ".hidden", "a/.b", "model.onnx", "C:\\x", "a\\b",
            "a\x00b", "a\nb", "x" * 300, "a/b/c/d/e", "~/x", "-rf",
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize(("body", "words"), WRONG)
def test_a_wrong_field_is_named(body: Any, words: str) -> None:
    with pytest.raises(http.RequestError) as e:
        read_job(body, max_seconds=60.0)
    assert e.value.status == 422
    assert words in str(e.value)
    assert len(str(e.value)) < 300


def test_bad_bodies_are_refused_over_the_wire(agent: Agent) -> None:
    status, answer = agent.ask("POST", "/v1/jobs", {**GOOD, "threads": 3})
    assert (status, "at most 2" in answer["error"]) == (422, True)
    plain = {"Content-Type": "application/json"}
    for body in (b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"kind": NaN}'):
        assert agent.ask("POST", "/v1/jobs", body, headers=plain)[0] == 400, body[:20]
    assert agent.ask("POST", "/v1/jobs", b"{}")[0] == 415
    assert agent.ask("POST", "/v1/jobs", b"{}", headers={**plain, "Content-Encoding": "br"})[0] == 415
    assert agent.ask("POST", "/v1/jobs", b" " * (2 << 20), headers=plain)[0] == 413
    assert agent.ask("PATCH", "/v1/jobs")[0] == 405
    assert agent.ask("GET", "/v2/anything")[0] == 404


def test_a_pinned_file_stays(agent: Agent) -> None:
    name = agent.put(b"needed")
    agent.service.store.pin([name])
    assert agent.ask("DELETE", f"/v1/files/{name}")[0] == 409
    agent.service.store.unpin([name])
    assert agent.ask("DELETE", f"/v1/files/{name}")[0] == 204


def test_the_work_folder_holds_nothing_of_ended_jobs(agent: Agent) -> None:
    work: Path = agent.service.settings.work
    assert not list((work / "jobs").iterdir())
    assert not list((work / "arriving").iterdir())
