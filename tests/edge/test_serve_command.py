"""`featherweight serve` as a process: it says where it serves, answers, and ends cleanly when told to."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import urllib.request

import pytest

pytest.importorskip("aiohttp")

import serving
from click.testing import CliRunner

from featherweight.cli import serve


def test_it_serves_until_sigterm(tmp_path):
    command = [sys.executable, "-m", "featherweight.cli", "serve", f"m={serving.whole(tmp_path)}"]
    process = subprocess.Popen(
        [*command, "--port", "0", "--access-log"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        line = process.stdout.readline()
        url = re.search(r"serving m on (http://127\.0\.0\.1:\d+)$", line.strip()).group(1)
        request = json.dumps({"inputs": [serving.tensor("image", serving.image())]}).encode()
        with urllib.request.urlopen(f"{url}/v2/models/m/infer", request, timeout=20) as answer:
            assert json.load(answer)["outputs"][0]["shape"] == [1, 5]
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == 0
    assert "requests are joined along axis 0" in errors
    assert "'/v2/models/m/infer' 200" in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["absent.onnx"], 1, "must be a file"),
        (["--host", "0.0.0.0", "m.onnx"], 1, "needs a token"),
        (["--tls-cert", "c.pem", "m.onnx"], 2, "belong together"),
        (["--token-file", "absent", "m.onnx"], 1, "cannot be read"),
        (["--max-delay", "5%", "m.onnx"], 1, "must be a time"),
        (["--max-delay", "soon", "m.onnx"], 2, "latency"),
        (["a/m.onnx", "b/m.onnx"], 1, "name of its own"),
        ([], 2, "MODEL"),
    ],
)
def test_what_cannot_be_served_is_said(arguments, code, words):
    found = CliRunner().invoke(serve.command, arguments)
    assert found.exit_code == code
    assert words in found.output


def test_an_address_in_use_is_said(tmp_path):
    with serving.serving([serving.whole(tmp_path)]) as running:
        told = [str(serving.whole(tmp_path, "other")), "--port", str(running.port), "--json"]
        found = subprocess.run(
            [sys.executable, "-m", "featherweight.cli", "serve", *told], capture_output=True, text=True, timeout=60
        )
    assert found.returncode == 1
    assert "give another --port" in json.loads(found.stdout)["message"]
