"""Small models that broke public tools: the public search and every pass give the right answer on real kernels.

The cases lie outside the repository; whatever is in their folder is tried. Own models of the same kinds: test_kinds.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import featherweight as fw
from e2e.judging import Case, assert_same_interface, bytes_on_disk, run, shared_cases, worst_db
from featherweight.core import Profile
from featherweight.graph import io
from featherweight.graph.normalise import normalise
from featherweight.runtime import ort
from featherweight.stats import collect
from featherweight.techniques import _half, quantize_model
from featherweight.techniques._protocol import Context

CASES = shared_cases()


def of(wanted: Callable[[Case], Any]) -> pytest.MarkDecorator:
    """Parametrise by the cases that are `wanted`; where there are none the test is skipped and says so."""
    found = [pytest.param(case, id=case.name) for case in CASES if wanted(case)]
    none = pytest.param(None, marks=pytest.mark.skip(reason="no such shared case here (set FEATHERWEIGHT_SHARED)"))
    return pytest.mark.parametrize("case", found or [none])


def has(kind: str) -> Callable[[Case], bool]:
    return lambda case: kind in case.oracle and case.facts.get("expects") != "clear error"


def runner(model: Any, feeds: Any) -> list[dict[str, np.ndarray]]:
    session = ort.session(io.to_bytes(model))
    return [session.run(f) for f in feeds]


class InProcess:
    """Stands in for the child process: small, known models need none."""

    def call(self, func: Callable[..., Any], *args: Any, timeout_s: float | None = None) -> Any:
        return func(*args)


# -- the public way ----------------------------------------------------------------------------------------


@of(has("int8"))
def test_compress_keeps_the_outputs_within_the_bound(case: Case, tmp_path: Path) -> None:
    before = case.files
    report = fw.compress(case.model, case.data, out=tmp_path / "run")
    assert report.ok, report.reason
    assert case.files == before
    result = tmp_path / "run" / "model.onnx"
    assert_same_interface(case.model, result)
    assert bytes_on_disk(result) == report.result.size_bytes <= bytes_on_disk(case.model)
    db = worst_db(case.expected, run(result, case.inputs), case.facts.get("extra", {}).get("sqnr_blocks"))
    assert db >= case.oracle["int8"]["min_sqnr_db"], f"{db:.1f} dB"
    for layer in report.layers:
        assert layer["int8"] or layer["why"], f"{layer['tensor']} stays float without a reason"


@of(lambda case: case.facts.get("expects") == "skip with reason" and "int8" not in case.oracle)
def test_what_should_be_left_alone_gives_the_same_outputs(case: Case, tmp_path: Path) -> None:
    report = fw.compress(case.model, case.data, out=tmp_path / "run")
    assert report.ok, report.reason
    result = tmp_path / "run" / "model.onnx"
    assert_same_interface(case.model, result)
    assert bytes_on_disk(result) <= bytes_on_disk(case.model)
    assert worst_db(case.expected, run(result, case.inputs)) > 20


# -- the passes by themselves ------------------------------------------------------------------------------


@pytest.mark.parametrize("int8_dot", [False, True])
@of(has("int8"))
def test_forced_int8_with_measured_fallback_meets_the_bound(case: Case, int8_dot: bool) -> None:
    model = normalise(io.load(case.model), run=runner, feeds=[case.inputs]).model
    batches = case.batches
    stats = collect(model, batches, worker=InProcess(), threads=1)
    ctx = Context(Profile("p", "x86_64", 1, 1 << 33, int8_dot), stats)
    quantized, _ = quantize_model(model, stats, ctx, runner=runner, feeds=batches)
    blocks = case.facts.get("extra", {}).get("sqnr_blocks")
    db = worst_db(case.expected, runner(quantized, [case.inputs])[0], blocks)
    assert db >= case.oracle["int8"]["min_sqnr_db"], f"{db:.1f} dB"


@of(has("fp16"))
def test_half_precision_meets_the_bound(case: Case) -> None:
    model = normalise(io.load(case.model), run=runner, feeds=[case.inputs]).model
    stats = collect(model, case.batches, worker=InProcess(), threads=1)
    _half.convert(model, Context(Profile("p", "x86_64", 1, 1 << 33, True), stats))
    db = worst_db(case.expected, runner(model, [case.inputs])[0])
    assert db >= case.oracle["fp16"]["min_sqnr_db"], f"{db:.1f} dB"


@of(has("fold"))
def test_cleaning_up_keeps_the_outputs(case: Case, tmp_path: Path) -> None:
    result = normalise(io.load(case.model), run=runner, feeds=[case.inputs])
    assert not [s for s in result.steps if s.rolled_back]
    io.save(result.model, tmp_path / "clean.onnx")
    assert_same_interface(case.model, tmp_path / "clean.onnx")
    got = run(tmp_path / "clean.onnx", case.inputs)
    for name, value in case.expected.items():
        np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=case.oracle["fold"]["atol"])


# -- budgets -----------------------------------------------------------------------------------------------


def limits(budget: dict[str, Any]) -> dict[str, Any]:
    """The oracle's limits as the arguments of `decide`."""
    asked: dict[str, Any] = {}
    if "max_bytes" in budget:
        asked["max_size"] = budget["max_bytes"]
    if "max_bytes_ratio" in budget:
        asked["max_size"] = f"{100 * budget['max_bytes_ratio']:g}%"
    asked |= {k: budget[k] for k in ("max_drop", "max_peak_memory") if k in budget}
    return asked


