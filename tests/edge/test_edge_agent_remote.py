"""Measuring on another device equals measuring here; what goes wrong on the way is said with the way out."""

from __future__ import annotations

import contextlib
import datetime
import http.server
import ipaddress
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

pytest.importorskip("aiohttp")
pytest.importorskip("urllib3")

import agent_helpers
from agent_helpers import PROFILE, TOKEN, Agent, greedy, model, running

from featherweight import data as fwdata
from featherweight.edge import _link, access, remote
from featherweight.edge.agent import jobs
from featherweight.errors import DataError, FeatherweightError, RemoteError, RunError
from featherweight.runtime import evaluate as ev
from featherweight.runtime import metrics
from featherweight.runtime.sandbox import Worker

LET_IN = remote.Access(token=TOKEN)
SPECS = [fwdata.InputSpec("x", np.dtype(np.float32), ("n", 4))]


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Agent]:
    with running(tmp_path_factory.mktemp("agent")) as found:
        yield found


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker() as found:
        yield found


@pytest.fixture(autouse=True)
def little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_link, "PATIENCE_S", 0.5)


@pytest.fixture
def bench(agent: Agent, worker: Worker) -> Iterator[remote.RemoteBench]:
    with remote.connect(agent.url, worker, let_in=LET_IN) as found:
        yield found


@pytest.fixture
def models(tmp_path: Path) -> tuple[Path, Path]:
    paths = tmp_path / "original.onnx", tmp_path / "candidate.onnx"
    for seed, path in enumerate(paths):
        path.write_bytes(model(seed))
    return paths


@pytest.fixture
def dataset(tmp_path: Path) -> fwdata.Dataset:
    rng = np.random.default_rng(3)
    np.savez(tmp_path / "d.npz", x=rng.normal(size=(50, 4)).astype(np.float32), labels=rng.integers(0, 4, 50))
    return fwdata.open_data(tmp_path / "d.npz", SPECS, batch_size=8)


def test_the_bench_is_the_device(bench: remote.RemoteBench) -> None:
    assert bench.host == "device (agent)"
    assert bench.runtime == "1.0.test"
    assert bench.profile is not None
    assert (bench.profile.threads, bench.profile.name) == (PROFILE.threads, "device (agent)")
    assert remote.device_profile is not None
    words = " ".join(note.text for note in bench.notes())
    assert "measured on device (agent)" in words
    assert "1.0.test" in words
    assert TOKEN not in words


@pytest.mark.parametrize("name", ["accuracy", "cosine"])
def test_evaluation_there_equals_evaluation_here(
    bench: remote.RemoteBench, worker: Worker, models: Any, dataset: Any, tmp_path: Path, name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(remote, "PART_BYTES", 600)  # several parts
    metric = metrics.get(name)
    found = []
    for which, evaluate in (("there", bench.evaluate), ("here", ev.evaluate)):
        more: dict[str, Any] = {} if which == "there" else {"worker": worker}
        folder = tmp_path / which
        steps: list[tuple[int, int]] = []
        first = evaluate(models[0], dataset, metric, record_to=folder, **more)
        second = evaluate(
            models[1],
            dataset,
            metric,
            reference=folder,
            progress=lambda d, n, steps=steps: steps.append((d, n)),
            **more,
        )
        assert steps == sorted(steps)
        assert steps[-1] == (7, 7)
        found.append((first, second))
    for there, here in zip(*found, strict=True):
        assert (there.value, there.n_samples, there.metric_name) == (here.value, here.n_samples, here.metric_name)
        np.testing.assert_array_equal(there.per_sample, here.per_sample)


def test_latency_and_memory_come_from_there(bench: remote.RemoteBench, agent: Agent, models: Any) -> None:
    batch = [{"x": np.ones((2, 4), np.float32)}]
    found = bench.latency(*models, batch, time_limit_s=0.2)
    assert found.ratio_interval.low <= found.ratio <= found.ratio_interval.high
    assert found.turns >= 3
    assert bench.memory(models[0], batch[0]).load_ms > 0
    kinds = [j["kind"] for j in agent.ask("GET", "/v1/jobs")[1]["jobs"]]
    assert kinds[-2:] == ["latency", "memory"]


def test_weights_beside_a_model_travel_with_it(bench: remote.RemoteBench, tmp_path: Path) -> None:
    proto = onnx.ModelProto.FromString(model(wide=64))
    path = tmp_path / "outside.onnx"
    onnx.save_model(proto, path, save_as_external_data=True, location="outside.bin", size_threshold=0)
    assert bench.memory(path, {"x": np.ones((1, 4), np.float32)}).peak_bytes >= 0


def test_a_models_failure_there_is_the_models(bench: remote.RemoteBench, tmp_path: Path, dataset: Any) -> None:
    (tmp_path / "greedy.onnx").write_bytes(greedy())
    with pytest.raises(RunError, match=r"on device \(agent\): .*Tile"):
        bench.evaluate(tmp_path / "greedy.onnx", dataset, metrics.get("cosine"), record_to=tmp_path / "r")
    with pytest.raises(DataError):
        bench.memory(tmp_path / "greedy.onnx", {"x": np.zeros((1, 4), np.dtype([("a", "f4")]))})


def test_interrupted_the_job_is_cancelled_there(
    bench: remote.RemoteBench, agent: Agent, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.tasks, "memory", agent_helpers.hangs)

    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "_watched", stop)
    with pytest.raises(KeyboardInterrupt):
        bench.memory(models[0], {"x": np.ones((1, 4), np.float32)})
    assert agent.ask("GET", "/v1/jobs")[1]["jobs"][-1]["state"] == "cancelled"


