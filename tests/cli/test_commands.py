"""Every command: what it asks of the library, what it prints, how it exits."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import onnx
import pytest
from click.testing import Result

import featherweight.cli
from featherweight.cli import group
from featherweight.core import Silent
from featherweight.errors import BudgetError, ModelError

Run = Callable[..., Result]
NAMES = [m.name for m in pkgutil.iter_modules(featherweight.cli.__path__) if not m.name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_help_json_and_an_example(name: str, run: Run) -> None:
    shown = run(name, "--help")
    assert shown.exit_code == 0
    assert "--json" in shown.output
    assert f"featherweight {name}" in shown.output
    command = importlib.import_module(f"featherweight.cli.{name}").command
    assert command.short_help
    assert all(isinstance(p, click.Argument) or p.help for p in command.params)


def test_group_lists_every_command_and_the_exit_codes(run: Run) -> None:
    shown = run("--help")
    assert all(f"\n  {name} " in shown.output for name in NAMES)
    assert "3 budget not met" in shown.output
    assert run("--version").output.startswith("featherweight ")


def test_unknown_command_is_a_usage_error_with_a_near_name(run: Run) -> None:
    shown = run("compres")
    assert shown.exit_code == 2
    assert "compress" in shown.output


def test_compress_passes_everything_on(pipeline: Any, run: Run, tmp_path: Path) -> None:
    options = """
        --calibration c.npz --metric top5 --max-size 25% --max-latency 60% --max-peak-memory 50MB --max-drop 1%
        --max-macs 70%
        --minimize latency --techniques static_int8,palette --keep-float /head/* --keep-float stem --preprocess lite0
        --tokenizer t.json --batch-size 4 --target portable --threads 2 --time-budget 10m --seed 7 --resume
        --save-anyway --max-candidates 5 --target-token-file token --target-ca ca.pem
        --recover distill --trust
    """.split()  # noqa: SIM905  # reads like the command line it is
    shown = run("compress", "m.onnx", "--data", "d.npz", *options, "-o", str(tmp_path / "run"))
    assert shown.exit_code == 0, shown.output
    name, args, asked = pipeline.asked
    assert (name, args) == ("compress", (Path("m.onnx"), "d.npz"))
    assert isinstance(asked.pop("progress"), Silent)
    assert asked == {
        "calibration": "c.npz",
        "metric": "top5",
        "max_macs": "70%",
        "max_size": "25%",
        "max_latency": "60%",
        "max_peak_memory": "50MB",
        "max_drop": "1%",
        "minimize": "latency",
        "techniques": ("static_int8", "palette"),
        "keep_float": ("/head/*", "stem"),
        "preprocess": "lite0",
        "tokenizer": Path("t.json"),
        "batch_size": 4,
        "profile": "portable",
        "target_token_file": Path("token"),
        "target_ca": Path("ca.pem"),
        "recover": "distill",
        "threads": 2,
        "time_budget": "10m",
        "seed": 7,
        "resume": True,
        "save_anyway": True,
        "max_candidates": 5,
        "trust": True,
        "out": tmp_path / "run",
    }


def test_what_is_not_given_is_left_to_the_library(pipeline: Any, run: Run) -> None:
    run("compress", "m.onnx", "--data", "d", "-o", "r")
    asked = pipeline.asked[2]
    unset = ("metric", "max_size", "max_drop", "minimize", "techniques", "time_budget", "max_candidates", "calibration")
    assert all(asked[name] is None for name in unset)
    assert asked["keep_float"] == ()


@pytest.mark.parametrize(("answer", "code"), [("yes", 0), ("no, proved", 3), ("not found", 3)])
@pytest.mark.parametrize("name", ["compress", "decide"])
def test_exit_code_is_the_answer(pipeline: Any, run: Run, made_report: Any, name: str, answer: str, code: int) -> None:
    pipeline.answer = made_report(answer=answer, outcome="any word")
    shown = run(name, "m.onnx", "--data", "d", "-o", "r")
    assert shown.exit_code == code
    assert "ANY WORD" in shown.output


@pytest.mark.parametrize("name", ["compress", "decide", "frontier"])
def test_json_is_one_document_and_nothing_else(pipeline: Any, run: Run, name: str, tmp_path: Path) -> None:
    shown = run(name, "m.onnx", "--data", "d", "-o", str(tmp_path), "--json")
    raw = json.loads(shown.stdout)
    assert (raw["kind"], raw["schema"], raw["outcome"]) == ("report", 1, "met")
    assert shown.stderr == ""


def test_decide_says_its_answer_first(pipeline: Any, run: Run, made_report: Any) -> None:
    pipeline.answer = made_report(answer="no, proved", outcome="proved impossible")
    assert run("decide", "m.onnx", "--data", "d").output.startswith("answer: no, proved\n")


def test_resume_without_a_folder_is_a_usage_error(pipeline: Any, run: Run) -> None:
    shown = run("decide", "m.onnx", "--data", "d", "--resume")
    assert shown.exit_code == 2
    assert "-o RUN_DIR" in shown.output


def test_frontier_writes_page_and_document(pipeline: Any, run: Run, tmp_path: Path) -> None:
    shown = run("frontier", "m.onnx", "--data", "d", "-o", str(tmp_path), "--points", "3")
    assert pipeline.asked[2]["points"] == 3
    assert shown.exit_code == 3  # the stand-in's front is empty
    assert (tmp_path / "frontier.html").read_text().startswith("<!doctype html>")
    assert json.loads((tmp_path / "frontier.json").read_text())["kind"] == "report"


def test_apply_says_what_it_wrote(pipeline: Any, run: Run, tmp_path: Path) -> None:
    model = tmp_path / "again.onnx"
    onnx.save(onnx.ModelProto(ir_version=10, producer_name="x" * 1229), model)
    pipeline.answer = model
    assert run("apply", "m.onnx", "plan.json", "-o", str(model)).output == f"{model}: 1.23 kB\n"
    raw = json.loads(run("apply", "m.onnx", "plan.json", "-o", str(model), "--json").stdout)
    assert (raw["kind"], raw["size_bytes"]) == ("applied", 1234)


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--max-size", "5XB", "unit of a size"),
        ("--max-latency", "8", "write it like '8ms'"),
        ("--max-drop", "1", "write '1%' or 0.01"),
        ("--time-budget", "soon", "'10m', '90s' or '1h30m'"),
        ("--minimize", "everything", "'size', 'latency', 'memory', 'drop'"),
        ("--threads", "0", "x>=1"),
    ],
)
def test_malformed_quantity_is_a_usage_error(pipeline: Any, run: Run, option: str, value: str, says: str) -> None:
    shown = run("compress", "m.onnx", "--data", "d", "-o", "r", option, value)
    assert shown.exit_code == 2
    assert says in " ".join(shown.output.split())
    assert pipeline.asked is None


def test_error_is_one_message_without_traceback(pipeline: Any, run: Run) -> None:
    pipeline.answer = ModelError("node 'stem' does not exist; did you mean 'steam'?")
    shown = run("compress", "m.onnx", "--data", "d", "-o", "r")
    assert shown.exit_code == 1
    assert shown.stderr == "error: node 'stem' does not exist; did you mean 'steam'?\n"
    assert shown.stdout == ""


def test_error_with_json_is_a_document(pipeline: Any, run: Run) -> None:
    pipeline.answer = BudgetError("limits contradict")
    shown = run("compress", "m.onnx", "--data", "d", "-o", "r", "--json")
    assert shown.exit_code == 1
    assert json.loads(shown.stdout) == {
        "schema": 1,
        "kind": "error",
        "error": "BudgetError",
        "message": "limits contradict",
    }


def test_debug_shows_the_traceback(pipeline: Any, run: Run) -> None:
    pipeline.answer = ModelError("bad")
    shown = run("compress", "m.onnx", "--data", "d", "-o", "r", "--debug")
    assert isinstance(shown.exception, ModelError)


def test_bug_is_never_hidden(pipeline: Any, run: Run) -> None:
    pipeline.answer = ZeroDivisionError("a bug")
    assert isinstance(run("compress", "m.onnx", "--data", "d", "-o", "r").exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("left", "says"),
    [
        ((), "stopped before a first model was kept; what was measured is in"),
        (("model.onnx",), "stopped; best so far kept in"),
    ],
)
def test_interrupt_says_what_was_kept(
    pipeline: Any, run: Run, tmp_path: Path, left: tuple[str, ...], says: str
) -> None:
    for name in left:
        (tmp_path / name).touch()
    pipeline.answer = KeyboardInterrupt()
    shown = run("compress", "m.onnx", "--data", "d", "-o", str(tmp_path))
    assert shown.exit_code == 130
    assert shown.stderr.startswith(says)
    assert "continue with --resume" in shown.stderr


def test_interrupt_before_anything_was_written_says_so(pipeline: Any, run: Run, tmp_path: Path) -> None:
    pipeline.answer = KeyboardInterrupt()
    shown = run("compress", "m.onnx", "--data", "d", "-o", str(tmp_path / "none"))
    assert (shown.exit_code, shown.stderr) == (130, "stopped; nothing was written\n")


def test_options_stand_under_their_headings(run: Run) -> None:
    shown = run("compress", "--help").output
    order = [shown.index(f"\n{name}:\n") for name in ("Budget", "Data", "Target", "Search", "Output")]
    assert order == sorted(order)
    assert "--max-size" in shown[order[0] : order[1]]
    assert isinstance(group, click.Group)
