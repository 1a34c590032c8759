"""Whole runs in which structure changes: limits that numbers alone miss, replay, resuming, what is reported."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

import featherweight as fw
from featherweight.graph import cost, io
from featherweight.recover import Recovered
from featherweight.report.html import render as page
from featherweight.report.text import render
from featherweight.search import prepare, problem, replay
from pipeline.small import convnet, samples
from search.fake_techniques import with_fakes

FAKES = ("plain_svd", "front_channels", "static_int8", "weight_nbit")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convnet(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    return samples(model.parent, model)


@pytest.fixture(scope="module")
def fakes():
    """The two structure techniques of the tests are there too; weights are not solved anew after them."""
    patch = pytest.MonkeyPatch()
    patch.setattr(prepare, "recover", lambda _original, reduced, *_, **__: Recovered(reduced, (), ()))
    for module in (problem, replay):
        patch.setattr(module, "all_techniques", with_fakes)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def halved(fakes, model, data, tmp_path_factory) -> tuple[fw.Report, Path]:
    """A run that may use half of the MACs."""
    out = tmp_path_factory.mktemp("halved") / "run"
    return fw.compress(model, data, max_macs="50%", techniques=FAKES, out=out, max_candidates=6), out


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def macs_of(path: Path) -> int:
    return cost.costs(io.load(path), input_shapes={"x": (1, 3, 12, 12)}).macs


def test_a_limit_on_macs_is_met_by_changing_the_structure(halved, model):
    report, out = halved
    assert report.ok
    assert report.baseline.macs == macs_of(model)
    assert report.result.macs == macs_of(out / "model.onnx") <= 0.5 * macs_of(model)
    used = {a.technique for d in report.plan.decisions for a in d.actions}
    assert used & {"plain_svd", "front_channels"}
    assert used - {"plain_svd", "front_channels"}  # and numbers on top of it


def test_the_run_folder_keeps_what_a_replay_needs_and_the_replay_gives_the_same_bytes(halved, model, tmp_path):
    _, out = halved
    assert (out / "structure.onnx").exists()
    assert not (out / "work").exists()
    again = fw.apply(model, out / "plan.json", out=tmp_path / "again.onnx")
    assert digest(again) == digest(out / "model.onnx")


def test_the_interface_stays(halved, model):
    old, new = onnx.load(model).graph, onnx.load(halved[1] / "model.onnx").graph
    assert [str(v.type) + v.name for v in (*old.input, *old.output)] == [
        str(v.type) + v.name for v in (*new.input, *new.output)
    ]


def test_replay_without_the_structure_says_what_to_keep(halved, model, tmp_path):
    for name in ("plan.json", "statistics.npz"):
        (tmp_path / name).write_bytes((halved[1] / name).read_bytes())
    with pytest.raises(fw.PlanError, match=r"needs the structure\.onnx and statistics\.npz of its run folder; keep"):
        fw.apply(model, tmp_path / "plan.json", out=tmp_path / "x.onnx")


def test_replay_refuses_another_structure_and_another_model(halved, model, tmp_path):
    for name in ("plan.json", "statistics.npz"):
        (tmp_path / name).write_bytes((halved[1] / name).read_bytes())
    (tmp_path / "structure.onnx").write_bytes(model.read_bytes())
    with pytest.raises(fw.PlanError, match="not the structure this plan was made with"):
        fw.apply(model, tmp_path / "plan.json", out=tmp_path / "x.onnx")
    (tmp_path / "other").mkdir()
    with pytest.raises(fw.PlanError, match="give the plan's own model"):
        fw.apply(convnet(tmp_path / "other", seed=5), halved[1] / "plan.json", out=tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_reports_name_what_structure_did(halved):
    report, _ = halved
    words, html = render(report, width=120), page(report)
    for shown in (words, html):
        assert "MACs" in shown
    assert "fewer" in words
    if any("front_channels" in str(d) for d in report.plan.changed()):
        assert "Channels removed" in words
        assert "Channels removed" in html
    rows = [row for row in report.layers if row.get("kind") != "channels"]
    assert sum(row["macs_after"] for row in rows) == report.result.macs
    assert sum(row["macs"] for row in rows) == report.baseline.macs


def test_macs_below_what_structure_reaches_are_refused_with_what_binds(model, data, tmp_path):
    report = fw.decide(model, data, max_macs=10_000, techniques=("channel_prune", "static_int8"), out=tmp_path / "run")
    assert report.answer == "no, proved"
    assert "MACs: no plan reaches 10000 a call; the lower bound is" in report.reason
    assert "channels of" in report.reason
    assert "at its narrowest (channel_prune(keep=" in report.reason


def test_macs_cannot_fall_by_numbers_alone(model, data, tmp_path):
    report = fw.decide(model, data, max_macs="50%", techniques=("static_int8",), out=tmp_path / "run")
    assert report.answer == "no, proved"
    assert "MACs: no plan reaches" in report.reason
    assert "no technique in use removes work" in report.reason


def test_a_float_model_of_less_structure_is_a_result(model, data, tmp_path):
    out = tmp_path / "run"
    report = fw.compress(model, data, max_size="60%", techniques="channel_prune", max_candidates=3, out=out)
    assert report.ok
    assert report.result.size_bytes <= 0.6 * report.baseline.size_bytes
    assert all(t.data_type == onnx.TensorProto.FLOAT for t in onnx.load(out / "model.onnx").graph.initializer if t.dims)
    assert digest(fw.apply(model, out, out=tmp_path / "again.onnx")) == digest(out / "model.onnx")


def test_with_nothing_asked_the_structure_stays(model, data, tmp_path):
    report = fw.compress(model, data, out=tmp_path / "run")
    assert report.result.macs == report.baseline.macs
    assert not (tmp_path / "run" / "structure.onnx").exists()


def test_structure_is_kept_in_the_plan_only_if_it_wins_by_measurement(fakes, model, data, tmp_path):
    report = fw.compress(
        model, data, minimize="size", max_drop="5%", techniques=FAKES, max_candidates=6, out=tmp_path / "run"
    )
    best = min((a for a in report.attempts if a.measured.drop <= 0.04), key=lambda a: a.measured.size_bytes)
    assert report.plan.decisions == best.plan.decisions


def test_each_point_of_a_front_says_what_it_is_made_of(fakes, model, data, tmp_path):
    report = fw.frontier(model, data, points=4, techniques=FAKES, out=tmp_path / "run")
    assert all("x" in word for word in [page(report)])
    from featherweight.report.front import front_parts
    from featherweight.report.terminal import to_text

    shown = to_text(front_parts(report), width=160)
    assert "techniques" in shown
    assert " x" in shown


def test_a_malformed_count_is_refused_before_any_work(model, data, tmp_path):
    with pytest.raises(fw.BudgetError, match="unit of a count must be"):
        fw.compress(model, data, max_macs="3 apples", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_stopped_run_finds_its_structures_again(fakes, model, data, tmp_path, monkeypatch):
    from featherweight.search import widen

    made: list[str] = []
    real = prepare.stage.run_stage

    def counted(*args, **kw):
        made.append("stage")
        return real(*args, **kw)

    monkeypatch.setattr(prepare.stage, "run_stage", counted)

    def stopped(*_args, **_kw):
        raise KeyboardInterrupt

    asked = {"max_macs": "50%", "max_candidates": 3, "techniques": FAKES, "out": tmp_path / "run"}
    with monkeypatch.context() as inner:
        inner.setattr(widen, "measure_plan", stopped)
        with pytest.raises(KeyboardInterrupt):
            fw.compress(model, data, **asked)
    first = len(made)
    assert first >= 1
    assert (tmp_path / "run" / "work" / "structure").exists()
    report = fw.compress(model, data, resume=True, **asked)
    assert report.ok
    facts = json.loads((tmp_path / "run" / "report.json").read_text())
    assert facts["result"]["macs"] == report.result.macs
    tried = {json.dumps([str(d) for d in a.plan.decisions if "channels" in d.site]) for a in report.attempts}
    assert len(made) - first < max(len(tried), 1) + 1


def test_fewer_pixels_alone_meet_a_limit_and_replay(model, data, tmp_path):
    out = tmp_path / "run"
    report = fw.compress(
        model, data, max_macs="60%", techniques=("input_resolution", "static_int8"), out=out, max_candidates=6
    )
    assert report.ok
    assert macs_of(out / "model.onnx") <= 0.6 * macs_of(model)
    (resize,) = [n for n in onnx.load(out / "model.onnx").graph.node if n.op_type == "Resize"]
    assert resize.name.startswith("x.smaller")
    used = {a.technique for d in report.plan.decisions for a in d.actions}
    assert "input_resolution" in used
    assert "resolution of x: input_resolution columns" in render(report)
    again = fw.apply(model, out, out=tmp_path / "again.onnx")
    assert digest(again) == digest(out / "model.onnx")


def test_fewer_pixels_and_fewer_channels_go_together(model, data, tmp_path):
    report = fw.compress(
        model, data, max_macs="3%", techniques=("input_resolution", "channel_prune"), out=tmp_path / "run",
        max_candidates=6,
    )  # fmt: skip
    assert report.ok
    assert report.result.macs <= 0.03 * macs_of(model)
    used = {a.technique for d in report.plan.decisions for a in d.actions}
    assert used == {"input_resolution", "channel_prune"}


@pytest.mark.parametrize("techniques", [("input_resolution",), ("input_resolution", "channel_prune")])
def test_fewer_pixels_and_nothing_else_are_a_result_though_the_file_grows(techniques, model, data, tmp_path):
    limit = "60%" if len(techniques) == 1 else "80%"
    report = fw.compress(model, data, max_macs=limit, techniques=techniques, out=tmp_path / "run", max_candidates=4)
    assert report.ok, report.reason
    assert report.result.macs <= float(limit[:-1]) / 100 * macs_of(model)


def test_memory_of_activations_is_saved_by_fewer_pixels(model, tmp_path):
    """The larger the batch, the more of the memory is activations; the search must not ask the numbers for it."""
    x = np.random.default_rng(0).normal(size=(96, 3, 12, 12)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    report = fw.compress(
        model, tmp_path / "x.npz", batch_size=32, minimize="memory", max_drop=0.5, metric="cosine",
        techniques=("input_resolution",), out=tmp_path / "run", max_candidates=4,
    )  # fmt: skip
    used = {a.technique for d in report.plan.decisions for a in d.actions}
    assert used == {"input_resolution"}
    assert report.result.peak_bytes < report.baseline.peak_bytes