def test_a_busy_agent_is_waited_for_with_a_notice(
    agent: Agent, worker: Worker, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(agent.service.jobs, "_most_waiting", 0)

    def told(text: str) -> None:
        said.append(text)
        monkeypatch.setattr(agent.service.jobs, "_most_waiting", 16)

    monkeypatch.setattr(_link.time, "sleep", lambda s: None)
    with remote.connect(agent.url, worker, let_in=LET_IN, notice=told) as bench:
        bench.memory(models[0], {"x": np.ones((1, 4), np.float32)})
    assert any("is busy" in text for text in said)
    monkeypatch.setattr(agent.service.jobs, "_most_waiting", 0)
    monkeypatch.setattr(_link, "BUSY_S", -1.0)
    with (
        remote.connect(agent.url, worker, let_in=LET_IN) as bench,
        pytest.raises(RemoteError, match="--queue"),
    ):
        bench.memory(models[0], {"x": np.ones((1, 4), np.float32)})


# -- what goes wrong ---------------------------------------------------------------------------------------


def refused(url: str, let_in: remote.Access = LET_IN) -> str:
    with pytest.raises(RemoteError) as e:
        remote.connect(url, None, let_in=let_in)
    assert TOKEN not in str(e.value)
    return str(e.value)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_wrong_or_missing_token_is_told(agent: Agent, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = refused(agent.url, remote.Access(token="y" * 20))
    assert "does not accept this token" in words
    assert "--target-token-file" in words
    monkeypatch.delenv("FEATHERWEIGHT_AGENT_TOKEN", raising=False)
    assert "wants a token" in refused(agent.url, remote.Access())
    monkeypatch.setenv("FEATHERWEIGHT_AGENT_TOKEN", TOKEN)
    remote.connect(agent.url, None).close()
    (tmp_path / "token").write_text(TOKEN + "\n")
    assert remote.device_profile(agent.url, token_file=tmp_path / "token") == PROFILE
    with pytest.raises(FeatherweightError, match="cannot be read"):
        remote.device_profile(agent.url, token_file=tmp_path / "absent")
    assert TOKEN not in repr(LET_IN)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        ("http://user:secret@host:1", "credentials"),
        ("http://", "like http"),
        ("http://host:99999", "like http"),
        ("http://127.0.0.1:1/?q=1", "like http"),
        ("http://no-such-host.invalid:1", "not known"),
    ],
)
def test_an_address_that_is_none_is_told(url: str, words: str) -> None:
    said = refused(url)
    assert words in said
    assert "secret" not in said


