"""Whatever a model or its inputs do in the child is a failed job in words; the agent lives and tells nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("aiohttp")

import agent_helpers
from agent_helpers import TOKEN, Agent, endless, feeds, greedy, model, pointing_at, running

from featherweight.edge.agent import jobs, tasks
from featherweight.errors import DataError


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    work = tmp_path_factory.mktemp("agent")
    with running(work, max_file_bytes=1 << 20, quota_bytes=2 << 20, max_seconds=30.0) as found:
        yield found
        assert found.alive()
        said = found.log.getvalue()
        assert TOKEN not in said
        assert str(work) not in said
        assert not list((work / "jobs").iterdir())


# -- models and inputs -------------------------------------------------------------------------------------


def outcome(agent: Agent, file: bytes, data: bytes | None = None, **more: Any) -> dict[str, Any]:
    given = agent.put(feeds() if data is None else data)
    return agent.run({"kind": "outputs", "model": {"file": agent.put(file)}, "feeds": [given], **more})


def npz(**arrays: Any) -> bytes:
    held = io.BytesIO()
    np.savez(held, **arrays)
    return held.getvalue()


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (b"not a model", "ONNX"),
        (model()[:50], "ONNX"),
        (pointing_at("../../../../../../../../etc/passwd"), "folder"),
        (pointing_at("/etc/passwd"), "folder"),
        (pointing_at("absent.bin"), "absent.bin"),
        (greedy(), "Tile"),
    ],
    ids=["garbage", "cut", "outside", "absolute", "absent", "greedy"],
)
def test_a_model_that_cannot_run_fails_its_job(agent: Agent, file: bytes, words: str) -> None:
    job = outcome(agent, file)
    assert job["state"] == "failed"
    assert words in job["error"]["message"]
    assert str(agent.service.settings.work) not in job["error"]["message"]
    assert "root:" not in json.dumps(job)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"PK no archive", "npz"),
        (b"", "npz"),
        (npz(), "at least one batch"),
        (npz(x=np.zeros((1, 4), np.float32)), "::"),
        (npz(**{"0::x": np.array([{"a": 1}], dtype=object)}), "unpickled"),
        (feeds()[:300], "npz"),
    ],
)
def test_an_archive_that_is_none_is_refused(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "feeds.npz"
    path.write_bytes(data)
    with pytest.raises(DataError, match=words):
        list(tasks.read_batches(path))


def test_inputs_that_do_not_fit_fail_their_job(agent: Agent) -> None:
    job = outcome(agent, model(), npz(**{"0::x": np.zeros((1, 5), np.float32)}))
    assert (job["state"], job["error"]["type"]) == ("failed", "RunError")
    assert "model.onnx" in job["error"]["message"]


def test_a_model_that_never_ends_is_killed_in_time(agent: Agent) -> None:
    job = outcome(agent, endless(), timeout_s=4)
    assert (job["state"], job["error"]["type"]) == ("failed", "ChildCrashed")
    assert "within 4 s" in job["error"]["message"]


def test_outputs_that_do_not_fit_end_the_job(agent: Agent) -> None:
    job = outcome(agent, greedy(40_000), feeds(batches=2))
    assert job["state"] == "failed"
    assert "outputs must fit" in job["error"]["message"]


def test_a_crashing_child_is_a_failed_job(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.tasks, "memory", agent_helpers.crashes)
    job = agent.run({"kind": "memory", "model": {"file": agent.put(model())}, "feeds": [agent.put(feeds())]})
    assert (job["state"], job["error"]["type"]) == ("failed", "ChildCrashed")
    assert "SIGSEGV" in job["error"]["message"]


def test_a_child_that_takes_too_much_memory_is_a_failed_job(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.tasks, "memory", agent_helpers.fills_memory)
    monkeypatch.setattr(agent.service.jobs, "_memory_limit_bytes", 600 << 20)
    job = agent.run({"kind": "memory", "model": {"file": agent.put(model())}, "feeds": [agent.put(feeds())]})
    assert (job["state"], job["error"]["type"]) == ("failed", "ChildCrashed")
    assert "memory" in job["error"]["message"]


def test_messages_say_nothing_of_the_device(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs.tasks, "memory", agent_helpers.tells_where_it_is)
    job = agent.run({"kind": "memory", "model": {"file": agent.put(model())}, "feeds": [agent.put(feeds())]})
    assert job["error"]["message"] == "the job failed: ValueError: cannot open model/model.onnx nor secret"
    assert str(Path.home()) not in agent.log.getvalue()
