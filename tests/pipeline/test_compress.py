"""Whole runs on a small network: the three answers, what is written, what is never touched."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

import featherweight as fw
from featherweight.core import Plan
from pipeline.small import convnet, samples


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convnet(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def data(model: Path) -> Path:
    return samples(model.parent, model)


@pytest.fixture(scope="module")
def plain(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[fw.Report, Path, str]:
    """One default run: the report, its folder, the hash of the user's file before it."""
    before = digest(model)
    out = tmp_path_factory.mktemp("plain") / "run"
    return fw.compress(model, data, out=out), out, before


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def outputs(path: Path, x: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]


def test_the_default_is_an_eight_bit_model_that_answers_alike(plain, model, data):
    report, out, _ = plain
    assert report.ok
    assert report.outcome == "met"
    written = out / "model.onnx"
    assert written.stat().st_size == report.result.size_bytes
    assert report.size_ratio < 0.5
    with np.load(data) as arrays:
        a, b = outputs(model, arrays["x"]), outputs(written, arrays["x"])
    noise = ((a - b) ** 2).sum() / (a**2).sum()
    assert noise < 10**-2.5  # 25 dB
    assert (a.argmax(1) == b.argmax(1)).mean() > 0.95


def test_the_users_file_is_untouched_and_the_interface_kept(plain, model):
    _, out, before = plain
    assert digest(model) == before
    old, new = onnx.load(model).graph, onnx.load(out / "model.onnx").graph
    assert [str(v.type) + v.name for v in old.input] == [str(v.type) + v.name for v in new.input]
    assert [str(v.type) + v.name for v in old.output] == [str(v.type) + v.name for v in new.output]


def test_the_run_folder_holds_model_plan_and_reports_and_nothing_half_done(plain):
    report, out, _ = plain
    assert {p.name for p in out.iterdir()} == {
        "model.onnx", "plan.json", "report.json", "report.html", "statistics.npz", "journal.sqlite",
    }  # fmt: skip
    facts = json.loads((out / "report.json").read_text())
    assert facts["result"]["size_bytes"] == report.result.size_bytes
    assert Plan.from_json((out / "plan.json").read_text()) == report.plan


def test_figures_are_of_samples_the_search_never_saw(plain, data):
    report, _, _ = plain
    assert report.result.n_samples == report.facts["samples"]["holdout"] == 48
    assert sum(report.facts["samples"].values()) == 120
    assert report.result.drop_interval is not None
    assert report.result.drop_interval.low <= report.result.drop <= report.result.drop_interval.high
    assert report.result.latency_ratio is not None
    assert report.result.peak_bytes is not None


def test_every_site_is_reported_with_what_was_decided(plain):
    report, _, _ = plain
    assert [layer["tensor"] for layer in report.layers] == ["w1", "w2", "w3", "w4"]
    assert all(layer["decision"] for layer in report.layers)
    assert {d.site for d in report.plan.decisions} == {"w1", "w2", "w3", "w4"}


def test_replaying_the_plan_gives_the_same_bytes(plain, model, tmp_path):
    _, out, _ = plain
    again = fw.apply(model, out / "plan.json", out=tmp_path / "again.onnx")
    assert digest(again) == digest(out / "model.onnx")


def test_a_plan_refuses_another_model(plain, tmp_path):
    _, out, _ = plain
    (tmp_path / "other").mkdir()
    other = convnet(tmp_path / "other", seed=5)
    with pytest.raises(fw.PlanError, match="another model"):
        fw.apply(other, out / "plan.json", out=tmp_path / "x.onnx")
    assert not (tmp_path / "x.onnx").exists()


def test_a_plan_without_its_statistics_says_what_is_missing(plain, model, tmp_path):
    _, out, _ = plain
    (tmp_path / "plan.json").write_text((out / "plan.json").read_text())
    with pytest.raises(fw.PlanError, match=r"needs the statistics\.npz of its run folder"):
        fw.apply(model, tmp_path / "plan.json", out=tmp_path / "x.onnx")


def test_a_size_limit_is_met_with_the_least_drop(model, data, tmp_path):
    report = fw.compress(model, data, max_size="20%", out=tmp_path / "run")
    assert report.ok
    assert report.result.size_bytes <= 0.2 * report.baseline.size_bytes
    assert (tmp_path / "run" / "model.onnx").stat().st_size == report.result.size_bytes


def test_a_tighter_limit_never_gives_a_bigger_model(model, data, tmp_path):
    sizes = [
        fw.compress(model, data, max_size=share, out=tmp_path / share, max_candidates=4).result.size_bytes
        for share in ("60%", "30%", "18%")
    ]
    assert sizes == sorted(sizes, reverse=True)


