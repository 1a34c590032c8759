"""Measurements have sane fields. Nothing here asserts how long anything took."""

from __future__ import annotations

import gc
import os
import sys

import numpy as np
import pytest
import scipy.stats
import small_models

from featherweight.errors import RunError
from featherweight.runtime import measure
from featherweight.runtime.floors import gemm_peaks
from featherweight.runtime.ort import optimised_ops, run_model
from featherweight.runtime.sandbox import Worker
from featherweight.runtime.targets import quiet_cpus

X = {"x": np.random.default_rng(0).standard_normal((1, 16, 32, 32)).astype(np.float32)}


@pytest.fixture(scope="module")
def conv(tmp_path_factory):
    return small_models.conv_relu(tmp_path_factory.mktemp("m") / "conv.onnx")


def test_latency_has_every_field(conv):
    got = measure.latency(conv, conv, X, max_turns=15, time_limit_s=5)
    assert 5 <= got.turns <= 15
    assert 0 < got.original_min_ms <= got.original_ms <= got.original_p95_ms
    assert 0 < got.candidate_min_ms <= got.candidate_ms <= got.candidate_p95_ms
    assert got.ratio_interval.low <= got.ratio <= got.ratio_interval.high
    assert got.speedup == pytest.approx(1 / got.ratio)
    assert got.ratio_of_minimums == pytest.approx(got.candidate_min_ms / got.original_min_ms)
    assert got.threads == 1
    if sys.platform == "linux":
        assert len(got.cpus) == 1


def test_latency_takes_several_inputs_and_needs_one(conv):
    assert measure.latency(conv, conv, [X, X], max_turns=5).turns == 5
    with pytest.raises(RunError, match="at least one input"):
        measure.latency(conv, conv, [])
    with pytest.raises(RunError, match=r"takes the inputs \['x'\]"):
        measure.latency(conv, conv, {"wrong": X["x"]})


def test_the_interval_of_a_median_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        low <= 0 <= high for low, high in (measure.median_interval(list(rng.standard_normal(21))) for _ in range(2000))
    ]
    exact = 1 - 2 * scipy.stats.binom.cdf(5, 21, 0.5)  # between the 6th and the 16th of 21 values
    assert exact >= 0.95
    assert np.mean(hits) == pytest.approx(exact, abs=0.012)
    assert measure.median_interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


def test_memory_sees_the_weights(tmp_path):
    w = np.random.default_rng(0).standard_normal((2048, 2048)).astype(np.float32)  # 16.8 MB
    path = small_models.linear(tmp_path / "big.onnx", w)
    got = measure.memory(path, {"x": np.ones((1, 2048), np.float32)})
    assert got.resident_bytes >= 0.9 * w.nbytes
    assert got.peak_bytes == max(got.run_peak_bytes, got.load_peak_bytes)
    assert got.load_peak_bytes >= got.resident_bytes
    assert got.peak_bytes < 20 * w.nbytes
    assert got.load_ms > 0
    small = small_models.linear(tmp_path / "small.onnx", w[:, :16])
    assert measure.peak_memory(small, {"x": np.ones((1, 2048), np.float32)}) < got.peak_bytes - w.nbytes // 2


def test_the_sampling_watch_sees_a_peak_too(monkeypatch):
    monkeypatch.setattr(measure, "_status", lambda field: None)
    gc.collect()  # what earlier tests left must not be freed while this one watches
    before = measure._rss_bytes()
    with measure.PeakWatch() as watch:
        block = np.ones(256 << 20, np.uint8)
        end = 0
        while watch.peak_bytes < before + (60 << 20) and end < 2000:
            end += 1
            np.add(block, 0, out=block)
        del block
    assert watch.peak_bytes >= before + (60 << 20)


def test_node_times_go_to_the_files_nodes(conv):
    got = measure.node_times(conv, X, calls=3)
    assert {"conv1", "pool1"} <= set(got.ms)
    assert "relu1" not in got.ms
    assert all(v >= 0 for v in got.ms.values())
    assert got.op_types["conv1"] in ("Conv", "FusedConv")
    assert got.kernels["GlobalAveragePool"] == 1
    with Worker() as worker:
        assert set(measure.node_times(conv, X, calls=2, worker=worker).ms) == set(got.ms)


def test_renamed_nodes_are_not_confused_with_longer_names(conv):
    from featherweight.runtime.profiling import Origin

    origin = Origin(str(conv))
    assert origin.of("conv1", "Conv") == "conv1"
    assert origin.of("conv1_nchwc", "Conv") == "conv1"
    assert origin.of("r_nchwc", "Conv") == "conv1"  # the fused activation's output names the node that computes
    assert origin.of("conv10", "Conv") == "conv10"
    assert origin.of("ReorderOutput", "ReorderOutput") == "ReorderOutput"


def test_the_trivial_model_runs():
    (out,) = run_model(measure.trivial_model(), [{"x": np.array([2], np.float32)}])
    assert out["y"] == -2


def test_quiet_cpus_are_ours():
    if sys.platform != "linux":
        assert quiet_cpus(1) == ()
        return
    allowed = os.sched_getaffinity(0)
    assert set(quiet_cpus(1)) <= allowed
    assert len(quiet_cpus(1)) == 1
    assert set(quiet_cpus(10_000)) == allowed


def test_peaks_come_from_the_kernels_they_name(tmp_path):
    from featherweight.runtime import floors

    path = tmp_path / "int8.onnx"
    path.write_bytes(floors.int8_matmul())
    assert optimised_ops(path)["QLinearMatMul"] == 1
    peaks = gemm_peaks(seconds=0.1)
    assert 0 < peaks.float_median_gmacs <= peaks.float_gmacs
    assert 0 < peaks.int8_median_gmacs <= peaks.int8_gmacs
    assert peaks.float_floor_ms(1_000_000) == pytest.approx(1 / peaks.float_gmacs)
    assert peaks.int8_floor_ms(2_000_000) == pytest.approx(2 / peaks.int8_gmacs)
    with pytest.raises(RunError, match="seconds must be > 0, but got 0"):
        gemm_peaks(seconds=0)
