"""The door in the pipeline and on the command line: a run folder with its source, resumed, refused and cleaned up."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")

import featherweight as fw  # noqa: E402
from featherweight.cli import group  # noqa: E402
from featherweight.graph import io  # noqa: E402


@pytest.fixture(scope="module")
def net() -> torch.nn.Module:  # type: ignore[name-defined]
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    return {"input": np.random.default_rng(0).standard_normal((240, 16)).astype(np.float32)}


@pytest.fixture(scope="module")
def program(net, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("program") / "net.pt2"
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(net.eval(), (torch.randn(2, 16),), dynamic_shapes=shapes), path)
    return path


def test_a_module_is_compressed_and_the_run_resumed(net, data, tmp_path):
    asked = {"max_size": "50%", "max_candidates": 2, "out": tmp_path / "run"}
    report = fw.compress(net, data, **asked)
    assert report.outcome == "met"
    assert report.notes[0].where == "Sequential"
    assert report.notes[0].text.startswith("converted from Sequential: largest difference")
    assert json.loads((tmp_path / "run" / "source.json").read_text())["source"] == "Sequential"
    assert "0.weight" in io.load(tmp_path / "run" / "source.onnx").graph.initializers
    stamp = (tmp_path / "run" / "source.onnx").stat().st_mtime_ns
    again = fw.compress(net, data, **asked, resume=True)
    assert again.outcome == "met"
    assert (tmp_path / "run" / "source.onnx").stat().st_mtime_ns == stamp
    with pytest.raises(fw.OutputError, match="already holds a run"):
        fw.compress(net, data, **asked)
    assert (tmp_path / "run" / "source.onnx").stat().st_mtime_ns == stamp


def test_a_refused_run_leaves_nothing(net, data, tmp_path):
    wrong = {"other": data["input"]}
    with pytest.raises(fw.DataError, match="lacks 'input'"):
        fw.compress(net, wrong, max_size="50%", out=tmp_path / "run")
    narrow = {"input": data["input"][:, :5]}
    with pytest.raises(fw.DataError):
        fw.compress(net, narrow, max_size="50%", out=tmp_path / "run", example_inputs=torch.randn(1, 16))
    with pytest.raises(fw.BudgetError):  # known before anything is converted
        fw.compress(net, data, minimize="beauty", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def call(*arguments: object):
    return CliRunner().invoke(group, [str(a) for a in arguments])


def test_commands_take_a_program(program, tmp_path):
    written = call("convert", program, "-o", tmp_path / "net.onnx", "--json")
    assert written.exit_code == 0, written.output
    answer = json.loads(written.stdout)
    assert (answer["kind"], answer["source"]) == ("converted", "net.pt2")
    assert answer["largest_difference"] < 1e-5
    assert answer["size_bytes"] == (tmp_path / "net.onnx").stat().st_size
    shown = call("inspect", program, "--json")
    assert json.loads(shown.stdout)["parameters"] == 16 * 64 + 64 + 64 * 4 + 4
    assert "converted from net.pt2: largest difference" in shown.stderr


@pytest.mark.parametrize(
    "command", [("inspect",), ("compress", "--data", "d.npz", "-o", "run"), ("convert", "-o", "x.onnx")]
)
def test_pickles_need_trust(command, net, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez("d.npz", input=np.zeros((4, 16), np.float32))
    torch.save(net, "net.pt")
    refused = call(command[0], "net.pt", *command[1:])
    assert refused.exit_code == 1
    assert "can run any code" in refused.stderr
    assert not Path("run").exists()


def test_a_trusted_module_takes_its_examples_from_the_data(net, data, tmp_path):
    torch.save(net, tmp_path / "net.pt")
    np.savez(tmp_path / "pixels.npz", pixels=data["input"])
    for nothing in (None, tmp_path / "pixels.npz"):
        with pytest.raises(fw.DataError, match=r"lacks 'input'|needs an example"):
            fw.compress(tmp_path / "net.pt", nothing, max_size="50%", out=tmp_path / "run", trust=True)
    np.savez(tmp_path / "data.npz", **data)
    files = [tmp_path / name for name in ("net.pt", "data.npz", "run")]
    said = call("compress", files[0], "--data", files[1], "--trust", "--max-size", "50%", "-o", files[2], "--quiet")
    assert said.exit_code == 0, said.output
    alone = call("convert", files[0], "--trust", "--example", files[1], "-o", tmp_path / "net.onnx")
    assert alone.exit_code == 0, alone.output
    absent = call("convert", files[0], "--trust", "--example", tmp_path / "typo.npz", "-o", tmp_path / "net.onnx")
    assert "typo.npz" in absent.stderr
    report = fw.compress(
        tmp_path / "net.pt", data, max_size="50%", max_candidates=2, out=tmp_path / "other", trust=True,
        example_inputs=torch.randn(2, 16),
    )  # fmt: skip
    assert report.outcome == "met"


def test_an_example_is_for_pickled_modules(program, tmp_path):
    said = call("convert", program, "--example", tmp_path / "x.npz", "-o", tmp_path / "net.onnx")
    assert said.exit_code == 1
    assert "--example is for pickled modules" in said.stderr


def narrow() -> torch.nn.Module:  # type: ignore[name-defined]
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))


def test_a_module_teaches_a_module(net, data, tmp_path):
    found = fw.distill(net, narrow(), data, max_steps=60, stages="end", out=tmp_path / "run")
    assert found.gain > 0
    assert found.notes[0].text.startswith("converted from Sequential: largest difference")
    assert "0.weight" in io.load(tmp_path / "run" / "source.onnx").graph.initializers
    assert io.load(tmp_path / "run" / "model.onnx").graph.initializers["0.weight"].shape == (8, 16)


def test_a_refused_lesson_leaves_nothing(net, data, tmp_path):
    with pytest.raises(fw.ModelError, match="student's output"):
        fw.distill(net, torch.nn.Linear(16, 5), data, out=tmp_path / "run", max_steps=2)
    assert not (tmp_path / "run").exists()


def test_a_program_teaches_on_the_command_line(program, data, tmp_path):
    np.savez(tmp_path / "data.npz", **data)
    asked = ("--student", "width=50%", "--data", tmp_path / "data.npz", "--max-steps", 5, "-o", tmp_path / "run")
    done = call("distill", program, *asked, "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["notes"][0]["text"].startswith("converted from net.pt2")


def test_pickled_teachers_and_students_need_trust(net, program, data, tmp_path):
    torch.save(net, tmp_path / "net.pt")
    np.savez(tmp_path / "data.npz", **data)
    asked = ("--data", tmp_path / "data.npz", "--max-steps", 2, "-o", tmp_path / "run")
    for teacher, student in ((tmp_path / "net.pt", "width=50%"), (program, tmp_path / "net.pt")):
        done = call("distill", teacher, "--student", student, *asked)
        assert done.exit_code == 1
        assert "can run any code" in done.stderr
        assert not (tmp_path / "run").exists()
    assert call("distill", program, "--student", tmp_path / "net.pt", *asked, "--trust").exit_code == 0


def test_comparing_a_module_with_its_program(net, data, program):
    found = fw.compare(net, program, data, example_inputs=torch.randn(1, 16))
    assert found.candidate.drop == pytest.approx(0, abs=1e-6)
    assert {n.where for n in found.notes} >= {"Sequential", "net.pt2"}


@pytest.mark.skipif(sys.platform == "win32", reason="reads /proc")
def test_files_are_read_in_a_child(program, tmp_path, monkeypatch):
    import featherweight.convert.door as door

    monkeypatch.setattr(door, "to_onnx", lambda *_a, **_k: pytest.fail("in this process"))
    from featherweight.convert import convert_file

    assert convert_file(program, tmp_path / "m.onnx").largest_difference < 1e-5
