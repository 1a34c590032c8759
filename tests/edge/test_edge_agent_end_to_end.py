"""The command on a port of its own: searches measure there and outlive its kill -9; it ends cleanly when told."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("urllib3")

from agent_helpers import TOKEN

import featherweight as fw
from featherweight.edge import _link, remote
from featherweight.search import baseline, measured
from featherweight.search.journal import Journal
from pipeline.small import convnet, samples

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")


class Command:
    """`featherweight agent` as a process."""

    def __init__(self, work: Path, *options: str, port: int = 0, token: str | None = TOKEN) -> None:
        environment = {k: v for k, v in os.environ.items() if k != "FEATHERWEIGHT_AGENT_TOKEN"}
        if token:
            environment["FEATHERWEIGHT_AGENT_TOKEN"] = token
        line = [sys.executable, "-m", "featherweight.cli", "agent", "--work", str(work), "--port", str(port)]
        self.log = work.parent / f"{time.monotonic_ns()}.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*line, "--name", "bench", "--json", "--access-log", *options],
                stdout=subprocess.PIPE, stderr=log, text=True, env=environment,
            )  # fmt: skip
        assert self.process.stdout is not None
        first = self.process.stdout.readline()
        self.said = json.loads(first) if first.startswith('{"schema"') else {"url": ""}  # else it refused to start
        self.url = self.said["url"]

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def children(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait(30)


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    found = Command(tmp_path / "work")
    yield found
    found.end()


def alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(true: Any, what: str, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def test_a_search_measures_there_and_goes_on_after_a_kill(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_link, "PATIENCE_S", 1.0)
    for module, name in ((measured, "QUICK_LATENCY_S"), (measured, "PROOF_LATENCY_S"), (baseline, "QUICK_LATENCY_S")):
        monkeypatch.setattr(module, name, 0.3)
    model = convnet(tmp_path, width=8)
    data = samples(tmp_path, model, n=40)
    out = tmp_path / "run"
    asked: dict[str, Any] = {
        "max_size": "45%", "max_latency": "500%", "techniques": ("weight_nbit", "float16"), "max_candidates": 1,
        "target": command.url, "target_token": TOKEN, "out": out,
    }  # fmt: skip
    failed: list[BaseException] = []

    def search() -> None:
        try:
            fw.compress(model, data, **asked)
        except fw.RemoteError as e:
            failed.append(e)

    def timing() -> bool:  # a job whose child has children: the one that takes turns
        try:
            return any(child.children() for child in command.children())
        except psutil.NoSuchProcess:  # one that was listed has ended since
            return False

    thread = threading.Thread(target=search)
    thread.start()
    until(lambda: not thread.is_alive() or timing(), "no candidate is timed")
    orphans = command.children()
    command.kill()
    thread.join(60)
    assert failed, "the search did not notice"
    assert "--resume" in str(failed[0])
    assert "no agent answers" in str(failed[0]) or "was lost" in str(failed[0])
    until(lambda: not any(alive(p) for p in orphans), "children of a killed agent live")

    again = Command(tmp_path / "work", port=command.port)
    try:
        assert not list((tmp_path / "work" / "jobs").iterdir())
        report = fw.compress(model, data, resume=True, **asked)
        assert report.ok, report.reason
        assert report.result.host == report.baseline.host == "bench (agent)"
        assert report.facts["target"] == "bench (agent)"
        assert report.result.latency_ms is not None
        assert report.result.peak_bytes is not None
        assert any("measured on bench (agent)" in note.text for note in report.notes)
        assert TOKEN not in (out / "report.json").read_text() + (out / "report.html").read_text()
        assert TOKEN.encode() not in (out / "journal.sqlite").read_bytes()
    finally:
        assert again.end() == 0
    said = command.log.read_text() + again.log.read_text()
    assert "POST '/v1/jobs' 202" in said
    assert TOKEN not in said
    assert str(tmp_path) not in said


@pytest.mark.slow
def test_two_models_are_compared_there(command: Command, tmp_path: Path) -> None:
    paths = [convnet(tmp_path, width=width).rename(tmp_path / f"{width}.onnx") for width in (8, 16)]
    found = fw.compare(*paths, samples(tmp_path, paths[0], n=40), target=command.url, target_token=TOKEN)
    assert found.candidate.host == found.original.host == "bench (agent)"
    assert found.candidate.latency_ratio is not None
    with pytest.raises(fw.BudgetError, match="http://HOST:PORT"):
        fw.compare(*paths, tmp_path / "labelled.npz", target="portable")


def test_a_new_token_is_printed_once_and_ctrl_c_ends_it(tmp_path: Path) -> None:
    command = Command(tmp_path / "work", token=None)
    token = command.said["token"]
    assert len(token) == 64
    monkey = remote.Access(token=token)
    remote.connect(command.url, None, let_in=monkey).close()
    assert command.end(signal.SIGINT) in (0, 130)
    assert token not in command.log.read_text()


def test_one_agent_a_folder_and_no_open_door_without_a_token(tmp_path: Path, command: Command) -> None:
    for options, words in (
        ((), "another agent works in"),
        (("--host", "0.0.0.0", "--work", str(tmp_path / "other")), "needs a token"),
        (("--tls-cert", "c.pem", "--work", str(tmp_path / "other")), "belong together"),
    ):
        refused = Command(tmp_path / "work", *options, token=None)
        assert refused.process.wait(30) in (1, 2)
        assert words in refused.log.read_text()


def test_the_journal_of_another_device_is_not_gone_on_with(tmp_path: Path) -> None:
    asked = {"profile": "one (agent)"}
    Journal(tmp_path / "journal.sqlite", asked, resume=False).close()
    with pytest.raises(fw.OutputError, match=r"one \(agent\)"):
        Journal(tmp_path / "journal.sqlite", {"profile": "other (agent)"}, resume=True)
