"""Evaluation in a child: values, stored references, and the ways data reaches it."""

from __future__ import annotations

import json

import child_functions as cf
import numpy as np
import pytest
import small_models

from featherweight.errors import DataError
from featherweight.runtime import metrics
from featherweight.runtime.evaluate import INDEX, Reference, evaluate, pick_metric
from featherweight.runtime.sandbox import Worker

W = np.random.default_rng(7).standard_normal((3, 4)).astype(np.float32)
OTHER = (W + 0.3 * np.random.default_rng(8).standard_normal((3, 4))).astype(np.float32)


@pytest.fixture(scope="module")
def worker():
    with Worker() as w:
        yield w


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return small_models.linear(folder / "a.onnx", W), small_models.linear(folder / "b.onnx", OTHER)


def everything(data=None):
    found = list((data or cf.Data()).batches())
    return np.concatenate([b.feeds["x"] for b in found]), np.concatenate([b.labels for b in found])


def test_accuracy_equals_numpy(worker, models):
    x, labels = everything()
    seen = []
    got = evaluate(
        models[0], cf.Data(), metrics.get("accuracy"), worker=worker, progress=lambda d, t: seen.append((d, t))
    )
    np.testing.assert_array_equal(got.per_sample, (x @ W).argmax(1) == labels)
    np.testing.assert_array_equal(got.labels, labels)
    assert got.value == got.per_sample.mean()
    assert got.n_samples == 12
    assert seen == [(1, 3), (2, 3), (3, 3)]


@pytest.mark.parametrize("name", ["agreement", "cosine", "kl", "sqnr"])
def test_a_stored_reference_equals_running_both(worker, models, tmp_path, name):
    metric = metrics.get(name)
    own = evaluate(models[0], cf.Data(), metric, record_to=tmp_path / "ref", worker=worker)
    assert own.value == pytest.approx(metric.perfect)
    stored = evaluate(models[1], cf.Data(), metric, reference=tmp_path / "ref", worker=worker)
    both = evaluate(models[1], cf.Data(), metric, reference=models[0], worker=worker)
    np.testing.assert_array_equal(stored.per_sample, both.per_sample)
    assert stored.value != metric.perfect


def test_accuracy_tells_how_many_answers_are_not_the_originals(worker, models, tmp_path):
    x, _ = everything()
    metric = metrics.get("accuracy")
    assert evaluate(models[0], cf.Data(), metric, record_to=tmp_path / "ref", worker=worker).changed is None
    found = evaluate(models[1], cf.Data(), metric, reference=tmp_path / "ref", worker=worker)
    assert found.changed == pytest.approx(((x @ W).argmax(1) != (x @ OTHER).argmax(1)).mean())
    assert found.changed > 0


def test_the_stored_reference_is_memory_mapped_and_exact(worker, models, tmp_path):
    evaluate(models[0], cf.Data(), metrics.get("cosine"), record_to=tmp_path / "ref", worker=worker)
    reference = Reference(tmp_path / "ref")
    batch = next(iter(cf.Data().batches()))
    got = reference.batch(0, 4)["y"]
    assert isinstance(got, np.memmap)
    np.testing.assert_allclose(got, batch.feeds["x"] @ W, rtol=1e-5)


def test_a_reference_of_other_data_is_refused(worker, models, tmp_path):
    metric = metrics.get("cosine")
    evaluate(models[0], cf.Data(), metric, record_to=tmp_path / "ref", worker=worker)
    with pytest.raises(DataError, match="must be of the same data, but batch 0 of 5 samples is not in it"):
        evaluate(models[1], cf.Data(n=5), metric, reference=tmp_path / "ref", worker=worker)
    with pytest.raises(DataError, match="is of 3 batches, but the data has 1"):
        evaluate(models[1], list(cf.Data().batches())[:1], metric, reference=tmp_path / "ref", worker=worker)
    (tmp_path / "ref" / INDEX).write_text(json.dumps({"schema": 9}))
    with pytest.raises(DataError, match=r"must have schema 1, but .* has 9"):
        Reference(tmp_path / "ref")
    with pytest.raises(DataError, match=r"must hold a readable reference.json"):
        evaluate(models[1], cf.Data(), metric, reference=tmp_path, worker=worker)


def test_data_that_cannot_travel_is_streamed_from_here(worker, models):
    class Local(cf.Data):  # a local class: the child cannot import it
        pass

    metric = metrics.get("accuracy")
    want = evaluate(models[0], cf.Data(), metric, worker=worker)
    for data in (Local(), list(cf.Data().batches()), (b for b in cf.Data().batches())):
        seen = []
        got = evaluate(models[0], data, metric, worker=worker, progress=lambda d, t, seen=seen: seen.append(d))
        np.testing.assert_array_equal(got.per_sample, want.per_sample)
        assert seen == [1, 2, 3]


def test_custom_metrics_whole_and_by_batch(worker, models):
    x, labels = everything()
    want = float(((x @ W).argmax(1) == labels).mean())
    whole = evaluate(models[0], cf.Data(), metrics.get("child_functions:hit_rate"), worker=worker)
    assert whole.per_sample is None
    assert whole.value == pytest.approx(want)
    each = evaluate(models[0], cf.Data(), metrics.get("child_functions:hits"), worker=worker)
    assert len(each.per_sample) == 12
    assert each.value == pytest.approx(want)


def test_no_data_is_told(worker, models):
    with pytest.raises(DataError, match="needs at least one sample, but the data has none"):
        evaluate(models[0], [], metrics.get("cosine"), reference=models[0], worker=worker)


def test_the_metric_is_picked_on_the_first_batch(worker, models):
    assert pick_metric(models[0], cf.Data(), worker=worker)[0].name == "accuracy"
    metric, why = pick_metric(models[0], cf.Data(labelled=False), worker=worker)
    assert metric.name == "cosine"
    assert "no labels" in why
    assert pick_metric(models[0], cf.Data(), "kl", worker=worker)[1] == "as asked"
    with pytest.raises(DataError, match="top5 needs more than 5 classes"):
        pick_metric(models[0], cf.Data(), "top5", worker=worker)
    with pytest.raises(DataError, match="needs at least one batch"):
        pick_metric(models[0], [], worker=worker)


def test_without_a_worker_one_is_made(models):
    assert evaluate(models[0], cf.Data(), metrics.get("cosine"), reference=models[0]).value == pytest.approx(1.0)
