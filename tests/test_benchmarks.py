"""The benchmark's own arithmetic: what is reported must be right before it is compared."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import evaluate, floors, joint, likely, ocr, process, results, speech, structure, svd_peer, tasks

IMAGES, _, PAIRS = tasks.TASKS
LINES, _ = tasks.MORE_TASKS


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


def test_macs_of_a_recurrent_layer_are_steps_times_its_matrices() -> None:
    w, r = np.ones((1, 12, 5), np.float32), np.ones((1, 12, 3), np.float32)
    graph = helper.make_graph(
        [helper.make_node("LSTM", ["x", "w", "r"], ["", "h"], hidden_size=3)],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [7, "n", 5])],
        [helper.make_tensor_value_info("h", TensorProto.FLOAT, [1, "n", 3])],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(r, "r")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    assert floors.macs_by_node(model, {"x": np.ones((7, 2, 5), np.float32)}) == {"h": 7 * 2 * (12 * 5 + 12 * 3)}


def _dense(rank: int) -> onnx.ModelProto:
    """Conv 1x1 (8 to 6) of the given rank, then Gemm (6 to 4) with a bias; weights of rank one at most there."""
    rng = np.random.default_rng(rank)
    conv = (rng.normal(size=(6, rank)) @ rng.normal(size=(rank, 8))).astype(np.float32)[:, :, None, None]
    gemm = np.outer(rng.normal(size=4), rng.normal(size=6)).astype(np.float32)
    arrays = {"w": conv, "b": rng.normal(size=6).astype(np.float32), "v": gemm, "c": np.ones(4, np.float32)}
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "w", "b"], ["y"], strides=[2, 2]),
            helper.make_node("GlobalAveragePool", ["y"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("Gemm", ["f", "v", "c"], ["z"], transB=1),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 4, 4])],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, [1, 4])],
        [numpy_helper.from_array(a, n) for n, a in arrays.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])
    model.ir_version = 10
    return model


def _answer(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, feed)[0])


def test_svd_of_layers_of_low_rank_changes_no_answer() -> None:
    model = _dense(rank=2)
    feed = {"x": np.random.default_rng(1).normal(size=(1, 8, 4, 4)).astype(np.float32)}
    before, macs = _answer(model, feed), floors.macs(model, feed)
    # Two of the 48 / 14 ranks a 6 x 8 layer breaks even at, one of the 24 / 10 of a 4 x 6: 35 % are gone at least.
    svd_peer.factor(model, 0.35, feed)
    assert floors.macs(model, feed) == 4 * 2 * (6 + 8) + 1 * (4 + 6)
    assert floors.macs(model, feed) <= 0.65 * macs
    np.testing.assert_allclose(_answer(model, feed), before, rtol=1e-5, atol=1e-5)


def test_svd_says_when_the_dense_layers_are_too_few() -> None:
    model = _dense(rank=2)
    model.graph.node[0].attribute.append(helper.make_attribute("group", 1))
    feed = {"x": np.ones((1, 8, 4, 4), np.float32)}
    with pytest.raises(RuntimeError, match=r"dense layers have 216 of 216 MACs; 100% cannot go"):
        svd_peer.factor(model, 1.0, feed)


def test_ctc_merges_repeats_and_drops_blanks() -> None:
    steps = np.array([[0, 3, 3, 0, 3, 5, 5], [0, 0, 0, 0, 0, 0, 0]])
    assert ocr.collapse(steps) == [(3, 3, 5), ()]
    labels = np.array([[3, 3, 5, 0], [1, 0, 0, 0]])
    assert ocr.lines_read(steps, labels).tolist() == [True, False]


def test_lines_agree_where_either_reads_a_character() -> None:
    original, candidate = np.array([[0, 3, 0, 5]]), np.array([[0, 3, 4, 5]])
    got = evaluate.compare(LINES, np.array([[3, 5]]), original, candidate)
    assert (got.metric, got.drop, got.n) == (0.0, 1.0, 1)
    assert got.closeness == pytest.approx(2 / 3)


def test_equal_error_rate_of_scores_that_overlap_by_one_pair() -> None:
    angle = np.arccos([1.0, 1.0, 0.8, 0.0])
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1)
    speakers = np.array([0, 0, 1, 1])
    # Same: 1.0, 0.6. Others: 0.8, 0, 0.8, 0. At a threshold between 0.6 and 0.8 one of two is missed, two of four pass.
    assert speech.equal_error_rate(vectors, speakers) == pytest.approx(0.5)
    assert speech.equal_error_rate(vectors, np.array([0, 0, 0, 1])) == pytest.approx(0.0)


def test_a_tone_falls_into_the_band_around_it() -> None:
    tone = np.sin(2 * np.pi * 1000 * np.arange(16000) / 16000).astype(np.float32)
    bands = speech.mel_bands(tone)
    assert bands.shape == (101, 40)
    # Slaney's scale: 15 mel at 1 kHz, 27 / ln 6.4 mel a factor e above; 42 edges from 0 to 8 kHz.
    top = 15 + 27 * np.log(8) / np.log(6.4)
    assert bands[50].argmax() == round(15 / (top / 41)) - 1


def test_windows_are_those_of_the_package() -> None:
    # 2.2 s are 221 frames: windows start at 0 and 77; the second is covered by 143 of 160 frames.
    assert speech.mel_windows(np.ones(35200, np.float32)).shape == (2, 160, 40)
    # 1.6 s: the second window is half covered and dropped. Less than a window is padded.
    assert speech.mel_windows(np.ones(25600, np.float32)).shape == (1, 160, 40)
    assert speech.mel_windows(np.ones(4000, np.float32)).shape == (1, 160, 40)


def test_rows_of_the_structure_table_are_made_once() -> None:
    for task in (*tasks.TASKS, *tasks.MORE_TASKS):
        names = [e.name for e in (*structure.entries(task), *joint.entries(task))]
        assert len(names) == len(set(names))
    peer, ours = structure.Entry("svd-30"), structure.Entry("featherweight 30", ("--max-macs", "70%"))
    assert not structure._missing(peer, results.Row("svd-30", error="exit 1: no"))
    assert structure._missing(peer, results.Row("svd-30", error="not installed (make bench)"))
    assert structure._missing(ours, results.Row(ours.name, error="exit 2: No such option"))
    assert not structure._missing(ours, results.Row(ours.name, metric=0.8))


def test_a_table_shows_the_share_of_macs_if_counted() -> None:
    rows = [results.Row("float", 10, 0.9, macs=200), results.Row("x", 5, 0.8, macs=140), results.Row("y", error="no")]
    raw = {"rows": [vars(r) for r in rows], "floors": None}
    lines = results.table(IMAGES, raw).splitlines()
    assert [line.count("|") for line in lines] == [10] * 5
    assert lines[3].startswith("| x | 0.00 | 70% | 0.8000 |")


def test_the_table_of_likely_drops_tells_good_files_from_bad_ones() -> None:
    same = {"before": [1] * 500, "after": [1] * 500, "changed": [0] * 500}
    bad = {"before": [1] * 500, "after": [1] * 400 + [0] * 100, "changed": [0] * 400 + [1] * 100}
    page = likely.table([same, bad])
    assert "| 0 to 3 | 0 | 0.00 to 0.00 |" in page  # nothing changed, so there is no share
    assert "| 8 to 100 | 1 | 1.00 to 1.00 |" in page  # every changed answer was lost
    rows = [line for line in page.splitlines() if line.startswith(("| 60 |", "| 150 |", "| 400 |"))]
    assert len(rows) == 6
    assert all(row.endswith("| 0.0% | 0.0% |") for row in rows)  # a fifth lost never passes, nothing lost always does
    assert all(row.split(" | ")[2] == "0.00" for row in rows)
