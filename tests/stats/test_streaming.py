"""One pass: right numbers, flat memory, clear errors."""

import tracemalloc

import numpy as np
import onnx_ir as ir
import pytest

from featherweight.errors import DataError
from featherweight.graph import io
from featherweight.graph import weights as graph_weights
from featherweight.stats import Statistics, collect, model_key, streaming
from featherweight.stats.reads import Tables, reads_of

MODEL = """
<ir_version: 10, opset_import: ["" : 21]>
net (int64[n, 3] ids, float[n, 4] x) => (float[n, 2] y)
<{weights}, int64[1] axes = {{1}}>
{{
  rows = Gather(table, ids)
  pooled = ReduceMean<keepdims=0>(rows, axes)
  s = Add(pooled, x)
  m = MatMul(s, w1)
  a = Add(m, b1)
  h = Relu(a)
  y = MatMul(h, w2)
}}
"""
SHAPES = {"table": (5, 4), "w1": (4, 3), "b1": (3,), "w2": (3, 2)}


class InProcess:
    """Runs the child's function here: the tests look at its numbers, not at the sandbox."""

    def call(self, func, *args, timeout_s=None):
        return func(*args)


def small_model() -> ir.Model:
    rng = np.random.default_rng(0)
    parts = []
    for name, shape in SHAPES.items():
        numbers = ", ".join(f"{v:.6f}" for v in rng.normal(size=shape).ravel())
        parts.append(f"float[{', '.join(map(str, shape))}] {name} = {{{numbers}}}")
    return ir.from_onnx_text(MODEL.format(weights=", ".join(parts)))


def feeds(n: int, batch: int = 2):
    rng = np.random.default_rng(1)
    for _ in range(n):
        yield {"ids": rng.integers(-5, 5, (batch, 3)), "x": rng.normal(size=(batch, 4)).astype(np.float32)}


def test_moments_ranges_and_counts_equal_numpy():
    model = small_model()
    data = list(feeds(20))
    stats = collect(model, data, worker=InProcess(), threads=1)
    arrays = {n: v.const_value.numpy().astype(np.float64) for n, v in model.graph.initializers.items()}
    s = np.concatenate([arrays["table"][f["ids"]].mean(axis=1) + f["x"] for f in data])
    h = np.maximum(s @ arrays["w1"] + arrays["b1"], 0)
    np.testing.assert_allclose(stats.second_moment("w1")[0], s.T @ s / len(s), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.second_moment("w2")[0], h.T @ h / len(h), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(stats.mean("w2")[0], h.mean(axis=0), rtol=1e-4, atol=1e-5)
    assert stats.range("h") == pytest.approx((h.min(), h.max()), rel=1e-5)
    np.testing.assert_allclose(stats.values["h"].channel_high, h.max(axis=0), rtol=1e-5)
    ids = np.concatenate([f["ids"].ravel() for f in data]) % 5
    np.testing.assert_array_equal(stats.gather_counts("table"), np.bincount(ids, minlength=5))
    assert stats.n_samples == 40
    assert stats.n_rows("w1") == 40
    assert stats.key == model_key(model)
    found = stats.histogram("h")
    assert found is not None
    counts, edges = found
    assert counts.sum() == h.size
    assert len(edges) == len(counts) + 1


def test_saved_statistics_are_read_back(tmp_path):
    stats = collect(small_model(), list(feeds(3)), worker=InProcess(), threads=1)
    stats.save(tmp_path / "s.npz")
    again = Statistics.load(tmp_path / "s.npz")
    assert again.key == stats.key
    assert again.values.keys() == stats.values.keys()
    np.testing.assert_allclose(again.second_moment("w1"), stats.second_moment("w1"), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(again.second_moment("w1"), again.second_moment("w1").transpose(0, 2, 1))
    top = np.abs(stats.values["h"].rows).max()
    np.testing.assert_allclose(again.values["h"].rows, stats.values["h"].rows, atol=top * 2**-11)
    assert again.values["h"].low == stats.values["h"].low
    np.testing.assert_array_equal(again.gather_counts("table"), stats.gather_counts("table"))


def test_statistics_read_back_are_saved_to_the_same_numbers(tmp_path):
    collect(small_model(), list(feeds(3)), worker=InProcess(), threads=1).save(tmp_path / "a.npz")
    once = Statistics.load(tmp_path / "a.npz")
    once.save(tmp_path / "b.npz")
    twice = Statistics.load(tmp_path / "b.npz")
    for name, found in once.moments.items():
        np.testing.assert_array_equal(twice.moments[name].second, found.second)


def test_other_files_are_not_statistics(tmp_path):
    (tmp_path / "s.npz").write_bytes(b"not a zip")
    with pytest.raises(DataError, match="statistics file of schema 1"):
        Statistics.load(tmp_path / "s.npz")


def test_no_batch_is_an_error():
    with pytest.raises(DataError, match="at least one batch"):
        collect(small_model(), [], worker=InProcess(), threads=1)


def test_equal_seeds_give_equal_statistics():
    one = collect(small_model(), list(feeds(5)), worker=InProcess(), threads=1, seed=3)
    two = collect(small_model(), list(feeds(5)), worker=InProcess(), threads=1, seed=3)
    np.testing.assert_array_equal(one.values["s"].rows, two.values["s"].rows)


def test_runs_in_the_child_process():
    stats = collect(small_model(), list(feeds(2)), threads=1)
    assert stats.n_samples == 4


def peak_bytes(path, job, n: int) -> int:
    tracemalloc.start()
    streaming.stream(str(path), feeds(n), *job)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def test_memory_does_not_grow_with_the_number_of_batches(tmp_path):
    model = small_model()
    listed = graph_weights.weights(model)
    axes = streaming.value_axes(model)
    job = (reads_of(listed)[0], Tables.of(listed), axes, 64, 1, 0)
    io.save(streaming.instrumented(model, {"s", "h", *axes}), tmp_path / "m.onnx")
    peak_bytes(tmp_path / "m.onnx", job, 10)
    few, many = peak_bytes(tmp_path / "m.onnx", job, 1200), peak_bytes(tmp_path / "m.onnx", job, 4800)
    assert many < few * 1.1 + 100_000


def test_infinite_values_are_marked_and_kept_out():
    model = small_model()
    data = list(feeds(3))
    data[1]["x"][0, 0] = -np.inf
    stats = collect(model, data, worker=InProcess(), threads=1)
    assert not stats.values["s"].finite
    assert np.isfinite(stats.range("s")).all()
    assert np.isfinite(stats.second_moment("w1")).all()
    assert stats.n_rows("w1") == 5


def test_scaled_values_scale_ranges_by_channel():
    v = collect(small_model(), list(feeds(9)), worker=InProcess(), threads=1).values["h"]
    factor = np.array([2.0, 0.5, 1.0], np.float32)
    scaled = v.scaled(factor)
    np.testing.assert_allclose(scaled.channel_high, v.channel_high * factor)
    np.testing.assert_allclose(scaled.rows, v.rows * factor)
    assert scaled.counts.sum() == v.rows.size
