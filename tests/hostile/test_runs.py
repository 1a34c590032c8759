"""Whole runs on hostile models, data and disks: exit 1, one clear message, bounded memory, nothing half-written."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import featherweight as fw
from featherweight.graph import io
from featherweight.search import replay
from pipeline.small import convnet, samples

N = helper.make_node
MEMORY = 6 << 30  # of address space; libraries and their threads reserve some of it without touching it

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are POSIX")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convnet(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    return samples(model.parent, model, n=40)


def command(*arguments: str | Path, file_limit: int | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process with bounded memory and, where asked, bounded files."""
    code = textwrap.dedent(
        f"""
        import resource, sys
        resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
        if {file_limit!r}:
            resource.setrlimit(resource.RLIMIT_FSIZE, ({file_limit!r}, {file_limit!r}))
        from featherweight.cli import main
        sys.argv[1:] = {[str(a) for a in arguments]!r}
        main()
        """
    )
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)


def assert_refused(done: subprocess.CompletedProcess[str], out: Path, *words: str) -> None:
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ")] == [done.stderr.rstrip()]
    assert len(done.stderr) < 2000
    for word in words:
        assert word in done.stderr
    assert not out.exists() or not list(out.iterdir())


# -- models ------------------------------------------------------------------------------------------------


def truncated(good: bytes) -> bytes:
    return good[: len(good) // 2]


def garbage(good: bytes) -> bytes:
    return np.random.default_rng(0).bytes(len(good))


def nested(_good: bytes) -> bytes:
    """3000 sub-graphs, each inside the one before; written by hand, as protobuf's own writer gives up."""

    def varint(n: int) -> bytes:
        head = b""
        while n > 127:
            head, n = head + bytes([n & 127 | 128]), n >> 7
        return head + bytes([n])

    def field(number: int, payload: bytes) -> bytes:
        return varint(number << 3 | 2) + varint(len(payload)) + payload

    graph = b""
    for _ in range(3000):
        graph = field(1, field(5, field(1, b"a") + field(6, graph)))
    return field(7, graph)


def edited(change: Callable[[onnx.ModelProto], None]) -> Callable[[bytes], bytes]:
    def write(good: bytes) -> bytes:
        proto = onnx.ModelProto.FromString(good)
        change(proto)
        return proto.SerializeToString()

    return write


def absurd_shape(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.dims[:] = [2**40, 2**40]
    tensor.ClearField("raw_data")


def outside(proto: onnx.ModelProto) -> None:
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../../../../etc/passwd"


def huge_at_run_time(proto: onnx.ModelProto) -> None:
    """Small on disk; when run it asks for 4 TiB."""
    graph = proto.graph
    graph.initializer.append(numpy_helper.from_array(np.array([2**40, 1], np.int64), "repeats"))
    graph.node.append(N("Tile", [graph.output[0].name, "repeats"], ["much"], "tile"))
    graph.node.append(N("ReduceMax", ["much"], ["most"], "most", keepdims=0))
    graph.output.append(helper.make_tensor_value_info("most", TensorProto.FLOAT, []))


def unknown_operator(proto: onnx.ModelProto) -> None:
    proto.graph.node[1].domain = "nobody.knows"
    proto.opset_import.append(helper.make_opsetid("nobody.knows", 1))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (truncated, ["bad.onnx"]),
        (garbage, ["bad.onnx"]),
        (nested, ["bad.onnx", "nested deeper"]),
        (edited(absurd_shape), ["'w1'", "1099511627776"]),
        (edited(outside), ["'w1'", "etc/passwd"]),
        (edited(huge_at_run_time), ["bad.onnx"]),
        (edited(unknown_operator), ["bad.onnx", "nobody.knows"]),
    ],
    ids=["truncated", "garbage", "nested", "absurd shape", "data outside", "huge when run", "unknown operator"],
)
def test_a_hostile_model_is_refused(make: Callable[[bytes], bytes], words: list[str], model, data, tmp_path) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(make(model.read_bytes()))
    out = tmp_path / "run"
    assert_refused(command("compress", bad, "--data", data, "-o", out), out, *words)
    assert sorted(p.name for p in tmp_path.iterdir() if p != out) == ["bad.onnx"]


# -- data --------------------------------------------------------------------------------------------------