@of(lambda case: has("budget")(case) and limits(dict(case.oracle["budget"])))
def test_decide_gives_the_known_answer(case: Case, tmp_path: Path) -> None:
    budget = dict(case.oracle["budget"])
    report = fw.decide(case.model, case.data, out=tmp_path / "run", **limits(budget))
    if budget["answer"] != "yes":
        assert report.answer == "no, proved" if "proved" in budget["answer"] else report.answer != "yes"
        assert not (tmp_path / "run" / "model.onnx").exists()
        return
    result = tmp_path / "run" / "model.onnx"
    assert report.answer == "yes", report.reason
    assert not report.violations
    assert bytes_on_disk(result) <= budget.get(
        "max_bytes", budget.get("max_bytes_ratio", 1) * bytes_on_disk(case.model)
    )
    if budget.get("untouched"):
        assert report.outcome == "already fits"
        assert result.read_bytes() == case.model.read_bytes()
    elif "int8" in case.oracle:
        assert worst_db(case.expected, run(result, case.inputs)) >= case.oracle["int8"]["min_sqnr_db"]


@of(lambda case: has("budget")(case) and "fastest" in case.oracle["budget"]["answer"])
@pytest.mark.parametrize("asked", [{"minimize": "latency"}, {"max_latency": "100%"}, {}])
def test_where_the_original_is_fastest_it_is_kept(case: Case, asked: dict[str, str], tmp_path: Path) -> None:
    report = fw.compress(case.model, case.data, out=tmp_path / "run", **asked)
    assert report.ok, report.reason
    assert not report.plan.changed()
    got = run(tmp_path / "run" / "model.onnx", case.inputs)
    assert worst_db(case.expected, got) > 100


# -- refusals ----------------------------------------------------------------------------------------------


@of(lambda case: case.facts.get("expects") == "clear error" or "calib" in case.oracle)
def test_a_trap_gives_one_clear_error_or_is_repaired(case: Case, tmp_path: Path) -> None:
    """Bad calibration data and missing files stop at once; what only the runtime refuses may be repaired."""
    before = case.files
    try:
        report = fw.compress(case.model, case.data, out=tmp_path / "run")
    except fw.FeatherweightError as e:
        assert not (tmp_path / "run").exists()
        assert case.files == before
        _assert_says_what_is_wrong(case, e)
        return
    assert "calib" not in case.oracle or case.facts["expects"] != "clear error", "bad data went through"
    assert report.ok, report.reason
    got = run(tmp_path / "run" / "model.onnx", case.inputs)
    assert all(np.isfinite(v).all() for v in got.values() if v.dtype.kind == "f")


def _assert_says_what_is_wrong(case: Case, error: fw.FeatherweightError) -> None:
    text = str(error)
    if "calib" in case.oracle:
        assert isinstance(error, fw.DataError)
    if case.name == "calibration_contains_nan_and_inf":
        assert "batch '1', input 'x': nan at position [0, 1, 2, 3]" in text
    elif case.name == "calibration_is_empty":
        assert text.startswith("calibration data is empty")
    elif case.name == "external_data_file_missing":
        assert isinstance(error, fw.ModelError)
        assert "external_data_file_missing.data" in text
    assert len(text) > 20
    assert "Traceback" not in text


@of(lambda case: case.name == "duplicate_node_names")
def test_clashing_names_are_repaired_and_said(case: Case, tmp_path: Path) -> None:
    report = fw.compress(case.model, case.data, out=tmp_path / "run")
    assert report.ok
    assert any("its repaired form is measured" in note.text for note in report.notes)
    assert_same_interface(case.model, tmp_path / "run" / "model.onnx")