def test_the_smallest_model_within_a_drop(model, data, tmp_path):
    report = fw.compress(model, data, max_drop="5%", minimize="size", out=tmp_path / "run")
    assert report.attempts
    assert report.result.size_bytes < 0.25 * report.baseline.size_bytes
    assert report.ok == (report.result.drop <= 0.05)


def test_decide_yes_comes_with_a_model(model, data, tmp_path):
    report = fw.decide(model, data, max_size="30%", max_drop="10%", out=tmp_path / "run")
    assert report.answer == "yes"
    assert (tmp_path / "run" / "model.onnx").exists()


def test_decide_no_is_proved_and_names_what_binds(model, data, tmp_path):
    report = fw.decide(model, data, max_size=500, out=tmp_path / "run")
    assert report.answer == "no, proved"
    assert "no plan reaches 500 B" in report.reason
    assert not (tmp_path / "run" / "model.onnx").exists()


def test_decide_memory_no_is_proved_by_inputs_and_outputs(model, data, tmp_path):
    report = fw.decide(model, data, max_peak_memory=1000, out=tmp_path / "run")
    assert report.answer == "no, proved"
    assert "'x' of 1728 B" in report.reason  # 3 * 12 * 12 float32


def test_not_found_says_how_near_it_came(model, data, tmp_path):
    report = fw.decide(model, data, max_size="5.5%", max_drop=0.0, out=tmp_path / "run")
    assert report.answer == "not found"
    assert report.violations
    assert not (tmp_path / "run" / "model.onnx").exists()


def test_a_model_already_within_the_budget_is_returned_byte_for_byte(model, data, tmp_path):
    report = fw.decide(model, data, max_size="1MB", out=tmp_path / "run")
    assert (report.answer, report.outcome) == ("yes", "already fits")
    assert digest(tmp_path / "run" / "model.onnx") == digest(model)


def test_kept_float_layers_stay_as_they_were(model, data, tmp_path):
    fw.compress(model, data, keep_float=["head", "stem"], out=tmp_path / "run")
    before = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(model).graph.initializer}
    after = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(tmp_path / "run/model.onnx").graph.initializer}
    assert np.array_equal(after["w4"], before["w4"])
    assert after["w1"].dtype == np.float32


def test_unknown_layer_pattern_lists_near_names(model, data, tmp_path):
    with pytest.raises(fw.ModelError, match=r"'hed' matches no node; did you mean head"):
        fw.compress(model, data, keep_float=["hed"], out=tmp_path / "run")


def test_unknown_technique_lists_near_names(model, data, tmp_path):
    with pytest.raises(fw.TechniqueError, match=r"'static_int9'; did you mean static_int8"):
        fw.compress(model, data, techniques=["static_int9"], out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_unlabelled_data_is_judged_by_agreement_with_the_original_and_said_so(model, tmp_path):
    data = samples(tmp_path, model, labelled=False)
    report = fw.compress(model, data, out=tmp_path / "run")
    assert report.result.metric_name == "agreement"
    assert report.baseline.metric == 1.0
    assert "no labels" in report.facts["metric"]


def test_a_front_trades_size_against_drop(model, data, tmp_path):
    report = fw.frontier(model, data, points=4, out=tmp_path / "run")
    sizes = [a.measured.size_bytes for a in report.front]
    drops = [a.measured.drop for a in report.front]
    assert len(report.attempts) >= 3
    assert sizes == sorted(sizes)
    assert drops == sorted(drops, reverse=True)


def test_compare_pairs_two_files_on_the_same_data(plain, model, data):
    _, out, _ = plain
    found = fw.compare(model, out / "model.onnx", data, metric="accuracy")
    assert found.candidate.n_samples == 120
    assert found.original.metric == pytest.approx(0.95)
    assert found.candidate.drop == pytest.approx(found.original.metric - found.candidate.metric)


def test_two_models_of_different_inputs_are_not_compared(model, data, tmp_path):
    other = onnx.load(model)
    other.graph.input[0].name = other.graph.node[0].input[0] = "image"
    onnx.save(other, tmp_path / "other.onnx")
    with pytest.raises(fw.ModelError, match=r"same inputs to be compared, but got \['x'\] and \['image'\]"):
        fw.compare(model, tmp_path / "other.onnx", data)


def test_a_request_refused_at_the_baseline_leaves_the_folder_free(model, data, tmp_path):
    with pytest.raises(fw.FeatherweightError, match="metric must be one of"):
        fw.compress(model, data, metric="acuracy", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
