"""--target and --targets: which device, whether it fits, and that a prediction is never shown as a measurement."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

import featherweight as fw
from featherweight.cli import group
from featherweight.core import Budget, Measurement
from featherweight.edge.predicting import device_of
from featherweight.errors import DataError
from featherweight.inspection import inspect
from featherweight.report.json import read
from featherweight.runtime.targets import shipped_profiles, this_machine, to_json
from featherweight.target_view import target_view


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two dense layers of 64 KB, one input of 64 values and an open batch."""
    rng = np.random.default_rng(0)
    stored = [
        numpy_helper.from_array((rng.normal(size=(64, 256)) / 8).astype(np.float32), "w1"),
        numpy_helper.from_array((rng.normal(size=(256, 64)) / 16).astype(np.float32), "w2"),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w1"], ["a"], "first"),
        helper.make_node("Relu", ["a"], ["b"], "relu"),
        helper.make_node("MatMul", ["b", "w2"], ["y"], "second"),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 64]) for n in "xy")
    graph = helper.make_graph(nodes, "g", [x], [y], stored)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "dense.onnx"
    path.write_bytes(proto.SerializeToString())
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, x=np.random.default_rng(1).normal(size=(64, 64)).astype(np.float32))
    return path


def run(*arguments: str) -> object:
    return CliRunner().invoke(group, list(arguments), prog_name="featherweight")


def test_every_shipped_device_is_in_the_table(model) -> None:
    view = target_view(model)
    assert [line.name for line in view.lines] == [p.name for p in shipped_profiles()]
    by_name = {line.name: line for line in view.lines}
    assert by_name["raspberry-pi-5"].fits
    assert by_name["raspberry-pi-5"].latency_ms > 0
    assert by_name["raspberry-pi-5"].label == "predicted"
    small = by_name["stm32h7"]
    assert not small.fits
    assert small.reasons == ("ONNX Runtime does not run there: the file must be converted for a runtime that does",)
    assert small.latency_ms > by_name["raspberry-pi-4"].latency_ms > by_name["raspberry-pi-5"].latency_ms


def test_the_table_is_printed_and_given_as_json(model) -> None:
    shown = run("inspect", str(model), "--targets")
    assert shown.exit_code == 0, shown.output
    assert "latency predicted from each device's profile, not measured" in shown.stdout
    assert "stm32h7: ONNX Runtime does not run there" in " ".join(shown.stdout.split())
    raw = json.loads(run("inspect", str(model), "--targets", "--json").stdout)
    assert raw["kind"] == "targets"
    assert {line["label"] for line in raw["lines"]} == {"predicted"}


def test_a_device_of_ones_own_comes_first(model, tmp_path) -> None:
    mine = next(p for p in shipped_profiles() if p.name == "phone")
    (tmp_path / "mine.json").write_text(to_json(mine).replace('"phone"', '"mine"'))
    raw = json.loads(run("inspect", str(model), "--targets", "--json", "--target", str(tmp_path / "mine.json")).stdout)
    assert raw["lines"][0]["name"] == "mine"


def test_inspect_on_a_device_predicts_and_says_so(model) -> None:
    found = inspect(model, profile="raspberry-pi-4", batch=3)
    assert found.fit.ok
    assert found.predicted_ms > 0
    assert all(n.latency_ms is None for n in found.nodes)
    assert sum(n.predicted_ms or 0 for n in found.nodes) <= found.predicted_ms
    assert found.predicted_ms > inspect(model, profile="raspberry-pi-4").predicted_ms
    shown = run("inspect", str(model), "--target", "raspberry-pi-4").stdout
    assert "On raspberry-pi-4" in shown
    assert "predicted from the profile" in shown
    assert "in all nodes, predicted" in shown
    assert "measured" not in shown


def test_inspect_here_measures(model, data) -> None:
    found = inspect(model, data=str(data))
    assert found.predicted_ms is None
    assert found.fit is None
    assert any(n.latency_ms for n in found.nodes)
    assert all(n.predicted_ms is None for n in found.nodes)


def test_this_machine_is_not_predicted_for(model) -> None:
    found = inspect(model, profile="this")
    assert found.predicted_ms is None
    assert found.fit.ok
    assert not any("rates" in n.text for n in found.notes)


def test_a_profile_may_be_given_as_it_is(model) -> None:
    phone = next(p for p in shipped_profiles() if p.name == "phone")
    assert inspect(model, profile=phone).predicted_ms == inspect(model, profile="phone").predicted_ms


@pytest.mark.parametrize("target", [None, "this", "portable"])
def test_these_are_measured_here(target) -> None:
    assert device_of(target) is None


def test_a_device_elsewhere_is_predicted_for(tmp_path) -> None:
    assert device_of("raspberry-pi-4").name == "raspberry-pi-4"
    (tmp_path / "here.json").write_text(to_json(this_machine()))
    assert device_of(tmp_path / "here.json") is None
    with pytest.raises(DataError, match="a profile must be one of"):
        device_of("ghost")


def test_a_search_for_a_device_judges_by_prediction(model, data, tmp_path) -> None:
    asked = {"techniques": ("dynamic_int8",), "max_candidates": 2, "target": "raspberry-pi-4"}
    report = fw.compress(model, data, out=tmp_path / "run", max_latency="1ms", max_drop=0.5, minimize="size", **asked)
    assert report.ok
    assert report.result.latency_from == "predicted"
    assert report.baseline.latency_from == "predicted"
    assert report.result.p95_ms is None
    assert 0 < report.result.latency_ms < 1
    assert report.facts["target"] == "raspberry-pi-4"
    texts = [n.text for n in report.notes if n.where == "raspberry-pi-4"]
    assert any(t.startswith("latency is predicted from its profile") for t in texts)
    assert any(t.startswith("fits: ") for t in texts)
    assert read(tmp_path / "run" / "report.json").result.latency_from == "predicted"
    assert "predicted latency" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.slow
def test_a_limit_that_is_not_met_says_predicted(model, data, tmp_path) -> None:
    report = fw.decide(
        model,
        data,
        out=tmp_path / "run",
        max_latency="1us",
        techniques=("dynamic_int8",),
        max_candidates=2,
        target="phone",
    )
    assert report.answer == "not found"
    assert any(v.startswith("predicted latency ") for v in report.violations)


@pytest.mark.slow
def test_the_storage_of_a_device_is_a_limit(model, data, tmp_path) -> None:
    small = next(p for p in shipped_profiles() if p.name == "phone")
    text = to_json(small).replace(f'"storage_bytes": {small.storage_bytes}', '"storage_bytes": 60000')
    (tmp_path / "small.json").write_text(text)
    report = fw.decide(
        model, data, out=tmp_path / "run", techniques=("weight_nbit", "dynamic_int8"), max_candidates=3,
        target=tmp_path / "small.json",
    )  # fmt: skip
    assert report.budget.max_size_bytes == 60000
    assert report.ok
    assert any("is the limit on the size" in n.text for n in report.notes)


def test_violations_name_what_was_predicted() -> None:
    budget = Budget(max_latency_ms=1.0, max_latency_ratio=0.5)
    measured = Measurement(1, latency_ms=2.0, latency_ratio=0.9)
    assert budget.violations(measured)[0].startswith("latency 2 ms")
    predicted = Measurement(1, latency_ms=2.0, latency_ratio=0.9, latency_from="predicted")
    assert [v.split(" 0.9")[0].split(" 2 ")[0] for v in budget.violations(predicted)] == [
        "predicted latency", "predicted latency ratio",
    ]  # fmt: skip
