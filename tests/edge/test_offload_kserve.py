"""Offload against a server made with the package kserve. Name a Python that has it in FEATHERWEIGHT_KSERVE_PYTHON."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("urllib3")
pytest.importorskip("aiohttp")

import serving
from serving import image

import featherweight as fw
from featherweight.runtime import ort

PYTHON = os.environ.get("FEATHERWEIGHT_KSERVE_PYTHON", "")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="FEATHERWEIGHT_KSERVE_PYTHON names no Python")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def port(folder):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    script = Path(__file__).with_name("kserve_server.py")
    process = subprocess.Popen(
        [PYTHON, str(script), "tail", str(serving.tail(folder)), str(number)], stderr=subprocess.DEVNULL
    )
    yield number
    process.terminate()
    process.wait(30)


@pytest.mark.parametrize("binary", [None, True])
@pytest.mark.parametrize("wire", ["float32", "int8+zstd"])
def test_a_kserve_server_continues_our_head(folder, port, binary, wire):
    expected = ort.session(serving.whole(folder)).run({"image": image()})["logits"]
    with fw.Offload(
        serving.head(folder), f"http://127.0.0.1:{port}", tail="tail",
        fallback=serving.whole(folder, "small", scale=2.0),
        binary=binary, wire=wire, deadline="20s",
    ) as model:  # fmt: skip
        assert model.wait_until_up(60), model.stats().reason
        for _ in range(3):
            reply = model.ask({"image": image()})
            assert reply.source == "split"
            np.testing.assert_allclose(reply.outputs["logits"], expected, rtol=1e-4, atol=1e-4)
        assert model.stats().wire == "float32"  # packed tensors are for servers that announce them
