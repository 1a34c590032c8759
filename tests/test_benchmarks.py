"""The benchmark's own arithmetic: what is reported must be right before it is compared."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import evaluate, floors, process, tasks

IMAGES, _, PAIRS = tasks.TASKS


def _one_hot(classes: list[int]) -> np.ndarray:
    return np.eye(4, dtype=np.float32)[classes]


def test_accuracy_drop_is_paired() -> None:
    labels = np.array([0, 1, 2, 3, 0, 1])
    original = _one_hot([0, 1, 2, 3, 0, 0])
    candidate = _one_hot([0, 1, 2, 0, 1, 1])
    got = evaluate.compare(IMAGES, labels, original, candidate)
    assert got.metric == pytest.approx(4 / 6)
    assert got.drop == pytest.approx(1 / 6)
    # Two lost, one won: P(at least as uneven) of a fair coin thrown three times is 1.
    assert got.p == pytest.approx(1.0)
    assert got.closeness == pytest.approx(3 / 6)


def test_an_even_loss_is_significant() -> None:
    labels = np.zeros(8, np.int64)
    got = evaluate.compare(IMAGES, labels, _one_hot([0] * 8), _one_hot([1] * 8))
    assert got.p == pytest.approx(2 * 0.5**8)


def test_spearman_is_scipys_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.integers(0, 5, 50).astype(float), rng.normal(size=50)
    assert evaluate.spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


def test_pairs_are_rows_2i_and_2i_plus_1() -> None:
    angles = np.random.default_rng(0).permutation(12) / 10
    rows = np.zeros((24, 2), np.float32)
    rows[0::2, 0] = 1
    rows[1::2] = np.stack([np.cos(angles), np.sin(angles)], 1)
    got = evaluate.compare(PAIRS, -angles, rows, 3 * rows)
    assert got.metric == pytest.approx(1.0)
    assert got.closeness == pytest.approx(1.0)
    assert got.drop == 0


def test_macs_are_counted_from_shapes() -> None:
    w = np.ones((6, 2, 3, 3), np.float32)
    v = np.ones((3, 5), np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w"], ["c"], group=2, strides=[2, 2], pads=[1, 1, 1, 1]),
            helper.make_node("MatMul", ["c", "v"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 6, 3, 5])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(v, "v")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    feed = {"x": np.ones((2, 4, 6, 6), np.float32)}
    conv = 2 * 6 * 3 * 3 * (2 * 3 * 3)
    matmul = 2 * 6 * 3 * 5 * 3
    assert floors.macs(model, feed) == conv + matmul


def test_a_failing_command_is_told_with_its_last_line(tmp_path: Path) -> None:
    cost = process.run(
        [sys.executable, "-c", "raise SystemExit('no such tool')"], cwd=tmp_path, log=tmp_path / "log", limit_s=60
    )
    assert cost.error == "exit 1: no such tool"
    assert cost.peak_bytes > 0


def test_memory_of_grandchildren_counts(tmp_path: Path) -> None:
    grandchild = "import time; x = bytearray(80_000_000); time.sleep(1)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    cost = process.run([sys.executable, "-c", code], cwd=tmp_path, log=tmp_path / "log", limit_s=60)
    assert cost.error == ""
    assert cost.peak_bytes > 80_000_000
