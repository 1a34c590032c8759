"""`featherweight split` and `featherweight place` as people call them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result
from onnx import TensorProto, helper, numpy_helper

import featherweight as fw
from featherweight.cli import group

PHONE = {
    "schema": 2, "name": "phone", "arch": "arm64", "threads": 1, "memory_bytes": 4 * 10**9, "int8_dot": True,
    "rates": {"float32": 15.0}, "memory_gb_per_s": 10.0, "busy_w": 2.5, "idle_w": 0.3,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    stored = [
        numpy_helper.from_array(rng.normal(size=s).astype(np.float32), n)
        for n, s in (("w0", (64, 16)), ("w1", (16, 64)))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w0"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MatMul", ["b", "w1"], ["y"], "last"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 64]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    path = tmp_path / "m.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    (tmp_path / "phone.json").write_text(json.dumps(PHONE))
    return path


def run(*arguments: Any) -> Result:
    return CliRunner().invoke(group, [str(a) for a in arguments])


def run_json(*arguments: Any) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code in (0, 3), result.output
    return json.loads(result.stdout)


def place(model: Path, *more: Any) -> tuple[Any, ...]:
    return ("place", model, "--device", model.parent / "phone.json", "--requests", "1M", *more)


def test_list(model: Path) -> None:
    result = run("split", model, "--list")
    assert result.exit_code == 0
    assert "relu" in result.output or "first" in result.output
    raw = run_json("split", model, "--list", "--shape", "x=4x64")
    assert raw["kind"] == "cuts"
    assert [c["wire_bytes"] for c in raw["cuts"]] == [256, 256]


def test_split_checks_itself(model: Path) -> None:
    result = run("split", model, "--at", "b", "-o", model.parent / "out")
    assert result.exit_code == 0, result.output
    assert "equal the whole" in result.output
    assert (model.parent / "out" / "split.json").is_file()
    raw = run_json("split", model, "--at", "1", "-o", model.parent / "out")
    assert raw["check"]["equal"]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--list", "--at", "b"), 2, "either --list or --at"),
        ((), 2, "either --list or --at"),
        (("--at", "b"), 2, "-o DIR"),
        (("--list", "--shape", "x=4"), 1, "has 2 axes"),
        (("--list", "--shape", "x=0x64"), 2, "sizes above 0"),
        (("--list", "--shape", "4x64"), 2, "sizes above 0"),
        (("--list", "--shape", "z=4x64"), 1, "but got one for ['z']"),
        (("--list", "--shape", "x=4x64x2"), 1, "has 2 axes"),
        (("--at", "nowhere", "-o", "out"), 1, "is none"),
    ],
)
def test_wrong_use_is_told(model: Path, arguments: tuple[str, ...], code: int, words: str) -> None:
    result = run("split", model, *arguments)
    assert result.exit_code == code
    assert words in result.output


def test_place_shows_every_option(model: Path) -> None:
    result = run(*place(model))
    assert result.exit_code == 0, result.output
    raw = run_json(*place(model))
    assert raw["kind"] == "placement"
    kinds = [(o["kind"], o["place"]) for o in raw["options"]]
    servers = ["edge", "on-premises", "aws-cpu", "aws-gpu", "aws-serverless"]
    assert sorted(kinds) == sorted([("device", "device"), *((k, s) for k in ("server", "split") for s in servers)])
    assert {p["offer"]["kind"] for p in raw["asked"]["places"]} == {"owned", "instance", "serverless"}
    assert all(p["offer"]["sources"] for p in raw["asked"]["places"])


def test_place_says_no_with_code_3(model: Path) -> None:
    raw = run(*place(model, "--max-latency", "1ms", "--measured", "device=12ms"))
    assert raw.exit_code == 3
    assert "no, proved" in raw.output
    assert "latency at most 1 ms: p95 12 ms" in raw.output


def test_rules_choose_the_device(model: Path) -> None:
    raw = run_json(*place(model, "--data-stays", "device", "--must-work-offline", "--measured", "device=12ms"))
    assert raw["answer"] == "yes"
    assert raw["best"] == "original: device"
    assert raw["options"][0]["p95_ms"] == pytest.approx(12.0)
    assert raw["options"][0]["source"] == "measured"
    assert {o["kind"] for o in raw["options"] if not o["breaks"]} == {"device"}


def test_files_of_a_placement(model: Path) -> None:
    from PIL import Image

    out = model.parent / "placed"
    more = ("--edge", "none", "--onprem", "none", "--cloud", "aws-serverless", "--compressed", model)
    result = run(*place(model, *more, "-o", out))
    assert result.exit_code == 0, result.output
    page = (out / "placement.html").read_text()
    assert "<script" not in page
    assert "who wins over bandwidth" in page
    with Image.open(out / "placement.png") as image:
        assert image.size == (1520, 940)
        assert len(image.getcolors(1 << 20) or ()) > 3
    raw = json.loads((out / "placement.json").read_text())
    assert len(raw["winners"]["cells"]) == 25
    assert {o["model"] for o in raw["options"]} == {"original", "compressed"}


def test_names_in_the_page_are_escaped(model: Path) -> None:
    named = model.parent / "<b>&.onnx"
    named.write_bytes(model.read_bytes())
    out = model.parent / "placed"
    more = ("--edge", "none", "--onprem", "none", "--cloud", "aws-cpu")
    assert run(*place(named, *more, "-o", out)).exit_code == 0
    assert "<b>&" not in (out / "placement.html").read_text()


@pytest.mark.parametrize(
    ("more", "code", "words"),
    [
        (("--cloud", "nimbus"), 1, "an offer must be one of"),
        (("--edge", "aws-cpu"), 1, "kind owned"),
        (("--link", "5.5g"), 1, "a link must be one of"),
        (("--measured", "moon=3ms"), 1, "one of the places device, edge"),
        (("--measured", "3ms"), 2, "written like device=12ms"),
        (("--measured", "device=3%"), 1, "unit ms or s"),
        (("--max-latency", "50%"), 2, "is a time"),
        (("--not-private", "z"), 1, "must be an input (x)"),
        (("--cloud", "aws-cpu", "--cloud", "aws-cpu"), 1, "there twice"),
        (("--requests", "many"), 2, "a count"),
    ],
)
def test_wrong_use_of_place_is_told(model: Path, more: tuple[str, ...], code: int, words: str) -> None:
    result = run(*place(model, *more))
    assert result.exit_code == code, result.output
    assert words in result.output


def test_from_python(model: Path) -> None:
    made = fw.split(model, "b", model.parent / "py")
    assert [t.name for t in made.wire] == ["b"]
    found = fw.place(model, device=model.parent / "phone.json", requests="3M")
    assert found.ok
    assert found.placement.best is not None
