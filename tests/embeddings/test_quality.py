"""Quality numbers against brute force and cases worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

import featherweight as fw
from featherweight.embeddings import quality, tasks
from featherweight.errors import DataError


def words_of(vectors, names=None):
    table = np.asarray(vectors, np.float32)
    return fw.words.from_arrays(names or [f"w{i}" for i in range(len(table))], table)


def test_cosines_by_hand() -> None:
    one = np.array([[1, 0], [1, 1], [0, 0], [0, 0]], np.float32)
    other = np.array([[2, 0], [1, 0], [0, 0], [1, 0]], np.float32)
    np.testing.assert_allclose(quality.cosines(one, other), [1, 0.5**0.5, 1, 0], rtol=1e-6)


def test_overlap_is_the_share_of_neighbours_that_stay() -> None:
    rng = np.random.default_rng(0)
    a = rng.standard_normal((60, 8)).astype(np.float32)
    b = a + 0.4 * rng.standard_normal((60, 8)).astype(np.float32)
    shares = []
    for i in range(60):
        near = []
        for table in (a, b):
            c = quality.unit(table) @ quality.unit(table)[i]
            c[i] = -9
            near.append(set(np.argsort(-c)[:5].tolist()))
        shares.append(len(near[0] & near[1]) / 5)
    found = quality.overlap(lambda r: a[r], lambda r: b[r], 60, k=5)
    assert (found.name, found.n) == ("neighbours@5", 60)
    assert found.value == pytest.approx(np.mean(shares))
    assert quality.overlap(lambda r: a[r], lambda r: 3 * a[r], 60).value == 1.0


def test_similarity_is_spearmans_on_known_pairs(tmp_path) -> None:
    path = tmp_path / "sim.tsv"
    path.write_text("# comment\na\tb\t9\na\tc\t5\nB\tc\t1\na\tunknown\t7\n")
    table = words_of([[1, 0], [0.9, 0.1], [0.5, 0.5]], ["a", "b", "c"])
    # Cosines: a-b .994, a-c .707, b-c .78: ranks 3, 1, 2 against 3, 2, 1.
    found = quality.similarity(table, path)
    assert (found.n, found.left_out) == (3, 1)
    assert found.value == pytest.approx(0.5)
    path.write_text("a\tb\n")
    with pytest.raises(DataError, match="line 1 must be two words and a score"):
        quality.similarity(table, path)


def test_analogies_are_answered_without_the_words_given(tmp_path) -> None:
    path = tmp_path / "q.txt"
    path.write_text(": plural\nman woman king queen\nman woman king absent\nwoman man queen king\n")
    table = words_of(
        [[1, 0, 0], [1, 1, 0], [0, 0, 1], [0, 1, 1], [5, 5, 5]], ["man", "woman", "king", "queen", "other"]
    )
    found = quality.analogies(table, path)
    assert (found.value, found.n, found.left_out) == (1.0, 2, 1)
    path.write_text("only three words\n")
    with pytest.raises(DataError, match="line 1 must be four words"):
        quality.analogies(table, path)


def test_gensim_agrees_on_its_own_lists() -> None:
    datapath = pytest.importorskip("gensim.test.utils").datapath
    keyed = pytest.importorskip("gensim.models").KeyedVectors
    rng = np.random.default_rng(0)
    from pathlib import Path

    lines = [line.split("\t") for line in Path(datapath("wordsim353.tsv")).read_text().splitlines() if line[0] != "#"]
    names = sorted({w.lower() for a, b, _ in lines for w in (a, b)})[:300]
    vectors = rng.standard_normal((300, 5)).astype(np.float32)
    theirs = keyed(5)
    theirs.add_vectors(names, vectors)
    expected = theirs.evaluate_word_pairs(datapath("wordsim353.tsv"))
    found = quality.similarity(words_of(vectors, names), Path(datapath("wordsim353.tsv")))
    assert found.value == pytest.approx(expected[1][0], abs=1e-3)
    assert found.left_out / (found.n + found.left_out) == pytest.approx(expected[2] / 100, abs=1e-3)


def test_pairs_and_labels_become_tasks(tmp_path) -> None:
    table = words_of([[1, 0], [0, 1], [0.9, 0.1]], ["sea", "sky", "lake"])
    ids_of = tasks.ids_by_word(table)
    assert ids_of(["The Sea, sky!", "nothing"]) == [[0, 1], []]
    pairs = tmp_path / "pairs.tsv"
    pairs.write_text("sentence1\tsentence2\tscore\nsea\tlake\t5\nsea\tsky\t0\nsea sky\tsea\t2\n")
    task = tasks.load_task(pairs, ids_of)
    assert task.metric == "spearman"
    assert task.score(table.rows).value == pytest.approx(1.0)
    labelled, train = tmp_path / "l.tsv", tmp_path / "t.tsv"
    train.write_text("text\tlabel\n" + "sea lake\twater\nsky\tair\n" * 5)
    labelled.write_text("text\tlabel\nlake\twater\nsky sky\tair\nsky\twater\n")
    score = tasks.load_task(labelled, ids_of, train=train).score(table.rows)
    assert score.n == 3
    assert score.value == pytest.approx(2 / 3)
    assert tasks.load_task(train, ids_of).score(table.rows).value == 1.0
    pairs.write_text("sentence1\tsentence2\tscore\na\tb\tx\n")
    with pytest.raises(DataError, match="line 2: the score must be a number, but got 'x'"):
        tasks.load_task(pairs, ids_of)


def test_the_classifier_is_ridge_regression_with_leave_one_out() -> None:
    rng = np.random.default_rng(2)
    x = rng.standard_normal((90, 6)).astype(np.float32)
    labels = (x[:, 0] + 0.3 * rng.standard_normal(90) > 0).astype(np.int64) + (x[:, 1] > 1)
    train = np.arange(90) < 60
    a = np.concatenate([x, np.ones((90, 1))], axis=1).astype(np.float64)
    target = np.eye(3)[labels[train]]
    errors = {}
    for ridge in tasks.RIDGES:
        scale = ridge * 60 / 100 * np.eye(7)
        left = 0.0
        for i in range(60):
            others = np.arange(60) != i
            b = a[:60][others]
            w = np.linalg.solve(b.T @ b + scale, b.T @ target[others])
            left += float(((target[i] - a[i] @ w) ** 2).sum())
        errors[ridge] = left
    best = min(errors, key=errors.get)
    w = np.linalg.solve(a[:60].T @ a[:60] + best * 0.6 * np.eye(7), a[:60].T @ target)
    np.testing.assert_array_equal(tasks.predicted(x, labels, train), (a[60:] @ w).argmax(axis=1))
