"""Runs that are killed or stopped: nothing half-written, and resumed they end where the whole run ends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

import featherweight as fw
from pipeline.small import convnet, samples

ASKED = {"max_drop": 0.05, "minimize": "size", "max_candidates": 4}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, bytes]:
    """Model, data, and the bytes an uninterrupted run gives."""
    folder = tmp_path_factory.mktemp("made")
    model = convnet(folder)
    data = samples(folder, model)
    fw.compress(model, data, out=folder / "whole", save_anyway=True, **ASKED)
    return model, data, (folder / "whole" / "model.onnx").read_bytes()


def start(model: Path, data: Path, out: Path) -> subprocess.Popen[str]:
    code = textwrap.dedent(
        f"""
        import signal
        import featherweight as fw
        from pathlib import Path
        class Said(fw.Silent):
            def start(self, phase, total=None):
                print(phase, flush=True)
        signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
        if __name__ == "__main__":
            try:
                fw.compress({str(model)!r}, {str(data)!r}, out={str(out)!r}, save_anyway=True,
                            resume=Path({str(out)!r}).exists(),
                            progress=Said(), **{ASKED!r})
                print("done", flush=True)
            except KeyboardInterrupt:
                print("stopped", flush=True)
        """
    )
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def until(child: subprocess.Popen[str], phase: str) -> None:
    for line in child.stdout:
        if line.startswith(phase):
            return
    pytest.fail(f"the run ended before it came to {phase!r}")


@pytest.mark.parametrize("phase", ["normalising", "measuring how noise", "candidate 1", "candidate 3", "verifying"])
def test_killed_in_a_phase_and_resumed_it_gives_the_same_bytes(made, phase, tmp_path):
    model, data, whole = made
    out = tmp_path / "run"
    child = start(model, data, out)
    until(child, phase)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    assert not (out / "model.onnx").exists()
    report = fw.compress(model, data, out=out, save_anyway=True, resume=True, **ASKED)
    assert (out / "model.onnx").read_bytes() == whole
    assert report.result.size_bytes == len(whole)


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_it_gives_the_same_bytes(made, tmp_path):
    model, data, whole = made
    rng = random.Random(0)
    out = tmp_path / "run"
    for _ in range(6):
        child = start(model, data, out)
        time.sleep(rng.uniform(0.5, 8))
        child.kill()
        child.wait()
    fw.compress(model, data, out=out, save_anyway=True, resume=True, **ASKED)
    assert (out / "model.onnx").read_bytes() == whole


def test_no_child_outlives_a_killed_run(made, tmp_path):
    model, data, _ = made
    child = start(model, data, tmp_path / "run")
    until(child, "candidate 1")
    children = psutil.Process(child.pid).children(recursive=True)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert not alive


def test_ctrl_c_keeps_the_best_so_far_and_resume_goes_on(made, tmp_path):
    model, data, whole = made
    out = tmp_path / "run"
    child = start(model, data, out)
    until(child, "candidate 3")
    child.send_signal(signal.SIGINT)
    rest = child.stdout.read()
    assert "stopped" in rest
    assert (out / "model.onnx").exists()
    fw.compress(model, data, out=out, save_anyway=True, resume=True, **ASKED)
    assert (out / "model.onnx").read_bytes() == whole


def test_a_time_budget_that_is_used_up_still_gives_an_answer(made, tmp_path):
    model, data, _ = made
    report = fw.compress(model, data, out=tmp_path / "run", time_budget="1s", save_anyway=True, **ASKED)
    assert report.answer in ("yes", "not found")
    assert len(report.attempts) <= 1


def test_resume_with_another_request_is_refused(made, tmp_path):
    model, data, _ = made
    fw.compress(model, data, out=tmp_path / "run", max_candidates=1, max_size="50%")
    with pytest.raises(fw.OutputError, match="max_size: was '50%', now '40%'"):
        fw.compress(model, data, out=tmp_path / "run", max_candidates=1, max_size="40%", resume=True)


def test_a_second_run_into_the_same_folder_needs_resume(made, tmp_path):
    model, data, _ = made
    fw.compress(model, data, out=tmp_path / "run", max_size="1MB")
    with pytest.raises(fw.OutputError, match="continue it with --resume"):
        fw.compress(model, data, out=tmp_path / "run", max_size="1MB")
