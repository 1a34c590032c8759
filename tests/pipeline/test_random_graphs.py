"""What holds for any model: interface kept, nothing grown, tighter limits no bigger, plans replayed byte for byte."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings

import featherweight as fw
from pipeline import random_graphs

RUNS = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


def outputs(path: Path, x: np.ndarray) -> dict[str, np.ndarray]:
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, {"x": x}), strict=True))


def assert_alike(model: Path, result: Path, x: np.ndarray) -> None:
    before, after = outputs(model, x), outputs(result, x)
    assert list(before) == list(after)
    for name, a in before.items():
        b = after[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert np.isfinite(b).all()
    old, new = onnx.load(model).graph, onnx.load(result).graph
    assert [(v.name, v.type) for v in old.input] == [(v.name, v.type) for v in new.input]
    assert [v.name for v in old.output] == [v.name for v in new.output]


def check(proto: onnx.ModelProto) -> None:
    """All properties on one network: three runs and a replay."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model, data = random_graphs.save(proto, folder)
        before, x = model.read_bytes(), random_graphs.inputs_of(proto, 3, 2)
        runs: dict[str, fw.Report] = {"plain": fw.compress(model, data, out=folder / "plain")}
        for share in ("70%", "40%"):
            runs[share] = fw.compress(model, data, out=folder / share, max_size=share, max_candidates=3)
        assert model.read_bytes() == before
        for run, report in runs.items():
            result = folder / run / "model.onnx"
            assert result.exists() == report.ok
            if not report.ok:
                continue
            assert result.stat().st_size == report.result.size_bytes <= len(before)
            assert_alike(model, result, x)
            if report.plan.changed():
                fw.apply(model, folder / run, out=folder / "again.onnx")
                assert (folder / "again.onnx").read_bytes() == result.read_bytes()
        assert runs["plain"].ok
        if runs["40%"].ok:
            assert runs["70%"].ok
            assert runs["40%"].result.size_bytes <= runs["70%"].result.size_bytes


@given(random_graphs.networks())
@settings(RUNS, max_examples=5)
def test_whole_runs_on_random_networks(proto: onnx.ModelProto) -> None:
    check(proto)


@pytest.mark.slow
@given(random_graphs.networks())
@settings(RUNS, max_examples=40)
def test_whole_runs_on_many_random_networks(proto: onnx.ModelProto) -> None:
    check(proto)