def test_nobody_there_is_told() -> None:
    assert "featherweight agent" in refused(f"http://127.0.0.1:{free_port()}")


def test_certificates_are_checked_and_wrong_schemes_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cert, key = certificate(tmp_path, "mine")
    other, _ = certificate(tmp_path, "other")
    with running(tmp_path / "work", tls=access.server_tls(cert, key)) as agent:
        with remote.connect(agent.url, None, let_in=remote.Access(token=TOKEN, ca=cert)) as bench:
            assert not any("encrypted" in note.text for note in bench.notes())
        for ca in (None, other):
            words = refused(agent.url, remote.Access(token=TOKEN, ca=ca))
            assert "not trusted" in words
            assert "--target-ca" in words
        name = agent.url.replace("127.0.0.1", "localhost")  # the certificate is for the address alone
        assert "not trusted" in refused(name, remote.Access(token=TOKEN, ca=cert))
        assert "https://" in refused(agent.url.replace("https", "http"))
    with running(tmp_path / "work") as agent:
        assert "http://" in refused(agent.url.replace("http", "https"))
    with pytest.raises(FeatherweightError, match="authorities"):
        remote.connect("https://127.0.0.1:1", None, let_in=remote.Access(token=TOKEN, ca=key))


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """A certificate for 127.0.0.1 that signs itself, and its key."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.UTC)
    called = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    made = (
        x509.CertificateBuilder().subject_name(called).issuer_name(called).public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256())
    )  # fmt: skip
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip
    return paths


def test_another_version_and_another_service_are_told() -> None:
    with stranger({"api": 99}) as url:
        assert "version 99" in refused(url)
    with stranger([1]) as url:
        assert "version None" in refused(url)
    with stranger(None) as url:
        assert "not a featherweight agent" in refused(url)
    with stranger(None, status=404) as url:
        assert "not a featherweight agent" in refused(url)
    with stranger(None, status=302) as url:
        assert "not a featherweight agent" in refused(url)


@contextlib.contextmanager
def stranger(answer: Any, status: int = 200) -> Iterator[str]:
    """A web server that is no agent."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = b"<html>" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Location", "http://127.0.0.1:1/")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


# -- the agent goes away -----------------------------------------------------------------------------------


def test_a_restarted_agent_gets_its_job_again(
    tmp_path: Path, worker: Worker, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_link, "PATIENCE_S", 20.0)
    said: list[str] = []
    port = free_port()
    with contextlib.ExitStack() as first:
        before = first.enter_context(running(tmp_path / "work", port=port))
        bench = remote.connect(before.url, worker, let_in=LET_IN, notice=said.append)
        real, times = bench._watched, []

        def watched(job_id: str, progress: Any) -> Any:
            times.append(job_id)
            if len(times) == 1:
                before.service.jobs.submit = None
                first.close()
                second = running(tmp_path / "work", port=port)
                first.enter_context(second)
            return real(job_id, progress)

        monkeypatch.setattr(bench, "_watched", watched)
        with bench:
            assert bench.memory(models[0], {"x": np.ones((1, 4), np.float32)}).load_ms > 0
    assert len(set(times)) == 2
    assert any("restarted" in text for text in said)


def test_a_lost_link_is_told(tmp_path: Path, worker: Worker, models: Any) -> None:
    with running(tmp_path / "work") as agent:
        bench = remote.connect(agent.url, worker, let_in=LET_IN)
    with bench, pytest.raises(RemoteError, match="no agent answers"):
        bench.memory(models[0], {"x": np.ones((1, 4), np.float32)})


def test_a_link_lost_while_a_job_is_followed_is_told_in_words(
    tmp_path: Path, worker: Worker, models: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelling the job nobody waits for fails too; its error must not hide the first."""
    with running(tmp_path / "work") as agent:
        bench = remote.connect(agent.url, worker, let_in=LET_IN)
    monkeypatch.setattr(bench._link, "ask", lambda *a, **k: (202, {}))
    with bench, pytest.raises(RemoteError, match="no agent answers"):
        bench.memory(models[0], {"x": np.ones((1, 4), np.float32)})
