"""Metric values worked out by hand, and which output each metric looks at."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats

from featherweight.errors import DataError
from featherweight.runtime import metrics, outputs

LOGITS = np.array([[1, 5, 2, 0, 0, 0, 0], [9, 1, 1, 1, 1, 1, 8], [0, 0, 3, 3, 0, 0, 0]], np.float32)


def scored(name, out, ref=None, labels=None, rows=1, **kw):
    metric = metrics.get(name)
    each = metric.per_sample(out, ref, labels, rows, **kw)
    return each, metric.aggregate(each, labels)


def test_accuracy_by_hand():
    each, value = scored("accuracy", {"y": LOGITS}, labels=np.array([1, 6, 2]))
    np.testing.assert_array_equal(each, [1, 0, 1])  # the tie of the third row goes to the lower class, as in argmax
    assert value == pytest.approx(2 / 3)
    assert scored("accuracy", {"y": LOGITS}, labels=np.array([1, 0, 3]))[0].tolist() == [1, 1, 0]


def test_top5_by_hand_counts_ties_towards_the_lower_class():
    each, _ = scored("top5", {"y": LOGITS}, labels=np.array([4, 5, 5]))
    # row 0: 5, 2, 1, then the zeros of classes 3, 4, 5, 6: class 4 is fifth.
    # row 1: 9, 8, then classes 1, 2, 3: class 5 is out.
    # row 2: classes 2, 3, then zeros 0, 1, 4: class 5 is sixth.
    np.testing.assert_array_equal(each, [1, 0, 0])


def test_accuracy_takes_columns_one_hot_and_dense_labels():
    labels = np.array([1, 0, 2])
    for form in (labels[:, None], np.eye(7)[labels], np.eye(7, dtype=np.int64)[labels]):
        assert scored("accuracy", {"y": LOGITS}, labels=form)[1] == 1.0
    dense = np.zeros((1, 2, 2, 3), np.float32)
    dense[0, 1, 0] = 1  # class 1 wins in the first row of pixels
    each, _ = scored("accuracy", {"y": dense}, labels=np.array([[[1, 1, 0], [0, 0, 1]]]))
    assert each.tolist() == [4 / 6]
    tokens = np.zeros((1, 3, 5), np.float32)
    tokens[0, :, 2] = 1
    assert scored("accuracy", {"y": tokens}, labels=np.array([[2, 2, 4]]))[0].tolist() == [2 / 3]


def test_accuracy_of_label_outputs_and_of_binary_scores():
    assert scored("accuracy", {"label": np.array([3, 4])}, labels=np.array([3, 5]))[0].tolist() == [1, 0]
    assert scored("accuracy", {"prob": np.array([[0.7], [0.2]])}, labels=np.array([1, 1]))[0].tolist() == [1, 0]
    assert scored("accuracy", {"logit": np.array([[0.3], [-2.0]])}, labels=np.array([1, 1]))[0].tolist() == [1, 0]


def test_scores_that_are_not_numbers_are_wrong():
    bad = LOGITS.copy()
    bad[0, 3] = np.nan
    assert scored("accuracy", {"y": bad}, labels=np.array([3, 0, 2]))[0].tolist() == [0, 1, 1]
    assert scored("agreement", {"y": bad}, {"y": LOGITS})[0].tolist() == [0, 1, 1]


@pytest.mark.parametrize(
    ("name", "out", "labels", "text"),
    [
        ("accuracy", LOGITS, np.array([1, 2, 7]), r"labels must be in 0\.\.6 for the output 'y' of 7 classes.*1\.\.7"),
        ("accuracy", LOGITS, np.array([0.5, 1, 2]), "class labels must be whole numbers.*float64; use spearman"),
        ("top5", LOGITS[:, :5], np.array([1, 2, 3]), "top5 needs more than 5 classes, but 'y' has 5; use accuracy"),
        ("accuracy", LOGITS, None, "accuracy needs labels, but the data has none; use agreement or cosine"),
        ("spearman", LOGITS, np.array([1.0, 2, 3]), "one number a sample or pairs of vectors"),
        ("kl", LOGITS[:, :1], None, "at least 2 classes"),
    ],
)
def test_what_does_not_fit_is_told(name, out, labels, text):
    with pytest.raises(DataError, match=text):
        scored(name, {"y": out}, {"y": out}, labels)


def test_agreement_by_hand():
    other = LOGITS[[0, 2, 2]]
    each, value = scored("agreement", {"y": other}, {"y": LOGITS})
    assert each.tolist() == [1, 0, 1]
    metric = metrics.get("agreement")
    assert metric.drop(metric.perfect, value) == pytest.approx(1 / 3)


def test_cosine_by_hand_and_the_worst_output_counts():
    ref = {"a": np.array([[1, 0], [0, 2]], np.float32), "b": np.array([[1, 1], [1, 1]], np.float32)}
    out = {"a": np.array([[1, 1], [0, 5]], np.float32), "b": np.array([[1, 0], [0, 0]], np.float32)}
    each, value = scored("cosine", out, ref)
    np.testing.assert_allclose(each, [[math.sqrt(0.5), math.sqrt(0.5)], [1, 0]], atol=1e-7)
    assert value == pytest.approx(math.sqrt(0.5) / 2)
    zero = {"a": np.zeros((1, 2), np.float32)}
    assert scored("cosine", zero, zero)[1] == 1.0
    assert scored("cosine", {"a": np.full((1, 2), np.nan)}, {"a": np.ones((1, 2))})[1] == 0.0


def test_cosine_of_pairs_is_the_mean_of_its_rows():
    ref = {"y": np.array([[1, 0], [1, 0], [1, 0], [1, 0]], np.float32)}
    out = {"y": np.array([[1, 0], [0, 1], [1, 0], [1, 0]], np.float32)}
    assert scored("cosine", out, ref, rows=2)[0].tolist() == [[0.5], [1.0]]


def test_kl_by_hand_for_logits_and_for_probabilities():
    p, q = np.array([[0.5, 0.5]]), np.array([[0.9, 0.1]])
    want = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
    assert scored("kl", {"y": q}, {"y": p})[1] == pytest.approx(want)
    assert scored("kl", {"y": np.log(q) + 3}, {"y": np.log(p) - 1})[1] == pytest.approx(want)
    assert scored("kl", {"y": p}, {"y": p})[1] == 0.0
    assert metrics.get("kl").drop(0.0, 0.2) == pytest.approx(0.2)
    assert scored("kl", {"y": np.array([[np.nan, 1]])}, {"y": p})[1] == math.inf


def test_sqnr_by_hand_is_a_ratio_of_sums_of_the_worst_output():
    ref = {"a": np.array([[3, 4], [0, 5]], np.float32), "b": np.array([[10, 0], [0, 0]], np.float32)}
    out = {"a": np.array([[3, 4], [0, 4]], np.float32), "b": np.array([[9, 0], [0, 2]], np.float32)}
    each, value = scored("sqnr", out, ref)
    np.testing.assert_array_equal(each[:, 0], [[25, 0], [25, 1]])
    assert value == pytest.approx(10 * math.log10(100 / 5))
    metric = metrics.get("sqnr")
    assert metric.drop(metric.perfect, value) == pytest.approx(0.05)
    assert scored("sqnr", ref, ref)[1] == math.inf
    assert scored("sqnr", {"a": np.array([[math.nan]])}, {"a": np.array([[1.0]])})[1] == -math.inf
    same = {"a": np.array([[math.inf, 1.0]])}
    assert scored("sqnr", same, same)[1] == math.inf


def test_spearman_of_pairs_agrees_with_scipy():
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((40, 8)).astype(np.float32)
    gold = rng.integers(0, 5, 20).astype(np.float64)  # with ties
    cos = [float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(rows[::2], rows[1::2], strict=True)]
    each, value = scored("spearman", {"y": rows}, labels=gold, rows=2)
    np.testing.assert_allclose(each, cos, rtol=1e-5)
    assert value == pytest.approx(scipy.stats.spearmanr(cos, gold).statistic)


def test_spearman_of_a_regression_output_and_of_a_constant():
    gold = np.array([1.0, 2, 3, 4])
    assert scored("spearman", {"y": np.array([[1.0], [3], [2], [4]])}, labels=gold)[1] == pytest.approx(0.8)
    assert scored("spearman", {"y": np.ones((4, 1))}, labels=gold)[1] == 0.0


def test_token_vectors_are_averaged_over_the_attention_mask():
    tokens = np.array([[[1, 0], [3, 0], [np.nan, 7]], [[0, 2], [9, 9], [9, 9]]], np.float32)
    feeds = {"input_ids": np.ones((2, 3), np.int64), "attention_mask": np.array([[1, 1, 0], [1, 0, 0]])}
    got = metrics.get("spearman").select({"last_hidden_state": tokens, "pooler_output": np.ones((2, 2))}, feeds)
    assert list(got) == ["last_hidden_state"]
    np.testing.assert_array_equal(got["last_hidden_state"], [[2, 0], [0, 2]])
    assert scored("cosine", {"h": tokens}, {"h": got["last_hidden_state"]}, feeds=feeds)[1] == 1.0
    other = tokens.copy()
    other[1, 2] = 1e6  # only at a padded place
    assert scored("sqnr", {"h": other}, {"h": tokens}, feeds=feeds)[1] == math.inf


def test_which_output_is_looked_at():
    a, b = np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)
    choose = lambda kind, found, **kw: next(iter(outputs.select(found, kind, **kw)))  # noqa: E731
    assert choose("class", {"features": a, "class_logits": b}) == "class_logits"
    assert choose("class", {"one": np.zeros((2, 1), np.float32), "two": b}) == "two"
    assert choose("class", {"features": a, "logits": b}, output="features") == "features"
    assert choose("vector", {"token_embeddings": np.zeros((2, 5, 3), np.float32), "sentence_embedding": a}) == (
        "sentence_embedding"
    )
    assert list(outputs.select({"a": a, "ids": np.zeros(2, np.int64)}, "all")) == ["a"]
    with pytest.raises(
        DataError, match=r"must be one of \['logits', 'aux'\], but got 'logit'; did you mean \['logits'\]"
    ):
        outputs.select({"logits": a, "aux": b}, "class", output="logit")


@pytest.mark.parametrize(
    ("found", "labels", "rows", "name", "reason"),
    [
        ({"y": LOGITS}, np.array([1, 2, 3]), 1, "accuracy", "class labels"),
        ({"y": LOGITS[:, :1]}, np.array([0.1, 2.5, 3.0]), 1, "spearman", "gold scores"),
        ({"y": LOGITS[:2]}, np.array([4.2]), 2, "spearman", "pairs"),
        ({"logits": LOGITS}, None, 1, "agreement", "no labels, and the output 'logits' .* named like class scores"),
        ({"y": np.full((3, 4), 0.25)}, None, 1, "agreement", "holds probabilities"),
        ({"y": LOGITS}, None, 1, "cosine", "not known to be class scores"),
        ({"embedding_scores": LOGITS}, None, 1, "cosine", "not known"),
        ({"label": np.array([1, 2, 3])}, None, 1, "agreement", "class numbers"),
        ({"logits": LOGITS}, np.array([1, 2, 9]), 1, "agreement", r"labels do not fit the outputs .*0\.\.6"),
    ],
)
def test_the_metric_is_chosen_with_a_reason(found, labels, rows, name, reason):
    import re

    metric, why = metrics.choose(found, feeds={}, labels=labels, rows_per_sample=rows)
    assert metric.name == name
    assert re.search(reason, why), why


def test_unknown_names_get_near_matches():
    with pytest.raises(DataError, match="but got 'acuracy'; did you mean accuracy"):
        metrics.get("acuracy")
    with pytest.raises(DataError, match=r"must be an importable module:function.*PYTHONPATH"):
        metrics.get("no_such_module:f")
    with pytest.raises(DataError, match="must be a function, but is a float"):
        metrics.get("math:pi")


def test_a_custom_metric_gives_values_or_one_number():
    out, labels = {"y": LOGITS}, np.array([1, 0, 0])
    each, value = scored("child_functions:hits", out, labels=labels)
    assert each.tolist() == [1, 1, 0]
    assert value == pytest.approx(2 / 3)
    number, value = scored("child_functions:hit_rate", out, labels=labels)
    assert number.shape == ()
    assert value == pytest.approx(2 / 3)
    with pytest.raises(DataError, match="broken_metric must return numbers, but raised KeyError"):
        scored("child_functions:broken_metric", out, labels=labels)
    with pytest.raises(DataError, match=r"one number or 3 of them, but got shape \(4,\)"):
        scored("child_functions:wrong_length", out, labels=labels)


def test_drop_is_positive_when_worse_whatever_the_direction():
    assert metrics.get("accuracy").drop(0.8, 0.7) == pytest.approx(0.1)
    assert metrics.get("kl").drop(0.0, 0.1) == pytest.approx(0.1)
    assert metrics.get("sqnr").drop(math.inf, 20.0) == pytest.approx(0.01)
    assert metrics.get("sqnr").drop(30.0, 20.0) == pytest.approx(0.009)