def nan_inside(x: np.ndarray) -> dict[str, np.ndarray]:
    x = x.copy()
    x[7, 1, 2, 3] = np.nan
    return {"x": x}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nan_inside, ["'x'", "nan", "1, 2, 3"]),
        (lambda x: {"a": x, "b": x}, ["'x'", "'a', 'b'"]),
        (lambda x: {"x": x[:, :2]}, ["'x'", "2"]),
        (lambda x: {"x": x.astype(np.complex64)}, ["'x'", "complex64"]),
        (lambda x: {"x": x[:0]}, ["empty"]),
        (lambda x: {"x": np.array([object()] * 4)}, ["bad.npz"]),
    ],
    ids=["nan", "name", "shape", "type", "empty", "pickle"],
)
def test_bad_data_is_refused(
    make: Callable[[np.ndarray], dict[str, np.ndarray]], words: list[str], model, data, tmp_path
):
    with np.load(data) as good:
        np.savez(tmp_path / "bad.npz", **make(good["x"]))
    out = tmp_path / "run"
    assert_refused(command("compress", model, "--data", tmp_path / "bad.npz", "-o", out), out, *words)


# -- full disk ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1_000, 30_000, 60_000])
def test_a_disk_that_fills_up_ends_the_run_with_a_clear_error(limit: int, model, data, tmp_path) -> None:
    out = tmp_path / "run"
    done = command("compress", model, "--data", data, "--max-size", "90%", "-o", out, file_limit=limit)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error: ") == 1
    assert not (out / "model.onnx").exists()
    assert not list(out.glob(".*.onnx")) if out.exists() else True


@pytest.mark.parametrize("target", ["model.onnx", "plan.json", "statistics.npz"])
def test_no_half_written_result_where_the_last_write_fails(target: str, model, data, tmp_path, monkeypatch) -> None:
    out = tmp_path / "run"
    real_save, real_write = io.save, replay.write_file

    def full(*_args: object) -> None:
        raise OSError(28, "No space left on device")

    def save(built, path, **kw):
        if Path(path) == out / target:
            raise fw.OutputError(f"{path} cannot be written: No space left on device")
        real_save(built, path, **kw)

    def write_file(path, write_to):
        real_write(path, full if path == out / target else write_to)

    monkeypatch.setattr(io, "save", save)
    monkeypatch.setattr(replay, "write_file", write_file)
    with pytest.raises(fw.OutputError, match=rf"{target} cannot be written: No space left on device"):
        fw.compress(model, data, out=out, max_size="50%", max_candidates=1)
    assert not (out / "report.json").exists()
    assert not [p for p in out.iterdir() if p.name.startswith(".")]
    monkeypatch.undo()
    report = fw.compress(model, data, out=out, max_size="50%", max_candidates=1, resume=True)
    assert report.ok
    onnx.checker.check_model(str(out / "model.onnx"))


# -- crashes -----------------------------------------------------------------------------------------------


@pytest.fixture
def crashing(model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Arm the metric to kill the child that scores a candidate, so many times; the original is scored in peace."""
    import onnxruntime as ort

    with np.load(data) as arrays:
        session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
        one_by_one = [session.run(None, {"x": x[None]})[0] for x in arrays["x"]]
    np.save(tmp_path / "original.npy", np.concatenate(one_by_one))
    monkeypatch.setenv("CRASH_UNLESS", str(tmp_path / "original.npy"))
    monkeypatch.setenv("CRASH_WHILE", str(tmp_path / "fuse"))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))

    def arm(times: int) -> None:
        (tmp_path / "fuse").write_text("x" * times)

    return arm


def test_a_candidate_that_kills_its_child_is_one_failed_attempt_and_the_search_goes_on(
    crashing, model, data, tmp_path
) -> None:
    crashing(1)
    report = fw.compress(
        model,
        data,
        out=tmp_path / "run",
        metric="hostile_metric:score",
        max_drop="60%",
        minimize="size",
        max_candidates=4,
    )
    failed = [a for a in report.attempts if a.error]
    assert len(failed) == 1
    assert "SIGSEGV" in failed[0].error
    assert failed[0].measured is None
    assert any(a.measured is not None for a in report.attempts)
    assert report.ok, report.reason
    onnx.checker.check_model(str(tmp_path / "run" / "model.onnx"))


def test_where_every_candidate_crashes_the_report_says_so(crashing, model, data, tmp_path) -> None:
    crashing(1000)
    report = fw.compress(
        model, data, out=tmp_path / "run", metric="hostile_metric:score", max_size="40%", max_candidates=2
    )
    assert not report.ok
    assert "SIGSEGV" in report.reason
    assert not (tmp_path / "run" / "model.onnx").exists()
