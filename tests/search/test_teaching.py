"""Which candidate is worth the time of teaching."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import pytest

import featherweight as fw
from featherweight import pipeline
from featherweight.core import Attempt, Budget, Measurement, Plan
from featherweight.search.teaching import worth_teaching


def attempt(index: int, size: int, drop: float) -> Attempt:
    return Attempt(index, Plan(()), Measurement(size, metric_name="accuracy", metric=1 - drop, drop=drop))


def test_the_smallest_that_misses_by_little() -> None:
    budget = Budget(max_drop=0.01)
    best, near, smaller, far = attempt(1, 100, 0.005), attempt(2, 80, 0.02), attempt(3, 60, 0.03), attempt(4, 20, 0.5)
    assert worth_teaching(budget, best, [best, near, smaller, far]) is smaller
    assert worth_teaching(budget, None, [far]) is None
    assert worth_teaching(budget, attempt(9, 50, 0.0), [near, smaller]) is None


def test_without_a_limit_on_the_drop_the_best_is_taught() -> None:
    budget = Budget(max_size_bytes=90, minimize="drop")
    best, large = attempt(1, 80, 0.05), attempt(2, 200, 0.0)
    assert worth_teaching(budget, best, [best, large]) is best
    assert worth_teaching(budget, None, [large]) is None


def recovered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, learn: Any, **asked: Any) -> tuple[Any, list[int]]:
    """A run with `recover=distill` in which `learn` stands for the teaching; and how often the data were asked for."""
    pytest.importorskip("torch")
    pytest.importorskip("safetensors")
    rng, calls = np.random.default_rng(asked.get("seed")), []

    def batches() -> Iterator[dict[str, np.ndarray]]:
        calls.append(1)
        yield from ({"x": rng.normal(size=(10, 16)).astype(np.float32)} for _ in range(30))

    proto = onnx.parser.parse_model("""<ir_version: 10, opset_import: ["" : 21]>
        g (float[N, 16] x) => (float[N, 4] y) { h = MatMul(x, a) r = Relu(h) y = MatMul(r, b) }""")
    fixed = np.random.default_rng(0)
    for name, shape in (("a", (16, 64)), ("b", (64, 4))):
        proto.graph.initializer.append(onnx.numpy_helper.from_array(fixed.normal(size=shape).astype(np.float32), name))
    onnx.save(proto, tmp_path / "net.onnx")
    monkeypatch.setattr(pipeline, "_learn", learn)
    given = {"max_size": "50%", "recover": "distill", "max_candidates": 2, "out": tmp_path / "run", **asked}
    return fw.compress(tmp_path / "net.onnx", batches, **given), calls


def test_data_from_the_users_code_are_asked_for_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another time they could come in another order, and what is reported on would be taught."""
    seen: dict[str, set[bytes]] = {}

    def learn(problem: Any, student: Path, data: Any, out: Path, seconds: float) -> tuple[Path, bool]:
        del out, seconds
        for role in ("calibration", "validation", "holdout"):
            parts = {"taught": data.calibration} if role == "calibration" else {}
            for name, part in {role: getattr(problem.splits, role), **parts}.items():
                seen[name] = {row.tobytes() for batch in part.batches() for row in batch.feeds["x"]}
        return student, False

    _, calls = recovered(tmp_path, monkeypatch, learn)
    assert len(calls) == 1
    assert seen["taught"] == seen["calibration"]
    assert not seen["taught"] & (seen["holdout"] | seen["validation"])


def test_teaching_that_is_interrupted_is_no_finished_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted = [True, False]
    taught: list[Path] = []

    def learn(_problem: Any, student: Path, *_rest: Any) -> tuple[Path, bool]:
        taught.append(student)
        return student, interrupted[len(taught) - 1]

    with pytest.raises(KeyboardInterrupt):
        recovered(tmp_path, monkeypatch, learn, seed=3)
    assert (tmp_path / "run" / "model.onnx").exists(), "the best so far is kept"
    recovered(tmp_path, monkeypatch, learn, seed=3, resume=True)
    assert len(taught) == 2, "teaching went on"
    recovered(tmp_path, monkeypatch, learn, seed=3, resume=True)
    assert len(taught) == 2, "a finished run repeats nothing"
